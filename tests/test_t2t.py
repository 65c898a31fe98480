"""T2T-ViT: its stem, its token mixers and its nets against the authors' code, in float64."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from blocks.attention import Attention
from blocks.base import Block, Shape, tokens
from blocks.gates import NoGate, SigmoidGate
from blocks.heads import ClassTokenHead
from blocks.mlp import Mlp
from blocks.positions import SinusoidPosition
from blocks.t2t import (
    PerformerToken,
    TokensToTokenStem,
    TransformerToken,
)
from blocks.transformer import Encoder
from framework.backbones import Isotropic
from framework.data.base import Image
from framework.weights import convert
from tests.vectors import FOLDER, Net, assert_near, joined, load, shapes

MIXERS: dict[str, type[Block]] = {"performer": PerformerToken, "transformer": TransformerToken}


def t2t(
    img_size: int = 224,
    num_classes: int = 1000,
    embed_dim: int = 384,
    depth: int = 14,
    num_heads: int = 6,
    mlp_ratio: float = 3.0,
    token_dim: int = 64,
    tokens_type: str = "performer",
    se: bool = False,
) -> Net:
    """T2T-ViT, with the official names of arguments."""
    mixer = partial(Attention, heads=num_heads, gate=SigmoidGate if se else NoGate)
    encoder = partial(Encoder, mixer=mixer, mlp=partial(Mlp, ratio=mlp_ratio))
    stem = partial(TokensToTokenStem, token_dim=token_dim, mixer=MIXERS[tokens_type])
    backbone = Isotropic(Image(img_size, 3), {"enc": encoder}, f"enc*{depth}", embed_dim, stem, SinusoidPosition())
    return Net(backbone, ClassTokenHead, num_classes)


def outputs(*modules: nn.Module) -> list[Any]:
    """Filled with what these give when the net runs."""
    found: list[Any] = []
    for module in modules:
        module.register_forward_hook(lambda module, args, out: found.append(out))
    return found


@pytest.mark.parametrize("name", ["t2t_performer", "t2t_transformer", "t2t_se14style"])
def test_equals_the_authors(name: str) -> None:
    vector = load(name)
    net = t2t(**vector.args, se=name == "t2t_se14style").imported(vector.state)
    stem: Any = net.backbone.stem
    split, mixed, projected = outputs(stem.splits[0]), outputs(*stem.mixers), outputs(stem.proj)
    blocks = outputs(*(block for _, _, block in net.backbone.steps()))
    assert_near(net(vector["input"]), vector["logits"], "logits")
    if "mid.soft_split0_raw" in vector.tensors:
        assert_near(split[0].map.flatten(2), vector["mid.soft_split0_raw"], "split")
    for i, out in enumerate(mixed):
        assert_near(tokens(out.map), vector[f"mid.attention{i + 1}"], f"attention {i + 1}")
    assert_near(projected[0], vector["mid.tokens"], "tokens")
    assert len(blocks) == vector.args["depth"]
    for i, out in enumerate(blocks):
        assert_near(joined(out), vector[f"mid.block{i}"], f"block {i}")
    assert_near(joined(net.backbone(vector["input"])), vector["mid.norm"], "norm")
    net.backbone.keep(net.head.reads)
    assert_near(net(vector["input"]), vector["logits"], "logits, unread work skipped")


@pytest.mark.parametrize("name", ["t2t_performer", "t2t_se14style"])
def test_sinusoids_are_the_authors(name: str) -> None:
    want = load(name)["x.sinusoid_table"]
    table = SinusoidPosition().tokens(Shape(want.shape[2], (4, 4), 1)).state_dict()["table"]
    torch.testing.assert_close(table.double(), want, rtol=0, atol=1e-7)


FULL: dict[str, dict[str, Any]] = {
    "t2t_vit_14": {},
    "t2t_vit_t_14": {"tokens_type": "transformer"},
    "t2t_vit_14_se": {"se": True},
}


@pytest.mark.parametrize("name", FULL)
def test_every_official_key_has_its_place(name: str) -> None:
    official = json.loads((FOLDER / f"keys_{name}.json").read_text())
    with torch.device("meta"):
        net = t2t(**FULL[name])
        state = {key: torch.empty(shape) for key, shape in official["shapes"].items()}
    converted = convert(state, shapes(net))
    assert {key: value.shape for key, value in converted.items()} == shapes(net)
    frozen = sum(state[key].numel() for key in official["frozen"])
    assert sum(p.numel() for p in net.parameters()) == official["param_count"] - frozen
    assert sum(b.numel() for b in net.buffers()) == frozen
