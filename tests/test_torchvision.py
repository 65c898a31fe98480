"""Torchvision's data sets: splits, sizes, folders, what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures

from framework.data import Image, Torchvision
from tests.test_data import epoch_of, error_of, run_seed  # noqa: F401
from tests.test_npz import arrays, raw, save  # noqa: F401


def test_known_sets_need_no_files() -> None:
    data = Torchvision("CIFAR100", root="/nowhere")
    assert (data.image, data.num_classes) == (Image(32, 3), 100)
    assert Torchvision("OxfordIIITPet", size=224).image == Image(224, 3)
    assert Torchvision("MNIST").image == Image(28, 1)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Pictures of two classes, red ones and green ones, of different sizes; 20 to train, 6 to validate."""
    numbers = np.random.RandomState(0)
    for split, count in {"train": 10, "val": 3}.items():
        for channel, name in enumerate(("red", "green")):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(count):
                pixels = numbers.randint(0, 60, (20 + n, 30, 3)).astype(np.uint8)
                pixels[..., channel] += 150
                Pictures.fromarray(pixels).save(tmp_path / split / name / f"{n}.png")
    return tmp_path


def test_fake_data() -> None:
    data = Torchvision("FakeData", batch_size=8, args={"size": 50, "image_size": [3, 72, 72], "num_classes": 4})
    assert (data.image, data.num_classes) == (Image(72, 3), 4)
    assert data.class_names == ["0", "1", "2", "3"]
    assert [len(data.split(split)) for split in ("train", "val", "test")] == [45, 5, 5]
    assert next(iter(data.val_dataloader()))[0].shape == (5, 3, 72, 72)
    grey = Torchvision("FakeData", args={"size": 20, "image_size": [1, 16, 16]})
    assert grey.image == Image(16, 1)
    assert grey.split("train")[0][0].shape == (1, 16, 16)


def test_folders_of_another_set_are_left_alone(folders: Path) -> None:
    assert len(Torchvision("FakeData", root=str(folders), size=8, args={"size": 20}).split("train")) == 18
    assert error_of(Torchvision, "EuroSAT", root=str(folders)).startswith("data.root: no EuroSAT under")


def test_workers_change_nothing() -> None:
    args = {"size": 40, "image_size": [3, 16, 16]}
    torch.manual_seed(1)
    alone = Torchvision("FakeData", batch_size=8, workers=0, args=args)
    torch.manual_seed(2)
    helped = Torchvision("FakeData", batch_size=8, workers=2, args=args)
    loader = helped.train_dataloader()
    assert loader.num_workers == 2
    for epoch in (0, 2):  # the worker processes stay between the epochs
        images, targets = epoch_of(alone, epoch)
        loader.sampler.set_epoch(epoch)
        found = list(loader)
        assert torch.equal(torch.cat([batch for batch, _ in found]), images)
        assert torch.equal(torch.cat([labels for _, labels in found]), targets)
    assert not torch.equal(epoch_of(alone, 0)[0], epoch_of(alone, 1)[0])


def test_augmentation_leaves_the_global_generator_alone(folders: Path) -> None:
    train = Torchvision("ImageFolder", root=str(folders), size=72).split("train")
    before = torch.get_rng_state()
    assert torch.equal(train[3][0], train[3][0])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(train[3][0], train[3 + len(train)][0]), "another epoch"


@pytest.mark.parametrize("size", [16, 72])
def test_image_folder(folders: Path, size: int) -> None:
    data = Torchvision("ImageFolder", root=str(folders), size=size, batch_size=4, workers=0)
    assert (data.image, data.num_classes) == (Image(size, 3), 2)
    assert data.class_names == ["green", "red"]
    assert [len(data.split(split)) for split in ("train", "val", "test")] == [20, 6, 6]
    for images, targets in (epoch_of(data), next(iter(data.val_dataloader()))):
        assert images.shape[1:] == (3, size, size)
        centre = images[:, :, size // 2, size // 2]
        assert torch.equal((centre[:, 0] > centre[:, 1]).long(), targets), "red is class 1"


def test_image_folder_without_splits(folders: Path) -> None:
    data = Torchvision("ImageFolder", root=str(folders / "train"), size=16)
    train, val = data.split("train"), data.split("val")
    assert (len(train), len(val)) == (18, 2)
    assert not set(train.indices) & set(val.indices)
    assert sorted(val[n][1].item() for n in range(2)) == [0, 1], "stratified"


def test_eval_shows_the_centre(folders: Path) -> None:
    data = Torchvision("ImageFolder", root=str(folders), size=70)
    source, val = data._open("val"), data.split("val")
    picture = source[0][0].resize((120, 80), Pictures.Resampling.BICUBIC).crop((25, 5, 95, 75))
    expected = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 255
    found = val[0][0] * val.std[:, None, None] + val.mean[:, None, None]
    assert torch.allclose(found, expected, atol=1.5 / 255)


def write_idx(root: Path, name: str, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    (root / name).write_bytes(header + array.astype(np.uint8).tobytes())


def test_fashion_mnist_lives_in_memory(tmp_path: Path) -> None:
    folder = tmp_path / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    stored = arrays(100, (28, 28)) | arrays(20, (28, 28), 1, "t10k")
    for name, array in stored.items():
        split, part = name.split("_")
        write_idx(folder, f"{split}-{part}-idx{array.ndim}-ubyte", array)
    data = Torchvision("FashionMNIST", root=str(tmp_path), batch_size=90)
    assert [len(data.split(split)) for split in ("train", "val", "test")] == [90, 10, 20]
    assert data.class_names[0] == "T-shirt/top"
    assert data.train_dataloader().num_workers == 0
    images, targets = raw(data, "test")
    assert torch.equal(images[:, 0], torch.as_tensor(stored["t10k_images"]).float())
    assert torch.equal(images[:, 0, 0, 0].long(), targets)
    plain = Torchvision("FashionMNIST", root=str(tmp_path), batch_size=90, crop=0, flip=False)
    images, _ = epoch_of(plain)
    assert images.mean().abs() < 1e-4
    assert torch.bincount(plain.split("val").__getitems__(list(range(10)))[1]).min() >= 2
    assert not torch.equal(epoch_of(data)[0], images)
    large = Torchvision("FashionMNIST", root=str(tmp_path), size=72)
    assert large.split("train")[0][0].shape == (1, 72, 72)
    assert large.train_dataloader().num_workers == 2


def test_cifar_lives_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    stored = arrays(40, (3, 32, 32)) | arrays(8, (3, 32, 32), 1, "test")
    for split in ("train", "test"):
        batch = {"data": stored[f"{split}_images"].reshape(-1, 3072), "labels": stored[f"{split}_labels"].tolist()}
        (folder / split).write_bytes(pickle.dumps(batch))
        monkeypatch.setattr(CIFAR10, f"{split}_list", [[split, None]])
    (folder / "meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": None})
    data = Torchvision("CIFAR10", root=str(tmp_path), size=0)
    assert [len(data.split(split)) for split in ("train", "val", "test")] == [36, 4, 8]
    images, targets = raw(data, "test")
    assert torch.equal(images, torch.as_tensor(stored["test_images"]).float())
    assert torch.equal(images[:, 0, 0, 0].long(), targets)
    assert data.class_names == list("abcdefghij")


def test_split_of_args_trains_and_holds_out(tmp_path: Path) -> None:
    folder = tmp_path / "EMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, array in (arrays(40, (28, 28)) | arrays(8, (28, 28), 1, "test")).items():
        split, part = name.split("_")
        write_idx(folder, f"emnist-letters-{split}-{part}-idx{array.ndim}-ubyte", array)
    data = Torchvision("EMNIST", root=str(tmp_path), args={"split": "letters"})
    assert (data.image, data.num_classes) == (Image(28, 1), 27)
    assert [len(data.split(split)) for split in ("train", "val", "test")] == [36, 4, 8]
    assert "Unknown value 'leters' for argument split" in error_of(
        Torchvision, "EMNIST", str(tmp_path), args={"split": "leters"}
    )


def test_own_val_split_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets with `split`: values that one does not know are passed over, as torchvision says so."""
    from torchvision import datasets

    class Sliced(datasets.FakeData):
        def __init__(self, root: str, split: str = "trainval") -> None:
            counts = {"trainval": 20, "valid": 4, "test": 6}
            datasets.utils.verify_str_arg(split, "split", tuple(counts))
            super().__init__(size=counts[split], image_size=(3, 16, 16), num_classes=2)

    monkeypatch.setattr(datasets, "FakeData", Sliced)
    data = Torchvision("FakeData", root=str(tmp_path))
    assert [len(data.split(split)) for split in ("train", "val", "test")] == [20, 4, 6]
    named = Torchvision("FakeData", root=str(tmp_path), args={"split": "trainval"})
    assert [len(named.split(split)) for split in ("train", "val", "test")] == [18, 2, 6]


def test_download_happens_once_in_prepare_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    calls = []

    class Fetched(datasets.FakeData):
        def __init__(self, root: Path, train: bool = True, download: bool = False) -> None:
            calls.append((train, download))
            if not download:
                raise RuntimeError("Dataset not found. You can use download=True to download it")
            super().__init__(size=20, image_size=(3, 16, 16))

    monkeypatch.setattr(datasets, "FakeData", Fetched)
    data = Torchvision("FakeData", root=str(tmp_path / "new"), download=True)
    data.prepare_data()
    assert len(data.split("train")) == 18
    assert calls == [(True, True), (False, True)]
    error = error_of(Torchvision, "FakeData", root=str(tmp_path))
    assert error == f"data.root: no FakeData under {tmp_path}; put it there or set download: true"


def test_unlabelled_test_split_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    class Challenge(datasets.FakeData):
        def __init__(self, train: bool = True) -> None:
            super().__init__(size=20 if train else 7, image_size=(3, 16, 16))
            self.train = train

        def __getitem__(self, index: int) -> Any:
            picture, target = super().__getitem__(index)
            return picture, target if self.train else None

    monkeypatch.setattr(datasets, "FakeData", Challenge)
    assert len(Torchvision("FakeData").split("test")) == 2


def test_torchvision_errors(folders: Path, tmp_path: Path) -> None:
    error = error_of(Torchvision, "CIFAR1O")
    assert error.startswith("data.dataset: torchvision has no data set 'CIFAR1O'; did you mean 'CIFAR10'?")
    assert error_of(Torchvision, "Flowers102").startswith("data.size: the images of Flowers102 differ in size")
    missing = error_of(Torchvision, "CIFAR10", root=str(tmp_path))
    assert missing == f"data.root: no CIFAR10 under {tmp_path}; put it there or set download: true"
    missing = error_of(Torchvision, "ImageFolder", root="/nowhere", size=16)
    assert missing == "data.root: no ImageFolder under /nowhere; put it there (there is no such folder)"
    missing = error_of(Torchvision, "ImageNet", root=str(tmp_path), size=16)
    assert "no ImageNet under" in missing
    assert "ILSVRC2012_devkit_t12.tar.gz is not present" in missing
    error = error_of(Torchvision, "ImageFolder", root=str(folders))
    assert error == (
        "data.size: the images of ImageFolder do not share one square size (20×30, 22×30, 23×30); give one, such as 224"
    )
    error = error_of(Torchvision, "FakeData", args={"sise": 3})
    assert error.startswith("data.args: FakeData has no 'sise' to set here; did you mean 'size'?")
    assert error_of(Torchvision, "FakeData", args={"size": 0}) == "data: FakeData has no images for training"
    assert error_of(Torchvision, "FakeData", size=8, args={"size": 1}) == "data: FakeData has no images for training"
    error = error_of(Torchvision, "FakeData", download=True)
    assert error == "data.download: torchvision cannot fetch FakeData; set download: false"
    assert "frames_per_clip" in error_of(Torchvision, "UCF101", root=str(tmp_path), size=16)


def test_class_folders_must_agree(folders: Path) -> None:
    (folders / "val" / "red").rename(folders / "val" / "blue")
    error = error_of(Torchvision, "ImageFolder", root=str(folders), size=16)
    assert "train and val have different classes" in error
    assert error.endswith("only one of them has blue, red")


def test_other_tasks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    monkeypatch.setattr(datasets.FakeData, "__getitem__", lambda self, index: (Pictures.new("RGB", (8, 8)), [1]))
    error = error_of(Torchvision, "FakeData")
    assert "is not for image classification: it gives (Image, list)" in error


# All of them
