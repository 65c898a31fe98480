"""A Linear behind a GELU as one operation: its backward pass needs GELU's result and slope, which share their work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blocks.kernels import native, products
from blocks.kernels.linear import eager


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """`F.linear(F.gelu(x), weight, bias)`, to be differentiated; None where the kernel does not serve."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not eager(x, weight, bias):
        return None
    if not (x.requires_grad and weight.requires_grad and x.is_contiguous()):
        return None
    low = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
    dtype = torch.bfloat16 if low else torch.float32
    if x.dtype is not dtype or weight.dtype is not torch.float32:
        return None
    if (not low and torch.is_autocast_enabled("cpu")) or not native.has("gelu", dtype):
        return None
    return _GeluLinear.apply(x, weight, bias)


def activated(x: Tensor, grad: Tensor | None = None) -> Tensor:
    """GELU(x); and of `grad`, its gradient, it makes the gradient of x in place. Both contiguous."""
    made = torch.empty_like(x)
    assert x.is_contiguous()
    assert grad is None or grad.is_contiguous()
    native.call("gelu", x.dtype, x, grad, made, x.numel())
    return made


class _GeluLinear(torch.autograd.Function):
    """Keeps x, and the weight as it is: a parameter, which costs nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        rows = activated(x).view(-1, x.shape[-1])
        out = products.forward(rows, weight, bias)
        # Not a view, which could not be changed in place behind a Function.
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[-1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # these gradients will be differentiated in turn
            with torch.autocast("cpu", enabled=False):
                out = F.linear(F.gelu(x), weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            inputs = [t for t, wanted in zip((x, weight, bias), ctx.needs_input_grad, strict=True) if wanted]
            grads = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
            return tuple(next(grads) if wanted else None for wanted in ctx.needs_input_grad)
        rows = grad.reshape(-1, grad.shape[-1])
        dx = products.grad_input(rows, weight)
        dw, db = products.grad_weight(rows, activated(x, dx).view_as(dx), bias=ctx.needs_input_grad[2])
        return dx.view_as(x), dw.to(weight.dtype), None if db is None else db.to(weight.dtype)
