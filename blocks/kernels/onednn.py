"""oneDNN's operators for float32 and bfloat16 products and convolutions.

They are private to torch: they are used only where they pass a test. Their ReLU is not used: it makes NaN 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The sum that is the gradient of a weight is done on so many rows at a time.
ROWS = 2048


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, act: str = "none") -> Tensor:
    """`F.linear(x, weight, bias)`, and GELU behind it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, act, [], "none" if act == "gelu" else "")


def conv(map: Tensor, weight: Tensor, bias: Tensor | None, like: nn.Conv2d) -> Tensor:
    """`F.conv2d(map, weight, bias)` with the steps of `like`; a channels_last map gives such a one.

    Without torch's own choice, which with one thread and few images is a slow form.
    """
    at = (like.padding, like.stride, like.dilation, like.groups)
    return torch.ops.mkldnn._convolution_pointwise(map, weight, bias, *at, "none", [], "")


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
    parts = (forward(a.t(), b.t(), None) for a, b in pieces)
    total = next(parts)
    for part in parts:
        total += part
    return total.t().contiguous() if flip else total


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of that precision by oneDNN, float32 by these operators."""
    x, weight, bias, grad = draw(7, 3, 20).transpose(0, 1), draw(24, 20)[4:20], draw(16), draw(21, 16)
    rows = x.reshape(21, 20)

    def pairs(x: Tensor, weight: Tensor, bias: Tensor, grad: Tensor, rows: Tensor) -> list[tuple[Tensor, Tensor]]:
        want = F.linear(x.float(), weight.float(), bias.float())
        found = [
            (forward(x, weight, bias), want),
            (forward(x, weight, bias, "gelu"), F.gelu(want)),
            (forward(x[:, :2], weight, None), F.linear(x[:, :2].float(), weight.float())),
            (forward(x[:0], weight, bias, "gelu"), want[:0]),
        ]
        if dtype is torch.float32:
            found += [(grad_input(grad, weight), grad @ weight), (grad_weight(grad, rows), grad.t() @ rows),
                      (grad_weight(grad, rows[:, :4]), grad.t() @ rows[:, :4])]  # fmt: skip
        return found

    return _holds(dtype, lambda: pairs(*(t.to(dtype) for t in (x, weight, bias, grad, rows))))


@cache
def convolves(dtype: torch.dtype) -> bool:
    """Whether torch's convolutions of that precision are oneDNN's."""
    like = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2, device="meta")
    shapes = ((2, 7, 6, 8), (12, 4, 3, 3), (12,))

    def pairs(map: Tensor, weight: Tensor, bias: Tensor) -> list[tuple[Tensor, Tensor]]:
        def want(bias: Tensor | None) -> Tensor:
            return F.conv2d(map.float(), weight.float(), bias, 2, 1, 1, 2)

        return [(conv(map, weight, bias, like), want(bias.float())), (conv(map, weight, None, like), want(None))]

    map, weight, bias = (draw(*shape).to(dtype) for shape in shapes)
    return _holds(dtype, lambda: pairs(map.permute(0, 3, 1, 2), weight, bias))


def _holds(dtype: torch.dtype, pairs: Callable[[], list[tuple[Tensor, Tensor]]]) -> bool:
    """Whether torch has the operators, they are not switched off, and what they compute is right."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2**-6}.get(dtype)
    try:
        if tolerance is None or (dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            return False
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            found = pairs()
    except (AttributeError, RuntimeError):
        return False
    return all(a.shape == b.shape and torch.allclose(a.float(), b, rtol=tolerance, atol=tolerance) for a, b in found)


def draw(*shape: int) -> Tensor:
    """Random numbers that leave torch's own generator, and with it the run, as they were."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
