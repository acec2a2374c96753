"""Low-rank adaptation (LoRA) of Linear, Conv2d and Embedding layers. Travels alone.

    from lora import inject_lora, merge_lora
    inject_lora(model, rank=16, alpha=8.0)  # after the base weights are loaded; then train
    plain = merge_lora(model)               # no adapters left, the original state-dict keys

Hu et al. 2021, arXiv 2106.09685, eq. 3. A or B starts at zero: injection changes no output.

    h = W x + s * B A x    s = alpha / rank; W (out, in) frozen; A (rank, in), B (out, rank) trained

`forward` runs the branch, base(x) + s * B(A(x)): cheaper than the sum W + s*B*A, where bf16 would
round a small s*B*A away. `weight` is the sum, for code that reads it and never calls the layer
(nn.MultiheadAttention's out_proj): given W, an adapter there silently does nothing, as in the
authors' runs. Bare Parameters (in_proj_weight) stay.
"""
import copy
import math
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _LoRA(nn.Module):
    """What the layers share. Each subclasses what it adapts, for code (open_clip's SigLIP) that
    asks isinstance(layer, nn.Linear)."""

    def __init__(self, base: nn.Module, rank: int = 16, alpha: float = 8.0, dropout: float = 0.0):
        _check(base, type(self), rank, alpha, dropout)
        nn.Module.__init__(self)  # nn.Linear's would make a second weight
        self.base = base.requires_grad_(False)
        self.rank, self.dropout, self.scale = rank, dropout, alpha / rank
        with torch.device(base.weight.device):
            a, b = self.start()
        # fp32 under any base: a step on a bf16 A or B is often below its rounding
        self.lora_A, self.lora_B = nn.Parameter(a.float()), nn.Parameter(b.float())

    def start(self) -> tuple[Tensor, Tensor]:
        out, *kernel = self.base.weight.shape  # (in,) or (in / groups, kh, kw)
        a = torch.empty(getattr(self.base, "groups", 1) * self.rank, *kernel)
        b = torch.zeros(out, self.rank, *[1] * (len(kernel) - 1))
        return nn.init.kaiming_uniform_(a, math.sqrt(5)), b

    @property
    def weight(self) -> Tensor:
        """W + s*B*A in W's dtype, summed in fp32 or better, differentiable in A and B."""
        w = self.base.weight
        with torch.autocast(w.device.type, enabled=False):  # it would multiply B and A in bf16
            return (w + self.delta()).to(w.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if type(self.base).forward is not self.adapts.forward:
            # A subclass with its own arithmetic (timm's StdConv2d) needs the whole weight
            return torch.func.functional_call(self.base, {"weight": self.weight}, (x,))
        return self.add_branch(x)

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "weight"):  # a failed sum never gives the frozen W
                raise
            return getattr(self.base, name)  # bias, in_features, stride ...


class LoRALinear(_LoRA, nn.Linear):
    """x (..., in) -> (..., out). A (rank, in), B (out, rank)."""
    adapts = nn.Linear

    def delta(self) -> Tensor:
        return self.lora_B @ (self.scale * self.lora_A)  # (out, in)

    def add_branch(self, x: Tensor) -> Tensor:
        # Added in place by the product: no second tensor of y's size
        rows = x.reshape(-1, x.shape[-1])
        y = self.base(rows)
        rows = F.dropout(rows, self.dropout, self.training)
        down = F.linear(rows, (self.scale * self.lora_A).to(x.dtype))  # (N, rank); s is cheap on A
        y.addmm_(down.to(y.dtype), self.lora_B.T.to(y.dtype))
        return y.view(*x.shape[:-1], y.shape[1])


class LoRAConv2d(_LoRA, nn.Conv2d):
    """x (N, in, H, W) -> (N, out, H', W'). A (groups * rank, in / groups, kh, kw) has the base's
    geometry, B (out, rank, 1, 1) its groups."""
    adapts = nn.Conv2d

    def delta(self) -> Tensor:
        groups = self.base.groups
        a = (self.scale * self.lora_A).reshape(groups, self.rank, -1)
        b = self.lora_B.reshape(groups, -1, self.rank)  # (groups, out / groups, rank)
        return (b @ a).reshape(self.base.weight.shape)  # (out, in / groups, kh, kw)

    def add_branch(self, x: Tensor) -> Tensor:
        y = self.base(x)
        x = F.dropout(x, self.dropout, self.training)
        # nn.Conv2d's helper has the base's stride, padding, padding_mode, dilation and groups
        down = self.base._conv_forward(x, (self.scale * self.lora_A).to(x.dtype), None)
        up = F.conv2d(down, self.lora_B.to(x.dtype), groups=self.base.groups)  # (N, out, H', W')
        return y + up.to(y.dtype)


class LoRAEmbedding(_LoRA, nn.Embedding):
    """ids (...) -> (..., dim). A (rank, V) starts at zero, B (dim, rank) at N(0, 1). The row of
    `padding_idx` stays that of W. Dropout drops a token's whole branch: an id has no parts."""
    adapts = nn.Embedding

    def start(self) -> tuple[Tensor, Tensor]:
        vocabulary, dim = self.base.weight.shape
        return torch.zeros(self.rank, vocabulary), torch.randn(dim, self.rank)

    def delta(self) -> Tensor:
        delta = self.lora_A.T @ (self.scale * self.lora_B).T  # (V, dim)
        if self.base.padding_idx is not None:
            delta[self.base.padding_idx] = 0.0
        return delta

    def add_branch(self, ids: Tensor) -> Tensor:
        y = self.base(ids)
        down = F.embedding(ids, self.lora_A.T)  # (..., rank); nothing of size V * dim is built
        if self.base.padding_idx is not None:
            down = down.masked_fill((ids == self.base.padding_idx).unsqueeze(-1), 0.0)
        keep = F.dropout(torch.ones_like(down[..., :1]), self.dropout, self.training)  # (..., 1)
        return y + F.linear(down * keep, self.scale * self.lora_B).to(y.dtype)


TARGETS = {"linear": LoRALinear, "conv2d": LoRAConv2d, "embedding": LoRAEmbedding}


def inject_lora(model: nn.Module, rank: int = 16, alpha: float = 8.0, dropout: float = 0.0,
                targets: Collection[str] = (*TARGETS,), skip: Collection[str] = ()) -> list[str]:
    """Freeze `model`, put an adapter on each targeted layer and return their names.

    skip: modules left alone with all they contain, as both ends of a tied weight. A layer of
    several names gets one adapter. ValueError, the model unchanged, for what cannot be right.
    """
    if unknown := {*targets} - {*TARGETS}:
        raise ValueError(f"unknown target {unknown}; choose from {', '.join(TARGETS)}")
    skipped = {part for name in skip for part in model.get_submodule(name).modules()}
    found = {}  # layer -> its name, its adapter's class
    for name, module in model.named_modules():
        if isinstance(module, _LoRA):
            raise ValueError(f"LoRA is in the model already, at {name!r}; inject once")
        for kind in map(TARGETS.get, targets):
            if isinstance(module, kind.adapts) and module not in skipped:
                _check(module, kind, rank, alpha, dropout, name)
                found[module] = name, kind
    if not found or model in found:
        raise ValueError(f"no layer to adapt inside {type(model).__name__} by {targets=}; "
                         "a lone layer: model = LoRALinear(model, rank, alpha)")
    model.requires_grad_(False)
    _replace(model, {x: kind(x, rank, alpha, dropout) for x, (_, kind) in found.items()})
    return [name for name, _ in found.values()]


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of each adapter's lora_A, lora_B and scale (which tells a wrong alpha)."""
    return {f"{name}.{key}".lstrip("."): torch.as_tensor(getattr(layer, key)).detach().clone()
            for name, layer in model.named_modules() if isinstance(layer, _LoRA)
            for key in ("lora_A", "lora_B", "scale")}


def load_lora_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy a `lora_state_dict` into a model injected alike. ValueError: other keys or scale."""
    expected = lora_state_dict(model)
    if differ := sorted(expected.keys() ^ state.keys()):
        raise ValueError(f"LoRA state and model differ in {differ[:3]}; inject as for its model")
    for key, ours in expected.items():
        if key.endswith("scale") and not torch.isclose(ours, state[key], rtol=1e-3):
            raise ValueError(f"{key} (alpha / rank) is {state[key]:g}, the model's {ours:g}")
    model.load_state_dict(state, strict=False)  # the base's keys are not in it


def merge_lora(model: nn.Module) -> nn.Module:
    """A copy with s*B*A added to each adapted weight: the original classes and state-dict keys."""
    merged = copy.deepcopy(model)
    plain = {layer: layer.base for layer in merged.modules() if isinstance(layer, _LoRA)}
    for layer, base in plain.items():
        # A new Parameter, not a sum in place: a module that shares the old one keeps it
        base.weight = nn.Parameter(layer.weight.detach(), base.weight.requires_grad)
    _replace(merged, plain)
    return plain.get(merged, merged)  # the model may be one adapter


def _check(base: nn.Module, kind: type, rank, alpha, dropout, name: str = "base"):
    if not isinstance(rank, int) or rank < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1:
        raise ValueError(f"{rank=}, {alpha=}, {dropout=}; expected integer >= 1, > 0, [0, 1)")
    settings = "max_norm", "scale_grad_by_freq", "sparse"
    reasons = [f"{x}, which is blind to s*B*A" for x in settings if getattr(base, x, None)]
    if base._parameters.get("weight") is None:
        reasons.append("a computed weight, nothing to merge into")
    if dropout and type(base).forward is not kind.adapts.forward:
        reasons.append("its own forward, no place for dropout")
    if reasons:
        raise ValueError(f"{name} ({type(base).__name__}) has {reasons[0]}; skip it")


def _replace(model: nn.Module, new: dict):
    """Put new[child] in the place of each child in `new`, under all of its names."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                setattr(parent, name, new[child])
