"""CONCH: towers and tokenizer give the original's numbers; what sets them apart is pinned."""
import hashlib
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

import pairing
from lora import inject_lora
from pairing import ConchTokenizer, build_conch, conch_tokenizer_file, load_clip

SHARED = ROOT.parent / "shared"
TINY = dict(width=64, layers=2)


def shared(name):
    """A file of the folder ../shared, which is no part of the repository."""
    if not (SHARED / name).is_file():
        pytest.skip(f"needs {SHARED / name}, which is not here")
    return SHARED / name


# ---- The original's numbers ---------------------------------------------------------------------

def original_weights(seed):
    """The weights under which conch_expected.json was computed, one draw a key in sorted order."""
    generator, state = torch.Generator().manual_seed(seed), {}
    for line in sorted(shared("facts/conch_keys.tsv").read_text().splitlines()[1:]):
        key, shape, _ = line.split("\t")
        shape = () if shape == "scalar" else tuple(map(int, shape.split("x")))
        r = torch.randn(shape, generator=generator)
        if shape == ():
            state[key] = torch.tensor(2.6593)
        elif key.endswith("bias"):
            state[key] = 0.02 * r
        elif len(shape) == 1 and key.endswith("weight"):
            state[key] = 1 + 0.1 * r
        elif "token_embedding" in key or key.endswith(
                ("query", "cls_emb", "cls_token", "pos_embed", "positional_embedding")):
            state[key] = 0.5 * r
        else:
            state[key] = r * shape[-1] ** -0.5
    return state


def test_features_equal_the_original_package(monkeypatch):
    expected = json.loads(shared("data/conch_expected.json").read_text())
    state = original_weights(expected["seed"])  # in memory: a file of them has 0.8 GB
    monkeypatch.setattr(timm.models, "load_state_dict", lambda path, **settings: state)
    clip = load_clip("conch", "conch.bin", shared("data/conch_byte_level_bpe_uncased.json"))
    white = clip.preprocess(Image.new("L", (600, 500), 255))
    assert clip.dim == 512 and white.shape == (3, 448, 448)
    expected_white = (1 - torch.tensor(OPENAI_CLIP_MEAN)) / torch.tensor(OPENAI_CLIP_STD)
    torch.testing.assert_close(white.mean((1, 2)), expected_white)
    generator = torch.Generator().manual_seed(expected["seed"] + 1)
    with torch.inference_mode():
        got = {"text": clip.encode_text(torch.tensor(expected["tokens"]))}
        for size in (448, 224):
            images = torch.randn(2, 3, size, size, generator=generator)
            got[f"image_{size}"] = clip.encode_image(images[:1])  # one of two shows it
    for name, features in got.items():
        original = torch.tensor(expected[name][:len(features)])
        torch.testing.assert_close(features, original, rtol=0, atol=1e-5)


def test_tokens_equal_the_original_package():
    tokenize = ConchTokenizer(shared("data/conch_byte_level_bpe_uncased.json"))
    texts, ids = zip(*json.loads(shared("data/conch_tokens.json").read_text()))
    assert tokenize(list(texts)).tolist() == list(ids)


# ---- Towers -------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("length", [2, 126, 127])
def test_cls_sees_the_tokens_and_the_first_pad_and_not_itself_nor_the_last_column(length):
    text, masks = build_conch(**TINY).text, []
    # tokens 1 ... n, then zeros; the last of the 128 columns is the placeholder
    tokens = F.pad(torch.arange(1, length + 1), (0, 128 - length))[None]
    expected = text(tokens)
    text.transformer.resblocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attn_mask"]), with_kwargs=True)
    tokens[:, -1] = 7
    assert torch.equal(text(tokens), expected)
    # Only with no pad left, 127 of 127, the cls sees itself
    assert masks[0].shape == (1, 128, 128)
    assert masks[0][0, -1].isfinite().nonzero().flatten().tolist() == list(range(length + 1))


def test_sizes_are_those_of_the_published_file_and_lora_of_the_text_the_authors():
    with torch.device("meta"):
        model = build_conch()
    state = model.state_dict()
    assert len(state) == 314  # without logit_scale
    assert sum(value.numel() for value in state.values()) == 197_958_912
    assert len(inject_lora(model.text, rank=16)) == 1 + 12 * 3
    added = sum(p.numel() for p in model.text.parameters() if p.requires_grad)
    assert added == 524_400 + 1_474_560 + 294_912  # embedding, MLPs, output projections


# ---- Checkpoints --------------------------------------------------------------------------------

@pytest.mark.parametrize("wrap", [
    dict, lambda state: {"state_dict": state},
    lambda state: {f"module.{key}": value for key, value in state.items()}])
def test_checkpoint_may_be_wrapped_and_hold_the_captioning_parts(tmp_path, wrap, monkeypatch,
                                                                 tokenizer_file):
    small = build_conch(**TINY)
    monkeypatch.setattr(pairing, "build_conch", lambda: build_conch(**TINY))
    extra = ("logit_scale", "text_decoder.text_projection", "visual.attn_pool_caption.query",
             "visual.ln_caption.bias")
    state = small.state_dict()
    torch.save(wrap(state | {key: torch.ones(1) for key in extra}), tmp_path / "conch.bin")
    clip = load_clip("conch", tmp_path / "conch.bin", tokenizer_file[0])
    for part, tower in (("visual", clip.image_tower), ("text", clip.text_tower)):
        assert not any(p.requires_grad for p in tower.parameters())
        for key, value in tower.state_dict().items():
            assert torch.equal(value, state[f"{part}.{key}"]), key


# ---- Tokenizer ----------------------------------------------------------------------------------

@pytest.fixture
def tokenizer_file(tmp_path):
    """The format of CONCH's file with five merges, and its vocabulary."""
    special = ["<pad>", "<start_of_text>", "<end_of_text>", "<|date|>"]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable]
    symbols += [chr(256 + i) for i in range(256 - len(printable))]
    merges = ["h e", "l l", "Ġ he", "1 2", "Ġhe ll"]
    words = special + symbols + [merge.replace(" ", "") for merge in merges]
    vocab = {word: i for i, word in enumerate(words)}
    path = tmp_path / "bpe.json"
    path.write_text(json.dumps({
        "added_tokens": [{"id": vocab[word], "content": word} for word in special],
        "model": {"vocab": vocab, "merges": merges}}), encoding="utf-8")
    return path, vocab


@pytest.mark.parametrize("text, symbols", [
    ("hello", ["Ġhell", "o"]),
    (" hello", ["Ġhell", "o"]),                   # one space before the first word, not two
    ("HÉLLO", ["Ġhell", "o"]),                    # no case, no accents
    ("he\u0903llo", ["Ġhell", "o"]),              # Mc is an accent as well as Mn
    ("ΟΣ", ["Ġ", "Î", "¿", "Ï", "ĥ"]),            # lower case by character: no final sigma
    ("\the", ["Ġ", "ĉ", "he"]),                   # a tab is no space: the prefix comes before it
    ("a  he", ["Ġ", "a", "Ġ", "Ġhe"]),
    ("112 he's", ["Ġ", "1", "12", "Ġhe", "'", "s"]),
    ("x<|date|>he", ["Ġ", "x", "<|date|>", "Ġhe"]),  # each segment is a text of its own
    ("<|DATE|>", ["Ġ", "<", "|", "d", "a", "t", "e", "|", ">"]),
    ("", []),
    ("a" * 125, ["Ġ", *"a" * 124]),               # 125 of them at most: the last is cut off
    ("b " * 300, ["Ġ", *"bĠ" * 62]),
], ids=range(13))
def test_byte_pair_encoding(tokenizer_file, text, symbols):
    path, vocab = tokenizer_file
    row = ConchTokenizer(path)([text])[0].tolist()
    assert row[:len(symbols) + 2] == [1, *(vocab[symbol] for symbol in symbols), 2]
    assert len(row) == 128 and row[-1] == 0 and not any(row[len(symbols) + 2:])


def test_tokenizer_file_is_downloaded_once_and_checked(tmp_path, monkeypatch, tokenizer_file):
    published, _ = tokenizer_file
    content, cached = published.read_bytes(), tmp_path / "torch" / "hub" / "bpe.json"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    url, sha256 = published.as_uri(), hashlib.sha256(content).hexdigest()
    published.write_bytes(content[:-1])  # another file
    with pytest.raises(ValueError, match=f"tokenizer: put {url} at {cached}: invalid hash"):
        conch_tokenizer_file(url, sha256)
    assert not list(cached.parent.iterdir())
    for there, here in ((content, None), (content, content[:-1]), (b"", content)):
        published.write_bytes(there)  # what is here is damaged the second time, whole the third
        if here:
            cached.write_bytes(here)
        assert conch_tokenizer_file(url, sha256) == cached and cached.read_bytes() == content
        assert list(cached.parent.iterdir()) == [cached]
