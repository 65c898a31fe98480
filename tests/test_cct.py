"""Compact Transformers: against the authors' code with their weights through the importer, how they start."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from blocks.attention import Attention
from blocks.base import Features, NoPosition, Site, tokens
from blocks.cct import CompactPatchStem, ConvTokenizer, SeqPoolHead
from blocks.heads import ClassTokenHead
from blocks.mlp import Mlp
from blocks.nextvit import NCB
from blocks.norms import BatchNorm
from blocks.positions import LearnedPosition, SinusoidPosition
from blocks.tnt import TNT, SentenceStem
from blocks.transformer import Encoder
from framework.backbones import Isotropic, Pyramid, Stage
from framework.data.base import Image
from framework.errors import ConfigError
from framework.weights import FAMILIES, convert
from framework.weights.transfer import start_from
from tests.vectors import Net, assert_near, encoder, joined, load, shapes

POSITIONS = {
    "learnable": LearnedPosition(0.2, "bilinear"),
    "sine": SinusoidPosition("bilinear"),
    "none": NoPosition(),
}
VECTORS = {
    "cct_3x1_learnable": "cct",
    "cct_3x2_none": "cct",
    "cvtlite_4_learnable": "cvt",
    "vitlite_4_learnable": "vit",
}


def compact(kind: str, given: dict[str, Any]) -> Net:
    """A net of the family, with the authors' names of arguments."""
    stem: Any = partial(CompactPatchStem, patch=given["kernel_size"], prefix=int(kind == "vit"))
    if kind == "cct":
        stem = partial(
            ConvTokenizer, layers=given["n_conv_layers"], kernel=given["kernel_size"],
            stride=given.get("stride"), padding=given.get("padding"),
        )  # fmt: skip
    block = partial(
        Encoder,
        mixer=partial(Attention, heads=given["num_heads"], attn_drop=0.1),
        mlp=partial(Mlp, ratio=given["mlp_ratio"]),
        norm_stream=True,
    )
    backbone = Isotropic(
        Image(given["img_size"], 3), {"enc": block}, f"enc*{given['num_layers']}", given["embedding_dim"], stem,
        POSITIONS[given["positional_embedding"]], drop_path=0.1,
    )  # fmt: skip
    return Net(backbone, ClassTokenHead if kind == "vit" else SeqPoolHead, given["num_classes"])


def heard(module: torch.nn.Module, before: bool = False) -> list[Any]:
    """Filled with what a module gives, or with what it is given first, when the net runs."""
    found: list[Any] = []
    if before:
        module.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    else:
        module.register_forward_hook(lambda module, args, out: found.append(out))
    return found


@pytest.mark.parametrize(("name", "kind"), VECTORS.items())
def test_equals_the_authors(name: str, kind: str) -> None:
    vector = load(name)
    net = compact(kind, vector.args).imported(vector.state)
    steps: list[Any] = [block for _, _, block in net.backbone.steps()]
    patches, mixed = heard(net.backbone.stem.position, before=True), heard(steps[0].mixer)
    blocks = [heard(block) for block in steps]
    assert_near(net(vector["input"]), vector["logits"], "logits")
    assert_near(tokens(patches[0]), vector["out.tokenizer"], "tokenizer")
    assert_near(mixed[0], vector["out.classifier.blocks.0.self_attn"], "attention")
    assert len(blocks) == 2
    for i, (out,) in enumerate(blocks):
        assert_near(joined(out), vector[f"out.classifier.blocks.{i}"], f"block {i}")
    final = net.backbone(vector["input"])
    assert_near(joined(final), vector["out.classifier.norm"], "norm")
    if kind != "vit":
        assert_near(net.head.pool(tokens(final.map)), vector["out.classifier.attention_pool"], "weights")
    net.backbone.keep(net.head.reads)
    assert_near(net(vector["input"]), vector["logits"], "logits, unread work skipped")


@pytest.mark.parametrize(("name", "kind"), VECTORS.items())
def test_every_weight_has_its_place_in_one_family(name: str, kind: str) -> None:
    vector = load(name)
    assert [family.NAME for family in FAMILIES if family.recognises(vector.state)] == ["CCT"]
    converted = convert(vector.state, shapes(compact(kind, vector.args)))
    assert sum(v.numel() for v in converted.values()) == sum(v.numel() for v in vector.state.values())
    without = convert(vector.state, shapes(compact(kind, {**vector.args, "num_classes": 3})), head=False)
    assert {key for key in converted if not key.startswith("head.")} == set(without)


def test_a_net_of_another_form_is_refused() -> None:
    vector = load("vitlite_4_learnable")
    with pytest.raises(ConfigError, match=r"no place for: classifier\.class_emb; missing: head\.pool\.weight, head"):
        convert(vector.state, shapes(compact("cvt", vector.args)))
    deeper = compact("vit", {**vector.args, "num_layers": 1})
    with pytest.raises(ConfigError, match=r"no place for: classifier\.blocks\.1\.linear1\.bias, .* and 5 more$"):
        convert(vector.state, shapes(deeper))


def test_a_table_is_loaded_as_it_is_in_the_place_of_sinusoids() -> None:
    """The released functions put random values there."""
    vector = load("cct_3x1_learnable")
    net = compact("cct", {**vector.args, "positional_embedding": "sine"}).imported(vector.state)
    assert_near(net(vector["input"]), vector["logits"], "logits")


def test_sinusoids_are_the_authors_and_frozen() -> None:
    net = compact("vit", {**load("vitlite_4_learnable").args, "positional_embedding": "sine"})
    key = "backbone.stem.position.table"
    assert key not in dict(net.named_parameters())
    table = net.state_dict()[key][0]
    assert table.shape == (65, 32)
    for place, channel in ((0, 0), (0, 1), (3, 4), (64, 31)):
        angle = torch.tensor(place / 10000 ** (2 * (channel // 2) / 32), dtype=torch.float64)
        want = angle.cos() if channel % 2 else angle.sin()
        torch.testing.assert_close(table[place, channel].double(), want, rtol=0, atol=1e-6)


def test_positions_are_resized_bilinearly() -> None:
    vector = load("vitlite_4_learnable")
    net = compact("vit", {**vector.args, "img_size": 48, "num_classes": 4})
    report = start_from(net, vector.state)
    assert report.resized == ["backbone.stem.position.table"]
    assert set(report.fresh) == {"head.fc.weight", "head.fc.bias"}
    old = vector.state["classifier.positional_emb"]
    grid = old[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
    want = F.interpolate(grid, size=(12, 12), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    table = net.state_dict()["backbone.stem.position.table"].double()
    torch.testing.assert_close(table, torch.cat([old[:, :1], want], dim=1), rtol=0, atol=1e-5)


# ---- parts


@pytest.mark.parametrize(
    ("size", "layers", "kernel", "side"),
    [(32, 1, 3, 16), (32, 2, 3, 8), (224, 2, 7, 14), (384, 2, 7, 24), (64, 1, 5, 32)],
)
def test_the_tokenizer_cuts_as_published(size: int, layers: int, kernel: int, side: int) -> None:
    with torch.device("meta"):
        stem = ConvTokenizer(Site.at(3, size, dim=128), layers=layers, kernel=kernel)
    assert stem.out.grid == (side, side)
    assert [conv.out_channels for conv in stem.convs] == [64] * (layers - 1) + [128]
    assert {conv.padding for conv in stem.convs} == {(kernel // 2, kernel // 2)}


def test_a_start_as_the_authors() -> None:
    """Kernels from N(0, 2 / fan-in), class token at zero, positions ten times as wide as elsewhere."""
    torch.manual_seed(0)
    for stem, weight in (
        (made := ConvTokenizer(Site.at(3, 32, dim=256), layers=2), made.convs[1].weight),
        (made := CompactPatchStem(Site.at(3, 32, dim=256, position=POSITIONS["learnable"])), made.conv.weight),
    ):
        deviation = (2 / weight[0].numel()) ** 0.5
        assert float(weight.std()) == pytest.approx(deviation, rel=0.03)
        assert weight.abs().max() > 2 * deviation  # a uniform one ends at √3
        assert all(not p.any() for name, p in stem.named_parameters() if name == "prefix")
    assert made.prefix is not None
    assert float(made.position.get_parameter("table").std()) == pytest.approx(0.2, rel=0.03)
    assert CompactPatchStem(Site.at(3, 32, dim=32), prefix=0).prefix is None


def test_pooling_weighs_positions() -> None:
    """With no weights it is the mean; a position that outweighs the others is what is left."""
    head = SeqPoolHead(Site.at(4, 6).inp, 3)
    map = torch.randn(2, 4, 6, 6)
    features = Features(map, prefix=torch.randn(2, 1, 4))
    torch.nn.init.zeros_(head.pool.weight)
    torch.testing.assert_close(head.pooled(features), map.mean((2, 3)))
    with torch.no_grad():
        head.pool.weight[0, 0] = 1.0
        map[:, 0] = 0.0
        map[0, 0, 1, 2] = map[1, 0, 5, 0] = 100.0
    torch.testing.assert_close(head.pooled(features), torch.stack([map[0, :, 1, 2], map[1, :, 5, 0]]))
    torch.testing.assert_close(head(features), head.fc(head.pooled(features)))


def test_pooling_ignores_the_bias_of_its_weights() -> None:
    head = SeqPoolHead(Site.at(4, 6).inp, 3).double()
    features = Features(torch.randn(2, 4, 6, 6, dtype=torch.float64))
    before = head(features)
    torch.nn.init.constant_(head.pool.bias, 5.0)
    assert_near(head(features), before)


def test_the_parts_serve_other_families() -> None:
    """The tokenizer before convolutions of Next-ViT, the pooling behind them and beside TNT's words and class token."""
    stages = {"s1": Stage(32, "ncb"), "s2": Stage(64, "ncb", stride=2)}
    pyramid = Pyramid(Image(32, 3), stages, {"ncb": NCB}, partial(ConvTokenizer, hidden=8, layers=2), norm=BatchNorm)
    nested = partial(TNT, inner=encoder(2), outer=encoder(4))
    words = Isotropic(Image(32, 3), {"tnt": nested}, "tnt*2", 32, partial(SentenceStem, patch=8, words=4, word_dim=8))
    for backbone in (pyramid, words):
        net = Net(backbone, SeqPoolHead, 5)
        backbone.keep(net.head.reads)
        net(torch.randn(2, 3, 32, 32)).square().sum().backward()
        assert backbone.out.grid == (4, 4)
        assert net.head.pool.weight.grad.any()


def test_both_branches_of_a_layer_are_dropped_at_one_rate() -> None:
    net = compact("cct", {**load("cct_3x2_none").args, "num_layers": 3})
    rates = [(b.mixer_residual.rate, b.mlp_residual.rate) for b in net.backbone.blocks]
    assert rates == [(0.0, 0.0), (0.05, 0.05), (0.1, 0.1)]
