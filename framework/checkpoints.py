"""Checkpoints: written whole or not at all, and enough to use a net without its config and its data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from framework.data import Image, ImageData
from framework.data.memory import MemorySet
from framework.errors import ConfigError

KEY = "tessera"


class WholeFiles(TorchCheckpointIO):
    """Writes beside the old file, then replaces it.

    Lightning's own way goes through the system's temporary folder. From there to another disk, as a cluster's shared
    one, the file is copied over the old one: a kill or a full disk in between leaves neither.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)


def link(there: Path, path: Path) -> None:
    """Makes `path` a further name of a file, in place of what it was: who replaces either leaves the other as it is."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        os.link(there, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Kept:
    """What a checkpoint keeps under the key `tessera`, as plain data.

    Args:
        config: the composed document of its run, before inheritance.
        class_names: of its data.
        image: size and channels of the images.
        mean: of each channel of the training images, or what stood for it.
        std: of each channel.
        interpolation: how images are brought to their size for validation: bilinear, as sets in memory are, or bicubic
            with the centre cut out.
    """

    config: dict[str, Any]
    class_names: list[str]
    image: Image
    mean: list[float]
    std: list[float]
    interpolation: str

    @classmethod
    def of(cls, document: Mapping[str, Any], data: ImageData) -> Kept:
        """That of a document and its data. Raises ConfigError where the data cannot be read."""
        train = data.split("train")
        memory = isinstance(data.split("val"), MemorySet)
        names = [str(name) for name in data.class_names]
        mean, std = train.mean.tolist(), train.std.tolist()
        return cls(dict(document), names, data.image, mean, std, "bilinear" if memory else "bicubic")

    def plain(self) -> dict[str, Any]:
        return asdict(self)

    def facts(self, document: Mapping[str, Any]) -> tuple[Image, int] | None:
        """Image and number of classes for a document with the same data, which may be gone; None for other data."""
        same = _data_of(document) == _data_of(self.config)
        return (self.image, len(self.class_names)) if same else None


def _data_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """What a document says of its data, without how it is read."""
    section = document["data"]
    args = {key: value for key, value in section.get("init_args", {}).items() if key not in ("batch_size", "workers")}
    return {**section, "init_args": args}


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU; nothing in it is run. Raises ConfigError where it is none."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(value, Tensor) for value in found["state_dict"].values()):
            raise TypeError("not only tensors")
    except Exception as error:  # a file from anywhere
        raise ConfigError(f"--ckpt_path: {path} is no checkpoint of this program, or a damaged one") from error
    return found


def kept_in(checkpoint: Mapping[str, Any], path: Path) -> Kept | None:
    """What a checkpoint keeps beside weights; None in one of another program, or of an early version of this one.

    Raises:
        ConfigError: it is damaged.
    """
    if KEY not in checkpoint:
        return None
    try:
        found = checkpoint[KEY]
        kept = Kept(**{**found, "image": Image(**found["image"])})
        words = [*kept.class_names, *kept.config.get("plugins", [])]
        numbers = (kept.image.size, kept.image.channels)
        if not all(isinstance(word, str) for word in words) or not all(isinstance(number, int) for number in numbers):
            raise TypeError("parts of the wrong kind")
        if torch.tensor([kept.mean, kept.std]).shape != (2, kept.image.channels):
            raise ValueError("not a mean and a deviation of each channel")
    except Exception as error:  # a file from anywhere
        raise ConfigError(f"--ckpt_path: {path}: what it keeps of its run is damaged; give its --config") from error
    return kept


def document_of(checkpoint: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The composed document of the run of a checkpoint. Raises ConfigError where the checkpoint does not hold it."""
    kept = kept_in(checkpoint, path)
    if kept is None:
        beside = path.resolve().parent.parent / "config.yaml"
        hint = str(beside) if beside.is_file() else "FILE"
        raise ConfigError(f"--ckpt_path: {path} does not hold the config of its run; give it: --config {hint}")
    return kept.config
