"""Images in WebDataset's shards: tar files in which the members with one key are an image and its class."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
import tarfile
import uuid
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch.utils.data import DistributedSampler

from blocks.kernels.native import cache_folder
from framework.data.base import ORDER, ImageSet, at_least, seed_of
from framework.data.picture_data import PictureData
from framework.data.pictures import PictureSet, read_picture
from framework.errors import ConfigError, reason, suggest

# What a picture's name may end with.
PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff")

# As WebDataset divides a name: the key ends at the first dot behind the last slash.
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")

# `{000..146}` and `{a,b}`, as a shell has them.
BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")

# Columns of an index: number of the shard, where the picture begins in it, its bytes, its class.
SHARD, OFFSET, SIZE, LABEL = range(4)

# Changes with what an index holds, so that an old one is made anew.
FORMAT = 1

# Shards that a process keeps open; a window of the order goes over fewer.
OPEN = 64


def expand(pattern: str) -> list[str]:
    """A pattern with its braces written out."""
    found = BRACES.search(pattern)
    if not found:
        return [pattern]
    first, last, words = found.groups()
    names = words.split(",") if words else [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
    rests = expand(pattern[found.end() :])
    return [pattern[: found.start()] + name + rest for name in names for rest in rests]


def find(split: str, pattern: str) -> list[Path]:
    """The shards that a pattern of braces, `*` and `?` names. Raises ConfigError where one is missing."""
    names = expand(str(Path(pattern).expanduser().absolute()))
    found = {name: sorted(glob.glob(name)) if re.search(r"[*?]", name) else [name] for name in names}
    missing = [name for name, paths in found.items() if not paths or not Path(paths[0]).is_file()]
    if not names:
        raise ConfigError(f"data.{split}: {pattern} names no shard; a range counts up, such as {{000..146}}")
    if missing:
        first = Path(missing[0])
        there = [path.name for path in first.parent.glob("*.tar") if path.is_file()] if first.parent.is_dir() else []
        near = suggest(first.name, there) if there else "there is no .tar file"
        near = near if first.parent.is_dir() else "there is no such folder"
        more = f" (and {len(missing) - 1} more of {len(names)})" if len(missing) > 1 else ""
        raise ConfigError(f"data.{split}: no shard {first.name}{more} in {first.parent}; {near}")
    return [Path(path) for path in dict.fromkeys(path for paths in found.values() for path in paths)]


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key, ending and header of every file with an ending."""
    while member := tar.next():
        cast(Any, tar).members.clear()  # it would keep all of them
        if member.isreg() and (name := NAME.fullmatch(member.name)):
            yield name[1], name[2].lower(), member


def scan(split: str, label_key: str, path: Path) -> np.ndarray:
    """Where each picture of a shard lies and its class `(N, 3)`, from the headers and the small members alone.

    Args:
        split: for messages.
        label_key: where the class is in a .json member.
        path: the shard.

    Raises:
        ConfigError: the file is no whole tar, or a key has not one picture and one class.
    """
    rows = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for key, members in groupby(_members(tar), lambda found: found[0]):
                rows.append(_sample(f"data.{split}: {path}: {key}", label_key, tar, members))
            # tarfile takes anything that is no header for the end of the file.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError("broken header")
    except (OSError, ValueError, tarfile.TarError) as error:
        raise ConfigError(f"data.{split}: {path} is no whole, uncompressed .tar file ({reason(error)})") from error
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _sample(where: str, label_key: str, tar: tarfile.TarFile, members: Any) -> tuple[int, int, int]:
    pictures, texts, endings = [], {}, []
    for _, ending, member in members:
        endings.append(ending)
        if ending in PICTURES:
            pictures.append((member.offset_data, member.size))
        elif ending in ("cls", "json"):
            texts[ending] = cast(Any, tar.extractfile(member)).read()
    if len(pictures) != 1:
        raise ConfigError(f"{where} has {len(pictures)} pictures, must be one; its members: .{', .'.join(endings)}")
    if not texts:
        raise ConfigError(f"{where} has no class: no .cls or .json member beside .{', .'.join(endings)}")
    ending = "cls" if "cls" in texts else "json"
    text = texts[ending].decode(errors="replace").strip()
    label: Any = text
    try:
        label = int(text) if ending == "cls" else json.loads(text)[label_key]
    except KeyError:
        near = suggest(label_key, json.loads(text))
        raise ConfigError(f"{where}.json has no {label_key!r}; set data.label_key; {near}") from None
    except (ValueError, TypeError):
        pass
    if type(label) is not int or not 0 <= label < 2**31:
        raise ConfigError(f"{where}.{ending}: the class is {str(label)[:40]!r}, must be a whole number from 0 on")
    return *pictures[0], label


def read_index(split: str, label_key: str, shards: list[Path]) -> np.ndarray:
    """The index of these shards, int64 `(N, 4)`: from the file that an earlier run left, or from the shards.

    The file lies beside the shards or, where that folder cannot be written, in the user's cache. It holds for the
    same names, sizes and times of change. Several processes may make it at once: each replaces it as a whole.
    """
    state = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in shards]
    key = np.frombuffer(json.dumps([FORMAT, label_key, state]).encode(), dtype=np.uint8)
    names = hashlib.sha256("\n".join(map(str, shards)).encode()).hexdigest()[:16]
    places = [folder / f".index-{names}.npz" for folder in (shards[0].parent, cache_folder())]
    for place in places:
        try:
            with np.load(place, allow_pickle=False) as stored:
                if np.array_equal(stored["key"], key):
                    return stored["rows"]
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
            continue
    out = Console(stderr=True)
    # Threads: over a network every header is waited for.
    with ThreadPoolExecutor(8) as pool:
        parts = pool.map(partial(scan, split, label_key), shards)
        shown = track(parts, "reading shards", len(shards), console=out, transient=True, disable=not out.is_terminal)
        rows = np.concatenate([np.insert(part, 0, number, axis=1) for number, part in enumerate(shown)])
    for place in places:
        part = place.with_name(f"{place.name}.{uuid.uuid4().hex}")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with part.open("xb") as file:
                np.savez(file, key=key, rows=rows)
            os.replace(part, place)
            break
        except OSError:
            part.unlink(missing_ok=True)
    return rows


class ShardOrder(DistributedSampler[int]):
    """A random order that reads each shard from one device, and there nearly from front to back.

    The shards are shuffled by the run's seed and the epoch. Each device has an equal run of images of that order,
    which may begin and end within a shard; the rest, fewer images than devices, is left out. Then every image moves
    by less than `window` places at random. The keys are `round · count + index`, as those of `Repeats`; copies of an
    image follow each other on one device. A DistributedSampler, so that Lightning puts none of its own round it.

    Args:
        shards: for each image, the number of its shard; those of one lie together.
        window: images; 1 leaves a shard's as they lie.
        repeats: how often each comes, in an epoch that has no more images for it.
        ranks: number of devices.
        rank: which of them this is.
    """

    def __init__(self, shards: np.ndarray, window: int, repeats: int = 1, ranks: int = 1, rank: int = 0) -> None:
        super().__init__(cast(Any, shards), ranks, rank)
        self.shards = np.split(np.arange(len(shards)), np.flatnonzero(np.diff(shards)) + 1)
        self.count = len(shards)
        self.window = window
        self.repeats = repeats

    def __len__(self) -> int:
        return self.count // self.num_replicas

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(ORDER, self.epoch))
        shuffled = np.concatenate([self.shards[n] for n in torch.randperm(len(self.shards), generator=generator)])
        order = torch.from_numpy(shuffled)[self.rank * len(self) : (self.rank + 1) * len(self)]
        generator.manual_seed(seed_of(ORDER, self.epoch, self.rank + 1))
        places = torch.arange(len(self))
        moved = places + self.window * torch.rand(len(self), dtype=torch.float64, generator=generator)
        order = order[moved.argsort()]
        rounds = self.epoch * self.repeats + places % self.repeats
        return iter((rounds * self.count + order[places // self.repeats]).tolist())


class Shards:
    """The pictures of an index. Each process opens the files when it reads them, and keeps the last ones open.

    Args:
        paths: the shards.
        index: int64 `(N, 4)`.

    Attributes:
        labels: the class numbers `(N,)`.
    """

    def __init__(self, paths: list[Path], index: np.ndarray) -> None:
        self.paths = paths
        self.index = index
        self.labels = index[:, LABEL]
        self._files: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_files": OrderedDict()}  # an open file does not go into another process

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        shard, offset, size, label = self.index[index].tolist()
        return read_picture(io.BytesIO(self._read(shard, offset, size))), label

    def name_of(self, index: int) -> str:
        """Shard and member, the name of which is in the block in front of the picture."""
        shard, offset = self.index[index, [SHARD, OFFSET]].tolist()
        try:
            header = self._read(shard, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
            return f"{self.paths[shard]}: {tarfile.TarInfo.frombuf(header, 'utf-8', 'replace').name}"
        except (OSError, tarfile.TarError):  # gone or changed since it was indexed
            return f"{self.paths[shard]}, byte {offset}"

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        if shard not in self._files:
            if len(self._files) >= OPEN:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = self.paths[shard].open("rb", buffering=0)
        self._files.move_to_end(shard)
        # Not seek and read: a forked process shares its place in a file with the others.
        return os.pread(self._files[shard].fileno(), size, offset)


class WebDataset(PictureData):
    """Images in WebDataset's shards, such as `train: /data/train-{000000..000146}.tar`.

    A key's members are a picture (`0001.jpg`) and its class: a whole number in `0001.cls`, or in `0001.json` under
    `label_key`. Shards are read through once, without the pictures, for an index that is kept beside them. So, unlike
    the streams of the webdataset library, which draw shards anew for each process, an epoch has every image once over
    all devices and workers, its length is exact, and a run goes on in the midst of it. The shards must lie in a file
    system and be uncompressed.

    Training images are shuffled shard by shard, and then within a window of so many images: each device reads its own
    part of the shards nearly from front to back. So the shards should have been written in a random order. Without
    `val` a stratified tenth of the training images validates; without `test` the validation images test.

    Args:
        train: the shards to train on: `{000..146}`, `{a,b}`, `*` and `?` stand for several.
        val: those to validate on.
        test: those to test on.
        classes: a file with the name of a class in each line; by default classes.txt beside the first shard, if it is
            there.
        label_key: where the class is in a .json member.
        size: height and width; 0 keeps that of the pictures, where all have the same.
        batch_size: images in a batch, on each device.
        workers: processes that read images.
        shuffle: images of the window; an image moves by less than that from its place in the shuffled shards.
        crop: random shift of training images of up to 64 pixels, by up to so many pixels.
        flip: whether training images are mirrored at random; not for digits and letters.
        auto_augment: RandAugment of training images in timm's notation, such as rand-m9-mstd0.5-inc1; empty for none.
        erase_prob: probability that a rectangle of a training image becomes noise, as in timm.
        repeats: how often a training image comes in an epoch, each time with draws of its own; an epoch then has as
            many fewer of them.
        bad_files: how many pictures of a split may be unreadable; in training others take their place, else they are
            left out.
        split_seed: draws the tenth that validates where there is no `val`; the same for all runs.
    """

    def __init__(
        self,
        train: str,
        val: str = "",
        test: str = "",
        classes: str = "",
        label_key: str = "label",
        size: int = 0,
        batch_size: int = 64,
        workers: int = 2,
        shuffle: int = 4096,
        crop: int = 4,
        flip: bool = True,
        auto_augment: str = "",
        erase_prob: float = 0.0,
        repeats: int = 1,
        bad_files: int = 10,
        split_seed: int = 0,
    ) -> None:
        at_least(1, shuffle=shuffle)
        super().__init__(
            train, size, batch_size, workers, crop, flip, auto_augment, erase_prob, repeats, bad_files, split_seed
        )
        self.patterns = {"train": train, "val": val, "test": test}
        self.classes = classes
        self.label_key = label_key
        self.shuffle = shuffle
        self._opened: dict[str, Shards] = {}

    @cached_property
    def num_classes(self) -> int:
        return len(self._names) or int(self._index("train").labels.max(initial=-1)) + 1

    @property
    def class_names(self) -> list[str]:
        return self._names or [str(label) for label in range(self.num_classes)]

    def order(self, images: ImageSet, devices: int, rank: int) -> ShardOrder:
        source = self._index("train")
        shards = source.index[cast(PictureSet, images).indices, SHARD]
        return ShardOrder(shards, self.shuffle, self.repeats, devices, rank)

    @cached_property
    def _names(self) -> list[str]:
        path = Path(self.classes).expanduser() if self.classes else self._index("train").paths[0].parent / "classes.txt"
        try:
            return [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
        except FileNotFoundError:
            if self.classes:
                raise ConfigError(f"data.classes: no file {path}") from None
            return []
        except (OSError, ValueError) as error:
            raise ConfigError(f"data.classes: {path} cannot be read: {reason(error)}") from error

    def _open(self, split: str) -> Shards | None:
        if not self.patterns[split]:
            return None
        source = self._index(split)
        wrong = np.flatnonzero(source.labels >= self.num_classes)
        if len(wrong):
            name, label = source.name_of(int(wrong[0])), source.labels[wrong[0]]
            raise ConfigError(f"data.{split}: {name} has class {label}, but there are {self.num_classes} classes")
        return source

    def _index(self, split: str) -> Shards:
        if split not in self._opened:
            paths = find(split, self.patterns[split])
            self._opened[split] = Shards(paths, read_index(split, self.label_key, paths))
        return self._opened[split]
