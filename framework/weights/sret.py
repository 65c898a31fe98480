"""SReT: szq0214/SReT SReT.py and SReT_wo_slice.py, whose keys are the same.

A block that is run twice stands there twice, as `blocks.0` and `blocks.2`, with its projections, which are never
shared, behind each. Its learned coefficients are called biases.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from torch import Tensor

from framework.weights.keys import map_keys

NAME = "SReT"

NET = {
    **{f"patch_embed.conv{i + 1}": f"backbone.stem.layers.{i}.conv" for i in range(3)},
    **{f"patch_embed.bn{i + 1}": f"backbone.stem.layers.{i}.norm.bn" for i in range(3)},
    "norm": "head.norm",
    "head": "head.fc",
}

TOKENS = {"pos_embed": "backbone.stem.position.table"}

SHARED = {
    "norm1": "block.norm1",
    "attn.qkv": "block.mixer.qkv",
    "attn.proj": "block.mixer.proj",
    "norm2": "block.norm2",
    "mlp.fc1": "block.mlp.fc1",
    "mlp.fc2": "block.mlp.fc2",
    "coefficient1": "block.mixer_residual.skip",
    "coefficient2": "block.mixer_residual.branch",
    "coefficient3": "block.mlp_residual.skip",
    "coefficient4": "block.mlp_residual.branch",
}

AFTER = {
    "norm1": "norm",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "coefficient1": "residual.skip",
    "coefficient2": "residual.branch",
}


def recognises(keys: Collection[str]) -> bool:
    return "transformers.0.blocks.0.coefficient1.bias" in keys


def names(keys: Collection[str], blocks: list[list[str]]) -> dict[str, str]:
    net, inside = dict(NET), {}
    for s, stage in enumerate(blocks):
        numbers = [int(found[1]) for key in keys if (found := re.match(rf"transformers\.{s}\.blocks\.(\d+)\.", key))]
        runs = (max(numbers, default=0) + 1) // (2 * len(stage))
        for r, prefix in enumerate(stage):
            for run in range(runs):
                i = 2 * (r * runs + run)
                inside[f"transformers.{s}.blocks.{i}"] = (prefix, SHARED)
                inside[f"transformers.{s}.blocks.{i + 1}"] = (f"{prefix}.after.{run}", AFTER)
        ours, _, first = stage[0].partition(".blocks.")
        net[f"pools.{s - 1}.conv"] = f"{ours}.{'entry' if first == '0' else 'blocks.0'}.conv"
    named = map_keys(keys, TOKENS, net, inside)
    return {key: ours.removesuffix(".bias") if ".coefficient" in key else ours for key, ours in named.items()}


def layout(key: str, tensor: Tensor) -> Tensor:
    return tensor.flatten(2).transpose(1, 2) if key == "pos_embed" else tensor
