"""Small sets that live in memory as one uint8 tensor: a batch is one indexing, one gather and one normalisation.

On a GPU they live in its memory, and all of that happens there: the same images, bit by bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from framework.data.base import AUGMENT, Batch, ImageData, ImageSet, at_least, seed_of

# Rounds whose draws are kept: a batch has as many as an image has repetitions.
ROUNDS = 8

# A set goes to a GPU where it takes no more than this share of the memory that is free when its loader is made: the net
# is there by then, but neither its gradients nor its activations.
SHARE = 0.25


def square(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """`(size, channels)` of images `(N, H, W)`, `(N, H, W, C)` or `(N, C, H, W)`; None where they are not square."""
    match shape:
        case (_, height, width) if height == width:
            return height, 1
        case (_, height, width, channels) if height == width != channels:
            return height, channels
        case (_, channels, height, width) if height == width != channels:
            return height, channels
    return None


def to_images(array: np.ndarray | Tensor) -> Tensor:
    """A uint8 array in one of the layouts that `square` knows, as a tensor `(N, C, H, W)`."""
    images = torch.as_tensor(array)
    if images.ndim == 3:
        return images[:, None]
    if images.shape[1] == images.shape[2]:
        images = images.permute(0, 3, 1, 2)
    return images.contiguous()


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 images `(N, C, H, W)` at another size, bilinear."""
    if images.shape[-1] == size or not len(images):
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)


def statistics(images: Tensor) -> Batch:
    """Mean and standard deviation of each channel of uint8 images, as values in 0..1; exact, without a float copy."""
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
    share = counts.double() / counts.sum(1, keepdim=True)
    mean = share @ values
    variance = (share * (values - mean[:, None]) ** 2).sum(1)
    # A channel that never changes is left at zero.
    return mean.float(), variance.sqrt().clamp(min=1 / 255).float()


class MemorySet(ImageSet):
    """Images in memory, augmented in batch. An image's draws depend on the run's seed, the round and its index.

    Args:
        images: uint8 `(N, C, H, W)`.
        targets: int64 `(N,)`.
        mean: of each channel.
        std: of each channel.
        crop: pixels of zero padding, out of which a window of the old size is cut at random.
        flip: whether half of the images are mirrored.
    """

    def __init__(
        self, images: Tensor, targets: Tensor, mean: Tensor, std: Tensor, crop: int = 0, flip: bool = False
    ) -> None:
        super().__init__(mean, std)
        self.images = images
        self.targets = targets
        self.crop = crop
        self.flip = flip
        self._drawn: dict[int, Tensor] = {}  # by seed

    def __len__(self) -> int:
        return len(self.images)

    def labels(self) -> Tensor:
        return self.targets

    def plain(self) -> MemorySet:
        return MemorySet(self.images, self.targets, self.mean, self.std)

    def to(self, device: torch.device) -> MemorySet:
        """The same set with its images on `device`, where its batches are made then."""
        moved = copy(self)
        moved._drawn = {}
        for name in ("images", "targets", "mean", "std"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved

    def near(self, device: torch.device) -> MemorySet:
        # Not with Metal: torch has had wrong results of uint8 there, and its memory is the host's anyway.
        if device.type != "cuda" or self.images.nbytes > SHARE * torch.cuda.mem_get_info(device)[0]:
            return self
        return self.to(device)

    def pixels(self, rounds: list[int], indices: list[int]) -> Batch:
        at = torch.tensor(indices)
        if not (self.crop or self.flip):
            return self._take(at.to(self.images.device, non_blocking=True))
        draws = self._draws(rounds[0]).index_select(0, at)
        for number in set(rounds[1:]) - {rounds[0]}:
            here = torch.tensor([each == number for each in rounds])
            draws[here] = self._draws(number)[at[here]]
        # Drawn by the host's generator, so that every device sees the same. What goes over is some kilobytes: CUDA does
        # not make the host wait for that.
        plan = torch.cat([at[:, None], draws], dim=1).to(self.images.device, non_blocking=True)
        images, targets = self._take(plan[:, 0])
        return self._augment(images, plan[:, 1:]), targets

    def _take(self, at: Tensor) -> Batch:
        # On the host this takes a tenth of the time that indexing takes.
        return self.images.index_select(0, at), self.targets.index_select(0, at)

    def _draws(self, number: int) -> Tensor:
        """Shift down, shift right and mirroring of every image in this round: `(N, 3)`."""
        seed = seed_of(AUGMENT, number)
        if seed not in self._drawn:
            while len(self._drawn) >= ROUNDS:
                del self._drawn[next(iter(self._drawn))]
            generator = torch.Generator().manual_seed(seed)
            shifts = torch.randint(2 * self.crop + 1, (len(self), 2), generator=generator)
            mirrored = torch.randint(2, (len(self), 1), generator=generator) * self.flip
            self._drawn[seed] = torch.cat([shifts, mirrored], dim=1)
        return self._drawn[seed]

    def _augment(self, images: Tensor, draws: Tensor) -> Tensor:
        channels, size = images.shape[1:3]
        down, right, mirrored = draws[:, :, None].unbind(1)
        line = torch.arange(size, device=images.device)
        padded = F.pad(images, [self.crop] * 4)
        columns = torch.where(mirrored == 1, line.flip(0), line) + right
        places = ((line + down) * padded.shape[3])[:, :, None] + columns[:, None, :]
        # One gather by place takes half the time of two by rows and columns.
        drawn = padded.flatten(2).gather(2, places.flatten(1)[:, None].expand(-1, channels, -1))
        return drawn.unflatten(2, (size, size))


class MemoryData(ImageData, ABC):
    """A data module whose images live in memory, normalised by the statistics of its training images.

    Args:
        source: what the data is, for messages.
        batch_size: images in a batch, on each device.
        workers: processes that read images, where reading is slow.
        crop: random shift of training images by up to so many pixels.
        flip: whether training images are mirrored at random.
        repeats: how often a training image comes in an epoch, which has as many fewer of them.
    """

    def __init__(
        self, source: str, batch_size: int, workers: int = 0, crop: int = 0, flip: bool = False, repeats: int = 1
    ) -> None:
        at_least(0, crop=crop)
        super().__init__(source, batch_size, workers, repeats)
        self.crop = crop
        self.flip = flip

    @abstractmethod
    def read(self, split: str) -> Batch:
        """All images of `split`, uint8 `(N, C, H, W)` at their final size, and their int64 targets."""

    def build(self, split: str) -> ImageSet:
        images, targets = self.read(split)
        if split == "train":
            return MemorySet(images, targets, *statistics(images), self.crop, self.flip)
        train = self.split("train")
        return MemorySet(images, targets, train.mean, train.std)
