"""The demo's assets are what the script makes from its seeds; what should be apart is apart."""
import make_demo
import numpy as np
import pytest
from conftest import DEMO
from PIL import Image

import train
from data import load_reports


@pytest.mark.parametrize("split, kind, index", [
    ("train", "NORM", 3), ("train", "ADI", 70), ("val", "MUS", 0), ("test", "TUM", 99),
    ("test", "MUC", 41), ("test", "LYM", 7)])
def test_a_tile_is_painted_again_from_its_seed(split, kind, index):
    stored = Image.open(DEMO / split / kind / f"{index:03d}.jpg").convert("RGB")

    def distance(seed):
        painted = np.asarray(make_demo.render_tile(kind, seed), dtype=float)
        return np.abs(painted - np.asarray(stored)).mean()
    seed = make_demo.tile_seed(split, kind, index)
    # grey levels of 255: JPEG's loss against another tile
    assert distance(seed) < 6 < 12 < distance(seed + 1)


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
