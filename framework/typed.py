"""What constructor signatures say: the types that a config is walked beside."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin

REQUIRED = inspect.Parameter.empty


@dataclass(frozen=True)
class Slot:
    """A place for a class: what it must be a subclass of, and the types that its parent calls it with."""

    base: type
    given: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Argument:
    """One argument that a config can set: its type, and its default (`REQUIRED` where there is none)."""

    hint: Any
    default: Any = REQUIRED
    inherits: str = ""


class Arguments:
    """A hint for a mapping of the arguments of one fixed class, such as the Trainer."""

    def __init__(self, cls: type) -> None:
        self.cls = cls


def as_slot(hint: Any) -> Slot | None:
    """The slot that a hint means: a factory `Callable[[…], Base]`, or a class that is no dataclass or builtin."""
    if get_origin(hint) is Callable or get_origin(hint) is typing.get_origin(typing.Callable[[], int]):
        given, base = get_args(hint) or ((), object)
        if isinstance(base, type) and isinstance(given, list):
            return Slot(base, tuple(given))
        return None
    if not isinstance(hint, type) or get_args(hint) or dataclasses.is_dataclass(hint):
        return None
    if hint.__module__.partition(".")[0] in sys.stdlib_module_names or issubclass(hint, int | float | str | Enum):
        return None  # a value: numbers, text, paths, choices
    return Slot(hint)


def union(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a Union, else the hint alone."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def options(hint: Any) -> list[Any]:
    """The alternatives of a hint but null."""
    return [option for option in union(hint) if option is not type(None)] or [hint]


def allows_none(hint: Any) -> bool:
    return hint is Any or type(None) in union(hint)


@cache
def arguments(cls: type, hidden: int = 0) -> Mapping[str, Argument]:
    """What a config may set of `cls`: its constructor's arguments but the first `hidden`, or a dataclass's fields.

    Where the constructor has `**kwargs`, those of the classes that it extends too, to which these usually go.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    found: dict[str, Argument] = {}
    for init in _constructors(cls):
        hints = _hints(init)
        for name, parameter in list(inspect.signature(init).parameters.items())[1 + hidden :]:
            if parameter.kind in VARIABLE or name in found:
                continue
            default, field = parameter.default, fields.get(name)
            if field is not None and field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            inherits = field.metadata.get("inherits", "") if field else ""
            # "key": how a config spells a field whose name would be a keyword of Python
            key = field.metadata.get("key", name) if field else name
            found[key] = Argument(hints.get(name, Any), default, inherits)
    return found


def _hints(init: Callable[..., None]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(init)
    except (NameError, TypeError, AttributeError):
        return {}  # a class from outside whose annotations do not resolve: no types, but names


VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _constructors(cls: type) -> list[Callable[..., None]]:
    """The constructor of a class, and those of the classes above as far as `**kwargs` reach."""
    found = []
    for base in cls.__mro__:
        init = vars(base).get("__init__")
        if init is None:
            continue
        kinds = [p.kind for p in inspect.signature(init).parameters.values()][1:]
        if kinds and all(kind in VARIABLE for kind in kinds):
            continue  # object's, or one that only hands on
        found.append(init)
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return found


def takes_any(cls: type) -> bool:
    """Whether the constructor has `**kwargs`, which may also go elsewhere (DDPStrategy's do)."""
    own = _constructors(cls)[:1]
    return any(p.kind is p.VAR_KEYWORD for init in own for p in inspect.signature(init).parameters.values())


def default_class(default: Any) -> type | None:
    """The class that a slot's default means: a class itself, or the class of an instance such as `NoPosition()`."""
    if default is REQUIRED or default is None:
        return None
    return default if isinstance(default, type) else type(default)


def misfit(cls: type, slot: Slot) -> str:
    """Why `cls` cannot be called as the factory of `slot`; empty where it can."""
    init = next(iter(_constructors(cls)), None)
    parameters = list(inspect.signature(init).parameters.values())[1:] if init else []
    hints = _hints(init) if init else {}
    by_name = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    for i, given in enumerate(slot.given):
        want = given.__name__ if isinstance(given, type) else str(given)
        if i >= len(parameters) or parameters[i].kind in by_name:
            return f"its constructor must take {want} as argument {i + 1}"
        hint = hints.get(parameters[i].name, given)
        if isinstance(given, type) and isinstance(hint, type) and hint not in (given, Any):
            return f"its argument {i + 1}, {parameters[i].name}, must be {want}, not {hint.__name__}"
    return ""


def show(hint: Any) -> str:
    """A type in a user's words: `int`, `[int, …]`, `{name: Block}`, `Norm`, `tokens | map`."""
    slot = as_slot(hint)
    if slot is not None:
        return slot.base.__name__
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(map(str, args))
    if len(union(hint)) > 1:
        return " | ".join("null" if part is type(None) else show(part) for part in union(hint))
    if origin in (list, tuple):
        return f"[{show(args[0])}, …]" if origin is list or (len(args) == 2 and args[1] is ...) else (
            f"[{', '.join(show(part) for part in args)}]"
        )  # fmt: skip
    if origin is dict:
        return f"{{{'name' if args[0] is str else show(args[0])}: {show(args[1])}}}"
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")
