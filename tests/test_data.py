"""Tiles, splits and reports, and those of the demo."""
import json
from collections import Counter

import make_demo
import numpy as np
import pytest
from conftest import DEMO, REPORTS, write_tiles
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor

import train
from data import (TileError, Tiles, draw_shots, load_reports, load_tiles, read_reports,
                  stratified_split, warn_of_repeated_tiles)

LABELS = [0] * 50 + [1] * 17 + [2] * 2 + [3]


def test_splits_and_shots_take_their_share_of_every_class_by_seed():
    kept, held = stratified_split(LABELS, 0.2, seed=42)
    assert sorted(kept + held) == list(range(len(LABELS)))
    assert Counter(LABELS[i] for i in held) == {0: 10, 1: 3, 2: 1}  # a single tile is kept
    drawn = draw_shots(LABELS, 15, seed=42)
    assert Counter(LABELS[i] for i in set(drawn)) == {0: 15, 1: 15, 2: 2, 3: 1}
    assert Counter(LABELS[i] for i in draw_shots(LABELS, 0.2, seed=0)) == {0: 10, 1: 3, 2: 1, 3: 1}
    assert (kept, held) == stratified_split(LABELS, 0.2, 42) != stratified_split(LABELS, 0.2, 43)
    assert drawn == draw_shots(LABELS, 15, seed=42) != draw_shots(LABELS, 15, seed=43)


def test_tiles_are_torchvisions_and_validation_is_val_or_a_fifth_of_the_training_tiles(world):
    write_tiles(world / "two" / "train", {"A": 10, "B": 5})
    write_tiles(world / "two" / "test", {"A": 1, "B": 1})
    for folder, part, trained, validated in (("tiles", "val", 24, [0, 0, 0, 1, 1, 1, 2, 2, 2]),
                                             ("two", "train", 12, [0, 0, 1])):
        tiles, val = (load_tiles(world / folder, split) for split in ("train", "val"))
        theirs = ImageFolder(world / folder / "train")
        assert tiles.classes == theirs.classes and len(tiles) == trained
        kept = [item for item in theirs.samples if item[0] not in val.paths]
        assert list(zip(tiles.paths, tiles.labels)) == kept
        assert val.labels == validated and all(f"/{part}/" in path for path in val.paths)


def test_files_of_other_kinds_and_tiles_that_occur_twice_are_a_line_each(world, capsys):
    folder = world / "tiles" / "train"
    for name in ("A/a.jp2", "A/b.JP2", "B/Thumbs.db"):
        (folder / name).write_text("not read")
    tiles = {split: load_tiles(world / "tiles", split) for split in ("train", "val", "test")}
    warn_of_repeated_tiles(tiles)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 1 and told[0].startswith(f"3 files in {folder} are not CLASS/*.jpg *.jpeg")
    (world / "tiles" / "test" / "A" / "link.png").symlink_to(folder / "B" / "0.png")
    (folder / "C" / "loop").symlink_to(folder / "C")
    tiles = {split: load_tiles(world / "tiles", split) for split in ("train", "test")}
    warn_of_repeated_tiles(tiles)
    repeated = len(tiles["train"]) - 24 + 1  # the loop, as often as it is followed, and the link
    assert repeated > 8 and f"\nwarning: {repeated} of " in capsys.readouterr().out


def test_every_kind_of_image_file_is_read_as_rgb_and_unknown_ranges_are_refused(tmp_path):
    for kind in ("jpg L", "tif RGB", "png RGBA", "bmp P", "PNG LA"):
        suffix, mode = kind.split()
        Image.new("L", (5, 4), 90).convert(mode).save(tmp_path / f"tile.{suffix}")
        image, _ = Tiles([tmp_path / f"tile.{suffix}"], [0], ["A"])[0]
        assert image.getcolors() == [(20, (90, 90, 90))]
    levels = np.array([[0, 257, 32_768, 65_535]], "uint16")  # scaled to 8 bits
    Image.fromarray(levels).save(tmp_path / "little.png")
    Image.frombytes("I;16B", (4, 1), levels.astype(">u2").tobytes()).save(tmp_path / "big.tif")
    for name in ("little.png", "big.tif"):
        image, _ = Tiles([tmp_path / name], [0], ["A"])[0]
        assert image.tobytes() == b"\0\0\0\1\1\1\x80\x80\x80\xff\xff\xff"
    for mode in ("F", "I"):
        Image.new(mode, (4, 1), 1).save(tmp_path / "tile.tif")
        with pytest.raises(TileError, match=f"tile.tif: .*pixels of mode {mode}.* as 8 bits"):
            Tiles([tmp_path / "tile.tif"], [0], ["A"])[0]


@pytest.mark.parametrize("spoiled, workers", [
    (b"\x89PNG\r\n\x1a\n", 0), (b"text", 1), (b"", 0), (b"P6 8 8 ff", 0)])
def test_an_unreadable_tile_is_a_line_with_its_path(spoiled, workers, world):
    tiles = load_tiles(world / "tiles", "train", transform=PILToTensor())
    path = world / "tiles" / "train" / "A" / "0.png"
    path.write_bytes(spoiled)
    batches = iter(DataLoader(tiles, 4, num_workers=workers))
    with pytest.raises(TileError) as refused:
        next(batches)
    words = str(refused.value)
    assert words.startswith(f"{path}: not a readable image") and "\n" not in words
    if workers:  # left to Python, their end takes five seconds
        batches._shutdown_workers()


def test_reports_are_read_alike_from_every_kind_of_file_with_their_places(tmp_path):
    (tmp_path / "r.TXT").write_text("\n\n  ".join(REPORTS) + " \r\n\n", "utf-8-sig")
    rows = "".join(f'7,"{text}"\n' for text in REPORTS)
    (tmp_path / "r.CSV").write_text(f"id,text\n{rows}", "utf-8-sig")
    (tmp_path / "r.JSONL").write_text("\n\n".join(json.dumps({"text": text}) for text in REPORTS))
    for i, text in enumerate(REPORTS):
        file = tmp_path / "cases" / ("a.txt", f"b/{i:02d}.TXT")[i > 0]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.replace(" ", "\n", 1))
    for place in ("r.TXT line 3", "r.CSV row 3", "r.JSONL line 3", "cases/b/01.TXT"):
        source = tmp_path / place.split("/")[0].split()[0]
        assert list(read_reports(source)) == load_reports(source) == REPORTS
        assert read_reports(source)[REPORTS[1]] == place


def test_reports_may_be_long_hold_newlines_and_be_equal_or_empty(tmp_path, capsys):
    (tmp_path / "r.txt").write_text("adenoma\n\n ileum \nadenoma\nileum\ncolon\n")
    assert read_reports(tmp_path / "r.txt") == {
        "adenoma": "r.txt line 1", "ileum": "r.txt line 3", "colon": "r.txt line 6"}
    assert "r.txt: 3 reports, 3 empty or equal left out" in capsys.readouterr().out
    (tmp_path / "r.csv").write_text('text\n"' + "tumour\n" * 40_000 + '"\nshort\n')
    assert load_reports(tmp_path / "r.csv") == [("tumour\n" * 40_000).strip(), "short"]
    (tmp_path / "r.jsonl").write_text('{"text": "a\u2028b"}\n{"text": "c"}')
    assert load_reports(tmp_path / "r.jsonl") == ["a\u2028b", "c"]


@pytest.mark.parametrize("name, content, told", [
    ("utf16.txt", "colon\nileum\n".encode("utf-16"), "expected UTF-8"),
    ("zero.txt", b"a\0b\nc\n", "zero byte"), ("empty.txt", b"", "0 distinct"),
    ("equal.txt", b"same\nsame\n", "1 distinct"),
    ("header.csv", b"id,report\n1,a\n2,b\n", "KeyError"),
    ("commas.csv", b"id,text\n1,colon\n2,ileum, or not\n", "row 3 has more cells than row 1"),
    ("short.csv", b"id,text\n1,colon\n2\n", "from short.csv row 3 on: None"),
    ("quote.csv", b'text\ncolon\n"ileum\njejunum\n', "unexpected end of data"),
    ("null.jsonl", b'{"text": "colon"}\n{"text": null}\n', "from null.jsonl line 2 on: None"),
    ("cut.jsonl", b'{"text": "colon"}\n{"text": "il', "JSONDecodeError"),
    ("r.tsv", b"text\na\nb\n", "expected .txt"), ("r.json", b'["a", "b"]', "expected .txt")])
def test_bad_reports_are_one_line_with_the_path(name, content, told, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileNotFoundError if told == "expected .txt" else ValueError) as refused:
        load_reports(tmp_path / name)
    said = str(refused.value)
    assert str(tmp_path / name) in said and told in said and "\n" not in said


# ---- The demo's assets are what make_demo.py makes from its seeds --------------------------------

@pytest.mark.parametrize("split, kind, index", [
    ("train", "NORM", 3), ("val", "MUS", 0), ("test", "TUM", 99), ("test", "LYM", 7)])
def test_a_tile_is_painted_again_from_its_seed(split, kind, index):
    stored = Image.open(DEMO / split / kind / f"{index:03d}.jpg").convert("RGB")

    def distance(seed):
        painted = np.asarray(make_demo.render_tile(kind, seed), dtype=float)
        return np.abs(painted - np.asarray(stored)).mean()
    seed = make_demo.tile_seed(split, kind, index)
    assert distance(seed) < 6 < 12 < distance(seed + 1)  # JPEG's loss; another tile


def test_the_reports_are_written_again_from_their_seeds_and_name_no_class():
    reports = load_reports(DEMO / "reports.txt")
    seeds = range(make_demo.REPORT_SEED, make_demo.REPORT_SEED + make_demo.REPORTS)
    assert reports == [make_demo.write_report(seed) for seed in seeds]
    assert not [kind for kind in make_demo.KINDS if kind in " ".join(reports)]


def test_no_case_serves_two_purposes_and_the_demo_is_small():
    seeds = [make_demo.tile_seed(split, kind, i) for split, count in make_demo.SPLITS.items()
             for kind in make_demo.KINDS for i in range(count)]
    seeds += range(make_demo.PAIR_SEED, make_demo.PAIR_SEED + make_demo.PAIRS)
    seeds += range(make_demo.REPORT_SEED, make_demo.REPORT_SEED + make_demo.REPORTS)
    assert len(seeds) == len(set(seeds))
    files = [path.read_bytes() for path in DEMO.rglob("*.jpg")]
    assert len(files) == len(set(files)) == 9 * sum(make_demo.SPLITS.values())
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) <= 12e6


def test_the_main_command_runs_on_the_demo(tmp_path, monkeypatch):
    monkeypatch.setattr(train.train_head, "__defaults__", (500, 20))
    metrics = train.main(["--dir", tmp_path, "--shots", 4, "--ep", 1, "--batch", 18])
    assert metrics["test_tiles"] == 900 and metrics["classes"] == list(make_demo.KINDS)
    # far above chance after four tiles a class
    assert metrics["rows"]["vision head"]["balanced_accuracy"] > 2 / 9
