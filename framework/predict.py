"""Predictions: of pictures from anywhere, or of the test set, and the table that they are written to."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from framework.checkpoints import Kept, kept_in, read_checkpoint
from framework.construct import Workbench, complete
from framework.data.cuts import transform_for
from framework.data.pictures import decoded, read_picture, why
from framework.errors import ConfigError
from framework.run import load_weights


@dataclass(frozen=True)
class Row:
    """One picture of a table.

    Args:
        probabilities: of all classes; empty where the picture cannot be read.
        index: in the test set.
        file: its path as it was given, or as the test set calls it.
        label: its true class.
        error: why it cannot be read.
    """

    probabilities: Tensor
    index: int | None = None
    file: str = ""
    label: int | None = None
    error: str = ""


@dataclass(frozen=True)
class Predictions:
    """Rows and the names of their classes, of which no two are the same."""

    rows: list[Row]
    names: list[str]


def pictures(paths: Sequence[str]) -> list[str]:
    """The files that `--images` names, sorted, each once: files, what is below folders, and what patterns match.

    Raises:
        ConfigError: nothing is there, or a folder holds no pictures.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found: dict[str, None] = {}
    for given in paths:
        matches = [given] if Path(given).exists() else sorted(glob(given, recursive=True))
        if not matches:
            raise ConfigError(f"--images: no such file or folder: {given}")
        for match in map(Path, matches):
            inside = [match]
            if match.is_dir():
                below = (p for p in match.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.is_file())
                inside = [p for p in below if not any(part.startswith(".") for part in p.relative_to(match).parts)]
            found |= dict.fromkeys(map(str, inside))
    if not found:
        raise ConfigError(f"--images: no pictures under {', '.join(paths)}; they end in {', '.join(IMG_EXTENSIONS)}")
    return sorted(found)


class Files(Dataset[tuple[Tensor, list[str]]]):
    """Pictures as a net wants them, a batch at a time; beside them why one cannot be read (then it is blank).

    Args:
        files: their paths.
        kept: how they are read and normalised.
    """

    def __init__(self, files: Sequence[str], kept: Kept) -> None:
        self.files, self.image = files, kept.image
        self.mode = "L" if kept.image.channels == 1 else "RGB"
        self.mean, self.std = torch.tensor(kept.mean), torch.tensor(kept.std)
        self.cut = None if kept.interpolation == "bilinear" else transform_for(kept.image, train=False)

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, list[str]]:
        images, errors = zip(*(self._read(self.files[index]) for index in indices), strict=True)
        values = torch.stack(images).float().sub_(255 * self.mean[:, None, None]).div_(255 * self.std[:, None, None])
        return values, list(errors)

    def _read(self, file: str) -> tuple[Tensor, str]:
        size = self.image.size
        try:
            pixels = decoded(read_picture(file), self.mode)
            if self.cut:
                return self.cut(pixels), ""
            return F.interpolate(pixels[None], size=(size, size), mode="bilinear", antialias=True)[0], ""
        except Exception as error:  # PIL raises a dozen kinds for a damaged file
            return torch.zeros(self.image.channels, size, size, dtype=torch.uint8), why(error, file)


def _as_it_is(batch: Any) -> Any:
    return batch


class Collect(Callback):
    """Keeps what a net predicts, on the CPU, and what came with the images of each batch."""

    def __init__(self) -> None:
        self.probabilities: list[Tensor] = []  # one for each image
        self.others: list[Any] = []

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        self.probabilities += outputs.float().cpu()
        self.others += batch[1].tolist() if isinstance(batch[1], Tensor) else batch[1]


def _predict(bench: Workbench, model: LightningModule, loader: Any) -> Collect:
    """The predictions for a loader's batches: all of them, by one device, whatever the run trained on."""
    collect = Collect()
    trainer = bench.make_trainer(
        callbacks=[collect], logger=False, enable_model_summary=False, enable_checkpointing=False,
        enable_progress_bar=sys.stdout.isatty(), devices=1, num_nodes=1, strategy="auto", fast_dev_run=False,
        limit_predict_batches=1.0,
    )  # fmt: skip
    trainer.predict(model, dataloaders=loader, return_predictions=False)
    return collect


def predict_pictures(document: Mapping[str, Any], checkpoint: Path, files: Sequence[str]) -> Predictions:
    """Class probabilities of pictures, read as the validation images of the checkpoint's run were.

    Args:
        document: a composed document. Where its data is that of the checkpoint, no file of it is read.
        checkpoint: the weights.
        files: the pictures.

    Raises:
        ConfigError: the net cannot be built or loaded, or takes no pictures.
    """
    kept = kept_in(read_checkpoint(checkpoint), checkpoint)
    facts = kept.facts(document) if kept else None
    finished = complete(document, facts)
    bench = Workbench(finished)
    if not kept or not facts:
        kept = Kept.of(document, bench.make_data())
    if kept.image.channels not in (1, 3):
        raise ConfigError(f"--images: the net takes {kept.image.channels} channels, pictures have 1 or 3")
    model = bench.make_model()
    load_weights(model, checkpoint)
    args = finished["data"].get("init_args", {})
    size = args.get("batch_size", 64)
    workers = args.get("workers", 0) if len(files) > size else 0
    loader = DataLoader(
        Files(files, kept), batch_size=size, num_workers=workers, collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    found = _predict(bench, model, loader)
    rows = [
        Row(values[:0] if error else values, file=file, error=error)
        for file, values, error in zip(files, found.probabilities, found.others, strict=True)
    ]
    return Predictions(rows, unique(kept.class_names, len(found.probabilities[0])))


def predict_test(document: Mapping[str, Any], checkpoint: Path) -> Predictions:
    """Class probabilities of the test set, with its true classes."""
    bench = Workbench(complete(document))
    data, model = bench.make_data(), bench.make_model()
    load_weights(model, checkpoint)
    data.setup("test")
    images = data.split("test")
    found = _predict(bench, model, data.test_dataloader())
    bad = getattr(images, "bad", None)  # pictures that cannot be read are left out
    indices = [index for index in range(len(images)) if bad is None or not bad.met[index]]
    name_of = getattr(images, "name_of", None)
    rows = [
        Row(values, index, name_of(int(images.indices[index])) if name_of else "", label)  # type: ignore[attr-defined]
        for index, values, label in zip(indices, found.probabilities, found.others, strict=True)
    ]
    return Predictions(rows, unique([str(name) for name in data.class_names], len(found.probabilities[0])))


def unique(names: Sequence[str], count: int) -> list[str]:
    """Names for `count` classes; what two share gets its number behind it, and who has none is called by that."""
    shared = Counter(names)
    named = [name if shared[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]
    return [*named, *(str(number) for number in range(len(names), count))]


def write(target: Path, found: Predictions, top: int | None = None) -> None:
    """A table as .json or .csv, row by row, whole or not at all.

    Args:
        target: the file.
        found: the table.
        top: only so many of the likeliest classes, in falling order; all by default, in theirs.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with part.open("w", newline="", encoding="utf-8") as file:
            if target.suffix == ".json":
                _write_json(file, found, top)
            else:
                _write_csv(file, found, top)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _facts(row: Row, names: Sequence[str]) -> dict[str, Any]:
    """What is known of a picture itself."""
    facts: dict[str, Any] = {} if row.index is None else {"index": row.index}
    if row.file:
        facts["file"] = row.file
    if row.label is not None:
        facts["label"] = names[row.label]
    return facts


def _write_json(file: TextIO, found: Predictions, top: int | None) -> None:
    names = found.names
    for number, row in enumerate(found.rows):
        values = [round(value, 6) for value in row.probabilities.tolist()]
        best = row.probabilities.argsort(descending=True, stable=True).tolist()
        entry = _facts(row, names) | {
            "prediction": names[best[0]] if best else None,
            "confidence": values[best[0]] if best else None,
            "probabilities": {names[at]: values[at] for at in (sorted(best) if top is None else best[:top])},
        }
        entry |= {"error": row.error} if row.error else {}
        file.write(f"{',' if number else '['}\n{json.dumps(entry, ensure_ascii=False)}")
    file.write("\n]\n")


def _write_csv(file: TextIO, found: Predictions, top: int | None) -> None:
    names = found.names
    errors = any(row.index is None for row in found.rows)  # the test set leaves out what cannot be read
    shown = 1 if top is None else min(top, len(names))
    head = [*_facts(found.rows[0], names), "prediction", "confidence", *names]
    if top is not None:
        head = [*_facts(found.rows[0], names)]
        head += [f"{column}_{place + 1}" for place in range(shown) for column in ("prediction", "confidence")]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*head, "error"] if errors else head)
    for row in found.rows:
        cells: list[Any] = list(_facts(row, names).values())
        values = [f"{value:.6f}" for value in row.probabilities.tolist()]
        for at in row.probabilities.argsort(descending=True, stable=True)[:shown].tolist():
            cells += [names[at], values[at]]
        cells += values if top is None else []
        cells += [""] * (len(head) - len(cells))
        writer.writerow([*cells, row.error] if errors else cells)
