"""Small patches go through the stem's convolution as one product, against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from blocks.tnt import convolved, numbered
from tests.kernels import error


@pytest.mark.parametrize(("side", "stride", "channels"), [(2, 1, 1), (4, 2, 3), (4, 1, 3), (7, 4, 2), (8, 4, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_are_convolved(side: int, stride: int, channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, 12, 7, stride, 3).to(memory_format=torch.channels_last)
    patches = torch.randn(10, channels, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    far, exact = patches.detach().double().requires_grad_(), copy.deepcopy(conv).double()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        made = convolved(patches, conv)
    want = convolved(far, exact)
    assert made.dtype is dtype
    assert torch.equal(want, exact(far))
    assert error(made, want) < (1e-6 if dtype is torch.float32 else 0.01)
    slope = torch.randn(made.shape)
    found = torch.autograd.grad(made, [patches, *conv.parameters()], slope.to(dtype))
    grads = torch.autograd.grad(want, [far, *exact.parameters()], slope.double())
    for own, other in zip(found, grads, strict=True):
        assert error(own, other) < (1e-6 if dtype is torch.float32 else 0.01)


def test_hooks_see_the_convolution() -> None:
    conv, seen = nn.Conv2d(1, 12, 7, 1, 3), []
    convolved(torch.randn(4, 1, 2, 2), conv)
    conv.register_forward_hook(lambda *args: seen.append(args))
    convolved(torch.randn(4, 1, 2, 2), conv)
    assert len(seen) == 1


def test_what_is_kept_under_inference_serves_gradients() -> None:
    numbered.cache_clear()
    conv, patches = nn.Conv2d(1, 12, 7, 1, 3), torch.randn(4, 1, 2, 2)
    with torch.inference_mode():
        first = convolved(patches, conv)
    second = convolved(patches, conv)
    second.sum().backward()
    assert torch.equal(first, second)
    assert conv.weight.grad is not None
