"""WebDataset's shards: in which order they are read, by which device, and the index that is kept of them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from framework.data import WebDataset
from framework.data import shards as module
from framework.data.shards import LABEL, ShardOrder, find, read_index
from tests.shards import data_of, fill, numbers, on_rank, samples, settle, write


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    settle(monkeypatch, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return fill(tmp_path)


# Order


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_once_over_all_devices(folder: Path, ranks: int, workers: int) -> None:
    found = []
    for rank in range(ranks):
        data = data_of(folder, workers=workers)
        loader = on_rank(data, rank, ranks)
        batches = list(loader)
        assert len(loader) == len(batches)
        found.append(numbers(data, batches))
    assert [len(share) for share in found] == [61 // ranks] * ranks
    everything = [number for share in found for number in share]
    assert len(set(everything)) == len(everything) == 61 // ranks * ranks
    assert set(everything) <= set(range(61))


def order_of(epoch: int = 0, **arguments: Any) -> list[int]:
    shards = arguments.pop("shards", np.repeat(np.arange(40), 25))
    sampler = ShardOrder(shards, **{"window": 1, **arguments})
    sampler.set_epoch(epoch)
    keys = list(sampler)
    assert len(keys) == len(sampler)
    return keys


def test_order_depends_on_seed_and_epoch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first = order_of(window=64)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert order_of(window=64) == first
    assert torch.equal(torch.get_rng_state(), before), "the global generator moved"
    later = order_of(3, window=64)
    assert sorted(later) == list(range(3000, 4000)), "keys are epoch · count + index"
    assert [key % 1000 for key in later] != first
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert order_of(window=64) != first


def test_a_device_reads_a_part_of_the_shards_from_front_to_back() -> None:
    shares = [order_of(ranks=3, rank=rank) for rank in range(3)]
    assert [len(share) for share in shares] == [333] * 3
    for one in range(3):
        # 333 images lie in 14 or 15 shards of 25, of which the first and the last may be cut
        assert len({key // 25 for key in shares[one]}) <= 15
        breaks = sum(after != before + 1 for before, after in pairwise(shares[one]))
        assert breaks <= 14, "within a shard from front to back"
        for other in range(one):
            assert not set(shares[one]) & set(shares[other])
    left_out = set(range(1000)) - {key for share in shares for key in share}
    assert len(left_out) == 1
    later = set(range(1000)) - {key % 1000 for rank in range(3) for key in order_of(1, ranks=3, rank=rank)}
    assert later != left_out, "it is another one in another epoch"


def test_the_window_mixes_and_keeps_near() -> None:
    for rank in (0, 1):
        straight = order_of(ranks=2, rank=rank)
        mixed = order_of(ranks=2, rank=rank, window=100)
        assert sorted(mixed) == sorted(straight)
        places = {key: place for place, key in enumerate(straight)}
        moved = np.array([abs(place - places[key]) for place, key in enumerate(mixed)])
        assert moved.max() < 100
        assert moved.mean() > 15
    whole = order_of(window=10**9)
    assert np.mean([abs(key // 25 - after // 25) for key, after in pairwise(whole)]) > 10


def test_repeats_follow_each_other() -> None:
    shares = [order_of(2, ranks=2, rank=rank, repeats=3, window=50) for rank in (0, 1)]
    for share in shares:
        assert len(share) == 500, "an epoch has no more images"
        assert [key // 1000 for key in share] == [6 + place % 3 for place in range(500)], "draws of their own"
        images = [key % 1000 for key in share]
        assert all(len(set(images[n : n + 3])) == 1 for n in range(0, 498, 3))
        assert len(set(images)) == 167
    assert not {key % 1000 for key in shares[0]} & {key % 1000 for key in shares[1]}


def test_a_resumed_epoch_goes_on_where_it_was(folder: Path) -> None:
    def loader_of() -> tuple[WebDataset, Any]:
        data = data_of(folder, batch_size=7, flip=True, crop=2, repeats=2, shuffle=16)
        return data, on_rank(data, 1, 2)

    _, loader = loader_of()
    loader.sampler.set_epoch(2)
    batches = iter(loader)
    had = [next(batches) for _ in range(2)]
    state = loader.state_dict()
    rest = list(batches)
    _, again = loader_of()
    again.load_state_dict(state)
    found = list(again)
    assert len(found) == len(rest) == len(loader) - len(had) == 2
    for (images, targets), (same, labels) in zip(rest, found, strict=True):
        assert torch.equal(images, same)
        assert torch.equal(targets, labels)


# The index


@pytest.fixture
def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The shards that are read through."""
    found: list[str] = []
    scan = module.scan

    def watched(split: str, label_key: str, path: Path) -> np.ndarray:
        found.append(path.name)
        return scan(split, label_key, path)

    monkeypatch.setattr(module, "scan", watched)
    return found


def labels_of(folder: Path, **arguments: Any) -> Tensor:
    return torch.from_numpy(data_of(folder, **arguments)._open("train").index[:, LABEL])


def test_the_index_is_made_once(folder: Path, scans: list[str]) -> None:
    labels = labels_of(folder)
    assert len(scans) == 4
    assert torch.equal(labels_of(folder), labels)
    assert len(scans) == 4, "it was kept"
    assert len(list(folder.glob(".index-*.npz"))) == 1
    assert not list(folder.glob(".index-*.npz.*")), "nothing half-written is left"


def test_the_index_is_made_anew_where_a_shard_or_the_question_changes(folder: Path, scans: list[str]) -> None:
    labels_of(folder)
    write(folder / "train-01.tar", samples(20, 5))
    assert len(labels_of(folder)) == 59
    assert len(scans) == 8
    stat = (folder / "train-01.tar").stat()
    os.utime(folder / "train-01.tar", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    labels_of(folder)
    labels_of(folder, label_key="other")
    assert len(scans) == 16
    (kept,) = folder.glob(".index-*.npz")
    kept.write_bytes(kept.read_bytes()[:100])
    assert len(labels_of(folder, label_key="other")) == 59
    assert len(scans) == 20, "a broken one is no index"


def test_the_index_goes_to_the_cache_where_the_folder_is_read_only(
    folder: Path, scans: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def read_only(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if path.parent == folder and "x" in mode:
            raise PermissionError(path)
        return opened(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", read_only)
    labels = labels_of(folder)
    assert not list(folder.glob(".index*"))
    assert len(list(module.cache_folder().glob(".index-*.npz"))) == 1
    assert torch.equal(labels_of(folder), labels)
    assert len(scans) == 4


def test_several_processes_may_make_the_index_at_once(folder: Path) -> None:
    paths = find("train", str(folder / "train-*.tar"))
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda _: read_index("train", "label", paths), range(12)))
    assert all(np.array_equal(one, found[0]) for one in found)
    assert len(found[0]) == 61
    assert len(list(folder.glob(".index-*"))) == 1
