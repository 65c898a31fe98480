"""Pictures of every kind, files that cannot be read, and the folders of published sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from PIL import ImageFile, ImageOps
from PIL.ExifTags import Base

from framework.cli import main
from framework.data import Image, Torchvision
from framework.data.pictures import PictureSet, read_picture, to_mode, transform_for
from framework.errors import ConfigError

RED, GREEN = (200, 30, 20), (20, 180, 60)


@pytest.fixture(autouse=True)
def run_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)


# Modes


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_and_not_cut_off(tmp_path: Path, suffix: str) -> None:
    values = (np.arange(256, dtype=np.uint32) * 257).astype(np.uint16).reshape(16, 16)
    Pictures.fromarray(values).save(tmp_path / f"deep.{suffix}")
    picture = read_picture(tmp_path / f"deep.{suffix}")
    assert picture.mode == "I;16"
    expected = np.arange(256).reshape(16, 16)
    assert (np.asarray(to_mode(picture, "L")) == expected).all()
    assert (np.asarray(to_mode(picture, "RGB")) == expected[..., None]).all()
    cut = np.asarray(picture.convert("L"))
    assert (cut != expected).mean() > 0.9, "PIL's own way is good now: use it"


def test_16_bit_values_are_rounded_in_both_byte_orders() -> None:
    values = np.array([[0, 128, 129, 65535, 300, 40000]], np.uint16)
    big = Pictures.frombytes("I;16B", (6, 1), values.astype(">u2").tobytes())
    for picture in (Pictures.fromarray(values), big, Pictures.fromarray(values.astype(np.int32))):
        assert np.asarray(to_mode(picture, "L")).tolist() == [[0, 0, 1, 255, 1, 156]], picture.mode


def test_whole_numbers_up_to_255_stay() -> None:
    values = np.array([[0, 7, 255]], np.int32)
    assert np.asarray(to_mode(Pictures.fromarray(values), "L")).tolist() == [[0, 7, 255]]


@pytest.mark.parametrize(
    "values", [np.array([[0, 70000]], np.int32), np.array([[-1, 9]], np.int32), np.ones((2, 2), "f")]
)
def test_values_without_a_known_white_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="which value is white"):
        to_mode(Pictures.fromarray(values), "L")


def palette(transparent: bool) -> Any:
    picture = Pictures.new("P", (2, 1))
    picture.putpalette([*RED, *GREEN])
    picture.putpixel((1, 0), 1)
    if transparent:
        picture.info["transparency"] = 1
    return picture


def pair(mode: str, first: Any, second: Any) -> Any:
    picture = Pictures.new(mode, (2, 1), first)
    picture.putpixel((1, 0), second)
    return picture


@pytest.mark.parametrize(
    ("picture", "expected"),
    [
        (pair("1", 0, 255), [(0, 0, 0), (255, 255, 255)]),
        (pair("L", 9, 200), [(9, 9, 9), (200, 200, 200)]),
        (pair("LA", (9, 255), (9, 0)), [(9, 9, 9), (255, 255, 255)]),
        (pair("RGB", RED, GREEN), [RED, GREEN]),
        (pair("RGBA", (*RED, 255), (*GREEN, 0)), [RED, (255, 255, 255)]),
        (pair("RGBA", (*RED, 255), (0, 100, 200, 51)), [RED, (204, 224, 244)]),
        (palette(False), [RED, GREEN]),
        (palette(True), [RED, (255, 255, 255)]),
        (pair("CMYK", (0, 0, 0, 0), (0, 255, 255, 0)), [(255, 255, 255), (255, 0, 0)]),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_modes(picture: Any, expected: list[tuple[int, ...]]) -> None:
    found = to_mode(picture, "RGB")
    assert (found.mode, [found.getpixel((x, 0)) for x in (0, 1)]) == ("RGB", expected)
    grey = to_mode(picture, "L")
    assert grey.mode == "L"
    assert (np.asarray(grey) == np.asarray(found.convert("L"))).all()


def test_transparency_of_a_file_is_seen(tmp_path: Path) -> None:
    palette(True).save(tmp_path / "a.png", transparency=1)
    assert to_mode(read_picture(tmp_path / "a.png"), "RGB").getpixel((1, 0)) == (255, 255, 255)
    pair("RGB", RED, GREEN).save(tmp_path / "b.png", transparency=GREEN)  # one colour of RGB
    assert to_mode(read_picture(tmp_path / "b.png"), "RGB").getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_pictures_come_upright(tmp_path: Path, suffix: str, turned: int) -> None:
    plain = Pictures.fromarray(noise(6, 9, 3))
    exif = Pictures.Exif()
    exif[Base.Orientation] = turned
    path = tmp_path / f"a.{suffix}"
    plain.save(path, exif=exif)
    plain.getexif()[Base.Orientation] = turned
    expected = np.asarray(ImageOps.exif_transpose(plain))
    assert expected.shape == ((6, 9, 3) if turned < 5 else (9, 6, 3))
    assert (np.asarray(to_mode(read_picture(path), "RGB")) == expected).all()
    with Pictures.open(path) as lazy:  # a TIFF turns itself when it is read: not twice
        assert (np.asarray(to_mode(lazy, "RGB")) == expected).all()


def test_broken_exif_data_is_passed_over() -> None:
    picture = Pictures.fromarray(noise(4, 5, 3))
    picture.info["exif"] = b"Exif\0\0no TIFF at all"
    assert (np.asarray(to_mode(picture, "RGB")) == noise(4, 5, 3)).all()


# Files that cannot be read

BAD = {
    "cut.jpg": "image file is truncated",
    "empty.png": "no image, or of a kind that PIL does not know",
    "text.jpg": "no image, or of a kind that PIL does not know",
    "broken.png": "",
    "gone.png": "No such file or directory",
    "folder.jpg": "Is a directory",
    "huge.png": "decompression bomb",
    "real.tif": "which value is white",
}


def spoil(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a bad file of the kind that its name says."""
    picture = Pictures.fromarray(noise(40, 40, 3))
    match path.name:
        case "cut.jpg":
            picture.save(path, quality=95)
            path.write_bytes(path.read_bytes()[:-600])
        case "empty.png":
            path.touch()
        case "text.jpg":
            path.write_text("<html>404</html>")
        case "broken.png":
            picture.save(path)
            data = bytearray(path.read_bytes())
            data[60:90] = bytes(30)
            path.write_bytes(data)
        case "folder.jpg":
            path.mkdir()
        case "huge.png":
            Pictures.new("L", (300, 300)).save(path)
            monkeypatch.setattr(Pictures, "MAX_IMAGE_PIXELS", 10_000)
        case "real.tif":
            Pictures.fromarray(np.ones((4, 4), np.float32)).save(path)


class Folder:
    """Good pictures, of which each has one colour by its number, and bad files at the given places."""

    def __init__(self, folder: Path, count: int, bad: dict[int, str]) -> None:
        self.paths = [folder / bad.get(i, f"{i}.png") for i in range(count)]
        for i, path in enumerate(self.paths):
            if i not in bad:
                Pictures.new("RGB", (10, 8), (i, 0, 0)).save(path)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return read_picture(self.paths[index]), index

    def name_of(self, index: int) -> str:
        return str(self.paths[index])

    def pictures(self, train: bool, bad_files: int = 10) -> PictureSet:
        zero, one = torch.zeros(3), torch.ones(3)
        indices, image = np.arange(len(self.paths)), Image(8)
        transform = transform_for(image, train)
        return PictureSet(
            self, indices, image, transform, zero, one, bad_files=bad_files, train=train, name_of=self.name_of
        )


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    spoil(tmp_path / name, monkeypatch)
    source = Folder(tmp_path, 6, {2: name})
    images, targets = source.pictures(train=False).__getitems__([1, 2, 3])
    assert targets.tolist() == [1, 3]
    assert (images[:, 0, 0, 0] * 255).round().tolist() == [1, 3]
    assert images.shape == (2, 3, 8, 8)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"data: cannot read {tmp_path / name}: ")
    assert BAD[name] in lines[0]
    assert lines[0].endswith("; left out (1 of at most 10)")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_another_picture_is_trained_on(tmp_path: Path, capsys: Any) -> None:
    source = Folder(tmp_path, 20, {3: "gone.png", 4: "lost.png"})
    train = source.pictures(train=True)
    stand_ins = []
    for epoch in range(4):
        keys = [epoch * 20 + i for i in (2, 3, 4, 5)]
        images, targets = train.__getitems__(keys)
        assert (images[:, 0, 4, 4] * 255).round().tolist() == targets.tolist(), "picture and class belong together"
        assert targets[[0, 3]].tolist() == [2, 5]
        assert not {3, 4} & set(targets.tolist())
        stand_ins += targets[1:3].tolist()
        again = source.pictures(train=True)[keys[2]]  # in another batch, by another process
        assert torch.equal(again[0], images[2])
        assert again[1] == targets[2]
    assert len(set(stand_ins)) > 2, "by round and index"
    capsys.readouterr()
    train.__getitems__(list(range(20)))
    assert capsys.readouterr().err == "", "each is named once"
    assert train.unread() == 2


def test_limit_of_bad_files(tmp_path: Path) -> None:
    source = Folder(tmp_path, 9, {i: f"gone{i}.png" for i in (1, 3, 5)})
    val = source.pictures(train=False, bad_files=2)
    for _ in range(2):  # the same two again and again are two
        assert val.__getitems__([0, 1, 3])[1].tolist() == [0]
    for _ in range(2):
        with pytest.raises(ConfigError) as caught:
            val.__getitems__([4, 5])
        gone = tmp_path / "gone5.png"
        assert str(caught.value) == (
            f"data: cannot read {gone}: No such file or directory; 3 files are bad, data.bad_files allows 2"
        )
    with pytest.raises(
        ConfigError, match=r"gone1.png: No such file or directory; 1 file is bad, data.bad_files allows 0"
    ):
        source.pictures(train=True, bad_files=0).__getitems__([0, 1])


def test_without_any_good_picture_training_ends(tmp_path: Path) -> None:
    source = Folder(tmp_path, 3, {i: f"gone{i}.png" for i in range(3)})
    with pytest.raises(ConfigError, match="none of the 3 images for training can be read"):
        source.pictures(train=True).__getitems__([0])


def test_plain_pictures_are_those_for_validation(tmp_path: Path) -> None:
    source = Folder(tmp_path, 4, {1: "gone.png"})
    plain, val = source.pictures(train=True).plain(), source.pictures(train=False)
    for one, two in zip(plain.__getitems__([0, 1, 2]), val.__getitems__([0, 1, 2]), strict=True):
        assert torch.equal(one, two)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Pictures of two classes, red ones and green ones: 16 to train, 8 to validate; one of each is bad."""
    for split, count in {"train": 8, "val": 4}.items():
        for name, colour in (("green", GREEN), ("red", RED)):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(count):
                Pictures.new("RGB", (16, 16), colour).save(tmp_path / split / name / f"{n}.png")
        (tmp_path / split / "green" / "0.png").write_bytes(b"")
    return tmp_path


def test_worker_processes_count_together(photos: Path, capfd: Any) -> None:
    (photos / "train" / "red" / "5.png").write_bytes(b"")
    data = Torchvision("ImageFolder", root=str(photos), size=8, batch_size=4, workers=2)
    assert data.num_classes == 2, "the first picture is a bad one"
    loader, val = data.train_dataloader(), data.val_dataloader()
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        assert [len(targets) for _, targets in loader] == [4] * 4
    assert [len(targets) for _, targets in val] == [3, 4]
    assert (data.split("train").unread(), data.split("val").unread()) == (2, 1)
    data.teardown("fit")
    lines = sorted(capfd.readouterr().err.splitlines())
    assert [line.split(": ")[1].split("/")[-1] for line in lines if "cannot read" in line] == [
        "0.png",
        "5.png",
        "0.png",
    ]
    assert [line for line in lines if "of at most" not in line] == [
        "data: 1 of 8 images for validation could not be read",
        "data: 2 of 16 images for training could not be read",
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_are_one_line(photos: Path, workers: int) -> None:
    (photos / "val" / "red" / "1.png").write_bytes(b"")
    data = Torchvision("ImageFolder", root=str(photos), size=8, batch_size=4, workers=workers, bad_files=1)
    with pytest.raises(ConfigError) as caught:
        list(data.val_dataloader())
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"data: cannot read {photos}/val/")
    assert str(caught.value).endswith("PIL does not know; 2 files are bad, data.bad_files allows 1")


def test_command_ends_with_one_line(photos: Path, tmp_path: Path, capfd: Any) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"extends: {Path(__file__).parent}/configs/tnt.yaml\n"
        "data:\n  class_path: Torchvision\n  init_args:\n"
        f"    {{dataset: ImageFolder, root: {photos}, size: 16, batch_size: 4, workers: 1}}\n"
    )
    (photos / "train" / "red" / "1.png").write_bytes(b"")
    command = ["fit", "--config", str(config), "--runs", str(tmp_path / "runs"), "--trainer.accelerator=cpu",
               "--trainer.max_epochs=1"]  # fmt: skip
    assert main([*command, "--data.bad_files=1"]) == 2
    lines = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith(("error", "Traceback", "Original"))
    ]
    assert len(lines) == 1
    assert lines[0].startswith(f"error: data: cannot read {photos}/train/")
    assert lines[0].endswith("2 files are bad, data.bad_files allows 1")
    assert main(command) == 0
    assert "data: 2 of 16 images for training could not be read" in capfd.readouterr().err


def test_a_set_of_bad_files_says_so(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for n in range(3):
            (tmp_path / name / f"{n}.png").touch()
    with pytest.raises(ConfigError, match=r"data: cannot read .*/a/0.png: no image, or of a kind that PIL"):
        Torchvision("ImageFolder", root=str(tmp_path), size=8).split("train")


# Folders of published sets
