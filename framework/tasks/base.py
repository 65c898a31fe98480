"""The base of all tasks: what commands and studies rely on."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning.pytorch import LightningModule
from torch import Tensor

from framework.backbones import Backbone


class Task(LightningModule, ABC):
    """A LightningModule round a backbone.

    Attributes:
        backbone: the net under it.
    """

    backbone: Backbone

    @abstractmethod
    def read_parts(self) -> frozenset[str]:
        """Which parts of the backbone's final features this task reads."""

    @abstractmethod
    def example(self, batch: int = 1) -> Tensor:
        """Images of the size that the net was built for, on the net's device."""
