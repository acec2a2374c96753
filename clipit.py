"""CLIP-IT: a tile classifier that learned from reports and needs none. Travels with lora.py.

    probabilities = Classifier.from_pretrained("runs/demo/base").predict([image, ...])  # (B, C)
    python clipit.py runs/demo/base tiles/ more.png --csv out.csv

In the paper's symbols, by the layers and the loss of the authors' code:
    v = backbone(image)    t = text_tower(report of the tile)    t-hat = h_d(v)
    logits = fusion([h_v(v), h_t(t-hat)])
    loss = CE(logits, y) + lambda * mean(1 - cos(t, t-hat))
"""
import argparse
import csv
import json
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, PyTorchModelHubMixin, snapshot_download
from jinja2 import Template
from PIL import Image
from safetensors.torch import load_file, load_model
from timm.models import _hub, vision_transformer
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

from lora import merge_lora


class ClipIT(nn.Module):
    """The model that is trained. backbone: images -> v (B, vision_dim); text_tower: tokens -> t
    (B, text_dim), None for a fixed text; kd_layers: of h_d, 1 or 2."""

    def __init__(self, backbone: nn.Module, text_tower: nn.Module | None, num_classes: int,
                 vision_dim: int, text_dim: int, kd_layers: int = 1, random_fusion: bool = False):
        super().__init__()
        self.backbone, self.text_tower = backbone, text_tower
        self.sizes = dict(vision_dim=vision_dim, text_dim=text_dim, kd_layers=kd_layers)
        self.vision_head = nn.Linear(vision_dim, num_classes)  # h_v
        self.distill_head = nn.Linear(vision_dim, text_dim)  # h_d
        if kd_layers == 2:
            self.distill_head = text_classifier(vision_dim, text_dim)
        self.text_head = text_classifier(text_dim, num_classes)  # h_t
        self.fusion = nn.Linear(2 * num_classes, num_classes)
        if not random_fusion:
            # starts as h_v + h_t: LoRA would first bend the backbone to suit a random mix
            self.fusion.weight.data[:] = torch.eye(num_classes).repeat(1, 2)
            nn.init.zeros_(self.fusion.bias)

    def fuse(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """v (B, vision_dim) -> logits (B, C), t-hat (B, text_dim)."""
        t_hat = self.distill_head(v)
        return self.fusion(torch.cat([self.vision_head(v), self.text_head(t_hat)], dim=1)), t_hat

    def forward(self, images: Tensor) -> Tensor:
        """Without text: images (B, 3, H, W) -> logits (B, C)."""
        return self.fuse(self.backbone(images))[0]

    def forward_train(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images, tokens (B, L) -> logits (B, C), t-hat and t (B, text_dim)."""
        return *self.fuse(self.backbone(images)), self.text_tower(tokens)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> v (B, vision_dim), t-hat (B, text_dim)."""
        v = self.backbone(images)
        return v, self.fuse(v)[1]

    def train(self, mode: bool = True):
        """BatchNorm stays in eval mode: a frozen backbone's statistics are frozen too."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def to_classifier(self, classes: list[str], run: dict | None = None) -> "Classifier":
        """A copy with LoRA merged and without the text tower."""
        config = self.backbone.recipe | self.sizes | {"classes": classes, "run": run}
        classifier = Classifier(config)
        for name, part in self.named_children():
            if name != "text_tower":
                getattr(classifier, name).load_state_dict(merge_lora(part).state_dict())
        return classifier


def text_classifier(text_dim: int, num_classes: int) -> nn.Module:
    """The MLP of h_t and of the text head alone: text_dim -> text_dim -> C."""
    return nn.Sequential(nn.Linear(text_dim, text_dim), nn.LeakyReLU(0.1),
                         nn.Linear(text_dim, num_classes))


def clipit_loss(logits: Tensor, labels: Tensor, t_hat: Tensor, t: Tensor | None,
                kd_weight: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """logits (B, C), labels (B,), t_hat, t (B, text_dim) or None -> loss, its parts ce and kd."""
    ce = F.cross_entropy(logits, labels)
    if t is None:
        return ce, {"ce": ce.detach()}
    kd = (1 - F.cosine_similarity(t, t_hat, dim=-1)).mean()
    return ce + kd_weight * kd, {"ce": ce.detach(), "kd": kd.detach()}


class Classifier(ClipIT, PyTorchModelHubMixin):
    """A trained ClipIT without its text tower; forward gives logits, predict probabilities. config:
    the backbone's recipe, ClipIT's sizes, the classes, run (for the card); transform or preprocess:
    PIL image -> (3, size, size)."""
    FILES = ["config.json", "model.safetensors"]

    def __init__(self, config: dict):
        backbone = build_backbone(config["architecture"], config["model_args"])
        super().__init__(backbone, None, len(config["classes"]), config["vision_dim"],
                         config["text_dim"], config["kd_layers"])
        self.config, self.classes = config, config["classes"]
        self.transform = tile_transform(config["size"], config["mean"], config["std"])
        self.preprocess = self.transform
        self.eval()

    @torch.inference_mode()
    def predict(self, images) -> Tensor:
        """PIL images -> probabilities (B, C) on the CPU."""
        batch = torch.stack([self.transform(to_rgb(image)) for image in images])
        return self(batch.to(self.vision_head.weight.device)).float().softmax(dim=1).cpu()

    @classmethod
    def from_pretrained(cls, source, **kwargs) -> "Classifier":
        """Of a run's folder, its classifier/, a hub id; kwargs: snapshot_download's. ValueError."""
        folder = next(filter(Path.is_dir, (Path(source, "classifier"), Path(source))), None)
        try:
            if not folder and (Path(source).is_absolute() or str(source).count("/") > 1):
                raise FileNotFoundError("no such folder")
            if not folder:
                folder = snapshot_download(str(source), allow_patterns=cls.FILES, **kwargs)
            config, weights = (Path(folder, name) for name in cls.FILES)
            config = json.loads(config.read_text())
            with torch.device("meta"):  # other sizes are refused before they take memory
                cls(config).load_state_dict(load_file(weights), strict=False, assign=True)
            load_model(classifier := cls(config), weights)
            return classifier
        except Exception as error:  # of files, weights, the hub
            raise ValueError(
                f"{source}: no classifier could be loaded ({_reason(error)})\nexpected "
                f"{' and '.join(cls.FILES)} in a run's folder or on the hub") from None

    def save_pretrained(self, save_directory, **kwargs):
        super().save_pretrained(save_directory, config=self.config, **kwargs)
        # safetensors 0.8 writes for the owner alone; the config's mode follows the umask
        shutil.copymode(*(Path(save_directory, name) for name in self.FILES))

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        return ModelCard(Template(CARD).render(self.config))


CARD = """---
license: other
license_name: {{ licence.replace(" ", "-") | tojson }}
pipeline_tag: image-classification
tags: [histopathology]
---
# Tile classifier: {{ classes | join(", ") }}

For research only: no medical device, not for the care of patients. No text or
text model is in it. In this folder, with clipit.py and lora.py:

    from PIL import Image
    from clipit import Classifier
    Classifier.from_pretrained(".").predict([Image.open("tile.png")])  # (1, {{ classes | length }})

- **Backbone**: {{ backbone_id }}; the licence of its weights covers this model: **{{ licence }}**
- **Tiles**: {{ run.side or "unknown" }} pixels, {{ run.mpp or "unknown" }} micrometres per pixel
{%- if run.data %}
- **Data**: {{ run.data }}; licence: {{ run.licence }}
- **Training text**: {{ run.reports or "none" }}
{%- if run.reports %}, paired by {{ run.clip_model }}, whose terms can cover this model; CONCH's do
{%- endif %}
- **Balanced accuracy** on {{ run.test_tiles }} test tiles: {{ run.variant }}, this model,
  {{ "%.2f" % (100 * run.metrics.balanced_accuracy) }} %; unimodal, on the frozen backbone,
  {{ "%.2f" % (100 * run.unimodal.balanced_accuracy) }} %
{%- endif %}
"""


# ---- Backbones ----

CC = "cc-by-nc-nd-4.0"
OPTIMUS = dict(mean=[0.707223, 0.578729, 0.703617], std=[0.211883, 0.230117, 0.177517])
VIRCHOW = dict(embed_dim=1280, depth=32, num_heads=16, mlp_ratio=5.3375, no_embed_class=False,
               global_pool="cls+mean")


def _row(repo, licence, statistics={}, architecture="vit_giant_patch14_reg4_dinov2", **args):
    source = dict(hf_hub_id=repo, license=licence, **statistics)  # timm's own are ImageNet's
    return dict(source=source, architecture=architecture, args=dict(img_size=224) | args)


def _kaiko(architecture, **args):
    repo = f"1aurent/{architecture.replace('dinov2', '224')}.kaiko_ai_towards_large_pathology_fms"
    half = dict(mean=[0.5] * 3, std=[0.5] * 3)
    return _row(repo, "kaiko-non-commercial", half, architecture, dynamic_img_size=True, **args)


BACKBONES = {  # the paper's six by the authors' names, then newer ones
    "UNI": _row("MahmoodLab/UNI", CC, architecture="vit_large_patch16_224", init_values=1e-5,
                dynamic_img_size=True),
    # the paper's "DINO"; its positions, of 518 pixels, are resampled to 224 in each forward pass
    "DINOL14": _kaiko("vit_large_patch14_reg4_dinov2", img_size=518),
    "VITS_8": _kaiko("vit_small_patch8_224"),
    "VITS_16": _kaiko("vit_small_patch16_224"),
    "VITB_8": _kaiko("vit_base_patch8_224"),
    "VITB_16": _kaiko("vit_base_patch16_224"),
    "UNI2-h": _row("MahmoodLab/UNI2-h", CC, depth=24, num_heads=24, reg_tokens=8),
    "Virchow": _row("paige-ai/Virchow", "apache-2.0", reg_tokens=0, **VIRCHOW),
    "Virchow2": _row("paige-ai/Virchow2", CC, **VIRCHOW),
    "H-optimus-0": _row("bioptimus/H-optimus-0", "apache-2.0", OPTIMUS),
    "H-optimus-1": _row("bioptimus/H-optimus-1", CC, OPTIMUS),
    # of H0-mini the class token, as TRIDENT takes it
    "H0-mini": _row("bioptimus/H0-mini", CC, OPTIMUS, embed_dim=768, depth=12, num_heads=12,
                    mlp_ratio=5.33334),
    "prov-gigapath": _row("prov-gigapath/prov-gigapath", "apache-2.0 with conditions",
                          architecture="vit_giant_patch14_dinov2", patch_size=16),
}


def load_backbone(name: str, weights=None, size: int | None = None) -> nn.Module:
    """A timm model without its classifier, in eval mode: images (B, 3, H, W) -> (B, num_features).

    name: a key of BACKBONES, a timm id, "hf-hub:org/model", "local-dir:folder"; weights: None for
    the published ones, "none" for random ones, or a .pth, .bin or .safetensors file; size: pixels.
    Its preprocess: PIL image -> (3, size, size); its recipe: of the Classifier. ValueError.
    """
    kind, _, place = name.partition(":")
    try:
        source, architecture, args = None, name, {}
        if name in BACKBONES:
            source, architecture, args = BACKBONES[name].values()
        elif kind == "hf-hub":
            source, architecture, args = _hub.load_model_config_from_hf(place)
        elif kind == "local-dir":
            source, architecture, args = _hub.load_model_config_from_path(place)
        args = args | {"num_classes": 0} | ({"img_size": size} if size else {})
        backbone = build_backbone(architecture, args, weights is None, source)
        if weights not in (None, "none"):
            state = timm.models.load_state_dict(str(weights), weights_only=True)
            if isinstance(backbone, vision_transformer.VisionTransformer):  # DINOv2's names, grids
                state = vision_transformer.checkpoint_filter_fn(state, backbone)
            with torch.device("meta"):
                full = build_backbone(architecture, args | {"num_classes": 2})
            for key in full.state_dict().keys() - backbone.state_dict().keys():
                state.pop(key, None)  # of the classifier
            backbone.load_state_dict(state)
        data = timm.data.resolve_model_data_config(backbone)
        pixels = size or data["input_size"][-1]
        tile = dict(size=pixels, mean=list(data["mean"]), std=list(data["std"]))
        backbone.preprocess = tile_transform(**tile)
        with torch.no_grad():
            v = backbone(torch.zeros(1, 3, pixels, pixels))
        if v.ndim != 2 or not v.numel():
            raise ValueError(f"its features are {tuple(v.shape)}; expected (B, D)")
    except Exception as error:  # timm and the hub raise of all kinds
        raise ValueError(
            f"--model {name} --weights {weights} --tile-size {size}: could not be loaded "
            f"({_reason(error)})\nchoose a timm id, hf-hub:org/model, local-dir:folder, --weights "
            f"FILE or {', '.join(BACKBONES)}; a gated one: ask at huggingface.co/MahmoodLab/UNI or "
            "its like, then `hf auth login`"
        ) from None
    known = name in BACKBONES or not weights  # a file under another name can be anyone's
    licence = known and backbone.pretrained_cfg.get("license") or "see the backbone"
    if kind == "local-dir":
        name = f"local-dir:{Path(place).name}"  # nobody's folders are published
    if grid := getattr(getattr(backbone, "patch_embed", None), "img_size", None):
        args["img_size"] = grid[0]  # of the positions; the architecture's own may differ
    backbone.num_features = v.shape[1]  # timm's is that of the last stage, not always of v
    backbone.recipe = dict(architecture=architecture, model_args=args, backbone_id=name,
                           licence=licence, **tile)
    return backbone


def build_backbone(architecture: str, args: dict, pretrained=False, source=None) -> nn.Module:
    """The timm model in eval mode; nothing in args fetches or runs anything."""
    if not timm.is_model(architecture):  # "hf-hub:...", a path
        raise ValueError(f"architecture {architecture}: expected a name of timm's")
    if any(isinstance(value, int) and value > 10_000 for value in args.values()):
        raise ValueError(f"{args}: expected no number above 10,000")
    pooled = args.get("global_pool") == "cls+mean"
    if pooled:  # timm has no such pooling
        args = args | {"global_pool": ""}
    # What is given here cannot be in args, too
    backbone = timm.create_model(architecture, pretrained, source, checkpoint_path=None, **args)
    if pooled:  # Virchow's, of tokens (B, prefix + N, D): class token, mean of the N (B, 2 * D)
        prefix = backbone.num_prefix_tokens
        backbone.register_forward_hook(lambda model, images, tokens: torch.cat(
            [tokens[:, 0], tokens[:, prefix:].mean(dim=1)], dim=1))
    return backbone.eval()


def tile_transform(size: int, mean, std):
    """PIL image -> (3, size, size), as kaiko-eva's ResizeAndCrop: on uint8, in this order. No
    crop_pct: a tile's border is tissue like its centre."""
    mean, std = [*map(float, mean)], [*map(float, std)]
    if len(mean) != 3 or len(std) != 3 or not 0 < size < 10_000:
        raise ValueError(f"{size=}, {mean=}, {std=}; expected pixels, three numbers each")
    return v2.Compose([v2.PILToTensor(), v2.Resize(size), v2.CenterCrop(size),
                       v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image as PIL RGB, 16-bit grey scaled to 8 bits; ValueError for modes I and F."""
    if image.mode.startswith("I;16"):  # PIL would clip it at 255, which makes it white
        image = image.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, whose range is unknown; save it as 8 bits")
    return image.convert("RGB")


# ---- Files, command line ----

@contextmanager
def whole(path: Path):
    """A temporary path for a file or folder that replaces `path` in the end, whole or not at all,
    whatever ends the program. OSError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".tmp", dir=path.parent) as folder:
            part = Path(folder, path.name)
            yield part
            _sync(part, *part.rglob("*"))
            if path.is_dir() and part.is_dir():  # a folder cannot be renamed over another
                path.rename(f"{part}.old")
            os.replace(part, path)
        _sync(path.parent)
    except Exception as error:  # safetensors' are of its own kind
        raise OSError(f"{path}: could not be written ({_reason(error)})\nmake room or take another "
                      "place, and give the same command again") from None


def _sync(*paths: Path) -> None:
    for path in paths if os.name == "posix" else ():  # of a folder, the names in it
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def main(argv=None) -> int:
    """The exit code: 1 where an image was unreadable."""
    parser = argparse.ArgumentParser("clipit.py", usage=argparse.SUPPRESS)  # one line an error
    parser.add_argument("model", help="a run's folder, its classifier/ or a hub id")
    parser.add_argument("images", nargs="*", type=Path, help="image files, folders of them")
    parser.add_argument("--csv", type=Path, help="unset, standard output")
    parser.add_argument("--wsinfer", type=Path, help="a new folder, for WSInfer")
    args = parser.parse_args(argv)
    if args.csv and args.csv.is_dir():
        parser.error(f"--csv {args.csv}: expected a file")
    paths = []
    for path in args.images:
        inside = (file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        paths += sorted(inside) if path.is_dir() else [path]
    if not paths and not args.wsinfer:
        parser.error("images: expected image files or folders")
    model = Classifier.from_pretrained(args.model)
    if args.wsinfer:
        write_wsinfer(model, args.wsinfer)
    if not paths:
        return 0
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    rows = [["path", "pred", *model.classes]]
    for start in tqdm(range(0, len(paths), 64), disable=None):
        images = []
        for path in paths[start:start + 64]:
            try:
                images.append((path, to_rgb(Image.open(path))))
            except Exception as error:  # each format of PIL's raises its own
                print(f"clipit.py: {path}: not a readable image ({error})", file=sys.stderr)
        table = model.predict([image for _, image in images]).tolist() if images else []
        for (path, _), p in zip(images, table):
            rows.append([path, model.classes[p.index(max(p))], *(f"{x:.6f}" for x in p)])
    if args.csv:
        with whole(args.csv) as part, open(part, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    else:
        csv.writer(sys.stdout).writerows(rows)
    return int(len(rows) < 1 + len(paths))


def write_wsinfer(model: Classifier, folder: Path) -> None:
    """torchscript_model.pt, images -> logits, and config.json, as WSInfer reads them."""
    config, run = model.config, model.config["run"] or {}
    side, mpp, size = run.get("side"), run.get("mpp"), config["size"]
    if not side or not mpp:
        raise ValueError("--wsinfer: unknown side or mpp; train with --mpp on tiles of one size")
    if folder.exists():
        raise FileExistsError(f"--wsinfer {folder}: exists; give a new folder")
    transform = [dict(name="ToTensor"), dict(name="Normalize", arguments=dict(
        mean=config["mean"], std=config["std"]))]
    if side != size:
        transform.insert(0, dict(name="Resize", arguments=dict(size=size)))
    wsinfer = dict(spec_version="1.0", architecture=config["backbone_id"], transform=transform,
                   num_classes=len(model.classes), class_names=model.classes,
                   patch_size_pixels=side, spacing_um_px=mpp)
    traced = torch.jit.freeze(torch.jit.trace(model, torch.zeros(1, 3, size, size)))
    with whole(folder) as part:
        part.mkdir()
        (part / "torchscript_model.pt").write_bytes(traced.save_to_buffer())
        (part / "config.json").write_text(json.dumps(wsinfer, indent=2))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # what is unfinished is removed
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        sys.exit(main())
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"clipit.py: {error}", file=sys.stderr)
        sys.exit(2)
