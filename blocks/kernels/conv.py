"""3×3 convolutions of stride 1 on maps that lie by channels, on the CPU, where a kernel is faster than oneDNN.

That is in groups of some channels, and everywhere for the gradient of the weight (`cpp/conv.cpp`).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.kernels import native
from blocks.kernels.linear import DTYPES, eager, precision, unhooked

# Channels of a group come in such numbers.
LANES = 32

# On smaller maps the border weighs too much.
SIDE = 20


class Shape(ctypes.Structure):
    _fields_ = [("batch", ctypes.c_int64)] + [
        (name, ctypes.c_int32) for name in ("height", "width", "groups", "inp", "out", "threads", "relu")
    ]


def convolved(layer: nn.Module, map: Tensor) -> Tensor:
    """`layer(map)`."""
    if type(layer) is nn.Conv2d and torch.is_grad_enabled() and unhooked(layer) and layer.bias is None:
        weight, dtype = layer.weight, precision(map)
        if weight.requires_grad and weight.dtype is torch.float32 and serves(layer, map, dtype) and eager(weight):
            return _Conv.apply(map, weight, layer.groups, dtype)
    return layer(map)


def serves(layer: nn.Conv2d, map: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for a convolution of such a map in this precision, or for its gradients."""
    known = (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
    if not known or layer.padding_mode != "zeros" or layer.in_channels // layer.groups % LANES:
        return False
    if layer.out_channels // layer.groups % LANES or not eager(map) or not map.numel() or map.dtype not in DTYPES:
        return False
    if dtype not in DTYPES or not map.is_contiguous(memory_format=torch.channels_last):
        return False
    return native.has("conv_forward", dtype)


def faster(map: Tensor, groups: int) -> bool:
    """Whether the kernel, where it serves, also convolves faster."""
    return groups > 1 and map.shape[3] >= SIDE


def conv(map: Tensor, weight: Tensor, bias: Tensor | None, groups: int, relu: bool = False) -> Tensor:
    """`F.conv2d(map, weight, bias, padding=1, groups=groups)`, and ReLU behind it, in the precision of the map."""
    size, lies = (len(map), weight.shape[0], *map.shape[2:]), torch.channels_last
    made = torch.empty(size, dtype=map.dtype, memory_format=lies)
    bias = None if bias is None else bias.float().contiguous()
    low = map.dtype is torch.bfloat16
    # (groups, tap, words of channels in, out), in bfloat16 two of them in a word.
    parts = weight.to(map.dtype).reshape(groups, -1, weight.shape[1] // (1 + low), 1 + low, 9)
    parts = parts.permute(0, 4, 2, 1, 3).contiguous()
    native.run("conv_forward", map.dtype, _shape(map, made, groups, relu), map, parts, bias, made)
    return made


def grad_map(grad: Tensor, weight: Tensor, groups: int) -> Tensor:
    """The gradient of the map: a convolution by the weight seen from the other side."""
    turned = weight.unflatten(0, (groups, -1)).transpose(1, 2).flip(3, 4).flatten(0, 1)
    return conv(grad, turned, None, groups)


def grad_weight(map: Tensor, grad: Tensor, groups: int) -> Tensor:
    """The gradient of the weight, in float32."""
    out, inp = grad.shape[1] // groups, map.shape[1] // groups
    made = map.new_empty(groups, 9, out, inp, dtype=torch.float32)
    native.run("conv_weight", map.dtype, _shape(map, grad, groups), map, grad, made)
    return made.permute(0, 2, 3, 1).reshape(groups * out, inp, 3, 3)


def _shape(map: Tensor, made: Tensor, groups: int, relu: bool = False) -> Shape:
    b, c, h, w = map.shape
    return Shape(b, h, w, groups, c // groups, made.shape[1] // groups, torch.get_num_threads(), relu)


class _Conv(torch.autograd.Function):
    """Keeps the map in the product's precision, and the weight as it is."""

    @staticmethod
    def forward(ctx: Any, map: Tensor, weight: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
        ctx.groups, ctx.dtype = groups, map.dtype
        map = map.to(dtype)
        ctx.save_for_backward(map, weight)
        if faster(map, groups):
            return conv(map, weight, None, groups)
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(map, weight.to(dtype), padding=1, groups=groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        map, weight = ctx.saved_tensors
        need_map, need_weight = ctx.needs_input_grad[:2]
        with torch.autocast("cpu", enabled=False):
            if torch.is_grad_enabled():  # these gradients will be differentiated in turn
                out = F.conv2d(map, weight.to(map.dtype), padding=1, groups=ctx.groups)
                needed = [t for t, need in ((map, need_map), (weight, need_weight)) if need]
                found = iter(torch.autograd.grad(out, needed, grad, create_graph=True))
                return next(found) if need_map else None, next(found) if need_weight else None, None, None
            grad = grad.contiguous(memory_format=torch.channels_last)
            dmap = None
            if need_map and faster(map, ctx.groups):
                dmap = grad_map(grad, weight, ctx.groups)
            elif need_map:
                at = ((1, 1), (1, 1), (1, 1), False, (0, 0), ctx.groups, (True, False, False))
                dmap = torch.ops.aten.convolution_backward(grad, map, weight.to(map.dtype), None, *at)[0]
            dweight = grad_weight(map, grad, ctx.groups) if need_weight else None
            return None if dmap is None else dmap.to(ctx.dtype), dweight, None, None
