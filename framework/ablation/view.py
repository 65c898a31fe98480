"""A study in the terminal: how far its runs are, and its table."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from framework.ablation import forms, tables
from framework.ablation.grid import Choices
from framework.ablation.state import Status, read_status, read_study
from framework.ablation.tables import Column, Table, collect, columns

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table as Lines

STYLES = {
    "waiting": "dim",
    "running": "cyan",
    "finished": "green",
    "interrupted": "yellow",
    "stopped": "magenta",
    "failed": "red",
}

# Seconds between two looks at a study: thousands of small files are read each time.
PAUSE = 2.0


class Run(NamedTuple):
    """One run of a study: the folder of its cell, its seed, its own folder."""

    cell: str
    seed: int
    folder: Path


class Progress:
    """How far the runs of a study are.

    Args:
        runs: of the study, or some of them.
        metric: the one that is shown.
        again: folders of those that are going to be run, whatever an earlier launcher has left there.
    """

    def __init__(self, runs: Iterable[Run], metric: str, again: Collection[Path] = ()) -> None:
        self.metric = metric
        self.statuses = {run: Status() if run.folder in again else read_status(run.folder) for run in runs}

    def refresh(self, left: Collection[Path] = ()) -> Iterator[Run]:
        """Looks again, and gives each run whose state has changed; a failure of one that is left is none yet."""
        for run, before in self.statuses.items():
            if before.state == "finished":
                continue
            status = read_status(run.folder)
            if status.state == "failed" and run.folder in left:
                continue
            self.statuses[run] = status
            if status.state != before.state:
                yield run

    @property
    def over(self) -> bool:
        return all(status.final for status in self.statuses.values())

    @property
    def counts(self) -> str:
        """`3 finished, 1 failed`."""
        return count(self.statuses.values())

    def line(self, run: Run) -> str:
        """What has become of a run."""
        status = self.statuses[run]
        name = f"{run.cell} seed={run.seed}"
        if not status.final:
            return f"{name}  {status.state}{f' again after: {status.error}' if status.error else ''}"
        done = sum(each.state in ("finished", "failed", "stopped") for each in self.statuses.values())
        number = f"[{done:{len(str(len(self.statuses)))}}/{len(self.statuses)}]"
        if status.state == "finished":
            result = f"{self.metric} {status.values.get(self.metric, float('nan')):.4g}"
            if "seconds" in status.measures:
                result += f"  {status.measures['seconds']:.0f} s"
            return f"{number} {name}  {result}"
        if status.state == "stopped":
            return f"{number} {name}  stopped as hopeless at epoch {status.epoch}"
        return f"{number} {name}  {status.state}: {status.error or 'stopped'}  {run.folder / 'log.txt'}"

    def lines(self) -> Lines:
        """Cells × seeds."""
        from rich.table import Table as Lines
        from rich.text import Text

        cells: dict[str, dict[int, Text]] = {}
        for run, status in self.statuses.items():
            text: str = status.state
            if status.state == "running":
                text = f"epoch {status.epoch}/{status.epochs}"
            metric = status.values.get(self.metric)
            if metric is not None and status.state in ("running", "finished"):
                text += f"  {metric:.4g}"
            cells.setdefault(run.cell, {})[run.seed] = Text(text, style=STYLES[status.state])
        lines = Lines(caption=self.counts)
        lines.add_column("cell")
        seeds = dict.fromkeys(run.seed for run in self.statuses)
        for seed in seeds:
            lines.add_column(f"seed {seed}")
        for cell, row in cells.items():
            lines.add_row(Text(cell), *(row.get(seed, Text()) for seed in seeds))
        return lines


def count(statuses: Iterable[Status]) -> str:
    """`3 finished, 1 failed`."""
    states = Counter[str](status.state for status in statuses)
    return ", ".join(f"{states[state]} {state}" for state in STYLES if states[state])


@contextmanager
def following(progress: Progress) -> Iterator[Callable[[Collection[Path]], None]]:
    """Gives a function that shows how far the runs are: cells × seeds in a terminal, else a line for each change.

    It may be called as often as one likes, with the runs that are not over yet.
    """
    out = tables.console()
    if out.is_terminal:
        from rich.live import Live

        with Live(progress.lines(), console=out, auto_refresh=False) as live:

            def draw(left: Collection[Path]) -> None:
                list(progress.refresh(left))
                live.update(progress.lines(), refresh=True)

            yield from _now_and_then(draw)
    else:
        yield from _now_and_then(lambda left: _log(out, progress, left))


def _now_and_then(show: Callable[[Collection[Path]], None]) -> Iterator[Callable[[Collection[Path]], None]]:
    """`show`, at most once in a while, and once more at the end."""
    last = 0.0

    def call(left: Collection[Path]) -> None:
        nonlocal last
        if time.monotonic() - last > PAUSE:
            show(left)
            last = time.monotonic()

    try:
        yield call
    finally:
        show(())


def _log(out: Console, progress: Progress, left: Collection[Path] = ()) -> None:
    for run in progress.refresh(left):
        out.print(progress.line(run), markup=False, highlight=False, soft_wrap=True)


def watch(study: Path, chosen: Callable[[Choices], bool]) -> None:
    """Shows the table of a study again and again until all runs are over or Ctrl-C; a line for each change where there
    is no terminal. Then prints and writes it.

    Raises:
        ConfigError: there is no study in this folder.
    """
    out = tables.console()
    progress = Progress(runs_of(study, chosen), collect(study).metric.name)
    with suppress(KeyboardInterrupt):
        if out.is_terminal:
            from rich.console import Group
            from rich.live import Live
            from rich.text import Text

            with Live(console=out, auto_refresh=False, transient=True) as live:
                while True:
                    list(progress.refresh())
                    shown = [*_table(collect(study), out.width, chosen), Text(progress.counts)]
                    live.update(Group(*shown), refresh=True)
                    if progress.over:
                        break
                    time.sleep(PAUSE)
        else:
            out.print(progress.counts, markup=False, highlight=False, soft_wrap=True)
            while not progress.over:
                time.sleep(PAUSE)
                _log(out, progress)
    table = collect(study)
    forms.write(study, table)
    show(study, table, chosen)


def runs_of(study: Path, chosen: Callable[[Choices], bool]) -> list[Run]:
    """The runs of a study's folder, or some of its cells'."""
    data = read_study(study)
    return [
        Run(cell["folder"], seed, study / cell["folder"] / f"seed={seed}")
        for cell in data["cells"]
        if chosen(cell["choices"])
        for seed in data["seeds"]
    ]


def show(study: Path, table: Table, chosen: Callable[[Choices], bool] = lambda choices: True) -> None:
    """Prints the table of a study, or some of its cells, and the paths of its written forms."""
    from rich.text import Text

    out = tables.console()
    for part in _table(table, out.width, chosen):
        out.print(part)
    paths = sorted([*study.glob("table.*"), *study.glob("figure*.png")])
    for line in [*(f"failed: {failure}" for failure in table.failures), *map(str, paths)]:
        out.print(Text(line), soft_wrap=True)


def _table(table: Table, width: int, chosen: Callable[[Choices], bool]) -> list[RenderableType]:
    from rich.table import Table as Lines
    from rich.text import Text

    made = columns(table)
    fitting = _fitting(made, width)
    lines = Lines()
    for column in fitting:
        lines.add_column(Text(column.head), justify="right" if column.number else "left")
    for place, row in enumerate(table.rows):
        if chosen(row.choices):
            lines.add_row(*(Text(c.texts[place], style="bold" if place in c.bold else "") for c in fitting))
    below = list(table.notes)
    if lines.row_count < len(table.rows):
        below.insert(
            0, f"{lines.row_count} of the {len(table.rows)} cells that the study has and the statistics are of"
        )
    if left_out := [column.head for column in made if column not in fitting]:
        below.append(f"no room for {', '.join(left_out)}: see table.html")
    return [Text(table.title, style="bold"), lines, *map(Text, below)]


def _fitting(made: list[Column], width: int) -> list[Column]:
    """The columns without as many of the highest ranks as it takes to fit."""
    fitting = list(made)
    while sum(max(map(len, [column.head, *column.texts])) + 3 for column in fitting) + 1 > width:
        last = max(fitting, key=lambda column: column.rank)
        if not last.rank:
            break
        fitting.remove(last)
    return fitting
