"""`Columns`: a macro-structure whose levels take any blocks, and whose training keeps the maps of one column alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from blocks.base import (
    Block,
    BlockFactory,
    BuildError,
    Features,
    NoPosition,
    Norm,
    NormFactory,
    Position,
    Shape,
    Site,
    show_grid,
)
from blocks.norms import NoNorm
from blocks.revcol import QUARTERS, Fusion, FusionFactory
from blocks.stems import PatchStem
from framework.backbones import WHERE, Backbone, Level, Stage, StageBlocks, make_stem
from framework.build import Section, check_rate, compose, meta_features, quiet_meta
from framework.data.base import Image
from framework.errors import reason
from framework.reversible import Maps, Reversible

LEAST = 1e-3
"""The least amount of α, by which reversing divides."""


def floored(alpha: Tensor) -> Tensor:
    """α with each entry moved away from 0 to `LEAST`, on its side."""
    return alpha.abs().clamp(min=LEAST).copysign(alpha)


class ColumnLevel(StageBlocks):
    """One level of a column: fusion, blocks, and the share `alpha` of the same level of the column before."""

    def __init__(self, names: list[str], blocks: list[Block], entry: bool, fusion: Fusion) -> None:
        super().__init__(names, blocks, entry)
        self.fusion = fusion
        self.alpha = nn.Parameter(torch.full((1, fusion.out.dim, 1, 1), 0.5))

    def branch(self, below: Tensor, above: Tensor | None = None) -> Tensor:
        """What it makes of the level below it and the one above."""
        features = Features(self.fusion(below, above))
        for _, _, block in self.steps():
            features = block(features)
        return features.map

    def add(self, map: Tensor, old: Tensor | None) -> Tensor:
        """`map` and its share of the column before. In the first column there is none, and α has a gradient of 0."""
        alpha = self.alpha if self.training else floored(self.alpha)
        return map + (0 * alpha if old is None else alpha * old)


class Column(nn.Module):
    """One column: a map for each level, from the stem's map and those of the column before."""

    def __init__(self, stages: dict[str, ColumnLevel]) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)

    @property
    def levels(self) -> list[ColumnLevel]:
        return [cast(ColumnLevel, level) for level in self.stages.values()]

    def forward(self, stem: Tensor, old: Maps | None) -> Maps:
        new: list[Tensor] = []
        for i, level in enumerate(self.levels):
            above = old[i + 1] if old and i + 1 < len(old) else None
            new.append(level.add(level.branch(new[-1] if new else stem, above), old[i] if old else None))
        return tuple(new)


class Columns(Backbone):
    """Columns side by side, each with all levels of a pyramid, between which maps are kept whole (RevCol).

    The stem feeds the first level of every column. A level joins the one below it in its column with the one above it
    in the column before (`fusion`), runs its blocks, and adds α times itself in the column before. Levels pass on their
    map alone: words that a pattern makes end in their level, and prefix tokens are refused.

    Its pyramid has the levels of the last column. With a multiple of 4 columns the final features carry, in `extra`,
    the last level's maps behind each quarter of them but the last (`QuarterHead`, `Reconstruction`).

    Args:
        stages: the levels in order, any number; their blocks keep width and grid.
        blocks: the blocks that patterns name, for all levels.
        columns: how many.
        stem: images to the first level's map.
        fusion: how a level begins.
        position: position encoding between tokens.
        word_position: position encoding between the words of one token.
        drop_path: stochastic depth: rate of each column's last block, growing linearly from 0 at its first.
        reversible: whether training works out the maps of all columns but the last again in its backward pass, in
            place of keeping them: the same gradients but for rounding, one more forward pass. Weights of 16 bits,
            sharded ones (FSDP2) and whatever a compiler traces are trained plainly.
        norm: the norm behind the last column's last level; RevCol has one behind the mean, in its head.

    Raises:
        BuildError: the parts do not fit together, or the stem gives more than a map.

    Source: RevCol, arXiv 2212.11696; megvii-research/RevCol models/revcol.py and revcol_function.py.
    """

    def __init__(
        self,
        image: Image,
        stages: dict[str, Stage],
        blocks: dict[str, BlockFactory],
        columns: int = 4,
        stem: BlockFactory = PatchStem,
        fusion: FusionFactory = Fusion,
        position: Position = NoPosition(),
        word_position: Position = NoPosition(),
        drop_path: float = 0.0,
        reversible: bool = True,
        norm: NormFactory = NoNorm,
    ) -> None:
        super().__init__()
        check_rate(drop_path, WHERE)
        if columns < 1:
            raise BuildError(f"{WHERE}.columns: got {columns}, must be at least 1")
        if not stages:
            raise BuildError(f"{WHERE}.stages: needs at least one level, for example s1: {{dim: 64, pattern: …}}")
        self.stem = make_stem(stem, image, next(iter(stages.values())).dim, position, word_position)
        if self.stem.out.prefix or self.stem.out.words:
            raise BuildError(
                f"{WHERE}.stem: Columns pass maps alone between their levels, but {type(self.stem).__name__} gives "
                + (f"{self.stem.out.prefix} prefix token(s); set prefix: 0 in it" if self.stem.out.prefix else "words")
            )
        self.reversible = reversible
        sections = {name: _section(name, stage, blocks) for name, stage in stages.items()}
        net: dict[str, Any] = {"drop_path": drop_path, "position": position, "word_position": word_position}
        belows = [self.stem.out]  # what each level gets from below
        with quiet_meta():
            for name, stage in stages.items():
                belows.append(_check_fusion(fusion, _site(name, stage, belows[-1]), None))
            shapes = belows[1:]
            aboves = [*shapes[1:], None]
            depth = 0
            for i, (name, stage) in enumerate(stages.items()):
                _check_fusion(fusion, _site(name, stage, belows[i]), aboves[i])
                made = compose([sections[name]], shapes[i], **net)[0]
                _check_level(sections[name], made[-1].out, shapes[i])
                depth += sum(block.counts for block in made)
        self.columns = nn.ModuleList()
        for number in range(columns):
            levels: dict[str, ColumnLevel] = {}
            index = 0
            for i, (name, stage) in enumerate(stages.items()):
                begin = fusion(_site(name, stage, belows[i]), aboves[i] if number else None)
                made = compose([sections[name]], shapes[i], depth=depth, index=index, check=False, **net)[0]
                index += sum(block.counts for block in made)
                levels[name] = ColumnLevel(sections[name].names(), made, bool(stage.entry), begin)
            self.columns.append(Column(levels))
        quarters = {columns * (i + 1) // 4 - 1: name for i, name in enumerate(QUARTERS)} if columns % 4 == 0 else {}
        self.quarters: dict[int, str] = quarters
        self.levels = [
            Level(name, shape.dim, round(image.size / shape.grid[0]))
            for name, shape in zip(stages, shapes, strict=True)
        ]
        self.out = replace(shapes[-1], extra=tuple(quarters.values()))
        self.norm = norm(self.out.dim)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def steps(self) -> Iterator[tuple[str, str, Block]]:
        for number, column in enumerate(self._columns()):
            for name, level in zip(column.stages, column.levels, strict=True):
                for key, alias, block in level.steps():
                    yield f"columns.{number}.stages.{name}.{key}", alias, block

    def layers(self) -> dict[str, int]:
        """Blocks are numbered through all columns; what joins levels goes with the block behind it."""
        found, layer = {f"stem.{name}": 0 for name, _ in self.stem.named_parameters()}, 0
        for number, column in enumerate(self._columns()):
            for name, level in zip(column.stages, column.levels, strict=True):
                prefix = f"columns.{number}.stages.{name}"
                found |= {f"{prefix}.{key}": layer + 1 for key, _ in level.named_parameters()}
                for key, _, block in level.steps():
                    layer += block.counts
                    found |= {f"{prefix}.{key}.{own}": layer for own, _ in block.named_parameters()}
        return found

    def forward(self, images: Tensor) -> Features:
        features, maps, extra = self._run(images)
        norm = cast(Norm, self.norm)
        return Features(norm.on_map(maps[-1]), extra={**(features.extra or {}), **extra} or None)

    def pyramid(self, images: Tensor) -> list[Tensor]:
        return list(self._run(images)[1])

    def _columns(self) -> list[Column]:
        return [cast(Column, column) for column in self.columns]

    def _run(self, images: Tensor) -> tuple[Features, Maps, dict[str, Tensor]]:
        """What the stem gives, the maps of the last column, and those behind quarters."""
        features = self.stem(Features(images.contiguous(memory_format=torch.channels_last)))
        columns = self._columns()
        if self.training:
            for column in columns:
                for level in column.levels:
                    # as released: the weight itself; not a change that earlier passes' gradients would notice
                    level.alpha.data.copy_(floored(level.alpha.data))
        dtype = columns[0].levels[0].alpha.dtype
        run = Reversible(columns, features.map, dtype) if self._reverses(features.map, dtype) else None
        maps: Maps | None = None
        extra = {}
        for number, column in enumerate(columns):
            maps = run.run(number, features.map, maps) if run else column(features.map, maps)
            if number in self.quarters:
                extra[self.quarters[number]] = maps[-1].to(dtype) if run else maps[-1]
        assert maps is not None
        return features, tuple(map.to(dtype) for map in maps) if run else maps, extra

    def _reverses(self, stem: Tensor, dtype: torch.dtype) -> bool:
        if not (self.reversible and self.training and torch.is_grad_enabled()):
            return False
        if torch.compiler.is_compiling() or stem.is_meta:
            return False
        # FSDP2 puts whole weights in the place of sharded ones, and only while their module runs.
        return dtype in (torch.float32, torch.float64) and not type(self).__name__.startswith("FSDP")


def _section(name: str, stage: Stage, blocks: dict[str, BlockFactory]) -> Section:
    """A level's blocks; the stride is taken before them."""
    where = f"{WHERE}.stages.{name}"
    Section(where, stage.pattern, stage.dim, stage.stride)  # checks the stride
    return Section(
        where, stage.pattern, stage.dim, 1, {**blocks, **stage.blocks}, stage.dims, stage.entry, stage.drop_path
    )


def _site(name: str, stage: Stage, below: Shape) -> Site:
    return Site(below, stage.dim, stage.stride, where=f"{WHERE}.stages.{name}.fusion")


def _check_fusion(factory: FusionFactory, site: Site, above: Shape | None) -> Shape:
    """What a level's beginning gives. Raises BuildError where it cannot be made, or gives something else."""
    try:
        made = factory(site, above)
        map = made.eval()(*(meta_features(shape).map for shape in (site.inp, above) if shape))
    except BuildError:
        raise
    except Exception as error:  # a block from outside may fail in any way
        raise BuildError(f"{site.where}: cannot be built: {reason(error)}") from error
    if map.shape[1:] != (site.dim, *made.out.grid):
        raise BuildError(f"{site.where}: gives a map {tuple(map.shape[1:])}, but its out declares {made.out}")
    return made.out


def _check_level(section: Section, out: Shape, want: Shape) -> None:
    """Raises BuildError where a level does not give the map that it begins with, in shape."""
    got = replace(out, words=None)
    if got != want:
        tokens = f" and {got.prefix} prefix token(s)" if got.prefix else ""
        raise BuildError(
            f"{section.where}: a level of columns keeps its {want.dim} × {show_grid(want.grid)} map, but "
            f"{section.pattern!r} gives {got.dim} × {show_grid(got.grid)}{tokens}; take blocks that keep width and "
            "grid, and no ClassToken"
        )
