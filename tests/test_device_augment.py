"""Sets in memory on another device: the same images, made where the set lives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from framework.data import Digits
from framework.data.memory import MemorySet

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def run_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def images(channels: int = 3, size: int = 7, count: int = 60) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def memory_set(crop: int = 2, flip: bool = True, channels: int = 3) -> MemorySet:
    found = images(channels)
    return MemorySet(
        found, torch.arange(60) % 4, torch.full((channels,), 0.4), torch.full((channels,), 0.2), crop, flip
    )


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("crop", "flip"), [(2, True), (2, False), (0, True)])
def test_windows_are_those_that_were_drawn(crop: int, flip: bool, channels: int) -> None:
    train = memory_set(crop, flip, channels)
    rounds, indices = [0, 1, 0, 2, 1] * 12, [(7 * i) % 60 for i in range(60)]
    pixels, targets = train.pixels(rounds, indices)
    assert pixels.dtype == torch.uint8
    changed = 0
    for at, (number, index) in enumerate(zip(rounds, indices, strict=True)):
        down, right, mirrored = train._draws(number)[index].tolist()
        padded = torch.zeros(channels, 7 + 2 * crop, 7 + 2 * crop, dtype=torch.uint8)
        padded[:, crop : crop + 7, crop : crop + 7] = train.images[index]
        window = padded[:, down : down + 7, right : right + 7]
        assert torch.equal(pixels[at], window.flip(2) if mirrored else window)
        assert targets[at] == index % 4
        changed += not torch.equal(pixels[at], train.images[index])
    assert changed > 20


@pytest.mark.parametrize(("crop", "flip"), [(2, True), (0, False)])
def test_a_moved_set_gives_the_same_batches(crop: int, flip: bool) -> None:
    train = memory_set(crop, flip)
    moved = train.to(CPU)
    assert moved is not train
    assert moved._drawn is not train._drawn
    rounds, indices = [3] * 30 + [4] * 30, list(range(59, -1, -1))
    for one, other in zip(train.pixels(rounds, indices), moved.pixels(rounds, indices), strict=True):
        assert torch.equal(one, other)
    keys = [60 * number + index for number, index in zip(rounds, indices, strict=True)]
    assert torch.equal(train.__getitems__(keys)[0], moved.__getitems__(keys)[0])


@pytest.mark.parametrize(("crop", "flip"), [(2, True), (0, False)])
def test_batches_are_made_on_the_device(crop: int, flip: bool) -> None:
    """Tensors without values, on a GPU that need not be there: what mixes devices is an error."""
    with FakeTensorMode():
        found = torch.zeros(60, 3, 7, 7, dtype=torch.uint8)
        train = MemorySet(found, torch.zeros(60, dtype=torch.int64), torch.zeros(3), torch.ones(3), crop, flip)
        pixels, targets = train.to(torch.device("cuda")).__getitems__([61, 60, 70])
        assert pixels.device.type == targets.device.type == "cuda"
        assert (pixels.shape, pixels.dtype) == ((3, 3, 7, 7), torch.float32)
        assert train.__getitems__([61, 60, 70])[0].device == CPU


def test_no_draws_for_validation() -> None:
    train = memory_set()
    plain = train.plain()
    pixels, targets = plain.pixels([5] * 60, list(range(60)))
    assert torch.equal(pixels, train.images)
    assert torch.equal(targets, train.labels())
    assert not torch.equal(train.pixels([5] * 60, list(range(60)))[0], train.images)


def test_a_set_moves_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    train = memory_set()
    moved: list[torch.device] = []
    monkeypatch.setattr(MemorySet, "to", lambda self, device: moved.append(device) or train)
    size = train.images.nbytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * size - 1, 80 << 30))
    assert train.near(torch.device("cuda", 1)) is train
    assert train.near(CPU) is train
    assert train.near(torch.device("mps")) is train
    assert moved == []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * size, 80 << 30))
    train.near(torch.device("cuda", 1))
    assert moved == [torch.device("cuda", 1)]


def trainer(device: str) -> Any:
    return SimpleNamespace(world_size=1, global_rank=0, strategy=SimpleNamespace(root_device=torch.device(device)))


def test_loaders_take_the_set_to_the_trainers_device(monkeypatch: pytest.MonkeyPatch) -> None:
    # Pinning is for what lies in the host's memory; torch refuses to pin anything else.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(MemorySet, "near", lambda self, device: self.to(device))
    data = Digits(size=8, crop=1)
    assert data.train_dataloader().pin_memory
    data.trainer = trainer("meta")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert loader.dataset.images.device.type == "meta"
        assert not loader.pin_memory
    assert data.split("train").images.device == CPU, "what else reads the set finds it on the host"
    assert data.sample(4)[0].device == CPU


def test_on_the_host_nothing_changes() -> None:
    data = Digits(size=8, crop=1)
    before = next(iter(data.train_dataloader()))
    data.trainer = trainer("cpu")
    loader = data.train_dataloader()
    assert loader.dataset is data.split("train")
    assert all(torch.equal(one, other) for one, other in zip(before, next(iter(loader)), strict=True))
