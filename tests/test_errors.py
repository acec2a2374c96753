"""Bad input: one or two lines that say what is wrong, exit code 2, no traceback, nothing half-written."""
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, write_tiles

import train


def refused(argv, capsys, monkeypatch):
    """What train.py says on stderr when it refuses these arguments."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        train.cli()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said
    lines = [line for line in said.splitlines() if not line.startswith("usage") and not line.startswith("    ")]
    assert 1 <= len(lines) <= 2, said
    return said


def replaced(argv, flag, value):
    argv = list(argv)
    argv[argv.index(flag) + 1] = value
    return argv


@pytest.fixture
def says(argv, capsys, monkeypatch, world):
    """says(more arguments, *words): the run is refused, the words are in what it says, and no run folder is left."""
    def check(more, *words, base=argv):
        said = refused([*base, *more], capsys, monkeypatch)
        for word in words:
            assert str(word) in said, said
        assert not list(world.glob("runs/**/*.tmp")) and not list(world.glob("runs/tiles/r/*"))
    return check


def test_an_unknown_data_set_lists_the_choices(says, argv):
    says([], "--ds no-such", "demo", base=replaced(argv, "--ds", "no-such"))


def test_a_missing_folder_or_split(says, argv, world):
    says([], "neither a folder", base=replaced(argv, "--ds", world / "nowhere"))
    shutil.rmtree(world / "tiles" / "test")
    says([], world / "tiles" / "test", "missing")
    shutil.move(world / "tiles" / "train", world / "tiles" / "test")
    says([], world / "tiles" / "train", "missing")


def test_a_folder_without_class_folders_or_with_a_single_class(says, world):
    shutil.rmtree(world / "tiles" / "train")
    (world / "tiles" / "train").mkdir()
    says([], "no class folders", world / "tiles" / "train")
    write_tiles(world / "tiles" / "train", {"A": 9})
    says([], "a single class (A)")


def test_other_classes_in_test_than_in_train(says, world):
    (world / "tiles" / "test" / "C").rename(world / "tiles" / "test" / "D")
    says([], "classes differ", "'D'", "'C'", world / "tiles" / "test")


def test_an_empty_class(says, world):
    for path in (world / "tiles" / "train" / "B").iterdir():
        path.unlink()
    says([], "no image in class B")


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_an_unreadable_tile_is_named_and_skip_bad_goes_on_without_it(says, argv, world, split, capsys):
    path = world / "tiles" / split / "B" / "1.png"
    path.write_bytes(path.read_bytes()[:200])
    says([], path, "--skip-bad")
    train.main([*argv, "--skip-bad"])
    printed = capsys.readouterr().out
    assert f"1 unreadable {split} tile" in printed and str(path) in printed
    assert str(path) not in (world / "runs" / "tiles" / "r" / "pairs.csv").read_text()


def test_reports_that_cannot_be_used(says, argv, world):
    says([], "no such file", base=replaced(argv, "--reports", world / "no.txt"))
    for content, word in ((b"", "0 distinct"), (b"one report\n", "1 distinct"), (b"same\nsame\n", "1 distinct"),
                          (b"\xff\xfe\x00report\n", "not readable as UTF-8"), (b"a\0b\nc\n", "zero bytes")):
        (world / "bad.txt").write_bytes(content)
        says([], word, world / "bad.txt", base=replaced(argv, "--reports", world / "bad.txt"))
    (world / "bad.csv").write_text("id,report\n1,a\n2,b\n")
    says([], "no column `text`", "id, report", base=replaced(argv, "--reports", world / "bad.csv"))
    (world / "bad.jsonl").write_text('{"text": "a"}\n{"text"\n')
    says([], world / "bad.jsonl", base=replaced(argv, "--reports", world / "bad.jsonl"))


def test_an_unknown_model(says, argv):
    says([], "--model no_such_model", "choose", base=replaced(argv, "--model", "no_such_model"))
    says([], "--clip-model no_such_model", "quilt", base=replaced(argv, "--clip-model", "no_such_model"))


def test_weights_that_cannot_be_used(says, world):
    torch.save({"blocks.0.other": torch.zeros(1)}, world / "other.pth")
    (world / "text.pth").write_text("not a checkpoint")
    torch.save({"model": object}, world / "code.pth")
    for flag, key in (("--weights", "blocks.0.other"), ("--clip-weights", "Missing key")):  # what does not fit
        says([flag, world / "no.pth"], flag, "no such file")
        says([flag, world / "other.pth"], world / "other.pth", key)
        says([flag, world / "text.pth"], world / "text.pth")
        says([flag, world / "code.pth"], world / "code.pth")


@pytest.mark.parametrize("flag, value, word", [
    ("--lora-r", 0, "--lora-vision 0"), ("--batch", 25, "24 training tiles"), ("--batch", 0, "1 or more"),
    ("--val-int", 0, "between 0 and 1"), ("--val-int", 1, "between 0 and 1"), ("--drop-words", 1, "below 1"),
    ("--ep", 0, "1 or more"), ("--limit", 2, "between 0 and 1"), ("--lora-alpha", 0, "more than 0"), ("--sd", "x", "--sd"),
    ("--monitor", "val", "val_loss"), ("--no-such-flag", 1, "--no-such-flag")])
def test_a_flag_out_of_range(says, flag, value, word):
    says([flag, value], flag, word)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none(says):
    says(["--device", "cuda"], "--device cuda", "--device cpu")


def test_an_output_folder_that_cannot_be_written(says, argv, world):
    (world / "file").write_text("in the way")
    says([], "--dir", world / "file", base=replaced(argv, "--dir", world / "file"))
    assert (world / "file").read_text() == "in the way"


def test_a_run_folder_that_holds_another_configuration_is_left_as_it_is(argv, world, capsys, monkeypatch):
    train.main(argv)
    run = world / "runs" / "tiles" / "r"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = refused([*argv, "--lora-r", 4], capsys, monkeypatch)
    assert "another configuration" in said and "lora_r 16 there, 4 now" in said and "--run" in said
    said = refused([*argv, "--lr", 0.01, "--resume"], capsys, monkeypatch)
    assert "lr 0.001 there, 0.01 now" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_no_finished_runs_to_put_in_a_table(capsys, monkeypatch, tmp_path):
    assert "no metrics.json" in refused(["--table", tmp_path], capsys, monkeypatch)


def test_a_real_process_exits_with_2_and_no_traceback(argv):
    done = subprocess.run([sys.executable, "train.py", *map(str, replaced(argv, "--reports", "nowhere.txt"))], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 2 and "nowhere.txt" in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 2
