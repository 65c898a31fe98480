"""scikit-learn's digits: real images that are in the package, so that everything runs without a download."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from framework.data.base import Batch, Image, at_least
from framework.data.memory import MemoryData, resize
from framework.data.splits import Part


class Digits(MemoryData):
    """scikit-learn's hand-written digits: 1,797 grey images, 1,197 to train, 300 to validate, 300 to test.

    Args:
        size: height and width; the images have 8×8 pixels and are enlarged bilinearly.
        batch_size: images in a batch, on each device.
        crop: random shift of training images by up to so many pixels, at `size`.
    """

    def __init__(self, size: int = 16, batch_size: int = 64, crop: int = 0) -> None:
        at_least(1, size=size)
        super().__init__("Digits", batch_size, crop=crop)
        self.size = size

    @property
    def image(self) -> Image:
        return Image(self.size, channels=1)

    @property
    def num_classes(self) -> int:
        return 10

    @property
    def class_names(self) -> list[str]:
        return [str(digit) for digit in range(10)]

    @cached_property
    def _indices(self) -> dict[str, np.ndarray]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        labels = load_digits().target
        rest, test = train_test_split(np.arange(len(labels)), test_size=300, stratify=labels, random_state=0)
        train, val = train_test_split(rest, test_size=300, stratify=labels[rest], random_state=0)
        return {"train": train, "val": val, "test": test}

    def part(self, split: str) -> Part:
        from sklearn.datasets import load_digits

        indices = self._indices[split]
        return Part("all", len(indices), load_digits().target[indices], indices)

    def read(self, split: str) -> Batch:
        from sklearn.datasets import load_digits

        digits = load_digits()
        indices = self._indices[split]
        images = (digits.images[indices] * (255 / 16)).round().astype(np.uint8)  # values are 0..16
        return resize(torch.from_numpy(images)[:, None], self.size), torch.from_numpy(digits.target[indices])
