"""What torchvision's sets do not say in one way: names of classes, labels in bulk, files of pictures."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from framework.data.pictures import read_picture, why
from framework.errors import ConfigError


def names_of(source: Any) -> list[Any]:
    """The names of its classes, where a torchvision set has them."""
    kind = taxon(source)
    if kind and kind != "full":
        return list(source.categories_index[kind])
    for name in ("classes", "categories", "all_categories"):
        if found := getattr(source, name, None):
            return list(found)
    return []


def labels_of(source: Any) -> np.ndarray | None:
    """All class numbers of a torchvision set, where they can be had without reading images."""
    if kind := taxon(source):
        classes = np.array([number for number, _ in source.index], dtype=np.int64)
        if kind == "full":
            return classes
        return np.array([taxa[kind] for taxa in source.categories_map], dtype=np.int64)[classes]
    for name in ("targets", "labels", "_labels", "y", "_samples"):
        found = getattr(source, name, ())
        if name == "_samples":
            found = [label for _, label in found]
        labels = np.asarray(found)
        if labels.shape == (len(source),) and labels.dtype.kind in "iu":
            return labels.astype(np.int64)
    return None


def taxon(source: Any) -> str:
    """What INaturalist's classes are, such as full or genus; empty for another set."""
    if not hasattr(source, "categories_map") or len(source.target_type) != 1:
        return ""
    return str(source.target_type[0])


def sort_files(source: Any) -> None:
    """Sorts the images of sets that list them as the disk does: an index must mean the same one everywhere."""
    if taxon(source):
        source.index.sort()
    elif type(source).__name__ == "SUN397":
        pairs = sorted(zip(source._image_files, source._labels, strict=True))
        source._image_files, source._labels = [file for file, _ in pairs], [label for _, label in pairs]


def name_of(source: Any, dataset: str, index: int) -> str:
    """What a message calls the picture of an index: its file, or `image 17 of CIFAR10`."""
    if hasattr(source, "name_of"):
        return str(source.name_of(index))
    if taxon(source):
        number, name = source.index[index]
        return str(Path(source.root, source.all_categories[number], name))
    for attribute in ("samples", "_samples", "imgs", "_image_files", "_images", "data"):
        files = getattr(source, attribute, None)
        if isinstance(files, list) and len(files) == len(source):
            path = files[index][0] if isinstance(files[index], tuple) else files[index]
            if isinstance(path, str | Path):
                return str(path)
    return f"image {index} of {dataset}"


class Files:
    """Pictures read by ours, of a set that reads them by itself and makes them RGB.

    Args:
        paths: their files.
        labels: their class numbers.
    """

    def __init__(self, paths: list[Any], labels: list[int]) -> None:
        self.paths = paths
        self.labels = labels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return read_picture(self.paths[index]), self.labels[index]


def pictures_of(source: Any) -> Any:
    """What gives the pictures of a torchvision set: itself, or its files where it takes no `loader`."""
    match type(source).__name__:
        case "OxfordIIITPet" if source._target_types == ["category"]:
            return Files(source._images, source._labels)
        case "GTSRB":
            return Files(*(list(column) for column in zip(*source._samples, strict=True)))
    return source


def some(source: Any, dataset: str, indices: Iterable[int], most: int) -> list[tuple[Any, Any]]:
    """The first `most` readable ones of some pictures, with their targets. Raises ConfigError where there are none."""
    pictures, found, failed = pictures_of(source), list[tuple[Any, Any]](), ""
    for index in indices:
        try:
            picture, target = pictures[int(index)]
            if hasattr(picture, "load"):  # some sets are not for classification
                picture.load()
            found.append((picture, target))
        except Exception as error:  # as in PictureSet
            name = name_of(source, dataset, int(index))
            failed = failed or f"data: cannot read {name}: {why(error, name)}"
        if len(found) == most:
            break
    if not found:
        raise ConfigError(failed)
    return found
