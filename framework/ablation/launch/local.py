"""Runs as processes of this machine, some at a time."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path

from framework.ablation.launch.base import Ended, Launcher
from framework.ablation.launch.work import (
    LOG,
    SKIPPED,
    Task,
    interruptible,
    last_error,
    log_size,
    log_to,
    terminate_as_interrupt,
    work,
)
from framework.errors import ConfigError

# What the fork server imports.
PRELOAD = ["framework.ablation.launch.preload"]

# Seconds that a run has to write its checkpoint once it is told to stop.
GRACE = 30.0


class Local(Launcher):
    """Each run in a fresh process of this machine, with its output in the folder's log.txt.

    Args:
        processes: how many at a time, which share the cores, and take turns at the GPUs, one for each run; 0: as many
            as there are GPUs, or cores where there is no GPU.
        retries: how often a failed run is tried again.
    """

    def __init__(self, processes: int = 0, retries: int = 1) -> None:
        super().__init__(retries)
        if processes < 0:
            raise ConfigError(f"launcher.processes: got {processes}; give a number of processes, or 0 for all cores")
        self.processes = processes

    def plan(self, folders: list[Path]) -> str:
        self._share(len(folders))
        where = f"GPUs {', '.join(self.devices)} in turn" if self.devices else "no GPU"
        return f"{len(folders)} runs here, {self.count} at a time, {self.threads} thread(s) each, {where}"

    def _share(self, runs: int) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.devices = devices()
        self.count = max(1, min(self.processes or len(self.devices) or cores, runs))
        self.threads = max(1, cores // self.count)

    @contextmanager
    def session(self, folders: list[Path], task: Task) -> Iterator[None]:
        self._share(len(folders))
        self.task = task
        self.jobs: list[_Job] = []
        start_server()
        with terminate_as_interrupt():
            if not self.devices:
                from blocks.kernels.native import library  # here, because it imports torch

                library()  # where it must be built, that is said here rather than in the log of the first runs
            yield

    def room(self) -> int:
        return self.count - len(self.jobs)

    def start(self, folders: list[Path]) -> None:
        for folder in folders:
            slot = min(set(range(self.count)) - {job.slot for job in self.jobs})
            device = self.devices[slot % len(self.devices)] if self.devices else None
            # Kept first, started then: an interrupt in between must not lose a running process.
            self.jobs.append(_Job(folder, self.task, self.threads, slot, device))
            self.jobs[-1].process.start()

    def poll(self) -> Ended:
        if not self.jobs:
            time.sleep(0.5)
        return self._reap(0.5)

    def _reap(self, timeout: float | None) -> Ended:
        """Waits until a job ends, at most `timeout` seconds, and gives those that have."""
        sentinels = connection.wait([job.process.sentinel for job in self.jobs], timeout)
        ended = [job for job in self.jobs if job.process.sentinel in sentinels]
        for job in ended:
            job.process.join()
            self.jobs.remove(job)
        return [(job.folder, job.how()) for job in ended]

    def stop(self) -> Ended:
        """Interrupts the jobs, and kills those that have not ended in time or when a second Ctrl-C comes."""
        self.jobs = [job for job in self.jobs if job.process.pid]
        ended = self._reap(0)
        try:
            if self.jobs:
                count = len(self.jobs)
                print(f"stopping {count} run(s), each leaves a checkpoint; Ctrl-C again kills them", file=sys.stderr)
            for job in self.jobs:
                _send(job, os.kill, signal.SIGINT)
            end = time.monotonic() + GRACE
            while self.jobs and (left := end - time.monotonic()) > 0:
                ended += self._reap(left)
        except KeyboardInterrupt:
            pass
        for job in self.jobs:
            # The group too, which has its data workers in it; there is none yet when the process has only just begun.
            _send(job, os.killpg, signal.SIGKILL)
            _send(job, os.kill, signal.SIGKILL)
        while self.jobs:
            ended += self._reap(None)
        return ended


def devices() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name not in ("", "-1")]
    torch = sys.modules.get("torch")  # whoever has built the nets of a study has loaded it
    return [str(index) for index in range(torch.cuda.device_count())] if torch else []


class _Job:
    """One run, seen from the launcher.

    Args:
        folder: the run folder.
        task: what trains it.
        threads: of the process.
        slot: its number among those that run at a time.
        device: the only GPU that it sees; None: whatever there is.
    """

    def __init__(self, folder: Path, task: Task, threads: int, slot: int, device: str | None) -> None:
        self.folder, self.slot = folder, slot
        self.log_start = log_size(folder)
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=_child, args=(folder, task, threads, device))

    def how(self) -> str | None:
        """How the process has ended; None if another one has the run."""
        code = self.process.exitcode or 0
        if code == SKIPPED:
            return None
        if code >= 0:
            how = f"exit code {code}" if code else "ended without a result"
        else:
            how = f"killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += " (out of memory?)"
        return how + last_error(self.folder / LOG, self.log_start)


def start_server() -> None:
    """Starts the process that imports once and is forked for each run, if there is none yet.

    It starts with SIGINT blocked, and each run unblocks it when it is ready for it: else a Ctrl-C in a terminal,
    which goes to all processes, would end it in the middle of its imports.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    resource_tracker.ensure_running()  # else the server starts it, and that unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    atexit.unregister(_end_server)
    atexit.register(_end_server)


def _end_server() -> None:
    """Left to itself it takes seconds to end, and its libraries say on the terminal what they leave behind."""
    if pid := forkserver._forkserver._forkserver_pid:  # type: ignore[attr-defined]
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _send(job: _Job, kill: Callable[[int, int], None], number: int) -> None:
    assert job.process.pid  # 0 would be this process's own group
    with suppress(ProcessLookupError):
        kill(job.process.pid, number)


def _child(folder: Path, task: Task, threads: int, device: str | None) -> None:
    """The process of one run."""
    # A group of its own: a terminal's Ctrl-C goes to the launcher alone, which passes it on once.
    os.setpgid(0, 0)
    log_to(folder)
    interruptible()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_follow_launcher, daemon=True).start()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    # For what is imported later and for processes of this one; a torch that is there already does not read it.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
    if not work(folder, task):
        sys.exit(SKIPPED)


def _follow_launcher() -> None:
    """Interrupts this process when its launcher is gone, however that ended."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)
