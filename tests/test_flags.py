"""What the flags of train.py do to a run."""
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, log_of, model_of

import lora
import train

AUTHORS = {"model": "VITS_16", "ds": "crc", "run": "run1", "dir": "/tmp/x", "output": "o",
           "batch": "64", "lr": "0.001", "ep": "1", "worker": "2", "val-int": "0.1", "clip": "0.5",
           "weight-decay": "0.0001", "scheduler": "1", "lora-r": "16", "lora-alpha": "4",
           "lora-dropout": "0.1", "lora-text": "1", "lora-vision": "1", "monitor": "val_loss",
           "mod": "min", "patience": "5", "delta": "5", "early": "1", "log": "5", "wandb": "0",
           "chkpnt": "1", "sd": "0", "kd-layers": "2"}
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("mark", ["-", "_"])
def test_every_flag_of_the_authors_works_under_its_name(mark, monkeypatch):
    given = [word for name, value in AUTHORS.items()
             for word in (f"--{name.replace('-', mark)}", value)]
    args = train.parse_args([*given, f"--no{mark}lin"])
    for name, value in AUTHORS.items():
        held = getattr(args, name.replace("-", "_"))
        assert held == type(held)(value), name
    assert args.lora_targets == ["conv2d", "embedding"]
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    for name in ("early", "chkpnt", "wandb", "scheduler"):  # with a value or without
        values = [getattr(train.parse_args(given), name)
                  for given in ([], [f"--{name}"], [f"--{name}", "1"], [f"--{name}=0"])]
        assert values == [0, 1, 1, 0]


def test_a_run_is_named_after_the_flags_that_differ_and_authors_are_one(
        tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    args = train.parse_args(["--lora_r", "4", "--kd_layers=2", "--no_text"])
    assert (args.lora_r, args.kd_layers, args.no_text, args.ds) == (4, 2, True, "demo")
    assert args.run == "lora-r-4_kd-layers-2_no-text"
    assert train.parse_args([]).run == "base" and "the folder is ./demo" in capsys.readouterr().out
    args = train.parse_args(["--ds", tmp_path, "--reports", "reports.txt"])
    assert (args.model, args.clip_model) == ("UNI", "conch")
    args = train.parse_args(["--authors"])
    assert (args.lora_text, args.ep, args.monitor, args.lora_alpha) == (1, 1, "last", 8.0)
    assert train.parse_args(["--authors", "--ep", 3]).ep == 3 and args.run == "authors"


@pytest.mark.parametrize("targets, more", [
    (["linear"], []), (["conv2d"], ["--lora-text", 0]), (["embedding"], ["--lora-vision", 0]),
    (["conv2d", "linear", "embedding"], []), (["conv2d", "embedding"], ["--no-lin"])])
def test_lora_adapts_the_kinds_that_are_asked_for_and_no_others(finished, targets, more):
    asked = more if more == ["--no-lin"] else ["--lora-targets", *targets, *more]
    run = ["--run", "-".join(targets), "--lora-text", 1]
    model = model_of([*finished.argv, *run, *asked])
    adapters = {name: type(part) for name, part in model.named_modules()
                if isinstance(part, lora._LoRA)}
    kinds = {kind for kind in lora.TARGETS if lora.TARGETS[kind] in adapters.values()}
    towers = {name.partition(".")[0] for name in adapters}
    assert kinds == set(targets)
    assert ("text_tower" in towers) == ("--lora-text" not in more)
    assert ("backbone" in towers) == ("--lora-vision" not in more)


def test_gradients_are_clipped_and_weight_decay_is_l2_in_the_gradient(finished, monkeypatch):
    norms, step = [], torch.optim.Adam.step

    def watched(self, *args, **kwargs):
        group = self.param_groups[0]
        assert group["weight_decay"] == 1e-4 and not group.get("decoupled_weight_decay")
        norms.append(torch.cat([p.grad.flatten() for p in group["params"]]).norm().item())
        return step(self, *args, **kwargs)
    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    for limit in (0.5, 0):  # the default, none
        train.main([*finished.argv, "--run", f"clip-{limit}", "--clip", limit, "--ep", 1])
    assert max(norms[:3]) == pytest.approx(0.5, abs=1e-4)
    assert len(norms) == 6 and max(norms[3:]) > 0.6


def test_double_softmax_is_cross_entropy_of_the_probabilities():
    def loss_of(logits, labels, *more):
        args = train.parse_args(["--no-text", *more])
        model = SimpleNamespace(backbone=lambda images: images, fuse=lambda v: (v, None))
        return train.clipit_loss(train.forward(model, logits, None, None, None, args)[0], labels,
                                 None, None)[0]
    logits, labels = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, 1.0]]), torch.tensor([2, 1])
    expected = -(logits.softmax(dim=1).softmax(dim=1)[[0, 1], labels].log()).mean()
    plain = F.cross_entropy(logits, labels).item()
    assert loss_of(logits, labels) == pytest.approx(plain)
    loss = loss_of(logits, labels, "--authors")
    assert loss == pytest.approx(expected.item()) and abs(loss - plain) > 0.01


def test_gradient_checkpointing_changes_nothing_but_memory(finished):
    argv = [*finished.argv, "--run", "memory", "--grad-checkpointing"]
    assert model_of(argv).backbone.grad_checkpointing
    train.main(argv)
    for ours, plain in zip(log_of(argv), log_of(finished.argv), strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-6)
        assert ours["val_loss"] == pytest.approx(plain["val_loss"], abs=1e-6)


def test_help_shows_every_flag_and_the_readme_names_what_is_there(capsys):
    with pytest.raises(SystemExit) as ended:
        train.parse_args(["--help"])
    shown, names = capsys.readouterr().out, vars(train.parse_args([])).keys()
    names -= {"device", "flags", "variant"}
    assert ended.value.code == 0 and len(names) > 40
    assert all(f"--{name.replace('_', '-')} " in shown for name in names)
    others = {"--nproc_per_node", "--csv", "--wsinfer",  # of torchrun, clipit.py; of WSInfer
              "--wsi-dir", "--results-dir", "--config", "--model-path", "--out", "--world"}
    flags = {*others, *re.findall(r"--[a-z][\w-]+", shown)}
    used = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README))
    assert len(used) > 20 and used <= flags, used - flags
    files = list((ROOT / "tests").glob("test_*.py"))
    tests = {name for path in files
             for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}
    named = set(re.findall(r"\btest_\w+", README)) - {path.stem for path in files}
    assert len(named) > 15 and named <= tests, named - tests
