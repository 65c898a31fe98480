"""The figures of a study: its cells, what they cost, how they learned."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framework.ablation.labels import Point, write_names
from framework.ablation.state import counted
from framework.ablation.stats import Sample, sample
from framework.ablation.tables import Row, Table, short
from framework.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS, SEEDS, PAPER, BASELINE = "#0b5394", "#7aa6d1", "#c55a11", "#888888"

# How far seeds and published numbers lie beside the mean, in lines: under its bar they could not be seen.
ASIDE = 0.2

# With more lines than these they are drawn small, and of points only the best for their cost are named.
MANY = 40

# More curves than these could not be told apart: the best are drawn.
CURVES = 10

# Without the grey of the baseline.
COLORS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf", "#00429d"]

INTERVAL = "mean, 95 % interval"

# By metric and epoch.
Curves = dict[str, dict[int, float]]


def draw(study: Path, table: Table) -> list[Path]:
    """Draws what there is data for into PNG files of the study's folder, and gives their paths."""
    makers: dict[str, Callable[[], Figure | None]] = {
        "figure.png": lambda: cells(table),
        "figure_macs.png": lambda: against(table, "MACs", lambda row: row.macs, short),
        "figure_throughput.png": lambda: against(
            table, "images/s, evaluation", lambda row: row.measures.get("images_per_s", math.nan), "{:.0f}".format, -1
        ),
        "figure_curves.png": lambda: curves(study, table),
    }
    drawn = []
    for name, make in makers.items():
        figure = make()
        if figure is None:
            (study / name).unlink(missing_ok=True)  # of what the folder held before
        else:
            figure.savefig(study / name, dpi=150)
            drawn.append(study / name)
    return drawn


def cells(table: Table) -> Figure:
    """Each cell's mean, interval and seeds, with the paper's numbers on a scale of their own."""
    rows, metric = table.rows, table.metric
    small = len(rows) > MANY
    labels = [row.label for row in rows]
    figure = _figure(5.5 + 0.07 * max(len(label) for label in labels), 2 + (0.16 if small else 0.5) * len(rows))
    axes = figure.add_subplot()
    samples = [result.sample for result in table.results[metric.name]]
    measured = [place for place, each in enumerate(samples) if math.isfinite(each.mean)]
    seeds = [
        (metric.scale * value, place + ASIDE)
        for place, row in enumerate(rows)
        for value in row.values[metric.name].values()
    ]
    axes.errorbar(
        [metric.scale * samples[place].mean for place in measured],
        measured,
        xerr=[metric.scale * _half(samples[place]) for place in measured],
        fmt="o",
        color=OURS,
        markersize=4 if small else 7,
        capsize=2 if small else 4,
        label=INTERVAL,
    )
    axes.plot([x for x, _ in seeds], [y for _, y in seeds], "o", color=SEEDS, markersize=4 - small, label="one seed")
    if (baseline := _baseline(table)) in measured:
        x = metric.scale * samples[baseline].mean
        axes.axvline(x, color=BASELINE, linestyle="--", linewidth=1, zorder=1, label="baseline")
    axes.set_xlabel(metric.label)
    axes.set_yticks(range(len(rows)), labels, fontsize=7 if small else 10)
    axes.set_ylabel(" / ".join(table.axes))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(top=small, labeltop=small)
    if any(not math.isnan(row.published) for row in rows):
        paper = axes.twiny()
        paper.plot(
            [row.published for row in rows],
            [place - ASIDE for place in range(len(rows))],
            "D",
            color=PAPER,
            fillstyle="none",
            markersize=5 if small else 8,
            label="paper",
        )
        paper.set_xlabel(table.paper, color=PAPER)
        paper.tick_params(axis="x", colors=PAPER)
    _entitle(figure, f"{table.name}: {metric.name}, {table.which}", 4)
    return figure


def against(
    table: Table, head: str, cost: Callable[[Row], float], show: Callable[[float], str], better: int = 1
) -> Figure | None:
    """The metric against what a cell costs; None where no two cells differ in it.

    Args:
        table: the cells.
        head: what it is.
        cost: of a cell; nan where it is not known.
        show: how it is written.
        better: 1 where less of it is better, -1 where more is.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    metric, baseline = table.metric, _baseline(table)
    points = {
        place: Point(cost(row), metric.scale * each.mean, metric.scale * _half(each), row.label)
        for place, (row, result) in enumerate(zip(table.rows, table.results[metric.name], strict=True))
        if math.isfinite((each := result.sample).mean) and math.isfinite(cost(row))
    }
    costs = {point.x for point in points.values()}
    if len(costs) < 2:
        return None
    many, front = len(points) > MANY, _front(points, better, 1 if metric.lower else -1)
    figure = _figure(7.5, 5.5)
    axes = figure.add_subplot()
    for color, label, places in (
        (SEEDS, INTERVAL, [place for place in points if many and place not in front and place != baseline]),
        (OURS, "best at their cost" if many else INTERVAL, front if many else points.keys() - {baseline}),
        (BASELINE, "baseline", points.keys() & {baseline}),
    ):
        some = [points[place] for place in places]
        axes.errorbar(
            [point.x for point in some],
            [point.y for point in some],
            yerr=[point.half for point in some],
            fmt="o",
            color=color,
            ecolor=(color, 0.4),
            markersize=4 if many else 6,
            capsize=2 if many else 3,
            label=label if some else None,
        )
    axes.set_xlabel(head)
    axes.set_ylabel(metric.label)
    axes.margins(0.12)
    least, most = min(costs), max(costs)
    if most > 8 * least:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    elif most < 1.2 * least:  # what differs by noise must not look far apart
        axes.set_xlim(0.85 * (least + most) / 2, 1.15 * (least + most) / 2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: show(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    _entitle(figure, f"{table.name}: {metric.name} against {head}", 3)
    named = [points[place] for place in points if not many or place in front or place == baseline]
    write_names(figure, axes, named, points.values())
    return figure


def _front(points: Mapping[int, Point], cheap: int, good: int) -> list[int]:
    """The places of points that no other beats in both coordinates: less is better times `cheap`, and times `good`."""
    front: list[int] = []
    for place in sorted(points, key=lambda place: (cheap * points[place].x, good * points[place].y)):
        if not front or good * points[place].y < good * points[front[-1]].y:
            front.append(place)
    return front


def curves(study: Path, table: Table) -> Figure | None:
    """Each metric over the epochs, a line with a band for each cell; None where no run has written two of them."""
    metric, baseline = table.metric, _baseline(table)
    means = {place: result.sample.mean for place, result in enumerate(table.results[metric.name]) if result.sample.n}
    worst = math.inf if metric.lower else -math.inf
    ranked = sorted(means, key=lambda p: means[p] if math.isfinite(means[p]) else worst, reverse=not metric.lower)
    chosen = ranked[:CURVES]
    if baseline is not None and baseline in ranked[CURVES:]:
        chosen[-1] = baseline
    runs: dict[int, list[Curves]] = {}
    for place in sorted(chosen):
        row = table.rows[place]
        runs[place] = [_read_curves(study / row.folder / f"seed={seed}") for seed in row.values[metric.name]]
    every = [run for some in runs.values() for run in some]
    metrics = [each for each in table.metrics if any(len(run.get(each.name, {})) > 1 for run in every)]
    if not metrics:
        return None
    figure = _figure(1 + 5.5 * len(metrics), 4.5 + 0.25 * math.ceil(len(runs) / 2))
    for number, each in enumerate(metrics):
        axes = figure.add_subplot(1, len(metrics), number + 1)
        seen = []
        for color, (place, some) in zip(COLORS, runs.items(), strict=False):
            label = table.rows[place].label
            style = {"color": color, "linestyle": "-", "label": label}
            if place == baseline:
                style = {"color": BASELINE, "linestyle": "--", "label": f"{label} (baseline)"}
            seen += _curve(axes, [run[each.name] for run in some if each.name in run], each.scale, style)
        if seen:
            edge = 0.05 * (max(seen) - min(seen)) or 1.0
            axes.set_ylim(min(seen) - edge, max(seen) + edge)
        axes.set_xlabel("epochs")
        axes.locator_params(axis="x", integer=True)
        axes.set_ylabel(each.label)
        axes.grid(alpha=0.3)
    some_only = f", the best {len(runs)} of {len(ranked)} cells" if len(runs) < len(ranked) else ""
    _entitle(figure, f"{table.name}: mean ± std over seeds{some_only}", 2 * len(metrics))
    return figure


def _curve(axes: Any, runs: list[dict[int, float]], scale: float, style: dict[str, Any]) -> list[float]:
    """Draws the mean of some runs with its band, and gives what of it should be seen: not the steep first fifth."""
    epochs = sorted({epoch for run in runs for epoch in run})
    at = [sample([scale * run[epoch] for run in runs if epoch in run]) for epoch in epochs]
    done = [epoch + 1 for epoch in epochs]
    axes.plot(done, [each.mean for each in at], linewidth=1.5, **style)
    stds = [0.0 if math.isnan(each.std) else each.std for each in at]
    low = [each.mean - std for each, std in zip(at, stds, strict=True)]
    high = [each.mean + std for each, std in zip(at, stds, strict=True)]
    axes.fill_between(done, low, high, color=style["color"], alpha=0.15, linewidth=0)
    first = len(epochs) // 5
    return [value for value in [*low[first:], *high[first:]] if math.isfinite(value)]


def _read_curves(run: Path) -> Curves:
    """What a run has written of its epochs; empty where there is nothing.

    Raises:
        ConfigError: the file is damaged.
    """
    found: Curves = {}
    path, lines = run / "curves.csv", 0
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for lines, line in enumerate(csv.DictReader(file), 1):  # noqa: B007 (read where it fails)
                epoch = int(line.pop("epoch"))
                for name, value in counted({name: float(text) for name, text in line.items() if text}).items():
                    found.setdefault(name, {})[epoch] = value
    except FileNotFoundError:
        pass
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is damaged: no text in UTF-8; delete it to do without its curves") from None
    except (KeyError, TypeError, ValueError, csv.Error):
        raise ConfigError(
            f"{path}, line {lines + 1}: is damaged: must hold an epoch and numbers; delete it to do without its curves"
        ) from None
    return found


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _entitle(figure: Figure, title: str, columns: int) -> None:
    figure.suptitle(title, fontsize=11, wrap=True)
    # What several panels, or an axis on the other side, have: each once.
    shown = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _half(each: Sample) -> float:
    """Half the width of its interval; 0 where it has none."""
    return 0.0 if math.isnan(each.high) else each.high - each.mean


def _baseline(table: Table) -> int | None:
    """The place of the one row that all are compared with; None where rows are compared like with like."""
    if set(table.baseline) != set(table.axes):
        return None
    return next((place for place, row in enumerate(table.rows) if row is table.baselines[place]), None)
