"""Pictures whose batches are finished on a GPU: the same images up to rounding, from the same draws."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from PIL.ExifTags import Base
from timm.data import auto_augment
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from framework.data import Torchvision
from framework.data.augment import noted, own_draws, posterize, rand_augment, seed_timm, seed_torch
from framework.data.base import Loader
from framework.data.batched import GROUPS, NAMES, NONE, rand_augment_batch
from framework.data.cuts import RandomPart
from framework.data.pictures import PictureSet, decoded, read_picture, to_mode

CPU, POLICY = torch.device("cpu"), "rand-m9-mstd0.5-inc1"
FILL = {"RGB": (124, 116, 104), "L": (114,)}


@pytest.fixture(autouse=True)
def run_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def smooth(height: int, width: int, seed: int = 0) -> Any:
    """A picture that is no noise: JPEG and bicubic filters find in it what they are made for."""
    values = np.random.RandomState(seed).randint(0, 256, (6, 7, 3)).astype(np.uint8)
    return Pictures.fromarray(values).resize((width, height), Pictures.Resampling.BICUBIC)


def tensor(picture: Any) -> Tensor:
    return v2.functional.pil_to_tensor(picture)


# Operations


def samples(mode: str, size: int = 37) -> list[Any]:
    """A smooth picture, noise, one colour, and dark shades."""
    noise = Pictures.fromarray(np.random.RandomState(1).randint(0, 256, (size, size, 3)).astype(np.uint8))
    plain = Pictures.new("RGB", (size, size), (200, 30, 20))
    made = [smooth(size, size), noise, plain, smooth(size, size, 2).point([9 + v // 3 for v in range(256)] * 3)]
    return [each.convert(mode) for each in made]


def arguments(name: str) -> list[tuple[float, ...]]:
    """What timm makes of magnitudes 0..10, of both signs."""
    level = auto_augment.LEVEL_TO_ARG[name]
    if not level:
        return [()]
    with own_draws():
        seed_timm(0)
        return sorted({level(magnitude / 2, {}) for magnitude in range(21) for _ in range(6)})


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("inc", ["", "Increasing"])
@pytest.mark.parametrize("name", NAMES)
def test_every_operation_is_that_of_pillow_at_every_magnitude(name: str, inc: str, mode: str) -> None:
    known = name + inc if name + inc in auto_augment.NAME_TO_OP else name
    act = posterize if name == "Posterize" else auto_augment.NAME_TO_OP[known]
    pictures, given = samples(mode), arguments(known)
    expected = [
        tensor(act(picture, *args, fillcolor=FILL[mode], resample=Pictures.Resampling.BICUBIC))
        for args in given
        for picture in pictures
    ]
    images = torch.stack([tensor(picture) for picture in pictures]).repeat(len(given), 1, 1, 1)
    steps = [[[NAMES.index(name), args[0] if args else 0.0]] for args in given for _ in pictures]
    found = rand_augment_batch(images, torch.tensor(steps, dtype=torch.float64), FILL[mode])
    apart = (found.int() - torch.stack(expected).int()).abs()
    assert found.dtype == torch.uint8
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 1e-3
    if name == "Posterize":
        assert {args[0] for args in given} == {0, 1, 2, 3, 4}, "0 bits are among them, which Pillow 13 refuses"


def test_every_operation_of_timm_is_in_one_group() -> None:
    for policy in ("rand-m9", POLICY):
        ops = rand_augment(policy, 32, (0.5,)).ops
        assert sorted(op.name.removesuffix("Increasing") for op in ops) == sorted(NAMES)
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(NAMES)


def test_images_of_a_batch_do_not_touch_each_other() -> None:
    images = torch.stack([tensor(smooth(24, 24, seed)) for seed in range(len(NAMES) + 1)])
    steps = torch.tensor([[[number, 1.7], [NONE, 0.0]] for number in (*range(len(NAMES)), NONE)], dtype=torch.float64)
    steps[NAMES.index("Posterize"), 0, 1] = 3
    together = rand_augment_batch(images.clone(), steps, FILL["RGB"])
    for at in range(len(images)):
        alone = rand_augment_batch(images[at : at + 1].clone(), steps[at : at + 1], FILL["RGB"])
        assert torch.equal(alone[0], together[at])
    assert torch.equal(together[-1], images[-1]), "no step"
    assert sum(torch.equal(one, other) for one, other in zip(together, images, strict=True)) == 1


# Draws


@pytest.mark.parametrize("policy", [POLICY, "rand-m10-n3-p1.0-mstd0.5-inc1", "rand-m9-mstd101"])
def test_noted_steps_are_what_timm_would_do(policy: str) -> None:
    acting = rand_augment(policy, 32, (0.5, 0.5, 0.5))
    noting, done = noted(acting), list[tuple[int, float]]()
    for op in acting.ops:
        number = NAMES.index(op.name.removesuffix("Increasing"))
        op.aug_fn = lambda picture, *args, number=number, **_: done.append((number, *(args or (0.0,)))) or picture
    found: Counter[int] = Counter()
    for seed in range(300):
        done.clear()
        with own_draws():
            seed_timm(seed)
            acting(object())
            seed_timm(seed)
            assert noting([]) == done
        found.update(number for number, _ in done)
    assert set(found) == set(range(len(NAMES)))
    assert max(found.values()) < 3 * min(found.values())


def test_a_part_is_that_of_torchvision() -> None:
    size = 80
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.08, 1.0), interpolation=InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
        ]
    )
    ours, picture = RandomPart(size, flip=True), smooth(120, 150)
    for seed in range(30):
        with own_draws():
            seed_torch(seed)
            found = ours(tensor(picture))
            seed_torch(seed)
            assert torch.equal(found, theirs(tensor(picture)))
            seed_torch(seed)
            assert (found.int() - tensor(theirs(picture)).int()).abs().max() <= 2, "of a PIL image"


# Decoding


@pytest.mark.parametrize(
    "how", [{}, {"subsampling": 0}, {"subsampling": 1, "progressive": True}, {"keep_rgb": True}, {"quality": 30}]
)
@pytest.mark.parametrize(("stored", "mode"), [("RGB", "RGB"), ("L", "L"), ("L", "RGB"), ("RGB", "L"), ("CMYK", "RGB")])
def test_a_jpeg_has_the_values_that_pil_gives(
    stored: str, mode: str, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = io.BytesIO()
    smooth(61, 47).convert(stored).save(file, "jpeg", **(how if stored == "RGB" else {}))
    expected = tensor(to_mode(Pictures.open(io.BytesIO(file.getvalue())), mode))
    # Nothing but a JPEG that needs no more than decoding goes past PIL.
    if stored in ("L", mode):
        monkeypatch.setattr("framework.data.pictures.to_mode", None)
    assert torch.equal(decoded(read_picture(file), mode), expected)


def test_without_torchvisions_decoder_pil_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    smooth(30, 40).save(file, "jpeg")
    expected = decoded(read_picture(file), "RGB")
    monkeypatch.setattr(torch.ops, "image", SimpleNamespace())
    assert torch.equal(decoded(read_picture(file), "RGB"), expected)


@pytest.mark.parametrize("turned", range(1, 9))
def test_a_jpeg_comes_upright(tmp_path: Path, turned: int) -> None:
    exif = Pictures.Exif()
    exif[Base.Orientation] = turned
    smooth(32, 48).save(tmp_path / "a.jpg", exif=exif, quality=95)
    found = decoded(read_picture(tmp_path / "a.jpg"), "RGB")
    assert found.shape[1:] == ((32, 48) if turned < 5 else (48, 32))
    assert torch.equal(found, tensor(to_mode(read_picture(tmp_path / "a.jpg"), "RGB")))


@pytest.mark.parametrize("missing", [1, 40, 900])
def test_a_jpeg_that_is_cut_off_is_refused_as_pil_does(missing: int) -> None:
    file = io.BytesIO()
    smooth(200, 200).save(file, "jpeg", quality=95)
    with pytest.raises(OSError, match="image file is truncated"):
        decoded(read_picture(io.BytesIO(file.getvalue()[:-missing])), "RGB")


# Sets


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files of two classes: 40 to train, 4 to validate."""
    root = tmp_path_factory.mktemp("photos")
    for split, count in (("train", 20), ("val", 2)):
        for number, name in enumerate("ab"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                smooth(90, 110, 100 * number + i).save(root / split / name / f"{i}.jpg")
    return root


def folder(photos: Path, **args: Any) -> Torchvision:
    given = {"size": 72, "batch_size": 10, "workers": 0, "auto_augment": POLICY, "erase_prob": 0.5, **args}
    return Torchvision("ImageFolder", str(photos), **given)


def noise_of(train: PictureSet, key: int) -> Tensor:
    """Where an image is erased, `(H, W)`."""
    mask = torch.zeros(train.image.size, train.image.size, dtype=torch.bool)
    for _, _, top, left, height, width in train._boxes([key]).tolist():
        mask[top : top + height, left : left + width] = True
    return mask


@pytest.mark.parametrize("size", [32, 72])
def test_a_finished_batch_is_that_of_the_host(photos: Path, size: int) -> None:
    here = folder(photos, size=size).split("train")
    assert isinstance(here, PictureSet)
    there = here.to(CPU)
    keys = [40 * number + index for index in range(40) for number in (0, 3)]
    raw = there.__getitems__(keys)
    assert raw[0].dtype == torch.uint8, "less to carry over"
    expected, targets = here.__getitems__(keys)
    found, same = there.finish(raw)
    assert torch.equal(same, targets)
    assert 20 < len(raw[3]) < 60, "erased ones"
    masks = torch.stack([noise_of(there, key) for key in keys])[:, None].expand_as(found)
    # The seeds are the same; what differs is how much of a generator's numbers another kind of device takes.
    assert torch.equal(found[masks], expected[masks])
    apart = ((found - expected) * 255 * here.std[:, None, None]).abs()
    # A step on top of one that rounds otherwise may make more of it.
    assert (apart > 1.5).float().mean() < 1e-3
    assert (apart > 0.5).float().mean() < 5e-3


def test_without_augmentation_they_are_the_same_bit_by_bit(photos: Path) -> None:
    data = folder(photos, auto_augment="", erase_prob=0.0)
    for split in ("train", "val"):
        images = data.split(split)
        assert isinstance(images, PictureSet)
        keys, there = list(range(len(images))), images.to(CPU)
        for one, other in zip(images.__getitems__(keys), there.finish(there.__getitems__(keys)), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(there[1][0], images[1][0])


def test_draws_of_a_finished_batch_depend_on_the_image_alone(photos: Path) -> None:
    train = folder(photos).split("train").to(CPU)  # type: ignore[attr-defined]
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    once = train.finish(train.__getitems__(list(range(40))))[0]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    again = train.finish(train.__getitems__([7, 3]))[0]
    assert torch.equal(again, once[[7, 3]])
    assert not torch.equal(train[43][0], once[3]), "another epoch"


def trainer(device: str) -> Any:
    return SimpleNamespace(world_size=1, global_rank=0, strategy=SimpleNamespace(root_device=torch.device(device)))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_finishes_its_batches_and_goes_on_in_the_midst(
    photos: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PictureSet, "near", lambda self, device: self.to(device))
    expected = folder(photos).split("train").to(CPU)  # type: ignore[attr-defined]
    data = folder(photos, workers=workers)
    data.trainer = trainer("cpu")
    loader = data.train_dataloader()
    assert isinstance(loader, Loader)
    loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
    batches = list(loader)
    keys = list(loader.sampler)
    for at, (images, targets) in enumerate(batches):
        assert images.dtype == torch.float32
        wanted = expected.finish(expected.__getitems__(keys[10 * at : 10 * at + 10]))
        assert torch.equal(images, wanted[0])
        assert torch.equal(targets, wanted[1])
    resumed = data.train_dataloader()
    resumed.load_state_dict({"epoch": 1, "done": 2})  # type: ignore[attr-defined]
    rest = list(resumed)
    assert len(rest) == len(batches) - 2
    assert all(torch.equal(one[0], other[0]) for one, other in zip(rest, batches[2:], strict=True))


def test_sets_go_to_a_gpu_and_nowhere_else(photos: Path) -> None:
    data = folder(photos)
    train = data.split("train")
    for device in ("cpu", "mps"):
        assert train.near(torch.device(device)) is train
    there = train.near(torch.device("cuda", 1))
    assert isinstance(there, PictureSet)
    assert there.device == torch.device("cuda", 1)
    assert there.mean.device == CPU, "worker processes have the set, too"
    assert data.split("train").device is None, "what else reads the set finds whole batches"  # type: ignore[attr-defined]
    assert data.sample(4)[0].shape == (4, 3, 72, 72)


def test_batches_are_finished_on_the_device(photos: Path) -> None:
    """Tensors without values: whatever mixes devices, or waits for what a device has computed, is an error."""
    train = folder(photos, auto_augment="rand-m9-n4-p1.0-mstd0.5-inc1", erase_prob=0.0).split("train")
    assert isinstance(train, PictureSet)
    there = train.to(torch.device("meta"))
    batch = there.__getitems__(list(range(40)))
    assert len(set(batch[2][..., 0].flatten().tolist())) == len(NAMES), "all operations"
    assert all(each.device == CPU for each in batch), "what comes from a worker process"
    images, targets = there.finish(batch)
    assert images.device.type == targets.device.type == "meta"
    assert (images.shape, images.dtype) == ((40, 3, 72, 72), torch.float32)
    with pytest.raises(RuntimeError):
        images.mean().item()


# Loaders


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_settings_of_loaders(photos: Path, workers: int, cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    data = folder(photos, workers=workers)
    loaders = [data.train_dataloader(), data.val_dataloader()]
    for device in ("cpu", "cuda"):
        data.trainer = trainer(device)
        loaders += [data.train_dataloader(), data.val_dataloader()]
    for loader, pinned in zip(loaders, [cuda, cuda, False, False, True, True], strict=True):
        assert loader.num_workers == workers
        assert loader.persistent_workers == (workers > 0)
        assert loader.prefetch_factor == (2 if workers else None)
        # Pinned memory is for what goes to a GPU: a run on the CPU of a machine that has one does not touch it.
        assert loader.pin_memory == pinned
