"""Data sets of Hugging Face's `datasets` library, out of a folder."""

from __future__ import annotations

import io
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from framework.data.cuts import SMALL
from framework.data.picture_data import MEMORY, PictureData
from framework.data.pictures import read_picture
from framework.errors import ConfigError, reason, suggest

# What sets call their splits; the first that is there wins.
NAMES = {"train": ("train",), "val": ("validation", "valid", "val", "dev"), "test": ("test",)}


class Table:
    """The pictures and classes of one split.

    Args:
        rows: a `datasets.Dataset`.
        image_key: its column of pictures.
        label_key: its column of classes.
        where: the folder and the split, for messages.

    Attributes:
        labels: the class numbers `(N,)`; -1 where a row has none.
        classes: their names; empty where the column holds plain numbers.
        count: how many classes there are.
    """

    def __init__(self, rows: Any, image_key: str, label_key: str, where: str) -> None:
        # Arrow's tables are as they are stored: `datasets` decodes nothing.
        self.rows = rows.select_columns([image_key]).with_format("arrow")
        column = rows.select_columns([label_key]).with_format("arrow")[:][label_key]
        self.labels = column.fill_null(-1).to_numpy().astype(np.int64)
        self.classes: list[str] = list(getattr(rows.features[label_key], "names", None) or [])
        self.count = len(self.classes) or int(self.labels.max(initial=-1)) + 1
        self.image_key = image_key
        self.where = where

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        stored = self.rows[index][self.image_key][0].as_py()
        if not stored:
            raise ValueError("the row has no picture")
        file = stored["path"] if stored["bytes"] is None else io.BytesIO(stored["bytes"])
        return read_picture(file), int(self.labels[index])

    def name_of(self, index: int) -> str:
        return f"row {index} of {self.where}"


class HuggingFace(PictureData):
    """A folder that `save_to_disk` of Hugging Face's `datasets` wrote: a DatasetDict, or a Dataset to train on.

    Nothing is fetched; `datasets.load_dataset(name).save_to_disk(path)` makes such a folder out of a set of the hub.
    The splits are train, validation and test. Without validation a stratified tenth of the training images validates;
    without test, or where all of its classes are -1, the validation images test. Images of one size up to 64 pixels
    live in memory.

    Args:
        path: the folder.
        image_key: the column of pictures; by default the only one of the type Image.
        label_key: the column of classes; by default the only one of the type ClassLabel. It may hold whole numbers.
        size: height and width; 0 keeps that of the set, where all of its images have the same.
        batch_size: images in a batch, on each device.
        workers: processes that read images, for sets that do not live in memory.
        crop: random shift of training images of up to 64 pixels, by up to so many pixels.
        flip: whether training images are mirrored at random; not for digits and letters.
        auto_augment: RandAugment of training images in timm's notation, such as rand-m9-mstd0.5-inc1; empty for none.
        erase_prob: probability that a rectangle of a training image becomes noise, as in timm.
        repeats: how often a training image comes in an epoch, each time with draws of its own; an epoch then has as
            many fewer of them.
        bad_files: how many pictures of a split may be unreadable; in training others take their place, else they are
            left out.
        split_seed: draws the tenth that validates where there is no validation split; the same for all runs.
    """

    def __init__(
        self,
        path: str,
        image_key: str = "",
        label_key: str = "",
        size: int = 0,
        batch_size: int = 64,
        workers: int = 2,
        crop: int = 4,
        flip: bool = True,
        auto_augment: str = "",
        erase_prob: float = 0.0,
        repeats: int = 1,
        bad_files: int = 10,
        split_seed: int = 0,
    ) -> None:
        super().__init__(
            path, size, batch_size, workers, crop, flip, auto_augment, erase_prob, repeats, bad_files, split_seed
        )
        self.path = Path(path).expanduser()
        self.image_key = image_key
        self.label_key = label_key
        self._opened: dict[str, Table | None] = {}

    @property
    def num_classes(self) -> int:
        return self._table("train").count

    @property
    def class_names(self) -> list[str]:
        return self._table("train").classes or [str(label) for label in range(self.num_classes)]

    @property
    def _in_memory(self) -> bool:
        image, (stored, _) = self.image, self._look()
        small = 0 < stored <= SMALL and image.size <= SMALL
        return small and len(self._table("train")) * image.channels * image.size**2 <= MEMORY

    def _open(self, split: str) -> Table | None:
        if split not in self._opened:
            self._opened[split] = self._checked(split) if split == "train" or split in self._stored else None
        return self._opened[split]

    def _table(self, split: str) -> Table:
        table = self._open(split)
        assert table, "there is always one to train on"
        return table

    def _error(self, message: str) -> ConfigError:
        return ConfigError(f"data.path: {self.path}: {message}")

    @cached_property
    def _stored(self) -> dict[str, Any]:
        """The splits in the folder, under our names."""
        # Said before the import: the variable is read there. It leaves the hub's own client alone.
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        try:
            import datasets
        except ImportError as error:
            raise ConfigError(
                f"data: HuggingFace needs the package datasets ({error}); pip install 'datasets>=4.0'"
            ) from error
        how = "datasets.load_dataset(name).save_to_disk(path) makes one"
        if not self.path.is_dir():
            raise ConfigError(f"data.path: no folder {self.path}; {how}")
        datasets.disable_progress_bars()
        try:
            found = datasets.load_from_disk(str(self.path))
        except FileNotFoundError as error:
            raise self._error(f"is no folder of datasets.save_to_disk; {how} ({reason(error)})") from error
        except Exception as error:  # a damaged file may show as anything
            raise self._error(f"cannot be read by datasets {datasets.__version__}: {reason(error)}") from error
        if not isinstance(found, dict):
            return {"train": found}
        splits = {ours: next((name for name in names if name in found), None) for ours, names in NAMES.items()}
        if not splits["train"]:
            raise self._error(f"has no split train; there are: {', '.join(found) or 'none'}")
        return {ours: found[name] for ours, name in splits.items() if name}

    def _checked(self, split: str) -> Table | None:
        rows = self._stored[split]
        image = self._column(rows.features, "image_key", self.image_key, "Image")
        label = self._column(rows.features, "label_key", self.label_key, "ClassLabel")
        table = Table(rows, image, label, f"{self.path} ({split})")
        if split == "test" and (table.labels < 0).all():
            return None  # its labels are not public
        if split != "train" and table.classes != self._table("train").classes:
            differ = sorted(set(table.classes) ^ set(self._table("train").classes))[:5]
            told = f"only one of them has {', '.join(differ)}" if differ else "they are in another order"
            raise self._error(f"train and {split} have different classes: {told}")
        count = table.count if split == "train" else self.num_classes
        wrong = np.flatnonzero((table.labels < 0) | (table.labels >= count))
        if len(wrong):
            found = f"{table.name_of(int(wrong[0]))} has class {table.labels[wrong[0]]}"
            raise ConfigError(f"data.path: {found}, but there are {count} classes, from 0 on")
        return table

    def _column(self, features: Any, option: str, given: str, kind: str) -> str:
        """The column that is given, or the only one of this kind."""
        kinds = {name: type(feature).__name__ for name, feature in features.items()}
        if not given:
            fitting = [name for name in kinds if kinds[name] == kind]
            if len(fitting) != 1:
                columns = ", ".join(f"{name} ({kinds[name]})" for name in kinds)
                raise ConfigError(
                    f"data.{option}: {self.path} has {len(fitting) or 'no'} columns of the type {kind}; "
                    f"name one of {columns}"
                )
            return fitting[0]
        if given not in kinds:
            raise ConfigError(f"data.{option}: {self.path} has no column {given!r}; {suggest(given, kinds)}")
        whole = kind == "ClassLabel" and kinds[given] == "Value" and "int" in features[given].dtype
        if kinds[given] != kind and not whole:
            must = f"{kind} or whole numbers" if kind == "ClassLabel" else kind
            raise ConfigError(f"data.{option}: {given!r} of {self.path} has the type {features[given]}, must be {must}")
        return given
