"""How fast training images of small sets are shifted, mirrored and normalised: one by one, in batch, and on a GPU.

    uv run python benchmarks/augmentation.py                        # one thread: its CPU time
    uv run python benchmarks/augmentation.py --threads 2            # wall time, on an idle machine

All in one process without workers; every method takes the same images in the same order. "one by one" is what
torchvision's sets do: an array made a PIL image, transforms v2, a stack. "v2 in batch" draws once for a batch, so that
all of its images are shifted and mirrored alike: faster, and not the same augmentation. The last two draw anew for each
image. On a machine with a GPU the batches of the first three are copied there, as training has to, and the GPU's time
is measured, in which it waits for the host.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from framework.bench import report
from framework.bench.harness import CLOCKS, Candidate, Section, cpu_time, cuda_time, race, threads, wall_time
from framework.data.memory import MemorySet
from framework.process import prepare

# Size, channels, crop.
SETS = ((8, 1, 1), (28, 1, 2), (32, 3, 4))
COUNT, BATCH = 20_000, 128
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


def candidates(size: int, channels: int, crop: int) -> list[Candidate]:
    """Each method as a candidate that makes the next batch of an epoch, again and again."""
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(0))
    batches = order[: COUNT // BATCH * BATCH].view(-1, BATCH).tolist()
    made = []
    for name, method in methods(size, channels, crop).items():
        first = method(batches[0])
        assert first.shape == (BATCH, channels, size, size), f"{name}: {first.shape}"
        assert first.dtype == torch.float32, f"{name}: {first.dtype}"
        made.append(Candidate(name, partial(next, map(method, cycle(batches))), BATCH))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="with 1, CPU time is measured, else wall time (default: 1)"
    )
    parser.add_argument("--rounds", type=int, default=21, metavar="N", help="how often each is timed (default: 21)")
    args = parser.parse_args()
    prepare()
    there = torch.cuda.is_available()
    stopwatch = cuda_time if there else cpu_time if args.threads == 1 else wall_time
    notes = [] if there else ["ours, device: there is no CUDA device here"]
    title = f"batches of {BATCH}, {args.threads} thread{'s' * (args.threads > 1)}"
    before, found = report.circumstances(), []
    with threads(args.threads):
        for size, channels, crop in SETS:
            timings = race(candidates(size, channels, crop), stopwatch, args.rounds)
            setting = {"size": size, "channels": channels, "crop": crop, "batch": BATCH, "threads": args.threads}
            found.append(Section(title, CLOCKS[stopwatch], timings, notes, setting, f"{channels}×{size}×{size}"))
    report.show(found)
    print(report.write(report.where("augmentation"), "augmentation", report.sections(found), vars(args), **before))


if __name__ == "__main__":
    main()
