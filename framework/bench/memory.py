"""What a step takes in memory: bytes that the forward saves for the backward, and the peak of the process."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch
from torch import UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks

from framework.bench.harness import Act
from framework.bench.nets import Entrant, Form, Setting, formed, step
from framework.errors import ConfigError
from framework.process import keep_freed

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def saved_bytes(forward: Act, net: nn.Module) -> int:
    """Bytes of the storages that `forward` keeps for its backward, each counted once, without those of parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    held: dict[int, UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage
        return tensor.detach()  # the tensor itself would hold the graph that holds it, and both would stay for good

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in held.values())


def peak_of(act: Act, device: str) -> int | None:
    """Bytes that an act takes at its peak, over what was held before it: on the GPU, or of the process.

    None where the system does not tell (it needs Linux).
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        act()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # what was freed goes back to the system, or the peak would not show it again
    try:
        CLEAR.write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        act()
        return resident("VmHWM") - before
    except OSError:
        return None


def resident(name: str) -> int:
    """A line of this process's status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def peak(entrant: Entrant, form: Form, setting: Setting) -> int | None:
    """Bytes that one step takes at its peak, over weights and the optimizer's state: in a fresh process on the CPU.

    Raises:
        ConfigError: the process was killed, as the system does where memory runs out.
    """
    if setting.device == "cuda":
        return _peak(entrant, form, setting)
    context = fresh_processes()
    # At Ctrl-C it ends without a word.
    with ProcessPoolExecutor(1, context, signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:
        try:
            return pool.submit(_peak, entrant, form, setting).result()
        except BrokenProcessPool as error:
            raise ConfigError(f"{entrant.name}: what measures its memory was killed; give a smaller batch") from error


def fresh_processes() -> ForkServerContext:
    """What starts processes that have torch and timm, and nothing of what this one has done to them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["framework.bench.memory", "timm"])
    return context


def _peak(entrant: Entrant, form: Form, setting: Setting) -> int | None:
    keep_freed()
    torch.set_num_threads(setting.threads)
    act = step(formed(entrant.make(), form, setting), form, setting, entrant.image)
    act()  # what stays: the optimizer's state, caches of the libraries
    act()
    return peak_of(act, setting.device)
