"""Published checkpoints into our models: `convert(read(path), target)`, one importer a family.

An importer maps every key by its name. What it does not know, what is missing and what has another shape is an error;
nothing is left out but tensors that no forward reads.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from framework.errors import ConfigError
from framework.weights import cct, convnext, cvt, nextvit, pvt, revcol, sret, t2t, tnt, vit
from framework.weights.keys import Family, assemble, block_prefixes

FAMILIES: list[Family] = [tnt, vit, nextvit, pvt, cvt, cct, t2t, sret, convnext, revcol]

# What the families call their classifiers.
HEAD = re.compile(r"(head|head_dist|proj_head|classifier\.fc|classifier\.attention_pool|cls|cls_blocks)\.")


def has_head(state: Mapping[str, Tensor]) -> bool:
    """Whether published weights hold a classifier; those of self-supervised backbones do not."""
    return any(HEAD.match(key) for key in state)


def convert(
    state: Mapping[str, Tensor], target: Mapping[str, torch.Size], head: bool = True, shapes: bool = True
) -> dict[str, Tensor]:
    """A published state dict, official or timm's, under the keys of one of our models.

    Args:
        state: the published weights.
        target: keys and shapes of our model, in the order of its state dict. Of those that are neither under
            `backbone.` nor `head.`, terms of the loss, only published ones count.
        head: False leaves out the classifier on both sides, for another number of classes.
        shapes: False lets tensors of another shape through, for one who resizes them.

    Raises:
        ConfigError: no family has such keys, or the weights do not fit the model; names the keys.
    """
    fitting = [family for family in FAMILIES if family.recognises(state)]
    if len(fitting) != 1:
        shown = ", ".join(list(state)[:4])
        raise ConfigError(
            f"no importer knows weights with the keys {shown}, …; families: {', '.join(f.NAME for f in FAMILIES)}"
        )
    if not head:
        names = fitting[0].names(state, block_prefixes(target))
        state = {key: value for key, value in state.items() if not names.get(key, "").startswith("head.")}
        target = {key: shape for key, shape in target.items() if not key.startswith("head.")}
    return assemble(fitting[0], state, target, shapes)


def read(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a published file (.safetensors, or what `torch.save` wrote), without its wrappings.

    Raises:
        ConfigError: there is no such file, it cannot be read, or no state dict is in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no such weights file: {path}")
    found: Any
    try:
        if path.suffix == ".safetensors":
            found = load_file(path)
        else:
            # facebookresearch/deit and its kin save the arguments of the run beside the weights
            with torch.serialization.safe_globals([argparse.Namespace]):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may fail in any way
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"cannot read weights from {path}: {type(error).__name__}: {reason}") from error
    # timm's script saves averaged weights beside the others, and its evaluation, as T2T-ViT's, reads them
    for wrapping in ("model", "state_dict_ema", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(wrapping), dict):
            found = found[wrapping]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"{path} holds no state dict (a mapping from names to tensors)")
    return {key.removeprefix("module."): value for key, value in found.items()}
