"""Training of a residual branch of batch norm, Linear, ReLU and Linear, as one function with its own backward pass.

The norm's scale and shift are put into the first Linear, so that what it gives is never written down; nor are the
gradients between the two layers, which are made and used up in pieces that stay in the processor's cache. For the
backward pass it keeps its input and what ReLU gave.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.base import Grid, Norm
from blocks.gates import NoGate
from blocks.kernels import batch_norm, onednn
from blocks.kernels.linear import DTYPES, Linear, eager, precision, unhooked
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
    if type(bn) is not nn.BatchNorm2d or type(mlp.act) is not ReLU:
        return False
    if any(type(layer) is not Linear for layer in layers):
        return False
    if not bn.training or bn.momentum is None or bn.running_mean is None or not bn.affine:
        return False
    if type(residual.gate) is not NoGate or residual.layer_scale is not None or residual.scale != 1.0:
        return False
    parameters = (bn.weight, bn.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    if not eager(bn.running_mean, *parameters) or any(p is None or p.dtype is not torch.float32 for p in parameters):
        return False
    if not any(t.requires_grad for t in (x, *parameters)) or (mlp.training and mlp.drop.p) or not x.is_contiguous():
        return False
    return unhooked(residual, residual.gate, norm, bn, mlp, *mlp.children()) and x.shape[0] * x.shape[1] > 1


def branch(residual: Residual, norm: Norm, mlp: nn.Module, x: Tensor, grid: Grid) -> Tensor:
    """`residual(x, mlp(norm(x)))`, where `serves` says so."""
    bn = norm.bn
    assert isinstance(mlp, Mlp)
    assert isinstance(bn, nn.BatchNorm2d)
    with torch.no_grad():
        mean, variance = batch_norm.statistics(bn, x.detach().unflatten(1, grid).permute(0, 3, 1, 2))
    keep = None
    if residual.training and residual.rate > 0.0:
        keep = kept(x, residual.rate)
    parts = (bn.weight, bn.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    return _Branch.apply(x, *parts, mean, variance, keep, bn.eps)


def _plain(x: Tensor, parts: tuple[Tensor, ...], keep: Tensor | None, eps: float) -> Tensor:
    scale, shift, w1, b1, w2, b2 = (part.to(x.dtype) for part in parts)
    normed = F.batch_norm(x.flatten(0, 1), None, None, scale, shift, True, 0.0, eps).view(x.shape)
    y = F.linear(F.relu(F.linear(normed, w1, b1)), w2, b2)
    return x + (y if keep is None else y * keep)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    if _chosen(x, weight):
        return onednn.forward(x, weight, bias, relu)
    made = F.linear(x, weight, bias)
    return made.relu_() if relu else made


def _chosen(x: Tensor, weight: Tensor) -> bool:
    if x.dtype is torch.bfloat16:
        return onednn.fuses(x.dtype)
    return onednn.faster(2.0 * x.numel() * weight.shape[0])


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """`gradᵀ x` in float32."""
    if x.dtype is torch.float32 and _chosen(x, grad.t()):
        return onednn.grad_weight(grad, x)
    return (grad.t() @ x).float()


class _Branch(torch.autograd.Function):
    """Keeps the input and, piece by piece, what ReLU gave."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
        mean: Tensor, variance: Tensor, keep: Tensor | None, eps: float,
    ) -> Tensor:  # fmt: skip
        with torch.autocast("cpu", enabled=False):
            root = torch.rsqrt(variance.float() + eps)
            mean, a = mean.float(), scale * root
            weight, bias = (w1 * a).to(x.dtype), (b1 + w1 @ (shift - mean * a)).to(x.dtype)
            weight2, bias2 = w2.to(x.dtype), b2.to(x.dtype)
            count = max(max(HIDDEN // len(w1), onednn.ROWS) // x.shape[1], 1)
            out, hidden = torch.empty_like(x), []
            for i, piece in enumerate(x.split(count)):
                hidden.append(_product(piece.flatten(0, 1), weight, bias, relu=True))
                y = _product(hidden[-1], weight2, bias2).view(piece.shape)
                place = out[i * count : i * count + len(piece)]
                if keep is None:
                    torch.add(piece, y, out=place)
                else:
                    torch.addcmul(piece, y, keep[i * count : i * count + len(piece)], out=place)
        ctx.count, ctx.eps = count, eps
        ctx.save_for_backward(x, scale, shift, w1, b1, w2, b2, mean, root, keep, *hidden)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *rest = ctx.saved_tensors
        parts, (mean, root, keep), hidden = tuple(rest[:6]), rest[6:9], rest[9:]
        with torch.autocast("cpu", enabled=False):
            if torch.is_grad_enabled():  # these gradients will be differentiated in turn
                needed = [t for t, need in zip((x, *parts), ctx.needs_input_grad, strict=False) if need]
                found = iter(torch.autograd.grad(_plain(x, parts, keep, ctx.eps), needed, grad, create_graph=True))
                return *(next(found) if need else None for need in ctx.needs_input_grad[:7]), None, None, None, None
            return *_gradients(grad.contiguous(), x, parts, mean, root, keep, hidden, ctx.count), None, None, None, None


def _gradients(
    grad: Tensor, x: Tensor, parts: tuple[Tensor, ...], mean: Tensor, root: Tensor, keep: Tensor | None,
    hidden: list[Tensor], count: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of `x` and `parts`."""
    scale, shift, w1, _, w2, _ = parts
    a = scale * root
    back1, back2 = (w1 * a).to(x.dtype).t(), w2.to(x.dtype).t()
    dw1, db1, dw2, db2 = (p.new_zeros(p.shape) for p in parts[2:])
    below = []
    grads, pieces = grad.split(count), x.split(count)
    for i, (given, piece, h) in enumerate(zip(grads, pieces, hidden, strict=True)):
        d = given if keep is None else given * keep[i * count : i * count + len(given)]
        d, rows = d.flatten(0, 1), piece.flatten(0, 1)
        dw2 += _weight_gradient(d, h)
        db2 += d.sum(0)
        dh = _product(d, back2, None)
        torch.ops.aten.threshold_backward.grad_input(dh, h, 0, grad_input=dh)
        dw1 += _weight_gradient(dh, rows)
        db1 += dh.sum(0)
        below.append(_product(dh, back1, None).view(piece.shape))
    # The sums over all tokens that a norm's gradient needs, without another look at the tokens.
    n = x.shape[0] * x.shape[1]
    dshift = db1 @ w1
    dscale = ((dw1 * w1).sum(0) - mean * dshift) * root
    slope = -a * root * dscale / n
    offset = -a * dshift / n - slope * mean
    dx = torch.empty_like(x)
    for given, piece, found, place in zip(grads, pieces, below, dx.split(count), strict=True):
        torch.add(torch.addcmul(offset, piece, slope).add_(given), found, out=place)
    dw1 = torch.addr(dw1 * a, db1, shift - mean * a)
    return dx, dscale, dshift, dw1, db1, dw2, db2
