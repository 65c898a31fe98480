"""Batch norms folded into the convolution or Linear beside them where no gradient is asked for, and ReLU in place.

Folded anew in every call: a weight has few numbers beside what it is applied to, and nothing kept can go stale.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.base import Act, Norm
from blocks.kernels.linear import DTYPES, Linear, eager, linear, unhooked
from blocks.mlp import ReLU
from blocks.norms import BatchNorm


def folds(norm: nn.Module, x: Tensor, *others: nn.Module) -> bool:
    """Whether `norm` is a fixed scale and shift of each channel here, and nobody looks between it and `others`."""
    return (
        not torch.is_grad_enabled()
        and x.dtype in DTYPES
        and eager(x)
        and type(norm) is BatchNorm
        and type(norm.bn) is nn.BatchNorm2d
        and norm.bn.weight.dtype is torch.float32
        and norm.bn.running_var is not None
        and not norm.bn.training
        and unhooked(norm, norm.bn, *others)
    )


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    bn = cast(nn.BatchNorm2d, norm.bn)
    assert bn.running_var is not None
    assert bn.running_mean is not None
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    return scale, bn.bias - bn.running_mean * scale


def conv_norm_act(conv: nn.Module, norm: Norm, act: Act, map: Tensor) -> Tensor:
    """`act(norm(conv(map)))` on a map."""
    if type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and folds(norm, map, conv, act):
        scale, shift = scale_and_shift(norm)
        bias = shift if conv.bias is None else shift + conv.bias * scale
        weight = conv.weight * scale.view(-1, 1, 1, 1)
        map = F.conv2d(map, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)  # type: ignore[arg-type]
        return F.relu_(map) if type(act) is ReLU else act(map)
    map = norm.on_map(conv(map))
    # A batch norm's backward does not look at what it gave, so there is no need for a second map.
    if type(act) is ReLU and type(norm) is BatchNorm and eager(map) and unhooked(norm, norm.bn, act):
        return F.relu_(map)
    return act(map)


def linear_norm(layer: nn.Module, norm: Norm, x: Tensor) -> Tensor | None:
    """`norm(layer(x))` on tokens in one product; None where that is not possible."""
    if type(layer) is not Linear or not folds(norm, x, layer):
        return None
    scale, shift = scale_and_shift(norm)
    return linear(x, layer.weight * scale[:, None], shift if layer.bias is None else shift + layer.bias * scale)


def norm_into_linear(norm: Norm, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of `layer(norm(x))` in one; None where that is not possible, or `x` too small to be worth it."""
    # The size last: while a graph is recorded it is unknown, and to ask would fix it.
    if type(layer) is not Linear or not folds(norm, x, layer) or x.numel() <= layer.weight.numel():
        return None
    scale, shift = scale_and_shift(norm)
    bias = layer.weight @ shift
    return layer.weight * scale, bias if layer.bias is None else bias + layer.bias
