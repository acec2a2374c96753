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
                                               "predictions.csv", "classifier"}
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
    monkeypatch.setattr(train, "train_head", None)  # finished steps are not done again
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
        assert len(report) == tiles and len(tokens) == len(tokens.unique(dim=0)) == len(report.unique()) <= 6


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
    assert torch.equal(started[0], heads["vision_head"]["weight"])


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
    assert all(value.isfinite().all() for value in state["model"].values())


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


def test_the_modules_import_only_what_the_design_allows():
    for module, never in (("data", ("pairing", "lora", "clipit", "train")), ("pairing", ("data", "lora", "clipit", "train")),
                          ("lora", ("data", "pairing", "clipit", "train", "timm", "open_clip", "torchvision")),
                          ("clipit", ("data", "pairing", "train", "open_clip"))):
        code = f"import sys, {module}; print([m for m in {never!r} if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.strip() == "[]", (module, done.stdout, done.stderr)
