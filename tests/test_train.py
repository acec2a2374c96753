"""Whole runs on a small world."""
import csv
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import train
from clipit import Classifier
from data import load_tiles


def run_folder(argv):
    return argv[argv.index("--dir") + 1] / "tiles" / argv[argv.index("--run") + 1]


def another(argv, run, *more):
    argv = list(argv)
    argv[argv.index("--run") + 1] = run
    return argv + list(more)


def bytes_of(argv):
    return (run_folder(argv) / "metrics.json").read_bytes()


def test_a_run_leaves_every_file_and_prints_the_table(argv, capsys):
    metrics = train.main(argv)
    printed, run = capsys.readouterr().out, run_folder(argv)
    assert {p.name for p in run.iterdir()} == {"args.json", "log.jsonl", "pairs.csv", "heads.pt", "last.pt", "metrics.json",
                                               "predictions.csv", "classifier", "pairs.html", "report.html"}
    assert list(metrics["rows"]) == ["vision head", "text head", "CLIP-IT"]
    assert json.loads((run / "metrics.json").read_text()) == metrics
    for row in ("vision head (frozen backbone, unimodal)", "text head (paired reports)", "CLIP-IT (image only)"):
        assert row in printed
    assert "reports used" in printed and "complementarity" in printed and str(run) in printed
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [3, 6]
    for line in log:
        assert line["loss"] == pytest.approx(line["ce"] + line["kd"], abs=1e-5)
        assert line["val_loss"] == pytest.approx(line["val_ce"] + line["val_kd"], abs=1e-5)


def test_predictions_are_those_of_the_saved_text_free_classifier(argv):
    metrics, run = train.main(argv), run_folder(argv)
    with open(run / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    tiles = load_tiles(argv[1], "test")
    probabilities = Classifier.from_pretrained(run / "classifier").predict([image for image, _ in tiles])
    assert [row["path"] for row in rows] == tiles.paths and [int(row["target"]) for row in rows] == tiles.labels
    for row, p in zip(rows, probabilities):
        assert [float(row[f"class_{i}"]) for i in range(3)] == pytest.approx(p.tolist(), abs=1e-5)
    right = sum(row["pred"] == row["target"] for row in rows)
    assert metrics["rows"]["CLIP-IT"]["accuracy"] == pytest.approx(right / len(rows))


def test_pairs_csv_names_the_nearest_report_of_every_tile(argv):
    from pairing import embed_images, embed_texts, load_clip, nearest_text
    from data import load_reports
    train.main(argv)
    with open(run_folder(argv) / "pairs.csv") as file:
        rows = list(csv.DictReader(file))
    clip = load_clip(argv[argv.index("--clip-model") + 1])
    texts = embed_texts(clip, load_reports(argv[3]))
    for split in ("train", "val", "test"):
        tiles = load_tiles(argv[1], split, transform=clip.preprocess)
        index, similarity = nearest_text(embed_images(clip, tiles), texts)
        mine = [row for row in rows if row["split"] == split]
        assert [row["tile"] for row in mine] == tiles.paths
        assert [int(row["report"]) for row in mine] == index.tolist()
        assert [float(row["similarity"]) for row in mine] == pytest.approx(similarity.tolist(), abs=1e-5)


def test_the_same_seed_gives_the_same_metrics_with_workers_or_without(argv):
    train.main(argv)
    train.main(another(argv, "again"))
    train.main(another(argv, "workers", "--worker", 2))
    train.main(another(argv, "other", "--sd", 1))
    assert bytes_of(argv) == bytes_of(another(argv, "again")) == bytes_of(another(argv, "workers"))
    assert bytes_of(argv) != bytes_of(another(argv, "other"))


def test_dropout_and_dropped_words_do_not_depend_on_workers_either(argv):
    more = ["--lora-dropout", 0.2, "--drop-words", 0.3, "--val-every", 0.5]
    train.main(another(argv, "a", *more))
    train.main(another(argv, "b", *more, "--worker", 2))
    assert bytes_of(another(argv, "a")) == bytes_of(another(argv, "b"))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_that_is_stopped_and_resumed_ends_like_one_that_was_not(argv, stop, monkeypatch, capsys):
    more = ["--lora-dropout", 0.2, "--val-every", 0.5, "--scheduler", 1]
    train.main(another(argv, "whole", *more))
    validate, calls = train.validate, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return validate(*args)

    monkeypatch.setattr(train, "validate", interrupted)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, another(argv, "r", *more))])
    with pytest.raises(SystemExit) as ended:
        train.cli()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "--resume" in said and "last.pt" in said and "Traceback" not in said
    assert not (run_folder(argv) / "metrics.json").exists()
    monkeypatch.setattr(train, "validate", validate)
    monkeypatch.setattr(train, "train_head", None)  # raises if called: finished steps are not done again
    train.main(another(argv, "r", *more, "--resume"))
    assert bytes_of(argv) == bytes_of(another(argv, "whole"))
    log = [json.loads(line)["step"] for line in (run_folder(argv) / "log.jsonl").read_text().splitlines()]
    assert log == [2, 4, 6]


def test_a_second_run_takes_the_embeddings_from_the_cache(argv, capsys):
    train.main(argv)
    assert "from the cache" not in capsys.readouterr().out
    train.main(another(argv, "second"))
    assert capsys.readouterr().out.count("from the cache") == 4


def test_without_text_nothing_but_the_distillation_differs(argv, monkeypatch):
    starts = []
    monkeypatch.setattr(train, "train_clipit", lambda model, *rest: starts.append(
        {name: p.clone() for name, p in model.named_parameters() if not name.startswith("text_tower")}) or stop())

    class Stop(Exception):
        pass

    def stop():
        raise Stop

    for more in ([], ["--no-text"]):
        with pytest.raises(Stop):
            train.main(another(argv, "n", *more) if more else argv)
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(p, starts[1][name]) for name, p in starts[0].items())


def test_without_text_the_loss_is_cross_entropy_alone(argv):
    metrics = train.main(argv + ["--no-text"])
    assert list(metrics["rows"]) == ["vision head", "text head", "CLIP-IT without text"]
    for line in map(json.loads, (run_folder(argv) / "log.jsonl").read_text().splitlines()):
        assert line["loss"] == line["ce"] and "kd" not in line and line["val_loss"] == line["val_ce"]


def test_a_batch_encodes_each_distinct_report_once(argv, monkeypatch):
    seen = []
    forward_train = train.ClipIT.forward_train
    monkeypatch.setattr(train.ClipIT, "forward_train", lambda self, images, tokens, report: seen.append(
        (len(images), tokens, report)) or forward_train(self, images, tokens, report))
    train.main(argv)
    assert len(seen) == 6
    for tiles, tokens, report in seen:
        assert len(report) == tiles and len(tokens) == len(tokens.unique(dim=0)) == len(report.unique()) > 1
    assert any(len(tokens) < tiles for tiles, tokens, _ in seen)  # some tiles of a batch did share a report


def test_fixed_text_is_looked_up_and_gives_what_the_frozen_tower_gives(argv, monkeypatch):
    looked_up = train.main(another(argv, "a", "--lora-text", 0))
    monkeypatch.setattr(train.nn.Embedding, "from_pretrained", None)
    monkeypatch.setattr(train, "drop_words", lambda report, share, seed: report)  # the tower runs, on whole reports
    tower = train.main(another(argv, "b", "--lora-text", 0, "--drop-words", 0.3))
    for key in ("balanced_accuracy", "macro_auroc"):
        assert looked_up["rows"]["CLIP-IT"][key] == pytest.approx(tower["rows"]["CLIP-IT"][key], abs=1e-6)
    assert looked_up["best"]["value"] == pytest.approx(tower["best"]["value"], abs=1e-4)


def test_the_vision_head_of_step_two_is_where_fusion_starts(argv, monkeypatch):
    started = []
    monkeypatch.setattr(train, "train_clipit", lambda model, *rest: started.append(model.vision_head.weight.clone()))
    with pytest.raises(FileNotFoundError):  # there is no last.pt, since nothing was trained
        train.main(argv)
    heads = torch.load(run_folder(argv) / "heads.pt", weights_only=True)
    assert torch.equal(started[0], heads["start"]["weight"])


def test_the_best_state_by_the_monitor_is_what_is_tested(argv, monkeypatch):
    values = iter([3.0, 1.0, 2.0, 5.0])
    validate = train.validate
    monkeypatch.setattr(train, "validate", lambda *args: validate(*args) | {"val_loss": next(values)})
    metrics = train.main(argv + ["--ep", 4, "--chkpnt", 1])
    assert metrics["best"] == {"value": 1.0, "step": 6}
    best = torch.load(run_folder(argv) / "step_6.pt", weights_only=True)
    classifier = Classifier.from_pretrained(run_folder(argv) / "classifier")
    assert torch.equal(classifier.fusion.weight, best["fusion.weight"])


def test_early_stopping_waits_for_patience(argv, monkeypatch):
    values = iter([3.0, 1.0, 2.0, 0.95, 4.0])
    validate = train.validate
    monkeypatch.setattr(train, "validate", lambda *args: validate(*args) | {"val_loss": next(values)})
    metrics = train.main(argv + ["--ep", 9, "--early", 1, "--patience", 2, "--delta", 0.1])
    assert metrics["best"] == {"value": 0.95, "step": 12}  # kept, though too small a step for --delta to go on


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv), "--lr", "1e30", "--clip", "0", "--val-every", "0.3"])
    with pytest.raises(SystemExit) as ended:
        train.cli()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert all(word in said for word in ("not finite at step", "ce ", "kd ", "lr 1e+30", "last.pt"))
    state = torch.load(run_folder(argv) / "last.pt", weights_only=True)
    assert state["step"] == 0  # the first step at that rate ruins the model, so what is kept is what it began with
    assert all(value.abs().max() < 100 for value in state["model"].values())


def test_dropped_words_are_a_share_in_order_and_anew_for_every_seed():
    report = " ".join(f"w{i}" for i in range(100))
    once, again, other = (train.drop_words(report, 0.3, seed).split() for seed in ("0 0 7", "0 0 7", "0 1 7"))
    assert len(once) == 70 and once == again != other
    assert once == sorted(once, key=lambda word: int(word[1:]))
    assert train.drop_words("word", 0.9, "s") == "word"


def test_flags_are_taken_with_underscores_too_and_the_run_is_named_after_what_differs():
    args = train.parse_args(["--lora_r", "4", "--kd_layers=2", "--no_text"])
    assert (args.lora_r, args.kd_layers, args.no_text, args.ds) == (4, 2, True, "demo")
    assert args.run == "lora-r-4_kd-layers-2_no-text"
    assert train.parse_args([]).run == "base"


def test_help_shows_every_flag(capsys):
    with pytest.raises(SystemExit) as ended:
        train.parse_args(["--help"])
    shown = capsys.readouterr().out
    flags = ["--" + name.replace("_", "-") for name in vars(train.parse_args([]))]
    assert ended.value.code == 0 and all(flag in shown for flag in flags)


def test_the_heads_take_the_state_of_the_lowest_validation_loss():
    generator = torch.Generator().manual_seed(0)
    x = {split: torch.randn(60, 5, generator=generator) for split in ("train", "val")}
    y = {split: (x[split][:, 0] > 0).long() for split in x}
    y["train"] = y["train"] ^ (torch.rand(60, generator=generator) < 0.3).long()  # noise that training fits in the end
    torch.manual_seed(0)
    head = train.train_head(torch.nn.Sequential(torch.nn.Linear(5, 200), torch.nn.ReLU(), torch.nn.Linear(200, 2)), x, y, 0,
                            steps=3000)
    at_best = torch.nn.functional.cross_entropy(head(x["val"]), y["val"])
    on = train.train_head(head, {"train": x["train"], "val": x["train"]}, {"train": y["train"], "val": y["train"]}, 0, 3000)
    assert at_best < torch.nn.functional.cross_entropy(on(x["val"]), y["val"])


def test_complementarity_counts_what_the_text_model_alone_gets_right_by_class_too():
    labels = torch.tensor([0, 0, 0, 1, 1])
    vision, text = torch.eye(2)[[0, 1, 1, 1, 0]], torch.eye(2)[[1, 0, 1, 0, 1]]
    assert train.complementarity(vision, text, labels, ["a", "b"]) == {
        "tiles": 2, "share": 2 / 5, "share_of_vision_errors": 2 / 3,
        "per_class": {"a": {"tiles": 1, "share": 1 / 3}, "b": {"tiles": 1, "share": 1 / 2}}}


def test_text_spread_is_one_minus_the_mean_cosine_of_two_reports():
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    cosines = [torch.nn.functional.cosine_similarity(features[i], features[j], dim=0).item()
               for i in range(7) for j in range(7) if i != j]
    assert train.text_spread(features) == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-6)
    assert train.text_spread(features[:1].repeat(4, 1)) == pytest.approx(0, abs=1e-6)


def test_the_spread_of_a_fixed_text_stays_and_that_of_a_trained_one_moves(argv):
    for run, more, moves in (("fixed", ["--detach-text"], False), ("trained", [], True)):
        train.main(another(argv, run, *more))
        log = (run_folder(another(argv, run)) / "log.jsonl").read_text().splitlines()
        spreads = [json.loads(line)["text_spread"] for line in log]
        assert (spreads[0] != spreads[1]) == moves


def test_the_lora_baseline_has_lora_and_the_vision_head_alone(argv, monkeypatch):
    models = []
    train_clipit = train.train_clipit
    monkeypatch.setattr(train, "train_clipit", lambda model, *rest: models.append(model) or train_clipit(model, *rest))
    metrics = train.main(argv + ["--baseline", "lora"])
    assert list(metrics["rows"])[-1] == "LoRA with a plain head"
    trained = {name.split(".")[0] for name, p in models[0].named_parameters() if p.requires_grad}
    assert trained == {"backbone", "vision_head"}
    classifier = Classifier.from_pretrained(run_folder(argv) / "classifier")
    assert {name.split(".")[0] for name in classifier.state_dict()} == trained


def test_zero_shot_is_the_nearest_class_prompt(argv):
    from pairing import embed_images, embed_texts, load_clip
    metrics = train.main(argv + ["--baseline", "zeroshot", "clip-probe"])
    assert list(metrics["rows"]) == ["vision head", "text head", "CLIP linear probe", "CLIP zero-shot", "CLIP-IT"]
    clip = load_clip(argv[argv.index("--clip-model") + 1])
    tiles = load_tiles(argv[1], "test", transform=clip.preprocess)
    prompts = embed_texts(clip, [f"an H&E image of {name}." for name in "ABC"])
    nearest = (embed_images(clip, tiles) @ prompts.T).argmax(dim=1)
    right = (nearest == torch.tensor(tiles.labels)).double().mean().item()
    assert metrics["rows"]["CLIP zero-shot"]["accuracy"] == pytest.approx(right)


def test_the_table_gathers_runs_that_differ_in_the_seed_alone(argv, capsys):
    folder = argv[argv.index("--dir") + 1]
    gains = []
    for sd in (0, 1):
        rows = train.main(another(argv, f"sd{sd}", "--sd", sd))["rows"]
        gains.append(100 * (rows["CLIP-IT"]["balanced_accuracy"] - rows["vision head"]["balanced_accuracy"]))
    train.main(another(argv, "other", "--no-text"))
    capsys.readouterr()
    lines = train.main(["--table", folder, "--csv", folder / "table.csv"])["table"]
    both = next(line for line in lines if line["row"] == "CLIP-IT")
    assert both["n"] == 2 and both["gain_mean"] == pytest.approx(sum(gains) / 2)
    assert both["gain_sd"] == pytest.approx(abs(gains[0] - gains[1]) / 2 ** 0.5)
    assert "n = 2" in capsys.readouterr().out
    with open(folder / "table.csv") as file:
        assert [row["row"] for row in csv.DictReader(file)] == [line["row"] for line in lines]


def test_what_a_run_was_is_in_args_json(argv):
    train.main(argv)
    held = json.loads((run_folder(argv) / "args.json").read_text())
    assert held["config"]["lora_r"] == 16 and len(held["config"]["tiles"]) == len(held["config"]["reports_text"]) == 64
    assert held["versions"]["torch"] == torch.__version__.split("+")[0] and held["places"]["device"] == "cpu"
    assert 0 < held["parameters"]["trained"] < held["parameters"]["total"] and "commit" in held


@pytest.mark.parametrize("flag", [["--wandb", 1], ["--tensorboard"]])
def test_a_tracker_that_is_not_installed_is_one_line(argv, flag, monkeypatch, capsys):
    for module in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv + flag)])
    with pytest.raises(SystemExit) as ended:
        train.cli()
    said = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and "pip install" in said and flag[0] in said and len(said.splitlines()) == 1


KILLED = """
import os, signal, sys
sys.path[:0] = [{root!r}]
import torch
import pairing, train
torch.set_num_threads(1)
place, calls, saved = {place!r}, [0], torch.save

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def save(state, path):  # dies with half a file written
    saved(state, path)
    calls[0] += 1
    if place == f"save {{calls[0]}}":
        os.truncate(path, os.path.getsize(path) // 2)
        die()

torch.save = save
if place == "between heads":
    head = train.train_head
    train.train_head = lambda *args: (calls.append(1), die() if len(calls) == 3 else None, head(*args))[-1]
if place == "after log":
    finite = train.finite
    train.open_trackers = lambda args, run: [lambda line, step: die() if step == 4 else None]
if place == "before metrics":
    train.Classifier.from_pretrained = lambda folder: die()
train.main({argv!r})
"""


@pytest.mark.parametrize("place", ["save 2", "between heads", "save 5", "save 7", "after log", "before metrics"])
def test_a_run_that_is_killed_and_resumed_ends_like_one_that_was_not(argv, place):
    """Killed inside a write (of the cache, of heads.pt, of last.pt), between steps and between writes."""
    more = ["--val-every", 0.5, "--lora-dropout", 0.1]
    whole, killed = another(argv, "whole", *more), another(argv, "killed", *more)
    code = KILLED.format(root=str(ROOT), place=place, argv=[str(word) for word in killed])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert not (run_folder(killed) / "metrics.json").exists()
    train.main(killed + ["--resume"])
    train.main(whole)
    assert bytes_of(killed) == bytes_of(whole)
    steps = [[json.loads(line)["step"] for line in (run_folder(a) / "log.jsonl").read_text().splitlines()]
             for a in (whole, killed)]
    assert steps[0] == steps[1] == [2, 4, 6]


def test_the_modules_import_only_what_the_design_allows():
    for module, never in (("data", ("pairing", "lora", "clipit", "train")), ("pairing", ("data", "lora", "clipit", "train")),
                          ("lora", ("data", "pairing", "clipit", "train", "timm", "open_clip", "torchvision")),
                          ("clipit", ("data", "pairing", "train", "open_clip"))):
        code = f"import sys, {module}; print([m for m in {never!r} if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.strip() == "[]", (module, done.stdout, done.stderr)
