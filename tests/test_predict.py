"""python clipit.py: probabilities of image files from a saved classifier."""
import csv
import runpy
import sys

import pytest
import torch
from conftest import DEMO, ROOT, write_tiles
from huggingface_hub import errors
from PIL import Image
from safetensors.torch import save_file

import clipit
from clipit import ClipIT, load_backbone
from lora import inject_lora


@pytest.fixture
def model(tmp_path):
    """A model; its classifier is saved in tmp_path/run, and tmp_path/tiles has four images."""
    torch.manual_seed(0)
    backbone = load_backbone(f"local-dir:{DEMO}/backbone")
    model = ClipIT(backbone, None, 2, backbone.num_features, 16).eval()
    inject_lora(model.backbone, 2)
    model.to_classifier(["benign", "tumour"]).save_pretrained(tmp_path / "run" / "classifier")
    write_tiles(tmp_path / "tiles", {"a": 3, "deep/er": 1})
    return model


@pytest.fixture
def call(model, tmp_path, monkeypatch, capsys):
    """python clipit.py with these words, in tmp_path: (exit code, standard output, errors)."""
    def run(*words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["clipit.py", *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "clipit.py"), run_name="__main__")
        return ended.value.code, *capsys.readouterr()
    return run


def test_every_image_gets_its_probabilities_and_an_unreadable_one_is_named(model, call, tmp_path):
    (tmp_path / "tiles" / "a" / "1.png").write_bytes(b"no image")
    (tmp_path / "tiles" / "a" / "notes.txt").write_text("no tile")
    Image.new("L", (70, 64), 200).save(tmp_path / "extra.jpg")
    words = ["run", "tiles", "extra.jpg", "--batch", "2", "--csv", "out.csv"]
    code, out, said = call(*words)
    assert code == 1 and out == ""
    assert "clipit.py: tiles/a/1.png: not a readable image" in said
    written = (tmp_path / "out.csv").read_text()
    rows = list(csv.DictReader(written.splitlines()))
    assert [row["path"] for row in rows] == [
        "tiles/a/0.png", "tiles/a/2.png", "tiles/deep/er/0.png", "extra.jpg"]
    for row in rows:
        image = model.backbone.preprocess(Image.open(tmp_path / row["path"]).convert("RGB"))
        p = model(image[None]).softmax(1)[0]
        written_p = [float(row["benign"]), float(row["tumour"])]
        assert written_p == pytest.approx(p.tolist(), abs=1e-5)
        assert row["pred"] == ("benign", "tumour")[int(p.argmax())]
    assert not list(tmp_path.glob("*.tmp"))


def test_standard_output_is_the_table_and_nothing_else(call):
    code, out, _ = call("run/classifier", "tiles")
    header, *rows = out.splitlines()
    assert code == 0 and header == "path,pred,benign,tumour"
    assert [row.partition(",")[0] for row in rows] == [
        "tiles/a/0.png", "tiles/a/1.png", "tiles/a/2.png", "tiles/deep/er/0.png"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("earlier", [None, "of an earlier run\n"])
def test_a_run_that_ends_midway_leaves_nothing(model, tmp_path, monkeypatch, error, earlier):
    forward, calls, file = clipit.Classifier.forward, [], tmp_path / "out.csv"

    def fail_at_the_second(self, images):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return forward(self, images)
    monkeypatch.setattr(clipit.Classifier, "forward", fail_at_the_second)
    if earlier:
        file.write_text(earlier)
    with pytest.raises(error):
        clipit.main([str(tmp_path / "run"), str(tmp_path / "tiles"), "--csv", str(file),
                     "--batch", "2"])
    assert len(calls) == 2 and not list(tmp_path.glob("*.tmp"))
    assert (file.read_text() if file.exists() else None) == earlier


def test_ctrl_c_is_one_line_and_exit_code_2(call, monkeypatch):
    def stop(path):
        raise KeyboardInterrupt
    monkeypatch.setattr(Image, "open", stop)
    code, _, said = call("run", "tiles")
    assert code == 2 and said.splitlines()[-1] == "clipit.py: stopped"


@pytest.mark.parametrize("spoil", [
    lambda classifier: save_file({"fusion.bias": torch.ones(2)}, classifier / "model.safetensors"),
    lambda classifier: (classifier / "config.json").unlink(),
    lambda classifier: (classifier / "config.json").write_text("{"),
    lambda classifier: (classifier / "model.safetensors").write_bytes(b"half"),
    lambda classifier: classifier.rename(classifier.with_name("other"))])
def test_a_folder_without_a_whole_classifier_is_refused_in_words(call, tmp_path, spoil):
    spoil(tmp_path / "run" / "classifier")
    code, out, said = call("run", "tiles", "--csv", "out.csv")
    assert code == 2 and out == "" and not (tmp_path / "out.csv").exists()
    first, second = said.splitlines()[-2:]
    assert first.startswith("clipit.py: run: no classifier could be loaded")
    assert second.startswith("expected a run's folder, its classifier/ with config.json")


def test_what_is_not_there_is_named(call, tmp_path, monkeypatch):
    def hf_hub_download(*args, **kwargs):
        raise errors.LocalEntryNotFoundError("the hub cannot be reached")
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", hf_hub_download)
    (tmp_path / "empty").mkdir()
    for words, says in ((["run", "empty"], "empty: no image there (.jpg"),
                        (["run", "tiles", "nowhere.png"], "nowhere.png: no image there"),
                        (["run", "tiles", "--device", "abacus"], "device abacus is invalid"),
                        (["org/model", "tiles"], "org/model: no classifier could be loaded")):
        code, out, said = call(*words)
        assert code == 2 and out == "" and says in said and "Traceback" not in said
