"""`bench`."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framework.commands import document as composed
from framework.errors import ConfigError

if TYPE_CHECKING:
    from framework.bench.harness import Section, Timing
    from framework.bench.nets import Entrant, Setting

TIMM = "timm:"
MODES = ("inference", "training")


def run(args: Namespace) -> int:
    document = composed(args)
    for name in ("ablation", "launcher", "weights"):  # of a net, not of its files
        document.pop(name, None)
    target = Path(args.json) if args.json else None
    if target and not target.parent.is_dir():
        raise ConfigError(f"--json: no such folder: {target.parent}")
    at = settings(args)

    from framework.bench import report
    from framework.bench.compare import make

    before = report.circumstances()
    entrants = entrants_of(document, args.against)
    show_costs(entrants)
    costs = {entrant.name: dict(zip(("params", "macs"), entrant.cost(), strict=True)) for entrant in entrants}
    arguments = {key: value for key, value in vars(args).items() if key != "module"}
    found: list[Section] = []
    for section in measure(entrants, make(entrants), at, args):
        found.append(section)
        if target:  # each time, so that what is stopped keeps what it has
            report.write(target, "bench", report.sections(found), arguments, **before, nets=costs)
    return 0


def settings(args: Namespace) -> list[Setting]:
    """What the options ask for. Raises ConfigError where they cannot be had."""
    import torch

    from framework.bench.nets import Setting

    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: there is no CUDA device here")
    if args.rounds < 1:
        raise ConfigError(f"--rounds: got {args.rounds}, must be at least 1")
    batches = numbers("--batch", args.batch or ("256" if device == "cuda" else "8"))
    counts = numbers("--threads", args.threads) if args.threads else [torch.get_num_threads()]
    cores = os.cpu_count() or 1
    if max(counts) > cores:
        raise ConfigError(f"--threads: got {max(counts)}, but this machine has {cores} cores")
    modes = MODES if args.mode == "both" else (args.mode,)
    dtypes = ("float32", "bfloat16") if args.dtype == "both" else (args.dtype,)
    return [
        Setting(mode, dtype, batch, count, device)
        for mode in modes
        for dtype in dtypes
        for count in (counts if device == "cpu" else counts[:1])
        for batch in batches
    ]


def numbers(option: str, text: str) -> list[int]:
    """Whole numbers of at least 1, with commas between. Raises ConfigError."""
    found = []
    for word in text.split(","):
        if not (word.strip().isdecimal() and int(word) > 0):
            raise ConfigError(f"{option}: got {word!r}, must be whole numbers of at least 1, such as 1,8")
        found.append(int(word))
    return list(dict.fromkeys(found))


def entrants_of(document: Mapping[str, Any], against: str | None) -> list[Entrant]:
    """The nets, the one to compare with first: it has weights that ours can take."""
    from framework.bench.nets import Ours, Timm
    from framework.construct import complete
    from framework.errors import nearest

    ours = Ours.of(document)
    if not against:
        return [ours]
    if against.startswith(TIMM):
        import timm

        name = against.removeprefix(TIMM)
        if not timm.is_model(name):
            near = nearest(name, timm.list_models())
            hint = f"did you mean timm:{near}?" if near else "timm.list_models() gives their names"
            raise ConfigError(f"--against: timm has no net {name!r} ({hint})")
        args = complete(document)["model"]["init_args"]
        rate = args["backbone"].get("init_args", {}).get("drop_path", 0.0)
        return [Timm(against, name, ours.image, args["num_classes"], rate), ours]
    if Path(against).suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--against: got {against!r}, must be a config file (.yaml), or timm:NAME for a net of timm")
    from framework.config import compose

    other = compose([against])
    for section in ("ablation", "launcher", "weights"):
        other.pop(section, None)
    if other["name"] == document["name"]:
        other["name"] = against
    return [Ours.of(other), ours]


def measure(entrants: list[Entrant], made: Any, at: list[Setting], args: Namespace) -> Iterator[Section]:
    """The sections, one by one; those that differ in their batch alone are shown as one table."""
    from framework.bench.compare import Entry, compare, latency
    from framework.bench.nets import Form
    from framework.bench.report import one_table

    forms = [Form(), Form(compile=True)] if args.compile else [Form()]
    entries = [Entry(entrant, form) for entrant in entrants for form in forms]
    places = count(1)
    for _, parts in groupby(at, key=lambda setting: replace(setting, batch=0)):
        with one_table() as group:
            for setting in parts:
                place = f"{next(places)} of {len(at)}"
                section = compare(entries, made, setting, args.rounds, place=place)
                if setting.mode == "inference" and not group:
                    timings = latency(entries, made, setting, args.rounds)
                    section.notes += [latency_line(timing) for timing in timings]
                    section.setting["latency"] = {timing.name: timing.seconds for timing in timings}
                group.append(section)
                yield section


def latency_line(timing: Timing) -> str:
    import numpy as np

    half, most = (1000 * np.quantile(timing.seconds, [0.5, 0.95])).tolist()
    images = len(timing.seconds)
    return f"latency of {timing.name} at batch 1: {half:.3g} ms (p50), {most:.3g} ms (p95) over {images} images"


def show_costs(entrants: list[Entrant]) -> None:
    from framework.ablation.tables import console, short

    out = console()
    for entrant in entrants:
        params, macs = entrant.cost()
        size = f"{entrant.image.size}×{entrant.image.size}"
        out.print(f"{entrant.name}: {params:,} parameters, {short(macs)} MACs at {size}", markup=False, highlight=False)
    out.print()
