"""The catalogue: every class that a config can name, with its arguments, defaults and source."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from docstring_parser import parse

from blocks import base, heads, registry, residual, revcol
from framework import typed
from framework.ablation.launch import Launcher
from framework.backbones import Backbone
from framework.config import document_hints, load_plugins
from framework.data import ImageData
from framework.mix import Mix
from framework.objectives import Objective, Teacher
from framework.optim import Optimizer, Schedule
from framework.tasks import Task

# What may be asked for where, and how many arguments the parent gives.
KINDS: dict[str, tuple[type, int]] = {
    "task": (Task, 0),
    "backbone": (Backbone, 1),
    "block": (base.Block, 1),
    "mixer": (base.Mixer, 1),
    "feed-forward": (base.FeedForward, 1),
    "residual": (residual.Residual, 1),
    "fusion": (revcol.Fusion, 2),
    "gate": (base.Gate, 1),
    "norm": (base.Norm, 1),
    "activation": (base.Act, 0),
    "position": (base.Position, 0),
    "head": (heads.Head, 2),
    "mix": (Mix, 0),
    "objective": (Objective, 0),
    "teacher": (Teacher, 0),
    "optimizer": (Optimizer, 0),
    "schedule": (Schedule, 0),
    "data": (ImageData, 0),
    "launcher": (Launcher, 0),
}


@dataclass(frozen=True)
class ArgumentEntry:
    """One argument: its name, its type and default as a config writes them, and what it means."""

    name: str
    type: str
    default: str
    text: str


@dataclass(frozen=True)
class Entry:
    """One class of the catalogue."""

    name: str
    kind: str
    path: str
    summary: str
    text: str
    source: str
    arguments: list[ArgumentEntry]


def catalogue(plugins: Iterable[str] = ()) -> list[Entry]:
    """Every class that a config can name, by kind and name.

    Raises:
        ConfigError: a plug-in cannot be loaded.
    """
    document_hints()  # imports everything that registers
    load_plugins(plugins)
    entries = []
    for kind, (root, hidden) in KINDS.items():
        for _, classes in sorted(registry.usable(root).items()):
            entries += [_entry(cls, kind, hidden) for cls in classes]
    return entries


def entry_of(entries: Iterable[Entry], name: str) -> Entry | None:
    """The entry called `name`, whatever its case, or None."""
    return next((e for e in entries if e.name == name), None) or next(
        (e for e in entries if e.name.lower() == name.lower()), None
    )


def _entry(cls: type, kind: str, hidden: int) -> Entry:
    doc = parse(inspect.getdoc(cls) or "")
    texts = {p.arg_name: " ".join((p.description or "").split()) for p in doc.params}
    if dataclasses.is_dataclass(cls) and not doc.params and (cls.__doc__ or "").startswith(cls.__name__ + "("):
        doc = parse("")  # the signature that dataclasses write where there is no docstring
    found = typed.arguments(cls, hidden)
    return Entry(
        name=cls.__name__,
        kind=kind,
        path=f"{cls.__module__}.{cls.__qualname__}",
        summary=doc.short_description or "",
        text=(doc.description or "").strip(),
        source=str(getattr(cls, "source", "") or _source(cls)),
        arguments=[
            ArgumentEntry(name, typed.show(a.hint), _default(a.default), texts.get(name, ""))
            for name, a in found.items()
        ],
    )


def _source(cls: type) -> str:
    """What stands behind "Source:" in a docstring, which docstring_parser does not know."""
    found = re.search(r"^Source: (.+(?:\n[ \t]+\S.*)*)", inspect.getdoc(cls) or "", re.MULTILINE)
    return " ".join(found[1].split()) if found else ""


def _default(default: Any) -> str:
    if default is typed.REQUIRED:
        return "required"
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, type):
        return default.__name__
    if isinstance(default, int | float | str | list | tuple | dict):
        return str(list(default) if isinstance(default, tuple) else default) or '""'
    return type(default).__name__
