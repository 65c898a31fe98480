"""`data`: what it counts, what it measures, and what stands on its sheets."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from framework.cli import main
from framework.commands.data import by_class, caption, draws, look, mixed
from framework.data import Digits, Image, ImageData, Torchvision
from framework.data.base import Batch, ImageSet
from framework.data.sheet import MARGIN, Strip, sheet
from framework.errors import ConfigError
from framework.mix import Mix, MixupCutmix
from tests.conftest import CONFIGS

TNT = CONFIGS / "tnt.yaml"


@pytest.fixture(autouse=True)
def run_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def data_config(tmp_path: Path, **arguments: Any) -> Path:
    """A config of nothing but data."""
    path = tmp_path / "only.yaml"
    path.write_text(json.dumps({"data": {"class_path": arguments.pop("kind"), "init_args": arguments}}))
    return path


def facts(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    assert main(["data", "--json", *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def test_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    found = facts(capsys, "--config", TNT, "--data.crop=2", "--out", out, "--samples", "6")
    digits = Digits()
    assert found["image"] == {"size": 16, "channels": 1}
    assert found["classes"] == digits.class_names
    assert list(found["splits"]) == ["train", "val", "test"]
    for split, told in found["splits"].items():
        images, targets = digits.read(split)
        assert told["images"] == told["counted"] == told["read"] == len(images)
        assert told["bad"] == 0
        assert told["counts"] == torch.bincount(targets).tolist()
        assert told["measured"]["mean"] == pytest.approx([images.double().mean().item() / 255], abs=1e-5)
        assert told["measured"]["std"] == pytest.approx([images.double().std().item() / 255], abs=1e-4)
        assert told["normalised_by"] == found["splits"]["train"]["measured"]
    assert found["augmented"]
    assert found["files"] == [str(out / name) for name in ("sheet.png", "classes.csv", "tensorboard")]
    rows = list(csv.reader((out / "classes.csv").open()))
    assert rows[0] == ["class", "train", "val", "test"]
    assert rows[4] == ["3", *(str(told["counts"][3]) for told in found["splits"].values())]
    written = np.asarray(Pictures.open(out / "sheet.png"))
    board = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert board.Images("data/sheet")[0].width == written.shape[1]


def test_columns_are_what_a_run_sees() -> None:
    data = Digits(size=8, crop=2)
    train = data.split("train")
    header, columns, targets = draws(data, "train", [3, 900, 17])
    assert header == ("validation", "epoch 0", "epoch 1", "epoch 2", "epoch 3", "epoch 4")
    assert torch.equal(columns[0], train.images[[3, 900, 17]])
    assert torch.equal(targets, train.targets[[3, 900, 17]])
    for epoch, column in enumerate(columns[1:]):
        assert torch.equal(column, train.pixels([epoch] * 3, [3, 900, 17])[0])
    assert not torch.equal(columns[1], columns[2])
    assert draws(data, "val", [0, 1])[0] == ()
    assert len(draws(Digits(size=8), "train", [0, 1])[1]) == 1, "nothing is drawn: one column says it all"


def test_columns_of_pictures() -> None:
    data = Torchvision("FakeData", size=72, args={"size": 20, "image_size": [3, 80, 80]})
    train = data.split("train")
    _, columns, targets = draws(data, "train", [3, 9])
    assert torch.equal(columns[0], train.plain().pixels([0, 0], [3, 9])[0])
    assert torch.equal(columns[2], train.pixels([1, 1], [3, 9])[0])
    assert not torch.equal(columns[0], columns[2])
    assert targets.tolist() == [train[3][1], train[9][1]]


def test_small_images_are_enlarged_pixel_by_pixel() -> None:
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    made = np.asarray(sheet([Strip(images, ("a",)), Strip(images.flip(0), ("b",))]))
    top = MARGIN + 14
    assert (made[top : top + 64, MARGIN : MARGIN + 64] == np.kron(images[0, 0], np.ones((8, 8)))[:, :, None]).all()
    assert (made[top - 14 : top] < 128).any(), "the caption"
    large = sheet([Strip(torch.zeros(1, 3, 500, 500, dtype=torch.uint8), ("a long name " * 9,))])
    assert max(large.size) < 200


def test_rows_are_sorted_by_class() -> None:
    shades = torch.tensor([200, 100, 150], dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 64, 64)
    made = np.asarray(by_class((), [shades], torch.tensor([2, 0, 1]), ["a", "b", "c"]))[:, :, 0]
    found = [(made == shade).nonzero() for shade in (100, 150, 200)]
    assert all(len(rows) == 64 * 64 for rows, _ in found)
    places = [(int(columns[0]), int(rows[0])) for rows, columns in found]
    assert places == sorted(places)


def test_mixed_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config", TNT, "--model.mix=MixupCutmix", "--split", "train", "--samples", "5", "--out", tmp_path]
    found = facts(capsys, *words)
    assert list(found["splits"]) == ["train"]
    assert not found["augmented"]
    with Pictures.open(tmp_path / "mixed.png") as picture:
        assert picture.width > 4 * 112, "four of five: the fifth has no partner"
    assert main(["data", "--config", str(TNT), "--samples=5", f"--out={tmp_path}", "--split=train"]) == 0
    assert not (tmp_path / "mixed.png").exists(), "nothing is mixed here"
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert board.Tags()["images"] == ["data/sheet", "data/mixed"]
    names = ["cat", "dog", "cow"]
    assert caption(torch.tensor([0.25, 0.05, 0.7]), names) == ("70% cow", "25% cat")
    assert caption(torch.tensor([0.03, 0.94, 0.03]), names) == ("94% dog", "")
    assert caption(torch.tensor(1), names) == ("dog", "")


def test_mixed_sheet_shows_each_step() -> None:
    class Count(Mix):
        steps: list[int] = []  # noqa: RUF012

        def __call__(self, images: Any, targets: Any, num_classes: int, step: int) -> Any:
            self.steps.append(step)
            return MixupCutmix()(images, targets, num_classes, step)

    train = Digits(size=8).split("train")
    assert mixed(train, [4, 5, 6, 7], [*"0123456789"], Count()).width > 4 * 64
    assert Count.steps == list(range(6))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Eight red and eight blue pictures of 20×30 pixels to train on, four to validate on; one is no picture."""
    for split, count in (("train", 8), ("val", 2)):
        for name, color in (("blue", (0, 0, 204)), ("red", (204, 0, 0))):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Pictures.new("RGB", (30, 20), color).save(folder / f"{number}.png")
    (tmp_path / "pictures/train/red/5.png").write_bytes(b"no picture")
    return tmp_path / "pictures"


def folder_words(folders: Path, size: int) -> list[str | Path]:
    config = data_config(folders.parent, kind="Torchvision", dataset="ImageFolder", root=str(folders), size=size)
    return ["--config", config, "--out", folders.parent / "out"]


def test_pictures(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = facts(capsys, *folder_words(folders, 72), "--samples", "50")
    train = found["splits"]["train"]
    assert (train["images"], train["read"], train["bad"]) == (16, 16, 1)
    assert (train["counts"], train["counted"]) == ([8, 8], 16), "labels need no reading"
    blue, red = 0.8 * 8 / 15, 0.8 * 7 / 15
    assert train["measured"]["mean"] == pytest.approx([red, 0, blue], abs=1e-3)
    assert train["normalised_by"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert found["splits"]["val"]["bad"] == 0
    sample = facts(capsys, *folder_words(folders, 72), "--samples", "3")["splits"]["train"]
    assert (sample["images"], sample["read"], sample["counts"]) == (16, 3, [8, 8])


def test_printed(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *map(str, folder_words(folders, 16)), "--samples", "12"]) == 0
    text = capsys.readouterr().out
    assert "only: Torchvision, 2 classes, 16×16 pixels, 3 channel(s)" in text
    assert "measured over" in text
    assert "8 (blue)" in text
    assert str(folders.parent / "out/sheet.png") in text


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_images_of_other_channels_are_shown_by_the_first(
    channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.RandomState(0).randint(0, 256, (40, 8, 8, channels)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", train_images=images, train_labels=np.arange(40) % 4)
    config = data_config(tmp_path, kind="Npz", path=str(tmp_path / "set.npz"))
    assert main(["data", "--config", str(config), "--out", str(tmp_path / "out")]) == 0
    assert f"{channels} channel(s)" in capsys.readouterr().out
    tile = np.asarray(Pictures.open(tmp_path / "out" / "sheet.png"))[MARGIN * 2 : -MARGIN, MARGIN:-MARGIN]
    assert (tile.max(axis=2) == tile.min(axis=2)).all() == (channels == 2)  # grey, or in colour


def test_many_classes_go_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = np.arange(400) % 40
    labels[labels == 7] = 8
    stored = {f"{split}_images": np.zeros((400, 8, 8), np.uint8) for split in ("train", "val")}
    stored |= {f"{split}_labels": labels for split in ("train", "val")}
    names = np.array([f"kind {number}" for number in range(40)])
    np.savez(tmp_path / "set.npz", **stored, class_names=names)
    config = data_config(tmp_path, kind="Npz", path=str(tmp_path / "set.npz"), flip=True)
    assert main(["data", "--config", str(config), "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "0 (kind 7)" in text
    assert "20 (kind 8)" in text
    assert "kind 30" not in text
    assert "training images are not augmented" in text, "black images look the same when mirrored"
    rows = list(csv.reader((tmp_path / "out/classes.csv").open()))
    assert len(rows) == 41
    assert rows[9] == ["kind 8", "20", "20", "20"]


class Foreign(ImageData):
    """A module from elsewhere: the interface alone; its labels are known to who reads, every third is unreadable."""

    image = Image(8, 3)  # type: ignore[assignment]
    num_classes = 2  # type: ignore[assignment]
    class_names = ["even", "odd"]  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self, every: int = 3) -> None:
        super().__init__("Foreign", 4)
        self.every = every

    def build(self, split: str) -> ImageSet:
        return ForeignSet(self.every)


class ForeignSet(ImageSet):
    def __init__(self, every: int) -> None:
        super().__init__(torch.full((3,), 0.5), torch.full((3,), 0.25))
        self.every = every

    def __len__(self) -> int:
        return 30

    def pixels(self, rounds: list[int], indices: list[int]) -> Batch:
        for index in indices:
            if index % self.every == 0:
                raise ValueError(f"{index} is damaged\nindeed")
        shades = [torch.full((3, 8, 8), index + number, dtype=torch.uint8) for number, index in zip(rounds, indices)]  # noqa: B905
        return torch.stack(shades), torch.tensor(indices) % 2


def test_modules_by_others() -> None:
    data = Foreign()
    found, looked = look(data, ["train"], 30)
    told = found["splits"]["train"]
    assert (told["images"], told["read"], told["bad"], told["counted"]) == (30, 30, 10, 20)
    assert told["counts"] == [10, 10]
    assert told["first_bad"].startswith("data: cannot read image ")
    assert "is damaged indeed" in told["first_bad"]
    assert sorted(looked["train"]) == [index for index in range(30) if index % 3]
    columns = draws(data, "train", looked["train"][:4])[1]
    assert torch.equal(columns[2], columns[0] + 1), "the draw of epoch 1"
    with pytest.raises(ConfigError, match="data: cannot read image"):
        look(Foreign(every=1), ["train"], 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", TNT, "--split=trian"], "--split: got 'trian', must be train, val or test"),
        (["--config", TNT, "--samples=0"], "--samples: got 0, must be at least 1"),
        (["--config", TNT, "--data.siz=8"], "data.siz: Digits "),
        (["--config", TNT, "--data=Digts"], "did you mean 'Digits'?"),
        (["--config", TNT, "--data.size=0"], "data.size: got 0, must be at least 1"),
        (["--config", TNT, "--data={class_path: Npz, init_args: {path: none.npz}}"], "data.path: no file none.npz"),
        ([], "name a config"),
    ],
)
def test_mistakes(
    words: list[Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", *map(str, words)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    facts(capsys, "--config", TNT, "--split=val", "--samples=2")
    assert (tmp_path / "runs/tnt-data/sheet.png").is_file()
