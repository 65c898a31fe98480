"""The composer, and the backbones that it makes.

Blocks that are defined here begin with an underscore: no config can name them, in this or another test.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blocks.attention import Attention
from blocks.base import PARTS, Block, BlockFactory, BuildError, Features, Shape, Site, Words
from blocks.heads import ClassTokenHead, DistilledHead
from blocks.nextvit import NCB, NTB
from blocks.positions import LearnedPosition
from blocks.stems import ConvStem, PatchStem
from blocks.structure import AddPosition, ClassToken, ConvEmbed, Identity, MakeWords, Merge
from blocks.tnt import TNT, SentenceStem
from blocks.transformer import Encoder
from framework.backbones import Backbone, Composed, Isotropic, Pyramid, Stage, TimmBackbone
from framework.build import Section, compose
from framework.construct import build_model
from framework.data import Image
from tests.contract import assert_channels_last

ENC = partial(Encoder, mixer=partial(Attention, heads=2))
INNER = partial(Encoder, mixer=partial(Attention, heads=2))
TNT_BLOCK = partial(TNT, inner=INNER, outer=ENC)
NTB_BLOCK = partial(NTB, shrink=0.5)
BLOCKS: dict[str, BlockFactory] = {
    "enc": ENC, "tnt": TNT_BLOCK, "ncb": NCB, "ntb": NTB_BLOCK, "id": Identity, "cls": ClassToken, "pos": AddPosition,
    "embed": ConvEmbed, "merge": Merge, "words": partial(MakeWords, words=4, word_dim=8),
}  # fmt: skip
MAP = Shape(32, (8, 8))


def section(pattern: str, **options: Any) -> Section:
    """A section whose patterns may name the blocks above, and the classes among the options."""
    given = {name: options.pop(name) for name in list(options) if isinstance(options[name], type)}
    return Section("model.backbone.stages.s1", pattern, **{"dim": 32, "blocks": {**BLOCKS, **given}, **options})


def shapes(pattern: str, shape: Shape = MAP, **options: Any) -> list[Shape]:
    return [block.out for block in compose([section(pattern, **options)], shape)[0]]


def refusal(pattern: str, shape: Shape = MAP, **options: Any) -> str:
    with pytest.raises(BuildError) as caught:
        compose([section(pattern, **options)], shape)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("model.backbone.stages.s1")
    return message


class _Own(Block):
    """Gives what it gets; what differs from this is the mistake."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.out = site.inp

    def forward(self, features: Features) -> Features:
        return features


class _WrongShape(_Own):
    def forward(self, features: Features) -> Features:
        return features.replace(map=features.map[:, :, 1:])


class _Halves(_Own):
    """Changes the width of the map and leaves the prefix behind."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.out = replace(site.inp, dim=site.inp.dim // 2)

    def forward(self, features: Features) -> Features:
        return features.replace(map=features.map[:, : self.out.dim])


class _GivesTensor(_Own):
    def forward(self, features: Features) -> Any:
        return features.map


class _DropsPrefix(_Own):
    def forward(self, features: Features) -> Features:
        return features.replace(prefix=None)


class _Raises(_Own):
    def forward(self, features: Features) -> Features:
        return features.replace(map=features.map @ features.map.mT[:, :, :3])


class _RaisesAtOnce(_Own):
    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.key = {}["missing"]


class _NoOut(Block):
    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, features: Features) -> Features:
        return features


# ---- strides, widths, entries


@pytest.mark.parametrize(
    ("pattern", "grids"),
    [
        ("ncb ncb", [4, 4]),
        ("id ncb ncb", [8, 4, 4]),
        ("enc*2 merge enc", [8, 8, 4, 4]),
        ("pos id embed enc", [8, 8, 4, 4]),
    ],
)
def test_a_stride_is_offered_until_a_block_takes_it(pattern: str, grids: list[int]) -> None:
    assert [shape.grid for shape in shapes(pattern, stride=2)] == [(n, n) for n in grids]


def test_a_stride_is_not_offered_again_once_it_is_taken() -> None:
    first, second = compose([section("ncb*2", stride=2), section("ncb*2", stride=2)], MAP)
    assert [block.out.grid for block in first + second] == [(4, 4), (4, 4), (2, 2), (2, 2)]


@pytest.mark.parametrize("pattern", ["enc*2", "id", "pos enc"])
def test_a_stride_that_nobody_takes_is_an_error(pattern: str) -> None:
    message = refusal(pattern, stride=2)
    assert "takes stride 2" in message
    assert "set stride: 1" in message


def test_the_entry_runs_first_and_takes_the_stride() -> None:
    made = compose([section("enc*2", stride=2, entry="embed")], MAP)[0]
    assert [type(block) for block in made] == [ConvEmbed, Encoder, Encoder]
    assert made[0].out.grid == (4, 4)


def test_an_entry_is_one_block() -> None:
    assert "s1.entry: unknown block 'ebmed' (did you mean 'embed'?" in refusal("enc", entry="ebmed")
    assert "s1.entry: unknown block 'embed cls'" in refusal("enc", entry="embed cls")


def test_dims_are_the_widths_of_some_names() -> None:
    assert [s.dim for s in shapes("(ncb ntb)*2", dims={"ntb": 64})] == [32, 64, 32, 64]
    assert "s1.dims: unknown block 'wrods' (did you mean 'words'?" in refusal("ncb", dims={"wrods": 64})
    assert "s1.dims.ntb: got 0" in refusal("ncb", dims={"ntb": 0})


@pytest.mark.parametrize(("option", "value"), [("dim", 0), ("dim", -3), ("stride", 0), ("stride", -2)])
def test_sizes_are_positive(option: str, value: int) -> None:
    assert refusal("ncb", **{option: value}) == f"model.backbone.stages.s1.{option}: got {value}, must be at least 1"


def test_an_empty_pattern_is_an_error() -> None:
    assert "s1.pattern: names no block; there are: enc, tnt, ncb" in refusal(" ")


def test_sites_tell_where_in_the_net_a_block_is() -> None:
    sites: list[Site] = []

    class _Spy(_Own):
        def __init__(self, site: Site) -> None:
            super().__init__(site)
            sites.append(site)

    compose([section("id spy", spy=_Spy), section("cls spy*2", spy=_Spy)], MAP)
    real = sites[3:]  # the first three were made on the meta device
    assert [(s.stage, s.place, s.index, s.depth) for s in real] == [(0, 1, 0, 3), (1, 1, 1, 3), (1, 2, 2, 3)]
    assert {s.where for s in sites} == {"model.backbone.stages.s1.blocks.spy"}


# ---- what a block declares and what it gives


def test_a_wrong_shape_is_found() -> None:
    assert refusal("enc bad", bad=_WrongShape) == (
        "model.backbone.stages.s1, block 1 'bad': _WrongShape.forward gives map (2, 32, 7, 8), "
        "but its out declares (2, 32, 8, 8)"
    )


def test_a_tensor_is_no_features() -> None:
    assert "block 0 'bad': _GivesTensor.forward must give Features, got Tensor" in refusal("bad", bad=_GivesTensor)


def test_a_forward_that_raises_says_where() -> None:
    message = refusal("bad", replace(MAP, prefix=1, words=Words(8, (2, 2), (8, 8))), bad=_Raises)
    assert "block 0 'bad': _Raises.forward fails on map (2, 32, 8, 8), prefix (2, 1, 32), words (128, 4, 8)" in message
    assert "(test_build.py, line " in message


def test_a_constructor_that_raises_says_where() -> None:
    message = refusal("bad", bad=_RaisesAtOnce)
    assert message.startswith(
        "model.backbone.stages.s1.blocks.bad: cannot be built: KeyError: 'missing' (test_build.py"
    )


def test_a_block_must_set_out() -> None:
    assert "s1.blocks.bad: _NoOut does not set self.out, the Shape" in refusal("bad", bad=_NoOut)


def test_a_stale_prefix_is_found() -> None:
    message = refusal("cls bad", bad=_Halves)
    assert "_Halves.forward gives prefix (2, 1, 32), but its out declares (2, 1, 16)" in message
    assert "put ClassToken behind" in message
    assert "1 prefix token(s) of width 32 come along" in refusal("cls ncb", dim=32, dims={"ncb": 64})


def test_a_lost_prefix_is_found() -> None:
    message = refusal("cls bad", bad=_DropsPrefix)
    assert message.endswith("_DropsPrefix.forward gives prefix none, but its out declares (2, 1, 32)")


def test_words_must_be_there_and_lie_under_the_map() -> None:
    missing = refusal("enc tnt")
    assert "s1.blocks.tnt: TNT needs words" in missing
    assert "use stem: SentenceStem or put MakeWords before it" in missing
    stale = refusal("words ncb tnt")  # the words lie under 4×4, the map stays at 8×8
    assert "needs words under its 8×8 map, but they lie under 4×4" in stale
    assert "put MakeWords behind" in stale
    assert shapes("words ncb tnt", stride=2)[-1].words == Words(8, (2, 2), over=(4, 4))


def test_every_block_runs_on_what_the_one_before_gives() -> None:
    assert "s1.blocks.enc.mixer: Attention cannot split width 33 by heads: 2" in refusal("embed enc", dim=33)
    assert "keeps its width, but gets 32 and should give 64" in refusal("enc", dim=64)


# ---- drop path, random numbers


def test_drop_path_grows_over_the_counting_blocks_alone() -> None:
    made = compose([section("cls pos enc id enc"), section("enc id ncb", dim=32)], MAP, drop_path=0.3)
    rates = [block.mixer_residual.rate for chain in made for block in chain if block.counts]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_a_part_of_a_net_continues_the_decay() -> None:
    made = compose([section("enc*2")], MAP, drop_path=0.3, depth=4, index=2)[0]
    assert [block.mixer_residual.rate for block in made] == pytest.approx([0.2, 0.3])
    assert compose([section("enc")], MAP, drop_path=0.3)[0][0].mixer_residual.rate == 0.0


def test_building_draws_for_the_real_blocks_alone() -> None:
    """What is checked on the meta device first leaves the random numbers as they were."""
    torch.manual_seed(0)
    alone = [ENC(Site(inp=MAP, dim=32)) for _ in range(2)]
    state = torch.get_rng_state()
    torch.manual_seed(0)
    made = compose([section("enc*2")], MAP)[0]
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(alone, made, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


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
