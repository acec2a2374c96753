"""The pages one can look at: whole, self-contained, small, safe, and their numbers those of the run."""
import csv
import html
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import MODELS, ROOT
from PIL import Image

import pairing
import train
from data import Tiles
from pairing import confusion_grid, curves, histogram, html_table, write_gallery, write_page

VOID = {"meta", "img"}
REFERENCES = ("src", "href", "xlink:href", "data", "srcset", "action", "poster")


class Page(HTMLParser):
    """A page's text in pieces, its tags and tables. Fails where a tag is not closed in order, where anything would run
    or be fetched, or where the phone's width is not asked for."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.pieces, self.rows, self.links = [], [], [], [], []
        self.source = path.read_text("utf-8")
        assert self.source.startswith("<!DOCTYPE html>") and path.stat().st_size < 3e6
        self.feed(self.source)
        self.close()
        assert not self.open and 'name="viewport"' in self.source and "prefers-color-scheme: dark" in self.source
        assert "script" not in self.tags and not re.search(r"url\(|@import", self.source.split("</style>")[0])

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), (name, value)
            if name in REFERENCES:
                assert value == "pairs.html" or value.startswith("data:image/jpeg;base64,"), value[:80]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):  # <line .../>
        assert {"svg"} & set(self.open)
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, text):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += text
        self.pieces.append(text)

    @property
    def text(self):
        return " ".join("".join(self.pieces).split())


class Made(Tiles):
    """Tiles that are made when they are asked for: coarse noise, which neither JPEG nor shrinking makes small."""

    def __getitem__(self, i):
        noise = np.random.default_rng(i).integers(0, 256, (176, 176, 3), dtype=np.uint8)
        return Image.fromarray(noise).resize((704, 704), Image.Resampling.NEAREST), self.labels[i]


def gallery(folder, tiles, index, reports, similarity=None):
    similarity = torch.linspace(0.9, 0.1, len(index)) if similarity is None else similarity
    write_gallery(folder / "pairs.html", "made", "clip", tiles, torch.as_tensor(index), similarity, reports)
    assert [path.name for path in folder.glob("pairs*")] == ["pairs.html"]  # no temporary file stays
    return Page(folder / "pairs.html")


@pytest.mark.parametrize("classes", [2, 9, 100, 130])
def test_the_gallery_stays_below_3_MB_whatever_the_tiles_and_reports(tmp_path, classes):
    count = 15 * classes
    tiles = Made([f"{'folder/' * 50}{i}.tif" for i in range(count)], [i % classes for i in range(count)],
                 [f"class <{i}> {'x' * 200}" for i in range(classes)])
    reports = [f"{i} " + 'é"&<\n' * 20_000 for i in range(3)]
    page = gallery(tmp_path, tiles, [i % 3 for i in range(len(tiles))], reports)
    shown = page.tags.count("img")
    assert min(classes, 120) * 2 <= shown <= 240 and shown % min(classes, 120) == 0
    assert f"class <{min(classes, 120) - 1}>" in page.text and ("first 120 of 130" in page.text) == (classes == 130)


def test_the_gallery_shows_what_the_pairing_computed(tmp_path):
    """Two classes, three reports of which one is never used."""
    tiles = Made([f"tile{i}.png" for i in range(5)], [0, 0, 0, 1, 1], ["A", "B"])
    similarity = torch.tensor([0.5, 0.75, 0.25, 0.125, 1.0])
    page = gallery(tmp_path, tiles, [2, 2, 0, 2, 2], ["first report", "never", "third report"], similarity)
    figures = re.findall(r"<b>(.*?)</b> · report (.*?)<details><summary>(.*?)</summary>.*?tile (\S+?)</p>", page.source)
    shared = "shared by 4 tiles"
    assert figures == [("0.750", shared, "third report", "tile1.png"), ("0.500", shared, "third report", "tile0.png"),
                       ("0.250", "of this tile alone", "first report", "tile2.png"),
                       ("1.000", shared, "third report", "tile4.png"), ("0.125", shared, "third report", "tile3.png")]
    assert re.findall("<dd>(.*?)</dd>", page.source) == ["5", f"{similarity.mean():.3f}", "2 of 3", "80.0% of the tiles"]
    assert re.findall("<title>(.*?) tiles</title>", page.source) == ["1"] * 5  # five values in five bins
    assert re.findall(r">(\d): (.*?)</text>.*?>([\d.]+%)</text>", page.source) == [
        ("2", "third report", "80.0%"), ("0", "first report", "20.0%")]
    assert not re.search("never", page.text.split("Examples")[1])


def test_text_of_others_is_shown_and_never_interpreted(tmp_path):
    bad = '<script>alert("1")</script>&amp; <img src=x onerror=a> http://nowhere.example'
    tiles = Made([f"{bad}{i}.png" for i in range(4)], [0, 1, 0, 1], [bad, "B"])
    page = gallery(tmp_path, tiles, [0, 1, 0, 1], [bad, "a report " * 100 + bad])
    assert "<script" not in page.source and html.escape(bad) in page.source and page.text.count(bad) >= 4
    write_page(tmp_path / "page.html", bad, bad, confusion_grid([[1, 0], [0, 1]], [bad, "B"], "counts"))
    page = Page(tmp_path / "page.html")
    assert "<script" not in page.source and page.text.count(bad) == 5  # title, heading, lead, row, column


def test_a_histogram_counts_every_value_once():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for some in (values, values[:1], torch.full((7,), 0.3)):
        counts = [int(n) for n in re.findall("<title>(.*?) tiles</title>", histogram(some, "x", "caption"))]
        assert sum(counts) == len(some)
    heights = re.findall(r'height="([\d.]+)"><title>(\d+) ', histogram(values, "x", "caption"))
    ratios = [float(height) / int(n) for height, n in heights if int(n) > 20]
    assert max(ratios) == pytest.approx(min(ratios), rel=0.02)  # a bar is as high as its count


def test_curves_pass_through_their_points_and_their_names_do_not_meet():
    series = {f"s{i}": ("blue", [(1, 1.0), (2, 0.5 + i / 1000), (4, 0.5 + i / 1000)]) for i in range(6)}
    drawn = curves(series, "epoch", "loss", "caption", 0)
    points = [[tuple(map(float, point.split(","))) for point in line.split()]
              for line in re.findall('points="(.*?)"', drawn)]
    for line in points:
        assert [x for x, _ in line] == [25, 50, 100]
        heights = [pairing.HEIGHT - y for _, y in line]
        assert heights[1] / heights[0] == pytest.approx(0.5, abs=0.01)
    places = sorted(float(y) for y in re.findall(r'dx="8" y="([\d.]+)"', drawn))
    assert len(places) == 6 and min(b - a for a, b in zip(places, places[1:])) >= 15
    assert max(places) <= pairing.HEIGHT + 5
    assert "<polyline" in curves({"one": ("ink", [(1, 0.7)])}, "epoch", "loss", "caption")  # a single validation


def test_a_run_writes_both_pages_with_its_own_numbers(argv, capsys):
    metrics = train.main(argv)
    run = argv[argv.index("--dir") + 1] / "tiles" / "r"
    metrics["rows"]["vision head"] |= {"confusion": [[1, 2, 2], [3, 2, 5], [4, 0, 4]], "recall": [0.2, 0.2, 0.5]}
    train.write_report(metrics, run)  # so small a run ends with equal rows: these differ
    pairs, report = Page(run / "pairs.html"), Page(run / "report.html")
    with open(run / "pairs.csv") as file:
        rows = {row["tile"]: row for row in csv.DictReader(file)}
    uses = [row["report"] for row in rows.values()]
    shown = re.findall(r"<b>(.*?)</b> · report (.*?)<details>.*?report (\d+), tile (\S+?)</p>", pairs.source)
    assert len(shown) == 3 * 12
    for similarity, shared, number, tile in shown:
        row = next(row for path, row in rows.items() if path.endswith(tile))
        assert number == row["report"] and float(similarity) == pytest.approx(float(row["similarity"]), abs=6e-4)
        assert shared == (f"shared by {n} tiles" if (n := uses.count(number)) > 1 else "of this tile alone")
    table = {row[0].split(" (")[0]: row[1:] for row in report.rows[1:4]}
    for name, of in metrics["rows"].items():
        assert table[name] == [f"{100 * of[key]:.2f}" for key in train.COLUMNS]
    grids = [row for row in report.rows if row[0] in "ABC"]
    captions = re.findall("<figcaption><b>(.*?)</b>", report.source)
    assert captions == ["CLIP-IT", "vision head"]
    for name, grid in zip(captions, (grids[:3], grids[3:])):
        assert [[int(n or 0) for n in row[1:4]] for row in grid] == metrics["rows"][name]["confusion"]
        assert [row[5] for row in grid] == [f"{recall:.1%}" for recall in metrics["rows"][name]["recall"]]
    assert report.tags.count("polyline") == 7 and 'href="pairs.html"' in report.source
    assert "--lora-r 16 " in report.text and "--sd 0 " in report.text  # a flag that is 0 is set
    assert f"step {metrics['best']['step']} of 6" in report.text


def test_a_run_without_text_has_a_report_and_a_fresh_run_removes_the_old_pages(argv, monkeypatch):
    train.main([*argv, "--no-text"])
    run = argv[argv.index("--dir") + 1] / "tiles" / "r"
    assert Page(run / "report.html").tags.count("polyline") == 3  # training and validation loss, balanced accuracy
    monkeypatch.setattr(train, "cached", None)  # fails in step 1
    with pytest.raises(TypeError):
        train.main([*argv, "--no-text"])
    assert not list(run.glob("*.html"))


def test_undefined_figures_are_dashes(tmp_path):
    grid = confusion_grid([[0, 0], [3, 1]], ["A", "B"], "caption")
    write_page(tmp_path / "page.html", "t", "l", grid, html_table([["", "x"], ["a", "1"]], "caption"))
    assert Page(tmp_path / "page.html").rows == [["true class", "A", "B", "tiles", "recall"], ["A", "", "", "0", "–"],
                                                 ["B", "3", "1", "4", "25.0%"], ["", "x"], ["a", "1"]]
    assert "Too many" in confusion_grid([[1] * 200] * 200, ["c"] * 200, "caption")


def command(argv, cwd):
    return subprocess.run([sys.executable, ROOT / "pairing.py", *map(str, argv)], cwd=cwd, capture_output=True,
                          text=True)


def test_the_command_writes_the_page_of_the_demo_offline(tmp_path):
    done = command(["--ds", "demo", "--limit", 0.05, "--gallery", "pairs.html"], tmp_path)
    assert done.returncode == 0, done.stderr
    page = Page(tmp_path / "pairs.html")
    tiles, used, total, similarity = re.search(r"(\d+) tiles paired with (\d+) of (\d+) reports, mean similarity "
                                               r"([\d.]+):", done.stdout).groups()
    assert re.findall("<dd>(.*?)</dd>", page.source)[:3] == [tiles, similarity, f"{used} of {total}"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs.html", "runs"]  # the features' cache
    first = (tmp_path / "pairs.html").read_bytes()
    assert command(["--limit", 0.05], tmp_path).returncode == 0 and (tmp_path / "pairs.html").read_bytes() == first


def test_the_command_and_train_pair_the_same_and_share_the_cache(argv, world, monkeypatch, capsys):
    train.main(argv)
    monkeypatch.setattr(pairing, "embed_images", None)  # raises if called
    clip = [*argv[:4], *argv[argv.index("--clip-model"):][:2], "--dir", world / "runs", "--worker", 0]
    pairing.main([str(word) for word in [*clip, "--gallery", world / "pairs.html"]])
    assert (world / "pairs.html").read_bytes() == (world / "runs/tiles/r/pairs.html").read_bytes()


@pytest.mark.parametrize("more, word", [
    (["--ds", "no-such"], "no-such"), (["--ds", "{world}/tiles"], "--reports"), (["--reports", "no.txt"], "no.txt"),
    (["--clip-model", "no_such_model"], "quilt"), (["--limit", "2"], "--limit 2"), (["--batch", "0"], "--batch"),
    (["--gallery", "nowhere/pairs.html"], "--gallery nowhere"), (["--gallery", "."], "--gallery .")])
def test_the_command_refuses_bad_input_before_anything_is_written(world, monkeypatch, more, word):
    monkeypatch.chdir(world)
    with pytest.raises((ValueError, OSError)) as refused:
        pairing.main([part.format(world=world) for part in more])
    assert word in str(refused.value) and len(str(refused.value).splitlines()) <= 2
    assert sorted(path.name for path in world.iterdir()) == ["reports.txt", "tiles"]


def test_a_real_process_exits_with_2_and_a_line(world):
    (world / "tiles/train/B/1.png").write_bytes(b"no image")
    data = ["--ds", world / "tiles", "--reports", world / "reports.txt", *MODELS[:2]]
    for argv, word in ((["--ds", "no-such"], "no-such"), (data, "1.png")):
        done = command(argv, world)
        assert done.returncode == 2 and word in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not list(world.glob("pairs*"))


def test_a_write_that_breaks_off_leaves_the_old_page(tmp_path, monkeypatch):
    write_page(tmp_path / "page.html", "old", "lead")

    def stopped(*_):
        raise OSError("full")
    monkeypatch.setattr(pairing.os, "replace", stopped)
    with pytest.raises(OSError):
        write_page(tmp_path / "page.html", "new", "lead")
    assert "old" in (tmp_path / "page.html").read_text()


def test_pairing_alone_pairs_two_tensors(tmp_path):
    """Without data.py the command line says what it lacks; everything else works."""
    (tmp_path / "pairing.py").write_bytes((ROOT / "pairing.py").read_bytes())
    code = "import sys; sys.path = ['.'] + [p for p in sys.path[1:]]; import torch, pairing; " \
           "print(pairing.nearest_text(torch.eye(3), torch.eye(3).flip(0))[0].tolist(), 'open_clip' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "[2, 1, 0] False", done.stderr
    done = subprocess.run([sys.executable, "pairing.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.strip() == "pairing.py: No module named 'data'"
