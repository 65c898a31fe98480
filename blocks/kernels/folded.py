"""Batch norms folded into the convolution or Linear beside them where no gradient is asked for, and ReLU in place.

Folded anew in every call: a weight has few numbers beside what it is applied to, and nothing kept can go stale.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.base import Act, Norm
from blocks.kernels import batch_norm, native, onednn
from blocks.kernels import conv as kernel
from blocks.kernels.linear import DTYPES, Linear, eager, linear, precision, unhooked
from blocks.mlp import ReLU
from blocks.norms import BatchNorm
from blocks.residual import Residual

# Pixels of the images that a stem takes at a time.
PIXELS = 100_000


def folds(norm: nn.Module, x: Tensor, *others: nn.Module) -> bool:
    """Whether `norm` is a fixed scale and shift of each channel here, and nobody looks between it and `others`."""
    return (
        not torch.is_grad_enabled()
        and x.dtype in DTYPES
        and eager(x)
        and type(norm) is BatchNorm
        and type(norm.bn) is nn.BatchNorm2d
        and norm.bn.affine
        and norm.bn.weight.dtype is torch.float32
        and norm.bn.running_var is not None
        and not norm.bn.training
        and unhooked(norm, norm.bn, *others)
    )


def fold(
    norm: nn.Module, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, behind: bool
) -> tuple[Tensor, Tensor]:
    """Weight and bias, in `dtype`, of the layer with these and the norm behind it, or in front of it."""
    bn = cast(nn.BatchNorm2d, norm.bn)
    assert bn.running_var is not None
    assert bn.running_mean is not None
    rows, fixed = weight.shape[0], (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    width, own = weight.numel() // rows, [t for t in (weight, bias, *fixed) if t is not None]
    dense = weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))
    served = dense and dtype in DTYPES and not width % batch_norm.LANES and eager(*own)
    if served and native.has("infer_folded", dtype) and all(t.dtype is torch.float32 for t in own):
        made, made_bias = torch.empty_like(weight, dtype=dtype), weight.new_empty(rows)
        native.call("infer_folded", dtype, weight, bias, *fixed, bn.eps, behind, rows, width, made, made_bias)
        return made, made_bias.to(dtype)
    scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
    shift = bn.bias - bn.running_mean * scale
    if behind:
        shift = shift if bias is None else shift + bias * scale
        return (weight * scale.view(-1, *[1] * (weight.dim() - 1))).to(dtype), shift.to(dtype)
    shift = weight.to(shift.dtype) @ shift
    return (weight * scale).to(dtype), (shift if bias is None else shift + bias).to(dtype)


Convolution = tuple[nn.Module, Norm, Act]


class Folded(NamedTuple):
    """A convolution with the batch norm behind it."""

    conv: nn.Conv2d
    weight: Tensor
    bias: Tensor
    act: Act

    def __call__(self, map: Tensor) -> Tensor:
        relu, dtype = type(self.act) is ReLU, self.weight.dtype
        if kernel.chosen(self.conv, map, dtype):
            map = kernel.conv(map.to(dtype), self.weight, self.bias, self.conv.groups, relu)
            return map if relu else self.act(map)
        if dtype in DTYPES and onednn.convolves(dtype):
            map = onednn.conv(map.to(dtype), self.weight, self.bias, self.conv)
        else:
            at = (self.conv.stride, self.conv.padding, self.conv.dilation, self.conv.groups)
            map = F.conv2d(map, self.weight, self.bias, *at)  # type: ignore[arg-type]
        return F.relu_(map) if relu else self.act(map)


def conv_norm(conv: nn.Module, norm: Norm, act: Act, map: Tensor) -> Folded | None:
    """`conv` and `norm` in one for maps like this; None where that is not possible."""
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    if not folds(norm, map, conv, act):
        return None
    return Folded(conv, *fold(norm, conv.weight, conv.bias, precision(map), behind=True), act)


def conv_norm_act(conv: nn.Module, norm: Norm, act: Act, map: Tensor) -> Tensor:
    """`act(norm(conv(map)))` on a map."""
    folded = conv_norm(conv, norm, act, map)
    if folded is not None:
        return folded(map)
    map = kernel.convolved(conv, map)
    if type(act) is ReLU and type(norm) is BatchNorm and unhooked(norm, act):
        made = batch_norm.batch_norm(norm.bn, map, relu=True)
        if made is not None:
            return made
    map = norm.on_map(map)
    # A batch norm's backward does not look at what it gave, so there is no need for a second map.
    if type(act) is ReLU and type(norm) is BatchNorm and eager(map) and unhooked(norm, norm.bn, act):
        return F.relu_(map)
    return act(map)


def convs_of_images(layers: Iterable[Convolution], images: Tensor) -> Tensor:
    """`conv_norm_act` of one layer behind the other on images, some at a time, so that maps stay in the cache."""
    if not eager(images):  # the order in memory is the compiler's affair there, and on a GPU cuDNN's
        for layer in layers:
            images = conv_norm_act(*layer, images)
        return images
    layers, images = list(layers), images.contiguous(memory_format=torch.channels_last)
    folded = [conv_norm(*layer, images) for layer in layers]
    if not all(folded) or not len(images):
        for layer in layers:
            images = conv_norm_act(*layer, images)
        return images
    count = max(torch.get_num_threads(), PIXELS // (images.shape[2] * images.shape[3]), 1)
    made: Tensor | None = None
    for start in range(0, len(images), count):
        map = images[start : start + count]
        for each in folded:
            assert each is not None
            map = each(map)
        if len(map) == len(images):
            return map
        if made is None:
            size = (len(images), *map.shape[1:])
            made = torch.empty(size, dtype=map.dtype, memory_format=torch.channels_last)
        made[start : start + count] = map
    assert made is not None
    return made


def adds(residual: nn.Module) -> bool:
    """Whether a residual is a mere sum here, and nobody looks at it."""
    return isinstance(residual, Residual) and residual.plain and not (residual.training and residual.rate > 0.0)


def added(residual: nn.Module, x: Tensor, y: Tensor, last: nn.Module) -> Tensor:
    """`residual(x, y)`, in the memory of `y` if that is what the Linear `last` has just made."""
    if not (type(last) is Linear and unhooked(last) and eager(x, y) and adds(residual)) or x.shape != y.shape:
        return residual(x, y)
    if torch.promote_types(x.dtype, y.dtype) is not y.dtype or (y.requires_grad and y._is_view()):
        return residual(x, y)
    return y.add_(x)


def linear_norm(layer: nn.Module, norm: Norm, x: Tensor) -> Tensor | None:
    """`norm(layer(x))` on tokens in one product; None where that is not possible."""
    if type(layer) is not Linear or not folds(norm, x, layer):
        return None
    # Under autocast the product rounds weights by itself.
    dtype = torch.float32 if torch.is_autocast_enabled("cpu") else x.dtype
    return linear(x, *fold(norm, layer.weight, layer.bias, dtype, behind=True))


def norm_into_linear(norm: Norm, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of `layer(norm(x))` in one; None where that is not possible, or `x` too small to be worth it."""
    # The size last: while a graph is recorded it is unknown, and to ask would fix it.
    if type(layer) is not Linear or not folds(norm, x, layer) or x.numel() <= layer.weight.numel():
        return None
    return fold(norm, layer.weight, layer.bias, precision(x), behind=False)
