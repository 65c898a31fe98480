"""What the importers refuse, and how published files are read. That they are right: test_golden_nets.py."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from blocks.base import Site
from blocks.nextvit import NCB
from blocks.tnt import TNT as TNTBlock
from blocks.tnt import SentenceStem
from framework.backbones import Isotropic
from framework.data.base import Image
from framework.errors import ConfigError
from framework.weights import FAMILIES, convert, read
from framework.weights.keys import block_prefixes
from tests.vectors import Net, encoder, load, shapes, tnt, vit

TNT: dict[str, Any] = {
    "img_size": 64, "num_classes": 10, "embed_dim": 48, "inner_dim": 8, "depth": 2, "num_heads_inner": 2,
    "num_heads_outer": 3,
}  # fmt: skip


@pytest.fixture
def net() -> Net:
    return tnt(**TNT)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return dict(load("tnt_m16_basic").state)


def refusal(state: dict[str, Tensor], net: Net) -> str:
    with pytest.raises(ConfigError) as caught:
        convert(state, shapes(net))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_tensor_arrives_once(net: Net, state: dict[str, Tensor]) -> None:
    converted = convert(state, shapes(net))
    assert list(converted) == list(net.state_dict())
    count = sum(value.numel() for key, value in state.items() if key != "outer_tokens")
    assert sum(value.numel() for value in converted.values()) == count
    net.load_state_dict(converted)


def test_an_unknown_key_is_named(net: Net, state: dict[str, Tensor]) -> None:
    state["blocks.1.surprise.weight"] = torch.zeros(1)
    assert refusal(state, net) == "TNT weights do not fit this model: no place for: blocks.1.surprise.weight"


def test_missing_keys_are_named(net: Net, state: dict[str, Tensor]) -> None:
    del state["blocks.1.outer_norm1.bias"], state["inner_pos"]
    message = refusal(state, net)
    assert message.endswith(": missing: backbone.stem.word_position.table, backbone.blocks.1.outer.norm1.bias")


def test_half_of_a_fused_projection_is_named(net: Net, state: dict[str, Tensor]) -> None:
    del state["blocks.0.inner_attn.v.weight"]
    assert "another shape: backbone.blocks.0.inner.mixer.qkv.weight 16×8 (model: 24×8)" in refusal(state, net)
    state["blocks.0.inner_attn.v.weight"] = torch.zeros(8, 9)
    assert "another shape: backbone.blocks.0.inner.mixer.qkv.weight 16×8 (model: 24×8)" in refusal(state, net)


def test_two_keys_for_one_place_are_refused_where_they_differ(net: Net, state: dict[str, Tensor]) -> None:
    state["patch_pos"] = state["outer_pos"].clone()
    assert torch.equal(convert(state, shapes(net))["backbone.stem.position.table"], state["outer_pos"])
    state["patch_pos"] += 1
    assert refusal(state, net).endswith("fit this model: differs from its copy: patch_pos")


def test_another_shape_is_named(state: dict[str, Tensor]) -> None:
    message = refusal(state, tnt(**{**TNT, "img_size": 96, "num_classes": 3}))
    assert "no place" not in message
    assert "missing" not in message
    assert "head.fc.weight 10×48 (model: 3×48)" in message
    assert "backbone.stem.position.table 1×17×48 (model: 1×37×48)" in message


def test_a_deeper_or_shallower_model_is_refused(state: dict[str, Tensor]) -> None:
    message = refusal(state, tnt(**{**TNT, "depth": 1}))
    assert "no place for: blocks.1.inner_attn.proj.bias, " in message
    assert message.endswith(" and 23 more")
    assert "missing: backbone.blocks.2.inner.norm1.weight, " in refusal(state, tnt(**{**TNT, "depth": 3}))


def test_weights_of_another_form_are_refused(net: Net, state: dict[str, Tensor]) -> None:
    """TNT's two forms share most names; neither goes into the other."""
    message = refusal(state, tnt(**TNT, legacy=True))
    assert "no place for: blocks.0.proj_norm2.bias, blocks.0.proj_norm2.weight, " in message
    assert "missing: backbone.blocks.0.proj.bias, " in message
    assert "no place for: blocks.0.proj.bias, " in refusal(dict(load("tnt_timm_legacy").state), net)
    assert "missing: backbone.blocks.0.outer.mlp_residual.gate.norm.weight, " in refusal(state, tnt(**TNT, se=True))


def test_a_distilled_net_s_second_token_and_head_are_not_lost() -> None:
    args = {"img_size": 64, "num_classes": 10, "embed_dim": 48, "depth": 3, "num_heads": 3}
    message = refusal(load("deit_distilled").state, vit(**args))
    assert "no place for: head_dist.bias, head_dist.weight;" in message
    assert "backbone.stem.prefix 1×2×48 (model: 1×1×48)" in message


def test_weights_of_no_family_are_refused(net: Net) -> None:
    assert "no importer knows weights with the keys conv1.weight" in refusal({"conv1.weight": torch.zeros(1)}, net)
    assert "families: TNT, ViT/DeiT, Next-ViT" in refusal({}, net)


@pytest.mark.parametrize(
    ("name", "family"),
    [("tnt_m4", "TNT"), ("tnt_timm_legacy", "TNT"), ("deit_plain", "ViT/DeiT"), ("nextvit_r025_hd32", "Next-ViT")],
)
def test_one_family_recognises_each_vector(name: str, family: str) -> None:
    assert [f.NAME for f in FAMILIES if f.recognises(load(name).state)] == [family]


def test_lv_vit_is_no_vit() -> None:
    """Its blocks have the same keys."""
    state = {**load("deit_plain").state, "patch_embed.conv1.weight": torch.zeros(1)}
    assert not any(family.recognises(state) for family in FAMILIES)


def test_without_the_head_another_number_of_classes_fits(state: dict[str, Tensor]) -> None:
    net = tnt(**{**TNT, "num_classes": 3})
    converted = convert(state, shapes(net), head=False)
    assert converted.keys() == {key for key in shapes(net) if key.startswith("backbone.")}
    del state["norm.weight"]
    with pytest.raises(ConfigError, match=r"missing: backbone\.norm\.weight"):
        convert(state, shapes(net), head=False)


def test_other_parts_of_a_task_keep_their_own_weights(net: Net, state: dict[str, Tensor]) -> None:
    target = {**shapes(net), "objectives.tokens.proj.weight": torch.Size([3, 3])}
    assert convert(state, target).keys() == shapes(net).keys()


def test_layers_without_words_are_encoders(state: dict[str, Tensor]) -> None:
    """TNT-S-1 to -4: some layers have no inner part, and are ordinary encoders in ours."""
    blocks = {"tnt": partial(TNTBlock, inner=encoder(2), outer=encoder(3)), "vit": encoder(3)}
    backbone = Isotropic(Image(64), blocks, "tnt vit", 48, partial(SentenceStem, word_dim=8))
    for key in list(state):
        if key.startswith(("blocks.1.inner", "blocks.1.proj", "inner_pos", "outer_pos")):
            del state[key]
    target = {f"backbone.{key}": shape for key, shape in shapes(backbone).items()}
    converted = convert(state, target, head=False)
    assert torch.equal(converted["backbone.blocks.0.outer.mlp.fc1.weight"], state["blocks.0.outer_mlp.fc1.weight"])
    assert torch.equal(converted["backbone.blocks.1.mlp.fc1.weight"], state["blocks.1.outer_mlp.fc1.weight"])


def test_batch_norms_without_a_count_start_it_at_zero() -> None:
    vector = load("nextvit_block_ncb")
    prefix = "backbone.stages.one.blocks.0."
    target = {prefix + key: shape for key, shape in shapes(NCB(Site.at(32, 9, stride=2, dim=64))).items()}
    state = {f"features.0.{key}": value for key, value in vector.state.items()}
    with_count = convert(state, target)
    counts = {key for key in target if key.endswith("num_batches_tracked")}
    assert len(counts) == 3
    lean = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    without = convert(lean, target)
    for key in target:
        assert torch.equal(without[key], torch.tensor(0) if key in counts else with_count[key])
    assert any(with_count[key] > 0 for key in counts)
    with pytest.raises(ConfigError, match=rf"missing: {prefix}mixer\.norm\.bn\.running_mean"):
        convert({key: v for key, v in state.items() if key != "features.0.mhca.norm.running_mean"}, target)


def test_blocks_are_counted_by_stage_and_without_what_lies_between() -> None:
    keys = [
        "backbone.stem.conv.weight",
        "backbone.stages.late.entry.mlp.fc1.weight",
        "backbone.stages.late.blocks.0.position.table",
        "backbone.stages.late.blocks.10.outer.mlp.fc1.weight",
        "backbone.stages.late.blocks.10.inner.mlp.fc1.weight",
        "backbone.stages.early.blocks.0.mlp.fc1.weight",
        "head.fc.weight",
    ]
    late, early = "backbone.stages.late", "backbone.stages.early"
    assert block_prefixes(keys) == [[f"{late}.entry", f"{late}.blocks.10"], [f"{early}.blocks.0"]]


def test_files_are_read_without_their_wrappings(tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(2), "b": torch.zeros(1)}
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"model": wrapped, "epoch": 3, "args": argparse.Namespace(lr=1e-3)}, tmp_path / "deit.pth")
    torch.save({"state_dict": state}, tmp_path / "tnt.pth.tar")
    torch.save(state, tmp_path / "plain.pt")
    save_file(state, tmp_path / "timm.safetensors")
    for file in tmp_path.iterdir():
        found = read(file)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such weights file"):
        read(tmp_path / "none.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(ConfigError, match="holds no state dict"):
        read(tmp_path / "empty.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ConfigError, match="cannot read"):
        read(tmp_path / "text.pth")
