"""What lora.py promises, in numbers: the equation, no inert adapter, exact merging, nothing silent."""

import copy
import warnings

import open_clip
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lora import (LoRAConv2d, LoRAEmbedding, LoRALinear, inject_lora, load_lora_state_dict, lora_state_dict,
                  merge_lora)

LORA_TYPES = (LoRALinear, LoRAConv2d, LoRAEmbedding)
# Merged against unmerged, one layer, |y| about 2.5.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}

CONVS = [
    dict(kernel_size=3),
    dict(kernel_size=3, stride=2, padding=1),
    dict(kernel_size=(3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    dict(kernel_size=3, padding="same", dilation=2),
    dict(kernel_size=4, padding="same"),
    dict(kernel_size=3, padding="valid", bias=False),
    dict(kernel_size=3, padding=1, padding_mode="reflect"),
    dict(kernel_size=3, padding=(2, 1), padding_mode="replicate", stride=2),
    dict(kernel_size=3, padding=2, padding_mode="circular", dilation=2),
    dict(kernel_size=3, padding="same", padding_mode="circular"),
    dict(kernel_size=3, padding=1, groups=2),
    dict(kernel_size=3, padding=1, groups=4, stride=2),
    dict(kernel_size=3, padding=2, groups=2, dilation=2, padding_mode="reflect"),
    dict(kernel_size=1),
    dict(kernel_size=4, stride=4),
]


@pytest.fixture(autouse=True)
def seeded_on_one_thread():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small only lose time on a second thread
    yield
    torch.set_num_threads(threads)


def fill(module, std=0.2):
    """Give every A and B random values, as training would."""
    for layer in adapters(module):
        nn.init.normal_(layer.lora_A, std=std)
        nn.init.normal_(layer.lora_B, std=std)
    return module


def adapters(module):
    return [layer for layer in module.modules() if isinstance(layer, LORA_TYPES)]


def small_vit():
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3, num_classes=0)


def small_text_tower():
    return open_clip.transformer.TextTransformer(
        context_length=10, vocab_size=60, width=32, heads=2, layers=2, output_dim=16)


def small_encoder_layer():
    return nn.TransformerEncoderLayer(32, 2, 48, dropout=0.0, batch_first=True)


MODELS = {
    "timm ViT": (small_vit, lambda: torch.randn(2, 3, 32, 32)),
    "open_clip text": (small_text_tower, lambda: torch.randperm(60).view(6, 10)),
    "TransformerEncoderLayer": (small_encoder_layer, lambda: torch.randn(2, 5, 32)),
}
each_model = pytest.mark.parametrize("name", MODELS)
each_conv = pytest.mark.parametrize("geometry", CONVS, ids=str)


# ----------------------------------------------------------------- the equation


def test_linear_is_w_plus_s_b_a_in_float64():
    base = nn.Linear(7, 5)
    layer = fill(LoRALinear(base, rank=3, alpha=4.0))
    x = torch.randn(2, 6, 7)
    weight = base.weight.double() + 4.0 / 3 * layer.lora_B.double() @ layer.lora_A.double()
    expected = x.double() @ weight.T + base.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.weight.double(), weight, rtol=0, atol=1e-6)
    assert (expected - base(x)).abs().max() > 0.1  # the adapter is part of what was compared


@each_conv
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_conv_is_a_convolution_with_w_plus_s_b_a_in_float64(geometry):
    base = nn.Conv2d(4, 8, **geometry)
    layer = fill(LoRAConv2d(base, rank=3, alpha=4.0))
    groups, rank = base.groups, 3
    assert layer.lora_A.shape == (groups * rank, 4 // groups, *base.kernel_size)
    assert layer.lora_B.shape == (8, rank, 1, 1)
    # Written out output channel by output channel, unlike the batched product in lora.py.
    weight = base.weight.detach().double().clone()
    a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    for out in range(8):
        group = out // (8 // groups)
        for r in range(rank):
            weight[out] += 4.0 / 3 * b[out, r, 0, 0] * a[group * rank + r]
    torch.testing.assert_close(layer.weight.double(), weight, rtol=0, atol=1e-5)

    x = torch.randn(2, 4, 11, 13)
    padded, padding = x.double(), base.padding
    if base.padding_mode != "zeros":  # F.conv2d pads with zeros only
        rows, columns = ((base.kernel_size[i] - 1) * base.dilation[i] // 2 for i in (0, 1)) \
            if padding == "same" else padding
        padded, padding = F.pad(padded, (columns, columns, rows, rows), mode=base.padding_mode), 0
    bias = None if base.bias is None else base.bias.double()
    expected = F.conv2d(padded, weight, bias, base.stride, padding, base.dilation, groups)
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=1e-5)
    assert (expected - base(x)).abs().max() > 0.1


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_embedding_is_a_row_of_w_plus_s_b_a_in_float64(padding_idx):
    base = nn.Embedding(9, 5, padding_idx=padding_idx)
    layer = fill(LoRAEmbedding(base, rank=3, alpha=4.0))
    delta = 4.0 / 3 * (layer.lora_B.double() @ layer.lora_A.double()).T
    if padding_idx is not None:
        delta[padding_idx] = 0.0
    ids = torch.arange(9).view(3, 3)
    expected = (base.weight.double() + delta)[ids]
    torch.testing.assert_close(layer(ids).double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(layer.weight.double()[ids], expected, rtol=0, atol=1e-6)
    assert (expected - base(ids)).abs().max() > 0.1


@pytest.mark.parametrize("make", [
    lambda: (LoRALinear(nn.Linear(4, 3), 2, 4.0), torch.randn(2, 4)),
    lambda: (LoRAConv2d(nn.Conv2d(2, 4, 3, padding=1, groups=2, padding_mode="circular"), 2),
             torch.randn(1, 2, 4, 4)),
    lambda: (LoRAEmbedding(nn.Embedding(5, 3, padding_idx=1), 2, 4.0), torch.tensor([[0, 1, 4], [4, 2, 1]])),
], ids=["linear", "conv2d", "embedding"])
def test_gradients_of_a_and_b_agree_with_finite_differences(make):
    layer, x = make()
    fill(layer).double()
    x = x.double().requires_grad_() if x.is_floating_point() else x

    # gradcheck perturbs A and B in place, so the functions may ignore their arguments.
    for read in (lambda a, b: layer(x), lambda a, b: layer.weight):
        assert torch.autograd.gradcheck(read, (layer.lora_A, layer.lora_B))


def test_the_start_values_are_those_of_the_paper_and_leave_the_product_zero():
    linear, conv = LoRALinear(nn.Linear(64, 5), 200), LoRAConv2d(nn.Conv2d(8, 4, 3, groups=2), 200)
    embedding = LoRAEmbedding(nn.Embedding(50, 40), 200)
    for layer, fan_in in ((linear, 64), (conv, 4 * 9)):
        bound = fan_in ** -0.5  # kaiming uniform with a = sqrt 5
        assert not layer.lora_B.any()
        assert 0.98 * bound < layer.lora_A.abs().max() <= bound
        assert abs(layer.lora_A.std() - bound / 3 ** 0.5) < 0.02 * bound
    assert not embedding.lora_A.any()
    assert abs(embedding.lora_B.mean()) < 0.05 and abs(embedding.lora_B.std() - 1) < 0.05


def test_the_scale_is_a_true_division():
    layer = fill(LoRALinear(nn.Linear(4, 3, bias=False), rank=16, alpha=4))
    assert layer.scale == 0.25
    delta = layer(torch.eye(4)).T - layer.base.weight
    torch.testing.assert_close(delta, 0.25 * layer.lora_B @ layer.lora_A, rtol=0, atol=1e-6)


@each_model
def test_injection_leaves_the_output_as_it_was(name):
    build, make_input = MODELS[name]
    model, x = build(), make_input()
    with torch.no_grad():
        before = model(x)
        inject_lora(model)
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-6)
        model.eval()
        torch.testing.assert_close(model(x), before, rtol=0, atol=5e-6)  # torch's fast path sums differently


# ------------------------------------------------------------ no inert adapter


@each_model
def test_after_one_step_every_adapter_has_a_gradient_and_has_moved(name):
    build, make_input = MODELS[name]
    model, x = build(), make_input()
    inject_lora(model, rank=4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    start = lora_state_dict(model)
    for _ in range(2):  # the factor that starts at zero moves in the first step, the other in the second
        optimizer.zero_grad()
        y = model(x)
        (y - torch.randn_like(y)).square().mean().backward()
        for key, parameter in model.named_parameters():
            assert (parameter.grad is not None) == ("lora_" in key), key
        optimizer.step()
    for key, value in lora_state_dict(model).items():
        assert key.endswith("scale") or not torch.equal(value, start[key]), key


@pytest.mark.parametrize("mode", ["train", "eval, inference_mode"])
@each_model
def test_perturbing_any_adapter_changes_the_output(name, mode):
    build, make_input = MODELS[name]
    model, x = build(), make_input()
    inject_lora(model, rank=4)
    model.train(mode == "train")
    layers = {key: layer for key, layer in model.named_modules() if isinstance(layer, LORA_TYPES)}
    assert len(layers) == {"timm ViT": 9, "open_clip text": 7, "TransformerEncoderLayer": 3}[name]
    for key, layer in layers.items():
        start = layer.lora_A if isinstance(layer, LoRAEmbedding) else layer.lora_B
        with torch.inference_mode(mode != "train"), torch.no_grad():
            before = model(x)
            start.data.normal_()
            changed = (model(x) - before).abs().max()
            start.data.zero_()
        assert changed > 1e-3, f"{key} is inert"


def test_attention_and_the_eval_fast_path_compute_with_the_effective_weights():
    model, x = fill_injected(small_encoder_layer()), torch.randn(2, 5, 32)
    merged = merge_lora(model).eval()
    expected = merged(x)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-5)  # train mode: forward of the wrappers
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=1e-5)  # eval: their weights


def fill_injected(model, **settings):
    inject_lora(model, **{"rank": 4, **settings})
    return fill(model)


def test_a_layer_shows_what_other_code_reads_off_it():
    linear, conv = LoRALinear(nn.Linear(3, 4)), LoRAConv2d(nn.Conv2d(2, 4, 3, 2, padding="valid", bias=False))
    embedding = LoRAEmbedding(nn.Embedding(6, 5, padding_idx=-1))
    assert (linear.in_features, linear.out_features) == (3, 4) and linear.bias is linear.base.bias
    assert (conv.stride, conv.padding, conv.kernel_size, conv.groups) == ((2, 2), "valid", (3, 3), 1)
    assert conv.bias is None
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (6, 5, 5)
    with pytest.raises(AttributeError, match="stride"):
        linear.stride


def test_a_failing_weight_is_an_error_and_never_the_frozen_weight():
    layer = LoRALinear(nn.Linear(3, 4))
    del layer.scale
    with pytest.raises(AttributeError):
        layer.weight


def test_the_base_is_frozen_and_the_adapters_train():
    model = small_text_tower()
    inject_lora(model)
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in key), key
    assert not any(p.requires_grad for p in LoRALinear(nn.Linear(2, 2)).base.parameters())


# --------------------------------------------------------------------- dropout


def test_dropout_acts_on_the_branch_input_in_train_mode_only():
    layer = fill(LoRALinear(nn.Linear(400, 3), rank=2, dropout=0.5))
    x = torch.ones(1, 400)
    kept = layer.eval()(x)
    torch.testing.assert_close(kept, F.linear(x, layer.weight, layer.bias))
    outputs = torch.stack([layer.train()(x) for _ in range(2000)])
    assert outputs.std(0).min() > 0.1
    torch.testing.assert_close(outputs.mean(0), kept, rtol=0, atol=0.25)  # unbiased
    with torch.no_grad():
        layer.lora_B.zero_()
    assert torch.equal(layer(x), layer.base(x))  # the base's input is not dropped


def test_dropout_of_an_embedding_drops_the_whole_branch_of_a_token():
    layer = fill(LoRAEmbedding(nn.Embedding(5, 8), rank=2, dropout=0.5))
    ids = torch.full((1000,), 3)
    branch = layer.train()(ids) - layer.base(ids)
    full = layer.eval()(ids[:1]) - layer.base(ids[:1])
    dropped = (branch == 0).all(1)
    assert 400 < dropped.sum() < 600
    torch.testing.assert_close(branch[~dropped] / 2, full.expand_as(branch)[~dropped], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- dtypes


def layers_and_inputs():
    yield LoRALinear(nn.Linear(6, 5), 2), torch.randn(3, 6)
    yield LoRAConv2d(nn.Conv2d(4, 6, 3, groups=2), 2), torch.randn(2, 4, 5, 5)
    yield LoRAEmbedding(nn.Embedding(7, 5), 2), torch.arange(7)


def test_under_autocast_the_output_has_the_dtype_of_the_base():
    for layer, x in layers_and_inputs():
        fill(layer)
        with torch.autocast("cpu", torch.bfloat16):
            y, of_base, weight = layer(x), layer.base(x), layer.weight
        assert y.dtype == of_base.dtype == (torch.float32 if x.dtype == torch.int64 else torch.bfloat16)
        assert torch.equal(weight, layer.weight)  # the effective weight does not depend on autocast
        torch.testing.assert_close(y.float(), layer(x), rtol=0, atol=3e-2)
        y.float().square().sum().backward()
        assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_base_of_another_dtype_keeps_fp32_adapters(dtype):
    for plain, x in ((nn.Linear(6, 5), torch.randn(3, 6)), (nn.Conv2d(4, 6, 3), torch.randn(2, 4, 5, 5)),
                     (nn.Embedding(7, 5), torch.arange(7))):
        model = nn.Sequential(plain.to(dtype))
        fill_injected(model)
        x = x.to(dtype) if x.is_floating_point() else x
        assert model[0].lora_A.dtype == model[0].lora_B.dtype == torch.float32
        y = model(x)
        assert y.dtype == model[0].weight.dtype == dtype
        y.float().square().sum().backward()
        assert model[0].lora_A.grad.dtype == torch.float32
        merged = merge_lora(model)
        assert merged[0].weight.dtype == dtype
        torch.testing.assert_close(merged(x), y, rtol=0, atol=TOLERANCE.get(dtype, 1e-6))


@each_model
def test_a_model_trains_under_bf16_autocast(name):
    build, make_input = MODELS[name]
    model, x = fill_injected(build()), make_input()
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().square().mean().backward()
    for key, parameter in model.named_parameters():
        assert "lora_" not in key or (parameter.grad.dtype == torch.float32 and parameter.grad.any()), key


def test_under_bf16_autocast_a_small_update_is_not_rounded_away():
    half = torch.randn(8, 64)
    layer = LoRALinear(nn.Linear(128, 8, bias=False), rank=4, alpha=4.0)
    with torch.no_grad():
        layer.base.weight.copy_(torch.cat([half, -half], dim=1))  # the base's output is 0 on x = [u, u] ...
        nn.init.normal_(layer.lora_B, std=1e-4)
    x = torch.randn(32, 64).repeat(1, 2)
    term = x.double() @ (layer.lora_B.double() @ layer.lora_A.double()).T  # ... so this is the output
    with torch.autocast("cpu", torch.bfloat16):
        by_branch, by_weight = layer(x), F.linear(x, layer.weight)
    assert (by_branch - term).norm() < 0.01 * term.norm()
    assert (by_weight - term).norm() > 0.5 * term.norm()  # what `forward` would do with the summed weight


# --------------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", TOLERANCE)
@each_model
def test_merged_equals_unmerged(name, dtype):
    build, make_input = MODELS[name]
    model, x = build().to(dtype), make_input()
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        before = model(x)
        fill_injected(model, rank=16)
        for layer in adapters(model):
            layer.lora_B.mul_(0.1)
        y = model(x)
        # Two blocks round more often than one layer, and |y| goes up to 3.7 after the last LayerNorm.
        atol = TOLERANCE[dtype] * (1 if dtype == torch.float32 else 2)
        torch.testing.assert_close(merge_lora(model)(x), y, rtol=0, atol=atol)
        assert (y - before).abs().max() > 1.3 * atol


@each_conv
def test_merged_convolution_equals_unmerged(geometry):
    layer, x = fill(LoRAConv2d(nn.Conv2d(4, 8, **geometry), 3)), torch.randn(2, 4, 11, 13)
    merged = merge_lora(layer)
    assert type(merged) is nn.Conv2d and merged.padding_mode == layer.padding_mode
    torch.testing.assert_close(merged(x), layer(x), rtol=0, atol=1e-5)


@each_model
def test_merging_gives_the_original_keys_and_classes_and_leaves_the_argument_alone(name):
    build, _ = MODELS[name]
    plain, model = build(), build()
    fill_injected(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    merged = merge_lora(model)
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    plain.load_state_dict(merged.state_dict())
    assert all(tensor.is_contiguous() for tensor in merged.state_dict().values())
    addresses = {p.data_ptr() for p in model.parameters()}
    with torch.no_grad():
        for parameter in merged.parameters():
            assert parameter.data_ptr() not in addresses
            parameter.fill_(7.0)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_merging_a_model_without_adapters_copies_it():
    model = nn.Sequential(nn.Linear(2, 3))
    merged = merge_lora(model)
    assert merged is not model and torch.equal(merged[0].weight, model[0].weight)


# ------------------------------------------------------------------------ ties


class Tied(nn.Module):
    """One Linear under two names, and an output head that shares the embedding's Parameter."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.first = nn.Linear(4, 4)
        self.again = nn.ModuleList([self.first, nn.Linear(4, 4)])
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.first(self.embed(ids))
        for layer in self.again:
            x = layer(x)
        return self.head(x)


def test_a_module_reached_twice_has_one_adapter_and_stays_one_module_when_merged():
    model, ids = Tied(), torch.arange(7)
    assert inject_lora(model, skip=("embed", "head")) == ["first", "again.1"]
    assert model.first is model.again[0]
    fill(model)
    assert sorted({key.rsplit(".", 1)[0] for key in lora_state_dict(model)}) == ["again.1", "first"]
    merged = merge_lora(model)
    assert merged.first is merged.again[0] and merged.head.weight is merged.embed.weight
    assert list(merged.state_dict()) == list(Tied().state_dict())
    torch.testing.assert_close(merged(ids), model(ids), rtol=0, atol=1e-5)


def test_a_module_skipped_under_one_of_its_names_is_left_alone_under_all():
    model = Tied()
    assert inject_lora(model, targets=["linear"], skip=["again.0", "head"]) == ["again.1"]
    assert type(model.first) is nn.Linear


@pytest.mark.filterwarnings("ignore:head shares its weight with embed")
@pytest.mark.parametrize("skip, partner_changes", [(["head"], False), ([], True)])
def test_merging_never_changes_the_untouched_partner_of_a_shared_weight(skip, partner_changes):
    model, ids = Tied(), torch.arange(7)
    w = model.head.weight.detach().clone()
    with pytest.warns(UserWarning, match="embed shares its weight with head"):
        inject_lora(model, skip=skip)
    fill(model)
    merged = merge_lora(model)
    assert merged.embed.weight is not merged.head.weight and not torch.equal(merged.embed.weight, w)
    assert torch.equal(merged.head.weight, w) != partner_changes
    torch.testing.assert_close(merged(ids), model(ids), rtol=0, atol=1e-5)


def test_models_without_shared_weights_inject_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inject_lora(small_text_tower())


# ------------------------------------------------------------------- embedding


def test_the_padding_row_stays_the_row_of_the_base_and_gets_no_gradient():
    layer = LoRAEmbedding(nn.Embedding(6, 4, padding_idx=2), rank=3)
    nn.init.ones_(layer.lora_A)
    ids = torch.tensor([[2, 1], [5, 2]])
    y = layer(ids)
    assert torch.equal(y[ids == 2], layer.base.weight[2].expand(2, -1))
    assert (y[ids != 2] - layer.base(ids)[ids != 2]).abs().min() > 0
    (y.sum() + layer.weight.square().sum()).backward()
    assert not layer.lora_A.grad[:, 2].any() and layer.lora_A.grad[:, 1].any()
    assert torch.equal(merge_lora(layer).weight[2], layer.base.weight[2])


@pytest.mark.parametrize("setting", [dict(max_norm=1.0), dict(sparse=True)])
def test_embeddings_that_cannot_be_adapted_are_refused_with_the_reason(setting):
    model = nn.ModuleDict({"words": nn.Embedding(5, 4, **setting), "out": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match=rf"words \(Embedding\) has {next(iter(setting))}"):
        inject_lora(model)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())  # nothing half done
    assert inject_lora(model, skip=["words"]) == ["out"]


# --------------------------------------------------------- injection, refusals


def test_skip_takes_names_and_prefixes_of_whole_dotted_parts():
    block1 = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model = nn.ModuleDict({"block1": block1, "block10": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    assert inject_lora(model, skip=("block1", "head")) == ["block10"]
    assert type(model["head"]) is nn.Linear and not model["head"].weight.requires_grad
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert inject_lora(model, skip=["0.1"]) == ["0.0"]


def test_targets_choose_the_kinds_of_layer():
    assert inject_lora(small_vit(), targets=["conv2d"]) == ["patch_embed.proj"]
    assert len(inject_lora(small_vit(), targets=["linear"])) == 8
    assert inject_lora(small_text_tower(), targets=["embedding"]) == ["token_embedding"]


def test_resnet18_takes_an_adapter_on_each_convolution_and_the_classifier():
    model, x = torchvision.models.resnet18().eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(x)
        assert len(inject_lora(model, rank=2)) == 21
        assert torch.equal(model(x), before)
        y = fill(model, 0.05)(x)
        assert (y - before).abs().max() > 1e-2
        torch.testing.assert_close(merge_lora(model)(x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings, message", [
    (dict(rank=0), "rank is 0; expected"),
    (dict(rank=2.5), "rank is 2.5; expected"),
    (dict(alpha=0), "alpha is 0; expected"),
    (dict(alpha=-1.0), "alpha is -1.0; expected"),
    (dict(alpha=float("nan")), "alpha is nan; expected"),
    (dict(dropout=1.0), "dropout is 1.0; expected"),
    (dict(targets=["linear", "conv1d"]), "unknown target 'conv1d'; choose from linear, conv2d, embedding"),
    (dict(targets=["conv2d"]), "no layer to adapt in Sequential"),
    (dict(skip=["0", "hed"]), "no module is named 'hed'"),
    (dict(skip=["0"]), "no layer to adapt in Sequential"),
], ids=str)
def test_settings_that_cannot_be_right_are_refused(settings, message):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=message) as error:
        inject_lora(model, **settings)
    assert "\n" not in str(error.value)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_a_second_injection_is_refused():
    model = small_vit()
    inject_lora(model)
    with pytest.raises(ValueError, match="already, at 'patch_embed.proj'"):
        inject_lora(model)


def test_a_model_that_is_one_layer_is_refused_and_can_be_wrapped():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"a lone Linear .* model = LoRALinear\(model, rank, alpha\)"):
        inject_lora(model)
    wrapped, x = fill(LoRALinear(model, 2, 4.0)), torch.randn(4, 3)
    assert list(lora_state_dict(wrapped)) == ["lora_A", "lora_B", "scale"]
    assert type(merge_lora(wrapped)) is nn.Linear
    torch.testing.assert_close(merge_lora(wrapped)(x), wrapped(x))


def test_a_wrapper_refuses_layers_of_another_kind_and_computed_weights():
    with pytest.raises(ValueError, match="Conv2d.* is not an nn.Linear"):
        LoRALinear(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match="computed weight"):
        LoRALinear(parametrizations.weight_norm(nn.Linear(2, 2)))


@pytest.mark.parametrize("kind", [timm.layers.Conv2dSame, timm.layers.StdConv2d])
def test_a_subclass_with_a_forward_of_its_own_is_adapted_through_its_weight(kind):
    model, x = nn.Sequential(kind(4, 6, 3, stride=2)), torch.randn(2, 4, 9, 9)
    before = model(x)
    inject_lora(model, rank=2)
    assert torch.equal(model(x), before)
    y = fill(model)(x)
    assert (y - before).abs().max() > 0.1
    assert torch.equal(merge_lora(model)(x), y) and type(merge_lora(model)[0]) is kind
    y.sum().backward()
    assert model[0].lora_A.grad.any() and model[0].lora_B.grad.any()
    with pytest.raises(ValueError, match="its own forward"):
        inject_lora(merge_lora(model), dropout=0.1)


# ----------------------------------------------------------------------- state


@each_model
def test_a_state_goes_through_a_file_into_a_freshly_injected_model(name, tmp_path):
    build, make_input = MODELS[name]
    plain, x = build(), make_input()
    model, other = copy.deepcopy(plain), copy.deepcopy(plain)
    fill_injected(model)
    inject_lora(other, rank=4)
    torch.save(lora_state_dict(model), tmp_path / "lora.pt")
    load_lora_state_dict(other, torch.load(tmp_path / "lora.pt", weights_only=True))
    with torch.no_grad():
        assert torch.equal(other(x), model(x)) and not torch.allclose(other(x), plain(x), atol=1e-3)
    full = model.state_dict()
    assert {key for key in lora_state_dict(model) if not key.endswith("scale")} < set(full)
    assert {key.replace("base.", "") for key in full if "lora_" not in key} == set(plain.state_dict())


def test_a_state_is_a_copy_that_further_training_does_not_change():
    model = fill_injected(nn.Sequential(nn.Linear(3, 2)))
    state = lora_state_dict(model)
    kept = state["0.lora_B"].clone()
    fill(model)
    assert torch.equal(state["0.lora_B"], kept) and not state["0.lora_B"].requires_grad


def test_loading_is_strict_and_names_the_keys():
    def injected(**settings):
        return fill_injected(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), **settings)

    model, state = injected(), lora_state_dict(injected())
    before = lora_state_dict(model)
    incomplete = {key: value for key, value in state.items() if key != "1.lora_B"}
    for wrong, message in (
        (incomplete, "missing 1.lora_B"),
        ({**state, "2.lora_A": torch.zeros(1)}, "unexpected 2.lora_A"),
        (lora_state_dict(injected(rank=3)), r"0.lora_A is \(3, 3\), the model's \(4, 3\)"),
        (lora_state_dict(injected(alpha=2.0)), r"0.scale \(alpha / rank\) is 0.5, the model's 2"),
        ({}, "6 keys do not fit: missing 0.lora_A; missing 0.lora_B; missing 0.scale"),
    ):
        with pytest.raises(ValueError, match=message):
            load_lora_state_dict(model, wrong)
    after = lora_state_dict(model)
    assert all(torch.equal(before[key], after[key]) for key in before)  # nothing was loaded in part
    with pytest.raises(ValueError, match="unexpected 0.lora_A"):
        load_lora_state_dict(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), state)


def test_a_deep_copy_computes_the_same_and_shares_nothing():
    model, x = fill_injected(small_encoder_layer()), torch.randn(2, 5, 32)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    fill(twin)
    assert not torch.allclose(twin(x), model(x), atol=1e-3)
