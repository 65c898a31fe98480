"""Data modules of pictures: the splits that a source has and those that are held out, and what to build a net for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import numpy as np
import torch

from framework.data.augment import rand_augment
from framework.data.base import Batch, Image, ImageSet, at_least, hold_out
from framework.data.cuts import SMALL, transform_for
from framework.data.memory import MemoryData, statistics
from framework.data.pictures import GREY, MEAN, STD, PictureSet
from framework.data.sources import labels_of, name_of, pictures_of, some
from framework.data.splits import Part
from framework.errors import ConfigError

# Sets in memory take no more than so many bytes for a split, in every process of a run.
MEMORY = 2**30


class PictureData(MemoryData, ABC):
    """Pictures out of files. Where there is no split to validate on, a stratified tenth of the training images
    validates; where there is none to test on, the validation images test.

    Args:
        source: what the data is, for messages.
        size: height and width; 0 keeps that of the pictures, where all have the same.
        batch_size: images in a batch, on each device.
        workers: processes that read images.
        crop: random shift of training images of up to 64 pixels, by up to so many pixels.
        flip: whether training images are mirrored at random.
        auto_augment: RandAugment of training images in timm's notation; empty for none.
        erase_prob: probability that a rectangle of a training image becomes noise.
        repeats: how often a training image comes in an epoch, which has as many fewer of them.
        bad_files: how many pictures of a split may be unreadable.
        split_seed: draws the tenth that is held out.
    """

    def __init__(
        self,
        source: str,
        size: int,
        batch_size: int,
        workers: int,
        crop: int,
        flip: bool,
        auto_augment: str,
        erase_prob: float,
        repeats: int,
        bad_files: int,
        split_seed: int,
    ) -> None:
        at_least(0, size=size, bad_files=bad_files, split_seed=split_seed)
        super().__init__(source, batch_size, workers, crop, flip, repeats)
        if not 0 <= erase_prob <= 1:
            raise ConfigError(f"data.erase_prob: got {erase_prob}, must be 0 to 1")
        if auto_augment:
            rand_augment(auto_augment, SMALL, MEAN[3])  # a wrong one is an error here, not when training starts
        self.size = size
        self.auto_augment = auto_augment
        self.erase_prob = erase_prob
        self.bad_files = bad_files
        self.split_seed = split_seed
        self._looked: tuple[int, int] | None = None

    @abstractmethod
    def _open(self, split: str) -> Any:
        """What holds a split, a map-style set of PIL images and class numbers; None where there is none. All classes
        are in its `labels`, and its `name_of(index)` says what a message calls a picture, or `sources.py` knows both.
        """

    @property
    def image(self) -> Image:
        size, channels = self._look()
        return Image(self.size or size, channels)

    @property
    def _in_memory(self) -> bool:
        return False

    def read(self, split: str) -> Batch:
        from torchvision.transforms import InterpolationMode, v2

        size = self.image.size
        # Bilinear, as all sets in memory.
        steps = [v2.Resize(size, InterpolationMode.BILINEAR), v2.CenterCrop(size)]
        images = self._pictures(split, v2.Compose(steps), torch.zeros(1), torch.ones(1), train=False)
        return images.pixels([0] * len(images), list(range(len(images))))

    def build(self, split: str) -> ImageSet:
        train = split == "train"
        if self._in_memory and not (train and (self.auto_augment or self.erase_prob)):
            return super().build(split)
        channels = self.image.channels
        mean, std = torch.tensor(MEAN[channels]), torch.tensor(STD[channels])
        if self._in_memory:
            mean, std = statistics(self.read(split)[0])
        transform, augment = transform_for(self.image, train, self.crop, self.flip), None
        if train and self.auto_augment:
            augment = rand_augment(self.auto_augment, self.image.size, tuple(mean.tolist()))
        return self._pictures(split, transform, mean, std, train, augment)

    def _pictures(
        self, split: str, transform: Any, mean: torch.Tensor, std: torch.Tensor, train: bool, augment: Any = None
    ) -> PictureSet:
        source, indices = self._part(split)
        labels = labels_of(source)
        return PictureSet(
            pictures_of(source),
            indices,
            self.image,
            transform,
            mean,
            std,
            self.erase_prob,
            self.bad_files,
            train,
            partial(name_of, source, self.source),
            None if labels is None else labels[indices],
            augment,
        )

    def part(self, split: str) -> Part:
        origin, indices = self._where(split)
        source = self._open(origin)
        labels = labels_of(source)
        if indices is not None and labels is not None:
            labels = labels[indices]
        return Part(origin, len(source) if indices is None else len(indices), labels, indices)

    def _where(self, split: str) -> tuple[str, np.ndarray | None]:
        """The stored split in which a split lies, and its indices there; None for all of it."""
        if split == "test":
            return self._where("val") if self._open("test") is None else ("test", None)
        if self._open("val") is not None:
            return split, None
        train = self._open("train")
        labels = labels_of(train)
        rest, held = hold_out(np.zeros(len(train)) if labels is None else labels, self.split_seed)
        return "train", rest if split == "train" else held

    def _part(self, split: str) -> tuple[Any, np.ndarray]:
        """What holds a split, and its indices there."""
        origin, indices = self._where(split)
        source = self._open(origin)
        return source, np.arange(len(source)) if indices is None else indices

    def _look(self, rgb: bool = False) -> tuple[int, int]:
        """Size (0: they differ) and channels, after a look at a few of the training pictures.

        Args:
            rgb: whether grey pictures are to be in colour.
        """
        if self._looked:
            return self._looked
        source = self._open("train")
        if not len(source):
            raise ConfigError(f"data: {self.source} has no images for training")
        places = np.linspace(0, len(source) - 1, min(len(source), 8)).astype(int)
        pictures = [picture for picture, _ in some(source, self.source, places.tolist(), len(places))]
        sizes = sorted({picture.size for picture in pictures})
        same = len(sizes) == 1 and sizes[0][0] == sizes[0][1]
        if not self.size and not same:
            shown = ", ".join(f"{height}×{width}" for width, height in sizes[:3])
            raise ConfigError(
                f"data.size: the images of {self.source} do not share one square size ({shown}); give one, such as 224"
            )
        grey = not rgb and all(picture.mode in GREY for picture in pictures)
        self._looked = sizes[0][0] if same else 0, 1 if grey else 3
        return self._looked
