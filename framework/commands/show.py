"""`describe` and `blocks`."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from framework.commands import document as composed


def run(args: Namespace) -> int:
    return describe(args) if args.command == "describe" else blocks(args)


def describe(args: Namespace) -> int:
    from blocks.base import describe_shape
    from framework.ablation.tables import console, short
    from framework.measure import cost, meta_model

    document = composed(args)
    document.pop("ablation", None)
    kept = None
    if not args.config:
        from framework.checkpoints import kept_in, read_checkpoint

        path = Path(args.ckpt_path)
        kept = kept_in(read_checkpoint(path), path)
    found = cost(meta_model(document, kept.facts(document) if kept else None))
    if args.json:
        print(json.dumps({"name": document["name"], **asdict(found)}, indent=1))
        return 0
    from rich.markup import escape
    from rich.table import Table

    out = console()
    channels, height, width = found.image
    frozen = f" and {found.frozen:,} frozen" if found.frozen else ""
    out.print(
        f"[bold]{escape(document['name'])}[/bold]: {found.params:,} parameters{frozen}, {short(found.macs)} MACs "
        f"for a {height}×{width} image with {channels} channel(s)"
    )
    out.print("levels: " + ", ".join(f"{lv.name} {lv.channels} @ 1/{lv.stride}" for lv in found.levels))
    if not found.blocks:
        return 0
    table = Table()
    for column in ("key", "block", "class", "gives"):
        table.add_column(column, no_wrap=column == "key")
    for column in ("params", "MACs"):
        table.add_column(column, justify="right", no_wrap=True)
    for block in found.blocks:
        row = (block.key, block.name, block.kind, describe_shape(block.out), f"{block.params:,}", short(block.macs))
        table.add_row(*row)
    out.print(table)
    return 0


def blocks(args: Namespace) -> int:
    from framework.catalogue import catalogue, entry_of
    from framework.errors import ConfigError, nearest

    entries = catalogue(args.plugins)
    if args.name:
        entry = entry_of(entries, args.name)
        if entry is None:
            near = nearest(args.name, [e.name for e in entries])
            hint = f"did you mean {near!r}?" if near else "python cli.py blocks lists all"
            raise ConfigError(f"no class {args.name!r} ({hint})")
        entries = [entry]
    if args.json:
        print(json.dumps([asdict(entry) for entry in entries], indent=1))
        return 0
    show_one(entries[0]) if args.name else show_all(entries)
    return 0


def show_all(entries: list[Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from framework.ablation.tables import console

    out = console()
    for kind in dict.fromkeys(entry.kind for entry in entries):
        table = Table(title=kind, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for entry in entries:
            if entry.kind == kind:
                arguments = ", ".join(f"{a.name}" for a in entry.arguments)
                shown = escape(entry.summary) + (f" [dim]({arguments})[/dim]" if arguments else "")
                table.add_row(entry.name, shown)
        out.print(table)
        out.print()
    out.print("python cli.py blocks NAME shows arguments, defaults and source of one.")


def show_one(entry: Any) -> None:
    from rich.markup import escape
    from rich.table import Table

    from framework.ablation.tables import console

    out = console()
    out.print(f"[bold]{entry.name}[/bold] ({entry.kind}, {entry.path})\n{escape(entry.text)}\n")
    if entry.source:
        out.print(f"source: {escape(entry.source)}\n")
    if not entry.arguments:
        out.print("no arguments")
        return
    table = Table()
    for column in ("argument", "type", "default", ""):
        table.add_column(column, no_wrap=column == "argument")
    for argument in entry.arguments:
        table.add_row(argument.name, escape(argument.type), escape(argument.default), escape(argument.text))
    out.print(table)
