"""ViT-Lite, CVT and CCT: SHI-Labs/Compact-Transformers src/vit.py, cvt.py and cct.py.

A table of positions is loaded as it is: weights that are called sinusoidal fit a net with either kind of table. (The
released functions for CCT and CVT make a learned table even then, and put its fresh values in the place of the file's.)
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

from torch import Tensor

from framework.weights.keys import map_keys

NAME = "CCT"

NET = {
    "classifier.norm": "backbone.norm",
    "classifier.attention_pool": "head.pool",
    "classifier.fc": "head.fc",
}

TOKENS = {
    "classifier.class_emb": "backbone.stem.prefix",
    "classifier.positional_emb": "backbone.stem.position.table",
}

BLOCK = {
    "pre_norm": "norm1",
    "self_attn.qkv": "mixer.qkv",
    "self_attn.proj": "mixer.proj",
    "norm1": "norm2",
    "linear1": "mlp.fc1",
    "linear2": "mlp.fc2",
}


def recognises(keys: Collection[str]) -> bool:
    return "tokenizer.conv_layers.0.0.weight" in keys and "classifier.blocks.0.self_attn.qkv.weight" in keys


def names(keys: Collection[str], blocks: list[list[str]]) -> dict[str, str]:
    count = sum(key.startswith("tokenizer.") and key.endswith(".weight") for key in keys)
    stem = {f"tokenizer.conv_layers.{i}.0": f"backbone.stem.convs.{i}" for i in range(count)}
    if "tokenizer.conv_layers.0.0.bias" in keys:  # patches; CCT's convolutions have none
        stem = {"tokenizer.conv_layers.0.0": "backbone.stem.conv"}
    inside = {f"classifier.blocks.{i}": (prefix, BLOCK) for i, prefix in enumerate(chain(*blocks))}
    return map_keys(keys, TOKENS, NET | stem, inside)


def layout(key: str, tensor: Tensor) -> Tensor:
    return tensor
