"""Optimizers and schedules, where they differ from torch's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from framework.optim import OneCycle
from framework.run import train


def rates(make: Callable[[torch.optim.Optimizer], LRScheduler], steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.7)
    schedule = make(optimizer)
    found = []
    for step in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps - 1:
            schedule.step()
    return found


@pytest.mark.parametrize("steps", [2, 3, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3, 0.9])
def test_one_cycle_is_that_of_torch(steps: int, warmup: float) -> None:
    ours = rates(lambda optimizer: OneCycle(warmup).build(optimizer, steps, 1), steps)
    theirs = rates(lambda optimizer: OneCycleLR(
        optimizer, 0.7, total_steps=steps, pct_start=warmup, final_div_factor=1e4, cycle_momentum=False), steps
    )  # fmt: skip
    assert ours == pytest.approx(theirs, abs=1e-15)


def test_one_cycle_without_a_way_down() -> None:
    assert rates(lambda optimizer: OneCycle(1.0).build(optimizer, 5, 1), 5)[-1] == pytest.approx(0.7)


def test_gradients_are_clipped_in_mixed_precision(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Which Lightning refuses for fused optimizers."""
    document = tiny(trainer__gradient_clip_val=1.0, trainer__precision="bf16-mixed", trainer__fast_dev_run=True)
    assert train(tmp_path, document, bar=False).global_step == 1
