"""report.html: one whole, self-contained, small and safe page; its figures are those of the run."""
import html
import json
import re
from html.parser import HTMLParser
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import REPORTS, folder_of, log_of, rows_of
from PIL import Image

import data
import train


class Page(HTMLParser):
    """A page's text, tags and table. Fails where anything would run or be fetched."""

    def __init__(self, folder):
        super().__init__()
        self.tags, self.text, path = [], "", folder / "report.html"
        self.source = path.read_text("utf-8")
        assert self.source.startswith("<!DOCTYPE html>") and path.stat().st_size < 3e6
        self.feed(self.source)
        assert "script" not in self.tags and not re.search(r"url\(|@import", self.source)
        self.rows = [[html.unescape(cell) for cell in re.findall("<t[hd][^>]*>([^<]*)", row)]
                     for row in self.source.split("<tr>")[1:]]

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on") and name not in ("href", "srcset", "action"), name
            assert name != "src" or value.startswith("data:image/jpeg;base64,"), value[:80]

    def handle_data(self, text):
        self.text += text


def test_the_page_shows_the_figures_of_the_run_and_its_pairs(finished):
    page = Page(finished.folder)
    pairs = {row["tile"]: row for row in rows_of(finished.argv, "pairs.csv")}
    assert train.results(finished.metrics) in page.text
    assert all(train.shown(line) in page.text for line in log_of(finished.argv))
    counts = [[int(count) for count in row[1:]] for row in page.rows[1:]]
    assert page.rows[0] == ["true \\ predicted", "A", "B", "C"]
    assert counts == finished.metrics["rows"]["CLIP-IT"]["confusion"]
    shown = re.findall(r"<b>(.*?)</b> report (\d+): (.*?)<br>(.*?)</p>", page.source)
    assert len(shown) == page.tags.count("img") == 3 * 4  # four tiles of each class
    for similarity, number, text, tile in shown:
        row = pairs[html.unescape(tile)]
        assert row["split"] == "train" and row["report"] == number
        assert similarity == f"{float(row['similarity']):.3f}"
        assert html.unescape(text) == REPORTS[int(number)][:500]
    assert json.loads(page.text.rpartition("Flags")[2])["config"]["lora_r"] == 16


def test_text_of_others_is_shown_and_never_interpreted(argv, world):
    bad = '<script>alert("1")<!-- &amp; <img src=x onerror=a> http:'
    for split in ("train", "val", "test"):
        (world / "tiles" / split / "A").rename(world / "tiles" / split / bad)
    (world / "reports.txt").write_text(f"{bad} one\n{bad} two\n")
    argv += ["--run", bad, "--ep", 0]
    with patch.object(train, "train_head", None), pytest.raises(TypeError):
        train.main(argv)
    assert not Page(folder_of(argv)).rows  # after the pairing
    train.main(argv)
    page = Page(folder_of(argv))
    assert page.rows[0][1] == page.rows[1][0] == bad  # the names of a column and a row
    assert page.text.count(bad) > 12 and html.escape(f"tiles/{bad}") in page.source


def test_the_page_stays_small_whatever_the_tiles_and_reports(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    monkeypatch.setattr(data, "read_tile", lambda path: Image.fromarray(noise))
    tiles = data.Tiles(["folder/" * 50] * 1500, [i % 100 for i in range(1500)], ["x" * 200] * 100)
    (tmp_path / "args.json").write_text("{}")
    train.write_page(tmp_path, tiles, [0] * 1500, torch.rand(1500), {'é"&<\n' * 20_000: "a.txt"})
    assert Page(tmp_path).tags.count("img") == 40 * 4  # of the first classes
