"""The contract of a loss term."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor, nn

from blocks.base import BuildError, Features

if TYPE_CHECKING:
    from framework.tasks.classification import Classification

Token = Literal["class", "distillation"]


@dataclass(frozen=True)
class Step:
    """What a loss term can read of one training step.

    Shape:
        images: `(B, C, H, W)` as the net saw them.
        targets: `(B,)` class numbers, or `(B, num_classes)` probabilities.
        features: the net's final features.
        logits: `(B, num_classes)`, as evaluation has them.
        class_logits: those that learn from the labels: the class token's where another term teaches the
            distillation token, else `logits`.
        distillation_logits: those of the distillation token, or None where the head has none.
        each: those of every classifier of the head.
    """

    images: Tensor
    targets: Tensor
    features: Features
    logits: Tensor
    class_logits: Tensor
    distillation_logits: Tensor | None = None
    each: tuple[Tensor, ...] = ()


class Objective(nn.Module, ABC):
    """One term of a loss, swapped by config like a block.

    Attributes:
        reads: which parts of the final features it reads beside what the head reads.
        weight: its factor in the sum; what is logged under its name is the value without it.
        label_smoothing: share of each target that is spread over all classes, where it has one.
        token: whose classifier it teaches, where a head has two.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    weight: float = 1.0
    label_smoothing: float = 0.0
    token: Token = "class"

    def check(self, where: str) -> None:
        """Raises BuildError where the weight or the label smoothing of the term at `where` is out of range."""
        if not self.weight >= 0:
            raise BuildError(f"{where}.weight: got {self.weight}, must be at least 0")
        if not 0 <= self.label_smoothing <= 1:
            raise BuildError(f"{where}.label_smoothing: got {self.label_smoothing}, must be 0 to 1")

    def setup(self, task: Classification) -> None:
        """Called once when the net is there: checks what it needs of it, and adds projections of its own.

        Raises:
            BuildError: the net has not what it needs.
        """

    def start(self, task: Classification) -> None:
        """Called before training starts, and never for evaluation: loads what no checkpoint holds, as a teacher.

        Raises:
            ConfigError: it cannot be loaded.
        """

    @abstractmethod
    def forward(self, step: Step) -> Tensor:
        """The mean over the batch, a scalar, without the weight."""
