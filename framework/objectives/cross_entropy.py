"""Cross-entropy with class numbers or probabilities."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from framework.objectives.base import Objective, Step


class CrossEntropy(Objective):
    """Cross-entropy between logits and targets.

    Of a head with two classifiers it teaches what is evaluated, their mean; where another term teaches the
    distillation token, it teaches the class token alone, as DeiT does.

    Args:
        label_smoothing: share of each target that is spread over all classes.
        weight: factor in the sum of all terms.
    """

    def __init__(self, label_smoothing: float = 0.0, weight: float = 1.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.weight = weight

    def forward(self, step: Step) -> Tensor:
        return F.cross_entropy(step.class_logits, step.targets, label_smoothing=self.label_smoothing)
