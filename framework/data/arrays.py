"""Images from a .npz file, in MedMNIST's layout."""

from __future__ import annotations

import re
import zipfile
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from framework.data.base import PURPOSES, Batch, Image, at_least, hold_out
from framework.data.memory import MemoryData, resize, square, to_images
from framework.data.splits import Part
from framework.errors import ConfigError, suggest

_ORGANS = (
    "bladder", "femur-left", "femur-right", "heart", "kidney-left", "kidney-right", "liver", "lung-left", "lung-right",
    "pancreas", "spleen",
)  # fmt: skip

# Classes of MedMNIST's files, which do not say them. Source: INFO in MedMNIST/MedMNIST medmnist/info.py, 3.0.2.
MEDMNIST = {
    "pathmnist": (
        "adipose", "background", "debris", "lymphocytes", "mucus", "smooth muscle", "normal colon mucosa",
        "cancer-associated stroma", "colorectal adenocarcinoma epithelium",
    ),
    "dermamnist": (
        "actinic keratoses and intraepithelial carcinoma", "basal cell carcinoma", "benign keratosis-like lesions",
        "dermatofibroma", "melanoma", "melanocytic nevi", "vascular lesions",
    ),
    "octmnist": ("choroidal neovascularization", "diabetic macular edema", "drusen", "normal"),
    "pneumoniamnist": ("normal", "pneumonia"),
    "retinamnist": ("0", "1", "2", "3", "4"),
    "breastmnist": ("malignant", "normal, benign"),
    "bloodmnist": (
        "basophil", "eosinophil", "erythroblast",
        "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)", "lymphocyte", "monocyte", "neutrophil",
        "platelet",
    ),
    "tissuemnist": (
        "Collecting Duct, Connecting Tubule", "Distal Convoluted Tubule", "Glomerular endothelial cells",
        "Interstitial endothelial cells", "Leukocytes", "Podocytes", "Proximal Tubule Segments",
        "Thick Ascending Limb",
    ),
    "organamnist": _ORGANS,
    "organcmnist": _ORGANS,
    "organsmnist": _ORGANS,
}  # fmt: skip


class Npz(MemoryData):
    """Images from a .npz file with the arrays train_images, train_labels, and optionally val_* and test_*.

    Images are uint8 `(N, H, W)`, `(N, H, W, C)` or `(N, C, H, W)`, labels whole numbers `(N,)` or `(N, 1)`; an
    array `class_names` may name the classes. Without val_* a stratified tenth of the training images validates;
    without test_* the validation images test. MedMNIST's 2-D files for one label per image fit as they are, in all of
    their sizes; their classes are named as published where the file has MedMNIST's name, such as pathmnist_64.npz.

    Args:
        path: the file.
        size: height and width to resize to; 0 keeps the size in the file.
        batch_size: images in a batch, on each device.
        crop: random shift of training images by up to so many pixels.
        flip: whether training images are mirrored at random.
        split_seed: draws the tenth that validates where the file has no val_*; the same for all runs.
    """

    def __init__(
        self,
        path: str,
        size: int = 0,
        batch_size: int = 64,
        crop: int = 0,
        flip: bool = False,
        split_seed: int = 0,
    ) -> None:
        at_least(0, size=size, split_seed=split_seed)
        super().__init__(path, batch_size, crop=crop, flip=flip)
        self.path = Path(path).expanduser()
        self.size = size
        self.split_seed = split_seed

    @property
    def image(self) -> Image:
        size, channels = self._layout
        return Image(self.size or size, channels)

    @cached_property
    def num_classes(self) -> int:
        most, names = self._most, self._names
        if most > len(names) > 0:
            raise self._error(f"class_names has {len(names)} names, but there are labels up to {most - 1}")
        return len(names) or most

    @property
    def class_names(self) -> list[str]:
        return self._names or [str(label) for label in range(self.num_classes)]

    def read(self, split: str) -> Batch:
        size, _ = self._layout
        part = self.part(split)
        images = self._array(f"{part.source}_images")
        if part.indices is not None:
            images = images[part.indices]
        return resize(to_images(images), self.size or size), torch.from_numpy(part.labels)

    def part(self, split: str) -> Part:
        if split == "test" and "test" not in self._stored:
            split = "val"
        held = "val" not in self._stored
        stored = "train" if split == "val" and held else split
        labels, indices = self._labels(stored), None
        if held and stored == "train":
            indices = hold_out(labels, self.split_seed)[split == "val"]
            labels = labels[indices]
        return Part(stored, len(labels), labels, indices)

    def _error(self, message: str) -> ConfigError:
        return ConfigError(f"data.path: {self.path}: {message}")

    @cached_property
    def _headers(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of every array in the file, without reading one."""
        if not self.path.is_file():
            folder = self.path.parent
            if not folder.is_dir():
                raise ConfigError(f"data.path: no file {self.path}: there is no folder {folder}")
            if self.path.is_dir():
                raise ConfigError(f"data.path: {self.path} is a folder, not a .npz file")
            names = [path.name for path in folder.glob("*.npz") if path.is_file()]
            near = suggest(self.path.name, names) if names else "there is no .npz file"
            raise ConfigError(f"data.path: no file {self.path.name} in {folder}; {near}")
        headers = {}
        try:
            with zipfile.ZipFile(self.path) as archive:
                for name in archive.namelist():
                    with archive.open(name) as file:
                        old = np.lib.format.read_magic(file) == (1, 0)
                        read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                        shape, _, dtype = read(file)
                        headers[name.removesuffix(".npy")] = (shape, dtype)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise self._error(f"cannot be read as .npz: {error}") from error
        return headers

    def _array(self, name: str) -> np.ndarray:
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                return arrays[name]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise self._error(f"cannot read {name}: {error}") from error

    @cached_property
    def _stored(self) -> tuple[str, ...]:
        """The splits in the file. Raises ConfigError where half of one, or the training images, are missing."""
        there = self._headers
        stored = tuple(s for s in PURPOSES if s == "train" or f"{s}_images" in there or f"{s}_labels" in there)
        missing = [f"{s}_{part}" for s in stored for part in ("images", "labels") if f"{s}_{part}" not in there]
        if missing:
            raise self._error(f"has no {', no '.join(missing)}; there are: {', '.join(there) or 'no arrays at all'}")
        return stored

    @cached_property
    def _layout(self) -> tuple[int, int]:
        """Size and channels of the images in the file, after a look at the headers of all of its arrays."""
        layouts = {}
        for split in self._stored:
            images, labels = f"{split}_images", f"{split}_labels"
            shape, dtype = self._headers[images]
            if not shape or not shape[0]:
                raise ConfigError(f"data: {self.source} has no images for {PURPOSES[split]}: {images} is empty")
            if dtype != np.uint8:
                raise self._error(f"{images} has type {dtype}, must be uint8 with values 0..255")
            layout = square(shape)
            if layout is None:
                size = "×".join(str(n) for n in shape[1:])
                raise self._error(f"{images} are {size}, must be square: (N, H, W), (N, H, W, C) or (N, C, H, W)")
            layouts[images] = layout
            self._check_labels(labels, shape[0], images)
        if len(set(layouts.values())) > 1:
            shown = ", ".join(f"{name} {size}×{size}×{channels}" for name, (size, channels) in layouts.items())
            raise self._error(f"the splits must have the same size and channels, got {shown}")
        return layouts["train_images"]

    def _check_labels(self, labels: str, count: int, images: str) -> None:
        shape, dtype = self._headers[labels]
        if dtype.kind not in "iu":
            raise self._error(f"{labels} has type {dtype}, must be integers")
        if shape[1:] not in ((), (1,)) or not shape:
            several = f"; {shape[1]} labels for one image are another task, multi-label" if len(shape) == 2 else ""
            raise self._error(f"{labels} has shape {shape}, must be (N,) or (N, 1): one class for each image{several}")
        if shape[0] != count:
            raise self._error(f"{shape[0]} {labels}, but {count} {images}; there must be as many")

    def _labels(self, split: str) -> np.ndarray:
        _ = self._layout  # the headers must be right before an array is read
        labels = self._array(f"{split}_labels").reshape(-1).astype(np.int64)
        if labels.min() < 0:
            raise self._error(f"{split}_labels has {labels.min()}, must be 0 or more")
        return labels

    @cached_property
    def _names(self) -> list[str]:
        if "class_names" in self._headers:
            return [str(name) for name in self._array("class_names")]
        published = MEDMNIST.get(re.sub(r"_(64|128|224)$", "", self.path.stem), ())
        # Somebody's own file may have such a name.
        return list(published) if self._most <= len(published) else []

    @cached_property
    def _most(self) -> int:
        """One more than the highest label."""
        return max(int(self._labels(split).max()) for split in self._stored) + 1
