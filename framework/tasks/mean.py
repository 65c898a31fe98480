"""Means of what each step gives, which cost a step next to nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Mean(Metric):
    """A mean weighted by batch size, summed up on the device and over all devices at the end.

    Logged once, in the first step of an epoch, it is read, logged and reset by Lightning at the end of it. `self.log`
    in every step and torchmetrics' own MeanMetric give the same numbers, but take longer than a small net's step.
    """

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def add(self, total: Tensor | float, count: int) -> None:
        """What `update` does, without the bookkeeping that torchmetrics puts round it: for all but the first step."""
        self.total.add_(total)  # in place, as torch looks at whatever is assigned to a module
        self.count.add_(count)

    def update(self, total: Tensor | float, count: int) -> None:
        """Adds what the images of a batch add up to."""
        self.add(total, count)

    def compute(self) -> Tensor:
        return self.total / self.count
