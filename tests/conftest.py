"""A small world of tiles, reports and the demo's two models, and runs of train.py on it."""
import contextlib
import csv
import io
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

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

import train  # noqa: E402
from pairing import load_clip  # noqa: E402

# Whole runs are fast: their heads take up to 60 steps, where a real run's take 12,500
train.train_head.__defaults__ = HEADS = (60, 20)


@pytest.fixture(autouse=True)
def signals_of_its_own():
    """A command line sets handlers; the next test begins with Python's."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    train.SIGNALS.clear()


# ---- Tiles and reports --------------------------------------------------------------------------

def write_tiles(folder: Path, counts: dict[str, int]) -> Path:
    """folder/CLASS/*.png of 48 x 48 pixels, each of a colour of its own."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (48, 48), (9 * i, 50, len(name))).save(folder / name / f"{i}.png")
    return folder


def write_world(folder: Path) -> Path:
    """tiles/{train,val,test}/{A,B,C}/*.png, three kinds of the demo's tissue, and reports.txt."""
    first = 0
    for split, count in (("train", 8), ("val", 3), ("test", 5)):
        for name, kind in (("A", "ADI"), ("B", "LYM"), ("C", "STR")):
            (folder / "tiles" / split / name).mkdir(parents=True)
            for i in range(count):
                tile = Image.open(DEMO / "test" / kind / f"{first + i:03d}.jpg")
                tile.save(folder / "tiles" / split / name / f"{i}.png")
        first += count
    (folder / "reports.txt").write_text("\n".join(REPORTS) + "\n")
    return folder


def argv_of(world: Path) -> list:
    """A run on that world: two epochs of three steps."""
    return ["--ds", world / "tiles", "--reports", world / "reports.txt", *MODELS,
            "--dir", world / "runs", "--run", "r", "--batch", 8, "--ep", 2, "--worker", 0]


@pytest.fixture
def world(tmp_path) -> Path:
    return write_world(tmp_path)


@pytest.fixture
def argv(world) -> list:
    return argv_of(world)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> SimpleNamespace:
    """A run that has ended, for tests that leave it and its world as they are: argv, metrics, what
    it printed and its folder."""
    argv = argv_of(write_world(tmp_path_factory.mktemp("finished")))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        metrics = train.main(argv)
    return SimpleNamespace(argv=argv, metrics=metrics, printed=printed.getvalue(),
                           folder=folder_of(argv))


class Hostile:
    """An object whose unpickling runs code."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


# ---- Runs and what they leave; of a flag that is given twice the last one counts ----------------

def folder_of(argv) -> Path:
    args = train.parse_args(argv)
    return Path(args.dir, args.output, args.run)


def bytes_of(argv) -> bytes:
    return (folder_of(argv) / "metrics.json").read_bytes()


def files_of(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def log_of(argv) -> list:
    return [json.loads(line) for line in open(folder_of(argv) / "log.jsonl")]


def rows_of(argv, name) -> list:
    with open(folder_of(argv) / name) as file:
        return list(csv.DictReader(file))


def clip_of(argv):
    return load_clip(train.parse_args(argv).clip_model)


def model_of(argv):
    """The model that a run begins step 4 with; the run ends there."""
    with patch.object(train, "train_clipit", side_effect=InterruptedError) as step_4:
        with pytest.raises(InterruptedError):
            train.main(argv)
    return step_4.call_args.args[0]


@pytest.fixture
def said(monkeypatch, capsys):
    """said(argv, code): what train.py says on stderr when it ends with that exit code."""
    def said_by_cli(argv, code=2):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
        with pytest.raises(SystemExit) as ended:
            train.cli()
        words = capsys.readouterr().err
        assert ended.value.code == code and "Traceback" not in words
        return words
    return said_by_cli


@pytest.fixture
def validations(monkeypatch):
    """validations(key, values): they find these values for that key, one after another."""
    def found(key, values):
        values, validate = iter(values), train.validate
        monkeypatch.setattr(train, "validate", lambda *args: validate(*args) | {key: next(values)})
    return found
