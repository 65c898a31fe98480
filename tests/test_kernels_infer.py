"""The branches of Next-ViT's blocks in one call, without gradients, against float64 and their parts one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blocks.base import Features, Site
from blocks.kernels import conv, infer, native
from blocks.mlp import GELU
from blocks.nextvit import NCB, NTB
from blocks.norms import LayerNorm
from blocks.positions import RelativeBias, RoPE
from blocks.residual import Residual
from tests.contract import features, randomise
from tests.kernels import FORMS, error, in_form

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="no kernels on this machine"),
    pytest.mark.usefixtures("ours"),
]

ONE, PIECES, MIXED = ["infer_branches"], ["infer_branches"] * 3, ["infer_mixed"]

# The block, its width and side, and the calls that it is in float32, and in bfloat16.
CASES: dict[str, tuple[Callable[[Site], NCB | NTB], int, int, list[str], list[str]]] = {
    "convolution within": (NCB, 64, conv.SIDE, ONE, ONE),
    "convolution before": (partial(NCB, head_dim=96), 96, 5, ONE, ONE),  # too many channels in a group
    "small maps": (NCB, 64, 5, ONE, ONE),  # in bfloat16 the convolution is before
    "attention": (NTB, 256, conv.SIDE, MIXED, MIXED),
    "attention on means": (partial(NTB, sr_ratio=3), 256, 14, MIXED, MIXED),  # and some tokens are left over
    "attention on small maps": (partial(NTB, sr_ratio=2), 128, 5, MIXED, PIECES),
    "attention before": (partial(NTB, head_dim=96), 384, 5, PIECES, PIECES),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those that this is about."""
    seen: list[str] = []
    run = native.run

    def noted(name: str, *args: Any) -> None:
        seen.extend({name} & {"infer_branches", "infer_mixed"})
        run(name, *args)

    monkeypatch.setattr(native, "run", noted)
    return seen


def block(name: str) -> NCB | NTB:
    torch.manual_seed(0)
    make, width, side, *_ = CASES[name]
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
                assert calls == CASES[name][3]
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
    for fits in (True, False):
        monkeypatch.setattr(infer, "fits", lambda *sizes, fits=fits: fits)
        calls.clear()
        got = inferred(made, map)
        assert calls == CASES[name][4]
        assert got.dtype is torch.bfloat16
        assert error(got, exact) < 1.1 * plain


def look(part: nn.Module) -> None:
    part.register_forward_hook(lambda *args: None)


NONE: list[str] = []

# What is done to a block, and the calls that it still is.
CHANGES: dict[str, dict[str, tuple[Callable[[Any], object], list[str]]]] = {
    "small maps": {
        "a hook on the mixer": (lambda b: look(b.mixer), ONE),
        "a hook on its norm": (lambda b: look(b.mixer.norm.bn), ONE),
        "a hook on its last layer": (lambda b: look(b.mixer.proj), ONE),
        "a hook in the MLP": (lambda b: look(b.mlp.act), NONE),
        "a residual that scales": (lambda b: setattr(b.mlp_residual, "scale", 0.5), NONE),
        "a first residual that scales": (lambda b: setattr(b.mixer_residual, "scale", 0.5), NONE),
        "a norm in training": (lambda b: b.norm.train(), NONE),
        "weights in bfloat16": (lambda b: b.mlp.bfloat16(), NONE),
    },
    "attention on means": {
        "a hook on the first norm": (lambda b: look(b.norm1.bn), PIECES),
        "a hook on the attention": (lambda b: look(b.attn), PIECES[1:]),
        "a hook on the keys": (lambda b: look(b.attn.k), PIECES),
        "a hook on the keys' norm": (lambda b: look(b.attn.norm), PIECES),
        "a hook on what turns scores": (lambda b: look(b.attn.position), PIECES),
        "a hook on the projection": (lambda b: look(b.project), PIECES),
        "a hook on its layer": (lambda b: look(b.project.proj), PIECES),
        "a hook on the convolution": (lambda b: look(b.conv), PIECES[1:]),
        "a hook on its last layer": (lambda b: look(b.conv.proj), PIECES[1:]),
        "a hook on the MLP": (lambda b: look(b.mlp), PIECES[1:]),
        "a residual that scales": (lambda b: setattr(b.attn_residual, "scale", 0.5), PIECES[1:]),
        "a second residual that scales": (lambda b: setattr(b.conv_residual, "scale", 0.5), PIECES[1:]),
        "a third residual that scales": (lambda b: setattr(b.mlp_residual, "scale", 0.5), PIECES[1:]),
        "a norm in training": (lambda b: b.project.norm.train(), PIECES),
        "weights in bfloat16": (lambda b: b.attn.q.bfloat16(), PIECES),
    },
}


@pytest.mark.parametrize(("name", "change"), [(name, change) for name in CHANGES for change in CHANGES[name]])
def test_what_somebody_looks_at_is_done(name: str, change: str, calls: list[str]) -> None:
    made, map = block(name), given(name, 9)
    act, wanted = CHANGES[name][change]
    act(made)
    again, low = copy.deepcopy(made), change == "weights in bfloat16"
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        got = made(Features(map)).map
        assert calls == wanted
        with torch.enable_grad():
            want = again(Features(map.clone().requires_grad_())).map
    assert error(got, want.detach()) < (0.01 if low else 1e-5)


def test_who_looks_at_all_modules_sees_them(calls: list[str]) -> None:
    made, map, seen = block("attention on means"), given("attention on means", 2), []
    want = inferred(made, map)
    calls.clear()
    hook = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(module))
    try:
        got = inferred(made, map)
    finally:
        hook.remove()
    assert error(got, want) < 1e-5
    assert {made.attn, made.conv, made.mlp, made.project} <= set(seen)
    assert "infer_mixed" not in calls


OTHERS = [(NCB, "small maps", part) for part in ({"act": GELU}, {"mlp_residual": partial(Residual, scale=2.0)})]
OTHERS += [(NTB, "attention", part) for part in ({"position": RelativeBias()}, {"position": RoPE()})]


@pytest.mark.parametrize(("kind", "name", "part"), [*OTHERS, *((k, n, {"norm": LayerNorm}) for k, n, _ in OTHERS[1:3])])
def test_other_parts_are_left_to_themselves(
    kind: type[NCB | NTB], name: str, part: dict[str, Any], calls: list[str]
) -> None:
    torch.manual_seed(0)
    made, map = kind(Site.at(*CASES[name][1:3]), **part).eval(), given(name, 4)
    assert error(inferred(made, map), exactly(made, map)) < 1e-6
    assert not set(CASES[name][3]) & set(calls)


def test_empty_batches_and_gradients(calls: list[str]) -> None:
    made, map = block("small maps"), given("small maps", 2)
    assert inferred(made, map[:0]).shape == (0, 64, 5, 5)
    made(Features(map)).map.sum().backward()
    assert "infer_branches" not in calls
