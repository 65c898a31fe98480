"""What a launcher is."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from framework.ablation.launch.work import Task
from framework.ablation.lock import held, hold
from framework.ablation.state import State, Status, read_status, write_status
from framework.errors import ConfigError

Watch = Callable[[Collection[Path]], None]

# How the process of a run has ended, in words; None: it did nothing, because another process has the run.
Ended = list[tuple[Path, str | None]]


class Launcher(ABC):
    """Runs the folders of a study somewhere: in local processes, on a cluster.

    A launcher only starts processes and sees them end. How a run went is in its folder alone, and a lock there keeps
    all others out; so several launchers can work on one study, and one can go on where another was killed.

    Args:
        retries: how often a failed run is tried again.
    """

    def __init__(self, retries: int = 1) -> None:
        if retries < 0:
            raise ConfigError(f"launcher.retries: got {retries}; give how often a failed run is tried again, or 0")
        self.retries = retries
        self.hopeless: set[Path] = set()  # runs that are interrupted for good

    @abstractmethod
    def plan(self, folders: list[Path]) -> str:
        """What `run` would start for these folders, in a few lines. Starts nothing.

        Raises:
            ConfigError: it cannot be started here.
        """

    @abstractmethod
    def session(self, folders: list[Path], task: Task) -> AbstractContextManager[None]:
        """A context manager around all that follows."""

    @abstractmethod
    def room(self) -> int:
        """How many more runs can be started now."""

    @abstractmethod
    def start(self, folders: list[Path]) -> None:
        """Starts a process for each folder: `work(folder, task)`."""

    @abstractmethod
    def poll(self) -> Ended:
        """The runs whose processes have ended since the last call; waits for the next one, but not for long."""

    @abstractmethod
    def stop(self) -> Ended:
        """Interrupts all processes, and comes back when they have ended."""

    def run(self, folders: list[Path], task: Task, watch: Watch) -> None:
        """Runs each folder, and comes back when all have ended, also those that another launcher runs.

        Args:
            folders: what to run, in this order.
            task: a function of a module, which can be sent to another process by its name.
            watch: called again and again with the runs that have not ended.

        Raises:
            ConfigError: nothing can be started here.
            KeyboardInterrupt: after all runs have been stopped.
        """
        left = dict.fromkeys(folders, self.retries)
        queue = list(folders)
        ended: dict[Path, str | None] = {}
        with self.session(folders, task):
            try:
                while left:
                    self._start(queue, left)
                    ended.update(self.poll())
                    # A process of another machine that was killed holds its lock until its beats have been missed.
                    for folder in [folder for folder in ended if not held(folder)]:
                        how = ended.pop(folder)
                        if how is None or self._settle(folder, how, "failed", left):
                            queue.append(folder)
                        else:
                            del left[folder]
                    watch(left)
            except BaseException:
                for folder, how in [*ended.items(), *self.stop()]:
                    if how is not None and (folder in self.hopeless or read_status(folder).state == "running"):
                        self._settle(folder, how, "interrupted", {})
                raise

    def _start(self, queue: list[Path], left: dict[Path, int]) -> None:
        """Starts what there is room for of the queue and is not another's; takes it, and what is finished, off it."""
        room = self.room()
        chosen: list[Path] = []
        for folder in list(queue) if room else []:
            if len(chosen) == room:
                break
            if held(folder):
                continue
            queue.remove(folder)
            status = read_status(folder)
            if status.over:
                del left[folder]
                continue
            if status.state != "waiting":
                # What an earlier launcher left: a failure that is tried again, a "running" of a killed process.
                _write(folder, replace(status, state="waiting", error=""))
            chosen.append(folder)
        if chosen:
            self.start(chosen)

    def _settle(self, folder: Path, how: str, state: State, left: dict[Path, int]) -> bool:
        """Gives a run, whose process has ended, a final status if it has none; gives whether it is tried again."""
        status = read_status(folder)
        if not status.final:
            status = replace(status, state=state, error=how)
        if folder in self.hopeless and status.state != "finished":
            status = replace(status, state="stopped", error="")
        again = status.state == "failed" and left.get(folder, 0) > 0
        if again:
            status = replace(status, state="waiting")  # with its error, so that one can see why
        if not _write(folder, status):
            return True
        if again:
            left[folder] -= 1
        return again


def _write(folder: Path, status: Status) -> bool:
    """Writes the status of a run that nobody works on; False if somebody does by now."""
    try:
        if status == read_status(folder):
            return True
        with hold(folder) as mine:
            if mine:
                write_status(folder, status)
            return mine
    except OSError as error:  # a full disk: the other runs go on
        print(f"{folder}: {status.state} {status.error} (not written: {error})", file=sys.stderr)
        return True
