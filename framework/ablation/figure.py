"""The figure of a study: each cell's mean, spread and seeds, with the paper's numbers on a scale of their own."""

from __future__ import annotations

import math
from pathlib import Path

from framework.ablation.tables import Row, Table

OURS, SEEDS, PAPER, BASELINE = "#0b5394", "#7aa6d1", "#c55a11", "#888888"

# How far seeds and published numbers lie beside the mean, in lines: under its bar they could not be seen.
ASIDE = 0.2


def draw(table: Table, path: Path) -> None:
    """Draws the table into a PNG file: one line per cell, so that long names stay readable."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = table.rows
    scale = 100 if table.percent else 1
    labels = [" / ".join(row.choices.values()) for row in rows]
    size = (5.5 + 0.07 * max(len(label) for label in labels), 1.8 + 0.5 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    measured = [(place, row) for place, row in enumerate(rows) if row.values]
    points = [(scale * value, place + ASIDE) for place, row in measured for value in row.values.values()]
    axes.plot([x for x, _ in points], [y for _, y in points], "o", color=SEEDS, markersize=4, label="one seed")
    axes.errorbar(
        [scale * row.mean for _, row in measured],
        [place for place, _ in measured],
        xerr=[0 if math.isnan(row.std) else scale * row.std for _, row in measured],
        fmt="o",
        color=OURS,
        markersize=7,
        capsize=4,
        label="mean ± std",
    )
    for baseline in _baselines(table):
        axes.axvline(scale * baseline.mean, color=BASELINE, linestyle="--", linewidth=1, zorder=1, label="baseline")
    axes.set_xlabel(table.label)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylabel(" / ".join(table.axes))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    if any(not math.isnan(row.published) for row in rows):
        paper = axes.twiny()
        paper.plot(
            [row.published for row in rows],
            [place - ASIDE for place in range(len(rows))],
            "D",
            color=PAPER,
            fillstyle="none",
            markersize=8,
            label="paper",
        )
        paper.set_xlabel(table.paper, color=PAPER)
        paper.tick_params(axis="x", colors=PAPER)
    figure.suptitle(table.title)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


def _baselines(table: Table) -> list[Row]:
    """The one row that all are compared with; none where rows are compared like with like."""
    if set(table.baseline) != set(table.axes):
        return []
    return [row for row in table.rows if row.choices == table.baseline and row.values]
