"""Pictures that come as PIL images: every mode made RGB or grey, and files that cannot be read put up with.

What is done to a picture on its way: it is decoded, cut out and mirrored, goes through RandAugment, is normalised, and
a part of it is erased. Where a run has a GPU, the last three happen there, a batch at a time.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from framework.data.augment import Box, as_tensor, noted, own_draws, seed_timm, seed_torch
from framework.data.base import AUGMENT, ERASE, REPLACE, Batch, Image, ImageSet, seed_of
from framework.data.batched import rand_augment_batch
from framework.data.cuts import transform_for
from framework.errors import ConfigError

# ImageNet's statistics, by channels; the grey ones are those of its luminance.
MEAN = {3: (0.485, 0.456, 0.406), 1: (0.449,)}
STD = {3: (0.229, 0.224, 0.225), 1: (0.226,)}

# What torchvision calls the modes that pictures are made.
COLOURS = {"L": "GRAY", "RGB": "RGB"}

# PIL's modes without colour.
GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N", "F")


def read_picture(path: Any) -> Any:
    """The picture in a file, as it is stored; it is decoded when somebody asks for its pixels, see `decoded`.

    A `loader` for torchvision's sets, whose own makes it RGB.
    """
    from PIL import Image as Pictures

    if not hasattr(path, "read"):
        with open(path, "rb") as file:
            path = io.BytesIO(file.read())
    return Pictures.open(path)


def decoded(picture: Any, mode: str) -> Tensor:
    """A PIL image as a uint8 tensor `(C, H, W)` of `mode`, as `to_mode` has it.

    A JPEG file that only needs decoding goes through torchvision's decoder where that is there, which gives the same
    values: the detour over PIL's image takes half as long again.
    """
    from torchvision.io import ImageReadMode
    from torchvision.transforms.v2.functional import pil_to_tensor

    file = getattr(picture, "fp", None)
    plain = picture.format == "JPEG" and picture.mode in ("L", mode) and not turned(picture)
    if plain and isinstance(file, io.BytesIO):
        stored = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
        try:
            # Not torchvision.io.decode_jpeg: from 0.29 on that warns, for each picture, that it is to go some day.
            return torch.ops.image.decode_jpeg(stored, getattr(ImageReadMode, COLOURS[mode]).value, False)
        except (AttributeError, RuntimeError):
            pass  # without that decoder, or with a damaged file: PIL says in fewer words what is wrong
    return pil_to_tensor(to_mode(picture, mode))


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


def turned(picture: Any) -> bool:
    """Whether its EXIF tag says that it does not lie upright."""
    from PIL.ExifTags import Base

    try:
        return bool(picture.getexif().get(Base.Orientation, 1) != 1)
    except Exception:  # broken EXIF data says nothing, and the picture can be used
        return False


def _upright(picture: Any) -> Any:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(picture) if turned(picture) else picture
    except Exception:  # as above
        return picture


def _eight_bits(values: np.ndarray, mode: str) -> np.ndarray:
    most = values.max()
    if mode == "I":
        if values.min() < 0 or most > 65535:
            raise ValueError(f"32-bit values {values.min()}..{most} do not say which value is white; store 16-bit ones")
        if most <= 255:
            return values.astype(np.uint8)
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


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
    if "cannot identify image file" in text:
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
        transform: from a uint8 tensor to another one of that size; it draws from the global generators.
        mean: of each channel.
        std: of each channel.
        erase_prob: probability that a rectangle of a training image becomes noise.
        bad_files: how many pictures may be unreadable; one more is an error.
        train: whether they are trained on.
        name_of: what to call the picture of an index of `source`, such as its file.
        targets: their class numbers, where these are known without reading.
        augment: timm's RandAugment of training images; None for none.
    """

    slow = True
    device: torch.device | None = None  # the GPU on which batches are finished

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
        augment: Any = None,
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
        self.augment = augment if train else None

    def __len__(self) -> int:
        return len(self.indices)

    def labels(self) -> Tensor | None:
        return None if self.targets is None else torch.as_tensor(self.targets)

    def plain(self) -> PictureSet:
        plain = copy(self)
        plain.transform, plain.augment = transform_for(self.image, train=False), None
        plain.erase_prob, plain.train = 0.0, False
        return plain

    def near(self, device: torch.device) -> PictureSet:
        return self.to(device) if device.type == "cuda" else self

    def to(self, device: torch.device) -> PictureSet:
        """The same set with its batches finished on `device`: up to rounding the same images, but other noise."""
        moved = copy(self)
        moved.device = device
        moved.augment = self.augment and noted(self.augment)
        return moved

    def unread(self) -> int:
        return len(self.bad)

    def pixels(self, rounds: list[int], indices: list[int]) -> Batch:
        keys = [number * len(self) + index for number, index in zip(rounds, indices, strict=True)]
        pixels, targets = self._pixels(keys, self._seeds(AUGMENT, keys))
        return pixels.contiguous(), targets

    def _pixels(self, keys: list[int], seeds: list[int]) -> Batch:
        """Images, the channels last, as they are decoded, and their targets."""
        shape = len(keys), self.image.channels, self.image.size, self.image.size
        pixels = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)
        targets: list[int] = []
        with own_draws():
            for key, seed in zip(keys, seeds, strict=True):
                if found := self._readable(*divmod(key, len(self))):
                    pixels[len(targets)] = self._drawn(found[0], seed)
                    targets.append(found[1])
        return pixels[: len(targets)], torch.tensor(targets, dtype=torch.int64)

    def _drawn(self, image: Tensor, seed: int) -> Tensor:
        from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

        seed_torch(seed)
        image = self.transform(image)
        if not self.augment or self.device:
            return image
        seed_timm(seed)
        return pil_to_tensor(self.augment(to_pil_image(image)))

    def _readable(self, number: int, index: int) -> tuple[Tensor, int] | None:
        """The picture and class of an index, or of another one that stands in for it."""
        at, attempt = index, 0
        while True:
            place = int(self.indices[at])
            try:
                picture, target = self.source[place]
                return decoded(picture, self.mode), int(target)
            except ConfigError:
                raise
            except Exception as error:  # PIL raises a dozen kinds for a damaged file
                self.bad.add(at, self.name_of(place), error)
            if not self.train:
                return None
            if len(self.bad) == len(self):
                raise ConfigError(f"data: none of the {len(self)} images for training can be read")
            at, attempt = seed_of(REPLACE, number, index, attempt) % len(self), attempt + 1

    def __getitems__(self, keys: list[int]) -> Any:
        """A batch; where it is finished on a GPU, what `finish` makes one of, all of it in the host's memory."""
        # All draws of one kind together: between two pictures nothing of that code is left in a core's cache.
        seeds = self._seeds(AUGMENT, keys)
        if self.device:
            steps, boxes = self._steps(seeds), self._boxes(keys)
            return *self._pixels(keys, seeds), steps, boxes
        pixels, targets = self._pixels(keys, seeds)
        images = self.normalised(pixels)
        if self.erase_prob:
            # Behind the normalisation: the noise is that of normalised images.
            erase = self._erasing()
            with own_draws():
                for seed, image in zip(self._seeds(ERASE, keys), images, strict=True):
                    seed_torch(seed)
                    seed_timm(seed)
                    erase(image)
        return images, targets

    def finish(self, batch: Any) -> Batch:
        if not self.device:
            return batch
        pixels, targets, steps, boxes = batch
        pixels, targets = (each.to(self.device, non_blocking=True) for each in (pixels, targets))
        if self.augment:
            pixels = rand_augment_batch(pixels.contiguous(), steps, self.augment.ops[0].kwargs["fillcolor"])
        images = self.normalised(pixels)
        for place, seed, top, left, height, width in boxes.tolist():
            # By the image, as all that is drawn: a run that goes on and other batches have the same noise.
            generator = torch.Generator(self.device).manual_seed(seed)
            noise = torch.empty(images.shape[1], height, width, device=self.device).normal_(generator=generator)
            images[place, :, top : top + height, left : left + width] = noise
        return images, targets

    def _steps(self, seeds: list[int]) -> Tensor:
        """The steps of RandAugment, `(B, layers, 2)`."""
        if not self.augment:
            return torch.empty(len(seeds), 0, 2)
        with own_draws():
            steps = []
            for seed in seeds:
                seed_timm(seed)
                steps.append(self.augment([]))
        return as_tensor(steps, self.augment.num_layers)

    def _boxes(self, keys: list[int]) -> Tensor:
        """What is erased, int64 `(n, 6)`: place in the batch, seed of the noise, top, left, height and width."""
        rows = []
        if self.erase_prob:
            erase = self._erasing()
            with own_draws():
                for place, seed in enumerate(self._seeds(ERASE, keys)):
                    seed_timm(seed)
                    box = Box(self.image.channels, self.image.size)
                    erase(box)
                    if box.place:
                        rows.append([place, seed, *box.place])
        # Seeds have 64 bits: the larger ones become negative, which generators take for the same.
        return torch.from_numpy(np.array(rows, dtype=np.uint64).view(np.int64)).view(-1, 6)

    def _erasing(self) -> Any:
        from timm.data.random_erasing import RandomErasing

        return RandomErasing(self.erase_prob, mode="const" if self.device else "pixel", device="cpu")

    def _seeds(self, stream: int, keys: list[int]) -> list[int]:
        return [seed_of(stream, *divmod(key, len(self))) for key in keys]
