"""`plan` and `report`."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path

from framework.commands import document as composed
from framework.errors import ConfigError


def run(args: Namespace) -> int:
    return report(args) if args.command == "report" else plan(args)


def report(args: Namespace) -> int:
    from framework.ablation import forms, view
    from framework.ablation.grid import selection
    from framework.ablation.tables import collect

    folder = Path(args.folder)
    table = collect(folder)
    chosen = selection(args.only, table.axes)
    if args.watch:
        view.watch(folder, chosen)
    else:
        forms.write(folder, table)
        view.show(folder, table, chosen)
    return 0


def plan(args: Namespace) -> int:
    document = composed(args)
    launcher = document.pop("launcher", None) or {"class_path": "Local"}
    if "ablation" not in document:
        raise ConfigError(f"{args.config[-1]}: has no ablation section to plan; see describe for a single net")
    from blocks import registry
    from framework.ablation import study
    from framework.ablation.grid import Ablation
    from framework.ablation.launch import Launcher
    from framework.ablation.probe import Expectation
    from framework.config import dump, override
    from framework.run import planned

    measure = partial(planned, metrics=Ablation.read(document).metrics)
    made = registry.find(Launcher, launcher["class_path"])(**launcher.get("init_args", {}))
    expect = None if args.no_probe else Expectation(made)
    study.plan(document, Path(args.runs), override, measure, dump, args.only, expect)
    return 0
