"""Pair tiles with reports they never came with: each gets the report of highest cosine under CLIP.

    from pairing import load_clip, embed_images, embed_texts, nearest_text
    clip = load_clip("conch")  # or "quilt", any open_clip id, "local-dir:folder"
    index, similarity = nearest_text(embed_images(clip, tiles), embed_texts(clip, reports))

Travels alone. psi of the paper: with v_i the CLIP feature of tile i and t_j that of report j, both
of length 1, psi(i) = argmax_j <v_i, t_j>. It sees no labels; one report may serve many tiles.

CONCH: Lu et al. 2024, "A visual-language foundation model for computational pathology", Nature
Medicine. QuiltNet: Ikezogwo et al. 2023, arXiv 2306.11207.
"""
import hashlib
import json
import logging
import os
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm


@torch.no_grad()
def nearest_text(image_emb: Tensor, text_emb: Tensor, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """psi: the report of highest cosine for every tile, (index LongTensor (N,), similarity (N,)).

    image_emb (N, dim), text_emb (M, dim), of length 1; of equal cosines the first wins. Raises
    ValueError for features that do not fit together, are not finite, or where there are none.
    """
    if image_emb.shape[1:] != text_emb.shape[1:] or text_emb.ndim != 2 or len(text_emb) == 0:
        raise ValueError(f"nearest_text: expected (N, dim) and (M > 0, dim), got "
                         f"{tuple(image_emb.shape)} and {tuple(text_emb.shape)}")
    n, text_emb, device = len(image_emb), text_emb.float(), text_emb.device
    # one block is written over and over: there is no N x M matrix, and memory stays flat
    cosine = torch.empty(min(chunk, n), len(text_emb), device=device)  # (chunk, M)
    index = torch.empty(n, dtype=torch.long, device=device)  # (N,)
    similarity = torch.empty(n, device=device)  # (N,)
    for start in range(0, n, chunk):
        images = image_emb[start:start + chunk].float().to(device)
        rows = slice(start, start + len(images))
        torch.mm(images, text_emb.T, out=cosine[:len(images)])
        torch.max(cosine[:len(images)], dim=1, out=(similarity[rows], index[rows]))
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
    from clip.preprocess, or a tuple that begins with one: labels are not read."""
    loader = torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers,
                                         pin_memory=clip.device.type == "cuda")
    features = []
    for batch in tqdm(loader, "embed tiles", leave=False, disable=None):
        images = batch[0] if isinstance(batch, (tuple, list)) else batch  # (B, 3, H, W)
        features.append(clip.encode_image(images.to(clip.device, non_blocking=True)))
    return torch.cat(features).cpu()


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
    "conch": None,  # open_clip has no such architecture: load_conch
    "quilt": ("hf-hub:wisdomik/QuiltNet-B-32", "ViT-B-32"),
    "quilt16": ("hf-hub:wisdomik/QuiltNet-B-16", "ViT-B-16"),
}


def load_clip(name: str, weights=None, tokenizer=None, device="cpu") -> Clip:
    """A CLIP model, frozen, in eval mode. Raises ValueError where it cannot be had.

    name: a key of CLIPS, "hf-hub:org/model", "local-dir:folder" or "ViT-B-32/openai"; weights: a
    local checkpoint or "none" (random); tokenizer: CONCH's tokenizer file, unused by other models.
    """
    logging.disable(logging.WARNING)  # open_clip's "initialized randomly": so it was asked for
    try:
        if name == "conch":
            model, preprocess, tokenize = load_conch(weights, tokenizer)
        else:
            model, preprocess, tokenize = load_open_clip(name, weights)
    except Exception as error:  # open_clip and the hub raise of all kinds
        local = f" --clip-weights {weights}" if weights else ""
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"--clip-model {name}{local}: could not be loaded ({type(error).__name__}: {reason})\n"
            f"choose {', '.join(CLIPS)}, hf-hub:org/model, local-dir:folder or ViT-B-32/openai, or "
            "give --clip-weights FILE; conch needs access from https://huggingface.co/MahmoodLab/"
            "CONCH and `hf auth login`") from None
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

    model_id, architecture = CLIPS.get(name, (name, name))
    if weights:  # then quilt needs nothing from the hub
        model_id = architecture
    tag, tokenizer_id = "", None
    if model_id.startswith("hf-hub:"):  # its folder in the hub's cache is a local-dir
        repo, _, revision = model_id.removeprefix("hf-hub:").partition("@")
        config = Path(hf_hub_download(repo, "open_clip_config.json", revision=revision or None))
        if "hf_tokenizer_name" in harmless_config(config)["text_cfg"]:
            tokenizer_id = model_id  # that one lies elsewhere
        if not weights:
            open_clip.pretrained.download_pretrained_from_hf(repo, revision=revision or None)
        model_id = f"local-dir:{config.parent}"
    elif model_id.startswith("local-dir:"):
        harmless_config(Path(model_id.removeprefix("local-dir:"), "open_clip_config.json"))
    else:
        model_id, _, tag = model_id.partition("/")
    known = open_clip.get_pretrained_cfg(model_id, tag)
    images = {f"image_{key}": known.get(key)
              for key in ("mean", "std", "interpolation", "resize_mode")}
    # force_custom_text keeps the text tower a module of its own, as LoRA and training need it
    model, _, preprocess = open_clip.create_model_and_transforms(
        model_id, None if weights else tag, load_weights=not weights,
        require_pretrained=not weights, force_custom_text=True, pretrained_text=False,
        force_quick_gelu=known.get("quick_gelu", False), **images)
    if weights not in (None, "none"):
        open_clip.load_checkpoint(model, weights)
    return model, preprocess, open_clip.get_tokenizer(tokenizer_id or model_id)


def harmless_config(path: Path) -> dict:
    """The model_cfg of an open_clip_config.json. Raises ValueError where it lets transformers run
    code from files, or sends timm to another place."""
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
    """list[str] -> LongTensor (B, 128): <start_of_text>, up to 125 tokens, <end_of_text>, zeros.

    path: CONCH's file of byte-level BPE, by default the published one; read with the first text.
    """

    def __init__(self, path=None):
        self.path, self.vocab, self.merged = path, {}, {}

    def __call__(self, texts: list[str]) -> Tensor:
        if not self.vocab:
            self.read()
        start, end = self.special["<start_of_text>"], self.special["<end_of_text>"]
        rows = torch.zeros(len(texts), 128, dtype=torch.long)
        for row, text in zip(rows, texts):
            ids = [start, *self.encode(text)[:125], end]
            row[:len(ids)] = torch.tensor(ids)
        return rows

    def encode(self, text: str) -> list[int]:
        ids = []
        for segment in self.segments.split(text):
            if segment in self.special:
                ids.append(self.special[segment])
                continue
            # lower case, character by character, and no accents: NFD without marks
            segment = "".join(letter.lower() for letter in unicodedata.normalize("NFD", segment)
                              if not unicodedata.category(letter).startswith("M"))
            if segment and not segment.startswith(" "):
                segment = " " + segment
            for word in self.words.findall(segment):
                if word not in self.merged:
                    self.merged[word] = self.merge(word)
                ids += self.merged[word]
        return ids

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
        merges, self.vocab = file["model"]["merges"], file["model"]["vocab"]
        self.rank = {tuple(pair.split(" ")): i for i, pair in enumerate(merges)}
        self.special = {token["content"]: token["id"] for token in file["added_tokens"]}
        self.segments = regex.compile("(" + "|".join(map(regex.escape, self.special)) + ")")
        self.words = regex.compile(  # GPT-2's
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        self.symbols = bytes_to_unicode()  # byte -> printable character, GPT-2's too


CONCH_TOKENIZER = ("https://raw.githubusercontent.com/mahmoodlab/CONCH/main/conch/open_clip_custom/"
                   "tokenizers/conch_byte_level_bpe_uncased.json",  # a branch, pinned by its sha256
                   "a3861e67c64d32670eb6725a8e52d7dbdd2a06646a4a3c7463052ae7110760fb")


def conch_tokenizer_file() -> Path:
    """The published tokenizer file (CC BY-NC-ND 4.0), downloaded unless it lies in the cache."""
    url, sha256 = CONCH_TOKENIZER
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(cache, "clip-it", Path(url).name)
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        except (OSError, RuntimeError) as error:  # no connection; another file than expected
            raise ValueError(f"--clip-model conch: its tokenizer could not be downloaded: {error}\n"
                             f"put {url} at {path}, or take --clip-model quilt") from None
    return path
