"""timm's RandAugment and random erasing, with draws from seeds of our own."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import numpy as np
import torch

from framework.data.batched import NAMES, NONE
from framework.errors import ConfigError

RAND = re.compile(r"rand(-(m|n|inc|mmax)\d+|-(mstd|p)\d+(\.\d+)?)*")


@contextmanager
def own_draws() -> Iterator[None]:
    """The global generators of torch, numpy and Python are put back as they were behind, whoever seeds them within.

    That takes many times as long as to seed them: it is done once for a batch.
    """
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])


def seed_torch(seed: int) -> None:
    # Not torch.manual_seed: it would seed the accelerators' generators too, whose state nobody puts back.
    torch.default_generator.manual_seed(seed)


def seed_timm(seed: int) -> None:
    """The generators that timm draws from."""
    np.random.seed(seed % 2**32)
    random.seed(seed)


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


def noted(policy: Any) -> Any:
    """The same policy, which changes no picture: given a list, it adds the steps that it would take.

    It draws the same numbers. A step is a place in `batched.NAMES` and an argument.
    """
    made = copy(policy)
    made.ops = [copy(op) for op in policy.ops]
    for op in made.ops:
        op.aug_fn = partial(_note, NAMES.index(op.name.removesuffix("Increasing")))
    return made


def _note(number: int, steps: list[tuple[float, float]], argument: float = 0.0, **_: Any) -> Any:
    steps.append((number, argument))
    return steps


def as_tensor(steps: list[list[tuple[float, float]]], layers: int) -> torch.Tensor:
    """The steps of each image, float64 `(B, layers, 2)`."""
    filled = [[*own, *[(float(NONE), 0.0)] * (layers - len(own))] for own in steps]
    return torch.tensor(filled, dtype=torch.float64).view(len(steps), layers, 2)


class Box:
    """In the place of an image `(C, H, W)`: remembers which part of it timm's RandomErasing writes to.

    Attributes:
        place: top, left, height and width; None where nothing is erased.
    """

    dtype = torch.float32

    def __init__(self, channels: int, size: int) -> None:
        self.shape = (channels, size, size)
        self.place: tuple[int, int, int, int] | None = None

    def size(self) -> tuple[int, int, int]:
        return self.shape

    def __setitem__(self, key: tuple[slice, slice, slice], value: object) -> None:
        _, rows, columns = key
        self.place = rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start
