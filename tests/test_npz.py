"""Images from a .npz file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from framework.data import Image, ImageData, Npz
from tests.test_data import epoch_of, error_of, run_seed  # noqa: F401


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


@pytest.mark.parametrize(("channels", "seen"), [(2, 1), (4, 3), (5, 3)])
def test_other_channels_are_trained_on_and_the_first_are_shown(save: Any, channels: int, seen: int) -> None:
    data = Npz(save(**arrays(40, (8, 8, channels))))
    assert data.image == Image(8, channels)
    batch = epoch_of(data)[0]
    assert batch.shape == (36, channels, 8, 8)
    train = data.split("train")
    want = (batch * train.std[:, None, None] + train.mean[:, None, None])[:5, :seen]
    assert torch.allclose(data.sample(5)[0], want, atol=1e-6)


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
    (tmp_path / "dir.npz").mkdir()
    assert error_of(Npz, str(tmp_path / "dir.npz")) == f"data.path: {tmp_path}/dir.npz is a folder, not a .npz file"
    assert error_of(Npz, "/usr/set.npz") == "data.path: no file set.npz in /usr; there is no .npz file"
    assert "there is no folder" in error_of(Npz, str(tmp_path / "no" / "set.npz"))
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"no zip")
    assert "broken.npz: cannot be read as .npz" in error_of(Npz, str(broken))
    broken.write_bytes((tmp_path / "set.npz").read_bytes()[:300])
    assert "broken.npz: cannot be read as .npz" in error_of(Npz, str(broken))


# Torchvision


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
