"""The pieces of nets that have kernels of their own, against timm's and torch's: forward, and forward and backward.

    uv run python benchmarks/kernels.py                         # one thread: its CPU time
    uv run python benchmarks/kernels.py --threads 2 --rounds 5  # wall time, on an idle machine

TNT's inner block: timm's, ours in PyTorch (the reference) and ours in one kernel, each in its own memory layout. The
textbook encoder: timm's block of a ViT, and ours as one call each way, in the sizes of three TNTs' outer blocks. The
Linears of TNT-S's outer blocks at batch 8, the MLPs of these and of Next-ViT-S's first stage, attention of TNT-S at
batch 8 and of a tiny one at batch 128 on queries, keys and values as they come out of one product, and Next-ViT-S's
3×3 convolutions at batch 16: torch's and ours; bfloat16 is autocast on bfloat16 inputs. Weights and inputs are the
same. *Δ* is the largest difference to the first row, of results and gradients, for each unit of the largest number:
above 1e-5 in float32 (0.02 in bfloat16) the script stops. Whole nets: `nets.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from timm.models import vision_transformer
from timm.models.tnt import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from blocks.attention import Attention
from blocks.base import Features, Site, linear, to_map, tokens
from blocks.kernels import conv, inner
from blocks.kernels.attention import attend
from blocks.kernels.encoder import encode
from blocks.mlp import GELU, Mlp, ReLU
from blocks.norms import LayerNorm
from blocks.transformer import Encoder
from framework.bench import equal, report
from framework.bench.harness import CLOCKS, Candidate, Section, cpu_time, race, threads, wall_time
from framework.bench.nets import DTYPES
from framework.process import prepare

# Token sets, words, width, heads: TNT-S at batch 8, then small TNTs.
INNER = [(1568, 16, 24, 4), (2048, 16, 12, 2), (2048, 4, 24, 4), (2048, 4, 12, 2), (392, 64, 24, 4)]
# Samples, tokens, width and heads of the outer blocks of a TNT on digits, of a tiny one, and of TNT-S.
OUTER = [(64, 17, 48, 4), (128, 17, 192, 3), (8, 197, 384, 6)]
# Rows, width and output width of TNT-S's outer Linears at batch 8.
LINEAR = {"qkv": (1576, 384, 1152), "proj": (1576, 384, 384), "fc1": (1576, 384, 1536), "fc2": (1576, 1536, 384)}
# Samples, tokens, heads and their width, of TNT-S and of a tiny TNT.
ATTENTION = [(8, 197, 6, 64), (128, 17, 3, 64)]
# Rows, width, hidden width and activation of the MLPs of TNT-S and of Next-ViT-S's first stage, at batch 8.
MLP = [(1576, 384, 1536, GELU), (25088, 96, 288, ReLU)]
# Channels in and out, groups and side of Next-ViT-S's maps.
CONV = [(64, 32, 1, 112), (96, 96, 3, 56), (192, 192, 6, 28)]

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}


@dataclass(frozen=True)
class Way:
    """One way to compute a piece.

    Args:
        run: gives the result.
        x: what it takes.
        grad: of the result.
        params: whose gradients are wanted besides that of `x`.
    """

    run: Callable[[Tensor], Tensor]
    x: Tensor
    grad: Tensor
    params: tuple[Tensor, ...] = ()

    def forward(self, dtype: str) -> list[Tensor]:
        with torch.no_grad(), autocast(dtype):
            return [self.run(self.x)]

    def both(self, dtype: str) -> list[Tensor]:
        """The result, and the gradients of the input and of the parameters."""
        x = self.x.detach().requires_grad_()
        with autocast(dtype):
            y = self.run(x)
        return [y, *torch.autograd.grad(y, (x, *self.params), self.grad)]


@dataclass(frozen=True)
class Piece:
    """A piece of a net in one size.

    Args:
        part: the size.
        dtype: float32 or bfloat16.
        ways: by name; the first is what the others are compared with.
    """

    part: str
    dtype: str
    ways: dict[str, Way]


def autocast(dtype: str) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")


class TimmInner(nn.Module):
    """The inner part of timm's block."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm_in, self.attn_in = block.norm_in, block.attn_in
        self.norm_mlp_in, self.mlp_in = block.norm_mlp_in, block.mlp_in

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn_in(self.norm_in(x))
        return x + self.mlp_in(self.norm_mlp_in(x))


def inner_block(dtype: str, sets: int, words: int, width: int, heads: int) -> Piece:
    side = round(words**0.5)
    theirs = TimmInner(Block(width, 32, words, heads, 4))
    ours = Encoder(Site.at(width, side), mixer=partial(Attention, heads=heads))
    x, grad = torch.randn(sets, words, width), torch.randn(sets, words, width)
    equal.liven(theirs, x)
    vector_to_parameters(parameters_to_vector(theirs.parameters()), ours.parameters())  # they come in the same order
    turned, turned_grad = (value.transpose(1, 2).contiguous().transpose(1, 2) for value in (x, grad))
    assert inner.serves(ours, turned), "the kernel is not there: is there a C++ compiler?"

    def in_torch(x: Tensor) -> Tensor:
        return tokens(ours(Features(to_map(x, (side, side)))).map)

    params = tuple(ours.parameters())
    ways = {
        "timm": Way(theirs, x, grad, tuple(theirs.parameters())),
        "ours, in PyTorch": Way(in_torch, x, grad, params),
        "ours, kernel": Way(partial(inner.run, ours), turned, turned_grad, params),
    }
    return Piece(f"{dtype}: {sets} × {words} words of {width}, {heads} heads", dtype, ways)


def outer_block(dtype: str, samples: int, count: int, width: int, heads: int) -> Piece:
    theirs = vision_transformer.Block(width, heads)
    ours = Encoder(Site.at(width, 4), partial(Attention, heads=heads), norm=partial(LayerNorm, eps=theirs.norm1.eps))
    x, grad = torch.randn(samples, count, width), torch.randn(samples, count, width)
    equal.liven(theirs, x)
    vector_to_parameters(parameters_to_vector(theirs.parameters()), ours.parameters())  # they come in the same order

    def called(x: Tensor) -> Tensor:
        made = encode(ours, x)
        assert made is not None, "the kernel is not there, or BLAS is faster"
        return made

    ways = {
        "timm": Way(theirs, x, grad, tuple(theirs.parameters())),
        "ours": Way(called, x, grad, tuple(ours.parameters())),
    }
    return Piece(f"{dtype}: {samples} × {count} tokens of {width}, {heads} heads", dtype, ways)


def product(dtype: str, name: str, rows: int, width: int, out: int) -> Piece:
    theirs, ours = nn.Linear(width, out), linear(width, out)
    ours.load_state_dict(theirs.state_dict())
    x, grad = torch.randn(rows, width, dtype=DTYPES[dtype]), torch.randn(rows, out, dtype=DTYPES[dtype])
    layers = {"torch": theirs, "ours": ours}
    ways = {who: Way(layer, x, grad, tuple(layer.parameters())) for who, layer in layers.items()}
    return Piece(f"{dtype}: {name}, {rows} × {width} → {out}", dtype, ways)


def mlp(dtype: str, rows: int, width: int, hidden: int, act: type[GELU] | type[ReLU]) -> Piece:
    ours = Mlp(Site.at(width, 1), ratio=hidden / width, act=act)
    theirs = nn.Sequential(nn.Linear(width, hidden), getattr(nn, act.__name__)(), nn.Linear(hidden, width))
    vector_to_parameters(parameters_to_vector(theirs.parameters()), ours.parameters())
    x, grad = (torch.randn(rows, width, dtype=DTYPES[dtype]) for _ in range(2))
    ways = {
        "torch": Way(theirs, x, grad, tuple(theirs.parameters())),
        "ours": Way(lambda x: ours(x, (1, 1)), x, grad, tuple(ours.parameters())),
    }
    return Piece(f"{dtype}: {rows} × {width} → {hidden} → {width}, {act.__name__}", dtype, ways)


def attention(dtype: str, samples: int, tokens: int, heads: int, dim: int) -> Piece:
    qkv = torch.randn(samples, tokens, 3, heads, dim, dtype=DTYPES[dtype])
    grad = torch.randn(samples, tokens, heads, dim, dtype=DTYPES[dtype]).transpose(1, 2)

    def of(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda qkv: function(*qkv.permute(2, 0, 3, 1, 4).unbind(0))

    functions: dict[str, Callable[..., Tensor]] = {"torch": F.scaled_dot_product_attention, "ours": attend}
    ways = {who: Way(of(function), qkv, grad) for who, function in functions.items()}
    return Piece(f"{dtype}: {samples} × {heads} heads, {tokens} tokens of {dim}", dtype, ways)


def convolution(dtype: str, inp: int, out: int, groups: int, side: int) -> Piece:
    layer = nn.Conv2d(inp, out, 3, padding=1, groups=groups, bias=False)
    x, grad = (torch.randn(16, side, side, n, dtype=DTYPES[dtype]).permute(0, 3, 1, 2) for n in (inp, out))

    def ours(map: Tensor) -> Tensor:  # without gradients it is part of a folded batch norm
        return conv.convolved(layer, map) if torch.is_grad_enabled() else conv.conv(map, layer.weight, None, groups)

    ways = {"torch": Way(layer, x, grad, (layer.weight,)), "ours": Way(ours, x, grad, (layer.weight,))}
    return Piece(f"{dtype}: {inp} → {out} channels in {groups} group{'s' * (groups > 1)}, {side} × {side}", dtype, ways)


def timed(title: str, piece: Piece, backward: bool, count: int, rounds: int) -> Section:
    """Races the ways of a piece, which must give the same."""
    stopwatch = cpu_time if count == 1 else wall_time
    candidates, reference = [], None
    for name, way in piece.ways.items():
        act = partial(way.both if backward else way.forward, piece.dtype)
        found = comparable(act())
        reference = reference or found
        apart = max(map(equal.difference, found, reference))
        assert apart <= TOLERANCE[piece.dtype], f"{title}, {piece.part}: {name} differs by {apart:.2g}"
        candidates.append(Candidate(name, act, extra={} if found is reference else {"Δ": apart}))
    timings = race(candidates, stopwatch, rounds)
    setting = {"dtype": piece.dtype, "backward": backward, "threads": count}
    return Section(title, CLOCKS[stopwatch], timings, setting=setting, part=piece.part)


def comparable(found: list[Tensor]) -> list[Tensor]:
    """Gradients of parameters as one vector: timm has two where ours has one."""
    values, params = found[:2], found[2:]
    return [*values, torch.cat([value.flatten() for value in params])] if params else values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="with 1, CPU time is measured, else wall time (default: 1)"
    )
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="how often each is timed (default: 10)")
    args = parser.parse_args()
    prepare()
    torch.manual_seed(0)
    before, found = report.circumstances(), []
    pieces = {
        "inner block of TNT": [inner_block(dtype, *sizes) for dtype in DTYPES for sizes in INNER],
        "encoder": [
            outer_block(dtype, *sizes) for dtype in DTYPES for sizes in OUTER if dtype == "float32" or not sizes[2] % 32
        ],
        "Linear": [product(dtype, name, *sizes) for dtype in DTYPES for name, sizes in LINEAR.items()],
        "attention": [attention(dtype, *sizes) for dtype in DTYPES for sizes in ATTENTION],
        "MLP": [mlp(dtype, *sizes) for dtype in DTYPES for sizes in MLP],
        "3×3 convolution": [convolution(dtype, *sizes) for dtype in DTYPES for sizes in CONV],
    }
    with threads(args.threads):
        for name, sizes in pieces.items():
            for backward, what in ((False, "forward"), (True, "forward and backward")):
                title = f"{name}: {what}, {args.threads} thread{'s' * (args.threads > 1)}"
                parts = [timed(title, piece, backward, args.threads, args.rounds) for piece in sizes]
                report.show(parts)
                found += parts
    print(report.write(report.where("kernels"), "kernels", report.sections(found), vars(args), **before))


if __name__ == "__main__":
    main()
