"""DeiT's distillation: logits of a frozen teacher as targets, for the class or the distillation token."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from blocks.base import BuildError
from framework.objectives.base import Objective, Step, Token
from framework.objectives.teachers import Frozen, Teacher

if TYPE_CHECKING:
    from framework.tasks.classification import Classification


class Distillation(Objective, ABC):
    """What both forms share: a teacher that sees the student's very images, augmented and mixed."""

    def __init__(self, teacher: Teacher, token: Token, weight: float) -> None:
        super().__init__()
        self.teacher = teacher
        self.token = token
        self.weight = weight
        self.net: Frozen | None = None

    def setup(self, task: Classification) -> None:
        if self.token == "distillation" and not task.head.distilled:
            raise BuildError(
                f"model.objectives: {type(self).__name__} teaches the distillation token, but "
                f"{type(task.head).__name__} reads none; set head: DistilledHead and prefix: 2 in the stem, "
                "or token: class"
            )

    def start(self, task: Classification) -> None:
        if self.net is None:
            with torch.random.fork_rng(devices=[]):  # its initialisation does not shift the student's draws
                self.net = Frozen(self.teacher.build(task.image, task.num_classes))

    def forward(self, step: Step) -> Tensor:
        assert self.net is not None, "start() makes the teacher"
        student = step.class_logits if self.token == "class" else step.distillation_logits
        assert student is not None
        return self.compare(student, self.net(step.images))

    @abstractmethod
    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of logits `(B, num_classes)` against those of the teacher, a scalar."""


class HardDistillation(Distillation):
    """Cross-entropy with the teacher's decision as the label, without smoothing.

    DeiT's (1 − α)·base + α·distillation is the weights of two terms: `cross_entropy: {weight: 0.5}` beside this one
    with its 0.5.

    Args:
        teacher: the net whose decision is the label.
        token: whose classifier learns it.
        weight: factor in the sum of all terms: DeiT's α.

    Raises:
        BuildError: the head has no distillation token.

    Source: DeiT, arXiv 2012.12877, equation 3; facebookresearch/deit losses.py.
    """

    def __init__(self, teacher: Teacher, token: Token = "distillation", weight: float = 0.5) -> None:
        super().__init__(teacher, token, weight)

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.cross_entropy(student, teacher.argmax(dim=1))


class SoftDistillation(Distillation):
    """The divergence of the student's probabilities from the teacher's, both at temperature τ, times τ².

    DeiT's (1 − α)·base + α·distillation is the weights of two terms: with the paper's α = 0.1 and τ = 3,
    `cross_entropy: {weight: 0.9}` beside this one with `weight: 0.1, tau: 3`.

    Args:
        teacher: the net whose probabilities are the target.
        tau: the temperature.
        normalisation: what divides the sum over batch and classes: `deit`, their product as in the released code;
            `batchmean`, the batch alone, as in Hinton's formula and timm.
        token: whose classifier learns them.
        weight: factor in the sum of all terms: DeiT's α.

    Raises:
        BuildError: the head has no distillation token, or τ is not positive.

    Source: DeiT, arXiv 2012.12877, equation 2; facebookresearch/deit losses.py.
    """

    def __init__(
        self,
        teacher: Teacher,
        tau: float = 1.0,
        normalisation: Literal["deit", "batchmean"] = "deit",
        token: Token = "distillation",
        weight: float = 0.5,
    ) -> None:
        super().__init__(teacher, token, weight)
        if tau <= 0:
            raise BuildError(f"model.objectives: tau must be more than 0, got {tau}")
        self.tau = tau
        self.normalisation = normalisation

    def compare(self, student: Tensor, teacher: Tensor) -> Tensor:
        cold, target = (self._log_probabilities(logits) for logits in (student, teacher))
        total = F.kl_div(cold, target, reduction="sum", log_target=True) * self.tau**2
        return total / (student.numel() if self.normalisation == "deit" else len(student))

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        """In float32 at least: in half precision small probabilities are lost."""
        return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.tau).log_softmax(dim=1)
