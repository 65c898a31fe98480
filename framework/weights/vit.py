"""ViT and DeiT: facebookresearch/deit models.py, whose names timm's vision_transformer.py and deit.py share."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

from torch import Tensor

from framework.weights.keys import map_keys

NAME = "ViT/DeiT"

NET = {
    "patch_embed.proj": "backbone.stem.conv",
    "norm": "backbone.norm",
    "head": "head.fc",
    "head_dist": "head.fc_dist",
}

TOKENS = {
    "cls_token": "backbone.stem.prefix#0",
    "dist_token": "backbone.stem.prefix#1",
    "pos_embed": "backbone.stem.position.table",
}

BLOCK = {
    "norm1": "norm1",
    "attn.qkv": "mixer.qkv",
    "attn.proj": "mixer.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def recognises(keys: Collection[str]) -> bool:
    # LV-ViT has the same blocks behind other patches
    patches = {key for key in keys if key.startswith("patch_embed.")}
    return patches == {"patch_embed.proj.weight", "patch_embed.proj.bias"} and "blocks.0.attn.qkv.weight" in keys


def names(keys: Collection[str], blocks: list[list[str]]) -> dict[str, str]:
    inside = {f"blocks.{i}": (prefix, BLOCK) for i, prefix in enumerate(chain(*blocks))}
    return map_keys(keys, TOKENS, NET, inside)


def layout(key: str, tensor: Tensor) -> Tensor:
    return tensor
