"""Whole nets against the authors' code and timm, in float64, with their weights through the importers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.nextvit import NextViT
from timm.models.tnt import TNT as TimmTNT
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from blocks.base import Features, tokens
from blocks.nextvit import NTB
from framework.backbones import Stage
from framework.weights import convert
from tests.contract import randomise
from tests.vectors import FOLDER, Net, assert_near, joined, load, nextvit, nextvit_stages, shapes, tnt, vit


def outputs(net: Net) -> list[Features]:
    """Filled with what each block gives when the net runs."""
    found: list[Features] = []
    for _, _, block in net.backbone.steps():
        block.register_forward_hook(lambda module, args, out: found.append(out))
    return found


def inputs(module: nn.Module) -> list[Tensor]:
    """Filled with the first argument of a module when the net runs."""
    found: list[Tensor] = []
    module.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    return found


@pytest.mark.parametrize("name", ["tnt_m16_basic", "tnt_m16_se", "tnt_m4"])
def test_tnt_equals_the_authors(name: str) -> None:
    vector = load(name)
    args = vector.args
    net = tnt(
        args["img_size"], args["patch_size"], args["num_classes"], args["outer_dim"], args["inner_dim"],
        args["depth"], args["inner_num_heads"], args["outer_num_heads"], args["inner_stride"], se=bool(args["se"]),
    ).imported(vector.state)  # fmt: skip
    blocks = outputs(net)
    words, sentences = inputs(net.backbone.stem.word_position), inputs(net.backbone.stem.position)
    assert_near(net(vector["input"]), vector["logits"], "logits")
    assert_near(tokens(words[0]), vector["mid.patch_embed_words_before_pos"], "words")
    assert_near(tokens(sentences[0]), vector["mid.sentences_before_cls_and_pos"], "sentences")
    assert len(blocks) == args["depth"]
    for i, out in enumerate(blocks):
        assert out.words is not None
        assert_near(out.words, vector[f"mid.block{i}.0"], f"words of block {i}")
        assert_near(joined(out), vector[f"mid.block{i}.1"], f"tokens of block {i}")
    assert_near(joined(net.backbone(vector["input"])), vector["mid.norm"], "norm")
    net.backbone.keep(net.head.reads)
    assert_near(net(vector["input"]), vector["logits"], "logits, unread work skipped")


@pytest.mark.parametrize("name", ["tnt_timm_final", "tnt_timm_legacy"])
def test_tnt_equals_timm_s_vectors(name: str) -> None:
    vector = load(name)
    assert_near(tnt(**vector.args).imported(vector.state)(vector["input"]), vector["logits"])


@pytest.mark.parametrize("name", ["deit_plain", "deit_distilled"])
def test_deit_equals_the_authors(name: str) -> None:
    vector = load(name)
    given = ("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads")
    distilled = name == "deit_distilled"
    net = vit(**{key: vector.args[key] for key in given}, distilled=distilled).imported(vector.state)
    blocks, patches = outputs(net), inputs(net.backbone.stem.position)
    assert_near(net(vector["input"]), vector["logits"], "logits")
    assert_near(tokens(patches[0]), vector["mid.patch_embed"], "patches")
    for i, out in enumerate(blocks):
        assert_near(joined(out), vector[f"mid.block{i}"], f"block {i}")
    final = net.backbone(vector["input"])
    assert_near(joined(final), vector["mid.norm"], "norm")
    if distilled:
        assert final.prefix is not None
        assert_near(net.head.fc(final.prefix[:, 0]), vector["mid.head"], "head")
        assert_near(net.head.fc_dist(final.prefix[:, 1]), vector["mid.head_dist"], "head_dist")
    net.backbone.keep(net.head.reads)
    assert_near(net(vector["input"]), vector["logits"], "logits, unread work skipped")


@pytest.mark.parametrize("name", ["nextvit_S_like_r075_64", "nextvit_r025_hd32"])
def test_next_vit_equals_the_authors(name: str) -> None:
    vector = load(name)
    stages: dict[str, Stage] = {}
    for block in vector.args["blocks"]:
        if block["stride"] == 2 or not stages:
            stages[f"s{len(stages) + 1}"] = Stage(block["out"], "", stride=block["stride"])
        stage = stages[f"s{len(stages)}"]
        kind = block["type"].lower()
        stage.pattern += f" {kind}"
        stage.dims[kind] = block["out"]
        if kind == "ntb":
            stage.blocks["ntb"] = partial(NTB, sr_ratio=block["sr"], shrink=vector.args["mix_block_ratio"])
    stem = vector.args["stem"]
    net = nextvit(stages, vector.args["num_classes"], 64, (*stem, stem[-1])).imported(vector.state)
    blocks, first = outputs(net), inputs(next(net.backbone.steps())[2])
    assert_near(net(vector["input"]), vector["logits"], "logits")
    assert_near(first[0].map, vector["mid.stem"], "stem")
    assert len(blocks) == len(vector.args["blocks"])
    for i, out in enumerate(blocks):
        assert_near(out.map, vector[f"mid.features.{i}"], f"block {i}")
    assert_near(net.backbone(vector["input"]).map, vector["mid.final_norm"], "norm")


# ---- timm with its own weights

TNT_ARGS: dict[str, Any] = {
    "img_size": 48, "num_classes": 7, "embed_dim": 32, "inner_dim": 12, "depth": 3, "num_heads_inner": 3,
    "num_heads_outer": 4, "first_stride": 6,
}  # fmt: skip
LEGACY_ARGS: dict[str, Any] = {**TNT_ARGS, "first_stride": 8, "legacy": True}
VIT_ARGS: dict[str, Any] = {"img_size": 48, "num_classes": 7, "embed_dim": 32, "depth": 3, "num_heads": 4}
DEPTHS = (1, 2, 5, 2)

TWINS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Net], int]] = {
    "tnt": (lambda: TimmTNT(**TNT_ARGS), lambda: tnt(**TNT_ARGS), 48),
    "tnt_legacy": (lambda: TimmTNT(**LEGACY_ARGS), lambda: tnt(**LEGACY_ARGS), 48),
    "vit": (lambda: VisionTransformer(**VIT_ARGS), lambda: vit(**VIT_ARGS), 48),
    "deit_distilled": (lambda: VisionTransformerDistilled(**VIT_ARGS), lambda: vit(**VIT_ARGS, distilled=True), 48),
    "nextvit": (
        lambda: NextViT(3, num_classes=7, depths=DEPTHS),
        lambda: nextvit(nextvit_stages(*DEPTHS), num_classes=7, img_size=72),
        72,
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_equals_timm(name: str) -> None:
    theirs_factory, ours_factory, size = TWINS[name]
    torch.manual_seed(0)
    theirs = theirs_factory()
    randomise(theirs)
    ours = ours_factory().imported(theirs.state_dict())
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    want = theirs.double().eval()(images)
    assert want.std() > 0.01  # nothing is proved by logits that are all alike
    assert_near(ours(images), want)


# ---- full-size nets, without numbers

FULL: dict[str, Callable[[], Net]] = {
    "tnt_s": tnt,
    "tnt_s_se": lambda: tnt(se=True),
    "tnt_s_legacy": lambda: tnt(legacy=True),
    "deit_small_distilled": lambda: vit(distilled=True),
    "nextvit_small": lambda: nextvit(nextvit_stages(3, 4, 10, 3)),
}


@pytest.mark.parametrize("name", ["tnt_s", "tnt_s_se", "deit_small_distilled", "nextvit_small"])
def test_every_official_key_has_its_place(name: str) -> None:
    official = json.loads((FOLDER / f"keys_{name}.json").read_text())
    with torch.device("meta"):
        net = FULL[name]()
        state = {key: torch.empty(shape) for key, shape in official["shapes"].items()}
    converted = convert(state, shapes(net))
    assert {key: value.shape for key, value in converted.items()} == shapes(net)
    frozen = sum(state[key].numel() for key in official["frozen"])
    assert sum(p.numel() for p in net.parameters()) == official["param_count"] - frozen


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("tnt_s_patch16_224", "tnt_s"),
        ("tnt_s_legacy_patch16_224", "tnt_s_legacy"),
        ("deit_small_distilled_patch16_224", "deit_small_distilled"),
        ("nextvit_small", "nextvit_small"),
    ],
)
def test_every_key_of_timm_has_its_place(name: str, ours: str) -> None:
    with torch.device("meta"):
        net, theirs = FULL[ours](), timm.create_model(name)
    assert convert(theirs.state_dict(), shapes(net)).keys() == shapes(net).keys()
