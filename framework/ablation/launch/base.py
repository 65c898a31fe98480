"""What a launcher is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

Task = Callable[[Path], None]


class Launcher(ABC):
    """Runs the folders of a study somewhere: in local processes, on a cluster."""

    @abstractmethod
    def run(self, folders: list[Path], task: Task, watch: Callable[[], None]) -> None:
        """Runs `task(folder)` for each folder, each of which waits, and comes back when all have ended.

        Whether a run went well is in its folder's status, and nowhere else: what ends without a final status
        (finished, interrupted, failed) is given one here, with the reason.

        Args:
            folders: what to run, in this order.
            task: a function of a module, which can be sent to another process by its name.
            watch: called about twice a second, and after each end.

        Raises:
            KeyboardInterrupt: after all runs have been stopped.
        """
