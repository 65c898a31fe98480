"""WebDataset's shards: what is read, and what a user is told."""

from __future__ import annotations

import json
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from PIL import Image as Pictures
from torch import Tensor

from framework.ablation.state import read_status
from framework.cli import main
from framework.config import dump
from framework.data import Image, ImageData, WebDataset
from framework.data import shards as module
from framework.data.shards import expand
from framework.errors import ConfigError
from tests.shards import data_of, error_of, fill, numbers, on_rank, picture, samples, settle, write


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    settle(monkeypatch, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path)


# What is read


def test_facts_and_splits(folder: Path) -> None:
    data = data_of(folder)
    assert (data.image, data.num_classes, data.class_names) == (Image(8, 3), 3, ["0", "1", "2"])
    assert [len(data.split(split)) for split in ("train", "val", "test")] == [61, 9, 9]
    assert numbers(data, [data.split("train").__getitems__(list(range(61)))]) == list(range(61))
    assert numbers(data, data.val_dataloader()) == list(range(100, 109)), "in the order of the shard"
    write(folder / "test-0.tar", samples(200, 5))
    assert numbers(data_of(folder, test=str(folder / "test-{0..0}.tar")), data_of(
        folder, test=str(folder / "test-{0..0}.tar")).test_dataloader()) == list(range(200, 205))  # fmt: skip


def test_names_of_classes(folder: Path) -> None:
    (folder / "classes.txt").write_text("ant\nbee\ncow\n\n")
    assert data_of(folder).class_names == ["ant", "bee", "cow"]
    (folder / "other.txt").write_text("a\nb\nc\nd\n")
    assert data_of(folder, classes=str(folder / "other.txt")).num_classes == 4


def test_a_tenth_is_held_out(folder: Path) -> None:
    data = data_of(folder, val="")
    train, val = (set(numbers(data, [data.split(s).__getitems__(list(range(len(data.split(s)))))]))
                  for s in ("train", "val"))  # fmt: skip
    assert train | val == set(range(61))
    assert len(val) == 7
    assert not train & val
    other = data_of(folder, val="", split_seed=1)
    assert set(numbers(other, other.val_dataloader())) != val
    order = list(on_rank(data, 0, 1).sampler)
    assert sorted(order) == list(range(54)), "the order is one of the pictures that are left"


def test_what_belongs_together(tmp_path: Path) -> None:
    """Folders, endings in capitals, endings of several parts, and members that are none of ours."""
    long = "x" * 150  # more than a plain header can hold
    write(
        tmp_path / "train-0.tar",
        {
            "README": b"no ending",
            "a.b/1.PNG": picture(1),
            "a.b/1.seg.png": b"another task's",
            "a.b/1.json": json.dumps({"label": 1, "text": "x"}).encode(),
            "a.b/._1.png": b"left by a Mac",
            "2.json": json.dumps({"label": 0}).encode(),
            "2.cls": b" 2\n",
            "2.png": picture(2),
            f"{long}.png": picture(3),
            f"{long}.cls": b"0",
        },
    )
    data = WebDataset(str(tmp_path / "train-?.tar"), size=8, workers=0, crop=0, flip=False)
    source = data._open("train")
    assert [source[n][1] for n in range(3)] == [1, 2, 0], ".cls comes before .json"
    assert [source[n][0].getpixel((0, 0))[0] for n in range(3)] == [1, 2, 3]
    assert source.name_of(0) == f"{tmp_path / 'train-0.tar'}: a.b/1.PNG"


def test_shards_of_the_webdataset_library(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "train-0.tar")) as writer:
        for n in range(5):
            writer.write({"__key__": f"{n:03}", "png": Pictures.new("RGB", (8, 8), (n, 0, 0)), "cls": n % 3})
    with webdataset.TarWriter(str(tmp_path / "train-1.tar")) as writer:
        for n in range(5, 9):
            writer.write({"__key__": f"{n:03}", "png": picture(n), "json": {"kind": n % 3}})
    data = WebDataset(str(tmp_path / "train-{0..1}.tar"), size=8, label_key="kind", workers=0)
    source = data._open("train")
    theirs = webdataset.WebDataset([str(path) for path in source.paths], shardshuffle=False, empty_check=False).decode(
        "pil"
    )
    found = [(sample["png"].getpixel((3, 3)), sample.get("cls", sample.get("json", {}))) for sample in theirs]
    found = [(pixel, label["kind"] if isinstance(label, dict) else label) for pixel, label in found]
    assert found == [(source[n][0].getpixel((3, 3)), source[n][1]) for n in range(9)]


def test_braces() -> None:
    assert expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand("{a,bc}/{0..1}") == ["a/0", "a/1", "bc/0", "bc/1"]
    assert expand("{x}/{}") == ["{x}/{}"]


# What a user is told


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"9.png": picture(9)}, "train-00.tar: 9 has no class: no .cls or .json member beside .png"),
        ({"9.cls": b"1", "9.txt": b"x"}, "train-00.tar: 9 has 0 pictures, must be one; its members: .cls, .txt"),
        ({"9.png": picture(9), "9.jpg": b"", "9.cls": b"1"}, "train-00.tar: 9 has 2 pictures, must be one"),
        ({"9.png": picture(9), "9.cls": b"cat"}, "9.cls: the class is 'cat', must be a whole number from 0 on"),
        ({"9.png": picture(9), "9.cls": b"-1"}, "9.cls: the class is '-1', must be"),
        ({"9.png": picture(9), "9.cls": b"9" * 30}, "9.cls: the class is '9999"),
        ({"9.png": picture(9), "9.json": b"{"}, "9.json: the class is '{', must be"),
        ({"9.png": picture(9), "9.json": b'{"label": "a"}'}, "9.json: the class is 'a', must be"),
        ({"9.png": picture(9), "9.json": b'{"lable": 1}'}, "9.json has no 'label'; set data.label_key; did you mean"),
        ({}, "train-00.tar has no images for training"),
    ],
)
def test_samples_that_are_not_whole(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    write(tmp_path / "train-00.tar", members)
    with pytest.raises(ConfigError) as caught:
        WebDataset(str(tmp_path / "train-00.tar"), size=8).split("train")
    found = str(caught.value)
    assert message in found
    assert found.startswith("data")


@pytest.mark.parametrize("keep", [300, 512 * 7, 512 * 7 + 100, 512 * 119])
def test_a_shard_that_is_cut_off(folder: Path, keep: int) -> None:
    path = folder / "train-02.tar"
    path.write_bytes(path.read_bytes()[:keep])
    assert error_of(folder).startswith(f"data.train: {path} is no whole, uncompressed .tar file (ReadError")


def test_broken_shards(folder: Path) -> None:
    path = folder / "train-02.tar"
    content = bytearray(path.read_bytes())
    content[512 * 8 : 512 * 9] = os.urandom(512)
    path.write_bytes(content)
    assert f"{path} is no whole, uncompressed .tar file" in error_of(folder)
    with tarfile.open(path, "w:gz"):
        pass
    assert f"{path} is no whole, uncompressed .tar file" in error_of(folder)


def test_missing_shards(folder: Path) -> None:
    (folder / "train-01.tar").unlink()
    (folder / "train-03.tar").unlink()
    message = error_of(folder)
    assert message.startswith(f"data.train: no shard train-01.tar (and 1 more of 4) in {folder}; did you mean")
    present = str(folder / "train-*.tar")
    assert "data.val: no shard vall-*.tar" in error_of(folder, train=present, val=str(folder / "vall-*.tar"))
    assert "names no shard; a range counts up" in error_of(folder, train="train-{3..1}.tar")
    assert error_of(folder / "none").endswith("there is no such folder")


def test_classes_out_of_range(folder: Path) -> None:
    write(folder / "val-0.tar", {**samples(0, 4), "x.png": picture(1), "x.cls": b"3"})
    message = error_of(folder)
    assert message == f"data.val: {folder / 'val-0.tar'}: x.png has class 3, but there are 3 classes"
    (folder / "classes.txt").write_text("ant\nbee\n")
    assert "train-00.tar: 0002.png has class 2, but there are 2 classes" in error_of(folder)
    assert f"no file {folder / 'nowhere.txt'}" in error_of(folder, classes=str(folder / "nowhere.txt"))


def test_bad_pictures_are_counted_and_named(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(folder / "val-0.tar", {**samples(100, 3), "bad.png": b"no picture", "bad.cls": b"0"})
    data = data_of(folder)
    assert numbers(data, data.val_dataloader()) == [100, 101, 102]
    assert f"cannot read {folder / 'val-0.tar'}: bad.png" in capfd.readouterr().err
    assert f"cannot read {folder / 'val-0.tar'}: bad.png" in error_of(folder, bad_files=0)


def test_few_files_stay_open(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "OPEN", 2)
    source = data_of(folder)._open("train")
    for n in (0, 60, 25, 1, 45, 60):
        assert source[n][0].getpixel((0, 0))[0] == n
    assert len(source._files) == 2
    again = pickle.loads(pickle.dumps(source))
    assert not again._files
    assert again[7][0].getpixel((0, 0))[0] == 7


# Runs


def test_config_builds_it(folder: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=ImageData)
    chosen = {"class_path": "WebDataset", "init_args": {"train": str(folder / "train-*.tar"), "size": 8}}
    made = parser.instantiate_classes(parser.parse_object({"data": chosen})).data
    assert made.image == Image(8, 3)


def document_of(folder: Path, tiny: Any, **trainer: Any) -> dict[str, Any]:
    arguments = {"train": str(folder / "train-{00..03}.tar"), "val": str(folder / "val-0.tar"), "size": 8}
    data = {"class_path": "WebDataset", "init_args": {**arguments, "batch_size": 8, "workers": 0}}
    return tiny(data=data, trainer={"accelerator": "cpu", "max_epochs": 1, **trainer})


def test_a_run_from_the_command_line(folder: Path, tmp_path: Path, tiny: Any) -> None:
    (folder / "run.yaml").write_text(dump(document_of(folder, tiny, limit_train_batches=1.0, limit_val_batches=1.0)))
    assert main(["fit", "--config", str(folder / "run.yaml"), "--runs", str(tmp_path / "runs")]) == 0
    (last,) = (tmp_path / "runs").glob("**/checkpoints/last.ckpt")
    assert read_status(last.parent.parent).state == "finished"
    assert torch.load(last, weights_only=True)["global_step"] == 61 // 8


class Watch(LightningModule):
    """Writes down which pictures each device sees in each epoch."""

    def __init__(self, data: WebDataset, folder: Path) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.data, self.folder = data, folder
        self.seen: list[list[int]] = []

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.seen[-1] += numbers(self.data, [batch])
        return self.layer(torch.ones(1, 1)).sum()

    def on_train_end(self) -> None:
        (self.folder / f"seen{self.global_rank}.json").write_text(json.dumps(self.seen))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_two_processes_share_an_epoch(folder: Path) -> None:
    data = data_of(folder, batch_size=10)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.fit(Watch(data, folder), datamodule=data)
    one, two = (json.loads((folder / f"seen{rank}.json").read_text()) for rank in (0, 1))
    for epoch in (0, 1):
        assert len(one[epoch]) == len(two[epoch]) == 30
        assert len(set(one[epoch]) | set(two[epoch])) == 60, "every image once but for the one that is left out"
    assert one[0] != one[1]
    alone = data_of(folder, batch_size=10)
    loader = on_rank(alone, 1, 2)
    loader.sampler.set_epoch(1)
    assert numbers(alone, loader) == two[1]
