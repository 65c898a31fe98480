"""What the tests of configs, nets and commands share."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from framework.config import compose, override

REPO = Path(__file__).parent.parent
EXPERIMENTS = REPO / "experiments"

torch.set_num_threads(1)  # pytest-xdist runs one process for each core


@pytest.fixture(scope="session")
def _tiny() -> dict[str, Any]:
    smaller = {
        "model.backbone.dim": 16,
        "model.backbone.pattern": "tnt*2",
        "model.backbone.stem.word_dim": 4,
        "trainer": {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1},
    }
    return compose([EXPERIMENTS / "base/tnt_digits.yaml"], smaller)


@pytest.fixture
def tiny(_tiny: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """The composed document of a very small TNT on digits, with dotted settings (`.` as `__`) over it."""

    def make(**settings: Any) -> dict[str, Any]:
        return override(deepcopy(_tiny), {name.replace("__", "."): value for name, value in settings.items()})

    return make
