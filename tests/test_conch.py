"""CONCH: towers and tokenizer give the original's numbers; what sets them apart is pinned with random weights."""
import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import pairing
from lora import inject_lora
from pairing import ConchTokenizer, build_conch, load_clip

SHARED = Path(__file__).resolve().parents[2] / "shared"
TINY = dict(image_size=32, patch=16, width=32, layers=2, heads=2, dim=16, vocab=50, positions=12)


def shared(name):
    """A file of the folder ../shared, which is no part of the repository: the original's numbers and its tokenizer."""
    if not (SHARED / name).is_file():
        pytest.skip(f"needs {SHARED / name}, which is not here")
    return SHARED / name


def tiny():
    torch.manual_seed(0)
    model = build_conch(**TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def padded(*lengths, columns=12):
    """Rows of tokens 1 ... n, then zeros."""
    return torch.stack([F.pad(torch.arange(1, n + 1), (0, columns - n)) for n in lengths])


# ---- The original's numbers -----------------------------------------------------------------------------------------

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
        elif "token_embedding" in key or key.endswith(("query", "cls_emb", "cls_token", "pos_embed",
                                                       "positional_embedding")):
            state[key] = 0.5 * r
        else:
            state[key] = r * shape[-1] ** -0.5
    return state


def test_features_equal_the_original_package(tmp_path):
    expected = json.loads(shared("data/conch_expected.json").read_text())
    torch.save({"state_dict": original_weights(expected["seed"])}, tmp_path / "pytorch_model.bin")
    clip = load_clip("conch", weights=tmp_path / "pytorch_model.bin")
    assert clip.dim == 512
    generator = torch.Generator().manual_seed(expected["seed"] + 1)
    with torch.inference_mode():
        for size in (448, 224):
            images = torch.randn(2, 3, size, size, generator=generator)
            torch.testing.assert_close(clip.encode_image(images), torch.tensor(expected[f"image_{size}"]),
                                       rtol=0, atol=1e-5)
        tokens = torch.tensor(expected["tokens"])
        torch.testing.assert_close(clip.encode_text(tokens), torch.tensor(expected["text"]), rtol=0, atol=1e-5)


def test_tokens_equal_the_original_package():
    tokenize = ConchTokenizer(shared("data/conch_byte_level_bpe_uncased.json"))
    texts, ids = zip(*json.loads(shared("data/conch_tokens.json").read_text()))
    assert tokenize(list(texts)).tolist() == list(ids)


# ---- Towers ---------------------------------------------------------------------------------------------------------

def plain_text(text, tokens):
    """The text tower without trimming, its mask written out row by row as the original's code defines it."""
    tokens = tokens[:, :-1]
    count = tokens.shape[1] + 1
    x = torch.cat([text.token_embedding(tokens), text.cls_emb.expand(len(tokens), 1, -1)], 1)
    x = x + text.positional_embedding
    masks = []
    for row in tokens:
        mask = torch.full((count, count), float("-inf")).triu(1)
        for key in range(1, count):
            if row[key - 1] == 0:
                mask[-1, key] = float("-inf")
        masks.append(mask)
    x = text.transformer(x, attn_mask=torch.stack(masks).repeat_interleave(text.heads, 0))
    return text.ln_final(x[:, -1]) @ text.text_projection


@torch.no_grad()
def test_trimmed_padding_equals_untrimmed():
    text = tiny().text
    tokens = padded(1, 2, 5, 10, 11)
    for rows in (tokens, tokens[:1], tokens[:3], tokens[1:4]):
        torch.testing.assert_close(text(rows), plain_text(text, rows), rtol=0, atol=1e-5)
    looked_at = []
    text.transformer.resblocks[0].ln_1.register_forward_pre_hook(
        lambda module, inputs: looked_at.append(inputs[0].shape[1]))
    text(tokens[:3])
    assert looked_at == [7]  # five tokens, one pad, the cls


@torch.no_grad()
def test_the_last_column_is_only_a_placeholder():
    text, tokens = tiny().text, padded(3, 11)
    other = tokens.clone()
    other[:, -1] = 7
    assert torch.equal(text(other), text(tokens))


@torch.no_grad()
@pytest.mark.parametrize("length", [2, 10, 11])
def test_cls_sees_the_tokens_and_the_first_pad_and_not_itself(length, monkeypatch):
    text, tokens = tiny().text, padded(length)
    seen, block = [], pairing.attention_block
    monkeypatch.setattr(pairing, "attention_block",
                        lambda module, x, mask, *at: seen.append(mask[0, 0, -1]) or block(module, x, mask, *at))
    text(tokens)
    open_keys = seen[0].nonzero().flatten().tolist()
    # keys are the tokens, one pad where there is room, the cls; only with no pad left (11 of 11) the cls sees itself
    assert open_keys == list(range(length + 1))


@torch.no_grad()
def test_the_vision_tower_takes_other_sizes():
    visual = tiny().visual
    assert visual(torch.randn(2, 3, 32, 32)).shape == visual(torch.randn(2, 3, 64, 64)).shape == (2, 16)


def test_keys_and_sizes_are_those_of_the_published_file():
    with torch.device("meta"):
        model = build_conch()
    assert len(model.state_dict()) == 314  # without logit_scale
    assert sum(value.numel() for value in model.state_dict().values()) == 197_958_912
    rows = [line.split("\t") for line in shared("facts/conch_keys.tsv").read_text().splitlines()[1:]]
    ours = {key: "x".join(map(str, value.shape)) for key, value in model.state_dict().items()}
    assert ours == {key: shape for key, shape, needed in rows if needed == "yes" and key != "logit_scale"}


def test_lora_of_the_text_tower_has_the_authors_size():
    with torch.device("meta"):
        text = build_conch().text
        inject_lora(text, rank=16)
    sizes = {}
    for name, parameter in text.named_parameters():
        if "lora_" in name:
            part = next(part for part in ("token_embedding", "mlp", "out_proj") if part in name)
            sizes[part] = sizes.get(part, 0) + parameter.numel()
    assert sizes == {"token_embedding": 524_400, "mlp": 1_474_560, "out_proj": 294_912}


# ---- Checkpoints ----------------------------------------------------------------------------------------------------

@pytest.fixture
def small_conch(monkeypatch):
    sizes = dict(TINY, positions=128)
    monkeypatch.setattr(pairing, "build_conch", lambda: build_conch(**sizes))
    return build_conch(**sizes)


@pytest.mark.parametrize("wrap", [dict, lambda state: {"state_dict": state},
                                  lambda state: {f"module.{key}": value for key, value in state.items()}])
def test_checkpoint_may_be_wrapped_and_hold_the_captioning_parts(small_conch, tmp_path, wrap):
    extra = ("logit_scale", "text_decoder.text_projection", "visual.attn_pool_caption.query", "visual.ln_caption.bias")
    torch.save(wrap(small_conch.state_dict() | {key: torch.ones(1) for key in extra}), tmp_path / "conch.bin")
    clip = load_clip("conch", weights=tmp_path / "conch.bin")
    for key, value in clip.text_tower.state_dict().items():
        assert torch.equal(value, small_conch.text.state_dict()[key]), key
    assert not any(p.requires_grad for p in clip.text_tower.parameters())


def test_a_missing_an_unknown_and_a_hostile_checkpoint_are_refused(small_conch, tmp_path):
    path, state = tmp_path / "conch.bin", small_conch.state_dict()
    torch.save({key: value for key, value in state.items() if key != "text.cls_emb"}, path)
    with pytest.raises(ValueError, match="Missing.*text.cls_emb"):
        load_clip("conch", weights=path)
    torch.save(state | {"visual.head.weight": torch.ones(1)}, path)
    with pytest.raises(ValueError, match="Unexpected.*visual.head.weight"):
        load_clip("conch", weights=path)

    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"text.cls_emb": Hostile()}, path)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_clip("conch", weights=path)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(FileNotFoundError, match="--clip-weights nowhere.bin"):
        load_clip("conch", weights="nowhere.bin")


def test_images_are_made_448_with_openai_statistics(small_conch):
    from PIL import Image
    clip = load_clip("conch", weights="none")
    image = clip.preprocess(Image.new("L", (600, 500), 255))
    assert image.shape == (3, 448, 448)
    white = (1 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(image.mean((1, 2)), white)


# ---- Tokenizer ------------------------------------------------------------------------------------------------------

@pytest.fixture
def tokenizer_file(tmp_path):
    """The format of CONCH's file with five merges: "h e", "l l", "Ġ he" and those of a two-letter number."""
    special = ["<pad>", "<start_of_text>", "<end_of_text>", "<|date|>"]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = ["h e", "l l", "Ġ he", "1 2", "Ġhe ll"]
    words = special + symbols + [merge.replace(" ", "") for merge in merges]
    path = tmp_path / "bpe.json"
    path.write_text(json.dumps({
        "added_tokens": [{"id": i, "content": word} for i, word in enumerate(special)],
        "model": {"vocab": {word: i for i, word in enumerate(words)}, "merges": merges}}), encoding="utf-8")
    return path, {word: i for i, word in enumerate(words)}


@pytest.mark.parametrize("text, symbols", [
    ("hello", ["Ġhell", "o"]),
    (" hello", ["Ġhell", "o"]),                              # one space before the first word, not two
    ("HÉLLO", ["Ġhell", "o"]),                               # no case, no accents
    ("he\u0903llo", ["Ġhell", "o"]),                         # Mc is an accent as well as Mn
    ("ΟΣ", ["Ġ", "Î", "¿", "Ï", "ĥ"]),                       # lower case by character: no final sigma
    ("\the", ["Ġ", "ĉ", "he"]),                              # a tab is no space: the prefix comes before it
    ("a  he", ["Ġ", "a", "Ġ", "Ġhe"]),
    ("112", ["Ġ", "1", "12"]),
    ("he's", ["Ġhe", "'", "s"]),
    ("x<|date|>he", ["Ġ", "x", "<|date|>", "Ġhe"]),          # each segment is a text of its own
    ("<|DATE|>", ["Ġ", "<", "|", "d", "a", "t", "e", "|", ">"]),
    ("", []),
])
def test_byte_pair_encoding(tokenizer_file, text, symbols):
    path, vocab = tokenizer_file
    row = ConchTokenizer(path)([text])[0].tolist()
    assert row[:len(symbols) + 2] == [1, *(vocab[symbol] for symbol in symbols), 2]
    assert len(row) == 128 and not any(row[len(symbols) + 2:])


def test_truncation_keeps_start_the_first_125_and_end(tokenizer_file):
    path, vocab = tokenizer_file
    rows = ConchTokenizer(path)(["a" * 124, "a" * 125, "b " * 300])
    assert rows.shape == (3, 128) and rows.dtype == torch.long
    assert rows[0].tolist() == [1, vocab["Ġ"], *[vocab["a"]] * 124, 2, 0]
    assert rows[1].tolist() == rows[0].tolist()
    assert rows[2, :3].tolist() == [1, vocab["Ġ"], vocab["b"]] and rows[2, 126:].tolist() == [2, 0]


def test_tokenizer_file_is_read_with_the_first_text(tmp_path, tokenizer_file):
    tokenize = ConchTokenizer(tmp_path / "later.json")
    tokenizer_file[0].rename(tmp_path / "later.json")
    assert tokenize(["hello"])[0, 0] == 1
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ValueError, match="--clip-tokenizer .*broken.json"):
        ConchTokenizer(tmp_path / "broken.json")(["hello"])


def test_tokenizer_file_is_downloaded_once_and_checked(tmp_path, monkeypatch, tokenizer_file):
    content, asked = tokenizer_file[0].read_bytes(), []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    digest = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(pairing, "CONCH_TOKENIZER", ("https://example.org/bpe.json", digest))
    reply = [content[:-1]]

    def urlopen(url, timeout):
        asked.append(url)
        if isinstance(reply[0], Exception):
            raise reply[0]
        return io.BytesIO(reply[0])

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    for wrong in (content[:-1], OSError("no connection")):
        reply[0] = wrong
        with pytest.raises(ValueError, match="example.org/bpe.json.*--clip-tokenizer FILE") as raised:
            ConchTokenizer()(["hello"])
        assert len(str(raised.value).splitlines()) == 2 and not list(tmp_path.glob("cache/**/*.json*"))
    reply[0] = content
    assert ConchTokenizer()(["hello"])[0, 0] == 1
    assert ConchTokenizer()(["hello"])[0, 0] == 1
    assert len(asked) == 3 and [path.name for path in tmp_path.glob("cache/*/*")] == ["bpe.json"]
    next(tmp_path.glob("cache/*/*")).write_bytes(b"{}")  # a damaged file is replaced
    assert ConchTokenizer()(["hello"])[0, 0] == 1 and len(asked) == 4


def test_cache_key_of_conch_knows_weights_and_tokenizer(small_conch, tokenizer_file, tmp_path):
    clip = load_clip("conch", weights="none", tokenizer=tokenizer_file[0])
    key = pairing.cache_key(clip, texts=["a report"])
    assert key == pairing.cache_key(clip, texts=["a report"])
    clip.text_tower.cls_emb.data += 1
    assert {name for name in key if pairing.cache_key(clip, texts=["a report"])[name] != key[name]} == {"weights"}
    assert "0x" not in pairing.cache_key(clip, paths=[tokenizer_file[0]])["preprocessing"]
