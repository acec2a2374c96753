"""CLIP-IT: a tile classifier that learned from reports and needs none.

    from clipit import Classifier
    classifier = Classifier.from_pretrained("runs/demo/base/classifier")     # text-free, plain modules
    probabilities = classifier.predict([PIL_image, ...])                     # (B, C)

    python clipit.py runs/demo/base tiles/ more.png --csv out.csv             # class probabilities of files, no text

Travels with lora.py, with which to_classifier merges; a saved Classifier holds neither LoRA nor text. The symbols:
v = backbone(image), t = text_tower(report of the tile), t-hat = h_d(v); logits = fusion([h_v(v), h_t(t-hat)]);
loss = CE(logits, y) + lambda * mean(1 - cos(t, t-hat)).
"""
import argparse
import contextlib
import csv
import ctypes
import io
import os
import platform
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from lora import merge_lora


BACKBONES = {  # the authors' names: hub repository, licence, timm architecture and arguments, mean and std of images
    "UNI": dict(repo="MahmoodLab/UNI", licence="cc-by-nc-nd-4.0", architecture="vit_large_patch16_224",
                model_args={"init_values": 1e-5}, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])} | {
    name: dict(repo=f"1aurent/{published}.kaiko_ai_towards_large_pathology_fms", licence="kaiko-non-commercial",
               architecture=architecture, model_args={}, mean=[0.5, 0.5, 0.5], std=[0.5, 0.5, 0.5])
    for name, published, architecture in (  # kaiko's
        ("DINOL14", "vit_large_patch14_reg4_224", "vit_large_patch14_reg4_dinov2"),  # native 518, resampled to 224
        ("VITS_8", "vit_small_patch8_224", "vit_small_patch8_224"),
        ("VITS_16", "vit_small_patch16_224", "vit_small_patch16_224"),
        ("VITB_8", "vit_base_patch8_224", "vit_base_patch8_224"),
        ("VITB_16", "vit_base_patch16_224", "vit_base_patch16_224"))}
OTHERWISE = "--weights FILE, or take an open model: --model VITS_16"
# What a saved Classifier says of itself; "see the backbone" where no licence of the weights is known.
CARD = """---
{{ card_data }}
license_name: "{{ licence | replace(" ", "-") }}"
---

# Tile classifier: {{ classes | join(", ") }}

Needs the image alone: no text, tokenizer or text model is in it. With clipit.py and lora.py of CLIP-IT beside you:

    from clipit import Classifier
    classifier = Classifier.from_pretrained("this folder, or its hub id")
    probabilities = classifier.predict([image])  # PIL images -> (B, {{ classes | length }})

- **Intended use**: research only. It is no medical device and must not guide the care of a patient.
- **Backbone**: `{{ backbone_id }}`{% if repo %} (https://huggingface.co/{{ repo }}){% endif %}.
  Licence of its weights: **{{ licence }}**; read it before you share this file, which is made of them.
{%- if run %}
- **Data**: {{ run.data }}; licence: {{ run.licence }}.
{%- if run.reports %}
- **Training text**: `{{ run.reports }}`, paired with the tiles by `{{ run.clip_model }}`; used in training alone.
  Terms of a CLIP model can cover what is trained on its outputs; CONCH's do.
{%- endif %}

| {{ run.test_tiles }} test tiles, in % | frozen backbone, linear head (unimodal) | {{ run.variant }}, this classifier |
|---|---|---|
{%- for name, value in run.metrics | dictsort %}
| {{ name | replace("_", " ") }} |
{%- for x in (run.unimodal[name], value) %} {{ "-" if x is none else "%.2f" | format(100 * x) }} |{% endfor %}
{%- endfor %}
{%- endif %}
"""


def load_backbone(name: str, weights=None) -> nn.Module:
    """A timm model without its classifier: images (B, 3, H, W) -> v (B, num_features), in eval mode.

    name: a key of BACKBONES, any timm id, "hf-hub:org/model" or "local-dir:folder"; weights: None for the published
    weights, a local .pth, .bin or .safetensors file, or "none" for random ones; with either, a key of BACKBONES or a
    timm id needs nothing from the hub. backbone.recipe tells how to build it again, how its images are made and what
    to say of it: architecture, model_args, size, mean, std, backbone_id, licence.
    Raises ValueError or FileNotFoundError in words for the command line where the model cannot be had.
    """
    import timm
    from timm.models._hub import load_model_config_from_path

    flag, row, (source, _, place) = f"--model {name}", BACKBONES.get(name), name.partition(":")
    choices = (f"choose {', '.join(BACKBONES)}, a timm id (vit_small_patch16_224, resnet50, ...), hf-hub:org/model or "
               "local-dir:folder")
    config, repo, overlay = None, None, None
    if weights not in (None, "none") and not Path(weights).is_file():
        raise FileNotFoundError(f"--weights {weights}: no such file; give a .pth, .bin or .safetensors file, or `none`")
    try:
        if row:
            repo, architecture, model_args = row["repo"], row["architecture"], row["model_args"]
        elif source in ("hf-hub", "hf_hub"):  # its folder in the hub's cache is a local-dir
            repo, folder = place, Path(hub_file(flag, place, "config.json", otherwise=OTHERWISE)).parent
            config, architecture, model_args = load_model_config_from_path(folder)
        elif source == "local-dir":
            config, architecture, model_args = load_model_config_from_path(place)
        else:
            architecture, model_args = name, {}
        if not timm.is_model(architecture):
            near = timm.list_models(f"*{architecture.split('_')[0]}*")[:3]
            raise ValueError(f"timm has no {architecture}" + (f"; near: {', '.join(near)}" if near else ""))
        kwargs = dict(model_args or {}, num_classes=0)
        if "vit_" in architecture:  # the paper's tiles are 224 whatever size the weights were trained at
            kwargs["dynamic_img_size"] = True
        if weights is None and source != "local-dir":
            repo = repo or timm.get_pretrained_cfg(architecture).hf_hub_id
            if repo:
                file = hub_file(flag, repo, "model.safetensors", "pytorch_model.bin", otherwise=OTHERWISE)
                weights, overlay = (file, None) if row else (None, dict(source="", file=file, custom_load=False))
        backbone = timm.create_model(architecture, pretrained=weights is None, pretrained_cfg=config,
                                     pretrained_cfg_overlay=overlay, **kwargs)
    except Exception as error:  # timm raises of all kinds; what went wrong is the user's to know
        if str(error).startswith(flag):  # hub_file has said it
            raise
        first = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{flag}: could not be loaded ({first}); {choices}, or give --weights FILE") from None
    if weights not in (None, "none"):
        load_weights(backbone, weights)
    data = timm.data.resolve_model_data_config(backbone)
    # a local file under a timm id can be anyone's; and what is published names a folder without the path to it
    licence = row["licence"] if row else backbone.pretrained_cfg.get("license") if weights is None else None
    backbone.recipe = dict(architecture=architecture, model_args=kwargs, size=data["input_size"][-1],
                           mean=list(data["mean"]), std=list(data["std"]),
                           backbone_id=f"local-dir:{Path(place).name}" if source == "local-dir" else name,
                           licence="random weights" if weights == "none" else licence or "see the backbone")
    if row:
        backbone.recipe |= dict(size=224, mean=row["mean"], std=row["std"])
    return lean(backbone).eval()


class LeanBlock(nn.Module):
    """timm's ViT block: x (B, L, D) -> (B, L, D), each sum in the memory of its newer part; nothing else reads it."""

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        x = add(self.drop_path1(self.ls1(self.attn(self.norm1(x), **kwargs))), x)
        return add(self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), x)


class PooledBlock(nn.Module):
    """The last block of timm's ViT where only the class token is read: x (B, L, D) -> (B, 1, D)."""

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        x = x[:, :1] + self.drop_path1(self.ls1(self.attn(self.norm1(x), **kwargs)[:, :1]))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def add(new: Tensor, x: Tensor) -> Tensor:
    """new + x, in place; under autocast out of place, since `new` is of less precision than the sum."""
    return new.add_(x) if new.dtype == x.dtype else new + x


def lean(backbone: nn.Module) -> nn.Module:
    """The same timm model; a ViT's blocks need less memory, and its last one, where there is a class token, leaves out
    the MLP of all other tokens. Parameters and their names stay."""
    from timm.models.vision_transformer import Block, VisionTransformer
    if type(backbone) is VisionTransformer and all(type(block) is Block for block in backbone.blocks):
        for block in backbone.blocks:
            block.__class__ = LeanBlock
        if backbone.global_pool == "token":
            block.__class__ = PooledBlock
    return backbone


def keep_freed_memory() -> None:
    """Have glibc keep the memory that one tensor frees for the next. By itself it hands large blocks back to the
    kernel, which clears every page again when they are asked for anew: a third or more of a training step on a CPU, at
    batch 64. A process then stays as large as it once was. For command lines; without glibc nothing happens."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)   # M_MMAP_MAX: no block apart from the heap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap does not shrink


def hub_file(flag: str, repo: str, *names: str, otherwise: str) -> str:
    """The local path of the first of the files `names` that a Hugging Face repository holds, from its cache or
    downloaded. repo: "org/model", "hf-hub:org/model" or either with "@revision".

    Raises ValueError of two lines: what is wrong, and what to do. (pairing.py and clipit.py each hold this function,
    so that each can be copied without the other.)
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
    repo, _, revision = repo.rpartition(":")[2].partition("@")
    for name in names:
        try:
            return hf_hub_download(repo, name, revision=revision or None, local_files_only=True)
        except Exception:  # not there, or no repository's name: the hub's answer below tells
            pass
    what = f"{repo} on the hub holds no {' or '.join(names)}"
    try:
        for name in names:
            try:
                # asked once: hf_hub_download itself tries again for half a minute where there is no connection
                get_hf_file_metadata(hf_hub_url(repo, name, revision=revision or None), timeout=10)
                return hf_hub_download(repo, name, revision=revision or None)
            except errors.LocalEntryNotFoundError:  # an EntryNotFoundError too, but it means: no connection
                raise
            except errors.EntryNotFoundError:
                continue
    except errors.GatedRepoError:  # a RepositoryNotFoundError too, so it comes first
        what = f"{repo} is gated, and the hub does not know you as one who may load it"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        what = f"the hub has no repository {repo}, or a private one"
    except Exception as error:  # no connection, a broken one, a full disk: of many classes
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        what = f"{repo} is not in the cache, and the hub could not be reached or the download broke off ({first})"
    raise ValueError(f"{flag}: {what}\nask for access on https://huggingface.co/{repo} where it is gated, then log in "
                     f"(`hf auth login` or HF_TOKEN); or give {otherwise}")


def load_weights(model: nn.Module, path) -> None:
    """Load a local checkpoint into a timm model, every key; a classifier that the model does not have is left out.

    Raises ValueError where the file is no checkpoint, holds more than tensors or belongs to another architecture (the
    keys are named).
    """
    from timm.models import load_state_dict
    from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

    try:
        state = load_state_dict(str(path), weights_only=True)
        if not state or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it holds more than named tensors")
    except Exception as error:  # every kind of broken or hostile file ends here, unread
        first = " ".join(str(error).split())[:120] or type(error).__name__
        raise ValueError(f"--weights {path}: not a checkpoint of tensors ({first}); expected a state dict saved by "
                         "torch.save or safetensors") from None
    if isinstance(model, VisionTransformer) and any("patch_embed" in key for key in state):
        state = checkpoint_filter_fn(state, model)  # a file with DINOv2's names, or with another grid of positions
    own = model.state_dict()
    classifier = tuple(part for part in ("head.", "fc.", "classifier.") if not any(key.startswith(part) for key in own))
    state = {key: value for key, value in state.items() if not key.startswith(classifier)}
    wrong = {"missing": own.keys() - state.keys(), "not in the model": state.keys() - own.keys(),
             "of another shape": {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}}
    if any(wrong.values()):
        raise ValueError(f"--weights {path}: of another architecture: " + "; ".join(
            f"{len(keys)} keys {what}, such as {min(keys)}" for what, keys in wrong.items() if keys))
    model.load_state_dict(state)


def tile_transform(size: int, mean, std, interpolation: str = "bilinear"):
    """PIL image -> (3, size, size): shortest side to `size` (antialias), centre crop, (x - mean) / std.

    On uint8 tensors and in this order, as kaiko-eva's ResizeAndCrop does it (Datasets section 3.1 there). The whole
    tile is used: no crop_pct, since a tile's border is tissue like its centre.
    """
    from torchvision.transforms import v2
    return v2.Compose([v2.PILToTensor(), v2.Resize(size, v2.InterpolationMode(interpolation), antialias=True),
                       v2.CenterCrop(size), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


class ClipIT(nn.Module):
    """The model that is trained. Its parts: backbone, text_tower, vision_head, distill_head, text_head, fusion.

    backbone: images -> v (B, vision_dim); text_tower: tokens -> t (B, text_dim), or None where no text is learned from;
    kd_layers: 1 for a linear h_d, 2 for an MLP (the authors' FuserModelKD); fused=False: h_v alone, the plain baseline;
    random_fusion: the authors' start of the fusion layer.
    """

    def __init__(self, backbone: nn.Module, text_tower: nn.Module | None, num_classes: int, vision_dim: int,
                 text_dim: int, kd_layers: int = 1, fused: bool = True, random_fusion: bool = False):
        super().__init__()
        self.backbone, self.text_tower, self.fused = backbone, text_tower, fused
        # what a text-free classifier is built from
        self.sizes = dict(vision_dim=vision_dim, text_dim=text_dim, kd_layers=kd_layers, fused=fused)
        self.vision_head = nn.Linear(vision_dim, num_classes)                                           # h_v
        if not fused:
            return
        self.distill_head = nn.Linear(vision_dim, text_dim) if kd_layers == 1 else nn.Sequential(       # h_d
            nn.Linear(vision_dim, vision_dim), nn.LeakyReLU(0.1), nn.Linear(vision_dim, text_dim))
        self.text_head = text_classifier(text_dim, num_classes)                                         # h_t
        self.fusion = nn.Linear(2 * num_classes, num_classes)
        if not random_fusion:
            # Fused logits start as h_v(v) + h_t(t-hat), so training starts from the unimodal classifier of step 2. The
            # authors' random start mixes its logits, and LoRA first bends the backbone to suit that mixture.
            with torch.no_grad():
                self.fusion.weight.copy_(torch.eye(num_classes).repeat(1, 2))
                self.fusion.bias.zero_()

    def train(self, mode: bool = True):
        """Batch statistics of a frozen backbone stay as they are: BatchNorm is in eval mode always."""
        super().train(mode)
        for module in self.backbone.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def fuse(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """v (B, vision_dim) -> logits (B, C), t-hat (B, text_dim); without fusion h_v(v) and no t-hat."""
        if not self.fused:
            return self.vision_head(v), None
        t_hat = self.distill_head(v)
        return self.fusion(torch.cat([self.vision_head(v), self.text_head(t_hat)], dim=1)), t_hat

    def forward(self, images: Tensor) -> Tensor:
        """The text-free path: images (B, 3, H, W) -> logits (B, C)."""
        return self.fuse(self.backbone(images))[0]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, 3, H, W) -> v (B, vision_dim), t-hat (B, text_dim; None without fusion), for other tools."""
        v = self.backbone(images)
        return v, self.fuse(v)[1]

    def forward_train(self, images: Tensor, tokens: Tensor,
                      report: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """images (B, 3, H, W), tokens (B, L) -> logits (B, C), t-hat (B, text_dim), t (B, text_dim).

        With `report` (B,), tokens (R, L) holds the distinct reports of the batch and report[i] is the row of tile i:
        tiles share reports, and each is encoded once.
        """
        t = self.text_tower(tokens)  # first: in the other order the two graphs took 5 % more memory
        logits, t_hat = self.fuse(self.backbone(images))
        return logits, t_hat, t if report is None else t[report]

    def to_classifier(self, classes: list[str] | None = None, run: dict | None = None) -> "Classifier":
        """The text-free classifier with LoRA merged; this model stays as it is. The backbone must come from
        load_backbone, whose recipe the classifier is built from (ValueError otherwise). run: see Classifier."""
        if not hasattr(self.backbone, "recipe"):
            raise ValueError("to_classifier: the backbone has no recipe; make it with load_backbone")
        classes = classes or [f"class_{i}" for i in range(self.vision_head.out_features)]
        classifier = Classifier(**self.backbone.recipe, classes=classes, **self.sizes, run=run)
        for name, part in self.named_children():
            if name != "text_tower":
                getattr(classifier, name).load_state_dict(merge_lora(part).state_dict())
        return classifier.eval()


def text_classifier(text_dim: int, num_classes: int) -> nn.Module:
    """The MLP of h_t and of the stand-alone text head: text_dim -> text_dim -> C with LeakyReLU(0.1)."""
    return nn.Sequential(nn.Linear(text_dim, text_dim), nn.LeakyReLU(0.1), nn.Linear(text_dim, num_classes))


def clipit_loss(logits: Tensor, labels: Tensor, t_hat: Tensor, t: Tensor | None, kd_weight: float = 1.0):
    """(loss, {"ce": ..., "kd": ...}): CE(logits, y) + kd_weight * mean(1 - cos(t, t-hat)).

    logits (B, C), labels (B,), t_hat and t (B, text_dim). t = None is the paper's ablation without text: CE alone.
    The authors' code takes a softmax first and so trains on CE of probabilities; the paper's CE is of logits.
    """
    ce = F.cross_entropy(logits, labels)
    if t is None:
        return ce, {"ce": ce.detach()}
    kd = (1 - F.cosine_similarity(t, t_hat, dim=-1)).mean()
    return ce + kd_weight * kd, {"ce": ce.detach(), "kd": kd.detach()}


class Classifier(ClipIT, PyTorchModelHubMixin, model_card_template=CARD, license="other",
                 pipeline_tag="image-classification", tags=["histopathology"]):
    """A trained ClipIT without its text tower: plain modules, rebuilt from config.json with no download.

    save_pretrained(dir) writes config.json, model.safetensors and the model card README.md, push_to_hub(id) uploads
    them, from_pretrained(dir or hub id) reads them. run: what config.json and the card tell of the training: data,
    licence, reports, clip_model, test_tiles, variant, and name -> share for metrics and unimodal (the baseline's).
    """

    def __init__(self, architecture: str, model_args: dict, size: int, mean: list[float], std: list[float],
                 classes: list[str], vision_dim: int, text_dim: int, kd_layers: int = 1, fused: bool = True,
                 interpolation: str = "bilinear", backbone_id: str = "", licence: str = "see the backbone",
                 run: dict | None = None):
        import timm
        backbone = lean(timm.create_model(architecture, pretrained=False, **model_args))
        super().__init__(backbone, None, len(classes), vision_dim, text_dim, kd_layers, fused)
        self.classes, self.preprocess = list(classes), tile_transform(size, mean, std, interpolation)
        self.about = dict(backbone_id=backbone_id or architecture, licence=licence, run=run)
        self.eval()

    def generate_model_card(self, **kwargs):
        """The mixin's, called by save_pretrained and push_to_hub, with what this classifier knows."""
        repo = BACKBONES.get(self.about["backbone_id"], {}).get("repo")
        return super().generate_model_card(classes=self.classes, repo=repo, **self.about | kwargs)

    @classmethod
    def from_pretrained(cls, directory_or_hub_id, **kwargs) -> "Classifier":
        """The mixin's from_pretrained, strict: a file that does not hold every weight is refused."""
        with contextlib.redirect_stdout(io.StringIO()):  # the mixin prints, and standard output may be a .csv
            return super().from_pretrained(directory_or_hub_id, strict=True, **kwargs)

    @torch.inference_mode()
    def predict(self, images) -> Tensor:
        """PIL images -> probabilities (B, C) on the CPU."""
        batch = torch.stack([self.preprocess(image.convert("RGB")) for image in images])
        return self(batch.to(self.vision_head.weight.device)).softmax(dim=1).cpu()


# ---- Command line: class probabilities of image files ---------------------------------------------------------------

class Files(torch.utils.data.Dataset):
    """Item i is (path, image (3, size, size), None), or (path, None, what is wrong) for a file that is no image."""

    def __init__(self, paths, transform):
        self.paths, self.transform = paths, transform

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        from PIL import Image
        try:
            with Image.open(self.paths[index]) as image:
                image = image.convert("RGB")
        except Exception as error:  # PIL raises of all kinds, each format its own
            return self.paths[index], None, str(error) or type(error).__name__
        return self.paths[index], self.transform(image), None


def main(argv=None) -> int:
    """Write path, pred and one probability a class for every image; the exit code: 0, or 1 where one was unreadable.
    A run that fails or is stopped leaves no file, and one of an earlier run as it was."""
    from torchvision.datasets.folder import IMG_EXTENSIONS
    from tqdm import tqdm

    parser = argparse.ArgumentParser("clipit.py", description="Class probabilities of tiles, from the image alone.")
    parser.add_argument("model", help="a run's folder, its classifier/ or a hub id")
    parser.add_argument("images", nargs="+", help="image files and folders (with all folders in them)")
    parser.add_argument("--csv", help="the file to write; unset, standard output")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--worker", type=int, default=min(os.cpu_count() or 1, 8), help="processes that decode images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--amp", choices=("off", "bf16", "fp16"), default="off", help="autocast to this type")
    args = parser.parse_args(argv)
    for key, least in (("batch", 1), ("worker", 0)):
        if getattr(args, key) < least:
            raise ValueError(f"--{key} {getattr(args, key)}: expected {least} or more")

    inside = Path(args.model, "classifier")
    source = inside if inside.is_dir() else Path(args.model)
    if not source.is_dir():  # a hub id; what the hub refuses comes in words
        hub_file(f"no folder {args.model}", args.model, "config.json", otherwise="the folder of a finished run")
    try:
        classifier = Classifier.from_pretrained(source if source.is_dir() else args.model).to(args.device)
    except Exception as error:  # no config.json, a broken one, other weights, no such device
        raise ValueError(f"{args.model}: no classifier could be loaded to --device {args.device} "
                         f"({' '.join(str(error).split())[:200]})\nexpected a folder with config.json and "
                         "model.safetensors, which train.py writes as RUN/classifier/") from None
    paths = []
    for given in map(Path, args.images):
        if not given.exists():
            raise FileNotFoundError(f"{given}: no such file or folder")
        found = sorted(p for p in given.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS) if given.is_dir() else [given]
        if not found:
            raise ValueError(f"{given}: no image in it ({' '.join(IMG_EXTENSIONS)})")
        paths += found

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
    loader = torch.utils.data.DataLoader(Files(paths, classifier.preprocess), args.batch, num_workers=args.worker,
                                         collate_fn=list)
    bad, part = 0, args.csv and f"{args.csv}.tmp"
    with (contextlib.ExitStack() as stack, torch.inference_mode(),
          torch.autocast(torch.device(args.device).type, dtype, enabled=dtype is not None)):
        if part:
            stack.callback(Path(part).unlink, missing_ok=True)  # nothing is left of it, however this ends
        file = stack.enter_context(open(part, "w", newline="")) if part else sys.stdout
        writer = csv.writer(file)
        writer.writerow(["path", "pred", *classifier.classes])
        for batch in tqdm(loader, "tiles", disable=None if part else True):
            for path, _, error in batch:
                if error is not None:
                    bad += 1
                    print(f"clipit.py: {path}: not a readable image ({error}); left out", file=sys.stderr)
            good = [(path, image) for path, image, error in batch if error is None]
            if good:
                images = torch.stack([image for _, image in good]).to(args.device)
                for (path, _), row in zip(good, classifier(images).float().softmax(dim=1).cpu()):
                    writer.writerow([path, classifier.classes[int(row.argmax())], *(f"{p:.6f}" for p in row.tolist())])
        if part:
            file.close()
            os.replace(part, args.csv)
    return 1 if bad else 0


if __name__ == "__main__":
    keep_freed_memory()
    try:
        sys.exit(main())
    except (ValueError, OSError, KeyboardInterrupt) as error:
        print(f"clipit.py: {str(error) or 'stopped'}", file=sys.stderr)
        sys.exit(2)
