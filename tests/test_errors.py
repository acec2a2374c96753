"""Bad input: one or two lines that say what is wrong, exit code 2, nothing half-written."""
import runpy
import shutil
import sys

import pytest
from conftest import ROOT, folder_of, write_tiles


@pytest.fixture
def says(argv, said, world):
    """says(more arguments, *words): the run is refused in these words, and leaves no file."""
    def check(more, *words):
        told = said([*argv, *more])
        assert 1 <= len(told.splitlines()) <= 2, told
        for word in words:
            assert str(word) in told, told
        assert not [path for path in (world / "runs").rglob("*") if path.parent.name != "cache"]
    return check


@pytest.mark.parametrize("flag, value, words", [
    ("--lora-r", 0, "expected 1 "), ("--batch", 0, "expected 1 "), ("--lora-alpha", 0, "expected"),
    ("--val-int", 0, "expected"), ("--limit", 2, "0.001 to 0.999"), ("--lr", "nan", "expected"),
    ("--drop-words", 1, "0 to 0.99"), ("--clip", "nan", "expected 0 "), ("--sd", -1, "expected 0 "),
    ("--kd-weight", "inf", "expected 0 "), ("--delta", -1, "expected 0 "), ("--ep", -1, "expected"),
    ("--patience", 0, "expected 1 "), ("--worker", -1, "expected 0 "), ("--sd", "x", "invalid"),
    ("--monitor", "val", "val_loss"), ("--early", 2, "choose from"), ("--no-such", 1, "unrecogni")])
def test_a_flag_out_of_range_is_named(says, flag, value, words):
    says([flag, value], flag, words, "python train.py --help")


@pytest.mark.parametrize("given, words", [
    ("--ds none", "demo"), ("--model none", "UNI"), ("--clip-model none", "quilt"),
    ("--reports none", "authors:"), ("--weights no.pth", "FileNotFoundError"),
    ("--clip-weights no.pth", "--clip-weights FILE"), ("--table none", "no metrics.json"),
    ("--reports one.txt", "1 distinct"), ("--dir one.txt", "one.txt"), ("--wandb", "wandb")])
def test_what_is_not_there_or_cannot_be_used_is_named(says, world, given, words, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    monkeypatch.chdir(world)
    (world / "one.txt").write_text("one\n")
    says(given.split(), *given.split()[1:], words)
    assert (world / "one.txt").read_text() == "one\n"


def test_a_missing_split_and_classes_that_are_missing_or_differ_are_named(says, world):
    tiles, test = world / "tiles" / "train", world / "tiles" / "test"
    (test / "C").rename(test / "D")
    says([], test, "['A', 'B', 'D']", "['A', 'B', 'C']")
    for path in (tiles / "B").iterdir():
        path.unlink()
    says([], tiles, "the classes B.")  # torchvision's words: no valid file
    shutil.rmtree(tiles)
    tiles.mkdir()
    says([], tiles, "[]", "two or more")
    write_tiles(tiles, {"A": 9})
    says([], tiles, "['A']", "two or more")
    for folder in (test, tiles):
        shutil.rmtree(folder)
        says([], "no folder", folder)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_unreadable_tile_is_named_before_any_training(argv, world, split, said):
    path = world / "tiles" / split / "B" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    told = said(argv)
    assert told.startswith(f"train.py: {path}: not a readable image (") and told.count("\n") == 1
    assert {file.name for file in folder_of(argv).iterdir()} == {"args.json", ".lock"}


def test_the_script_itself_ends_with_2_and_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--ds", "nowhere"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert ended.value.code == 2 and "--ds nowhere" in capsys.readouterr().err
