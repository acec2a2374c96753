"""Whole runs on a small world."""
import csv
import json
import subprocess
import sys
from unittest.mock import DEFAULT, patch

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

import train
from clipit import Classifier
from data import load_reports, load_tiles
from pairing import embed_images, embed_texts, load_clip, nearest_text


def replaced(argv, flag, value):
    argv = list(argv)
    argv[argv.index(flag) + 1] = value
    return argv


def another(argv, run, *more):
    return replaced(argv, "--run", run) + list(more)


def run_folder(argv):
    return argv[argv.index("--dir") + 1] / "tiles" / argv[argv.index("--run") + 1]


def bytes_of(argv):
    return (run_folder(argv) / "metrics.json").read_bytes()


def log_of(argv):
    return [json.loads(line) for line in open(run_folder(argv) / "log.jsonl")]


def rows_of(argv, name):
    with open(run_folder(argv) / name) as file:
        return list(csv.DictReader(file))


def clip_of(argv):
    return load_clip(argv[argv.index("--clip-model") + 1])


def model_of(argv):
    """The model that a run begins step 4 with; the run ends there."""
    with patch.object(train, "train_clipit", side_effect=InterruptedError) as step_4:
        with pytest.raises(InterruptedError):
            train.main(argv)
    return step_4.call_args.args[0]


def said_by_cli(argv, monkeypatch, capsys, code=2):
    """What train.py says on stderr when it ends with that exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, argv)])
    with pytest.raises(SystemExit) as ended:
        train.cli()
    said = capsys.readouterr().err
    assert ended.value.code == code and "Traceback" not in said
    return said


def monitored(key, values, monkeypatch):
    """Validations find these values, one after another."""
    values, validate = iter(values), train.validate
    monkeypatch.setattr(train, "validate", lambda *args: validate(*args) | {key: next(values)})


def test_a_run_leaves_every_file_and_prints_the_table(argv, capsys):
    metrics = train.main(argv)
    printed, run = capsys.readouterr().out, run_folder(argv)
    assert {path.name for path in run.iterdir()} == {
        "args.json", "log.jsonl", "pairs.csv", "last.pt", "metrics.json", "predictions.csv",
        "classifier", "report.html", ".lock"}
    assert list(metrics["rows"]) == ["vision head", "text head", "CLIP-IT"]
    assert json.loads((run / "metrics.json").read_text()) == metrics
    for said in ("vision head (frozen backbone, unimodal)", "text head (paired reports)",
                 "CLIP-IT (image only)", "reports used", "complementarity", str(run)):
        assert said in printed
    assert [line["step"] for line in log_of(argv)] == [3, 6]
    for line in log_of(argv):
        assert line["loss"] == pytest.approx(line["ce"] + line["kd"], abs=1e-5)
        assert line["val_loss"] == pytest.approx(line["val_ce"] + line["val_kd"], abs=1e-5)
    held = json.loads((run / "args.json").read_text())  # what the run was
    assert held["config"]["lora_r"] == 16
    assert held["inputs"].keys() == {"reports", "train tiles", "val tiles", "test tiles", "CLIP",
                                    "backbone"}
    assert held["versions"]["torch"] == torch.__version__.split("+")[0]


def test_without_epochs_a_run_is_pairs_page_and_heads_alone(argv):
    whole, alone = train.main(argv), another(argv, "alone", "--ep", 0)
    metrics = train.main(alone)
    assert {path.name for path in run_folder(alone).iterdir()} == {
        "args.json", "pairs.csv", "metrics.json", "report.html", ".lock"}
    assert list(metrics["rows"]) == ["vision head", "text head"] and metrics["best"] is None
    assert all(metrics["rows"][name] == whole["rows"][name] for name in metrics["rows"])
    assert metrics["complementarity"] == whole["complementarity"]


def test_predictions_are_those_of_the_saved_text_free_classifier(argv):
    metrics, rows = train.main(argv), rows_of(argv, "predictions.csv")
    tiles = load_tiles(argv[1], "test")
    classifier = Classifier.from_pretrained(run_folder(argv) / "classifier")
    probabilities = classifier.predict([image for image, _ in tiles])
    assert [row["path"] for row in rows] == tiles.paths
    assert [int(row["target"]) for row in rows] == tiles.labels
    for row, p in zip(rows, probabilities):
        assert [float(row[f"class_{i}"]) for i in range(3)] == pytest.approx(p.tolist(), abs=1e-5)
    right = sum(row["pred"] == row["target"] for row in rows)
    assert metrics["rows"]["CLIP-IT"]["accuracy"] == pytest.approx(right / len(rows))


def test_pairs_csv_names_the_nearest_report_of_every_tile(argv):
    train.main(argv + ["--ep", 0])
    rows, clip = rows_of(argv, "pairs.csv"), clip_of(argv)
    texts = embed_texts(clip, load_reports(argv[3]))
    for split in ("train", "val", "test"):
        tiles = load_tiles(argv[1], split, transform=clip.preprocess)
        index, similarity = nearest_text(embed_images(clip, tiles), texts)
        mine = [row for row in rows if row["split"] == split]
        assert [row["tile"] for row in mine] == tiles.paths
        assert [int(row["report"]) for row in mine] == index.tolist()
        cosines = [float(row["similarity"]) for row in mine]
        assert cosines == pytest.approx(similarity.tolist(), abs=1e-5)
    lines = (argv[3]).read_text().splitlines()
    for row in rows:  # the place and the first words are the report's own
        name, _, number = row["place"].split()
        assert name == "reports.txt" and lines[int(number) - 1].startswith(row["text"])


def test_the_same_seed_gives_the_same_metrics_with_workers_or_without(argv, world):
    argv += ["--lora-dropout", 0.2, "--drop-words", 0.3, "--ep", 1]
    workers = replaced(argv, "--dir", world / "workers") + ["--worker", 2]  # a cache of its own
    other = another(argv, "other", "--sd", 1)
    for run in (argv, workers, other):
        train.main(run)
    assert bytes_of(argv) == bytes_of(workers) != bytes_of(other)


def test_a_run_that_is_stopped_and_resumed_ends_like_one_that_was_not(argv, monkeypatch, capsys):
    argv += ["--lora-dropout", 0.2, "--val-int", 0.5, "--scheduler", 1]
    stopped = another(argv, "stopped")
    stop = dict(wraps=train.validate, side_effect=[DEFAULT, KeyboardInterrupt])
    with patch.object(train, "validate", **stop):
        said = said_by_cli(stopped, monkeypatch, capsys, code=130)
    assert "the same command goes on" in said and len(said.splitlines()) == 1
    assert not (run_folder(stopped) / "metrics.json").exists()
    train.main(argv)
    train.main(stopped)
    assert bytes_of(stopped) == bytes_of(argv)
    assert [line["step"] for line in log_of(stopped)] == [2, 4, 6]


def test_features_are_computed_once_for_the_same_tiles_reports_and_weights(argv, world, capsys):
    def computed(run, *more):
        """The kinds of features that a run computed, and how often."""
        train.main(another(argv, run, "--ep", 0, *more))
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("features of ")]
        assert len(said) == 7  # of the reports; of three splits by CLIP and by the backbone
        kinds = [line.split()[2] + line.split()[-2] for line in said if line.endswith("computed")]
        return {kind: kinds.count(kind) for kind in kinds}
    assert computed("first") == {"CLIPreports:": 1, "CLIPtiles:": 3, "backbonetiles:": 3}
    assert computed("again") == {}
    Image.new("RGB", (64, 64)).save(world / "tiles" / "val" / "B" / "1.png")
    assert computed("tile") == {"CLIPtiles:": 1, "backbonetiles:": 1}
    assert computed("weights", "--weights", "none") == {"backbonetiles:": 3}
    next((world / "runs" / "cache").glob("CLIP-reports-*")).write_bytes(b"broken")
    assert computed("broken") == {"CLIPreports:": 1}
    with open(world / "reports.txt", "a") as file:
        file.write("one report more\n")
    assert computed("reports") == {"CLIPreports:": 1}


def test_without_text_nothing_but_the_distillation_differs(argv):
    starts = []
    for run, more in (("text", []), ("none", ["--no-text"])):
        model = model_of(another(argv, run, *more))
        starts.append({name: p for name, p in model.named_parameters() if "text_tower" not in name})
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(p, starts[1][name]) for name, p in starts[0].items())
    without = another(argv, "none", "--no-text")
    assert list(train.main(without)["rows"])[-1] == "CLIP-IT without text"
    for line in log_of(without):
        assert line["loss"] == line["ce"] and line["val_loss"] == line["val_ce"]
        assert "kd" not in line and "text_spread" not in line


def test_a_batch_encodes_each_distinct_report_once(argv, monkeypatch):
    seen, forward = [], train.forward

    def watched(model, images, report, text_emb, tokens, args):
        encoded = []
        hook = model.text_tower.register_forward_pre_hook(lambda _, given: encoded.append(given[0]))
        logits, t_hat, t = forward(model, images, report, text_emb, tokens, args)
        hook.remove()
        torch.testing.assert_close(t, model.text_tower(tokens[report]), atol=1e-5, rtol=1e-5)
        seen.append((encoded, report, tokens))
        return logits, t_hat, t
    monkeypatch.setattr(train, "forward", watched)
    train.main([*argv, "--lora-text", 1])
    assert len(seen) == 2 * (3 + 2)  # of two epochs, in training and in validation
    for encoded, report, tokens in seen:
        assert len(encoded) == 1 and torch.equal(encoded[0], tokens[report.unique()])
    # some tiles of a batch did share a report, and not all
    assert any(1 < len(encoded[0]) < len(report) for encoded, report, _ in seen)


def test_fixed_text_is_looked_up_and_gives_what_the_frozen_tower_gives(argv, monkeypatch):
    looked_up = train.main(another(argv, "a"))
    build_model = train.build_model

    def with_tower(backbone, clip, *rest):
        model = build_model(backbone, clip, *rest)
        model.text_tower = clip.text_tower
        return model

    def with_tokens(clip, reports, text_emb, args):
        return torch.full_like(text_emb, torch.nan), clip.tokenize(reports)
    monkeypatch.setattr(train, "build_model", with_tower)
    monkeypatch.setattr(train, "text_of", with_tokens)
    tower = train.main(another(argv, "b"))
    for metrics in (looked_up, tower):
        assert metrics["rows"]["CLIP-IT"] == looked_up["rows"]["CLIP-IT"]
    assert looked_up["best"]["value"] == pytest.approx(tower["best"]["value"], abs=1e-4)


def test_the_vision_head_of_step_two_is_where_fusion_starts(argv, monkeypatch):
    def trained(name, head, *rest):
        torch.nn.init.ones_(next(head.parameters()))
    monkeypatch.setattr(train, "train_head", trained)
    assert (model_of(argv).vision_head.weight == 1).all()


@pytest.mark.parametrize("monitor, values", [("val_loss", [3.0, 1.0, 2.0]),
                                             ("val_bacc", [0.3, 0.8, 0.7])])
def test_the_best_state_by_the_monitor_is_what_is_tested(argv, monitor, values, monkeypatch):
    monitored(monitor, values, monkeypatch)
    metrics = train.main(argv + ["--ep", 3, "--chkpnt", "--monitor", monitor])
    assert metrics["best"] == {"value": values[1], "step": 6}
    best = torch.load(run_folder(argv) / "step_6.pt", weights_only=True)
    classifier = Classifier.from_pretrained(run_folder(argv) / "classifier")
    assert torch.equal(classifier.fusion.weight, best["fusion.weight"])


def test_early_stopping_waits_for_patience(argv, monkeypatch):
    monitored("val_loss", [3.0, 1.0, 2.0, 0.95, 4.0], monkeypatch)
    metrics = train.main(argv + ["--ep", 9, "--monitor", "val_loss", "--early", "--patience", 2, "--delta", 0.1])
    # kept, though too small a step for --delta to go on
    assert metrics["best"] == {"value": 0.95, "step": 12}


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(argv, monkeypatch, capsys):
    nan = torch.tensor(torch.nan)
    losses = [DEFAULT] * 5 + [(nan, {"ce": nan, "kd": nan})]  # after three steps, a look, a step
    with patch.object(train, "clipit_loss", wraps=train.clipit_loss, side_effect=losses):
        said = said_by_cli(argv, monkeypatch, capsys)
    for word in ("not finite at step 5", "ce ", "kd ", "--lr", "last.pt"):
        assert str(word) in said
    held = torch.load(run_folder(argv) / "last.pt", weights_only=True)
    assert held["state"]["step"] == 3


def test_dropped_words_are_a_share_in_order_and_anew_for_every_seed():
    report = " ".join(f"w{i}" for i in range(100))
    once, again, other = (train.drop_words(report, 0.3, seed).split()
                          for seed in ("0 0 7", "0 0 7", "0 1 7"))
    assert len(once) == 70 and once == again != other
    assert once == sorted(once, key=lambda word: int(word[1:]))
    assert train.drop_words("word", 0.9, "s") == "word"


@pytest.mark.parametrize("lora_text", [0, 1])
def test_an_epoch_sees_what_is_left_of_each_report(argv, lora_text):
    args = train.parse_args(argv + ["--drop-words", 0.5, "--lora-text", lora_text, "--sd", 3])
    clip, reports = clip_of(argv), load_reports(argv[3])
    left = [train.drop_words(report, 0.5, f"3 1 {i}") for i, report in enumerate(reports)]
    features, tokens = train.text_of(clip, reports, torch.zeros(12, 64), args, epoch=1)
    if lora_text:
        assert torch.equal(tokens, clip.tokenize(left))
    else:
        assert tokens is None and torch.equal(features, embed_texts(clip, left))


def test_the_heads_take_the_state_of_the_lowest_validation_loss():
    generator = torch.Generator().manual_seed(0)
    x = {split: torch.randn(60, 5, generator=generator) for split in ("train", "val")}
    y = {split: (x[split][:, 0] > 0).long() for split in x}
    noise = torch.rand(60, generator=generator) < 0.3  # that training fits in the end
    y["train"] = y["train"] ^ noise.long()

    def val_loss(**val):
        torch.manual_seed(0)
        head = torch.nn.Sequential(torch.nn.Linear(5, 200), torch.nn.ReLU(),
                                   torch.nn.Linear(200, 2))
        train.train_head("head", head, x | {"val": val["x"]}, y | {"val": val["y"]}, 0, steps=1000)
        return F.cross_entropy(head(x["val"]), y["val"])
    assert val_loss(x=x["val"], y=y["val"]) < val_loss(x=x["train"], y=y["train"])


def test_complementarity_counts_what_the_text_model_alone_gets_right_by_class_too():
    labels = torch.tensor([0, 0, 0, 1, 1])
    vision, text = torch.eye(2)[[0, 1, 1, 1, 0]], torch.eye(2)[[1, 0, 1, 0, 1]]
    assert train.complementarity(vision, text, labels, ["a", "b"]) == {
        "tiles": 2, "share": 2 / 5, "share_of_vision_errors": 2 / 3,
        "per_class": {"a": {"tiles": 1, "share": 1 / 3}, "b": {"tiles": 1, "share": 1 / 2}}}


def test_text_spread_is_one_minus_the_mean_cosine_of_two_reports():
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    cosines = [F.cosine_similarity(features[i], features[j], dim=0).item()
               for i in range(7) for j in range(7) if i != j]
    expected = 1 - sum(cosines) / len(cosines)
    assert train.text_spread(features) == pytest.approx(expected, abs=1e-6)
    assert train.text_spread(features[:1].repeat(4, 1)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("lora_text, moves", [(0, False), (1, True)])
def test_the_spread_of_a_fixed_text_stays_and_that_of_a_trained_one_moves(argv, lora_text, moves):
    train.main(argv + ["--lora-text", lora_text])
    spreads = [line["text_spread"] for line in log_of(argv)]
    assert (spreads[0] != spreads[1]) == moves


def test_the_lora_baseline_has_lora_and_the_vision_head_alone(argv):
    argv += ["--baseline", "lora"]
    model = model_of(argv)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"backbone", "vision_head"}
    assert list(train.main(argv)["rows"])[-1] == "LoRA with a plain head"
    classifier = Classifier.from_pretrained(run_folder(argv) / "classifier")
    assert {name.split(".")[0] for name in classifier.state_dict()} == trained


def test_zero_shot_is_the_nearest_class_prompt(argv):
    rows = train.main(argv + ["--baseline", "zeroshot", "clip-probe", "--ep", 0])["rows"]
    assert list(rows) == ["vision head", "text head", "CLIP linear probe", "CLIP zero-shot"]
    clip = clip_of(argv)
    tiles = load_tiles(argv[1], "test", transform=clip.preprocess)
    prompts = embed_texts(clip, [f"an H&E image of {name}." for name in "ABC"])
    nearest = (embed_images(clip, tiles) @ prompts.T).argmax(dim=1)
    right = (nearest == torch.tensor(tiles.labels)).double().mean().item()
    assert rows["CLIP zero-shot"]["accuracy"] == pytest.approx(right)


def test_the_table_has_a_line_a_variant_and_differences_paired_by_seed(argv, capsys):
    """Two seeds: t of one degree of freedom is 12.706, and sd / sqrt(n) half of their distance."""
    argv += ["--monitor", "last", "--lr", 0.01]  # so that the variants differ; both have it
    folder, percent = argv[argv.index("--dir") + 1], {}
    for sd in (0, 1):
        for more in ([], ["--no-text"]):
            rows = train.main([*replaced(argv, "--run", f"{sd}{more}"), "--sd", sd, *more])["rows"]
            percent[sd, bool(more)] = 100 * list(rows.values())[-1]["balanced_accuracy"]
    train.main([*another(argv, "twice"), "--sd", 1])
    capsys.readouterr()
    lines = {line["flags"]: line for line in train.main(["--table", folder])["table"]}
    printed, first, none = capsys.readouterr().out, lines["-"], lines["--no-text"]
    assert "seed 1 once more" in printed and len(lines) == 2
    assert first["n"] == none["n"] == 2 and first["paper"] == ""
    mean = (percent[0, False] + percent[1, False]) / 2
    sd = abs(percent[0, False] - percent[1, False]) / 2 ** 0.5
    assert first["trained"] == f"{mean:.1f} ± {sd:.1f}"
    gains = [percent[sd, False] - percent[sd, True] for sd in (0, 1)]
    assert gains[0] != gains[1]
    mean, half = sum(gains) / 2, 12.706 * abs(gains[0] - gains[1]) / 2
    low, high = (f"{mean + sign * half:+.1f}" for sign in (-1, 1))
    assert first["minus no-text"] == f"{mean:+.1f} [{low}, {high}]"
    assert none["minus no-text"] == "" and none["minus no flag"].startswith(f"{0 - mean:+.1f} [")
    with open(folder / "table.csv") as file:
        lines = list(csv.DictReader(file))
    assert {line["flags"]: line["trained"] for line in lines} == {
        "-": first["trained"], "--no-text": none["trained"]}
    assert f"| {first['trained']} |" in printed


def test_wandb_that_is_not_installed_is_one_line(argv, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = said_by_cli(argv + ["--wandb"], monkeypatch, capsys)
    assert "wandb" in said and len(said.splitlines()) == 1


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import torch, train
torch.set_num_threads(1)  # as here: another number sums in another order
train.train_head.__defaults__ = {heads}
replace, written = os.replace, []

def killing_replace(part, path):
    written.append(path.name)
    if sum(name.startswith(file) for name in written) == number:
        os.truncate(part, os.path.getsize(part) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(part, path)

for (file, number), argv in {runs!r}.items():  # a fork each: torch is imported once
    child = os.fork()
    if not child:
        os.replace = killing_replace
        train.main(argv)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, file
"""


def test_a_run_that_is_killed_and_resumed_ends_like_one_that_was_not(argv, world):
    """Killed while a file is written: of the cache, the first and the second last.pt, and
    metrics.json, the last of all."""
    argv += ["--val-int", 0.5, "--lora-dropout", 0.1]
    places = [("CLIP-val-tiles", 1), ("last.pt", 1), ("last.pt", 2), ("metrics.json", 1)]
    killed = {place: replaced(argv, "--dir", world / f"{place}") for place in places}
    runs = {place: [str(word) for word in run] for place, run in killed.items()}
    code = KILLED.format(root=str(ROOT), heads=train.train_head.__defaults__, runs=runs)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    train.main(argv)
    for place, run in killed.items():
        assert not (run_folder(run) / "metrics.json").exists()
        train.main(run)
        assert bytes_of(run) == bytes_of(argv), place
        assert not list(run_folder(run).glob(".tmp*")), place
        assert [line["step"] for line in log_of(run)] == [2, 4, 6], place


def test_the_modules_import_only_what_the_design_allows():
    never = {"lora": "data pairing clipit train timm open_clip torchvision",
             "pairing": "data lora clipit train timm open_clip torchvision",
             "data": "pairing lora clipit train timm open_clip",
             "clipit": "data pairing train open_clip"}
    code = f"""import sys
for name, others in {never}.items():
    __import__(name)
    assert not set(others.split()) & sys.modules.keys(), name
    for own in {list(never)}:
        sys.modules.pop(own, None)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
