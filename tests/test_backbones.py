"""Whole nets, and modules from outside in them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blocks.base import PARTS, BuildError, Features
from blocks.heads import AveragePoolHead, ClassTokenHead, DistilledHead, HeadFactory
from blocks.nextvit import NTB
from blocks.positions import LearnedPosition
from blocks.stems import ConvStem, PatchStem
from blocks.tnt import TNT, SentenceStem
from blocks.transformer import Encoder
from framework.backbones import Backbone, Composed, Isotropic, Pyramid, Stage, TimmBackbone
from framework.construct import build_model
from framework.data import Image
from framework.measure import cost
from framework.tasks import Classification
from tests.contract import assert_channels_last
from tests.test_build import BLOCKS, ENC, INNER, TNT_BLOCK, _WrongShape

# ---- whole nets

STAGES = {
    "s1": Stage(32, "ncb", 1),
    "s2": Stage(64, "words ncb tnt", 2, blocks={"tnt": partial(TNT, inner=INNER, outer=partial(NTB, shrink=0.5))}),
    "s3": Stage(64, "id enc cls enc", 2, entry="embed"),
}
NETS: dict[str, Callable[..., Backbone]] = {
    "tnt": partial(
        Isotropic, blocks={"tnt": TNT_BLOCK, "enc": ENC}, pattern="tnt*2 enc tnt*2", dim=16, position=LearnedPosition(),
        stem=partial(SentenceStem, patch=4, words=4, word_dim=8), word_position=LearnedPosition(), drop_path=0.1,
    ),
    "deit": partial(
        Isotropic, blocks={"enc": ENC}, pattern="enc*3", dim=16, stem=partial(PatchStem, patch=4, prefix=2),
        position=LearnedPosition(),
    ),
    "pyramid": partial(Pyramid, stages=STAGES, blocks=BLOCKS, stem=partial(ConvStem, dims=(16, 32), strides=(2, 2))),
}  # fmt: skip


def net(name: str, size: int = 32, dtype: torch.dtype = torch.float32) -> Composed:
    torch.manual_seed(0)
    made = NETS[name](Image(size)).eval().to(dtype)
    for parameter in made.parameters():  # what starts at zero or one hides mistakes
        nn.init.normal_(parameter, std=0.2)
    return made


@pytest.mark.parametrize("name", NETS)
def test_a_seed_gives_the_same_weights(name: str) -> None:
    def build() -> Mapping[str, Tensor]:
        torch.manual_seed(3)
        return NETS[name](Image(32)).state_dict()

    first, second = build(), build()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", NETS)
def test_a_whole_net_builds_on_the_meta_device(name: str) -> None:
    with torch.device("meta"):
        made = NETS[name](Image(32))
        assert all(tensor.is_meta for tensor in made.state_dict().values())
        out = made(torch.empty(2, 3, 32, 32))
    assert out.map.shape == (2, made.out.dim, *made.out.grid)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", NETS)
def test_levels_are_what_the_pyramid_gives(name: str, size: int) -> None:
    made = net(name, size)
    with torch.no_grad():
        maps = made.pyramid(torch.randn(2, 3, size, size))
    assert [(m.shape[1], size / m.shape[2]) for m in maps] == [(lv.channels, lv.stride) for lv in made.levels]
    assert len({level.name for level in made.levels}) == len(made.levels)


def test_names_of_levels() -> None:
    assert [level.name for level in net("tnt").levels] == ["block1", "block2", "block3", "block5"]
    assert [level.name for level in net("deit").levels] == ["block1", "block2", "block3"]
    assert [(lv.name, lv.channels, lv.stride) for lv in net("pyramid").levels] == [
        ("s1", 32, 4), ("s2", 64, 8), ("s3", 64, 16)
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["resnet18", "deit_tiny_patch16_224"])
def test_levels_of_timm(name: str) -> None:
    made = TimmBackbone(Image(64), name).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        maps, out = made.pyramid(images), made(images)
    assert [(m.shape[1], 64 // m.shape[2]) for m in maps] == [(lv.channels, lv.stride) for lv in made.levels]
    assert out.map.shape == (1, made.out.dim, 1, 1)
    assert out.prefix is not None
    assert out.prefix.shape == (1, 1, made.out.dim)


def test_a_net_of_timm_that_does_not_fit_is_one_line() -> None:
    for name, args in (("resnet1", {}), ("resnet18", {"wrong": 1}), ("vgg11", {"in_chans": 0})):
        with pytest.raises(BuildError, match=r"^model\.backbone") as caught:
            TimmBackbone(Image(8), name, args)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tnt", "deit"])
def test_keep_changes_no_logit_and_is_reversible(name: str) -> None:
    made = net(name, dtype=torch.float64)
    head = (DistilledHead if name == "deit" else ClassTokenHead)(made.out, 7).double()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        whole = made(images)
        made.keep(head.reads)
        kept = made(images)
        torch.testing.assert_close(head(kept), head(whole), rtol=0, atol=1e-12)
        assert not torch.equal(kept.map, whole.map)  # or nothing was skipped
        before, maps = head(kept), made.pyramid(images)
        assert torch.equal(head(made(images)), before)  # pyramid puts it back
        made.keep(PARTS)
        again = made(images)
    assert torch.equal(again.map, whole.map)
    assert again.prefix is not None
    assert torch.equal(again.prefix, whole.prefix)
    assert torch.equal(made.norm.on_map(maps[-1]), whole.map)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", NETS)
def test_maps_stay_channels_last_between_blocks(name: str, batch: int) -> None:
    made = net(name)
    seen: list[Tensor] = []
    for block in made.chain():
        block.register_forward_hook(lambda m, args, out: seen.append(out.map))
    with torch.no_grad():
        made(torch.randn(batch, 3, 32, 32))
    assert len(seen) == len(made.chain())
    for map in seen:
        assert_channels_last(map, any_batch_stride=True)  # behind a block with prefix tokens these lie between


def test_the_stem_is_named_by_its_path() -> None:
    with pytest.raises(BuildError, match=r"^model\.backbone\.stem: PatchStem cannot cut 30×30 px"):
        NETS["deit"](Image(30))
    with pytest.raises(BuildError, match=r"^model\.backbone\.stem: _WrongShape\.forward gives map"):
        Isotropic(Image(8), BLOCKS, "id", 3, stem=_WrongShape)


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_drop_path_is_a_rate(rate: float) -> None:
    with pytest.raises(BuildError, match=r"^model\.backbone\.drop_path: got"):
        partial(NETS["tnt"], drop_path=rate)(Image(32))


def test_a_pyramid_has_stages() -> None:
    with pytest.raises(BuildError, match=r"^model\.backbone\.stages: needs at least one stage"):
        Pyramid(Image(32), {}, BLOCKS)


def test_state_dict_keys_of_stages() -> None:
    keys = {key.rsplit(".", 1)[0] for key in net("pyramid").state_dict()}
    assert {"stages.s3.entry.conv", "stages.s1.blocks.0.norm.bn", "stem.layers.0.conv", "norm"} <= keys
    assert [key for key, _, _ in net("pyramid").steps()][-5:] == [
        "stages.s3.entry", *(f"stages.s3.blocks.{i}" for i in range(4))
    ]  # fmt: skip


# ---- prefix tokens that see the map


class _Detached(ClassTokenHead):
    """Learns from features that do not learn from it."""

    def pooled(self, features: Features) -> Tensor:
        return super().pooled(features).detach()


class _Told(Encoder):
    """Gives the prefix what is in the map, and no gradients to the map."""

    def forward(self, features: Features) -> Features:
        assert features.prefix is not None
        return features.replace(
            map=features.map.detach(), prefix=features.prefix + features.map.detach().mean((2, 3))[:, None]
        )


def with_head(pattern: str, head: HeadFactory = ClassTokenHead, prefix: int = 0) -> Classification:
    stem = partial(PatchStem, patch=4, prefix=prefix)
    with torch.device("meta"):
        return Classification(partial(Isotropic, blocks=SEEING, pattern=pattern, dim=32, stem=stem), Image(32), 7, head)


SEEING = {**BLOCKS, "told": _Told}


@pytest.mark.parametrize(
    ("pattern", "prefix"), [("ncb*2", 1), ("ncb cls ncb id", 0), ("enc cls", 0), ("enc cls ncb", 0), ("ncb cls id", 1)]
)
def test_a_class_token_that_sees_nothing_is_refused(pattern: str, prefix: int) -> None:
    with pytest.raises(BuildError, match=r"^model\.head: ClassTokenHead's logits do not depend on the image: no block"):
        cost(with_head(pattern, prefix=prefix))
    cost(with_head(pattern, AveragePoolHead, prefix))


@pytest.mark.parametrize(
    ("pattern", "prefix"),
    [("ncb enc", 1), ("ncb cls ncb enc ncb", 0), ("enc ncb", 1), ("ncb told", 1), ("enc cls enc", 1)],
)
def test_a_class_token_that_sees_the_map_is_not_refused(pattern: str, prefix: int) -> None:
    cost(with_head(pattern, prefix=prefix))
    if "told" not in pattern:
        cost(with_head(pattern, _Detached, prefix))


# ---- modules from outside, by config alone


def with_module(tiny: Callable[..., dict[str, Any]], module: Any, **more: Any) -> dict[str, Any]:
    block = {"class_path": "FromModule", "init_args": {"module": module, **more}}
    return tiny(model__backbone__blocks__own=block, model__backbone__pattern="tnt own tnt")


def test_a_block_of_timm_by_import_path(tiny: Callable[..., dict[str, Any]]) -> None:
    module = {"class_path": "timm.models.vision_transformer.Block", "init_args": {"num_heads": 4}}
    document = with_module(tiny, module, site_args={"drop_path": "drop_path"})
    document["model"]["init_args"]["backbone"]["init_args"]["drop_path"] = 0.2
    model = build_model(document).eval()
    theirs = model.backbone.blocks[1].module
    assert type(theirs).__module__ == "timm.models.vision_transformer"
    assert theirs.attn.num_heads == 4
    assert theirs.drop_path1.drop_prob == pytest.approx(0.1)
    assert model(model.example(2)).shape == (2, 10)


def test_a_module_of_a_file_elsewhere_by_import_path(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tessera_test_elsewhere.py").write_text(
        "from torch import nn\n"
        "class Shift(nn.Module):\n"
        "    def __init__(self, channels: int, by: float = 1.0) -> None:\n"
        "        super().__init__()\n"
        "        self.by = by\n"
        "    def forward(self, x):\n"
        "        return x + self.by\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    module = {"class_path": "tessera_test_elsewhere.Shift", "init_args": {"by": 2.5}}
    model = build_model(with_module(tiny, module, layout="map"))
    block = model.backbone.blocks[1]
    assert block.module.by == 2.5
    map = torch.randn(1, 16, 4, 4)
    assert torch.equal(block(Features(map)).map, map + 2.5)
    sys.modules.pop("tessera_test_elsewhere")
