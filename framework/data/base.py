"""What every data module gives: facts to build a net from, and batches whose order and draws depend on no net.

Data order and augmentation come from generators of their own, seeded from the run's seed, the epoch and the image.
torch's global generator is left alone: a net that draws more numbers at its construction, or has dropout, sees
the same data as the one that it is compared with.
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from math import ceil
from typing import Any, ClassVar, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler

from framework.data.splits import Part
from framework.errors import ConfigError

Batch = tuple[Tensor, Tensor]

# What the random streams are for: the first part of `seed_of`.
ORDER, AUGMENT, MIX, ERASE, REPLACE = 0, 1, 2, 3, 4

PURPOSES = {"train": "training", "val": "validation", "test": "testing"}


@dataclass(frozen=True)
class Image:
    """What a backbone is built for.

    Args:
        size: height and width in pixels.
        channels: 3 for colour, 1 for grey; arrays may have others.
    """

    size: int
    channels: int = 3


def visible(images: Tensor) -> Tensor:
    """Images `(N, C, H, W)` in grey or colour: of 2 channels the first, of more than 3 the first 3."""
    return images[:, : 3 if images.shape[1] > 2 else 1]


def seed_of(stream: int, *parts: int) -> int:
    """A 64-bit seed for one purpose, from the run's seed (which `seed_everything` puts into the environment)."""
    run = int(os.environ.get("PL_GLOBAL_SEED", 0))
    return int(np.random.SeedSequence((stream, run, *parts)).generate_state(1, np.uint64)[0])


def hold_out(labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of nine tenths to train on and of a stratified tenth to validate on: the same ones for every run."""
    # RandomState: unlike the newer generators, its numbers never change between versions of numpy.
    mixed = np.random.RandomState(seed).permutation(len(labels))
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


class Repeats(DistributedSampler[int]):
    """Repeated augmentation: every image several times in a row, each time with draws of its own.

    The copies are dealt out to the devices in turn, so that they are in one step of all of them; an epoch has no more
    images than without repetition, so that it sees a part of the set. The numbers are those of DeiT's sampler, which
    rounds a set down to whole 256s; a smaller one stays whole, as in timm. The keys are `round · count + index` with
    `round = epoch · repeats + copy`. A DistributedSampler, so that Lightning puts none of its own round it.

    Args:
        count: images in the set.
        repeats: how often each comes.
        ranks: number of devices.
        rank: which of them this is.

    Source: Hoffer et al. 2020, arXiv 1901.09335; facebookresearch/deit samplers.py; timm's RepeatAugSampler.
    """

    def __init__(self, count: int, repeats: int, ranks: int = 1, rank: int = 0) -> None:
        super().__init__(cast(Any, range(count)), ranks, rank)
        self.count = count
        self.repeats = repeats

    def __len__(self) -> int:
        whole = self.count // 256 * 256
        return whole // self.num_replicas if whole else ceil(self.count / self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(ORDER, self.epoch))
        order = torch.randperm(self.count, generator=generator)
        places = torch.arange(len(self)) * self.num_replicas + self.rank
        rounds = self.epoch * self.repeats + places % self.repeats
        return iter((rounds * self.count + order[places // self.repeats % self.count]).tolist())


class ImageSet(Dataset[Batch], ABC):
    """The images of one split, read a batch at a time. A plain index is a key of round 0.

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
    def pixels(self, rounds: list[int], indices: list[int]) -> Batch:
        """Augmented uint8 images `(B, C, H, W)` and their int64 targets `(B,)`.

        An image is drawn anew for each round: an epoch, or one of several repetitions in an epoch.
        """

    def labels(self) -> Tensor | None:
        """The int64 targets of all images `(N,)`, where they can be had without reading the images."""
        return None

    def plain(self) -> ImageSet:
        """The same images as they are for validation: nothing is drawn."""
        return self

    def near(self, device: torch.device) -> ImageSet:
        """This set, with its batches made on `device` where that is worth it."""
        return self

    def finish(self, batch: Any) -> Batch:
        """What `__getitems__` gives, made ready in the process that trains: worker processes may leave work to it."""
        return batch

    def unread(self) -> int:
        """How many of the images could not be read up to now."""
        return 0

    def __getitems__(self, keys: list[int]) -> Batch:
        count = len(self)  # asked once: a tensor takes longer to tell than to index
        pixels, targets = self.pixels([key // count for key in keys], [key % count for key in keys])
        return self.normalised(pixels), targets

    def normalised(self, pixels: Tensor) -> Tensor:
        mean, std = (each.to(pixels.device, non_blocking=True)[:, None, None] for each in (self.mean, self.std))
        values = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return values.sub_(255 * mean).div_(255 * std)

    def __getitem__(self, key: int) -> Batch:
        images, targets = self.finish(self.__getitems__([key]))
        return images[0], targets[0]


def own_line(error: ConfigError) -> str:
    """The one line of an error, without the worker process and the traceback that torch puts round it."""
    return str(error).rstrip().rpartition("ConfigError: ")[2]


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
        batches: Any = super().__iter__()
        try:
            for batch in batches:
                self.done += 1
                if len(batch[1]):  # none where no picture of a batch can be read
                    yield cast(ImageSet, self.dataset).finish(batch)
        except ConfigError as error:
            if self.num_workers:  # else the garbage collector does it, where torch may wait for 5 seconds each
                batches._shutdown_workers()
                self._iterator = None
            raise ConfigError(own_line(error)) from None

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
        repeats: how often a training image comes in an epoch, which has as many fewer of them.
    """

    def __init__(self, source: str, batch_size: int, workers: int = 0, repeats: int = 1) -> None:
        at_least(1, batch_size=batch_size, repeats=repeats)
        at_least(0, workers=workers)
        super().__init__()
        self.source = source
        self.batch_size = batch_size
        self.workers = workers
        self.repeats = repeats
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

    def part(self, split: str) -> Part | None:
        """Where the images of `split` come from, without reading them; None where the data does not say."""
        return None

    def teardown(self, stage: str) -> None:
        for split, images in self._splits.items():
            if bad := images.unread():
                print(f"data: {bad} of {len(images)} images for {PURPOSES[split]} could not be read", file=sys.stderr)

    def split(self, split: str) -> ImageSet:
        """The images of `split`: train, val or test; built once. Raises ConfigError where there are none."""
        if split not in self._splits:
            images = self.build(split)
            if not len(images):
                raise ConfigError(f"data: {self.source} has no images for {PURPOSES[split]}")
            self._splits[split] = images
        return self._splits[split]

    def sample(self, n: int) -> Batch:
        """The first `n` training images of epoch 0 and their targets.

        They are as a net sees them, but `visible` and with values in 0..1.
        """
        images = self.split("train")
        pixels, targets = images.__getitems__(list(Order(len(images)))[:n])
        return visible(pixels * images.std[:, None, None] + images.mean[:, None, None]).clamp(0, 1), targets

    def order(self, images: ImageSet, devices: int, rank: int) -> Order | DistributedSampler[int]:
        """The order of the training images. Lightning shares one out over the devices, but no DistributedSampler."""
        return Repeats(len(images), self.repeats, devices, rank) if self.repeats > 1 else Order(len(images))

    def train_dataloader(self) -> DataLoader[Batch]:
        images = self.split("train")
        devices, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        order = self.order(images, devices, rank)
        share = len(order) // devices if isinstance(order, Order) else len(order)
        # A set that fills no second batch keeps its rest, or there might be no batch at all.
        return self._loader(images, order, drop_last=share // self.batch_size > 1)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.split("val"))

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.split("test"))

    def plain_dataloader(self, split: str) -> DataLoader[Batch]:
        """All images of `split`, in their order and without augmentation."""
        return self._loader(self.split(split).plain())

    def _loader(self, images: ImageSet, sampler: Sampler[int] | None = None, drop_last: bool = False) -> DataLoader:
        workers = self.workers if images.slow else 0
        gpu = torch.cuda.is_available()
        if self.trainer:
            device = self.trainer.strategy.root_device
            images, gpu = images.near(device), device.type == "cuda"
        return Loader(
            images,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=drop_last,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=_as_it_is,
            pin_memory=gpu and images.mean.device.type == "cpu",
            # Its own: every iterator draws a seed, and a resumed run makes them at other moments.
            generator=torch.Generator().manual_seed(0),
        )
