"""The splits of a run: stored in its folder when it begins, compared when it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from framework.ablation.state import write_text
from framework.errors import ConfigError

if TYPE_CHECKING:
    from framework.data.base import ImageData

SPLITS, INDICES = "splits.json", "splits.npz"

NAMES = {"train": "training", "val": "validation", "test": "test"}


@dataclass(frozen=True)
class Part:
    """Where the images of one split come from.

    Args:
        source: the stored split of the data that they are in.
        count: how many they are.
        labels: their class numbers, where these can be had without reading images.
        indices: which images of the source they are; None for all of them.
    """

    source: str
    count: int
    labels: np.ndarray | None = None
    indices: np.ndarray | None = None

    def summary(self, classes: int) -> dict[str, Any]:
        """What is stored of it, with the images of each of so many classes and a hash of indices and labels."""
        found = hashlib.sha256(f"{self.source} {self.count}".encode())
        told: dict[str, Any] = {"source": self.source, "whole": self.indices is None, "count": self.count}
        if self.indices is not None:
            found.update(b"indices" + np.asarray(self.indices, dtype="<i8").tobytes())
        if self.labels is not None:
            found.update(b"labels" + np.asarray(self.labels, dtype="<i8").tobytes())
            told["per_class"] = np.bincount(self.labels, minlength=classes).tolist()
        return {**told, "hash": found.hexdigest()[:16]}


def parts(data: ImageData) -> dict[str, Part]:
    """The splits that the data tells about. Raises ConfigError where images to train on or validate are missing."""
    found = {}
    for split in NAMES:
        try:
            part = data.part(split)
        except ConfigError:
            if split != "test":
                raise
            continue  # a run does not need test images
        if part is not None:
            found[split] = part
    return found


def store(folder: Path, data: ImageData) -> None:
    """Writes the splits of a run into its folder: splits.json, and the indices of partial ones to splits.npz."""
    if not (there := parts(data)):
        return
    indices = {split: part.indices for split, part in there.items() if part.indices is not None}
    if indices:
        arrays: Any = {split: index.astype(np.uint32) for split, index in indices.items()}
        np.savez_compressed(folder / INDICES, **arrays)
    write_text(folder / SPLITS, json.dumps(document(data, there), ensure_ascii=False))


def document(data: ImageData, there: Mapping[str, Part]) -> dict[str, Any]:
    """What splits.json holds."""
    splits = {split: part.summary(data.num_classes) for split, part in there.items()}
    return {"splits": splits, "class_names": data.class_names}


def compare(folder: Path, data: ImageData) -> None:
    """Raises ConfigError where the data gives other splits than those that a run began with."""
    try:
        old = json.loads((folder / SPLITS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return  # begun before splits were stored
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / SPLITS}: cannot be read: {error}") from error
    new = document(data, parts(data))
    for split, before in old["splits"].items():
        now = new["splits"].get(split)
        if now is None and split == "test":
            continue
        if now is None or now["hash"] != before["hash"]:
            then, here = _shown(before), _shown(now) if now else "nothing"
            raise ConfigError(
                f"data: the {NAMES[split]} split is not the one this run began with: it was {then}, now it is {here}; "
                f"put the data back, or start another run"
            )
    if new["class_names"] != old["class_names"]:
        then, here = old["class_names"], new["class_names"]
        at = next((i for i, pair in enumerate(zip(then, here, strict=False)) if len(set(pair)) > 1), len(then))
        raise ConfigError(
            f"data: the classes are not those this run began with: {len(then)} then, {len(here)} now; "
            f"the first that differs is number {at}: {then[at : at + 1]} then, {here[at : at + 1]} now"
        )


def _shown(summary: Mapping[str, Any]) -> str:
    of = "" if summary["whole"] else "a part of "
    return f"{of}{summary['source']}, {summary['count']} images, hash {summary['hash']}"
