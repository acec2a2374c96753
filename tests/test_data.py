"""Tiles, splits and reports."""
import json

import pytest
import torch
from conftest import REPORTS, write_tiles
from PIL import Image

from data import draw_shots, find_bad_tiles, load_reports, load_tiles, stratified_split

LABELS = [0] * 50 + [1] * 17 + [2] * 2 + [3]


def test_a_stratified_split_takes_its_share_of_every_class():
    kept, held = stratified_split(LABELS, 0.2, seed=42)
    assert sorted(kept + held) == list(range(len(LABELS)))
    assert [sum(LABELS[i] == c for i in held) for c in range(4)] == [10, 3, 1, 0]  # a single tile is kept
    assert stratified_split(LABELS, 0.2, seed=42) == (kept, held) != stratified_split(LABELS, 0.2, seed=43)


def test_shots_draw_that_many_tiles_of_every_class_and_other_ones_for_another_seed():
    drawn = draw_shots(LABELS, 15, seed=0)
    assert [sum(LABELS[i] == c for i in drawn) for c in range(4)] == [15, 15, 2, 1]
    assert drawn == draw_shots(LABELS, 15, seed=0) != draw_shots(LABELS, 15, seed=1)


def test_tiles_are_in_order_of_class_and_file_name(world):
    tiles = load_tiles(world / "tiles", "train")
    assert tiles.classes == ["A", "B", "C"] and tiles.labels == [0] * 8 + [1] * 8 + [2] * 8
    assert tiles.paths == sorted(tiles.paths)
    image, label = tiles[9]
    assert isinstance(image, Image.Image) and image.mode == "RGB" and label == 1


def test_a_folder_without_val_holds_out_a_fifth_of_its_training_tiles(world, tmp_path):
    own_val = load_tiles(world / "tiles", "val").paths
    assert all("/val/" in path for path in own_val)
    write_tiles(tmp_path / "two" / "train", {"A": 10, "B": 5})
    write_tiles(tmp_path / "two" / "test", {"A": 1, "B": 1})
    train, val = (load_tiles(tmp_path / "two", split) for split in ("train", "val"))
    assert (len(train), len(val), val.labels) == (12, 3, [0, 0, 1])
    assert not set(train.paths) & set(val.paths)


def test_val_int_holds_out_that_share_of_the_training_tiles(world):
    train, val = (load_tiles(world / "tiles", split, val_fraction=0.25) for split in ("train", "val"))
    assert (len(train), len(val)) == (18, 6) and not any("/val/" in path for path in val.paths)


def test_every_kind_of_image_file_is_read_as_rgb(tmp_path):
    for name, mode in (("a.jpg", "L"), ("b.tif", "RGB"), ("c.png", "RGBA"), ("d.png", "P"), ("e.PNG", "LA")):
        for split in ("train", "test"):
            for kind in "AB":
                folder = tmp_path / split / kind
                folder.mkdir(parents=True, exist_ok=True)
                Image.new(mode, (5, 4)).save(folder / name)
                (folder / "Thumbs.db").write_text("not a tile")
    tiles = load_tiles(tmp_path, "test")
    assert len(tiles) == 10 and {image.mode for image, _ in tiles} == {"RGB"} and find_bad_tiles(tiles) == {}


def test_unreadable_tiles_are_found_by_name(world):
    tiles = load_tiles(world / "tiles", "train")
    whole = open(tiles.paths[4], "rb").read()
    open(tiles.paths[4], "wb").write(whole[:len(whole) // 2])
    open(tiles.paths[7], "w").write("text")
    for workers in (0, 3):
        bad = find_bad_tiles(tiles, workers)
        assert set(bad) == {4, 7} and all(tiles.paths[i] in message for i, message in bad.items())


def test_reports_are_read_alike_from_every_kind_of_file(tmp_path):
    (tmp_path / "r.txt").write_text("\n\n  ".join(REPORTS) + " \r\n\n")
    (tmp_path / "r.csv").write_text('id,text\n' + "\n".join(f'{i},"{text}"' for i, text in enumerate(REPORTS)))
    (tmp_path / "r.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in REPORTS) + "\n\n")
    (tmp_path / "folder").mkdir()
    for i, text in enumerate(REPORTS):
        (tmp_path / "folder" / f"{i:02d}.txt").write_text(text.replace(" ", "\n", 1))
    for name in ("r.txt", "r.csv", "r.jsonl", "folder"):
        assert load_reports(tmp_path / name) == REPORTS


def test_a_report_of_a_csv_may_be_long_and_hold_newlines(tmp_path):
    (tmp_path / "r.csv").write_text('text\n"' + "tumour\n" * 40_000 + '"\nshort\n')
    assert [len(report) for report in load_reports(tmp_path / "r.csv")] == [7 * 40_000 - 1, 5]


def test_threads_and_workers_give_the_same_tiles(world):
    tiles = load_tiles(world / "tiles", "train", transform=lambda image: torch.tensor(list(image.tobytes())))
    alone = [image for image, _ in tiles]
    for (images, _), expected in zip(torch.utils.data.DataLoader(tiles, 1, num_workers=2), alone):
        assert torch.equal(images[0], expected)
