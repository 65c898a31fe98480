"""The table of a study, as a paper would show it: a pure function of the study's folder, whoever ran it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from framework.ablation import stats
from framework.ablation.grid import Choices, Published, When, applying
from framework.ablation.state import read_status, read_study
from framework.ablation.stats import Comparison, Sample
from framework.errors import suggest

if TYPE_CHECKING:
    from rich.console import Console

NOTHING = "–"


@dataclass(frozen=True)
class Measure:
    """Something that runs measured of themselves: its column, and the one number that its seeds make."""

    head: str
    over_seeds: Callable[[Iterable[float]], float]


# By the name in the status of a run.
MEASURES = {
    "train_images_per_s": Measure("train img/s", statistics.fmean),
    "images_per_s": Measure("eval img/s", statistics.fmean),
    "peak_mib": Measure("peak MiB", max),
    "seconds": Measure("time (s)", statistics.fmean),
}


@dataclass(frozen=True)
class Failure:
    """A run that failed, or finished without a metric that is compared."""

    seed: int
    reason: str
    log: Path


@dataclass(frozen=True)
class Metric:
    """A metric, and how its name says that it is read."""

    name: str

    @property
    def percent(self) -> bool:
        """Whether it is a fraction that readers know in per cent."""
        return self.name.split("/")[-1].startswith("acc")

    @property
    def lower(self) -> bool:
        """Whether less is better."""
        name = self.name.split("/")[-1].lower()
        return any(part in name for part in ("loss", "err", "mse", "mae", "perplexity"))

    @property
    def label(self) -> str:
        return f"{self.name} (%)" if self.percent else self.name

    @property
    def scale(self) -> int:
        """What a value is multiplied with before it is shown."""
        return 100 if self.percent else 1

    def show(self, value: float, sign: str = "", digits: int = 4) -> str:
        """A value without its unit; `sign="+"` for a difference. `digits` count only where it is no fraction."""
        return format(self.scale * value, f"{sign}.1f" if self.percent else f"{sign}.{digits}g")


@dataclass(frozen=True)
class Result:
    """One metric of one cell.

    Args:
        sample: over its seeds.
        comparison: with its baseline, uncorrected; of nothing where it is the baseline, or has none.
        sign_flip: p after Holm's correction over the cells of the table.
        t_test: the same of the t-test.
    """

    sample: Sample
    comparison: Comparison
    sign_flip: float
    t_test: float


@dataclass(frozen=True)
class Row:
    """One cell of the study over its seeds; what is not there is nan.

    Args:
        values: by metric and seed, of the runs that finished; nan where one has diverged.
        stopped: the epochs at which runs were stopped as hopeless, by seed.
    """

    choices: Choices
    folder: str
    params: int
    macs: int
    published: float = math.nan
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    stopped: dict[int, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return "/".join(self.choices.values())

    @property
    def label(self) -> str:
        return " / ".join(self.choices.values())


@dataclass(frozen=True)
class Table:
    """The rows of a study, in the order of its axes, and what is needed to read them."""

    name: str
    metrics: list[Metric]
    axes: dict[str, list[str]]
    seeds: list[int]
    baseline: Choices
    when: When
    published: Published | None
    rows: list[Row]

    @property
    def metric(self) -> Metric:
        """The main one."""
        return self.metrics[0]

    @property
    def title(self) -> str:
        metrics = ", ".join(metric.name for metric in self.metrics)
        return f"{self.name}: {metrics}, mean ± std, {self.which}"

    @property
    def which(self) -> str:
        """`seeds 0, 1, 2`."""
        return f"{'seeds' if len(self.seeds) > 1 else 'seed'} {', '.join(str(seed) for seed in self.seeds)}"

    @property
    def paper(self) -> str:
        """The head of the column of published numbers."""
        metric = self.published.metric if self.published else ""
        return f"paper ({metric})" if metric else "paper"

    @property
    def source(self) -> str:
        """Where the published numbers come from; empty where there are none."""
        return f"paper: {self.published.source}" if self.published else ""

    @property
    def failures(self) -> list[str]:
        """A line for each run that failed."""
        return [
            f"{row.folder} seed={failure.seed}: {failure.reason} ({failure.log})"
            for row in self.rows
            for failure in row.failures
        ]

    @cached_property
    def baselines(self) -> list[Row | None]:
        """What each row is compared with: the row that has the baseline's values where it names them, else its own."""
        rows = {frozenset(row.choices.items()): row for row in self.rows}
        wanted = [applying({**row.choices, **self.baseline}, self.when) for row in self.rows]
        return [rows.get(frozenset(choices.items())) if self.baseline else None for choices in wanted]

    @cached_property
    def results(self) -> dict[str, list[Result]]:
        """By metric: one for each row."""
        return {metric.name: self._results(metric.name) for metric in self.metrics}

    def _results(self, metric: str) -> list[Result]:
        samples = [stats.sample(list(row.values.get(metric, {}).values())) for row in self.rows]
        comparisons = [
            stats.compare(row.values.get(metric, {}), baseline.values.get(metric, {}))
            if baseline and baseline is not row
            else stats.compare({}, {})
            for row, baseline in zip(self.rows, self.baselines, strict=True)
        ]
        sign_flips = stats.holm([comparison.sign_flip for comparison in comparisons])
        t_tests = stats.holm([comparison.t_test for comparison in comparisons])
        return [Result(*each) for each in zip(samples, comparisons, sign_flips, t_tests, strict=True)]

    def best(self, metric: Metric) -> float:
        """The best mean; nan where there is none."""
        means = [result.sample.mean for result in self.results[metric.name]]
        return (min if metric.lower else max)((mean for mean in means if math.isfinite(mean)), default=math.nan)

    @property
    def notes(self) -> list[str]:
        """How the table is to be read, and what it cannot show; a sentence or two each."""
        compared = [result for result in self.results[self.metric.name] if not math.isnan(result.sign_flip)]
        if not compared:
            return [note for note in (*self.selection, self.source) if note]
        many = f"over {len(compared)} comparisons" if len(compared) > 1 else "over 1 comparison"
        read = (
            "Δ: mean difference to the baseline over the seeds that both have, with its 95 % t-interval. p flip: exact "
            f"sign-flip test, p t: t-test, both paired by seed, two-sided, after Holm's correction {many}."
        )
        reach = stats.reach(max(result.comparison.difference.n for result in compared), len(compared))
        return [note for note in (read, reach, *self.selection, self.source) if note]

    @property
    def stopped(self) -> bool:
        """Whether runs were stopped as hopeless."""
        return any(row.stopped for row in self.rows)

    @property
    def selection(self) -> list[str]:
        """What it means that runs were stopped, and which; nothing where none was."""
        if not self.stopped:
            return []
        means = (
            "Hopeless runs were stopped early (ASHA): every mean, interval and test is of the runs that survived, "
            "which were selected by their results. They are not comparable to those of a full study."
        )
        cells = [
            f"{row.folder} {len(row.stopped)} of {len(self.seeds)} "
            f"({', '.join(f'seed {seed} at epoch {epoch}' for seed, epoch in row.stopped.items())})"
            for row in self.rows
            if row.stopped
        ]
        return [means, f"Stopped: {'; '.join(cells)}."]


@dataclass(frozen=True)
class Column:
    """A column as it is printed, everywhere but in CSV; where there is little room the highest `rank` is left out."""

    head: str
    texts: list[str]
    number: bool = True
    bold: frozenset[int] = frozenset()
    rank: int = 0


def collect(study: Path) -> Table:
    """The table of a study as far as it has been run.

    Raises:
        ConfigError: there is no study in this folder.
    """
    data = read_study(study)
    published = Published(**data["published"]) if data["published"] else None
    names = [data["metric"]] if isinstance(data["metric"], str) else data["metric"]
    table = Table(
        data["name"],
        [Metric(name) for name in names],
        data["axes"],
        data["seeds"],
        data["baseline"],
        data.get("when", {}),
        published,
        [],
    )
    for cell in data["cells"]:
        row = Row(cell["choices"], cell["folder"], cell["params"], cell["macs"], values={name: {} for name in names})
        if published:
            row = replace(row, published=published.rows.get(row.name, math.nan))
        measured: dict[str, list[float]] = {}
        for seed in table.seeds:
            folder = study / row.folder / f"seed={seed}"
            status = read_status(folder)
            if status.state == "failed":
                row.failures.append(Failure(seed, status.error, folder / "log.txt"))
            if status.state == "stopped":
                row.stopped[seed] = status.epoch
            if status.state != "finished":
                continue
            for name, value in status.measures.items():
                measured.setdefault(name, []).append(value)
            for name in names:
                if name in status.values:
                    row.values[name][seed] = status.values[name]
                else:
                    reason = f"finished without {name!r}; {suggest(name, status.metrics)}"
                    row.failures.append(Failure(seed, reason, folder / "log.txt"))
        row.measures.update({name: MEASURES[name].over_seeds(measured[name]) for name in MEASURES if name in measured})
        table.rows.append(row)
    return table


def columns(table: Table) -> list[Column]:
    """The table in text: what all printed forms share."""
    rows, main = table.rows, table.metric
    results = table.results[main.name]
    made = [Column(axis, [row.choices.get(axis, NOTHING) for row in rows], number=False) for axis in table.axes]
    if any(result.sample.n != len(table.seeds) for result in results):
        made.append(Column("n", [str(result.sample.n) for result in results], rank=1))
    if table.stopped:
        made.append(Column("stopped", [str(len(row.stopped)) for row in rows], rank=1))
    made.append(_means(table, main))
    if len(table.seeds) > 1:
        intervals = [_interval(main, result.sample) or NOTHING for result in results]
        made.append(Column("95 % interval", intervals, rank=6))
    if table.baseline:
        made.append(Column("Δ [95 % interval]", [_difference(table, place) for place in range(len(rows))], rank=1))
        if len(table.seeds) > 1:
            made.append(Column("p flip", [_p(result.sign_flip) for result in results], rank=2))
            made.append(Column("p t", [_p(result.t_test) for result in results], rank=6))
    made += [replace(_means(table, metric), rank=3) for metric in table.metrics[1:]]
    made.append(Column("params", [short(row.params) for row in rows], rank=4))
    made.append(Column("MACs", [short(row.macs) for row in rows], rank=4))
    for name, measure in MEASURES.items():
        if any(name in row.measures for row in rows):
            made.append(Column(measure.head, [_measured(row.measures.get(name)) for row in rows], rank=5))
    if table.published:
        numbers = [row.published for row in rows]
        digits = max(len(str(number).partition(".")[2]) for number in numbers)
        texts = [NOTHING if math.isnan(number) else f"{number:.{digits}f}" for number in numbers]
        made.append(Column(table.paper, texts, rank=1))
    return made


def console() -> Console:
    """Where tables are printed; wide where it is not a terminal, so that a log keeps them whole."""
    from rich.console import Console

    out = Console()
    return out if out.is_terminal else Console(width=200)


def short(number: float) -> str:
    """Parameters or MACs: 512, 81.0K, 23.8M, 5.22G."""
    for unit, size, digits in (("G", 1e9, 2), ("M", 1e6, 1), ("K", 1e3, 1)):
        # What would be rounded to 1000.0K is 1.0M.
        if number >= 0.99995 * size:
            return f"{number / size:.{digits}f}{unit}"
    return str(number)


def _means(table: Table, metric: Metric) -> Column:
    samples = [result.sample for result in table.results[metric.name]]
    best = table.best(metric)
    bold = frozenset(place for place, sample in enumerate(samples) if sample.mean == best)
    texts = [_mean(metric, row, sample) for row, sample in zip(table.rows, samples, strict=True)]
    return Column(metric.label, texts, bold=bold)


def _mean(metric: Metric, row: Row, sample: Sample) -> str:
    if diverged := [str(seed) for seed, value in row.values.get(metric.name, {}).items() if not math.isfinite(value)]:
        return f"diverged: seed {', '.join(diverged)}"
    if sample.n:
        return f"{metric.show(sample.mean)} ± {NOTHING if sample.n == 1 else metric.show(sample.std, digits=2)}"
    return "failed" if row.failures else "stopped" if row.stopped else NOTHING


def _interval(metric: Metric, sample: Sample, sign: str = "") -> str:
    """Empty where there is none."""
    return (
        "" if math.isnan(sample.low) else f"[{metric.show(sample.low, sign, 3)}, {metric.show(sample.high, sign, 3)}]"
    )


def _difference(table: Table, place: int) -> str:
    if table.baselines[place] is table.rows[place]:
        return "baseline"
    difference = table.results[table.metric.name][place].comparison.difference
    if not math.isfinite(difference.mean):
        return NOTHING
    return f"{table.metric.show(difference.mean, '+', 3)} {_interval(table.metric, difference, '+')}".strip()


def _p(value: float) -> str:
    return NOTHING if math.isnan(value) else "<0.001" if value < 0.001 else f"{value:.3f}"


def _measured(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"
