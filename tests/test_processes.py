"""A run of two processes is the run of one."""
import json
import os
import shutil
import subprocess
import sys
from unittest.mock import DEFAULT, patch

import pytest
from conftest import ROOT
from test_train import another, log_of, replaced, rows_of, run_folder, said_by_cli

import train

SCRIPT = f"""
import os, signal, sys, torch
sys.path.insert(0, {str(ROOT)!r})
import train
train.train_head.__defaults__ = {{heads}}  # as in the process that this one is compared with
{{more}}
train.cli()
"""
DIES = """
step = torch.optim.Adam.step
def die(self, *args, **kwargs):
    if train.RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
torch.optim.Adam.step = die
"""


def torchrun(folder, argv, more=""):
    """train.py in two processes, with `more` done to it first."""
    script = folder / "two.py"
    script.write_text(SCRIPT.format(heads=train.train_head.__defaults__, more=more))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--standalone", "--", script, *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_two_processes_go_on_with_what_one_began_and_give_what_one_gives(argv, world):
    """Pairs, losses and metrics; 24 tiles in batches of 5 leave 4 for the last one."""
    one = replaced(argv, "--batch", 5) + ["--val-int", 0.5]
    two, metrics = another(one, "two"), train.main(one)
    stop = dict(wraps=train.validate, side_effect=[DEFAULT, KeyboardInterrupt])
    with patch.object(train, "validate", **stop), pytest.raises(KeyboardInterrupt):
        train.main(two)
    (run_folder(two) / ".lock").unlink()  # this process would hold it
    shutil.rmtree(world / "runs" / "cache")  # two processes share the tiles of the pairing too
    done = torchrun(world, two)
    assert done.returncode == 0, done.stderr
    assert "going on from step 2" in done.stdout
    assert done.stdout.count("image only") == 1  # the first process alone speaks
    for mine, theirs in zip(rows_of(one, "pairs.csv"), rows_of(two, "pairs.csv"), strict=True):
        assert [theirs[key] for key in ("tile", "split", "report")] == list(mine.values())[:3]
    for mine, theirs in zip(log_of(one), log_of(two), strict=True):
        del mine["tiles_per_second"], theirs["tiles_per_second"]
        assert theirs == pytest.approx(mine, abs=1e-5)
    theirs = json.loads((run_folder(two) / "metrics.json").read_text())
    for row, values in metrics["rows"].items():
        assert theirs["rows"][row]["confusion"] == values["confusion"]


def test_bad_input_is_said_once(argv, monkeypatch, capsys):
    monkeypatch.setattr(train, "WORLD", 2)
    said = "train.py: argument --lora-r: 0: expected 1 to 1e+09; "
    said += "python train.py --help lists the flags\n"
    assert said_by_cli([*argv, "--lora-r", 0], monkeypatch, capsys) == said
    monkeypatch.setattr(train.time, "sleep", lambda seconds: sys.exit(0))  # torchrun ends it there
    monkeypatch.setattr(train, "RANK", 1)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which the second process closes
    with pytest.raises(SystemExit) as ended:
        train.cli()
    assert ended.value.code == 0 and capsys.readouterr() == ("", "")


def test_processes_that_see_other_tiles_stop_together(argv, world):
    more = """
load_data = train.load_data
def fewer(*args):
    tiles, labels, reports = load_data(*args)
    if train.RANK == 1:
        tiles["train"] = tiles["train"].take(range(20))
    return tiles, labels, reports
train.load_data = fewer
"""
    done = torchrun(world, argv, more)
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert done.returncode != 0 and len(said) == 1 and "different tiles" in said[0], done.stderr
    assert not (run_folder(argv) / "args.json").exists()


def test_a_process_that_dies_ends_all_with_one_message(argv, world):
    done = torchrun(world, argv, DIES)
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert done.returncode != 0 and len(said) == 1, done.stderr
    assert "the same command goes on" in done.stderr
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : -9" in done.stderr  # torchrun names it
