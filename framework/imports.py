"""Makes Lightning, torchmetrics and torchvision import in half the time: without what they only name.

Lightning and torchvision import torch's compiler (and with it Inductor and sympy, about 3 s) at their top, for a class
to compare with, a decorator and a question that nobody asks before a net is compiled or trained. torchmetrics imports
scipy.signal, matplotlib and torchvision (1.5 s), for metrics and plots that few ask for. While the three are imported,
and only then, stand-ins answer to these names; each brings in the real thing when it is used.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pkgutil import resolve_name
from types import ModuleType
from typing import Any

DYNAMO, UTILS = "torch._dynamo", "torch._dynamo.utils"
METRICS, SIGNAL = "torchmetrics", "scipy.signal"
LATER = ("matplotlib", "scipy", "torchvision")


class _Lazy(type):
    def __instancecheck__(cls, instance: object) -> bool:
        real = sys.modules.get(DYNAMO)
        return real is not None and isinstance(instance, real.OptimizedModule)


class OptimizedModule(metaclass=_Lazy):
    """Stands for torch's class of compiled modules, of which there is none before the compiler is imported."""


def disable(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """Stands for `torch._dynamo.disable`, which is applied at the first call."""
    real: list[Callable[..., Any]] = []

    @wraps(fn)
    def first(*call_args: Any, **call_kwargs: Any) -> Any:
        if not real:
            import torch._dynamo

            real.append(torch._dynamo.disable(fn, *args, **kwargs))
        return real[0](*call_args, **call_kwargs)

    return first


def is_compile_supported(device_type: str) -> Any:
    """Stands for `torch._dynamo.utils.is_compile_supported`."""
    from torch._dynamo.utils import is_compile_supported as real

    return real(device_type)


@contextmanager
def style(*args: Any, **kwargs: Any) -> Iterator[None]:
    """Stands for `matplotlib.style.context`, which torchmetrics decorates its plots with."""
    from matplotlib import style

    with style.context(*args, **kwargs):
        yield


class Later:
    """Stands for a module, or for a class or function in it.

    Args:
        path: its dotted path.
    """

    asked = False  # while torchmetrics is imported, what it asks of one is one too

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        path = f"{self._path}.{name}"
        if not Later.asked:
            return resolve_name(path)
        return style if path == "matplotlib.pyplot.style.context" else Later(path)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return resolve_name(self._path)(*args, **kwargs)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, resolve_name(self._path))


@contextmanager
def without_dynamo() -> Iterator[None]:
    """Torch's compiler is there by name only."""
    import torch

    if DYNAMO in sys.modules:
        yield
        return
    names: dict[str, dict[str, Any]] = {
        DYNAMO: {"OptimizedModule": OptimizedModule, "disable": disable},
        UTILS: {"is_compile_supported": is_compile_supported},
    }
    put = []
    for name, members in names.items():
        if name not in sys.modules:
            stand_in = ModuleType(name)
            vars(stand_in).update(members)
            sys.modules[name] = stand_in
            put.append((name, stand_in))
    try:
        yield
    finally:
        for name, stand_in in put:
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]
        if any(vars(torch).get("_dynamo") is stand_in for _, stand_in in put):
            del torch._dynamo


@contextmanager
def without_plots() -> Iterator[None]:
    """What torchmetrics itself imports of `LATER`, and nobody else does, are stand-ins."""
    real = builtins.__import__

    def instead(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        top, asks = name.partition(".")[0], (globals or {}).get("__name__", "").partition(".")[0]
        if level or top not in LATER or asks != METRICS or name in sys.modules:
            return real(name, globals, locals, fromlist, level)
        return Later(name if fromlist else top)

    builtins.__import__, Later.asked = instead, True
    try:
        yield
    finally:
        builtins.__import__, Later.asked = real, False


@contextmanager
def with_hamming() -> Iterator[None]:
    """scipy.signal has the old name for a window that torchmetrics gives it."""
    yield
    signal = sys.modules[SIGNAL]
    if METRICS in sys.modules and not hasattr(signal, "hamming"):
        signal.hamming = signal.windows.hamming  # type: ignore[attr-defined]


WHILE = {"lightning": without_dynamo, "torchvision": without_dynamo, METRICS: without_plots, SIGNAL: with_hamming}


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in WHILE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                with WHILE[name]():
                    run(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """From now on they import so. Does nothing where they, or what they name, are imported already."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
