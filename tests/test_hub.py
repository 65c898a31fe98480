"""Hugging Face's `datasets` out of a folder: columns, splits, pictures, and what a user is told."""

from __future__ import annotations

import io
import json
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image as Pictures
from torch import Tensor

from framework.cli import main
from framework.config import dump
from framework.data import HuggingFace, Image, ImageData
from framework.data.memory import MemorySet
from framework.data.pictures import PictureSet
from framework.errors import ConfigError

datasets = pytest.importorskip("datasets")

NAMES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")

    connect = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        assert self.family == socket.AF_UNIX, "it reaches for the network"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


def picture(number: int, side: int = 8, mode: str = "RGB", **options: Any) -> dict[str, Any]:
    """A picture that says which one it is, as `datasets` stores it."""
    file = io.BytesIO()
    Pictures.new("RGB", (side, side), (number, 255 - number, 7)).convert(mode).save(file, "png", **options)
    return {"bytes": file.getvalue(), "path": None}


def table(first: int, count: int, side: int = 8, label: Any = None, **columns: Any) -> Any:
    label = datasets.ClassLabel(names=NAMES) if label is None else label
    content = {
        "note": [f"picture {n}" for n in range(first, first + count)],
        "picture": [picture(n, side) for n in range(first, first + count)],
        "kind": [n % 3 for n in range(first, first + count)],
        **columns,
    }
    features = {"note": datasets.Value("string"), "picture": datasets.Image(), "kind": label}
    features |= {name: datasets.Value("int64") for name in columns if name not in features}
    return datasets.Dataset.from_dict(content, datasets.Features(features))


@pytest.fixture
def save(tmp_path: Path) -> Any:
    def saved(*single: Any, **splits: Any) -> str:
        path = tmp_path / "set"
        shutil.rmtree(path, ignore_errors=True)
        (single[0] if single else datasets.DatasetDict(splits)).save_to_disk(path)
        return str(path)

    return saved


def raw(data: ImageData, split: str) -> tuple[Tensor, Tensor]:
    """Images with values in 0..255, and targets, without draws."""
    images = data.split(split)
    pixels, targets = images.__getitems__(list(range(len(images))))
    return ((pixels * images.std[:, None, None] + images.mean[:, None, None]) * 255).round(), targets


def numbers(data: ImageData, split: str) -> list[int]:
    """Which pictures these are."""
    pixels, targets = raw(data, split)
    assert torch.equal(pixels[:, 1], 255 - pixels[:, 0])
    assert torch.equal(pixels[:, 0, 0, 0].long() % 3, targets)
    return pixels[:, 0, 0, 0].int().tolist()


def error_of(path: str, **arguments: Any) -> str:
    def use() -> None:
        data = HuggingFace(path, **{"crop": 0, "flip": False, "size": 8, **arguments})
        _ = data.image, data.num_classes, data.class_names
        for split in ("train", "val", "test"):
            raw(data, split)

    with pytest.raises(ConfigError) as caught:
        use()
    message = str(caught.value)
    assert "\n" not in message
    return message


# Splits and columns


def test_three_splits(save: Any, capfd: pytest.CaptureFixture[str]) -> None:
    data = HuggingFace(save(train=table(0, 20), validation=table(20, 6), test=table(40, 5)), crop=0, flip=False)
    assert (data.image, data.num_classes, data.class_names) == (Image(8, 3), 3, NAMES)
    capfd.readouterr()
    assert numbers(data, "train") == list(range(20))
    assert numbers(data, "val") == list(range(20, 26))
    assert numbers(data, "test") == list(range(40, 45))
    assert capfd.readouterr().out == ""
    part = data.part("val")
    assert (part.source, part.count, part.indices) == ("val", 6, None)
    assert part.labels is not None
    assert part.labels.tolist() == [n % 3 for n in range(20, 26)]


def test_one_split_holds_a_tenth_out(save: Any) -> None:
    path = save(table(0, 60))
    data = HuggingFace(path, crop=0, flip=False)
    train, val = numbers(data, "train"), numbers(data, "val")
    assert sorted(train + val) == list(range(60))
    assert sorted(n % 3 for n in val) == [0, 0, 1, 1, 2, 2], "stratified"
    assert numbers(data, "test") == val
    other = HuggingFace(path, crop=0, flip=False, split_seed=1)
    assert numbers(other, "val") != val


def test_a_test_split_without_classes_is_not_used(save: Any) -> None:
    path = save(train=table(0, 9), valid=table(10, 3), test=table(20, 4, kind=[-1] * 4))
    assert numbers(HuggingFace(path, crop=0, flip=False), "test") == [10, 11, 12]


def test_columns_that_are_named(save: Any) -> None:
    more = datasets.concatenate_datasets(
        [table(0, 9), datasets.Dataset.from_dict({"mask": [picture(200)] * 9},
         datasets.Features({"mask": datasets.Image()}))], axis=1)  # fmt: skip
    path = save(more)
    message = error_of(path)
    assert message == (
        f"data.image_key: {path} has 2 columns of the type Image; "
        "name one of note (Value), picture (Image), kind (ClassLabel), mask (Image)"
    )
    data = HuggingFace(path, image_key="picture", crop=0, flip=False)
    assert sorted(numbers(data, "train") + numbers(data, "val")) == list(range(9))
    assert "has no column 'pictures'; did you mean 'picture'?" in error_of(path, image_key="pictures")
    assert f"'note' of {path} has the type Value('string'), must be Image" in error_of(path, image_key="note")


def test_plain_numbers_are_classes_where_they_are_named(save: Any) -> None:
    plain = datasets.Value("int32")
    path = save(train=table(0, 9, label=plain), validation=table(9, 3, label=plain))
    assert error_of(path).startswith(f"data.label_key: {path} has no columns of the type ClassLabel; name one of note")
    data = HuggingFace(path, label_key="kind", crop=0, flip=False)
    assert (data.num_classes, data.class_names) == (3, ["0", "1", "2"])
    assert numbers(data, "val") == [9, 10, 11]
    assert "must be ClassLabel or whole numbers" in error_of(path, label_key="note")


def test_rows_in_another_order(save: Any) -> None:
    assert numbers(HuggingFace(save(train=table(0, 9).select([4, 2, 8]), val=table(0, 3)), size=8), "val") == [0, 1, 2]
    chosen = HuggingFace(save(train=table(0, 9).select([4, 2, 8]), val=table(0, 3)), crop=0, flip=False)
    assert numbers(chosen, "train") == [4, 2, 8]


# Pictures


def test_facts_need_few_pictures(save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from framework.data import hub

    data = HuggingFace(save(train=table(0, 60), validation=table(60, 6)))
    read = []
    monkeypatch.setattr(hub, "read_picture", lambda file, real=hub.read_picture: read.append(1) or real(file))
    assert (data.image, data.num_classes, data.class_names) == (Image(8, 3), 3, NAMES)
    _ = data.part("train"), data.part("val"), data.part("test")
    assert len(read) == 8


def test_small_images_live_in_memory_and_are_drawn_as_others(save: Any) -> None:
    path = save(train=table(0, 20), validation=table(20, 6))
    assert isinstance(HuggingFace(path).split("train"), MemorySet)
    assert isinstance(HuggingFace(path, size=16).split("train"), MemorySet)
    drawn = HuggingFace(path, auto_augment="rand-m9")
    assert isinstance(drawn.split("train"), PictureSet)
    assert isinstance(drawn.split("val"), MemorySet)
    assert torch.equal(drawn.split("train").mean, HuggingFace(path).split("train").mean)
    assert isinstance(HuggingFace(path, size=72).split("train"), PictureSet)
    large = save(train=table(0, 20, side=72), validation=table(20, 6, side=72))
    assert isinstance(HuggingFace(large, size=8).split("train"), PictureSet)


def test_large_images_are_the_same_with_worker_processes(save: Any) -> None:
    path = save(train=table(0, 20, side=72), validation=table(20, 6, side=72))
    alone, helped = (HuggingFace(path, batch_size=4, workers=workers) for workers in (0, 2))
    assert alone.image == Image(72, 3)
    for split in ("train_dataloader", "val_dataloader"):
        loaders = [getattr(data, split)() for data in (alone, helped)]
        assert loaders[1].num_workers == 2
        for (images, targets), (same, labels) in zip(*loaders, strict=True):
            assert torch.equal(images, same)
            assert torch.equal(targets, labels)


def test_modes_and_orientation(save: Any, tmp_path: Path) -> None:
    deep = io.BytesIO()
    Pictures.fromarray(np.full((8, 8), 257 * 100, dtype=np.uint16)).save(deep, "png")
    turned = Pictures.new("L", (8, 8))
    turned.paste(200, (0, 0, 8, 2))
    tag = Pictures.Exif()
    tag[274] = 6
    file = io.BytesIO()
    turned.save(file, "png", exif=tag)
    grey = [{"bytes": content.getvalue(), "path": None} for content in (deep, file)]
    data = HuggingFace(save(train=table(0, 2, picture=grey), val=table(0, 2, picture=grey)), crop=0, flip=False)
    assert data.image == Image(8, 1)
    pixels, _ = raw(data, "val")
    assert pixels[0].unique().tolist() == [100], "16 bits become 8"
    assert pixels[1, 0, 3].tolist() == [0] * 6 + [200] * 2, "upright"


def test_a_file_outside_of_the_table(save: Any, tmp_path: Path) -> None:
    (tmp_path / "5.png").write_bytes(picture(5)["bytes"])
    outside = [{"bytes": None, "path": str(tmp_path / "5.png")}, picture(2)]
    data = HuggingFace(save(train=table(5, 2, picture=outside, kind=[2, 2]), val=table(0, 2)), crop=0, flip=False)
    assert numbers(data, "train") == [5, 2]


@pytest.mark.parametrize("side", [8, 72])
def test_bad_pictures_are_left_out_and_named(save: Any, side: int, capfd: pytest.CaptureFixture[str]) -> None:
    bad = [picture(0, side), {"bytes": b"no picture", "path": None}, picture(2, side), None]
    path = save(train=table(0, 9, side), validation=table(0, 4, picture=bad))
    data = HuggingFace(path, size=side, crop=0, flip=False)
    assert numbers(data, "val") == [0, 2]
    told = capfd.readouterr().err
    assert f"cannot read row 1 of {path} (val): " in told
    assert f"cannot read row 3 of {path} (val): the row has no picture; left out (2 of at most 10)" in told
    assert "2 files are bad, data.bad_files allows 1" in error_of(path, size=side, bad_files=1)


# What a user is told


def test_folders_that_are_none(tmp_path: Path, save: Any) -> None:
    message = error_of(str(tmp_path / "none"))
    assert message.startswith(f"data.path: no folder {tmp_path / 'none'}; datasets.load_dataset(name).save_to_disk")
    assert "is no folder of datasets.save_to_disk" in error_of(str(tmp_path))
    path = save(train=table(0, 9))
    (file,) = Path(path).glob("train/*.arrow")
    file.write_bytes(file.read_bytes()[:50])
    assert error_of(path).startswith(f"data.path: {path}: cannot be read by datasets")
    assert error_of(save(training=table(0, 9))).endswith("has no split train; there are: training")


def test_classes_must_agree(save: Any) -> None:
    other = datasets.ClassLabel(names=["ant", "bee", "elk"])
    path = save(train=table(0, 9), validation=table(0, 3, label=other))
    assert error_of(path).endswith("train and val have different classes: only one of them has cow, elk")
    turned = datasets.ClassLabel(names=NAMES[::-1])
    assert error_of(save(train=table(0, 9), val=table(0, 3, label=turned))).endswith("they are in another order")
    plain = datasets.Value("int64")
    path = save(train=table(0, 9, label=plain), val=table(0, 3, label=plain, kind=[0, 1, 7]))
    message = error_of(path, label_key="kind")
    assert message == f"data.path: row 2 of {path} (val) has class 7, but there are 3 classes, from 0 on"
    path = save(train=table(0, 3, kind=[0, None, 1]))
    assert f"row 1 of {path} (train) has class -1" in error_of(path)


def test_sizes_that_differ_need_one(save: Any) -> None:
    both = [picture(0, 8), picture(1, 10), picture(2, 8)]
    path = save(train=table(0, 3, picture=both), val=table(0, 3))
    assert "do not share one square size (8×8, 10×10); give one" in error_of(path, size=0)
    assert isinstance(HuggingFace(path, size=8).split("train"), PictureSet)


def test_without_the_library(save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(train=table(0, 9))
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "HuggingFace needs the package datasets" in error_of(path)
    assert "pip install 'datasets>=4.0'" in error_of(path)


# Runs


def test_config_builds_it(save: Any) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=ImageData)
    chosen = {"class_path": "HuggingFace", "init_args": {"path": save(train=table(0, 9))}}
    assert parser.instantiate_classes(parser.parse_object({"data": chosen})).data.image == Image(8, 3)


def test_a_run_from_the_command_line(save: Any, tmp_path: Path, tiny: Any) -> None:
    path = save(train=table(0, 60), validation=table(60, 9))
    data = {"class_path": "HuggingFace", "init_args": {"path": path, "batch_size": 8}}
    (tmp_path / "run.yaml").write_text(dump(tiny(data=data, trainer__accelerator="cpu", trainer__max_epochs=1)))
    assert main(["fit", "--config", str(tmp_path / "run.yaml"), "--runs", str(tmp_path / "runs")]) == 0
    (last,) = (tmp_path / "runs").glob("**/checkpoints/last.ckpt")
    assert torch.load(last, weights_only=True)["global_step"] == 1
    stored = json.loads((last.parent.parent / "splits.json").read_text())
    assert stored["class_names"] == NAMES
