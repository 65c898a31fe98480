"""What every process of this program does first."""

from __future__ import annotations

import ctypes
import os
import warnings

# Of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3


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
    training step on the CPU. Other C libraries are left as they are.
    """
    tune = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if tune is not None:
        # Older ones take no more than 32 MiB.
        for most in (2**30, 2**25):
            if tune(MMAP_THRESHOLD, most):
                break
        tune(TRIM_THRESHOLD, 2**31 - 1)
