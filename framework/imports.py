"""Makes Lightning and torchvision import in half the time: without torch._dynamo, which they only name.

Both import torch's compiler (and with it Inductor and sympy, about 3 s) at their top, for a class to compare with, a
decorator and a question that nobody asks before a net is compiled or trained. While they are imported, and only then,
stand-ins answer to its name; each brings in the real thing when it is used.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

DYNAMO, UTILS = "torch._dynamo", "torch._dynamo.utils"


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


class _WithoutDynamo(Loader):
    """Runs a package's own loader with the stand-ins in place."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        import torch

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
            self.loader.exec_module(module)
        finally:
            for name, stand_in in put:
                if sys.modules.get(name) is stand_in:
                    del sys.modules[name]
            if any(vars(torch).get("_dynamo") is stand_in for _, stand_in in put):
                del torch._dynamo


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in ("lightning", "torchvision") or DYNAMO in sys.modules:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _WithoutDynamo(spec.loader)
        return spec


def install() -> None:
    """From now on the two import so. Does nothing where they, or the compiler, are imported already."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
