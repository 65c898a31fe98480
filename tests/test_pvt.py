"""PVT v1 against the authors' code."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from blocks.base import PARTS, BuildError, Features, Site
from blocks.positions import LearnedPosition, PositionTable
from blocks.pvt import ReducedAttention
from framework.config import compose
from framework.measure import meta_model
from framework.optim import parameter_groups
from framework.weights import convert
from tests.conftest import EXPERIMENTS
from tests.vectors import FOLDER, Vector, assert_near, joined, load, published


def net(vector: Vector) -> Any:
    stages: dict[str, Any] = {}
    args = vector.args
    for i, depth in enumerate(args["depths"]):
        block = {
            "mixer": {"heads": args["num_heads"][i], "sr": args["sr_ratios"][i], "qkv_bias": args["qkv_bias"]},
            "mlp": {"ratio": args["mlp_ratios"][i]},
        }
        pattern = f"{'cls ' if i == 3 else ''}pos pvt*{depth}"
        stages[f"s{i + 1}"] = {"dim": args["embed_dims"][i], "pattern": pattern, "blocks": {"pvt": block}}
    changes = {"data.size": args["img_size"], "model.backbone.stages": stages}
    return published("pvt_tiny", vector.state, changes)


@pytest.mark.parametrize("name", ["pvt_64", "pvtv1_64"])
def test_equals_the_authors(name: str) -> None:
    vector = load(name)
    task = net(vector)
    assert_near(task(vector["input"]), vector["logits"], "logits, unread work skipped")
    task.backbone.keep(PARTS)
    found: dict[str, Tensor] = {}  # the last of each stage
    for prefix, alias, block in task.backbone.steps():
        stage = prefix.split(".")[1].removeprefix("s")
        name = {"embed": f"patch_embed{stage}.0", "pvt": f"block{stage}"}.get(alias, alias)
        block.register_forward_hook(lambda module, args, out, name=name: found.update({name: joined(out)}))
    found["norm"] = joined(task.backbone(vector["input"]))
    compared = 0
    for key, want in vector.tensors.items():
        what = key.partition(".")[2].removesuffix("_last")
        what = what.removesuffix(".0") if what.startswith("block") else what
        if what in found:
            assert_near(found[what], want, what)
            compared += 1
    assert compared >= 6


def test_official_names_of_the_full_size() -> None:
    shapes = json.loads((FOLDER / "keys_pvt_small.json").read_text())["shapes"]
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    target = {key: v.shape for key, v in meta_model(compose([EXPERIMENTS / "zoo/pvt_small.yaml"])).state_dict().items()}
    assert list(convert(state, target)) == [key for key in target if key.startswith(("backbone.", "head."))]


def test_another_image_size_interpolates_bilinearly_with_the_class_token_aside() -> None:
    vector = load("pvt_64")
    task = net(vector)
    images = torch.randn(1, 3, 96, 64, dtype=torch.float64)
    block = next(block for _, alias, block in task.backbone.steps() if alias == "pos")
    seen: list[Features] = []
    block.register_forward_hook(lambda module, args, out: seen.append(args[0]) or seen.append(out))
    task(images)
    table = vector.state["pos_embed1"].transpose(1, 2).unflatten(2, (16, 16))
    want = F.interpolate(table, size=(24, 16), mode="bilinear", align_corners=False)
    assert_near(seen[1].map - seen[0].map, want)


def test_positions_are_decayed_and_the_class_token_is_not() -> None:
    task = meta_model(compose([EXPERIMENTS / "zoo/pvt_tiny.yaml"]))
    tables = {id(m.table) for m in task.modules() if isinstance(m, PositionTable)}
    assert len(tables) == 4
    decayed = {id(p) for group in parameter_groups(task, 0.05) if group["weight_decay"] for p in group["params"]}
    assert tables <= decayed
    assert not {id(p) for name, p in task.named_parameters() if name.endswith(".prefix")} & decayed
    assert "table" in LearnedPosition().tokens(Site.at(8, 4).inp).no_decay


def test_a_map_smaller_than_the_reduction_is_refused() -> None:
    with pytest.raises(BuildError, match=r"ReducedAttention needs an sr from 1 to 3 on a 3×4 map, got 4"):
        ReducedAttention(Site.at(8, (3, 4)), heads=2, sr=4)
