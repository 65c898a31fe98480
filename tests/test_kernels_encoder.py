"""The encoder, and what lies between TNT's words and tokens, as one call each way: against float64 and torch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from blocks import residual
from blocks.attention import Attention
from blocks.base import Features, Grid, Site, Words, linear
from blocks.gates import SigmoidGate
from blocks.kernels import encoder as kernel
from blocks.kernels import layers, native, onto, products
from blocks.mlp import Mlp, ReLU
from blocks.norms import LayerNorm, RMSNorm
from blocks.positions import RoPE
from blocks.tnt import TNT
from blocks.transformer import Encoder
from tests.kernels import FORMS, draw, error, in_form, saved_bytes

FULL, LOW = torch.float32, torch.bfloat16


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(products, "preferred", lambda dtype: True)
    with in_form(request.param, monkeypatch):
        for kept in (kernel._room, onto._room):
            kept.cache_clear()
        yield request.param
        for kept in (kernel._room, onto._room):
            kept.cache_clear()


def need(name: str, dtype: torch.dtype) -> None:
    if not native.has(name, dtype):
        pytest.skip("no kernel for this precision")


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are called from Python, but for those that say how much room they need."""
    found: list[str] = []
    run = native.run

    def note(name: str, *args: Any) -> None:
        found.extend([] if name.endswith("_room") else [name])
        run(name, *args)

    monkeypatch.setattr(native, "run", note)
    return found


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    if native.library() is None:
        pytest.skip("no compiler, or a processor without a kernel")
    monkeypatch.setattr(products, "preferred", lambda dtype: True)
    return watched(monkeypatch)


def randomised(block: Any) -> Any:
    generator = torch.Generator().manual_seed(len(list(block.parameters())))
    for p in block.parameters():
        nn.init.normal_(p, std=0.3, generator=generator)
    return block


def encoder(prefix: int = 1, only: bool = False, grid: Grid = (4, 4), dim: int = 64, **parts: Any) -> Encoder:
    """An encoder whose every parameter tells; `only`: nobody reads its map."""
    site = Site.at(dim, grid[0], prefix=prefix, drop_path=parts.pop("drop_path", 0.0))
    mixer = partial(Attention, heads=parts.pop("heads", 4), qkv_bias=parts.pop("bias", False), **parts.pop("mix", {}))
    block = randomised(Encoder(site, mixer=mixer, **parts))
    block.keep(frozenset({"prefix"} if only else {"map", "prefix"}))
    return block


def given(block: Encoder, batch: int, dtype: torch.dtype = FULL) -> list[Tensor]:
    """Map and prefix."""
    dim, (h, w), prefix = block.out.dim, block.out.grid, block.out.prefix
    map = draw(batch, dim, h, w).to(memory_format=torch.channels_last)
    parts = [map, *([draw(batch, prefix, dim)] if prefix else [])]
    return [t.to(dtype).requires_grad_() for t in parts]


def through(block: Any, parts: list[Tensor], low: bool = False) -> list[Tensor]:
    """What is read of the result."""
    torch.manual_seed(1)
    with torch.autocast("cpu", LOW, enabled=low):
        out = block(Features(*parts))
    only = isinstance(block, Encoder) and block.prefix_only
    return [t for t in (None if only else out.map, out.prefix, out.words) if t is not None]


def whole(
    block: Any, parts: list[Tensor], low: bool = False, run: Callable[..., list[Tensor]] = through
) -> list[Tensor]:
    """Results and all gradients."""
    results = run(block, parts, low)
    grads = [draw(3, *r.shape)[i].to(r.dtype) for i, r in enumerate(results)]
    return [*results, *torch.autograd.grad(results, [*parts, *block.parameters()], grads)]


def compare(block: Any, parts: list[Tensor], low: bool, monkeypatch: pytest.MonkeyPatch, factor: float = 1.5) -> None:
    """Results and gradients are as near to float64's as those of torch's operators."""
    got = whole(block, parts, low)
    exact = whole(copy.deepcopy(block).double(), [t.detach().double().requires_grad_() for t in parts])
    monkeypatch.setattr(native, "has", lambda name, dtype: False)
    monkeypatch.setattr(products, "kernel", lambda dtype: False)  # it keeps what it was told
    own = whole(block, parts, low)
    for a, b, c in zip(got, own, exact, strict=True):
        assert a.dtype is b.dtype
        assert error(a, c) < factor * error(b, c) + (1e-3 if low else 2e-6)


CASES = {
    "tokens": {},
    "bias": {"bias": True, "prefix": 2},
    "no prefix": {"prefix": 0},
    "one head": {"heads": 1, "grid": (3, 3)},
    "wide": {"dim": 160, "heads": 5, "grid": (5, 5)},
    "drop path": {"drop_path": 0.4},
    "prefix alone": {"only": True},
    "two alone": {"only": True, "prefix": 2, "bias": True, "drop_path": 0.4},
}


@pytest.mark.parametrize("dtype", [FULL, LOW])
@pytest.mark.parametrize("case", CASES)
def test_an_encoder(case: str, dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need("encoder_forward", dtype)
    block = encoder(**CASES[case]).train()
    parts, calls = given(block, 17), watched(monkeypatch)
    compare(block, parts, dtype is LOW, monkeypatch)
    assert calls[:2] == ["encoder_forward", "encoder_backward"]


@pytest.mark.parametrize("which", [{0}, {1}, {0, 1}])
@pytest.mark.parametrize("case", ["tokens", "bias", "two alone"])
def test_branches_of_which_all_samples_are_dropped(case: str, which: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is done for them, and what was in memory does not come through."""
    need("encoder_forward", FULL)
    block = encoder(**{**CASES[case], "drop_path": 0.4}).train()
    monkeypatch.setattr(products, "preferred", lambda dtype: True)
    drawn = itertools.count()
    monkeypatch.setattr(
        residual, "kept", lambda x, rate: x.new_full((len(x), 1, 1), 0.0 if next(drawn) % 2 in which else 2.0)
    )
    monkeypatch.setattr(native, "space", lambda size: torch.full((size,), 255, dtype=torch.uint8))  # not a number
    calls = watched(monkeypatch)
    parts = given(block, 17)
    found = whole(block, parts)
    assert calls == ["encoder_forward", "encoder_backward"]
    exact = whole(copy.deepcopy(block).double(), [t.detach().double().requires_grad_() for t in parts])
    for got, want in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [FULL, LOW])
@pytest.mark.parametrize("case", ["tokens", "bias", "no prefix", "wide", "prefix alone", "two alone"])
@pytest.mark.parametrize("most", [layers.MOST, 0])
def test_without_gradients(
    most: int, case: str, dtype: torch.dtype, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the MLP as one kernel, and in pieces; what came in stays as it was."""
    need("encoder_inference", dtype)
    monkeypatch.setattr(layers, "MOST", most)
    block = encoder(**CASES[case]).eval()
    parts, low = given(block, 130), dtype is LOW
    want = [t.detach() for t in through(block, parts, low)]
    exact = through(copy.deepcopy(block).double(), [t.double() for t in parts])
    before, calls = [t.detach().clone() for t in parts], watched(monkeypatch)
    with torch.no_grad():
        got = through(block, parts, low)
    assert calls == ["encoder_inference"]
    for a, b, c in zip(got, want, exact, strict=True):
        assert a.dtype is b.dtype
        assert error(a, c) < 1.2 * error(b, c) + 1e-6
    assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))


def test_checkpointing_gives_the_same(calls: list[str]) -> None:
    block = encoder()
    parts = given(block, 17)

    def again(block: Encoder, parts: list[Tensor], low: bool) -> list[Tensor]:
        out = checkpoint(block, Features(*parts), use_reentrant=False)
        return [out.map, out.prefix]

    first, second = whole(block, parts), whole(block, parts, run=again)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert calls.count("encoder_forward") == 3


@pytest.mark.parametrize("case", ["bias", "drop path", "two alone"])
def test_second_derivatives(case: str, calls: list[str]) -> None:
    def penalty(block: Encoder, parts: list[Tensor]) -> list[Tensor]:
        inputs = [*parts[1:], *block.parameters()]
        first = torch.autograd.grad(sum(t.square().sum() for t in through(block, parts)), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))

    block = encoder(**CASES[case])
    parts = given(block, 17)
    got = penalty(block, parts)
    assert "encoder_forward" in calls
    with sdpa_kernel(SDPBackend.MATH):  # torch cannot differentiate the other twice
        exact = penalty(copy.deepcopy(block).double(), [t.detach().double().requires_grad_() for t in parts])
    for a, b in zip(got, exact, strict=True):
        assert error(a, b) < 1e-4


@pytest.mark.parametrize("low", [False, True])
def test_what_is_kept(low: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream twice, queries, keys and values, what was seen, what goes into GELU: no more than one by one."""
    need("encoder_forward", LOW if low else FULL)
    block = encoder()
    parts = given(block, 8)
    parameters = list(block.parameters())
    ours = saved_bytes(lambda: through(block, parts, low)[0], parameters)
    rows, width = 8 * 17, 2 if low else 4
    least = rows * 64 * (2 * 4 + (3 + 1 + 4) * width)
    assert least < ours < 1.1 * least
    monkeypatch.setattr(kernel, "encode", lambda *args: None)
    assert ours <= 1.01 * saved_bytes(lambda: through(block, parts, low)[0], parameters)


OTHERS = {
    "another activation": lambda: encoder(mlp=partial(Mlp, act=ReLU)),
    "another norm": lambda: encoder(norm=RMSNorm),
    "a position": lambda: encoder(mix={"position": RoPE()}),
    "a gate": lambda: encoder(mix={"gate": SigmoidGate}),
    "dropout": lambda: encoder(mix={"attn_drop": 0.1}).train(),
    "width": lambda: encoder(dim=40),
    "a frozen norm": lambda: frozen(encoder(), "norm1"),
    "float64": lambda: encoder().double(),
    "no products": lambda: encoder(),
}


def frozen(block: Encoder, name: str) -> Encoder:
    block.get_submodule(name).requires_grad_(False)
    return block


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_left_to_others(name: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "no products":
        monkeypatch.setattr(products, "preferred", lambda dtype: False)
    block = OTHERS[name]()
    through(block, given(block, 17, next(block.parameters()).dtype))
    assert not [call for call in calls if call.startswith("encoder")]


@pytest.mark.parametrize("part", ["", "norm1", "mixer", "mixer.qkv", "mixer.gate", "mixer_residual", "mlp", "mlp.fc2"])
def test_hooks_are_called(part: str, calls: list[str]) -> None:
    block, seen = encoder(), []
    block.get_submodule(part).register_forward_hook(lambda *args: seen.append(args[0]))
    parts = given(block, 3)
    through(block, parts)
    assert seen == [block.get_submodule(part)]


def test_depth_without_gradients_is_left_to_others(calls: list[str]) -> None:
    """A net in training under no_grad draws the same numbers as with gradients."""
    block = encoder(drop_path=0.4).train()
    parts = given(block, 17)
    want = through(block, parts)
    calls.clear()
    with torch.no_grad():
        for a, b in zip(through(block, parts), want, strict=True):
            torch.testing.assert_close(a, b)
    assert not [call for call in calls if call.startswith("encoder")]


# ---- words onto tokens


class Between(nn.Module):
    """TNT's way from words to tokens."""

    def __init__(self, words: int, width: int, dim: int) -> None:
        super().__init__()
        self.norm1, self.proj, self.norm2 = LayerNorm(words * width), linear(words * width, dim, False), LayerNorm(dim)
        randomised(self)

    def forward(self, words: Tensor, x: Tensor | None, prefix: Tensor | None, ours: bool = True) -> tuple[Tensor, ...]:
        batch = words.shape[0] // 6
        if ours:
            both = onto.words_onto(words, batch, self.norm1, self.proj, self.norm2, x, prefix)
            assert both is not None
            return both
        y = F.linear(F.layer_norm(words.flatten(1), self.norm1.weight.shape, self.norm1.weight, self.norm1.bias),
                     self.proj.weight)  # fmt: skip
        y = F.layer_norm(y.to(words.dtype), self.norm2.weight.shape, self.norm2.weight, self.norm2.bias)
        y = y.view(batch, 6, -1)
        y = y if x is None else x + y
        return words, y if prefix is None else torch.cat([prefix, y], dim=1)


@pytest.mark.parametrize("dtype", [FULL, LOW])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("words", "width", "prefix"), [(16, 4, 1), (4, 16, 2), (9, 32, 0), (4, 8, None)])
def test_words_onto(words: int, width: int, prefix: int | None, turned: bool, dtype: torch.dtype, form: str) -> None:
    """As near to float64 as torch's operators, with words in either order in memory; and the same without gradients."""
    need("onto_forward", dtype)
    module, low = Between(words, width, 64), dtype is LOW
    given = draw(66, width, words).transpose(1, 2) if turned else draw(66, words, width)
    tokens = None if prefix is None else draw(11, 6 + prefix, 64)
    parts = [given, None if tokens is None else tokens[:, prefix:], tokens[:, :prefix] if prefix else None]

    def grads(module: Between, dtype: torch.dtype, low: bool, ours: bool) -> list[Tensor]:
        inputs = [None if t is None else t.detach().to(dtype).requires_grad_() for t in parts]
        with torch.autocast("cpu", LOW, enabled=low):
            results = module(*inputs, ours)
        wanted = [*(t for t in inputs if t is not None), *module.parameters()]
        made = [draw(*r.shape).to(r.dtype) for r in results]
        return [*results, *torch.autograd.grad(results, wanted, made)]

    got, own = grads(module, FULL, low, True), grads(module, FULL, low, False)
    for a, b, c in zip(got, own, grads(copy.deepcopy(module).double(), torch.float64, False, False), strict=True):
        assert a.dtype is b.dtype
        assert error(a, c) < 1.5 * error(b, c) + 1e-6
    with torch.no_grad(), torch.autocast("cpu", LOW, enabled=low):
        for a, b in zip(module(*parts), got, strict=False):
            assert torch.equal(a, b)


def test_words_onto_in_second_derivatives() -> None:
    need("onto_forward", FULL)
    module = Between(4, 8, 64)
    given, x = draw(66, 8, 4).transpose(1, 2), draw(11, 6, 64)

    def penalty(module: Between, dtype: torch.dtype, ours: bool) -> list[Tensor]:
        inputs = [given.to(dtype).detach().requires_grad_(), *module.parameters()]
        made = module(inputs[0], x.to(dtype), None, ours)
        first = torch.autograd.grad(sum(t.pow(3).sum() for t in made), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), inputs))

    for a, b in zip(penalty(module, FULL, True), penalty(copy.deepcopy(module).double(), torch.float64, False),
                    strict=True):  # fmt: skip
        assert error(a, b) < 1e-4


def tnt(words: int = 16, **args: Any) -> TNT:
    side = round(words**0.5)
    site = Site.at(64, 4, prefix=1, words=Words(8, (side, side), over=(4, 4)), drop_path=args.pop("drop_path", 0.0))
    inner, outer = (partial(Encoder, mixer=partial(Attention, heads=heads)) for heads in (2, 4))
    return randomised(TNT(site, inner=inner, outer=outer, **args))


def given_words(words: int = 16, batch: int = 3) -> list[Tensor]:
    map = draw(batch, 64, 4, 4).to(memory_format=torch.channels_last)
    return [t.requires_grad_() for t in (map, draw(batch, 1, 64), draw(batch * 16, 8, words).transpose(1, 2))]


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("words", [4, 16])
def test_a_block_of_tnt(words: int, low: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three calls each way; without gradients too."""
    need("encoder_forward", LOW if low else FULL)
    block, parts = tnt(words), given_words(words)
    compare(block, parts, low, monkeypatch)
    assert calls[:6] == [*(f"{part}_forward" for part in ("inner", "onto", "encoder")),
                         *(f"{part}_backward" for part in ("encoder", "onto", "inner"))]  # fmt: skip


def test_a_block_of_tnt_without_gradients(calls: list[str]) -> None:
    block, parts = tnt(), given_words()
    want = through(block, parts)
    calls.clear()
    with torch.no_grad():
        for a, b in zip(through(block, parts), want, strict=True):
            torch.testing.assert_close(a, b)
    assert calls == ["inner_forward", "onto_forward", "encoder_inference"]


def test_words_alone(calls: list[str]) -> None:
    """Where nobody reads the tokens, gradients come through the words, and the layers between have none."""
    block, parts = tnt(), given_words()
    words = through(block, parts)[-1]
    words.square().sum().backward()
    assert block.proj.weight.grad is None
    assert parts[2].grad is not None
    assert calls == ["inner_forward", "onto_forward", "encoder_forward", "inner_backward"]
