"""Scaled dot-product attention by the form that is fastest for the device, the precision and the size.

On the CPU that is a kernel in C++, forward and backward, which keeps two numbers for each row of the softmax
(`cpp/attention.cpp`; of many heads on short sequences `cpp/attention_lanes.h`). Where it does not serve (a bias,
dropout, long sequences, no compiler) torch's own is, but not in bfloat16 (half as fast forward, a third to a tenth
forward and backward), and not with heads of 16 channels or fewer on short sequences in training: there it is matrix
products and a softmax.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blocks.kernels import native
from blocks.kernels.linear import DTYPES, eager, precision, recorded

# In float32, heads this narrow on sequences this short train faster without torch's kernel.
NARROW, SHORT = 16, 64

# In float32, fewer queries than this are not worth bringing keys and values into the kernel's order, but for as many
# heads on short sequences, which it has side by side.
FEW, MANY = 6, 64

# What the kernel holds in the processor's cache: longer sequences and wider heads are torch's.
MOST_KEYS, MOST_CHANNELS = 1024, 256


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, drop: float = 0.0) -> Tensor:
    """`dropout(softmax(q kᵀ/√d + bias)) v` of `(B, heads, N, d)` queries and `(B, heads, M, d)` keys and values."""
    dtype = precision(q)
    low = dtype is torch.bfloat16 and q.dtype is not torch.float64
    if low:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if bias is None and not drop and q.dtype is dtype and serves(q, k, v):
        if training:
            return _Fused.apply(*(x.transpose(1, 2).unsqueeze(2) for x in (q, k, v))).transpose(1, 2)
        return fused(q, k, v)[0].transpose(1, 2)
    narrow = dtype is torch.float32 and q.shape[-1] <= NARROW and k.shape[-2] <= SHORT and bias is None and not drop
    if not (q.is_cpu and (low or (narrow and training))) or recorded():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if bias is not None or drop:
        return spelled_out(q, k, v, bias, drop)
    if training and eager(q, k, v):
        return _Attention.apply(q, k, v)
    return _multiplied(q, k, v)[0]


def attend_joined(*parts: Tensor) -> Tensor:
    """`attend` over tensors `(B, N, one or more of q, k and v, heads, d)`: the gradients then come in as many."""
    q, k, v = split(parts)
    wanted = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    if wanted and precision(q) is q.dtype and serves(q, k, v):
        return _Fused.apply(*parts).transpose(1, 2)
    return attend(q, k, v)


def spelled_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, drop: float = 0.0) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return F.dropout(scores.softmax(-1), drop, drop > 0) @ v


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """The attention weights of `(B·heads, N, d)` queries."""
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    return torch.softmax(scores, -1)


def _multiplied(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result and the weights."""
    weights = _weights(q.flatten(0, 1), k.flatten(0, 1))
    return torch.bmm(weights, v.flatten(0, 1)).view(*q.shape[:3], v.shape[3]), weights


class _Attention(torch.autograd.Function):
    """Keeps queries, keys and values; and the weights, unless they are larger than these."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, weights = _multiplied(q, k, v)
        large = k.shape[2] > 2 * q.shape[3] >= 64
        ctx.save_for_backward(q, k, v, *(() if large else (weights,)))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        saved = ctx.saved_tensors  # once: checkpointing gives them one time only
        inputs, kept = saved[:3], saved[3:]
        if torch.is_grad_enabled():  # these gradients will be differentiated in turn
            with torch.autocast("cpu", enabled=False):
                return torch.autograd.grad(_multiplied(*inputs)[0], inputs, grad, create_graph=True)
        q, k, v = (x.flatten(0, 1) for x in inputs)
        weights = kept[0] if kept else _weights(q, k)
        grad = grad.flatten(0, 1)
        dv = torch.bmm(weights.transpose(1, 2), grad)
        ds = torch._softmax_backward_data(torch.bmm(grad, v.transpose(1, 2)), weights, -1, weights.dtype)
        none, scale = q.new_empty(()), q.shape[-1] ** -0.5
        dq = torch.baddbmm(none, ds, k, beta=0, alpha=scale)
        dk = torch.baddbmm(none, ds.transpose(1, 2), q, beta=0, alpha=scale)
        return tuple(part.view(x.shape) for part, x in zip((dq, dk, dv), inputs, strict=True))


class Shape(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64), ("heads", ctypes.c_int64), ("queries", ctypes.c_int32), ("keys", ctypes.c_int32),
        ("d", ctypes.c_int32), ("threads", ctypes.c_int32), ("scale", ctypes.c_float),
    ]  # fmt: skip


class Rows(ctypes.Structure):
    """Where the rows of a tensor `(B, heads, N, d)` lie."""

    _fields_ = [("at", ctypes.c_void_p), ("batch", ctypes.c_int64), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        return cls(x.data_ptr(), x.stride(0), x.stride(2), x.stride(1))


def serves(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel computes attention over these."""
    if not eager(q, k, v) or not (q.dtype is k.dtype is v.dtype) or q.dtype not in DTYPES:
        return False
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        return False
    if not (q.numel() and k.numel()) or not all(reads(x) for x in (q, k, v)):
        return False
    return fits(q.shape[0] * q.shape[1], q.shape[2], k.shape[2], k.shape[3], q.dtype)


def fits(heads: int, queries: int, keys: int, channels: int, dtype: torch.dtype) -> bool:
    """Whether the kernel is there for these sizes, and gains; `heads` are those of the whole batch."""
    if keys > MOST_KEYS or channels > MOST_CHANNELS:
        return False
    low, few = dtype is torch.bfloat16, queries < FEW <= keys and (keys > SHORT or heads < MANY)
    if (few and not low) or (low and channels % 2):
        return False
    return native.has("attention_forward", dtype)


def reads(x: Tensor) -> bool:
    """Whether the rows of a tensor are whole, and two numbers of bfloat16 lie in one word."""
    whole = x.stride(3) == 1
    if x.dtype is not torch.bfloat16:
        return whole
    return whole and x.shape[3] % 2 == x.data_ptr() % 4 == 0 and all(step % 2 == 0 for step in x.stride()[:3])


def call(name: str, parts: Sequence[Tensor], kept: Tensor) -> None:
    """Calls a function of `attention.cpp`: `parts` are its tensors `(B, heads, N, d)`."""
    q, k = parts[:2]
    threads, scale = torch.get_num_threads(), q.shape[3] ** -0.5
    shape = Shape(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.shape[3], threads, scale)
    rows = (Rows * len(parts))(*(Rows.of(x) for x in parts))
    native.run(name, q.dtype, shape, rows, kept)


def fused(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result, `(B, N, heads, d)` in memory, and what the backward pass wants of the softmax."""
    b, heads, n, d = q.shape
    out, kept = q.new_empty(b, n, heads, d), q.new_empty(b, heads, n, 2, dtype=torch.float32)
    call("attention_forward", (q, k, v, out.transpose(1, 2)), kept)
    return out, kept


def split(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Queries, keys and values, `(B, heads, N, d)`, of tensors `(B, N, one or more of them, heads, d)`."""
    q, k, v = (x for part in parts for x in part.permute(2, 0, 3, 1, 4).unbind(0))
    return q, k, v


class _Fused(torch.autograd.Function):
    """Keeps queries, keys and values, and two numbers for each row of the softmax."""

    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        out, kept = fused(*split(parts))
        ctx.save_for_backward(kept, *parts)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        kept, *parts = ctx.saved_tensors  # once: checkpointing gives them one time only
        grad = grad.transpose(1, 2)
        if torch.is_grad_enabled():  # these gradients will be differentiated in turn
            with torch.autocast("cpu", enabled=False):
                return torch.autograd.grad(_multiplied(*split(parts))[0], parts, grad, create_graph=True)
        grads = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
        grad = grad if reads(grad) else grad.contiguous()
        call("attention_backward", (*split(parts), grad, *split(grads)), kept)
        return tuple(grads)
