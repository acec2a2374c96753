"""Pair tiles with reports they never came with: each gets the report of highest cosine under CLIP.

    from pairing import load_clip, embed_images, embed_texts, nearest_text
    clip = load_clip("conch")  # or "quilt", any open_clip id, "local-dir:folder"
    index, similarity = nearest_text(embed_images(clip, tiles), embed_texts(clip, reports))

Travels alone; pairing two tensors needs torch alone. The pairing is psi of the paper: with v_i the
CLIP feature of tile i and t_j that of report j, both of length 1, psi(i) = argmax_j <v_i, t_j>. It
sees no labels; one report may serve many tiles, another none.

CONCH: Lu et al. 2024, "A visual-language foundation model for computational pathology", Nature
Medicine, here without its captioning parts. QuiltNet: Ikezogwo et al. 2023, arXiv 2306.11207.
"""
import json
import logging
import os
import unicodedata
from collections import OrderedDict
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

    image_emb (N, dim), text_emb (M, dim), of length 1; of equal cosines the first wins. No N x M
    matrix exists: a block of chunk x M is written over and over, and memory stays flat. Raises
    ValueError for features that do not fit together, are not finite, or where there are none.
    """
    if image_emb.shape[1:] != text_emb.shape[1:] or text_emb.ndim != 2 or len(text_emb) == 0:
        raise ValueError(f"nearest_text: expected (N, dim) and (M > 0, dim), got "
                         f"{tuple(image_emb.shape)} and {tuple(text_emb.shape)}")
    n, text_emb, device = len(image_emb), text_emb.float(), text_emb.device
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

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.image_tower(images).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.text_tower(tokens).float(), dim=-1)

    @property
    def device(self):
        return next(self.text_tower.parameters()).device


@torch.no_grad()
def embed_images(clip: Clip, dataset, batch_size: int = 64, workers: int = 0) -> Tensor:
    """(N, dim) fp32 features of length 1, in the data set's order, on the CPU. dataset: item i is
    an image that clip.preprocess has made, or a tuple that begins with one: labels are not read."""
    loader = torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers,
                                         pin_memory=clip.device.type == "cuda")
    features = []
    for batch in tqdm(loader, "embed tiles", leave=False, disable=None):
        images = batch[0] if isinstance(batch, (tuple, list)) else batch  # (B, 3, H, W)
        features.append(clip.encode_image(images.to(clip.device, non_blocking=True)))
    return torch.cat(features).cpu()


@torch.no_grad()
def embed_texts(clip: Clip, texts: list[str], batch_size: int = 64) -> Tensor:
    """(M, dim) fp32 features of length 1, on the CPU."""
    features = []
    for start in tqdm(range(0, len(texts), batch_size), "embed reports", leave=False, disable=None):
        tokens = clip.tokenize(texts[start:start + batch_size])  # (B, L)
        features.append(clip.encode_text(tokens.to(clip.device)).cpu())
    return torch.cat(features)


# ---- Models by name -----------------------------------------------------------------------------

CLIPS = {  # short names: hub id, open_clip's name of the architecture; other names go to open_clip
    "conch": ("hf-hub:MahmoodLab/CONCH", None),  # open_clip has no such architecture: build_conch
    "quilt": ("hf-hub:wisdomik/QuiltNet-B-32", "ViT-B-32"),
    "quilt16": ("hf-hub:wisdomik/QuiltNet-B-16", "ViT-B-16"),
}


def load_clip(name: str, weights=None, tokenizer=None, device="cpu") -> Clip:
    """A CLIP model in eval mode, frozen.

    name: a key of CLIPS or any open_clip id: "hf-hub:org/model", "local-dir:folder",
    "ViT-B-32/openai"; weights: a local checkpoint instead of the published one, "none" for random
    weights; tokenizer: of conch alone, its local tokenizer file instead of the published one.
    Raises ValueError in words for the command line where it cannot be had.
    """
    import open_clip

    try:
        if name == "conch":
            weights = weights or hub_file(CLIPS[name][0], "pytorch_model.bin")
            model, tokenize = build_conch(), ConchTokenizer(tokenizer)
            preprocess = open_clip.image_transform(448, is_train=False)  # bicubic, OpenAI's mean
            if weights != "none":
                load_conch(model, weights)
        else:
            model, preprocess, tokenize = load_open_clip(name, weights)
    except Exception as error:  # open_clip and the hub raise of all kinds
        raise ValueError(
            f"--clip-model {name}{f' --clip-weights {weights}' if weights else ''}: could not be "
            f"loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]})\nchoose "
            f"{', '.join(CLIPS)}, hf-hub:org/model, local-dir:folder or ViT-B-32/openai, or give "
            "--clip-weights FILE; conch is gated: ask for access on https://huggingface.co/"
            "MahmoodLab/CONCH, then `hf auth login`") from None
    model.eval().requires_grad_(False).to(device)
    model.text.output_tokens = False  # of CoCa models: the pooled feature alone
    return Clip(name, model.text.output_dim, model.visual, model.text, preprocess, tokenize)


def load_open_clip(name: str, weights=None):
    """(model, preprocess, tokenize) of an open_clip model."""
    import open_clip

    model_id, architecture = CLIPS.get(name, (name, None))
    tag = ""
    if architecture and weights:  # then nothing is needed from the hub
        model_id = architecture
    if ":" not in model_id:
        model_id, _, tag = model_id.partition("/")
    tokenizer_id, known = model_id, open_clip.get_pretrained_cfg(model_id, tag)
    if model_id.startswith("hf-hub:"):  # its folder in the hub's cache is a local-dir
        config = hub_file(model_id, "open_clip_config.json")
        if not weights:
            hub_file(model_id, "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        model_id = f"local-dir:{Path(config).parent}"
        text = json.loads(Path(config).read_text())["model_cfg"]["text_cfg"]
        if "hf_tokenizer_name" not in text:  # that one lies elsewhere
            tokenizer_id = model_id
    images = {f"image_{key}": known.get(key)
              for key in ("mean", "std", "interpolation", "resize_mode")}
    logging.disable(logging.WARNING)  # "initialized randomly": so it was asked for
    try:
        # force_custom_text keeps the text tower a module of its own, as LoRA and training need it
        model, _, preprocess = open_clip.create_model_and_transforms(
            model_id, None if weights else tag, load_weights=not weights,
            require_pretrained=not weights, force_custom_text=True, pretrained_image=False,
            pretrained_text=False, force_quick_gelu=known.get("quick_gelu", False), **images)
    finally:
        logging.disable(logging.NOTSET)
    if weights not in (None, "none"):
        open_clip.load_checkpoint(model, weights, strict=True)
    return model, preprocess, open_clip.get_tokenizer(tokenizer_id)


def hub_file(repo: str, *names: str) -> str:
    """The local path of the first of the files `names` that a Hugging Face repository ("org/model",
    with "hf-hub:" before it or "@revision" behind it) holds, downloaded once."""
    from huggingface_hub import errors, hf_hub_download

    repo, _, revision = repo.removeprefix("hf-hub:").partition("@")
    for name in names:
        try:
            return hf_hub_download(repo, name, revision=revision or None)
        except errors.EntryNotFoundError as error:
            missing = error
    raise missing


# ---- CONCH --------------------------------------------------------------------------------------
# Its package needs transformers 4 and a pinned timm. Its two towers, under the checkpoint's names,
# and its tokenizer are all that pairing takes; they equal the package's (tests/test_conch.py).

class ConchVision(nn.Module):
    """Images (B, 3, H, W) -> (B, dim), not normalised: a ViT, a query to its tokens, a projection."""

    def __init__(self, image_size: int, patch: int, width: int, layers: int, heads: int, dim: int):
        from open_clip.transformer import AttentionalPooler
        from timm.models.vision_transformer import VisionTransformer
        super().__init__()
        self.trunk = VisionTransformer(image_size, patch, embed_dim=width, depth=layers,
                                       num_heads=heads, num_classes=0, dynamic_img_size=True)
        self.attn_pool_contrast = AttentionalPooler(dim, width, n_head=8, n_queries=1)
        self.ln_contrast = nn.LayerNorm(dim)
        self.proj_contrast = nn.Parameter(dim ** -0.5 * torch.randn(dim, dim))

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.trunk.forward_features(images)  # (B, 1 + patches, width)
        return self.ln_contrast(self.attn_pool_contrast(tokens)[:, 0]) @ self.proj_contrast


class ConchBlock(nn.Module):
    """A pre-norm transformer block, x (B, L, width) -> (B, L, width)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)  # for its parameters and their names alone
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(),
                                             c_proj=nn.Linear(4 * width, width)))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """mask (B, 1, L, L): True where a query (row) sees a key (column)."""
        qkv = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, heads, L, width / heads)
        x = x + self.attn.out_proj(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class ConchText(nn.Module):
    """Tokens (B, positions) -> (B, dim), not normalised: a causal transformer that is read at a
    class embedding behind the tokens. Batch-first, unlike open_clip's, which takes far longer."""

    def __init__(self, positions: int, vocab: int, width: int, heads: int, layers: int, dim: int):
        super().__init__()
        self.output_dim = dim
        self.token_embedding = nn.Embedding(vocab, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(positions, width))
        self.cls_emb = nn.Parameter(0.01 * torch.randn(width))
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(ConchBlock(width, heads) for _ in range(layers))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width ** -0.5 * torch.randn(width, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens[:, :-1]  # the last column is a placeholder for the class embedding
        # what lies behind the longest report and one pad is seen by no class embedding: cut off
        used = int((tokens != 0).any(dim=0).nonzero().max()) + 2
        tokens, position = tokens[:, :used], self.positional_embedding
        position = torch.cat([position[:tokens.shape[1]], position[-1:]])
        cls = self.cls_emb.expand(len(tokens), 1, -1)
        x = torch.cat([self.token_embedding(tokens), cls], dim=1) + position  # (B, L, width)
        # The mask of the keys is off by one: key j is seen where token j - 1 is no pad, so the cls
        # sees the first pad and not itself. The published weights were trained with this.
        keys = torch.cat([torch.ones_like(tokens[:, :1]), tokens], dim=1) != 0  # (B, L)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        mask = keys[:, None, None] & causal  # (B, 1, L, L)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        return self.ln_final(x[:, -1]) @ self.text_projection


def build_conch(image_size=448, patch=16, width=768, layers=12, heads=12, dim=512, vocab=32007,
                positions=128) -> nn.Module:
    """CONCH's two towers with random weights: module.visual, module.text. The sizes are CONCH's."""
    model = nn.Module()
    model.visual = ConchVision(image_size, patch, width, layers, heads, dim)
    model.text = ConchText(positions, vocab, width, heads, layers, dim)
    return model


def load_conch(model: nn.Module, path) -> None:
    """CONCH's checkpoint into build_conch's towers; of its keys only those that pairing does not
    use may be absent. Raises RuntimeError that names keys which are missing, unknown, misshapen."""
    from timm.models import load_state_dict
    state = load_state_dict(str(path), weights_only=True)  # unwraps "state_dict", strips "module."
    unused = ("text_decoder.", "visual.attn_pool_caption.", "visual.ln_caption.", "logit_scale")
    model.load_state_dict({key: x for key, x in state.items() if not key.startswith(unused)})


class ConchTokenizer:
    """list[str] -> LongTensor (B, 128): CONCH's byte-level BPE without transformers.

    path: its tokenizer file, None for the published one (downloaded once); read with the first
    text. A row: <start_of_text>, up to 125 tokens, <end_of_text>, zeros; the last is the cls's 0.
    """

    def __init__(self, path=None):
        self.path, self.merged = path, {}

    def read(self) -> None:
        import regex
        from open_clip.tokenizer import bytes_to_unicode
        path = self.path or conch_tokenizer_file()
        try:
            file = json.loads(Path(path).read_text(encoding="utf-8"))
            self.vocab = file["model"]["vocab"]
            self.special = {token["content"]: token["id"] for token in file["added_tokens"]}
            merges = file["model"]["merges"]
            self.rank = {tuple(pair.split(" ")): i for i, pair in enumerate(merges)}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not CONCH's tokenizer file ({error})") from None
        self.segments = regex.compile("(" + "|".join(map(regex.escape, self.special)) + ")")
        self.words = regex.compile(  # GPT-2's
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        self.symbols = bytes_to_unicode()  # byte -> printable character, GPT-2's too

    def __call__(self, texts: list[str]) -> Tensor:
        if not hasattr(self, "vocab"):
            self.read()
        start, end = self.special["<start_of_text>"], self.special["<end_of_text>"]
        rows = torch.zeros(len(texts), 128, dtype=torch.long)
        for row, text in zip(rows, texts):
            ids = [start, *self.encode(text)[:125], end]
            row[:len(ids)] = torch.tensor(ids)
        return rows

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start and end."""
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
                ids += self.merge(word)
        return ids

    def merge(self, word: str) -> list[int]:
        """Byte-pair encoding: the neighbours of lowest rank are joined until no pair is known."""
        if word not in self.merged:
            symbols = [self.symbols[byte] for byte in word.encode()]
            while len(symbols) > 1:
                ranks = [self.rank.get(pair, len(self.rank)) for pair in zip(symbols, symbols[1:])]
                if min(ranks) == len(self.rank):
                    break
                i = ranks.index(min(ranks))
                symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
            self.merged[word] = [self.vocab[symbol] for symbol in symbols if symbol in self.vocab]
        return self.merged[word]


CONCH_TOKENIZER = ("https://raw.githubusercontent.com/mahmoodlab/CONCH/main/conch/open_clip_custom/"
                   "tokenizers/conch_byte_level_bpe_uncased.json",  # a branch, pinned by its sha256
                   "a3861e67c64d32670eb6725a8e52d7dbdd2a06646a4a3c7463052ae7110760fb")


def conch_tokenizer_file() -> Path:
    """The published tokenizer file (CC BY-NC-ND 4.0), downloaded once into the user's cache folder
    and checked by its sha256. Raises ValueError where it cannot be had."""
    url, sha256 = CONCH_TOKENIZER
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(cache, "clip-it", Path(url).name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        except (OSError, RuntimeError) as error:  # no connection; another file than expected
            raise ValueError("--clip-model conch: its tokenizer file could not be downloaded "
                             f"({error})\nput {url} at {path}, or take --clip-model quilt") from None
    return path
