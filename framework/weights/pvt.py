"""PVT v1: whai362/PVT classification/pvt.py, whose names do not change with the size of the net."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from framework.weights.keys import map_keys

NAME = "PVT"

NET = {"norm": "backbone.norm", "head": "head.fc"}

EMBED = {"proj": "conv", "norm": "norm"}

BLOCK = {
    "norm1": "norm1",
    "attn.q": "mixer.q",
    "attn.kv": "mixer.kv",
    "attn.sr": "mixer.reduce",
    "attn.norm": "mixer.norm",
    "attn.proj": "mixer.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def recognises(keys: Collection[str]) -> bool:
    return "block1.0.attn.kv.weight" in keys and "pos_embed1" in keys


def names(keys: Collection[str], blocks: list[list[str]]) -> dict[str, str]:
    modules, tokens = dict(NET), dict[str, str]()
    inside: dict[str, tuple[str, dict[str, str]]] = {}
    for s, prefixes in enumerate(blocks, 1):
        # A stage's entry embeds; before its encoders it adds positions, and before those the last has a class token.
        stage, first = prefixes[0].rsplit(".blocks.", 1)
        modules |= {f"patch_embed{s}.{part}": f"{stage}.entry.{ours}" for part, ours in EMBED.items()}
        tokens[f"pos_embed{s}"] = f"{stage}.blocks.{int(first) - 1}.position.table"
        tokens["cls_token"] = f"{stage}.blocks.{int(first) - 2}.prefix"
        inside |= {f"block{s}.{i}": (prefix, BLOCK) for i, prefix in enumerate(prefixes)}
    return map_keys(keys, tokens, modules, inside)


def layout(key: str, tensor: Tensor) -> Tensor:
    return tensor
