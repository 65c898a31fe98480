"""Predictions of any pictures from a checkpoint alone: the net's own, with its normalisation."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures

from framework.checkpoints import Kept, kept_in, read_checkpoint
from framework.cli import main
from framework.config import dump, override
from framework.construct import Workbench, complete
from framework.data import Digits, Image, Npz, Torchvision
from framework.errors import ConfigError
from framework.predict import Files, pictures, unique
from framework.run import LAST
from framework.tasks import Classification

NAMES = ["cat", "dog, wet", "crane", "crane"]
UNIQUE = ["cat", "dog, wet", "crane (2)", "crane (3)"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, _tiny: dict[str, Any]) -> Path:
    """The checkpoint of a net for four classes of 8 px colour images, whose data and run folder are gone."""
    root = tmp_path_factory.mktemp("predict")
    draw = np.random.default_rng(0)
    arrays = {
        "train_images": draw.integers(0, 200, (64, 12, 12, 3), dtype=np.uint8),
        "train_labels": np.arange(64) % 4,
        "class_names": np.array(NAMES),
    }
    np.savez(root / "data.npz", **arrays)
    data = {"class_path": "Npz", "init_args": {"path": str(root / "data.npz"), "size": 8, "batch_size": 4}}
    document = override(_tiny, {"data": data, "name": "photos", "model.optimizer.lr": 0.05})
    (root / "photos.yaml").write_text(dump(document))
    assert main(["fit", "--config", str(root / "photos.yaml"), "--runs", str(root / "runs")]) == 0
    checkpoint = shutil.copy(root / "runs/photos/0" / LAST, root / "net.ckpt")
    for path in (root / "data.npz", root / "photos.yaml"):
        path.unlink()
    shutil.rmtree(root / "runs")
    return Path(checkpoint)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures of many kinds under `photos`, which is named from the working folder, and two that are none."""
    monkeypatch.chdir(tmp_path)
    root = Path("photos")
    (root / "deep/er").mkdir(parents=True)
    (root / ".cache").mkdir()
    draw = np.random.default_rng(1)
    rgb = draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Pictures.fromarray(rgb).save(root / "colour.png")
    Pictures.fromarray(rgb).save(root / "deep/photo.JPG", "JPEG")
    Pictures.fromarray(rgb[:, :, 0]).save(root / "deep/er/grey.tif")
    Pictures.fromarray(np.dstack([rgb, rgb[:, :, 0]])).save(root / "alpha.webp", lossless=True)
    Pictures.fromarray(rgb[:8, :10]).save(root / "wide.bmp")
    Pictures.fromarray(rgb).save(root / ".cache/hidden.png")
    (root / "broken.png").write_bytes((root / "colour.png").read_bytes()[:60])
    (root / "text.jpeg").write_text("no picture")
    (root / "notes.txt").write_text("no picture")
    return root


FILES = ["alpha.webp", "broken.png", "colour.png", "deep/er/grey.tif", "deep/photo.JPG", "text.jpeg", "wide.bmp"]
BAD = ["broken.png", "text.jpeg"]


def expected(checkpoint: Path, file: Path) -> torch.Tensor:
    """The probabilities of one picture, by hand."""
    picture = Pictures.open(file)
    if picture.mode == "RGBA":
        white = Pictures.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        picture = white
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB"))).permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(pixels, size=(8, 8), mode="bilinear", antialias=True).float() / 255
    kept = kept_in(read_checkpoint(checkpoint), checkpoint)
    assert kept is not None
    mean, std = (torch.tensor(values)[:, None, None] for values in (kept.mean, kept.std))
    with torch.no_grad():
        return Classification.load_from_checkpoint(checkpoint).eval()((small - mean) / std).softmax(1)[0]


def test_a_folder_of_pictures_as_csv(alone: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--ckpt_path", str(alone), "--images", "photos", "--out", "p.csv"]) == 0
    said = capsys.readouterr()
    assert said.out == "5 images → p.csv\n"
    assert [line.split(": cannot be read: ")[0] for line in said.err.splitlines()] == [f"photos/{n}" for n in BAD]
    with open("p.csv", newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["file", "prediction", "confidence", *UNIQUE, "error"]
    assert [row[0] for row in rows] == [f"photos/{name}" for name in FILES]
    for path, prediction, confidence, *values, error in rows:
        if Path(path).name in BAD:
            assert [prediction, confidence, *values] == [""] * 6
            assert error
            assert "BytesIO" not in error
            continue
        want = expected(alone, Path(path))
        np.testing.assert_allclose([float(value) for value in values], want, atol=2e-6)
        assert (prediction, error) == (UNIQUE[int(want.argmax())], "")
        assert confidence == max(values)
    assert len({tuple(row[1:]) for row in rows}) > 3, "the pictures do not matter"


def test_the_same_as_json(alone: Path, folder: Path) -> None:
    assert main(["predict", "--ckpt_path", str(alone), "--images", "photos/", "--out", "p.json"]) == 0
    entries = json.loads(Path("p.json").read_text())
    assert [entry["file"] for entry in entries] == [f"photos/{name}" for name in FILES]
    for entry in entries:
        if Path(entry["file"]).name in BAD:
            assert entry["error"]
            assert (entry["prediction"], entry["confidence"], entry["probabilities"]) == (None, None, {})
            continue
        assert set(entry) == {"file", "prediction", "confidence", "probabilities"}
        want = expected(alone, Path(entry["file"]))
        assert list(entry["probabilities"]) == UNIQUE
        np.testing.assert_allclose(list(entry["probabilities"].values()), want, atol=2e-6)
        assert (
            entry["confidence"] == entry["probabilities"][entry["prediction"]] == max(entry["probabilities"].values())
        )


def test_the_likeliest_classes_alone(alone: Path, folder: Path) -> None:
    words = ["predict", "--ckpt_path", str(alone), "--images", "photos/colour.png", "--top", "2", "--out"]
    assert main([*words, "p.csv"]) == 0
    assert main([*words, "p.json"]) == 0
    with open("p.csv", newline="") as file:
        head, row = csv.reader(file)
    assert head == ["file", "prediction_1", "confidence_1", "prediction_2", "confidence_2", "error"]
    values, numbers = expected(alone, folder / "colour.png").topk(2)
    names = [UNIQUE[number] for number in numbers.tolist()]
    assert [row[1], row[3]] == names
    np.testing.assert_allclose([float(row[2]), float(row[4])], values, atol=2e-6)
    (entry,) = json.loads(Path("p.json").read_text())
    assert list(entry["probabilities"]) == names


def test_what_images_may_name(folder: Path) -> None:
    assert pictures(["photos"]) == [f"photos/{name}" for name in FILES]
    assert pictures(["photos/*.png", "photos/colour.png"]) == ["photos/broken.png", "photos/colour.png"]
    assert pictures(["photos/**/*.tif", "photos/deep"]) == ["photos/deep/er/grey.tif", "photos/deep/photo.JPG"]
    assert pictures(["photos/notes.txt"]) == ["photos/notes.txt"]
    assert pictures([str(folder.resolve() / "wide.bmp")]) == [str(folder.resolve() / "wide.bmp")]
    with pytest.raises(ConfigError, match=r"--images: no such file or folder: photos/\*\.gif"):
        pictures(["photos/*.gif"])
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match=r"--images: no pictures under empty; they end in \.jpg"):
        pictures(["empty"])


def test_where_none_can_be_read_the_command_fails(alone: Path, folder: Path, capsys) -> None:
    words = ["predict", "--ckpt_path", str(alone), "--images", "photos/text.jpeg", "photos/notes.txt", "--out", "p.csv"]
    assert main(words) == 2
    err = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in err] == ["photos/notes.txt", "photos/text.jpeg", "error"]
    assert err[-1] == "error: --images: none of the 2 files can be read as a picture"
    assert len(Path("p.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--out", "p.txt"], "--out: got p.txt; name a file that ends in .csv or .json"),
        (["--out", "."], "--out: Is a directory"),
        (["--top", "0"], "--top: got 0, must be at least 1"),
        (["--top", "few"], "invalid int value: 'few'"),
        (["--images", "nowhere"], "--images: no such file or folder: nowhere"),
        ([], "data.path: no file"),
    ],
)
def test_a_mistake_is_one_line(alone: Path, folder: Path, capsys, words: list[str], says: str) -> None:
    assert main(["predict", "--ckpt_path", str(alone), *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert says in err


def test_files_are_read_as_the_validation_images(tmp_path: Path) -> None:
    """By each kind of data module: the same bits for a picture as for the image of the set that it was."""
    draw = np.random.default_rng(2)
    for split, count in (("train", 3), ("val", 2)):
        for name in "ab":
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (40, 90, 3), dtype=np.uint8)
                Pictures.fromarray(pixels).save(tmp_path / "set" / split / name / f"{i}.png")
    small, grey = (draw.integers(0, 256, shape, dtype=np.uint8) for shape in ((10, 12, 12, 3), (10, 12, 12)))
    modules: dict[str, Any] = {}
    for name, images in (("small", small), ("grey", grey)):
        labels = np.arange(len(images)) % 2
        np.savez(
            tmp_path / f"{name}.npz", train_images=images, train_labels=labels, val_images=images, val_labels=labels
        )
        modules[name] = Npz(str(tmp_path / f"{name}.npz"), size=8)
        for i, pixels in enumerate(images):
            Pictures.fromarray(pixels).save(tmp_path / f"{name}{i}.png")
    sizes = (24, 72)  # without and with the part round the centre
    modules |= {str(size): Torchvision("ImageFolder", str(tmp_path / "set"), size=size) for size in sizes}
    for name, data in modules.items():
        found = sorted(tmp_path.glob(f"{name}?.png")) or sorted((tmp_path / "set/val").rglob("*.png"))
        kept = Kept.of({}, data)
        assert kept.interpolation == ("bicubic" if name.isdigit() else "bilinear")
        values, errors = Files([str(file) for file in found], kept).__getitems__(list(range(len(found))))
        want, _ = data.split("val").__getitems__(list(range(len(found))))
        assert not any(errors)
        assert torch.equal(values, want), name


def test_pictures_of_the_test_set_get_its_predictions(tmp_path: Path, tiny, monkeypatch) -> None:
    from sklearn.datasets import load_digits

    (tmp_path / "tiny.yaml").write_text(dump(tiny(name="tiny")))
    assert main(["fit", "--config", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path)]) == 0
    checkpoint = str(tmp_path / "tiny/0" / LAST)
    data, digits = Digits(), load_digits()
    for i, index in enumerate(data._indices["test"][:20]):
        pixels = (digits.images[index] * (255 / 16)).round().astype(np.uint8)
        Pictures.fromarray(pixels).save(tmp_path / f"{i:02}.png")
    for words in (["--images", str(tmp_path)], []):
        assert main(["predict", "--ckpt_path", checkpoint, *words, "--out", str(tmp_path / f"{len(words)}.json")]) == 0
    of_files, of_set = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (2, 0))
    assert [row["index"] for row in of_set] == list(range(300))
    assert [row["label"] for row in of_set] == [str(n) for n in data.split("test").labels().tolist()]
    for one, two in zip(of_files, of_set[:20], strict=True):
        assert one["prediction"] == two["prediction"]
        np.testing.assert_allclose(list(one["probabilities"].values()), list(two["probabilities"].values()), atol=2e-6)


def test_names_of_classes_are_told_apart() -> None:
    assert unique(NAMES, 6) == [*UNIQUE, "4", "5"]


def test_a_net_for_other_channels_takes_no_pictures(tmp_path: Path, tiny) -> None:
    from framework.predict import predict_pictures

    images = np.zeros((8, 16, 16, 4), np.uint8)
    np.savez(tmp_path / "four.npz", train_images=images, train_labels=np.arange(8) % 2)
    document = tiny(data={"class_path": "Npz", "init_args": {"path": str(tmp_path / "four.npz")}})
    model = Workbench(complete(document)).make_model()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "four.ckpt")
    with pytest.raises(ConfigError, match="the net takes 4 channels, pictures have 1 or 3"):
        predict_pictures(document, tmp_path / "four.ckpt", ["x.png"])
    assert Image(16, 4) == Npz(str(tmp_path / "four.npz")).image
