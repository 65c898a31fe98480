"""The composer: patterns and factories to a chain of blocks, each checked on the meta device before any is made.

It knows no block by name and inserts nothing. A section offers its width and its stride; the stride is offered on
along the pattern until a block takes it, which shows in the grid of its `out`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blocks.base import Block, BlockFactory, BuildError, Features, NoPosition, Position, Shape, Site
from framework.errors import reason, suggest
from framework.pattern import expand


@dataclass(frozen=True)
class Section:
    """A run of blocks that share width and stride: a stage of a pyramid, or the whole of an isotropic net.

    Args:
        where: config path, for messages.
        pattern: which blocks, in the stacking language.
        dim: width offered to its blocks.
        stride: how much the map should shrink inside the section.
        blocks: the factories that the pattern names.
        dims: another width for some names.
        entry: name of a block that runs before the pattern.
        drop_path: rate of the section's last block, growing linearly from 0 at its first, or the rates of both; None:
            the net's rule.
    """

    where: str
    pattern: str
    dim: int
    stride: int = 1
    blocks: Mapping[str, BlockFactory] = field(default_factory=dict)
    dims: Mapping[str, int] = field(default_factory=dict)
    entry: str = ""
    drop_path: float | tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for rate in self.drop_path_ends or ():
            check_rate(rate, self.where)
        sizes = {"dim": self.dim, "stride": self.stride} | {f"dims.{name}": dim for name, dim in self.dims.items()}
        for what, value in sizes.items():
            if value < 1:
                raise BuildError(f"{self.where}.{what}: got {value}, must be at least 1")

    @property
    def drop_path_ends(self) -> tuple[float, float] | None:
        """The rates of its first and its last block; None where the net's rule gives them."""
        return (0.0, self.drop_path) if isinstance(self.drop_path, int | float) else self.drop_path

    def names(self) -> list[str]:
        """The names of its blocks in order, the entry first. Raises BuildError where one is not there."""
        for name in self.dims:
            if name not in self.blocks:
                raise BuildError(f"{self.where}.dims: unknown block {name!r} ({suggest(name, self.blocks)})")
        names = expand(self.pattern, self.blocks.keys(), f"{self.where}.pattern")
        if self.entry:
            if self.entry not in self.blocks:
                near = suggest(self.entry, self.blocks)
                raise BuildError(f"{self.where}.entry: unknown block {self.entry!r} ({near})")
            names = [self.entry, *names]
        if not names:
            raise BuildError(f"{self.where}.pattern: names no block; there are: {', '.join(self.blocks) or 'none'}")
        return names


def compose(
    sections: Sequence[Section],
    shape: Shape,
    *,
    drop_path: float = 0.0,
    position: Position = NoPosition(),
    word_position: Position = NoPosition(),
    depth: int = 0,
    index: int = 0,
    check: bool = True,
) -> list[list[Block]]:
    """The blocks of each section, on the current default device.

    Twice over: first every block is made and run on the meta device, on the real output of the one before it, and
    what it gives is compared with its `out`; then, with the net's depth known, all are made for real.

    Args:
        sections: what to build, in order.
        shape: what comes in.
        drop_path: rate of the last block; it grows linearly from 0 at the first (DeiT's and Next-ViT's rule).
        position: the net's position encoding between tokens.
        word_position: the net's position encoding between words.
        depth: number of counting blocks in the whole net where these sections are only a part of it, else 0.
        index: number of the first counting block in the whole net.
        check: whether blocks are run on the meta device; not needed for sections that were composed before.

    Raises:
        BuildError: a block does not fit, or does not give what it declares; one line with the place and the fix.
    """
    with quiet_meta():
        planned = list(_chain(sections, shape, position, word_position, [0.0], check))
    if not depth:
        depth = sum(block.counts for _, block in planned)
    rates = linear_rates(0.0, drop_path, max(depth, 1))
    for stage, section in enumerate(sections):
        count = sum(block.counts for at, block in planned if at == stage)
        if section.drop_path_ends is not None:
            first = index + sum(block.counts for at, block in planned if at < stage)
            rates[first : first + count] = linear_rates(*section.drop_path_ends, count)
    built: list[list[Block]] = [[] for _ in sections]
    for (stage, block), (_, plan) in zip(
        _chain(sections, shape, position, word_position, rates, check=False, depth=depth, index=index),
        planned,
        strict=True,
    ):
        if block.out != plan.out:
            raise BuildError(f"{sections[stage].where}: {type(block).__name__} gives another shape on the meta device")
        built[stage].append(block)
    return built


def linear_rates(first: float, last: float, count: int) -> list[float]:
    """Stochastic depth of `count` blocks: from `first` at the first to `last` at the last."""
    return [first + (last - first) * (i / max(count - 1, 1)) for i in range(count)]


def check_rate(drop_path: float, where: str) -> None:
    """Raises BuildError where it is no rate."""
    if not 0 <= drop_path < 1:
        raise BuildError(f"{where}.drop_path: got {drop_path}, must be at least 0 and less than 1")


@contextmanager
def quiet_meta() -> Iterator[None]:
    """New tensors are meta tensors, and nothing is drawn from the random generator of the caller."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        yield


def _chain(
    sections: Sequence[Section],
    shape: Shape,
    position: Position,
    word_position: Position,
    rates: Sequence[float],
    check: bool,
    depth: int = 1,
    index: int = 0,
) -> Iterator[tuple[int, Block]]:
    features = meta_features(shape) if check else None
    before: tuple[Block, Features, Features] | None = None  # the last block that was run, with what came in and out
    for stage, section in enumerate(sections):
        stride, entered = section.stride, shape.grid[0]
        for place, name in enumerate(section.names()):
            site = Site(
                inp=shape,
                dim=section.dims.get(name, section.dim),
                stride=stride,
                stage=stage,
                place=place,
                index=index,
                depth=depth,
                drop_path=rates[min(index, len(rates) - 1)],
                where=f"{section.where}.blocks.{name}",
                position=position,
                word_position=word_position,
            )
            block = make_block(section.blocks[name], site)
            if features is not None:
                given = features
                if before is not None and alike((block.eval(), given), before[:2]):
                    features = before[2]
                else:
                    features = check_block(block, given, f"{section.where}, block {place} '{name}'")
                    before = block, given, features
            if block.out.grid != shape.grid:
                stride = 1
            shape = block.out
            index += block.counts
            yield stage, block
        took = round(entered / shape.grid[0])
        exact = (entered // section.stride, -(-entered // section.stride))  # 10 by 4: 2 or 3
        if section.stride > 1 and stride == 1 and took != section.stride and shape.grid[0] not in exact:
            raise BuildError(f"{section.where}: its blocks shrink the map by {took}, not by stride {section.stride}")
        if stride > 1:
            raise BuildError(
                f"{section.where}: no block of {section.pattern!r} takes stride {stride}; put one first that shrinks "
                "the map (ConvEmbed, Merge, NCB), or set stride: 1"
            )


def alike(a: Any, b: Any, seen: set[tuple[int, int]] | None = None) -> bool:
    """Whether modules, or other values, hold the same, so that the forward of the one is that of the other.

    Of tensors their form counts. What cannot be compared is not alike.

    Args:
        seen: what is being compared already, where things hold each other.
    """
    seen = set() if seen is None else seen
    if a is b or (id(a), id(b)) in seen:
        return True
    seen.add((id(a), id(b)))
    if type(a) is not type(b):
        return False
    if (isinstance(a, nn.Module) or is_dataclass(a)) and hasattr(a, "__dict__"):  # a dataclass may have slots
        return alike(vars(a), vars(b), seen)
    if isinstance(a, Tensor):
        return a.shape == b.shape and a.dtype is b.dtype and a.stride() == b.stride()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(alike(value, b[key], seen) for key, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(alike(x, y, seen) for x, y in zip(a, b, strict=True))
    return isinstance(a, int | float | str | set | frozenset) and a == b


def make_block(factory: BlockFactory, site: Site) -> Block:
    """The block of one site. Raises BuildError, with the place, where it cannot be made or sets no `out`."""
    try:
        block = factory(site)
    except BuildError as error:
        # Parts without a site (positions, heads) cannot say where they are.
        if site.where and not str(error).startswith("model."):
            raise BuildError(f"{site.where}: {error}") from None
        raise
    except Exception as error:  # a block from outside may fail in any way, and so may torch at odd arguments
        raise BuildError(f"{site.where}: cannot be built: {reason(error)}") from error
    if not isinstance(getattr(block, "out", None), Shape):
        raise BuildError(f"{site.where}: {type(block).__name__} does not set self.out, the Shape that it gives")
    return block


def meta_features(shape: Shape, batch: int = 2) -> Features:
    """Empty features of `shape` on the meta device."""
    words = shape.words
    return Features(
        map=torch.empty(batch, shape.dim, *shape.grid, device="meta", memory_format=torch.channels_last),
        prefix=torch.empty(batch, shape.prefix, shape.dim, device="meta") if shape.prefix else None,
        words=None
        if words is None
        else torch.empty(batch * words.over[0] * words.over[1], words.count, words.dim, device="meta"),
    )


def check_block(block: Block, features: Features, where: str) -> Features:
    """Runs `block` on meta features and compares what comes out with its `out`.

    Raises:
        BuildError: its forward fails, or gives another shape than it declares.
    """
    name = type(block).__name__
    got = f"map {_show(features.map)}" + "".join(
        f", {part} {_show(value)}" for part in ("prefix", "words") if (value := getattr(features, part)) is not None
    )
    try:
        out = block.eval()(features)
    except Exception as error:  # a block from outside may fail in any way
        raise BuildError(f"{where}: {name}.forward fails on {got}: {reason(error)}") from error
    if not isinstance(out, Features) or not isinstance(out.map, Tensor):
        raise BuildError(f"{where}: {name}.forward must give Features, got {type(out).__name__}")
    want = meta_features(block.out, features.map.shape[0])
    for part in ("map", "prefix", "words"):
        expected, found = getattr(want, part), getattr(out, part)
        if (expected is None) != (found is None) or (expected is not None and expected.shape != found.shape):
            stale = ""
            if part == "prefix" and found is not None and found.shape[-1] != block.out.dim:
                stale = " (the prefix kept the old width; put ClassToken behind the block that changes it)"
            raise BuildError(
                f"{where}: {name}.forward gives {part} {_show(found)}, but its out declares {_show(expected)}{stale}"
            )
    return out


def _show(value: Tensor | None) -> str:
    return "none" if value is None else f"({', '.join(map(str, value.shape))})"
