"""GELU and the Linear behind it as one operation in training, against float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from blocks.base import Site
from blocks.kernels import gelu, native, products
from blocks.mlp import Mlp
from tests.kernels import draw, error, saved_bytes

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """For small tensors too, without a look at the clock."""
    if native.library() is None:
        pytest.skip("no compiler, or a processor without a kernel")
    monkeypatch.setattr(products, "FLOOR", 0.0)
    monkeypatch.setattr(products, "_smallest", lambda: 0.0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    activated = gelu.activated
    monkeypatch.setattr(
        gelu, "activated", lambda x, grad=None: found.append("f" if grad is None else "b") or activated(x, grad)
    )
    return found


def mlp(**args: Any) -> Mlp:
    torch.manual_seed(0)
    made = Mlp(Site.at(24, 4), **args)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made


def reference(block: Mlp, x: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(x, block.fc1.weight, block.fc1.bias))
    return F.linear(hidden, block.fc2.weight, block.fc2.bias)


def gradients(block: Mlp, forward: Any, x: Tensor, low: bool = False) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = forward(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *block.parameters()], draw(*out.shape).to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 15, 16, 100, 70001])
def test_gelu_and_its_gradient(dtype: torch.dtype, size: int) -> None:
    """As near to float64 as torch's own to half a unit of float32, far out too, and the same in two threads."""
    if not native.has("gelu", dtype):
        pytest.skip("no kernel for this precision")
    x, grad = (draw(size) * 4).to(dtype), draw(size + 1)[1:].to(dtype)
    x[: min(size, 6)] = torch.tensor([-40.0, 40.0, 0.0, -5.3, 5.3, -0.01])[: min(size, 6)].to(dtype)
    exact = x.double().requires_grad_()
    want = F.gelu(exact)
    (slope,) = torch.autograd.grad(want, exact, grad.double())
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            dx = grad.clone()
            results.append((gelu.activated(x), gelu.activated(x, dx), dx))
    finally:
        torch.set_num_threads(threads)
    (forward, made, dx), two = results
    assert all(torch.equal(a, b) for a, b in zip(results[0], two, strict=True))
    assert torch.equal(forward, made)
    for got, own, exactly in ((made, F.gelu(x), want), (dx, torch.ops.aten.gelu_backward(grad, x), slope)):
        off = (own.double() - exactly).abs()
        assert ((got.double() - exactly).abs() < 1.5 * off.max() + 2e-7 * exactly.abs() + 1e-6).all()
        if size > 1000:
            assert error(got[6:], exactly[6:]) < 1.2 * error(own[6:], exactly[6:]) + 1e-7


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_in_training(dtype: torch.dtype, calls: list[str]) -> None:
    """Its gradients are as near to float64's as torch's own; it keeps its input and the hidden tokens alone."""
    if not native.has("gelu", dtype):
        pytest.skip("no kernel for this precision")
    block, x, low = mlp(), draw(4, 50, 24), dtype is torch.bfloat16
    double = copy.deepcopy(block).double()
    exact = gradients(double, lambda x: reference(double, x), x.double())
    theirs = gradients(block, lambda x: reference(block, x), x, low)
    assert not calls
    ours = gradients(block, lambda x: block(x, (4, 4)), x, low)
    assert calls == ["f", "b"]
    for got, own, want in zip(ours, theirs, exact, strict=True):
        assert got.dtype == own.dtype
        assert error(got, want) < 1.5 * error(own, want) + 1e-6
    again = gradients(block, lambda x: checkpoint(block, x, (4, 4), use_reentrant=False), x, low)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        kept = saved_bytes(lambda: block(x.requires_grad_(), (4, 4)), list(block.parameters()))
    width = torch.finfo(dtype).bits // 8
    assert kept == 200 * (24 + 96) * width


def test_what_is_left_to_others(calls: list[str]) -> None:
    """Dropout between, a hook, a frozen weight, compilers; a second derivative is right."""
    x = draw(4, 50, 24).requires_grad_()
    mlp(drop=0.5)(x, (4, 4))
    hooked = mlp()
    hooked.act.register_forward_hook(lambda *args: None)
    hooked(x, (4, 4))
    frozen = mlp().requires_grad_(False)
    frozen(x, (4, 4))
    block = mlp()
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="eager")(x, (4, 4))
    block.double()(x.double(), (4, 4))
    assert not calls
    torch.testing.assert_close(block.float()(x, (4, 4)), compiled)
    assert calls == ["f"]


def test_second_derivatives() -> None:
    def penalty(block: Mlp, x: Tensor, forward: Any) -> tuple[Tensor, ...]:
        inner = torch.autograd.grad(forward(x).square().sum(), [x, *block.parameters()], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in inner), list(block.parameters()))

    block, x = mlp(), draw(6, 24)
    double = copy.deepcopy(block).double()
    got = penalty(block, x.clone().requires_grad_(), lambda x: block(x, (4, 4)))
    for a, b in zip(got, penalty(double, x.double().requires_grad_(), lambda x: reference(double, x)), strict=True):
        assert error(a, b) < 1e-4
