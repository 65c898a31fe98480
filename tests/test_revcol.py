"""RevCol and ConvNeXt: the authors' numbers, and what reversible columns must have in common with plain ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.convnext import ConvNeXt as TimmConvNeXt
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F

from blocks.attention import Attention
from blocks.base import BlockFactory, BuildError, Features, Site
from blocks.convnext import ConvNeXt
from blocks.heads import AveragePoolHead
from blocks.mlp import GELU, Mlp
from blocks.nextvit import NCB
from blocks.norms import LayerNorm, NoNorm
from blocks.residual import Residual
from blocks.revcol import QUARTERS, Fusion, QuarterHead
from blocks.stems import PatchStem
from blocks.structure import ClassToken, ConvEmbed, Identity, MakeWords
from blocks.tnt import TNT
from blocks.transformer import Encoder
from framework.backbones import Pyramid, Stage
from framework.bench.memory import saved_bytes
from framework.columns import ColumnLevel, Columns
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
from tests.contract import assert_channels_last, randomise
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


# ---- reversible columns

HEADS = partial(Encoder, mixer=partial(Attention, heads=4, attn_drop=0.1))
BLOCKS: dict[str, BlockFactory] = {
    "cnx": partial(ConvNeXt, kernel=3, residual=partial(Residual, layer_scale=0.5)),
    "ncb": partial(NCB, act=GELU),
    "enc": HEADS,
    "words": partial(MakeWords, words=1, word_dim=8),
    "tnt": partial(TNT, inner=partial(Encoder, mixer=partial(Attention, heads=2)), outer=HEADS),
}
LEVELS = {"s1": Stage(32, "cnx"), "s2": Stage(64, "ncb cnx", 2)}
MIXED = {"s1": Stage(32, "cnx ncb"), "s2": Stage(64, "enc cnx", 2), "s3": Stage(64, "words tnt cnx", 2)}


def columns(count: int = 4, reversible: bool = True, stages: dict[str, Stage] = LEVELS, **more: Any) -> Columns:
    torch.manual_seed(0)
    made = Columns(
        Image(16), stages, BLOCKS, count, partial(PatchStem, patch=2, prefix=0, norm=LayerNorm),
        reversible=reversible, **{"drop_path": 0.3, **more},
    )  # fmt: skip
    randomise(made)
    return made


def images(batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, 3, 16, 16, dtype=dtype)


def read(features: Features) -> Tensor:
    """A number that every entry of the final map and of those behind quarters has a share in."""
    torch.manual_seed(2)
    found = [features.map, *(features.extra or {}).values()]
    return sum(((map * torch.randn_like(map)).sum() for map in found), torch.zeros(()))


def grads(net: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def assert_same_gradients(one: nn.Module, other: nn.Module, tolerance: float = 1e-9) -> None:
    for (name, got), want in zip(grads(one).items(), grads(other).values(), strict=True):
        assert got is not None, name
        assert want is not None, name
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("count", [1, 2, 8])
def test_reversible_columns_are_plain_ones(count: int) -> None:
    """Random drops, batch norms' statistics and what is drawn afterwards included."""
    nets = [columns(count, reversible, MIXED).double().train() for reversible in (True, False)]
    after, given = [], []
    for net in nets:
        given.append(images().requires_grad_())
        out = net(given[-1])
        before = torch.get_rng_state()
        loss = read(out)
        loss.backward()
        read(out)
        after.append((out.map, loss, torch.rand(3)))
        assert before.shape
    for got, want in zip(*after, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert_near(given[0].grad, given[1].grad, "images")
    assert_same_gradients(*nets)
    for (name, got), want in zip(nets[0].named_buffers(), nets[1].buffers(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12, msg=name)
    counted = [value for name, value in nets[0].named_buffers() if name.endswith("num_batches_tracked")]
    assert counted
    assert all(value == 1 for value in counted)


def test_the_backward_pass_draws_nothing() -> None:
    net = columns().train()
    loss = read(net(images(dtype=torch.float32)))
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_maps_of_earlier_columns_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[StorageWeakRef] = []
    add = ColumnLevel.add

    def watched(*args: Any) -> Tensor:
        map = add(*args)
        seen.append(StorageWeakRef(map.untyped_storage()))
        return map

    monkeypatch.setattr(ColumnLevel, "add", watched)

    def alive(reversible: bool, count: int) -> tuple[list[bool], int]:
        seen.clear()
        net, out = columns(count, reversible, drop_path=0.0).train(), list[Features]()
        saved = saved_bytes(lambda: out.append(net(images(2, torch.float32))), net)
        assert len(seen) == 2 * count
        return [not ref.expired() for ref in seen[::2]], saved  # the second level's are read behind quarters

    kept, saved = alive(True, 4)
    assert kept == [False, False, False, True]
    assert alive(True, 8) == ([*[False] * 7, True], saved)
    kept, plain = alive(False, 4)
    assert all(kept)
    assert plain > 10 * saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_columns_back_lose_no_precision(dtype: torch.dtype) -> None:
    """Sums in float32 are off by more than a tenth of the gradients here."""
    nets = [columns(16, reversible, drop_path=0.0).train() for reversible in (True, False)]
    for net in nets:
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            out = net(images(2, torch.float32))
        read(out).backward()
    found = [torch.cat([grad.flatten() for grad in grads(net).values() if grad is not None]) for net in nets]
    assert (found[0] - found[1]).norm() < (1e-4 if dtype is torch.float32 else 0.05) * found[1].norm()


def test_it_may_run_backward_again_or_in_part() -> None:
    nets = [columns(4, reversible).double().train() for reversible in (True, False)]
    found = []
    for net in nets:
        torch.manual_seed(5)
        out = net(images())
        assert out.extra is not None
        last, first = read(Features(out.map)), read(Features(out.extra[QUARTERS[0]]))
        parts = []
        for loss, number in ((last, 2), (last, 0), (first, 0)):
            weights = list(net.columns[number].parameters())
            parts.append(torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True))
        (first + last).backward(retain_graph=True)
        first.backward()
        found.append(parts)
    for got, want in zip(*found, strict=True):
        for one, other in zip(got, want, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_near(one, other)
    assert_same_gradients(*nets)


def test_gradients_add_up_over_batches() -> None:
    nets = [columns(4, reversible).double().train() for reversible in (True, False)]
    for net in nets:
        torch.manual_seed(5)
        losses = [read(net(images())) for _ in range(2)]  # two passes before a backward one
        sum(losses).backward()  # type: ignore[union-attr]
        read(net(images())).backward()
    assert_same_gradients(*nets)


def test_frozen_parts_stay_without_gradients() -> None:
    nets = [columns(4, reversible).double().train() for reversible in (True, False)]
    for net in nets:
        torch.manual_seed(5)
        net.stem.requires_grad_(False)
        net.columns[0].requires_grad_(False)
        net.columns[2].stages.s2.requires_grad_(False)
        read(net(images())).backward()
    for (name, got), want in zip(grads(nets[0]).items(), grads(nets[1]).values(), strict=True):
        assert (got is None) == (want is None), name
        if got is not None and want is not None:
            assert_near(got, want, name)


def test_under_autocast() -> None:
    nets = [columns(4, reversible).train() for reversible in (True, False)]
    for net in nets:
        for inside in (False, True):  # wherever the backward pass stands
            torch.manual_seed(5)
            with torch.autocast("cpu", torch.bfloat16):
                out = net(images(dtype=torch.float32))
                assert out.map.dtype == torch.float32
                if inside:
                    read(out).backward()
            if not inside:
                read(out).backward()
    for name, got in grads(nets[0]).items():
        want = grads(nets[1])[name]
        assert got is not None
        assert want is not None
        assert got.dtype == want.dtype
        assert (got - want).norm() <= 0.05 * want.norm() + 1e-3, name


@pytest.mark.parametrize("change", [lambda net: net.eval(), lambda net: net.to(torch.bfloat16)])
def reverses(net: Columns, dtype: torch.dtype = torch.float32) -> bool:
    """Whether a pass keeps no maps."""
    node, found = net(images(dtype=dtype)).map.grad_fn, False
    while node is not None:
        found = found or "_Run" in type(node).__name__
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
    return found


def test_it_is_plain_where_it_cannot_be_reversible() -> None:
    net = columns()
    assert reverses(net.train())
    assert not reverses(net.eval())
    with torch.no_grad():
        assert not reverses(net.train())
    assert not reverses(net.to(torch.bfloat16), torch.bfloat16)
    assert not reverses(columns(reversible=False).train())


def test_a_map_changed_in_place_is_found_out() -> None:
    net = columns().double().train()
    loss = (out := net(images()).map).sum()
    with torch.no_grad():
        out.zero_()
    with pytest.raises(RuntimeError, match="changed in place before its backward pass"):
        loss.backward()


def test_shares_keep_away_from_zero() -> None:
    net = columns(2)
    alpha = net.columns[1].stages.s1.alpha
    given = torch.linspace(-2e-3, 2e-3, 32).view_as(alpha)
    want = given.sign() * given.abs().clamp(min=1e-3)
    alpha.data.copy_(given)
    net.eval()
    net(images(dtype=torch.float32))
    assert torch.equal(alpha, given), "evaluation changes nothing"
    whole = net.train().double()(images())
    torch.testing.assert_close(alpha.float(), want)
    assert whole.map.isfinite().all()


def test_distributed_data_parallel_sees_every_gradient(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        net, plain = columns().double().train(), columns(reversible=False).double().train()
        wrapped = nn.parallel.DistributedDataParallel(net)
        for _ in range(2):  # DDP refuses the second step where a gradient was missing in the first
            torch.manual_seed(5)
            read(wrapped(images())).backward()
            torch.manual_seed(5)
            read(plain(images())).backward()
        assert_same_gradients(net, plain)
    finally:
        torch.distributed.destroy_process_group()


# ---- columns as a backbone


def test_drop_path_starts_anew_in_each_column() -> None:
    net = columns(3, stages={"s1": Stage(32, "cnx*2"), "s2": Stage(64, "cnx*3", 2)}, drop_path=0.4)
    rates = [block.residual.rate for _, _, block in net.steps()]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4] * 3)


def test_levels_keys_and_layers() -> None:
    net = columns(2, stages=MIXED)
    assert [(lv.name, lv.channels, lv.stride) for lv in net.levels] == [("s1", 32, 2), ("s2", 64, 4), ("s3", 64, 8)]
    assert [tuple(map.shape[1:]) for map in net.pyramid(images(dtype=torch.float32))] == [
        (32, 8, 8), (64, 4, 4), (64, 2, 2)
    ]  # fmt: skip
    keys = {key for key, _ in net.named_parameters()}
    assert "columns.0.stages.s1.fusion.proj.weight" not in keys
    assert {"columns.1.stages.s1.fusion.proj.weight", "columns.1.stages.s2.fusion.down.conv.weight"} <= keys
    layers = net.layers()
    assert set(layers) == keys
    assert layers["columns.1.stages.s1.alpha"] == layers["columns.1.stages.s1.blocks.0.conv.weight"] == 7
    assert net.out.extra == ()
    net = columns(8)
    assert net.out.extra == QUARTERS
    assert net.quarters == {1: "quarter1", 3: "quarter2", 5: "quarter3"}


def test_maps_stay_channels_last() -> None:
    for batch in (1, 2):
        for map in columns().eval().pyramid(images(batch, torch.float32)):
            assert_channels_last(map)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem": PatchStem}, r"stem: Columns pass maps alone .* gives 1 prefix token\(s\); set prefix: 0"),
        ({"columns": 0}, r"columns: got 0, must be at least 1"),
        ({"stages": {}}, r"stages: needs at least one level"),
        ({"stages": {"s1": Stage(32, "cls cnx")}}, r"stages\.s1: a level of columns keeps .* 1 prefix token"),
        ({"stages": {"s1": Stage(32, "ncb", dims={"ncb": 64})}}, r"stages\.s1: a level .* gives 64 × 4×4; take"),
        ({"stages": {"s1": Stage(32, "cnx", 3)}}, r"stages\.s1\.fusion\.down: ConvEmbed cannot cut a 4×4 map"),
        ({"stages": {"s1": Stage(32, "cnx", 0)}}, r"stages\.s1\.stride: got 0"),
        ({"stages": {"s1": Stage(32, "tnt")}}, r"stages\.s1\.blocks\.tnt: TNT needs words"),
        ({"fusion": partial(Fusion, down=Identity)}, r"stages\.s2\.fusion: Fusion should give 64 × 2×2, but .* 32 × 4"),
        ({"drop_path": 1.0}, r"drop_path: got 1\.0"),
    ],
)
def test_what_does_not_fit_is_one_line(change: dict[str, Any], message: str) -> None:
    given = {
        "stages": {"s1": Stage(32, "cnx"), "s2": Stage(64, "cnx", 2)},
        "stem": partial(PatchStem, patch=4, prefix=0),
    }
    with pytest.raises(BuildError, match=r"^model\.backbone\." + message) as caught:
        Columns(Image(16), blocks={**BLOCKS, "cls": ClassToken}, **{**given, **change})
    assert "\n" not in str(caught.value)


# ---- supervision of earlier columns

LITTLE: dict[str, Any] = {
    "stages": {"s1": Stage(32, "cnx"), "s2": Stage(64, "cnx", 2)},
    "blocks": BLOCKS,
    "stem": partial(PatchStem, patch=2, prefix=0),
}


def test_its_loss_is_the_authors() -> None:
    terms = [CrossEntropy(), IntermediateCrossEntropy(), Reconstruction()]
    task = Classification(
        partial(Columns, **LITTLE), Image(16), 5, QuarterHead, objectives={str(i): term for i, term in enumerate(terms)}
    )
    given, targets = images(2, torch.float32), torch.tensor([1, 4])
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
