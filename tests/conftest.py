"""What the tests of configs, nets and commands share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch

from blocks.kernels import products
from framework.cli import main
from framework.config import compose, override

REPO = Path(__file__).parent.parent
EXPERIMENTS = REPO / "experiments"
CONFIGS = REPO / "tests/configs"

torch.set_num_threads(1)  # pytest-xdist runs several processes

# The processes that tests start import the same libraries again and again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(autouse=True)
def _no_rank_is_left() -> Iterator[None]:
    """Lightning numbers this process when it starts others; the next test's run would take itself for one of those."""
    yield
    for name in ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are by the kernel, without a look at the clock."""
    monkeypatch.setattr(products, "_smallest", lambda: 0.0)


@pytest.fixture(scope="session")
def _tiny() -> dict[str, Any]:
    return compose([CONFIGS / "tnt.yaml"])


@pytest.fixture
def tiny(_tiny: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """The composed document of a very small TNT on digits, with dotted settings (`.` as `__`) over it."""

    def make(**settings: Any) -> dict[str, Any]:
        return override(deepcopy(_tiny), {name.replace("__", "."): value for name, value in settings.items()})

    return make


Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
        return path

    return make


@dataclass
class Result:
    """What a command ended with."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a mistake."""
        assert self.code == 2, f"exit code {self.code}: {self.out}"
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in lines[0] + self.out
        assert len(lines[0]) < 500
        return lines[0]


Cli = Callable[..., Result]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    def run(*words: str | Path) -> Result:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Result(code, *capfd.readouterr())

    return run
