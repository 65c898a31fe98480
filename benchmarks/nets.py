"""Whole nets against timm's, on the same weights and images: speed and memory, at inference and training.

    uv run python benchmarks/nets.py --nets tnt_s,next_vit_s --threads 1 --batch 8 --dtype both
    uv run python benchmarks/nets.py --compile                  # timm compiled by blocks and frozen too: takes minutes

Rivals: timm as it is (the first row), in channels_last, all in bfloat16, compiled block by block, and at inference
compiled with its weights frozen. Nets whose logits differ by more than 1e-4 in float32 are refused, and named.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, groupby
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from framework.cli import Parser, add_bench, told
from framework.errors import ConfigError, suggest
from framework.process import prepare

ZOO = Path(__file__).resolve().parents[1] / "experiments/zoo"

# By name: config, settings over it, timm's name and arguments.
NETS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "tnt_s": ("tnt_s", {}, "tnt_s_patch16_224", {}),
    # What an ablation on 32-px images trains.
    "tnt_tiny": (
        "tnt_s",
        {
            "data.dataset": "CIFAR10",
            "data.size": 32,
            "model.backbone.stem.patch": 8,
            "model.backbone.stem.word_dim": 12,
            "model.backbone.dim": 192,
            "model.backbone.pattern": "tnt*6",
            "model.backbone.blocks.tnt.inner.mixer.heads": 2,
            "model.backbone.blocks.tnt.outer.mixer.heads": 3,
        },
        "tnt_s_patch16_224",
        {
            "patch_size": 8,
            "first_stride": 2,
            "inner_dim": 12,
            "embed_dim": 192,
            "depth": 6,
            "num_heads_inner": 2,
            "num_heads_outer": 3,
        },
    ),
    "tnt_b": ("tnt_b", {}, "tnt_b_patch16_224", {}),
    "next_vit_s": ("next_vit_s", {}, "nextvit_small", {}),
    "deit_s": ("deit_s", {}, "deit_small_patch16_224", {}),
}


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--nets", default=",".join(NETS), metavar="NAME,…", help="(default: %(default)s)")
    add_bench(parser)
    return told(lambda: run(parser.parse_args()))


def run(args: argparse.Namespace) -> None:
    prepare()
    from framework.bench import report
    from framework.bench.equal import Unequal
    from framework.commands.bench import settings

    names = args.nets.split(",")
    for name in names:
        if name not in NETS:
            raise ConfigError(f"--nets: no net {name!r} ({suggest(name, NETS)})")
    before, at, found, refused = report.circumstances(), settings(args), [], []
    path = None

    def save() -> None:  # after each section, so that a run that is stopped keeps what it has
        nonlocal path
        path = path or report.where("nets")
        results = {"sections": report.sections(found), "refused": refused}
        report.write(path, "nets", results, vars(args), **before)

    try:
        for number, name in enumerate(names):
            places = (f"{place} of {len(names) * len(at)}" for place in count(number * len(at) + 1))
            try:
                for section in measure(name, at, args, places):
                    found.append(section)
                    save()
            except Unequal as error:
                print(f"{name}: {error}\n", flush=True)
                refused.append(str(error))
                save()
    finally:
        if path:
            print(path)


def measure(name: str, at: list[Any], args: argparse.Namespace, places: Iterator[str]) -> Iterator[Any]:
    """The sections of one net, one by one; those that differ in their batch alone are shown as one table."""
    from framework.bench.compare import compare, make
    from framework.bench.report import one_table

    timm, ours = entrants(name)
    made = make([timm, ours], strict=True)
    for _, group in groupby(at, key=lambda setting: replace(setting, batch=0)):
        with one_table() as parts:
            for setting in group:
                rivals = entries(timm, ours, setting, args.compile)
                parts.append(compare(rivals, made, setting, args.rounds, name, place=next(places)))
                yield parts[-1]


def entrants(name: str) -> tuple[Any, Any]:
    from framework.bench.nets import Ours, Timm
    from framework.config import compose

    config, changes, net, args = NETS[name]
    document = compose([ZOO / f"{config}.yaml"], changes)
    ours = replace(Ours.of(document), name="ours")
    rate = document["model"]["init_args"]["backbone"]["init_args"].get("drop_path", 0.0)
    classes = {224: 1000, 32: 10}[ours.image.size]
    return Timm("timm", net, ours.image, classes, rate, tuple(args.items())), ours


def entries(timm: Any, ours: Any, setting: Any, compiled: bool) -> list[Any]:
    """timm as a script runs it first, then in its better forms, then ours."""
    from framework.bench.compare import Entry
    from framework.bench.nets import Form

    infer, low = setting.mode == "inference", setting.dtype == "bfloat16"
    forms = [Form(), Form(channels_last=True)]
    forms += [Form(channels_last=True, low=True)] if infer and low else []
    if compiled:
        forms += [Form(compile=True), Form(channels_last=True, compile=True)]
        forms += [Form(channels_last=True, compile=True, freezing=True)] if infer else []
    own = [Form(), *([Form(compile=True)] if compiled else [])]
    alone = [Entry(timm, alone=True)] if setting.device == "cpu" else []
    return alone + [Entry(timm, form) for form in forms] + [Entry(ours, form) for form in own]


if __name__ == "__main__":
    sys.exit(main())
