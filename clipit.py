"""CLIP-IT: a tile classifier that learned from reports and needs none.

    from clipit import Classifier
    classifier = Classifier.from_pretrained("runs/demo/base/classifier")  # text-free, plain modules
    probabilities = classifier.predict([image, ...])                      # PIL images -> (B, C)

    python clipit.py runs/demo/base tiles/ more.png --csv out.csv         # the same for files

Travels with lora.py. The symbols of the paper:

    v = backbone(image)    t = text_tower(report of the tile)    t-hat = h_d(v)
    logits = fusion([h_v(v), h_t(t-hat)])
    loss = CE(logits, y) + lambda * mean(1 - cos(t, t-hat))

LoRA, distillation and fusion are the paper's; the layers and the loss are the authors' code's.
"""
import argparse
import csv
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin
from torch import Tensor, nn

from lora import merge_lora


class ClipIT(nn.Module):
    """The model that is trained.

    backbone: images -> v (B, vision_dim); text_tower: tokens -> t (B, text_dim), None where the
    text is fixed or there is none; kd_layers: 1 for a linear h_d, 2 for an MLP; fused=False: h_v
    alone, the plain baseline; random_fusion: the authors' start.
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
            self.distill_head = nn.Sequential(nn.Linear(vision_dim, vision_dim), nn.LeakyReLU(0.1),
                                              nn.Linear(vision_dim, text_dim))
        self.text_head = text_classifier(text_dim, num_classes)  # h_t
        self.fusion = nn.Linear(2 * num_classes, num_classes)
        if not random_fusion:
            # Fused logits start as h_v(v) + h_t(t-hat), so training starts from the unimodal
            # classifier of step 2. The authors' random start mixes its logits, and LoRA first bends
            # the backbone to suit that mixture.
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

    def forward_train(self, images: Tensor, tokens: Tensor, report: Tensor | None = None):
        """images (B, 3, H, W), tokens (B, L) -> logits (B, C), t-hat and t (B, text_dim).

        With `report` (B,), tokens (R, L) are those of the distinct reports of the batch and
        report[i] is the row of tile i: tiles share reports, and each is encoded once.
        """
        logits, t_hat = self.fuse(self.backbone(images))
        t = self.text_tower(tokens)
        return logits, t_hat, t if report is None else t[report]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """images (B, 3, H, W) -> v (B, vision_dim), t-hat (B, text_dim), for other tools."""
        v = self.backbone(images)
        return v, self.fuse(v)[1]

    def train(self, mode: bool = True):
        """BatchNorm stays in eval mode: a frozen backbone's batch statistics are frozen too."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def to_classifier(self, classes: list[str] | None = None, run: dict | None = None):
        """The text-free Classifier with LoRA merged; this model stays as it is. The backbone must
        be load_backbone's, whose recipe the classifier is built from. run: see Classifier."""
        classes = classes or [f"class_{i}" for i in range(self.vision_head.out_features)]
        classifier = Classifier(**self.backbone.recipe, classes=classes, **self.sizes, run=run)
        for name, part in self.named_children():
            if name != "text_tower":
                getattr(classifier, name).load_state_dict(merge_lora(part).state_dict())
        return classifier.eval()


def text_classifier(text_dim: int, num_classes: int) -> nn.Module:
    """The MLP of h_t and of the stand-alone text head: text_dim -> text_dim -> C."""
    return nn.Sequential(nn.Linear(text_dim, text_dim), nn.LeakyReLU(0.1),
                         nn.Linear(text_dim, num_classes))


def clipit_loss(logits: Tensor, labels: Tensor, t_hat: Tensor, t: Tensor | None,
                kd_weight: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, {"ce", "kd"}): CE(logits, y) + kd_weight * mean(1 - cos(t, t-hat)).

    logits (B, C), labels (B,), t_hat and t (B, text_dim); t = None: the paper's ablation without
    text, CE alone. (The authors' code takes a softmax first and so the CE of probabilities.)
    """
    ce = F.cross_entropy(logits, labels)
    if t is None:
        return ce, {"ce": ce.detach()}
    kd = (1 - F.cosine_similarity(t, t_hat, dim=-1)).mean()
    return ce + kd_weight * kd, {"ce": ce.detach(), "kd": kd.detach()}


class Classifier(ClipIT, PyTorchModelHubMixin):
    """A trained ClipIT without its text tower: plain modules, rebuilt from config.json offline.

    save_pretrained(dir) writes config.json, model.safetensors and the model card, push_to_hub(id)
    uploads them, from_pretrained(dir or hub id) reads them. run: what config.json and the card tell
    of the training: data, licence, reports, clip_model, test_tiles, variant, metrics, unimodal.
    """

    def __init__(self, architecture: str, model_args: dict, size: int, mean: list[float],
                 std: list[float], classes: list[str], vision_dim: int, text_dim: int,
                 kd_layers: int = 1, fused: bool = True, backbone_id: str = "",
                 licence: str = "see the backbone", run: dict | None = None):
        import timm
        backbone = timm.create_model(architecture, pretrained=False, **model_args)
        super().__init__(backbone, None, len(classes), vision_dim, text_dim, kd_layers, fused)
        self.classes, self.preprocess = list(classes), tile_transform(size, mean, std)
        self.about = dict(backbone_id=backbone_id or architecture, licence=licence, run=run)
        self.eval()

    @torch.inference_mode()
    def predict(self, images) -> Tensor:
        """PIL images -> probabilities (B, C) on the CPU."""
        batch = torch.stack([self.preprocess(image.convert("RGB")) for image in images])
        return self(batch.to(self.vision_head.weight.device)).float().softmax(dim=1).cpu()

    @classmethod
    def from_pretrained(cls, directory_or_hub_id, **kwargs) -> "Classifier":
        """The mixin's, strict: a file that does not hold every weight is refused."""
        with redirect_stdout(sys.stderr):  # the mixin prints, and standard output may be a .csv
            return super().from_pretrained(directory_or_hub_id, strict=True, **kwargs)

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """The mixin's, which save_pretrained and push_to_hub call, of this classifier."""
        data = ModelCardData(license="other", license_name=self.about["licence"].replace(" ", "-"),
                             pipeline_tag="image-classification", tags=["histopathology"])
        repo = BACKBONES.get(self.about["backbone_id"], {}).get("repo")
        return ModelCard.from_template(data, template_str=CARD, classes=self.classes, repo=repo,
                                       **self.about)


# ---- Backbones ----------------------------------------------------------------------------------

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALF = ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5])


def _kaiko(published: str, architecture: str, **args) -> dict:
    return dict(repo=f"1aurent/{published}.kaiko_ai_towards_large_pathology_fms", statistics=HALF,
                licence="kaiko-non-commercial", architecture=architecture, args=args)


# The authors' names: hub repository, licence, timm architecture and arguments, mean and std
BACKBONES = {
    "UNI": dict(repo="MahmoodLab/UNI", licence="cc-by-nc-nd-4.0", statistics=IMAGENET,
                architecture="vit_large_patch16_224", args=dict(init_values=1e-5)),
    # the paper's "DINO"; its positions are for 518 pixels and resampled to 224 in each forward pass
    "DINOL14": _kaiko("vit_large_patch14_reg4_224", "vit_large_patch14_reg4_dinov2", img_size=518),
    "VITS_8": _kaiko("vit_small_patch8_224", "vit_small_patch8_224"),
    "VITS_16": _kaiko("vit_small_patch16_224", "vit_small_patch16_224"),
    "VITB_8": _kaiko("vit_base_patch8_224", "vit_base_patch8_224"),
    "VITB_16": _kaiko("vit_base_patch16_224", "vit_base_patch16_224"),
}


def load_backbone(name: str, weights=None) -> nn.Module:
    """A timm model without its classifier, in eval mode: images (B, 3, H, W) -> v (B, D).

    name: a key of BACKBONES, any timm id, "hf-hub:org/model" or "local-dir:folder"; weights: None
    for the published weights, a local .pth, .bin or .safetensors file, or "none" for random ones.
    backbone.recipe tells how to build it again and what to say of it, backbone.preprocess makes its
    input of a PIL image. Raises ValueError in words for the command line where it cannot be had.
    """
    import timm
    from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

    row, (source, _, place) = BACKBONES.get(name), name.partition(":")
    config, architecture, args = None, name, {}
    try:
        if row:
            architecture, args = row["architecture"], dict(row["args"], dynamic_img_size=True)
            config = dict(hf_hub_id=row["repo"], license=row["licence"], input_size=(3, 224, 224),
                          mean=row["statistics"][0], std=row["statistics"][1], num_classes=0)
        elif source == "hf-hub":
            config, architecture, args = load_model_config_from_hf(place)
        elif source == "local-dir":
            config, architecture, args = load_model_config_from_path(place)
        args = dict(args or {}, num_classes=0)
        backbone = timm.create_model(architecture, weights is None, config, **args)
        if weights not in (None, "none"):
            load_weights(backbone, architecture, args, weights)
    except Exception as error:  # timm and the hub raise of all kinds; what went wrong is the user's
        raise ValueError(
            f"--model {name}{f' --weights {weights}' if weights else ''}: could not be loaded "
            f"({type(error).__name__}: {' '.join(str(error).split())[:300]})\nchoose "
            f"{', '.join(BACKBONES)}, a timm id, hf-hub:org/model or local-dir:folder, or give "
            "--weights FILE; UNI is gated: ask for access on https://huggingface.co/MahmoodLab/UNI, "
            "then `hf auth login`") from None
    data = timm.data.resolve_model_data_config(backbone)
    # A local file under a timm id can be anyone's; a folder is published without its path
    licence = backbone.pretrained_cfg.get("license") if row or weights is None else None
    backbone.recipe = dict(
        architecture=architecture, model_args=args, size=data["input_size"][-1],
        mean=list(data["mean"]), std=list(data["std"]),
        backbone_id=f"local-dir:{Path(place).name}" if source == "local-dir" else name,
        licence="random weights" if weights == "none" else licence or "see the backbone")
    backbone.preprocess = tile_transform(data["input_size"][-1], data["mean"], data["std"])
    return backbone.eval()


def load_weights(backbone: nn.Module, architecture: str, args: dict, path) -> None:
    """Load a local checkpoint into a timm model, every key but those of the classifier, which the
    full model has and this one lacks. (timm's own loading would pass over what does not fit.)"""
    import timm
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    state = timm.models.load_state_dict(str(path), weights_only=True)
    if isinstance(backbone, VisionTransformer):
        state = checkpoint_filter_fn(state, backbone)  # DINOv2's names, other grids of positions
    with torch.device("meta"):
        full = timm.create_model(architecture, **dict(args, num_classes=2)).state_dict().keys()
    classifier = full - backbone.state_dict().keys()
    backbone.load_state_dict({key: x for key, x in state.items() if key not in classifier})


def tile_transform(size: int, mean, std):
    """PIL image -> (3, size, size): shortest side to `size`, centre crop, (x - mean) / std.

    On uint8 tensors and in this order, as kaiko-eva's ResizeAndCrop. The whole tile is used: no
    crop_pct, since a tile's border is tissue like its centre.
    """
    from torchvision.transforms import v2
    return v2.Compose([v2.PILToTensor(), v2.Resize(size, antialias=True), v2.CenterCrop(size),
                       v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


CARD = """---
{{ card_data }}
---
# Tile classifier: {{ classes | join(", ") }}

Needs the image alone: no text, tokenizer or text model is in it. Beside clipit.py and lora.py:

    from clipit import Classifier
    classifier = Classifier.from_pretrained("this folder, or its hub id")
    probabilities = classifier.predict([image])  # PIL images -> (B, {{ classes | length }})

- **Intended use**: research only. It is no medical device and must not guide the care of a patient.
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


# ---- Command line: class probabilities of image files -------------------------------------------

def find_images(given: list[str]) -> list[Path]:
    """The files given and the images below the folders given, in order of name."""
    from torchvision.datasets.folder import IMG_EXTENSIONS
    paths = []
    for path in map(Path, given):
        inside = [path]
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        if not inside or not inside[0].exists():
            raise FileNotFoundError(f"{path}: no image there ({' '.join(IMG_EXTENSIONS)})")
        paths += inside
    return paths


def read_image(path: Path):
    """A PIL image, or what is wrong with the file."""
    from PIL import Image
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # PIL raises of all kinds, each format its own
        return f"{path}: not a readable image ({error}); left out"


def write_probabilities(classifier: Classifier, paths: list[Path], file, args) -> int:
    """path, pred and one probability a class for every image; how many files were none."""
    from tqdm import tqdm

    writer, unreadable = csv.writer(file), 0
    writer.writerow(["path", "pred", *classifier.classes])
    with ThreadPoolExecutor(max(args.worker, 1)) as pool:
        for start in tqdm(range(0, len(paths), args.batch), "batches", disable=None):
            paths_read, images = [], []
            files = paths[start:start + args.batch]
            for path, image in zip(files, pool.map(read_image, files)):
                if isinstance(image, str):
                    unreadable += 1
                    print(f"clipit.py: {image}", file=sys.stderr)
                else:
                    paths_read.append(path)
                    images.append(image)
            rows = classifier.predict(images).tolist() if images else []
            for path, row in zip(paths_read, rows):
                name = classifier.classes[row.index(max(row))]
                writer.writerow([path, name, *(f"{p:.6f}" for p in row)])
    return unreadable


def main(argv=None) -> int:
    """The exit code: 0, or 1 where an image was unreadable. A run that fails or is stopped leaves
    no file, and one of an earlier run as it was."""
    parser = argparse.ArgumentParser("clipit.py", description="Class probabilities of tiles.")
    parser.add_argument("model", help="a run's folder, its classifier/ or a hub id")
    parser.add_argument("images", nargs="+", help="image files and folders (with all below them)")
    parser.add_argument("--csv", help="the file to write; unset, standard output")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--worker", type=int, default=os.cpu_count(), help="reading threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)

    if args.batch < 1:
        raise ValueError(f"--batch {args.batch}: expected 1 or more")
    inside = Path(args.model, "classifier")
    try:
        source = inside if inside.is_dir() else args.model
        classifier = Classifier.from_pretrained(source).to(args.device)
    except Exception as error:  # no config.json, a broken one, other weights, no such device
        raise ValueError(f"{args.model}: no classifier could be loaded to --device {args.device} "
                         f"({' '.join(str(error).split())[:200]})\nexpected a run's folder, its "
                         "classifier/ with config.json and weights, or a hub id") from None
    paths = find_images(args.images)
    if not args.csv:
        return int(write_probabilities(classifier, paths, sys.stdout, args) > 0)
    part = Path(f"{args.csv}.tmp")
    try:
        with open(part, "w", newline="") as file:
            unreadable = write_probabilities(classifier, paths, file, args)
        os.replace(part, args.csv)
    finally:
        part.unlink(missing_ok=True)
    return int(unreadable > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, KeyboardInterrupt) as error:
        print(f"clipit.py: {str(error) or 'stopped'}", file=sys.stderr)
        sys.exit(2)
