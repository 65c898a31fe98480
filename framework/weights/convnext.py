"""ConvNeXt: timm's models/convnext.py."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from framework.weights.keys import map_keys

NAME = "ConvNeXt"

NET = {
    "stem.0": "backbone.stem.conv",
    "stem.1": "backbone.stem.norm",
    "head.norm": "head.norm",
    "head.fc": "head.fc",
}

BLOCK = {
    "conv_dw": "conv",
    "norm": "norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "gamma": "residual.layer_scale",
}


def recognises(keys: Collection[str]) -> bool:
    return "stages.0.blocks.0.conv_dw.weight" in keys and "stem.0.weight" in keys


def names(keys: Collection[str], blocks: list[list[str]]) -> dict[str, str]:
    modules = dict(NET)
    inside: dict[str, tuple[str, dict[str, str]]] = {}
    for s, stage in enumerate(blocks):
        entry = f"{stage[0].rpartition('.blocks.')[0]}.entry"
        modules |= {f"stages.{s}.downsample.0": f"{entry}.before", f"stages.{s}.downsample.1": f"{entry}.conv"}
        inside |= {f"stages.{s}.blocks.{i}": (prefix, BLOCK) for i, prefix in enumerate(stage)}
    return map_keys(keys, {}, modules, inside)


def layout(key: str, tensor: Tensor) -> Tensor:
    return tensor
