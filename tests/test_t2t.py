"""T2T-ViT: its stem, its token mixers and its nets against the authors' code, in float64."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from blocks.attention import Attention
from blocks.base import Block, BuildError, Shape, Site, tokens
from blocks.gates import NoGate, SigmoidGate
from blocks.heads import ClassTokenHead
from blocks.mlp import Mlp
from blocks.positions import RelativeBias, SinusoidPosition, resize_grid
from blocks.structure import ClassToken, Identity
from blocks.t2t import (
    PerformerAttention,
    PerformerToken,
    SoftSplit,
    TokensToTokenStem,
    TransformerToken,
    random_feature_attention,
)
from blocks.transformer import Encoder
from framework.backbones import Isotropic, Pyramid, Stage
from framework.data.base import Image
from framework.errors import ConfigError
from framework.weights import convert
from framework.weights.transfer import source, start_from
from tests.contract import features
from tests.vectors import FOLDER, Net, assert_near, joined, load, shapes

STEM = Site.at(3, (40, 56), dim=32)

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


# ---- the stem and its parts


@pytest.mark.parametrize(("kernel", "stride", "side"), [(7, 4, 13), (3, 2, 8), (2, 2, 6), (3, 1, 5), (5, 2, 9)])
def test_a_soft_split_is_unfold_with_and_without_gradients(kernel: int, stride: int, side: int) -> None:
    split = SoftSplit(Site.at(6, (side, side + 4), stride=stride), kernel)
    given = features(Shape(6, (side, side + 4)))
    want = F.unfold(given.map, kernel, padding=split.padding, stride=stride)
    plain = split(given).map
    assert plain.shape[1:] == (split.out.dim, *split.out.grid)
    assert torch.equal(plain.flatten(2), want)
    given.map.requires_grad_()
    learned = split(given).map
    assert torch.equal(learned, plain)
    assert learned.stride() == plain.stride()


def test_the_published_splits_take_16_and_any_image() -> None:
    for size, grid in [((224, 224), (14, 14)), ((384, 384), (24, 24)), ((96, 160), (6, 10)), ((100, 90), (7, 6))]:
        with torch.device("meta"):
            stem = TokensToTokenStem(Site.at(3, size, dim=48))
        assert stem.out == Shape(48, grid, 1)
        out = stem(features(Shape(3, size), device="meta"))
        assert (out.map.shape[2:], out.prefix.shape) == (grid, (2, 1, 48))


def test_a_stem_takes_images_of_another_shape_than_it_was_built_for() -> None:
    torch.manual_seed(0)
    built, other = (TokensToTokenStem(Site.at(3, size, dim=32)).eval() for size in ((48, 48), (32, 80)))
    other.load_state_dict(built.state_dict())
    given = features(Shape(3, (32, 80)))
    assert torch.equal(built(given).map, other(given).map)


def test_many_random_features_come_near_a_softmax() -> None:
    """On average over w, attention through them is that of unscaled scores."""
    torch.manual_seed(0)
    q, k, v = (scale * torch.randn(1, 2, 20, 2, dtype=torch.float64) for scale in (0.5, 0.5, 1.0))
    got = random_feature_attention(q, k, v, torch.randn(50_000, 2, dtype=torch.float64))
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, scale=1.0), rtol=0, atol=0.02)
    for wrong in (F.scaled_dot_product_attention(q, k, v), v.mean(2, keepdim=True)):
        assert (got - wrong).abs().max() > 0.05


def test_random_features_are_orthogonal_fixed_and_saved() -> None:
    mixer = PerformerAttention(Site.at(64, 4), heads=1)
    torch.testing.assert_close(mixer.w @ mixer.w.t(), 32 * torch.eye(32), rtol=0, atol=1e-4)
    assert "w" in mixer.state_dict()
    assert "w" not in dict(mixer.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_features_are_computed_in_float32(dtype: torch.dtype) -> None:
    """They are exponentials of squares: what comes in may be rounded, under autocast too, but nothing in between."""
    torch.manual_seed(0)
    mixer = PerformerAttention(Site.at(32, 6), heads=1)
    low = [torch.randn(2, 1, 36, 32).to(dtype) for _ in range(3)]
    want = random_feature_attention(*(x.float() for x in low), mixer.w)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(random_feature_attention(*low, mixer.w), want)
    assert torch.equal(random_feature_attention(*low, mixer.w), want)
    assert mixer.to(dtype)(low[0][:, 0], (6, 6)).dtype == dtype


def test_a_tenth_is_dropped_in_training_only_and_by_default() -> None:
    torch.manual_seed(0)
    block = PerformerToken(Site.at(48, 5, dim=16))
    dropped = outputs(block.mixer.proj_drop, block.drop)
    given = features(Shape(48, (5, 5)), batch=8)
    block(given)
    for out in dropped:
        assert 0.07 < (out == 0).float().mean() < 0.13
    assert torch.equal(block.eval()(given).map, block(given).map)
    quiet = PerformerToken(Site.at(48, 5, dim=16), drop=0.0)
    assert torch.equal(quiet(given).map, quiet(given).map)


def test_scores_of_the_transformer_have_the_scale_of_the_width_that_comes_in() -> None:
    torch.manual_seed(0)
    block = TransformerToken(Site.at(48, 5, dim=16)).double()
    x = torch.randn(2, 25, 48, dtype=torch.float64)
    q, k, v = block.qkv(x).chunk(3, dim=-1)
    want = block.proj((q @ k.transpose(1, 2) * 48**-0.5).softmax(-1) @ v)
    values, mixed = block.mix(x, (5, 5))
    torch.testing.assert_close(mixed, want, rtol=0, atol=1e-12)
    assert torch.equal(values, v)


@pytest.mark.parametrize("mixer", [PerformerToken, TransformerToken])
def test_splits_and_token_blocks_make_a_pyramid(mixer: type[Block]) -> None:
    """Outside of the stem they are ordinary blocks: the split takes the stride, the block behind it the width."""
    stages = {
        "s1": Stage(24, "split mix", 4, blocks={"split": partial(SoftSplit, kernel=7)}),
        "s2": Stage(32, "split mix cls mix", 2),
    }
    blocks = {"split": SoftSplit, "mix": mixer, "cls": ClassToken}
    net = Pyramid(Image(32, 3), stages, blocks, stem=Identity, drop_path=0.1)
    assert [(level.channels, level.stride) for level in net.levels] == [(24, 4), (32, 8)]
    out = net(torch.randn(2, 3, 32, 32))
    assert out.prefix is not None
    (out.map.sum() + out.prefix.sum()).backward()
    assert all(parameter.grad is not None for name, parameter in net.named_parameters())


@pytest.mark.parametrize(
    ("cls", "site", "args", "text"),
    [
        (SoftSplit, Site.at(8, 6, stride=4), {}, "with kernel 3 skips pixels at stride 4; use a kernel of at least 4"),
        (SoftSplit, Site.at(8, (6, 1), stride=2), {"kernel": 4}, "with kernel 4 does not fit a 6×1 map"),
        (SoftSplit, Site.at(8, 6, prefix=1), {}, "1 prefix token(s) come in"),
        (PerformerAttention, Site.at(32, 6), {"heads": 5}, "cannot split width 32 by heads: 5"),
        (PerformerAttention, Site.at(32, 6), {"features": 0.1}, "has no random features: 4 × 0.1"),
        (PerformerToken, Site.at(32, 6, position=RelativeBias()), {}, "forms no scores for RelativeBias"),
        (TokensToTokenStem, STEM, {"strides": (4, 2)}, "one stride for each kernel, got kernels [7, 3, 3]"),
        (TokensToTokenStem, STEM, {"kernels": (), "strides": ()}, "one stride for each kernel"),
        (TokensToTokenStem, STEM, {"kernels": (3, 3, 3)}, "skips pixels at stride 4"),
        (TokensToTokenStem, STEM, {"mixer": ClassToken}, "should keep the 10×14 map between two splits"),
        (TokensToTokenStem, STEM, {"mixer": Encoder}, "keeps its width, but gets 147 and should give 64"),
        (TokensToTokenStem, Site.at(3, 2, dim=8), {}, "does not fit a 2×2 map; use larger images"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_what_is_wrong(cls: type, site: Site, args: dict[str, Any], text: str) -> None:
    with pytest.raises(BuildError, match=re.escape(text)) as caught:
        cls(replace(site, where="model.here"), **args)
    assert str(caught.value).startswith("model.here")
    assert "\n" not in str(caught.value)


# ---- weights


@pytest.mark.parametrize(("old", "new"), [(224, 384), (64, 96)])
def test_sinusoids_of_another_image_size_are_resized(old: int, new: int) -> None:
    """Published tables at 384 px are the resized ones, not the sinusoids of that size."""
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2, "token_dim": 8, "num_classes": 3}
    theirs, net = t2t(old, **small), t2t(new, **small)
    table = SinusoidPosition().tokens(Shape(16, (old // 16, old // 16), 1)).state_dict()["table"]
    report = start_from(net, theirs.state_dict())
    assert report.resized == ["backbone.stem.position.table"]
    assert not report.fresh
    found = net.state_dict()["backbone.stem.position.table"]
    assert torch.equal(found[:, :1], table[:, :1])
    want = resize_grid(table[:, 1:], (old // 16, old // 16), (new // 16, new // 16))
    torch.testing.assert_close(found[:, 1:], want)
    own = SinusoidPosition().tokens(Shape(16, (new // 16, new // 16), 1)).state_dict()["table"]
    assert (found - own).abs().max() > 0.1


def test_published_weights_start_a_net_of_another_size(tmp_path: Path) -> None:
    """As released: under `state_dict_ema`, each name behind `module.`; the averages are what was measured."""
    vector = load("t2t_performer")
    state = {f"module.{key}": value.float() for key, value in vector.state.items()}
    others = {key: torch.zeros_like(value) for key, value in state.items()}
    torch.save({"epoch": 1, "state_dict": others, "state_dict_ema": state}, tmp_path / "t2t.pth.tar")
    net = t2t(**{**vector.args, "img_size": 96})
    report = start_from(net, source(str(tmp_path / "t2t.pth.tar")))
    assert report.resized == ["backbone.stem.position.table"]
    assert torch.equal(net.backbone.stem.mixers[1].mixer.w, vector.state["tokens_to_token.attention2.w"].float())
    same = t2t(**vector.args)
    assert not start_from(same, source(str(tmp_path / "t2t.pth.tar"))).resized
    torch.testing.assert_close(same.double().eval()(vector["input"]), vector["logits"], rtol=0, atol=1e-9)


def test_weights_of_another_form_are_refused() -> None:
    """Performers, transformers and gates go into nets that have them only."""
    args = load("t2t_performer").args
    for name, wrong, text in [
        ("t2t_performer", t2t(**{**args, "tokens_type": "transformer"}), "mixers.0.qkv.weight"),
        ("t2t_transformer", t2t(**args), "mixers.0.mixer.w"),
        ("t2t_se14style", t2t(**load("t2t_se14style").args), "attn.se_layer.fc.0.weight"),
    ]:
        with pytest.raises(ConfigError, match="T2T-ViT weights do not fit this model") as caught:
            convert(load(name).state, shapes(wrong))
        assert text in str(caught.value)
