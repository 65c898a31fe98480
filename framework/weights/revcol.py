"""RevCol: megvii-research/RevCol models/revcol.py, with or without intermediate supervision.

The classifiers and decoders of earlier columns go to `QuarterHead` and to a `Reconstruction` that is called
`reconstruction`, and are left out where a model has none. Their 1×1 convolutions are Linear layers here.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import count

from torch import Tensor

from blocks.revcol import QUARTERS
from framework.weights.keys import map_keys

NAME = "RevCol"

BLOCK = {
    "dwconv": "conv",
    "norm": "norm",
    "pwconv1": "mlp.fc1",
    "pwconv2": "mlp.fc2",
    "gamma": "residual.layer_scale",
}

FUSION = {
    "down.0": "down.conv",
    "down.1": "down.norm",
    "up.channel_reschedule.0": "proj",
    "up.channel_reschedule.1": "norm",
}

TRAINING = ("objectives.", "head.intermediate.")


def recognises(keys: Collection[str]) -> bool:
    return "subnet0.alpha0" in keys


def names(keys: Collection[str], blocks: list[list[str]]) -> dict[str, str]:
    levels = next(i for i in count() if f"subnet0.alpha{i}" not in keys)
    tokens: dict[str, str] = {}
    modules = {"stem.0": "backbone.stem.conv", "stem.1": "backbone.stem.norm"}
    inside: dict[str, tuple[str, dict[str, str]]] = {}
    for number, stage in enumerate(blocks):
        column, level = divmod(number, levels)
        prefix = stage[0].rpartition(".blocks.")[0]
        tokens[f"subnet{column}.alpha{level}"] = f"{prefix}.alpha"
        theirs = f"subnet{column}.level{level}"
        modules |= {f"{theirs}.fusion.{name}": f"{prefix}.fusion.{ours}" for name, ours in FUSION.items()}
        inside |= {f"{theirs}.blocks.{i}": (ours, BLOCK) for i, ours in enumerate(stage)}
    heads = {"cls": "head", **{f"cls_blocks.{i}": f"head.intermediate.{i}" for i in range(len(QUARTERS))}}
    heads[f"cls_blocks.{len(QUARTERS)}"] = "head"
    for name, ours in heads.items():
        modules |= {f"{name}.classifier.0": f"{ours}.norm", f"{name}.classifier.1": f"{ours}.fc"}
    for i in range(len(QUARTERS)):
        theirs, decoder = f"decoder_blocks.{i}", f"objectives.reconstruction.decoders.{i}"
        modules[f"{theirs}.projback.0"] = f"{decoder}.back"
        for step in range(levels - 1):
            ours = f"{decoder}.steps.{step}"
            modules |= {f"{theirs}.proj_layers.{step}.{n}": f"{ours}.{name}" for n, name in enumerate(("proj", "norm"))}
            block = f"{theirs}.normal_layers.{step}.0"
            modules |= {f"{block}.{name}": f"{ours}.block.{own}" for name, own in BLOCK.items()}
    found = map_keys(keys, tokens, modules, inside)
    return {key: f"{ours}?" if ours.startswith(TRAINING) else ours for key, ours in found.items()}


def layout(key: str, tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.shape[2:] == (1, 1) and key.endswith("weight") else tensor
