"""The C++ kernels: built once on a machine by its own compiler, kept in the user's cache, called through ctypes.

The library has a plain C interface and knows nothing of torch, so that it builds in seconds and fits every version.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "cpp"
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared", "-pthread"]
# What PyTorch calls the instructions that a processor has, and the environment has not forbidden.
AVX512 = ["-DLANES=16", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
INSTRUCTIONS = {
    "AVX512": AVX512,
    "AVX512_BF16": [*AVX512, "-mavx512bf16"],
    "AVX2": ["-DLANES=8", "-mavx2", "-mfma"],
}  # fmt: skip


class NoKernel(Exception):
    """Why there is no library: one line."""


@cache
def library() -> ctypes.CDLL | None:
    """The library for this processor, built where it is missing; None, and one line on stderr, where that fails."""
    if sys.platform == "win32" or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    if capability() not in INSTRUCTIONS:
        return None
    try:
        return load(capability(), cache_folder())
    except NoKernel as reason:
        print(
            f"no CPU kernels for attention and the words of TNT, which run in plain PyTorch: {reason}", file=sys.stderr
        )
        return None


def capability() -> str:
    """What torch calls the processor, and whether it multiplies bfloat16 too."""
    found = torch.backends.cpu.get_cpu_capability()
    multiplies = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "AVX512_BF16" if found == "AVX512" and multiplies() else found


def processor() -> str:
    """The processor's name, family and model: makers sell unlike ones under one name."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "model name" in found:
            return f"{found['model name']} {found.get('cpu family', '')}.{found.get('model', '')}"
    return platform.processor() or platform.machine()


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tessera"


def load(capability: str, folder: Path) -> ctypes.CDLL:
    """The library for `capability` in `folder`, built where it is missing. Raises NoKernel where that fails."""
    files = sorted(SOURCES.iterdir())
    text = b"".join(file.read_bytes() for file in files)
    key = repr((text, FLAGS, INSTRUCTIONS[capability], platform.libc_ver()))
    name = f"kernels_{capability.lower()}_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder / f"{name}.lock"):
            if not (folder / name).exists():
                build(capability, folder / name)
            found = ctypes.CDLL(str(folder / name))
    except OSError as error:
        raise NoKernel(" ".join(str(error).split())) from error
    return found


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock that dies with its process; where the file system has none, two may build, each for itself."""
    import fcntl  # not on Windows

    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def compiler() -> list[str]:
    """The command of the C++ compiler, the environment's first; empty where there is none."""
    asked = shlex.split(os.environ.get("CXX", ""))
    return asked or [found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))][:1]


def build(capability: str, target: Path) -> None:
    """Builds beside `target` and renames, so that it is never there by half. Raises NoKernel, OSError."""
    asked = compiler()
    if not asked:
        raise NoKernel("there is no C++ compiler (c++, g++ or clang++); install one to run them several times as fast")
    print("building the CPU kernels, once on this machine …", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made, sources = Path(folder) / target.name, sorted(SOURCES.glob("*.cpp"))
        objects = [str(Path(folder) / f"{source.stem}.o") for source in sources]
        command = [*asked, *FLAGS, *INSTRUCTIONS[capability]]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = zip(sources, objects, strict=True)
            list(pool.map(_run, ([*command, "-c", str(source), "-o", to] for source, to in parts)))
        _run([*command, *objects, "-o", str(made)])
        with made.open("rb") as file:  # or it may be there and empty when power has failed: nobody would build it again
            os.fsync(file.fileno())
        made.replace(target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error:" in line] or [f"exit {done.returncode}"]
        raise NoKernel(f"{command[0]} fails: {errors[0]}")


class Team(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("number", ctypes.c_void_p)]


@cache
def threads() -> Any:
    """OpenMP's entries for parallel work, or null, in the copy that torch uses: another's threads would compete."""
    folder = Path(torch.__file__).parent
    for name in [None, *folder.glob("lib/libgomp*"), *folder.parent.glob("torch.libs/libgomp*")]:
        try:
            found = ctypes.CDLL(None if name is None else str(name))
            entries = found.GOMP_parallel, found.omp_get_thread_num
        except (OSError, AttributeError):
            continue
        return ctypes.pointer(Team(*(ctypes.cast(entry, ctypes.c_void_p) for entry in entries)))
    return ctypes.POINTER(Team)()


def has(name: str, dtype: torch.dtype) -> bool:
    """Whether there is a kernel of that name for float32 or bfloat16."""
    return hasattr(library(), _named(name, dtype))


def _named(name: str, dtype: torch.dtype) -> str:
    return f"{name}_bf16" if dtype is torch.bfloat16 else name


Part = Tensor | ctypes.Structure | ctypes.Array[Any] | None


class Plan:
    """Calls of kernels that are made together, later: within `with plan:` nothing runs, and no number may be read.

    What they give lies in few pieces of memory: of each kind (`fresh`) two, in turn, since a call reads what the one
    before it gave, and nobody reads what that one read.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Any, list[Any], tuple[Part, ...], str]] = []
        self.pieces: dict[tuple[str, int], Tensor] = {}
        self.turns: dict[str, int] = {}

    def __enter__(self) -> Plan:
        _local.plan = self
        return self

    def __exit__(self, *error: object) -> None:
        _local.plan = None

    def run(self) -> None:
        """Makes the calls, and forgets them and the memory. Raises MemoryError: a kernel had none to work in."""
        calls, self.calls, self.pieces = self.calls, [], {}
        for kernel, given, _, name in calls:
            _make(kernel, given, name)

    def piece(self, kind: str, size: int, turns: bool) -> Tensor:
        """So many bytes, which the last call but one of this kind had, or the last."""
        turn = self.turns[kind] = self.turns.get(kind, 0) ^ turns
        found = self.pieces.get((kind, turn))
        if found is None or len(found) < size:
            found = self.pieces[kind, turn] = torch.empty(size, dtype=torch.uint8, device="cpu")
        return found[:size]


_local = threading.local()


def planned() -> Plan | None:
    """The plan that this thread makes at the moment."""
    return getattr(_local, "plan", None)


@contextmanager
def at_once() -> Iterator[None]:
    """Calls within it are made now, also where others wait for their plan."""
    plan, _local.plan = planned(), None
    try:
        yield
    finally:
        _local.plan = plan


def run(name: str, dtype: torch.dtype, *parts: Part) -> None:
    """The kernel of that name for `dtype`, which takes the places of structures, arrays and tensors, and no numbers.

    Raises:
        MemoryError: it had no memory to work in.
    """
    given = [
        part.data_ptr() if isinstance(part, Tensor) else None if part is None else ctypes.byref(part) for part in parts
    ]
    kernel, plan = _taking(library(), _named(name, dtype), len(given) + 1), planned()
    if plan is None:
        _make(kernel, given, name)
    else:
        plan.calls.append((kernel, given, parts, name))  # with the parts, which are to live as long


def _make(kernel: Any, given: list[Any], name: str) -> None:
    if kernel(*given, threads()):
        raise MemoryError(f"{name} had no memory to work in")


def places(tensors: Sequence[Tensor | None]) -> ctypes.Array[Any]:
    """Where tensors lie, for a kernel that takes many."""
    return (ctypes.c_void_p * len(tensors))(*[None if t is None else t.data_ptr() for t in tensors])


def room(name: str, dtype: torch.dtype, shape: ctypes.Structure) -> list[int]:
    """What a kernel of that name says of bytes: that its forward pass keeps, and that each pass works in."""
    found = (ctypes.c_int64 * 4)()
    _make(_taking(library(), _named(name, dtype), 3), [ctypes.byref(shape), ctypes.byref(found)], name)
    return list(found)


def space(size: int, kind: str = "work") -> Tensor:
    """Memory of so many bytes for a kernel to work in; calls that are planned together share that of a kind."""
    plan = planned()
    return torch.empty(size, dtype=torch.uint8, device="cpu") if plan is None else plan.piece(kind, size, turns=False)


def fresh(kind: str, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for what a kernel gives: where calls are planned, that of a kind in turns."""
    plan = planned()
    if plan is None:
        return torch.empty(size, dtype=dtype, device="cpu")
    return plan.piece(kind, math.prod(size) * dtype.itemsize, turns=True).view(dtype).view(size)


@cache
def _taking(library: ctypes.CDLL, name: str, count: int) -> Any:
    """A kernel that takes so many pointers: without their types each would need a wrapper."""
    kernel = getattr(library, name)
    kernel.argtypes = [ctypes.c_void_p] * count
    return kernel


def call(name: str, dtype: torch.dtype, *args: Tensor | ctypes.Array[Any] | float | int | None) -> None:
    """The same of a kernel that takes numbers too: double, int64, and int for bool; and the number of threads.

    It is called at once, and so not within a plan.
    """
    assert planned() is None, f"{name} does not wait for what is planned"
    given: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            given.append(ctypes.c_void_p(arg.data_ptr()))
        elif isinstance(arg, ctypes.Array):
            given.append(arg)
        elif isinstance(arg, bool):
            given.append(ctypes.c_int(arg))
        elif isinstance(arg, int):
            given.append(ctypes.c_int64(arg))
        else:
            given.append(arg if arg is None else ctypes.c_double(arg))
    kernel = getattr(library(), _named(name, dtype))
    if kernel(*given, torch.get_num_threads(), threads()):
        raise MemoryError(f"{name} had no memory to work in")
