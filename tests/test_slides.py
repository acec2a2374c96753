"""The exported model over a whole slide by WSInfer gives Classifier.predict's probabilities of the
same pixels. Needs an environment with `pip install wsinfer openslide-bin openslide-python tifffile`
beside requirements.txt (WSInfer 0.6 wants zarr<3); skipped elsewhere. TILES=folder: other tiles."""
import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEMO, folder_of
from PIL import Image

import clipit
import train

for package in ("wsinfer", "openslide", "tifffile"):
    pytest.importorskip(package)
SIDE, MPP, COLUMNS = 64, 0.5, 40
# `wsinfer run` without the list of its model zoo, which it would download
WSINFER = """import sys, wsinfer_zoo.client as zoo
zoo.load_registry = lambda: zoo.ModelRegistry(models={})
from wsinfer.cli.cli import cli
cli(sys.argv[1:])"""


def write_slide(path: Path) -> np.ndarray:
    """A pyramidal TIFF of tiles, with its resolution; its pixels (H, W, 3)."""
    from tifffile import TiffWriter
    folder = Path(os.environ.get("TILES", DEMO / "test"))
    tiles = sorted(file for file in folder.rglob("*") if file.suffix in (".jpg", ".png"))
    tiles = [np.asarray(Image.open(file).convert("RGB").resize((SIDE, SIDE))) for file in tiles]
    rows = [np.concatenate([tiles[(31 * row + 7 * i) % len(tiles)] for i in range(COLUMNS)], axis=1)
            for row in range(COLUMNS)]
    pixels = np.concatenate(rows)
    with TiffWriter(path) as file:
        for level in range(3):
            size = tuple(length >> level for length in pixels.shape[:2])
            reduced = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BOX))
            file.write(reduced, tile=(256, 256), photometric="rgb", subfiletype=int(level > 0),
                       resolutionunit="CENTIMETER", resolution=(1e4 / MPP / 2 ** level,) * 2)
    return pixels


def test_wsinfer_over_a_slide_gives_what_predict_gives(argv, tmp_path):
    train.main([*argv, "--mpp", MPP])
    classifier = clipit.Classifier.from_pretrained(folder_of(argv))
    slides, out, model = (tmp_path / name for name in ("slides", "out", "model"))
    assert clipit.main([str(folder_of(argv)), "--wsinfer", str(model)]) == 0
    slides.mkdir()
    pixels = write_slide(slides / "slide.tiff")
    command = [sys.executable, "-c", WSINFER, "--backend", "openslide", "run", "--num-workers", "1",
               "--wsi-dir", slides, "--results-dir", out, "--config", model / "config.json",
               "--model-path", model / "torchscript_model.pt"]
    done = subprocess.run(command, capture_output=True, text=True,
                          env=os.environ | {"WSINFER_FORCE_CPU": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    with open(out / "model-outputs-csv" / "slide.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > COLUMNS ** 2 / 2
    images = []
    for row in rows:
        x, y, width, height = (int(float(row[key])) for key in ("minx", "miny", "width", "height"))
        assert width == height == SIDE
        images.append(Image.fromarray(pixels[y:y + height, x:x + width]))
    expected = torch.cat([classifier.predict(images[i:i + 64]) for i in range(0, len(images), 64)])
    p = torch.tensor([[float(row[f"prob_{name}"]) for name in classifier.classes] for row in rows])
    torch.testing.assert_close(p, expected, atol=1e-3, rtol=0)
    assert expected.std(dim=0).min() > 0.01  # not the same for all patches
