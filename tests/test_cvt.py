"""CvT against the authors' code."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from blocks.base import PARTS, BuildError, Site, tokens
from blocks.cvt import ConvAttention
from blocks.structure import ConvEmbed, Identity
from blocks.transformer import Encoder
from framework.backbones import Pyramid, Stage
from framework.config import compose
from framework.data.base import Image
from framework.measure import meta_model
from tests.conftest import EXPERIMENTS
from tests.vectors import Vector, assert_near, joined, load, published


def net(vector: Vector) -> Any:
    stages: dict[str, Any] = {}
    args = vector.args
    for i, depth in enumerate(args["DEPTH"]):
        mixer = {
            "heads": args["NUM_HEADS"][i], "projection": args["QKV_PROJ_METHOD"][i], "kv_stride": args["STRIDE_KV"][i],
            "qkv_bias": args["QKV_BIAS"][i],
        }  # fmt: skip
        pattern = f"{'cls ' if args['CLS_TOKEN'][i] else ''}cvt*{depth}"
        stages[f"s{i + 1}"] = {"dim": args["DIM_EMBED"][i], "pattern": pattern, "blocks": {"cvt": {"mixer": mixer}}}
    return published("cvt_13", vector.state, {"data.size": 64, "model.backbone.stages": stages})


@pytest.mark.parametrize("name", ["cvt_tiny_64", "cvt_tiny_avg_64"])
def test_equals_the_authors(name: str) -> None:
    vector = load(name)
    task = net(vector)
    assert_near(task(vector["input"]), vector["logits"], "logits, unread work skipped")
    task.backbone.keep(PARTS)
    found: dict[str, Tensor] = {}

    def watch(module: Any, name: str, show: Any) -> None:
        module.register_forward_hook(lambda module, args, out: found.update({f"out.{name}": show(out)}))

    counts = [0, 0, 0]
    for prefix, alias, block in task.backbone.steps():
        stage = int(prefix.split(".")[1].removeprefix("s")) - 1
        if alias == "embed":
            watch(block, f"stage{stage}.patch_embed", lambda out: out.map)
        if alias == "cvt":
            here = f"stage{stage}.blocks.{counts[stage]}"
            counts[stage] += 1
            watch(block, here, joined)
            watch(block.mixer, f"{here}.attn", lambda out: out)
            watch(block.mlp, f"{here}.mlp", lambda out: out)
            for part in "qk":
                if (conv := getattr(block.mixer, f"conv_{part}")) is not None:
                    watch(conv, f"{here}.attn.conv_proj_{part}", tokens)
    assert_near(task(vector["input"]), vector["logits"], "logits")
    names = vector.tensors.keys() & found.keys()
    assert len(names) >= 9
    for name in names:
        assert_near(found[name], vector[name], name)


def test_without_a_class_token_any_size_works() -> None:
    """50×70 px: odd maps, whose keys lie on rounded-up grids."""
    block = partial(Encoder, mixer=partial(ConvAttention, heads=2))
    stages = {"s1": Stage(8, "cvt", 4, entry="embed"), "s2": Stage(16, "cvt", 2, entry="embed")}
    backbone = Pyramid(Image(48, 3), stages, {"cvt": block, "embed": partial(ConvEmbed, kernel=7)}, Identity)
    out = backbone(torch.randn(2, 3, 50, 70))
    assert out.map.shape == (2, 16, 7, 9)


def test_the_scale_is_that_of_the_whole_width() -> None:
    site = Site.at(16, 4)
    torch.manual_seed(0)
    wide, narrow = (ConvAttention(site, heads=4, projection="linear", scale=scale) for scale in ("width", "head"))
    narrow.load_state_dict(wide.state_dict())
    x = torch.randn(2, 16, 16)
    assert not torch.allclose(wide(x, (4, 4)), narrow(x, (4, 4)))
    with torch.no_grad():
        narrow.q.weight.mul_(0.5)
    torch.testing.assert_close(wide(x, (4, 4)), narrow(x, (4, 4)))


def test_drop_path_is_in_the_last_stage_alone() -> None:
    task = meta_model(compose([EXPERIMENTS / "zoo/cvt_13.yaml"]))
    rates = [block.mixer_residual.rate for _, alias, block in task.backbone.steps() if alias == "cvt"]
    assert rates == pytest.approx([0, 0, 0, *(0.1 * i / 9 for i in range(10))])


def test_a_stride_below_one_is_refused() -> None:
    with pytest.raises(BuildError, match="ConvAttention needs a kv_stride of at least 1, got 0"):
        ConvAttention(Site.at(8, 4), heads=2, kv_stride=0)
