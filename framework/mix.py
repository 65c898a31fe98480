"""Mixup and CutMix of a batch, with draws that depend on the run's seed and the step alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from framework.data.base import MIX, seed_of
from framework.errors import ConfigError


class Mix(ABC):
    """Mixes the images and targets of a training batch."""

    @abstractmethod
    def __call__(self, images: Tensor, targets: Tensor, num_classes: int, step: int) -> tuple[Tensor, Tensor]:
        """Images `(B, C, H, W)` and class numbers `(B,)` to mixed images and targets, perhaps `(B, num_classes)`."""


@dataclass(frozen=True)
class NoMix(Mix):
    """Each image by itself."""

    def __call__(self, images: Tensor, targets: Tensor, num_classes: int, step: int) -> tuple[Tensor, Tensor]:
        return images, targets


@dataclass(frozen=True)
class MixupCutmix(Mix):
    """timm's Mixup and CutMix: one of both for each batch, with the batch in reverse order as partner.

    Args:
        mixup_alpha: of the Beta distribution of Mixup's share; 0 turns Mixup off.
        cutmix_alpha: of the Beta distribution of CutMix's area; 0 turns CutMix off.
        prob: probability that a batch is mixed at all.
        switch_prob: probability of CutMix where both are on.
        label_smoothing: share of each target that is spread over all classes.

    Raises:
        ConfigError: both are off, or a probability or a share is none.

    Source: arXiv 1710.09412 and 1905.04899, with DeiT's defaults (arXiv 2012.12877, table 9), by timm.data.Mixup.
    """

    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    prob: float = 1.0
    switch_prob: float = 0.5
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.mixup_alpha <= 0 and self.cutmix_alpha <= 0:
            raise ConfigError("model.mix: mixup_alpha and cutmix_alpha are both 0; for no mixing use NoMix")
        for name in ("prob", "switch_prob", "label_smoothing"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ConfigError(f"model.mix.{name}: got {value}, must be 0 to 1")

    def __call__(self, images: Tensor, targets: Tensor, num_classes: int, step: int) -> tuple[Tensor, Tensor]:
        from timm.data import Mixup

        if len(images) % 2:  # the partner of the middle image would be itself, and timm refuses it
            images, targets = images[:-1], targets[:-1]
        mixup = Mixup(
            self.mixup_alpha, self.cutmix_alpha, prob=self.prob, switch_prob=self.switch_prob,
            label_smoothing=self.label_smoothing, num_classes=num_classes,
        )  # fmt: skip
        before = np.random.get_state()
        np.random.seed(seed_of(MIX, step) % 2**32)  # what timm draws from
        try:
            return mixup(images.clone(), targets)
        finally:
            np.random.set_state(before)
