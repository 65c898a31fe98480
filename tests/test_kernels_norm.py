"""Norms with the residual stream around them as one operation, against float64."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from blocks.attention import Attention
from blocks.base import Features, Site, Words
from blocks.kernels import native, norm
from blocks.kernels.linear import Linear, recipe_of
from blocks.mlp import Mlp, ReLU
from blocks.residual import Residual, kept
from blocks.tnt import TNT
from blocks.transformer import Encoder
from tests.kernels import draw, error, saved_bytes

FULL, LOW = torch.float32, torch.bfloat16


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    if native.library() is None:
        pytest.skip("no compiler, or a processor without a kernel")
    found: list[str] = []
    call = norm.run
    monkeypatch.setattr(norm, "run", lambda name, *args: found.append(name.removeprefix("norm_")) or call(name, *args))
    return found


def need(dtype: torch.dtype) -> None:
    if not native.has("norm_forward", dtype):
        pytest.skip("no kernel for this precision")


def in_two_threads(act: Any) -> list[Tensor]:
    """What `act` gives, the same with one thread and with two."""
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(act())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return results[0]


def spelled_out(x: Tensor, w: Tensor, b: Tensor, branch: Tensor | None, factor: Tensor | None) -> Any:
    x = x if branch is None else x + branch * (1 if factor is None else factor)
    return x, F.layer_norm(x, w.shape, w, b, 1e-5)


def gradients(act: Any, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Results, and gradients of the inputs."""
    results = act()
    grads = [draw(3, *r.shape)[i].to(dtype if i else r.dtype).to(r.dtype) for i, r in enumerate(results)]
    return [*results, *torch.autograd.grad(results, inputs, grads)]


@pytest.mark.parametrize("dtype", [FULL, LOW])
@pytest.mark.parametrize("form", ["alone", "branch", "factor"])
@pytest.mark.parametrize(("rows", "dim"), [(1, 16), (70, 48), (700, 384), (9, 192)])
def test_sum_and_norm(dtype: torch.dtype, form: str, rows: int, dim: int) -> None:
    """As near to float64 as torch's own operators, forward and backward, and the same in two threads."""
    need(dtype)
    x, w, b = draw(2, rows, dim) * 3 + 1, draw(dim), draw(dim + 1)[1:].clone()
    branch = draw(2, rows, dim + 1)[..., 1:].contiguous().to(dtype) if form in ("branch", "factor") else None
    factor = torch.tensor([0.0, 1.25]).view(2, 1, 1) if form == "factor" else None
    exact = [None if t is None else t.double().requires_grad_() for t in (x, w, b, branch)]
    inputs = [t.requires_grad_() for t in (x, w, b, branch) if t is not None]

    def ours() -> Any:
        return norm.add_norm(x, w, b, 1e-5, dtype, branch, factor)

    def theirs() -> Any:
        stream, made = spelled_out(x, w, b, branch, factor)
        return stream, made.to(dtype)

    far = None if factor is None else factor.double()
    want = gradients(lambda: spelled_out(*exact, far), [t for t in exact if t is not None], dtype)
    got, own = in_two_threads(lambda: gradients(ours, inputs, dtype)), gradients(theirs, inputs, dtype)
    for a, b_, c in zip(got, own, want, strict=True):
        assert a.dtype is b_.dtype
        assert error(a, c) <= 1.5 * error(b_, c) + 5e-7
    made = ours()[1]
    recipe = recipe_of(made)
    assert recipe is not None
    with torch.no_grad():
        assert torch.equal(recipe.make(*recipe.parts), got[1])
        assert all(torch.equal(a, b_) for a, b_ in zip(ours(), got, strict=False))
        total, made = norm.add_norm(x, w, b, 1e-5, dtype, branch, factor, own=True)
        assert total.data_ptr() == x.data_ptr()
        assert torch.equal(total, got[0])
        assert torch.equal(made, got[1])


def tnt(**args: Any) -> TNT:
    torch.manual_seed(0)
    site = Site.at(48, 4, prefix=1, words=Words(8, (4, 4), over=(4, 4)), drop_path=args.pop("drop_path", 0.0))
    inner = partial(Encoder, mixer=partial(Attention, heads=2))
    outer = partial(
        Encoder, mixer=partial(Attention, heads=4), mlp=partial(Mlp, act=ReLU), **args
    )  # not the textbook's
    block = TNT(site, inner=inner, outer=outer)
    for p in block.parameters():
        nn.init.normal_(p, std=0.3)
    return block


def given(dtype: torch.dtype = FULL, batch: int = 3) -> list[Tensor]:
    map = draw(batch, 48, 4, 4).to(memory_format=torch.channels_last)
    return [t.to(dtype).requires_grad_() for t in (map, draw(batch, 1, 48), draw(batch * 16, 8, 16).transpose(1, 2))]


def through(block: Any, parts: list[Tensor], low: bool = False, act: Any = None) -> list[Tensor]:
    torch.manual_seed(1)
    with torch.autocast("cpu", LOW, enabled=low):
        out = (act or block)(Features(*parts))
    return [t for t in (out.map, out.prefix, out.words) if t is not None]


def whole(block: Any, parts: list[Tensor], low: bool = False, act: Any = None) -> list[Tensor]:
    """Results, and all gradients."""
    inputs = [*parts, *block.parameters()]
    return gradients(lambda: through(block, parts, low, act), inputs, FULL)


@pytest.mark.parametrize("low", [False, True])
def test_a_block(low: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and gradients of TNT are as near to float64's as without the kernel, and so when computed again."""
    need(LOW if low else FULL)
    block, parts = tnt(), given()
    got = whole(block, parts, low)
    assert calls.count("forward") == (3 if low else 2)
    assert calls.count("backward") == 2
    again = whole(block, parts, low, partial(checkpoint, block, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    exact = whole(copy.deepcopy(block).double(), given(torch.float64))
    monkeypatch.setattr(norm, "serves", lambda *args: False)
    calls.clear()
    own = whole(block, parts, low)
    assert not calls
    for a, b, c in zip(got, own, exact, strict=True):
        assert a.dtype is b.dtype
        assert error(a, c) < 1.5 * error(b, c) + 2e-6


@pytest.mark.parametrize("low", [False, True])
def test_it_keeps_no_more(low: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    need(LOW if low else FULL)
    block, parts = tnt(), given(batch=8)
    act = lambda: through(block, parts, low)[0]  # noqa: E731
    ours = saved_bytes(act, list(block.parameters()))
    monkeypatch.setattr(norm, "serves", lambda *args: False)
    assert ours <= saved_bytes(act, list(block.parameters()))


@pytest.mark.parametrize("prefix", [False, True])
def test_what_came_in_stays(prefix: bool, calls: list[str]) -> None:
    """Without gradients a sum may take the place of the stream, but not of what the block was given."""
    block = Encoder(Site.at(48, 4, prefix=int(prefix)), mixer=partial(Attention, heads=4), mlp=partial(Mlp, act=ReLU))
    parts: list[Any] = given()[:2] if prefix else [given()[0], None]
    before = [None if t is None else t.clone() for t in parts]
    with torch.no_grad():
        got = through(block, parts)
    assert calls == ["forward", "forward"]
    assert all(a is None or torch.equal(a, b) for a, b in zip(parts, before, strict=True))
    for a, b in zip(got, through(block, parts), strict=True):
        torch.testing.assert_close(a, b)


def test_stochastic_depth(calls: list[str]) -> None:
    """Both branches are scaled by what the residual would have drawn, sample by sample."""
    block, parts = tnt(drop_path=0.4).train(), given(batch=8)
    got = whole(block, parts)
    assert "backward" in calls
    calls.clear()
    for residual in (block.outer.mixer_residual, block.outer.mlp_residual):  # type: ignore[union-attr]
        residual.register_forward_hook(lambda *args: None)
    for a, b in zip(got, whole(block, parts), strict=True):
        assert error(a, b.double()) < 1e-5


def test_a_branch_in_bfloat16_is_added_without_a_copy() -> None:
    need(LOW)
    residual, x, y = Residual(Site.at(48, 4, drop_path=0.4)).train(), draw(8, 5, 48), draw(8, 5, 48).to(LOW)
    torch.manual_seed(2)
    factor = kept(x, 0.4)
    torch.manual_seed(2)
    torch.testing.assert_close(residual(x, y), x + factor * y)


def test_what_is_left_to_torch(calls: list[str]) -> None:
    """Hooks, a frozen norm, float64, compilers, widths that are no multiple of 16; the results agree."""
    parts = given()
    want = through(tnt(), parts)
    calls.clear()

    def hooked(block: TNT, *names: str) -> TNT:
        for name in names:
            block.get_submodule(name).register_forward_hook(lambda *args: None)
        return block

    norms = ["norm1_proj", "norm2_proj", "outer.norm1", "outer.norm2"]
    frozen = tnt()
    for name in norms:
        frozen.get_submodule(name).requires_grad_(False)
    torch._dynamo.reset()
    for other in (hooked(tnt(), *norms), frozen, torch.compile(tnt(), backend="eager")):
        for a, b in zip(through(other, parts), want, strict=True):
            torch.testing.assert_close(a, b)
    through(tnt().double(), given(torch.float64))
    narrow = Encoder(Site.at(24, 4), mixer=partial(Attention, heads=4))
    narrow(Features(draw(2, 24, 4, 4)))
    assert not calls


def test_a_hook_on_what_multiplies_sees_float32(calls: list[str]) -> None:
    need(LOW)
    block, seen = tnt(), []
    block.outer.mixer.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))  # type: ignore[union-attr]
    block.outer.mlp.fc1.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))  # type: ignore[union-attr]
    through(block, given(), low=True)
    assert seen == [FULL, FULL]
    assert type(block.outer.mlp.fc1) is Linear  # type: ignore[union-attr]


def test_second_derivatives(calls: list[str]) -> None:
    def penalty(block: TNT, parts: list[Tensor]) -> list[Tensor]:
        inputs = [*parts, *block.outer.parameters(), *block.norm1_proj.parameters()]
        first = torch.autograd.grad(sum(t.square().sum() for t in through(block, parts)), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))

    block, parts = tnt(), given()
    block.inner.requires_grad_(False)
    block.mix = lambda words, turn: words  # type: ignore[method-assign]
    with sdpa_kernel(SDPBackend.MATH):  # torch cannot differentiate the other twice
        exact = penalty(copy.deepcopy(block).double(), given(torch.float64))
    assert not calls
    got = penalty(block, parts)
    assert "forward" in calls
    for a, b in zip(got, exact, strict=True):
        assert error(a, b) < 1e-4
