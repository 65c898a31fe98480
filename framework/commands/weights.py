"""`convert`."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from framework.commands import document as composed
from framework.errors import ConfigError


def run(args: Namespace) -> int:
    target = Path(args.out)
    if target.suffix != ".safetensors":
        raise ConfigError(f"--out: got {args.out}; name a file that ends in .safetensors")
    if not target.parent.is_dir():
        raise ConfigError(f"--out: no such folder: {target.parent}")
    document = composed(args)
    document.pop("ablation", None)

    from framework.config import dump
    from framework.construct import build_model
    from framework.weights.transfer import source, start_from, write_weights

    task = build_model(document)
    report = start_from(task, source(args.checkpoint))
    if report.fresh:
        raise ConfigError(f"{args.checkpoint}: has no head, or one for other classes: {', '.join(report.fresh)}")
    card = {
        "converted from": Path(args.checkpoint).name,
        "origin": args.origin,
        "licence": args.licence,
        "accuracy as published": args.accuracy,
        "parameters": f"{sum(p.numel() for p in task.parameters()):,}",
        "config": dump(document),
    }
    write_weights(target, task, card)
    print(f"{report}\n{target}\n{target.with_suffix('.md')}")
    return 0
