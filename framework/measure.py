"""What a net costs: parameters and multiply-accumulates, without data and without memory (on the meta device)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from blocks.base import PARTS, Block, BuildError, Features, Shape
from framework.backbones import Composed, Level
from framework.config import load_plugins
from framework.construct import build_model, check_validated
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
    images, net = task.example(), task.backbone
    prefixed = [block for block in net.chain() if block.out.prefix] if isinstance(net, Composed) else []
    given: list[Features] = []
    noting = prefixed[0].register_forward_pre_hook(lambda _, args: given.append(args[0])) if prefixed else nullcontext()
    with noting, FlopCounterMode(display=False) as counter:
        task(images)
    if given and not _reached(prefixed, given[0]):
        _check_head(task)
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


def _reached(blocks: Sequence[Block], features: Features) -> bool:
    """Whether blocks give the prefix anything of the map: its gradients show it, as there are no others."""
    features = features.replace(map=features.map.detach().requires_grad_())
    for block in blocks:
        features = block(features)
        if features.prefix is None or features.prefix.requires_grad:
            return True  # mostly behind the first block: the others need not run
    return not features.map.requires_grad  # else blocks do without gradients, and nothing is known


def _check_head(task: Task) -> None:
    """Raises BuildError where the logits do not depend on the image."""
    if not task(task.example().requires_grad_()).requires_grad:
        head = type(getattr(task, "head", task)).__name__
        raise BuildError(
            f"model.head: {head}'s logits do not depend on the image: no block gives its prefix tokens anything of the "
            "map; put one behind them that mixes tokens (Encoder, TNT), or use AveragePoolHead"
        )


def measure(document: Mapping[str, Any]) -> dict[str, int]:
    """Trainable parameters and MACs of a document's net: `{params, macs}`. Runs in a fresh process too.

    Raises:
        ConfigError, BuildError: it cannot be built, or its last epoch would not be validated.
    """
    load_plugins(document.get("plugins", []))
    check_validated(document["trainer"])
    found = cost(meta_model(document))
    return {"params": found.params, "macs": found.macs}
