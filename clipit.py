"""CLIP-IT: a tile classifier that learned from reports and needs none. Travels with lora.py.

    from clipit import Classifier
    classifier = Classifier.from_pretrained("runs/demo/base")
    probabilities = classifier.predict([image, ...])  # PIL images -> (B, C)

    python clipit.py runs/demo/base tiles/ more.png --csv out.csv

In the paper's symbols:

    v = backbone(image)    t = text_tower(report of the tile)    t-hat = h_d(v)
    logits = fusion([h_v(v), h_t(t-hat)])
    loss = CE(logits, y) + lambda * mean(1 - cos(t, t-hat))

The layers and the loss are those of the authors' code.
"""
import argparse
import csv
import json
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin, snapshot_download
from PIL import Image
from safetensors.torch import load_file, load_model
from timm.models import _hub, vision_transformer
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

from lora import merge_lora


class ClipIT(nn.Module):
    """The model that is trained.

    backbone: images -> v (B, vision_dim); text_tower: tokens -> t (B, text_dim), None where no text
    is trained; kd_layers: 1, a linear h_d, or 2, an MLP; fused=False: h_v alone, the baseline.
    """

    def __init__(self, backbone: nn.Module, text_tower: nn.Module | None, num_classes: int,
                 vision_dim: int, text_dim: int, kd_layers: int = 1, fused: bool = True,
                 random_fusion: bool = False):
        super().__init__()
        self.backbone, self.text_tower, self.fused = backbone, text_tower, fused
        self.sizes = dict(vision_dim=vision_dim, text_dim=text_dim,
                          kd_layers=kd_layers, fused=fused)
        self.vision_head = nn.Linear(vision_dim, num_classes)  # h_v
        if not fused:
            return
        self.distill_head = nn.Linear(vision_dim, text_dim)  # h_d
        if kd_layers == 2:
            self.distill_head = text_classifier(vision_dim, text_dim)
        self.text_head = text_classifier(text_dim, num_classes)  # h_t
        self.fusion = nn.Linear(2 * num_classes, num_classes)
        if not random_fusion:
            # Logits start as h_v(v) + h_t(t-hat): from the unimodal classifier. The authors' random
            # start mixes its logits, and LoRA first bends the backbone to suit that
            with torch.no_grad():
                self.fusion.weight.copy_(torch.eye(num_classes).repeat(1, 2))
                self.fusion.bias.zero_()

    def fuse(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """v (B, vision_dim) -> logits (B, C), t-hat (B, text_dim)."""
        if not self.fused:
            return self.vision_head(v), None
        t_hat = self.distill_head(v)
        return self.fusion(torch.cat([self.vision_head(v), self.text_head(t_hat)], dim=1)), t_hat

    def forward(self, images: Tensor) -> Tensor:
        """Without text: images (B, 3, H, W) -> logits (B, C)."""
        return self.fuse(self.backbone(images))[0]

    def forward_train(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images, tokens (B, L) -> logits (B, C), t-hat and t (B, text_dim)."""
        return *self.fuse(self.backbone(images)), self.text_tower(tokens)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images -> v (B, vision_dim), t-hat (B, text_dim)."""
        v = self.backbone(images)
        return v, self.fuse(v)[1]

    def train(self, mode: bool = True):
        """BatchNorm stays in eval mode: the statistics of a frozen backbone are frozen too."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def to_classifier(self, classes: list[str], run: dict | None = None) -> "Classifier":
        """A copy with LoRA merged and without the text tower."""
        classifier = Classifier(dict(self.backbone.recipe, **self.sizes, classes=classes, run=run))
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
    """logits (B, C), labels (B,), t_hat and t (B, text_dim) -> loss, its parts {"ce", "kd"}.

    t = None: the ablation without text. (The authors' code takes the CE of a softmax.)
    """
    ce = F.cross_entropy(logits, labels)
    if t is None:
        return ce, {"ce": ce.detach()}
    kd = (1 - F.cosine_similarity(t, t_hat, dim=-1)).mean()
    return ce + kd_weight * kd, {"ce": ce.detach(), "kd": kd.detach()}


class Classifier(ClipIT, PyTorchModelHubMixin):
    """A trained ClipIT without its text tower: plain modules, rebuilt from config.json offline.

    classes: C names; transform (or preprocess): PIL image -> (3, size, size); forward: images
    (B, 3, size, size) -> logits (B, C), no softmax; predict: PIL images -> probabilities; features:
    images -> v, t-hat. config: a backbone's recipe, ClipIT's sizes, classes, run (for the card).
    """

    FILES = ["config.json", "model.safetensors"]

    def __init__(self, config: dict):
        sizes = {key: config[key] for key in ("vision_dim", "text_dim", "kd_layers", "fused")}
        backbone = build_backbone(config["architecture"], config["model_args"])
        super().__init__(backbone, None, len(config["classes"]), **sizes)
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
    def from_pretrained(cls, source, map_location="cpu", **kwargs) -> "Classifier":
        """Of a run's folder, its classifier/ or a hub id (kwargs: snapshot_download's). Nothing in
        config.json runs or fetches anything. Raises ValueError."""
        folder = Path(source)
        if (folder / "classifier").is_dir():
            folder /= "classifier"
        try:
            if not folder.is_dir():
                if folder.is_absolute() or len(folder.parts) > 2:
                    raise FileNotFoundError("no such folder")
                folder = snapshot_download(str(source), allow_patterns=cls.FILES, **kwargs)
            config, weights = (Path(folder, name) for name in cls.FILES)
            config = json.loads(config.read_text())
            with torch.device("meta"):  # other sizes are refused before they take memory
                cls(config).load_state_dict(load_file(weights), strict=False, assign=True)
            classifier = cls(config)
            load_model(classifier, weights)
            return classifier.to(map_location)
        except Exception as error:  # of files, weights, the hub, the device
            raise ValueError(
                f"{source}: no classifier could be loaded ({_reason(error)})\nexpected a run's "
                "folder, or config.json and model.safetensors in a folder or on the hub") from None

    def save_pretrained(self, save_directory, **kwargs):
        result = super().save_pretrained(save_directory, **kwargs)
        # The umask holds for weights, too: safetensors 0.8 writes them for the owner alone
        config, weights = (Path(save_directory, name) for name in self.FILES)
        shutil.copymode(config, weights)
        return result

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        name = self.config["licence"].replace(" ", "-")
        data = ModelCardData(license="other", license_name=name, tags=["histopathology"],
                             pipeline_tag="image-classification")
        return ModelCard.from_template(data, template_str=CARD, **self.config,
                                       row=BACKBONES.get(self.config["backbone_id"]))


CARD = """---
{{ card_data }}
---
# Tile classifier: {{ classes | join(", ") }}

For research only: it is no medical device and must not guide the care of a patient. No text or
text model is in it. In this folder, beside clipit.py and lora.py:

    from PIL import Image
    from clipit import Classifier
    Classifier.from_pretrained(".").predict([Image.open("tile.png")])  # (1, {{ classes | length }})

- **Backbone**: `{{ backbone_id }}`
{%- if row %} (https://huggingface.co/{{ row.source.hf_hub_id }}){% endif %}.
  Licence of its weights: **{{ licence }}**; read it before you share what is made of them.
- **Tiles**: {{ run.side or "unknown" }} pixels, {{ run.mpp or "unknown" }} micrometres per pixel.
{%- if run.data %}
- **Data**: {{ run.data }}; licence: {{ run.licence }}.
{%- if run.reports %}
- **Training text**: `{{ run.reports }}`, paired with the tiles by `{{ run.clip_model }}`, whose
  terms can cover what is trained on its outputs; CONCH's do.
{%- endif %}
- **Balanced accuracy** on {{ run.test_tiles }} test tiles: {{ run.variant }}, this classifier,
  {{ "%.2f" | format(100 * run.metrics.balanced_accuracy) }} %; unimodal, on the frozen backbone,
  {{ "%.2f" | format(100 * run.unimodal.balanced_accuracy) }} %.
{%- endif %}
"""


# ---- Backbones ----------------------------------------------------------------------------------

IMAGENET = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
OPTIMUS = dict(mean=[0.707223, 0.578729, 0.703617], std=[0.211883, 0.230117, 0.177517])
HALF = dict(mean=[0.5] * 3, std=[0.5] * 3)
CC, GIANT = "cc-by-nc-nd-4.0", "vit_giant_patch14_reg4_dinov2"
VIRCHOW = dict(img_size=224, embed_dim=1280, depth=32, num_heads=16, mlp_ratio=5.3375,
               no_embed_class=False, global_pool="cls+mean")


def _row(repo, licence, gated, statistics, architecture, **args) -> dict:
    source = dict(hf_hub_id=repo, license=licence, input_size=(3, 224, 224), num_classes=0)
    return dict(gated=gated, architecture=architecture, args=args, source=source | statistics)


def _kaiko(architecture, **args) -> dict:
    published = architecture.replace("dinov2", "224")
    return _row(f"1aurent/{published}.kaiko_ai_towards_large_pathology_fms", "kaiko-non-commercial",
                False, HALF, architecture, dynamic_img_size=True, **args)


BACKBONES = {  # the paper's six by the authors' names, then newer ones
    "UNI": _row("MahmoodLab/UNI", CC, True, IMAGENET, "vit_large_patch16_224", init_values=1e-5,
                dynamic_img_size=True),
    # the paper's "DINO"; its positions are for 518 pixels and resampled to 224 in each forward pass
    "DINOL14": _kaiko("vit_large_patch14_reg4_dinov2", img_size=518),
    "VITS_8": _kaiko("vit_small_patch8_224"),
    "VITS_16": _kaiko("vit_small_patch16_224"),
    "VITB_8": _kaiko("vit_base_patch8_224"),
    "VITB_16": _kaiko("vit_base_patch16_224"),
    "UNI2-h": _row("MahmoodLab/UNI2-h", CC, True, IMAGENET, GIANT, img_size=224, depth=24,
                   num_heads=24, reg_tokens=8),
    "Virchow": _row("paige-ai/Virchow", "apache-2.0", True, IMAGENET, GIANT, reg_tokens=0,
                    **VIRCHOW),
    "Virchow2": _row("paige-ai/Virchow2", CC, True, IMAGENET, GIANT, **VIRCHOW),
    "H-optimus-0": _row("bioptimus/H-optimus-0", "apache-2.0", False, OPTIMUS, GIANT, img_size=224),
    "H-optimus-1": _row("bioptimus/H-optimus-1", CC, True, OPTIMUS, GIANT, img_size=224),
    # of H0-mini the class token, as TRIDENT takes it
    "H0-mini": _row("bioptimus/H0-mini", CC, True, OPTIMUS, GIANT, img_size=224, embed_dim=768,
                    depth=12, num_heads=12, mlp_ratio=5.33334),
    "prov-gigapath": _row("prov-gigapath/prov-gigapath", "apache-2.0 with conditions", True,
                          IMAGENET, "vit_giant_patch14_dinov2", img_size=224, patch_size=16),
}


def load_backbone(name: str, weights=None, size: int | None = None) -> nn.Module:
    """A timm model without its classifier, in eval mode: images (B, 3, H, W) -> v (B, D).

    name: a key of BACKBONES, a timm id, "hf-hub:org/model" or "local-dir:folder"; weights: None for
    the published ones, "none" for random ones, or a .pth, .bin or .safetensors file; size: pixels
    of a tile, None for the model's own. Its num_features is D; preprocess: PIL image -> its input;
    recipe: what the Classifier rebuilds it of. Raises ValueError.
    """
    given = f"--model {name}" + (f" --weights {weights}" if weights else "")
    given += f" --tile-size {size}" if size else ""
    try:
        source, architecture, args = find_backbone(name)
        args = dict(args or {}, num_classes=0)
        if size:
            args["img_size"] = size
        backbone = build_backbone(architecture, args, weights is None, source)
        if weights not in (None, "none"):
            load_weights(backbone, architecture, args, weights)
        data = timm.data.resolve_model_data_config(backbone)
        size, mean, std = size or data["input_size"][-1], list(data["mean"]), list(data["std"])
        backbone.preprocess = tile_transform(size, mean, std)
        with torch.no_grad():
            v = backbone(torch.zeros(1, 3, size, size))
        if v.ndim != 2 or v.shape[1] == 0:  # timm 1.0.26's InceptionNeXt has none
            raise ValueError(f"its features are {tuple(v.shape)}; expected (B, D)")
    except Exception as error:  # timm and the hub raise of all kinds
        raise ValueError(
            f"{given}: could not be loaded ({_reason(error)})\nchoose {', '.join(BACKBONES)}, a "
            "timm id, hf-hub:org/model or local-dir:folder with timm's config.json, or --weights "
            "FILE; ask for a gated one on its page, as https://huggingface.co/MahmoodLab/UNI, then "
            "`hf auth login`") from None
    licence = None  # of a local file under another name: it can be anyone's
    if name in BACKBONES or not weights:
        licence = backbone.pretrained_cfg.get("license")
    if name.startswith("local-dir:"):
        name = "local-dir:" + Path(name.partition(":")[2]).name  # nobody's folders are published
    grid = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    if grid:  # of the positions; the architecture's own may differ
        args["img_size"] = grid[0]
    backbone.num_features = v.shape[1]  # timm's is that of the last stage, not always of v
    backbone.recipe = dict(architecture=architecture, model_args=args, size=size, mean=mean,
                           std=std, backbone_id=name, licence=licence or "see the backbone")
    return backbone


def find_backbone(name: str) -> tuple[dict | None, str, dict]:
    """timm's pretrained_cfg (None: its own), architecture and arguments."""
    if name in BACKBONES:
        row = BACKBONES[name]
        return row["source"], row["architecture"], row["args"]
    kind, _, place = name.partition(":")
    try:
        if kind == "hf-hub":
            return _hub.load_model_config_from_hf(place)
        if kind == "local-dir":
            return _hub.load_model_config_from_path(place)
    except KeyError as missing:
        raise ValueError(f"its config.json is not one of timm's: no {missing}") from None
    return None, name, {}


def build_backbone(architecture: str, args: dict, pretrained=False, source=None) -> nn.Module:
    """The timm model in eval mode; nothing in args fetches or runs anything."""
    if not timm.is_model(architecture):  # "hf-hub:...", a path
        raise ValueError(f"architecture {architecture}: expected a name of timm's")
    for key, value in args.items():
        if isinstance(value, int) and value > 10_000:
            raise ValueError(f"{key} is {value}; expected at most 10,000")
    pooled = args.get("global_pool") == "cls+mean"
    if pooled:  # timm has no such pooling
        args = dict(args, global_pool="")
    # An argument that is given here cannot be in args, too
    backbone = timm.create_model(architecture, pretrained=pretrained, pretrained_cfg=source,
                                 checkpoint_path=None, **args)
    if pooled:
        backbone.head = ClassAndMean(backbone.num_prefix_tokens)
    return backbone.eval()


class ClassAndMean(nn.Module):
    """Virchow's head: tokens (B, prefix + N, D) -> class token, mean of the N others (B, 2 * D)."""

    def __init__(self, prefix: int):
        super().__init__()
        self.prefix = prefix  # the class token and the registers

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, 0], tokens[:, self.prefix:].mean(dim=1)], dim=1)


def load_weights(backbone: nn.Module, architecture: str, args: dict, path) -> None:
    """Load a file strictly, but for the classifier: keys that the model with classes has alone."""
    state = timm.models.load_state_dict(str(path), weights_only=True)
    if isinstance(backbone, vision_transformer.VisionTransformer):  # DINOv2's names, other grids
        state = vision_transformer.checkpoint_filter_fn(state, backbone)
    with torch.device("meta"):
        full = build_backbone(architecture, dict(args, num_classes=2))
    classifier = full.state_dict().keys() - backbone.state_dict().keys()
    backbone.load_state_dict({key: x for key, x in state.items() if key not in classifier})


def tile_transform(size: int, mean, std):
    """PIL image -> (3, size, size), as kaiko-eva's ResizeAndCrop: on uint8, in this order. No
    crop_pct: a tile's border is tissue like its centre."""
    numbers = all(isinstance(x, (int, float)) for x in (*mean, *std))
    if not numbers or len(mean) != 3 or len(std) != 3:
        raise ValueError(f"mean {mean}, std {std}; expected three numbers each")
    return v2.Compose([v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size),
                       v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def to_rgb(image: Image.Image) -> Image.Image:
    """A PIL image as PIL RGB, 16-bit grey scaled to 8 bits; ValueError for modes I and F."""
    if image.mode.startswith("I;16"):  # PIL would clip it at 255, which makes it white
        image = image.convert("I").point(lambda value: value / 257 + 0.5).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, whose range is unknown; save it as 8 bits")
    return image.convert("RGB")


@contextmanager
def whole(path: Path):
    """A temporary path; what is written there takes the place of `path` in the end, and after an
    error or a signal not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".tmp", dir=path.parent) as folder:
        part = Path(folder, path.name)
        yield part
        part.replace(path)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


# ---- Command line: class probabilities of image files -------------------------------------------

def main(argv=None) -> int:
    """Exit code 0, or 1 where an image was unreadable."""
    parser = argparse.ArgumentParser("clipit.py", usage=argparse.SUPPRESS)  # one line an error
    parser.add_argument("model", help="a run's folder, its classifier/ or a hub id")
    parser.add_argument("images", nargs="*", help="image files and folders (with all below them)")
    parser.add_argument("--csv", help="the file to write; unset, standard output")
    parser.add_argument("--wsinfer", help="a new folder, for the model as WSInfer reads it")
    args = parser.parse_args(argv)
    if not args.images and not args.wsinfer:
        parser.error("images: expected files or folders")
    if args.csv and Path(args.csv).is_dir():
        raise ValueError(f"--csv {args.csv}: expected a file")

    classifier = Classifier.from_pretrained(args.model)
    if args.wsinfer:
        write_wsinfer(classifier, Path(args.wsinfer))
    if not args.images:
        return 0
    classifier.to("cuda" if torch.cuda.is_available() else "cpu")
    paths, rows, unreadable = [], [["path", "pred", *classifier.classes]], 0
    for path in map(Path, args.images):
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        if not inside and not path.is_file():
            raise FileNotFoundError(f"{path}: no image there ({' '.join(IMG_EXTENSIONS)})")
        paths += inside or [path]
    for start in tqdm(range(0, len(paths), 64), disable=None):
        readable, images = [], []
        for path in paths[start:start + 64]:
            try:
                images.append(to_rgb(Image.open(path)))
                readable.append(path)
            except Exception as error:  # each format of PIL's raises its own
                unreadable = 1
                print(f"clipit.py: {path}: not a readable image ({error})", file=sys.stderr)
        probabilities = classifier.predict(images).tolist() if images else []
        for path, p in zip(readable, probabilities):
            rows.append([path, classifier.classes[p.index(max(p))], *(f"{x:.6f}" for x in p)])
    if args.csv:
        with whole(Path(args.csv)) as part, open(part, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    else:
        csv.writer(sys.stdout).writerows(rows)
    return unreadable


def write_wsinfer(classifier: Classifier, folder: Path) -> None:
    """folder/torchscript_model.pt, images -> logits, and config.json, as WSInfer reads them."""
    config, run = classifier.config, classifier.config["run"] or {}
    side, mpp, size = run.get("side"), run.get("mpp"), config["size"]
    if not side or not mpp:
        raise ValueError("--wsinfer: unknown micrometres per pixel or side of a tile; train with "
                         "--mpp on tiles of one size")
    if folder.exists():
        raise FileExistsError(f"--wsinfer {folder}: exists; give a new folder")
    normalize = dict(mean=config["mean"], std=config["std"])
    transform = [dict(name="ToTensor"), dict(name="Normalize", arguments=normalize)]
    if side != size:
        transform.insert(0, dict(name="Resize", arguments=dict(size=size)))
    wsinfer = dict(spec_version="1.0", architecture=config["backbone_id"], transform=transform,
                   num_classes=len(classifier.classes), class_names=classifier.classes,
                   patch_size_pixels=side, spacing_um_px=mpp)
    traced = torch.jit.freeze(torch.jit.trace(classifier, torch.zeros(1, 3, size, size)))
    with whole(folder) as part:
        part.mkdir()
        traced.save(part / "torchscript_model.pt")
        (part / "config.json").write_text(json.dumps(wsinfer, indent=2))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is unfinished is removed
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("clipit.py: stopped", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"clipit.py: {error}", file=sys.stderr)
        sys.exit(2)
