"""What every part of a block must satisfy: mixers, norms, gates, heads, positions; run by tests/test_blocks.py."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blocks.base import (
    PARTS,
    Act,
    BuildError,
    FeedForward,
    Gate,
    Mixer,
    Norm,
    Position,
    Shape,
    tokens,
)
from blocks.heads import Head
from blocks.residual import Residual
from blocks.revcol import Fusion
from tests.contract import CLASSES, assert_channels_last, build, features, parts
from tests.settings import IDLE, Case


def sample(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tokens `(2, P + N, C)` of a row's place."""
    torch.manual_seed(1)
    shape = case.site.inp
    return torch.randn(2, shape.prefix + shape.positions, shape.dim, dtype=dtype)


def check_module(module: nn.Module, *args: Any) -> Tensor:
    """What every part satisfies: finite gradients everywhere, float64, copies. Gives its float64 output."""
    out = module(*args)
    if out.requires_grad:
        out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    module = pickle.loads(pickle.dumps(copy.deepcopy(module))).double()
    out = module(*(a.double() if isinstance(a, Tensor) else a for a in args))
    assert out.dtype == torch.float64
    return out


def check_mixer(cls: type[Mixer], case: Case) -> None:
    """Keeps shape; with `rows`, gives just these, equal to the rows of the whole, where it says that it can."""
    for training in (False, True):
        mixer, x, grid = build(cls, case, training), sample(case), case.site.inp.grid
        assert check_module(mixer, x, grid).shape == x.shape
        mixer, x = mixer.double(), x.double()
        if mixer.per_token and case.site.inp.prefix:
            count = case.site.inp.prefix
            torch.testing.assert_close(mixer(x, grid, rows=count), mixer(x, grid)[:, :count], rtol=0, atol=1e-12)


def check_feed_forward(cls: type[FeedForward], case: Case) -> None:
    """Keeps shape; rows can be had by themselves where it says so."""
    for training in (False, True):
        mlp, x, grid = build(cls, case, training), sample(case), case.site.inp.grid
        assert check_module(mlp, x, grid).shape == x.shape
        _check_per_token(mlp, lambda x, mlp=mlp, grid=grid: mlp(x, grid), x)


def check_norm(cls: type[Norm], case: Case) -> None:
    """Keeps shape; a map is normalised as its tokens are, without leaving channels_last."""
    for training in (False, True):
        norm, x = build(cls, case, training), sample(case)
        assert check_module(norm, x).shape == x.shape
        for batch in (1, 2):
            given = features(case.site.inp, batch).map
            out = norm.on_map(given)
            assert_channels_last(out)
            torch.testing.assert_close(tokens(out), norm(tokens(given)))
        _check_per_token(norm, norm, x)


def check_gate(cls: type[Gate], case: Case) -> None:
    """Keeps shape; rows can be had by themselves where it says so."""
    for training in (False, True):
        gate, x = build(cls, case, training), sample(case)
        assert check_module(gate, x).shape == x.shape
        _check_per_token(gate, gate, x)


def _check_per_token(part: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """`per_token` is an exact promise, and parts that cannot keep it do not give it."""
    part.double()
    x = x.double()
    alone = torch.allclose(call(x[:, :2]), call(x)[:, :2], rtol=0, atol=1e-12)
    if part.per_token:
        assert alone, f"{type(part).__name__} says per_token, but its rows depend on the others"
    elif part.training:
        assert not alone, f"{type(part).__name__} could say per_token"


def check_act(cls: type[Act], case: Case) -> None:
    """Works on each number by itself."""
    act, x = build(cls, case), sample(case)
    out = check_module(act, x)
    assert out.shape == x.shape
    torch.testing.assert_close(act(x.double().flatten().flip(0)).flip(0), out.flatten())


def check_head(cls: type[Head], case: Case) -> None:
    """Gives `(B, classes)`, and reads only what it says."""
    head, given = build(cls, case), features(case.site.inp)
    logits = head(given)
    assert logits.shape == (2, CLASSES)
    assert set() < head.reads <= PARTS
    unread = {name: torch.full_like(v, torch.nan) for name, v in parts(given).items() if name not in head.reads}
    torch.testing.assert_close(head(given._replace(**unread)), logits, rtol=0, atol=0)
    each = head.each(given)
    assert len(each) == head.classifiers
    torch.testing.assert_close(head.evaluated(each), logits)
    torch.stack(each).sum().backward()
    assert all(p.grad is not None and (p.grad.any() or n in IDLE.get(cls, ())) for n, p in head.named_parameters())
    if "prefix" in head.reads:
        with pytest.raises(BuildError, match="prefix"):
            cls(dataclasses.replace(case.site.inp, prefix=0), CLASSES)


def check_position(cls: type[Position], case: Case) -> None:
    """A frozen, comparable config object whose parts keep shape, dtype and memory layout, also on another grid."""
    position = build(cls, case)
    assert position == cls(**case.args)
    assert hash(position) == hash(cls(**case.args))
    assert dataclasses.is_dataclass(position)
    for field in dataclasses.fields(position):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(position, field.name, 0)
    at = case.site.inp
    part = position.tokens(at)
    scores = position.scores(at, heads=4, head_dim=at.dim // 4, keys=at.grid)
    for shape in (at, dataclasses.replace(at, grid=(4, 7))):
        for batch in (1, 2):
            given = features(shape, batch)
            map, prefix = part(given.map, given.prefix)
            assert map.shape == given.map.shape
            assert (prefix is None) == (given.prefix is None)
            assert prefix is None or prefix.shape == given.prefix.shape
            assert_channels_last(map)
        n = shape.prefix + shape.positions
        q = torch.randn(2, 4, n, at.dim // 4)
        turned, bias = scores.rotate(q, shape.grid), scores.bias(shape.grid)
        assert turned.shape == q.shape
        assert turned.dtype == q.dtype
        torch.testing.assert_close(turned.norm(dim=-1), q.norm(dim=-1))
        assert bias is None or bias.shape == (1, 4, n, n)
    assert position.on_scores == (scores.rotate(q, shape.grid) is not q or bias is not None)


def check_residual(cls: type[Residual], case: Case) -> None:
    """Adds the branch; drops whole samples in training only, at its site's rate, and scales what it keeps."""
    residual = build(cls, case)
    x, y = sample(case), sample(case).flip(0)
    assert check_module(residual, x, y).shape == x.shape
    alone = residual(x, torch.zeros_like(y))  # what there is without the branch
    branch = residual(x, y) - alone
    residual.train()
    torch.manual_seed(4)
    x, y = x[:1].expand(400, -1, -1), y[:1].expand(400, -1, -1)
    share = (residual(x, y) - alone[:1]).flatten(1) @ branch[0].flatten() / branch[0].square().sum()
    rate = case.site.drop_path
    kept = share > 0.5
    torch.testing.assert_close(share[kept], torch.full_like(share[kept], 1 / (1 - rate)), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(share[~kept], torch.zeros_like(share[~kept]), rtol=0, atol=1e-4)
    assert abs(1 - kept.float().mean() - rate) < 0.08


def check_fusion(cls: type[Fusion], case: Case) -> None:
    """Gives the map that it declares, from the level below and, where there is one, the one above; in channels_last."""
    fusion = build(cls, case)
    for batch in (1, 2):
        below, above = features(case.site.inp, batch).map, features(Shape(48, (3, 2)), batch).map
        out = fusion(below, above)
        assert out.shape == (batch, fusion.out.dim, *fusion.out.grid)
        assert fusion.out.dim == case.site.dim
        assert_channels_last(out)
        assert not torch.allclose(out, fusion(below))
    check_module(fusion, below, above)
    first = cls(case.site, None, **case.args)
    assert {name.partition(".")[0] for name, _ in first.named_parameters()} <= {"down"}
    assert first(below).shape == out.shape


PART_CHECKS: dict[type, Callable[[Any, Case], None]] = {
    Mixer: check_mixer,
    FeedForward: check_feed_forward,
    Norm: check_norm,
    Gate: check_gate,
    Act: check_act,
    Head: check_head,
    Position: check_position,
    Residual: check_residual,
    Fusion: check_fusion,
}
