"""timm's RandAugment and random erasing, with draws from seeds of our own."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from framework.errors import ConfigError

RAND = re.compile(r"rand(-(m|n|inc|mmax)\d+|-(mstd|p)\d+(\.\d+)?)*")


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """The global generators of torch, numpy and Python seeded, and put back as they were behind."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    # Not torch.manual_seed: it would seed the accelerators' generators too, whose state nobody puts back.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def posterize(picture: Any, bits_to_keep: int, **_: Any) -> Any:
    """The highest bits of every value; 0 bits give black, which Pillow refuses from version 13 on."""
    mask = 256 - (1 << (8 - bits_to_keep))
    return picture.point([value & mask for value in range(256)] * len(picture.getbands()))


def rand_augment(policy: str, size: int, mean: tuple[float, ...]) -> Any:
    """timm's RandAugment of PIL images, as its `create_transform` makes it with bicubic interpolation.

    Args:
        policy: in timm's notation, such as `rand-m9-mstd0.5-inc1`.
        size: height and width of the images.
        mean: of each channel in 0..1: what comes in from outside of an image.

    Raises:
        ConfigError: it is no such policy.
    """
    from PIL import Image
    from timm.data import auto_augment

    if not RAND.fullmatch(policy):
        raise ConfigError(
            f"data.auto_augment: got {policy!r}, must be timm's RandAugment, such as rand-m9-mstd0.5-inc1"
        )
    given = {
        "translate_const": int(size * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
        "interpolation": Image.Resampling.BICUBIC,
    }
    made = auto_augment.rand_augment_transform(policy, given)
    for op in made.ops:
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = posterize
    return made
