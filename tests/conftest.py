"""What the tests of configs, nets and commands share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
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


@pytest.fixture(autouse=True)
def _no_rank_is_left() -> Iterator[None]:
    """Lightning numbers this process when it starts others; the next test's run would take itself for one of those."""
    yield
    for name in ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def _tiny() -> dict[str, Any]:
    return compose([CONFIGS / "tnt.yaml"])


@pytest.fixture
def tiny(_tiny: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """The composed document of a very small TNT on digits, with dotted settings (`.` as `__`) over it."""

    def make(**settings: Any) -> dict[str, Any]:
        return override(deepcopy(_tiny), {name.replace("__", "."): value for name, value in settings.items()})

    return make
