"""Pair tiles with reports they never came with: each gets the report of highest cosine by CLIP.

    from pairing import load_clip, embed_images, embed_texts, nearest_text
    clip = load_clip("conch")  # or "quilt", any open_clip id, "local-dir:folder"
    index, similarity = nearest_text(embed_images(clip, tiles), embed_texts(clip, reports))

Travels alone. psi of the paper: with v_i the CLIP feature of tile i and t_j that of report j,
psi(i) = argmax_j cos(v_i, t_j). It sees no labels; one report may serve many tiles.

CONCH: Lu et al. 2024, "A visual-language foundation model for computational pathology", Nature
Medicine. QuiltNet: Ikezogwo et al. 2023, arXiv 2306.11207.
"""
import hashlib
import json
import logging
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
    """psi: the report of highest cosine for every tile, (index LongTensor (N,), similarity (N,)).

    image_emb (N, dim), text_emb (M, dim), of length 1; the first of equal cosines wins. ValueError
    for features that do not fit together or are not finite, and for no reports.
    """
    if image_emb.shape[1:] != text_emb.shape[1:] or text_emb.ndim != 2 or len(text_emb) == 0:
        raise ValueError(f"nearest_text: expected (N, dim) and (M > 0, dim), got "
                         f"{tuple(image_emb.shape)} and {tuple(text_emb.shape)}")
    n, text_emb, device = len(image_emb), text_emb.float(), text_emb.device
    # Written over for each chunk: there is no N x M matrix, and memory stays flat
    cosine = torch.empty(min(chunk, n), len(text_emb), device=device)  # (chunk, M)
    index = torch.empty(n, dtype=torch.long, device=device)  # (N,)
    similarity = torch.empty(n, device=device)  # (N,)
    for start in range(0, n, chunk):
        rows = slice(start, start + chunk)
        images = image_emb[rows].float().to(device)
        block = cosine[:len(images)]
        torch.mm(images, text_emb.T, out=block)
        torch.max(block, dim=1, out=(similarity[rows], index[rows]))
    if not similarity.isfinite().all():
        raise ValueError("nearest_text: the features hold NaN or infinity")
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
    """(N, dim) fp32 features of length 1, in order, on the CPU. An item of `dataset` is an image
    from clip.preprocess or a tuple that begins with one; labels are not read."""
    features = []
    loader = torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers)
    for images in tqdm(loader, "embed tiles", leave=False, disable=None):
        if not isinstance(images, Tensor):
            images = images[0]  # (B, 3, H, W)
        features.append(clip.encode_image(images.to(clip.device)).cpu())
    return torch.cat(features)


@torch.no_grad()
def embed_texts(clip: Clip, texts: list[str], batch_size: int = 64) -> Tensor:
    """(M, dim) fp32 features of length 1, in order, on the CPU."""
    features = []
    for start in tqdm(range(0, len(texts), batch_size), "embed reports", leave=False, disable=None):
        tokens = clip.tokenize(texts[start:start + batch_size])  # (B, L)
        features.append(clip.encode_text(tokens.to(clip.device)).cpu())
    return torch.cat(features)


# ---- Models by name -----------------------------------------------------------------------------

CLIPS = {  # short name: hub id, open_clip's name of the architecture
    "conch": None,  # not one of open_clip's: load_conch
    "quilt": ("hf-hub:wisdomik/QuiltNet-B-32", "ViT-B-32"),
    "quilt16": ("hf-hub:wisdomik/QuiltNet-B-16", "ViT-B-16"),
}


def load_clip(name: str, weights=None, tokenizer=None, device="cpu") -> Clip:
    """A CLIP model, frozen, in eval mode. Raises ValueError where it cannot be had.

    name: a key of CLIPS, "hf-hub:org/model", "local-dir:folder" or "ViT-B-32/openai"; weights: a
    local checkpoint or "none" (random); tokenizer: CONCH's tokenizer file.
    """
    logging.disable(logging.WARNING)  # open_clip's "initialized randomly": so it was asked for
    try:
        if name == "conch":
            model, preprocess, tokenize = load_conch(weights, tokenizer)
        else:
            model, preprocess, tokenize = load_open_clip(name, weights)
    except Exception as error:  # open_clip and the hub raise of all kinds
        flags = f"--clip-model {name}" + (f" --clip-weights {weights}" if weights else "")
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{flags}: could not be loaded ({type(error).__name__}: {reason})\n"
            f"choose {', '.join(CLIPS)}, hf-hub:org/model, local-dir:folder or ViT-B-32/openai, or "
            "give --clip-weights FILE; conch: ask at https://huggingface.co/MahmoodLab/CONCH, then "
            "`hf auth login`") from None
    finally:
        logging.disable(logging.NOTSET)
    model.eval().requires_grad_(False).to(device)
    model.text.output_tokens = model.visual.output_tokens = False  # CoCa: the pooled feature alone
    return Clip(name, model.text.output_dim, model.visual, model.text, preprocess, tokenize,
                torch.device(device))


def load_open_clip(name: str, weights=None):
    """(model, preprocess, tokenize) of an open_clip model."""
    import open_clip
    from huggingface_hub import hf_hub_download
    from open_clip.transform import PreprocessCfg, image_transform_v2

    source, architecture = CLIPS.get(name, (name, name))
    if weights:  # then quilt needs nothing from the hub
        source = architecture
    kind, _, place = source.partition(":")
    tag, tokenizer = "", None
    if kind == "hf-hub":  # its folder in the hub's cache is a local-dir
        repo, _, revision = place.partition("@")
        config = Path(hf_hub_download(repo, "open_clip_config.json", revision=revision or None))
        if "hf_tokenizer_name" in harmless_config(config)["text_cfg"]:
            tokenizer = source  # that one lies elsewhere
        if not weights:
            open_clip.pretrained.download_pretrained_from_hf(repo, revision=revision or None)
        source = f"local-dir:{config.parent}"
    elif kind == "local-dir":
        harmless_config(Path(place, "open_clip_config.json"))
    else:
        source, _, tag = source.partition("/")
    known = open_clip.get_pretrained_cfg(source, tag)  # of the tag: activation, mean, std ...
    # force_custom_text keeps the text tower a module of its own, as LoRA and training need it
    model = open_clip.create_model(
        source, None if weights else tag, load_weights=not weights, require_pretrained=not weights,
        force_custom_text=True, pretrained_text=False, force_preprocess_cfg=known,
        force_quick_gelu=known.get("quick_gelu", False))
    if weights not in (None, "none"):
        open_clip.load_checkpoint(model, weights)
    preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    return model, preprocess, open_clip.get_tokenizer(tokenizer or source)


def harmless_config(path: Path) -> dict:
    """The model_cfg of a file. ValueError where it runs code from files or sends timm elsewhere."""
    config = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
    if "trust_remote_code" in json.dumps(config):  # in tokenizer_kwargs, or deeper
        raise ValueError(f"{path} sets trust_remote_code: no code is run from files")
    if ":" in str(config["vision_cfg"].get("timm_model_name")):
        raise ValueError(f"{path}: timm_model_name is not the plain name of an architecture")
    return config


# ---- CONCH --------------------------------------------------------------------------------------
# Its package needs transformers 4 and a pinned timm. These towers, under the checkpoint's names,
# and this tokenizer equal the package's (tests/test_conch.py).

def load_conch(weights=None, tokenizer=None):
    """(model, preprocess, tokenize) of CONCH."""
    from huggingface_hub import hf_hub_download
    from open_clip import image_transform
    from timm.models import load_state_dict

    weights = weights or hf_hub_download("MahmoodLab/CONCH", "pytorch_model.bin")
    model = build_conch()
    if weights != "none":
        state = load_state_dict(str(weights), weights_only=True)  # unwraps it, strips "module."
        unused = "text_decoder.", "visual.attn_pool_caption.", "visual.ln_caption.", "logit_scale"
        model.load_state_dict({key: x for key, x in state.items() if not key.startswith(unused)})
    return model, image_transform(448, is_train=False), ConchTokenizer(tokenizer)


def build_conch(width: int = 768, layers: int = 12) -> nn.Module:
    """CONCH's two towers with random weights: module.visual, module.text."""
    from open_clip.transformer import TextTransformer

    class ConchText(TextTransformer):
        def forward(self, tokens: Tensor) -> Tensor:  # (B, 128) -> (B, 512), not normalised
            # The last column keeps the place of the class embedding (cls), which open_clip appends.
            # Its mask of the keys is off by one: key j is seen where token j - 1 is no pad, so the
            # cls sees the first pad and not itself. The weights were trained with this.
            return super().forward(tokens[:, :-1])

    model = nn.Module()
    model.visual = ConchVision(width, layers)
    model.text = ConchText(127, 32007, width, width // 64, layers, output_dim=512, embed_cls=True)
    return model


class ConchVision(nn.Module):
    """Images (B, 3, H, W) -> (B, 512), not normalised: a ViT whose tokens one query pools."""

    def __init__(self, width: int, layers: int):
        from open_clip.transformer import AttentionalPooler
        from timm.models.vision_transformer import VisionTransformer
        super().__init__()
        self.trunk = VisionTransformer(448, embed_dim=width, depth=layers, num_heads=width // 64,
                                       num_classes=0, dynamic_img_size=True)
        self.attn_pool_contrast = AttentionalPooler(512, width, n_queries=1)
        self.ln_contrast = nn.LayerNorm(512)
        self.proj_contrast = nn.Parameter(torch.randn(512, 512) / 512 ** 0.5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.trunk.forward_features(images)  # (B, 1 + patches, width)
        return self.ln_contrast(self.attn_pool_contrast(tokens)[:, 0]) @ self.proj_contrast


class ConchTokenizer:
    """list[str] -> LongTensor (B, 128): up to 127 tokens, then zeros. path: CONCH's file of
    byte-level BPE, by default the published one; read with the first text."""

    def __init__(self, path=None):
        self.path, self.vocab = path, {}

    def __call__(self, texts: list[str]) -> Tensor:
        if not self.vocab:
            self.read()
        rows = torch.zeros(len(texts), 128, dtype=torch.long)
        for row, text in zip(rows, texts):
            ids = [1, *self.encode(text)[:125], 2]  # between <start_of_text> and <end_of_text>
            row[:len(ids)] = torch.tensor(ids)
        return rows

    def encode(self, text: str) -> list[int]:
        ids = []
        for segment in self.segments.split(text):
            if segment in self.special:
                ids.append(self.vocab[segment])
                continue
            # lower case, character by character, and no accents: NFD without marks
            segment = "".join(letter.lower() for letter in unicodedata.normalize("NFD", segment)
                              if not unicodedata.category(letter).startswith("M"))
            if segment and not segment.startswith(" "):
                segment = " " + segment
            for word in self.words.findall(segment):
                ids += self.merge(word)
        return ids

    @cache
    def merge(self, word: str) -> list[int]:
        """Byte-pair encoding: the neighbours of lowest rank are joined until no pair is known."""
        symbols = [self.symbols[byte] for byte in word.encode()]
        while len(symbols) > 1:
            ranks = [self.rank.get(pair, len(self.rank)) for pair in zip(symbols, symbols[1:])]
            if min(ranks) == len(self.rank):
                break
            i = ranks.index(min(ranks))
            symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
        return [self.vocab[symbol] for symbol in symbols]

    def read(self) -> None:
        import regex
        from open_clip.tokenizer import bytes_to_unicode
        file = json.loads(Path(self.path or conch_tokenizer_file()).read_text(encoding="utf-8"))
        self.vocab, merges = file["model"]["vocab"], file["model"]["merges"]
        self.rank = {tuple(pair.split(" ")): i for i, pair in enumerate(merges)}
        self.special = [token["content"] for token in file["added_tokens"]]
        self.segments = regex.compile("(" + "|".join(map(regex.escape, self.special)) + ")")
        self.words = regex.compile(  # GPT-2's
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        self.symbols = bytes_to_unicode()  # byte -> printable character, GPT-2's too


CONCH_TOKENIZER = (  # of a branch, pinned by its sha256
    "https://raw.githubusercontent.com/mahmoodlab/CONCH/main/conch/open_clip_custom/tokenizers/"
    "conch_byte_level_bpe_uncased.json",
    "a3861e67c64d32670eb6725a8e52d7dbdd2a06646a4a3c7463052ae7110760fb")


def conch_tokenizer_file() -> Path:
    """The published tokenizer file (CC BY-NC-ND 4.0), from torch.hub's cache or the network."""
    url, sha256 = CONCH_TOKENIZER
    path = Path(torch.hub.get_dir(), Path(url).name)
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
    except (OSError, RuntimeError) as error:  # no connection; another file than expected
        raise ValueError(f"--clip-model conch: could not download its tokenizer: {error}\n"
                         f"put {url} at {path}, or take --clip-model quilt") from None
    return path
