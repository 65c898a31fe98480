"""T2T-ViT: yitu-opensource/T2T-ViT models/t2t_vit.py and t2t_vit_se.py.

The frozen random features `w` and the frozen table `pos_embed` are buffers here.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

from torch import Tensor

from framework.weights import vit
from framework.weights.keys import map_keys

NAME = "T2T-ViT"

# The performer's names, then the transformer's.
_TOKEN = {
    "norm1": "norm1",
    "kqv": "mixer.kqv",
    "proj": "mixer.proj",
    "norm2": "norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
    "attn.qkv": "qkv",
    "attn.proj": "proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_ATTENTIONS = {f"tokens_to_token.attention{i + 1}": f"backbone.stem.mixers.{i}" for i in range(2)}

NET = {
    **{f"{a}.{theirs}": f"{b}.{ours}" for a, b in _ATTENTIONS.items() for theirs, ours in _TOKEN.items()},
    "tokens_to_token.project": "backbone.stem.proj",
    "norm": "backbone.norm",
    "head": "head.fc",
}

TOKENS = {
    "cls_token": "backbone.stem.prefix",
    "pos_embed": "backbone.stem.position.table",
    **{f"{theirs}.w": f"{ours}.mixer.w" for theirs, ours in _ATTENTIONS.items()},
}

BLOCK = {
    **vit.BLOCK,
    "attn.se_layer.fc.0": "mixer.gate.fc1",
    "attn.se_layer.fc.2": "mixer.gate.fc2",
}


def recognises(keys: Collection[str]) -> bool:
    return "tokens_to_token.project.weight" in keys


def names(keys: Collection[str], blocks: list[list[str]]) -> dict[str, str]:
    inside = {f"blocks.{i}": (prefix, BLOCK) for i, prefix in enumerate(chain(*blocks))}
    return map_keys(keys, TOKENS, NET, inside)


def layout(key: str, tensor: Tensor) -> Tensor:
    return tensor
