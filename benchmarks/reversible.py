"""What reversible columns save: peak memory and time of a training step of RevCol, reversible against plain.

    uv run python benchmarks/reversible.py                              # small: about a minute on one core
    uv run python benchmarks/reversible.py --device cuda --net revcol_t --size 224 --batch 64 --dtype bfloat16

One net for each number of columns, with the same weights for both. Gradients that differ by more than rounding are
refused. The peak is over weights and the optimizer's state; gradients are a part of it, and grow with the columns. On
the CPU it is resident memory, where the C library keeps what is freed unless it is told to give larger pieces back.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from framework.bench import report
from framework.bench.equal import Unequal
from framework.bench.harness import Candidate, Section, race, threads
from framework.bench.memory import peak
from framework.bench.nets import Form, Ours, Setting, formed, images_for, loss, step
from framework.config import compose
from framework.errors import ConfigError
from framework.process import prepare

ZOO = Path(__file__).resolve().parents[1] / "experiments/zoo"

# RevCol-T with half its width and half its blocks.
SMALL = {
    f"model.backbone.stages.s{i + 1}": {"dim": 32 * 2**i, "pattern": "cnx" if i != 2 else "cnx*2"} for i in range(4)
}

# Of the gradients' norm. At first α is 0.5, so that each column back doubles what rounding has left.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.2}


def entrant(args: argparse.Namespace, columns: int, reversible: bool) -> Ours:
    settings: Mapping[str, Any] = {
        **(SMALL if args.net == "small" else {}),
        "name": "reversible" if reversible else "plain",
        "data.size": args.size,
        "model.backbone.columns": columns,
        "model.backbone.reversible": reversible,
        "model.backbone.drop_path": 0.1,
    }
    return Ours.of(compose([ZOO / f"{'revcol_t' if args.net == 'small' else args.net}.yaml"], settings))


def gradients(made: Ours, setting: Setting) -> dict[str, Tensor]:
    """Those of one step, with the same random drops each time."""
    net = formed(made.make(), Form(), setting)
    torch.manual_seed(0)
    loss(net, images_for(made.image, setting), Form(), setting)().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """How far two nets' gradients are apart, for each unit of their norm."""
    if one.keys() != other.keys():
        return float("inf")
    apart, whole = (torch.stack([g.double().square().sum() for g in grads]).sum().sqrt()
                    for grads in ([one[name] - grad for name, grad in other.items()], other.values()))  # fmt: skip
    return float(apart / whole)


def section(args: argparse.Namespace, columns: int, setting: Setting) -> Section:
    both = [entrant(args, columns, reversible) for reversible in (False, True)]
    found = difference(*(gradients(made, setting) for made in reversed(both)))
    if not found <= TOLERANCE[args.dtype]:
        raise Unequal(f"{columns} columns: gradients of reversible and plain ones differ by {found:.2g}: not timed")
    candidates = []
    for made in both:
        most = peak(made, Form(), setting)
        extra = {} if most is None else {"peak MiB": most / 2**20}
        extra["gradients MiB"] = 4 * made.params / 2**20
        if made is not both[0]:
            extra["Δ gradients"] = found
        act = step(formed(made.make(), Form(), setting), Form(), setting, made.image)
        candidates.append(Candidate(made.name, act, setting.batch, extra))
    timings = race(candidates, setting.stopwatch, args.rounds, warm_up=1, least=0)
    title = f"{args.net} at {args.size} px, batch {setting.batch}: {setting.title}"
    return Section(title, setting.clock, timings, [], {"columns": columns}, f"{columns} columns")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--net", default="small", metavar="NAME", help="small, or a RevCol of the zoo (default: small)")
    add("--columns", default="4,8,16", metavar="N,…", help="numbers of columns (default: 4,8,16)")
    add("--size", type=int, default=128, metavar="N", help="of images, a multiple of 32 (default: 128)")
    add("--batch", type=int, default=8, metavar="N", help="(default: 8)")
    add("--dtype", choices=TOLERANCE, default="float32", help="bfloat16 is autocast (default: float32)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(default: cpu)")
    add("--threads", type=int, default=1, metavar="N", help="with 1, CPU time is measured, else wall time (default: 1)")
    add("--rounds", type=int, default=3, metavar="N", help="how often each is timed (default: 3)")
    args = parser.parse_args()
    prepare()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # of the processes that peaks are measured in
    before, found = report.circumstances(), []
    setting = Setting("training", args.dtype, args.batch, args.threads, args.device)
    try:
        with threads(args.threads):
            for columns in map(int, args.columns.split(",")):
                print(f"{columns} columns", file=sys.stderr)
                found.append(section(args, columns, setting))
    except (ConfigError, Unequal, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report.show(found)
    print(report.write(report.where("reversible"), "reversible", report.sections(found), vars(args), **before))
    return 0


if __name__ == "__main__":
    sys.exit(main())
