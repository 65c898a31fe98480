"""One process at a time works in a run folder, among the processes of one machine or of many that share the folder.

`.lock/` of the folder holds one file for each turn: 1, 2, 3, … The last one says whose turn it is, and its age whether
its owner lives, who touches it every `BEAT` seconds. A turn is over when its file is set to the year 1970, when its
owner's process has ended on this machine, or when it has not been touched for `LIMIT` seconds. Then any process may
take the next number. Creating a file that must not exist is atomic on local disks and on NFS, so only one gets it;
and since no number is ever given back, nobody can take a turn twice by having looked too early.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

BEAT = 10.0

# Six missed beats. An owner that has been stopped for longer (a suspended machine, a network that was cut) may have
# lost its turn; it sees that at its next beat, and ends.
LIMIT = 60.0

LOST = 76  # exit code of a process that has lost its turn


@dataclass(frozen=True)
class Turn:
    """Who works in a folder, or did last.

    Args:
        alive: whether the turn goes on.
        host: the owner's machine, for people.
        pid: the owner's process.
        machine: tells machines, their restarts and containers apart; empty where they cannot be.
        began: when the owner's process began, in the system's ticks: process numbers are used again.
        job: the cluster's job that the owner belongs to.
    """

    alive: bool = False
    host: str = ""
    pid: int = 0
    machine: str = ""
    began: str = ""
    job: str = ""


@contextmanager
def hold(folder: Path, job: str = "") -> Iterator[bool]:
    """Gives whether this process has the folder for itself now; if so, until the end of the block.

    Args:
        folder: a run folder.
        job: the cluster's job that this process belongs to.
    """
    path = _take(folder / ".lock", job)
    if path is None:
        yield False
        return
    end = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, end), daemon=True)
    heart.start()
    try:
        yield True
    finally:
        end.set()
        heart.join()
        with suppress(OSError):  # without it, the turn is over all the same, but only after LIMIT seconds
            os.utime(path, (0, 0))


def held(folder: Path) -> bool:
    """Whether a living process works in the folder."""
    return turn(folder).alive


def turn(folder: Path) -> Turn:
    """The last turn in a folder."""
    lock = folder / ".lock"
    last = _last(lock)
    return _read(lock / str(last)) if last else Turn()


def _take(lock: Path, job: str) -> Path | None:
    lock.mkdir(exist_ok=True)
    last = _last(lock)
    if last and _read(lock / str(last)).alive:
        return None
    path = lock / str(last + 1)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
    owner = asdict(Turn(True, socket.gethostname(), os.getpid(), _machine(), _began(os.getpid()), job))
    del owner["alive"]
    owner["time"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
    # On a full disk the file stays empty, which is as good: its age is what counts.
    with suppress(OSError), os.fdopen(file, "w") as text:
        json.dump(owner, text)
    return path


def _last(lock: Path) -> int:
    try:
        return max((int(name) for name in os.listdir(lock) if name.isdigit()), default=0)
    except FileNotFoundError:
        return 0


def _read(path: Path) -> Turn:
    # Opened, not only looked at: NFS asks its server for the age of a file when it is opened, and else may be behind.
    with path.open() as file:
        touched = os.fstat(file.fileno()).st_mtime
        try:
            owner = json.load(file)
            owner.pop("time")
            found = Turn(True, **owner)
        except (ValueError, TypeError, AttributeError, KeyError):
            found = Turn(True)  # it has just been created, or the disk is full
    if touched <= 0:
        alive = False
    elif found.machine and found.machine == _machine():
        alive = _began(found.pid) == found.began  # at once, and also true of a process that has been stopped
    else:
        alive = _age(path.parent, touched) < LIMIT
    return found if alive else Turn(False, found.host, found.pid, found.machine, found.began, found.job)


def _age(folder: Path, touched: float) -> float:
    """Seconds by the file system's own clock, which every machine sees alike."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            return os.fstat(probe.fileno()).st_mtime - touched
    except OSError:
        return 0.0  # a full disk: it cannot be told


def _beat(path: Path, end: threading.Event) -> None:
    following = path.with_name(str(int(path.name) + 1))
    while not end.wait(BEAT):
        if following.exists():
            print(f"{path.parent.parent}: another process has taken over; this one was stopped for too long",
                  file=sys.stderr, flush=True)  # fmt: skip
            os._exit(LOST)  # at once: what runs here must not write one more byte
        with suppress(OSError):
            os.utime(path)


@cache
def _machine() -> str:
    """What two processes that see each other's process numbers have in common."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _began(pid: int) -> str:
    """When a living process began; empty where there is none."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]
