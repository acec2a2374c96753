"""Pair tiles with reports they never came with: every tile gets the report of highest cosine under a CLIP model.

    from pairing import load_clip, embed_images, embed_texts, nearest_text
    clip = load_clip("quilt")                   # or any open_clip id, "local-dir:folder"
    index, similarity = nearest_text(embed_images(clip, tiles), embed_texts(clip, reports))

Travels alone. The pairing is psi of the paper: with v_i the CLIP feature of tile i and t_j that of report j, both of
length 1, psi(i) = argmax_j <v_i, t_j>. It sees no labels; one report may serve many tiles, another none.
"""
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

CLIPS = {  # short names of --clip-model; anything else is passed to open_clip as it stands
    "quilt": "hf-hub:wisdomik/QuiltNet-B-32",
    "quilt16": "hf-hub:wisdomik/QuiltNet-B-16",
}
TIE = 1e-6  # cosines closer than this are equal: fp32 sums of the same numbers differ by that much with their order


@dataclass
class Clip:
    """A CLIP model taken apart. encode_image and encode_text return (B, dim) features of length 1."""
    name: str
    dim: int
    image_tower: nn.Module  # (B, 3, H, W) -> (B, dim), not normalised
    text_tower: nn.Module   # tokens (B, L) -> (B, dim), not normalised
    preprocess: Callable    # PIL image -> (3, H, W)
    tokenize: Callable      # list[str] -> LongTensor (B, L)

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.image_tower(images).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.text_tower(tokens).float(), dim=-1)

    @property
    def device(self):
        return next(self.text_tower.parameters()).device


def load_clip(name: str, weights=None, device="cpu") -> Clip:
    """A CLIP model in eval mode, frozen.

    name: a key of CLIPS or any open_clip id: "hf-hub:org/model", "local-dir:folder", "ViT-B-32/openai".
    weights: a local checkpoint instead of the published one, "none" for random weights.
    Raises ValueError or FileNotFoundError in words for the command line where the model cannot be had.
    """
    import open_clip  # here, so that pairing two tensors needs torch alone
    from timm.models import load_state_dict

    model_id, tag = CLIPS.get(name, name), ""
    if ":" not in model_id:
        model_id, _, tag = model_id.partition("/")
    choices = f"choose {', '.join(CLIPS)} or an open_clip id (hf-hub:org/model, local-dir:folder, ViT-B-32/openai)"
    if model_id.startswith("local-dir:"):
        if not Path(model_id.removeprefix("local-dir:"), "open_clip_config.json").is_file():
            raise FileNotFoundError(f"--clip-model {name}: no open_clip_config.json in that folder; {choices}")
    elif ":" not in model_id:
        tags = open_clip.list_pretrained_tags_by_model(model_id)
        if model_id not in open_clip.list_models() or not (tag in tags or weights):
            raise ValueError(f"--clip-model {name}: unknown" + (f" (its weights: {', '.join(tags)})" if tags else "")
                             + f"; {choices}")
    if weights not in (None, "none") and not Path(weights).is_file():
        raise FileNotFoundError(f"--clip-weights {weights}: no such file")
    quick_gelu = bool(tag) and bool((open_clip.get_pretrained_cfg(model_id, tag) or {}).get("quick_gelu"))
    try:
        # force_custom_text keeps the text tower a module of its own, which is what LoRA and training need
        model, _, preprocess = open_clip.create_model_and_transforms(
            model_id, tag or None, device=device, load_weights=weights is None, force_custom_text=True,
            force_quick_gelu=quick_gelu, pretrained_image=False, pretrained_text=False,
            require_pretrained=weights is None)
        tokenize = open_clip.get_tokenizer(model_id)
    except ImportError as error:
        raise ValueError(f"--clip-model {name}: its text tower needs the transformers package ({error}); "
                         "pip install transformers, or choose another model") from None
    except (OSError, RuntimeError, ValueError) as error:
        first = str(error).splitlines()[0][:200]
        raise ValueError(f"--clip-model {name}: could not be loaded ({first}); {choices}") from None
    if weights not in (None, "none"):
        open_clip.load_checkpoint(model, weights, strict=True)
    model.eval().requires_grad_(False)
    model.text.output_tokens = False  # of CoCa models: the pooled feature alone
    return Clip(name, model.text.output_dim, model.visual, model.text, preprocess, tokenize)


@torch.no_grad()
def embed_images(clip: Clip, dataset, batch_size: int = 64, workers: int = 0) -> Tensor:
    """(N, dim) fp32 features of length 1, in the data set's order, on the CPU.

    dataset: item i is an image that clip.preprocess has made, or a tuple that begins with one (labels are not used).
    """
    loader = torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers)
    batches = tqdm(loader, "embed tiles", leave=False, disable=None)
    images = (batch[0] if isinstance(batch, (tuple, list)) else batch for batch in batches)
    return torch.cat([clip.encode_image(batch.to(clip.device)).cpu() for batch in images])


@torch.no_grad()
def embed_texts(clip: Clip, texts: list[str], batch_size: int = 64) -> Tensor:
    """(M, dim) fp32 features of length 1, on the CPU. Equal texts are encoded once and have equal features."""
    distinct = list(dict.fromkeys(texts))
    batches = tqdm(range(0, len(distinct), batch_size), "embed reports", leave=False, disable=None)
    features = torch.cat([clip.encode_text(clip.tokenize(distinct[i:i + batch_size]).to(clip.device)).cpu()
                          for i in batches])
    position = {text: i for i, text in enumerate(distinct)}
    return features[[position[text] for text in texts]]


@torch.no_grad()
def nearest_text(image_emb: Tensor, text_emb: Tensor, chunk: int = 8192) -> tuple[Tensor, Tensor]:
    """The report of highest cosine for every tile: (index LongTensor (N,), similarity fp32 Tensor (N,)).

    image_emb (N, dim), text_emb (M, dim), of length 1. The first maximum wins a tie. No N x M matrix exists, only
    chunk x M, and the result does not depend on chunk: a matrix product rounds by the place of an entry in the matrix,
    so cosines within TIE of the maximum count as equal to it, and the similarity is summed anew for the pair alone.
    Raises ValueError for features that do not fit together, are not finite, or where there are none.
    """
    if image_emb.ndim != 2 or text_emb.ndim != 2 or image_emb.shape[1] != text_emb.shape[1] or not len(text_emb):
        raise ValueError(f"nearest_text: expected (N, dim) and (M > 0, dim), got {tuple(image_emb.shape)} and "
                         f"{tuple(text_emb.shape)}")
    index, similarity = [torch.empty(0, dtype=torch.long)], [torch.empty(0)]
    text_emb = text_emb.float()
    for images in image_emb.float().split(chunk):
        cosine = images @ text_emb.T                                             # (chunk, M)
        best = cosine.amax(1, keepdim=True)
        if not best.isfinite().all():
            raise ValueError("nearest_text: the features hold NaN or infinity")
        nearest = (cosine >= best - TIE).to(torch.uint8).argmax(1)  # argmax returns the first of equal maxima
        index.append(nearest.cpu())
        similarity.append((images * text_emb[nearest]).sum(1).cpu())
    return torch.cat(index), torch.cat(similarity)


def cached(path, key: dict[str, str], compute: Callable[[], Tensor]) -> tuple[Tensor, str]:
    """(tensor, what happened): the tensor stored at `path` if it was made from the same `key`, else compute()'s.

    key: name -> what the tensor came from, compared by hash; a changed one is named. The file is written under a
    temporary name and renamed, so that a run that is killed leaves the old file or the new one.
    """
    path, reason = Path(path), "computed"
    digests = {name: hashlib.sha256(value.encode()).hexdigest() for name, value in key.items()}
    if path.exists():
        try:
            stored = torch.load(path, weights_only=True)
            changed = [name for name in digests if stored["key"].get(name) != digests[name]]
            if not changed:
                return stored["tensor"], "from the cache"
            reason = f"computed again, because of another {' and '.join(changed)} than in {path}"
        except Exception as error:  # whatever is wrong with a cache, computing again mends it
            reason = f"computed again, because {path} is not readable ({type(error).__name__})"
    tensor = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"key": digests, "tensor": tensor}, path.with_name(path.name + ".tmp"))
    os.replace(path.with_name(path.name + ".tmp"), path)
    return tensor, reason


def cache_key(clip: Clip, paths=None, texts=None) -> dict[str, str]:
    """What embeddings of these tiles or texts come from: the files with sizes and times (or the texts), every weight
    of the tower and the preprocessing (or the tokens of a probe)."""
    tower = clip.image_tower if texts is None else clip.text_tower
    weights = hashlib.sha256()
    for name, value in tower.state_dict().items():
        weights.update(name.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    key = {"model": clip.name, "weights": weights.hexdigest()}
    if texts is not None:
        return key | {"reports": json.dumps(texts), "tokenizer": str(clip.tokenize(["Colon, biopsy: 12 mm."]).tolist())}
    files = [os.stat(re.sub(r"(?<=\.h5)#\d+$", "", str(path))) for path in paths]  # tile 17 of FILE.h5
    stats = [(str(path), file.st_size, file.st_mtime_ns) for path, file in zip(paths, files)]
    return key | {"tile list": json.dumps(stats), "preprocessing": str(clip.preprocess)}
