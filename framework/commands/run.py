"""`fit`, `validate`, `test` and `predict`."""

from __future__ import annotations

import re
import shutil
import sys
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from framework.commands import document as composed
from framework.commands import run_checkpoint
from framework.errors import ConfigError


def run(args: Namespace) -> int | None:
    if args.command == "fit":
        begin(args)
    document = composed(args)
    launcher = document.pop("launcher", None)
    if args.command == "fit":
        if "ablation" in document:
            return fit_study(args, document, launcher or {"class_path": "Local"})
        if launcher is not None:
            raise ConfigError("launcher: starts the runs of a study; this config has no ablation, and runs right here")
        if args.only:
            raise ConfigError("--only: chooses cells of a study; this config has no ablation")
        return fit(args, document)
    document.pop("ablation", None)
    if args.command == "predict":
        return predict(args, document)
    return evaluate(args, document)


def begin(args: Namespace) -> None:
    """Starts the server of the runs of what looks like a study: it imports for as long as this process does.

    Nobody uses it where the composed config says something else in the end.
    """
    texts = [path.read_text(errors="replace") for path in map(Path, args.config or []) if path.is_file()]
    has = {key: any(re.search(f"^{key}:", text, re.M) for text in texts) for key in ("ablation", "launcher")}
    here = not has["launcher"] and args.settings.get("launcher", "Local") == "Local"
    if has["ablation"] and here and not args.dry_run:
        from framework.ablation.launch.local import start_server

        start_server()


def console() -> Any:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True, markup=False)  # a folder may be called [x]


def fit(args: Namespace, document: dict[str, Any]) -> int:
    from framework.run import check, existing, run_folder_of, shared_folder

    checkpoint = existing(args.ckpt_path) if args.ckpt_path else None
    check(document, checkpoint)
    if args.dry_run:
        console().print(f"1 run in this process, in {checkpoint or Path(args.runs, document['name'], '<n>')}")
        return 0
    if checkpoint and (folder := run_folder_of(checkpoint)):
        return fit_in(folder, document, checkpoint)
    with shared_folder(Path(args.runs), document["name"]) as folder:
        try:
            return fit_in(folder, document, checkpoint)
        except ConfigError:
            from framework.run import LAST

            if not (folder / LAST).is_file():
                shutil.rmtree(folder, ignore_errors=True)  # the data cannot be read: nothing was trained
            raise


def fit_in(folder: Path, document: dict[str, Any], checkpoint: Path | None) -> int:
    """Trains in a run folder, alone; says where it is, what came out, and after Ctrl-C how to go on."""
    from framework.ablation.lock import hold
    from framework.run import BEST, LAST, rank, train

    if rank():  # a further process of the run that the first one shows
        train(folder, document, checkpoint, bar=False)
        return 0
    out = console()
    with hold(folder) as mine:
        if not mine:
            raise ConfigError(f"{folder}: another process trains in this folder; wait for it, or start another run")
        out.print(f"run folder: {folder}")
        try:
            trainer = train(folder, document, checkpoint)
        except KeyboardInterrupt:
            command = f"python cli.py fit --ckpt_path {folder / LAST}"
            there = (folder / LAST).is_file()
            out.print(f"\ninterrupted; the run goes on with:\n  {command}" if there else "interrupted")
            return 130
    if trainer.callback_metrics:
        show_metrics(trainer.callback_metrics, f"after {trainer.current_epoch} epochs")
    else:
        out.print(f"nothing left to train after {trainer.current_epoch} epochs; more with --trainer.max_epochs=…")
    checkpoints = [str(folder / name) for name in (LAST, BEST) if (folder / name).is_file()]
    out.print(f"checkpoints: {', '.join(checkpoints)}\ncurves: tensorboard --logdir {folder}")
    return 0


def fit_study(args: Namespace, document: dict[str, Any], slot: dict[str, Any]) -> int:
    from blocks import registry
    from framework.ablation.grid import Ablation
    from framework.ablation.launch import Launcher
    from framework.ablation.study import plan, run_study
    from framework.ablation.tables import collect
    from framework.config import dump, override
    from framework.run import fit_folder, planned

    if args.ckpt_path:
        raise ConfigError("--ckpt_path: a study goes on by itself; give its config alone, and finished runs are kept")
    launcher: Launcher = registry.find(Launcher, slot["class_path"])(**slot.get("init_args", {}))
    root, measure = Path(args.runs), partial(planned, metrics=Ablation.read(document).metrics)
    if args.dry_run:
        folders = plan(document, root, override, measure, dump, args.only)
        print(launcher.plan(folders) if folders else "nothing is left to run")
        return 0
    study = run_study(document, root, launcher, fit_folder, override, measure, dump, args.only)
    return 1 if collect(study).failures else 0


def evaluate(args: Namespace, document: dict[str, Any]) -> int:
    from framework.run import evaluate as measured

    checkpoint = run_checkpoint(args)
    show_metrics(measured(document, checkpoint, args.command), str(checkpoint))
    return 0


def predict(args: Namespace, document: dict[str, Any]) -> int:
    from framework.predict import pictures, predict_pictures, predict_test, write

    checkpoint = run_checkpoint(args)
    target = Path(args.out) if args.out else checkpoint.parent / "predictions.csv"
    if target.is_dir():
        raise ConfigError(f"--out: Is a directory: {target}")
    if target.suffix not in (".csv", ".json"):
        raise ConfigError(f"--out: got {target}; name a file that ends in .csv or .json")
    if not target.parent.is_dir():
        raise ConfigError(f"--out: no such folder: {target.parent}")
    if args.top is not None and args.top < 1:
        raise ConfigError(f"--top: got {args.top}, must be at least 1")
    if args.images:
        found = predict_pictures(document, checkpoint, pictures(args.images))
    else:
        found = predict_test(document, checkpoint)
    write(target, found, args.top)
    read = sum(not row.error for row in found.rows)
    console().print(f"{read} images → {target}")
    for row in found.rows:
        if row.error:
            print(f"{row.file}: cannot be read: {row.error}", file=sys.stderr)
    if not read:
        raise ConfigError(f"--images: none of the {len(found.rows)} files can be read as a picture")
    return 0


def show_metrics(metrics: Mapping[str, Any], title: str) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{float(value):.4g}")
    console().print(table)
