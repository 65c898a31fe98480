"""Golden vectors in tests/golden, made with the authors' code, and nets to hold against them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from blocks.attention import Attention
from blocks.base import Features, Position, tokens
from blocks.convnext import ConvNeXt
from blocks.gates import TanhGate
from blocks.heads import AveragePoolHead, ClassTokenHead, DistilledHead, HeadFactory
from blocks.nextvit import NCB, NTB
from blocks.norms import BatchNorm, LayerNorm
from blocks.positions import LearnedPosition
from blocks.residual import Residual
from blocks.revcol import Fusion
from blocks.stems import ConvStem, PatchStem
from blocks.structure import ConvEmbed
from blocks.tnt import TNT, SentenceStem
from blocks.transformer import Encoder
from framework.backbones import Backbone, Isotropic, Pyramid, Stage
from framework.config import compose
from framework.construct import build_model
from framework.data.base import Image
from framework.weights import convert
from tests.conftest import EXPERIMENTS

FOLDER = Path(__file__).parent / "golden"

TOLERANCE = 1e-9

# What official names of parameters and buffers begin with.
STATE = ("sd.", "state.")


# RevCol's parts.
NORM = partial(LayerNorm, eps=1e-6)
CNX = partial(ConvNeXt, norm=NORM, residual=partial(Residual, layer_scale=1e-6))
STEM = partial(PatchStem, patch=4, prefix=0, norm=NORM)
FUSION = partial(Fusion, down=partial(ConvEmbed, norm=NORM), norm=NORM)


@dataclass(frozen=True)
class Vector:
    """One golden vector: the constructor's arguments and the state dict under official names, inputs and outputs."""

    args: dict[str, Any]
    state: dict[str, Tensor]
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]


def load(name: str) -> Vector:
    """A vector with every number in float64."""
    found = {key: value.double() if value.is_floating_point() else value
             for key, value in load_file(FOLDER / f"{name}.safetensors").items()}  # fmt: skip
    state = {key.split(".", 1)[1]: value for key, value in found.items() if key.startswith(STATE)}
    tensors = {key: value for key, value in found.items() if not key.startswith(STATE)}
    about = json.loads((FOLDER / f"{name}.json").read_text())
    args = next((about[name] for name in ("constructor", "kwargs", "spec") if name in about), {})
    return Vector(args, state, tensors)


def assert_near(got: Tensor, want: Tensor, what: str = "") -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE, msg=lambda text: f"{what}: {text}")


def shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in module.state_dict().items()}


def joined(features: Features) -> Tensor:
    """`(B, P + N, C)`, as the originals keep their tokens."""
    x = tokens(features.map)
    return x if features.prefix is None else torch.cat([features.prefix, x], dim=1)


class Net(nn.Module):
    """A backbone and a head, under the names that a task gives them."""

    def __init__(self, backbone: Backbone, head: HeadFactory, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head(backbone.out, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def imported(self, state: Mapping[str, Tensor]) -> Net:
        """This net with published weights, in float64 and evaluation."""
        self.load_state_dict(convert(state, shapes(self)), strict=True)
        return self.double().eval()


def published(zoo: str, state: Mapping[str, Tensor], changes: Mapping[str, Any]) -> Any:
    """A file of the zoo with some changes, for ten classes, as a task with published weights, in float64."""
    data = {"data.dataset": "CIFAR10"}
    task = build_model(compose([EXPERIMENTS / f"zoo/{zoo}.yaml"], {**data, **changes}))
    missing = task.load_state_dict(convert(state, shapes(task)), strict=False)
    assert not missing.missing_keys
    return task.double().eval()


def encoder(heads: int, qkv_bias: bool = False, eps: float = 1e-5, se: bool = False) -> Callable[..., Encoder]:
    return partial(
        Encoder,
        mixer=partial(Attention, heads=heads, qkv_bias=qkv_bias),
        norm=partial(LayerNorm, eps=eps),
        mlp_residual=partial(Residual, gate=TanhGate) if se else Residual,
    )


def tnt(
    img_size: int = 224,
    patch_size: int = 16,
    num_classes: int = 1000,
    embed_dim: int = 384,
    inner_dim: int = 24,
    depth: int = 12,
    num_heads_inner: int = 4,
    num_heads_outer: int = 6,
    first_stride: int = 4,
    legacy: bool = False,
    se: bool = False,
    position: Position = LearnedPosition(),
    word_position: Position = LearnedPosition(),
) -> Net:
    """TNT, with timm's names of arguments."""
    stem = partial(
        SentenceStem, patch=patch_size, words=ceil(patch_size / first_stride) ** 2, word_dim=inner_dim, legacy=legacy
    )
    block = partial(TNT, inner=encoder(num_heads_inner), outer=encoder(num_heads_outer, se=se), legacy=legacy)
    backbone = Isotropic(Image(img_size, 3), {"tnt": block}, f"tnt*{depth}", embed_dim, stem, position, word_position)
    return Net(backbone, ClassTokenHead, num_classes)


def vit(
    img_size: int = 224,
    patch_size: int = 16,
    num_classes: int = 1000,
    embed_dim: int = 384,
    depth: int = 12,
    num_heads: int = 6,
    distilled: bool = False,
) -> Net:
    """ViT and DeiT, with timm's names of arguments."""
    backbone = Isotropic(
        Image(img_size, 3),
        {"vit": encoder(num_heads, qkv_bias=True, eps=1e-6)},
        f"vit*{depth}",
        embed_dim,
        partial(PatchStem, patch=patch_size, prefix=1 + distilled),
        LearnedPosition(),
        norm=partial(LayerNorm, eps=1e-6),
    )
    return Net(backbone, DistilledHead if distilled else ClassTokenHead, num_classes)


def nextvit(
    stages: dict[str, Stage],
    num_classes: int = 1000,
    img_size: int = 224,
    stem: tuple[int, ...] = (64, 32, 64, 64),
) -> Net:
    backbone = Pyramid(Image(img_size, 3), stages, {"ncb": NCB}, partial(ConvStem, dims=stem), norm=BatchNorm)
    return Net(backbone, AveragePoolHead, num_classes)


def nextvit_stages(*blocks: int) -> dict[str, Stage]:
    """Next-ViT's stages; `blocks` as in the papers: 3, 4, 10, 3 is the small one."""
    one, two, three, four = blocks
    return {
        "s1": Stage(96, f"ncb*{one}"),
        "s2": Stage(192, f"ncb*{two - 1} ntb", 2, {"ntb": 256}, {"ntb": partial(NTB, sr_ratio=4)}),
        "s3": Stage(384, f"(ncb*4 ntb)*{three // 5}", 2, {"ntb": 512}, {"ntb": partial(NTB, sr_ratio=2)}),
        "s4": Stage(768, f"ncb*{four - 1} ntb", 2, {"ntb": 1024}, {"ntb": partial(NTB, sr_ratio=1)}),
    }
