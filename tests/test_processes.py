"""A run of two processes is the run of one."""
import json
import os
import shutil
import subprocess
import sys
from unittest.mock import DEFAULT, patch

import pytest
from conftest import HEADS, ROOT, bytes_of, folder_of, log_of, rows_of

import train

SCRIPT = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
train.train_head.__defaults__ = {HEADS}  # as in the process that this one is compared with
load_data, step = train.load_data, torch.optim.Adam.step

def fewer(*args):
    tiles, labels, reports = load_data(*args)
    if train.RANK == 1:
        tiles["train"] = tiles["train"].take(range(20))
    return tiles, labels, reports

def die(*args, **kwargs):
    if train.RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(*args, **kwargs)

other, two, dies = ([*sys.argv[1:], "--run", run] for run in ("other", "two", "dies"))
train.load_data = fewer
try:
    train.main(other)
except ValueError as error:
    print(f"process {{train.RANK}}: {{error}}", flush=True)
train.load_data = load_data
# the processes have met, once for all
train.dist.init_process_group = train.dist.destroy_process_group = lambda *backend: None
sys.argv[1:] = two
train.cli()
torch.optim.Adam.step = die
sys.argv[1:] = dies
train.cli()
"""


def test_two_processes_stop_together_and_give_what_one_gives_and_end_together(argv, world):
    """Three runs: one process sees fewer tiles; both go on with what one had begun, where 24 tiles
    in batches of 5 leave 4 for the last; one dies."""
    argv += ["--batch", 5, "--val-int", 0.5]
    two, metrics = [*argv, "--run", "two"], train.main(argv)
    stop = dict(wraps=train.validate, side_effect=[DEFAULT, KeyboardInterrupt])
    with patch.object(train, "validate", **stop), pytest.raises(KeyboardInterrupt):
        train.main(two)
    (folder_of(two) / ".lock").unlink()  # this process would hold it
    shutil.rmtree(world / "runs" / "cache")  # two processes share the tiles of the pairing too
    (world / "two.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
               "--standalone", "--", world / "two.py", *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})

    for process in (0, 1):
        assert f"process {process}: the processes see different tiles" in done.stdout
    assert not (folder_of([*argv, "--run", "other"]) / "args.json").exists()

    assert "going on from step 2" in done.stdout, done.stderr
    assert done.stdout.count("image only") == 1  # the first process alone speaks
    for mine, theirs in zip(rows_of(argv, "pairs.csv"), rows_of(two, "pairs.csv"), strict=True):
        assert all(theirs[key] == mine[key] for key in ("tile", "split", "report"))
    for mine, theirs in zip(log_of(argv), log_of(two), strict=True):
        assert theirs == pytest.approx(mine, abs=1e-5)
    for name, row in json.loads(bytes_of(two))["rows"].items():
        assert row["confusion"] == metrics["rows"][name]["confusion"]

    assert done.returncode and done.stderr.count("train.py: ") == 1, done.stderr
    assert done.stderr.count("the same command goes on") == 1
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : -9" in done.stderr  # torchrun names it


def test_bad_input_is_said_once(argv, said, monkeypatch, capsys):
    monkeypatch.setattr(train, "WORLD", 2)
    words = said([*argv, "--lora-r", 0])
    assert words.startswith("train.py: argument --lora-r: 0: expected 1") and words.count("\n") == 1
    monkeypatch.setattr(train.time, "sleep", lambda seconds: sys.exit(0))  # torchrun ends it there
    monkeypatch.setattr(train, "RANK", 1)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which the second process closes
    assert said([*argv, "--lora-r", 0], code=0) == ""
