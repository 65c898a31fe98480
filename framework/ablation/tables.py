"""The table of a study, as a paper would show it: a pure function of the study's folder, whoever ran it."""

from __future__ import annotations

import csv
import io
import math
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from framework.ablation.grid import Published
from framework.ablation.state import cut, read_status, read_study, write_text
from framework.errors import suggest

if TYPE_CHECKING:
    from rich.console import Console

NOTHING = "–"


@dataclass(frozen=True)
class Failure:
    """A run that failed, or finished without the metric that is compared."""

    seed: int
    reason: str
    log: Path


@dataclass(frozen=True)
class Row:
    """One cell of the study over its seeds; what is not there is nan."""

    choices: dict[str, str]
    folder: str
    params: int
    macs: int
    published: float = math.nan
    values: dict[int, float] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    @property
    def name(self) -> str:
        return "/".join(self.choices.values())

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values.values()) if self.values else math.nan

    @property
    def std(self) -> float:
        """The standard deviation of a sample: over n − 1."""
        # A run that diverged makes the mean nan or infinite, which `stdev` does not take.
        known = len(self.values) > 1 and math.isfinite(self.mean)
        return statistics.stdev(self.values.values()) if known else math.nan


@dataclass(frozen=True)
class Table:
    """The rows of a study, in the order of its axes, and what is needed to read them."""

    name: str
    metric: str
    axes: list[str]
    seeds: list[int]
    baseline: dict[str, str]
    published: Published | None
    rows: list[Row]

    @property
    def percent(self) -> bool:
        """Whether the metric is a fraction that readers know in per cent."""
        return self.metric.split("/")[-1].startswith("acc")

    @property
    def label(self) -> str:
        return f"{self.metric} (%)" if self.percent else self.metric

    @property
    def title(self) -> str:
        many = "seeds" if len(self.seeds) > 1 else "seed"
        return f"{self.name}: {self.metric}, mean ± std, {many} {', '.join(str(seed) for seed in self.seeds)}"

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
    def best(self) -> float:
        """The best mean; nan where there is none."""
        means = [row.mean for row in self.rows if not math.isnan(row.mean)]
        name = self.metric.split("/")[-1].lower()
        lower = any(part in name for part in ("loss", "err", "mse", "mae", "perplexity"))
        return (min if lower else max)(means, default=math.nan)

    @property
    def failures(self) -> list[str]:
        """A line for each run that failed."""
        return [
            f"{row.folder} seed={failure.seed}: {failure.reason} ({failure.log})"
            for row in self.rows
            for failure in row.failures
        ]

    def baseline_of(self, row: Row) -> Row | None:
        """What a row is compared with: the row that has the baseline's values where it names them, and its own else."""
        wanted = {**row.choices, **self.baseline}
        return next((other for other in self.rows if other.choices == wanted), None) if self.baseline else None

    def difference(self, row: Row) -> float:
        """How far the mean of a row lies above that of its baseline; nan where it is its own, or has none."""
        baseline = self.baseline_of(row)
        return math.nan if baseline is None or baseline is row else row.mean - baseline.mean

    def show(self, value: float) -> str:
        """A value of the metric, without its unit."""
        return f"{100 * value:.1f}" if self.percent else f"{value:.4g}"

    def show_difference(self, value: float) -> str:
        return f"{100 * value:+.1f}" if self.percent else f"{value:+.4g}"


@dataclass(frozen=True)
class Column:
    """A column as it is printed, everywhere but in CSV."""

    head: str
    texts: list[str]
    number: bool = True
    bold: frozenset[int] = frozenset()


def collect(study: Path) -> Table:
    """The table of a study as far as it has been run.

    Raises:
        ConfigError: there is no study in this folder.
    """
    data = read_study(study)
    published = Published(**data["published"]) if data["published"] else None
    table = Table(data["name"], data["metric"], list(data["axes"]), data["seeds"], data["baseline"], published, [])
    for cell in data["cells"]:
        row = Row(cell["choices"], cell["folder"], cell["params"], cell["macs"])
        if published:
            row = replace(row, published=published.rows.get(row.name, math.nan))
        for seed in table.seeds:
            folder = study / row.folder / f"seed={seed}"
            status = read_status(folder)
            if status.state == "finished" and table.metric in status.metrics:
                row.values[seed] = status.metrics[table.metric]
            elif status.state == "finished":
                reason = f"finished without {table.metric!r}; {suggest(table.metric, status.metrics)}"
                row.failures.append(Failure(seed, reason, folder / "log.txt"))
            elif status.state == "failed":
                row.failures.append(Failure(seed, status.error, folder / "log.txt"))
        table.rows.append(row)
    return table


def columns(table: Table) -> list[Column]:
    """The table in text: what all printed forms share."""
    rows = table.rows
    made = [Column(axis, [row.choices[axis] for row in rows], number=False) for axis in table.axes]
    if any(len(row.values) != len(table.seeds) for row in rows):
        made.append(Column("n", [str(len(row.values)) for row in rows]))
    best = frozenset(place for place, row in enumerate(rows) if row.mean == table.best)
    made.append(Column(table.label, [_metric(table, row) for row in rows], bold=best))
    if table.baseline:
        made.append(Column("Δ vs baseline", [_difference(table, row) for row in rows]))
    made.append(Column("params", [short(row.params) for row in rows]))
    made.append(Column("MACs", [short(row.macs) for row in rows]))
    if table.published:
        numbers = [row.published for row in rows]
        digits = max(len(str(number).partition(".")[2]) for number in numbers)
        texts = [NOTHING if math.isnan(number) else f"{number:.{digits}f}" for number in numbers]
        made.append(Column(table.paper, texts))
    return made


def markdown(table: Table) -> str:
    made = columns(table)
    lines = [[column.head for column in made], ["---:" if column.number else "---" for column in made]]
    for place in range(len(table.rows)):
        texts = [column.texts[place].replace("|", "\\|") for column in made]
        lines.append(
            [f"**{text}**" if place in column.bold else text for column, text in zip(made, texts, strict=True)]
        )
    parts = [f"**{table.title}**", "\n".join(f"| {' | '.join(line)} |" for line in lines), table.source]
    parts.append("\n".join(f"- failed: {failure}" for failure in table.failures))
    return "\n\n".join(part for part in parts if part) + "\n"


def latex(table: Table) -> str:
    """For a document that loads booktabs."""
    made = columns(table)

    def line(texts: list[str]) -> str:
        return f"    {' & '.join(texts)} \\\\"

    body = [
        line([rf"\textbf{{{_tex(c.texts[place])}}}" if place in c.bold else _tex(c.texts[place]) for c in made])
        for place in range(len(table.rows))
    ]
    caption = f"{table.title}. {table.source[:1].upper()}{table.source[1:]}".strip()
    return "\n".join(
        [
            *(f"% failed: {failure}" for failure in table.failures),
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{_tex(caption)}}}",
            rf"  \begin{{tabular}}{{{''.join('r' if column.number else 'l' for column in made)}}}",
            r"    \toprule",
            line([_tex(column.head) for column in made]),
            r"    \midrule",
            *body,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def as_csv(table: Table) -> str:
    """The numbers as they are, for other programs: fractions stay fractions, and what is not there is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*table.axes, "n", table.metric, "std", "difference", "params", "macs", "published", "error"])
    for row in table.rows:
        numbers = [row.mean, row.std, table.difference(row), row.params, row.macs, row.published]
        texts = ["" if math.isnan(number) else str(number) for number in numbers]
        error = "; ".join(failure.reason for failure in row.failures)
        writer.writerow([*row.choices.values(), len(row.values), *texts, error])
    return text.getvalue()


def write(study: Path) -> list[Path]:
    """Writes the table of a study, in all its forms, and its figure into the study's folder, and gives their paths."""
    from framework.ablation.figure import draw

    table = collect(study)
    texts = {"table.md": markdown(table), "table.csv": as_csv(table), "table.tex": latex(table)}
    for name, text in texts.items():
        write_text(study / name, text)
    draw(table, study / "figure.png")
    return [study / name for name in (*texts, "figure.png")]


def show(study: Path) -> None:
    """Prints the table of a study, and the paths of its written forms."""
    from rich.table import Table as Lines
    from rich.text import Text

    table = collect(study)
    made = columns(table)
    lines = Lines()
    for column in made:
        lines.add_column(Text(column.head), justify="right" if column.number else "left")
    for place in range(len(table.rows)):
        lines.add_row(*(Text(c.texts[place], style="bold" if place in c.bold else "") for c in made))
    failures = [f"failed: {failure}" for failure in table.failures]
    paths = [str(path) for path in sorted([*study.glob("table.*"), *study.glob("figure.png")])]
    out = console()
    # Beside the table and not its title and caption, which would be wrapped to its width.
    out.print(Text(table.title, style="bold"), soft_wrap=True)
    out.print(lines)
    for line in filter(None, [table.source, *failures, *paths]):
        out.print(Text(line), soft_wrap=True)


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


def _metric(table: Table, row: Row) -> str:
    if row.values:
        return f"{table.show(row.mean)} ± {table.show(row.std) if len(row.values) > 1 else NOTHING}"
    if row.failures:
        return f"failed: {cut(row.failures[0].reason, 40)}"
    return NOTHING


def _difference(table: Table, row: Row) -> str:
    if table.baseline_of(row) is row:
        return "baseline"
    difference = table.difference(row)
    return NOTHING if math.isnan(difference) else table.show_difference(difference)


def _tex(text: str) -> str:
    special: dict[str, str | int | None] = {each: f"\\{each}" for each in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"±": r"$\pm$", "Δ": r"$\Delta$", "×": r"$\times$", "→": r"$\to$", "–": "--", "…": r"\dots{}"}
    return text.translate(str.maketrans(special))
