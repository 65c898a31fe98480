"""Nets sharded by FSDP2: the same numbers as whole ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from framework.config import compose
from framework.construct import build_model
from framework.tasks.base import Task

BASE = Path(__file__).parents[1] / "experiments/base"


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    finally:
        distributed.destroy_process_group()


def outcome(task: Task, images: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # stochastic depth
    logits = task(images)
    logits.square().mean().backward()
    grads = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
    whole = {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}
    return {"logits": logits.detach(), **whole}


@pytest.mark.parametrize("config", ["tnt_digits", "next_vit_digits", "revcol_digits"])
def test_a_sharded_net_trains_as_a_whole_one(config: str, mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    task = build_model(compose([BASE / f"{config}.yaml"]))
    images = torch.randn(4, *task.example().shape[1:])
    whole = outcome(copy.deepcopy(task), images)
    task._device_mesh = mesh
    task.configure_model()
    assert all(isinstance(p, DTensor) for p in task.parameters())
    sharded = outcome(task, images)
    assert sharded.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()) + 1e-8)
