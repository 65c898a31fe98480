"""Float32 matrix products by oneDNN, and whether they are faster here than the BLAS that torch calls.

Which library is faster depends on the processor: on AMD, MKL keeps to AVX2 and oneDNN has twice its speed; elsewhere
they may be equal. So it is measured, once for each processor and torch version, and kept in the user's cache folder.
The operators are private to torch: they are used only where they pass a test.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
import time
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.kernels import native
from blocks.kernels.native import cache_folder

# No product with fewer floating-point operations is tried: the calls themselves take as long.
FLOOR = 4e6

# Rows, width and output width of the products that are measured, each larger than the one before.
SIZES = ((128, 128, 128), (256, 256, 256), (1024, 384, 384))

# Work in pieces, such as the sum that is the gradient of a weight, is done on so many rows at a time.
ROWS = 2048

# How much faster oneDNN must be to be taken, so that two equal libraries are not told apart by noise.
MARGIN = 1.1


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = False) -> Tensor:
    """`F.linear(x, weight, bias)`, and ReLU behind it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu" if relu else "none", [], "")


def forward_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.gelu(F.linear(x, weight, bias))`, in float32 or bfloat16."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")


def conv(map: Tensor, weight: Tensor, bias: Tensor | None, like: nn.Conv2d, relu: bool = False) -> Tensor:
    """`F.conv2d(map, weight, bias)` with the steps of `like`, and ReLU behind it; a channels_last map gives such a one.

    Without torch's own choice, which with one thread and few images is a slow form.
    """
    at = (like.padding, like.stride, like.dilation, like.groups)
    return torch.ops.mkldnn._convolution_pointwise(map, weight, bias, *at, "relu" if relu else "none", [], "")


def grad_input(grad: Tensor, weight: Tensor) -> Tensor:
    """`grad @ weight`, the gradient of a Linear's input."""
    return forward(grad, weight.t(), None)


def grad_weight(grad: Tensor, x: Tensor) -> Tensor:
    """`gradᵀ @ x`, the gradient of a Linear's weight, of matrices.

    The operator copies its first operand, here transposed, to make it contiguous, and a gradient that comes out
    transposed is copied once more: the smaller copy decides. In pieces, whose copies stay in the processor's cache.
    """
    (rows, out), width = grad.shape, x.shape[1]
    flip = rows * width + width * out < rows * out
    # A second operand whose rows lie apart, such as those of class tokens alone, takes a thousand times as long.
    first, second = (x, grad.contiguous()) if flip else (grad, x.contiguous())
    count = max(1, -(-rows // ROWS))
    pieces = zip(first.tensor_split(count), second.tensor_split(count), strict=True)
    parts = (forward(turned(a), b.t(), None) for a, b in pieces)
    total = next(parts)
    for part in parts:
        total += part
    return turned(total) if flip else total


def turned(x: Tensor) -> Tensor:
    """`xᵀ` of a float32 matrix, contiguous: torch copies number by number."""
    rows, width = x.shape
    made = x.new_empty(width, rows)
    if not (x.is_contiguous() and rows and width % 16 == 0 and native.library() is not None):
        return made.copy_(x.t())
    native.call("branch_turned", x.dtype, x, rows, width, made)
    return made


def faster(flops: float) -> bool:
    """Whether oneDNN should do a float32 product of that many floating-point operations on this machine's CPU."""
    return flops >= FLOOR and flops >= _smallest() * torch.get_num_threads()


@cache
def _smallest() -> float:
    """The smallest product for one thread that oneDNN does faster; infinite where there is none.

    Taken from the cache folder, or measured now. Where several processes measure at once, the first to write decides
    for all, so that the runs of a study do not differ in rounding.
    """
    if not _works():
        return float("inf")
    file = cache_folder() / "onednn.json"
    key = f"{_processor()}, torch {torch.__version__}"
    known = _read(file)
    if key not in known:
        found = _measure()
        known = {key: found, **_read(file)}
        with contextlib.suppress(OSError):  # a folder that cannot be written: measured again by the next process
            _write(file, known)
    smallest = known[key]
    return float("inf") if smallest is None else smallest


@cache
def multiplies_bfloat16() -> bool:
    """Whether torch's own bfloat16 products are oneDNN's."""
    return _works() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def fuses(dtype: torch.dtype) -> bool:
    """Whether convolutions, and in bfloat16 matrix products, are oneDNN's for torch too, so that ReLU is free here."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    like = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2, device="meta")
    shapes = ((2, 7, 6, 8), (5, 20), (12, 20), (12, 4, 3, 3), (12,))
    map, x, weight, kernel, bias = (_draw(*shape).to(dtype) for shape in shapes)
    map = map.permute(0, 3, 1, 2)
    try:
        if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        got = [forward(x, weight, bias, relu=True), forward(x, weight, None),
               conv(map, kernel, bias, like, relu=True), conv(map, kernel, None, like)]  # fmt: skip
    except (AttributeError, RuntimeError):
        return False
    map, x, weight, kernel, bias = (t.float() for t in (map, x, weight, kernel, bias))
    with torch.autocast("cpu", enabled=False):
        want = [F.linear(x, weight, bias).relu(), F.linear(x, weight),
                F.conv2d(map, kernel, bias, 2, 1, 1, 2).relu(), F.conv2d(map, kernel, None, 2, 1, 1, 2)]  # fmt: skip
    tolerance = 1e-4 if dtype is torch.float32 else 2**-7
    return all(torch.allclose(a.float(), b, rtol=tolerance, atol=tolerance) for a, b in zip(got, want, strict=True))


def _works() -> bool:
    """Whether torch has the operators, they are not switched off, and what they compute is right."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    x, weight, bias, grad = _draw(7, 3, 20).transpose(0, 1), _draw(24, 20)[4:20], _draw(16), _draw(21, 16)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            pairs = [
                (forward(x, weight, bias), F.linear(x, weight, bias)),
                (forward(x[:, :2], weight, None), F.linear(x[:, :2], weight)),
                (forward(x[:0], weight, bias, relu=True), F.linear(x[:0], weight, bias)),
                (forward(x, weight, bias, relu=True), F.linear(x, weight, bias).relu()),
                (forward_gelu(x, weight, bias), F.gelu(F.linear(x, weight, bias))),
                (grad_input(grad, weight), grad @ weight),
                (grad_weight(grad, x.reshape(21, 20)), grad.t() @ x.reshape(21, 20)),
                (grad_weight(grad, x.reshape(21, 20)[:, :4]), grad.t() @ x.reshape(21, 20)[:, :4]),
            ]
    except (AttributeError, RuntimeError):
        return False
    return all(a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=1e-4) for a, b in pairs)


def _draw(*shape: int) -> Tensor:
    """Random numbers that leave torch's own generator, and with it the run, as they were."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")


def _measure() -> float | None:
    """The number of operations from which on oneDNN is faster, a Linear's three products together; None if never.

    In the time of one thread, which other processes on the machine do not count in.
    """
    smallest = None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for rows, width, out in reversed(SIZES):
            if _ratio(rows, width, out) < MARGIN:
                break
            smallest = 2.0 * rows * width * out
    finally:
        torch.set_num_threads(threads)
    return smallest


def _ratio(rows: int, width: int, out: int, budget: float = 0.05, rounds: int = 20) -> float:
    """The time of a Linear's three products by BLAS over that by oneDNN, the best of both in turns."""
    x, weight, grad = _draw(rows, width), _draw(out, width), _draw(rows, out)

    def blas() -> None:
        F.linear(x, weight), grad @ weight, grad.t() @ x

    def onednn() -> None:
        forward(x, weight, None), grad_input(grad, weight), grad_weight(grad, x)

    best = {blas: float("inf"), onednn: float("inf")}
    begin = time.thread_time()
    for i in range(rounds):
        for act in best:
            start = time.thread_time()
            act()
            if i:  # the first round makes the kernels
                best[act] = min(best[act], time.thread_time() - start)
        if i >= 3 and time.thread_time() - begin > budget:
            break
    return best[blas] / best[onednn]


def _processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        found = dict(line.split(":", 1) for line in lines if ":" in line)
        found = {name.strip(): value.strip() for name, value in found.items()}
        if "model name" in found:
            return f"{found['model name']} {found.get('cpu family', '')}.{found.get('model', '')}"
    return platform.processor() or platform.machine()


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
