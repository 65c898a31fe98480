"""One pre-norm transformer block over many tiny token sets, in one kernel: what TNT does to the words of its tokens.

The kernel's words are `(sets, channels, words)` in memory. It keeps only its input for the backward pass and computes
the rest again, which is cheaper than reading it. `serves` tells where it stands for an encoder; everywhere else, and
in float64, the encoder's own forward runs, which is the reference.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from blocks.attention import Attention
from blocks.kernels import native
from blocks.kernels.encoder import differentiable, parameters, spelled_out, standard
from blocks.kernels.linear import PLAIN, eager
from blocks.mlp import Mlp
from blocks.norms import LayerNorm
from blocks.residual import Residual, drop_path
from blocks.transformer import Encoder

MOST_WORDS, MOST_WIDTH = 64, 64  # beyond, ordinary matrix products are as fast


def serves(block: nn.Module, words: Tensor) -> bool:
    """Whether the kernel computes what `block` would on these words `(sets, m, c)`, on their device and in their type.

    The parts must be exactly those known here, and without hooks, which would not be called.
    """
    device = words.device.type
    if device not in ("cpu", "cuda"):
        return False
    if torch.compiler.is_exporting() or torch.jit.is_tracing():  # a saved graph should run without this package
        return False
    if type(block) is not Encoder or not standard(block):
        return False
    if any(isinstance(norm, LayerNorm) and norm.eps <= 0 for norm in (block.norm1, block.norm2)):
        return False  # lanes without a word hold zeros
    if words.shape[1] > MOST_WORDS or words.shape[2] > MOST_WIDTH:
        return False
    if words.dtype != torch.float32 and not (
        words.dtype in (torch.bfloat16, torch.float16) and torch.is_autocast_enabled(device)
    ):
        return False
    place = words.device
    for p in parameters(block):
        if p is not None and (p.dtype is not torch.float32 or p.device != place or type(p) not in PLAIN):
            return False
    if device == "cuda":
        mixer = block.mixer
        assert isinstance(mixer, Attention)
        assert isinstance(block.mlp, Mlp)
        hidden, bias = block.mlp.fc1.out_features, mixer.qkv.bias is not None
        return works(words.shape[1], words.shape[2], mixer.heads, hidden, bias, precision(words))
    return available()


def run(block: Any, words: Tensor) -> Tensor:
    """What `block` makes of words `(sets, m, c)`; the result lies as `(sets, c, m)` in memory.

    Args:
        block: an encoder that the kernel serves.
        words: best as such a result, or they are copied once.
    """
    x = words.transpose(1, 2).contiguous().float()
    s1, s2 = (kept(residual, x) for residual in (block.mixer_residual, block.mlp_residual))
    settings = (block.mixer.heads, block.norm1.eps, block.norm2.eps, precision(words))
    parts = (x, *parameters(block), s1, s2)
    y = (_Inner.apply if x.is_cpu and eager(*parts) else inner)(*parts, *settings)
    return y.to(words.dtype).transpose(1, 2)


def as_it_is(block: nn.Module, words: Tensor) -> bool:
    """Whether the kernel, where it serves, reads words and parameters where they lie, without a copy of them."""
    if words.dtype is not torch.float32 or not words.is_cpu or not words.transpose(1, 2).is_contiguous():
        return False
    parts = parameters(block)
    return eager(*parts) and all(p is None or p.is_contiguous() for p in parts)


def kept(residual: Residual, x: Tensor) -> Tensor | None:
    """What stochastic depth multiplies a branch of each set by: the numbers that `residual` would draw, or None."""
    if not residual.training or residual.rate == 0.0:
        return None
    return drop_path(x.new_ones(x.shape[0], 1, 1), residual.rate).flatten()


def precision(words: Tensor) -> str:
    """What the kernel multiplies in, as autocast and on CUDA `torch.set_float32_matmul_precision` ask."""
    if words.device.type != "cuda":
        low = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
        return "bf16" if low and multiplies() else "ieee"
    if torch.is_autocast_enabled("cuda"):
        return "bf16" if torch.get_autocast_dtype("cuda") == torch.bfloat16 else "fp16"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def available() -> bool:
    return native.library() is not None


def multiplies() -> bool:
    """Whether the processor multiplies bfloat16."""
    return hasattr(native.library(), "inner_forward_bf16")


@cache
def works(words: int, width: int, heads: int, hidden: int, bias: bool, precision: str) -> bool:
    """Whether Triton is there and its kernels run on this GPU: both are tried, once for each form of the block."""
    if importlib.util.find_spec("triton") is None:
        return False
    from blocks.kernels import inner_triton

    c, three = (width,), (3 * width,)
    shapes: list[tuple[int, ...] | None] = [c, c, (*three, *c), three if bias else None, (*c, *c), c, c, c,
                                            (hidden, *c), (hidden,), (*c, hidden), c]  # fmt: skip
    try:
        params = [None if shape is None else torch.ones(shape, device="cuda") for shape in shapes]
        x = torch.ones(2, width, words, device="cuda")
        y = inner_triton.forward(x, params, [None, None], (heads, 1e-5, 1e-5), precision)
        grads = inner_triton.backward(y, x, params, [None, None], (heads, 1e-5, 1e-5), precision)
        return all(bool(t.isfinite().all()) for t in (y, *grads))
    except Exception as error:  # a compiler's: anything
        line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(f"no Triton kernel for the words of TNT, which run in plain PyTorch: {line}", file=sys.stderr)
        return False


# What torch.compiler.assume_constant_result does, which imports the compiler for it, some seconds of every start.
for asked in (available, multiplies, works):
    asked._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Shape(ctypes.Structure):
    _fields_ = [
        ("sets", ctypes.c_int64), ("words", ctypes.c_int32), ("width", ctypes.c_int32), ("heads", ctypes.c_int32),
        ("hidden", ctypes.c_int32), ("eps1", ctypes.c_float), ("eps2", ctypes.c_float), ("threads", ctypes.c_int32),
    ]  # fmt: skip


# What the CPU multiplies in, by the name of the precision.
LOW = {"bf16": torch.bfloat16, "ieee": torch.float32}

POINTERS = ctypes.c_void_p * 12  # to all parameters


def call(
    function: str,
    precision: str,
    x: Tensor,
    params: list[Tensor | None],
    factors: list[Tensor | None],
    settings: tuple[int, float, float],
    *rest: Tensor | list[Tensor | None],
) -> None:
    """Calls a function of `inner.cpp`: `rest` are its further tensors, or lists of such as belong to parameters."""
    heads, eps1, eps2 = settings
    fc1 = params[8]
    assert fc1 is not None
    shape = Shape(x.shape[0], x.shape[2], x.shape[1], heads, fc1.shape[0], eps1, eps2, torch.get_num_threads())
    params = [None if p is None else p.contiguous() for p in params]

    def part(value: Tensor | list[Tensor | None] | None) -> native.Part:
        return POINTERS(*[None if p is None else p.data_ptr() for p in value]) if isinstance(value, list) else value

    assert x.is_contiguous()
    native.run(function, LOW[precision], shape, *[part(value) for value in (params, x, *factors, *rest)])


def _split(rest: tuple[Any, ...]) -> tuple[list[Tensor | None], list[Tensor | None], tuple[int, float, float], str]:
    """What follows x: parameters, factors, heads and eps, precision."""
    return [None if p is None else p.contiguous() for p in rest[:12]], list(rest[12:14]), rest[14:17], rest[17]


def _inner(
    x: Tensor, norm1_w: Tensor, norm1_b: Tensor, qkv_w: Tensor, qkv_b: Tensor | None, proj_w: Tensor, proj_b: Tensor,
    norm2_w: Tensor, norm2_b: Tensor, fc1_w: Tensor, fc1_b: Tensor, fc2_w: Tensor, fc2_b: Tensor,
    s1: Tensor | None, s2: Tensor | None, heads: int, eps1: float, eps2: float, precision: str,
) -> Tensor:  # fmt: skip
    """The block on float32 words `(sets, c, m)`; `s1`, `s2` `(sets,)` scale its two branches."""
    params = [norm1_w, norm1_b, qkv_w, qkv_b, proj_w, proj_b, norm2_w, norm2_b, fc1_w, fc1_b, fc2_w, fc2_b]
    y = native.fresh("words", x.shape, x.dtype)
    call("inner_forward", precision, x, params, [s1, s2], (heads, eps1, eps2), y)
    return y


inner = torch.library.custom_op("tessera::inner", _inner, mutates_args=(), device_types="cpu")


@inner.register_kernel("cuda")
def _(x: Tensor, *rest: Any) -> Tensor:
    from blocks.kernels import inner_triton

    with torch.cuda.device(x.device):
        return inner_triton.forward(x, *_split(rest))


@inner.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


def _inner_backward(
    dy: Tensor, x: Tensor, norm1_w: Tensor, norm1_b: Tensor, qkv_w: Tensor, qkv_b: Tensor | None, proj_w: Tensor,
    proj_b: Tensor, norm2_w: Tensor, norm2_b: Tensor, fc1_w: Tensor, fc1_b: Tensor, fc2_w: Tensor, fc2_b: Tensor,
    s1: Tensor | None, s2: Tensor | None, heads: int, eps1: float, eps2: float, precision: str,
) -> list[Tensor]:  # fmt: skip
    """The gradients of x and of the parameters that are there, in the order of `inner`."""
    params = [norm1_w, norm1_b, qkv_w, qkv_b, proj_w, proj_b, norm2_w, norm2_b, fc1_w, fc1_b, fc2_w, fc2_b]
    dx = torch.empty_like(x)
    grads = [None if p is None else torch.empty_like(p, memory_format=torch.contiguous_format) for p in params]
    call("inner_backward", precision, x, params, [s1, s2], (heads, eps1, eps2), dy.contiguous(), dx, grads)
    return [dx, *(grad for grad in grads if grad is not None)]


inner_backward = torch.library.custom_op(
    "tessera::inner_backward", _inner_backward, mutates_args=(), device_types="cpu"
)


@inner_backward.register_kernel("cuda")
def _(dy: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    from blocks.kernels import inner_triton

    with torch.cuda.device(x.device):
        return inner_triton.backward(dy.contiguous(), x, *_split(rest))


@inner_backward.register_fake
def _(dy: Tensor, x: Tensor, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(x), *(p.new_empty(p.shape) for p in rest[:12] if p is not None)]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:15])
    ctx.settings = inputs[15:]


def _backward(ctx: Any, dy: Tensor, made: Callable[..., Any] = inner_backward) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grads: list[Tensor | None] = list(made(dy, *saved, *ctx.settings))
    if saved[4] is None:  # no bias of queries, keys and values
        grads.insert(4, None)
    return (*grads, None, None, None, None, None, None)


def _spelled_out(dy: Tensor, x: Tensor, *rest: Any) -> list[Tensor | None]:
    """What `inner_backward` gives where it is asked for, by operators that can be differentiated in turn."""
    params, (s1, s2, heads, eps1, eps2, precision) = rest[:12], rest[12:]
    dtype, factors = LOW[precision], [None if s is None else s.view(-1, 1, 1) for s in (s1, s2)]
    with torch.autocast("cpu", enabled=False):
        y = spelled_out(x.transpose(1, 2), dtype, heads, x.shape[2], (eps1, eps2), *factors, *params)
    return differentiable(y.transpose(1, 2), [x, *(p for p in params if p is not None)], dy)


inner.register_autograd(_backward, setup_context=_keep)


class _Inner(torch.autograd.Function):
    """`inner` of ordinary tensors on the CPU, without torch's dispatcher, which takes 0.1 ms each time."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        _keep(ctx, inputs, inputs[0])
        return _inner(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _backward(ctx, dy, _spelled_out if torch.is_grad_enabled() else _inner_backward)
