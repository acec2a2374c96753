"""Bad input, the same command again, damage: a line or two that say it, and nothing is lost."""
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT, bytes_of, files_of, folder_of, log_of, write_tiles
from PIL import Image

import train
from data import Tiles


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
    ("--val-int", 0, "expected"), ("--lr", "nan", "expected"),
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
    says([], f"no valid file for the classes {tiles / 'B'}.")  # torchvision's words
    shutil.rmtree(tiles)
    tiles.mkdir()
    says([], f"any class folder in {tiles}")  # torchvision's words
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


def test_of_a_process_with_workers_an_unreadable_tile_is_one_line_and_no_traceback(argv, world):
    (world / "tiles" / "train" / "B" / "3.png").write_bytes(b"no image")
    command = [sys.executable, "train.py", *map(str, argv), "--batch", "2", "--worker", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("train.py: ")
    assert "B/3.png: not a readable image" in done.stderr and done.stderr.count("\n") == 1


def test_a_finished_run_is_shown_again_and_not_trained_again(finished, monkeypatch, capsys):
    before, args = files_of(finished.folder), finished.folder / "args.json"
    monkeypatch.setattr(train, "train_head", None)
    monkeypatch.setattr(train, "version", lambda package: "9.9")
    assert train.main(finished.argv) == finished.metrics
    assert capsys.readouterr().out.count(train.results(finished.metrics)) == 1
    versions, facts = json.loads(before[args])["versions"], json.loads(args.read_text())
    assert facts["versions"] == versions  # of the first start, beside those of the last
    assert facts["versions_of_the_last_start"] == versions | dict.fromkeys(
        versions.keys() - {"python"}, "9.9")
    assert files_of(finished.folder) == before | {args: args.read_bytes()}


def test_what_changed_since_the_first_start_is_named_and_the_run_left_as_it_is(
        argv, world, monkeypatch, said):
    train.main(argv)
    tile, reports = world / "tiles" / "test" / "A" / "0.png", world / "reports.txt"
    before, texts, load_models = files_of(folder_of(argv)), reports.read_text(), train.load_models

    def refused(words, *more):
        told = said([*argv, *more])
        for word in ("another configuration", words, "--run", "--overwrite"):
            assert word in told
        assert not any(len(word) > 60 for word in told.replace("/", " ").split())  # no hashes
        assert files_of(folder_of(argv)) == before

    def other_models(args):
        clip, backbone = load_models(args)
        torch.nn.init.ones_(next(backbone.parameters()))
        return clip, backbone
    refused("lora_r 16 there, 4 now", "--lora-r", 4)
    with monkeypatch.context() as patched:
        patched.setattr(train, "load_models", other_models)
        refused("the backbone changed")
    reports.write_text(texts + "one more\n")
    refused("the reports changed")
    reports.write_text(texts)
    moved = tile.rename(world / "tiles" / "test" / "B" / "a.png")  # another label
    refused("the test tiles changed")
    moved.rename(tile)
    Image.new("RGB", (64, 64)).save(tile)
    refused("the test tiles changed")
    mine = folder_of(argv) / "notes.txt"
    mine.write_text("mine")
    assert train.main([*argv, "--overwrite", "--lr", 0.01])["best"]
    assert mine.read_text() == "mine"  # what a run writes is removed, and no more


def test_damaged_files_are_named_with_what_to_do_or_made_anew(argv, said, capsys):
    argv += ["--val-int", 0.5]
    train.main(argv)
    run, whole = folder_of(argv), bytes_of(argv)
    for name in ("args.json", "metrics.json"):
        content = (run / name).read_bytes()
        for damaged in (b"", content[:len(content) // 2], bytes(len(content))):
            (run / name).write_bytes(damaged)
            words = said(argv)
            assert f"{run / name}" in words and "remove it" in words
            assert len(words.splitlines()) <= 2
        (run / name).write_bytes(content)
    (run / "metrics.json").unlink()
    for name in ("last.pt", "log.jsonl"):
        (run / name).write_bytes(bytes(100))
    next((run.parents[1] / "cache").iterdir()).write_bytes(b"")
    train.main(argv)
    assert f"{run / 'last.pt'}: damaged" in capsys.readouterr().out
    assert bytes_of(argv) == whole and b"\0" not in (run / "log.jsonl").read_bytes()
    assert [line["step"] for line in log_of(argv)] == [2, 4, 6]


def test_a_second_process_is_kept_from_the_same_run(argv, said):
    lock = folder_of(argv) / ".lock"
    lock.parent.mkdir(parents=True)
    code = f"import filelock; lock = filelock.FileLock({str(lock)!r}).acquire(); input(print(1))"
    with subprocess.Popen([sys.executable, "-uc", code], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        words = said(argv)
        other.kill()
    assert "another process is at this run" in words and len(words.splitlines()) == 1
    train.main([*argv, "--ep", 0])  # its lock has died with it


def test_a_full_disk_is_one_line_and_leaves_no_half_file(argv, said):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch.object(Path, "write_bytes", side_effect=full):
        words = said(argv)
    assert "No space left" in words and "/cache/" in words and "the same command" in words
    assert not list(folder_of(argv).parents[1].rglob(".tmp*"))
    with patch("safetensors.torch.save_file", side_effect=full):  # of the classifier
        words = said(argv)
    assert "classifier" in words and "No space left" in words
    assert not (folder_of(argv) / "classifier").exists()


class Killed(Tiles):
    """Tiles whose reading kills the process that reads them, as the system does without memory."""

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_the_system_kills_is_one_line(argv, monkeypatch, said):
    monkeypatch.setattr(Tiles, "with_transform", lambda tiles, transform: Killed(
        tiles.paths, tiles.labels, tiles.classes, transform))
    words = said([*argv, "--worker", 1])
    assert "DataLoader worker" in words and "the same command goes on" in words
    assert len(words.splitlines()) == 2


def test_features_that_are_not_finite_are_named(argv, monkeypatch, said):
    outputs = train.outputs
    monkeypatch.setattr(train, "outputs", lambda title, *rest, **more: outputs(
        title, *rest, **more) * (torch.nan if "backbone" in title else 1))
    words = said(argv)
    assert "features of backbone train tiles: NaN" in words and len(words.splitlines()) == 1


def test_a_text_that_collapses_is_said_once(finished, validations, capsys):
    validations("text_spread", [0.5, 0.05, 0.04, 0.2, 0.03])
    train.main([*finished.argv, "--run", "collapse", "--ep", 5, "--lora-text", 1])
    printed = capsys.readouterr().out
    assert printed.count("have collapsed") == 1 and "text_spread 0.0500" in printed
