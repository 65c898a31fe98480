"""DeiT-S, TNT-S and Next-ViT-S against timm's on the CPU: time, bytes kept for the backward pass, and products alone.

    uv run python benchmarks/outer_parts.py [--nets deit_small nextvit_small] [--rounds 5] [--threads 1]

Prints a table and writes it as JSON under benchmarks/results. Ours gets timm's weights. All candidates of a row run in
turns in one process, the order reversed every other round; a ratio is the median over rounds of timm's time over the
candidate's. With one thread it is the time of that thread, which other processes do not count in. Batch 16, since torch
has a slow way for 1×1 convolutions of smaller batches in one thread, which would flatter ours.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

NETS = {"deit_small": "deit_small_patch16_224", "tnt_s": "tnt_s_patch16_224", "nextvit_small": "nextvit_small"}
BATCH = 16

# Rows, width and output width of TNT-S's outer Linears at batch 8: qkv, proj, fc1, fc2.
SHAPES = [(1576, 384, 1152), (1576, 384, 384), (1576, 384, 1536), (1576, 1536, 384)]


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """timm's net and ours with its weights."""
    from framework.weights import convert
    from tests.vectors import nextvit, nextvit_stages, shapes, tnt, vit

    torch.manual_seed(0)
    theirs = timm.create_model(NETS[name])
    ours = {"deit_small": vit, "tnt_s": tnt, "nextvit_small": lambda: nextvit(nextvit_stages(3, 4, 10, 3))}[name]()
    ours.load_state_dict(convert(theirs.state_dict(), shapes(ours)), strict=True)
    ours.backbone.keep(ours.head.reads)
    return theirs, ours


def in_turns(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of each, and its ratio to the first: median, least and most over the rounds."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds + 1):
        for name in candidates if i % 2 else reversed(list(candidates)):
            start = clock()
            candidates[name]()
            if i:
                times[name].append(clock() - start)
    first = times[next(iter(candidates))]
    found = {}
    for name, taken in times.items():
        ratios = sorted(a / b for a, b in zip(first, taken, strict=True))
        found[name] = {"ms": 1e3 * statistics.median(taken), "ratio": statistics.median(ratios),
                       "least": ratios[0], "most": ratios[-1]}  # fmt: skip
    return found


def kept(net: nn.Module, images: Tensor, low: bool) -> float:
    """MiB for each image that the forward pass keeps for the backward pass, beside the parameters."""
    own, found = {p.untyped_storage().data_ptr() for p in net.parameters()}, {}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in own:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", enabled=low):
        net.train()(images).float().logsumexp(1).sum()
    return sum(storage.nbytes() for storage in found.values()) / 2**20 / len(images)


def act(net: nn.Module, images: Tensor, targets: Tensor, low: bool, training: bool) -> Callable[[], object]:
    """An inference, or a training step with timm's and our default optimizer."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)

    def infer() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", enabled=low):
            return net.eval()(images)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", enabled=low):
            loss = F.cross_entropy(net.train()(images), targets)
        loss.backward()
        optimizer.step()

    return step if training else infer


def products(rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    from blocks.base import linear

    found = {}
    for rows, width, out in SHAPES:
        ours, x, grad = linear(width, out), torch.randn(rows, width), torch.randn(rows, out)
        theirs = nn.Linear(width, out)

        def both(layer: nn.Module, x: Tensor = x, grad: Tensor = grad) -> Callable[[], object]:
            inputs = [x.clone().requires_grad_(), *layer.parameters()]
            return lambda: torch.autograd.grad(layer(inputs[0]), inputs, grad)

        def alone(layer: nn.Module, x: Tensor = x) -> Callable[[], object]:
            def run() -> None:
                with torch.no_grad():
                    layer(x)

            return run

        for kind, make in (("forward", alone), ("forward and backward", both)):
            found[f"Linear {rows}×{width}→{out} {kind}"] = in_turns(
                {"torch": make(theirs), "ours": make(ours)}, 3 * rounds
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="*", choices=list(NETS), default=list(NETS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    from framework.provenance import git, machine

    torch.set_num_threads(args.threads)
    found = products(args.rounds)
    memory: dict[str, dict[str, float]] = {}
    images, targets = torch.randn(BATCH, 3, 224, 224), torch.randint(1000, (BATCH,))
    last = images.contiguous(memory_format=torch.channels_last)
    for name in args.nets:
        theirs, ours = pair(name)
        nets = {"timm": (theirs, images), "ours": (ours, last)}
        if name == "nextvit_small":
            nets["timm channels_last"] = (copy.deepcopy(theirs).to(memory_format=torch.channels_last), last)
        for low in (False, True):
            kind = "bfloat16" if low else "float32"
            memory[f"{name} {kind}"] = {who: kept(net, given, low) for who, (net, given) in nets.items()}
            for training in (False, True):
                acts = {who: act(net, given, targets, low, training) for who, (net, given) in nets.items()}
                title = f"{name} {'training' if training else 'inference'} {kind}"
                found[title] = in_turns(acts, args.rounds)
                print(title, {who: round(row["ratio"], 2) for who, row in found[title].items()}, flush=True)
    for title, rows in found.items():
        for who, row in rows.items():
            print(
                f"{title:58} {who:20} {row['ms']:9.1f} ms  {row['ratio']:5.2f}× ({row['least']:.2f}–{row['most']:.2f})"
            )
    for title, rows in memory.items():
        print(f"{title:58} " + ", ".join(f"{who} {mib:.1f} MiB" for who, mib in rows.items()))
    now = datetime.now(UTC)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    cpu = "".join(c if c.isalnum() else "-" for c in machine()["cpu"].lower()).strip("-")
    target = folder / f"outer_parts_{cpu}_{now:%Y-%m-%d}.json"
    target.write_text(json.dumps({"time": now.isoformat(timespec="seconds"), "commit": git("rev-parse", "HEAD"),
                                  "machine": machine(), "threads": args.threads, "batch": BATCH, "times": found,
                                  "kept": memory}, indent=1, ensure_ascii=False))  # fmt: skip
    print(target)


if __name__ == "__main__":
    main()
