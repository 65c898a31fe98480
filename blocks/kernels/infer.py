"""The branches of a convolutional block in evaluation and without gradients, several in one call (`cpp/infer.cpp`).

Between kernels that are called one by one a single thread is at work, in Python: for a twelfth of Next-ViT-S's time at
two threads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, TypeGuard, cast

import torch
from torch import Tensor, nn

from blocks.base import Grid, Norm
from blocks.kernels import attention, native, products
from blocks.kernels import conv as kernel
from blocks.kernels.folded import Convolution, conv_norm, folds, norm_into_linear
from blocks.kernels.layers import fits
from blocks.kernels.linear import ROWS, Linear, eager, linear_relu, precision, unhooked
from blocks.mlp import Mlp, ReLU

# Numbers between the two layers of an MLP, at a time.
HIDDEN = 2**20

# A batch norm, and the MLP behind it.
Behind = tuple[Norm, nn.Module]


class Shape(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("height", "width", "groups", "threads")),
        *((name, ctypes.c_int64) for name in ("dim", "hidden")),
        *((name, ctypes.c_double) for name in ("eps1", "eps2")),
        *((name, ctypes.c_int32) for name in ("last", "layers")),
    ]


class Mixed(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("height", "width", "heads", "pool", "groups", "threads")),
        *((name, ctypes.c_int64) for name in ("attn", "conv", "hidden")),
        *((name, ctypes.c_double) for name in ("norm", "pooled", "project", "eps1", "eps2")),
        *((name, ctypes.c_int32) for name in ("last", "layers")),
    ]


@cache
def _room(kind: type[Shape] | type[Mixed], dtype: torch.dtype, *sizes: float) -> int:
    """Bytes that the kernel works in."""
    return native.room("infer_room" if kind is Shape else "mixed_room", dtype, kind(*sizes))[0]


class Attending(NamedTuple):
    """Attention on means of `pool` tokens, behind a norm; another norm is on the means, where these are of several."""

    norm: Norm
    layers: Sequence[nn.Module]  # to queries, keys and values, and behind these
    heads: int
    pool: int
    pooled: Norm | None


class Half(NamedTuple):
    """What the kernel is told of the convolution or the MLP: parameters, groups or hidden width, the norm's eps."""

    parts: Sequence[Tensor | None]
    size: int = 0
    eps: float = 0.0


NO_CONV, NO_MLP = Half([None] * 5), Half([None] * 8)


def convolved_onto(
    x: Tensor, grid: Grid, conv: Convolution, layer: nn.Module, behind: Behind | None = None
) -> Tensor | None:
    """`x + layer(act(norm(conv(x))))` of tokens on a grid, and `mlp(norm(…))` of that added to it.

    None where there is no kernel for it.
    """
    if not _serves(x) or type(layer) is not Linear or not unhooked(layer):
        return None
    second = NO_MLP if behind is None else _mlp(*behind, x)
    if second is None:
        return None
    (first, norm, act), map = conv, x.view(len(x), *grid, x.shape[2]).permute(0, 3, 1, 2)
    known = first if isinstance(first, nn.Conv2d) and first.bias is None and type(act) is ReLU else None
    if known is not None and folds(norm, x, known, act) and kernel.chosen(known, map, x.dtype):
        return _run(x, None, grid, _half(norm, known.groups, [known.weight], []), layer, second)
    if native.planned() is not None:  # what oneDNN gives cannot wait
        return None
    made = conv_norm(*conv, map)
    return None if made is None else _run(x, made(map).permute(0, 2, 3, 1), grid, NO_CONV, layer, second)


def mixed(
    x: Tensor,
    grid: Grid,
    attn: Attending,
    project: tuple[nn.Module, Norm],
    conv: Convolution,
    layer: nn.Module,
    behind: Behind,
) -> Tensor | None:
    """`z + mlp(norm(z))`, where z has two parts side by side: y, which is `x` and its attention's branch, and what
    `project` makes of y, with the branch of a convolution added; of tokens `(B, N, C)` on a grid.

    None where there is no kernel for it.
    """
    (down, down_norm), (first, norm, act) = project, conv
    layers = [each for each in (*attn.layers, down, layer) if isinstance(each, Linear)]
    norms = [attn.norm, attn.pooled, down_norm, norm]
    if not _serves(x) or [type(each) for each in layers] != [Linear] * 6 or not unhooked(*layers):
        return None
    if not isinstance(first, nn.Conv2d) or first.bias is not None or type(act) is not ReLU:
        return None
    (b, n, dim), wide = x.shape, first.in_channels
    known = [each for each in norms if each is not None]
    if wide % kernel.LANES or not all(folds(each, x, first, act) for each in known):
        return None
    if not attention.fits(b * attn.heads, n, n // attn.pool, dim // attn.heads, x.dtype):
        return None
    second, convolved = _mlp(*behind, x), x.new_empty(b, *grid, wide).permute(0, 3, 1, 2)  # such a map as it will see
    if second is None or not kernel.chosen(first, convolved, x.dtype):
        return None
    each, fixed = [[layer.weight, layer.bias] for layer in layers], [_affine(norm) for norm in norms]
    attended = [*fixed[0], *each[0], *each[1], *each[2], *fixed[1], *each[3], *each[4], *fixed[2]]
    branches, last = [first.weight, *fixed[3], *each[5], *second.parts], _last(first.weight)
    if not _reads(attended, False) or not _reads(branches, last):
        return None
    alone = fits(dim + wide, second.size, dim + wide, x.dtype)
    counts = (b, *grid, attn.heads, attn.pool, first.groups, torch.get_num_threads(), dim, wide, second.size)
    sizes = (*counts, *map(_eps, norms), second.eps, last, alone)
    made, work = native.fresh("map", (b, n, dim + wide), x.dtype), native.space(_room(Mixed, x.dtype, *sizes))
    native.run("infer_mixed", x.dtype, Mixed(*sizes), x, native.places([*attended, *branches]), work, made)
    return made


def linear_onto(x: Tensor, y: Tensor, layer: nn.Module) -> Tensor | None:
    """`x + layer(y)` of tokens of one shape; None where there is no kernel for it."""
    if not _serves(x) or type(layer) is not Linear or not unhooked(layer) or x.shape != y.shape:
        return None
    return _run(x, y, (x.shape[1], 1), NO_CONV, layer, NO_MLP)


def mlp_onto(norm: Norm, mlp: nn.Module, x: Tensor) -> Tensor | None:
    """`x + mlp(norm(x))` in the memory of `x`, without gradients; None where that is not possible.

    In one kernel or in pieces, so that what is between the two layers stays in the cache.
    """
    second = _mlp(norm, mlp, x) if _serves(x) else None
    made = None if second is None else _run(x, None, (x.shape[1], 1), NO_CONV, None, second)
    if made is not None:
        return made
    if not _plain(mlp) or not x.is_contiguous():
        return None
    first = norm_into_linear(norm, mlp.fc1, x)
    dtype = precision(x)
    if first is None or x.dtype is not torch.promote_types(x.dtype, dtype):
        return None
    weight, bias = (t.to(dtype) for t in first)
    rows = x.view(-1, x.shape[-1])
    most = max(ROWS, HIDDEN // mlp.fc1.out_features)
    for piece in rows.tensor_split(-(-len(rows) // most) or 1):  # of one size: few rows are multiplied slowly
        hidden = linear_relu(piece, weight, bias)
        products.forward(hidden, mlp.fc2.weight, mlp.fc2.bias, onto=piece)
    return x


def _serves(x: Tensor) -> bool:
    """Whether there is a kernel for tokens `(B, N, C)` like these."""
    if torch.is_grad_enabled() or not eager(x) or x.dtype is not precision(x) or x.shape[2] % kernel.LANES:
        return False
    return x.is_contiguous() and x.numel() > 0 and products.preferred(x.dtype) and native.has("infer_branches", x.dtype)


def _plain(mlp: nn.Module) -> TypeGuard[Mlp]:
    """Whether this is an MLP of Linear, ReLU and Linear, and nobody looks."""
    if type(mlp) is not Mlp or type(mlp.act) is not ReLU or mlp.drops:
        return False
    return type(mlp.fc1) is Linear and type(mlp.fc2) is Linear and unhooked(mlp, *mlp.children())


def _affine(norm: Norm | None) -> list[Tensor | None]:
    """What the kernel is told of a batch norm of fixed statistics, or of none."""
    if norm is None:
        return [None] * 4
    bn = cast(nn.BatchNorm2d, norm.bn)
    return [bn.weight, bn.bias, bn.running_mean, bn.running_var]


def _eps(norm: Norm | None) -> float:
    return 0.0 if norm is None else cast(nn.BatchNorm2d, norm.bn).eps


def _half(norm: Norm, size: int, before: Sequence[Tensor | None], behind: Sequence[Tensor | None]) -> Half:
    return Half([*before, *_affine(norm), *behind], size, _eps(norm))


def _mlp(norm: Norm, mlp: nn.Module, x: Tensor) -> Half | None:
    """None where the kernel does not know these parts."""
    if not _plain(mlp) or not folds(norm, x):
        return None
    first, last = mlp.fc1, mlp.fc2
    if first.out_features % kernel.LANES:
        return None
    return _half(norm, first.out_features, [], [first.weight, first.bias, last.weight, last.bias])


def _last(weight: Tensor | None) -> bool:
    """Whether the channels that come in lie side by side in a convolution's weight."""
    return weight is not None and weight.is_contiguous(memory_format=torch.channels_last)


def _reads(parts: Sequence[Tensor | None], last: bool) -> bool:
    """Whether the kernel reads parameters that lie as these do; with `last` the first is a weight whose channels do."""
    if not eager(*parts) or any(p is not None and p.dtype is not torch.float32 for p in parts):
        return False
    return all(t is None or t.is_contiguous() for t in parts[last:])


def _run(x: Tensor, y: Tensor | None, grid: Grid, conv: Half, layer: nn.Linear | None, mlp: Half) -> Tensor | None:
    """The kernel, with `y` for what a convolution gives where there is none."""
    own = [None, None] if layer is None else [layer.weight, layer.bias]
    parts, last = [*conv.parts, *own, *mlp.parts], _last(conv.parts[0])
    if not _reads(parts, last) or not (y is None or (y.is_contiguous() and y.dtype is x.dtype and eager(y))):
        return None
    dim = x.shape[2]
    alone = bool(mlp.size) and fits(dim, mlp.size, dim, x.dtype)
    sizes = (len(x), *grid, conv.size, torch.get_num_threads(), dim, mlp.size, conv.eps, mlp.eps, last, alone)
    made = x if layer is None else native.fresh("map", x.shape, x.dtype)
    work = native.space(_room(Shape, x.dtype, *sizes))
    native.run("infer_branches", x.dtype, Shape(*sizes), x, y, native.places(parts), work, made)
    return made
