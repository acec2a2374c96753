"""A run of two processes is the run of one."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import train


def torchrun(argv, processes=2):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes),
                           "--standalone", "--", ROOT / "train.py", *map(str, argv)],
                          capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run_folder(argv):
    return argv[argv.index("--dir") + 1] / "tiles" / "r"


def pairs(argv):
    return [line.rsplit(",", 1)[0] for line in (run_folder(argv) / "pairs.csv").read_text().splitlines()]


def log(argv):
    return [json.loads(line) for line in (run_folder(argv) / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def two(argv):
    """The same run into another folder; 24 tiles in batches of 7 leave 3 for the last one."""
    argv[argv.index("--batch") + 1] = 7
    other = list(argv)
    other[other.index("--dir") + 1] = argv[argv.index("--dir") + 1].with_name("two")
    return argv, other


def test_two_processes_give_the_pairs_losses_and_metrics_of_one(two):
    one, other = two
    metrics = train.main(one)
    done = torchrun(other)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("image only") == 1  # the first process alone speaks
    assert pairs(other) == pairs(one)
    for mine, theirs in zip(log(one), log(other), strict=True):
        del mine["tiles_per_second"], theirs["tiles_per_second"]
        assert theirs == pytest.approx(mine, abs=1e-5)
    theirs = json.loads((run_folder(other) / "metrics.json").read_text())
    for row, values in metrics["rows"].items():
        assert theirs["rows"][row]["confusion"] == values["confusion"]
        assert theirs["rows"][row]["macro_auroc"] == pytest.approx(values["macro_auroc"], abs=1e-5)


def test_what_one_process_began_two_go_on_with(two):
    one, other = two
    train.main(one)
    other[other.index("--ep") + 1] = 1
    train.main(other)
    other[other.index("--ep") + 1] = 2
    held = run_folder(other) / "args.json"
    args = json.loads(held.read_text())
    args["config"]["ep"] = 2  # as if the run had been meant to be this long
    held.write_text(json.dumps(args))
    done = torchrun([*other, "--resume"])
    assert done.returncode == 0 and "going on from step 4 of 8" in done.stdout
    for mine, theirs in zip(log(one), log(other), strict=True):
        assert theirs["val_loss"] == pytest.approx(mine["val_loss"], abs=1e-5)


def test_bad_input_is_said_once(two):
    done = torchrun([*two[1], "--lora-r", 0])
    assert done.returncode != 0
    assert [line for line in done.stderr.splitlines() if line.startswith("train.py: ")] == [
        "train.py: --lora-r 0: expected 1 or more; --lora-vision 0 --lora-text 0 trains without LoRA"]


def test_a_process_that_dies_ends_all_with_one_message(two):
    code = f"""
import os, signal, sys, torch
sys.path[:0] = [{str(ROOT)!r}]
import train
step = torch.optim.Adam.step
def die(self, *args, **kwargs):
    if train.RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
torch.optim.Adam.step = die
train.cli()
"""
    script = two[1][1].parent / "dying.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone",
                           "--", script, *map(str, two[1])], capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if line.startswith("train.py: ")]
    assert done.returncode != 0 and len(said) == 1 and "--resume" in said[0], done.stderr
    assert "rank      : 1 (local_rank: 1)\n  exitcode  : -9" in done.stderr  # torchrun names it
