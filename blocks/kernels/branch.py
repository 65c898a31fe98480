"""Training of a residual branch of batch norm, Linear, ReLU and Linear, as one function with its own backward pass.

The norm's scale and shift are put into the first Linear, so that what it gives is never written down; nor are the
gradients between the two layers, which are made and used up in pieces that stay in the processor's cache. For the
backward pass it keeps its input and what ReLU gave.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.base import Norm
from blocks.gates import NoGate
from blocks.kernels import batch_norm, products
from blocks.kernels.linear import DTYPES, ROWS, Linear, eager, precision, unhooked
from blocks.kernels.native import call
from blocks.mlp import Mlp, ReLU
from blocks.norms import BatchNorm
from blocks.residual import Residual, kept

# Numbers between the two layers, at a time; but no fewer rows than make a product fast.
HIDDEN = 2**20


def serves(residual: nn.Module, norm: Norm, mlp: nn.Module, x: Tensor) -> bool:
    """Whether `branch` computes what these parts would, of just the known types, on tokens `(B, N, C)` like `x`."""
    if not torch.is_grad_enabled() or not eager(x) or x.dtype not in DTYPES or precision(x) is not x.dtype:
        return False
    if type(residual) is not Residual or type(norm) is not BatchNorm or type(mlp) is not Mlp:
        return False
    bn, layers = norm.bn, (mlp.fc1, mlp.fc2)
    if type(bn) is not nn.BatchNorm2d or type(mlp.act) is not ReLU or not x.is_contiguous():
        return False
    if any(type(layer) is not Linear for layer in layers) or mlp.fc1.out_features % batch_norm.LANES:
        return False
    if not batch_norm.serves(bn, _as_map(x)):
        return False
    if type(residual.gate) is not NoGate or residual.layer_scale is not None or residual.scale != 1.0:
        return False
    parameters = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    if not eager(*parameters) or any(p is None or p.dtype is not torch.float32 for p in parameters):
        return False
    if not all(p.is_contiguous() for p in parameters) or (mlp.training and mlp.drop.p):
        return False
    if not any(t.requires_grad for t in (x, bn.weight, bn.bias, *parameters)):
        return False
    return unhooked(residual, residual.gate, norm, bn, mlp, *mlp.children())


def branch(residual: Residual, norm: Norm, mlp: nn.Module, x: Tensor) -> Tensor:
    """`residual(x, mlp(norm(x)))`, where `serves` says so."""
    bn = norm.bn
    assert isinstance(mlp, Mlp)
    assert isinstance(bn, nn.BatchNorm2d)
    with torch.no_grad():
        moments, folded = batch_norm.statistics(bn, _as_map(x))
    keep = None
    if residual.training and residual.rate > 0.0:
        keep = kept(x, residual.rate).float()
    parts = (bn.weight, bn.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    return _Branch.apply(x, *parts, moments, folded, keep, bn.eps)


def _as_map(x: Tensor) -> Tensor:
    """Tokens as a map for statistics, which do not ask where a token lies."""
    return x.detach().view(-1, x.shape[-1], 1, 1)


def _plain(x: Tensor, parts: tuple[Tensor, ...], keep: Tensor | None, eps: float) -> Tensor:
    scale, shift, w1, b1, w2, b2 = (part.to(x.dtype) for part in parts)
    normed = F.batch_norm(x.flatten(0, 1), None, None, scale, shift, True, 0.0, eps).view(x.shape)
    y = F.linear(F.relu(F.linear(normed, w1, b1)), w2, b2)
    return x + (y if keep is None else y * keep.to(y.dtype))


class _Branch(torch.autograd.Function):
    """Keeps the input and, piece by piece, what ReLU gave."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
        moments: Tensor, folded: Tensor, keep: Tensor | None, eps: float,
    ) -> Tensor:  # fmt: skip
        (hidden, width), each = w1.shape, x.shape[1]
        weight, bias = batch_norm.fold(w1, b1, folded[0], folded[1], x.dtype)
        count = max(max(HIDDEN // hidden, ROWS) // each, 1)
        out, kept = torch.empty_like(x), []
        with torch.autocast("cpu", enabled=False):
            for piece, place, by in zip(x.split(count), out.split(count), _split(keep, count), strict=False):
                rows = piece.flatten(0, 1)
                kept.append(products.forward(rows, weight, bias, "relu"))
                y = products.forward(kept[-1], w2, b2)
                call("branch_added", x.dtype, rows, y, by, each, len(rows), width, place)
        ctx.count, ctx.eps = count, eps
        ctx.save_for_backward(x, scale, shift, w1, b1, w2, b2, moments, folded, keep, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *rest = ctx.saved_tensors
        parts, (moments, folded, keep), hidden = tuple(rest[:6]), rest[6:9], rest[9:]
        with torch.autocast("cpu", enabled=False):
            if torch.is_grad_enabled():  # these gradients will be differentiated in turn
                needed = [t for t, need in zip((x, *parts), ctx.needs_input_grad, strict=False) if need]
                found = iter(torch.autograd.grad(_plain(x, parts, keep, ctx.eps), needed, grad, create_graph=True))
                return *(next(found) if need else None for need in ctx.needs_input_grad[:7]), None, None, None, None
            grads = _gradients(
                grad.contiguous(), x, parts[2], parts[4], moments, folded, keep, hidden, ctx.count, ctx.eps
            )
            return *grads, None, None, None, None


def _split(keep: Tensor | None, count: int) -> Iterable[Tensor | None]:
    return repeat(None) if keep is None else keep.split(count)


def _gradients(
    grad: Tensor, x: Tensor, w1: Tensor, w2: Tensor, moments: Tensor, folded: Tensor, keep: Tensor | None,
    hidden: list[Tensor], count: int, eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of the input, and of the parameters of norm, first and second layer."""
    dtype, each, (inner, width) = x.dtype, x.shape[1], w1.shape
    sums1, sums2 = (moments.new_empty(len(hidden), n) for n in (inner, width))
    below: list[Tensor] = []
    dw1: Tensor | None = None
    dw2: Tensor | None = None
    pieces = [t.flatten(0, 1) for t in x.split(count)]
    grads = [t.flatten(0, 1) for t in grad.split(count)]
    for i, (given, piece, h, by) in enumerate(zip(grads, pieces, hidden, _split(keep, count), strict=False)):
        d = given if by is None else torch.empty_like(given)
        call("branch_slope", dtype, given, None, by, each, len(d), width, None if by is None else d, sums2[i])
        dw2 = products.grad_weight(d, h, total=dw2)[0].float()
        dh = products.grad_input(d, w2)
        call("branch_slope", dtype, dh, h, None, each, len(d), inner, dh, sums1[i])
        dw1 = products.grad_weight(dh, piece, total=dw1)[0].float()
        below.append(products.grad_input(dh, w1))
    assert dw1 is not None
    assert dw2 is not None
    db1, db2 = (sums.sum(0).float() for sums in (sums1, sums2))
    # The sums over all tokens that a norm's gradient needs, without another look at the tokens.
    found = moments.new_empty(2, width)
    call("branch_unfolded", torch.float32, dw1, db1, w1, folded[0], folded[1], inner, width, found[0], found[1])
    dshift, root = found[1], torch.rsqrt(moments[1] + eps)
    dscale = (found[0] - moments[0] * dshift) * root
    by = -folded[0] / (x.shape[0] * each)
    slope, offset = (by * root * dscale).float(), (by * dshift).float()
    dx = torch.empty_like(x)
    for given, piece, d, place in zip(grads, pieces, below, dx.split(count), strict=True):
        call("branch_gradient", dtype, given, d, piece, len(d), width, folded[0], folded[2], slope, offset, place)
    return dx, dscale.float(), dshift.float(), dw1, db1, dw2, db2
