"""One table: every class of the package `blocks` that a config can name, with a tiny place to stand and arguments.

A class without a row makes tests/test_blocks.py fail. Grids are not square, so that a mixed-up height and width
shows; widths fit Next-ViT's rounding to 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import Block as TimmBlock

from blocks.attention import Attention
from blocks.base import Act, Block, FeedForward, Gate, Mixer, NoPosition, Norm, Position, Site, Words
from blocks.cct import CompactPatchStem, ConvTokenizer, SeqPoolHead
from blocks.convnext import ConvNeXt
from blocks.cvt import ConvAttention
from blocks.gates import SE, NoGate, SigmoidGate, TanhGate
from blocks.heads import AveragePoolHead, ClassTokenHead, DistilledHead, Head
from blocks.mlp import GELU, Hardswish, Mlp, QuickGELU, ReLU, SiLU
from blocks.nextvit import EMHSA, MHCA, NCB, NTB
from blocks.norms import BatchNorm, LayerNorm, NoNorm, RMSNorm
from blocks.positions import (
    ConditionalPosition,
    LearnedPosition,
    NetPosition,
    RelativeBias,
    RoPE,
    SinCosPosition,
    SinusoidPosition,
)
from blocks.pvt import ReducedAttention
from blocks.residual import LearnedResidual, Residual
from blocks.revcol import QUARTERS, Fusion, QuarterHead
from blocks.sret import NLL, SlicedAttention
from blocks.stems import ConvStem, PatchStem
from blocks.structure import AddPosition, ClassToken, ConvEmbed, FromModule, Identity, MakeWords, Merge, Recursive
from blocks.t2t import PerformerAttention, PerformerToken, SoftSplit, TokensToTokenStem, TransformerToken
from blocks.tnt import TNT, SentenceStem
from blocks.transformer import Encoder

SLOTS: tuple[type, ...] = (Block, Mixer, FeedForward, Norm, Gate, Act, Head, Position, Residual, Fusion)

GRID = (6, 4)
WORDS = Words(8, (2, 2), over=GRID)


@dataclass(frozen=True)
class Case:
    """One row: where a class stands and its arguments.

    Args:
        site: the whole of it for blocks and mixers; norms and gates are built with its width, heads and positions
            with its `inp`.
        args: the constructor's other arguments.
        passes: parts of the features that the block must hand on untouched, given or not.
        name: tells the rows of a class apart.
    """

    site: Site
    args: Mapping[str, Any] = field(default_factory=dict)
    passes: frozenset[str] = frozenset({"words"})
    name: str = "default"


def at(width: int = 32, grid: tuple[int, int] = GRID, **site: Any) -> Site:
    return Site.at(width, grid, **site)


def rows(*cases: tuple[str, Site, dict[str, Any]], passes: str = "words") -> list[Case]:
    return [Case(site, args, frozenset(passes.split()), name) for name, site, args in cases]


MAP = at()
ONE, TWO = at(prefix=1), at(prefix=2)
IMAGES = at(3, (32, 48), dim=32)
NOTHING = rows(("default", MAP, {}))
QUARTERED = replace(MAP, inp=replace(MAP.inp, extra=QUARTERS))
HEADS = partial(Attention, heads=4)
SCALED = partial(Residual, layer_scale=0.1)
GATED = partial(Residual, gate=TanhGate)
SLICED = partial(
    Encoder,
    mixer=partial(SlicedAttention, heads=4, groups=(6, 2)),
    mixer_residual=LearnedResidual,
    mlp_residual=LearnedResidual,
)
ENCODER = partial(Encoder, mixer=HEADS)
WORD_ENCODER = partial(Encoder, mixer=partial(Attention, heads=2))
SCALED = partial(Residual, layer_scale=0.1)
GATED = partial(Residual, gate=TanhGate)

TABLE: dict[type, list[Case]] = {
    # blocks
    Encoder: rows(
        ("map", MAP, {"mixer": HEADS}),
        ("prefix", TWO, {"mixer": partial(HEADS, qkv_bias=True)}),
        ("se", ONE, {"mixer": partial(HEADS, gate=SigmoidGate), "mlp_residual": GATED}),
        ("gate", ONE, {"mixer": HEADS, "mixer_residual": GATED}),
        ("batchnorm", ONE, {"mixer": HEADS, "norm": BatchNorm}),
        ("bias", at(prefix=1, position=RelativeBias()), {"mixer": HEADS}),
        ("rope", at(prefix=1, position=RoPE()), {"mixer": HEADS}),
        ("drop_path", at(prefix=1, drop_path=0.3), {"mixer": HEADS, "mlp_residual": SCALED}),
        ("dropout", ONE, {"mixer": partial(HEADS, attn_drop=0.1, proj_drop=0.1), "mlp": partial(Mlp, drop=0.1)}),
        ("norm_stream", ONE, {"mixer": HEADS, "norm_stream": True}),
        ("performer", ONE, {"mixer": partial(PerformerAttention, heads=4)}),
    ),
    TNT: rows(
        ("map", at(words=WORDS), {"inner": WORD_ENCODER, "outer": ENCODER}),
        ("prefix", at(prefix=1, words=WORDS, word_position=RoPE()), {"inner": WORD_ENCODER, "outer": ENCODER}),
        ("legacy", at(prefix=2, words=WORDS), {"inner": WORD_ENCODER, "outer": ENCODER, "legacy": True}),
        ("se", at(prefix=1, words=WORDS), {"inner": WORD_ENCODER, "outer": partial(ENCODER, mlp_residual=GATED)}),
        passes="",
    ),
    NCB: rows(
        ("same", MAP, {}),
        ("stride", at(32, (7, 5), stride=2, dim=64), {}),
        ("layernorm", at(drop_path=0.3), {"norm": LayerNorm, "act": GELU, "head_dim": 16}),
        ("residual", at(dim=64), {"mixer_residual": partial(Residual, gate=SigmoidGate, layer_scale=0.1)}),
        passes="words prefix",
    ),
    NTB: rows(
        ("sr", at(64, (7, 5)), {"sr_ratio": 2, "shrink": 0.5}),
        ("stride", at(32, (7, 5), stride=2, dim=64), {"shrink": 0.5}),
        ("bias", at(dim=64, position=RelativeBias()), {"shrink": 0.5, "norm": LayerNorm, "act": GELU}),
        ("rope", at(64, drop_path=0.3, position=RoPE()), {"shrink": 0.5, "head_dim": 16}),
        passes="words prefix",
    ),
    ConvNeXt: rows(
        ("plain", MAP, {}),
        ("scaled", at(drop_path=0.3), {"kernel": 3, "mlp": partial(Mlp, ratio=1), "residual": SCALED}),
        ("batchnorm", MAP, {"norm": BatchNorm, "residual": GATED}),
        passes="words prefix",
    ),
    SE: rows(("map", MAP, {}), ("prefix", TWO, {"gate": TanhGate})),
    PatchStem: rows(
        ("plain", IMAGES, {"patch": 8}),
        (
            "distilled",
            replace(IMAGES, position=LearnedPosition()),
            {"patch": 8, "prefix": 2, "norm": LayerNorm, "drop": 0.1},
        ),
        ("map", replace(IMAGES, position=SinCosPosition()), {"patch": 8, "prefix": 0}),
        passes="",
    ),
    SentenceStem: rows(
        ("plain", IMAGES, {"patch": 8, "words": 4, "word_dim": 8}),
        ("legacy", IMAGES, {"patch": 8, "words": 16, "word_dim": 8, "legacy": True, "prefix": 0}),
        (
            "positions",
            replace(IMAGES, position=ConditionalPosition(), word_position=LearnedPosition()),
            {"patch": 8, "words": 9, "word_dim": 8, "prefix": 2, "drop": 0.1},
        ),
        passes="",
    ),
    ConvStem: rows(
        ("plain", IMAGES, {"dims": (8, 16), "strides": (2, 2)}),
        (
            "odd",
            at(3, (31, 45), dim=32, position=LearnedPosition()),
            {"dims": (8, 16), "strides": (2, 2), "norm": LayerNorm, "act": GELU},
        ),
        ("bias", IMAGES, {"dims": (8, 16), "strides": (2, 2), "bias": True}),
        passes="",
    ),
    ConvTokenizer: rows(
        ("one", IMAGES, {}),
        (
            "two",
            at(3, (31, 45), dim=32, position=LearnedPosition()),
            {"layers": 2, "hidden": 8, "kernel": 7, "drop": 0.1},
        ),
        ("own", IMAGES, {"kernel": 4, "stride": 3, "padding": 0, "act": GELU}),
        passes="",
    ),
    CompactPatchStem: rows(
        ("vit_lite", replace(IMAGES, position=SinusoidPosition()), {}),
        ("cvt", replace(IMAGES, position=LearnedPosition()), {"prefix": 0, "norm": LayerNorm, "drop": 0.1}),
        passes="",
    ),
    SoftSplit: rows(
        ("overlap", at(32, (7, 5), stride=2), {}),
        ("patches", at(stride=2), {"kernel": 2}),
        ("same", at(8), {"kernel": 5}),
    ),
    PerformerToken: rows(
        ("narrower", at(48, dim=16), {}),
        ("prefix", at(prefix=2, drop_path=0.3), {"features": 1.0, "mlp_ratio": 2.0, "drop": 0.0}),
        ("residual", at(dim=64), {"mixer_residual": SCALED, "mlp_residual": GATED, "drop": 0.0}),
    ),
    TransformerToken: rows(
        ("narrower", at(48, dim=16), {}),
        ("prefix", at(prefix=2, drop_path=0.3), {"mlp_ratio": 2.0}),
        ("bias", at(dim=64, prefix=1, position=RelativeBias()), {"mixer_residual": SCALED, "mlp_residual": GATED}),
        ("rope", at(dim=16, position=RoPE()), {}),
    ),
    TokensToTokenStem: rows(
        ("performer", replace(IMAGES, position=SinusoidPosition()), {"token_dim": 16}),
        (
            "transformer",
            replace(IMAGES, position=LearnedPosition()),
            {"token_dim": 16, "mixer": TransformerToken, "prefix": 2, "drop": 0.1},
        ),
        (
            "convolutions",
            at(3, (31, 45), dim=32),
            {"token_dim": 32, "mixer": ConvEmbed, "kernels": (4, 5), "strides": (4, 2), "prefix": 0},
        ),
        passes="",
    ),
    Identity: rows(("map", MAP, {}), ("prefix", TWO, {}), passes="words prefix"),
    ClassToken: rows(("first", MAP, {}), ("more", ONE, {"count": 2})),
    AddPosition: rows(
        ("learned", ONE, {"position": LearnedPosition(), "drop": 0.1}),
        ("sincos", TWO, {"position": SinCosPosition()}),
        ("conditional", MAP, {"position": ConditionalPosition()}),
        ("net", at(position=LearnedPosition()), {}),
    ),
    MakeWords: rows(
        ("plain", ONE, {"words": 4, "word_dim": 8}),
        ("position", at(word_position=LearnedPosition()), {"words": 4, "word_dim": 8, "norm": LayerNorm}),
        passes="prefix",
    ),
    Merge: rows(("plain", at(stride=2, dim=64), {})),
    ConvEmbed: rows(
        ("patches", at(stride=2, dim=64), {}),
        ("overlap", at(32, (7, 5), stride=2, dim=64), {"kernel": 3}),
        ("padding", at(32, (12, 9), stride=4, dim=64), {"kernel": 7, "padding": 2, "norm": LayerNorm}),
        ("depthwise", at(stride=2, dim=64), {"kernel": 3, "depthwise": True, "norm": NoNorm}),
        ("before", at(stride=2, dim=64), {"before": LayerNorm, "norm": NoNorm}),
    ),
    Recursive: [
        *rows(
            ("encoder", TWO, {"block": ENCODER}),
            ("sliced", MAP, {"block": SLICED, "after": NLL, "times": 3}),
            ("drop_path", at(prefix=1, drop_path=0.3), {"block": ENCODER, "after": NLL}),
            ("once", ONE, {"block": ENCODER, "after": NLL, "times": 1}),
            ("nested", ONE, {"block": partial(Recursive, block=ENCODER), "after": ENCODER}),
        ),
        *rows(("ncb", MAP, {"block": NCB, "times": 3}), passes="words prefix"),
        *rows(("words", at(words=WORDS), {"block": partial(TNT, inner=WORD_ENCODER, outer=ENCODER)}), passes=""),
    ],
    NLL: rows(
        ("map", MAP, {"mlp": partial(Mlp, ratio=1.0)}),
        ("prefix", at(prefix=1, drop_path=0.3), {}),
        ("batchnorm", TWO, {"norm": BatchNorm, "residual": GATED}),
    ),
    FromModule: [
        *rows(("tokens", TWO, {"module": partial(TimmBlock, num_heads=4), "site_args": {"drop_path": "drop_path"}})),
        *rows(("map", MAP, {"module": ConvNeXtBlock, "layout": "map"}), passes="words prefix"),
    ],
    # mixers and feed-forwards
    Attention: rows(
        ("plain", TWO, {"heads": 4}),
        ("bias", ONE, {"heads": 4, "position": RelativeBias(), "qkv_bias": True}),
        ("rope", ONE, {"heads": 4, "position": RoPE()}),
        ("gate", ONE, {"heads": 4, "gate": SigmoidGate}),
    ),
    PerformerAttention: rows(("plain", TWO, {"heads": 4}), ("features", ONE, {"heads": 1, "features": 1.0})),
    SlicedAttention: rows(
        ("plain", MAP, {"heads": 4}),
        ("groups", MAP, {"heads": 4, "qkv_bias": True, "groups": (6, 2), "attn_drop": 0.1, "proj_drop": 0.1}),
    ),
    MHCA: rows(("plain", MAP, {}), ("layernorm", MAP, {"head_dim": 8, "norm": LayerNorm, "act": GELU})),
    ConvAttention: rows(
        ("plain", MAP, {"heads": 4}),
        ("prefix", TWO, {"heads": 4, "scale": "head", "norm": LayerNorm}),
        ("avg", at(32, (7, 5), prefix=1), {"heads": 4, "projection": "avg", "qkv_bias": False}),
        ("linear", at(prefix=1, position=RelativeBias()), {"heads": 4, "projection": "linear"}),
        ("rope", at(32, (7, 5), prefix=1, position=RoPE()), {"heads": 4, "kv_stride": 3}),
    ),
    ReducedAttention: rows(
        ("plain", TWO, {"heads": 4}),
        ("sr", at(32, (7, 5)), {"heads": 2, "sr": 2}),
        ("prefix", TWO, {"heads": 4, "sr": 2, "qkv_bias": False, "norm": NoNorm}),
        ("rope", at(32, (7, 5), prefix=1, position=RoPE()), {"heads": 4, "sr": 2}),
        ("bias", ONE, {"heads": 4, "position": RelativeBias()}),
    ),
    EMHSA: rows(
        ("plain", MAP, {}),
        ("sr", at(32, (7, 5)), {"sr_ratio": 2, "head_dim": 8}),
        ("bias", MAP, {"head_dim": 8, "position": RelativeBias()}),
    ),
    Mlp: rows(("plain", TWO, {}), ("rounded", MAP, {"ratio": 1.6, "act": ReLU, "round_to": 32})),
    # built with a width
    LayerNorm: NOTHING,
    RMSNorm: NOTHING,
    BatchNorm: NOTHING,
    NoNorm: NOTHING,
    NoGate: NOTHING,
    SigmoidGate: rows(("plain", MAP, {}), ("bias", MAP, {"reduction": 4, "bias": True})),
    TanhGate: NOTHING,
    # activations
    GELU: NOTHING,
    ReLU: NOTHING,
    SiLU: NOTHING,
    Hardswish: NOTHING,
    QuickGELU: NOTHING,
    # heads
    ClassTokenHead: rows(("plain", ONE, {}), ("more", TWO, {})),
    AveragePoolHead: rows(("plain", MAP, {}), ("prefix", ONE, {}), ("norm", MAP, {"norm": LayerNorm, "drop": 0.1})),
    SeqPoolHead: rows(("plain", MAP, {}), ("prefix", ONE, {})),
    DistilledHead: rows(("plain", TWO, {})),
    QuarterHead: rows(("plain", QUARTERED, {}), ("norm", QUARTERED, {"norm": LayerNorm, "drop": 0.1})),
    # positions
    NoPosition: NOTHING,
    NetPosition: NOTHING,
    LearnedPosition: rows(("prefix", TWO, {}), ("map", MAP, {"std": 0.1, "resize": "bilinear"})),
    SinusoidPosition: rows(("prefix", TWO, {}), ("map", MAP, {})),
    SinCosPosition: rows(("prefix", ONE, {}), ("map", MAP, {"temperature": 100.0})),
    ConditionalPosition: rows(("prefix", ONE, {}), ("wide", MAP, {"kernel": 5})),
    RelativeBias: rows(("prefix", TWO, {}), ("map", MAP, {"std": 0.1})),
    RoPE: rows(("prefix", ONE, {}), ("map", MAP, {"base": 100.0})),
    # residuals
    Residual: rows(
        ("plain", MAP, {}),
        ("all", at(drop_path=0.3), {"scale": 0.5, "layer_scale": 0.1, "gate": TanhGate}),
    ),
    LearnedResidual: rows(("plain", MAP, {}), ("drop_path", at(drop_path=0.3), {})),
    # what joins levels of columns
    Fusion: rows(
        ("plain", MAP, {}),
        ("down", at(stride=2, dim=64), {"norm": BatchNorm}),
        ("odd", at(32, (7, 5), stride=2, dim=64), {"down": partial(ConvEmbed, kernel=3)}),
    ),
}

UNPUBLISHED = {Identity, MakeWords, FromModule}
"""Blocks of this project's own, which no paper describes; every other block and mixer names its source."""

IDLE = {SeqPoolHead: {"pool.bias"}}
"""Parameters that published nets have and that change nothing: no gradient is asked of them."""
