"""Names beside the points of a scatter, so that none lies over another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Left, lower, right and upper edge in pixels.
Box = tuple[float, float, float, float]

# Places round a point, the near ones first: distances in typographic points, and sixteenths of a turn.
AWAY = (9, 16, 26, 40, 60)
TURNS = (0, 8, 2, 6, 14, 10, 4, 12, 1, 7, 15, 9, 3, 5, 13, 11)

# From this distance on, a line leads from the name to its point.
FAR = 20


class Point(NamedTuple):
    """A point with half the length of its error bar, and its name."""

    x: float
    y: float
    half: float
    label: str


class _Spot(NamedTuple):
    """A place for a name: how far from its point, what it covers, and what the line to it covers."""

    dx: float
    dy: float
    side: str
    box: Box
    line: list[Box]


def write_names(figure: Figure, axes: Any, named: Iterable[Point], points: Iterable[Point]) -> None:
    """Writes the names of `named` where no point and no name is, and no error bar either if there is such a place.

    Lines that lead to names cross neither names nor each other. A point round which there is no place gets no name.
    """
    figure.draw_without_rendering()  # places everything, so that pixels are known
    figure.set_layout_engine("none")  # and stay so
    marks, bars, written = list[Box](), list[Box](), list[Box]()
    for point in points:
        ends = [(point.x, point.y + sign * point.half) for sign in (-1, 0, 1)]
        (x, low), (_, y), (_, high) = axes.transData.transform(ends)
        marks.append((x - 5, y - 5, x + 5, y + 5))
        bars.append((x - 5, low, x + 5, high))
    for point in named:
        spots = [
            spot
            for spot in _spots(figure, axes, point)
            if not _hits(spot.box, [*marks, *written]) and not any(_hits(dot, written) for dot in spot.line)
        ]
        if not spots:
            continue
        spot = next((spot for spot in spots if not _hits(spot.box, bars)), spots[0])
        axes.annotate(
            point.label,
            (point.x, point.y),
            (spot.dx, spot.dy),
            textcoords="offset points",
            ha=spot.side,
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "#999999", "lw": 0.6} if spot.line else None,
        )
        written += [spot.box, *spot.line]


def _spots(figure: Figure, axes: Any, point: Point) -> Iterator[_Spot]:
    """The places round a point that lie inside the frame."""
    text = axes.annotate(point.label, (point.x, point.y), fontsize=8)
    size = text.get_window_extent()
    text.remove()
    frame, pixels = axes.get_window_extent(), figure.dpi / 72
    x, y = axes.transData.transform((point.x, point.y))
    for away in AWAY:
        for turn in TURNS:
            dx, dy = away * math.cos(math.pi * turn / 8), away * math.sin(math.pi * turn / 8)
            side = "left" if dx > 1 else "right" if dx < -1 else "center"
            left = x + pixels * dx - size.width * {"left": 0, "center": 0.5, "right": 1}[side]
            low = y + pixels * dy - size.height / 2
            box = (left - 2, low, left + size.width + 2, low + size.height)
            if frame.x0 < box[0] and box[2] < frame.x1 and frame.y0 < box[1] and box[3] < frame.y1:
                steps = [(x + pixels * dx * t / 20, y + pixels * dy * t / 20) for t in range(20)] if away > FAR else []
                yield _Spot(dx, dy, side, box, [(px - 1, py - 1, px + 1, py + 1) for px, py in steps])


def _hits(box: Box, others: Sequence[Box]) -> bool:
    left, low, right, high = np.array(others).reshape(-1, 4).T
    return bool(((left < box[2]) & (box[0] < right) & (low < box[3]) & (box[1] < high)).any())
