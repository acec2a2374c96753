"""Pair tiles with reports they never came with: every tile gets the report of highest cosine under a CLIP model.

    from pairing import load_clip, embed_images, embed_texts, nearest_text
    clip = load_clip("conch")  # or "quilt", any open_clip id, "local-dir:folder"; not needed to pair two tensors:
    index, similarity = nearest_text(embed_images(clip, tiles), embed_texts(clip, reports))  # (N, dim), (M, dim)

    python pairing.py --ds crc --gallery pairs.html     # the pairs as a page to look at (needs data.py too)

Travels alone. The pairing is psi of the paper: with v_i the CLIP feature of tile i and t_j that of report j, both of
length 1, psi(i) = argmax_j <v_i, t_j>. It sees no labels; one report may serve many tiles, another none.

CONCH: Lu et al. 2024, "A visual-language foundation model for computational pathology", Nature Medicine; a CoCa (Yu et
al. 2022, arXiv 2205.01917) without its captioning parts here. QuiltNet: Ikezogwo et al. 2023, arXiv 2306.11207.
"""
import argparse
import base64
import hashlib
import io
import json
import logging
import math
import os
import re
import sys
import unicodedata
import urllib.request
from dataclasses import dataclass
from html import escape
from http.client import HTTPException
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

CLIPS = {  # short names of --clip-model: hub id, open_clip's name of the architecture; other names go to open_clip
    "conch": ("hf-hub:MahmoodLab/CONCH", None),  # open_clip has no such architecture: build_conch
    "quilt": ("hf-hub:wisdomik/QuiltNet-B-32", "ViT-B-32"),
    "quilt16": ("hf-hub:wisdomik/QuiltNet-B-16", "ViT-B-16"),
}
CONCH_TOKENIZER = ("https://raw.githubusercontent.com/mahmoodlab/CONCH/main/conch/open_clip_custom/tokenizers/"
                   "conch_byte_level_bpe_uncased.json",  # a branch: what is read is pinned by its sha256
                   "a3861e67c64d32670eb6725a8e52d7dbdd2a06646a4a3c7463052ae7110760fb")
OTHERWISE = "--clip-weights FILE, or take an open model: --clip-model quilt"
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


def load_clip(name: str, weights=None, tokenizer=None, device="cpu") -> Clip:
    """A CLIP model in eval mode, frozen.

    name: a key of CLIPS or any open_clip id: "hf-hub:org/model", "local-dir:folder", "ViT-B-32/openai".
    weights: a local checkpoint instead of the published one, "none" for random weights.
    tokenizer: of conch alone, its local tokenizer file instead of the published one.
    Raises ValueError or FileNotFoundError in words for the command line where the model cannot be had.
    """
    import open_clip  # here, so that pairing two tensors needs torch alone

    for flag, path in (("--clip-weights", weights), ("--clip-tokenizer", tokenizer)):
        if path not in (None, "none") and not Path(path).is_file():
            raise FileNotFoundError(f"{flag} {path}: no such file")
    if tokenizer and name != "conch":
        raise ValueError(f"--clip-tokenizer {tokenizer}: only conch takes one, {name} has its own")
    if name == "conch":  # the weights first: they are refused to many
        path = weights or hub_file("--clip-model conch", CLIPS[name][0], "pytorch_model.bin", otherwise=OTHERWISE)
        model, tokenize = build_conch(), ConchTokenizer(tokenizer)
        preprocess = open_clip.image_transform(448, is_train=False)  # bicubic, centre crop, OpenAI's mean and std
    else:
        model, preprocess, tokenize, path = build_open_clip(name, weights)
    if path not in (None, "none"):
        try:
            load_conch(model, path) if name == "conch" else open_clip.load_checkpoint(model, path, strict=True)
        except Exception as error:  # no checkpoint, a broken one, one that holds code, or another model's
            raise ValueError(f"--clip-model {name}: the weights in {path} cannot be loaded "
                             f"({' '.join(str(error).split())[:300]})") from None
    model.eval().requires_grad_(False).to(device)
    model.text.output_tokens = False  # of CoCa models: the pooled feature alone
    return Clip(name, model.text.output_dim, model.visual, tight(model.text), preprocess, tokenize)


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


def build_open_clip(name: str, weights=None):
    """(model, preprocess, tokenize, path): an open_clip model and the weights to load into it, None where it has them.
    Raises like load_clip."""
    import open_clip

    flag, (model_id, architecture) = f"--clip-model {name}", CLIPS.get(name, (name, None))
    if architecture and weights:  # then nothing is needed from the hub
        model_id = architecture
    scheme, colon, place = model_id.partition(":")
    tag, of_tag, text, path = "", {}, {}, weights
    choices = f"choose {', '.join(CLIPS)} or an open_clip id (hf-hub:org/model, local-dir:folder, ViT-B-32/openai)"
    if not colon:
        source, _, tag = model_id.partition("/")
        tags = open_clip.list_pretrained_tags_by_model(source)
        if source not in open_clip.list_models() or not (tag in tags or weights):
            known = f" (its weights: {', '.join(tags)})" if tags else ""
            raise ValueError(f"{flag}: unknown{known}; {choices}")
        of_tag = open_clip.get_pretrained_cfg(source, tag) or {}
    else:
        if scheme == "hf-hub":  # its folder in the hub's cache is a local-dir
            place = Path(hub_file(flag, place, "open_clip_config.json", otherwise=OTHERWISE)).parent
        source = f"local-dir:{place}"
        if not Path(place, "open_clip_config.json").is_file():
            raise FileNotFoundError(f"{flag}: no open_clip_config.json in that folder; {choices}")
    own = scheme == "local-dir" and not weights  # open_clip finds the weights in the folder
    try:
        logging.disable(logging.WARNING)  # "initialized randomly": the weights come after
        # force_custom_text keeps the text tower a module of its own, which is what LoRA and training need
        model, _, preprocess = open_clip.create_model_and_transforms(
            source, load_weights=own, require_pretrained=own, force_custom_text=True, pretrained_image=False,
            pretrained_text=False, force_quick_gelu=bool(of_tag.get("quick_gelu")), image_mean=of_tag.get("mean"),
            image_std=of_tag.get("std"), image_interpolation=of_tag.get("interpolation"),
            image_resize_mode=of_tag.get("resize_mode"))
        if scheme == "hf-hub":
            text = json.loads(Path(place, "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
        # a transformers tokenizer lies in the repository or in another one, not in the folder of the cache
        tokenize = open_clip.get_tokenizer(model_id if "hf_tokenizer_name" in text else source)
    except Exception as error:  # open_clip raises of all kinds; what went wrong is the user's to know
        what = f"could not be loaded ({' '.join(str(error).split())[:200]})"
        if isinstance(error, ImportError) or "pip install transformers" in what:
            what = "its text tower needs the transformers package: pip install transformers"
        raise ValueError(f"{flag}: {what}; {choices}") from None
    finally:
        logging.disable(logging.NOTSET)
    if not weights and not own:
        repo, file = os.path.split(of_tag.get("hf_hub", "")) if tag else (model_id, "")
        files = (file,) if file else ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        path = hub_file(flag, repo, *files, otherwise=OTHERWISE) if repo else open_clip.download_pretrained(of_tag)
    return model, preprocess, tokenize, path


# ---- Text towers ----------------------------------------------------------------------------------------------------

def tight(tower: nn.Module) -> nn.Module:
    """The same text tower with TextTower's forward where it is open_clip's plain transformer, else as it is."""
    from open_clip.transformer import ResidualAttentionBlock, TextTransformer
    plain = type(tower) is TextTransformer and tower.pool_type in ("argmax", "eos", "last") and not tower.use_pad_mask
    if plain and all(type(block) is ResidualAttentionBlock for block in tower.transformer.resblocks):
        tower.__class__ = TextTower  # parameters, their names and buffers stay: only the methods below change
    return tower


class TextTower(nn.Module):
    """open_clip's TextTransformer, computed with less: tokens (B, L) -> (B, dim), not normalised.

    Equal to the original but for rounding, gradients too. Columns that no pooled position looks at are cut off, the
    last block computes the pooled position alone, and blocks call their layers instead of nn.MultiheadAttention, which
    transposes what every layer then copies and reads out_proj.weight, a sum that LoRA would have to build.
    tokens may lie on the CPU whatever the tower's device: their lengths are then read without waiting for a GPU.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        position, mask = self.positional_embedding, None
        if self.cls_emb is None:
            pooled = torch.full_like(tokens[:, 0], tokens.shape[1] - 1)
            if self.pool_type != "last":
                pooled = (tokens if self.pool_type == "argmax" else (tokens == self.eos_id).int()).argmax(dim=1)
            if self.attn_mask is not None:  # causal: what comes after the last pooled position is never looked at
                tokens = tokens[:, :int(pooled.max()) + 1]
            tokens = tokens.to(position.device, non_blocking=True)
            x = self.token_embedding(tokens) + position[:tokens.shape[1]]                       # (B, L, width)
        else:  # CoCa, CONCH: a cls embedding at the end, which sees one pad at most
            last = min(tokens.shape[1], len(position) - 1)
            shown = tokens[:, :last] != self.pad_id
            used = min(int((shown * torch.arange(1, last + 1, device=tokens.device)).max()) + 1, last)
            tokens, shown = (part[:, :used].to(position.device, non_blocking=True) for part in (tokens, shown))
            pooled = torch.full_like(tokens[:, 0], used)
            x = torch.cat([self.token_embedding(tokens), self.cls_emb.expand(len(tokens), 1, -1)], dim=1)
            x = x + torch.cat([position[:used], position[last:last + 1]])                       # (B, used + 1, width)
            # The mask of the keys is off by one: key j is seen where token j - 1 is no pad, so the cls sees the first
            # pad and not itself. The published weights were trained with this (open_clip's legacy mask).
            first = torch.ones_like(shown[:, :1])
            mask = torch.cat([shown, first] if self.correct_cls_mask else [first, shown], dim=1)[:, None, None]
        if self.attn_mask is not None:
            causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            mask = causal[None, None] if mask is None else mask & causal                        # (1 or B, 1, L, L)
        blocks, pooled = self.transformer.resblocks, pooled.to(x.device, non_blocking=True)
        for block in blocks[:-1]:
            if self.transformer.grad_checkpointing:
                x = checkpoint(attention_block, block, x, mask, use_reentrant=False)
            else:
                x = attention_block(block, x, mask)
        x = self.ln_final(attention_block(blocks[-1], x, mask, pooled))
        projection = self.text_projection
        return x if projection is None else projection(x) if isinstance(projection, nn.Module) else x @ projection

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.transformer.grad_checkpointing = enable


def attention_block(block: nn.Module, x: Tensor, mask: Tensor | None, at: Tensor | None = None) -> Tensor:
    """open_clip's ResidualAttentionBlock: x (B, L, D), mask True where a key is seen -> (B, L, D).
    With `at` (B,) the block's output at that position of each row alone, (B, D)."""
    attn, y, split = block.attn, block.ln_1(x), x.shape[-1]
    weight, bias = attn.in_proj_weight, attn.in_proj_bias
    if at is None:
        q, k, v = F.linear(y, weight, bias).chunk(3, dim=-1)
    else:
        rows = torch.arange(len(x), device=x.device)
        mask = None if mask is None else mask.expand(len(x), 1, x.shape[1], -1)[rows, :, at, None]  # (B, 1, 1, L)
        k, v = F.linear(y, weight[split:], bias[split:]).chunk(2, dim=-1)
        x, q = x[rows, at, None], F.linear(y[rows, at, None], weight[:split], bias[:split])          # (B, 1, D)
    q, k, v = (part.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for part in (q, k, v))  # (B, heads, L, D')
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    x = add(block.ls_1(attn.out_proj(y)), x)
    x = add(block.ls_2(block.mlp(block.ln_2(x))), x)
    return x if at is None else x[:, 0]


def add(new: Tensor, x: Tensor) -> Tensor:
    """new + x, in place; under autocast out of place, since `new` is of less precision than the sum."""
    return new.add_(x) if new.dtype == x.dtype else new + x


# ---- Features and pairs ---------------------------------------------------------------------------------------------

@torch.no_grad()
def embed_images(clip: Clip, dataset, batch_size: int = 64, workers: int = 0) -> Tensor:
    """(N, dim) fp32 features of length 1, in the data set's order, on the CPU.

    dataset: item i is an image that clip.preprocess has made, or a tuple that begins with one (labels are not used).
    """
    loader = torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers,  # workers decode ahead
                                         pin_memory=clip.device.type == "cuda")
    batches = tqdm(loader, "embed tiles", leave=False, disable=None)
    images = (batch[0] if isinstance(batch, (tuple, list)) else batch for batch in batches)
    # gathered where they are made: a copy to the CPU after each batch would have a GPU wait for the next one
    return torch.cat([clip.encode_image(batch.to(clip.device, non_blocking=True)) for batch in images]).cpu()


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
def nearest_text(image_emb: Tensor, text_emb: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
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
    text_emb, block = text_emb.float(), image_emb.new_empty(min(chunk, len(image_emb)), len(text_emb)).float()
    for images in image_emb.float().split(chunk):
        cosine = torch.mm(images, text_emb.T, out=block[:len(images)])           # (chunk, M), one memory for all
        best = cosine.amax(1, keepdim=True)
        if not best.isfinite().all():
            raise ValueError("nearest_text: the features hold NaN or infinity")
        nearest = (cosine >= best - TIE).view(torch.uint8).argmax(1)  # argmax returns the first of equal maxima
        index.append(nearest.cpu())
        similarity.append((images * text_emb[nearest]).sum(1).cpu())
    return torch.cat(index), torch.cat(similarity)


def cached(path, key: dict[str, str], compute: Callable[[], Tensor], write: bool = True) -> tuple[Tensor, str]:
    """(tensor, what happened): the tensor stored at `path` if it was made from the same `key`, else compute()'s.

    key: name -> what the tensor came from, compared by hash; a changed one is named. The file is written under a
    temporary name and renamed, so that a run that is killed leaves the old file or the new one; of many processes that
    compute it together, one has write=True.
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
    if not write:
        return tensor, reason
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
    preprocessing = re.sub(" at 0x[0-9a-f]+", "", str(clip.preprocess))  # a function's address, anew in every process
    return key | {"tile list": json.dumps(stats), "preprocessing": preprocessing}


def slug(text: str) -> str:
    """A file name made of the text; what is too long for one is cut and told apart by its hash."""
    name = re.sub(r"[^\w.-]+", "-", str(text)).strip("-.")
    return name if len(name) <= 150 else f"{name[:140]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


# ---- CONCH ----------------------------------------------------------------------------------------------------------

class ConchVision(nn.Module):
    """Images (B, 3, H, W) -> (B, dim), not normalised: a ViT, a query that attends to all its tokens, a projection."""

    def __init__(self, image_size: int, patch: int, width: int, layers: int, heads: int, dim: int):
        from open_clip.transformer import AttentionalPooler
        from timm.models.vision_transformer import VisionTransformer
        super().__init__()
        self.trunk = VisionTransformer(image_size, patch, embed_dim=width, depth=layers, num_heads=heads, num_classes=0,
                                       dynamic_img_size=True)
        self.attn_pool_contrast = AttentionalPooler(dim, width, n_head=8, n_queries=1)
        self.ln_contrast = nn.LayerNorm(dim)
        self.proj_contrast = nn.Parameter(dim ** -0.5 * torch.randn(dim, dim))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.trunk.forward_features(images)                             # (B, 1 + patches, width)
        return self.ln_contrast(self.attn_pool_contrast(tokens)[:, 0]) @ self.proj_contrast


def build_conch(image_size=448, patch=16, width=768, layers=12, heads=12, dim=512, vocab=32007, positions=128):
    """CONCH's two towers with random weights: module.visual, module.text. The sizes are CONCH's unless a test asks.
    Of tokens (B, positions) the text tower leaves out the last column, a placeholder for the cls embedding."""
    from open_clip.transformer import TextTransformer
    model = nn.Module()
    model.visual = ConchVision(image_size, patch, width, layers, heads, dim)
    # open_clip adds a position for the cls
    model.text = tight(TextTransformer(positions - 1, vocab, width, heads, layers, output_dim=dim, embed_cls=True))
    return model


def load_conch(model: nn.Module, path) -> None:
    """CONCH's checkpoint into build_conch's towers; of its keys only those that pairing does not use may be absent.
    Raises RuntimeError that names the keys which are missing, unknown or of another shape."""
    from timm.models import load_state_dict
    state = load_state_dict(str(path), weights_only=True)  # unwraps {"state_dict": ...} and strips "module."
    unused = ("text_decoder.", "visual.attn_pool_caption.", "visual.ln_caption.", "logit_scale")
    model.load_state_dict({key: value for key, value in state.items() if not key.startswith(unused)})


class ConchTokenizer:
    """list[str] -> LongTensor (B, 128): the byte-level BPE of CONCH in plain Python.

    path: its tokenizer file, None for the published one (downloaded once). It is read with the first text, not before.
    A row is <start_of_text>, up to 125 tokens, <end_of_text>, zeros; the last column is 0, the place of the cls.
    Raises ValueError where the file cannot be had or is none.
    """

    def __init__(self, path=None):
        self.path, self.known = path, {}

    def read(self) -> None:
        import regex
        path = self.path or conch_tokenizer_file()
        try:
            file = json.loads(Path(path).read_text(encoding="utf-8"))
            self.vocab, self.special = file["model"]["vocab"], {t["content"]: t["id"] for t in file["added_tokens"]}
            self.rank = {tuple(merge.split(" ")): i for i, merge in enumerate(file["model"]["merges"])}
            self.start, self.end = self.special["<start_of_text>"], self.special["<end_of_text>"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"--clip-tokenizer {path}: not CONCH's tokenizer file "
                             f"({type(error).__name__}: {error})") from None
        self.segments = regex.compile("(" + "|".join(map(regex.escape, self.special)) + ")")
        self.words = regex.compile(  # GPT-2's
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]  # stand as the characters from 256 on
        self.symbol = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}

    def __call__(self, texts: list[str]) -> Tensor:
        if not hasattr(self, "vocab"):
            self.read()
        rows = torch.zeros(len(texts), 128, dtype=torch.long)
        for row, text in zip(rows, texts):
            ids = [self.start, *self.encode(text, 125), self.end]
            row[:len(ids)] = torch.tensor(ids)
        return rows

    def encode(self, text: str, most: int) -> list[int]:
        """The first `most` ids of a text, without start and end."""
        ids = []
        for segment in self.segments.split(text):
            if segment in self.special:
                ids.append(self.special[segment])
                continue
            segment = "".join(character.lower() for character in unicodedata.normalize("NFD", segment)
                              if not unicodedata.category(character).startswith("M"))  # no accents
            if segment and not segment.startswith(" "):
                segment = " " + segment
            for word in self.words.finditer(segment):
                if len(ids) >= most:
                    return ids[:most]
                ids += self.merge(word.group())
        return ids[:most]

    def merge(self, word: str) -> list[int]:
        """Byte-pair encoding: of the neighbouring symbols, the pair of lowest rank is joined until none is known."""
        if word not in self.known:
            symbols = [self.symbol[byte] for byte in word.encode()]
            while len(symbols) > 1:
                ranks = [self.rank.get(pair, len(self.rank)) for pair in zip(symbols, symbols[1:])]
                if min(ranks) == len(self.rank):
                    break
                i = ranks.index(min(ranks))
                symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
            self.known[word] = [self.vocab[symbol] for symbol in symbols if symbol in self.vocab]
        return self.known[word]


def conch_tokenizer_file() -> Path:
    """The published tokenizer file (CC BY-NC-ND 4.0), downloaded once into the user's cache folder.
    Raises ValueError where it cannot be downloaded or is another file than expected."""
    url, sha256 = CONCH_TOKENIZER
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "clip-it", Path(url).name)
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    try:
        with urllib.request.urlopen(url, timeout=20) as reply:
            content = reply.read()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ValueError(f"what came is not the file of sha256 {sha256[:8]}...")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # a killed run leaves no half file under the name
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except (OSError, ValueError, HTTPException) as error:
        raise ValueError(f"--clip-model conch: its tokenizer file could not be downloaded ({error})\n"
                         f"get {url} elsewhere and give --clip-tokenizer FILE, or take --clip-model quilt") from None
    return path


# ---- Pages: the pairs, and a run's results, to look at --------------------------------------------------------------
# Each is one HTML file: thumbnails inside, no script, no network. In the charts (inline SVG) x is in % and y in px, so
# that a chart follows the width of the page while its text keeps its size.

STYLE = """
:root { color-scheme: light dark; --page: #fdfdfc; --ink: #1b2025; --soft: #59636d; --rule: #dde0e3; --blue: #0072b2;
  --orange: #c45500; --hit: 110 172 226; --miss: 242 158 92 }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --ink: #e9ebed; --soft: #a3acb5; --rule: #363d44;
  --blue: #56b4e9; --orange: #f0a050; --hit: 30 98 160; --miss: 168 78 14 } }
* { box-sizing: border-box } figure { margin: 0; min-width: 0 } a { color: var(--blue) } summary { cursor: pointer }
body { margin: 0 auto; max-width: 76rem; padding: 2rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
h1, h2 { margin: 0 0 .5rem; font-weight: 600; font-size: 1.75rem; line-height: 1.25 }
h2 { margin: 3rem 0 1rem; font-size: 1.2rem } h2 + .soft { margin-top: -.75rem }
p, figcaption { max-width: 44rem; margin: 0 0 1rem } figcaption { margin: .5rem 0 0 }
.soft, figcaption, dt { color: var(--soft); font-size: .875rem }
dl { display: flex; flex-wrap: wrap; gap: .75rem 2.5rem; margin: 1.5rem 0 } dd { margin: 0; font-size: 1.35rem }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 2.5rem 3rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.5rem 2rem }
.tile { display: grid; grid-template-columns: 7rem 1fr; gap: .9rem; line-height: 1.4 } .tile figcaption { margin: 0 }
img { width: 7rem; height: 7rem; object-fit: cover; border-radius: 3px } details p { margin: .4rem 0 }
b, details { color: var(--ink) } .tile b { font-size: 1rem }
svg { display: block; width: 100%; overflow: visible; fill: var(--ink) } text { font-size: .8125rem }
text.soft { fill: var(--soft); font-size: .8125rem } .rule { stroke: var(--rule) } .bar { fill: var(--blue) }
rect { stroke: var(--page) } polyline, .legend line { fill: none; stroke-width: 2; vector-effect: non-scaling-stroke }
.ink { stroke: var(--ink) } .blue { stroke: var(--blue) } .orange { stroke: var(--orange) }
.dash { stroke-dasharray: 5 4 } .legend span { white-space: nowrap; margin-right: 1.25rem }
.legend svg { display: inline-block; width: 1.75rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; overflow-wrap: normal }
th, td { padding: .3rem .6rem; text-align: right; white-space: nowrap; font-weight: inherit }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--page) } thead { color: var(--soft) }
.rows tr { border-bottom: 1px solid var(--rule) } .rows tbody tr:last-child { font-weight: 600 }
.rows tbody th { white-space: normal; min-width: 8.5rem }
.grid td, .grid th + th { text-align: center; padding: .15rem .2rem } .grid thead th { vertical-align: bottom }
.grid td { min-width: 2rem; height: 2rem } .miss { background: rgb(var(--miss) / var(--p)) }
.hit { background: rgb(var(--hit) / var(--p)) } .grid th { max-width: 9rem; overflow: hidden; text-overflow: ellipsis }
.grid span { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 11rem }
ul { list-style: none; padding: 0; columns: 17rem; font-size: .875rem } li { break-inside: avoid }
"""
HEIGHT = 200  # px of a chart


def write_page(path, title: str, lead: str, *parts: str) -> None:
    """A whole HTML document, under a temporary name first. title and lead are text, parts are HTML."""
    head = f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><h1>{escape(title)}</h1><p>{escape(lead)}</p>"""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    temporary.write_bytes("\n".join([head, *parts, "</body></html>\n"]).encode("utf-8", "replace"))
    os.replace(temporary, path)


def html_table(rows: list[list[str]], caption: str, kind: str = "rows") -> str:
    """rows: the header first; cells are HTML, <td ...> where they bring their own tag. It scrolls in its own box."""
    lines = ["".join(cell if cell.startswith("<td") else f"<th>{cell}</th>" if i * j == 0 else f"<td>{cell}</td>"
                     for j, cell in enumerate(row)) for i, row in enumerate(rows)]
    return (f'<figure><div class="scroll"><table class="{kind}"><thead><tr>{lines[0]}</tr></thead><tbody><tr>'
            + "</tr><tr>".join(lines[1:]) + f"</tr></tbody></table></div><figcaption>{caption}</figcaption></figure>")


def confusion_grid(counts: list[list[int]], classes: list[str], caption: str) -> str:
    """counts (C, C): row = true class, column = predicted class, shaded by the share of the row."""
    if len(classes) > 120:
        return f"<p>{caption} Too many classes for a grid; metrics.json holds the counts.</p>"
    names = [escape(name) for name in classes]
    rows = [["true class", *(f"<span>{name}</span>" for name in names), "tiles", "recall"]]
    for i, row in enumerate(counts):
        total = sum(row)
        # a faint shade at least, so that no error is overlooked
        cells = (f'<td class="{"hit" if i == j else "miss"}" style="--p:{0.1 + 0.9 * n / total:.2f}">{n}</td>'
                 if n else "" for j, n in enumerate(row))
        rows.append([names[i], *cells, str(total), f"{row[i] / total:.1%}" if total else "–"])
    return html_table(rows, caption, "grid")


def axes(x: tuple, y: tuple, x_name: str, y_name: str, marks: str, caption: str, right: float = 1) -> str:
    """A chart with ticks and names on both axes. x, y: (lowest, highest); marks: the SVG in it, with x in % of the
    plot's width and y in px of HEIGHT; right: rem kept free beside it."""
    def ticks(low, high):  # at most seven round numbers, and where they lie in 0..1
        step = 10 ** math.floor(math.log10((high - low) / 6))
        step *= next(factor for factor in (1, 2, 5, 10) if factor * step * 6 >= (high - low) * 0.999)
        return [(f"{i * step:.4g}", (i * step - low) / (high - low))
                for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]

    grid = "".join(f'<line class="rule" x2="100%" y1="{at:.1f}" y2="{at:.1f}"/><text class="soft" text-anchor="end" '
                   f'x="-8" y="{at + 4:.1f}">{tick}</text>'
                   for tick, share in ticks(*y) for at in [HEIGHT * (1 - share)])
    grid += "".join(f'<text class="soft" text-anchor="middle" x="{100 * share:.2f}%" y="{HEIGHT + 20}">{tick}</text>'
                    for tick, share in ticks(*x))
    return (f'<figure><div style="padding:1.75rem {right}rem 3rem 2.5rem"><svg role="img" height="{HEIGHT}" '
            f'aria-label="{y_name} by {x_name}">{grid}{marks}<text class="soft" x="-36" y="-12">{y_name}</text>'
            f'<text class="soft" text-anchor="middle" x="50%" y="{HEIGHT + 42}">{x_name}</text></svg></div>'
            f"<figcaption>{caption}</figcaption></figure>")


def histogram(values: Tensor, x_name: str, caption: str, bins: int = 30) -> str:
    """The share of the values (N,) in equal bins from the lowest to the highest."""
    low, high = values.min().item(), max(values.max().item(), values.min().item() + 1e-3)
    counts = torch.histc(values.float(), bins, low, high).long().tolist()
    top, width = max(counts) * 1.05, 100 / bins
    marks = "".join(f'<rect class="bar" x="{i * width:.2f}%" y="{HEIGHT - px:.1f}" width="{width:.2f}%" '
                    f'height="{px:.1f}"><title>{n} tiles</title></rect>'
                    for i, n in enumerate(counts) if n for px in [HEIGHT * n / top])
    return axes((low, high), (0, 100 * top / len(values)), x_name, "% of tiles", marks, caption)


def bars(rows: list[tuple[str, float]], caption: str) -> str:
    """Horizontal bars of (label, share), each below its label."""
    marks = "".join(f'<text y="{y}">{escape(label)}</text><text class="soft" x="{width:.2f}%" dx="6" y="{y + 14}">'
                    f'{share:.1%}</text><rect class="bar" y="{y + 5}" width="{width:.2f}%" height="9"/>'
                    for y, (label, share) in zip(range(12, 999, 36), rows) for width in [85 * share / rows[0][1]])
    return (f'<figure><svg role="img" aria-label="{caption}" height="{36 * len(rows)}" style="overflow:hidden">{marks}'
            f"</svg><figcaption>{caption}</figcaption></figure>")


def curves(series: dict[str, tuple[str, list]], x_name: str, y_name: str, caption: str, low=None) -> str:
    """Lines with a legend and a name at each end. series: name -> (classes of STYLE, [(x, y), ...]); low: the y axis
    begins there; unset, near the lowest value."""
    xs, ys = zip(*(point for _, line in series.values() for point in line))
    pad = (max(ys) - min(ys) or 1) * 0.05
    right, bottom, top = max(xs), min(ys) - pad if low is None else low, max(ys) + pad
    scaled = {name: [(100 * x / right, HEIGHT * (top - y) / (top - bottom)) for x, y in line]
              for name, (_, line) in series.items()}
    order, places = sorted(scaled, key=lambda name: scaled[name][-1][1]), []
    for name in order:  # names that would lie on one another are moved apart, down first and then up
        places.append(max([scaled[name][-1][1], *(place + 15 for place in places[-1:])]))
    places = [min(place, HEIGHT - 15 * i) for i, place in zip(range(len(places))[::-1], places)]
    marks = legend = ""
    for name, place in zip(order, places):
        kind, points, (x, y) = series[name][0], " ".join(f"{x:.2f},{y:.1f}" for x, y in scaled[name]), scaled[name][-1]
        marks += (f'<svg viewBox="0 0 100 {HEIGHT}" height="{HEIGHT}" preserveAspectRatio="none">'
                  f'<polyline class="{kind}" points="{points}"/></svg><circle cx="{x:.2f}%" cy="{y:.1f}" r="2"/>'
                  f'<text x="100%" dx="8" y="{place + 4:.1f}">{name}</text>')
    for name, (kind, _) in series.items():
        legend += f'<span><svg height="10"><line class="{kind}" x2="100%" y1="6" y2="6"/></svg> {name}</span>'
    caption = f'<div class="legend">{legend}</div>{caption}' if len(series) > 1 else caption
    return axes((0, right), (bottom, top), x_name, y_name, marks, caption, 6.5)


def thumbnail(image, most: int) -> str:
    """A PIL image as <img> with at most so many characters of JPEG."""
    image = image.convert("RGB")
    for side in (176, 144, 112, 80, 56, 40):
        image.thumbnail((side, side))
        image.save(file := io.BytesIO(), "JPEG", quality=80)
        if 4 / 3 * file.tell() + 4 <= most:
            break
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'


def split_text(text: str, most: int) -> tuple[str, str]:
    """(the first words of a text, at most so many characters; the rest)"""
    cut = len(text) if len(text) <= most else len(text[:most].rsplit(" ", 1)[0]) or most
    return text[:cut] + " …" * (cut < len(text)), text[cut:]


def write_gallery(path, ds: str, clip_name: str, tiles, index: Tensor, similarity: Tensor, reports: list[str]) -> None:
    """The pairs as a page of less than 3 MB: key figures, two charts, and tiles of every class.

    tiles: item i is (PIL image, label), with .paths, .labels and .classes; index, similarity (N,): of nearest_text.
    Labels group the tiles on the page; the pairing has not seen them.
    """
    uses = index.bincount(minlength=len(reports))                                # (M,)
    most_used = uses.argsort(descending=True, stable=True)[:min(8, index.unique().numel())].tolist()
    classes, labels, parts = tiles.classes[:120], torch.tensor(tiles.labels), []
    a_class = 12 if len(classes) <= 4 else min(6, 240 // len(classes))
    for label, name in enumerate(classes):
        members = (labels == label).nonzero()[:, 0]
        members = members[similarity[members].argsort(descending=True, stable=True)]
        shown = members[torch.linspace(0, len(members) - 1, min(a_class, len(members))).round().long()].tolist()
        parts.append(f'<h2>{escape(name)}</h2><p class="soft">{len(shown)} of {len(members):,} tiles</p>'
                     '<div class="tiles">')
        for i in shown:
            report = int(index[i])
            shared = f"shared by {uses[report]:,} tiles" if uses[report] > 1 else "of this tile alone"
            first, rest = split_text(" ".join(reports[report].split()), 110)
            parts.append(
                f'<figure class="tile">{thumbnail(tiles[i][0], 1_700_000 // (a_class * len(classes)))}<figcaption>'
                f"<b>{similarity[i]:.3f}</b> · report {shared}"
                f"<details><summary>{escape(first)}</summary><p>{escape(split_text(rest, 500)[0])}</p>"
                f'<p class="soft">report {report}, tile {escape(str(tiles.paths[i])[-150:])}</p></details></figcaption>'
                "</figure>")
        parts.append("</div>")
    key = {"tiles": f"{len(index):,}", "mean similarity": f"{similarity.mean():.3f}",
           "reports in use": f"{int((uses > 0).sum()):,} of {len(reports):,}",
           "most used report": f"{uses.max() / len(index):.1%} of the tiles"}
    some = "every class" if len(classes) == len(tiles.classes) else f"the first 120 of {len(tiles.classes)} classes"
    write_page(
        path, f"Tiles and their reports: {Path(ds).resolve().name}",
        "Every tile got the report that the CLIP model finds most similar to it; no label took part. This page shows "
        f"how similar the pairs are, which reports are used most, and examples of {some}.",
        f'<p class="soft">Data set: {escape(ds)}. CLIP model: {escape(clip_name)}.</p><dl>',
        *(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in key.items()), '</dl><div class="charts">',
        histogram(similarity, "cosine similarity of tile and report",
                  "Share of the tiles by their similarity to their report (1: same direction, 0: unrelated)."),
        bars([(f"{i}: {split_text(' '.join(reports[i].split()), 40)[0]}", uses[i].item() / len(index))
              for i in most_used], "Share of the tiles that got each of the most used reports (number, beginning)."),
        f'</div><h2>Examples of {some}</h2><p class="soft">From the most similar tile of a class to the least, in '
        "equal steps. The figure is the cosine; open a report to read on. Reports are numbered from 0.</p>", *parts)


# ---- Command line: pair, and write the page -------------------------------------------------------------------------

def main(argv=None) -> None:
    """Embed, pair and write the gallery. Raises ValueError and OSError for bad input."""
    import data  # here, so that all else in this file works without data.py

    parser = argparse.ArgumentParser("pairing.py", description="Pair tiles with reports; write the pairs as a page.")
    for flag, default, text in (
            ("ds", "demo", f"{', '.join(data.DATASETS)}, or a folder with train/ and test/ of class folders"),
            ("reports", None, f".txt, .csv, .jsonl, a folder of .txt, or {', '.join(data.REPORTS)}"),
            ("gallery", "pairs.html", "the page to write"), ("data-dir", "data", "where downloaded data sets lie"),
            ("clip-model", None, f"{', '.join(CLIPS)} or an open_clip id; unset, conch"),
            ("clip-weights", None, "local weights of the pairing model, or `none` for random ones"),
            ("clip-tokenizer", None, "local tokenizer file of conch"),
            ("dir", "runs", "features are kept in DIR/cache, where train.py looks for them too"),
            ("limit", None, "use this share of every split, for a quick look"), ("batch", 64, "tiles a step"),
            ("worker", None, "processes that decode tiles"),
            ("device", "cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1 ...")):
        parser.add_argument(f"--{flag}", default=default, help=text + (f" [{default}]" if default else ""),
                            type={"limit": float, "batch": int, "worker": int}.get(flag, str))
    parser.add_argument("--download", action="store_true", help="fetch the data set and reports that are not there yet")
    args = parser.parse_args(argv)
    row = {"clip_model": "conch", "worker": min(os.cpu_count() or 1, 8)} | data.DATASETS.get(args.ds, {})
    for key in ("reports", "clip_model", "worker"):
        if getattr(args, key) is None:
            setattr(args, key, row.get(key))
    if not args.download:
        data.dataset_folder(args.ds, args.data_dir)
    for wrong, message in (
            (args.reports is None, f"--ds {args.ds} needs --reports"),
            (args.limit is not None and not 0 < args.limit < 1, f"--limit {args.limit}: expected a share such as 0.1"),
            (args.batch < 1 or args.worker < 0, "expected --batch 1 or more and --worker 0 or more"),
            (args.device.startswith("cuda") and not torch.cuda.is_available(),
             f"--device {args.device}: torch finds no CUDA device here; use --device cpu"),
            (Path(args.gallery).is_dir() or not Path(args.gallery).absolute().parent.is_dir(),
             f"--gallery {args.gallery}: expected a file in a folder that is there")):
        if wrong:
            raise ValueError(message)
    clip = load_clip(args.clip_model, args.clip_weights, args.clip_tokenizer, args.device)
    if args.download:
        data.download(args.ds, args.data_dir)
        data.download_reports(args.reports, args.data_dir)
    reports = data.load_reports(args.reports, args.data_dir)
    cache, paths, labels, tile_emb = Path(args.dir, "cache", slug(f"{args.ds} {args.clip_model}")), [], [], []
    text_emb, _ = cached(cache / f"reports-{slug(Path(args.reports).stem)}.pt", cache_key(clip, texts=reports),
                         lambda: embed_texts(clip, reports))                                          # (M, dim)
    for split in ("train", "val", "test"):
        tiles = data.load_tiles(args.ds, split, args.data_dir, clip.preprocess)
        if args.limit:
            tiles = tiles.take(data.stratified_split(tiles.labels, args.limit, 0)[1])
        for bad in data.find_bad_tiles(tiles, args.worker).values():
            raise ValueError(f"{bad}; mend it or remove it")
        name = f"{split}-limit{args.limit}-sd0.pt" if args.limit else f"{split}.pt"  # train.py's names
        tile_emb.append(cached(cache / name, cache_key(clip, paths=tiles.paths),
                               lambda: embed_images(clip, tiles, args.batch, args.worker))[0])        # (N, dim)
        paths, labels = paths + tiles.paths, labels + tiles.labels
    index, similarity = nearest_text(torch.cat(tile_emb), text_emb)
    write_gallery(args.gallery, args.ds, args.clip_model, data.Tiles(paths, labels, tiles.classes), index, similarity,
                  reports)
    print(f"{len(index)} tiles paired with {len(index.unique())} of {len(reports)} reports, mean similarity "
          f"{similarity.mean():.3f}: {args.gallery}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"pairing.py: {error}", file=sys.stderr)
        sys.exit(2)
