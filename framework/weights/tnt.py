"""TNT: huawei-noah/Efficient-AI-Backbones tnt_pytorch/tnt.py, and timm's models/tnt.py in both of its forms.

Queries and keys of the originals share a Linear and values have their own; ours has one for all three. The
originals' `outer_tokens` are zeros that no forward reads. Their layers without an inner part (TNT-S-1 to -4) are an
ordinary `Encoder` here.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import chain

from torch import Tensor

from framework.weights.keys import DROP, map_keys

NAME = "TNT"

_STEM = {"proj_norm1": "norm1_proj", "proj": "proj", "proj_norm2": "norm2_proj"}
_TIMM_STEM = {"norm1_proj": "norm1_proj", "proj": "proj", "norm2_proj": "norm2_proj"}

NET = {
    "norm": "backbone.norm",
    "head": "head.fc",
    "patch_embed.proj": "backbone.stem.conv",
    "pixel_embed.proj": "backbone.stem.conv",
    **{theirs: f"backbone.stem.{ours}" for theirs, ours in {**_STEM, **_TIMM_STEM}.items()},
}

TOKENS = {
    "cls_token": "backbone.stem.prefix",
    "outer_pos": "backbone.stem.position.table",
    "patch_pos": "backbone.stem.position.table",
    "inner_pos": "backbone.stem.word_position.table",
    "pixel_pos": "backbone.stem.word_position.table",
    "outer_tokens": DROP,
}


def _encoder(norm1: str, attention: str, norm2: str, mlp: str) -> dict[str, str]:
    return {
        norm1: "norm1",
        f"{attention}.qk": "mixer.qkv#0",
        f"{attention}.v": "mixer.qkv#1",
        f"{attention}.proj": "mixer.proj",
        norm2: "norm2",
        f"{mlp}.fc1": "mlp.fc1",
        f"{mlp}.fc2": "mlp.fc2",
    }


OUTER = {
    **_encoder("outer_norm1", "outer_attn", "outer_norm2", "outer_mlp"),
    **_encoder("norm_out", "attn_out", "norm_mlp", "mlp"),
    "se_layer.fc.0": "mlp_residual.gate.norm",
    "se_layer.fc.1": "mlp_residual.gate.fc1",
    "se_layer.fc.3": "mlp_residual.gate.fc2",
}
INNER = {
    **_encoder("inner_norm1", "inner_attn", "inner_norm2", "inner_mlp"),
    **_encoder("norm_in", "attn_in", "norm_mlp_in", "mlp_in"),
}
BLOCK = {
    **{theirs: f"inner.{ours}" for theirs, ours in INNER.items()},
    **{theirs: f"outer.{ours}" for theirs, ours in OUTER.items()},
    **_STEM,
    **_TIMM_STEM,
}


def recognises(keys: Collection[str]) -> bool:
    return any(re.match(r"blocks\.0\.(outer_attn|attn_out)\.qk\.", key) for key in keys)


def names(keys: Collection[str], blocks: list[list[str]]) -> dict[str, str]:
    with_words = {key.rsplit(".", 3)[0] for key in keys if re.search(r"\.(inner_attn|attn_in)\.qk\.weight$", key)}
    theirs = [(f"blocks.{i}", prefix) for i, prefix in enumerate(chain(*blocks))]
    return map_keys(
        keys, TOKENS, NET, {name: (prefix, BLOCK if name in with_words else OUTER) for name, prefix in theirs}
    )


def layout(key: str, tensor: Tensor) -> Tensor:
    # timm keeps the word positions as a map (1, c, √m, √m)
    return tensor.flatten(2).transpose(1, 2) if key == "pixel_pos" else tensor
