"""Low-rank adaptation (LoRA) of Linear, Conv2d and Embedding layers. Travels alone.

    from lora import inject_lora, lora_state_dict, merge_lora
    inject_lora(model, rank=16, alpha=8.0)  # after the base weights are loaded; then train
    plain = merge_lora(model)               # no adapters left, the original state-dict keys

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv 2106.09685, eq. 3:

    h = W x + s * B A x    s = alpha / rank; W (out, in) frozen; A (rank, in), B (out, rank) trained

A or B starts at zero: a model computes the same before and right after injection. A layer offers
both ways to evaluate the equation:

- `forward` runs the branch, base(x) + s * B(A(x)): cheaper than building W + s*B*A, and in bf16 B
  and A keep their own precision, where a small s*B*A would be rounded away against W.
- `weight` is the sum W + s*B*A, for code that reads `layer.weight` and never calls the layer:
  nn.MultiheadAttention does so with out_proj, nn.TransformerEncoderLayer in its eval fast path.
  Given the frozen W, such an adapter would do nothing, without an error (as in the authors' runs).

Not adapted: `in_proj_weight` of nn.MultiheadAttention, a bare Parameter and not a layer.
"""
import copy
import math
import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _LoRA(nn.Module):
    """What the three layers share. Each adds shapes() of A and B, delta() = s*B*A in W's shape, and
    branch(x) = s*B(A(x)) or add_branch(x). Raises ValueError for what LoRA cannot work with."""

    adapts: type[nn.Module]

    def __init__(self, base: nn.Module, rank: int = 16, alpha: float = 8.0, dropout: float = 0.0):
        _check(base, self.adapts, rank, alpha, dropout)
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.scale = alpha / rank  # s, a float: with //, alpha 4 and rank 16 would switch it off
        # fp32 under any base: an optimizer step on a bf16 A or B is often below its rounding
        kind = dict(dtype=torch.float32, device=base.weight.device)
        a, b = self.shapes()
        self.lora_A = nn.Parameter(torch.empty(a, **kind))
        self.lora_B = nn.Parameter(torch.empty(b, **kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def weight(self) -> Tensor:
        """W + s*B*A in W's shape and dtype, summed in fp32 or better, differentiable in A and B."""
        w = self.base.weight
        with torch.autocast(w.device.type, enabled=False):  # it would multiply B and A in bf16
            return (w + self.delta()).to(w.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.base).forward is not self.adapts.forward:
            # A subclass with its own arithmetic (timm's StdConv2d) has to see the whole weight.
            return torch.func.functional_call(self.base, {"weight": self.weight}, (x,))
        return self.add_branch(x)

    def add_branch(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.branch(x).to(y.dtype)

    def __getattr__(self, name: str):
        """What is missing here is the base's: `bias`, `in_features`, `stride`, `padding_idx` ..."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "weight":  # the property failed: never hand out the frozen W in its place
                raise
            return getattr(super().__getattr__("base"), name)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"


class LoRALinear(_LoRA):
    """x (..., in) -> (..., out). A (rank, in) starts kaiming uniform, B (out, rank) at zero."""

    adapts = nn.Linear

    def shapes(self) -> tuple[tuple, tuple]:
        return (self.rank, self.base.in_features), (self.base.out_features, self.rank)

    def delta(self) -> Tensor:
        return self.lora_B @ (self.scale * self.lora_A)  # (out, in)

    def add_branch(self, x: Tensor) -> Tensor:
        # Added in place by the product itself: no second tensor of y's size is made or kept.
        rows = x.reshape(-1, x.shape[-1])
        y = self.base(rows)
        rows = F.dropout(rows, self.dropout, self.training)
        down = F.linear(rows, (self.scale * self.lora_A).to(x.dtype))  # (N, rank); s is cheap on A
        y = y.addmm_(down.to(y.dtype), self.lora_B.T.to(y.dtype))
        return y.view(*x.shape[:-1], y.shape[1])


class LoRAConv2d(_LoRA):
    """x (N, in, H, W) -> (N, out, H', W').

    A (groups * rank, in / groups, kh, kw), in the base's geometry with `rank` outputs a group,
    starts kaiming uniform; B (out, rank, 1, 1), a 1x1 convolution in the same groups, at zero.
    """

    adapts = nn.Conv2d

    def shapes(self) -> tuple[tuple, tuple]:
        out_channels, *kernel = self.base.weight.shape  # kernel: in / groups, kh, kw
        return (self.base.groups * self.rank, *kernel), (out_channels, self.rank, 1, 1)

    def delta(self) -> Tensor:
        groups = self.base.groups
        a = (self.scale * self.lora_A).reshape(groups, self.rank, -1)
        b = self.lora_B.reshape(groups, -1, self.rank)  # (groups, out / groups, rank)
        return (b @ a).reshape(self.base.weight.shape)  # (out, in / groups, kh, kw)

    def branch(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        # nn.Conv2d's own helper, so that stride, padding, dilation and groups are the base's
        a = (self.scale * self.lora_A).to(x.dtype)
        down = self.base._conv_forward(x, a, None)  # (N, groups * rank, H', W')
        return F.conv2d(down, self.lora_B.to(x.dtype), groups=self.base.groups)


class LoRAEmbedding(_LoRA):
    """ids (...) -> (..., dim). A (rank, V) starts at zero, B (dim, rank) at N(0, 1).

    The row of `padding_idx` has no branch: it stays the base's and gives no gradient. Dropout drops
    the whole branch of a token, as on one-hot ids, since an id has no parts.
    """

    adapts = nn.Embedding

    def shapes(self) -> tuple[tuple, tuple]:
        return (self.rank, self.base.num_embeddings), (self.base.embedding_dim, self.rank)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.lora_A)
        nn.init.normal_(self.lora_B)

    def delta(self) -> Tensor:
        delta = self.lora_A.T @ (self.scale * self.lora_B).T  # (V, dim)
        if self.base.padding_idx is None:
            return delta
        row = torch.tensor(self.base.padding_idx, device=delta.device)
        return delta.index_fill(0, row, 0.0)

    def branch(self, ids: Tensor) -> Tensor:
        # Look up, then multiply: nothing of size V * dim is built
        scale_grad = self.base.scale_grad_by_freq
        down = F.embedding(ids, self.lora_A.T, scale_grad_by_freq=scale_grad)  # (..., rank)
        if self.base.padding_idx is not None:
            down = down.masked_fill((ids == self.base.padding_idx).unsqueeze(-1), 0.0)
        keep = F.dropout(torch.ones_like(down[..., :1]), self.dropout, self.training)  # (..., 1)
        return F.linear(down * keep, self.scale * self.lora_B)  # (..., dim)


TARGETS = {"linear": LoRALinear, "conv2d": LoRAConv2d, "embedding": LoRAEmbedding}


def inject_lora(model: nn.Module, rank: int = 16, alpha: float = 8.0, dropout: float = 0.0,
                targets: Iterable[str] = ("linear", "conv2d", "embedding"),
                skip: Iterable[str] = ()) -> list[str]:
    """Freeze all parameters of `model`, put an adapter on each targeted layer, return their names.

    skip: modules left alone with all they contain; "blocks.1" skips blocks.1.mlp, not blocks.10. A
    module with several names gets one adapter, or none if one of the names is skipped. Raises
    ValueError, the model unchanged, for a setting or layer that cannot be right, a second
    injection, a model that is itself one target layer, or no layer to adapt.
    """
    targets, skip = tuple(targets), tuple(skip)
    named = list(model.named_modules(remove_duplicate=False))
    names = [name for name, _ in named]
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"unknown target {target!r}; choose from {', '.join(TARGETS)}")
    for prefix in skip:
        if prefix not in names:
            raise ValueError(f"skip: no module is named {prefix!r}; see model.named_modules()")
    for name, module in named:
        if isinstance(module, _LoRA):
            raise ValueError(f"LoRA is in the model already, at {name!r}; inject once")

    prefixes = tuple(f"{prefix}." for prefix in skip)
    skipped = {module for name, module in named if f"{name}.".startswith(prefixes)}
    layers = {}  # layer -> (name, class of its adapter)
    for name, module in model.named_modules():
        for target in targets:
            if isinstance(module, TARGETS[target].adapts) and module not in skipped:
                _check(module, TARGETS[target].adapts, rank, alpha, dropout, name)
                layers[module] = name, TARGETS[target]
    if model in layers:
        raise ValueError(f"a lone {type(model).__name__} cannot be replaced in place; "
                         f"use model = {layers[model][1].__name__}(model, rank, alpha)")
    if not layers:
        raise ValueError(f"no layer to adapt in {type(model).__name__} by {targets=}, {skip=}")
    for module, (name, _) in layers.items():
        for other, owner in named:  # an output head tied to an embedding
            if owner is not module and module.weight in set(owner._parameters.values()):
                warnings.warn(f"{name} shares its weight with {other} but not its adapter: they "
                              "differ once trained; skip both to keep the tie", stacklevel=2)

    model.requires_grad_(False)
    adapters = {module: kind(module, rank, alpha, dropout) for module, (_, kind) in layers.items()}
    _replace(model, adapters)
    return [name for name, _ in layers.values()]


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of each adapter's lora_A, lora_B and scale (alpha / rank, to notice a wrong alpha)."""
    state = {}
    for name, module in model.named_modules():  # an adapter with several names is listed once
        if isinstance(module, _LoRA):
            for key in ("lora_A", "lora_B", "scale"):
                tensor = torch.as_tensor(getattr(module, key))
                state[f"{name}.{key}".lstrip(".")] = tensor.detach().clone()
    return state


def load_lora_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a `lora_state_dict` into a model injected in the same way.

    Raises ValueError, nothing loaded, naming keys that are missing, unexpected or do not fit.
    """
    expected = lora_state_dict(model)
    problems = [f"missing {key}" for key in expected.keys() - state.keys()]
    problems += [f"unexpected {key}" for key in state.keys() - expected.keys()]
    for key in expected.keys() & state.keys():
        ours, theirs = expected[key], state[key]
        if ours.shape != theirs.shape:
            problems.append(f"{key} is {tuple(theirs.shape)}, the model's {tuple(ours.shape)}")
        elif key.endswith("scale") and not torch.isclose(ours, theirs, rtol=1e-3):
            problems.append(f"{key} (alpha / rank) is {theirs:g}, the model's {ours:g}")
    if problems:
        raise ValueError(f"LoRA state, {len(problems)} keys do not fit: "
                         f"{'; '.join(sorted(problems)[:8])}. Inject as for the model it is from")
    weights = {key: x for key, x in state.items() if not key.endswith("scale")}
    model.load_state_dict(weights, strict=False)


def merge_lora(model: nn.Module) -> nn.Module:
    """A new module with s*B*A added to each adapted weight: original classes and state-dict keys.

    The argument is neither changed nor shared with. Sums are computed in fp32 and stored in the
    base's dtype. No way back: subtracting s*B*A does not restore W exactly.
    """
    merged = copy.deepcopy(model)
    plain = {}  # adapter -> its base layer, with the sum for a weight
    for adapter in merged.modules():
        if isinstance(adapter, _LoRA):
            plain[adapter] = base = adapter.base
            # A new Parameter, not a sum in place: a module that shares the old one keeps it.
            base.weight = nn.Parameter(adapter.weight.detach(), base.weight.requires_grad)
    _replace(merged, plain)
    return plain.get(merged, merged)  # the former if the model was itself one adapter


def _check(base: nn.Module, kind: type, rank, alpha, dropout, name: str = "base") -> None:
    """Raise ValueError for a layer or a setting that LoRA cannot work with."""
    layer = f"{name} ({type(base).__name__})"
    problems = {
        f"rank is {rank}; expected an integer of at least 1": not isinstance(rank, int) or rank < 1,
        f"alpha is {alpha}; expected a number above 0": not 0 < alpha < math.inf,
        f"dropout is {dropout}; expected 0 to below 1": not 0 <= dropout < 1,
        f"{layer} is not an nn.{kind.__name__}; use the class of its type":
            not isinstance(base, kind),
        f"{layer} has a computed weight (parametrization), nothing to merge into; skip it":
            base._parameters.get("weight") is None,
        f"{layer} has its own forward, no place for dropout; skip it or set 0":
            dropout and type(base).forward is not kind.forward,
        f"{layer} has max_norm, which rescales W blind to s*B*A; skip it or unset it":
            getattr(base, "max_norm", None) is not None,
        f"{layer} has sparse=True, but A's gradient is dense; skip it or unset it":
            getattr(base, "sparse", False)}
    for problem, found in problems.items():
        if found:
            raise ValueError(problem)


def _replace(model: nn.Module, new: dict[nn.Module, nn.Module]) -> None:
    """Put new[child] in the place of each child that is in `new`, under all of its names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])
