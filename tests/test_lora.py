"""What lora.py promises, in numbers: the equation, no inert adapter, exact merging, no silence."""
import copy
from collections import OrderedDict

import open_clip
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from lora import (LoRAConv2d, LoRAEmbedding, LoRALinear, inject_lora, load_lora_state_dict,
                  lora_state_dict, merge_lora)

# Merged against unmerged, one layer, |y| about 2.5.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def adapters(model):
    return [m for m in model.modules() if isinstance(m, (LoRALinear, LoRAConv2d, LoRAEmbedding))]


def fill(model, std=0.2):
    """Give every A and B random values, as training would."""
    for layer in adapters(model):
        nn.init.normal_(layer.lora_A, std=std)
        nn.init.normal_(layer.lora_B, std=std)
    return model


def fill_injected(model, **settings):
    inject_lora(model, **{"rank": 4, **settings})
    return fill(model)


def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2,
                             num_heads=3, num_classes=0), torch.randn(2, 3, 32, 32)


def text_tower():  # as SigLIP's, with proj_bias: asks isinstance(text_projection, nn.Linear)
    model = open_clip.transformer.TextTransformer(context_length=10, vocab_size=60, width=32,
                                                  heads=2, layers=2, output_dim=16, proj_bias=True)
    return model, torch.randperm(60).view(6, 10)


def encoder_layer():
    layer = nn.TransformerEncoderLayer(32, 2, 48, dropout=0.0, batch_first=True)
    return layer, torch.randn(2, 5, 32)


LAYERS = {vit: 9, text_tower: 8, encoder_layer: 3}  # how many take an adapter
each_model = pytest.mark.parametrize("build", LAYERS)
each_layer = pytest.mark.parametrize("make", [
    lambda: (nn.Linear(6, 5), torch.randn(3, 6)),
    lambda: (nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="circular"),
             torch.randn(2, 4, 5, 5)),
    lambda: (nn.Embedding(7, 5, padding_idx=1), torch.tensor([[0, 1, 4], [4, 2, 1]])),
], ids=["linear", "conv2d", "embedding"])


@pytest.mark.parametrize("rank, alpha", [(3, 4.0), (16, 4)])
def test_linear_is_w_plus_s_b_a_in_float64(rank, alpha):
    base, x = nn.Linear(7, 5), torch.randn(2, 6, 7)
    layer = fill(LoRALinear(base, rank, alpha))
    assert layer.scale == alpha / rank  # a true division
    weight = base.weight.double() + alpha / rank * layer.lora_B.double() @ layer.lora_A.double()
    expected = x.double() @ weight.T + base.bias.double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.weight.double(), weight, rtol=0, atol=1e-6)
    assert (expected - base(x)).abs().max() > 0.1  # the adapter is part of what was compared


@pytest.mark.parametrize("geometry", [
    dict(kernel_size=(3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    dict(kernel_size=4, padding="same", bias=False),
    dict(kernel_size=3, padding="same", padding_mode="circular", dilation=2),
    dict(kernel_size=3, padding="valid", groups=4, stride=2),
    dict(kernel_size=3, padding=2, groups=2, dilation=2, padding_mode="reflect"),
], ids=str)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_conv_and_its_merge_are_a_convolution_with_w_plus_s_b_a_in_float64(geometry):
    base = nn.Conv2d(4, 8, **geometry)
    layer = fill(LoRAConv2d(base, rank=3, alpha=4.0))
    # Written out output channel by output channel, unlike the batched product in lora.py.
    weight = base.weight.detach().double().clone()
    a, b = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    for out in range(8):
        group = out // (8 // base.groups)
        weight[out] += 4.0 / 3 * torch.tensordot(b[out, :, 0, 0], a[3 * group:3 * group + 3], 1)
    torch.testing.assert_close(layer.weight.double(), weight, rtol=0, atol=1e-5)
    plain, x = copy.deepcopy(base).double(), torch.randn(2, 4, 11, 13)
    expected = torch.func.functional_call(plain, {"weight": weight}, (x.double(),))
    assert (expected - base(x)).abs().max() > 0.1
    for module in (layer, merge_lora(layer)):
        torch.testing.assert_close(module(x).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("padding_idx", [None, 0, -1])
def test_embedding_is_a_row_of_w_plus_s_b_a_and_the_padding_row_stays_that_of_w(padding_idx):
    base, ids = nn.Embedding(9, 5, padding_idx=padding_idx), torch.arange(9).view(3, 3)
    nn.init.normal_(base.weight)
    layer = fill(LoRAEmbedding(base, rank=3, alpha=4.0))
    delta = 4.0 / 3 * (layer.lora_B.double() @ layer.lora_A.double()).T
    padding = [] if padding_idx is None else [padding_idx]
    delta[padding] = 0.0
    expected = base.weight.double() + delta
    assert (expected - base.weight).abs().max() > 0.1
    y = layer(ids)
    for rows in (y.view(9, 5), layer.weight, merge_lora(layer).weight):
        torch.testing.assert_close(rows.double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(rows[padding], base.weight[padding])
    (y.sum() + layer.weight.square().sum()).backward()
    trained = layer.lora_A.grad.any(0)
    assert trained.sum() == 9 - len(padding) and not trained[padding].any()


def test_the_start_values_are_those_of_the_paper_and_leave_the_product_zero():
    conv = LoRAConv2d(nn.Conv2d(8, 4, 3, groups=2), 200)
    embedding = LoRAEmbedding(nn.Embedding(50, 40), 200)
    for layer, fan_in in ((LoRALinear(nn.Linear(64, 5), 200), 64), (conv, 4 * 9)):
        bound = fan_in ** -0.5  # kaiming uniform with a = sqrt 5
        assert not layer.lora_B.any()
        assert 0.98 * bound < layer.lora_A.abs().max() <= bound
        assert abs(layer.lora_A.std() - bound / 3 ** 0.5) < 0.02 * bound
    assert not embedding.lora_A.any()
    assert abs(embedding.lora_B.mean()) < 0.05 and abs(embedding.lora_B.std() - 1) < 0.05


@each_layer
def test_gradients_are_those_of_finite_differences_in_float64(make):
    plain, x = make()
    layer = fill_injected(nn.Sequential(plain), rank=2)[0].double()
    x = x.double().requires_grad_() if x.is_floating_point() else x

    def call(x, a, b):
        return torch.func.functional_call(layer, {"lora_A": a, "lora_B": b}, (x,))
    assert torch.autograd.gradcheck(call, (x, layer.lora_A, layer.lora_B))


@pytest.mark.parametrize("mode", ["train", "eval, inference_mode"])
@each_model
def test_injection_leaves_the_output_as_it_was_and_each_adapter_can_change_it(build, mode):
    model, x = build()
    with torch.no_grad():
        plain = model(x)
    names = inject_lora(model, rank=4)
    model.train(mode == "train")
    assert len(names) == LAYERS[build]
    with torch.inference_mode(mode != "train"), torch.no_grad():
        before = model(x)
        atol = 1e-6 if mode == "train" else 5e-6  # torch's fast path sums differently
        torch.testing.assert_close(before, plain, rtol=0, atol=atol)
        for name in names:
            layer = model.get_submodule(name)
            start = layer.lora_A if isinstance(layer, LoRAEmbedding) else layer.lora_B
            start.data.normal_()
            assert (model(x) - before).abs().max() > 1e-3, f"{name} is inert"
            start.data.zero_()


@pytest.mark.parametrize("autocast", [False, True])
@each_model
def test_in_two_steps_each_a_and_b_moves_and_nothing_else(build, autocast):
    model, x = build()
    inject_lora(model, rank=4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    start = lora_state_dict(model)  # a copy, that training does not change
    for _ in range(2):  # the factor that starts at zero moves first, the other in the second step
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x).float()
        (y - torch.randn_like(y)).square().mean().backward()
        for key, parameter in model.named_parameters():
            assert parameter.requires_grad == (parameter.grad is not None) == ("lora_" in key), key
        optimizer.step()
    for key, value in lora_state_dict(model).items():
        assert key.endswith("scale") or not torch.equal(value, start[key]), key


def test_a_layer_shows_what_is_read_off_its_base_but_never_the_frozen_weight():
    linear, conv = LoRALinear(nn.Linear(3, 4)), LoRAConv2d(nn.Conv2d(2, 4, 3, 2, "valid"))
    assert linear.in_features == 3 and linear.bias is linear.base.bias and conv.padding == "valid"
    with pytest.raises(AttributeError, match="stride"):
        linear.stride
    del linear.scale
    with pytest.raises(AttributeError):  # the sum fails
        linear.weight


@pytest.mark.parametrize("kind, plain, x", [
    (LoRALinear, nn.Linear(400, 3), torch.ones(2000, 400)),
    (LoRAConv2d, nn.Conv2d(400, 3, 1), torch.ones(2000, 400, 1, 1)),
    (LoRAEmbedding, nn.Embedding(5, 3), torch.ones(2000, dtype=torch.long))],
    ids=["linear", "conv2d", "embedding"])
def test_dropout_acts_on_the_branch_in_train_mode_only(kind, plain, x):
    layer = fill(kind(plain, rank=2, dropout=0.5))
    kept = layer.eval()(x)
    outputs = layer.train()(x)
    torch.testing.assert_close(outputs.mean(0), kept[0], rtol=0, atol=0.25)  # unbiased
    assert (outputs.std(0) > 1e-3).all()
    if kind is LoRAEmbedding:  # the whole branch of a token, or nothing of it
        branch, full = outputs - layer.base(x), kept - layer.base(x)
        dropped = (branch == 0).all(1)
        assert 800 < dropped.sum() < 1200
        torch.testing.assert_close(branch[~dropped] / 2, full[~dropped], rtol=0, atol=1e-5)
    nn.init.zeros_(layer.lora_B)
    assert torch.equal(layer(x), layer.base(x))  # the base's input is not dropped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@each_layer
def test_a_base_of_any_dtype_keeps_it_and_has_fp32_adapters_under_autocast_too(make, dtype):
    plain, x = make()
    x = x.to(dtype) if x.is_floating_point() else x
    model = fill_injected(nn.Sequential(plain.to(dtype)))
    merged, layer, y = merge_lora(model), model[0], model(x)
    y.float().square().sum().backward()
    assert layer.lora_A.dtype == layer.lora_A.grad.dtype == layer.lora_B.dtype == torch.float32
    assert y.dtype == layer.weight.dtype == merged[0].weight.dtype == dtype
    torch.testing.assert_close(merged(x), y, rtol=0, atol=TOLERANCE.get(dtype, 1e-6))
    with torch.autocast("cpu", torch.bfloat16):
        mixed, of_base, weight = layer(x), plain(x), layer.weight
    assert mixed.dtype == of_base.dtype and torch.equal(weight, layer.weight)
    torch.testing.assert_close(mixed.float(), y.float(), rtol=0, atol=3e-2)


def test_under_bf16_autocast_a_small_update_is_not_rounded_away():
    half = torch.randn(8, 64)
    layer = LoRALinear(nn.Linear(128, 8, bias=False), rank=4, alpha=4.0)
    with torch.no_grad():
        layer.base.weight.copy_(torch.cat([half, -half], dim=1))  # W x is 0 on x = [u, u] ...
        nn.init.normal_(layer.lora_B, std=1e-4)
    x = torch.randn(32, 64).repeat(1, 2)
    term = x.double() @ (layer.lora_B.double() @ layer.lora_A.double()).T  # ... so this is left
    with torch.autocast("cpu", torch.bfloat16):
        by_branch, by_weight = layer(x), F.linear(x, layer.weight)
    assert (by_branch - term).norm() < 0.01 * term.norm()
    assert (by_weight - term).norm() > 0.5 * term.norm()  # what the summed weight would give


@pytest.mark.parametrize("dtype", TOLERANCE)
@each_model
@torch.no_grad()
def test_merging_gives_a_copy_with_the_original_classes_and_keys_and_the_same_output(build, dtype):
    plain, x = build()
    plain, x = plain.to(dtype), x.to(dtype) if x.is_floating_point() else x
    model = fill_injected(copy.deepcopy(plain), rank=16)
    for layer in adapters(model):
        layer.lora_B.mul_(0.1)
    y, state = model(x), copy.deepcopy(model.state_dict())
    merged = merge_lora(model)
    # Two blocks round more often than one layer, and |y| goes up to 3.7 after the last LayerNorm.
    atol = TOLERANCE[dtype] * (1 if dtype == torch.float32 else 2)
    # In eval mode torch's fast path and its attention read the weights and call no adapter.
    for other in (merged(x), model.eval()(x)):
        torch.testing.assert_close(other, y, rtol=0, atol=atol)
    assert (y - plain(x)).abs().max() > 1.3 * atol
    assert list(merged.state_dict()) == list(plain.state_dict())
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    for parameter in merged.parameters():
        assert parameter.is_contiguous()
        parameter.fill_(7.0)  # the argument does not notice
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def tied():
    """One Linear under two names, and an output head that shares the embedding's Parameter."""
    embed, first, head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
    head.weight = embed.weight
    again = nn.Sequential(first, nn.Linear(4, 4))
    return nn.Sequential(OrderedDict(embed=embed, first=first, again=again, head=head))


def test_a_module_of_two_names_has_one_adapter_or_none_and_stays_one_module_when_merged():
    assert inject_lora(tied(), targets=["linear"], skip=["again.0", "head"]) == ["again.1"]
    model, ids = tied(), torch.arange(7)
    assert inject_lora(model, skip=("embed", "head")) == ["first", "again.1"]
    assert model.first is model.again[0]
    assert {key.rsplit(".", 1)[0] for key in lora_state_dict(model)} == {"again.1", "first"}
    merged = merge_lora(fill(model))
    assert merged.first is merged.again[0] and merged.head.weight is merged.embed.weight
    assert list(merged.state_dict()) == list(tied().state_dict())
    torch.testing.assert_close(merged(ids), model(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("skip", [["head"], []])
def test_merging_never_changes_the_untouched_partner_of_a_shared_weight(skip):
    model, ids = tied(), torch.arange(7)
    w = model.head.weight.detach().clone()
    inject_lora(model, skip=skip)
    merged = merge_lora(fill(model))
    assert not torch.equal(merged.embed.weight, w)
    assert torch.equal(merged.head.weight, w) == bool(skip)
    torch.testing.assert_close(merged(ids), model(ids), rtol=0, atol=1e-5)


def test_targets_are_kinds_of_layer_and_skip_takes_names_and_prefixes_of_whole_dotted_parts():
    block1, block10 = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2))
    model = nn.ModuleDict({"block1": block1, "block10": block10, "head": nn.Linear(2, 2)})
    assert inject_lora(model, skip=("block1", "block10.1", "head")) == ["block10.0"]
    assert inject_lora(vit()[0], targets=["conv2d"]) == ["patch_embed.proj"]
    assert len(inject_lora(vit()[0], targets=["linear"])) == 8
    assert inject_lora(text_tower()[0], targets=["embedding"]) == ["token_embedding"]


@pytest.mark.parametrize("layer, settings, message", [
    *[(nn.Linear(2, 2), {name: value}, f"{name}={value}.* expected integer >= 1, > 0")
      for name, value in (("rank", 0), ("rank", 2.5), ("alpha", 0), ("alpha", float("nan")),
                          ("alpha", float("inf")), ("dropout", 1.0))],
    (nn.Linear(2, 2), dict(targets=["conv1d"]), "{'conv1d'}; choose from linear, conv2d"),
    (nn.Linear(2, 2), dict(targets=["conv2d"]), "no layer to adapt inside Sequential"),
    (nn.Linear(2, 2), dict(skip=["0", "hed"]), "Sequential has no attribute `hed`"),
    *[(nn.Embedding(5, 4, **{setting: 1}), {}, fr"1 \(Embedding\) has {setting}")
      for setting in ("max_norm", "scale_grad_by_freq", "sparse")],
    (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), {}, "computed weight"),
    (timm.layers.StdConv2d(2, 2, 3), dict(dropout=0.1), "its own forward"),
    (LoRALinear(nn.Linear(2, 2)), {}, "already, at '1'"),  # a second injection
], ids=str)
def test_what_cannot_be_right_is_refused_in_one_line_and_nothing_changes(layer, settings, message):
    model = nn.Sequential(nn.Linear(2, 2), copy.deepcopy(layer))
    modules, trained = list(model.modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises((ValueError, AttributeError), match=message) as error:
        inject_lora(model, **settings)
    assert "\n" not in str(error.value)
    assert list(model.modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == trained


def test_a_model_that_is_one_layer_is_refused_and_can_be_wrapped_in_the_class_of_its_kind():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"inside Linear .*LoRALinear\(model, rank, alpha\)"):
        inject_lora(model)
    wrapped = LoRALinear(model, 2, 4.0)
    assert list(lora_state_dict(wrapped)) == ["lora_A", "lora_B", "scale"]
    assert not model.weight.requires_grad and type(merge_lora(wrapped)) is nn.Linear


def test_a_subclass_with_a_forward_of_its_own_is_adapted_through_its_weight():
    kind, x = timm.layers.StdConv2d, torch.randn(2, 4, 9, 9)
    model = nn.Sequential(kind(4, 6, 3, stride=2))
    before = model(x)
    inject_lora(model, rank=2)
    assert torch.equal(model(x), before)
    y, merged = fill(model)(x), merge_lora(model)
    assert (y - before).abs().max() > 0.1
    assert torch.equal(merged(x), y) and type(merged[0]) is kind
    y.sum().backward()
    assert model[0].lora_A.grad.any() and model[0].lora_B.grad.any()


@each_model
def test_a_state_from_a_file_and_a_deep_copy_compute_what_the_model_does(build, tmp_path):
    plain, x = build()
    model, other = fill_injected(copy.deepcopy(plain)), fill_injected(copy.deepcopy(plain))
    state = lora_state_dict(model)
    torch.save(state, tmp_path / "lora.pt")
    load_lora_state_dict(other, torch.load(tmp_path / "lora.pt", weights_only=True))
    y, twin = model(x), copy.deepcopy(model)
    assert torch.equal(other(x), y) and torch.equal(twin(x), y)
    fill(twin)  # shares nothing with the model
    assert torch.equal(model(x), y) and not torch.allclose(twin(x), y, atol=1e-3)
    held = {key.replace("base.", "") for key in model.state_dict()}
    assert held == plain.state_dict().keys() | {k for k in state if not k.endswith("scale")}


def test_loading_is_strict_and_names_the_keys():
    def injected(**settings):
        return fill_injected(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), **settings)

    model, state = injected(), lora_state_dict(injected())
    before = lora_state_dict(model)
    for wrong, message in (
        ({key: state[key] for key in state if key != "1.lora_B"}, r"differ in \['1.lora_B'\]"),
        ({**state, "2.lora_A": torch.zeros(1)}, r"differ in \['2.lora_A'\]; inject as for its"),
        (lora_state_dict(injected(alpha=2.0)), r"0.scale \(alpha / rank\) is 0.5, the model's 2")):
        with pytest.raises(ValueError, match=message):
            load_lora_state_dict(model, wrong)
        torch.testing.assert_close(lora_state_dict(model), before, rtol=0, atol=0)
