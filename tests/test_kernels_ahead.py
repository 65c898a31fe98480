"""Blocks whose kernels are prepared together: the same numbers as one by one, and what somebody looks at is there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blocks.attention import Attention
from blocks.base import Block, Features, Shape, Site, Words
from blocks.kernels import native, products
from blocks.kernels.ahead import through
from blocks.nextvit import NCB, NTB
from blocks.tnt import TNT
from blocks.transformer import Encoder, as_one
from tests.contract import features, randomise

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="no kernels on this machine"),
    pytest.mark.usefixtures("ours"),
]

SIDE = 14
MEASURED = products._smallest


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many calls were made together, for each time that some were."""
    seen: list[int] = []
    run = native.Plan.run

    def noted(plan: native.Plan) -> None:
        seen.extend([len(plan.calls)] * bool(plan.calls))
        run(plan)

    monkeypatch.setattr(native.Plan, "run", noted)
    return seen


def convolutional() -> list[Block]:
    site = Site.at(256, SIDE)
    return [NCB(site), NCB(site), NTB(site, shrink=0.75), NCB(site), NCB(site)]


def nested() -> list[Block]:
    outer = partial(Encoder, mixer=partial(Attention, heads=2))
    at = Shape(64, (SIDE, SIDE), 1, Words(24, (4, 4), over=(SIDE, SIDE)))
    site = Site.at(64, SIDE)
    site = site.inside("", inp=at, dim=64)
    inner = partial(Encoder, mixer=partial(Attention, heads=4))
    return [TNT(site, inner, outer) for _ in range(4)]


def plain() -> list[Block]:
    site = Site.at(64, SIDE)
    site = site.inside("", inp=Shape(64, (SIDE, SIDE), 1), dim=64)
    return [Encoder(site, mixer=partial(Attention, heads=2)) for _ in range(4)]


CHAINS = {"convolutional": convolutional, "words in tokens": nested, "encoders": plain}


def chain(name: str) -> list[Block]:
    torch.manual_seed(0)
    blocks = CHAINS[name]()
    for block in blocks:
        randomise(block)
        block.eval()
    return blocks


def given(blocks: Sequence[Block], batch: int) -> Features:
    found = features(blocks[0].out, batch=batch)
    parts = (None if t is None else t.detach() for t in (found.prefix, found.words))
    return Features(found.map.detach(), *parts)


def one_by_one(blocks: Sequence[Block], x: Features) -> Features:
    for block in blocks:
        x = block(x)
    return x


def same(a: Features, b: Features) -> bool:
    pairs = zip((a.map, a.prefix, a.words), (b.map, b.prefix, b.words), strict=True)
    return all((x is None) == (y is None) and (x is None or y is None or torch.equal(x, y)) for x, y in pairs)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", CHAINS)
def test_the_same_numbers(name: str, batch: int, low: bool, runs: list[int]) -> None:
    blocks = chain(name)
    x = given(blocks, batch)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        if low and name == "convolutional":
            x = x.replace(map=x.map.bfloat16())
        got = through(blocks, x)
        assert same(got, one_by_one(blocks, x))
    if not low or native.has("gemm", torch.bfloat16):
        assert max(runs) >= 2


@pytest.mark.parametrize("name", CHAINS)
def test_what_is_looked_at_is_there(name: str) -> None:
    blocks, seen = chain(name), []
    x = given(blocks, 2)

    def look(block: nn.Module, args: tuple[Features], out: Features) -> None:
        seen.append((args[0].map.clone(), out.map.clone()))

    with torch.no_grad():
        alone = [one_by_one(blocks[:end], x).map for end in range(len(blocks) + 1)]
        blocks[2].register_forward_hook(look)
        through(blocks, x)
    ((before, behind),) = seen
    assert torch.equal(before, alone[2])
    assert torch.equal(behind, alone[3])


def test_who_looks_at_all_modules_sees_the_blocks(runs: list[int]) -> None:
    blocks, seen = chain("encoders"), []
    x = given(blocks, 2)
    hook = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(module))
    try:
        with torch.no_grad():
            through(blocks, x)
    finally:
        hook.remove()
    assert [module for module in seen if module in blocks] == blocks
    assert not runs


def test_what_goes_in_stays_and_is_held(runs: list[int]) -> None:
    blocks = chain("encoders")
    x = given(blocks, 2)
    kept = x.map.clone()
    with torch.no_grad():
        want = one_by_one(blocks, x)
        for _ in range(3):
            assert same(through(blocks, Features(x.map.clone(), x.prefix)), want)
        first, second = through(blocks, x), through(blocks[:3], x)
    assert torch.equal(x.map, kept)
    assert same(first, want)
    assert not same(second, want)
    assert runs


def test_memory_is_used_in_turns() -> None:
    plan = native.Plan()
    with plan:
        made = [native.fresh("map", (3, 5), torch.float32) for _ in range(4)]
        other = native.fresh("words", (3, 5), torch.float32)
        rooms = [native.space(64), native.space(64), native.space(128)]
    places = [t.data_ptr() for t in made]
    assert places[0] == places[2] != places[1] == places[3]
    assert other.data_ptr() not in places
    assert rooms[0].data_ptr() == rooms[1].data_ptr()
    assert [len(room) for room in rooms] == [64, 64, 128]
    assert native.planned() is None


def test_the_first_to_ask_measures_before_the_plan_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, runs: list[int]
) -> None:
    """What is measured is computed then, from memory that is still there, and the plan holds nothing of it."""
    made, make = [], native._make

    def noted(kernel: Any, given: list[Any], name: str) -> None:
        made.append((name, native.planned()))
        make(kernel, given, name)

    monkeypatch.setattr(products, "_smallest", cache(MEASURED.__wrapped__))
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(products, "MARGIN", 0.0)
    blocks = chain("convolutional")
    x = given(blocks, 1)
    monkeypatch.setattr(native, "_make", noted)
    with torch.no_grad():
        got = through(blocks, x)
        assert same(got, one_by_one(blocks, x))
    assert ("gemm", None) in made
    assert max(runs) <= 2 * len(blocks)


def test_an_error_ends_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = chain("encoders")

    def fails(features: Features) -> Features:
        raise MemoryError

    monkeypatch.setattr(blocks[1], "planned", fails)
    with torch.no_grad(), pytest.raises(MemoryError):
        through(blocks, given(blocks, 1))
    assert native.planned() is None


def test_gradients_flow(runs: list[int]) -> None:
    blocks = chain("encoders")
    through(blocks, given(blocks, 2)).map.sum().backward()
    assert all(p.grad is not None for block in blocks for p in block.parameters())
    assert not runs


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_that_lie_together_are_one_tensor(batch: int) -> None:
    def parts(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :2], x[:, 2:]

    whole = torch.randn(batch, 7, 8)
    found = as_one(*parts(whole))
    assert found is not None
    assert torch.equal(found, whole)
    assert found.data_ptr() == whole.data_ptr()
    assert as_one(whole[:, :2], whole[:, 3:]) is None
    assert as_one(whole[:, 2:4], whole[:, :2]) is None
    assert as_one(whole[:, :2].clone(), whole[:, 2:]) is None
    assert as_one(whole[:, :2, :4], whole[:, 2:, :4]) is None
