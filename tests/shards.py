"""Shards to write, and what is read of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image as Pictures

from framework.data import WebDataset
from framework.data import shards as module
from framework.errors import ConfigError


def picture(number: int, side: int = 8) -> bytes:
    """A picture that says which one it is."""
    file = io.BytesIO()
    Pictures.new("RGB", (side, side), (number, 255 - number, 7)).save(file, "png")
    return file.getvalue()


def write(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(first: int, count: int, classes: int = 3) -> dict[str, bytes]:
    """Members of the pictures `first`, `first + 1` and so on."""
    found = {}
    for n in range(first, first + count):
        found |= {f"{n:04}.png": picture(n), f"{n:04}.cls": str(n % classes).encode()}
    return found


SIZES = (20, 7, 30, 4)


def data_of(folder: Path, **arguments: Any) -> WebDataset:
    plain = {
        "train": str(folder / "train-{00..03}.tar"),
        "val": str(folder / "val-*.tar"),
        "size": 8,
        "workers": 0,
        "crop": 0,
        "flip": False,
        "batch_size": 31,
    }
    return WebDataset(**{**plain, **arguments})


def on_rank(data: WebDataset, rank: int, ranks: int) -> Any:
    data.trainer = SimpleNamespace(
        world_size=ranks, global_rank=rank, strategy=SimpleNamespace(root_device=torch.device("cpu"))
    )
    return data.train_dataloader()


def numbers(data: WebDataset, batches: Any) -> list[int]:
    """Which pictures these are."""
    found: list[int] = []
    mean, std = data.split("train").mean, data.split("train").std
    for images, targets in batches:
        red = ((images[:, 0] * std[0] + mean[0]) * 255).round().int()
        assert torch.equal(red.amin((1, 2)), red.amax((1, 2))), "one colour"
        assert torch.equal(red[:, 0, 0] % 3, targets.int())
        found += red[:, 0, 0].tolist()
    return found


def error_of(folder: Path, **arguments: Any) -> str:
    """The message with which the data, or reading all of it, ends."""

    def use() -> None:
        data = data_of(folder, **arguments)
        _ = data.image, data.num_classes, data.class_names
        for split in ("train", "val", "test"):
            images = data.split(split)
            numbers(data, [images.__getitems__(list(range(len(images))))])

    with pytest.raises(ConfigError) as caught:
        use()
    message = str(caught.value)
    assert "\n" not in message
    return message


def fill(folder: Path) -> Path:
    """61 pictures in 4 shards to train on, numbered from 0; 9 in one to validate on, from 100."""
    for number, count in enumerate(SIZES):
        write(folder / f"train-{number:02}.tar", samples(sum(SIZES[:number]), count))
    write(folder / "val-0.tar", samples(100, 9))
    return folder


def settle(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A seed for the order, and a folder of its own for the shards' counts."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr(module, "cache_folder", lambda: cache)
