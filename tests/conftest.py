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
CONFIGS = REPO / "tests/configs"

torch.set_num_threads(1)  # pytest-xdist runs one process for each core


@pytest.fixture(scope="session")
def _tiny() -> dict[str, Any]:
    return compose([CONFIGS / "tnt.yaml"])


@pytest.fixture
def tiny(_tiny: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """The composed document of a very small TNT on digits, with dotted settings (`.` as `__`) over it."""

    def make(**settings: Any) -> dict[str, Any]:
        return override(deepcopy(_tiny), {name.replace("__", "."): value for name, value in settings.items()})

    return make
