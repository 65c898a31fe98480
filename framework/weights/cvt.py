"""CvT: microsoft/CvT lib/models/cls_cvt.py."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from framework.weights.keys import map_keys

NAME = "CvT"

NET = {"norm": "backbone.norm", "head": "head.fc"}

EMBED = {"proj": "conv", "norm": "norm"}

BLOCK = {
    "norm1": "norm1",
    **{f"attn.conv_proj_{part}.conv": f"mixer.conv_{part}.conv" for part in "qkv"},
    **{f"attn.conv_proj_{part}.bn": f"mixer.conv_{part}.norm.bn" for part in "qkv"},
    **{f"attn.proj_{part}": f"mixer.{part}" for part in "qkv"},
    "attn.proj": "mixer.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def recognises(keys: Collection[str]) -> bool:
    return "stage0.blocks.0.attn.proj_q.weight" in keys


def names(keys: Collection[str], blocks: list[list[str]]) -> dict[str, str]:
    modules, tokens = dict(NET), dict[str, str]()
    inside: dict[str, tuple[str, dict[str, str]]] = {}
    for s, prefixes in enumerate(blocks):
        stage, first = prefixes[0].rsplit(".blocks.", 1)
        modules |= {f"stage{s}.patch_embed.{part}": f"{stage}.entry.{ours}" for part, ours in EMBED.items()}
        tokens[f"stage{s}.cls_token"] = f"{stage}.blocks.{int(first) - 1}.prefix"  # right before the encoders
        inside |= {f"stage{s}.blocks.{i}": (prefix, BLOCK) for i, prefix in enumerate(prefixes)}
    return map_keys(keys, tokens, modules, inside)


def layout(key: str, tensor: Tensor) -> Tensor:
    return tensor
