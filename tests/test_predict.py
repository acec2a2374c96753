"""python clipit.py: probabilities of image files from a saved classifier."""
import csv
import subprocess
import sys

import pytest
import torch
from conftest import DEMO, ROOT, write_tiles
from PIL import Image

import clipit
from clipit import ClipIT, load_backbone
from lora import inject_lora


@pytest.fixture
def saved(tmp_path):
    """A run's folder with a classifier, and the model it came from."""
    torch.manual_seed(0)
    backbone = load_backbone(f"local-dir:{DEMO}/backbone")
    model = ClipIT(backbone, None, 2, backbone.num_features, 16)
    inject_lora(model.backbone, 2)
    model.eval().to_classifier(["benign", "tumour"]).save_pretrained(tmp_path / "run" / "classifier")
    return tmp_path / "run", model


def read(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_every_image_gets_its_probabilities_and_an_unreadable_one_is_named(saved, tmp_path, capsys):
    run, model = saved
    folder = write_tiles(tmp_path / "tiles", {"a": 3, "deep/er": 2})
    (folder / "a" / "1.png").write_bytes(b"no image")
    (folder / "a" / "notes.txt").write_text("no tile")
    extra = tmp_path / "extra.png"
    Image.open(folder / "a" / "0.png").save(extra)
    code = clipit.main([str(run), str(folder), str(extra), "--csv", str(tmp_path / "out.csv"), "--batch", "2", "--worker", "0"])
    assert code == 1 and str(folder / "a" / "1.png") in capsys.readouterr().err
    rows = read(tmp_path / "out.csv")
    assert [row["path"] for row in rows] == [str(folder / name) for name in (
        "a/0.png", "a/2.png", "deep/er/0.png", "deep/er/1.png")] + [str(extra)]
    transform = clipit.Classifier.from_pretrained(run / "classifier").preprocess
    for row in rows:
        p = model(transform(Image.open(row["path"]))[None]).softmax(1)[0]
        assert [float(row["benign"]), float(row["tumour"])] == pytest.approx(p.tolist(), abs=1e-5)
        assert row["pred"] == ("benign", "tumour")[int(p.argmax())]
    assert not list(tmp_path.glob("*.tmp"))
    assert clipit.main([str(run), str(extra), "--csv", str(tmp_path / "out.csv"), "--worker", "2"]) == 0


def test_a_real_process_writes_to_standard_output_and_refuses_bad_input(saved, tmp_path):
    run, _ = saved
    write_tiles(tmp_path / "tiles", {"a": 1})

    def call(*argv):
        return subprocess.run([sys.executable, "clipit.py", *map(str, argv)], cwd=ROOT, capture_output=True, text=True)
    done = call(run / "classifier", tmp_path / "tiles")
    assert done.returncode == 0 and done.stdout.splitlines()[0] == "path,pred,benign,tumour" and done.stdout.count("a/0.png") == 1
    for argv in ((run, tmp_path / "nowhere"), (run, tmp_path / "run")):
        done = call(*argv)
        assert done.returncode == 2 and str(argv[1]) in done.stderr and "Traceback" not in done.stderr
