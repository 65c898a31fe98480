"""Splits: fixed by a seed, stored with the run, compared when it goes on; and the class names of stored files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pictures

from framework.cli import main
from framework.data import Digits, ImageData, Npz, Torchvision
from framework.data.arrays import MEDMNIST
from framework.data.base import hold_out
from framework.data.splits import Part, compare, store
from framework.errors import ConfigError


def save(path: Path, count: int = 40, classes: int = 4, size: int = 8, **more: np.ndarray) -> str:
    labels = np.arange(count) % classes
    images = np.random.RandomState(0).randint(0, 256, (count, size, size)).astype(np.uint8)
    arrays: Any = {"train_images": images, "train_labels": labels, **more}
    np.savez(path, **arrays)
    return str(path)


def stored(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "splits.json").read_text(encoding="utf-8"))


def error_of(folder: Path, data: ImageData) -> str:
    with pytest.raises(ConfigError) as caught:
        compare(folder, data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The seed of a split


def test_seed_0_holds_out_what_it_always_did() -> None:
    assert hold_out(np.arange(40) % 4)[1].tolist() == [15, 20, 22, 25]
    assert hold_out(np.arange(40) % 4, seed=0)[1].tolist() == [15, 20, 22, 25]
    rest, held = hold_out(np.arange(40) % 4, seed=1)
    assert held.tolist() != [15, 20, 22, 25]
    assert sorted([*rest, *held]) == list(range(40))
    assert sorted(held % 4) == [0, 1, 2, 3]


def test_split_seed_is_an_argument_of_the_data(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npz")
    args = {"size": 40, "image_size": [3, 8, 8]}
    for made in (
        lambda seed: Npz(path, split_seed=seed),
        lambda seed: Torchvision("FakeData", split_seed=seed, args=args),
    ):
        first, again, other = (made(seed).part("val").indices.tolist() for seed in (0, 0, 1))
        assert first == again != other
        assert not set(first) & set(made(0).part("train").indices.tolist())
    with pytest.raises(ConfigError, match=r"data\.split_seed: got -1, must be at least 0"):
        Npz(path, split_seed=-1)


# What is stored


def test_digits_tell_their_splits(tmp_path: Path) -> None:
    data = Digits()
    store(tmp_path, data)
    found = stored(tmp_path)
    assert found["class_names"] == list("0123456789")
    counts = {split: told["count"] for split, told in found["splits"].items()}
    assert counts == {"train": 1197, "val": 300, "test": 300}
    indices = np.load(tmp_path / "splits.npz")
    for split, told in found["splits"].items():
        assert (told["source"], told["whole"]) == ("all", False)
        assert (indices[split] == data._indices[split]).all()
        assert told["per_class"] == np.bincount(data.read(split)[1]).tolist()
    compare(tmp_path, Digits(size=8))


def test_whole_splits_have_no_indices(tmp_path: Path) -> None:
    val = {"val_images": np.zeros((6, 8, 8), np.uint8), "val_labels": np.array([0, 0, 0, 1, 3, 3])}
    data = Npz(save(tmp_path / "a.npz", **val))
    store(tmp_path, data)
    splits = stored(tmp_path)["splits"]
    assert {split: told["source"] for split, told in splits.items()} == {"train": "train", "val": "val", "test": "val"}
    assert splits["val"]["per_class"] == [3, 1, 0, 2]
    assert splits["train"]["count"] == 40
    assert splits["val"]["hash"] == splits["test"]["hash"] != splits["train"]["hash"]
    assert not (tmp_path / "splits.npz").exists()


def test_parts_are_what_is_read(tmp_path: Path) -> None:
    data = Npz(save(tmp_path / "a.npz"))
    images = np.load(tmp_path / "a.npz")["train_images"]
    for split in ("train", "val", "test"):
        part = data.part(split)
        assert (data.read(split)[0][:, 0].numpy() == images[part.indices]).all()
        assert data.read(split)[1].tolist() == part.labels.tolist()


def test_splits_are_told_without_reading_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for n in range(20):
            Pictures.new("RGB", (8, 8)).save(tmp_path / "set" / name / f"{n}.png")
    data = Torchvision("ImageFolder", root=str(tmp_path / "set"), size=8)
    assert data.num_classes == 2
    monkeypatch.setattr(Pictures, "open", lambda path: pytest.fail(f"{path} was read"))
    store(tmp_path, data)
    found = stored(tmp_path)
    assert found["class_names"] == ["a", "b"]
    assert found["splits"]["train"]["per_class"] == [18, 18]
    assert np.load(tmp_path / "splits.npz")["val"].tolist() == data.split("val").indices.tolist()


def test_a_set_without_labels_in_bulk_tells_its_counts(tmp_path: Path) -> None:
    data = Torchvision("FakeData", args={"size": 40, "image_size": [3, 8, 8]})
    store(tmp_path, data)
    assert stored(tmp_path)["splits"]["train"]["count"] == 36
    assert "per_class" not in stored(tmp_path)["splits"]["train"]


def test_hash_depends_on_source_count_indices_and_labels() -> None:
    labels, indices = np.array([0, 1, 1]), np.array([4, 5, 9])
    parts = [
        Part("train", 3, labels, indices),
        Part("val", 3, labels, indices),
        Part("train", 3, labels),
        Part("train", 3, None, indices),
        Part("train", 4),
        Part("train", 3),
        Part("train", 3, np.array([0, 1, 0]), indices),
        Part("train", 3, labels, np.array([4, 5, 8])),
    ]
    assert len({part.summary(2)["hash"] for part in parts}) == len(parts)
    assert Part("train", 3, labels.astype(np.uint8), indices.astype(np.int32)).summary(2) == parts[0].summary(2)


# What is compared


def test_another_split_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save(path)
    store(tmp_path, Npz(str(path)))
    compare(tmp_path, Npz(str(path)))
    splits = stored(tmp_path)["splits"]
    error = error_of(tmp_path, Npz(str(path), split_seed=1))
    assert error.startswith(
        "data: the training split is not the one this run began with: it was a part of train, 36 images, "
        f"hash {splits['train']['hash']}, now it is a part of train, 36 images, hash "
    )
    save(path, val_images=np.zeros((4, 8, 8), np.uint8), val_labels=np.arange(4))
    assert "now it is train, 40 images" in error_of(tmp_path, Npz(str(path)))
    store(tmp_path, Npz(str(path)))
    save(path, val_images=np.zeros((5, 8, 8), np.uint8), val_labels=np.arange(5) % 4)
    error = error_of(tmp_path, Npz(str(path)))
    assert "the validation split is not the one" in error
    assert "it was val, 4 images" in error
    assert "now it is val, 5 images" in error


def test_other_class_names_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    save(path, class_names=np.array(["cat", "dog", "elk", "fox"]))
    store(tmp_path, Npz(str(path)))
    save(path, class_names=np.array(["cat", "elk", "dog", "fox"]))
    assert error_of(tmp_path, Npz(str(path))) == (
        "data: the classes are not those this run began with: 4 then, 4 now; "
        "the first that differs is number 1: ['dog'] then, ['elk'] now"
    )


def test_a_folder_without_splits_is_left_alone(tmp_path: Path) -> None:
    compare(tmp_path, Digits())
    (tmp_path / "splits.json").write_text("{")
    assert "splits.json: cannot be read" in error_of(tmp_path, Digits())


def test_a_run_stores_its_splits_and_goes_on_with_them(tmp_path: Path, capsys: Any) -> None:
    path = save(tmp_path / "a.npz")
    config = tmp_path / "run.yaml"
    config.write_text(
        f"extends: {Path(__file__).parent}/configs/tnt.yaml\n"
        f"data: {{class_path: Npz, init_args: {{path: {path}, size: 16, batch_size: 4}}}}\n"
    )
    runs = tmp_path / "runs"
    command = ["fit", "--config", str(config), "--runs", str(runs), "--trainer.accelerator=cpu", "--name=a"]
    assert main(command) == 0
    folder = runs / "a" / "0"
    splits = stored(folder)["splits"]
    assert {split: told["count"] for split, told in splits.items()} == {"train": 36, "val": 4, "test": 4}
    assert np.load(folder / "splits.npz")["val"].tolist() == [15, 20, 22, 25]
    on = ["fit", "--config", str(folder / "config.yaml"), "--ckpt_path", str(folder / "checkpoints/last.ckpt"),
          "--trainer.max_epochs=2"]  # fmt: skip
    capsys.readouterr()
    assert main([*on, "--data.split_seed=3"]) == 2
    assert "was made with another config: data.split_seed: (not set) → 3" in capsys.readouterr().err
    save(path, count=43)
    assert main(on) == 2
    assert "error: data: the training split is not the one this run began with" in capsys.readouterr().err
    save(path)
    assert stored(folder)["splits"] == splits
    assert main(on) == 0


# Class names of stored files


@pytest.mark.parametrize("name", ["pathmnist", "pathmnist_64", "pathmnist_128", "pathmnist_224"])
def test_med_mnist_file_names_give_the_classes(tmp_path: Path, name: str) -> None:
    size = int(name.partition("_")[2] or 28)
    data = Npz(save(tmp_path / f"{name}.npz", count=18, classes=9, size=size), size=16)
    assert data.num_classes == 9
    assert data.class_names[8] == "colorectal adenocarcinoma epithelium"
    assert data.split("train")[0][0].shape == (1, 16, 16)


def test_published_classes() -> None:
    counts = {name: len(classes) for name, classes in MEDMNIST.items()}
    assert counts == {
        "pathmnist": 9, "dermamnist": 7, "octmnist": 4, "pneumoniamnist": 2, "retinamnist": 5, "breastmnist": 2,
        "bloodmnist": 8, "tissuemnist": 8, "organamnist": 11, "organcmnist": 11, "organsmnist": 11,
    }  # fmt: skip
    assert all(len(set(classes)) == len(classes) for classes in MEDMNIST.values())


def test_names_in_the_file_win_and_a_namesake_keeps_its_numbers(tmp_path: Path) -> None:
    own = np.array(["a", "b", "c", "d"])
    assert Npz(save(tmp_path / "octmnist.npz", class_names=own)).class_names == ["a", "b", "c", "d"]
    assert Npz(save(tmp_path / "breastmnist.npz")).class_names == ["0", "1", "2", "3"], "4 classes, not MedMNIST's 2"
    assert Npz(save(tmp_path / "pathmnist_65.npz")).class_names == ["0", "1", "2", "3"]


def test_several_labels_for_an_image_are_another_task(tmp_path: Path) -> None:
    path = save(tmp_path / "chestmnist.npz", train_labels=np.zeros((40, 14), np.uint8))
    with pytest.raises(ConfigError) as caught:
        _ = Npz(path).num_classes
    assert str(caught.value) == (
        f"data.path: {path}: train_labels has shape (40, 14), must be (N,) or (N, 1): one class for each image; "
        "14 labels for one image are another task, multi-label"
    )
