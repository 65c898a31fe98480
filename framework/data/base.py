"""What every data module gives: facts to build a net from, and batches whose order and draws depend on no net.

Data order and augmentation come from generators of their own, seeded from the run's seed, the epoch and the image.
torch's global generator is left alone: a net that draws more numbers at its construction, or has dropout, sees
the same data as the one that it is compared with.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from framework.errors import ConfigError

Batch = tuple[Tensor, Tensor]

# What the random streams are for: the first part of `seed_of`.
ORDER, AUGMENT, MIX = 0, 1, 2

PURPOSES = {"train": "training", "val": "validation", "test": "testing"}


@dataclass(frozen=True)
class Image:
    """What a backbone is built for.

    Args:
        size: height and width in pixels.
        channels: 3 for colour, 1 for grey.
    """

    size: int
    channels: int = 3


def seed_of(stream: int, *parts: int) -> int:
    """A 64-bit seed for one purpose, from the run's seed (which `seed_everything` puts into the environment)."""
    run = int(os.environ.get("PL_GLOBAL_SEED", 0))
    return int(np.random.SeedSequence((stream, run, *parts)).generate_state(1, np.uint64)[0])


def hold_out(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of nine tenths to train on and of a stratified tenth to validate on: the same ones for every seed."""
    # RandomState: unlike the newer generators, its numbers never change between versions of numpy.
    mixed = np.random.RandomState(0).permutation(len(labels))
    by_class = mixed[np.argsort(labels[mixed], kind="stable")]
    held = by_class[::10]
    return np.setdiff1d(by_class, held), np.sort(held)


def at_least(least: int, **values: int) -> None:
    """Raises ConfigError where one of the arguments is less."""
    for name, value in values.items():
        if value < least:
            raise ConfigError(f"data.{name}: got {value}, must be at least {least}")


class Order(Sampler[int]):
    """A random order that depends on the run's seed and the epoch alone; Lightning calls `set_epoch`.

    It yields keys `epoch · count + index`: so the epoch reaches the data set in whatever process that lives.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(ORDER, self.epoch))
        order = torch.randperm(self.count, generator=generator) + self.epoch * self.count
        return iter(order.tolist())


class ImageSet(Dataset[Batch], ABC):
    """The images of one split, read a batch at a time. A plain index is a key of epoch 0.

    Args:
        mean: of each channel, of values in 0..1.
        std: of each channel.

    Attributes:
        slow: whether reading takes long enough to give it worker processes.
    """

    slow: ClassVar[bool] = False

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean = mean
        self.std = std

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def pixels(self, epoch: int, indices: list[int]) -> Batch:
        """Augmented uint8 images `(B, C, H, W)` and their int64 targets `(B,)`."""

    def __getitems__(self, keys: list[int]) -> Batch:
        pixels, targets = self.pixels(keys[0] // len(self), [key % len(self) for key in keys])
        return pixels.float().sub_(255 * self.mean[:, None, None]).div_(255 * self.std[:, None, None]), targets

    def __getitem__(self, key: int) -> Batch:
        images, targets = self.__getitems__([key])
        return images[0], targets[0]


def _as_it_is(batch: Any) -> Any:
    return batch


class _Rest:
    """The batches of a loader's sampler, without those that a resumed epoch has had; what is skipped is not read."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.skip = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        # A generator: torch makes two of them for worker processes, and only the one that is used may skip.
        skip, self.skip = self.skip, 0
        yield from islice(iter(self.batches), skip, None)


class Loader(DataLoader[Batch]):
    """A DataLoader that a run can go on with in the midst of an epoch: Lightning stores its state in checkpoints."""

    done = 0

    @cached_property
    def _index_sampler(self) -> Any:
        return _Rest(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        self.done = self._index_sampler.skip
        for batch in super().__iter__():
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": getattr(self._order, "epoch", 0), "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        # With worker processes the first batches are asked for before Lightning calls set_epoch.
        whole = state["done"] >= len(self)
        self._index_sampler.skip = 0 if whole else state["done"]
        if hasattr(self._order, "set_epoch"):
            self._order.set_epoch(state["epoch"] + whole)

    @property
    def _order(self) -> Any:
        """The sampler under the batches; over several devices Lightning puts one of its own round ours."""
        return self.batch_sampler.sampler if isinstance(self.batch_sampler, BatchSampler) else self.sampler


class ImageData(LightningDataModule, ABC):
    """Images with one class each, in three splits. Batches are `(images, targets)`: normalised float32
    `(B, C, H, W)` and int64 `(B,)`.

    Args:
        source: what the data is, for messages.
        batch_size: images in a batch, on each device.
        workers: processes that read images, where reading is slow.
    """

    def __init__(self, source: str, batch_size: int, workers: int = 0) -> None:
        at_least(1, batch_size=batch_size)
        at_least(0, workers=workers)
        super().__init__()
        self.source = source
        self.batch_size = batch_size
        self.workers = workers
        self._splits: dict[str, ImageSet] = {}

    @property
    @abstractmethod
    def image(self) -> Image:
        """Size and channels of the images."""

    @property
    @abstractmethod
    def num_classes(self) -> int: ...

    @property
    @abstractmethod
    def class_names(self) -> list[str]: ...

    @abstractmethod
    def build(self, split: str) -> ImageSet:
        """The images of `split`: train, val or test."""

    def split(self, split: str) -> ImageSet:
        """The images of `split`: train, val or test; built once. Raises ConfigError where there are none."""
        if split not in self._splits:
            images = self.build(split)
            if not len(images):
                raise ConfigError(f"data: {self.source} has no images for {PURPOSES[split]}")
            self._splits[split] = images
        return self._splits[split]

    def sample(self, n: int) -> Batch:
        """The first `n` training images of epoch 0 as a net sees them, but with values in 0..1; and their targets."""
        images = self.split("train")
        pixels, targets = images.__getitems__(list(Order(len(images)))[:n])
        return (pixels * images.std[:, None, None] + images.mean[:, None, None]).clamp(0, 1), targets

    def train_dataloader(self) -> DataLoader[Batch]:
        images = self.split("train")
        devices = self.trainer.world_size if self.trainer else 1
        # A set that fills no second batch keeps its rest, or there might be no batch at all.
        drop_last = len(images) // (self.batch_size * devices) > 1
        return self._loader(images, Order(len(images)), drop_last)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.split("val"))

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.split("test"))

    def _loader(self, images: ImageSet, sampler: Sampler[int] | None = None, drop_last: bool = False) -> DataLoader:
        workers = self.workers if images.slow else 0
        return Loader(
            images,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            # Its own: every iterator draws a seed, and a resumed run makes them at other moments.
            generator=torch.Generator().manual_seed(0),
        )
