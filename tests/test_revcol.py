"""RevCol and ConvNeXt: the authors' numbers, and what reversible columns must have in common with plain ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor
from torch.nn import functional as F

from blocks.base import BlockFactory, BuildError, Features, Site
from blocks.convnext import ConvNeXt
from blocks.heads import AveragePoolHead
from blocks.mlp import Mlp
from blocks.norms import NoNorm
from blocks.residual import Residual
from blocks.revcol import QuarterHead
from blocks.stems import PatchStem
from blocks.structure import ConvEmbed
from framework.backbones import Pyramid, Stage
from framework.columns import Columns
from framework.config import compose
from framework.data.base import Image
from framework.errors import ConfigError
from framework.objectives import (
    CrossEntropy,
    HardDistillation,
    IntermediateCrossEntropy,
    Reconstruction,
    Step,
    TimmTeacher,
)
from framework.run import train
from framework.tasks import Classification
from framework.weights import convert
from tests.conftest import EXPERIMENTS
from tests.contract import randomise
from tests.vectors import CNX, FUSION, NORM, STEM, Net, Vector, assert_near, load, shapes


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
        backbone,
        Image(32),
        args["num_classes"],
        partial(QuarterHead, norm=NORM),
        objectives={"reconstruction": decoder},
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
        found = supervised(task, vector["input"])[1]
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


def convnext(dims: list[int], depths: list[int], num_classes: int) -> Net:
    stages = pyramid_of(dims, depths)
    for stage in list(stages.values())[1:]:
        stage.entry = "embed"
    blocks: dict[str, BlockFactory] = {"cnx": CNX, "embed": partial(ConvEmbed, before=NORM, norm=NoNorm)}
    backbone = Pyramid(Image(64), stages, blocks, STEM, norm=NoNorm)
    return Net(backbone, partial(AveragePoolHead, norm=NORM), num_classes)


def test_convnext_equals_timm() -> None:
    vector = load("convnext_64")
    net = convnext(vector.args["dims"], vector.args["depths"], 10).imported(vector.state)
    assert_near(net(vector["input"]), vector["logits"], "logits")
    chain = net.backbone.chain()
    map = chain[0](Features(vector["input"]))
    assert_near(map.map, vector["out.stem"], "stem")
    assert_near(chain[1](map).map, vector["out.stages.0.blocks.0"], "block")
    for i, level in enumerate(net.backbone.pyramid(vector["input"])):
        assert_near(level, vector[f"out.stages.{i}"], f"stage {i}")


def test_every_key_of_timm_s_convnext_has_its_place() -> None:
    with torch.device("meta"):
        theirs, ours = TimmConvNeXt(), convnext([96, 192, 384, 768], [3, 3, 9, 3], 1000)
    assert convert(theirs.state_dict(), shapes(ours)).keys() == shapes(ours).keys()


def test_its_block_equals_timm_s() -> None:
    torch.manual_seed(0)
    theirs, ours = ConvNeXtBlock(16).double(), CNX(Site.at(16, (6, 4))).double()
    randomise(theirs)
    names = {"conv_dw": "conv", "gamma": "residual.layer_scale"}
    state = {names.get(key.split(".")[0], key.split(".")[0]) + key[len(key.split(".")[0]) :]: value
             for key, value in theirs.state_dict().items()}  # fmt: skip
    ours.load_state_dict(state)
    map = torch.randn(2, 16, 6, 4, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    assert_near(ours(Features(map)).map, theirs(map))


# ---- supervision of earlier columns

LITTLE: dict[str, Any] = {
    "stages": {"s1": Stage(32, "cnx"), "s2": Stage(64, "cnx", 2)},
    "blocks": {"cnx": partial(ConvNeXt, kernel=3, residual=partial(Residual, layer_scale=0.5))},
    "stem": partial(PatchStem, patch=2, prefix=0),
}


def test_its_loss_is_the_authors() -> None:
    terms = [CrossEntropy(), IntermediateCrossEntropy(), Reconstruction()]
    task = Classification(
        partial(Columns, **LITTLE), Image(16), 5, QuarterHead, objectives={str(i): term for i, term in enumerate(terms)}
    )
    torch.manual_seed(1)
    given, targets = torch.randn(2, 3, 16, 16), torch.tensor([1, 4])
    task.objectives["2"].mean.fill_(0.4)
    task.objectives["2"].std.fill_(0.2)
    step = task._step(given, targets)
    assert len(step.each) == 4
    assert step.logits is step.each[3]
    assert step.class_logits is step.logits
    assert step.distillation_logits is None
    decoded = task.objectives["2"].images(step)
    want = F.cross_entropy(step.each[3], targets)
    pixels = (given * 0.2 + 0.4).clamp(0.01, 0.99)
    for i in range(3):
        want = want + 3.0 * (1 - i / 3) * F.binary_cross_entropy_with_logits(decoded[i], pixels)
        want = want + 0.7 * ((i + 1) / 4) * F.cross_entropy(step.each[i], targets)
    torch.testing.assert_close(sum(term.weight * term(step) for term in terms), want)
    want.backward()
    assert all(parameter.grad is not None for parameter in task.parameters())


@pytest.mark.parametrize(
    ("head", "term", "count", "message"),
    [
        (QuarterHead, CrossEntropy(), 6, r"^model\.head: QuarterHead reads maps behind each quarter"),
        (AveragePoolHead, Reconstruction(), 2, r"^model\.objectives: Reconstruction reads maps behind each quarter"),
        (AveragePoolHead, IntermediateCrossEntropy(), 4, r"IntermediateCrossEntropy teaches .* set head: QuarterHead"),
        (QuarterHead, HardDistillation(TimmTeacher("resnet18", "")), 4, r"HardDistillation teaches the distillation"),
    ],
)
def test_supervision_needs_its_parts(head: Any, term: Any, count: int, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        Classification(partial(Columns, **LITTLE, columns=count), Image(16), 5, head, objectives={"term": term})


def test_it_is_trained_on_pixels_before_normalisation(tmp_path: Path) -> None:
    terms = {"labels": "CrossEntropy", "earlier": "IntermediateCrossEntropy", "pixels": "Reconstruction"}
    chosen = {"model.head": "QuarterHead", "model.objectives": terms, "trainer.fast_dev_run": True}
    trainer = train(tmp_path, compose([EXPERIMENTS / "base/revcol_digits.yaml"], chosen), bar=False)
    logged, task = trainer.callback_metrics, trainer.lightning_module
    factors = [logged[f"weight/{name}"] for name in terms]
    assert factors == [1.0, pytest.approx(0.7), 3.0]
    values = [float(logged[f"train/{name}"] * factor) for name, factor in zip(terms, factors, strict=True)]
    assert float(logged["train/loss"]) == pytest.approx(sum(values), rel=1e-4)
    data = trainer.datamodule.split("train")  # type: ignore[attr-defined]
    assert torch.equal(task.objectives["pixels"].mean.flatten(), data.mean)  # type: ignore[union-attr, index]
    assert torch.equal(task.objectives["pixels"].std.flatten(), data.std)  # type: ignore[union-attr, index]
    assert data.mean.item() > 0
    assert not [key for key in task.state_dict() if key.endswith((".mean", ".std"))]


def test_weights_without_supervision_s_parts() -> None:
    """What serves training alone is left out of a net that has no place for it."""
    vector = load("revcol_4col_supv_32")
    args = vector.args
    backbone = Columns(
        Image(32), pyramid_of(args["channels"], args["layers"]), {"cnx": partial(CNX, kernel=3)}, 4, STEM, FUSION
    )
    net = Net(backbone, partial(AveragePoolHead, norm=NORM), 10).imported(vector.state)
    assert_near(net(vector["input"]), vector["logits"])
    del vector.state["subnet2.alpha1"]
    with pytest.raises(ConfigError, match=r"missing: backbone\.columns\.2\.stages\.s2\.alpha$"):
        convert(vector.state, shapes(net))
