"""LayerNorm together with the residual stream around it, on the CPU: one pass over memory each way (`cpp/norm.cpp`).

A block adds a branch to its stream, norms the sum, and multiplies what comes out. Here the addition and the norm are
one operation; under autocast its result is in the product's precision at once. Its backward pass adds the stream's
gradient to the norm's, and gives the branch's. For it the sum is kept, and two numbers for each row.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blocks.kernels import native
from blocks.kernels.linear import eager, remember
from blocks.kernels.native import run

# What a row may hold, and of how many rows the gradients of weight and bias are summed at first, as in norm.cpp.
MOST, CHUNK = 2048, 64


def serves(dtype: torch.dtype, *tensors: Tensor | None) -> bool:
    """Whether the kernels work on these, of which the first has the width, with results in `dtype`."""
    dim = tensors[0].shape[-1]  # type: ignore[union-attr]
    if dim % 16 or dim > MOST or not eager(*tensors):
        return False
    if not all(t is None or (t.is_contiguous() and t.numel()) for t in tensors):
        return False
    return native.has("norm_forward", dtype)


def reads(x: Tensor) -> bool:
    """Whether the samples of tokens `(B, N, C)` are whole rows of float32, of ordinary memory."""
    return eager(x) and x.dtype is torch.float32 and x.stride()[1:] == (x.shape[2], 1)


def learns(weight: Tensor, bias: Tensor, *inputs: Tensor | None) -> bool:
    """Whether all gradients of a norm are wanted, or none: the kernels give all."""
    some = any(t is not None and t.requires_grad for t in inputs)
    return not torch.is_grad_enabled() or (some == weight.requires_grad == bias.requires_grad)


def watched(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class Shape(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64), ("group", ctypes.c_int64), ("dim", ctypes.c_int32), ("threads", ctypes.c_int32),
        ("words", ctypes.c_int32), ("eps", ctypes.c_float),
    ]  # fmt: skip

    @classmethod
    def of(cls, x: Tensor, eps: float = 0.0) -> Shape:
        """Of rows `(samples, …, dim)`."""
        dim = x.shape[-1]
        rows = x.numel() // dim
        return cls(rows, rows // x.shape[0], dim, torch.get_num_threads(), 0, eps)


class Rows(ctypes.Structure):
    """Where the rows of float32 tokens `(B, N, C)` lie; nowhere, if there are none."""

    _fields_ = [("at", ctypes.c_void_p), ("sample", ctypes.c_int64)]

    @classmethod
    def of(cls, x: Tensor | None) -> Rows:
        return cls(None, 0) if x is None else cls(x.data_ptr(), x.stride(0))


def add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    branch: Tensor | None = None,
    factor: Tensor | None = None,
    own: bool = False,
) -> tuple[Tensor, Tensor]:
    """The sum `x + factor · branch` of float32 rows `(samples, …, dim)`, and what a norm makes of it, in `dtype`.

    Args:
        branch: of the shape of x, in `dtype`; without one the sum is x, whose gradients then come together here.
        factor: of each sample's branch.
        own: whether nobody else holds x, so that without gradients the sum may take its place.
    """
    if watched(x, branch, weight):
        stream, made = _AddNorm.apply(x, weight, bias, eps, dtype, branch, factor)
        stats = made.grad_fn.stats
        del made.grad_fn.stats
        make = partial(_again, eps, dtype)
        remember(made, make, stream, stats, weight, bias)
        return stream, made
    stream, made, _ = _forward(x, weight, bias, eps, dtype, branch, factor, own and not torch.is_grad_enabled())
    return stream, made


def added(x: Tensor, branch: Tensor, factor: Tensor | None, own: bool = False) -> Tensor:
    """`x + factor · branch` of float32 and bfloat16 `(samples, …, dim)`; `own` as above."""
    return _Add.apply(x, branch, factor) if watched(x, branch) else _sum(x, branch, factor, own)


def _sum(x: Tensor, branch: Tensor, factor: Tensor | None, own: bool = False) -> Tensor:
    total = x if own else torch.empty_like(x)
    rest = (None, None, total, None, None)
    run("norm_forward", branch.dtype, Shape.of(x), x, branch, factor, *rest)
    return total


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    branch: Tensor | None,
    factor: Tensor | None,
    own: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, its norm, and mean and inverse deviation of each row."""
    shape = Shape.of(x, eps)
    total = x if branch is None or own else torch.empty_like(x)
    made = torch.empty_like(x, dtype=dtype)
    stats = x.new_empty(shape.rows, 2)
    run("norm_forward", dtype, shape, x, branch, factor, weight, bias, total, stats, made)
    return total, made, stats


def _again(eps: float, dtype: torch.dtype, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the norm made."""
    if torch.is_grad_enabled():
        return F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype)
    made = torch.empty_like(x, dtype=dtype)
    run("norm_again", dtype, Shape.of(x), x, weight, bias, stats, made)
    return made


def _grads(shape: Shape, weight: Tensor) -> tuple[Tensor, Tensor]:
    """For the gradients of weight and bias: room for those of each chunk of rows, and for the whole."""
    return weight.new_empty(-(-shape.rows // CHUNK), 2, shape.dim), weight.new_empty(2, shape.dim)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        _, weight, bias, ctx.eps, ctx.dtype, branch, factor = given
        ctx.set_materialize_grads(False)
        ctx.with_branch = branch is not None
        total, made, ctx.stats = _forward(*given)
        ctx.save_for_backward(total, ctx.stats, weight, bias, factor)
        return total, made

    @staticmethod
    def backward(ctx: Any, stream: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, stats, weight, bias, factor = ctx.saved_tensors
        dw = db = dbranch = None
        if torch.is_grad_enabled():  # these gradients will be differentiated in turn
            dx = torch.zeros_like(x) if stream is None else stream
            if grad is not None:
                made = _again(ctx.eps, ctx.dtype, x, stats, weight, bias)
                more, dw, db = torch.autograd.grad(made, (x, weight, bias), grad, create_graph=True)
                dx = dx + more
            if ctx.with_branch:
                dbranch = (dx if factor is None else dx * factor.view(-1, *[1] * (x.dim() - 1))).to(ctx.dtype)
            return dx, dw, db, None, None, dbranch, None
        stream, shape = None if stream is None else stream.contiguous(), Shape.of(x)
        if ctx.with_branch:
            dbranch = torch.empty_like(x, dtype=ctx.dtype)
        if grad is None:
            if stream is not None and dbranch is not None:
                run("norm_scaled", ctx.dtype, shape, stream, factor, dbranch)
            return stream, None, None, None, None, None if stream is None else dbranch, None
        dx, (parts, dw) = torch.empty_like(x), _grads(shape, weight)
        run("norm_backward", ctx.dtype, shape, x, weight, stats, grad.contiguous(), stream,
             factor, dx, dbranch, parts, dw)  # fmt: skip
        dw, db = dw.unbind()
        return dx, dw, db, None, None, dbranch, None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, factor: Tensor | None) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.dtype = branch.dtype
        return _sum(x, branch, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (factor,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # these gradients will be differentiated in turn
            own = grad if factor is None else grad * factor.view(-1, *[1] * (grad.dim() - 1))
            return grad, own.to(ctx.dtype), None
        dbranch, grad = torch.empty(grad.shape, dtype=ctx.dtype), grad.contiguous()
        run("norm_scaled", ctx.dtype, Shape.of(grad), grad, factor, dbranch)
        return grad, dbranch, None
