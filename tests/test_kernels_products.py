"""The products of Linears, by the kernel and by oneDNN, against float64; and the choice between these and torch's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blocks.kernels import native, onednn, products
from tests.kernels import draw, error

ACTS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}

# Rows, width and output width: one of each, whole and broken tiles, blocks, panels, and sums in parts.
KERNEL = [(1, 32, 32), (13, 32, 96), (37, 64, 224), (300, 1056, 32), (700, 96, 320), (1300, 32, 64), (2300, 64, 32)]
ONEDNN = [(5000, 12, 40), (5000, 40, 12), (300, 16, 16), (2048, 8, 9)]


# What this machine has built, or builds once.
FOLDER = native.cache_folder()

KEPT = (products.kernel, products._smallest, onednn.multiplies)


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Without what is known already, here and in the user's cache folder."""
    native.library()  # from the folder that is there
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for kept in KEPT:
        kept.cache_clear()
    yield
    for kept in KEPT:
        kept.cache_clear()


@cache
def built(capability: str) -> Any:
    """The kernels for processors that this one can stand for."""
    order = ["AVX2", "AVX512", "AVX512_BF16"]
    if native.library() is None or order.index(capability) > order.index(native.capability()):
        pytest.skip("no compiler, or a processor without a kernel")
    return native.load(capability, FOLDER)


@pytest.fixture(params=["AVX2", "AVX512_BF16", "one thread", "oneDNN", "torch"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A way to multiply; the kernel at any size."""
    threads, name = torch.get_num_threads(), request.param
    monkeypatch.setattr(products, "LARGE", 0)
    monkeypatch.setattr(products, "faster", lambda *args: True)
    if name == "one thread":
        torch.set_num_threads(1)
    elif name in native.INSTRUCTIONS:
        found = built(name)
        monkeypatch.setattr(native, "library", lambda: found)
    elif native.library() is not None:
        monkeypatch.setattr(products, "kernel", lambda dtype: False)
    if name == "torch":
        monkeypatch.setattr(onednn, "multiplies", lambda dtype: False)
    yield name
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "out"), KERNEL + ONEDNN)
def test_products(form: str, rows: int, width: int, out: int, dtype: torch.dtype) -> None:
    x, grad = draw(rows, width).to(dtype), draw(rows, out).to(dtype)
    weight, bias = draw(out, width), draw(out)
    tolerance = 1e-6 if dtype is torch.float32 else 4e-3
    seen = weight.to(dtype).double()
    for name, act in ACTS.items():
        want = act(F.linear(x.double(), seen, bias.double()))
        assert error(products.forward(x, weight, bias, name), want) < tolerance
    assert error(products.forward(x, weight.to(dtype)), x.double() @ seen.t()) < tolerance
    for stream in (draw(rows, out), draw(rows, out).to(dtype)):
        sum = stream.double() + F.linear(x.double(), seen, bias.double())
        assert products.forward(x, weight, bias, onto=stream) is stream
        assert error(stream, sum) < tolerance
    got = products.grad_input(grad, weight)
    assert got.dtype is dtype
    assert error(got, grad.double() @ seen) < tolerance
    want, sums = grad.double().t() @ x.double(), grad.double().sum(0)
    got, of_bias = products.grad_weight(grad, x, bias=True)
    assert got.is_contiguous()
    assert error(got, want) < tolerance
    assert of_bias is not None
    assert error(of_bias, sums) < tolerance


def test_rows_that_lie_apart(form: str) -> None:
    """Class tokens, a gradient that is one number for all, one that lies in columns, and tokens of any shape."""
    x, weight = draw(9, 17, 64), draw(32, 64)
    got = products.forward(x[:, :1], weight)
    assert got.shape == (9, 1, 32)
    assert error(got, x[:, :1].double() @ weight.double().t()) < 1e-6
    assert error(products.forward(x, weight), x.double() @ weight.double().t()) < 1e-6
    for grad in (draw(9, 32), torch.ones(1, 1).expand(9, 32), draw(32, 9).t()):
        assert error(products.grad_weight(grad, x[:, 0])[0], grad.double().t() @ x[:, 0].double()) < 1e-6
        assert error(products.grad_input(grad, weight), grad.double() @ weight.double()) < 1e-6
    assert products.forward(x[:0], weight).shape == (0, 17, 32)
    assert not products.grad_weight(draw(9, 32)[:0], x[:0, 0])[0].any()


def test_the_sum_of_many(form: str) -> None:
    """Rounding hardly grows with the number of rows."""
    x, grad = draw(20000, 32), draw(20000, 32)
    got, sums = products.grad_weight(grad, x, bias=True)
    assert sums is not None
    assert error(got, grad.double().t() @ x.double()) < 1e-6
    assert error(sums, grad.double().sum(0)) < 1e-6


def test_the_same_bits_with_more_threads() -> None:
    """But for the gradient of a small weight over many rows, of which each thread has a part."""
    if not products.kernel(torch.float32):
        pytest.skip("no kernel")
    x, weight, grad, threads = draw(700, 256), draw(384, 256), draw(700, 384), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            dw, db = products.grad_weight(grad, x, bias=True, ours=True)
            below = products.grad_input(grad, weight, ours=True)
            found.append((products.forward(x, weight, ours=True), below, dw, db))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


def test_no_copy_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 the kernel reads a float32 weight, and gives its gradient in float32."""
    if not products.kernel(torch.bfloat16):
        pytest.skip("no kernel")
    x, weight = draw(40, 256).bfloat16(), draw(192, 256)
    monkeypatch.setattr(Tensor, "to", None)
    assert products.forward(x, weight, draw(192)).dtype is torch.bfloat16
    assert products.grad_weight(draw(40, 192).bfloat16(), x)[0].dtype is torch.float32


def test_the_measurement_leaves_the_run_alone() -> None:
    """No random number is drawn, the number of threads stays, and what is found is one of the sizes or none."""
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    found = products._measure()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert found is None or found in {2.0 * a * b * c for a, b, c in products.SIZES}


def test_the_measurement_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = iter([7.0, None])
    monkeypatch.setattr(products, "kernel", lambda dtype: True)
    monkeypatch.setattr(products, "_measure", lambda: next(results))
    assert products._smallest() == 7.0
    file = tmp_path / "tessera" / "products.json"
    (key,) = json.loads(file.read_text())
    assert torch.__version__ in key
    products._smallest.cache_clear()
    assert products._smallest() == 7.0  # read, not measured again
    assert [path.name for path in file.parent.iterdir()] == ["products.json"]
    file.write_text('{"half a fi')
    products._smallest.cache_clear()
    assert products._smallest() == float("inf")  # None: never faster
    assert json.loads(file.read_text()) == {key: None}


def test_of_two_processes_the_first_to_write_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured_meanwhile() -> float:
        monkeypatch.setattr(products, "_measure", lambda: 7.0)
        first = products._smallest.__wrapped__()
        assert first == 7.0
        return 9.0

    monkeypatch.setattr(products, "kernel", lambda dtype: True)
    monkeypatch.setattr(products, "_measure", measured_meanwhile)
    assert products._smallest() == 7.0


def test_a_cache_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(products, "kernel", lambda dtype: True)
    monkeypatch.setattr(products, "_measure", lambda: 7.0)
    assert products._smallest() == 7.0


def test_without_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that is missing or wrong is not used."""

    def missing(*args: object) -> Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    monkeypatch.setattr(products, "kernel", lambda dtype: False)
    wrong = lambda x, weight, bias, act="none": F.linear(x, weight)  # noqa: E731
    for operator in (wrong, missing):
        monkeypatch.setattr(onednn, "forward", operator)
        onednn.multiplies.cache_clear()
        assert not onednn.multiplies(torch.float32)
        assert products._smallest.__wrapped__() == float("inf")
        assert not products.faster(1e12, torch.bfloat16)


def test_the_precisions() -> None:
    assert not onednn.multiplies(torch.float64)
    assert not products.kernel(torch.float64)
    assert not products.faster(1e12, torch.float64)
