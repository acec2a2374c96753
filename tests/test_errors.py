"""Bad input: one or two lines that say what is wrong, exit code 2, nothing half-written."""
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, write_tiles
from test_train import run_folder, said_by_cli

import train


@pytest.fixture
def says(argv, capsys, monkeypatch, world):
    """says(more arguments, *words): the run is refused in these words, and leaves no file."""
    def check(more, *words):
        said = said_by_cli([*argv, *more], monkeypatch, capsys)
        assert 1 <= len(said.splitlines()) <= 2, said
        for word in words:
            assert str(word) in said, said
        assert not [path for path in (world / "runs").rglob("*") if path.parent.name != "cache"]
    return check


@pytest.mark.parametrize("flag, value, words", [
    ("--lora-r", 0, "1 to 1e+09"), ("--batch", 0, "1 to 1e+09"), ("--val-int", 0, "1e-09 to"),
    ("--lora-alpha", 0, "1e-09 to"), ("--limit", 2, "0.001 to 0.999"), ("--lr", "nan", "1e-09 to"),
    ("--drop-words", 1, "0 to 0.99"), ("--clip", "nan", "0 to 1e+09"), ("--sd", -1, "0 to 1e+09"),
    ("--kd-weight", "inf", "0 to 1e+09"), ("--delta", -1, "0 to 1e+09"), ("--ep", -1, "0 to 1e+09"),
    ("--patience", 0, "1 to 1e+09"), ("--worker", -1, "0 to 1e+09"), ("--sd", "x", "invalid number"),
    ("--monitor", "val", "val_loss"),
    ("--early", 2, "choose from"), ("--no-such-flag", 1, "unrecognized")])
def test_a_flag_out_of_range(says, flag, value, words):
    says([flag, value], flag, words, "python train.py --help")


@pytest.mark.parametrize("flag, choice", [("--ds", "demo"), ("--model", "UNI"),
                                          ("--clip-model", "quilt"), ("--reports", "authors:")])
def test_an_unknown_name_lists_the_choices(says, flag, choice):
    says([flag, "no-such"], f"{flag} no-such", choice)


def test_a_missing_split(says, world):
    shutil.rmtree(world / "tiles" / "test")
    says([], "no folder", world / "tiles" / "test")
    shutil.move(world / "tiles" / "train", world / "tiles" / "test")
    says([], "no folder", world / "tiles" / "train")


def test_classes_that_are_missing_or_differ(says, world):
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


@pytest.mark.parametrize("split, workers", [("train", 0), ("val", 2), ("test", 0)])
def test_an_unreadable_tile_is_named_before_any_training(argv, world, split, workers, monkeypatch,
                                                         capsys):
    path = world / "tiles" / split / "B" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    said = said_by_cli([*argv, "--worker", workers], monkeypatch, capsys)
    assert said.startswith(f"train.py: {path}: not a readable image (") and said.count("\n") == 1
    assert [file.name for file in run_folder(argv).iterdir() if file.name != ".lock"] == ["args.json"]


@pytest.mark.parametrize("name, content, words", [
    ("bad.txt", b"", "0 distinct"), ("bad.txt", b"one\n", "1 distinct"),
    ("bad.txt", b"same\nsame\n", "1 distinct"), ("bad.txt", b"a\0b\nc\n", "zero bytes"),
    ("bad.txt", b"\xff\xfe\x00report\n", "not UTF-8"),
    ("bad.csv", b"id,report\n1,a\n2,b\n", "a column `text` (KeyError"),
    ("bad.jsonl", b'{"text": "a"}\n{"text"\n', "JSONDecodeError")])
def test_reports_that_cannot_be_used(says, world, name, content, words):
    (world / name).write_bytes(content)
    says(["--reports", world / name], world / name, words)


@pytest.mark.parametrize("flag", ["--weights", "--clip-weights"])
def test_weights_that_cannot_be_used(says, world, flag):
    torch.save({"blocks.0.other": torch.zeros(1)}, world / "other.pth")
    (world / "text.pth").write_text("not a checkpoint")
    torch.save({"model": object}, world / "code.pth")
    says([flag, world / "no.pth"], flag, world / "no.pth")
    says([flag, world / "other.pth"], world / "other.pth", "Missing key")  # what does not fit
    says([flag, world / "text.pth"], world / "text.pth")
    says([flag, world / "code.pth"], world / "code.pth")


def test_an_output_folder_that_cannot_be_written(says, world):
    (world / "file").write_text("in the way")
    says(["--dir", world / "file"], world / "file")
    assert (world / "file").read_text() == "in the way"


def test_a_run_folder_that_holds_another_configuration_is_left_as_it_is(argv, capsys, monkeypatch):
    def files():
        return {path: path.read_bytes() for path in run_folder(argv).rglob("*") if path.is_file()}
    train.main(argv)
    before = files()
    said = said_by_cli([*argv, "--lora-r", 4], monkeypatch, capsys)
    assert "another configuration" in said and "lora_r 16 there, 4 now" in said and "--run" in said
    said = said_by_cli([*argv, "--lr", 0.01], monkeypatch, capsys)
    assert "lr 0.001 there, 0.01 now" in said
    assert files() == before
    (run_folder(argv) / "metrics.json").write_bytes(b"")
    assert "metrics.json" in said_by_cli(argv, monkeypatch, capsys)


def test_no_finished_runs_to_put_in_a_table(capsys, monkeypatch, tmp_path):
    assert "no metrics.json" in said_by_cli(["--table", tmp_path], monkeypatch, capsys)


def test_a_real_process_exits_with_2_and_no_traceback():
    command = [sys.executable, "train.py", "--ds", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) <= 2
