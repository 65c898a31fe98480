"""The `ablation:` section of a config, and the cells that it spans: every combination of its axes, with every seed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from framework.errors import ConfigError, suggest

Document = dict[str, Any]
Override = Callable[[Document, dict[str, Any], str], Document]


@dataclass
class Published:
    """The paper's own numbers, printed beside ours.

    Args:
        source: the paper, its table and what was measured there.
        rows: number by cell: the values of the axes, joined with "/" in the order of the axes.
        metric: what the numbers are, for the head of the column.
    """

    source: str
    rows: dict[str, float]
    metric: str = ""


@dataclass
class Ablation:
    """What varies in a study.

    Args:
        name: the study, and its folder.
        axes: axis → value → the dotted settings that make this value; `{}` is the base as it is.
        seeds: each cell runs once with each.
        metric: what the table compares. Names like acc1 are fractions and shown in per cent.
        baseline: axis → value that the others are compared with; an axis that is not named is compared like with like.
        published: the paper's own table.
    """

    name: str
    axes: dict[str, dict[str, dict[str, Any]]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    metric: str = "val/acc1"
    baseline: dict[str, Any] = field(default_factory=dict)
    published: Published | None = None

    @classmethod
    def read(cls, document: Document) -> Ablation:
        """The `ablation` of a document whose types are checked.

        Raises:
            ConfigError: nothing to vary, or a baseline or a published row that is not in the grid.
        """
        section = dict(document["ablation"])
        section["axes"] = {
            _name(axis, "axes"): {_name(value, f"axes.{axis}"): settings for value, settings in values.items()}
            for axis, values in section["axes"].items()
        }
        section["baseline"] = {
            _name(axis, "baseline"): _name(value, f"baseline.{axis}")
            for axis, value in section.get("baseline", {}).items()
        }
        if published := section.get("published"):
            rows = {_name(row, "published.rows"): value for row, value in published["rows"].items()}
            section["published"] = Published(**{**published, "rows": rows})
        ablation = cls(**section)
        ablation._check()
        return ablation

    @property
    def folder(self) -> str:
        return _safe(self.name).lstrip(".")

    def _check(self) -> None:
        if not self.folder:
            raise ConfigError(f"ablation.name: got {self.name!r}, which names no folder")
        if not self.axes:
            raise ConfigError("ablation.axes: nothing varies; give an axis, as word: {none: {…}, learned: {…}}")
        for axis, values in self.axes.items():
            if not values:
                raise ConfigError(f"ablation.axes.{axis}: has no values; give them as none: {{…}}, learned: {{…}}")
        if not self.seeds:
            raise ConfigError("ablation.seeds: is empty, so nothing would run; give at least one, as [0]")
        if twice := [seed for seed, count in Counter(self.seeds).items() if count > 1]:
            raise ConfigError(f"ablation.seeds: {twice[0]} is there twice")
        # Settings are applied in the order of the axes: the second would win in every cell, and the first vary nothing.
        owner: dict[str, str] = {}
        for axis, values in self.axes.items():
            for key in {key for settings in values.values() for key in settings}:
                if key in owner:
                    raise ConfigError(f"ablation.axes: {owner[key]} and {axis} both set {key}; one of them must not")
                owner[key] = axis
        for axis, value in self.baseline.items():
            if axis not in self.axes:
                raise ConfigError(f"ablation.baseline: there is no axis {axis!r}; {suggest(axis, self.axes)}")
            if value not in self.axes[axis]:
                raise ConfigError(
                    f"ablation.baseline.{axis}: there is no value {value!r}; {suggest(value, self.axes[axis])}"
                )


@dataclass(frozen=True)
class Cell:
    """One run of a study: a value of each axis, a seed, and the whole config that this makes."""

    choices: dict[str, str]
    seed: int
    document: Document

    @property
    def name(self) -> str:
        """The values alone, as published rows name them: `none/learned`."""
        return "/".join(self.choices.values())

    @property
    def group(self) -> str:
        """The folder that all seeds share: `sentence=none,word=learned`."""
        return ",".join(f"{_safe(axis)}={_safe(value)}" for axis, value in self.choices.items())

    @property
    def folder(self) -> str:
        """The folder of this run in that of the study: `sentence=none,word=learned/seed=0`."""
        return f"{self.group}/seed={self.seed}"


def cells(document: Document, override: Override) -> list[Cell]:
    """The cells of a document with an `ablation`: the last axis varies fastest, all seeds of a choice together.

    Args:
        document: a whole config.
        override: gives a new document with dotted settings applied; called with the place they come from.

    Raises:
        ConfigError: an `ablation` that makes no sense, or settings that do not fit the document.
    """
    ablation = Ablation.read(document)
    base = {key: value for key, value in document.items() if key != "ablation"}
    grid: list[tuple[dict[str, str], Document]] = [({}, base)]
    for axis, values in ablation.axes.items():
        grid = [
            ({**choices, axis: value}, override(made, settings, f"ablation.axes.{axis}.{value}") if settings else made)
            for choices, made in grid
            for value, settings in values.items()
        ]
    firsts = [Cell(choices, ablation.seeds[0], made) for choices, made in grid]
    groups: dict[str, Cell] = {}
    for cell in firsts:
        other = groups.setdefault(cell.group, cell)
        if other is not cell:
            raise ConfigError(
                f"ablation.axes: {other.name} and {cell.name} would share the folder {cell.group}; rename a value"
            )
    if ablation.published:
        names = [cell.name for cell in firsts]
        for row in ablation.published.rows:
            if row not in names:
                raise ConfigError(f"ablation.published.rows: there is no cell {row!r}; {suggest(row, names)}")
    return [
        Cell(cell.choices, seed, {**cell.document, "seed": seed, "name": f"{ablation.folder}/{cell.group}/seed={seed}"})
        for cell in firsts
        for seed in ablation.seeds
    ]


def _name(value: object, where: str) -> str:
    """A name from YAML, which reads 4 as a number and on, off, yes and no as booleans."""
    if value is None or isinstance(value, bool):
        raise ConfigError(f"ablation.{where}: YAML reads a name here as {value}; put it in quotes")
    return str(value)


def _safe(name: str) -> str:
    """`name` without what is unsafe in a file name, or used to join names."""
    return re.sub(r"[^\w.+-]+", "_", name)
