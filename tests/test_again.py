"""The same command again, other inputs, damaged files, interrupts: no wrong result, nothing lost."""
import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_train import bytes_of, log_of, replaced, run_folder, said_by_cli

import train
from data import Tiles


def files(argv):
    return {path: path.read_bytes() for path in run_folder(argv).rglob("*") if path.is_file()}


@pytest.fixture
def finished(argv):
    """A run that has ended."""
    train.main(argv)
    return argv


def test_a_finished_run_is_shown_again_and_not_trained_again(finished, capsys):
    metrics = json.loads(bytes_of(finished))
    before = files(finished)
    table = train.results(metrics)
    capsys.readouterr()
    with patch.object(train, "train_head", side_effect=AssertionError):
        assert train.main(finished) == metrics
    assert capsys.readouterr().out.count(table) == 1
    after = files(finished)
    del before[run_folder(finished) / "args.json"], after[run_folder(finished) / "args.json"]
    assert after == before


def test_overwrite_begins_anew_and_removes_what_a_run_writes_alone(finished):
    mine = run_folder(finished) / "notes.txt"
    mine.write_text("mine")
    metrics = train.main([*finished, "--overwrite", "--lr", 0.01])
    assert metrics["best"] and mine.read_text() == "mine"
    assert json.loads((run_folder(finished) / "args.json").read_text())["config"]["lr"] == 0.01


@pytest.mark.parametrize("change, words", [
    ("tile", "the test tiles changed"), ("label", "the test tiles changed"), ("reports", "the reports changed"),
    ("weights", "the backbone changed"), ("flag", "lora_r 16 there, 4 now")])
def test_what_changed_since_the_first_start_is_named_and_the_run_left_as_it_is(
        finished, world, change, words, monkeypatch, capsys):
    more, tile = [], world / "tiles" / "test" / "A" / "0.png"
    if change == "tile":
        Image.new("RGB", (64, 64)).save(tile)
    elif change == "label":
        tile.rename(world / "tiles" / "test" / "B" / "a.png")
    elif change == "reports":
        (world / "reports.txt").write_text((world / "reports.txt").read_text() + "one more\n")
    elif change == "weights":
        load_models = train.load_models

        def other(args):
            clip, backbone = load_models(args)
            torch.nn.init.ones_(next(backbone.parameters()))
            return clip, backbone
        monkeypatch.setattr(train, "load_models", other)
    else:
        more = ["--lora-r", 4]
    before = files(finished)
    said = said_by_cli([*finished, *more], monkeypatch, capsys)
    assert words in said and "--run" in said and "--overwrite" in said
    assert not any(len(word) > 60 for word in said.replace("/", " ").split())  # no hashes
    assert files(finished) == before


def test_the_versions_of_the_first_start_stay_beside_those_of_the_last(finished, monkeypatch):
    monkeypatch.setattr(train, "version", lambda package: "9.9")
    train.main(finished)
    facts = json.loads((run_folder(finished) / "args.json").read_text())
    assert facts["versions"]["torch"] == torch.__version__.split("+")[0]
    assert facts["versions_of_the_last_start"]["torch"] == "9.9"


@pytest.mark.parametrize("damage", [lambda old: b"", lambda old: old[:len(old) // 2],
                                    lambda old: bytes(len(old))])
def test_damaged_files_are_named_with_what_to_do_or_made_anew(argv, damage, monkeypatch, capsys):
    argv += ["--val-int", 0.5]
    train.main(argv)
    run, whole = run_folder(argv), bytes_of(argv)

    def said_after(name, *gone):
        for path in gone:
            (run / path).unlink()
        content = (run / name).read_bytes()
        (run / name).write_bytes(damage(content))
        said = said_by_cli(argv, monkeypatch, capsys)
        (run / name).write_bytes(content)
        assert str(run / name) in said and "remove it" in said and len(said.splitlines()) <= 2
    said_after("args.json")
    said_after("metrics.json")
    said_after("last.pt", "metrics.json")
    (run / "log.jsonl").write_bytes(damage((run / "log.jsonl").read_bytes()))
    next((run.parents[1] / "cache").iterdir()).write_bytes(b"")
    train.main(argv)
    assert bytes_of(argv) == whole and b"\0" not in (run / "log.jsonl").read_bytes()
    assert [line["step"] for line in log_of(argv)] == [2, 4, 6]


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_at_its_next_batch_and_the_same_command_goes_on(
        argv, number, code, monkeypatch, capsys):
    argv += ["--val-int", 0.5]
    validate = train.validate

    def interrupted(*args):
        signal.raise_signal(number)
        return validate(*args)
    with patch.object(train, "validate", interrupted):
        said = said_by_cli(argv, monkeypatch, capsys, code)
    assert signal.getsignal(number) == signal.SIG_DFL  # a second one would end it at once
    assert "ends at the next batch" in said and "the same command goes on" in said
    assert [path for path in run_folder(argv).glob(".tmp*")] == []
    train.SIGNALS.clear()
    train.main(argv)
    assert [line["step"] for line in log_of(argv)] == [2, 4, 6]


def test_a_second_process_is_kept_from_the_same_run(argv, monkeypatch, capsys):
    code = (f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); import train\n"
            f"lock = train.FileLock({str(run_folder(argv) / '.lock')!r}); lock.acquire(); print('locked', flush=True)\n"
            "time.sleep(60)")
    run_folder(argv).mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        said = said_by_cli(argv, monkeypatch, capsys)
        other.kill()
    assert "another process is at this run" in said and len(said.splitlines()) == 1
    train.main([*argv, "--ep", 0])  # its lock has died with it


def test_a_full_disk_is_one_line_and_leaves_no_half_file(argv, monkeypatch, capsys):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch.object(Path, "write_bytes", side_effect=full):
        said = said_by_cli(argv, monkeypatch, capsys)
    assert "No space left" in said and "/cache/" in said and "the same command goes on" in said
    assert not [path for path in run_folder(argv).parents[1].rglob(".tmp*")]
    train.main(argv)
    with patch("safetensors.torch.save_file", side_effect=full):  # of the classifier
        said = said_by_cli([*argv, "--overwrite"], monkeypatch, capsys)
    assert "classifier" in said and "No space left" in said
    assert not (run_folder(argv) / "classifier").exists()


class Killed(Tiles):
    """Tiles whose reading kills the process that reads them, as the system does without memory."""

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_the_system_kills_is_one_line(argv, monkeypatch, capsys):
    monkeypatch.setattr(Tiles, "with_transform", lambda tiles, transform: Killed(
        tiles.paths, tiles.labels, tiles.classes, transform))
    said = said_by_cli(replaced(argv, "--worker", 1), monkeypatch, capsys)
    assert "DataLoader worker" in said and "the same command goes on" in said and len(said.splitlines()) == 2


def test_features_that_are_not_finite_are_named(argv, monkeypatch, capsys):
    outputs = train.outputs
    monkeypatch.setattr(train, "outputs", lambda title, *rest, **more: outputs(
        title, *rest, **more) * (torch.nan if "backbone" in title else 1))
    said = said_by_cli(argv, monkeypatch, capsys)
    assert "features of backbone train tiles: NaN" in said and len(said.splitlines()) == 1


def test_a_text_that_collapses_is_said_once(argv, capsys):
    spreads = iter([0.5, 0.05, 0.04, 0.2, 0.03])
    validate = train.validate
    with patch.object(train, "validate", lambda *args: validate(*args) | {
            "text_spread": next(spreads)}):
        train.main([*argv, "--ep", 5, "--lora-text", 1])
    printed = capsys.readouterr().out
    assert printed.count("have collapsed") == 1 and "text_spread 0.0500" in printed


def test_the_last_state_is_kept_where_it_is_asked_for(argv):
    losses = iter([1.0, 2.0, 3.0])
    validate = train.validate
    with patch.object(train, "validate", lambda *args: validate(*args) | {"val_loss": next(losses)}):
        best = train.main([*argv, "--ep", 3, "--monitor", "last", "--chkpnt"])["best"]
    assert best["step"] == 9
    kept = torch.load(run_folder(argv) / "step_9.pt", weights_only=True)
    last = torch.load(run_folder(argv) / "last.pt", weights_only=True)["state"]["best"]["model"]
    assert all(torch.equal(kept[name], last[name]) for name in kept)


def test_the_authors_setting_is_one_flag():
    args = train.parse_args(["--authors"])
    assert (args.lora_text, args.ep, args.monitor, args.lora_alpha) == (1, 1, "last", 8.0)
    assert train.parse_args(["--authors", "--ep", 3]).ep == 3 and args.run == "authors"


def test_the_authors_augmentation_of_pcam_is_one_of_tile_and_epoch(argv, world):
    tile = str(next((world / "tiles" / "train" / "A").iterdir()))
    tiles = Tiles([tile] * 2, [0, 0], ["A"], lambda image: torch.tensor(list(image.tobytes())))
    args = train.parse_args([*argv, "--authors"])
    assert train.augment(tiles, 0, args) is tiles
    args.ds = "pcam"
    once, again, other = (train.augment(tiles, epoch, args)[0][0] for epoch in (0, 0, 1))
    assert torch.equal(once, again) and not torch.equal(once, other)
    assert not torch.equal(once, tiles[0][0])


def test_a_kept_folder_of_the_name_of_a_data_set_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    train.parse_args([])
    assert "not the folder" in capsys.readouterr().out
