"""Files that travel: each alone in an empty folder and process runs its example of the README."""
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import DEMO, ROOT, write_tiles
from PIL import Image

from clipit import ClipIT, load_backbone

LORA, PAIRING, DATA, CLASSIFIER = re.findall(
    r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def start_copied(folder, files, example, check, absent=()):
    """A process with the example and then the check, where only `files` and what lies in the folder
    can be found. Connections end it, and so does an import of `absent` or of a file from here."""
    for name in files:
        shutil.copy(ROOT / name, folder)
    here = {str(ROOT), str(ROOT / "tests")}
    (folder / "example.py").write_text(f"""
import sys
sys.path.insert(0, {str(folder)!r})
for name in {absent!r}:
    sys.modules[name] = None  # importing it fails
import socket
def refuse(*args):
    raise SystemExit(f"a connection was tried: {{args}}")
socket.socket.connect = socket.getaddrinfo = refuse
{example}
{check}
import os
for module in list(sys.modules.values()):
    assert os.path.dirname(getattr(module, "__file__", None) or "") not in {here!r}, module
""")
    command = [sys.executable, "-I", "example.py"]  # -I: no paths
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


def end(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def lora_alone(tmp_path_factory):
    """Started before the others, of which it takes the longest, and awaited after them."""
    first = "import lora\nassert not {'timm', 'open_clip', 'torchvision'} & sys.modules.keys()\n"
    return start_copied(tmp_path_factory.mktemp("lora"), ["lora.py"], first + LORA, """
import torch
assert list(plain.state_dict()) == list(torchvision.models.resnet18().state_dict())
images, tokens = torch.randn(2, 3, 64, 64), torch.randint(1, 49408, (2, 77))
for model, x in ((vision.eval(), images), (text.eval(), tokens)):
    before, trained = model(x), {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    for p in trained.values():
        torch.nn.init.normal_(p, std=0.02)
    assert not torch.equal(model(x), before)
    torch.testing.assert_close(merge_lora(model)(x), model(x), atol=1e-4, rtol=1e-4)
""")


def test_pairing_alone_pairs_two_tensors_with_torch_alone(lora_alone, tmp_path):
    end(start_copied(tmp_path, ["pairing.py"], PAIRING, """
cosines = tiles @ reports.T
best = cosines.amax(dim=1)  # by rounding alone, the place of the highest may be another
torch.testing.assert_close(cosines.gather(1, index[:, None])[:, 0], best, atol=2e-6, rtol=0)
torch.testing.assert_close(cosine, best, atol=2e-6, rtol=0)
""", absent=("open_clip", "timm", "torchvision", "PIL")))


def test_data_alone_splits_an_image_folder(lora_alone, tmp_path):
    write_tiles(tmp_path / "tiles" / "train", {"benign": 10, "tumour": 20})
    write_tiles(tmp_path / "tiles" / "test", {"benign": 1, "tumour": 1})
    end(start_copied(tmp_path, ["data.py"], DATA, """
count = lambda labels: [list(labels).count(label) for label in (0, 1)]
assert count(train.labels) == [8, 16] and count(val.labels) == [2, 4]
assert not set(train.paths) & set(val.paths)
assert image.mode == "RGB" and train.classes[label] == "benign"
assert count(half.labels) == [4, 8] and set(half.paths) < set(train.paths)
""", absent=("open_clip", "timm", "h5py", "huggingface_hub")))


@pytest.mark.filterwarnings("ignore:.*jit")
def test_clipit_and_lora_alone_run_a_saved_classifier_and_export_it(tmp_path):
    backbone = load_backbone(f"local-dir:{DEMO}/backbone")
    model = ClipIT(backbone, None, 3, backbone.num_features, 16)
    model.to_classifier(["a", "b", "c"]).save_pretrained(tmp_path / "classifier")
    Image.new("RGB", (80, 70), "pink").save(tmp_path / "tile.png")
    check = 'torch.save([probabilities, v, t_hat, images], "results.pt")'
    end(start_copied(tmp_path, ["clipit.py", "lora.py"], CLASSIFIER, check, absent=("open_clip",)))
    probabilities, v, t_hat, images = torch.load(tmp_path / "results.pt", weights_only=True)
    exported = torch.export.load(tmp_path / "classifier.pt2").module()
    traced = torch.jit.load(tmp_path / "classifier.ts")
    with torch.no_grad():
        expected = model(images)
        pairs = [(probabilities[0], expected[0].softmax(dim=0)), (v, model.backbone(images)),
                 (t_hat, model.distill_head(v)), (exported(images[:1]), expected[:1]),
                 (traced(images[:1]), expected[:1])]
    assert torch.equal(images[0], backbone.preprocess(Image.open(tmp_path / "tile.png")))
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_lora_alone_adapts_and_merges_a_resnet_and_a_text_tower(lora_alone):
    end(lora_alone)
