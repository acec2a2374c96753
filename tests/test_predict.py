"""A saved classifier: its config.json and card, and python clipit.py over image files."""
import csv
import inspect
import json
import os
import re
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ROOT, write_tiles
from huggingface_hub import ModelCard, errors
from PIL import Image

import clipit
import data
from clipit import BACKBONES, Classifier, ClipIT, load_backbone
from lora import inject_lora


def make_classifier(run=None, **recipe):
    """A classifier of the demo's backbone, of which other things are said."""
    backbone = load_backbone(f"local-dir:{DEMO}/backbone")
    backbone.recipe |= recipe
    return ClipIT(backbone, None, 2, backbone.num_features, 16).to_classifier(["a", "b"], run)


def test_config_and_card_tell_of_the_run(finished, tmp_path):
    folder, metrics = finished.folder / "classifier", finished.metrics
    names = ("README.md", "config.json", "model.safetensors")
    card, config, _ = (str((folder / name).read_bytes(), "utf-8", "replace") for name in names)
    assert str(finished.argv[1].parent) not in card + config  # nobody's folders are published
    run = json.loads(config)["run"]
    for part, row in (("metrics", "CLIP-IT"), ("unimodal", "vision head")):
        assert run[part] == metrics["rows"][row]
        assert f"{100 * run[part]['balanced_accuracy']:.2f} %" in card
    assert [run["data"], run["reports"], run["clip_model"]] == [
        "tiles", "reports.txt", "local-dir:clip"]
    for words in ("For research only", "No text or\ntext model is in it", "**mit**",
                  f"**Balanced accuracy** on {metrics['test_tiles']} test tiles",
                  "reports.txt, paired by local-dir:clip"):
        assert words in card
    Classifier.from_pretrained(finished.folder).save_pretrained(tmp_path)  # nothing is lost
    assert sorted(path.name for path in tmp_path.iterdir()) == list(names)
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in names)


@pytest.mark.parametrize("name, licence", [
    ("UNI", "cc-by-nc-nd-4.0"), ("prov-gigapath", "apache-2.0 with conditions"),
    ("mine", '"open": for #research'), ("mine", "a 'b' & {c}"), ("mine", "- x: y")])
def test_the_card_names_the_backbones_licence_and_where_it_stands(name, licence):
    """A licence of any characters leaves the header readable, as the hub reads it."""
    card = str(make_classifier(backbone_id=name, licence=licence).generate_model_card())
    data = ModelCard(card).data
    assert (data.license, data.license_name) == ("other", licence.replace(" ", "-"))
    assert "**Tiles**: unknown pixels, unknown micrometres per pixel" in card
    assert data.pipeline_tag == "image-classification" and f"**{licence}**" in card
    if name in BACKBONES:
        assert BACKBONES[name]["source"]["license"] == licence


def test_a_classifier_comes_back_by_the_cards_example_and_from_the_hub(tmp_path, monkeypatch):
    classifier, before = make_classifier(run={"mpp": 0.5, "side": 96}), os.umask(0o027)
    classifier.save_pretrained(tmp_path)
    os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o640}  # the umask
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (96, 96), "pink").save("tile.png")
    card, names = (tmp_path / "README.md").read_text(), {}
    assert "**Tiles**: 96 pixels, 0.5 micrometres per pixel" in card
    lines = [line.strip() for line in card.splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    exec("\n".join([*lines[:2], f"p = {lines[2]}"]), names)
    assert torch.equal(names["p"], classifier.predict([Image.open("tile.png")]))

    def snapshot_download(*repository, **options):  # of the hub
        files = ["config.json", "model.safetensors"]
        assert (repository, options) == (("org/model",), dict(allow_patterns=files, revision="v1"))
        return str(tmp_path)
    monkeypatch.setattr("clipit.snapshot_download", snapshot_download)
    (tmp_path / "README.md").unlink()
    again, x = Classifier.from_pretrained("org/model", revision="v1"), torch.randn(2, 3, 64, 64)
    assert torch.equal(again(x), classifier(x))


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model; its classifier is saved in run/ of the working folder, four images in tiles/."""
    torch.manual_seed(0)
    backbone = load_backbone(f"local-dir:{DEMO}/backbone")
    model = ClipIT(backbone, None, 2, backbone.num_features, 16).eval()
    inject_lora(model.backbone, 2)
    monkeypatch.chdir(tmp_path)
    model.to_classifier(["benign", "tumour"]).save_pretrained("run/classifier")
    write_tiles(Path("tiles"), {"a": 3, "deep/er": 1})
    return model


@pytest.fixture
def call(model, monkeypatch, capsys):
    """python clipit.py with these words: (exit code, standard output, errors)."""
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["clipit.py", *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "clipit.py"), run_name="__main__")
        return ended.value.code, *capsys.readouterr()
    return run


def test_every_image_gets_its_probabilities_and_an_unreadable_one_is_named(model, call):
    Path("tiles/a/1.png").write_bytes(b"no image")
    Path("tiles/a/notes.txt").write_text("no tile")
    Image.new("L", (70, 64), 200).save("extra.jpg")
    code, out, said = call("run", "tiles", "nowhere.png", "extra.jpg", "--csv", "out.csv")
    assert (code, out) == (1, "")
    for path in ("tiles/a/1.png", "nowhere.png"):
        assert f"clipit.py: {path}: not a readable image" in said
    written = Path("out.csv").read_bytes().decode()
    rows = list(csv.DictReader(written.splitlines()))
    assert [row["path"] for row in rows] == [
        "tiles/a/0.png", "tiles/a/2.png", "tiles/deep/er/0.png", "extra.jpg"]
    for row in rows:
        image = model.backbone.preprocess(Image.open(row["path"]).convert("RGB"))
        p = model(image[None]).softmax(1)[0]
        written_p = [float(row["benign"]), float(row["tumour"])]
        assert written_p == pytest.approx(p.tolist(), abs=1e-5)
        assert row["pred"] == ("benign", "tumour")[int(p.argmax())]
    assert call("run", "tiles", "extra.jpg")[:2] == (1, written)  # the table and nothing else


def stop(number):
    return lambda *args: os.kill(os.getpid(), number)


def fail(*args):
    raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("function, stops, code", [
    ("PIL.Image.open", stop(signal.SIGINT), 130), ("PIL.Image.open", stop(signal.SIGTERM), 143),
    ("os.replace", stop(signal.SIGINT), 130), ("os.replace", stop(signal.SIGTERM), 143),
    ("torch.stack", fail, 2)], ids=str)
def test_a_run_that_is_stopped_leaves_what_was_there(call, monkeypatch, function, stops, code):
    Path("old.csv").write_text("of an earlier run")
    before = set(Path().iterdir())
    monkeypatch.setattr(function, stops)
    for path in ("new.csv", "old.csv"):
        got, out, said = call("run", "tiles", "--csv", path)
        assert (got, out) == (code, "") and "Traceback" not in said
        assert set(Path().iterdir()) == before
    assert Path("old.csv").read_text() == "of an earlier run"


def test_what_is_whole_takes_the_place_of_what_was_there(tmp_path, monkeypatch):
    """A file or a folder, written to the disk; after an error the old one is there and no more."""
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(fsync(number)))
    file, folder = tmp_path / "deep" / "file", tmp_path / "deep" / "folder"
    for text in ("old", "new"):
        with clipit.whole(file) as part:
            part.write_text(text)
        with clipit.whole(folder) as part:
            part.mkdir()
            (part / text).touch()
    assert file.read_text() == "new" and list(folder.iterdir()) == [folder / "new"]
    assert len(synced) == 2 * (2 + 3)  # each file and folder, and the folder that they are in
    for path, write in ((file, "rmdir"), (folder, "touch")):  # no such folder; a file for a folder
        with pytest.raises(OSError) as raised, clipit.whole(path) as part:
            getattr(part, write)()
        first, second = str(raised.value).splitlines()
        assert first.startswith(f"{path}: could not be written (") and "make room" in second
    assert set(tmp_path.rglob("*")) == {file.parent, file, folder, folder / "new"}


def change(**values):
    """Of the text of a config.json, other values."""
    return lambda text: json.dumps(json.loads(text) | values)


@pytest.mark.parametrize("file, spoil, says", [
    ("model.safetensors", lambda text: "half", "SafetensorError"),
    ("model.safetensors", None, "model.safetensors"), ("config.json", None, "config.json"),
    ("config.json", lambda text: "{", "JSONDecodeError"),
    ("config.json", lambda text: text.replace('"size"', '"side"'), "KeyError: 'size'"),
    ("config.json", change(architecture="hf-hub:a/b"), "hf-hub:a/b: expected a name of timm's"),
    ("config.json", change(model_args={"pretrained": True}), "multiple values for .*'pretrained'"),
    ("config.json", change(model_args={"checkpoint_path": "w.pth"}), "values .*'checkpoint_path'"),
    ("config.json", change(model_args={"depth": 10 ** 9}), "'depth': 10{9}.*: expected no number"),
    ("config.json", change(text_dim=10 ** 9), "size mismatch for distill_head.weight"),
    ("config.json", change(kd_layers=2), "Missing key.*distill_head.0"),
    ("config.json", change(size=10 ** 7), "size=10000000, .*; expected pixels"),
    ("config.json", change(mean=[0.5]), "mean=.0.5., std=.*; expected pixels, three numbers"),
    ("config.json", change(std="abc"), "could not convert string to float: 'a'")])
def test_what_is_no_whole_classifier_is_refused_in_words(call, file, spoil, says):
    path = Path("run/classifier", file)
    if spoil:
        path.write_text(spoil(path.read_text(errors="replace")))
    else:
        path.unlink()
    code, out, said = call("run", "tiles", "--csv", "out.csv")
    assert code == 2 and out == "" and not Path("out.csv").exists()
    first, second = said.splitlines()[-2:]
    assert re.match(f"clipit.py: run: no classifier could be loaded .*{says}", first)
    assert second.startswith("expected config.json and model.safetensors in a run's folder")


@pytest.mark.parametrize("words, says", [
    ("run empty", "images: expected image files"), ("run", "images: expected image files"),
    ("/nowhere tiles", "/nowhere: no classifier could be loaded (FileNotFoundError: no such"),
    ("a/b/c tiles", "a/b/c: no classifier could be loaded (FileNotFoundError: no such folder"),
    ("org/model tiles", "Error: the hub cannot be reached)"),
    ("run tiles --csv empty", "--csv empty: expected a file"),
    ("run tiles --batch 0", "unrecognized arguments: --batch")])
def test_what_is_not_there_is_named(call, monkeypatch, words, says):
    def snapshot_download(*args, **kwargs):
        raise errors.LocalEntryNotFoundError("the hub cannot be reached")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    Path("empty").mkdir()
    code, out, said = call(*words.split())
    assert code == 2 and out == "" and says in said and "Traceback" not in said


def test_sixteen_bits_of_grey_are_read_alike_in_both_files(model):
    assert inspect.getsource(clipit.to_rgb) == inspect.getsource(data.to_rgb)
    images = [Image.new("L", (64, 64), 90), Image.new("I;16", (64, 64), 90 * 257)]
    assert torch.equal(*Classifier.from_pretrained("run").predict(images))


@pytest.mark.filterwarnings("ignore:.*jit", "ignore:Converting a tensor")
def test_a_classifier_goes_to_wsinfer(model, call):
    mean_std = {key: model.backbone.recipe[key] for key in ("mean", "std")}
    transform = [{"name": "Resize", "arguments": {"size": 64}}, {"name": "ToTensor"},
                 {"name": "Normalize", "arguments": mean_std}]
    for side, mpp in ((100, None), (None, 0.5), (100, 0.5), (64, 0.5)):
        model.to_classifier(["a", "b"], {"mpp": mpp, "side": side}).save_pretrained("c")
        folder = Path(f"out{side}")
        code, out, said = call("c", "--wsinfer", folder.name)
        if not (side and mpp):
            assert code == 2 and "train with --mpp on tiles of" in said and not folder.exists()
            continue
        assert (code, out) == (0, "")
        images = torch.randn(3, 3, 64, 64)
        traced = torch.jit.load(folder / "torchscript_model.pt")(images)
        torch.testing.assert_close(traced, model(images), rtol=0, atol=1e-5)
        assert json.loads((folder / "config.json").read_text()) == {
            "spec_version": "1.0", "architecture": "local-dir:backbone", "num_classes": 2,
            "patch_size_pixels": side, "spacing_um_px": 0.5, "class_names": ["a", "b"],
            "transform": transform[side == 64:]}
    code, _, said = call("c", "--wsinfer", "out64")
    assert code == 2 and "out64: exists" in said
