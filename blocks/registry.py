"""The door to the class tree, which is the registry: list, find, and bring in classes from outside.

Subclassing a base class is all that registering takes; there is no table of names.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import re
import sys
import sysconfig
import traceback
from abc import ABC
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType

ENTRY_POINTS = "tessera.plugins"


class Unknown(LookupError):
    """No class has this name: another one may have been meant."""


def subclasses(base: type) -> Iterator[type]:
    """Every imported class below `base`, each once, in the order of definition."""
    seen: dict[type, None] = {}

    def below(cls: type) -> None:
        sub: type
        for sub in cls.__subclasses__():
            if sub not in seen:
                seen[sub] = None
                below(sub)

    below(base)
    return iter(seen)


def _abstract(cls: type) -> bool:
    """Whether a class lacks methods, or says by naming ABC itself that it is only a base."""
    return inspect.isabstract(cls) or ABC in cls.__bases__


def usable(base: type) -> dict[str, list[type]]:
    """Public, concrete classes that may stand where `base` is asked for, by short name."""
    found: dict[str, list[type]] = {}
    for cls in (base, *subclasses(base)):
        if not _abstract(cls) and not cls.__name__.startswith("_"):
            found.setdefault(cls.__name__, []).append(cls)
    return found


def _lacks(cls: type) -> str:
    """What a class that should be usable has not; empty where it is meant as a base, or lacks nothing."""
    if ABC in cls.__bases__ or not inspect.isabstract(cls) or cls.__subclasses__():
        return ""
    return f"lacks {', '.join(sorted(cls.__abstractmethods__))}"  # type: ignore[attr-defined]


def find(base: type, name: str) -> type:
    """The class that `name`, short or a full import path, means where a `base` is asked for.

    Raises:
        LookupError: there is none, it is no `base`, it is abstract, or a short name is not unique; says so in one
            line, without suggestions.
    """
    if "." in name:
        module_name, _, attribute = name.rpartition(".")
        if not all(name.split(".")):
            raise LookupError(f"{name!r} is no import path; write package.module.Class")
        try:
            cls = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            raise LookupError(f"cannot import {name!r}: {error}") from error
        if not isinstance(cls, type) or not issubclass(cls, base):
            raise LookupError(f"{name!r} is no {base.__name__}")
        if _abstract(cls):
            raise LookupError(f"{name!r} {_lacks(cls) or 'is abstract; name a class below it'}")
        return cls
    found = usable(base).get(name, [])
    if len(found) > 1:
        paths = ", ".join(f"{cls.__module__}.{cls.__qualname__}" for cls in found[:4]) + ", …" * (len(found) > 4)
        raise LookupError(f"{name!r} means several classes; give the full path of one: {paths}")
    if not found:
        for cls in subclasses(base):
            if cls.__name__ == name and (lacks := _lacks(cls)):
                raise LookupError(f"{cls.__module__}.{cls.__qualname__} {lacks}, which a {base.__name__} must have")
        raise Unknown(f"unknown {base.__name__} {name!r}")
    return found[0]


def load_plugin(spec: str) -> ModuleType:
    """Imports a plug-in: a Python file, whose folder is then importable too, or an import path.

    Loading a file twice gives the module that is there.

    Raises:
        LookupError: there is no such file or module, or it fails while it is imported.
    """
    path = Path(spec).resolve()
    if not spec.strip():
        raise LookupError(f"got {spec!r}, must be a Python file (.py) or an import path")
    folder = f"{spec}: is a folder, not a file; name a Python file in it, or an import path" if path.is_dir() else ""
    if folder and (spec.endswith(".py") or not all(part.isidentifier() for part in spec.split("."))):
        raise LookupError(folder)
    if spec.endswith(".py"):
        if not path.is_file():
            raise LookupError(f"no such file: {spec}")
        present = sys.modules.get(path.stem)
        if present is not None:
            if getattr(present, "__file__", None) and Path(str(present.__file__)).resolve() == path:
                return present
            raise LookupError(f"{spec}: a module called {path.stem!r} is loaded already; rename the file")
    try:
        module = _execute(path) if spec.endswith(".py") else importlib.import_module(spec)
    except (Exception, SystemExit) as error:  # a plug-in may fail in any way
        if folder and isinstance(error, ModuleNotFoundError) and error.name == spec:
            raise LookupError(folder) from error
        raise LookupError(f"plug-in {spec} fails: {_one_line(error)}") from error
    if getattr(module, "__file__", None) is None and hasattr(module, "__path__"):
        raise LookupError(folder or f"{spec}: is a folder without __init__.py; name a module in it")
    return module


def _execute(path: Path) -> ModuleType:
    """A Python file as the module of its name."""
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[path.stem] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def load_entry_points() -> None:
    """Imports what installed packages offer under the entry-point group `tessera.plugins`.

    Raises:
        LookupError: one of them fails while it is imported.
    """
    _load_entry_points(tuple(sys.path))


@cache
def _load_entry_points(path: tuple[str, ...]) -> None:
    """Once for each search path: looking through all installed packages takes a while."""
    for point in entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except (Exception, SystemExit) as error:  # a plug-in may fail in any way
            raise LookupError(f"plug-in {point.value} fails: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    """`KeyError: 'x' (my_block.py, line 12)`: the place is the last one outside libraries, where there is one."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError):
        return text  # says it itself
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not re.search(r"^<frozen |[/\\]importlib[/\\]", frame.filename)
    ]
    libraries = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
    frames = [frame for frame in frames if not frame.filename.startswith(libraries)] or frames
    return f"{text} ({os.path.basename(frames[-1].filename)}, line {frames[-1].lineno})" if frames else text
