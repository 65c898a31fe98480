"""RevCol and ConvNeXt: the authors' numbers, and what reversible columns must have in common with plain ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from blocks.base import BlockFactory, BuildError, Features, Site
from blocks.convnext import ConvNeXt
from blocks.heads import AveragePoolHead
from blocks.mlp import Mlp
from blocks.norms import LayerNorm, NoNorm
from blocks.residual import Residual
from blocks.revcol import QUARTERS, Fusion, QuarterHead
from blocks.stems import PatchStem
from blocks.structure import ConvEmbed
from framework.backbones import Pyramid, Stage
from framework.columns import Columns
from framework.data.base import Image
from framework.objectives import Reconstruction, Step
from framework.tasks import Classification
from framework.weights import convert
from tests.contract import randomise
from tests.vectors import Net, Vector, assert_near, load, shapes

NORM = partial(LayerNorm, eps=1e-6)
CNX = partial(ConvNeXt, norm=NORM, residual=partial(Residual, layer_scale=1e-6))
STEM = partial(PatchStem, patch=4, prefix=0, norm=NORM)
FUSION = partial(Fusion, down=partial(ConvEmbed, norm=NORM), norm=NORM)


def pyramid_of(dims: list[int], depths: list[int]) -> dict[str, Stage]:
    return {
        f"s{i}": Stage(dim, f"cnx*{depth}", 1 if i == 1 else 2)
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True), 1)
    }


# ---- the authors' numbers


def revcol(vector: Vector, **more: Any) -> Classification:
    """The supervised net of a vector, with its weights, in float64."""
    args = vector.args
    backbone = partial(
        Columns, stages=pyramid_of(args["channels"], args["layers"]), columns=args["num_subnet"], stem=STEM,
        blocks={"cnx": partial(CNX, kernel=args["kernel_size"])}, fusion=FUSION, **more,
    )  # fmt: skip
    decoder = Reconstruction(partial(CNX, kernel=3, mlp=partial(Mlp, ratio=1.0)), NORM)
    task = Classification(
        backbone, Image(32), args["num_classes"], partial(QuarterHead, norm=NORM), objectives={"reconstruction": decoder}
    )
    task.load_state_dict(convert(vector.state, shapes(task)), strict=False)
    return task.double()


def supervised(task: Classification, images: Tensor) -> tuple[Features, list[Tensor]]:
    """Features, four logits and three images."""
    features = task.backbone(images)
    each = task.head.each(features)
    step = Step(images, images, features, each[-1], each[-1], each=each)
    return features, [*each, *task.terms["reconstruction"].images(step)]  # type: ignore[attr-defined]


def test_revcol_equals_the_authors() -> None:
    vector = load("revcol_4col_supv_32")
    task = revcol(vector).eval()
    columns = task.backbone.columns
    seen: dict[str, Any] = {}
    for number, column in enumerate(columns):
        column.register_forward_hook(lambda m, args, out, n=number: seen.__setitem__(f"subnet{n}", out))
    parts = {"fusion": columns[1].stages.s1.fusion, "blocks.0": columns[1].stages.s1.blocks[0]}
    for name, part in {**parts, "last": columns[1].stages.s4.fusion}.items():
        part.register_forward_hook(lambda m, args, out, n=name: seen.__setitem__(n, out))
    with torch.no_grad():
        features, found = supervised(task, vector["input"])
    assert_near(task.backbone.stem(Features(vector["input"])).map, vector["out.stem"], "stem")
    for number in range(4):
        for i, map in enumerate(seen[f"subnet{number}"]):
            assert_near(map, vector[f"out.subnet{number}.{i}"], f"column {number}, level {i}")
    assert_near(seen["fusion"], vector["out.subnet1.level0.fusion"], "fusion")
    assert_near(seen["last"], vector["out.subnet1.level3.fusion"], "fusion of the last level")
    assert_near(seen["blocks.0"].map, vector["out.subnet1.level0.blocks.0"], "block")
    names = [*(f"cls.{i}" for i in range(4)), *(f"img.{i}" for i in range(3))]
    for name, value in zip(names, found, strict=True):
        assert_near(value, vector[name], name)
    assert_near(task(vector["input"]), vector["logits"], "the last classifier is evaluated")


OURS = {
    "stem.0.weight": "stem.conv.weight",
    "subnet0.alpha0": "columns.0.stages.s1.alpha",
    "subnet1.alpha0": "columns.1.stages.s1.alpha",
    "subnet1.alpha3": "columns.1.stages.s4.alpha",
    "subnet0.level0.blocks.0.gamma": "columns.0.stages.s1.blocks.0.residual.layer_scale",
    "subnet1.level0.fusion.up.channel_reschedule.0.weight": "columns.1.stages.s1.fusion.proj.weight",
    "subnet1.level3.blocks.0.dwconv.weight": "columns.1.stages.s4.blocks.0.conv.weight",
}


@pytest.mark.parametrize("reversible", [True, False])
def test_its_gradients_are_the_authors(reversible: bool) -> None:
    vector = load("revcol_4col_supv_32")
    task = revcol(vector, reversible=reversible).train()
    images = vector["input"].clone().requires_grad_()
    found = supervised(task, images)[1]
    sum((out * vector[f"weights.{i}"]).sum() for i, out in enumerate(found)).backward()  # type: ignore[union-attr]
    assert images.grad is not None
    assert_near(images.grad, vector["grad.input"], "images")
    grads = {name: parameter.grad for name, parameter in task.backbone.named_parameters()}
    wanted = {key for key in vector.tensors if key.startswith("grad.")} - {"grad.input"}
    assert {f"grad.{theirs}" for theirs in OURS} == wanted
    for theirs, ours in OURS.items():
        assert_near(grads[ours], vector[f"grad.{theirs}"], theirs)
