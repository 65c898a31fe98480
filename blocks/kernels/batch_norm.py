"""Batch normalisation of training on the CPU where channels come last, and ReLU behind it, as one function.

Its sums over the batch are as exact as torch's are for channels first; torch's own for channels last are in float32.
For the backward pass it keeps its input alone: where ReLU was at work is found again from that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.kernels import native
from blocks.kernels.linear import DTYPES, eager, unhooked

# Channels are a multiple of this: the kernel knows whole vectors only.
LANES = 16


def batch_norm(bn: nn.Module, map: Tensor, relu: bool = False) -> Tensor | None:
    """`bn(map)`, and ReLU behind it; None where the kernel does not serve."""
    if not (type(bn) is nn.BatchNorm2d and serves(bn, map) and unhooked(bn)):
        return None
    count(bn)
    return _BatchNorm.apply(map, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, bn.momentum, relu)


def serves(bn: nn.BatchNorm2d, map: Tensor) -> bool:
    """Whether this norm is in training, with all that it can have, on a map that is rows of channels in memory."""
    if not bn.training or bn.momentum is None or bn.running_mean is None or bn.running_var is None or not bn.affine:
        return False
    if map.dtype not in DTYPES or map.dim() != 4 or not eager(map):
        return False
    own = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    if not eager(*own) or any(t.dtype is not torch.float32 or not t.is_contiguous() for t in own):
        return False
    if map.shape[1] != bn.num_features or bn.num_features % LANES or map.numel() <= bn.num_features:
        return False
    return map.is_contiguous(memory_format=torch.channels_last) and available(map.dtype)


def available(dtype: torch.dtype) -> bool:
    return native.has("batch_norm", dtype)


def count(bn: nn.BatchNorm2d) -> None:
    """One batch more."""
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked.add_(1)


def forward(
    map: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float,
    momentum: float, relu: bool = False, made: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gives mean and variance, in float64; and scale and shift on the map, and the mean once more, in float32.

    Fills `made` where there is one, and brings on the running statistics.
    """
    channels = map.shape[1]
    moments, folded = weight.new_empty(2, channels, dtype=torch.float64), weight.new_empty(3, channels)
    native.call("batch_norm", map.dtype, map, map.numel() // channels, channels, weight, bias, eps, momentum,
                running_mean, running_var, moments, folded, relu, made)  # fmt: skip
    torch.autograd.graph.increment_version((running_mean, running_var))
    return moments, folded


def statistics(bn: nn.BatchNorm2d, map: Tensor) -> tuple[Tensor, Tensor]:
    """What `forward` gives for a map that it serves."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    assert bn.momentum is not None
    count(bn)
    return forward(map, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.eps, bn.momentum)


def _plain(map: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> Tensor:
    made = F.batch_norm(map, None, None, weight, bias, True, 0.0, eps)
    return F.relu(made) if relu else made


class _BatchNorm(torch.autograd.Function):
    """Keeps its input."""

    @staticmethod
    def forward(
        ctx: Any, map: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, eps: float,
        momentum: float, relu: bool,
    ) -> Tensor:  # fmt: skip
        made = torch.empty_like(map)
        moments, folded = forward(map, weight, bias, running_mean, running_var, eps, momentum, relu, made)
        ctx.save_for_backward(map, weight, bias, moments, folded)
        ctx.eps, ctx.relu = eps, relu
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        map, weight, bias, moments, folded = ctx.saved_tensors
        needed = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # these gradients will be differentiated in turn
            inputs = [t for t, need in zip((map, weight, bias), needed, strict=True) if need]
            made = _plain(map, weight, bias, ctx.eps, ctx.relu)
            found = iter(torch.autograd.grad(made, inputs, grad, create_graph=True))
            return *(next(found) if need else None for need in needed), *5 * (None,)
        grad = grad.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(map) if needed[0] else None
        dweight, dbias = torch.empty_like(weight), torch.empty_like(bias)
        channels = len(weight)
        native.call("batch_norm_back", map.dtype, map, grad, map.numel() // channels, channels, ctx.eps, moments,
                    folded, ctx.relu, dweight, dbias, dx)  # fmt: skip
        return dx, dweight if needed[1] else None, dbias if needed[2] else None, *5 * (None,)
