"""What is computed with less is equal to the plain form: features, and the gradient of every adapter."""
import copy
import math
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from open_clip.transformer import QuickGELU, TextTransformer
from timm.models.vision_transformer import ParallelScalingBlock

import pairing
from clipit import LeanBlock, PooledBlock, lean
from lora import inject_lora
from pairing import TextTower, build_conch, tight

ROOT = Path(__file__).resolve().parents[1]
WORDS, END = 48, 49  # ids of words are 1 ... 48; the end of a text has the highest id; 0 is a pad
TOWERS = {
    "CLIP": {}, "eos": dict(pool_type="eos", eos_id=END), "last": dict(pool_type="last"),
    "not causal": dict(no_causal_mask=True),
    "not causal, last": dict(no_causal_mask=True, pool_type="last"), "CoCa": dict(embed_cls=True),
    "CoCa, mask corrected": dict(embed_cls=True, correct_cls_mask=True),
    "CoCa, not causal": dict(embed_cls=True, no_causal_mask=True), "layer scale": dict(ls_init_value=0.3),
    "QuickGELU": dict(act_layer=QuickGELU), "one block": dict(layers=1), "no projection": dict(proj_type="none"),
}
BATCHES = {"short": (3, 5, 2), "one": (4,), "one full": (12,), "full and short": (12, 2, 7, 11), "empty": (1, 1)}


def texts(*lengths, columns=12):
    """Rows of words with the end as the last of `length` tokens, then pads."""
    torch.manual_seed(1)
    rows = torch.zeros(len(lengths), columns, dtype=torch.long)
    for row, length in zip(rows, lengths):
        row[:length - 1] = torch.randint(1, WORDS + 1, (length - 1,))
        row[length - 1] = END
    return rows


def adapted(model):
    """LoRA on it, and every parameter large enough to be seen in the result."""
    inject_lora(model, 3)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if ".weight" in name and parameter.ndim == 1 else 0.0, 0.2)
    return model


def tower(**options):
    sizes = dict(context_length=12, vocab_size=50, width=32, heads=2, layers=3, output_dim=8) | options
    return adapted(TextTransformer(**sizes).eval())


def results(model, inputs):
    """Features, then the gradient of each adapter for a loss that weighs all features differently."""
    features = model(inputs)
    weight = torch.linspace(-1, 1, features.numel()).reshape(features.shape)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    grads = torch.autograd.grad((features * weight).sum(), trained.values())
    return {"features": features.detach(), **dict(zip(trained, grads))}


def assert_equal(got, expected):
    assert got.keys() == expected.keys() and len(got) > 4
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=2e-6 + 1e-5 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("options", TOWERS.values(), ids=TOWERS)
def test_the_text_tower_equals_open_clips_own(options, lengths):
    plain, tokens = tower(**options), texts(*lengths)
    ours = tight(copy.deepcopy(plain))
    assert type(ours) is TextTower and list(ours.state_dict()) == list(plain.state_dict())
    assert_equal(results(ours, tokens), results(plain, tokens))


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_conchs_text_tower_equals_open_clips_own(lengths):
    ours = adapted(build_conch(image_size=32, patch=16, width=32, layers=2, heads=2, dim=16, vocab=50, positions=13)
                   .text.eval())
    plain, tokens = copy.deepcopy(ours), texts(*lengths, columns=13)
    plain.__class__ = TextTransformer
    assert_equal(results(ours, tokens), results(plain, tokens[:, :12]))


def test_the_last_position_filled_by_a_word_is_no_pad():
    plain = tower(embed_cls=True)
    tokens = texts(12, 12).flip(1)  # the end comes first: no word of the last column is the highest
    assert_equal(results(tight(copy.deepcopy(plain)), tokens), results(plain, tokens))


def test_padding_behind_the_longest_text_is_not_computed():
    ours, seen = tight(tower()), []
    ours.transformer.resblocks[0].ln_1.register_forward_pre_hook(lambda module, x: seen.append(x[0].shape[1]))
    ours.transformer.resblocks[-1].mlp.register_forward_pre_hook(lambda module, x: seen.append(x[0].shape[1]))
    ours(texts(3, 5, 2))
    assert seen == [5, 1]  # the last block: the pooled position alone


@pytest.mark.parametrize("options", [dict(qk_norm=True), dict(pool_type="none"), dict(pool_type="first")])
def test_other_towers_stay_as_they_are(options):
    other = TextTransformer(width=32, heads=2, layers=1, **options)
    assert tight(other) is other and type(other) is TextTransformer


@pytest.mark.parametrize("options", [{}, dict(embed_cls=True)])
def test_grad_checkpointing_changes_no_gradient(options, monkeypatch):
    ours, calls = tight(tower(**options)), []
    expected, block = results(ours, texts(3, 5)), pairing.attention_block
    monkeypatch.setattr(pairing, "attention_block", lambda *args: calls.append(1) or block(*args))
    ours.set_grad_checkpointing()
    assert_equal(results(ours, texts(3, 5)), expected)
    assert len(calls) == 5  # three blocks, two of them a second time in the backward pass


def test_a_text_does_not_depend_on_its_batch():
    ours, tokens = tight(tower(embed_cls=True)), texts(3, 12, 7)
    with torch.no_grad():
        together = ours(tokens)
        for row, alone in zip(tokens, together):
            torch.testing.assert_close(ours(row[None])[0], alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("options", [{}, dict(reg_tokens=4), dict(dynamic_img_size=True), dict(init_values=0.3)])
def test_the_backbone_without_the_last_mlp_of_unread_tokens_equals_timms(options):
    torch.manual_seed(0)
    plain = adapted(timm.create_model("test_vit", num_classes=0, **options).eval())
    ours = copy.deepcopy(plain)
    lean(ours)
    assert type(ours.blocks[-1]) is PooledBlock and {type(block) for block in ours.blocks[:-1]} == {LeanBlock}
    assert list(ours.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 3, 160, 160)
    assert_equal(results(ours, images), results(plain, images))
    sizes = []
    ours.blocks[-1].mlp.register_forward_pre_hook(lambda module, x: sizes.append(x[0].shape[1]))
    ours(images)
    assert sizes == [1]


def test_a_backbone_that_reads_all_tokens_computes_them_all_and_equals_timms():
    torch.manual_seed(0)
    plain = adapted(timm.create_model("test_vit", num_classes=0, global_pool="avg").eval())
    ours = lean(copy.deepcopy(plain))
    assert {type(block) for block in ours.blocks} == {LeanBlock}
    images = torch.randn(2, 3, 160, 160)
    assert_equal(results(ours, images), results(plain, images))


@pytest.mark.parametrize("name, options", [
    ("test_vit", dict(block_fn=ParallelScalingBlock)), ("test_convnext", {}), ("resnet10t", {})])
def test_other_backbones_stay_as_they_are(name, options):
    model = timm.create_model(name, num_classes=0, **options)
    assert lean(model) is model
    assert not any(isinstance(module, (LeanBlock, PooledBlock)) for module in model.modules())


def test_under_autocast_the_sums_keep_the_precision_of_the_plain_form():
    torch.manual_seed(0)
    images, tokens = torch.randn(2, 3, 160, 160), texts(12, 7)
    for plain, make, inputs in ((adapted(timm.create_model("test_vit", num_classes=0).eval()), lean, images),
                                (tower(), tight, tokens)):
        ours, seen = make(copy.deepcopy(plain)), []
        for module in ours.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.register_forward_pre_hook(lambda module, x: seen.append(x[0].dtype))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(ours(inputs).float(), plain(inputs).float(), rtol=0.02, atol=0.02)
        assert set(seen) == {torch.float32}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
@pytest.mark.parametrize("keep, faults", [("clipit.keep_freed_memory()", (0, 500)), ("", (90_000, math.inf))])
def test_freed_memory_is_used_again_and_not_asked_for_anew(keep, faults):
    code = f"""import resource, torch, clipit
{keep}
for i in range(20):
    before = before if i > 15 else resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""  # the last five: 19,500 pages each
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert faults[0] <= int(done.stdout) <= faults[1]
