"""`probe`."""

from __future__ import annotations

import json
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from framework.commands import document as composed
from framework.commands import run_checkpoint
from framework.errors import ConfigError


def run(args: Namespace) -> int:
    ks = numbers(args.k) if args.k else []
    document = composed(args)
    for section in ("ablation", "launcher"):
        document.pop(section, None)
    checkpoint = None if "weights" in args.settings else run_checkpoint(args)
    if checkpoint is None and args.ckpt_path:
        raise ConfigError("--weights: --ckpt_path names weights too; give one of them")
    folder = Path(args.out) if args.out else checkpoint.parent if checkpoint else None
    if folder and not folder.is_dir():
        raise ConfigError(f"--out: no such folder: {folder}")

    from dataclasses import asdict

    from framework.ablation.state import write_text
    from framework.construct import Workbench, complete
    from framework.frozen import extract, neighbours, probe
    from framework.run import load_weights
    from framework.tasks import Classification
    from framework.weights.transfer import source, start_from

    bench = Workbench(complete(document))
    data, task = bench.make_data(), bench.make_model()
    if not isinstance(task, Classification):
        raise ConfigError(f"model: a probe needs the head of a Classification, got {type(task).__name__}")
    neighbours(ks, len(data.split("train")))  # a mistake shows before the features are taken, not after
    weights = str(checkpoint or document["weights"])
    if checkpoint:
        load_weights(task, checkpoint)
    else:
        report = start_from(task, source(document["weights"]))
        print(f"{weights}: {report}", file=sys.stderr if args.json else sys.stdout)
    start = time.perf_counter()
    splits, device = extract(bench, data, task, bar=sys.stdout.isatty() and not args.json)
    taken = round(time.perf_counter() - start, 2)
    found = asdict(probe(splits, data.num_classes, ks, device))
    found = {"name": document["name"], "weights": weights, **found, "seconds": {"features": taken, **found["seconds"]}}
    text = json.dumps(found, indent=1)
    if folder:
        write_text(folder / "probe.json", text + "\n")
    if args.json:
        print(text)
    else:
        show(found, folder)
    return 0


def numbers(text: str) -> list[int]:
    """The numbers in `10,20`. Raises ConfigError where there is anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--k: got {text!r}, must be whole numbers with commas between, as 10,20,100,200") from None


def show(found: dict[str, Any], folder: Path | None) -> None:
    from rich.markup import escape
    from rich.table import Table

    from framework.ablation.tables import console

    table = Table(title=escape(f"{found['name']}: {found['weights']}"), title_justify="left")
    for column in ("probe", "setting", "val/acc1", "val/acc5", "test/acc1", "test/acc5"):
        table.add_column(column, justify="left" if column == "probe" else "right", no_wrap=True)
    for row in found["rows"]:
        setting = f"k = {row['setting']}" if row["probe"] == "k-NN" else f"L2 = {row['setting']:.0e}"
        values = [row[split].get(name) for split in ("val", "test") for name in ("acc1", "acc5")]
        cells = ["" if value is None else f"{value:.4g}" for value in values]
        table.add_row(row["probe"], setting, *cells, style="bold" if row["test"] else None)
    out = console()
    out.print(table)
    images = ", ".join(f"{count:,} {split}" for split, count in found["images"].items())
    seconds = ", ".join(f"{name} {value} s" for name, value in found["seconds"].items())
    out.print(f"images: {images}; {found['features']} features; {seconds}")
    if found["same"]:
        out.print("The test images are the validation images: the settings were chosen on them.")
    if folder:
        out.print(escape(str(folder / "probe.json")))
