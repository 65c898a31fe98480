"""Published sets of pictures, in the layout of their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from torch import Tensor

from framework.data import Image, Torchvision
from framework.data.pictures import PictureSet, transform_for
from tests.test_pictures import Folder, noise, run_seed  # noqa: F401

RED, GREEN = (200, 30, 20), (20, 180, 60)


def targets_of(data: Torchvision, split: str) -> list[int]:
    images = data.split(split)
    return images.__getitems__(list(range(len(images))))[1].tolist()


def test_image_folder_reads_pictures_as_they_are_stored(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    Pictures.fromarray(np.full((8, 8), 25700, np.uint16)).save(tmp_path / "a" / "0.png")
    Pictures.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "b" / "0.png")
    data = Torchvision("ImageFolder", root=str(tmp_path), crop=0, flip=False)
    assert data.image == Image(8, 3)
    source, _ = data._part("train")
    images = PictureSet(source, np.arange(2), Image(8), transform_for(Image(8), False), torch.zeros(3), torch.ones(3))
    found = (images.__getitems__([0, 1])[0] * 255).round()
    assert found[0].unique().tolist() == [100]
    assert found[1].unique().tolist() == [255]


def test_image_folder_of_grey_pictures_stays_rgb(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        for n in range(2):
            Pictures.fromarray(noise(8, 8)).save(tmp_path / name / f"{n}.png")
    assert Torchvision("ImageFolder", root=str(tmp_path)).image == Image(8, 3)


def test_image_net(tmp_path: Path) -> None:
    words = {"n02": ("goldfish", "Carassius auratus"), "n01": ("tench", "Tinca tinca"), "n03": ("shark",)}
    torch.save((words, ["n01"]), tmp_path / "meta.bin")
    for split, count in {"train": 4, "val": 2}.items():
        for number, wnid in enumerate(sorted(words)):
            (tmp_path / split / wnid).mkdir(parents=True)
            for n in range(count):
                Pictures.new("RGB", (20, 10), (number, 0, 0)).save(tmp_path / split / wnid / f"{wnid}_{n}.JPEG")
    data = Torchvision("ImageNet", root=str(tmp_path), size=8, args={})
    assert (data.image, data.num_classes) == (Image(8, 3), 1000), "known before there are files"
    assert data.class_names == ["tench", "goldfish", "shark"]
    assert targets_of(data, "train") == [0] * 4 + [1] * 4 + [2] * 4
    assert targets_of(data, "val") == targets_of(data, "test") == [0, 0, 1, 1, 2, 2]
    assert data.part("val").source == data.part("test").source == "val"


SPECIES = [
    "00000_Animalia_Arthropoda_Insecta_Coleoptera_Cleridae_Trichodes_apiarius",
    "00001_Animalia_Chordata_Aves_Anseriformes_Anatidae_Anas_crecca",
    "00002_Plantae_Tracheophyta_Liliopsida_Asparagales_Orchidaceae_Ophrys_apifera",
]


@pytest.fixture
def inaturalist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three species, under the folders of two versions; the disk lists files in no order."""
    import os

    listed = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path=".": sorted(listed(path), reverse=True))
    for version, count in {"2021_train_mini": 10, "2021_valid": 2}.items():
        for number, species in enumerate(SPECIES):
            (tmp_path / version / species).mkdir(parents=True)
            for n in range(count):
                Pictures.new("RGB", (12, 10), (10 * number + n, 0, 0)).save(tmp_path / version / species / f"{n}.jpg")
    return tmp_path


def test_inaturalist(inaturalist: Path) -> None:
    assert Torchvision("INaturalist", size=8).num_classes == 10_000
    data = Torchvision("INaturalist", root=str(inaturalist), size=8, args={"version": "2021_train_mini"})
    assert (data.image, data.num_classes) == (Image(8, 3), 3)
    assert data.class_names == SPECIES
    assert targets_of(data, "train") == [0] * 10 + [1] * 10 + [2] * 10
    assert targets_of(data, "val") == targets_of(data, "test") == [0, 0, 1, 1, 2, 2]
    names = [data.split("val").name_of(index) for index in range(3)]
    species = [inaturalist / "2021_valid" / name for name in SPECIES]
    assert names == [str(species[0] / "0.jpg"), str(species[0] / "1.jpg"), str(species[1] / "0.jpg")]
    assert data.part("train").labels.tolist() == targets_of(data, "train")


def test_inaturalist_by_kingdom_and_with_a_folder_for_a_file(inaturalist: Path, capsys: Any) -> None:
    args = {"version": "2021_valid", "target_type": "kingdom"}
    (inaturalist / "2021_valid" / SPECIES[1] / "0.jpg").unlink()
    (inaturalist / "2021_valid" / SPECIES[1] / "0.jpg").mkdir()
    data = Torchvision("INaturalist", root=str(inaturalist), size=8, args=args)
    assert (data.num_classes, data.class_names) == (2, ["Animalia", "Plantae"])
    # 2021_valid itself is trained on: a tenth of each class validates.
    parts = [data.part(split) for split in ("train", "val")]
    assert [part.source for part in parts] == ["train", "train"]
    assert sorted(np.concatenate([part.indices for part in parts])) == list(range(6))
    for split, part in zip(("train", "val"), parts, strict=True):
        assert set(targets_of(data, split)) <= set(part.labels.tolist()) <= {0, 1}
    assert f"{SPECIES[1]}/0.jpg: Is a directory" in capsys.readouterr().err


def test_oxford_pets_are_read_as_stored(tmp_path: Path) -> None:
    folder = tmp_path / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    for split, count in {"trainval": 10, "test": 3}.items():
        lines = [f"{name}_{split}{n} {label} 1 1" for label, name in ((1, "Abyssinian"), (2, "great_pyrenees"))
                 for n in range(count)]  # fmt: skip
        (folder / "annotations" / f"{split}.txt").write_text("\n".join(lines))
        for line in lines:  # some of the published .jpg files are PNG or GIF with a palette, too
            Pictures.new("RGBA", (9, 12), (0, 0, 0, 0)).save(folder / "images" / f"{line.split()[0]}.jpg", "png")
    data = Torchvision("OxfordIIITPet", root=str(tmp_path), size=8)
    assert (data.image, data.class_names) == (Image(8, 3), ["Abyssinian", "Great Pyrenees"])
    assert [targets_of(data, split).count(1) for split in ("train", "val", "test")] == [9, 1, 3]
    test = data.split("test")
    assert ((test[0][0] * test.std[:, None, None] + test.mean[:, None, None] - 1).abs() < 1e-5).all(), "white"
    assert test.name_of(2) == str(folder / "images" / "Abyssinian_test2.jpg")


def test_flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scipy.io import savemat
    from torchvision.datasets import Flowers102

    files = {"label": ("imagelabels.mat", None), "setid": ("setid.mat", None), "image": ("102flowers.tgz", None)}
    monkeypatch.setattr(Flowers102, "_file_dict", files)
    folder = tmp_path / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    for number in range(1, 7):
        Pictures.new("RGB", (12, 9), (number, 0, 0)).save(folder / "jpg" / f"image_{number:05d}.jpg")
    savemat(folder / "imagelabels.mat", {"labels": [1, 102, 1, 102, 2, 3]})
    savemat(folder / "setid.mat", {"trnid": [1, 2], "valid": [3, 4], "tstid": [5, 6]})
    data = Torchvision("Flowers102", root=str(tmp_path), size=8)
    assert [targets_of(data, split) for split in ("train", "val", "test")] == [[0, 101], [0, 101], [1, 2]]
    assert (len(data.class_names), data.class_names[0], data.class_names[101]) == (
        102,
        "pink primrose",
        "blackberry lily",
    )
    assert data.split("val").name_of(1) == str(folder / "jpg" / "image_00004.jpg")


def test_image_folder_with_three_splits(tmp_path: Path) -> None:
    for split, count in {"train": 3, "val": 2, "test": 1}.items():
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            for n in range(count):
                Pictures.fromarray(noise(8, 8, 3)).save(tmp_path / split / name / f"{n}.png")
    data = Torchvision("ImageFolder", root=str(tmp_path), size=8)
    assert [targets_of(data, split) for split in ("train", "val", "test")] == [[0] * 3 + [1] * 3, [0, 0, 1, 1], [0, 1]]
    assert [data.part(split).source for split in ("train", "val", "test")] == ["train", "val", "test"]
    labels: Tensor | None = data.split("train").labels()
    assert labels is not None
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
