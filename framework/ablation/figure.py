"""The figure of a study: each cell's mean, spread and seeds, with the paper's numbers on a scale of their own."""

from __future__ import annotations

import math
from pathlib import Path

from framework.ablation.tables import Row, Table

OURS, SEEDS, PAPER, BASELINE = "#0b5394", "#7aa6d1", "#c55a11", "#888888"


def draw(table: Table, path: Path) -> None:
    """Draws the table into a PNG file: one line per cell, so that long names stay readable."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = table.rows
    scale = 100 if table.percent else 1
    figure = Figure(figsize=(7.5, 1.6 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    measured = [(place, row) for place, row in enumerate(rows) if row.values]
    for place, row in measured:
        values = [scale * value for value in row.values.values()]
        axes.plot(values, [place] * len(values), "o", color=SEEDS, markersize=4, zorder=2, label="one seed")
        spread = 0 if math.isnan(row.std) else scale * row.std
        axes.errorbar(
            scale * row.mean,
            place,
            xerr=spread,
            fmt="o",
            color=OURS,
            markersize=7,
            capsize=4,
            zorder=3,
            label="mean ± std",
        )
    for baseline in _baselines(table):
        axes.axvline(scale * baseline.mean, color=BASELINE, linestyle="--", linewidth=1, zorder=1, label="baseline")
    axes.set_xlabel(table.label)
    axes.set_yticks(range(len(rows)), [" / ".join(row.choices.values()) for row in rows])
    axes.set_ylabel(" / ".join(table.axes))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    if any(not math.isnan(row.published) for row in rows):
        top = axes.twiny()
        (handles["paper"],) = top.plot(
            [row.published for row in rows], range(len(rows)), "D", color=PAPER, fillstyle="none", markersize=8
        )
        top.set_xlabel(table.paper, color=PAPER)
        top.tick_params(axis="x", colors=PAPER)
    figure.suptitle(table.title)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def _baselines(table: Table) -> list[Row]:
    """The one row that all are compared with; none where rows are compared like with like."""
    if set(table.baseline) != set(table.axes):
        return []
    return [row for row in table.rows if row.choices == table.baseline and row.values]
