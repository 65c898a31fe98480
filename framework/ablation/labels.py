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
AWAY = (9, 16, 26, 40, 60, 85)
TURNS = (0, 8, 2, 6, 14, 10, 4, 12, 1, 7, 15, 9, 3, 5, 13, 11)

# Half the width of what covers a point, in pixels, and a little more.
MARK = 7

# From this distance on, a line leads from the name to its point.
FAR = 20

# A name could be another point's where that is not so many times as far from it as its own, or as the nearest place.
CLEAR = 1.5

# Where the line to a name ends, by the name's side of it: a part of its width.
ENDS = {"left": 0.0, "center": 0.5, "right": 1.0}


class Point(NamedTuple):
    """A point with half the length of its error bar, and its name."""

    x: float
    y: float
    half: float
    label: str


class _Spot(NamedTuple):
    """A place for a name: how far from its point, what it covers, and what the line to it covers.

    `doubt` that it is the name of this point: 1 where a line leads there from beside another point, 2 where it stands
    beside both, 0 elsewhere.
    """

    dx: float
    dy: float
    side: str
    box: Box
    line: list[Box]
    doubt: int


def write_names(figure: Figure, axes: Any, named: Iterable[Point], points: Iterable[Point]) -> None:
    """Writes the names of `named` where no point and no name is, and no error bar either if there is such a place.

    Beside a name stands its own point alone, or a line leads there. Lines cross neither names nor each other, and no
    other points if that can be. A point round which there is no place gets no name.
    """
    figure.draw_without_rendering()  # places everything, so that pixels are known
    figure.set_layout_engine("none")  # and stay so
    marks, bars, written = list[Box](), list[Box](), list[Box]()
    points = list(points)
    for point in points:
        ends = [(point.x, point.y + sign * point.half) for sign in (-1, 0, 1)]
        (x, low), (_, y), (_, high) = axes.transData.transform(ends)
        marks.append((x - 5, y - 5, x + 5, y + 5))
        bars.append((x - 5, low, x + 5, high))
    for point in named:
        others = [mark for other, mark in zip(points, marks, strict=True) if other is not point]
        spots = [
            spot
            for spot in _spots(figure, axes, point, others)
            if not _hits(spot.box, [*marks, *written]) and not any(_hits(dot, written) for dot in spot.line)
        ]
        if not spots:
            continue
        spot = min(
            spots,
            key=lambda spot: (spot.doubt, any(_hits(dot, others) for dot in spot.line), _hits(spot.box, bars)),
        )
        axes.annotate(
            point.label,
            (point.x, point.y),
            (spot.dx, spot.dy),
            textcoords="offset points",
            ha=spot.side,
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": "#999999", "lw": 0.6, "relpos": (ENDS[spot.side], 0.5)}
            if spot.line
            else None,
        )
        written += [spot.box, *spot.line]


def _spots(figure: Figure, axes: Any, point: Point, others: Sequence[Box]) -> Iterator[_Spot]:
    """The places round a point that lie inside the frame; `others` are the marks of the other points."""
    text = axes.annotate(point.label, (point.x, point.y), fontsize=8)
    size = text.get_window_extent()
    text.remove()
    frame, pixels = axes.get_window_extent(), figure.dpi / 72
    x, y = axes.transData.transform((point.x, point.y))
    for away in AWAY:
        for turn in TURNS:
            dx, dy = away * math.cos(math.pi * turn / 8), away * math.sin(math.pi * turn / 8)
            side = "left" if dx > 1 else "right" if dx < -1 else "center"
            left = x + pixels * dx - size.width * ENDS[side]
            low = y + pixels * dy - size.height / 2
            box = (left - 2, low, left + size.width + 2, low + size.height)
            if frame.x0 < box[0] and box[2] < frame.x1 and frame.y0 < box[1] and box[3] < frame.y1:
                own = pixels * AWAY[0] if away > FAR else _distances(box, [(x, y, x, y)])[0]
                doubtful = bool((_distances(box, others) < CLEAR * own).any())
                # From where it leaves the mark: the line of another point that lies there starts there too.
                parts = [t / 20 for t in range(20) if pixels * away * t / 20 > MARK]
                steps = [(x + pixels * dx * part, y + pixels * dy * part) for part in parts]
                line = [(px - 1, py - 1, px + 1, py + 1) for px, py in steps] if away > FAR or doubtful else []
                yield _Spot(dx, dy, side, box, line, (1 if away > FAR else 2) if doubtful else 0)


def _distances(box: Box, marks: Sequence[Box]) -> np.ndarray:
    """How far the centres of marks lie from a box."""
    left, low, right, high = np.array(marks).reshape(-1, 4).T
    x, y = (left + right) / 2, (low + high) / 2
    return np.hypot(
        np.maximum(0, np.maximum(box[0] - x, x - box[2])), np.maximum(0, np.maximum(box[1] - y, y - box[3]))
    )


def _hits(box: Box, others: Sequence[Box]) -> bool:
    left, low, right, high = np.array(others).reshape(-1, 4).T
    return bool(((left < box[2]) & (box[0] < right) & (low < box[3]) & (box[1] < high)).any())
