"""What a net costs: parameters and multiply-accumulates, without data and without memory (on the meta device)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from blocks.base import PARTS, BuildError, Shape
from framework.backbones import Level
from framework.construct import build_model
from framework.data import Image
from framework.tasks import Task


@dataclass(frozen=True)
class BlockCost:
    """One block of a net: state-dict prefix, name in the pattern, class, what it gives, and what it costs."""

    key: str
    name: str
    kind: str
    out: Shape
    params: int
    macs: int


@dataclass(frozen=True)
class Cost:
    """A net's cost for one image. `params` are the trainable ones; `macs` count convolutions and matrix products.

    The published definition: the whole net, in eval mode, norms, activations, softmax and pooling not counted. What a
    run skips because nobody reads it is counted too.
    """

    params: int
    frozen: int
    macs: int
    image: tuple[int, int, int]
    levels: list[Level]
    blocks: list[BlockCost]


def meta_model(document: Mapping[str, Any], facts: tuple[Image, int] | None = None) -> Task:
    """The task of a document on the meta device. Takes and raises what `build_model` does."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return build_model(document, facts)


def cost(task: Task) -> Cost:
    """The cost of a task's net; the task should be on the meta device, and is left in eval mode without gradients.

    Raises:
        BuildError: its logits do not depend on the image.
    """
    trainable = sum(p.numel() for p in task.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in task.parameters() if not p.requires_grad)
    # Not under no_grad: torch then takes paths of attention that the counter does not know.
    task.eval().requires_grad_(False)
    task.backbone.keep(PARTS)
    images, seen = task.example().requires_grad_(), []
    looking = task.backbone.register_forward_hook(lambda backbone, given, features: seen.append(features))
    with looking, FlopCounterMode(display=False) as counter:
        task(images)
    if task.read_parts() == {"prefix"} and any(f.map.requires_grad and not f.prefix.requires_grad for f in seen):
        head = type(getattr(task, "head", task)).__name__
        raise BuildError(
            f"model.head: {head}'s logits do not depend on the image: no block gives its prefix tokens anything of the "
            "map; put one behind them that mixes tokens (Encoder, TNT), or use AveragePoolHead"
        )
    task.backbone.keep(task.read_parts())
    counts = counter.get_flop_counts()
    root = type(task).__name__
    blocks = [
        BlockCost(
            key=key,
            name=name,
            kind=type(block).__name__,
            out=block.out,
            params=sum(p.numel() for p in block.parameters()),
            macs=sum(counts.get(f"{root}.backbone.{key}", {}).values()) // 2,
        )
        for key, name, block in task.backbone.steps()
    ]
    return Cost(
        params=trainable,
        frozen=frozen,
        macs=counter.get_total_flops() // 2,
        image=(images.shape[1], images.shape[2], images.shape[3]),
        levels=task.backbone.levels,
        blocks=blocks,
    )
