"""Data modules: what a batch holds, what its order and draws depend on, and what a user is told."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from PIL import Image as Pictures
from torch import Tensor
from torch.utils.data import RandomSampler

import framework.data
from framework.data import Digits, Image, ImageData, Npz, Torchvision
from framework.data.base import Order, hold_out
from framework.data.memory import MemorySet
from framework.errors import ConfigError


@pytest.fixture(autouse=True)
def run_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def epoch_of(data: ImageData, epoch: int = 0) -> tuple[Tensor, Tensor]:
    """All training images and targets of an epoch, as they come."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    images, targets = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(targets)


def error_of(data: Any, *args: Any, **kwargs: Any) -> str:
    """The message with which a data module, or reading all of it, ends."""

    def use() -> None:
        made = data(*args, **kwargs)
        _ = made.image, made.num_classes, made.class_names
        for split in ("train", "val", "test"):
            made.split(split)

    with pytest.raises(ConfigError) as caught:
        use()
    message = str(caught.value)
    assert "\n" not in message
    return message


# Order and draws


def test_order_depends_on_seed_and_epoch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def order(epoch: int) -> list[int]:
        sampler = Order(50)
        sampler.set_epoch(epoch)
        return list(sampler)

    torch.manual_seed(1)
    first = order(0)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert order(0) == first
    assert torch.equal(torch.get_rng_state(), before), "the global generator moved"
    assert sorted(first) == list(range(50))
    later = order(3)
    assert [key // 50 for key in later] == [3] * 50
    assert sorted(key % 50 for key in later) == list(range(50))
    assert [key % 50 for key in later] != first
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert order(0) != first


def test_same_epoch_gives_same_augmented_images() -> None:
    torch.manual_seed(1)
    images, targets = epoch_of(Digits(crop=2), 1)
    torch.manual_seed(2)
    again, same = epoch_of(Digits(crop=2), 1)
    assert torch.equal(images, again)
    assert torch.equal(targets, same)
    other, _ = epoch_of(Digits(crop=2), 2)
    assert not torch.equal(images, other)


def test_draws_of_an_image_do_not_depend_on_its_batch() -> None:
    small, large = Digits(crop=2, batch_size=3).split("train"), Digits(crop=2, batch_size=64).split("train")
    key = 5 * len(small) + 7  # image 7 in epoch 5
    assert torch.equal(small[key][0], large.__getitems__([key + 1, key, key + 9])[0][1])
    assert not torch.equal(small[key][0], small[7][0])


def test_seed_changes_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    train = Digits(crop=2).split("train")
    images = train.__getitems__(list(range(20)))[0]
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert not torch.equal(train.__getitems__(list(range(20)))[0], images)


def test_crop_shifts_and_flip_mirrors() -> None:
    image = torch.arange(1, 50, dtype=torch.uint8).reshape(1, 1, 7, 7)
    images, targets = image.expand(400, 3, 7, 7), torch.zeros(400, dtype=torch.int64)
    train = MemorySet(images, targets, torch.zeros(3), torch.ones(3), crop=2, flip=True)
    found = (train.__getitems__(list(range(400)))[0] * 255).round()
    assert found.shape == (400, 3, 7, 7)
    padded = torch.nn.functional.pad(image[0, 0].float(), (2, 2, 2, 2))
    windows = [padded[y : y + 7, x : x + 7] for y in range(5) for x in range(5)]
    allowed = {tuple(w.flatten().tolist()) for window in windows for w in (window, window.flip(1))}
    got = {tuple(map(float, one.flatten().tolist())) for one in found[:, 1]}
    assert got == {tuple(map(float, one)) for one in allowed}, "all 50 windows, and nothing else"
    assert torch.equal(found[:, 0], found[:, 2])


class Watch(LightningModule):
    """Keeps the targets of every epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    def on_train_epoch_start(self) -> None:
        self.seen.append([])

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.seen[-1] += batch[1].tolist()
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def test_lightning_tells_the_epoch() -> None:
    def fit(**arguments: Any) -> list[list[int]]:
        watch = Watch()
        torch.manual_seed(len(arguments))
        options = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
                   "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 1}  # fmt: skip
        Trainer(**options, **arguments).fit(watch, datamodule=Digits())
        return watch.seen

    first, second = fit()
    data = Digits()
    assert first == epoch_of(data, 0)[1].tolist()
    assert second == epoch_of(data, 1)[1].tolist()
    assert first != second
    # Lightning replaces the sampler here; keys are plain indices then.
    fixed, again = fit(overfit_batches=2)
    assert fixed == again == data.split("train").__getitems__(list(range(128)))[1].tolist()


def test_distributed_sampler_shares_the_epoch_out() -> None:
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper

    shares = [DistributedSamplerWrapper(Order(40), num_replicas=2, rank=rank, seed=0) for rank in (0, 1)]
    for share in shares:
        share.set_epoch(3)
    assert sorted(key for share in shares for key in share) == list(range(120, 160))


def test_batches() -> None:
    assert len(Digits(batch_size=64).train_dataloader()) == 1197 // 64, "the rest is dropped"
    assert len(Digits(batch_size=1000).train_dataloader()) == 2, "one full batch: the rest is kept"
    assert len(Digits(batch_size=5000).train_dataloader()) == 1
    val = Digits(batch_size=64).val_dataloader()
    assert len(val) == 5
    assert not isinstance(val.sampler, RandomSampler | Order)
    images, targets = next(iter(val))
    assert images.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert images.shape == (64, 1, 16, 16)


# Digits


def test_digits() -> None:
    data = Digits(batch_size=1197)
    assert data.image == Image(16, 1)
    assert data.num_classes == 10
    assert data.class_names == list("0123456789")
    images, _ = epoch_of(data)
    assert images.mean().abs() < 1e-4
    assert (images.std() - 1).abs() < 1e-3
    assert Digits(size=8).image == Image(8, 1)
    assert Digits(size=8).split("val")[0][0].shape == (1, 8, 8)


def test_digits_splits_are_disjoint_stratified_and_right() -> None:
    from sklearn.datasets import load_digits

    data, digits = Digits(size=8), load_digits()
    parts = data._indices
    assert sorted(np.concatenate(list(parts.values()))) == list(range(1797))
    for split, count in {"train": 1197, "val": 300, "test": 300}.items():
        images, targets = data.read(split)
        assert len(images) == len(targets) == count
        assert all(abs(n / count - 0.1) < 0.01 for n in torch.bincount(targets))
        assert (targets.numpy() == digits.target[parts[split]]).all()
        assert np.allclose(images[:, 0].numpy() / 255 * 16, digits.images[parts[split]], atol=0.05)


def test_sample_is_what_the_net_sees_first() -> None:
    data = Digits(crop=2, batch_size=64)
    images, targets = data.sample(10)
    assert images.shape == (10, 1, 16, 16)
    assert images.min() >= 0
    assert 0.9 < images.max() <= 1
    batch, labels = next(iter(data.train_dataloader()))
    assert torch.equal(targets, labels[:10])
    train = data.split("train")
    assert torch.allclose((images - train.mean) / train.std, batch[:10], atol=1e-5)
    assert len(data.sample(5000)[0]) == 1197


def test_hold_out_is_stratified() -> None:
    labels = np.repeat([0, 1, 2], [100, 200, 50])
    rest, held = hold_out(labels)
    assert sorted([*rest, *held]) == list(range(350))
    assert np.bincount(labels[held]).tolist() == [10, 20, 5]
    assert (hold_out(labels)[1] == held).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "data.batch_size: got 0, must be at least 1"),
        ({"size": 0}, "data.size: got 0, must be at least 1"),
        ({"crop": -1}, "data.crop: got -1, must be at least 0"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, int], message: str) -> None:
    assert error_of(Digits, **arguments) == message


# Npz


def arrays(count: int = 40, shape: tuple[int, ...] = (8, 8), seed: int = 0, prefix: str = "train") -> dict[str, Any]:
    """Random images whose first pixel is their label, 0..3."""
    numbers = np.random.RandomState(seed)
    images = numbers.randint(0, 256, (count, *shape)).astype(np.uint8)
    labels = np.arange(count) % 4
    images.reshape(count, -1)[:, 0] = labels
    return {f"{prefix}_images": images, f"{prefix}_labels": labels}


@pytest.fixture
def save(tmp_path: Path) -> Any:
    def save(**stored: Any) -> str:
        np.savez(tmp_path / "set.npz", **stored)
        return str(tmp_path / "set.npz")

    return save


def raw(data: ImageData, split: str) -> tuple[Tensor, Tensor]:
    """The images of a split as they were stored, and their targets."""
    images = data.split(split)
    batch, targets = images.__getitems__(list(range(len(images))))
    return (255 * (batch * images.std[:, None, None] + images.mean[:, None, None])).round(), targets


@pytest.mark.parametrize(("shape", "channels"), [((8, 8), 1), ((8, 8, 3), 3), ((3, 8, 8), 3), ((8, 8, 1), 1)])
@pytest.mark.parametrize("column", [False, True])
def test_npz_layouts(save: Any, shape: tuple[int, ...], channels: int, column: bool) -> None:
    stored = arrays(40, shape) | arrays(12, shape, 1, "val") | arrays(8, shape, 2, "test")
    if column:  # MedMNIST's labels
        stored |= {name: array[:, None].astype(np.uint8) for name, array in stored.items() if "labels" in name}
    data = Npz(save(**stored), batch_size=40)
    assert data.image == Image(8, channels)
    assert data.num_classes == 4
    assert data.class_names == ["0", "1", "2", "3"]
    for split, count in {"train": 40, "val": 12, "test": 8}.items():
        images, targets = raw(data, split)
        assert images.shape == (count, channels, 8, 8)
        assert torch.equal(images[:, 0, 0, 0].long(), targets)
        expected = torch.as_tensor(stored[f"{split}_images"]).float()
        if shape[-1] == 3:
            expected = expected.permute(0, 3, 1, 2)
        assert torch.equal(images.flatten(1), expected.flatten(1))
    batch, _ = epoch_of(data)
    assert batch.mean((0, 2, 3)).abs().max() < 1e-5
    assert (batch.std((0, 2, 3)) - 1).abs().max() < 1e-2


def test_npz_without_val_and_test_holds_a_tenth_out(save: Any) -> None:
    data = Npz(save(**arrays(400)))
    train, val, test = (raw(data, split) for split in ("train", "val", "test"))
    assert torch.bincount(val[1]).tolist() == [10] * 4
    assert len(train[1]) == 360
    both = {tuple(image.flatten().tolist()) for image in train[0]} & {
        tuple(image.flatten().tolist()) for image in val[0]
    }
    assert not both
    assert torch.equal(val[0], test[0])
    assert torch.equal(val[0][:, 0, 0, 0].long(), val[1])


def test_npz_without_test_tests_on_val(save: Any) -> None:
    data = Npz(save(**arrays(40), **arrays(12, seed=1, prefix="val")))
    assert len(data.split("train")) == 40
    assert torch.equal(raw(data, "val")[0], raw(data, "test")[0])


def test_npz_resizes_and_names(save: Any) -> None:
    data = Npz(save(**arrays(40, (8, 8, 3)), class_names=np.array(["a", "b", "c", "d", "e"])), size=16, crop=2)
    assert data.image == Image(16, 3)
    assert data.num_classes == 5
    assert data.class_names == ["a", "b", "c", "d", "e"]
    assert epoch_of(data)[0].shape == (36, 3, 16, 16)


def test_constant_images_stay_finite(save: Any) -> None:
    data = Npz(save(train_images=np.zeros((20, 4, 4), np.uint8), train_labels=np.arange(20) % 2))
    assert torch.equal(epoch_of(data)[0], torch.zeros(18, 1, 4, 4))


def test_npz_facts_need_no_images(save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Npz(save(**arrays()))
    read = data._array
    monkeypatch.setattr(data, "_array", lambda name: pytest.fail(name) if "images" in name else read(name))
    assert (data.image, data.num_classes) == (Image(8, 1), 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_labels": None}, "has no train_labels; there are: train_images"),
        ({"val_images": np.zeros((2, 8, 8), np.uint8)}, "has no val_labels; there are:"),
        ({"train_images": np.zeros((0, 8, 8), np.uint8)}, "has no images for training: train_images is empty"),
        ({"train_labels": np.zeros(39, int)}, "39 train_labels, but 40 train_images"),
        ({"train_labels": np.zeros(40)}, "train_labels has type float64, must be integers"),
        ({"train_labels": np.zeros((40, 14), int)}, "train_labels has shape (40, 14), must be (N,) or (N, 1)"),
        ({"train_labels": np.full(40, -1)}, "train_labels has -1, must be 0 or more"),
        ({"train_images": np.zeros((40, 8, 8))}, "train_images has type float64, must be uint8"),
        ({"train_images": np.zeros((40, 8, 9, 3), np.uint8)}, "train_images are 8×9×3, must be square"),
        ({"train_images": np.zeros((40, 8, 8, 8), np.uint8)}, "train_images are 8×8×8, must be square"),
        (arrays(8, (9, 9), prefix="val"), "the same size and channels, got train_images 8×8×1, val_images 9×9×1"),
        ({"class_names": np.array(["a", "b"])}, "class_names has 2 names, but there are labels up to 3"),
        ({"class_names": np.array(["a", None])}, "cannot read class_names"),
    ],
)
def test_npz_errors(save: Any, change: dict[str, Any], message: str) -> None:
    stored = {name: array for name, array in (arrays() | change).items() if array is not None}
    error = error_of(Npz, save(**stored))
    assert error.startswith("data")
    assert "set.npz" in error
    assert message in error


def test_npz_file_errors(save: Any, tmp_path: Path) -> None:
    save(**arrays())
    near = error_of(Npz, str(tmp_path / "sett.npz"))
    assert near == f"data.path: no file sett.npz in {tmp_path}; did you mean 'set.npz'?; allowed: set.npz"
    assert error_of(Npz, "/usr/set.npz") == "data.path: no file set.npz in /usr; there is no .npz file"
    assert "there is no folder" in error_of(Npz, str(tmp_path / "no" / "set.npz"))
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"no zip")
    assert "broken.npz: cannot be read as .npz" in error_of(Npz, str(broken))
    broken.write_bytes((tmp_path / "set.npz").read_bytes()[:300])
    assert "broken.npz: cannot be read as .npz" in error_of(Npz, str(broken))


# Torchvision


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


def test_config_builds_them(save: Any) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--data", type=ImageData)
    for name, args in {
        "Digits": {"crop": 1},
        "Npz": {"path": save(**arrays())},
        "Torchvision": {"dataset": "FakeData", "args": {"size": 20, "image_size": [3, 8, 8]}},
    }.items():
        made = parser.instantiate_classes(parser.parse_object({"data": {"class_path": name, "init_args": args}})).data
        assert type(made).__name__ == name
        assert made.image.size in (8, 16)
        assert next(iter(made.train_dataloader()))[1].dtype == torch.int64


@pytest.mark.parametrize("file", sorted(Path(framework.data.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_heavy_libraries_are_imported_when_used(file: Path) -> None:
    top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.name for node in top if isinstance(node, ast.Import) for name in node.names}
    names |= {str(node.module) for node in top if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {"torchvision", "sklearn", "PIL"}
