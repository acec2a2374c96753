"""What the flags of train.py do to a run."""
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_train import another, bytes_of, run_folder

import lora
import train

AUTHORS = {"model": "VITS_16", "ds": "crc", "run": "run1", "dir": "/tmp/x", "output": "o", "batch": "64", "lr": "0.001",
           "ep": "1", "worker": "2", "val-int": "0.1", "clip": "0.5", "weight-decay": "0.0001", "scheduler": "1",
           "lora-r": "16", "lora-alpha": "4", "lora-dropout": "0.1", "lora-text": "1", "lora-vision": "1", "monitor": "val_loss",
           "mod": "min", "patience": "5", "delta": "5", "early": "1", "log": "5", "wandb": "0", "chkpnt": "1", "sd": "0",
           "kd-layers": "2"}


@pytest.mark.parametrize("mark", ["-", "_"])
def test_every_flag_of_the_authors_works_under_its_name(mark):
    given = [word for name, value in AUTHORS.items() for word in (f"--{name.replace('-', mark)}", value)]
    args = train.parse_args([*given, f"--no{mark}lin"])
    for name, value in AUTHORS.items():
        held = getattr(args, name.replace("-", "_"))
        assert held == type(held)(value), name
    assert args.lora_targets == ["conv2d", "embedding"]


def log(argv):
    return [json.loads(line) for line in (run_folder(argv) / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("targets", [["linear"], ["conv2d"], ["embedding"], ["embedding", "linear"],
                                     ["conv2d", "linear", "embedding"]])
def test_lora_adapts_the_kinds_that_are_asked_for_and_no_others(argv, targets, monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(train, "train_clipit", lambda model, *rest: seen.update(
        {name: type(module) for name, module in model.named_modules() if isinstance(module, lora._LoRA)}))
    with pytest.raises(FileNotFoundError):  # there is no last.pt, since nothing was trained
        train.main([*argv, "--lora-targets", *targets])
    assert {kind for kind in lora.TARGETS if lora.TARGETS[kind] in seen.values()} == set(targets)
    assert any(name.startswith("text_tower") for name in seen) == (targets != ["conv2d"])
    said = capsys.readouterr().out
    assert ("the backbone has no such layer and stays as it is" in said) == (targets == ["embedding"])
    assert ("the text tower has no such layer and stays as it is" in said) == (targets == ["conv2d"])


def test_no_lin_is_another_name_for_two_targets(argv):
    train.main(another(argv, "a", "--no-lin"))
    train.main(another(argv, "b", "--lora-targets", "embedding", "conv2d"))
    assert bytes_of(another(argv, "a")) == bytes_of(another(argv, "b"))


def test_the_schedule_is_a_cosine_by_step_down_to_a_tenth(argv):
    train.main([*argv, "--scheduler", 1, "--val-every", 0.01])
    for line in log(argv):
        share = (1 + math.cos(math.pi * line["step"] / 6)) / 2
        assert line["lr"] == pytest.approx(1e-4 + (1e-3 - 1e-4) * share)


def test_gradients_are_clipped_and_weight_decay_is_l2_in_the_gradient(argv, monkeypatch):
    norms, step = [], torch.optim.Adam.step

    def watched(self, *args, **kwargs):
        group = self.param_groups[0]
        assert group["weight_decay"] == 1e-4 and not group.get("decoupled_weight_decay")
        norms.append(torch.cat([p.grad.flatten() for p in group["params"]]).norm().item())
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    train.main(another(argv, "a"))
    assert max(norms) == pytest.approx(0.5, abs=1e-4)
    norms.clear()
    train.main(another(argv, "b", "--clip", 0))
    assert max(norms) > 0.6


def test_double_softmax_is_cross_entropy_of_the_probabilities():
    logits, labels = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]]), torch.tensor([2, 1])
    p = logits.softmax(dim=1)
    expected = -(p.softmax(dim=1)[[0, 1], labels].log()).mean()
    args = train.parse_args(["--double-softmax"])
    loss, parts = train.loss_of(logits, labels, None, None, args)
    assert loss == pytest.approx(expected.item()) and abs(loss - F.cross_entropy(logits, labels)) > 0.01
    # the floor of the authors' loss with three classes: a certain and right answer is not free
    certain = train.loss_of(torch.tensor([[100.0, 0, 0]]), torch.tensor([0]), None, None, args)[0]
    assert certain == pytest.approx(math.log(1 + 2 / math.e))


def test_a_backbone_that_stays_as_it_is_runs_once_over_the_tiles(argv, monkeypatch):
    fixed = train.main(another(argv, "fixed", "--lora-vision", 0, "--lora-text", 0))
    monkeypatch.setattr(train, "adapt", lambda tower, name, args: bool(tower.requires_grad_(False)))
    through = train.main(another(argv, "through", "--lora-text", 0))  # no adapter, and every step runs the backbone
    assert fixed["best"]["value"] == pytest.approx(through["best"]["value"], abs=1e-5)
    assert fixed["rows"]["CLIP-IT"]["confusion"] == through["rows"]["CLIP-IT"]["confusion"]


def test_a_run_on_fixed_features_resumes(argv):
    metrics = train.main([*argv, "--lora-vision", 0])
    (run_folder(argv) / "metrics.json").unlink()
    assert train.main([*argv, "--lora-vision", 0, "--resume"]) == metrics


def test_gradient_checkpointing_changes_nothing_but_memory(argv):
    train.main(another(argv, "a"))
    train.main(another(argv, "b", "--grad-checkpointing"))
    for a, b in zip(log(another(argv, "a")), log(another(argv, "b")), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6) and a["val_loss"] == pytest.approx(b["val_loss"], abs=1e-6)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains_alike_and_resumes(argv, amp):
    train.main(another(argv, "fp32"))
    train.main(another(argv, amp, "--amp", amp))
    first, second = log(another(argv, "fp32"))[0], log(another(argv, amp))[0]
    assert first["val_loss"] != second["val_loss"] == pytest.approx(first["val_loss"], rel=0.1)
    held = bytes_of(another(argv, amp))
    train.main(another(argv, amp, "--amp", amp, "--resume"))
    assert bytes_of(another(argv, amp)) == held


def test_the_readme_names_tests_and_flags_that_are_there(capsys):
    readme = (ROOT / "README.md").read_text()
    tests = {name for path in (ROOT / "tests").glob("test_*.py")
             for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    files = {path.stem for path in (ROOT / "tests").glob("test_*.py")}
    named = set(re.findall(r"\btest_\w+", readme))
    assert len(named) > 20 and named <= tests | files, named - tests - files
    with pytest.raises(SystemExit):
        train.parse_args(["--help"])
    flags = set(re.findall(r"--[a-z][\w-]+", capsys.readouterr().out)) | {
        "--nproc_per_node", "--gallery", "--only", "--lam", "--learner"}  # torchrun's, pairing.py's, bench.py's, the authors'
    used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", readme))
    assert used <= flags, used - flags


def test_the_readme_quotes_the_papers_table_as_the_code_has_it():
    readme = (ROOT / "README.md").read_text()
    for model, cells in train.PAPER.items():
        assert f"| {model} | " + " | ".join(f"{a:.2f} → {b}" for a, b in cells) + " |" in readme


def test_detaching_the_text_is_the_same_as_leaving_its_tower_alone(argv):
    train.main(another(argv, "a", "--lora-text", 1, "--detach-text"))
    train.main(another(argv, "b", "--lora-text", 0))
    assert bytes_of(another(argv, "a")) == bytes_of(another(argv, "b"))
