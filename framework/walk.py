"""The typed walk: a layer of config merged into what is there, beside the constructor signatures.

It makes values canonical (where the type is a slot, a bare name or a mapping without `class_path` becomes
`{class_path, init_args}`), and raises at the first mistake with its full path. The rules of a merge:

- mappings merge; the same class merges its arguments, another class replaces the slot;
- null takes a key away, where the type does not allow null as a value; a slot always needs a class;
- anything else replaces.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from blocks import registry
from framework import typed
from framework.errors import ConfigError, suggest
from framework.typed import REQUIRED, Argument, Arguments, Slot

Path = tuple[str, ...]
CLASS, ARGS = "class_path", "init_args"
ABSENT = object()


class Walk:
    """One layer's walk.

    Args:
        source: where the layer comes from (a file, an option), for messages.
        partial: whether mappings whose class is not known yet are let through where the type says that they
            inherit one; else they are errors.
    """

    def __init__(self, source: str = "", partial: bool = True) -> None:
        self.source = source
        self.partial = partial

    def error(self, path: Path, message: str) -> ConfigError:
        at = ".".join(path)
        return ConfigError(": ".join(part for part in (self.source, at, message) if part))

    def merge(self, hint: Any, base: Any, layer: Any, path: Path, default: Any = REQUIRED, lazy: bool = False) -> Any:
        """`layer` over `base` (or `ABSENT`), canonical and checked against `hint`.

        `default` is the default of the argument: it gives a slot its class where neither side names one. `lazy`
        marks a slot that inherits its class later.
        """
        if isinstance(hint, Arguments):
            return self._arguments(typed.arguments(hint.cls), hint.cls, base, layer, path)
        if layer is None:
            if typed.allows_none(hint):
                return None
            raise self.error(path, f"null is not a value here; give {self._example(hint)}, or leave the key out")
        slot = typed.as_slot(hint)
        if slot is not None:
            return self._slot(slot, base, layer, path, default, lazy)
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            return self._arguments(typed.arguments(hint), hint, base, layer, path)
        options = typed.options(hint)
        if len(options) > 1:
            return self._union(options, hint, base, layer, path, default)
        if options[0] is not hint:
            return self.merge(options[0], base, layer, path, default, lazy)
        origin, args = get_origin(hint), get_args(hint)
        if origin is dict or hint is dict:
            return self._mapping(args[1] if args else Any, base, layer, path, lazy)
        if origin in (list, tuple) or hint in (list, tuple):
            return self._sequence(hint, layer, path)
        return self._scalar(hint, layer, path)

    def _slot(self, slot: Slot, base: Any, layer: Any, path: Path, default: Any, lazy: bool) -> Any:
        base_class = base.get(CLASS) if isinstance(base, Mapping) else None
        name, args = self._class_and_args(slot, layer, path)
        if name is None and base_class is None and default is REQUIRED:
            if lazy and self.partial:
                return {ARGS: _raw_merge(base.get(ARGS, {}) if isinstance(base, Mapping) else {}, args)}
            if not isinstance(layer, Mapping) or ARGS not in layer:
                known = suggest("", registry.usable(slot.base))
                raise self.error(path, f"names no {slot.base.__name__}; write a name, or class_path: … ({known})")
            raise self.error(path, f"names no class for these arguments; add class_path with a {slot.base.__name__}")
        standard = typed.default_class(default)
        named = name or base_class
        cls = self.find(slot, named, path) if named else standard
        assert cls is not None
        if reason := typed.misfit(cls, slot):
            raise self.error(path, f"{cls.__name__} does not fit here: {reason}")
        before: Any = {}
        if isinstance(base, Mapping):
            was = self.find(slot, base_class, path) if base_class else standard
            if was is cls or base_class is None:
                before = base.get(ARGS, {})
        known_args = typed.arguments(cls, len(slot.given))
        merged = self._arguments(known_args, cls, before, args, path, open=typed.takes_any(cls))
        written = named or cls.__name__
        if standard is cls and not registry.usable(slot.base).get(cls.__name__):
            written = f"{cls.__module__}.{cls.__qualname__}"
        return {CLASS: written, ARGS: merged} if merged else {CLASS: written}

    def _class_and_args(self, slot: Slot, layer: Any, path: Path) -> tuple[str | None, Mapping[str, Any]]:
        if isinstance(layer, str):
            return layer, {}
        if not isinstance(layer, Mapping):
            raise self.error(path, f"expected a {slot.base.__name__} (a name or a mapping of arguments), got {layer!r}")
        if CLASS not in layer and ARGS not in layer:
            return None, layer
        extra = set(layer) - {CLASS, ARGS}
        if extra:
            key = sorted(map(str, extra))[0]
            raise self.error((*path, key), f"stands beside {CLASS}; move it under {ARGS}")
        name, args = layer.get(CLASS), layer.get(ARGS)
        if name is not None and not isinstance(name, str):
            raise self.error((*path, CLASS), f"expected a class name, got {name!r}")
        if args is not None and not isinstance(args, Mapping):
            raise self.error((*path, ARGS), f"expected a mapping of arguments, got {args!r}")
        return name, args or {}

    def find(self, slot: Slot, name: str, path: Path) -> type:
        try:
            return registry.find(slot.base, name)
        except LookupError as error:
            unknown = isinstance(error, registry.Unknown)
            hint = f" ({suggest(name, registry.usable(slot.base))})" if unknown else ""
            if hint and not registry.usable(slot.base):
                hint = " (give the full import path, for example package.module.Class)"
            raise self.error(path, f"{error}{hint}") from None

    def _arguments(
        self, known: Mapping[str, Argument], cls: type, base: Any, layer: Any, path: Path, open: bool = False
    ) -> dict[str, Any]:
        if not isinstance(layer, Mapping):
            raise self.error(path, f"expected a mapping with the arguments of {cls.__name__}, got {layer!r}")
        merged = dict(base) if isinstance(base, Mapping) else {}
        for key, value in layer.items():
            key = self._name(key, path)
            if key not in known:
                if open:
                    merged[key] = value
                    continue
                raise self.error((*path, key), f"{cls.__name__} has no such argument ({suggest(key, known)})")
            argument = known[key]
            stays = typed.as_slot(argument.hint) is not None or typed.allows_none(argument.hint)
            if value is None and key in merged and not stays:
                del merged[key]
                continue
            before = merged.get(key, ABSENT)
            merged[key] = self.merge(
                argument.hint, before, value, (*path, key), argument.default, lazy=bool(argument.inherits)
            )
        return merged

    def _name(self, key: Any, path: Path) -> str:
        """A key as a name; a number is a fine one."""
        if isinstance(key, bool) or not isinstance(key, str | int | float):
            raise self.error(path, f"the key {key!r} is no name (YAML reads on, off, yes, no and null so: quote it)")
        return str(key)

    def _mapping(self, value_hint: Any, base: Any, layer: Any, path: Path, lazy: bool) -> dict[str, Any]:
        if not isinstance(layer, Mapping):
            raise self.error(path, f"expected a mapping of names to {typed.show(value_hint)}, got {layer!r}")
        merged = dict(base) if isinstance(base, Mapping) else {}
        for key, value in layer.items():
            key = self._name(key, path)
            if value is None and not typed.allows_none(value_hint):
                if key not in merged:
                    raise self.error((*path, key), f"null takes away what is not there ({suggest(key, merged)})")
                del merged[key]
            elif value_hint is Any:
                merged[key] = value
            else:
                merged[key] = self.merge(value_hint, merged.get(key, ABSENT), value, (*path, key), lazy=lazy)
        return merged

    def _sequence(self, hint: Any, layer: Any, path: Path) -> list[Any]:
        args = get_args(hint)
        fixed = get_origin(hint) is tuple and args and args[-1] is not ...
        if not isinstance(layer, list | tuple) or (fixed and len(layer) != len(args)):
            raise self.error(path, f"expected {typed.show(hint)}, got {layer!r}")
        hints = args if fixed else [args[0] if args else Any] * len(layer)
        return [
            self.merge(part, ABSENT, value, (*path[:-1], f"{path[-1]}[{i}]"))
            for i, (part, value) in enumerate(zip(hints, layer, strict=True))
        ]

    def _union(self, options: list[Any], hint: Any, base: Any, layer: Any, path: Path, default: Any) -> Any:
        for option in options:
            if isinstance(option, type) and type(layer) is option:
                return layer
        failure: ConfigError | None = None
        for option in options:
            try:
                return self.merge(option, base, layer, path, default)
            except ConfigError as error:
                # A mistake deeper down tells more than "no alternative fits".
                meant = isinstance(layer, Mapping) or (isinstance(layer, list) and get_origin(option) is list)
                if meant and (failure is None or len(str(error)) > len(str(failure))):
                    failure = error
        raise failure or self.error(path, f"expected {typed.show(hint)}, got {layer!r}")

    def _scalar(self, hint: Any, value: Any, path: Path) -> Any:
        if hint is Any or hint is object:
            return value
        if get_origin(hint) is Literal:
            if value in get_args(hint):
                return value
            raise self.error(path, f"got {value!r} ({suggest(str(value), map(str, get_args(hint)))})")
        ok = {
            bool: isinstance(value, bool),
            int: isinstance(value, int) and not isinstance(value, bool),
            float: isinstance(value, int | float) and not isinstance(value, bool),
            str: isinstance(value, str),
        }
        if hint not in ok:
            return value  # a type that only jsonargparse knows
        if not ok[hint]:
            raise self.error(path, f"expected {self._example(hint)}, got {value!r}")
        return float(value) if hint is float else value

    @staticmethod
    def _example(hint: Any) -> str:
        names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        slot = typed.as_slot(hint)
        if slot is not None:
            nothing = [name for name in registry.usable(slot.base) if re.match("No[A-Z]|Identity$", name)]
            return f"a {slot.base.__name__}" + (f" (for nothing: {', '.join(nothing)})" if nothing else "")
        return names.get(hint, typed.show(hint))

    def inherit(self, hint: Any, value: Any, path: Path, scope: Mapping[str, Any] | None = None) -> Any:
        """`value` with everything that inherits from a neighbour filled in, and nothing partial left.

        `scope` holds the arguments beside the one that is walked.
        """
        if isinstance(hint, Arguments):
            return self._inherit_arguments(typed.arguments(hint.cls), value, path)
        if value is None:
            return None
        if len(typed.options(hint)) == 1:
            hint = typed.options(hint)[0]
        slot = typed.as_slot(hint)
        if slot is not None:
            if not isinstance(value, Mapping) or CLASS not in value:
                return self.merge(hint, ABSENT, value, path)
            cls = self.find(slot, value[CLASS], path)
            known = typed.arguments(cls, len(slot.given))
            args = self._inherit_arguments(known, value.get(ARGS, {}), path)
            self._complete(known, cls, args, path)
            return {CLASS: value[CLASS], ARGS: args} if args else {CLASS: value[CLASS]}
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            known = typed.arguments(hint)
            filled = dict(value)
            for key, argument in known.items():
                if argument.inherits and scope is not None and key in filled:
                    shared = scope.get(argument.inherits, {})
                    part = get_args(argument.hint)[1]
                    filled[key] = {
                        name: self.merge(part, shared.get(name, ABSENT), own, (*path, key, name))
                        for name, own in filled[key].items()
                    }
            filled = self._inherit_arguments(known, filled, path)
            self._complete(known, hint, filled, path)
            return filled
        if get_origin(hint) is dict and isinstance(value, Mapping):
            part = get_args(hint)[1]
            return {key: self.inherit(part, own, (*path, key), scope) for key, own in value.items()}
        if get_origin(hint) in (list, tuple) and isinstance(value, list):
            part = get_args(hint)[0]
            return [self.inherit(part, own, (*path[:-1], f"{path[-1]}[{i}]"), scope) for i, own in enumerate(value)]
        return value

    def _inherit_arguments(self, known: Mapping[str, Argument], args: Mapping[str, Any], path: Path) -> dict[str, Any]:
        return {
            key: self.inherit(known[key].hint, value, (*path, key), args) if key in known else value
            for key, value in args.items()
        }

    def _complete(self, known: Mapping[str, Argument], cls: type, args: Mapping[str, Any], path: Path) -> None:
        for key, argument in known.items():
            linked = path == ("model",) and key in LINKED
            if argument.default is REQUIRED and key not in args and not linked:
                raise self.error((*path, key), f"{cls.__name__} needs it: {typed.show(argument.hint)}")


# Arguments of a task that the data module gives.
LINKED = ("image", "num_classes")


def _raw_merge(base: Any, layer: Any) -> Any:
    """A merge without types, for arguments whose class is not known yet; null is kept, for the typed merge."""
    if not isinstance(base, Mapping) or not isinstance(layer, Mapping):
        return layer
    if CLASS in layer and layer[CLASS] != base.get(CLASS):
        return dict(layer)
    return {**base, **{key: _raw_merge(base.get(key), value) for key, value in layer.items()}}
