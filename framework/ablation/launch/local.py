"""Runs as processes of this machine, some at a time."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from types import FrameType
from typing import NoReturn

from framework.ablation.launch.base import Launcher, Task
from framework.ablation.state import State, read_status, write_status
from framework.errors import ConfigError

# What every run needs and takes seconds to import: the fork server does it once for all.
PRELOAD = ["torch", "lightning.pytorch", "framework.run"]

# Seconds that a run has to write its checkpoint once it is told to stop.
GRACE = 30.0

LOG = "log.txt"


class Local(Launcher):
    """Each run in a fresh process of this machine, with its output in the folder's log.txt.

    Args:
        processes: how many at a time; 0: one per core.
    """

    def __init__(self, processes: int = 0) -> None:
        if processes < 0:
            raise ConfigError(f"processes: got {processes}; give a number of processes, or 0 for one per core")
        self.processes = processes

    def run(self, folders: list[Path], task: Task, watch: Callable[[], None]) -> None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = min(self.processes or cores, len(folders))
        threads = max(1, cores // max(1, count))
        _start_server()
        waiting, jobs = list(folders), list[_Job]()
        with _terminate_as_interrupt():
            try:
                while waiting or jobs:
                    while waiting and len(jobs) < count:
                        # Kept first, started then: an interrupt in between must not lose a running process.
                        jobs.append(_Job(waiting.pop(0), task, threads))
                        jobs[-1].process.start()
                    jobs = _reap(jobs, 0.5, "failed")
                    watch()
            except BaseException:
                _stop(jobs)
                raise


class _Job:
    """One run, seen from the launcher."""

    def __init__(self, folder: Path, task: Task, threads: int) -> None:
        self.folder = folder
        self.log = folder / LOG
        self.log.touch()
        self.log_start = self.log.stat().st_size
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=_child, args=(folder, task, threads))

    def judge(self, state: State) -> None:
        """Gives the run, which has ended, `state` and the reason, unless it has a final status of its own."""
        status = read_status(self.folder)
        if not status.final:
            write_status(self.folder, replace(status, state=state, error=self._reason()))

    def _reason(self) -> str:
        code = self.process.exitcode or 0
        if code >= 0:
            how = f"exit code {code}" if code else "ended without a result"
        else:
            how = f"killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += " (out of memory?)"
        with self.log.open("rb") as log:
            log.seek(self.log_start)
            lines = log.read().decode(errors="replace").splitlines()
        errors = [line.strip() for line in lines if re.search(r"(error|exception)(:|$)", line, re.IGNORECASE)]
        return f"{how}: {errors[-1][:300]}" if errors else how


def _start_server() -> None:
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


def _reap(jobs: list[_Job], timeout: float | None, state: State) -> list[_Job]:
    """Waits until a job ends, at most `timeout` seconds; judges the ended ones and gives those that still run."""
    ended = connection.wait([job.process.sentinel for job in jobs], timeout)
    running = []
    for job in jobs:
        if job.process.sentinel in ended:
            job.process.join()
            job.judge(state)
        else:
            running.append(job)
    return running


def _stop(jobs: list[_Job]) -> None:
    """Interrupts the jobs, and kills those that have not ended in time or when a second Ctrl-C comes."""
    jobs = _reap([job for job in jobs if job.process.pid], 0, "failed")
    try:
        if jobs:
            print(f"stopping {len(jobs)} run(s), each leaves a checkpoint; Ctrl-C again kills them", file=sys.stderr)
        for job in jobs:
            _send(job, os.kill, signal.SIGINT)
        end = time.monotonic() + GRACE
        while jobs and (left := end - time.monotonic()) > 0:
            jobs = _reap(jobs, left, "interrupted")
    except KeyboardInterrupt:
        pass
    for job in jobs:
        # The group too, which has its data workers in it; there is none yet when the process has only just begun.
        _send(job, os.killpg, signal.SIGKILL)
        _send(job, os.kill, signal.SIGKILL)
    while jobs:
        jobs = _reap(jobs, None, "interrupted")


def _send(job: _Job, kill: Callable[[int, int], None], number: int) -> None:
    assert job.process.pid  # 0 would be this process's own group
    with suppress(ProcessLookupError):
        kill(job.process.pid, number)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM (a cluster's time limit, `kill`) does what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _child(folder: Path, task: Task, threads: int) -> None:
    """The process of one run."""
    # A group of its own: a terminal's Ctrl-C goes to the launcher alone, which passes it on once.
    os.setpgid(0, 0)
    log = os.open(folder / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    signal.signal(signal.SIGINT, _interrupt_once)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_follow_launcher, daemon=True).start()
    # A run of a launcher that was killed may still be writing its checkpoint.
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another process runs in this folder; waiting until it ends")
        fcntl.flock(log, fcntl.LOCK_EX)
    if read_status(folder).state == "finished":
        return
    # For what is imported later and for processes of this one; a torch that is there already does not read it.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
    task(folder)


def _interrupt_once(number: int, frame: FrameType | None) -> NoReturn:
    """Interrupts; what follows is ignored, so that nothing disturbs the writing of the checkpoint."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _follow_launcher() -> None:
    """Interrupts this process when its launcher is gone, however that ended."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    launcher.join()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)
