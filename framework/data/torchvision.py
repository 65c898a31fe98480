"""Any of torchvision's sets for image classification, by class name."""

from __future__ import annotations

import inspect
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from framework.data.base import Batch, Image
from framework.data.cuts import SMALL
from framework.data.memory import resize, square, to_images
from framework.data.picture_data import PictureData
from framework.data.pictures import read_picture
from framework.data.sources import labels_of, names_of, some, sort_files
from framework.errors import ConfigError, suggest

# Size (0: the images differ), channels and classes, so that a net can be planned before the files are there.
KNOWN = {
    "MNIST": (28, 1, 10),
    "FashionMNIST": (28, 1, 10),
    "KMNIST": (28, 1, 10),
    "QMNIST": (28, 1, 10),
    "USPS": (16, 1, 10),
    "CIFAR10": (32, 3, 10),
    "CIFAR100": (32, 3, 100),
    "SVHN": (32, 3, 10),
    "EuroSAT": (64, 3, 10),
    "STL10": (96, 3, 10),
    "PCAM": (96, 3, 2),
    "OxfordIIITPet": (0, 3, 37),
    "Flowers102": (0, 3, 102),
    "Food101": (0, 3, 101),
    "DTD": (0, 3, 47),
    "FGVCAircraft": (0, 3, 100),
    "StanfordCars": (0, 3, 196),
    "GTSRB": (0, 3, 43),
    "Caltech101": (0, 3, 101),
    "SUN397": (0, 3, 397),
    "Places365": (0, 3, 365),
    "Imagenette": (0, 3, 10),
    "ImageNet": (0, 3, 1000),
    "INaturalist": (0, 3, 10000),
}

# What a constructor's argument for the split is called, and the values that sets give it; the first that fits wins.
SWITCHES = ("train", "split", "version")
VALUES: dict[str, tuple[str, ...]] = {
    "train": ("train", "trainval"),
    "val": ("val", "valid", "validation", "2021_valid"),
    "test": ("test",),
}

# INaturalist's versions to train on that 2021_valid is no part of.
APART = ("2021_train", "2021_train_mini")

# Arguments of the sets that are not for `args`.
OURS = ("self", "root", "download", "transform", "target_transform", "transforms", "loader", "args", "kwargs")


class Torchvision(PictureData):
    """A data set of torchvision, by its class name.

    Where a set has no validation split, a stratified tenth of its training images validates; where it has no test
    split, the validation images test. ImageFolder reads the folders train, val and test under root, or root itself.
    Training images of up to 64 pixels are shifted, larger ones are cut out and scaled at random (to .08–1 of their
    area); larger ones are validated on the centre of images enlarged by 1/0.875.

    Args:
        dataset: the class, such as CIFAR10, Flowers102, ImageNet or ImageFolder.
        root: folder of the files.
        size: height and width; 0 keeps that of the set, where all of its images have the same.
        batch_size: images in a batch, on each device.
        workers: processes that read images, for sets that do not live in memory.
        download: whether to fetch the files where they are missing.
        crop: random shift of training images of up to 64 pixels, by up to so many pixels.
        flip: whether training images are mirrored at random; not for digits and letters.
        auto_augment: RandAugment of training images in timm's notation, such as rand-m9-mstd0.5-inc1; empty for none.
        erase_prob: probability that a rectangle of a training image becomes noise, as in timm.
        repeats: how often a training image comes in an epoch, each time with draws of its own; an epoch then has as
            many fewer of them (repeated augmentation, arXiv 1901.09335).
        bad_files: how many pictures of a split may be unreadable; in training others take their place, else they are
            left out.
        split_seed: draws the tenth that validates where a set has no validation split; the same for all runs.
        args: further arguments of the class, such as `{split: letters}` for EMNIST.
    """

    def __init__(
        self,
        dataset: str,
        root: str = "data",
        size: int = 0,
        batch_size: int = 64,
        workers: int = 2,
        download: bool = False,
        crop: int = 4,
        flip: bool = True,
        auto_augment: str = "",
        erase_prob: float = 0.0,
        repeats: int = 1,
        bad_files: int = 10,
        split_seed: int = 0,
        args: dict[str, Any] = {},  # noqa: B006 (only read)
    ) -> None:
        super().__init__(
            dataset, size, batch_size, workers, crop, flip, auto_augment, erase_prob, repeats, bad_files, split_seed
        )
        self.dataset = dataset
        self.root = Path(root).expanduser()
        self.download = download
        self.args = args
        self._opened: dict[str, Any] = {}
        if dataset not in KNOWN:
            _ = self._class  # a name that does not exist is an error here, not when training starts
        elif not size and not args and not KNOWN[dataset][0]:
            raise ConfigError(f"data.size: the images of {dataset} differ in size; give one, such as 224")

    @property
    def image(self) -> Image:
        size, channels, _ = self._facts
        return Image(self.size or size, channels)

    @property
    def num_classes(self) -> int:
        return self._facts[2]

    @cached_property
    def class_names(self) -> list[str]:
        # ImageNet gives a tuple of synonyms for a class.
        names = [name if isinstance(name, str) else name[0] for name in names_of(self._open("train"))]
        return names or [str(label) for label in range(self.num_classes)]

    def prepare_data(self) -> None:
        # One process downloads; the others find the files.
        if self.download:
            for split in VALUES:
                self._open(split)

    def read(self, split: str) -> Batch:
        source, indices = self._part(split)
        labels = labels_of(source)
        assert labels is not None, "a set without labels is not read in memory"
        return resize(to_images(source.data)[indices], self.image.size), torch.from_numpy(labels[indices])

    @cached_property
    def _class(self) -> Any:
        import torchvision

        if self.dataset not in torchvision.datasets.__all__:
            near = suggest(self.dataset, torchvision.datasets.__all__)
            raise ConfigError(f"data.dataset: torchvision has no data set {self.dataset!r}; {near}")
        return getattr(torchvision.datasets, self.dataset)

    @cached_property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        """Arguments of the class and, as far as it passes them on as **kwargs, of those that it extends."""
        found: dict[str, inspect.Parameter] = {}
        for cls in self._class.__mro__:
            if "__init__" in vars(cls):
                own = inspect.signature(cls.__init__).parameters
                found = {**own, **found}
                if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in own.values()):
                    break
        return found

    def _choices(self, split: str) -> list[dict[str, Any]]:
        """The arguments that may give this split, best first; none where the set cannot have it."""
        switch = next((name for name in SWITCHES if name in self._parameters), None)
        train = split == "train"
        if switch in self.args and train:
            return [{}]
        if switch in self.args and split == "val" and str(self.args[switch]) not in APART:
            return []  # it may overlap with the split that `args` names
        if switch == "train":
            return [{"train": train}] if split != "val" else []
        if switch:
            default = self._parameters[switch].default
            return [{switch: value} for value in (*VALUES[split], *([default] if train else []))]
        # Without an argument for it, the split is a folder (which holds class folders), or there is only one. A set
        # that can be fetched has a folder of its own, and another set's folders may lie beside that.
        plain = "root" in self._parameters and "download" not in self._parameters
        if plain and any(path.is_dir() for path in (self.root / "train").glob("*")):
            return [{"root": self.root / name} for name in VALUES[split] if (self.root / name).is_dir()]
        return [{}] if train else []

    def _open(self, split: str) -> Any:
        """torchvision's own set of this split, or None where there is none. Raises ConfigError where it is missing."""
        if split not in self._opened:
            self._opened[split] = self._construct(split)
        return self._opened[split]

    def _construct(self, split: str) -> Any:
        allowed = [name for name in self._parameters if name not in OURS]
        for name in self.args:
            if name not in allowed:
                raise ConfigError(f"data.args: {self.dataset} has no {name!r} to set here; {suggest(name, allowed)}")
        common = dict(self.args)
        if "root" in self._parameters:
            common["root"] = self.root
            if not self.root.is_dir() and not self.download:
                raise self._not_found("there is no such folder")
        if "download" in self._parameters:
            common["download"] = self.download
        elif self.download:
            raise ConfigError(f"data.download: torchvision cannot fetch {self.dataset}; set download: false")
        if "loader" in self._parameters:
            common["loader"] = read_picture
        for choice in self._choices(split):
            try:
                source = self._class(**{**common, **choice})
            except Exception as error:  # a missing or broken file may show as anything
                why = str(error).splitlines()[0] if str(error) else repr(error)
                # So torchvision says that it does not know a value: the set may call this split something else.
                if any(f"for argument {name}." in why for name in choice):
                    continue
                if isinstance(error, TypeError) or "for argument" in why:
                    raise ConfigError(f"data.args: {self.dataset}: {why}") from error
                raise self._not_found(why) from error
            sort_files(source)
            first = some(source, self.dataset, range(min(len(source), self.bad_files + 1)), 1) if len(source) else []
            if split == "test" and first and first[0][1] is None:
                return None  # its labels are not public
            self._check(source, split, first)
            return source
        if split == "train":
            raise ConfigError(f"data.dataset: {self.dataset} has no split to train on that is known here")
        return None

    def _not_found(self, why: str) -> ConfigError:
        why = "" if "download=True" in why else f" ({why})"
        if self.download:
            return ConfigError(f"data.download: {self.dataset} could not be fetched to {self.root}{why}")
        can = " or set download: true" if "download" in self._parameters else ""
        return ConfigError(f"data.root: no {self.dataset} under {self.root}; put it there{can}{why}")

    def _check(self, source: Any, split: str, first: list[tuple[Any, Any]]) -> None:
        """Raises ConfigError where these are not images with one class each, or classes differ from train's."""
        from PIL.Image import Image as Picture

        if not first:
            return  # the caller's `split` has the message
        picture, target = first[0]
        if not isinstance(picture, Picture) or not isinstance(target, int | np.integer):
            raise ConfigError(
                f"data.dataset: {self.dataset} is not for image classification: it gives "
                f"({type(picture).__name__}, {type(target).__name__}), must be an image and a class number"
            )
        if split != "train" and (differ := set(names_of(source)) ^ set(names_of(self._open("train")))):
            raise ConfigError(
                f"data.root: train and {split} have different classes under {self.root}: "
                f"only one of them has {', '.join(sorted(map(str, differ))[:5])}"
            )

    @cached_property
    def _facts(self) -> tuple[int, int, int]:
        """Size, channels and classes: known ones, or what the files say."""
        if self.dataset in KNOWN and not self.args:
            return KNOWN[self.dataset]
        source = self._open("train")
        return *self._look(self._made_rgb), self._count(source)

    @property
    def _made_rgb(self) -> bool:
        """Whether torchvision makes all of the set's pictures RGB, which we read as they are stored."""
        from torchvision.datasets.folder import default_loader

        loader = self._parameters.get("loader")
        return self.dataset in ("OxfordIIITPet", "GTSRB") or (loader is not None and loader.default is default_loader)

    def _count(self, source: Any) -> int:
        """The number of classes."""
        if names := names_of(source):
            return len(names)
        if isinstance(count := getattr(source, "num_classes", None), int):
            return count
        labels = labels_of(source)
        if labels is None:
            raise ConfigError(f"data.dataset: {self.dataset} does not say how many classes it has")
        return int(labels.max()) + 1

    @cached_property
    def _in_memory(self) -> bool:
        source = self._open("train")
        data = getattr(source, "data", None)
        return (
            self.image.size <= SMALL
            and isinstance(data, np.ndarray | Tensor)
            and data.dtype in (np.uint8, torch.uint8)
            and square(tuple(data.shape)) is not None
            and labels_of(source) is not None
        )
