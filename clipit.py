"""CLIP-IT: a tile classifier that learned from reports and needs none. Travels with lora.py.

    from clipit import Classifier
    classifier = Classifier.from_pretrained("runs/demo/base")  # text-free, plain modules
    probabilities = classifier.predict([image, ...])           # PIL images -> (B, C)

    python clipit.py runs/demo/base tiles/ more.png --csv out.csv

In the symbols of the paper:

    v = backbone(image)    t = text_tower(report of the tile)    t-hat = h_d(v)
    logits = fusion([h_v(v), h_t(t-hat)])
    loss = CE(logits, y) + lambda * mean(1 - cos(t, t-hat))

LoRA, distillation and fusion are the paper's; the layers and the loss are the authors' code's.
"""
import argparse
import csv
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin
from PIL import Image
from timm.models import _hub
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from tqdm import tqdm

from lora import merge_lora


class ClipIT(nn.Module):
    """The model that is trained.

    backbone: images -> v (B, vision_dim); text_tower: tokens -> t (B, text_dim), None where no text
    is trained; kd_layers: 1 for a linear h_d, 2 for an MLP; fused=False: h_v alone, the plain
    baseline; random_fusion: the authors' start.
    """

    def __init__(self, backbone: nn.Module, text_tower: nn.Module | None, num_classes: int,
                 vision_dim: int, text_dim: int, kd_layers: int = 1, fused: bool = True,
                 random_fusion: bool = False):
        super().__init__()
        self.backbone, self.text_tower, self.fused = backbone, text_tower, fused
        self.sizes = dict(vision_dim=vision_dim, text_dim=text_dim, kd_layers=kd_layers,
                          fused=fused)
        self.vision_head = nn.Linear(vision_dim, num_classes)  # h_v
        if not fused:
            return
        self.distill_head = nn.Linear(vision_dim, text_dim)  # h_d
        if kd_layers == 2:
            self.distill_head = text_classifier(vision_dim, text_dim)  # the same kind of MLP
        self.text_head = text_classifier(text_dim, num_classes)  # h_t
        self.fusion = nn.Linear(2 * num_classes, num_classes)
        if not random_fusion:
            # Fused logits start as h_v(v) + h_t(t-hat): from the unimodal classifier of step 2. The
            # authors' random start mixes its logits, and LoRA bends the backbone to suit that first
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
        """The text-free path: images (B, 3, H, W) -> logits (B, C)."""
        return self.fuse(self.backbone(images))[0]

    def forward_train(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images (B, 3, H, W), tokens (B, L) -> logits (B, C), t-hat and t (B, text_dim)."""
        return *self.fuse(self.backbone(images)), self.text_tower(tokens)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """images (B, 3, H, W) -> v (B, vision_dim), t-hat (B, text_dim)."""
        v = self.backbone(images)
        return v, self.fuse(v)[1]

    def train(self, mode: bool = True):
        """BatchNorm stays in eval mode: a frozen backbone's batch statistics are frozen too."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def to_classifier(self, classes: list[str], run: dict | None = None) -> "Classifier":
        """The text-free Classifier with LoRA merged; this model stays as it is."""
        classifier = Classifier(**self.backbone.recipe, classes=classes, **self.sizes, run=run)
        for name, part in self.named_children():
            if name != "text_tower":
                getattr(classifier, name).load_state_dict(merge_lora(part).state_dict())
        return classifier


def text_classifier(text_dim: int, num_classes: int) -> nn.Module:
    """The MLP of h_t and of the stand-alone text head: text_dim -> text_dim -> C."""
    return nn.Sequential(nn.Linear(text_dim, text_dim), nn.LeakyReLU(0.1),
                         nn.Linear(text_dim, num_classes))


def clipit_loss(logits: Tensor, labels: Tensor, t_hat: Tensor, t: Tensor | None,
                kd_weight: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """logits (B, C), labels (B,), t_hat and t (B, text_dim) -> loss, its parts {"ce", "kd"}.

    t = None: the paper's ablation without text. (The authors' code takes a softmax first and so the
    CE of probabilities.)
    """
    ce = F.cross_entropy(logits, labels)
    if t is None:
        return ce, {"ce": ce.detach()}
    kd = (1 - F.cosine_similarity(t, t_hat, dim=-1)).mean()
    return ce + kd_weight * kd, {"ce": ce.detach(), "kd": kd.detach()}


class Classifier(ClipIT, PyTorchModelHubMixin):
    """A trained ClipIT without its text tower: plain modules, rebuilt from config.json offline.

    save_pretrained(dir) writes config.json, model.safetensors and the model card, push_to_hub(id)
    uploads them. run: what the card tells of the training: data, licence, reports, clip_model,
    test_tiles, variant, metrics, unimodal.
    """

    def __init__(self, architecture: str, model_args: dict, size: int, mean: list[float],
                 std: list[float], backbone_id: str, licence: str, classes: list[str],
                 vision_dim: int, text_dim: int, kd_layers: int = 1, fused: bool = True,
                 run: dict | None = None):
        backbone = timm.create_model(architecture, **model_args)
        super().__init__(backbone, None, len(classes), vision_dim, text_dim, kd_layers, fused)
        self.preprocess, self.classes = tile_transform(size, mean, std), list(classes)
        self.about = dict(backbone_id=backbone_id, licence=licence, run=run)
        self.eval()

    @torch.inference_mode()
    def predict(self, images) -> Tensor:
        """PIL images -> probabilities (B, C) on the CPU."""
        batch = torch.stack([self.preprocess(image.convert("RGB")) for image in images])
        return self(batch.to(self.vision_head.weight.device)).float().softmax(dim=1).cpu()

    @classmethod
    def from_pretrained(cls, source, **kwargs) -> "Classifier":
        """Of a run's folder, its classifier/ or a hub id. Raises ValueError."""
        inside = Path(source, "classifier")
        place = inside if inside.is_dir() else source
        try:
            with redirect_stdout(sys.stderr):  # the mixin prints, and the command writes a table
                return super().from_pretrained(place, strict=True, **kwargs)
        except Exception as error:  # no config.json, a broken one, other weights, no such device
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{source}: no classifier could be loaded ({reason})\nexpected a "
                             "run's folder, its classifier/ with config.json and weights, or a "
                             "hub id") from None

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """The mixin calls this where it saves and uploads."""
        data = ModelCardData(license="other", license_name=self.about["licence"].replace(" ", "-"),
                             pipeline_tag="image-classification", tags=["histopathology"])
        repo = BACKBONES.get(self.about["backbone_id"], {}).get("repo")
        return ModelCard.from_template(data, template_str=CARD, classes=self.classes, repo=repo,
                                       **self.about)


CARD = """---
{{ card_data }}
---
# Tile classifier: {{ classes | join(", ") }}

For research only: it is no medical device and must not guide the care of a patient. It needs the
image alone: no text, tokenizer or text model is in it. With clipit.py and lora.py:

    from clipit import Classifier
    classifier = Classifier.from_pretrained("this folder, or its hub id")
    probabilities = classifier.predict([image])  # PIL images -> (B, {{ classes | length }})

- **Backbone**: `{{ backbone_id }}`{% if repo %} (https://huggingface.co/{{ repo }}){% endif %}.
  Licence of its weights: **{{ licence }}**; read it before you share this file, made of them.
{%- if run %}
- **Data**: {{ run.data }}; licence: {{ run.licence }}.
{%- if run.reports %}
- **Training text**: `{{ run.reports }}`, paired with the tiles by `{{ run.clip_model }}`. Terms of
  a CLIP model can cover what is trained on its outputs; CONCH's do.
{%- endif %}
- **Balanced accuracy** on {{ run.test_tiles }} test tiles: {{ run.variant }}, this classifier,
  {{ "%.2f" | format(100 * run.metrics.balanced_accuracy) }} %; unimodal, on the frozen backbone,
  {{ "%.2f" | format(100 * run.unimodal.balanced_accuracy) }} %. config.json has more figures.
{%- endif %}
"""


# ---- Backbones ----------------------------------------------------------------------------------

def _kaiko(published: str, architecture: str, **args) -> dict:
    return dict(repo=f"1aurent/{published}.kaiko_ai_towards_large_pathology_fms",
                licence="kaiko-non-commercial", architecture=architecture, mean=[0.5] * 3,
                std=[0.5] * 3, args=dict(args, dynamic_img_size=True))


# The authors' names: hub repository, licence, timm architecture and arguments, mean and std
BACKBONES = {
    "UNI": dict(repo="MahmoodLab/UNI", licence="cc-by-nc-nd-4.0", mean=[0.485, 0.456, 0.406],
                std=[0.229, 0.224, 0.225], architecture="vit_large_patch16_224",
                args=dict(init_values=1e-5, dynamic_img_size=True)),
    # the paper's "DINO"; its positions are for 518 pixels and resampled to 224 in each forward pass
    "DINOL14": _kaiko("vit_large_patch14_reg4_224", "vit_large_patch14_reg4_dinov2", img_size=518),
    "VITS_8": _kaiko("vit_small_patch8_224", "vit_small_patch8_224"),
    "VITS_16": _kaiko("vit_small_patch16_224", "vit_small_patch16_224"),
    "VITB_8": _kaiko("vit_base_patch8_224", "vit_base_patch8_224"),
    "VITB_16": _kaiko("vit_base_patch16_224", "vit_base_patch16_224"),
}


def load_backbone(name: str, weights=None) -> nn.Module:
    """A timm model without its classifier, in eval mode: images (B, 3, H, W) -> v (B, D).

    name: a key of BACKBONES, a timm id, "hf-hub:org/model" or "local-dir:folder"; weights: None for
    the published ones, a .pth, .bin or .safetensors file, or "none" for random ones. Raises
    ValueError. Its .preprocess takes a PIL image, of its .recipe the Classifier is built.
    """
    row, (source, _, place) = BACKBONES.get(name), name.partition(":")
    config, architecture, args = None, name, {}
    try:
        if row:
            architecture, args = row["architecture"], row["args"]
            config = dict(hf_hub_id=row["repo"], license=row["licence"], mean=row["mean"],
                          std=row["std"], input_size=(3, 224, 224), num_classes=0)
        elif source == "hf-hub":
            config, architecture, args = _hub.load_model_config_from_hf(place)
        elif source == "local-dir":
            config, architecture, args = _hub.load_model_config_from_path(place)
        args = dict(args or {}, num_classes=0)
        backbone = timm.create_model(architecture, weights is None, config, **args)
        if weights not in (None, "none"):
            load_weights(backbone, architecture, args, weights)
    except Exception as error:  # timm and the hub raise of all kinds
        given = f"--model {name}" + (f" --weights {weights}" if weights else "")
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"{given}: could not be loaded ({reason})\nchoose "
                         f"{', '.join(BACKBONES)}, a timm id, hf-hub:org/model, local-dir:folder or "
                         "give --weights FILE; UNI is gated: ask for access on "
                         "https://huggingface.co/MahmoodLab/UNI, then `hf auth login`") from None
    licence = backbone.pretrained_cfg.get("license") or "see the backbone"
    if weights is not None and not row:  # a local file under another name can be anyone's
        licence = "see the backbone" if weights != "none" else "random weights"
    if source == "local-dir":  # nobody's folders are published
        name = f"local-dir:{Path(place).name}"
    data = timm.data.resolve_model_data_config(backbone)
    inputs = dict(size=data["input_size"][-1], mean=list(data["mean"]), std=list(data["std"]))
    backbone.preprocess = tile_transform(**inputs)
    backbone.recipe = dict(inputs, architecture=architecture, model_args=args, backbone_id=name,
                           licence=licence)
    return backbone.eval()


def load_weights(backbone: nn.Module, architecture: str, args: dict, path) -> None:
    """Load a file strictly, but for the classifier: keys that the model with classes has alone."""
    state = timm.models.load_state_dict(str(path), weights_only=True)
    if isinstance(backbone, VisionTransformer):
        state = checkpoint_filter_fn(state, backbone)  # DINOv2's names, other grids of positions
    with torch.device("meta"):
        full = timm.create_model(architecture, **dict(args, num_classes=2)).state_dict().keys()
    classifier = full - backbone.state_dict().keys()
    backbone.load_state_dict({key: x for key, x in state.items() if key not in classifier})


def tile_transform(size: int, mean, std):
    """PIL image -> (3, size, size), as kaiko-eva's ResizeAndCrop: on uint8, in this order. There is
    no crop_pct: a tile's border is tissue like its centre."""
    return v2.Compose([v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size),
                       v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


# ---- Command line: class probabilities of image files -------------------------------------------

def main(argv=None) -> int:
    """Exit code 0, or 1 where an image was unreadable. A run that is stopped writes nothing."""
    parser = argparse.ArgumentParser("clipit.py", description="Class probabilities of tiles.")
    parser.add_argument("model", help="a run's folder, its classifier/ or a hub id")
    parser.add_argument("images", nargs="+", help="image files and folders (with all below them)")
    parser.add_argument("--csv", help="the file to write; unset, standard output")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    classifier = Classifier.from_pretrained(args.model, map_location=args.device)
    rows, unreadable = [["path", "pred", *classifier.classes]], False
    batches = DataLoader(find_images(args.images), args.batch, collate_fn=list)
    for paths in tqdm(batches, "batches", disable=None):
        images = {}
        for path in paths:
            try:
                images[path] = Image.open(path).convert("RGB")
            except Exception as error:  # PIL raises of all kinds, each format its own
                unreadable = True
                print(f"clipit.py: {path}: not a readable image ({error})", file=sys.stderr)
        probabilities = classifier.predict(images.values()).tolist() if images else []
        for path, p in zip(images, probabilities):
            rows.append([path, classifier.classes[p.index(max(p))], *(f"{x:.6f}" for x in p)])
    if args.csv:
        with open(f"{args.csv}.tmp", "w", newline="") as file:
            csv.writer(file).writerows(rows)
        os.replace(f"{args.csv}.tmp", args.csv)
    else:
        csv.writer(sys.stdout).writerows(rows)
    return int(unreadable)


def find_images(given: list[str]) -> list[Path]:
    """The files given and the images below the folders given, in order of name, each once."""
    paths = {}
    for path in map(Path, given):
        inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        if not inside and not path.is_file():
            raise FileNotFoundError(f"{path}: no image there ({' '.join(IMG_EXTENSIONS)})")
        paths |= dict.fromkeys(inside or [path])
    return list(paths)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, KeyboardInterrupt) as error:
        print(f"clipit.py: {str(error) or 'stopped'}", file=sys.stderr)
        sys.exit(2)
