"""What every process of this program does first."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3

ASKED = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}


def prepare() -> None:
    """Library warnings that tell a user of this program nothing are off, and freed memory is kept for reuse."""
    quiet()
    keep_freed()


def quiet() -> None:
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for text in (
        ".*does not have many workers.*",
        ".*isinstance.treespec, LeafSpec.*",
        ".*srun.*command is available.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*lr_scheduler.step.*before.*optimizer.step.*",
        ".*number of training batches.*smaller than the logging interval.*",
        ".*Initializing zero-element tensors.*",
        ".*No complete tensor found in the group.*",
        ".*deprecated.*",
    ):
        warnings.filterwarnings("ignore", message=text)


def keep_freed() -> None:
    """Keeps the memory of freed tensors in the process.

    glibc gives large blocks back to the system, and the next step takes them anew, zeroed page by page: 3 to 16 % of a
    training step on the CPU. Other C libraries are left as they are, and so is what the environment asks of glibc.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if tune is not None and ASKED.isdisjoint(os.environ):
        # Older ones take no more than 32 MiB.
        for most in (2**30, 2**25):
            if tune(MMAP_THRESHOLD, most):
                break
        tune(TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def imports() -> Iterator[None]:
    """For the import of torch and what comes with it: stays, so Python does not look for garbage in it, now or later.

    It would again and again, for a third of the time. Processes forked from this one also share more memory.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # or libraries say what they leave behind
