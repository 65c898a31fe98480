"""Pictures that come as PIL images: every mode made RGB or grey, and files that cannot be read put up with."""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from framework.data.augment import drawing_from, rand_augment
from framework.data.base import AUGMENT, ERASE, REPLACE, Batch, Image, ImageSet, seed_of
from framework.errors import ConfigError

# Up to this size images are shifted and may live in memory; above it they are cut and scaled (DeiT's protocol).
SMALL = 64

# ImageNet's statistics, by channels; the grey ones are those of its luminance.
MEAN = {3: (0.485, 0.456, 0.406), 1: (0.449,)}
STD = {3: (0.229, 0.224, 0.225), 1: (0.226,)}

# PIL's modes without colour.
GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")


def read_picture(path: Any) -> Any:
    """The picture in a file, read whole, as it is stored: a `loader` for torchvision's sets, whose own makes it RGB."""
    from PIL import Image as Pictures

    with Pictures.open(path) as picture:
        picture.load()
    return picture


def to_mode(picture: Any, mode: str) -> Any:
    """A PIL image as 8-bit `mode`: "RGB" or "L"; upright as its EXIF tag says, and what is transparent on white.

    16-bit grey values are divided by 257 (PIL's own `convert` cuts off at 255); 32-bit whole numbers are taken for
    8-bit ones up to 255 and for 16-bit ones up to 65535.

    Raises:
        ValueError: nothing says which of its values is white: 32-bit numbers of another range, or fractions.
    """
    from PIL import Image as Pictures

    picture.load()  # a TIFF turns itself here
    picture = _upright(picture)
    if picture.mode == "F":
        raise ValueError("32-bit fractions (mode F) do not say which value is white; store 8- or 16-bit values")
    if picture.mode.startswith("I"):
        picture = Pictures.fromarray(_eight_bits(np.asarray(picture), picture.mode))
    elif picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Pictures.new("RGBA", picture.size, "white")
        picture = Pictures.alpha_composite(white, picture).convert("RGB")
    elif picture.mode not in ("1", "L"):
        picture = picture.convert("RGB")
    return picture if picture.mode == mode else picture.convert(mode)


def _upright(picture: Any) -> Any:
    from PIL import ImageOps
    from PIL.ExifTags import Base

    try:
        turned = picture.getexif().get(Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(picture) if turned else picture
    except Exception:  # broken EXIF data says nothing, and the picture can be used
        return picture


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    most = values.max()
    if mode == "I":
        if values.min() < 0 or most > 65535:
            raise ValueError(f"32-bit values {values.min()}..{most} do not say which value is white; store 16-bit ones")
        if most <= 255:
            return values.astype(np.uint8)
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def transform_for(
    image: Image, train: bool, crop: int = 0, flip: bool = False, auto_augment: str = "", mean: tuple[float, ...] = ()
) -> Any:
    """From a PIL image to a uint8 tensor; draws come from the global generators.

    Training images of up to `SMALL` pixels are shifted, larger ones are cut out and scaled at random (to .08–1 of
    their area); larger ones are validated on the centre of images enlarged by 1/0.875.

    Args:
        image: the size and channels to give.
        train: whether for training: the arguments behind are for this alone.
        crop: random shift by up to so many pixels, up to `SMALL` pixels.
        flip: whether images are mirrored at random.
        auto_augment: RandAugment in timm's notation; empty for none.
        mean: of each channel in 0..1: what RandAugment brings in from outside of an image; ImageNet's by default.
    """
    from torchvision.transforms import InterpolationMode, v2

    size, cubic = image.size, InterpolationMode.BICUBIC
    steps: list[Any]
    if size <= SMALL:
        steps = [v2.Resize(size, cubic), v2.CenterCrop(size)]
        if train and crop:
            steps.append(v2.RandomCrop(size, padding=crop))
    elif train:
        steps = [v2.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=cubic)]
    else:
        steps = [v2.Resize(int(size / 0.875), cubic), v2.CenterCrop(size)]
    if train and flip:
        steps.append(v2.RandomHorizontalFlip())
    if train and auto_augment:
        steps.append(rand_augment(auto_augment, size, mean or MEAN[image.channels]))
    return v2.Compose([*steps, v2.PILToTensor()])


class BadFiles:
    """Files that cannot be read: each is named and counted once, over epochs and worker processes.

    Args:
        count: files that there are.
        limit: how many may be bad.
    """

    def __init__(self, count: int, limit: int) -> None:
        self.limit = limit
        self.met = torch.zeros(count, dtype=torch.bool).share_memory_()  # worker processes write here too

    def __len__(self) -> int:
        return int(self.met.sum())

    def add(self, number: int, name: str, error: Exception) -> None:
        """File `number` cannot be read. Raises ConfigError where that is one too many."""
        new = not self.met[number]
        self.met[number] = True
        bad, reason = len(self), why(error, name)
        if bad > self.limit:
            raise ConfigError(
                f"data: cannot read {name}: {reason}; {bad} {'file is' if bad == 1 else 'files are'} bad, "
                f"data.bad_files allows {self.limit}"
            )
        if new:
            print(
                f"data: cannot read {name}: {reason}; left out ({bad} of at most {self.limit})",
                file=sys.stderr, flush=True,
            )  # fmt: skip


def why(error: Exception, name: str) -> str:
    """Why a file cannot be read, in a few words that do not name it again."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    if "cannot identify image file" in text and name in text:
        return "no image, or of a kind that PIL does not know"
    return text[:200] or type(error).__name__


class PictureSet(ImageSet):
    """Some pictures of a set. One's draws depend on the run's seed, the round and its index.

    In the place of a picture that cannot be read another one is trained on, drawn by round and index; for validation
    it is left out, and the batch is smaller.

    Args:
        source: gives a PIL image and a class number for an index.
        indices: which of them.
        image: the size and channels to give.
        transform: from a PIL image to a uint8 tensor; it draws from the global generators.
        mean: of each channel.
        std: of each channel.
        erase_prob: probability that a rectangle of a training image becomes noise.
        bad_files: how many pictures may be unreadable; one more is an error.
        train: whether they are trained on.
        name_of: what to call the picture of an index of `source`, such as its file.
        targets: their class numbers, where these are known without reading.
    """

    slow = True

    def __init__(
        self,
        source: Any,
        indices: np.ndarray,
        image: Image,
        transform: Any,
        mean: Tensor,
        std: Tensor,
        erase_prob: float = 0.0,
        bad_files: int = 10,
        train: bool = False,
        name_of: Callable[[int], str] = "image {}".format,
        targets: np.ndarray | None = None,
    ) -> None:
        super().__init__(mean, std)
        self.source = source
        self.indices = indices
        self.image = image
        self.mode = "L" if image.channels == 1 else "RGB"
        self.transform = transform
        self.erase_prob = erase_prob if train else 0.0
        self.bad = BadFiles(len(indices), bad_files)
        self.train = train
        self.name_of = name_of
        self.targets = targets

    def __len__(self) -> int:
        return len(self.indices)

    def labels(self) -> Tensor | None:
        return None if self.targets is None else torch.as_tensor(self.targets)

    def plain(self) -> PictureSet:
        plain = copy(self)
        plain.transform, plain.erase_prob, plain.train = transform_for(self.image, train=False), 0.0, False
        return plain

    def unread(self) -> int:
        return len(self.bad)

    def pixels(self, rounds: list[int], indices: list[int]) -> Batch:
        read = [one for one in map(self._one, rounds, indices) if one]
        if not read:
            size, channels = self.image.size, self.image.channels
            return torch.empty(0, channels, size, size, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        pictures, targets = zip(*read, strict=True)
        return torch.stack(pictures), torch.tensor(targets)

    def _one(self, number: int, index: int) -> tuple[Tensor, int] | None:
        found = self._readable(number, index)
        if found is None:
            return None
        with drawing_from(seed_of(AUGMENT, number, index)):
            return self.transform(found[0]), found[1]

    def _readable(self, number: int, index: int) -> tuple[Any, int] | None:
        """The picture and class of an index, or of another one that stands in for it."""
        at, attempt = index, 0
        while True:
            place = int(self.indices[at])
            try:
                picture, target = self.source[place]
                return to_mode(picture, self.mode), int(target)
            except ConfigError:
                raise
            except Exception as error:  # PIL raises a dozen kinds for a damaged file
                self.bad.add(at, self.name_of(place), error)
            if not self.train:
                return None
            if len(self.bad) == len(self):
                raise ConfigError(f"data: none of the {len(self)} images for training can be read")
            at, attempt = seed_of(REPLACE, number, index, attempt) % len(self), attempt + 1

    def __getitems__(self, keys: list[int]) -> Batch:
        images, targets = super().__getitems__(keys)
        if self.erase_prob:
            from timm.data.random_erasing import RandomErasing

            # Behind the normalisation: the noise is that of normalised images.
            erase = RandomErasing(self.erase_prob, mode="pixel", device="cpu")
            for key, image in zip(keys, images, strict=True):
                with drawing_from(seed_of(ERASE, *divmod(key, len(self)))):
                    erase(image)
        return images, targets
