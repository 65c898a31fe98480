"""The inner block's kernel against timm's inner block, and TNT with it against timm's TNT, on one core.

    OMP_NUM_THREADS=1 uv run python benchmarks/inner_kernel.py

Prints a table and writes it as JSON under benchmarks/results. All candidates of a row run in turns in one process, in
changing order, and are timed by the thread's own CPU time, which others' load does not touch; a ratio is the median of
the rounds' ratios, with the quartiles of its spread. Weights are timm's own: the results are compared too.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.tnt import TNT as TimmTNT
from timm.models.tnt import Block as TimmBlock
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from blocks.attention import Attention
from blocks.base import Features, Site, to_map, tokens
from blocks.kernels import inner
from blocks.transformer import Encoder
from framework.provenance import git, machine
from framework.weights import convert
from tests.vectors import shapes, tnt

ROUNDS = 11
# token sets, words, width, heads: TNT-S at batch 8; small TNTs
BLOCKS = [(1568, 16, 24, 4), (2048, 16, 12, 2), (2048, 4, 24, 4), (2048, 4, 12, 2), (392, 64, 24, 4)]
TINY: dict[str, Any] = {
    "img_size": 32, "patch_size": 8, "num_classes": 10, "embed_dim": 192, "inner_dim": 12, "depth": 6,
    "num_heads_inner": 2, "num_heads_outer": 3, "first_stride": 2,
}  # fmt: skip


def race(rounds: int, **candidates: Callable[[], object]) -> dict[str, Any]:
    """Milliseconds of each candidate, and how many times as fast as the first one the others are."""
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds + 2):
        for name in list(candidates)[:: 1 if i % 2 else -1]:
            start = time.thread_time()
            candidates[name]()
            if i >= 2:  # the first ones warm up
                found[name].append(time.thread_time() - start)
    first, *others = found
    ratios = {name: [a / b for a, b in zip(found[first], found[name], strict=True)] for name in others}
    return {
        "ms": {name: 1e3 * statistics.median(times) for name, times in found.items()},
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "quartiles": {name: statistics.quantiles(values)[::2] for name, values in ratios.items()},
    }


class TimmInner(nn.Module):
    """The inner part of timm's block."""

    def __init__(self, block: TimmBlock) -> None:
        super().__init__()
        self.norm_in, self.attn_in = block.norm_in, block.attn_in
        self.norm_mlp_in, self.mlp_in = block.norm_mlp_in, block.mlp_in

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn_in(self.norm_in(x))
        return x + self.mlp_in(self.norm_mlp_in(x))


def both(run: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> Callable[[], None]:
    return lambda: run(x).backward(grad)


def quiet(run: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    def act() -> object:
        with torch.no_grad():
            return run(x)

    return act


def block_rows() -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for sets, m, c, heads in BLOCKS:
        theirs = TimmInner(TimmBlock(c, 32, m, heads, 4))
        side = round(m**0.5)
        ours = Encoder(Site.at(c, side), mixer=partial(Attention, heads=heads))
        weights = [*ours.parameters()]
        attn, mlp = theirs.attn_in, theirs.mlp_in
        given = [theirs.norm_in.weight, theirs.norm_in.bias, torch.cat([attn.qk.weight, attn.v.weight]),
                 attn.proj.weight, attn.proj.bias, theirs.norm_mlp_in.weight, theirs.norm_mlp_in.bias,
                 mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias]  # fmt: skip
        for weight, value in zip(weights, given, strict=True):
            weight.data.copy_(value)
        x = torch.randn(sets, m, c)
        turned = x.transpose(1, 2).contiguous().transpose(1, 2)
        grad = torch.randn(sets, c, m).transpose(1, 2)
        runs = {
            "timm": (theirs, x),
            "torch": (lambda x, ours=ours, side=side: tokens(ours(Features(to_map(x, (side, side)))).map), x),
            "kernel": (partial(inner.run, ours), turned),
        }
        torch.testing.assert_close(runs["kernel"][0](turned), theirs(x), rtol=0, atol=1e-5)
        name = f"{sets} × {m} words of {c}, {heads} heads"
        show(rows, f"{name}: forward", race(ROUNDS, **{k: quiet(*v) for k, v in runs.items()}))
        steps = {k: both(run, x.detach().requires_grad_(), grad) for k, (run, x) in runs.items()}
        show(rows, f"{name}: forward and backward", race(ROUNDS, **steps))
    return rows


def step(net: nn.Module, images: Tensor, labels: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4, fused=True)

    def act() -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return act


def net_rows(name: str, theirs: nn.Module, ours: nn.Module, images: Tensor, rounds: int) -> dict[str, Any]:
    ours.load_state_dict(convert(theirs.state_dict(), shapes(ours)))
    rows: dict[str, Any] = {}
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=0, atol=1e-5)
    labels = torch.arange(len(images)) % 10
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        runs = {}
        for who, net in (("timm", theirs), ("kernel", ours)):

            def infer(x: Tensor, net: nn.Module = net, dtype: torch.dtype = dtype) -> Tensor:
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    return net.eval()(x)

            runs[who] = quiet(infer, images)
        show(rows, f"{name}, {kind}: inference", race(rounds, **runs))
        for net in (theirs, ours):
            net.train()
        steps = {who: step(net, images, labels, dtype) for who, net in (("timm", theirs), ("kernel", ours))}
        show(rows, f"{name}, {kind}: training step", race(rounds, **steps))
    return rows


def show(rows: dict[str, Any], name: str, row: dict[str, Any]) -> None:
    rows[name] = row
    low, high = row["quartiles"]["kernel"]
    print(f"{name:56}{row['ms']['timm']:9.2f}{row['ms']['kernel']:9.2f}{row['ratio']['kernel']:7.2f}"
          f"   {low:.2f} to {high:.2f}", flush=True)  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'':56}{'timm ms':>9}{'ms':>9}{'ratio':>7}   quartiles")
    rows = block_rows()
    rows |= net_rows("tiny TNT, batch 128", TimmTNT(**TINY), tnt(**TINY), torch.randn(128, 3, 32, 32), 5)
    rows |= net_rows("TNT-S, batch 8", timm.create_model("tnt_s_patch16_224"), tnt(), torch.randn(8, 3, 224, 224), 3)
    now = datetime.now(UTC)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    cpu = "".join(c if c.isalnum() else "-" for c in machine()["cpu"].lower()).strip("-")
    target = folder / f"inner_kernel_{cpu}_{now:%Y-%m-%d}.json"
    target.write_text(json.dumps({"time": now.isoformat(timespec="seconds"), "commit": git("rev-parse", "HEAD"),
                                  "machine": machine(), "results": rows}, indent=1, ensure_ascii=False))  # fmt: skip
    print(target)


if __name__ == "__main__":
    main()
