"""Repeated augmentation, RandAugment and random erasing: timm's rules, with draws of our own."""

from __future__ import annotations

import pickle
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Pictures
from PIL import ImageOps
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from timm.data.distributed_sampler import RepeatAugSampler
from torch import Tensor
from torch.utils.data import DistributedSampler

from framework.data import ImageData, Torchvision
from framework.data.augment import own_draws, posterize, rand_augment, seed_timm
from framework.data.base import Order, Repeats
from framework.data.memory import ROUNDS, MemorySet
from framework.errors import ConfigError

POLICY = "rand-m9-mstd0.5-inc1"


@pytest.fixture(autouse=True)
def run_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


def fake(size: int = 16, count: int = 40, channels: int = 3, **args: Any) -> Torchvision:
    """Pictures of noise, a tenth of which validates; neither shifted nor mirrored, if not asked for."""
    given = {"workers": 0, "batch_size": 8, "crop": 0, "flip": False, **args}
    return Torchvision("FakeData", args={"size": count, "image_size": [channels, size, size]}, **given)


def epoch_of(data: ImageData, epoch: int = 0) -> Tensor:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return torch.cat([images for images, _ in loader])


# Repeated augmentation


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [3, 100, 255, 256, 700, 1024])
def test_repeats_are_those_of_timm(monkeypatch: pytest.MonkeyPatch, count: int, ranks: int) -> None:
    order = torch.from_numpy(np.random.RandomState(0).permutation(count))
    monkeypatch.setattr(torch, "randperm", lambda n, generator: order)
    for rank in range(ranks):
        ours = Repeats(count, 3, ranks, rank)
        theirs = RepeatAugSampler(range(count), ranks, rank)
        ours.set_epoch(5)
        keys = list(ours)
        assert [key % count for key in keys] == list(theirs)
        assert len(keys) == len(ours) == len(theirs)
        assert {key // count for key in keys} <= {15, 16, 17}


def test_copies_are_drawn_apart_in_one_step_of_all_devices() -> None:
    shares = [list(Repeats(600, 3, 4, rank)) for rank in range(4)]
    dealt = [key for step in zip(*shares, strict=True) for key in step]
    assert len(dealt) == 512
    for place in range(0, 510, 3):
        copies = dealt[place : place + 3]
        assert len({key % 600 for key in copies}) == 1
        assert [key // 600 for key in copies] == [0, 1, 2]
    assert len(set(dealt)) == 512, "no draw comes twice"


def test_repeats_depend_on_seed_and_epoch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Repeats(300, 3)
    before = torch.get_rng_state()
    first = list(sampler)
    assert torch.equal(torch.get_rng_state(), before), "the global generator moved"
    assert list(sampler) == first
    assert [key % 300 for key in first[::3]] == [key % 300 for key in Order(300)][:86], "the order without repetition"
    sampler.set_epoch(1)
    later = list(sampler)
    assert not set(first) & set(later)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert list(sampler) != later


def test_a_loader_of_repeats_is_left_alone_by_lightning() -> None:
    data = fake(count=600, repeats=3)
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data.trainer = SimpleNamespace(world_size=2, global_rank=1, strategy=strategy)  # type: ignore[assignment]
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, DistributedSampler), "what Lightning does not wrap"
    assert list(loader.sampler) == list(Repeats(540, 3, 2, 1))
    assert len(loader) == 512 // 2 // 8
    assert not isinstance(data.val_dataloader().sampler, Repeats)


@pytest.mark.parametrize("flip", [False, True])
def test_copies_differ(flip: bool) -> None:
    images = epoch_of(fake(size=24, flip=flip, crop=4, repeats=3, batch_size=12))
    assert len(images) == 36
    copies = images.unflatten(0, (12, 3))
    assert sum(torch.equal(copies[i, 0], copies[i, 1]) for i in range(12)) <= 2


def test_copies_in_memory_differ_and_do_not_depend_on_their_batch() -> None:
    images = torch.randint(0, 256, (20, 3, 9, 9), dtype=torch.uint8)
    train = MemorySet(images, torch.zeros(20).long(), torch.zeros(3), torch.ones(3), crop=3)
    keys = [number * 20 + index for index in range(5) for number in range(ROUNDS + 4)]
    together = train.__getitems__(keys)[0]
    assert all(torch.equal(one, train[key][0]) for one, key in zip(together, keys, strict=True))
    assert len({tuple(one.flatten().tolist()) for one in together}) > 40
    assert len(train._drawn) == ROUNDS


def test_at_least_one_repetition() -> None:
    with pytest.raises(ConfigError, match=r"data\.repeats: got 0, must be at least 1"):
        fake(repeats=0)


# RandAugment


def test_rand_augment_is_that_of_timm() -> None:
    theirs = next(
        step
        for step in create_transform(224, is_training=True, auto_augment=POLICY, interpolation="bicubic").transforms
        if isinstance(step, RandAugment)
    )
    ours = rand_augment(POLICY, 224, (0.485, 0.456, 0.406))
    assert ours.num_layers == theirs.num_layers == 2
    for one, two in zip(ours.ops, theirs.ops, strict=True):
        own, others = vars(one), vars(two)
        assert {key: own[key] for key in own if key != "aug_fn"} == {
            key: others[key] for key in others if key != "aug_fn"
        }
        assert one.aug_fn is two.aug_fn or one.aug_fn is posterize
    assert sum(op.aug_fn is posterize for op in ours.ops) == 1


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_posterize_is_that_of_pillow_and_knows_0_bits(mode: str) -> None:
    shape = (16, 16, 3) if mode == "RGB" else (16, 16)
    picture = Pictures.fromarray(np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8))
    for bits in range(1, 9):
        assert np.array_equal(posterize(picture, bits), ImageOps.posterize(picture, bits))
    assert not np.any(posterize(picture, 0))


@pytest.mark.parametrize("channels", [1, 3])
def test_many_images_at_the_highest_magnitude(channels: int) -> None:
    """timm 1.0.31 stops with Pillow 13 at the first that keeps 0 bits."""
    mode = {1: "L", 3: "RGB"}[channels]
    policy = rand_augment("rand-m10-n3-p1.0-mstd0.5-inc1", 8, (0.5,) * channels)
    kept: list[int] = []
    for op in policy.ops:
        if op.aug_fn is posterize:
            op.aug_fn = lambda picture, bits, **given: kept.append(bits) or posterize(picture, bits, **given)
    picture = Pictures.fromarray(np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8)).convert(mode)
    for draw in range(400):
        with own_draws():
            seed_timm(draw)
            assert policy(picture).size == (8, 8)
    assert Counter(kept)[0] > 10


@pytest.mark.parametrize("inc", ["", "-inc1"])
@pytest.mark.parametrize("magnitude", range(11))
def test_no_operation_stops_at_any_magnitude(magnitude: int, inc: str) -> None:
    picture = Pictures.fromarray(np.random.RandomState(0).randint(0, 256, (8, 8, 3)).astype(np.uint8))
    ops = rand_augment(f"rand-m{magnitude}-p1.0{inc}", 8, (0.5, 0.5, 0.5)).ops
    assert len(ops) == 15
    for op in ops:
        assert op(picture).size == (8, 8)


def test_draws_depend_on_the_image_alone() -> None:
    train = fake(auto_augment="rand-m9-p1.0-inc1", erase_prob=0.5).split("train")
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    once = train.__getitems__(list(range(36)))[0]
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]
    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(3)
    assert torch.equal(train.__getitems__([7, 3])[0], once[[7, 3]])
    assert not torch.equal(train[3 + 36][0], once[3]), "another epoch"


def test_worker_processes_change_no_draw() -> None:
    given = {"auto_augment": POLICY, "erase_prob": 0.5, "repeats": 3}
    alone, helped = fake(**given), fake(**given, workers=2)
    assert helped.train_dataloader().num_workers == 2
    assert torch.equal(epoch_of(alone, 1), epoch_of(helped, 1))


@pytest.mark.parametrize("size", [16, 72])
def test_turning_them_on_leaves_crops_and_flips(size: int) -> None:
    plain, drawn = (
        fake(size, crop=4, flip=True, **given).split("train") for given in ({}, {"auto_augment": "rand-m9-p0"})
    )
    keys = list(range(36))
    assert torch.equal(plain.__getitems__(keys)[0], drawn.__getitems__(keys)[0])


def test_what_is_evaluated_is_not_augmented() -> None:
    plain, drawn = (fake(**given).split("val") for given in ({}, {"auto_augment": POLICY, "erase_prob": 1.0}))
    assert torch.equal(plain.__getitems__([0, 1, 2])[0], drawn.__getitems__([0, 1, 2])[0])


@pytest.mark.parametrize("policy", ["rand-m9-mstd", "augmix-m5", "rand-q3", "rand9", "rand-m1.5"])
def test_no_policy(policy: str) -> None:
    with pytest.raises(ConfigError, match=f"data.auto_augment: got '{policy}', must be timm's RandAugment") as caught:
        fake(auto_augment=policy)
    assert "\n" not in str(caught.value)


# Random erasing


def test_erasing_puts_noise_over_a_part_of_some_images() -> None:
    plain, drawn = (fake(32, 400, erase_prob=prob).split("train") for prob in (0.0, 0.25))
    keys = list(range(360))
    before, after = plain.__getitems__(keys)[0], drawn.__getitems__(keys)[0]
    changed = (before != after).any(1)
    share = changed.flatten(1).any(1)
    assert 0.18 < share.float().mean() < 0.33
    area = changed[share].float().mean((1, 2))
    assert area.min() > 0.01
    assert area.max() < 0.36
    noise = after.permute(1, 0, 2, 3)[:, changed]
    assert noise.mean().abs() < 0.05
    assert (noise.std() - 1).abs() < 0.05


@pytest.mark.parametrize("prob", [-0.1, 1.5])
def test_erase_prob_out_of_range(prob: float) -> None:
    with pytest.raises(ConfigError, match=f"data.erase_prob: got {prob}, must be 0 to 1"):
        fake(erase_prob=prob)


def test_a_set_in_memory_keeps_its_statistics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    (tmp_path / CIFAR10.base_folder).mkdir()
    draw = np.random.RandomState(0)
    for split in ("train", "test"):
        batch = {"data": draw.randint(0, 200, (40, 3072)).astype(np.uint8), "labels": [i % 10 for i in range(40)]}
        (tmp_path / CIFAR10.base_folder / split).write_bytes(pickle.dumps(batch))
        monkeypatch.setattr(CIFAR10, f"{split}_list", [[split, None]])
    (tmp_path / CIFAR10.base_folder / "meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": None})
    memory, drawn = (
        Torchvision("CIFAR10", root=str(tmp_path), crop=0, flip=False, auto_augment=policy)
        for policy in ("", "rand-m9-p0")
    )
    keys = list(range(30))
    assert type(memory.split("train")) is not type(drawn.split("train"))
    for split in ("train", "test"):
        torch.testing.assert_close(memory.split(split).__getitems__(keys)[0], drawn.split(split).__getitems__(keys)[0])
