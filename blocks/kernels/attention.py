"""Scaled dot-product attention by the form that is fastest for the device, the precision and the size.

torch's own is, but on the CPU not in bfloat16 (half as fast forward, a third to a tenth forward and backward), and not
with heads of 16 channels or fewer on short sequences in training. There it is matrix products and a softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blocks.kernels.linear import eager, recorded

# In float32, heads this narrow on sequences this short train faster without torch's kernel.
NARROW, SHORT = 16, 64


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, drop: float = 0.0) -> Tensor:
    """`dropout(softmax(q kᵀ/√d + bias)) v` of `(B, heads, N, d)` queries and `(B, heads, M, d)` keys and values."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    low = dtype is torch.bfloat16 and q.dtype is not torch.float64
    narrow = dtype is torch.float32 and q.shape[-1] <= NARROW and k.shape[-2] <= SHORT and bias is None and not drop
    training = torch.is_grad_enabled() and q.requires_grad
    if not (q.is_cpu and (low or (narrow and training))) or recorded():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if bias is not None or drop:
        return _spelled_out(q, k, v, bias, drop)
    if training and eager(q, k, v):
        return _Attention.apply(q, k, v)
    return _multiplied(q, k, v)[0]


def _spelled_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, drop: float = 0.0) -> Tensor:
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
