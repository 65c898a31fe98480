"""The branches of Next-ViT's blocks in one call, without gradients, against float64 and their parts one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from blocks.base import Features, Site
from blocks.kernels import conv, infer, native, products
from blocks.mlp import GELU
from blocks.nextvit import NCB, NTB
from blocks.norms import LayerNorm
from blocks.residual import Residual
from tests.contract import features, randomise
from tests.kernels import FORMS, error, in_form

pytestmark = pytest.mark.skipif(native.library() is None, reason="no kernels on this machine")

# The block, its width and side, and how many calls it is in one pass.
CASES: dict[str, tuple[Callable[[Site], NCB | NTB], int, int, int]] = {
    "convolution within": (NCB, 64, conv.SIDE, 1),
    "convolution before": (partial(NCB, head_dim=96), 96, 5, 1),  # too many channels in a group
    "small maps": (NCB, 64, 5, 1),  # in bfloat16 the convolution is before
    "attention": (partial(NTB, sr_ratio=2), 128, 6, 3),
}


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a look at the clock."""
    monkeypatch.setattr(products, "_smallest", lambda: 0.0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    run = native.run
    monkeypatch.setattr(native, "run", lambda name, *args: seen.append(name) or run(name, *args))
    return seen


def block(name: str) -> NCB | NTB:
    torch.manual_seed(0)
    make, width, side, _ = CASES[name]
    made = make(Site.at(width, side))
    randomise(made)
    return made.eval()


def given(name: str, batch: int) -> Tensor:
    return features(Site.at(CASES[name][1], CASES[name][2]).inp, batch=batch).map.detach()


def inferred(made: nn.Module, map: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=map.dtype is torch.bfloat16):
        return made(Features(map)).map


def exactly(made: nn.Module, map: Tensor) -> Tensor:
    return inferred(copy.deepcopy(made).double(), map.double())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 83])  # few rows are normalised, for many the norm is put into a weight
@pytest.mark.parametrize("name", CASES)
def test_float32(name: str, batch: int, form: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made, map = block(name), given(name, batch)
    before, exact = map.clone(), exactly(made, map)
    with in_form(form, monkeypatch):
        for fits in (True, False):
            for lies in (torch.contiguous_format, torch.channels_last):
                monkeypatch.setattr(infer, "fits", lambda *sizes, fits=fits: fits)
                calls.clear()
                got = inferred(made.to(memory_format=lies), map)
                assert calls.count("infer_branches") == CASES[name][3]
                assert error(got, exact) < 1e-6
                assert got.is_contiguous(memory_format=torch.channels_last)
                assert torch.equal(map, before)


@pytest.mark.parametrize("batch", [1, 83])
@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name: str, batch: int, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.has("infer_branches", torch.bfloat16):
        pytest.skip("no bfloat16 kernels on this machine")
    made, map = block(name), given(name, batch).bfloat16()
    exact = exactly(made, map)
    with monkeypatch.context() as without:
        without.setattr(infer, "_serves", lambda x: False)
        plain = error(inferred(made, map), exact)
    calls.clear()
    for fits in (True, False):
        monkeypatch.setattr(infer, "fits", lambda *sizes, fits=fits: fits)
        got = inferred(made, map)
        assert got.dtype is torch.bfloat16
        assert error(got, exact) < 1.1 * plain
    assert calls.count("infer_branches") == 2 * CASES[name][3]


CHANGES: dict[str, tuple[Callable[[NCB], object], int]] = {
    "a hook on the mixer": (lambda b: b.mixer.register_forward_hook(lambda *args: None), 1),
    "a hook on its norm": (lambda b: b.mixer.norm.bn.register_forward_hook(lambda *args: None), 1),
    "a hook on its last layer": (lambda b: b.mixer.proj.register_forward_hook(lambda *args: None), 1),
    "a hook in the MLP": (lambda b: b.mlp.act.register_forward_hook(lambda *args: None), 0),
    "a residual that scales": (lambda b: setattr(b.mlp_residual, "scale", 0.5), 0),
    "a first residual that scales": (lambda b: setattr(b.mixer_residual, "scale", 0.5), 0),
    "a norm in training": (lambda b: b.norm.train(), 0),
    "weights in bfloat16": (lambda b: b.mlp.bfloat16(), 0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_somebody_looks_at_is_done(name: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made, map = block("small maps"), given("small maps", 83)
    change, wanted = CHANGES[name]
    change(made)
    again = copy.deepcopy(made)
    low = name == "weights in bfloat16"
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        got = inferred(made, map)
        assert calls.count("infer_branches") == wanted
        with torch.enable_grad():
            want = again(Features(map.clone().requires_grad_())).map
    torch.testing.assert_close(got, want.detach(), rtol=1e-4, atol=2e-2 if low else 1e-4)


@pytest.mark.parametrize("part", [{"act": GELU}, {"norm": LayerNorm}, {"mlp_residual": partial(Residual, scale=2.0)}])
def test_other_parts_are_left_to_themselves(part: dict[str, object], calls: list[str]) -> None:
    torch.manual_seed(0)
    made, map = NCB(Site.at(64, 5), **part).eval(), given("small maps", 8)
    assert error(inferred(made, map), exactly(made, map)) < 1e-6
    assert "infer_branches" not in calls


def test_empty_batches_and_gradients(calls: list[str]) -> None:
    made, map = block("small maps"), given("small maps", 2)
    assert inferred(made, map[:0]).shape == (0, 64, 5, 5)
    made(Features(map)).map.sum().backward()
    assert "infer_branches" not in calls
