"""Measurements as a table, and as JSON with everything that is needed to judge them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framework.ablation.state import write_text
from framework.bench.harness import Section, Spread, Timing
from framework.provenance import PACKAGES, ROOT, git, machine, version_of

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "–"
RESULTS = ROOT / "benchmarks/results"
CLOCK_QUERY = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu", "driver_version")


def number(value: float) -> str:
    """Three significant digits; an exponent only for very small ones."""
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def ranged(spread: Spread) -> str:
    return f"{number(spread.median)} [{number(spread.low)}–{number(spread.high)}]"


def table(parts: Sequence[Section]) -> Table:
    """Sections with one title as Rich's table: milliseconds, images a second, times as fast as the first, and more.

    Where there are several rivals, also what is none of them as against the best of them.
    """
    from rich.markup import escape
    from rich.table import Table

    one = parts[0]
    timings = [timing for part in parts for timing in part.timings]
    images, compared = any(timing.images for timing in timings), len(one.timings) > 1
    rivals = any(part.best for part in parts)
    extra = list(dict.fromkeys(name for timing in timings for name in timing.extra))
    made = Table(title=escape(f"{one.title}, {one.clock}"), title_justify="left", title_style="bold", show_edge=False)
    made.add_column(escape(one.part) if len(parts) == 1 else "", no_wrap=True)
    heads = ["ms", *(["images/s"] if images else []), *(["times as fast"] if compared else [])]
    heads += ["as the best rival"] if rivals else []
    for head in (*heads, *extra):
        made.add_column(escape(head), justify="right")
    for part in parts:
        if len(parts) > 1:
            made.add_section()
            made.add_row(escape(part.part), style="italic")
        for timing in part.timings:
            row = [_milliseconds(timing)]
            row += [number(timing.images_per_s) if timing.images else NOTHING] if images else []
            first = part.timings[0]
            row += ["1" if timing is first else ranged(timing.times_as_fast(first))] if compared else []
            row += [_of_the_best(timing, part.best)] if rivals else []
            row += [number(timing.extra[name]) if name in timing.extra else NOTHING for name in extra]
            made.add_row(escape(timing.name), *row)
    return made


def _of_the_best(timing: Timing, best: Timing | None) -> str:
    if best is None or timing.rival:
        return "the best" if timing is best else NOTHING
    return ranged(timing.times_as_fast(best))


def _milliseconds(timing: Timing) -> str:
    spread = timing.spread
    return ranged(Spread(1000 * spread.median, 1000 * spread.low, 1000 * spread.high))


def show(parts: Sequence[Section]) -> None:
    """Prints sections with one title, and their notes."""
    from framework.ablation.tables import console

    out = console()
    out.print(table(parts))
    for note in dict.fromkeys(note for part in parts for note in part.notes):
        out.print(f"  {note}", markup=False, highlight=False)
    out.print()


@contextmanager
def one_table() -> Iterator[list[Section]]:
    """A list for sections with one title, which are shown at the end: what is there, also where the last one fails."""
    parts: list[Section] = []
    try:
        yield parts
    finally:
        if parts:
            show(parts)


def as_data(section: Section) -> dict[str, Any]:
    """A section as plain data, every round included."""
    first = section.timings[0]
    rows = []
    for timing in section.timings:
        row: dict[str, Any] = {"name": timing.name, "seconds": asdict(timing.spread)}
        if timing.images:
            row |= {"images": timing.images, "images_per_s": timing.images_per_s}
        if timing is not first:
            row["times_as_fast"] = asdict(timing.times_as_fast(first))
        if section.best and not timing.rival:
            row["times_as_fast_as_the_best"] = asdict(timing.times_as_fast(section.best))
        rows.append({**row, **timing.extra, "rounds": timing.seconds})
    named = {"title": section.title, "part": section.part, "clock": section.clock, **section.setting}
    named |= {"best": section.best.name} if section.best else {}
    return {**named, "reference": first.name, "notes": section.notes, "candidates": rows}


def circumstances() -> dict[str, Any]:
    """When, on what machine, with which versions and what other load something is measured."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted": bool(git("status", "--porcelain", "--untracked-files=no")),
        "machine": machine(),
        "clocks": clocks(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else [],
        "packages": {name: version_of(name) for name in (*PACKAGES, "triton", "pillow")},
    }


def clocks() -> list[dict[str, str]]:
    """Clocks, power and driver of each GPU as nvidia-smi tells them; nothing where there is none."""
    words = ["nvidia-smi", f"--query-gpu={','.join(CLOCK_QUERY)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    lines = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return [dict(zip(CLOCK_QUERY, cells, strict=False)) for cells in lines]


def where(name: str, folder: Path = RESULTS) -> Path:
    """The file of a benchmark's results, named by machine and date; it has a number where there is one already."""
    here = machine()
    device = (here["gpus"] or [here["cpu"]])[0]
    device = "".join(c if c.isalnum() else "-" for c in device.lower()).strip("-")
    stem = f"{name}_{device}_{datetime.now(UTC):%Y-%m-%d}"
    paths = (folder / f"{stem}{f'_{n}' if n else ''}.json" for n in count())
    return next(path for path in paths if not path.exists())


def write(path: Path, name: str, results: Any, arguments: Mapping[str, Any] | None = None, **facts: Any) -> Path:
    """Writes results as JSON, with the circumstances of the moment unless `facts` has those of the start."""
    path.parent.mkdir(exist_ok=True)
    found = {"benchmark": name, "arguments": dict(arguments or {}), **circumstances(), **facts, "results": results}
    write_text(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return path


def sections(found: Sequence[Section]) -> list[dict[str, Any]]:
    return [as_data(section) for section in found]
