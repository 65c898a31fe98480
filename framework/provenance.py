"""Where a run's numbers come from: versions, command, code and machine, written beside them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from blocks.kernels.native import processor
from framework.ablation.state import write_text

PACKAGES = ("torch", "torchvision", "lightning", "torchmetrics", "timm", "jsonargparse", "numpy", "scikit-learn")
ROOT = Path(__file__).resolve().parent.parent


def write_provenance(folder: Path, seed: int) -> None:
    """Adds this start to `provenance.json` of a run folder, and the uncommitted changes of the code to a diff."""
    path = folder / "provenance.json"
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        starts = []
    diff = git("diff", "HEAD")
    name = f"uncommitted-{len(starts)}.diff" if diff else ""
    if diff:
        write_text(folder / name, diff)
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "seed": seed,
        "git_commit": git("rev-parse", "HEAD"),
        "git_diff": name,
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "machine": machine(),
    }
    write_text(path, json.dumps([*starts, start], indent=1))


def machine() -> dict[str, Any]:
    """The hardware that a process can use."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "cuda": torch.version.cuda if gpus else "",
        "system": platform.platform(),
    }


def git(*words: str) -> str:
    """What git says about this program's own code; nothing where it is not a checkout, or there is no git."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def version_of(package: str) -> str:
    """The installed version of a package; empty where there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
