"""The products of a Linear layer on the CPU, forward and backward, by what is fastest on this machine.

That is a kernel in C++ (`cpp/gemm.cpp`) where it serves, else oneDNN. Whether either is faster in float32 than the BLAS
that torch calls is measured, once for each processor and torch version: on AMD, MKL keeps to AVX2, and both have twice
its speed; elsewhere they may be equal. In bfloat16 the kernel reads a float32 weight as it is, without a copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from blocks.kernels import native, onednn

# No product with fewer floating-point operations is tried: the calls themselves take as long.
FLOOR = 4e6

# Widths from which on the kernel is as fast as oneDNN.
LARGE = 192

# Rows, width and output width of the products that are measured, each larger than the one before.
SIZES = ((128, 128, 128), (256, 256, 256), (1024, 384, 384))

# The time of BLAS over ours from which on ours is taken. What it does behind a product, and the gradient of a bias with
# that of its weight, are not measured, and worth more than the rest.
MARGIN = 0.95

# What may be done behind a product, as in gemm.cpp.
ACTS = ("none", "relu", "gelu")


class Factor(ctypes.Structure):
    _fields_ = [
        ("at", ctypes.c_void_p), ("step", ctypes.c_int64), ("turned", ctypes.c_int32), ("single", ctypes.c_int32),
        ("places", ctypes.c_void_p),
    ]  # fmt: skip

    @classmethod
    def of(cls, x: Tensor, turned: bool = False) -> Factor:
        return cls(x.data_ptr(), x.stride(0), turned, x.dtype is torch.float32)


class Result(ctypes.Structure):
    _fields_ = [
        ("at", ctypes.c_void_p), ("single", ctypes.c_int32), ("act", ctypes.c_int32), ("base", ctypes.c_void_p),
        ("bias", ctypes.c_void_p), ("sums", ctypes.c_void_p), ("mask", ctypes.c_void_p), ("places", ctypes.c_void_p),
        ("by", ctypes.c_float),
    ]  # fmt: skip

    @classmethod
    def of(cls, made: Tensor, act: str, base: Tensor | None, bias: Tensor | None, sums: Tensor | None = None) -> Result:
        places = (None if t is None else t.data_ptr() for t in (base, bias, sums))
        return cls(made.data_ptr(), made.dtype is torch.float32, ACTS.index(act), *places, by=1.0)


class Size(ctypes.Structure):
    _fields_ = [("m", ctypes.c_int64), ("n", ctypes.c_int64), ("k", ctypes.c_int64), ("threads", ctypes.c_int64)]


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    act: str = "none",
    onto: Tensor | None = None,
    ours: bool | None = None,
) -> Tensor:
    """`act(F.linear(x, weight, bias))` in the precision of x, float32 or bfloat16; weight and bias may be float32.

    Args:
        onto: contiguous rows of this or more precision, to which the result is added in place.
        ours: whether by the kernel or oneDNN, where there is one of them; by default where that is faster.
    """
    rows, ours = x.reshape(-1, x.shape[-1]), _faster(x, weight.shape[0]) if ours is None else ours
    if ours and _serves(rows, weight, *weight.shape) and (onto is not None or _large(rows, weight)):
        made = rows.new_empty(rows.shape[0], weight.shape[0]) if onto is None else onto.view(-1, weight.shape[0])
        _call(Factor.of(rows), Factor.of(weight), made, rows.shape[1], bias, act, base=onto)
        if onto is not None:
            return onto
        # Not a view, which could not be changed in place behind a Function.
        return torch.ops.aten._unsafe_view(made, (*x.shape[:-1], weight.shape[0]))
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if ours and onednn.multiplies(x.dtype):
        made = onednn.forward(x, weight, bias, "gelu" if act == "gelu" else "none")
    else:
        made = F.linear(x, weight, bias)
        made = F.gelu(made) if act == "gelu" else made
    made = F.relu_(made) if act == "relu" else made
    return made if onto is None else onto.add_(made.view_as(onto))


def grad_input(grad: Tensor, weight: Tensor, ours: bool | None = None) -> Tensor:
    """`grad @ weight`, the gradient of a Linear's input, in the precision of `grad`; `ours` as above."""
    rows, ours = grad.reshape(-1, grad.shape[-1]), _faster(grad, weight.shape[1]) if ours is None else ours
    if ours and _serves(rows, weight, *weight.shape) and _large(rows, weight):
        made = rows.new_empty(rows.shape[0], weight.shape[1])
        _call(Factor.of(rows), Factor.of(weight, turned=True), made, rows.shape[1])
        return made.view(*grad.shape[:-1], weight.shape[1])
    if ours and grad.dtype is torch.float32 and onednn.multiplies(grad.dtype):
        return onednn.grad_input(grad, weight)
    return grad @ weight.to(grad.dtype)


def grad_weight(grad: Tensor, x: Tensor, bias: bool = False, ours: bool | None = None) -> tuple[Tensor, Tensor | None]:
    """`gradᵀ @ x`, the gradient of a Linear's weight, of matrices; and of its bias, if asked for; `ours` as above."""
    ours = _faster(x, grad.shape[1]) if ours is None else ours
    if grad.stride(1) != 1:
        grad = grad.contiguous()
    if ours and _serves(grad, x, x.shape[1]):
        made = x.new_empty(grad.shape[1], x.shape[1], dtype=torch.float32)
        sums = made.new_empty(grad.shape[1]) if bias else None
        _call(Factor.of(grad, turned=True), Factor.of(x, turned=True), made, len(x), sums=sums)
        return made, sums
    if ours and len(x) and x.dtype is torch.float32 and onednn.multiplies(x.dtype):
        made = onednn.grad_weight(grad, x)
    else:
        made = grad.t() @ x
    return made, grad.sum(0) if bias else None


def _faster(x: Tensor, width: int) -> bool:
    return faster(2.0 * x.numel() * width, x.dtype)


def _large(rows: Tensor, weight: Tensor) -> bool:
    """Whether the kernel is as fast as oneDNN, if there is that: it begins and ends a tile at more expense."""
    return min(weight.shape) >= LARGE or not onednn.multiplies(rows.dtype)


def lanes(dtype: torch.dtype) -> int:
    """Of so many numbers the widths of what is multiplied are whole multiples."""
    return 32 if dtype is torch.bfloat16 else 16


def _serves(first: Tensor, second: Tensor, *whole: int) -> bool:
    """Whether the kernel multiplies these, of which some sizes are to be whole vectors."""
    if (
        not kernel(first.dtype)
        or any(size % lanes(first.dtype) for size in whole)
        or not (first.numel() and second.numel())
    ):
        return False
    fits = second.dtype is first.dtype or (first.dtype is torch.bfloat16 and second.dtype is torch.float32)
    return fits and first.stride(1) == 1 == second.stride(1)


@cache
def kernel(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for this precision; in bfloat16 oneDNN is faster where the processor has tiles."""
    if dtype is torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        return False
    return dtype in (torch.float32, torch.bfloat16) and native.has("gemm", dtype)


def _call(
    a: Factor,
    b: Factor,
    made: Tensor,
    k: int,
    bias: Tensor | None = None,
    act: str = "none",
    sums: Tensor | None = None,
    base: Tensor | None = None,
) -> None:
    assert native.planned() is None, "nobody would hold what a product reads until it is made"
    bias = None if bias is None else bias.float().contiguous()
    result = Result.of(made, act, base, bias, sums)
    size = Size(*made.shape, k, torch.get_num_threads())
    native.run("gemm", torch.float32 if a.single else torch.bfloat16, a, b, result, size)


def faster(flops: float, dtype: torch.dtype = torch.float32) -> bool:
    """Whether products of that many floating-point operations are faster here than torch's on this machine's CPU."""
    if dtype is torch.bfloat16:
        return kernel(dtype) or onednn.multiplies(dtype)
    return dtype is torch.float32 and flops >= FLOOR and flops >= _smallest() * torch.get_num_threads()


def preferred(dtype: torch.dtype) -> bool:
    """Whether the kernel is there, and large products are not faster by another on this machine's CPU."""
    return kernel(dtype) and (dtype is torch.bfloat16 or _smallest() < float("inf"))


@cache
def _smallest() -> float:
    """The smallest product for one thread that is faster here than by BLAS; infinite where there is none.

    Taken from the cache folder, or measured now. Where several processes measure at once, the first to write decides
    for all, so that the runs of a study do not differ in rounding.
    """
    if not (kernel(torch.float32) or onednn.multiplies(torch.float32)):
        return float("inf")
    file = native.cache_folder() / "products.json"
    ours = native.capability() if kernel(torch.float32) else "oneDNN"
    # What was measured within a plan, where nothing ran, has a key without the last word.
    key = f"{native.processor()}, torch {torch.__version__}, {ours}, run"
    known = _read(file)
    if key not in known:
        found = _measure()
        known = {key: found, **_read(file)}
        with contextlib.suppress(OSError):  # a folder that cannot be written: measured again by the next process
            _write(file, known)
    smallest = known[key]
    return float("inf") if smallest is None else smallest


def _measure() -> float | None:
    """The number of operations from which on ours is faster, a Linear's three products together; None if never.

    In the time of one thread, which other processes on the machine do not count in.
    """
    smallest = None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with native.at_once():  # the first who asks may be about to plan
            for rows, width, out in reversed(SIZES):
                if _ratio(rows, width, out) < MARGIN:
                    break
                smallest = 2.0 * rows * width * out
    finally:
        torch.set_num_threads(threads)
    return smallest


def _ratio(rows: int, width: int, out: int, budget: float = 0.05, rounds: int = 20) -> float:
    """The time of a Linear's three products by BLAS over ours, the best of both in turns."""
    x, weight, grad = (onednn.draw(*shape) for shape in ((rows, width), (out, width), (rows, out)))

    def blas() -> None:
        F.linear(x, weight), grad @ weight, grad.t() @ x

    def ours() -> None:
        forward(x, weight, ours=True), grad_input(grad, weight, ours=True), grad_weight(grad, x, ours=True)

    best = {blas: float("inf"), ours: float("inf")}
    begin = time.thread_time()
    for i in range(rounds):
        for act in best:
            start = time.thread_time()
            act()
            if i:  # the first round makes the kernels
                best[act] = min(best[act], time.thread_time() - start)
        if i >= 3 and time.thread_time() - begin > budget:
            break
    return best[blas] / best[ours]


def _read(file: Path) -> dict[str, float | None]:
    """What the file holds; nothing where it is not there or not ours."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in entries if value is None or isinstance(value, (int, float))}


def _write(file: Path, known: dict[str, float | None]) -> None:
    """Whole or not at all: it is written beside its place and then moved there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=file.parent, suffix=".json")
    with os.fdopen(descriptor, "w") as handle:
        json.dump(known, handle, indent=1)
    os.replace(name, file)
