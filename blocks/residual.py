"""The residual branch: everything that happens to a branch before it is added."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from blocks.base import GateFactory, Norm, Site
from blocks.gates import NoGate
from blocks.kernels import norm as kernel
from blocks.kernels.linear import eager, precision, unhooked
from blocks.norms import LayerNorm


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Drops whole samples (first dimension) with probability `rate` and scales the others by 1 / (1 - rate).

    Source: stochastic depth, arXiv 1603.09382, as timm's `drop_path`.
    """
    return x * kept(x, rate)


def kept(x: Tensor, rate: float) -> Tensor:
    """What `drop_path` multiplies the samples of `x` by."""
    keep = 1.0 - rate
    mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
    return mask.div_(keep)


class Residual(nn.Module):
    """`x + drop_path(scale · layer_scale · gate(y))`, for tokens `(B, N, C)`.

    Args:
        scale: constant factor on the branch.
        layer_scale: initial value of a learned factor for each channel; 0 makes none (arXiv 2103.17239).
        gate: weighs the branch's channels, for example `TanhGate` for TNT's SE.

    The drop-path rate is the site's.
    """

    def __init__(self, site: Site, scale: float = 1.0, layer_scale: float = 0.0, gate: GateFactory = NoGate) -> None:
        super().__init__()
        self.gate = gate(site.inp.dim)
        self.scale = scale
        self.rate = site.drop_path
        self.layer_scale = nn.Parameter(torch.full((site.inp.dim,), layer_scale)) if layer_scale else None

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        y = self.gate(y)
        if self.layer_scale is not None:
            y = y * self.layer_scale
        if self.scale != 1.0:
            y = y * self.scale
        if sums(x, y):
            return kernel.added(x, y, self.factor(x))
        if self.training and self.rate > 0.0:
            if x.dtype is y.dtype:
                return torch.addcmul(x, y, kept(y, self.rate))
            y = drop_path(y, self.rate)
        return x + y

    def factor(self, x: Tensor) -> Tensor | None:
        """What stochastic depth multiplies the samples of a branch by, drawn anew; None for nothing."""
        return kept(x, self.rate) if self.training and self.rate > 0.0 else None

    @property
    def plain(self) -> bool:
        """Whether nothing happens to the branch but stochastic depth, and nobody looks."""
        known = type(self) is Residual and type(self.gate) is NoGate and unhooked(self, self.gate)
        return known and self.layer_scale is None and self.scale == 1.0

    def extra_repr(self) -> str:
        return f"drop_path={self.rate:.3g}" + (f", scale={self.scale}" if self.scale != 1.0 else "")


class LearnedResidual(Residual):
    """`a · x + b · drop_path(y)` with one learned number each, both 1 at the start.

    Source: SReT, arXiv 2111.05297, learnable residual connections; szq0214/SReT SReT.py, LearnableCoefficient.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.skip = nn.Parameter(torch.ones(1))
        self.branch = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(self.skip * x, self.branch * y)


def sums(x: Tensor, branch: Tensor) -> bool:
    """Whether there is a kernel that adds these without a copy in x's precision, as torch makes."""
    mixed = x.dtype is torch.float32 and branch.dtype is torch.bfloat16
    return mixed and x.shape == branch.shape and kernel.serves(branch.dtype, x, branch)


def add_norm(
    x: Tensor,
    norm: Norm,
    low: bool,
    branch: Tensor | None = None,
    residual: Residual | None = None,
    own: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """`residual(x, branch)`, and what `norm` makes of that, in one operation; None where there is no kernel for it.

    Args:
        low: whether all that is done with the norm's result are products: under autocast it may have their precision.
        branch: None for none, and x itself in the place of the sum; to be used instead of x, as it brings x's gradients
            together.
        own: as of the kernel.
    """
    if type(norm) is not LayerNorm or x.dtype is not torch.float32 or not unhooked(norm):
        return None
    dtype = torch.bfloat16 if low and precision(x) is torch.bfloat16 else torch.float32
    if branch is not None and not (branch.dtype is dtype and residual is not None and residual.plain):
        return None
    weight, bias = norm.weight, norm.bias
    if not kernel.serves(dtype, x, weight, bias, branch) or not kernel.learns(weight, bias, x, branch):
        return None
    factor = None if residual is None else residual.factor(x)
    return kernel.add_norm(x, weight, bias, norm.eps, dtype, branch, factor, own)


def add_to(x: Tensor, branch: Tensor, residual: Residual) -> Tensor:
    """`residual(x, branch)` of an x that nobody else holds: without gradients, in its place."""
    if not torch.is_grad_enabled() and residual.plain and x.shape == branch.shape and eager(x, branch):
        if x.dtype is branch.dtype:
            factor = residual.factor(x)
            return x.add_(branch) if factor is None else x.addcmul_(branch, factor)
        if sums(x, branch):
            return kernel.added(x, branch, residual.factor(x), own=True)
    return residual(x, branch)


ResidualFactory = Callable[[Site], Residual]
