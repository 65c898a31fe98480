"""Next-ViT: bytedance/Next-ViT classification/nextvit.py (blocks numbered through), and timm's models/nextvit.py.

Their 1×1 convolutions are Linear layers here. Weights with merged batch norms (their form for deployment) do not fit.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import chain

from torch import Tensor

from framework.weights.keys import map_keys

NAME = "Next-ViT"

NET = {
    **{f"stem.{i}.conv": f"backbone.stem.layers.{i}.conv" for i in range(4)},
    **{f"stem.{i}.norm": f"backbone.stem.layers.{i}.norm.bn" for i in range(4)},
    "norm": "backbone.norm.bn",
    "proj_head.0": "head.fc",
    "head.fc": "head.fc",
}

_BOTH = {
    "patch_embed.conv": "embed.proj",
    "patch_embed.norm": "embed.norm.bn",
    **{f"mlp.{theirs}": "mlp.fc1" for theirs in ("conv1", "fc1")},
    **{f"mlp.{theirs}": "mlp.fc2" for theirs in ("conv2", "fc2")},
}


def _mhca(ours: str) -> dict[str, str]:
    return {
        "mhca.group_conv3x3": f"{ours}.conv",
        "mhca.norm": f"{ours}.norm.bn",
        "mhca.projection": f"{ours}.proj",
    }


NCB = {**_BOTH, **_mhca("mixer"), "norm": "norm.bn"}
NTB = {
    **_BOTH,
    **_mhca("conv"),
    "norm1": "norm1.bn",
    **{f"e_mhsa.{part}": f"attn.{part}" for part in ("q", "k", "v", "proj")},
    "e_mhsa.norm": "attn.norm.bn",
    "projection.conv": "project.proj",
    "projection.norm": "project.norm.bn",
    "norm2": "norm2.bn",
}


def recognises(keys: Collection[str]) -> bool:
    return any(re.match(r"(features\.0|stages\.0\.blocks\.0)\.mhca\.group_conv3x3\.", key) for key in keys)


def names(keys: Collection[str], blocks: list[list[str]]) -> dict[str, str]:
    transformers = {key.removesuffix(".e_mhsa.q.weight") for key in keys if key.endswith(".e_mhsa.q.weight")}
    theirs = {f"features.{i}": prefix for i, prefix in enumerate(chain(*blocks))}
    for s, stage in enumerate(blocks):
        theirs |= {f"stages.{s}.blocks.{i}": prefix for i, prefix in enumerate(stage)}
    inside = {name: (prefix, NTB if name in transformers else NCB) for name, prefix in theirs.items()}
    return map_keys(keys, {}, NET, inside)


def layout(key: str, tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.dim() == 4 and tensor.shape[2:] == (1, 1) else tensor
