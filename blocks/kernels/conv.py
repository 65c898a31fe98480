"""3×3 convolutions of stride 1 on maps that lie by channels, on the CPU, where a kernel is faster than oneDNN.

In float32 and with few channels in a group that is Winograd's form, which takes less than half the products
(`cpp/winograd.cpp`); else `cpp/conv.cpp` in groups, and everywhere for the gradient of the weight.
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

# On smaller maps the border weighs too much, but in Winograd's form.
SIDE = 12

# Flags of filters, as in calls.h.
TURNED, LAST = 1, 2

# Numbers that a filter becomes, at most.
POINTS = 16

# Channels of a group in times out, whose filters in Winograd's form stay in the processor's cache.
FEW = 64 * 64


class Shape(ctypes.Structure):
    _fields_ = [("batch", ctypes.c_int64)] + [
        (name, ctypes.c_int32) for name in ("height", "width", "groups", "inp", "out", "threads", "flags")
    ]


def convolved(layer: nn.Module, map: Tensor) -> Tensor:
    """`layer(map)`."""
    if type(layer) is nn.Conv2d and torch.is_grad_enabled() and unhooked(layer) and layer.bias is None:
        weight, dtype = layer.weight, precision(map)
        if weight.requires_grad and weight.dtype is torch.float32 and serves(layer, map, dtype) and eager(weight):
            return _Conv.apply(map.to(dtype), weight, layer.groups)
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
    return native.has("conv_weight", dtype)


def chosen(layer: nn.Conv2d, map: Tensor, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for a convolution of such a map in this precision, and it is faster."""
    return serves(layer, map, dtype) and faster(map.shape[3], layer.weight, layer.groups, dtype)


def faster(width: int, weight: Tensor, groups: int, dtype: torch.dtype) -> bool:
    """Whether the kernel, where it serves, also convolves maps of this width faster."""
    if dtype is torch.float32:
        return _minimal(weight.shape[1], weight.shape[0] // groups)
    return groups > 1 and width >= SIDE


def _minimal(inp: int, out: int) -> bool:
    """Whether Winograd's form serves groups of so many channels."""
    return inp * out <= FEW


def conv(
    map: Tensor, weight: Tensor, bias: Tensor | None, groups: int, relu: bool = False, turned: bool = False
) -> Tensor:
    """`F.conv2d(map, weight, bias, padding=1, groups=groups)`, and ReLU behind it, in the precision of the map.

    Args:
        turned: by the weight seen from the other side: what `map` is the gradient of has this for a gradient.
    """
    out, inp = weight.shape[0] // groups, weight.shape[1]
    size, lies = (len(map), groups * (inp if turned else out), *map.shape[2:]), torch.channels_last
    made = torch.empty(size, dtype=map.dtype, memory_format=lies)
    filters = torch.empty(groups * POINTS * inp * out, dtype=torch.float32)
    last = weight.is_contiguous(memory_format=lies)
    weight = weight.float() if last else weight.float().contiguous()
    shape = Shape(0, 0, 0, groups, inp, out, torch.get_num_threads(), TURNED * turned + LAST * last)
    native.run("conv_filters", map.dtype, shape, weight, filters)
    bias = None if bias is None else bias.float().contiguous()
    native.run("conv_forward", map.dtype, _shape(map, made, groups, relu), map, filters, bias, None, made)
    return made


def grad_weight(map: Tensor, grad: Tensor, groups: int) -> Tensor:
    """The gradient of the weight, in float32."""
    out, inp = grad.shape[1] // groups, map.shape[1] // groups
    made = map.new_empty(groups, 9, out, inp, dtype=torch.float32)
    kernel = "winograd_weight" if map.dtype is torch.float32 and _minimal(inp, out) else "conv_weight"
    native.run(kernel, map.dtype, _shape(map, grad, groups), map, grad, made)
    return made.permute(0, 2, 3, 1).reshape(groups * out, inp, 3, 3)


def _shape(map: Tensor, made: Tensor, groups: int, relu: bool = False) -> Shape:
    b, c, h, w = map.shape
    return Shape(b, h, w, groups, c // groups, made.shape[1] // groups, torch.get_num_threads(), relu)


class _Conv(torch.autograd.Function):
    """Keeps the map in the product's precision, and the weight as it is."""

    @staticmethod
    def forward(ctx: Any, map: Tensor, weight: Tensor, groups: int) -> Tensor:
        ctx.groups = groups
        ctx.save_for_backward(map, weight)
        if faster(map.shape[3], weight, groups, map.dtype):
            return conv(map, weight, None, groups)
        with torch.autocast("cpu", enabled=False):
            return F.conv2d(map, weight.to(map.dtype), padding=1, groups=groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        map, weight = ctx.saved_tensors
        need_map, need_weight = ctx.needs_input_grad[:2]
        with torch.autocast("cpu", enabled=False):
            if torch.is_grad_enabled():  # these gradients will be differentiated in turn
                out = F.conv2d(map, weight.to(map.dtype), padding=1, groups=ctx.groups)
                needed = [t for t, need in ((map, need_map), (weight, need_weight)) if need]
                found = iter(torch.autograd.grad(out, needed, grad, create_graph=True))
                return next(found) if need_map else None, next(found) if need_weight else None, None
            grad = grad.contiguous(memory_format=torch.channels_last)
            dmap = None
            if need_map and faster(map.shape[3], weight, ctx.groups, map.dtype):
                dmap = conv(grad, weight, None, ctx.groups, turned=True)
            elif need_map:
                at = ((1, 1), (1, 1), (1, 1), False, (0, 0), ctx.groups, (True, False, False))
                dmap = torch.ops.aten.convolution_backward(grad, map, weight.to(map.dtype), None, *at)[0]
            dweight = grad_weight(map, grad, ctx.groups) if need_weight else None
            return dmap, dweight, None
