"""Two layers in one kernel against float64, and where an MLP and Next-ViT's blocks take it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.base import Site
from blocks.kernels import layers, native, products
from blocks.kernels.layers import two_layers
from blocks.mlp import GELU, Mlp, ReLU, SiLU
from tests.kernels import FORMS, draw, error, in_form

# Rows, width, hidden and output width: one row, broken tiles and panels, several blocks.
SHAPES = [(1, 32, 32, 16), (29, 64, 96, 48), (700, 96, 288, 96), (230, 192, 1056, 208), (500, 1024, 64, 32)]
ACTS = {"relu": F.relu, "gelu": F.gelu}


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with in_form(request.param, monkeypatch):
        products.kernel.cache_clear()
        yield request.param
    products.kernel.cache_clear()


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """For few numbers too, without a look at the clock."""
    monkeypatch.setattr(products, "FLOOR", 0.0)
    monkeypatch.setattr(products, "_smallest", lambda: 0.0)


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize(("rows", "width", "hidden", "out"), SHAPES)
def test_two_layers(form: str, rows: int, width: int, hidden: int, out: int, act: str, dtype: torch.dtype) -> None:
    if not products.kernel(dtype):
        pytest.skip(f"no {dtype}")
    x, w1, b1, w2, b2 = draw(rows, width), draw(hidden, width), draw(hidden), draw(out, hidden), draw(out)

    def want(x: Tensor, b1: Tensor | None, b2: Tensor | None) -> Tensor:
        x, v1, v2 = (t.to(dtype).double() for t in (x, w1, w2))
        between = ACTS[act](F.linear(x, v1, None if b1 is None else b1.double()))
        return F.linear(between.to(dtype).double(), v2, None if b2 is None else b2.double())

    tolerance = 1e-6 if dtype is torch.float32 else 4e-3
    with torch.no_grad(), autocast(dtype):
        for weights in ((w1, w2), (w1.to(dtype), w2), (w1.to(dtype), w2.to(dtype))):
            for given in (x, x.to(dtype)):
                got = two_layers(given, weights[0], b1, weights[1], b2, act)
                assert got is not None
                assert got.dtype is dtype
                assert error(got, want(x, b1, b2)) < tolerance
        got = two_layers(x.view(1, rows, width), w1, None, w2, None, act)
        assert got is not None
        assert got.shape == (1, rows, out)
        assert error(got[0], want(x, None, None)) < tolerance


def test_what_the_kernel_leaves_to_others() -> None:
    if not products.kernel(torch.float32):
        pytest.skip("no kernel")

    def served(rows: int = 8, width: int = 64, hidden: int = 64, out: int = 64) -> bool:
        made = two_layers(draw(rows, width), draw(hidden, width), None, draw(out, hidden), None, "relu")
        return made is not None

    assert not served()  # it gives no gradients
    with torch.no_grad():
        assert served()
        assert not served(rows=0)
        assert not served(width=40)
        assert not served(hidden=48)
        assert not served(out=40)
        assert not served(width=1600, hidden=layers.MOST)
        with torch.autocast("cpu", torch.float16):
            assert not served()
        x, w = draw(8, 64), draw(64, 64)
        assert two_layers(x.double(), w.double(), None, w.double(), None, "relu") is None
        assert two_layers(x, w.t(), None, w, None, "relu") is None


@pytest.mark.parametrize("act", [GELU, ReLU, SiLU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp(act: type[GELU] | type[ReLU] | type[SiLU], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not products.kernel(dtype):
        pytest.skip("no kernel")
    calls: list[str] = []
    run = native.run
    monkeypatch.setattr(native, "run", lambda name, *args: calls.append(name) or run(name, *args))
    mlp, x = Mlp(Site.at(64, 4), act=act, drop=0.1), draw(2, 16, 64)
    for p in mlp.parameters():
        nn.init.normal_(p, std=0.3)

    def given(training: bool) -> bool:
        calls.clear()
        with torch.no_grad(), autocast(dtype):
            mlp.train(training)(x, (4, 4))
        return "two_layers" in calls

    assert given(training=False) is (act is not SiLU)
    assert not given(training=True)  # there is dropout between the layers
    with torch.no_grad():
        double = mlp.eval()(x, (4, 4)).double()
        with autocast(dtype):
            assert error(mlp(x, (4, 4)), double) < (1e-6 if dtype is torch.float32 else 2e-2)
    for part in (mlp.fc1, mlp.act, mlp.fc2, mlp.drop):
        seen: list[object] = []
        handle = part.register_forward_hook(lambda *args, seen=seen: seen.append(args))
        assert not given(training=False)
        assert seen
        handle.remove()
