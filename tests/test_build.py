"""The composer, and the backbones that it makes.

Blocks that are defined here begin with an underscore: no config can name them, in this or another test.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from blocks.attention import Attention
from blocks.base import Block, BlockFactory, BuildError, Features, Shape, Site, Words
from blocks.nextvit import NCB, NTB
from blocks.structure import AddPosition, ClassToken, ConvEmbed, Identity, MakeWords, Merge
from blocks.tnt import TNT
from blocks.transformer import Encoder
from framework.build import Section, alike, compose

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


@pytest.mark.parametrize(("size", "stride", "grid"), [(10, 4, 3), (11, 4, 3), (7, 2, 4), (5, 4, 2), (3, 4, 1)])
def test_a_stride_may_leave_a_rest(size: int, stride: int, grid: int) -> None:
    assert shapes("ncb", Shape(32, (size, size)), stride=stride)[-1].grid == (grid, grid)


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


def test_a_section_may_have_a_decay_of_its_own() -> None:
    made = compose([section("cls enc*2"), section("enc id enc*2", drop_path=0.4)], MAP, drop_path=0.2)
    rates = [block.mixer_residual.rate for chain in made for block in chain if block.counts]
    assert rates == pytest.approx([0.0, 0.05, 0.0, 0.2, 0.4])
    later = compose([section("enc*2", drop_path=0.4)], MAP, drop_path=0.2, depth=4, index=2)[0]
    assert [block.mixer_residual.rate for block in later] == pytest.approx([0.0, 0.4])
    ends = compose([section("enc*2"), section("enc id enc*2", drop_path=(0.4, 0.2))], MAP)[1]
    assert [block.mixer_residual.rate for block in ends if block.counts] == pytest.approx([0.4, 0.3, 0.2])
    for wrong in (1.5, (0.1, 1.5), (1.5, 0.1)):
        with pytest.raises(BuildError, match=r"drop_path: got 1\.5, must be"):
            section("enc", drop_path=wrong)


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


class _Counted(_Own):
    """Notes that it was run; from the third site on it gives something else, as only a number in it tells."""

    runs: ClassVar[list[int]] = []

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.late = site.index >= 2

    def forward(self, features: Features) -> Features:
        self.runs.append(1)
        return features.replace(map=features.map[:, 1:]) if self.late else features


def test_a_block_like_the_one_before_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Counted, "runs", [])
    compose([section("own*2", own=_Counted)], MAP)
    assert len(_Counted.runs) == 1
    assert "block 2 'own': _Counted.forward gives map (2, 31, 8, 8)" in refusal("own*4", own=_Counted)


class _Holder(nn.Module):
    def __init__(self, **values: Any) -> None:
        super().__init__()
        self.child, self.weight = nn.Linear(2, 3), nn.Parameter(torch.zeros(4, 2))
        self.child.above = [self]  # a circle
        for name, value in values.items():
            setattr(self, name, value)


@dataclass(slots=True)
class _Slots:
    number: int = 1


OTHERS = {
    "slots": {"further": _Slots()},
    "number": {"number": 2},
    "type": {"number": 1.0},
    "deep": {"parts": (1, MAP, {"a": [None, "y"]})},
    "field": {"parts": (1, replace(MAP, dim=3), {"a": [None, "x"]})},
    "layer": {"child": nn.Linear(2, 4)},
    "kind of layer": {"child": nn.Identity()},
    "order in memory": {"weight": nn.Parameter(torch.zeros(2, 4).t())},
    "precision": {"weight": nn.Parameter(torch.zeros(4, 2, dtype=torch.float64))},
    "more": {"further": 1},
    "nobody knows": {"act": partial(torch.relu)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_alike(name: str) -> None:
    values = {"number": 1, "parts": (1, MAP, {"a": [None, "x"]}), "act": torch.relu}
    assert alike(_Holder(**values), _Holder(**{**values, "parts": (1, replace(MAP), {"a": [None, "x"]})}))
    assert not alike(_Holder(**values), _Holder(**{**values, **OTHERS[name]}))
