"""Files that travel: each set alone in an empty folder and a fresh interpreter runs its example of
the README."""
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import DEMO, ROOT, write_tiles
from PIL import Image

from clipit import ClipIT, load_backbone

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def run_copied(folder, files, example, check, absent=()):
    """The example and then the check, where only `files` and what lies in the folder can be found.
    Connections end it, and so does an import of `absent` or of a file of this repository."""
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
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_has_an_example_for_each_file_that_travels():
    named = [re.findall(r"from (lora|pairing|data|clipit) import", example) for example in EXAMPLES]
    assert named == [["lora"], ["pairing"], ["data"], ["clipit"]]


@pytest.mark.parametrize("name, names", [
    ("lora", "inject_lora merge_lora"), ("pairing", "nearest_text"), ("data", "load_tiles"),
    ("clipit", "Classifier")])
def test_a_files_docstring_begins_with_its_use_in_a_few_lines(name, names):
    title, blank, *lines = (ROOT / f"{name}.py").read_text().splitlines()
    use = lines[:lines.index("")]
    assert title.startswith('"""') and blank == "" and 2 <= len(use) <= 4
    code = "\n".join(line.removeprefix("    ") for line in use)
    compile(code, name, "exec")
    assert use[0].startswith(f"    from {name} import")
    assert all(word in code for word in names.split())


def test_lora_alone_on_a_resnet_and_on_a_text_tower(tmp_path):
    run_copied(tmp_path, ["lora.py"], EXAMPLES[0], """
import torch
assert list(plain.state_dict()) == list(torchvision.models.resnet18().state_dict())
images, tokens = torch.randn(2, 3, 64, 64), torch.randint(1, 49408, (2, 77))
for model, x in ((vision.eval(), images), (text.eval(), tokens)):
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert adapters and all("lora_" in name for name in adapters)
    frozen = {name: p.clone() for name, p in model.named_parameters() if name not in adapters}
    before, optimizer = model(x), torch.optim.SGD(adapters.values(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), torch.tensor([0, 1])).backward()
        torch.nn.utils.clip_grad_norm_(adapters.values(), 1.0)
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in adapters.values())  # both factors of every adapter
    for name, p in model.named_parameters():
        assert name in adapters or torch.equal(p, frozen[name])
    assert not torch.equal(model(x), before)
    torch.testing.assert_close(merge_lora(model)(x), model(x), atol=1e-4, rtol=1e-4)
""")


def test_pairing_alone_pairs_two_tensors_with_torch_alone(tmp_path):
    run_copied(tmp_path, ["pairing.py"], EXAMPLES[1], """
cosines = tiles @ reports.T
best = cosines.amax(dim=1)  # by rounding alone, the place of the highest may be another
torch.testing.assert_close(cosines.gather(1, index[:, None])[:, 0], best, atol=2e-6, rtol=0)
torch.testing.assert_close(cosine, best, atol=2e-6, rtol=0)
""", absent=("open_clip", "timm", "torchvision", "PIL"))


def test_data_alone_splits_an_image_folder(tmp_path):
    write_tiles(tmp_path / "tiles" / "train", {"benign": 10, "tumour": 20})
    write_tiles(tmp_path / "tiles" / "test", {"benign": 1, "tumour": 1})
    run_copied(tmp_path, ["data.py"], EXAMPLES[2], """
count = lambda labels: [list(labels).count(label) for label in (0, 1)]
assert count(train.labels) == [8, 16] and count(val.labels) == [2, 4]
assert not set(train.paths) & set(val.paths)
assert image.mode == "RGB" and train.classes[label] == "benign"
assert count(half.labels) == [4, 8] and set(half.paths) < set(train.paths)
""", absent=("open_clip", "timm", "h5py", "huggingface_hub"))


@pytest.mark.filterwarnings("ignore:.*jit")
def test_clipit_and_lora_alone_run_a_saved_classifier_and_export_it(tmp_path):
    backbone = load_backbone(f"local-dir:{DEMO}/backbone")
    model = ClipIT(backbone, None, 3, backbone.num_features, 16)
    model.to_classifier(["a", "b", "c"]).save_pretrained(tmp_path / "classifier")
    write_tiles(tmp_path, {"a": 1})
    (tmp_path / "a" / "0.png").rename(tmp_path / "tile.png")
    run_copied(tmp_path, ["clipit.py", "lora.py"], EXAMPLES[3],
               'torch.save([probabilities, v, t_hat, images], "results.pt")', absent=("open_clip",))
    probabilities, v, t_hat, images = torch.load(tmp_path / "results.pt", weights_only=True)

    def close(ours, theirs):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    with torch.no_grad():
        assert torch.equal(images[0], backbone.preprocess(Image.open(tmp_path / "tile.png")))
        close(probabilities[0], model(images)[0].softmax(dim=0))
        close(v, model.backbone(images))
        close(t_hat, model.distill_head(v))
        exported = torch.export.load(tmp_path / "classifier.pt2").module()
        for again in (exported, torch.jit.load(tmp_path / "classifier.ts")):
            for batch in (images[:1], images.repeat(3, 1, 1, 1)):
                close(again(batch), model(batch))
