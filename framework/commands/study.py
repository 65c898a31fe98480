"""`plan` and `report`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from framework.commands import document as composed
from framework.errors import ConfigError


def run(args: Namespace) -> int:
    if args.command == "report":
        from framework.ablation import tables

        folder = Path(args.folder)
        tables.write(folder)
        tables.show(folder)
        return 0
    document = composed(args)
    if "ablation" not in document:
        raise ConfigError(f"{args.config[-1]}: has no ablation section to plan; see describe for a single net")
    from framework.ablation.study import plan
    from framework.config import dump, override
    from framework.measure import measure

    plan(document, Path(args.runs), override, measure, dump)
    return 0
