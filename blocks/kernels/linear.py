"""Linear layers that run, and are differentiated, by the fastest matrix products and with the least memory.

On the CPU a product goes to a kernel or to oneDNN where that is faster. For the backward pass a Linear keeps its input,
unless that can be computed again from something that is kept anyway: a norm's or an activation's output carries how it
was made (`recomputable`), and the Linear behind it keeps that instead. Under autocast it keeps no copy of its weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.weak import WeakIdKeyDictionary

from blocks.kernels import products

PLAIN = (Tensor, nn.Parameter)

# Others run torch's own Linear; float64 is the reference that the rest is held against.
DTYPES = (torch.float32, torch.bfloat16)

# Work in pieces is done on so many rows at a time.
ROWS = 2048

# Bytes from which on the C library asks the system for fresh memory each time.
LARGE = 2**25


class Recipe(NamedTuple):
    """How a tensor was made: `make(*parts)`. It holds for these versions of the tensor and of the parts."""

    make: Callable[..., Tensor]
    parts: tuple[Tensor, ...]
    versions: tuple[int, ...]


# Beside the tensors, not on them: who saves one would save its recipe, and with it a module, too.
_recipes: WeakIdKeyDictionary = WeakIdKeyDictionary()


def recorded() -> bool:
    """Whether what runs is written down for elsewhere, where the best form for this machine means nothing."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def eager(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary CPU tensors and nothing watches the operators: no compiler, tracer, mode or transform.

    Only then may Python choose between forms of an operation. A default device is a mode too.
    """
    if torch.compiler.is_compiling():
        return False
    for t in tensors:  # asked for each operation of a net: no generator
        if t is not None and not (type(t) in PLAIN and t.is_cpu and t.layout is torch.strided):
            return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or forward_ad._current_level >= 0  # a Function without `jvp` would lose the tangent
        or torch._C._are_functorch_transforms_active()  # type: ignore[attr-defined]
        or torch._C._is_tracing()
    )


def unhooked(*modules: nn.Module) -> bool:
    """Whether nobody has asked to see what goes into these modules, or into all, or comes out, or has replaced one's
    `forward`.
    """
    if _has_any_global_hook():
        return False
    for m in modules:
        if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks:
            return False
        if "forward" in m.__dict__:
            return False
    return True


def recomputable(make: Callable[..., Tensor], *parts: Tensor) -> Tensor:
    """`make(*parts)`, which a Linear behind it will compute again in its backward pass rather than keep.

    `make` must be cheap, draw no random numbers and change nothing; the parts should be what its own backward keeps.
    """
    made = make(*parts)
    if not torch.compiler.is_compiling() and made.requires_grad and made.is_cpu:
        remember(made, make, *parts)
    return made


def remember(made: Tensor, make: Callable[..., Tensor], *parts: Tensor) -> None:
    """Notes that `made` is `make(*parts)`."""
    _recipes[made] = Recipe(make, parts, _versions(made, parts))


def recipe_of(x: Tensor) -> Recipe | None:
    """How `x` was made; None where that is not known, or it or what it was made of has been changed since."""
    found: Recipe | None = _recipes.get(x)
    return None if found is None or found.versions != _versions(x, found.parts) else found


def _versions(made: Tensor, parts: tuple[Tensor, ...]) -> tuple[int, ...]:
    return (made._version, *(part._version for part in parts))


def precision(x: Tensor) -> torch.dtype:
    """What a product with `x` is computed in on the CPU."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, weight, bias)`."""
    if torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    flops = 2.0 * x.numel() * weight.shape[0]
    if flops <= products.FLOOR or not eager(x, weight, bias):
        return F.linear(x, weight, bias)
    cast = torch.is_autocast_enabled("cpu")
    dtype = precision(x)
    if dtype not in DTYPES or x.dtype not in DTYPES or weight.dtype not in DTYPES:
        return F.linear(x, weight, bias)
    same = x.dtype is weight.dtype is dtype
    fast = (same or (cast and dtype is torch.bfloat16)) and products.faster(flops, dtype)
    if torch.is_grad_enabled() and (
        x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        recipe = recipe_of(x)
        if (fast or cast or recipe is not None) and (same or cast):
            return _Linear.apply(x.to(dtype), weight, bias, recipe)
    elif fast:
        return products.forward(x.to(dtype), weight, bias)
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """`F.gelu(F.linear(x, weight, bias))` in one product, without gradients; None where that is not possible."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not eager(x, weight, bias):
        return None
    flops = 2.0 * x.numel() * weight.shape[0]
    cast = torch.is_autocast_enabled("cpu")
    dtype = precision(x)
    if flops <= products.FLOOR or x.dtype not in DTYPES or not (cast or x.dtype is weight.dtype):
        return None
    if not products.faster(flops, dtype):
        return None
    return products.forward(x.to(dtype), weight, bias, "gelu")


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`relu(linear(x, weight, bias))` of ordinary tensors on the CPU, without gradients."""
    dtype = precision(x)
    if dtype in DTYPES and weight.dtype in DTYPES and (dtype is torch.bfloat16 or x.dtype is weight.dtype):
        return products.forward(x.to(dtype), weight, bias, "relu")
    return F.linear(x, weight, bias).relu_()


def in_pieces(make: Callable[[Tensor], Tensor], x: Tensor, hidden: int) -> Tensor:
    """`make(x)`, which works on each token alone and has `hidden` numbers for it in between.

    Without gradients, what is in between is thrown away at once; if it is large, then that is in pieces, which stay in
    the processor's cache, while fresh memory from the system would cost more than the products themselves.
    """
    if torch.is_grad_enabled() or not eager(x):
        return make(x)
    rows = x.numel() // x.shape[-1]
    if 4 * rows * hidden <= LARGE:
        return make(x)
    made = torch.cat([make(piece) for piece in x.reshape(rows, -1).tensor_split(-(-rows // ROWS))])
    return made.view(*x.shape[:-1], made.shape[-1])


class Linear(nn.Linear):
    """`nn.Linear`, with the same parameters under the same names."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    """Keeps the input, or what it can be made of, and the weight as it is: a parameter, which costs nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe | None) -> Tensor:
        ctx.make = None if recipe is None or not weight.requires_grad else recipe.make
        kept: tuple[Tensor, ...] = ()
        if recipe is not None and weight.requires_grad:
            # Parameters of a norm are copied too: a sharded one is only there while its own module runs.
            kept = recipe.parts + tuple(p.detach().clone() if type(p) is nn.Parameter else p for p in recipe.parts)
        elif weight.requires_grad:
            kept = (x,)
        ctx.save_for_backward(weight, *kept)
        out = products.forward(x.reshape(-1, x.shape[-1]), weight, bias)
        # Not a view, which could not be changed in place behind a Function.
        return torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[-1]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        weight, *kept = ctx.saved_tensors
        # With gradients on, these gradients will be differentiated in turn: by operators that can be.
        twice = torch.is_grad_enabled()
        ours = False if twice else None
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = products.grad_input(grad, weight, ours=ours)
        if ctx.needs_input_grad[1]:
            half = len(kept) // 2
            x = kept[0] if ctx.make is None else ctx.make(*(kept[:half] if twice else kept[half:]))
            x, rows = x.to(grad.dtype).reshape(-1, weight.shape[1]), grad.reshape(-1, weight.shape[0])
            dw, db = products.grad_weight(rows, x, bias=ctx.needs_input_grad[2], ours=ours)
            dw = dw.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = (grad.reshape(-1, grad.shape[-1]).sum(0) if db is None else db).to(weight.dtype)
        return dx, dw, db, None
