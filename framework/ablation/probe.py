"""What a run will take, from a few steps of it: an estimate."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import track

from blocks.base import BuildError
from framework.ablation.grid import Cell
from framework.ablation.launch import Launcher, Local
from framework.ablation.tables import console
from framework.construct import Workbench, complete
from framework.data import ImageData
from framework.errors import ConfigError, reason
from framework.run import BEST, LAST

# Batches that are timed, behind one that warms up.
TIMED = 3

# A few steps on one device, which write nothing.
SHORT: dict[str, Any] = {
    "max_epochs": 1,
    "max_steps": -1,
    "limit_train_batches": 1 + TIMED,
    "limit_val_batches": 2,
    "check_val_every_n_epoch": 1,
    "val_check_interval": 1.0,
    "num_sanity_val_steps": 0,
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}

# Arguments of the Trainer that say more than how a step is taken.
LEFT_OUT = ("callbacks", "logger", "profiler", "fast_dev_run")


@dataclass(frozen=True)
class Probe:
    """What one run takes: `seconds` in all, and `bytes` of checkpoints."""

    seconds: float
    bytes: int


class Expectation:
    """What runs will take, in a line.

    Args:
        launcher: what will run them.
    """

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher

    def __call__(self, left: list[Cell]) -> str:
        """Probes the net of each cell; a probe that fails, say because data is missing, is no error but said."""
        at_a_time, threads = _parallel(self.launcher, left)
        prober = Prober(threads)
        out = console()
        probes: dict[str, Probe] = {}
        firsts = list({run.group: run for run in left}.values())
        for run in track(firsts, "timing a few steps", console=out, transient=True, disable=not out.is_terminal):
            try:
                probes[run.group] = prober(run.document)
            except Exception as error:
                own = isinstance(error, ConfigError | BuildError)
                return f"expected time and disk: unknown, cell {run.name}: {error if own else reason(error)}"
        each = [probes[run.group] for run in left]
        total = sum(probe.seconds for probe in each)
        wall = max(total / at_a_time, *(probe.seconds for probe in each))
        disk = sum(probe.bytes for probe in each)
        return (
            f"expected, an estimate from {TIMED} steps of each cell on this machine: {_time(wall)} with {at_a_time} "
            f"run(s) at a time ({_time(total)} of computing), {_size(disk)} of checkpoints"
        )


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _size(count: int) -> str:
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def _parallel(launcher: Launcher, left: list[Cell]) -> tuple[int, int]:
    """How many runs go on at a time, and how many threads each has; 0 where that is not known."""
    if isinstance(launcher, Local):
        launcher.plan([Path(run.folder) for run in left])
        return launcher.count, launcher.threads
    # A cluster is taken to start as many as it is asked for.
    return min(getattr(launcher, "parallel", 0) or len(left), len(left)), 0


class Prober:
    """Probes documents, one after the other.

    Args:
        threads: torch's, as many as a run will have; 0 leaves them.
    """

    def __init__(self, threads: int = 0) -> None:
        self.threads = threads
        # Data may take long to read: what several documents share is read once, and counted for each.
        self.data: dict[str, ImageData] = {}
        self.starts: dict[str, float] = {}

    def __call__(self, document: Mapping[str, Any]) -> Probe:
        """Trains a few steps of a composed document, validates a batch, and extrapolates to the whole run.

        Raises:
            ConfigError, BuildError: the document cannot be built, or its data is not there.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            return self._probe(document)
        finally:
            torch.set_num_threads(before)

    def _probe(self, document: Mapping[str, Any]) -> Probe:
        clock = _Clock()
        given = {key: value for key, value in document["trainer"].items() if key not in LEFT_OUT}
        finished = complete({**document, "trainer": given})
        bench = Workbench(finished)
        key = json.dumps(finished["data"], sort_keys=True)
        if key not in self.data:
            self.data[key] = bench.make_data()
        model = bench.make_model()
        with tempfile.TemporaryDirectory() as folder:
            trainer = bench.make_trainer(callbacks=[clock], default_root_dir=folder, **SHORT)
            try:
                trainer.fit(model, datamodule=self.data[key])
            except SystemExit:  # Lightning's way out of Ctrl-C
                raise KeyboardInterrupt from None
        self.starts[key] = max(clock.start, self.starts.get(key, 0.0))
        world = _count(given.get("devices")) * _count(given.get("num_nodes"))
        loaders: Any = (trainer.train_dataloader, trainer.val_dataloaders)
        steps, batches = (math.ceil(len(loader) / world) for loader in loaders)
        steps = _limited(steps, given.get("limit_train_batches"))
        ends = (
            given.get("max_epochs") or 0,
            (given.get("max_steps") or 0) * _count(given.get("accumulate_grad_batches")) / steps,
        )
        epochs = min((end for end in ends if end > 0), default=1)
        validations = epochs / (given.get("check_val_every_n_epoch") or 1)
        batches = _limited(batches, given.get("limit_val_batches"))
        seconds = self.starts[key] + epochs * steps * clock.step + validations * batches * clock.validation
        return Probe(seconds, clock.bytes * len((LAST, BEST)))


class _Clock(Callback):
    """Times the steps of a run."""

    def __init__(self) -> None:
        self.began = _now()
        self.start = self.step = self.validation = 0.0
        self.bytes = 0
        self.ends: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ends = [_now()]
        self.start = self.ends[0] - self.began

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.ends.append(_now())
        self.step = _mean(self.ends)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ends = [_now()]

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.ends.append(_now())
        self.validation = _mean(self.ends)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        states = [pl_module.state_dict(), *(s for o in trainer.optimizers for s in o.state.values())]
        tensors = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        self.bytes = sum(tensor.nbytes for tensor in tensors)


def _mean(ends: list[float]) -> float:
    """Seconds from one end to the next, without the first, which warms up, where there are more."""
    first = 1 if len(ends) > 2 else 0
    return (ends[-1] - ends[first]) / (len(ends) - 1 - first)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _count(given: Any) -> int:
    """A number of devices or steps, which may be left to Lightning."""
    if isinstance(given, list):
        return len(given)
    return given if isinstance(given, int) and given > 0 else 1


def _limited(batches: int, limit: int | float | None) -> int:
    """How many of the batches Lightning takes: all, so many, or a share."""
    if limit is None:
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
