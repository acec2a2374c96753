"""A small world that the tests share: tiles of three kinds, reports, and the demo's two models."""
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)  # the models are so small that a second thread costs more than it gives

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
DEMO = ROOT / "tests" / "demo"
MODELS = ["--clip-model", f"local-dir:{DEMO}/clip", "--model", f"local-dir:{DEMO}/backbone"]
REPORTS = (DEMO / "reports.txt").read_text().splitlines()[:12]


def write_tiles(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    """folder/CLASS/*.png of 48 x 48 pixels, each class with a colour of its own under noise."""
    generator = np.random.default_rng(seed)
    for kind, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            noise = generator.integers(0, 120, (48, 48, 3))
            noise[..., kind % 3] += 60
            Image.fromarray(noise.astype("uint8")).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(autouse=True)
def short_heads(monkeypatch):
    """Whole runs are fast: the heads take up to 60 steps here, where a real run takes 12,500."""
    import train
    monkeypatch.setattr(train.train_head, "__defaults__", (60, 20))


@pytest.fixture(autouse=True)
def signals_of_its_own():
    """A command line sets handlers; the next test begins with Python's."""
    import train
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    train.SIGNALS.clear()


@pytest.fixture
def world(tmp_path) -> Path:
    """tiles/{train,val,test}/{A,B,C}/*.png, three kinds of the demo's tissue, and reports.txt."""
    first = 0
    for split, count in (("train", 8), ("val", 3), ("test", 5)):
        for name, kind in (("A", "ADI"), ("B", "LYM"), ("C", "STR")):
            folder = tmp_path / "tiles" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                tile = Image.open(DEMO / "test" / kind / f"{first + i:03d}.jpg")
                tile.save(folder / f"{i}.png")
        first += count
    (tmp_path / "reports.txt").write_text("\n".join(REPORTS) + "\n")
    return tmp_path


@pytest.fixture
def argv(world) -> list:
    """A run on that world: two epochs of three steps."""
    return ["--ds", world / "tiles", "--reports", world / "reports.txt", *MODELS,
            "--dir", world / "runs", "--run", "r", "--batch", 8, "--ep", 2, "--worker", 0]
