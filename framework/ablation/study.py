"""Runs a study: its cells, what they cost, the runs that are not finished yet, and the table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from framework.ablation import forms, tables
from framework.ablation.grid import Ablation, Cell, Document, Override, cells, selection
from framework.ablation.launch.base import Launcher
from framework.ablation.launch.local import start_server
from framework.ablation.launch.work import Task
from framework.ablation.state import Dump, Measures, Status, check, prepare, read_status
from framework.ablation.view import Progress, Run, count, following, show
from framework.errors import ConfigError

Measure = Callable[[Document], dict[str, int]]

# What the runs that are left will take, in words.
Expect = Callable[[list[Cell]], str]


def plan(
    document: Document,
    root: Path,
    override: Override,
    measure: Measure,
    dump: Dump,
    only: Sequence[str] = (),
    expect: Expect | None = None,
) -> list[Path]:
    """Prints what `run_study` would run; makes nothing.

    Args:
        document: a whole config with an `ablation`.
        root: the folder of all studies.
        override: gives a new document with dotted settings applied; called with the place they come from.
        measure: builds the net of a document and gives its params and macs.
        dump: the text of a config.
        only: `axis=value,value` of the cells that are meant; all where there is none.
        expect: what the runs that are left will take.

    Returns:
        The folders of the runs that are not finished.

    Raises:
        ConfigError: a cell that cannot be built, or a folder that holds other runs.
    """
    ablation = Ablation.read(document)
    study = root / ablation.folder
    runs = cells(document, override)
    chosen = _choose(ablation, runs, only)
    measures = _measure(chosen, measure)
    check(study, ablation, runs, dump)
    left = _print_plan(ablation, chosen, measures, study)
    if expect and left:
        tables.console().print(expect(left), markup=False, highlight=False, soft_wrap=True)
    return [study / run.folder for run in left]


def run_study(
    document: Document,
    root: Path,
    launcher: Launcher,
    task: Task,
    override: Override,
    measure: Measure,
    dump: Dump,
    only: Sequence[str] = (),
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
        only: `axis=value,value` of the cells to run; the folder and the table are of all of them.

    Returns:
        The study's folder.

    Raises:
        ConfigError: a cell that cannot be built, or a folder that holds other runs; nothing has been run then.
        KeyboardInterrupt: after all runs have been stopped. The same call goes on where they were.
    """
    ablation = Ablation.read(document)
    study = root / ablation.folder
    runs = cells(document, override)
    chosen = _choose(ablation, runs, only)
    measures = _measure(runs, measure)
    prepare(study, ablation, runs, measures, dump)
    left = [study / run.folder for run in _print_plan(ablation, chosen, measures, study)]
    if left:
        every = [Run(run.group, run.seed, study / run.folder) for run in chosen]
        progress = Progress(every, ablation.metrics[0], set(left))
        forms.ready()  # now, while the processes of the runs come up
        try:
            with following(progress) as watch:
                launcher.run(left, task, watch)
        except KeyboardInterrupt:
            done = sum(status.state == "finished" for status in progress.statuses.values())
            text = f"stopped with {done} of {len(chosen)} runs finished; the same command goes on"
            tables.console().print(text, highlight=False)
            raise
    table = tables.collect(study)
    forms.write(study, table)
    show(study, table)
    return study


def _choose(ablation: Ablation, runs: list[Cell], only: Sequence[str]) -> list[Cell]:
    fits = selection(only, ablation.axes)
    chosen = [run for run in runs if fits(run.choices)]
    if not chosen:
        raise ConfigError(f"--only {' --only '.join(only)}: the study has no such cell")
    return chosen


# Below so many nets a pool of processes is not up before they are built.
POOL_FROM = 40


def _measure(runs: list[Cell], measure: Measure) -> Measures:
    """Params and MACs by `Cell.group`; each net is built once, so that what cannot be built is known at once."""
    from rich.progress import track

    out = tables.console()
    firsts = [run for run in runs if run.seed == runs[0].seed]
    measures = {}
    with _measuring(firsts, measure) as results:
        for run in track(firsts, "building the nets", console=out, transient=True, disable=not out.is_terminal):
            try:
                measures[run.group] = next(results)
            except Exception as error:
                from blocks.base import BuildError  # here, because it imports torch

                if isinstance(error, ConfigError | BuildError):
                    raise ConfigError(f"cell {run.name}: {error}") from error
                raise
    return measures


@contextmanager
def _measuring(runs: list[Cell], measure: Measure) -> Iterator[Iterator[dict[str, int]]]:
    """The measures of each run in order: here, or for many runs in a process on each core."""
    cores = os.cpu_count() or 1
    if len(runs) < POOL_FROM or cores < 2:
        yield (measure(run.document) for run in runs)
        return
    start_server()
    with ProcessPoolExecutor(cores, get_context("forkserver")) as pool:
        try:
            futures = [pool.submit(measure, run.document) for run in runs]
            yield (future.result() for future in futures)
        finally:
            pool.shutdown(cancel_futures=True)


def _print_plan(ablation: Ablation, runs: list[Cell], measures: Measures, study: Path) -> list[Cell]:
    """Prints a line for each cell, and gives the runs that are not finished."""
    from rich.table import Table as Lines
    from rich.text import Text

    statuses: dict[str, list[Status]] = {}
    left = []
    for run in runs:
        status = read_status(study / run.folder)
        statuses.setdefault(run.group, []).append(status)
        if not status.over:
            left.append(run)
    lines = Lines()
    for axis in ablation.axes:
        lines.add_column(Text(axis))
    for head in ("seeds", "params", "MACs"):
        lines.add_column(head, justify="right")
    lines.add_column("runs")
    seeds = ", ".join(str(seed) for seed in ablation.seeds)
    for group, choices in {run.group: run.choices for run in runs}.items():
        measured = measures[group]
        values = [choices.get(axis, tables.NOTHING) for axis in ablation.axes]
        costs = [tables.short(measured["params"]), tables.short(measured["macs"])]
        lines.add_row(*(Text(text) for text in (*values, seeds, *costs, count(statuses[group]))))
    shape = f"{len(statuses)} cells × {len(ablation.seeds)} seeds"
    done = Counter(status.state for each in statuses.values() for status in each)
    over = f"{done['finished']} of them finished" + (f", {done['stopped']} stopped" if done["stopped"] else "")
    title = f"{ablation.name}: {len(runs)} runs ({shape}), {over}, in {study}"
    out = tables.console()
    out.print(Text(title, style="bold"), soft_wrap=True)
    out.print(lines)
    return left
