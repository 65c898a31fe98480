"""The contract of a loss term."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from blocks.base import Features


@dataclass(frozen=True)
class Step:
    """What a loss term can read of one training step.

    Shape:
        images: `(B, C, H, W)` as the net saw them.
        targets: `(B,)` class numbers, or `(B, num_classes)` probabilities.
        features: the net's final features.
        logits: `(B, num_classes)`.
    """

    images: Tensor
    targets: Tensor
    features: Features
    logits: Tensor


class Objective(nn.Module, ABC):
    """One term of a loss, swapped by config like a block.

    Attributes:
        reads: which parts of the final features it reads beside what the head reads.
        weight: its factor in the sum; what is logged under its name is the value without it.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    weight: float = 1.0

    @abstractmethod
    def forward(self, step: Step) -> Tensor:
        """The mean over the batch, a scalar, without the weight."""
