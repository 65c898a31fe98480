"""The textbook encoder on the CPU as one function, with its own backward pass (`cpp/encoder.cpp`).

Each pass is one call, which runs the kernels of norm, products, attention and GELU one after the other. Called by
themselves they lose a third of a small net's step between them: in Python, and in torch's records of views and sums.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blocks.attention import Attention
from blocks.base import ScorePosition
from blocks.gates import NoGate
from blocks.kernels import attention, layers, native, norm, products
from blocks.kernels.linear import Linear, eager, precision, unhooked
from blocks.mlp import GELU, Mlp
from blocks.norms import LayerNorm

# Where the norms' weights are among the parameters.
NORMS = (0, 6)


def standard(block: Any) -> bool:
    """Whether an `Encoder` is the textbook's: known parts, nothing between them, no dropout inside a branch."""
    mixer, mlp = block.mixer, block.mlp
    if type(mixer) is not Attention or type(mlp) is not Mlp or type(mlp.act) is not GELU or block.norm_stream:
        return False
    if type(mixer.position) is not ScorePosition or type(mixer.gate) is not NoGate:
        return False
    if (mixer.training and mixer.attn_drop > 0) or (mixer.proj_drop.training and mixer.proj_drop.p > 0) or mlp.drops:
        return False
    norms = (block.norm1, block.norm2)
    linears = (mixer.qkv, mixer.proj, mlp.fc1, mlp.fc2)
    if any(type(part) is not LayerNorm for part in norms) or any(type(part) is not Linear for part in linears):
        return False
    if not (block.mixer_residual.plain and block.mlp_residual.plain):
        return False
    return unhooked(block, mixer, mixer.gate, mixer.proj_drop, mlp, mlp.act, mlp.drop, *norms, *linears)


def parameters(block: Any) -> tuple[Tensor | None, ...]:
    """A block's parameters in the order of the kernels."""
    mixer, mlp = block.mixer, block.mlp
    parts = (block.norm1, mixer.qkv, mixer.proj, block.norm2, mlp.fc1, mlp.fc2)
    return tuple(p for part in parts for p in (part.weight, part.bias))


def encode(block: Any, x: Tensor, rows: int | None = None) -> Tensor | None:
    """What an `Encoder` makes of tokens `(B, N, C)`; None where the kernel does not serve.

    Args:
        rows: so many tokens alone are wanted, the first.
    """
    if x.dtype is not torch.float32 or not eager(x) or not standard(block):
        return None
    dtype, parts, (batch, count, dim) = precision(x), parameters(block), x.shape
    heads, hidden, wanted = block.mixer.heads, block.mlp.fc1.out_features, rows or count
    lanes = products.lanes(dtype)
    if dim % lanes or hidden % lanes or not products.preferred(dtype) or not norm.serves(dtype, x):
        return None
    if not eager(*parts) or not attention.fits(batch * heads, wanted, count, dim // heads, dtype):
        return None
    if any(p is not None and not (p.dtype is torch.float32 and p.is_contiguous()) for p in parts):
        return None
    eps, alone = (block.norm1.eps, block.norm2.eps), layers.fits(dim, hidden, dim, dtype)
    settings = (dtype, (batch, count, wanted, dim, heads, hidden), eps, alone)
    residuals = (block.mixer_residual, block.mlp_residual)
    if not norm.watched(x, *parts):
        if any(residual.training and residual.rate for residual in residuals):
            return None
        return _infer(x, settings, parts)
    if not all(p is None or p.requires_grad for p in parts):
        return None
    return _Encoder.apply(x, settings, *(residual.factor(x) for residual in residuals), *parts)


def spelled_out(
    x: Tensor, dtype: torch.dtype, heads: int, rows: int, eps: tuple[float, float], first: Tensor | None,
    second: Tensor | None, *parts: Tensor | None,
) -> Tensor:  # fmt: skip
    """The first `rows` tokens by torch's operators, of tokens of which `first` and `second` weigh the branches."""
    norm1_w, norm1_b, *rest = parts

    def layer(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None
        return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    y = F.layer_norm(x, x.shape[-1:], norm1_w, norm1_b, eps[0]).to(dtype)
    q, k, v = layer(y, rest[0], rest[1]).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    y = layer(attention.spelled_out(q[:, :, :rows], k, v).transpose(1, 2).flatten(2), rest[2], rest[3])
    x = x[:, :rows] + (y if first is None else y * first)
    y = F.layer_norm(x, x.shape[-1:], rest[4], rest[5], eps[1]).to(dtype)
    y = layer(F.gelu(layer(y, rest[6], rest[7])), rest[8], rest[9])
    return x + (y if second is None else y * second)


def differentiable(made: Tensor, parts: Sequence[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """The gradients of those parts that want one, which can be differentiated in turn."""
    wanted = [p for p in parts if p is not None and p.requires_grad]
    found = iter(torch.autograd.grad(made, wanted, grad, create_graph=True))
    return [next(found) if p is not None and p.requires_grad else None for p in parts]


class Shape(ctypes.Structure):
    _fields_ = [
        ("batch", ctypes.c_int64), ("count", ctypes.c_int64), ("rows", ctypes.c_int64), ("dim", ctypes.c_int32),
        ("heads", ctypes.c_int32), ("hidden", ctypes.c_int32), ("threads", ctypes.c_int32),
        ("eps1", ctypes.c_float), ("eps2", ctypes.c_float), ("layers", ctypes.c_int32),
    ]  # fmt: skip

    @classmethod
    def of(cls, settings: Settings) -> Shape:
        _, sizes, eps, alone = settings
        return cls(*sizes, torch.get_num_threads(), *eps, alone)


# Precision of the products, sizes, epsilons of the norms, and whether the MLP is one kernel at inference.
Settings = tuple[torch.dtype, tuple[int, ...], tuple[float, float], bool]


@cache
def _room(settings: Settings) -> list[int]:
    return native.room("encoder_room", settings[0], Shape.of(settings))


def _made(x: Tensor, settings: Settings) -> Tensor:
    """Room for the result."""
    batch, _, rows, dim, *_ = settings[1]
    return native.fresh("tokens", (batch, rows, dim), x.dtype)


def _infer(x: Tensor, settings: Settings, parts: Sequence[Tensor | None]) -> Tensor:
    made, work = _made(x, settings), native.space(_room(settings)[3])
    native.run("encoder_inference", settings[0], Shape.of(settings), x, native.places(parts), work, made)
    return made


class _Encoder(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, settings: Settings, first: Tensor | None, second: Tensor | None, *parts: Tensor | None
    ) -> Tensor:
        ctx.settings, (keeps, works, *_) = settings, _room(settings)
        made, kept, work = _made(x, settings), native.space(keeps), native.space(works)
        given = (x, native.places(parts), first, second)
        native.run("encoder_forward", settings[0], Shape.of(settings), *given, kept, work, made)
        ctx.save_for_backward(x, first, second, kept, *parts)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, first, second, kept, *parts = ctx.saved_tensors
        dtype, sizes, eps, _ = settings = ctx.settings
        if torch.is_grad_enabled():  # these gradients will be differentiated in turn
            with torch.autocast("cpu", enabled=False):
                made = spelled_out(x, dtype, sizes[4], sizes[2], eps, first, second, *parts)
            dx, *grads = differentiable(made, [x, *parts], grad)
            return dx, None, None, None, *grads
        dx, work = torch.empty_like(x), native.space(_room(settings)[2])
        each = [None if p is None else torch.empty_like(p) for p in parts]
        for at in NORMS:  # a norm's bias behind its weight
            each[at], each[at + 1] = x.new_empty(2, x.shape[2]).unbind()
        given, grad = (x, native.places(parts), first, second, kept), grad.contiguous()
        native.run("encoder_backward", dtype, Shape.of(settings), *given, grad, work, dx, native.places(each))
        return dx, None, None, None, *each
