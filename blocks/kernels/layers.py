"""Two Linear layers with an activation between them, without gradients, in one kernel (`cpp/layers.cpp`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from blocks.kernels import native, products
from blocks.kernels.linear import DTYPES, eager, precision
from blocks.kernels.products import Factor, Result

# Widths before and between the layers, in words of 32 bits, of which enough rows stay in the processor's cache.
MOST = 3400

# Widths come in whole vectors, between the layers in whole tiles.
LANES = 16


class Size(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "inp", "hidden", "out", "threads")]


def fits(inp: int, hidden: int, out: int, dtype: torch.dtype) -> bool:
    """Whether the kernel is for these widths, with products in `dtype`."""
    words = 1 + (dtype is torch.bfloat16)  # numbers in one
    return not (inp % (LANES * words) or hidden % (2 * LANES) or out % LANES) and (inp + hidden) // words <= MOST


def two_layers(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
) -> Tensor | None:
    """`F.linear(act(F.linear(x, weight, bias)), weight2, bias2)`; None where the kernel does not serve or gain.

    Args:
        x: rows, float32 or bfloat16; products are in the precision that autocast asks for.
        weight: of the first layer, float32 or as the products; `weight2` of the second.
        bias: of the first layer; `bias2` of the second.
        act: "relu" or "gelu".
    """
    if torch.is_grad_enabled() or not eager(x, weight, bias, weight2, bias2):
        return None
    dtype, (hidden, inp), out = precision(x), weight.shape, weight2.shape[0]
    low = dtype is torch.bfloat16
    if dtype not in DTYPES or x.dtype not in DTYPES or (not low and x.dtype is not dtype):
        return None
    if not {weight.dtype, weight2.dtype} <= {torch.float32, dtype} or not x.numel():
        return None
    if not fits(inp, hidden, out, dtype):
        return None
    rows = x.reshape(-1, inp)
    flops = 2.0 * rows.numel() * hidden
    if not products.kernel(dtype) or not native.has("two_layers", dtype) or not products.faster(flops, dtype):
        return None
    if not (rows.stride(1) == weight.stride(1) == weight2.stride(1) == 1):
        return None
    made = rows.new_empty(len(rows), out, dtype=dtype)
    biases = [None if b is None else b.float().contiguous() for b in (bias, bias2)]
    result = Result.of(made, act, None, biases[1])
    size = Size(len(rows), inp, hidden, out, torch.get_num_threads())
    native.run("two_layers", dtype, Factor.of(rows), Factor.of(weight), biases[0], Factor.of(weight2), result, size)
    return made.view(*x.shape[:-1], out)
