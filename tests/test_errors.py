"""Bad input: one or two lines that say what is wrong, exit code 2, nothing half-written."""
import runpy
import shutil
import sys

import pytest
from conftest import ROOT, folder_of, write_tiles

import train


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


@pytest.mark.parametrize("flag, value, choice", [
    ("--ds", "none", "demo"), ("--model", "none", "UNI"), ("--clip-model", "none", "quilt"),
    ("--reports", "none", "authors:"), ("--weights", "no.pth", "FileNotFoundError"),
    ("--clip-weights", "no.pth", "--clip-weights FILE"), ("--table", "none", "no metrics.json")])
def test_what_is_not_there_is_named_with_the_choices(says, flag, value, choice):
    says([flag, value], f"{flag} {value}", choice)


def test_a_missing_split_is_named(says, world):
    shutil.rmtree(world / "tiles" / "test")
    says([], "no folder", world / "tiles" / "test")
    shutil.move(world / "tiles" / "train", world / "tiles" / "test")
    says([], "no folder", world / "tiles" / "train")


def test_classes_that_are_missing_or_differ_are_named(says, world):
    (world / "tiles" / "test" / "C").rename(world / "tiles" / "test" / "D")
    says([], world / "tiles" / "test", "['A', 'B', 'D']", "['A', 'B', 'C']")
    train_folder = world / "tiles" / "train"
    for path in (train_folder / "B").iterdir():
        path.unlink()
    says([], train_folder, "the classes B.")  # torchvision's words: no valid file
    shutil.rmtree(train_folder)
    train_folder.mkdir()
    says([], train_folder, "[]", "two or more")
    write_tiles(train_folder, {"A": 9})
    says([], train_folder, "['A']", "two or more")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_unreadable_tile_is_named_before_any_training(argv, world, split, said):
    path = world / "tiles" / split / "B" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    told = said(argv)
    assert told.startswith(f"train.py: {path}: not a readable image (") and told.count("\n") == 1
    assert {file.name for file in folder_of(argv).iterdir()} == {"args.json", ".lock"}


def test_an_output_folder_that_cannot_be_written_is_named(says, world):
    (world / "file").write_text("in the way")
    says(["--dir", world / "file"], world / "file")
    assert (world / "file").read_text() == "in the way"


def test_wandb_that_is_not_installed_is_one_line(says, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    says(["--wandb"], "wandb")


def test_reports_that_cannot_be_used_are_named(says, world):
    (world / "bad.txt").write_text("one\n")
    says(["--reports", world / "bad.txt"], world / "bad.txt", "1 distinct")


def test_a_kept_folder_of_the_name_of_a_data_set_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    train.parse_args([])
    assert "not the folder" in capsys.readouterr().out


def test_the_script_itself_ends_with_2_and_no_traceback(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--ds", "nowhere"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    assert ended.value.code == 2 and "--ds nowhere" in capsys.readouterr().err
