"""Pair tiles with reports they never came with: each gets the report of highest cosine by CLIP.

    from pairing import load_clip, embed_images, embed_texts, nearest_text
    clip = load_clip("conch")  # or "quilt", any open_clip id
    index, similarity = nearest_text(embed_images(clip, tiles), embed_texts(clip, reports))

Travels alone. psi(i) = argmax_j cos(v_i, t_j) in the paper, with v_i the CLIP feature of tile i and
t_j that of report j. It sees no labels; one report may serve many tiles.
CONCH: Lu et al. 2024, Nature Medicine 30, 863-874. QuiltNet: arXiv 2306.11207.
"""
import hashlib
import json
import logging
import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm


@torch.no_grad()
def nearest_text(image_emb: Tensor, text_emb: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """psi: index (N,) and cosine (N,) of the report of highest cosine for every tile.

    image_emb (N, dim), text_emb (M, dim), of length 1; the first of equals wins. ValueError: shapes
    that do not fit, no reports, features that are not finite.
    """
    if image_emb.shape[1:] != text_emb.shape[1:] or text_emb.ndim != 2 or len(text_emb) == 0:
        raise ValueError("nearest_text: expected (N, dim) and (M > 0, dim), got "
                         f"{image_emb.shape} and {text_emb.shape}")
    text_emb, best = text_emb.float(), []
    # Written over for each chunk: there is no N x M matrix, and memory stays flat
    cosine = text_emb.new_empty(min(chunk, len(image_emb)), len(text_emb))  # (chunk, M)
    for images in image_emb.split(chunk):
        block = torch.mm(images.to(text_emb), text_emb.T, out=cosine[:len(images)])
        best.append(block.max(dim=1))
    similarity, index = (torch.cat(parts) for parts in zip(*best))  # (N,), (N,)
    if not similarity.isfinite().all():
        raise ValueError("nearest_text: features hold NaN or infinity")
    return index.cpu(), similarity.cpu()


@dataclass
class Clip:
    """A CLIP model taken apart. encode_image and encode_text give (B, dim) features of length 1."""
    name: str
    dim: int
    image_tower: nn.Module  # (B, 3, H, W) -> (B, dim), not normalised
    text_tower: nn.Module   # tokens (B, L) -> (B, dim), not normalised
    preprocess: Callable    # PIL image -> (3, H, W)
    tokenize: Callable      # list[str] -> LongTensor (B, L)
    device: torch.device

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.image_tower(images).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.text_tower(tokens).float(), dim=-1)


@torch.no_grad()
def embed_images(clip: Clip, dataset, batch_size: int = 64, workers: int = 0) -> Tensor:
    """(N, dim) fp32 features of length 1, in order, on the CPU. dataset: images of
    clip.preprocess, or tuples that begin with one (labels are not read)."""
    loader = torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers)
    batches = tqdm(loader, "embed tiles", leave=False, disable=None)
    images = (batch if isinstance(batch, Tensor) else batch[0] for batch in batches)
    return torch.cat([clip.encode_image(x.to(clip.device)).cpu() for x in images])


@torch.no_grad()
def embed_texts(clip: Clip, texts: list[str], batch_size: int = 64) -> Tensor:
    """(M, dim) fp32 features of length 1, in order, on the CPU."""
    starts = tqdm(range(0, len(texts), batch_size), "embed reports", leave=False, disable=None)
    tokens = (clip.tokenize(texts[i:i + batch_size]) for i in starts)
    return torch.cat([clip.encode_text(x.to(clip.device)).cpu() for x in tokens])


# ---- Models by name ----

CLIPS = {  # hub id, open_clip's name of the architecture
    "conch": None,  # by load_conch
    "quilt": ("hf-hub:wisdomik/QuiltNet-B-32", "ViT-B-32"),
    "quilt16": ("hf-hub:wisdomik/QuiltNet-B-16", "ViT-B-16"),
}


def load_clip(name: str, weights=None, tokenizer=None, device="cpu") -> Clip:
    """A CLIP model, frozen, in eval mode. ValueError where it cannot be had.

    name: a key of CLIPS, "hf-hub:org/model", "local-dir:folder" or "ViT-B-32/openai"; weights: a
    local checkpoint or "none" (random); tokenizer: CONCH's tokenizer file.
    """
    logging.disable(logging.WARNING)  # open_clip's "initialized randomly"
    try:
        parts = load_conch(weights, tokenizer) if name == "conch" else load_open_clip(name, weights)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"--clip-model {name} --clip-weights {weights}: could not be loaded "
                         f"({reason:.300})\nchoose {', '.join(CLIPS)} or an open_clip id, or "
                         "--clip-weights FILE; conch: ask at huggingface.co/MahmoodLab/CONCH, "
                         "`hf auth login`") from None
    finally:
        logging.disable(logging.NOTSET)
    model, preprocess, tokenize = parts
    model.eval().requires_grad_(False).to(device)
    model.text.output_tokens = model.visual.output_tokens = False  # CoCa: the pooled feature alone
    return Clip(name, model.text.output_dim, model.visual, model.text, preprocess, tokenize,
                torch.device(device))


def load_open_clip(name: str, weights):
    import open_clip
    from huggingface_hub import hf_hub_download

    source, architecture = CLIPS.get(name, (name, name))
    if weights:  # then quilt needs no hub
        source = architecture
    kind, _, place = source.partition(":")
    config, tag, tokenizer = Path(place, "open_clip_config.json"), "", None
    if kind == "hf-hub":
        repo, _, revision = place.partition("@")
        config = Path(hf_hub_download(repo, config.name, revision=revision or None))
    if place:
        model_cfg = json.loads(config.read_bytes())["model_cfg"]
        if bad := re.search('trust_remote_code|"timm_model_name": "[^"]*:', json.dumps(model_cfg)):
            raise ValueError(f"{config} has {bad[0]}: no code, no address is taken from files")
        if "hf_tokenizer_name" in model_cfg["text_cfg"]:
            tokenizer = source  # a hub's lies elsewhere
        source = f"local-dir:{config.parent}"  # a hub's is in its cache
    else:
        source, _, tag = source.partition("/")
    if kind == "hf-hub" and not weights:
        open_clip.pretrained.download_pretrained_from_hf(repo, revision=revision or None)
    known = open_clip.get_pretrained_cfg(source, tag)  # of the tag: activation, mean, std ...
    # force_custom_text: the text tower stays a module of its own
    model = open_clip.create_model(
        source, None if weights else tag, load_weights=not weights, require_pretrained=not weights,
        force_custom_text=True, pretrained_text=False, force_preprocess_cfg=known,
        force_quick_gelu=known.get("quick_gelu", False))
    if weights not in (None, "none"):
        open_clip.load_checkpoint(model, weights)
    cfg = open_clip.transform.PreprocessCfg(**model.visual.preprocess_cfg)
    preprocess = open_clip.transform.image_transform_v2(cfg, is_train=False)
    return model, preprocess, open_clip.get_tokenizer(tokenizer or source)


# ---- CONCH ----
# Equal to its package (tests/test_conch.py), which needs transformers 4 and a pinned timm.

def load_conch(weights, tokenizer):
    from huggingface_hub import hf_hub_download
    from open_clip import image_transform
    from timm.models import load_state_dict

    weights = weights or hf_hub_download("MahmoodLab/CONCH", "pytorch_model.bin")
    tokenize = ConchTokenizer(tokenizer)
    model = build_conch()
    if weights != "none":
        state = load_state_dict(weights, weights_only=True)  # unwraps it, strips "module."
        unused = "text_decoder.", "visual.attn_pool_caption.", "visual.ln_caption.", "logit_scale"
        model.load_state_dict({key: x for key, x in state.items() if not key.startswith(unused)})
    return model, image_transform(448, is_train=False), tokenize


def build_conch(width: int = 768, layers: int = 12) -> nn.Module:
    """CONCH's two towers with random weights: module.visual, module.text."""
    from open_clip.transformer import AttentionalPooler, TextTransformer
    from timm.models.vision_transformer import VisionTransformer

    heads, visual = width // 64, ConchVision()
    visual.trunk = VisionTransformer(448, embed_dim=width, depth=layers, num_heads=heads,
                                     num_classes=0, dynamic_img_size=True)
    visual.attn_pool_contrast = AttentionalPooler(512, width, n_queries=1)
    visual.ln_contrast = nn.LayerNorm(512)
    visual.proj_contrast = nn.Parameter(torch.randn(512, 512) / 512 ** 0.5)
    text = TextTransformer(127, 32007, width, heads, layers, output_dim=512, embed_cls=True)
    # The last of 128 columns keeps the place of the class embedding (cls) that open_clip appends.
    # Its mask is off by one: key j is seen where token j - 1 is no pad, so the cls sees the first
    # pad and not itself. The weights were trained so.
    text.register_forward_pre_hook(lambda module, args: args[0][:, :-1])
    return nn.ModuleDict({"visual": visual, "text": text})


class ConchVision(nn.Module):
    def forward(self, images: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 512), not normalised
        tokens = self.trunk.forward_features(images)  # (B, 1 + patches, width)
        return self.ln_contrast(self.attn_pool_contrast(tokens)[:, 0]) @ self.proj_contrast


class ConchTokenizer:
    """list[str] -> LongTensor (B, 128): up to 127 tokens, then zeros. Byte-level BPE; path: its
    vocabulary and merges, by default the published file."""

    def __init__(self, path=None):
        import regex
        from open_clip.tokenizer import bytes_to_unicode
        file = json.loads(Path(path or conch_tokenizer_file()).read_bytes())
        self.vocab = file["model"]["vocab"]
        self.rank = {tuple(pair.split(" ")): i for i, pair in enumerate(file["model"]["merges"])}
        self.special = regex.compile(  # any one of them
            r"(\L<names>)", names=[token["content"] for token in file["added_tokens"]])
        self.words = regex.compile(  # GPT-2's
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        self.symbols = bytes_to_unicode()  # byte -> printable character

    def __call__(self, texts: list[str]) -> Tensor:
        rows = torch.zeros(len(texts), 128, dtype=torch.long)
        for row, text in zip(rows, texts):
            ids = [1]  # <start_of_text>
            for i, segment in enumerate(self.special.split(text)):  # texts and tokens by turns
                ids += [self.vocab[segment]] if i % 2 else self.encode(segment)
            ids = ids[:126] + [2]  # <end_of_text>
            row[:len(ids)] = torch.tensor(ids)
        return rows

    def encode(self, text: str) -> list[int]:
        # No accents (NFD without marks); lower case, character by character
        text = "".join(letter.lower() for letter in unicodedata.normalize("NFD", text)
                       if unicodedata.category(letter)[0] != "M")
        text = text if text[:1] in ("", " ") else " " + text
        return [id for word in self.words.findall(text) for id in self.merge(word)]

    @cache
    def merge(self, word: str) -> list[int]:
        """Byte-pair encoding: the neighbours of lowest rank are joined until no pair is known."""
        symbols = [self.symbols[byte] for byte in word.encode()]
        while known := [(self.rank[pair], i) for i, pair in enumerate(zip(symbols, symbols[1:]))
                        if pair in self.rank]:
            _, i = min(known)
            symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
        return [self.vocab[symbol] for symbol in symbols]


def conch_tokenizer_file(
        url="https://raw.githubusercontent.com/mahmoodlab/CONCH/main/conch/open_clip_custom/"
            "tokenizers/conch_byte_level_bpe_uncased.json",
        sha256="a3861e67c64d32670eb6725a8e52d7dbdd2a06646a4a3c7463052ae7110760fb") -> Path:
    """The published tokenizer file (CC BY-NC-ND 4.0), from torch.hub's cache or the network."""
    path = Path(torch.hub.get_dir(), Path(url).name)
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        except (OSError, RuntimeError) as error:  # offline; another hash
            raise ValueError(f"tokenizer: put {url} at {path}: {error}") from None
    return path
