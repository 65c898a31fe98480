"""3×3 convolutions of the kernel, forward and backward, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from blocks.kernels import conv as kernel
from blocks.kernels import native
from tests.kernels import FORMS, draw, error, in_form

# Images, channels in, out, groups, height, width: one place, borders, whole and broken tiles, strips, several groups.
SHAPES = [
    (1, 32, 32, 1, 1, 1),
    (2, 64, 32, 1, 9, 9),
    (3, 96, 96, 3, 13, 12),
    (2, 64, 128, 2, 5, 14),
    (1, 64, 64, 2, 90, 57),
    (1, 96, 64, 1, 6, 7),
]
LIES = torch.channels_last


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with in_form(request.param, monkeypatch):
        yield request.param


def low(form: str) -> bool:
    return hasattr(native.library(), "conv_forward_bf16")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("b", "inp", "out", "groups", "h", "w"), SHAPES)
def test_convolutions(form: str, b: int, inp: int, out: int, groups: int, h: int, w: int, dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and not low(form):
        pytest.skip("no bfloat16")
    tolerance = 1e-6 if dtype is torch.float32 else 4e-3
    map, grad = (draw(b, c, h, w).to(dtype).contiguous(memory_format=LIES) for c in (inp, out))
    weight, bias = draw(out, inp // groups, 3, 3), draw(out)
    exact, seen = map.double().requires_grad_(), weight.to(dtype).double().requires_grad_()
    want = F.conv2d(exact, seen, bias.double(), padding=1, groups=groups)
    dmap, dweight = torch.autograd.grad(want, (exact, seen), grad.double())
    got = kernel.conv(map, weight, bias, groups)
    assert got.is_contiguous(memory_format=LIES)
    assert got.dtype is dtype
    assert error(got, want) < tolerance
    assert error(kernel.conv(map, weight, bias, groups, relu=True), want.relu()) < tolerance
    assert error(kernel.conv(grad, weight, None, groups, turned=True), dmap) < tolerance
    for turned, given in ((False, map), (True, grad)):  # channels side by side, as in a net
        lies = kernel.conv(given, weight.contiguous(memory_format=LIES), None, groups, turned=turned)
        assert torch.equal(lies, kernel.conv(given, weight, None, groups, turned=turned))
    assert error(kernel.grad_weight(map, grad, groups), dweight) < 2e-6  # in float32 whatever the precision


def layer(groups: int = 2) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(64, 64, 3, padding=1, groups=groups, bias=False)


def grads(act: Any, conv: nn.Conv2d, map: Tensor) -> tuple[Tensor, ...]:
    map = map.detach().requires_grad_()
    out = act(map)
    return out.detach(), *torch.autograd.grad(out.square().sum(), (map, conv.weight))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("side", [kernel.SIDE, kernel.SIDE - 1])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer(groups: int, side: int, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    conv, map = layer(groups), draw(2, 64, side, side).contiguous(memory_format=LIES)
    calls = []
    run = native.run
    monkeypatch.setattr(native, "run", lambda name, *args: calls.append(name) or run(name, *args))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        if not kernel.serves(conv, map, torch.bfloat16 if autocast else torch.float32):
            pytest.skip("no kernel")
        found, plain = (grads(act, conv, map) for act in (lambda x: kernel.convolved(conv, x), conv))
        kept = grads(lambda x: checkpoint(kernel.convolved, conv, x, use_reentrant=False), conv, map)
    by_kernel = not autocast or (groups > 1 and side >= kernel.SIDE)
    forward = ["conv_filters", "conv_forward"] if by_kernel else []
    wanted = [*forward, *forward, "conv_weight" if autocast else "winograd_weight"]
    assert calls[: len(wanted)] == wanted
    assert len(calls) == len([*wanted, *forward, *wanted])  # the second time the forward is done again
    for got, want, again in zip(found, plain, kept, strict=True):
        assert got.dtype is want.dtype
        assert error(got, want.double()) < (1e-2 if autocast else 1e-6)
        torch.testing.assert_close(again, got, rtol=0, atol=0)


def test_gradients_of_gradients() -> None:
    conv, map = layer(), draw(1, 64, 12, 12).contiguous(memory_format=LIES).requires_grad_()
    twice = []
    for act in (lambda x: kernel.convolved(conv, x), conv):
        (grad,) = torch.autograd.grad(act(map).square().sum(), map, create_graph=True)
        twice.append(torch.autograd.grad(grad.square().sum(), (map, conv.weight)))
    for got, want in zip(*twice, strict=True):
        assert error(got, want.double()) < 1e-5


def test_what_the_kernel_leaves_to_torch() -> None:
    map = draw(1, 64, 12, 12).contiguous(memory_format=LIES)
    others = [
        nn.Conv2d(64, 64, 3, padding=1, groups=4, bias=False),
        nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect", bias=False),
        nn.Conv2d(64, 64, 5, padding=1, bias=False),
        nn.Conv2d(64, 48, 3, padding=1, bias=False),
    ]
    assert not any(kernel.serves(other, map, torch.float32) for other in others)
    assert not kernel.faster(56, draw(64, 96, 3, 3), 1, torch.float32)
    for wrong in (map.contiguous(), map.double(), map[:0], map.to("meta")):
        assert not kernel.serves(layer(), wrong, torch.float32)
    conv, seen = layer(), []
    conv.register_forward_hook(lambda *args: seen.append(args))
    kernel.convolved(conv, map)
    assert seen
