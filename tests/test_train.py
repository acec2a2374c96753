"""Whole runs on a small world, their figures and their page."""
import csv
import html
import json
import math
import multiprocessing
import os
import re
import signal
from html.parser import HTMLParser
from unittest.mock import DEFAULT, patch

import pytest
import torch
import torch.nn.functional as F
from conftest import REPORTS, bytes_of, clip_of, folder_of, log_of, model_of, rows_of
from PIL import Image

import train
from clipit import Classifier
from data import load_tiles
from pairing import embed_images, embed_texts, nearest_text


def test_a_run_leaves_every_file_and_prints_the_table(finished):
    assert {path.name for path in finished.folder.iterdir()} == {
        "args.json", "log.jsonl", "pairs.csv", "last.pt", "metrics.json", "predictions.csv",
        "classifier", "report.html", ".lock"}
    assert list(finished.metrics["rows"]) == ["vision head", "text head", "CLIP-IT"]
    assert json.loads(bytes_of(finished.argv)) == finished.metrics
    for words in ("vision head (frozen backbone, unimodal)", "text head (paired reports)",
                  "CLIP-IT (image only)", "reports used", "complementarity", str(finished.folder)):
        assert words in finished.printed
    assert [line["step"] for line in log_of(finished.argv)] == [3, 6]
    for line in log_of(finished.argv):
        assert line["loss"] == pytest.approx(line["ce"] + line["kd"], abs=1e-5)
        assert line["val_loss"] == pytest.approx(line["val_ce"] + line["val_kd"], abs=1e-5)
    held = json.loads((finished.folder / "args.json").read_text())  # what the run was
    assert held["config"]["lora_r"] == 16
    assert held["inputs"].keys() == {"reports", "train tiles", "val tiles", "test tiles", "CLIP",
                                    "backbone"}
    assert held["versions"]["torch"] == torch.__version__.split("+")[0]


def test_without_epochs_a_run_is_pairs_page_and_heads_alone(finished):
    alone, whole = [*finished.argv, "--run", "alone", "--ep", 0], finished.metrics
    metrics = train.main(alone)
    assert {path.name for path in folder_of(alone).iterdir()} == {
        "args.json", "pairs.csv", "metrics.json", "report.html", ".lock"}
    assert list(metrics["rows"]) == ["vision head", "text head"] and metrics["best"] is None
    assert all(metrics["rows"][name] == whole["rows"][name] for name in metrics["rows"])
    assert metrics["complementarity"] == whole["complementarity"]


def test_predictions_are_those_of_the_saved_text_free_classifier(finished):
    rows, tiles = rows_of(finished.argv, "predictions.csv"), load_tiles(finished.argv[1], "test")
    classifier = Classifier.from_pretrained(finished.folder)
    probabilities = classifier.predict([image for image, _ in tiles])
    assert [row["path"] for row in rows] == tiles.paths
    assert [int(row["target"]) for row in rows] == tiles.labels
    for row, p in zip(rows, probabilities):
        assert [float(row[f"class_{i}"]) for i in range(3)] == pytest.approx(p.tolist(), abs=1e-5)
        assert row["pred_class"] == "ABC"[int(row["pred"])]
    right = sum(row["pred"] == row["target"] for row in rows)
    assert finished.metrics["rows"]["CLIP-IT"]["accuracy"] == pytest.approx(right / len(rows))


def test_pairs_csv_names_the_nearest_report_of_every_tile(finished):
    rows, clip = rows_of(finished.argv, "pairs.csv"), clip_of(finished.argv)
    texts = embed_texts(clip, REPORTS)
    for split in ("train", "val", "test"):
        tiles = load_tiles(finished.argv[1], split, transform=clip.preprocess)
        index, similarity = nearest_text(embed_images(clip, tiles), texts)
        of_split = [row for row in rows if row["split"] == split]
        assert [row["tile"] for row in of_split] == tiles.paths
        assert [int(row["report"]) for row in of_split] == index.tolist()
        cosines = [float(row["similarity"]) for row in of_split]
        assert cosines == pytest.approx(similarity.tolist(), abs=1e-5)
    for row in rows:  # the place and the first words are the report's own
        name, _, number = row["place"].split()
        assert name == "reports.txt" and REPORTS[int(number) - 1].startswith(row["text"])


def test_the_same_seed_gives_the_same_metrics_with_workers_or_without(argv, world):
    argv += ["--lora-dropout", 0.2, "--drop-words", 0.3, "--ep", 1]
    workers = [*argv, "--dir", world / "workers", "--worker", 2]  # a cache of its own
    other = [*argv, "--run", "other", "--sd", 1]
    for run in (argv, workers, other):
        train.main(run)
    assert bytes_of(argv) == bytes_of(workers) != bytes_of(other)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_a_signal_ends_goes_on_and_ends_like_one_that_was_not(argv, said, number, code):
    argv += ["--val-int", 0.5, "--lora-dropout", 0.2, "--scheduler", 1]
    stopped, validate = [*argv, "--run", "stopped"], train.validate

    def interrupted(*args):
        signal.raise_signal(number)
        return validate(*args)
    with patch.object(train, "validate", interrupted):
        words = said(stopped, code)
    assert signal.getsignal(number) == signal.SIG_DFL  # a second one would end it at once
    assert "ends at the next batch" in words and "the same command goes on" in words
    assert not (folder_of(stopped) / "metrics.json").exists()
    assert not list(folder_of(stopped).glob(".tmp*"))
    train.SIGNALS.clear()
    for run in (argv, stopped):
        train.main(run)
    assert bytes_of(stopped) == bytes_of(argv)
    assert [line["step"] for line in log_of(stopped)] == [2, 4, 6]
    for line in log_of(stopped):  # the schedule is a cosine by step down to a tenth
        share = (1 + math.cos(math.pi * line["step"] / 6)) / 2
        assert line["lr"] == pytest.approx(1e-4 + (1e-3 - 1e-4) * share)


def run_until_killed(argv, file, number):
    """In a process of its own, that dies while it writes that file for the time of that number."""
    replace, written = os.replace, []

    def killing_replace(part, path):
        written.append(path.name)
        if sum(name.startswith(file) for name in written) == number:
            os.truncate(part, os.path.getsize(part) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(part, path)
    os.replace = killing_replace
    train.main(argv)


def test_a_run_that_is_killed_and_resumed_ends_like_one_that_was_not(argv, world):
    """Killed while it writes the cache, the second last.pt, and metrics.json, the last of all."""
    argv += ["--val-int", 0.5, "--lora-dropout", 0.1]
    server, killed = multiprocessing.get_context("forkserver"), []
    server.set_forkserver_preload(["open_clip", "timm"])  # imported once
    for place in (("CLIP-val-tiles", 1), ("last.pt", 2), ("metrics.json", 1)):
        run = [*argv, "--dir", world / f"{place}"]
        killed.append((run, server.Process(target=run_until_killed, args=(run, *place))))
        killed[-1][1].start()
    train.main(argv)
    for run, process in killed:
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (folder_of(run) / "metrics.json").exists()
        train.main(run)
        assert bytes_of(run) == bytes_of(argv)
        assert not list(folder_of(run).glob(".tmp*"))
        assert [line["step"] for line in log_of(run)] == [2, 4, 6]


def test_features_are_computed_once_for_the_same_tiles_reports_and_weights(argv, world, capsys):
    def computed(run, *more):
        """The kinds of features that a run computed, and how often."""
        train.main([*argv, "--run", run, "--ep", 0, *more])
        lines = [line.split() for line in capsys.readouterr().out.splitlines()]
        lines = [words for words in lines if words[:2] == ["features", "of"]]
        assert len(lines) == 7  # of the reports; of three splits by CLIP and by the backbone
        kinds = [words[2] + words[-2] for words in lines if words[-1] == "computed"]
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


def test_without_text_nothing_but_the_distillation_differs(finished):
    argv = [*finished.argv, "--run", "none", "--no-text"]
    with patch.object(train, "train_head", wraps=train.train_head) as heads:
        starts = [model_of(run).state_dict() for run in (argv, [*finished.argv, "--run", "text"])]
    unimodal = heads.call_args_list[0].args[1]  # where fusion starts
    assert torch.equal(starts[0]["vision_head.weight"], unimodal.weight)
    assert starts[0].keys() == starts[1].keys()
    assert all(torch.equal(p, starts[1][name]) for name, p in starts[0].items())
    assert list(train.main(argv)["rows"])[-1] == "CLIP-IT without text"
    for line in log_of(argv):
        assert line["loss"] == line["ce"] and line["val_loss"] == line["val_ce"]
        assert "kd" not in line and "text_spread" not in line
    card = (folder_of(argv) / "classifier" / "README.md").read_text()
    assert "CLIP-IT without text, this model" in card and "**Training text**: none" in card


def test_a_batch_encodes_each_distinct_report_once(finished, monkeypatch):
    calls, forward = [], train.forward

    def watched(model, images, report, text_emb, tokens, args):
        encoded = []
        hook = model.text_tower.register_forward_pre_hook(lambda _, given: encoded.append(given[0]))
        logits, t_hat, t = forward(model, images, report, text_emb, tokens, args)
        hook.remove()
        torch.testing.assert_close(t, model.text_tower(tokens[report]), atol=1e-5, rtol=1e-5)
        calls.append((encoded, report, tokens))
        return logits, t_hat, t
    monkeypatch.setattr(train, "forward", watched)
    argv = [*finished.argv, "--run", "trained-text", "--lora-text", 1]
    train.main(argv)
    assert len(calls) == 2 * (3 + 2)  # of two epochs, in training and in validation
    for encoded, report, tokens in calls:
        assert len(encoded) == 1 and torch.equal(encoded[0], tokens[report.unique()])
    # some tiles of a batch did share a report, and not all
    assert any(1 < len(encoded[0]) < len(report) for encoded, report, _ in calls)
    for run, moves in ((argv, True), (finished.argv, False)):  # the text's features
        first, second = (line["text_spread"] for line in log_of(run))
        assert (first != second) == moves


def test_fixed_text_is_looked_up_and_gives_what_the_frozen_tower_gives(finished, monkeypatch):
    build_model = train.build_model

    def with_tower(backbone, clip, *rest):
        model = build_model(backbone, clip, *rest)
        model.text_tower = clip.text_tower
        return model

    def with_tokens(clip, reports, text_emb, args):
        return torch.full_like(text_emb, torch.nan), clip.tokenize(reports)
    monkeypatch.setattr(train, "build_model", with_tower)
    monkeypatch.setattr(train, "text_of", with_tokens)
    argv = [*finished.argv, "--run", "tower"]
    assert train.main(argv)["rows"] == finished.metrics["rows"]
    for by_tower, looked_up in zip(log_of(argv), log_of(finished.argv), strict=True):
        assert by_tower["val_loss"] == pytest.approx(looked_up["val_loss"], abs=1e-4)


@pytest.mark.parametrize("monitor, key, values, best", [
    ("val_loss", "val_loss", [3.0, 1.0, 2.0], {"value": 1.0, "step": 6}),
    ("val_bacc", "val_bacc", [0.3, 0.8, 0.7], {"value": 0.8, "step": 6}),
    ("last", "val_loss", [1.0, 2.0, 3.0], {"value": 9, "step": 9})])
def test_the_best_state_by_the_monitor_is_what_is_tested(argv, validations, monitor, key, values,
                                                         best):
    validations(key, values)
    assert train.main([*argv, "--ep", 3, "--chkpnt", "--monitor", monitor])["best"] == best
    kept = torch.load(folder_of(argv) / f"step_{best['step']}.pt", weights_only=True)
    classifier = Classifier.from_pretrained(folder_of(argv))
    assert torch.equal(classifier.fusion.weight, kept["fusion.weight"])


def test_early_stopping_waits_for_patience(finished, validations):
    validations("val_loss", [3.0, 1.0, 2.0, 0.95, 4.0])
    early = ["--run", "early", "--ep", 9, "--monitor", "val_loss", "--early", "--patience", 2]
    best = train.main([*finished.argv, *early, "--delta", 0.1])["best"]
    assert best == {"value": 0.95, "step": 12}  # too small a step for --delta to go on


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(argv, said):
    nan = torch.tensor(torch.nan)
    bad = torch.tensor(torch.nan, requires_grad=True), {"ce": nan, "kd": nan}
    losses = [DEFAULT] * 5 + [bad] + [DEFAULT] * 3  # after three steps, a look, a step
    with patch.object(train, "clipit_loss", wraps=train.clipit_loss, side_effect=losses):
        words = said(argv)
    for word in ("not finite: step 6", "ce ", "kd ", "--lr", folder_of(argv) / "last.pt"):
        assert str(word) in words
    assert torch.load(folder_of(argv) / "last.pt", weights_only=True)["state"]["step"] == 3


def test_dropped_words_are_a_share_in_order_and_anew_for_every_seed():
    report = " ".join(f"w{i}" for i in range(100))
    once, again, other = (train.drop_words(report, 0.3, seed).split()
                          for seed in ("0 0 7", "0 0 7", "0 1 7"))
    assert len(once) == 70 and once == again != other
    assert once == sorted(once, key=lambda word: int(word[1:]))
    assert train.drop_words("word", 0.9, "s") == "word"


def test_an_epoch_sees_what_is_left_of_each_report(argv):
    clip, zeros = clip_of(argv), torch.zeros(12, 64)
    left = [train.drop_words(report, 0.5, f"3 1 {i}") for i, report in enumerate(REPORTS)]
    fixed, trained = (train.parse_args([*argv, "--drop-words", 0.5, "--sd", 3, *more])
                      for more in ([], ["--lora-text", 1]))
    assert torch.equal(train.text_of(clip, REPORTS, zeros, trained, 1)[1], clip.tokenize(left))
    features, tokens = train.text_of(clip, REPORTS, zeros, fixed, epoch=1)
    assert tokens is None and torch.equal(features, embed_texts(clip, left))


def test_the_heads_take_the_state_of_the_lowest_validation_loss():
    generator = torch.Generator().manual_seed(0)
    x = {split: torch.randn(60, 5, generator=generator) for split in ("train", "val", "test")}
    y = {split: (x[split][:, 0] > 0).long() for split in x}
    noise = torch.rand(60, generator=generator) < 0.3  # that training fits in the end
    y["train"] = y["train"] ^ noise.long()

    def val_loss_where(split):  # what chooses the state
        torch.manual_seed(0)
        head = torch.nn.Sequential(torch.nn.Linear(5, 200), torch.nn.ReLU(),
                                   torch.nn.Linear(200, 2))
        train.train_head("head", head, x | {"val": x[split]}, y | {"val": y[split]}, 0, steps=1000)
        return F.cross_entropy(head(x["val"]), y["val"])
    assert val_loss_where("val") < val_loss_where("train")


def test_the_clip_probe_is_a_linear_head_on_the_features_of_the_pairing(finished):
    argv = [*finished.argv, "--run", "probe", "--clip-probe", "--ep", 0]
    with patch.object(train, "train_head", wraps=train.train_head) as heads:
        rows = train.main(argv)["rows"]
    assert list(rows) == ["vision head", "text head", "CLIP linear probe"]
    _, head, features, _, _ = heads.call_args.args
    clip = clip_of(argv)
    tiles = load_tiles(argv[1], "test", transform=clip.preprocess)
    torch.testing.assert_close(features["test"], embed_images(clip, tiles))
    right = head(features["test"]).argmax(dim=1) == torch.tensor(tiles.labels)
    assert rows["CLIP linear probe"]["accuracy"] == pytest.approx(right.double().mean().item())


def test_the_table_has_a_line_a_variant_and_differences_paired_by_seed(argv, world, capsys):
    """Two seeds: t of one degree of freedom is 12.706, and sd / sqrt(n) half of their distance."""
    argv += ["--monitor", "last", "--lr", 0.01]  # so that the variants differ; both have it
    percent = {}
    for sd in (0, 1):
        for more in ([], ["--no-text"]):
            rows = train.main([*argv, "--run", f"{sd}{more}", "--sd", sd, *more])["rows"]
            percent[sd, bool(more)] = 100 * list(rows.values())[-1]["balanced_accuracy"]
    train.main([*argv, "--run", "twice", "--sd", 1])
    capsys.readouterr()
    lines = {line["flags"]: line for line in train.main(["--table", world / "runs"])["table"]}
    printed, first, none = capsys.readouterr().out, lines["-"], lines["--no-text"]
    assert "seed 1 once more" in printed and len(lines) == 2
    assert first["n"] == none["n"] == 2
    mean = (percent[0, False] + percent[1, False]) / 2
    sd = abs(percent[0, False] - percent[1, False]) / 2 ** 0.5
    assert first["trained"] == f"{mean:.1f} ± {sd:.1f}" and f"| {first['trained']} |" in printed
    gains = [percent[sd, False] - percent[sd, True] for sd in (0, 1)]
    assert gains[0] != gains[1]
    mean, half = sum(gains) / 2, 12.706 * abs(gains[0] - gains[1]) / 2
    assert first["minus no-text"] == f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"
    assert none["minus no-text"] == "" and none["minus no flag"].startswith(f"{0 - mean:+.1f} [")
    with open(world / "runs" / "table.csv") as file:
        written = {line["flags"]: line["trained"] for line in csv.DictReader(file)}
    assert written == {flags: line["trained"] for flags, line in lines.items()}


# ---- Metrics against cases worked by hand --------------------------------------------------------

def test_three_classes_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    row = train.scores(torch.eye(3)[[0, 0, 0, 1, 1, 0, 2]], labels)
    assert row["confusion"] == [[3, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert row["recall"] == [0.75, 0.5, 1.0]
    assert row["balanced_accuracy"] == pytest.approx((0.75 + 0.5 + 1) / 3)
    assert row["accuracy"] == pytest.approx(5 / 7)
    assert row["macro_f1"] == pytest.approx((6 / 8 + 2 / 4 + 1) / 3)
    # class 2 is predicted once and has no tile, class 3 does not occur at all
    row = train.scores(torch.eye(4)[[0, 0, 1, 2]], torch.tensor([0, 0, 1, 1]))
    assert row["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert row["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert math.isnan(row["recall"][2])


def test_complementarity_counts_what_the_text_model_alone_gets_right():
    labels = torch.tensor([0, 0, 0, 1, 1])
    vision, text = torch.eye(2)[[0, 1, 1, 1, 0]], torch.eye(2)[[1, 0, 1, 0, 1]]
    assert train.complementarity(vision, text, labels) == {
        "tiles": 2, "share": 2 / 5, "share_of_vision_errors": 2 / 3}


def test_text_spread_is_one_minus_the_mean_cosine_of_two_reports():
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    cosines = [F.cosine_similarity(features[i], features[j], dim=0).item()
               for i in range(7) for j in range(7) if i != j]
    expected = 1 - sum(cosines) / len(cosines)
    assert train.text_spread(features) == pytest.approx(expected, abs=1e-6)
    assert train.text_spread(features[:1].repeat(4, 1)) == pytest.approx(0, abs=1e-6)


# ---- report.html: one whole, self-contained, small and safe page ---------------------------------

class Page(HTMLParser):
    """A page's text, tags and table. Fails where anything would run or be fetched."""

    def __init__(self, folder):
        super().__init__()
        self.tags, self.text, path = [], "", folder / "report.html"
        self.source = path.read_text("utf-8")
        assert self.source.startswith("<!DOCTYPE html>") and path.stat().st_size < 3e6
        self.feed(self.source)
        assert "script" not in self.tags and not re.search(r"url\(|@import", self.source)
        self.rows = [[html.unescape(cell) for cell in re.findall("<t[hd][^>]*>([^<]*)", row)]
                     for row in self.source.split("<tr>") if row.startswith("<th>")]

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on") and name not in ("href", "srcset", "action"), name
            assert name != "src" or value.startswith("data:image/jpeg;base64,"), value[:80]

    def handle_data(self, text):
        self.text += text


def test_the_page_shows_the_figures_of_the_run_and_its_pairs(finished):
    page = Page(finished.folder)
    pairs = {row["tile"]: row for row in rows_of(finished.argv, "pairs.csv")}
    assert train.results(finished.metrics) in page.text
    assert all(train.shown(line) in page.text for line in log_of(finished.argv))
    counts = [[int(count) for count in row[1:]] for row in page.rows[1:]]
    assert page.rows[0] == ["true \\ predicted", "A", "B", "C"]
    assert counts == finished.metrics["rows"]["CLIP-IT"]["confusion"]
    shown = re.findall(r"<b>(.*?)</b> report (\d+): (.*?)<br>(.*)", page.source)
    assert len(shown) == page.tags.count("img") == 3 * 4  # four tiles of each class
    for similarity, number, text, tile in shown:
        row = pairs[html.unescape(tile)]
        assert row["split"] == "train" and row["report"] == number
        assert similarity == f"{float(row['similarity']):.3f}"
        assert html.unescape(text) == REPORTS[int(number)][:500]


def test_text_of_others_is_shown_and_never_interpreted(argv, world):
    bad = '<script>alert("1")<!-- &amp; <img src=x onerror=a> http:'
    for split in ("train", "val", "test"):
        (world / "tiles" / split / "A").rename(world / "tiles" / split / bad)
    (world / "reports.txt").write_text(f"{bad} one\n{bad} two\n")
    argv += ["--run", bad, "--ep", 0]
    with patch.object(train, "train_head", None), pytest.raises(TypeError):
        train.main(argv)
    assert not Page(folder_of(argv)).rows  # after the pairing
    train.main(argv)
    page = Page(folder_of(argv))
    assert page.rows[0][1] == page.rows[1][0] == bad  # the names of a column and a row
    assert page.text.count(bad) > 12 and html.escape(f"tiles/{bad}") in page.source
