"""The `ablation:` section of a config, and the cells that it spans: combinations of its axes, with every seed."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from framework.errors import ConfigError, suggest

Document = dict[str, Any]
Override = Callable[[Document, dict[str, Any], str], Document]
Choices = dict[str, str]
When = Mapping[str, Mapping[str, Collection[str]]]

# Sections that no value of an axis can set, as every cell has its own or all have one, and what is right.
FIXED = {
    "seed": "list seeds under ablation.seeds",
    "name": "each run is named by its axes and its seed",
    "ablation": "set it under ablation itself",
    "launcher": "all cells of a study have one",
}


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
        metric: what the table compares, or a list of it, the main one first. Names like acc1 are fractions and shown
            in per cent; of names like loss the lower is the better.
        baseline: axis → value that the others are compared with; an axis that is not named is compared like with like.
        mode: grid runs every combination; one_at_a_time the baseline, and what differs from it in one axis.
        zip: spelt `with` in a config: groups of axes that vary together, the first value of one with the first of the
            others, and so on.
        when: axis → other axis → its values beside which the first applies; elsewhere a cell has no value of it.
        published: the paper's own table.
    """

    name: str
    axes: dict[str, dict[str, dict[str, Any]]]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    metric: str | list[str] = "val/acc1"
    baseline: dict[str, Any] = field(default_factory=dict)
    mode: Literal["grid", "one_at_a_time"] = "grid"
    zip: list[list[str]] = field(default_factory=list, metadata={"key": "with"})
    when: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    published: Published | None = None

    @classmethod
    def read(cls, document: Document) -> Ablation:
        """The `ablation` of a document whose types are checked.

        Raises:
            ConfigError: nothing to vary, or something is named that is not there.
        """
        section = dict(document["ablation"])
        for key, right in (("name", "the study's folder"), ("axes", "what varies, as word: {none: {…}, learned: {…}}")):
            if key not in section:
                raise ConfigError(f"ablation.{key}: is missing; give {right}")
        section["axes"] = {
            _name(axis, "axes"): {_name(value, f"axes.{axis}"): settings for value, settings in values.items()}
            for axis, values in section["axes"].items()
        }
        section["baseline"] = {
            _name(axis, "baseline"): _name(value, f"baseline.{axis}")
            for axis, value in section.get("baseline", {}).items()
        }
        section["when"] = {
            axis: {other: [_name(value, f"when.{axis}") for value in values] for other, values in beside.items()}
            for axis, beside in section.get("when", {}).items()
        }
        if published := section.get("published"):
            for key, right in (("source", "the paper and its table"), ("rows", "the paper's number for each cell")):
                if key not in published:
                    raise ConfigError(f"ablation.published.{key}: is missing; give {right}")
            rows = {_name(row, "published.rows"): value for row, value in published["rows"].items()}
            section["published"] = Published(**{**published, "rows": rows})
        section["zip"] = section.pop("with", [])
        ablation = cls(**section)
        ablation._check()
        return ablation

    @property
    def folder(self) -> str:
        return _safe(self.name).lstrip(".")

    @property
    def metrics(self) -> list[str]:
        """The main one first."""
        return [self.metric] if isinstance(self.metric, str) else self.metric

    def choices(self) -> list[Choices]:
        """The cells without their seeds: in a grid the last axis varies fastest, one_at_a_time has the baseline first.

        Raises:
            ConfigError: a value is in no cell.
        """
        groups = [self._together(axis) for axis in self.axes]
        options = [
            [dict(zip(group, values, strict=True)) for values in zip(*(self.axes[axis] for axis in group), strict=True)]
            for place, group in enumerate(groups)
            if group not in groups[:place]
        ]
        found: Iterable[Iterable[Choices]]
        if self.mode == "grid":
            found = itertools.product(*options)
        else:
            found = ([self.baseline, option] for option in [{}, *itertools.chain(*options)])
        cells: dict[tuple[tuple[str, str], ...], Choices] = {}
        for parts in found:
            whole = {axis: value for part in parts for axis, value in part.items()}
            cell = applying({axis: whole[axis] for axis in self.axes}, self.when)
            cells.setdefault(tuple(cell.items()), cell)
        there = {choice for cell in cells for choice in cell}
        for axis, values in self.axes.items():
            for value in values:
                if (axis, value) not in there:
                    why = "" if self.mode == "grid" else "; mode one_at_a_time changes the baseline in one axis only"
                    raise ConfigError(f"ablation.when.{axis}: is never met, so no cell has {axis}={value}{why}")
        return list(cells.values())

    def _together(self, axis: str) -> list[str]:
        """The axes that vary together with this one, itself among them."""
        return next((group for group in self.zip if axis in group), [axis])

    def _check(self) -> None:
        if not self.folder:
            raise ConfigError(f"ablation.name: got {self.name!r}, which names no folder")
        if not self.axes:
            raise ConfigError("ablation.axes: nothing varies; give an axis, as word: {none: {…}, learned: {…}}")
        for axis, values in self.axes.items():
            if not values:
                raise ConfigError(f"ablation.axes.{axis}: has no values; give them as none: {{…}}, learned: {{…}}")
            for value, settings in values.items():
                if "plugins" in settings:  # they are loaded once, before anything is looked up
                    raise ConfigError(
                        f"ablation.axes.{axis}.{value}: sets plugins, which all cells share; put it beside ablation"
                    )
        for key, many in (("seeds", self.seeds), ("metric", self.metrics)):
            if not many:
                raise ConfigError(f"ablation.{key}: is empty; give at least one")
            if twice := _twice(many):
                raise ConfigError(f"ablation.{key}: {twice[0]} is there twice")
        # Settings are applied in the order of the axes: the second would win in every cell, and the first vary nothing.
        owner: dict[str, str] = {}
        for axis, values in self.axes.items():
            for key in {key for settings in values.values() for key in settings}:
                if hint := FIXED.get(key.split(".")[0]):
                    value = next(value for value, settings in values.items() if key in settings)
                    raise ConfigError(f"ablation.axes.{axis}.{value}: {key} would vary nothing; {hint}")
                if key in owner:
                    raise ConfigError(f"ablation.axes: {owner[key]} and {axis} both set {key}; one of them must not")
                owner[key] = axis
        self._check_zip()
        self._check_when()
        self._check_baseline()

    def _check_zip(self) -> None:
        for group in self.zip:
            for axis in group:
                self._known("with", axis)
            if len(group) < 2:
                raise ConfigError(f"ablation.with: got {group}; a group is two axes or more, as [dim, depth]")
            first, *others = group
            for axis in others:
                if len(self.axes[axis]) != len(self.axes[first]):
                    raise ConfigError(
                        f"ablation.with: {first} has {len(self.axes[first])} values and {axis} has "
                        f"{len(self.axes[axis])}; axes that vary together need equally many"
                    )
        if twice := _twice(itertools.chain(*self.zip)):
            raise ConfigError(f"ablation.with: {twice[0]} is there twice")

    def _check_when(self) -> None:
        for axis, beside in self.when.items():
            self._known("when", axis)
            for other, values in beside.items():
                self._known(f"when.{axis}", other)
                for value in values:
                    self._known(f"when.{axis}.{other}", other, value)
        for axis in self.when:
            above, new = set[str](), set(self.when[axis])
            while new:
                above |= new
                new = {other for each in new for other in self.when.get(each, {})} - above
            if axis in above:
                raise ConfigError(f"ablation.when.{axis}: would depend on itself")

    def _check_baseline(self) -> None:
        for axis, value in self.baseline.items():
            self._known("baseline", axis)
            self._known(f"baseline.{axis}", axis, value)
        if self.mode == "one_at_a_time" and (missing := [axis for axis in self.axes if axis not in self.baseline]):
            raise ConfigError(
                f"ablation.baseline: mode one_at_a_time needs a value of every axis; add {', '.join(missing)}"
            )
        for group in self.zip:
            named = next((axis for axis in group if axis in self.baseline), None)
            if named is None:
                continue
            place = list(self.axes[named]).index(self.baseline[named])
            whole = {axis: list(self.axes[axis])[place] for axis in group}
            if any(self.baseline.get(axis) != value for axis, value in whole.items()):
                right = ", ".join(f"{axis}: {value}" for axis, value in whole.items())
                raise ConfigError(f"ablation.baseline: {' and '.join(group)} vary together; give {right}")

    def _known(self, where: str, axis: str, value: str | None = None) -> None:
        """Raises ConfigError where there is no such axis, or no such value of it."""
        if axis not in self.axes:
            raise ConfigError(f"ablation.{where}: there is no axis {axis!r}; {suggest(axis, self.axes)}")
        if value is not None and value not in self.axes[axis]:
            raise ConfigError(f"ablation.{where}: there is no value {value!r}; {suggest(value, self.axes[axis])}")


@dataclass(frozen=True)
class Cell:
    """One run of a study: a value of each axis that applies, a seed, and the whole config that this makes."""

    choices: Choices
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
    """The cells of a document with an `ablation`, in the order of `Ablation.choices`, all seeds of a choice together.

    Args:
        document: a whole config.
        override: gives a new document with dotted settings applied; called with the place they come from.

    Raises:
        ConfigError: an `ablation` that makes no sense, or settings that do not fit the document.
    """
    ablation = Ablation.read(document)
    base = {key: value for key, value in document.items() if key != "ablation"}
    made: dict[tuple[tuple[str, str], ...], Document] = {}

    def make(choices: tuple[tuple[str, str], ...]) -> Document:
        """The document of the first few choices, which cells share."""
        if not choices:
            return base
        if choices not in made:
            axis, value = choices[-1]
            before, settings = make(choices[:-1]), ablation.axes[axis][value]
            made[choices] = override(before, settings, f"ablation.axes.{axis}.{value}") if settings else before
        return made[choices]

    firsts = [Cell(choices, ablation.seeds[0], make(tuple(choices.items()))) for choices in ablation.choices()]
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
            if names.count(row) > 1:
                raise ConfigError(f"ablation.published.rows: {row!r} means several cells; rename a value")
    return [
        Cell(cell.choices, seed, {**cell.document, "seed": seed, "name": f"{ablation.folder}/{cell.group}/seed={seed}"})
        for cell in firsts
        for seed in ablation.seeds
    ]


def applying(choices: Choices, when: When) -> Choices:
    """The choices without those of axes that do not apply beside the others."""

    def applies(axis: str) -> bool:
        beside = when.get(axis, {})
        return all(choices.get(other) in values and applies(other) for other, values in beside.items())

    return {axis: value for axis, value in choices.items() if applies(axis)}


def selection(words: Iterable[str], axes: Mapping[str, Collection[str]]) -> Callable[[Choices], bool]:
    """Whether a cell is one of those that `--only axis=value,value` names; every one where there are no words.

    Raises:
        ConfigError: something else than an axis and its values.
    """
    wanted: dict[str, set[str]] = {}
    for word in words:
        axis, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(f"--only: got {word!r}; give an axis and its values, as --only {next(iter(axes))}=…")
        if axis not in axes:
            raise ConfigError(f"--only: there is no axis {axis!r}; {suggest(axis, axes)}")
        for value in [text] if text in axes[axis] else text.split(","):
            if value not in axes[axis]:
                raise ConfigError(f"--only {axis}: there is no value {value!r}; {suggest(value, axes[axis])}")
            wanted.setdefault(axis, set()).add(value)
    return lambda choices: all(choices.get(axis) in values for axis, values in wanted.items())


def _twice(many: Iterable[Any]) -> list[Any]:
    return [each for each, count in Counter(many).items() if count > 1]


def _name(value: object, where: str) -> str:
    """A name from YAML, which reads 4 as a number and on, off, yes and no as booleans."""
    if value is None or isinstance(value, bool):
        raise ConfigError(f"ablation.{where}: YAML reads a name here as {value}; put it in quotes")
    return str(value)


def _safe(name: str) -> str:
    """`name` without what is unsafe in a file name, or used to join names."""
    return re.sub(r"[^\w.+-]+", "_", name)
