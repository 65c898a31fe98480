"""What TNT does between words and tokens on the CPU, as one function: norm, Linear, norm, onto the tokens.

Each pass is one call (`cpp/onto.cpp`). For the backward pass it keeps the words, which the next block keeps anyway,
what the Linear gives, and two numbers for each row of a norm.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.kernels import native, products
from blocks.kernels.linear import DTYPES, Linear, eager, precision, unhooked
from blocks.kernels.norm import MOST, Rows, reads, watched
from blocks.norms import LayerNorm


def words_onto(
    words: Tensor,
    batch: int,
    norm1: nn.Module,
    proj: nn.Module,
    norm2: nn.Module | None,
    x: Tensor | None = None,
    prefix: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """`x + norm2(proj(norm1(words)))`, behind a prefix; None where the kernels do not serve.

    Args:
        words: `(B·N, m, c)`, whose memory may be ordered as `(B·N, c, m)`.
        batch: B.
        norm1: of a token's words as one vector.
        proj: a Linear without a bias.
        norm2: of what that gives.
        x: tokens `(B, N, C)`, whose samples may be any distance apart; None for nothing.
        prefix: `(B, P, C)`, or None.

    Returns:
        The words, to be used from then on, as that brings their gradients together; and tokens `(B, P + N, C)`.
    """
    if words.dtype is not torch.float32 or not eager(words, prefix):  # before any size, which a graph would record
        return None
    if not (type(norm1) is type(norm2) is LayerNorm and type(proj) is Linear) or not unhooked(norm1, proj, norm2):
        return None
    dtype, parts = precision(words), (norm1.weight, norm1.bias, proj.weight, norm2.weight, norm2.bias)
    if proj.bias is not None or dtype not in DTYPES or not eager(*parts) or not words.numel():
        return None
    if (x is not None and not reads(x)) or (prefix is not None and not (reads(prefix) and prefix.shape[1])):
        return None
    order = 0 if words.is_contiguous() else words.shape[1]
    rows = (words.transpose(1, 2) if order else words).flatten(1)
    dim, row = proj.weight.shape
    lanes = products.lanes(dtype)
    if dim % lanes or row % lanes or max(dim, row) > MOST or not native.has("onto_forward", dtype):
        return None
    if any(p.dtype is not torch.float32 or not p.is_contiguous() for p in parts) or not rows.is_contiguous():
        return None
    if (
        torch.is_grad_enabled() and len({t.requires_grad for t in (words, *parts)}) > 1
    ):  # the kernel gives all gradients
        return None
    sizes = (batch, len(rows) // batch, 0 if prefix is None else prefix.shape[1], order, row, dim)
    settings = (dtype, sizes, (norm1.eps, norm2.eps))
    if watched(rows, x, prefix, *parts):
        rows, made = _Onto.apply(rows, x, prefix, settings, *parts)
    else:
        made = _forward(rows, x, prefix, settings, parts)[0]
    if not order:
        return rows.view(words.shape), made
    return rows.view(words.shape[0], words.shape[2], order).transpose(1, 2), made


class Shape(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64), ("count", ctypes.c_int64), ("prefix", ctypes.c_int64), ("words", ctypes.c_int32),
        ("row", ctypes.c_int32), ("dim", ctypes.c_int32), ("threads", ctypes.c_int32),
        ("eps1", ctypes.c_float), ("eps2", ctypes.c_float),
    ]  # fmt: skip


Settings = tuple[torch.dtype, tuple[int, ...], tuple[float, float]]


@cache
def _room(dtype: torch.dtype, *sizes: int) -> list[int]:
    return native.room("onto_room", dtype, Shape(*sizes))


def _forward(
    rows: Tensor, x: Tensor | None, prefix: Tensor | None, settings: Settings, parts: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """The tokens, and what the backward pass wants."""
    dtype, sizes, eps = settings
    (batch, count, before, _, _, dim), (keeps, works, *_) = sizes, _room(dtype, *sizes)
    kept, work = native.space(keeps, "kept"), native.space(works)
    made = native.fresh("joined", (batch, before + count, dim), rows.dtype)
    shape, places = Shape(*sizes, torch.get_num_threads(), *eps), (Rows.of(x), Rows.of(prefix))
    native.run("onto_forward", dtype, shape, rows, native.places(parts), *places, kept, work, made)
    return made, kept


class _Onto(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, x: Tensor | None, prefix: Tensor | None, settings: Settings, *parts: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.settings, ctx.alone = settings, x is None
        made, kept = _forward(rows, x, prefix, settings, parts)
        ctx.save_for_backward(rows, kept, *parts)
        return rows, made

    @staticmethod
    def backward(ctx: Any, stream: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, kept, *parts = ctx.saved_tensors
        dtype, sizes, eps = ctx.settings
        before, words = sizes[2:4]
        if grad is None:
            return stream, *[None] * (len(parts) + 3)
        twice = torch.is_grad_enabled()  # these gradients will be differentiated in turn
        grad = grad if twice else grad.contiguous()
        rest, first = grad[:, before:], grad[:, :before] if before else None
        given = (None if ctx.alone else rest, first, None)
        if twice:
            norm1_w, norm1_b, weight, norm2_w, norm2_b = parts
            with torch.autocast("cpu", enabled=False):
                made = rows.unflatten(1, (-1, words)).transpose(1, 2).flatten(1) if words else rows
                made = F.layer_norm(made, norm1_w.shape, norm1_w, norm1_b, eps[0]).to(dtype)
                made = F.linear(made, weight.to(dtype)).float().view(rest.shape)
                made = F.layer_norm(made, norm2_w.shape, norm2_w, norm2_b, eps[1])
            d, *learned = torch.autograd.grad(made, (rows, *parts), rest, create_graph=True)
            return d if stream is None else d + stream, *given, *learned
        dx, work, weight = torch.empty_like(rows), native.space(_room(dtype, *sizes)[2]), torch.empty_like(parts[2])
        norm1, norm2 = (rows.new_empty(2, len(parts[at])) for at in (0, 3))
        learned = [*norm1.unbind(), weight, *norm2.unbind()]
        stream = None if stream is None else stream.contiguous()
        shape, places = Shape(*sizes, torch.get_num_threads(), *eps), native.places(parts)
        native.run("onto_backward", dtype, shape, rows, places, kept, Rows.of(rest), stream, work, dx,
                   native.places(learned))  # fmt: skip
        return dx, *given, *learned
