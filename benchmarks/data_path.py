"""From JPEG files to batches at 224 px: timm's training pipeline against ours, in images a second for each core.

    uv run python benchmarks/data_path.py

The files are made on the fly in a temporary folder: noise with a 1/f spectrum, 500×375 pixels, quality 90. They have
about 75 KB, those of ImageNet about 110 KB. Both sides read in this process, with one thread and without workers, whose
CPU time is measured. What "timm" and "ours" give is float32 and normalised, on the CPU alone. "timm, prefetched" and
"ours, host part" leave to the GPU what they can: timm normalisation and erasing, ours RandAugment as well. On a machine
with a GPU the part that is left to it is timed there, too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image as Picture
from torch import Tensor
from torch.utils.data import DataLoader

from framework.bench import report
from framework.bench.harness import CLOCKS, Candidate, Section, cpu_time, cuda_time, race, threads
from framework.data.augment import posterize
from framework.data.base import Order
from framework.data.pictures import PictureSet
from framework.data.torchvision import Torchvision
from framework.process import prepare

WIDTH, HEIGHT, QUALITY = 500, 375, 90
CLASSES, EACH = 4, 32
DEIT = {"auto_augment": "rand-m9-mstd0.5-inc1", "erase_prob": 0.25}
PLAIN: dict[str, Any] = {"auto_augment": "", "erase_prob": 0.0}


def pink(rng: np.random.Generator) -> Picture.Image:
    """Colour noise whose amplitude falls with its frequency, as in photographs."""
    down, right = np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]
    falloff = 1 / np.maximum(np.hypot(down, right), 1 / WIDTH)
    spectrum = (rng.normal(size=(3, *falloff.shape)) + 1j * rng.normal(size=(3, *falloff.shape))) * falloff
    pixels = np.fft.irfft2(spectrum, s=(HEIGHT, WIDTH))
    shared = pixels.mean(0, keepdims=True)  # colours of photographs go together
    pixels = 0.3 * pixels + 0.7 * shared
    pixels = 128 + 20 * (pixels - pixels.mean()) / pixels.std()
    return Picture.fromarray(pixels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def make_files(root: Path) -> float:
    """Writes the files, a folder for each class, and gives their mean size in KB."""
    rng = np.random.default_rng(0)
    sizes = []
    for split, count in (("train", EACH), ("val", 1)):
        for label in range(CLASSES):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                path = folder / f"{i}.jpg"
                pink(rng).save(path, quality=QUALITY)
                sizes.append(path.stat().st_size)
    return sum(sizes) / len(sizes) / 1000


def endless(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def timms(root: Path, batch: int, auto_augment: str, erase_prob: float, prefetched: bool = False) -> Iterator[Any]:
    """timm's loader as its train.py makes it; prefetched, the CPU's part of it where its prefetcher has a GPU."""
    from timm.data import ImageDataset, create_loader
    from timm.data import auto_augment as module

    images = ImageDataset(root / "train")
    loader = create_loader(
        images,
        input_size=(3, 224, 224),
        batch_size=batch,
        is_training=True,
        use_prefetcher=prefetched,
        auto_augment=auto_augment or None,
        re_prob=erase_prob,
        re_mode="pixel",
        color_jitter=None,
        interpolation="bicubic",
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    for step in images.transform.transforms:
        for op in getattr(step, "ops", ()):
            if op.aug_fn is module.posterize:
                op.aug_fn = posterize  # timm's asks Pillow 13 for 0 bits, which raises
    return endless(loader.loader if prefetched else loader)


def pictures(root: Path, batch: int, auto_augment: str, erase_prob: float) -> Torchvision:
    return Torchvision("ImageFolder", str(root), size=224, batch_size=batch, workers=0, auto_augment=auto_augment,
                       erase_prob=erase_prob)  # fmt: skip


def host_part(images: PictureSet, batch: int) -> Iterator[Any]:
    """What our worker processes do where there is a GPU."""
    there = images.to(torch.device("cuda"))  # nothing of it is touched here
    order = Order(len(images))
    return endless(DataLoader(there, batch, sampler=order, drop_last=True, collate_fn=lambda made: made))


def finishing(images: PictureSet, batch: int, device: torch.device) -> Candidate:
    """The rest, on a device; for a GPU with the way there."""
    there = images.to(device)
    pixels, *others = there.__getitems__(list(range(batch)))
    name = f"rest of ours on the {device.type.upper()}, batch {batch}"
    if device.type == "cuda":
        made = [pixels.pin_memory(), *others]
        return Candidate(name, lambda: there.finish(made), batch)
    # It changes the images in place where they are there already.
    return Candidate(name, lambda: there.finish([pixels.clone(), *others]), batch)


def decoded(root: Path, batch: int) -> Iterator[None]:
    """Pillow's decoding alone, which both sides share."""
    paths = sorted((root / "train").rglob("*.jpg"))
    at = 0
    while True:
        for _ in range(batch):
            Picture.open(paths[at % len(paths)]).convert("RGB")
            at += 1
        yield None


def same(images: PictureSet, batch: int) -> None:
    """What the two parts make of some images must be what our CPU pipeline does."""
    keys = list(range(batch))
    there = images.to(torch.device("cpu"))
    apart = (there.finish(there.__getitems__(keys))[0] - images.__getitems__(keys)[0]).abs() * 255 * images.std.max()
    assert (apart > 1.5).float().mean() < 1e-3, f"images differ: {(apart > 1.5).float().mean()} of the values"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="how often each is timed (default: 10)")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="images at a time (default: 32)")
    args = parser.parse_args()
    prepare()
    before, found = report.circumstances(), []
    with tempfile.TemporaryDirectory() as folder, threads(1):
        root = Path(folder)
        size = make_files(root)
        notes = [f"files of {size:.0f} KB on average, {WIDTH}×{HEIGHT} pixels"]
        for title, recipe in {"DeiT's augmentation": DEIT, "random crop and flip": PLAIN}.items():
            data = pictures(root, args.batch, **recipe)
            images = cast(PictureSet, data.split("train"))
            same(images, args.batch)
            rows = {
                "timm": timms(root, args.batch, **recipe),
                "timm, prefetched": timms(root, args.batch, **recipe, prefetched=True),
                "ours": endless(data.train_dataloader()),
                "ours, host part": host_part(images, args.batch),
                "decoding alone": decoded(root, args.batch),
            }
            for name in rows:
                if name != "decoding alone":
                    check(next(rows[name]), args.batch, whole=name in ("timm", "ours"))
            candidates = [Candidate(name, lambda it=it: next(it), args.batch) for name, it in rows.items()]
            candidates.append(finishing(images, args.batch, torch.device("cpu")))
            timings = race(candidates, cpu_time, args.rounds, least=0)
            found.append(Section(f"{title}, batch {args.batch}", CLOCKS[cpu_time], timings, notes))
            report.show(found[-1:])
            if torch.cuda.is_available():
                device = torch.device("cuda")
                candidates = [finishing(images, count, device) for count in (args.batch, len(images))]
                found.append(Section(f"{title}, on the GPU", CLOCKS[cuda_time],
                                     race(candidates, cuda_time, args.rounds), notes))  # fmt: skip
                report.show(found[-1:])
    print(report.write(report.where("data_path"), "data_path", report.sections(found), vars(args), **before))


def check(batch: Any, count: int, whole: bool) -> None:
    """What both sides must give: images of one size with their classes; whole, float ones, normalised."""
    images, targets = batch[:2]
    assert images.shape == (count, 3, 224, 224), images.shape
    assert images.is_floating_point() == whole, images.dtype
    assert not whole or images.mean().abs() < 1, "not normalised"
    assert set(targets.tolist()) <= set(range(CLASSES))


if __name__ == "__main__":
    main()
