"""Data modules: what a batch holds, what its order and draws depend on, and what a user is told."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import RandomSampler

import framework.data
from framework.data import Digits, Image, ImageData
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


@pytest.mark.parametrize("file", sorted(Path(framework.data.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_heavy_libraries_are_imported_when_used(file: Path) -> None:
    top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.name for node in top if isinstance(node, ast.Import) for name in node.names}
    names |= {str(node.module) for node in top if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & {"torchvision", "sklearn", "PIL"}
