"""Runs a study: its cells, what they cost, the runs that are not finished yet, and the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from framework.ablation import tables
from framework.ablation.grid import Ablation, Cell, Document, Override, cells
from framework.ablation.launch.base import Launcher, Task
from framework.ablation.state import Dump, Measures, check, prepare, read_status, write_status
from framework.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as Lines
    from rich.text import Text

Measure = Callable[[Document], dict[str, int]]

STYLES = {"waiting": "dim", "running": "cyan", "finished": "green", "interrupted": "yellow", "failed": "red"}


def plan(document: Document, root: Path, override: Override, measure: Measure, dump: Dump) -> None:
    """Prints what `run_study` would run; makes nothing.

    Args:
        document: a whole config with an `ablation`.
        root: the folder of all studies.
        override: gives a new document with dotted settings applied; called with the place they come from.
        measure: builds the net of a document and gives its params and macs.
        dump: the text of a config.

    Raises:
        ConfigError: a cell that cannot be built, or a folder that holds other runs.
    """
    ablation = Ablation.read(document)
    runs = cells(document, override)
    measures = _measure(runs, measure)
    check(root / ablation.folder, ablation, runs, dump)
    _print_plan(ablation, runs, measures, root / ablation.folder)


def run_study(
    document: Document,
    root: Path,
    launcher: Launcher,
    task: Task,
    override: Override,
    measure: Measure,
    dump: Dump,
) -> Path:
    """Runs what is not finished of a study, and prints and writes its table.

    Args:
        document: a whole config with an `ablation`.
        root: the folder of all studies.
        launcher: where the runs run.
        task: trains the run of a folder, and writes its status.
        override: gives a new document with dotted settings applied; called with the place they come from.
        measure: builds the net of a document and gives its params and macs.
        dump: the text of a config.

    Returns:
        The study's folder.

    Raises:
        ConfigError: a cell that cannot be built, or a folder that holds other runs; nothing has been run then.
        KeyboardInterrupt: after all runs have been stopped. The same call goes on where they were.
    """
    ablation = Ablation.read(document)
    study = root / ablation.folder
    runs = cells(document, override)
    measures = _measure(runs, measure)
    folders = prepare(study, ablation, runs, measures, dump)
    _print_plan(ablation, runs, measures, study)
    todo = [folder for folder in folders if read_status(folder).state != "finished"]
    for folder in todo:
        # What an earlier launcher left: a failure that is going to be tried again, a "running" of a killed process.
        write_status(folder, replace(read_status(folder), state="waiting", error=""))
    if todo:
        out = tables.console()
        try:
            with _view(out, ablation, runs, study) as watch:
                launcher.run(todo, task, watch)
        except KeyboardInterrupt:
            done = sum(read_status(folder).state == "finished" for folder in folders)
            out.print(f"stopped with {done} of {len(folders)} runs finished; the same command goes on", highlight=False)
            raise
    tables.write(study)
    tables.show(study)
    return study


def _measure(runs: list[Cell], measure: Measure) -> Measures:
    """Params and MACs by `Cell.group`; each net is built once, so that what cannot be built is known at once."""
    from rich.progress import track

    out = tables.console()
    firsts = [run for run in runs if run.seed == runs[0].seed]
    measures = {}
    for run in track(firsts, "building the nets", console=out, transient=True, disable=not out.is_terminal):
        try:
            measures[run.group] = measure(run.document)
        except Exception as error:
            from blocks.base import BuildError  # here, because it imports torch

            if isinstance(error, ConfigError | BuildError):
                raise ConfigError(f"cell {run.name}: {error}") from error
            raise
    return measures


def _print_plan(ablation: Ablation, runs: list[Cell], measures: Measures, study: Path) -> None:
    from rich.table import Table as Lines
    from rich.text import Text

    finished = sum(read_status(study / run.folder).state == "finished" for run in runs)
    shape = f"{len(measures)} cells × {len(ablation.seeds)} seeds"
    lines = Lines()
    for axis in ablation.axes:
        lines.add_column(Text(axis))
    for head in ("seeds", "params", "MACs"):
        lines.add_column(head, justify="right")
    seeds = ", ".join(str(seed) for seed in ablation.seeds)
    for group, choices in {run.group: run.choices for run in runs}.items():
        measured = measures[group]
        texts = [*choices.values(), seeds, tables.short(measured["params"]), tables.short(measured["macs"])]
        lines.add_row(*(Text(text) for text in texts))
    out = tables.console()
    title = f"{ablation.name}: {len(runs)} runs ({shape}), {finished} of them finished, in {study}"
    out.print(Text(title, style="bold"), soft_wrap=True)
    out.print(lines)


@contextmanager
def _view(out: Console, ablation: Ablation, runs: list[Cell], study: Path) -> Iterator[Callable[[], None]]:
    """Gives the function that shows how far the study is: a live table in a terminal, else a line for each end."""
    if not out.is_terminal:
        yield _Log(out, ablation, runs, study)
        return
    from rich.live import Live

    with Live(console=out, auto_refresh=False) as live:

        def watch() -> None:
            live.update(_states(ablation, runs, study), refresh=True)

        watch()
        try:
            yield watch
        finally:
            watch()


def _states(ablation: Ablation, runs: list[Cell], study: Path) -> Lines:
    """Cells × seeds, and how far each run is."""
    from rich.table import Table as Lines
    from rich.text import Text

    texts: dict[str, list[Text]] = {}
    states: Counter[str] = Counter()
    for run in runs:
        status = read_status(study / run.folder)
        states[status.state] += 1
        text: str = status.state
        if status.state == "running":
            text = f"epoch {status.epoch}/{status.epochs}"
        metric = status.metrics.get(ablation.metric)
        if metric is not None and status.state in ("running", "finished"):
            text += f"  {metric:.4g}"
        texts.setdefault(run.name, []).append(Text(text, style=STYLES[status.state]))
    lines = Lines(caption=", ".join(f"{states[state]} {state}" for state in STYLES if states[state]))
    lines.add_column(Text("/".join(ablation.axes)))
    for seed in ablation.seeds:
        lines.add_column(f"seed {seed}")
    for name, row in texts.items():
        lines.add_row(Text(name), *row)
    return lines


class _Log:
    """Prints one line for each run that has finished or failed since the study began."""

    def __init__(self, out: Console, ablation: Ablation, runs: list[Cell], study: Path) -> None:
        self.out, self.metric, self.study = out, ablation.metric, study
        self.open = {run.folder: run for run in runs if read_status(study / run.folder).state != "finished"}
        self.total = len(runs)

    def __call__(self) -> None:
        for folder, run in list(self.open.items()):
            status = read_status(self.study / folder)
            if status.state not in ("finished", "failed"):
                continue
            del self.open[folder]
            number = f"[{self.total - len(self.open):{len(str(self.total))}}/{self.total}]"
            if status.state == "failed":
                result = f"failed: {status.error}  {self.study / folder / 'log.txt'}"
            else:
                result = f"{self.metric} {status.metrics.get(self.metric, float('nan')):.4g}"
                if "seconds" in status.measures:
                    result += f"  {status.measures['seconds']:.0f} s"
            self.out.print(
                f"{number} {run.group} seed={run.seed}  {result}", markup=False, highlight=False, soft_wrap=True
            )
