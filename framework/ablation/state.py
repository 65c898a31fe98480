"""The folder is the state of a study: what each run is (config.yaml), how far it is (status.json), what all are for.

Everything is written whole or not at all, so that a reader never sees a part, and a killed study can go on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

import yaml

from framework.ablation.grid import Ablation, Cell, Document
from framework.errors import ConfigError

State = Literal["waiting", "running", "finished", "interrupted", "failed", "stopped"]

# What study.json must hold, of the study and of each cell.
ABOUT: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "metric": (str, list),
    "axes": dict,
    "seeds": list,
    "baseline": dict,
    "published": (dict, NoneType),
    "cells": list,
}
CELL: dict[str, type | tuple[type, ...]] = {"folder": str, "choices": dict, "params": int, "macs": int}
Dump = Callable[[Document], str]
Measures = dict[str, dict[str, int]]


@dataclass
class Status:
    """How far a run is.

    Args:
        state: an interrupted run goes on from its checkpoint; a failed one says why in `error`; a stopped one was
            found hopeless at its `epoch`, and never goes on.
        epoch: epochs done.
        epochs: epochs to do.
        metrics: the last ones.
        measures: what it took: params, macs, seconds.
        error: one line.
    """

    state: State = "waiting"
    epoch: int = 0
    epochs: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def values(self) -> dict[str, float]:
        """Its metrics as they count in a comparison."""
        return counted(self.metrics)

    @property
    def final(self) -> bool:
        """Whether nobody works on this run any more."""
        return self.state in ("finished", "interrupted", "failed", "stopped")

    @property
    def over(self) -> bool:
        """Whether nobody will work on this run again."""
        return self.state in ("finished", "stopped")


def counted(metrics: dict[str, float]) -> dict[str, float]:
    """Metrics of one epoch, those of a stage whose loss (`val/loss` beside `val/acc1`) has diverged as nan.

    A net of nan takes every image for class 0, and so has an accuracy all the same.
    """

    def diverged(name: str) -> bool:
        stage, slash, _ = name.rpartition("/")
        return bool(slash) and not math.isfinite(metrics.get(f"{stage}/loss", 0.0))

    return {name: math.nan if diverged(name) else value for name, value in metrics.items()}


def read_status(folder: Path) -> Status:
    """The status of a run; one that cannot be read, has a value of another type, or is not there, is waiting."""
    try:
        data = json.loads((folder / "status.json").read_text(encoding="utf-8"))
        status = Status(**{each.name: data[each.name] for each in fields(Status) if each.name in data})
        numbers = [status.epoch, status.epochs, *status.metrics.values(), *status.measures.values()]
    except (OSError, ValueError, TypeError, AttributeError):
        return Status()
    sound = status.state in get_args(State) and all(isinstance(number, int | float) for number in numbers)
    return status if sound and isinstance(status.error, str) else Status()


def write_status(folder: Path, status: Status) -> None:
    write_text(folder / "status.json", json.dumps(asdict(status), indent=1))


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader, and a power loss, finds the old text or the new one, and never a part of it."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def check(study: Path, ablation: Ablation, cells: list[Cell], dump: Dump) -> list[str]:
    """The text of each cell's config.yaml.

    Raises:
        ConfigError: the folder holds runs of another study, or of other configs.
    """
    mend = "take another ablation.name, or move the folder away"
    if (study / "study.json").exists():
        axes = list(read_study(study)["axes"])
        if axes != list(ablation.axes):
            raise ConfigError(f"{study}: has the axes {', '.join(axes)}, not {', '.join(ablation.axes)}; {mend}")
    texts = [dump(cell.document) for cell in cells]
    for cell, text in zip(cells, texts, strict=True):
        path = study / cell.folder / "config.yaml"
        if not path.exists():
            continue
        try:
            if (old := path.read_text(encoding="utf-8")) == text:
                continue
            # Both through the same loader: what it makes of a value does not matter, only whether it is the same.
            found = list(differences(yaml.safe_load(old), yaml.safe_load(text)))
        except (ValueError, yaml.YAMLError) as error:
            raise ConfigError(
                f"{path}: is damaged ({type(error).__name__}); delete it, or move the folder away"
            ) from None
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ConfigError(f"{path.parent}: was made with another config: {', '.join(found[:3])}{more}; {mend}")
    return texts


def prepare(study: Path, ablation: Ablation, cells: list[Cell], measures: Measures, dump: Dump) -> list[Path]:
    """Makes the folders of a study; what is there already stays.

    Args:
        study: the study's folder.
        ablation: what varies.
        cells: the runs.
        measures: params and macs by `Cell.group`.
        dump: the text of a config.

    Returns:
        The folders of the runs, in the order of `cells`.

    Raises:
        ConfigError: the folder holds runs of another study, or of other configs.
    """
    texts = check(study, ablation, cells, dump)
    folders = [study / cell.folder for cell in cells]
    for folder, text in zip(folders, texts, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.yaml").exists():
            write_text(folder / "config.yaml", text)
    data = asdict(ablation)
    data["axes"] = {axis: list(values) for axis, values in ablation.axes.items()}
    data["cells"] = [
        {"folder": group, "choices": choices, **measures[group]}
        for group, choices in {cell.group: cell.choices for cell in cells}.items()
    ]
    write_text(study / "study.json", json.dumps(data, indent=1, ensure_ascii=False))
    return folders


def read_study(study: Path) -> dict[str, Any]:
    """What `prepare` wrote about the study as a whole: all that a table needs beside the runs' statuses.

    Raises:
        ConfigError: there is no study in this folder, or its study.json is damaged.
    """
    path = study / "study.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{study}: is not the folder of a study: {error}") from error
    _need(about, ABOUT, f"{path}")
    for place, cell in enumerate(about["cells"]):
        _need(cell, CELL, f"{path}: cells[{place}]")
    return about


def _need(found: object, keys: Mapping[str, type | tuple[type, ...]], where: str) -> None:
    """Raises ConfigError where a mapping has not each of `keys` with a value of its type."""
    for key, kind in keys.items():
        if not isinstance(found, dict) or not isinstance(found.get(key, ...), kind):
            raise ConfigError(f"{where}: is damaged at {key!r}; delete it, and the next fit writes it anew")


def differences(old: object, new: object, path: str = "") -> Iterator[str]:
    """`key.of.the.value: old → new` for each value that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from differences(
                old.get(key, "(not set)"), new.get(key, "(not set)"), f"{path}.{key}" if path else key
            )
    elif old != new:
        yield f"{path}: {cut(old)} → {cut(new)}"


def cut(value: object, length: int = 60) -> str:
    """The value as text, with … for what is too long."""
    text = str(value)
    return text if len(text) <= length else f"{text[: length - 1]}…"
