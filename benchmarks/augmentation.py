"""How fast training images of small sets are shifted, mirrored and normalised: one by one, in batch, and on a GPU.

    uv run python benchmarks/augmentation.py

Prints a table and writes it as JSON under benchmarks/results. All in one process without workers; every method takes
the same images in the same order, and all take turns within a round, in reverse in every other one. "one by one" is
what torchvision's sets do: an array made a PIL image, transforms v2, a stack. "v2 in batch" draws once for a batch, so
that all of its images are shifted and mirrored alike: faster, and not the same augmentation. The last two draw anew for
each image. On a machine with a GPU the batches of the first three are copied there, as training has to.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from framework.data.memory import MemorySet
from framework.provenance import git, machine

# Size, channels, crop.
SETS = ((8, 1, 1), (28, 1, 2), (32, 3, 4))
COUNT, BATCH, ROUNDS, SECONDS = 20_000, 128, 21, 0.1
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

Method = Callable[[list[int]], Tensor]


def methods(size: int, channels: int, crop: int) -> dict[str, Method]:
    """Each method by name: from indices to a normalised float32 batch on the device to train on."""
    images = torch.randint(0, 256, (COUNT, channels, size, size), dtype=torch.uint8)
    arrays = np.ascontiguousarray(images.permute(0, 2, 3, 1).squeeze(-1).numpy())
    mean, std = torch.tensor(MEAN[:channels]), torch.tensor(STD[:channels])
    shift = [v2.RandomCrop(size, padding=crop), v2.RandomHorizontalFlip()]
    values = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN[:channels], STD[:channels])]
    single, batched = v2.Compose([*shift, v2.ToImage(), *values]), v2.Compose([*shift, *values])
    ours = MemorySet(images, torch.zeros(COUNT, dtype=torch.int64), mean, std, crop, flip=True)

    def moved(method: Method) -> Method:
        return lambda keys: method(keys).pin_memory().to("cuda", non_blocking=True)

    made: dict[str, Method] = {
        "one by one": lambda keys: torch.stack([single(Image.fromarray(arrays[key])) for key in keys]),
        "v2 in batch": lambda keys: batched(images[torch.tensor(keys)]),
        "ours, host": lambda keys: ours.__getitems__(keys)[0],
    }
    if torch.cuda.is_available():
        made = {name: moved(method) for name, method in made.items()}
        there = ours.to(torch.device("cuda"))
        made["ours, device"] = lambda keys: there.__getitems__(keys)[0]
    return made


def speed(method: Method, batches: list[list[int]]) -> float:
    """Images a second, over at least `SECONDS`."""
    done, start = 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        method(batches[done % len(batches)])
        done += 1
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return done * BATCH / (time.perf_counter() - start)


def measured(size: int, channels: int, crop: int) -> dict[str, dict[str, list[float]]]:
    """Of each method images a second and the ratio to the first one: quartiles over the rounds, the median first."""
    chosen = methods(size, channels, crop)
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    batches = order[: COUNT // BATCH * BATCH].view(-1, BATCH).tolist()
    for method in chosen.values():
        method(batches[0])
    found: dict[str, list[float]] = {name: [] for name in chosen}
    for number in range(ROUNDS):
        for name in list(chosen) if number % 2 else list(chosen)[::-1]:
            found[name].append(speed(chosen[name], batches))
    first = np.array(next(iter(found.values())))
    return {
        name: {"images_per_s": quartiles(np.array(each), 0), "ratio": quartiles(np.array(each) / first, 2)}
        for name, each in found.items()
    }


def quartiles(values: np.ndarray, digits: int) -> list[float]:
    return [round(float(value), digits) for value in np.quantile(values, [0.5, 0.25, 0.75])]


def main() -> None:
    before = os.getloadavg()[0]
    found = {}
    print(f"{'images':>10}  {'method':14}{'images/s':>12}  {'quartiles':21}{'ratio':>7}  quartiles")
    for size, channels, crop in SETS:
        name = f"{channels}×{size}×{size}"
        found[name] = measured(size, channels, crop)
        for method, each in found[name].items():
            (speed, *speeds), (ratio, *ratios) = each["images_per_s"], each["ratio"]
            spread = "–".join(f"{value:,.0f}" for value in speeds)
            print(f"{name:>10}  {method:14}{speed:12,.0f}  {spread:21}{ratio:7.2f}  {ratios[0]:.2f}–{ratios[1]:.2f}")
    skipped = [] if torch.cuda.is_available() else ["ours, device: there is no CUDA device here"]
    load = [round(before, 2), round(os.getloadavg()[0], 2)]
    print(*skipped, f"load average {load[0]} before, {load[1]} after", sep="\n")
    now = datetime.now(UTC)
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    cpu = "".join(c if c.isalnum() else "-" for c in machine()["cpu"].lower()).strip("-")
    target = folder / f"augmentation_{cpu}_{now:%Y-%m-%d}.json"
    text = {"time": now.isoformat(timespec="seconds"), "commit": git("rev-parse", "HEAD"), "machine": machine(),
            "load_average": load, "batch": BATCH, "rounds": ROUNDS, "skipped": skipped, "results": found}  # fmt: skip
    target.write_text(json.dumps(text, indent=1, ensure_ascii=False))
    print(target)


if __name__ == "__main__":
    main()
