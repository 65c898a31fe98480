"""Runs as tasks of a Ray cluster, or of a Ray that is started here."""

from __future__ import annotations

import math
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.ablation.launch import asha as rules
from framework.ablation.launch.asha import Asha
from framework.ablation.launch.base import Ended, Launcher
from framework.ablation.launch.work import (
    LOG,
    REPO,
    Task,
    interrupt_once,
    last_error,
    log_size,
    log_to,
    terminate_as_interrupt,
    work,
)
from framework.ablation.state import read_status
from framework.errors import ConfigError, reason

# Seconds that a run has to leave its checkpoint once it is told to stop.
GRACE = 30.0

# Seconds between two looks at the statuses for hopeless runs.
LOOK = 1.0

# Ray reports its use over the network unless told otherwise.
QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}


class Ray(Launcher):
    """Each run as a task of Ray, which finds a node with the resources, and another one when a node is lost.

    The nodes share the run folders and this program's folder.

    Args:
        address: of a running cluster, such as auto or ray-head:6379; empty: a Ray of its own on this machine, which
            ends with the study.
        cpus: of each run.
        gpus: of each run; a part, such as 0.5, lets runs share one.
        memory_gib: of each run; Ray counts it, and does not enforce it.
        losses: how often a run is started again whose node or process was lost. That is no failure.
        retries: how often a failed run is tried again.
        asha: whether runs that look hopeless beside the others are stopped early, for good, by Ray's rule (ASHA). The
            table then selects by result, and is not comparable to that of a full study.
        asha_grace: epochs before a run may be stopped.
        asha_factor: one of so many goes on, at epoch `asha_grace` and at each so many times as many.
    """

    def __init__(
        self,
        address: str = "",
        cpus: float = 1,
        gpus: float = 0,
        memory_gib: float = 0,
        losses: int = 2,
        retries: int = 1,
        asha: bool = False,
        asha_grace: int = 1,
        asha_factor: int = 4,
    ) -> None:
        super().__init__(retries)
        for name, value in (("cpus", cpus), ("gpus", gpus), ("memory_gib", memory_gib), ("losses", losses)):
            if value < 0:
                raise ConfigError(f"launcher.{name}: got {value}; give at least 0")
        for name, number, least in (("asha_grace", asha_grace, 1), ("asha_factor", asha_factor, 2)):
            if number < least:
                raise ConfigError(f"launcher.{name}: got {number}; give at least {least}")
        self.asha, self.asha_grace, self.asha_factor = asha, asha_grace, asha_factor
        self.address = address
        self.losses = losses
        self.needs: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "memory": int(memory_gib * 2**30)}

    def plan(self, folders: list[Path]) -> str:
        _import()
        cpus, gpus, memory = self.needs.values()
        asked = ((cpus, "CPU"), (gpus, "GPU"), (memory / 2**30, "GiB"))
        needs = ", ".join(f"{value:g} {unit}" for value, unit in asked if value)
        where = f"the cluster at {self.address}" if self.address else "a Ray of its own on this machine"
        text = (
            f"{len(folders)} tasks on {where}, each with {needs or 'nothing of its own'}; "
            f"started again after a loss up to {self.losses} times"
        )
        if self.asha:
            rules.scheduler()
            text += (
                f"; ASHA (Ray's AsyncHyperBandScheduler) stops hopeless runs for good from epoch {self.asha_grace} on, "
                f"where 1 of {self.asha_factor} goes on: the table is then of those that survive"
            )
        return text

    @contextmanager
    def session(self, folders: list[Path], task: Task) -> Iterator[None]:
        self.ray = _import()
        _check_address(self.address)
        self.task = task
        self.tasks: dict[Any, _Task] = {}
        self.rule = rules.of_study(folders[0], self.asha_grace, self.asha_factor) if self.asha and folders else None
        self.next_look = 0.0
        path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
        # Else a run that asks for no GPU sees all of them.
        env = {"PYTHONPATH": path, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
        # Its own Ray holds no objects and shows no pages.
        own = {} if self.address else {"include_dashboard": False, "object_store_memory": 100 * 2**20}
        try:
            self.ray.init(
                self.address or "local",
                log_to_driver=False,
                logging_level="error",
                runtime_env={"env_vars": env},
                **own,
            )
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"launcher Ray: {reason(error)}") from error
        try:
            self._check_resources()
            with terminate_as_interrupt():
                yield
        finally:
            self.ray.shutdown()

    def _check_resources(self) -> None:
        """Raises ConfigError where Ray would wait for ever. A cluster may grow, and is waited for."""
        there = self.ray.cluster_resources()
        for name, resource in (("num_cpus", "CPU"), ("num_gpus", "GPU"), ("memory", "memory")):
            if self.needs[name] > there.get(resource, 0):
                lacks = f"each run asks for {self.needs[name]} {resource}, and there is {there.get(resource, 0):g}"
                if not self.address:
                    raise ConfigError(f"launcher Ray: {lacks}")
                print(f"{lacks} in the cluster; the runs wait until it grows", file=sys.stderr)

    def room(self) -> int:
        return sys.maxsize

    def start(self, folders: list[Path]) -> None:
        # A process for one run only: the next begins with fresh random states and empty memory.
        remote = self.ray.remote(max_calls=1, max_retries=self.losses, **self.needs)(_task)
        for folder in folders:
            self.tasks[remote.remote(folder.absolute(), self.task)] = _Task(folder, log_size(folder))

    def poll(self) -> Ended:
        if not self.tasks:
            time.sleep(0.5)
        ended = self._reap(0.5)
        if self.rule and time.monotonic() >= self.next_look:
            self._stop_hopeless(self.rule)
            self.next_look = time.monotonic() + LOOK
        return ended

    def _stop_hopeless(self, rule: Asha) -> None:
        """Interrupts the runs that the rule calls hopeless, and kills those that have not ended in time."""
        for each, task in self.tasks.items():
            if task.folder not in self.hopeless and rule.hopeless(task.folder, read_status(task.folder)):
                self.hopeless.add(task.folder)
                task.kill_at = time.monotonic() + GRACE
                self.ray.cancel(each)
            elif time.monotonic() >= task.kill_at:
                task.kill_at = math.inf
                self.ray.cancel(each, force=True)

    def _reap(self, timeout: float) -> Ended:
        """Waits until a task ends, at most `timeout` seconds, and gives those that have."""
        waiting = list(self.tasks)
        if not waiting:
            return []
        self.ray.wait(waiting, num_returns=1, timeout=timeout)
        ended, _ = self.ray.wait(waiting, num_returns=len(waiting), timeout=0)
        tasks = [(each, self.tasks.pop(each)) for each in ended]
        return [(task.folder, self._how(each, task)) for each, task in tasks]

    def _how(self, ended: Any, task: _Task) -> str | None:
        try:
            return "ended without a result" if self.ray.get(ended) else None
        except self.ray.exceptions.RayError as error:
            said = str(error).strip().splitlines() or [""]
            return f"{type(error).__name__}{last_error(task.folder / LOG, task.log_start) or f': {said[0][:300]}'}"

    def stop(self) -> Ended:
        """Interrupts the runs, and kills those that have not ended in time or when a second Ctrl-C comes."""
        ended: Ended = []
        if self.tasks:
            print("stopping the runs, each leaves a checkpoint; Ctrl-C again kills them", file=sys.stderr)
        with suppress(KeyboardInterrupt):
            for each in self.tasks:
                self.ray.cancel(each)
            end = time.monotonic() + GRACE
            while self.tasks and (left := end - time.monotonic()) > 0:
                ended += self._reap(left)
        for each in self.tasks:
            self.ray.cancel(each, force=True)
        end = time.monotonic() + GRACE
        while self.tasks and (left := end - time.monotonic()) > 0:
            ended += self._reap(left)
        return ended


@dataclass
class _Task:
    """A task of Ray: the run folder, where its part of the run's log begins, and when it is killed, stopped or not."""

    folder: Path
    log_start: int
    kill_at: float = math.inf


def _import() -> Any:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise ConfigError("launcher Ray needs ray: uv sync --extra ray") from None
    return ray


def _check_address(address: str) -> None:
    """Raises ConfigError where nothing answers; Ray itself would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return  # none, or auto, which Ray looks up
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise ConfigError(f"launcher.address: no Ray answers at {address}: {error}") from error


def _task(folder: Path, task: Task) -> bool:
    """The process of one run."""
    log_to(folder)
    signal.signal(signal.SIGINT, interrupt_once)  # SIGTERM stays Ray's, which then takes the process as lost
    return work(folder, task)
