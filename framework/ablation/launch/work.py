"""What every launcher runs in the process that trains: one run, if no other process has it."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from framework.ablation.lock import hold, turn
from framework.ablation.state import read_status, write_status
from framework.errors import reason
from framework.process import prepare

Task = Callable[[Path], None]

LOG = "log.txt"

SKIPPED = 75  # exit code of a process whose run is another's

REPO = Path(__file__).parents[3]


def work(folder: Path, task: Task, job: str = "", rank: int = 0) -> bool:
    """Runs `task(folder)` with a lock on the folder, and leaves a status that says how it ended.

    Args:
        folder: the run folder.
        task: trains the run of a folder, and writes its status.
        job: the cluster's job that this process belongs to.
        rank: of this process among those of the job, the first of which holds the lock for all.

    Returns:
        False if another process has the folder; nothing was done then.
    """
    prepare()
    if rank:
        if mine := _wait_for_first(folder, job):
            task(folder)
        return mine
    with hold(folder, job) as mine:
        if not mine:
            print("another process works in this folder")
            return False
        status = read_status(folder)
        if status.over:
            return True
        # Lightning repeats this process's command for further devices. That of a study would start a second one.
        sys.argv = [str(REPO / "framework/ablation/launch/rank.py"), str(folder), f"{task.__module__}:{task.__name__}"]
        try:
            write_status(folder, replace(status, state="running", error=""))
            task(folder)
        except BaseException as error:
            status = read_status(folder)
            stopped = isinstance(error, KeyboardInterrupt)
            if not status.final:
                status = replace(status, state="interrupted" if stopped else "failed", error=reason(error))
                with suppress(OSError):  # a full disk: the launcher says it
                    write_status(folder, replace(status, error="" if stopped else status.error))
            raise
    return True


def _wait_for_first(folder: Path, job: str) -> bool:
    """Waits until the first process of this job has the lock, or did not get it."""
    while True:
        last = turn(folder)
        if last.job == job:
            return last.alive
        if last.alive or read_status(folder).over:
            return False
        time.sleep(0.5)


def log_to(folder: Path) -> None:
    """Everything that this process prints from now on goes to the run's log."""
    log = os.open(folder / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def log_size(folder: Path) -> int:
    with suppress(OSError):
        return (folder / LOG).stat().st_size
    return 0


def last_error(log: Path, start: int = 0) -> str:
    """`: ` and the last line of a log that names an error, from `start` on; empty if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(start)
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    errors = [line.strip() for line in lines if re.search(r"(error|exception)(:|$)", line, re.IGNORECASE)]
    return f": {errors[-1][:300]}" if errors else ""


def interrupt_once(number: int, frame: FrameType | None) -> NoReturn:
    """A handler that interrupts; what follows is ignored, so that nothing disturbs the writing of the checkpoint."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def interruptible() -> None:
    """SIGINT and SIGTERM interrupt this process."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupt_once)


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM (a cluster's time limit, `kill`) does what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
