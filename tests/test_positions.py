"""Position encodings against timm and golden vectors, at both levels of a net, and at another image size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from timm.layers import RelPosBias, RotaryEmbeddingCat, apply_rot_embed_cat, build_sincos2d_pos_embed
from timm.models.twins import PosConv
from torch import Tensor
from torch.nn import functional as F

from blocks.attention import Attention
from blocks.base import BuildError, NoPosition, Position, Shape, Site, to_map, tokens
from blocks.nextvit import EMHSA
from blocks.positions import (
    ConditionalPosition,
    LearnedPosition,
    NetPosition,
    RelativeBias,
    RoPE,
    SinCosPosition,
    SinusoidPosition,
)
from blocks.stems import PatchStem
from blocks.structure import AddPosition
from blocks.transformer import Encoder
from framework.backbones import Isotropic
from framework.data.base import Image
from tests.contract import randomise
from tests.vectors import load, tnt

GRIDS = [(4, 4), (5, 3), (2, 7)]
ENCODINGS: list[Position] = [
    NoPosition(), LearnedPosition(), SinCosPosition(), ConditionalPosition(), RelativeBias(), RoPE(),
    SinusoidPosition(),
]  # fmt: skip


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def zero_map(grid: tuple[int, int], dim: int) -> Tensor:
    return torch.zeros(1, dim, *grid).contiguous(memory_format=torch.channels_last)


# ---- sines and cosines


def mae_table(grid: tuple[int, int], dim: int) -> np.ndarray:
    """Written from the rule of facebookresearch/mae util/pos_embed.py: half the channels for the column (first),
    half for the row, each as sines, then cosines, of position / 10000^(i / (dim / 4))."""
    rows = []
    for y in range(grid[0]):
        for x in range(grid[1]):
            row: list[float] = []
            for position in (x, y):
                angles = [position / 10000 ** (i / (dim / 4)) for i in range(dim // 4)]
                row += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
            rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("grid", GRIDS)
def test_sincos_is_mae_s(grid: tuple[int, int]) -> None:
    with default_dtype(torch.float64):
        part = SinCosPosition().tokens(Shape(16, grid, prefix=1))
        map, prefix = part(zero_map(grid, 16), torch.zeros(1, 1, 16))
    np.testing.assert_allclose(tokens(map)[0].numpy(), mae_table(grid, 16), rtol=0, atol=1e-14)
    assert prefix is not None
    assert not prefix.any()


@pytest.mark.parametrize("grid", GRIDS)
def test_sincos_has_timm_s_numbers_in_mae_s_order(grid: tuple[int, int]) -> None:
    """timm: sines of rows, of columns, cosines of rows, of columns."""
    ours = tokens(SinCosPosition().tokens(Shape(16, grid))(zero_map(grid, 16))[0])[0]
    sin_y, sin_x, cos_y, cos_x = build_sincos2d_pos_embed(list(grid), 16).chunk(4, dim=1)
    torch.testing.assert_close(ours, torch.cat([sin_x, cos_x, sin_y, cos_y], dim=1), rtol=0, atol=1e-6)


# ---- RoPE


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("base", [10000.0, 100.0])
@pytest.mark.parametrize("prefix", [0, 2])
def test_rope_is_timm_s(grid: tuple[int, int], base: float, prefix: int) -> None:
    n, head_dim = grid[0] * grid[1], 16
    q = torch.randn(2, 3, prefix + n, head_dim)
    scores = RoPE(base).scores(Shape(48, grid, prefix), heads=3, head_dim=head_dim, keys=grid)
    table = RotaryEmbeddingCat(head_dim, in_pixels=False, feat_shape=list(grid), temperature=base).get_embed()
    turned = apply_rot_embed_cat(q[:, :, prefix:], table)
    torch.testing.assert_close(scores.rotate(q, grid), torch.cat([q[:, :, :prefix], turned], dim=2), rtol=0, atol=2e-6)


@pytest.mark.parametrize("grid", GRIDS)
def test_rope_turns_pairs_of_channels_like_complex_numbers(grid: tuple[int, int]) -> None:
    """In float64, from the definition: pairs turn by row · base^(-i / pairs), then by column; the rest stays."""
    head_dim, pairs = 18, 4
    with default_dtype(torch.float64):
        scores = RoPE().scores(Shape(18, grid), heads=1, head_dim=head_dim, keys=grid)
        q = torch.randn(1, 1, grid[0] * grid[1], head_dim)
        got = scores.rotate(q, grid)
    freqs = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    y, x = (torch.tensor([[p // grid[1], p % grid[1]] for p in range(q.shape[2])]).double()).unbind(1)
    angles = torch.cat([y[:, None] * freqs, x[:, None] * freqs], dim=1)
    turned = torch.view_as_complex(q[..., :16].unflatten(-1, (8, 2))) * torch.polar(torch.ones_like(angles), angles)
    want = torch.cat([torch.view_as_real(turned).flatten(-2), q[..., 16:]], dim=-1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)


def test_rope_on_another_grid_has_timm_s_scores() -> None:
    """timm's reference grid scales positions; ours also shifts them all, which no score between them sees."""
    built, run, head_dim = (4, 6), (6, 4), 16
    q, k = torch.randn(2, 1, 24, head_dim), torch.randn(2, 1, 24, head_dim)
    scores = RoPE().scores(Shape(16, built), heads=1, head_dim=head_dim, keys=built)
    table = RotaryEmbeddingCat(head_dim, in_pixels=False, feat_shape=list(run), ref_feat_shape=list(built)).get_embed()
    got = scores.rotate(q, run) @ scores.rotate(k, run).transpose(-1, -2)
    want = apply_rot_embed_cat(q, table) @ apply_rot_embed_cat(k, table).transpose(-1, -2)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


def test_rope_makes_scores_of_offsets() -> None:
    """The same query and key give the same score at the same offset, wherever they lie."""
    grid = (5, 5)
    scores = RoPE().scores(Shape(8, grid), heads=1, head_dim=8, keys=grid)
    q, k = (scores.rotate(torch.randn(1, 1, 1, 8).expand(1, 1, 25, 8), grid) for _ in range(2))
    table = (q @ k.transpose(-1, -2))[0, 0].view(5, 5, 5, 5)
    torch.testing.assert_close(table[0, 1, 2, 3], table[1, 2, 3, 4])
    assert not torch.allclose(table[0, 1, 2, 3], table[0, 1, 3, 2])


# ---- relative bias


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prefix", [0, 1])
def test_relative_bias_is_timm_s(grid: tuple[int, int], prefix: int) -> None:
    theirs = RelPosBias(grid, 3, prefix_tokens=prefix)
    ours = RelativeBias().scores(Shape(12, grid, prefix), heads=3, head_dim=4, keys=grid)
    table = torch.randn_like(theirs.relative_position_bias_table)
    offsets = (2 * grid[0] - 1) * (2 * grid[1] - 1)
    state = {"table": table[:offsets].T.reshape(3, 2 * grid[0] - 1, 2 * grid[1] - 1)}
    if prefix:
        state["prefix_table"] = table[offsets:].T
    ours.load_state_dict(state)
    theirs.load_state_dict({"relative_position_bias_table": table})
    torch.testing.assert_close(ours.bias(grid), theirs.get_bias(), rtol=0, atol=0)


def test_relative_bias_on_another_grid_resizes_its_table() -> None:
    ours = RelativeBias().scores(Shape(12, (4, 4), prefix=1), heads=3, head_dim=4, keys=(4, 4))
    with torch.no_grad():
        ours.table.copy_(torch.arange(7.0)[:, None].expand(3, 7, 7))  # grows with the row offset alone
    bias = ours.bias((6, 4))[0, :, 1:, 1:].view(3, 6, 4, 6, 4)
    rows = bias[0, :, 0, 0, 0]
    assert (rows.diff() > 0).all()
    torch.testing.assert_close(bias[:, 1, 0, 3, 2], bias[:, 2, 1, 4, 3])
    torch.testing.assert_close(bias[:, 3, 1, 3, 3], torch.full((3,), 3.0))  # no offset: the table's middle


def test_relative_bias_needs_keys_on_the_grid_of_its_queries() -> None:
    with pytest.raises(BuildError, match="keys on the 4×4 grid of the queries, got 2×2"):
        RelativeBias().scores(Shape(8, (4, 4)), heads=2, head_dim=4, keys=(2, 2))
    with pytest.raises(BuildError, match="means of 4 tokens in a row, which lie on no grid"):
        EMHSA(Site.at(32, 4, position=RelativeBias()), sr_ratio=2)


@pytest.mark.parametrize("number", [0.0, -2.0, math.nan])
def test_frequencies_have_a_base_above_zero(number: float) -> None:
    with pytest.raises(BuildError, match=f"^RoPE needs a base above 0, got {number}$"):
        RoPE(base=number).scores(Shape(8, (4, 4)), heads=2, head_dim=4, keys=(4, 4))
    with pytest.raises(BuildError, match=f"^SinCosPosition needs a temperature above 0, got {number}$"):
        SinCosPosition(temperature=number).tokens(Shape(8, (4, 4)))


# ---- conditional


@pytest.mark.parametrize("grid", GRIDS)
def test_conditional_position_is_timm_s(grid: tuple[int, int]) -> None:
    theirs, ours = PosConv(8, 8), ConditionalPosition().tokens(Shape(8, grid, prefix=1))
    ours.load_state_dict({key.replace("proj.0", "conv"): value for key, value in theirs.state_dict().items()})
    x, prefix = torch.randn(2, grid[0] * grid[1], 8), torch.randn(2, 1, 8)
    map, passed = ours(to_map(x, grid), prefix)
    torch.testing.assert_close(tokens(map), theirs(x, grid), rtol=0, atol=1e-6)
    assert passed is prefix


# ---- learned tables


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (3, 3), (5, 7)])
def test_learned_table_is_resized_as_the_authors_do(prefix: int, grid: tuple[int, int]) -> None:
    vector = load("pos_embed_resize")
    table = vector[f"x.pos_in_{prefix}extra_4x4"]
    name = f"x.bicubic_{prefix}extra_to_{grid[0]}x{grid[1]}"
    part = LearnedPosition().tokens(Shape(12, (4, 4), prefix)).double()
    part.load_state_dict({"table": table})
    map, first = part(zero_map(grid, 12).double(), torch.zeros(1, prefix, 12).double())
    got = torch.cat([first, tokens(map)], dim=1)
    torch.testing.assert_close(got, table if grid == (4, 4) else vector[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("side", [12, 4])
def test_learned_table_is_resized_without_antialias(side: int) -> None:
    tables = {name: value.float() for name, value in load("pos_embed_resample").tensors.items()}  # made in float32
    part = LearnedPosition().tokens(Shape(8, (7, 7), prefix=1))
    part.load_state_dict({"table": tables["pos7"]})
    map, first = part(zero_map((side, side), 8), torch.zeros(1, 1, 8))
    got = torch.cat([first, tokens(map)], dim=1)
    torch.testing.assert_close(got, tables[f"deit_{side}"], rtol=1e-5, atol=1e-6)
    assert (got - tables[f"timm_antialias_{side}"]).abs().max() > 0.1


def test_learned_table_starts_small_and_without_weight_decay() -> None:
    part = LearnedPosition(std=0.02).tokens(Shape(64, (14, 14), prefix=1))
    assert part.table.shape == (1, 197, 64)
    assert abs(part.table.std().item() - 0.02) < 0.001
    assert part.no_decay == {"table"}


# ---- whole nets


@pytest.mark.parametrize("position", ENCODINGS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("level", ["sentence", "word", "both"])
def test_every_encoding_works_at_every_level(position: Position, level: str) -> None:
    """TNT with it between sentences, between words, or both: runs, learns, and runs at another image size."""
    sentence = NoPosition() if level == "word" else position
    word = NoPosition() if level == "sentence" else position
    torch.manual_seed(0)
    net = tnt(
        32, 8, 5, embed_dim=32, inner_dim=16, depth=2, num_heads_inner=2, num_heads_outer=2,
        position=sentence, word_position=word,
    )  # fmt: skip
    images = torch.randn(2, 3, 32, 32)
    logits = net(images)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    places = {name for name, _ in net.named_parameters() if "position" in name}
    assert any("inner" in name or "word_position" in name for name in places) == (level != "sentence" and bool(places))
    net.eval()
    for size in ((48, 48), (24, 40)):
        assert net(torch.randn(2, 3, *size)).shape == (2, 5)
    randomise(net)
    shuffled = images.unflatten(3, (4, 8))[:, :, :, [2, 0, 3, 1]].flatten(3)
    blind = torch.allclose(net(shuffled), net(images), atol=1e-5)
    # Without sentence positions TNT cannot tell where a patch lies; with any encoding it can.
    assert blind == isinstance(sentence, NoPosition)


def test_an_attention_s_own_position_wins_over_the_net_s() -> None:
    site = Site.at(32, 4, position=RoPE())
    parts = [type(Attention(site, heads=2, **args).position).__name__ for args in (
        {}, {"position": NetPosition()}, {"position": NoPosition()}, {"position": RelativeBias()})]  # fmt: skip
    assert parts == ["Rotation", "Rotation", "ScorePosition", "RelativeBiasTable"]
    site = Site.at(32, 4, position=LearnedPosition())
    assert hasattr(AddPosition(site).position, "table")
    assert not hasattr(AddPosition(site, position=NoPosition()).position, "table")


def test_positions_make_no_parameters_that_nothing_reads() -> None:
    """An encoding on scores leaves nothing in stems, one on tokens leaves nothing in attention."""
    for position, places in ((RelativeBias(), {"blocks"}), (LearnedPosition(), {"stem"}), (RoPE(), set())):
        net = Isotropic(
            Image(32), {"vit": partial(Encoder, mixer=partial(Attention, heads=2))}, "vit*2", 16, PatchStem, position
        )
        assert {name.split(".")[0] for name, _ in net.named_parameters() if "position" in name} == places


def test_sinusoids_count_through_prefix_and_map() -> None:
    """Position p, channel j: sine for even j, cosine for odd, of p / 10000^(2⌊j/2⌋/C)."""
    part = SinusoidPosition().tokens(Shape(10, (2, 3), prefix=1))
    want = [[math.sin(a) if j % 2 == 0 else math.cos(a) for j in range(10) for a in [p / 1e4 ** (j // 2 * 2 / 10)]]
            for p in range(7)]  # fmt: skip
    map, prefix = part(zero_map((2, 3), 10).float(), torch.zeros(1, 1, 10))
    assert prefix is not None
    torch.testing.assert_close(torch.cat([prefix, tokens(map)], 1)[0], torch.tensor(want), rtol=0, atol=1e-6)
    assert "table" in part.state_dict()
    assert not list(part.parameters())


def test_a_table_is_resized_as_its_family_does() -> None:
    for mode in ("bicubic", "bilinear"):
        part = LearnedPosition(resize=mode).tokens(Shape(4, (4, 4)))
        map = part(zero_map((6, 3), 4).float())[0]
        want = F.interpolate(to_map(part.table, (4, 4)), size=(6, 3), mode=mode, align_corners=False)
        torch.testing.assert_close(map, want, rtol=0, atol=0)
