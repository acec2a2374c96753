"""python clipit.py: probabilities of image files from a saved classifier."""
import csv
import fcntl
import os
import pickle
import runpy
import struct
import subprocess
import sys
import termios

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
    done = call(run, tmp_path / "nowhere")
    assert done.returncode == 2 and str(tmp_path / "nowhere") in done.stderr and "Traceback" not in done.stderr


def test_a_terminal_shows_a_bar(saved, tmp_path):
    run, _ = saved
    write_tiles(tmp_path / "tiles", {"a": 3})
    terminal, its_end = os.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # 80 columns
    subprocess.run([sys.executable, "clipit.py", run, tmp_path / "tiles", "--csv", tmp_path / "out.csv", "--batch", "1",
                    "--worker", "0"], cwd=ROOT, stderr=its_end, check=True)
    os.close(its_end)
    shown = os.read(terminal, 100_000).decode()
    assert "tiles: 100%" in shown and "3/3" in shown


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp_changes_the_third_digit_at_most(saved, tmp_path, amp, monkeypatch):
    run, _ = saved
    write_tiles(tmp_path / "tiles", {"a": 3})
    rows, dtypes, fuse = {}, set(), clipit.Classifier.fuse
    monkeypatch.setattr(clipit.Classifier, "fuse", lambda self, v: (out := fuse(self, v), dtypes.add(out[0].dtype))[0])
    for kind in ("off", amp):
        assert clipit.main([str(run), str(tmp_path / "tiles"), "--csv", str(tmp_path / kind), "--worker", "0", "--amp", kind,
                            "--device", "cpu"]) == 0
        rows[kind] = [float(row["tumour"]) for row in read(tmp_path / kind)]
    assert dtypes == {torch.float32, {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]}
    assert rows[amp] == pytest.approx(rows["off"], abs=0.01)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_is_stopped_or_fails_midway_writes_nothing(saved, tmp_path, error, monkeypatch):
    run, _ = saved
    write_tiles(tmp_path / "tiles", {"a": 4})
    forward, calls = clipit.Classifier.forward, []
    monkeypatch.setattr(clipit.Classifier, "forward", lambda self, images: calls.append(1) or (
        forward(self, images) if len(calls) == 1 else exec("raise error", {"error": error})))
    for earlier in (None, "path,pred\n"):
        calls.clear()
        if earlier:
            (tmp_path / "out.csv").write_text(earlier)
        with pytest.raises(error):
            clipit.main([str(run), str(tmp_path / "tiles"), "--csv", str(tmp_path / "out.csv"), "--batch", "2", "--worker", "0"])
        assert len(calls) == 2 and not list(tmp_path.glob("*.tmp"))
        assert ((tmp_path / "out.csv").read_text() if earlier else (tmp_path / "out.csv").exists()) == (earlier or False)


def test_ctrl_c_is_one_line_and_exit_code_2(saved, tmp_path, monkeypatch, capsys):
    run, _ = saved
    write_tiles(tmp_path / "tiles", {"a": 1})

    def stop(self):
        raise KeyboardInterrupt
    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", stop)
    monkeypatch.setattr(sys, "argv", ["clipit.py", str(run), str(tmp_path / "tiles")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "clipit.py"), run_name="__main__")
    assert ended.value.code == 2 and capsys.readouterr().err.splitlines()[-1] == "clipit.py: stopped"


@pytest.mark.parametrize("spoil, word", [
    (lambda classifier: (classifier / "config.json").unlink(), "config.json"),
    (lambda classifier: (classifier / "config.json").write_text("{"), "no classifier could be loaded"),
    (lambda classifier: (classifier / "model.safetensors").write_bytes(b"half"), "no classifier could be loaded"),
    (lambda classifier: classifier.rename(classifier.with_name("other")), "config.json")])
def test_a_folder_without_a_whole_classifier_is_refused_in_words(saved, tmp_path, spoil, word):
    run, _ = saved
    spoil(run / "classifier")
    with pytest.raises(ValueError, match=f"(?s)run: .*{word}"):
        clipit.main([str(run), str(write_tiles(tmp_path / "tiles", {"a": 1}))])


@pytest.mark.parametrize("more, word", [(["--batch", "0"], "--batch 0"), (["--worker", "-1"], "--worker -1"),
                                        (["--device", "abacus"], "--device abacus")])
def test_a_flag_that_cannot_be_is_named(saved, tmp_path, more, word):
    run, _ = saved
    with pytest.raises(ValueError, match=word):
        clipit.main([str(run), str(write_tiles(tmp_path / "tiles", {"a": 1})), *more])


def test_a_folder_without_images_is_named(saved):
    run, _ = saved
    with pytest.raises(ValueError, match=f"{run}: no image in it"):
        clipit.main([str(run), str(run)])


def test_a_hub_id_that_cannot_be_had_is_refused_in_words(tmp_path, monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    with pytest.raises(ValueError, match="no folder runs/x: .*could not be reached[^@]*the folder of a finished run"):
        clipit.main(["runs/x", str(tmp_path)])


def test_what_decodes_files_can_be_sent_to_a_worker_that_is_not_a_fork(saved, tmp_path):
    run, _ = saved
    folder = write_tiles(tmp_path / "tiles", {"a": 1})
    files = clipit.Files([folder / "a" / "0.png", run], clipit.Classifier.from_pretrained(run / "classifier").preprocess)
    again = pickle.loads(pickle.dumps(files))
    assert torch.equal(again[0][1], files[0][1]) and again[1][1] is None and again[1][2]


def test_the_plain_baseline_predicts_too():
    backbone = load_backbone(f"local-dir:{DEMO}/backbone")
    classifier = ClipIT(backbone, None, 3, backbone.num_features, 16, fused=False).to_classifier()
    image = Image.new("RGB", (70, 64), (200, 120, 160))
    expected = classifier.vision_head(classifier.backbone(classifier.preprocess(image)[None])).softmax(dim=1)
    torch.testing.assert_close(classifier.predict([image]), expected)
    v, t_hat = classifier.features(classifier.preprocess(image)[None])
    assert v.shape == (1, backbone.num_features) and t_hat is None
