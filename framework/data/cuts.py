"""How pictures come to the size of a net: shifted, cut out at random, or the centre of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.data.base import Image

# Up to this size images are shifted and may live in memory; above it they are cut and scaled (DeiT's protocol).
SMALL = 64


class RandomPart:
    """A part of an image, of .08–1 of its area, scaled to `size` and mirrored in half of the cases.

    It is v2.RandomResizedCrop (bicubic) and v2.RandomHorizontalFlip, and draws what they draw. Those look over all that
    may come with an image, which takes half as long as to scale it.
    """

    def __init__(self, size: int, flip: bool) -> None:
        from torchvision.transforms import v2

        self.crop = v2.RandomResizedCrop(size, scale=(0.08, 1.0))
        self.flip = flip

    def __call__(self, pixels: Tensor) -> Tensor:
        drawn = self.crop.make_params([pixels])
        top, left, height, width = (drawn[name] for name in ("top", "left", "height", "width"))
        part = pixels[None, :, top : top + height, left : left + width]
        # As a decoder gives it: else torch reorders it, and what comes out once more.
        part = part.contiguous(memory_format=torch.channels_last)
        scaled = F.interpolate(part, self.crop.size, mode="bicubic", antialias=True)[0]
        return scaled.flip(-1) if self.flip and torch.rand(1) < 0.5 else scaled


def transform_for(image: Image, train: bool, crop: int = 0, flip: bool = False) -> Any:
    """From a uint8 tensor `(C, H, W)` to one of this size; draws come from the global generators.

    Training images of up to `SMALL` pixels are shifted, larger ones are cut out and scaled at random (to .08–1 of
    their area); larger ones are validated on the centre of images enlarged by 1/0.875.

    Args:
        image: the size to give.
        train: whether for training: the arguments behind are for this alone.
        crop: random shift by up to so many pixels, up to `SMALL` pixels.
        flip: whether images are mirrored at random.
    """
    from torchvision.transforms import InterpolationMode, v2

    size, cubic = image.size, InterpolationMode.BICUBIC
    if size > SMALL and train:
        return RandomPart(size, flip)
    steps: list[Any] = [v2.Resize(size if size <= SMALL else int(size / 0.875), cubic), v2.CenterCrop(size)]
    if train and crop:
        steps.append(v2.RandomCrop(size, padding=crop))
    if train and flip:
        steps.append(v2.RandomHorizontalFlip())
    return v2.Compose(steps)
