"""Training of a residual branch of convolution, batch norm, ReLU and Linear, as one function with its own backward.

Each pass is one call (`cpp/conv_branch.cpp`). Of samples that stochastic depth drops, the norm knows, and nothing after
it. For the backward pass it keeps its input, and what the convolution and ReLU gave.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.base import Grid
from blocks.kernels import batch_norm, native, products
from blocks.kernels import conv as kernel
from blocks.kernels.folded import Convolution
from blocks.kernels.linear import Linear, eager, precision, unhooked
from blocks.mlp import ReLU
from blocks.norms import BatchNorm
from blocks.residual import Residual


def conv_branch(residual: Residual, x: Tensor, grid: Grid, conv: Convolution, layer: nn.Module) -> Tensor | None:
    """`residual(x, layer(act(norm(conv(x)))))` of tokens on a grid; None where there is no kernel for it."""
    (first, norm, act), dtype = conv, x.dtype
    if not torch.is_grad_enabled() or not eager(x) or precision(x) is not dtype or not x.is_contiguous():
        return None
    if type(norm) is not BatchNorm or type(act) is not ReLU or type(layer) is not Linear or not residual.plain:
        return None
    bn = norm.bn
    if type(first) is not nn.Conv2d or type(bn) is not nn.BatchNorm2d or not unhooked(first, norm, bn, act, layer):
        return None
    map = x.detach().view(len(x), *grid, x.shape[2]).permute(0, 3, 1, 2)
    if not products.preferred(dtype) or not kernel.chosen(first, map, dtype) or not batch_norm.serves(bn, map):
        return None
    if not native.has("conv_branch_forward", dtype) or first.bias is not None or layer.bias is not None:
        return None
    last = first.weight.is_contiguous(memory_format=torch.channels_last)
    parts = (first.weight, bn.weight, bn.bias, layer.weight)
    if not eager(*parts) or not all(p.dtype is torch.float32 and p.requires_grad for p in parts):
        return None
    if not (last or first.weight.is_contiguous()) or not layer.weight.is_contiguous():
        return None
    batch_norm.count(bn)
    keep = residual.factor(x)
    settings = (len(x), *grid, first.groups, torch.get_num_threads(), x.shape[2], last, bn.eps, bn.momentum)
    made = _ConvBranch.apply(x, *parts, bn.running_mean, bn.running_var, keep, settings)
    torch.autograd.graph.increment_version((bn.running_mean, bn.running_var))
    return made


class Shape(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("height", "width", "groups", "threads")),
        *((name, ctypes.c_int64) for name in ("dim", "last")),
        *((name, ctypes.c_double) for name in ("eps", "momentum")),
    ]


@cache
def _room(dtype: torch.dtype, *settings: float) -> list[int]:
    """Bytes that the forward pass keeps, and that each pass works in."""
    return native.room("conv_branch_room", dtype, Shape(*settings))


def _plain(x: Tensor, parts: Sequence[Tensor], keep: Tensor | None, grid: Grid, groups: int, eps: float) -> Tensor:
    filters, scale, shift, weight = (part.to(x.dtype) for part in parts)
    map = F.conv2d(x.unflatten(1, grid).permute(0, 3, 1, 2), filters, padding=1, groups=groups)
    map = F.relu(F.batch_norm(map, None, None, scale, shift, True, 0.0, eps))
    y = F.linear(map.permute(0, 2, 3, 1).flatten(1, 2), weight)
    return x + (y if keep is None else y * keep.to(y.dtype))


class _ConvBranch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, filters: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, mean: Tensor,
        variance: Tensor, keep: Tensor | None, settings: tuple[Any, ...],
    ) -> Tensor:  # fmt: skip
        ctx.settings, (keeps, works, _, _) = settings, _room(x.dtype, *settings)
        keep = None if keep is None else keep.float()
        made, kept, work = torch.empty_like(x), native.space(keeps), native.space(works)
        given = (x, native.places((filters, scale, shift, weight)), mean, variance, keep)
        native.run("conv_branch_forward", x.dtype, Shape(*settings), *given, kept, work, made)
        ctx.save_for_backward(x, filters, scale, shift, weight, keep, kept)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *parts, keep, kept = ctx.saved_tensors
        settings, rest = ctx.settings, 4 * (None,)
        if torch.is_grad_enabled():  # these gradients will be differentiated in turn
            grid, groups, eps = settings[1:3], settings[3], settings[7]
            with torch.autocast("cpu", enabled=False):
                needed = [t for t, need in zip((x, *parts), ctx.needs_input_grad, strict=False) if need]
                made = _plain(x, parts, keep, grid, groups, eps)
                found = iter(torch.autograd.grad(made, needed, grad, create_graph=True))
            return *(next(found) if need else None for need in ctx.needs_input_grad[:5]), *rest
        dx, grad, work = torch.empty_like(x), grad.contiguous(), native.space(_room(x.dtype, *settings)[2])
        each = [torch.empty_like(p) for p in parts]
        given = (x, native.places(parts), keep, kept, grad, work, dx)
        native.run("conv_branch_backward", x.dtype, Shape(*settings), *given, native.places(each))
        return dx, *each, *rest
