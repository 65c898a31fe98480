"""Training of a residual branch of batch norm, Linear, ReLU and Linear, as one function with its own backward pass.

Each pass is one call (`cpp/branch.cpp`). Of samples that stochastic depth drops, the norm knows, and nothing behind it.
The norm's scale and shift are put into the first Linear, so that what it gives is never written down; gradients between
the two layers are made and used up in pieces. For the backward pass it keeps its input and what ReLU gave.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.base import Norm
from blocks.kernels import batch_norm, native, products
from blocks.kernels.linear import DTYPES, Linear, eager, precision, unhooked
from blocks.mlp import Mlp, ReLU
from blocks.norms import BatchNorm
from blocks.residual import Residual

# Numbers between the two layers, at a time: enough that the weights, which are read for each piece, weigh little.
HIDDEN = 2**23


def serves(residual: nn.Module, norm: Norm, mlp: nn.Module, x: Tensor) -> bool:
    """Whether `branch` computes what these parts would, of just the known types, on tokens `(B, N, C)` like `x`."""
    if not torch.is_grad_enabled() or not eager(x) or x.dtype not in DTYPES or precision(x) is not x.dtype:
        return False
    if not isinstance(residual, Residual) or not residual.plain or type(norm) is not BatchNorm or type(mlp) is not Mlp:
        return False
    bn, layers, lanes = norm.bn, (mlp.fc1, mlp.fc2), products.lanes(x.dtype)
    if type(bn) is not nn.BatchNorm2d or type(mlp.act) is not ReLU or not x.is_contiguous():
        return False
    if any(type(layer) is not Linear for layer in layers) or mlp.fc1.out_features % lanes or x.shape[2] % lanes:
        return False
    if not products.preferred(x.dtype):
        return False
    if not batch_norm.serves(bn, _as_map(x)):
        return False
    parameters = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    if not eager(*parameters) or any(p is None or p.dtype is not torch.float32 for p in parameters):
        return False
    if not all(p.is_contiguous() for p in parameters) or mlp.drops:
        return False
    if not all(t.requires_grad for t in (bn.weight, bn.bias, *parameters)):  # the kernel gives all gradients
        return False
    return unhooked(norm, bn, mlp, *mlp.children())


def branch(residual: Residual, norm: Norm, mlp: nn.Module, x: Tensor) -> Tensor:
    """`residual(x, mlp(norm(x)))`, where `serves` says so."""
    bn = norm.bn
    assert isinstance(mlp, Mlp)
    assert isinstance(bn, nn.BatchNorm2d)
    with torch.no_grad():
        moments, folded = batch_norm.statistics(bn, _as_map(x))
    keep = residual.factor(x)
    keep = None if keep is None else keep.float()
    parts = (bn.weight, bn.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    return _Branch.apply(x, *parts, moments, folded, keep, bn.eps)


def _as_map(x: Tensor) -> Tensor:
    """Tokens as a map for statistics, which do not ask where a token lies."""
    return x.detach().view(-1, x.shape[-1], 1, 1)


def _plain(x: Tensor, parts: Sequence[Tensor], keep: Tensor | None, eps: float) -> Tensor:
    scale, shift, w1, b1, w2, b2 = (part.to(x.dtype) for part in parts)
    normed = F.batch_norm(x.flatten(0, 1), None, None, scale, shift, True, 0.0, eps).view(x.shape)
    y = F.linear(F.relu(F.linear(normed, w1, b1)), w2, b2)
    return x + (y if keep is None else y * keep.to(y.dtype))


class Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "each", "most", "dim", "hidden", "threads")),
        ("eps", ctypes.c_double),
    ]  # fmt: skip


@cache
def _room(dtype: torch.dtype, *sizes: int) -> list[int]:
    """Bytes that each pass works in."""
    return native.room("branch_room", dtype, Shape(*sizes))


class _Branch(torch.autograd.Function):
    """Keeps the input and what ReLU gave."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
        moments: Tensor, folded: Tensor, keep: Tensor | None, eps: float,
    ) -> Tensor:  # fmt: skip
        (hidden, width), (batch, each) = w1.shape, x.shape[:2]
        ctx.sizes, ctx.eps = (batch, each, max(HIDDEN // hidden, 1), width, hidden), eps
        made, between = torch.empty_like(x), x.new_empty(batch, each, hidden)
        sizes = (*ctx.sizes, torch.get_num_threads())
        shape, work = Shape(*sizes, eps), native.space(_room(x.dtype, *sizes)[0])
        given = (x, native.places((w1, b1, w2, b2)), moments, folded, keep)
        native.run("branch_forward", x.dtype, shape, *given, between, work, made)
        ctx.save_for_backward(x, scale, shift, w1, b1, w2, b2, moments, folded, keep, between)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *parts, moments, folded, keep, between = ctx.saved_tensors
        if torch.is_grad_enabled():  # these gradients will be differentiated in turn
            with torch.autocast("cpu", enabled=False):
                needed = [t for t, need in zip((x, *parts), ctx.needs_input_grad, strict=False) if need]
                found = iter(torch.autograd.grad(_plain(x, parts, keep, ctx.eps), needed, grad, create_graph=True))
            return *(next(found) if need else None for need in ctx.needs_input_grad[:7]), None, None, None, None
        dx, (scale, shift, *layers), grad = torch.empty_like(x), parts, grad.contiguous()
        each = [torch.empty_like(p) for p in (*layers, scale, shift)]
        sizes = (*ctx.sizes, torch.get_num_threads())
        shape, work = Shape(*sizes, ctx.eps), native.space(_room(x.dtype, *sizes)[1])
        given = (x, native.places(layers), moments, folded, keep, between, grad)
        native.run("branch_backward", x.dtype, shape, *given, work, dx, native.places(each))
        return dx, *each[4:], *each[:4], None, None, None, None
