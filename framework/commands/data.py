"""`data`: what the images of a config are, in numbers, and a sheet of them as the net sees them."""

from __future__ import annotations

import csv
import io
import json
from argparse import Namespace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from framework.commands import document as composed
from framework.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from framework.data import ImageData
    from framework.data.base import Batch, ImageSet
    from framework.mix import Mix

SPLITS = ("train", "val", "test")

# Draws of one image side by side; images on a sheet; classes in the printed table; steps and images of the mixed sheet.
DRAWS, SHOWN, CLASSES, STEPS, MIXED = 5, 64, 30, 6, 8


def run(args: Namespace) -> int:
    if args.samples < 1:
        raise ConfigError(f"--samples: got {args.samples}, must be at least 1")
    if args.split and args.split not in SPLITS:
        raise ConfigError(f"--split: got {args.split!r}, must be {', '.join(SPLITS[:-1])} or {SPLITS[-1]}")
    document = composed(args)
    data = opened(document)
    folder = Path(args.out) if args.out else Path("runs", f"{document['name']}-data")
    found, looked = look(data, [args.split] if args.split else list(SPLITS), args.samples)
    found = {"name": document["name"], "data": document["data"]["class_path"], **found}
    folder.mkdir(parents=True, exist_ok=True)
    split = args.split or "train"
    header, columns, targets = draws(data, split, looked[split][:SHOWN])
    found["augmented"] = len(columns) > 1
    sheets = {"sheet.png": by_class(header, columns, targets, data.class_names)}
    mix = mix_of(document)
    if mix and split == "train" and min(len(targets), len(data.class_names)) > 1:
        sheets["mixed.png"] = mixed(data.split(split), looked[split][:SHOWN], data.class_names, mix)
    found["files"] = [str(path) for path in write(folder, found, sheets)]
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        show(found, folder)
    return 0


def opened(document: dict[str, Any]) -> ImageData:
    """The data module of a composed document, which needs no model; draws are those of its runs."""
    from lightning.pytorch import seed_everything

    from framework.config import document_hints
    from framework.construct import Workbench, checked
    from framework.walk import Walk

    seed_everything(document["seed"], workers=True, verbose=False)
    section = Walk(partial=False).inherit(document_hints()["data"][0], document["data"], ("data",))
    data = Workbench({"data": section}).make_data()
    checked(data.prepare_data, "data")
    return data


def mix_of(document: dict[str, Any]) -> Mix | None:
    """How the model mixes training images; None where it does not."""
    from blocks import registry
    from framework.mix import Mix, NoMix

    slot = document.get("model", {}).get("init_args", {}).get("mix")
    if not slot:
        return None
    mix: Mix = registry.find(Mix, slot["class_path"])(**slot.get("init_args", {}))
    return None if isinstance(mix, NoMix) else mix


def look(data: ImageData, splits: list[str], samples: int) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """The facts of a data module, and for each split images that can be read, in the order of a run's first epoch.

    Sets in memory are measured whole; of others `samples` images of each split are read.
    """
    from framework.data.base import Order
    from framework.data.memory import MemorySet, statistics

    found: dict[str, Any] = {
        "image": {"size": data.image.size, "channels": data.image.channels},
        "classes": data.class_names,
        "splits": {},
    }
    readable: dict[str, list[int]] = {}
    for split in splits:
        images = data.split(split)
        plain, bad = images.plain(), ""
        indices = list(Order(len(images)))[:samples]
        if isinstance(plain, MemorySet):
            pixels, targets, read = plain.images, plain.targets, len(plain)
            readable[split] = indices
        else:
            pixels, targets, readable[split], bad = read_each(plain, indices)
            read = len(indices)
        labels = images.labels()
        counted = targets if labels is None else labels
        found["splits"][split] = {
            "images": len(images),
            "counts": counted.bincount(minlength=len(data.class_names)).tolist(),
            "counted": len(counted),
            "read": read,
            "bad": read - len(targets),
            "first_bad": bad,
            "measured": dict(zip(("mean", "std"), map(rounded, statistics(pixels)), strict=True)),
            "normalised_by": {"mean": rounded(images.mean), "std": rounded(images.std)},
        }
    return found, readable


def read_each(images: ImageSet, indices: list[int]) -> tuple[Tensor, Tensor, list[int], str]:
    """Pixels, targets and indices of those images that can be read, and what was wrong with the first other one.

    Raises:
        ConfigError: none of them can be read.
    """
    import torch

    from framework.errors import reason

    batches: list[Batch] = []
    good, why = [], ""
    for index in indices:
        try:
            batch = images.pixels([0], [index])
        except ConfigError as error:
            why = why or str(error)
        except Exception as error:  # a damaged file may show as anything
            why = why or f"data: cannot read image {index}: {reason(error)}"
        else:
            if len(batch[1]):
                batches.append(batch)
                good.append(index)
    if not batches:
        raise ConfigError(why or f"data: none of {len(indices)} images can be read")
    pixels, targets = map(torch.cat, zip(*batches, strict=True))
    return pixels, targets, good, why


def rounded(values: Tensor) -> list[float]:
    return [round(value, 5) for value in values.tolist()]


def draws(data: ImageData, split: str, indices: list[int]) -> tuple[tuple[str, ...], list[Tensor], Tensor]:
    """Names of columns, images for each of them, and targets: as validation shows them and, of training images, as
    they are drawn, where that differs."""
    import torch

    images = data.split(split)
    plain, targets = shown(images.plain(), indices)
    if split != "train":
        return (), [plain], targets
    drawn = [shown(images, [number * len(images) + index for index in indices])[0] for number in range(DRAWS)]
    if all(torch.equal(each, plain) for each in drawn):
        return (), [plain], targets
    # An epoch has several rounds of draws where images are repeated.
    word = "epoch" if data.repeats == 1 else "draw"
    return ("validation", *(f"{word} {number}" for number in range(DRAWS))), [plain, *drawn], targets


def by_class(header: tuple[str, ...], columns: list[Tensor], targets: Tensor, names: list[str]) -> Image:
    """The sheet of an image with all of its draws in a row, sorted by class."""
    import torch

    from framework.data.sheet import Strip, sheet

    order = targets.argsort(stable=True).tolist()
    rows = [Strip(torch.stack([column[at] for column in columns]), (names[int(targets[at])],)) for at in order]
    return sheet(rows, header)


def shown(images: ImageSet, keys: list[int]) -> Batch:
    """Images as the net sees them, but visible, in uint8 and without normalisation; and their targets."""
    pixels, targets = images.__getitems__(keys)
    return denormalised(images, pixels), targets


def denormalised(images: ImageSet, pixels: Tensor) -> Tensor:
    import torch

    from framework.data.base import visible

    values = visible(pixels * images.std[:, None, None] + images.mean[:, None, None])
    return (255 * values).round().clamp(0, 255).to(torch.uint8)


def mixed(images: ImageSet, indices: list[int], names: list[str], mix: Mix) -> Image:
    """The first images of the first epoch, as they are mixed in the first steps."""
    from framework.data.sheet import Strip, sheet

    pixels, targets = images.__getitems__(indices)
    strips, rows = [], []
    for step in range(STEPS):
        batch, shares = mix(pixels, targets, len(names), step)
        batch = denormalised(images, batch)
        across = min(MIXED, len(batch))
        rows.append(f"step {step}")
        strips += [Strip(batch[place : place + 1], caption(shares[place], names)) for place in range(across)]
    return sheet(strips, across=across, rows=tuple(rows), smallest=112)  # there are two names over each


def caption(target: Tensor, names: list[str]) -> tuple[str, str]:
    """The two classes with the largest shares of a target, without what label smoothing gives to every class."""
    if not target.ndim:
        return names[int(target)], ""
    shares, classes = target.topk(2)
    texts = [f"{share:.0%} {names[at]}" for share, at in zip(shares.tolist(), classes.tolist(), strict=True)]
    return texts[0], texts[1] if shares[1] > target.min() else ""


def write(folder: Path, found: dict[str, Any], sheets: dict[str, Image]) -> list[Path]:
    """Writes class counts and sheets, the latter for TensorBoard too; gives the paths."""
    import numpy as np
    from torch.utils.tensorboard import SummaryWriter

    from framework.ablation.state import write_text

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["class", *found["splits"]])
    writer.writerows(class_rows(found))
    write_text(folder / "classes.csv", text.getvalue())
    (folder / "mixed.png").unlink(missing_ok=True)  # of what the folder held before
    board = SummaryWriter(str(folder / "tensorboard"))
    for name, picture in sheets.items():
        picture.save(folder / name)
        board.add_image(f"data/{Path(name).stem}", np.asarray(picture), 0, dataformats="HWC")
    board.close()
    return [folder / name for name in (*sheets, "classes.csv", "tensorboard")]


def class_rows(found: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Of each class its name and its number of images in each split."""
    return list(zip(found["classes"], *(facts["counts"] for facts in found["splits"].values()), strict=True))


def show(found: dict[str, Any], folder: Path) -> None:
    from rich.markup import escape
    from rich.table import Table

    from framework.ablation.tables import console

    out, size, splits = console(), found["image"]["size"], found["splits"]
    out.print(
        f"[bold]{escape(found['name'])}[/bold]: {escape(found['data'])}, {len(found['classes'])} classes, "
        f"{size}×{size} pixels, {found['image']['channels']} channel(s)"
    )
    table = Table()
    for column in ("split", "images", "smallest class", "median", "largest class", "bad files"):
        table.add_column(column, justify="left" if column == "split" or "class" in column else "right")
    for split, facts in splits.items():
        part = "" if facts["counted"] == facts["images"] else f" of {facts['counted']:,} looked at"
        ends = [
            f"{count:,} ({escape(found['classes'][facts['counts'].index(count)])}){part}"
            for count in (min(facts["counts"]), max(facts["counts"]))
        ]
        bad = f"{facts['bad']:,} of {facts['read']:,} read"
        table.add_row(split, f"{facts['images']:,}", ends[0], f"{median(facts['counts']):,.0f}", ends[1], bad)
    out.print(table)
    for split, facts in splits.items():
        if facts["first_bad"]:
            out.print(f"{split}: {facts['first_bad']}", markup=False)
    if len(found["classes"]) <= CLASSES:
        table = Table()
        for column in ("class", *splits):
            table.add_column(column, justify="left" if column == "class" else "right")
        for name, *counts in class_rows(found):
            table.add_row(escape(name), *(f"{count:,}" for count in counts))
        out.print(table)
    first, facts = next(iter(splits.items()))
    measured = facts["read"] - facts["bad"]
    whole = "all" if measured == facts["images"] else f"{measured:,} of"
    table = Table(title=f"values 0..1; measured over {whole} {facts['images']:,} {first} images", title_justify="left")
    for column in ("channel", "mean", "std", "measured mean", "measured std"):
        table.add_column(column, justify="left" if column == "channel" else "right")
    columns = [facts[key][each] for key in ("normalised_by", "measured") for each in ("mean", "std")]
    names = {1: ("grey",), 3: ("red", "green", "blue")}
    channels = names.get(len(columns[0]), tuple(str(channel) for channel in range(len(columns[0]))))
    for channel, *values in zip(channels, *columns, strict=True):
        table.add_row(channel, *(f"{value:.4f}" for value in values))
    out.print(table)
    if "train" in splits and not found["augmented"]:
        out.print("training images are not augmented: the sheet shows them as validation does")
    for path in found["files"]:
        out.print(path, markup=False, soft_wrap=True)
    out.print(f"tensorboard --logdir {folder}", markup=False, soft_wrap=True)
