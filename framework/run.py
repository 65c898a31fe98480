"""One run: a folder with its own config, trained, measured, interrupted, gone on with."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from framework.ablation.state import read_status
from framework.callbacks import RandomState, Record, RunState
from framework.config import compose, dump
from framework.construct import Workbench, complete
from framework.errors import ConfigError

CONFIG, RESOLVED, LAST, BEST = "config.yaml", "resolved.yaml", "checkpoints/last.ckpt", "checkpoints/best.ckpt"


def new_folder(root: Path, name: str) -> Path:
    """`<root>/<name>/<n>` with the first free n: a run never stops because another one is there."""
    parent = root / name
    parent.mkdir(parents=True, exist_ok=True)
    n = 0
    while True:
        try:
            (parent / str(n)).mkdir()
        except FileExistsError:
            n += 1
        else:
            return parent / str(n)


def run_folder_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in, or None."""
    folder = checkpoint.resolve().parent.parent
    return folder if (folder / CONFIG).is_file() and checkpoint.parent.name == "checkpoints" else None


def existing(checkpoint: str) -> Path:
    """The path of a checkpoint. Raises ConfigError where there is none."""
    path = Path(checkpoint)
    if not path.is_file():
        near = sorted(str(p) for p in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        raise ConfigError(f"--ckpt_path: no such file: {path}" + (f"; there are {', '.join(near)}" if near else ""))
    return path


def write_text(path: Path, text: str) -> None:
    """Writes a file as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of a document by its dotted path, as users write it (without `init_args`)."""
    found: dict[str, Any] = {}
    for key, value in document.items():
        path = prefix if key in ("init_args", "class_path") else f"{prefix}.{key}".lstrip(".")
        if isinstance(value, Mapping):
            found |= flat(value, path)
        else:
            found[path] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def train(folder: Path, document: Mapping[str, Any], checkpoint: Path | None = None, bar: bool = True) -> Trainer:
    """Trains `document` in `folder`, from its checkpoint where one is given, and keeps the folder's status.

    Args:
        folder: the run folder; it exists.
        document: a composed document without an ablation.
        checkpoint: what to go on from.
        bar: whether to show a progress bar, where there is a terminal.

    Raises:
        ConfigError, BuildError: the document cannot be built.
        KeyboardInterrupt: it was interrupted; the folder holds a checkpoint to go on from.
    """
    finished = complete(document)
    if not (folder / CONFIG).is_file():
        write_text(folder / CONFIG, dump(document))
    write_text(folder / RESOLVED, dump(finished))
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    seed_everything(int(document.get("seed", 0)), workers=True, verbose=False)
    bench = Workbench(finished)
    data, model = bench.make_data(), bench.make_model()
    last = folder / LAST
    measures = {"params": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    measures |= {name: value for name, value in read_status(folder).measures.items() if name != "seconds"}
    callbacks: list[Callback] = [
        RandomState(),
        RunState(folder, last, measures),
        Record(flat({key: finished[key] for key in ("model", "data", "seed")})),
        ModelCheckpoint(last.parent, filename="best", monitor="val/acc1", mode="max", enable_version_counter=False),
        ModelCheckpoint(last.parent, filename="last", save_on_train_epoch_end=True, enable_version_counter=False),
    ]
    shown = bar and sys.stdout.isatty()
    if shown:
        callbacks.append(RichProgressBar())
    given = finished.get("trainer", {})
    defaults: dict[str, Any] = {
        "default_root_dir": folder,
        "enable_progress_bar": shown,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 10,
    }
    arguments = {key: value for key, value in defaults.items() if key not in given}
    if given.get("logger") in (None, True):
        arguments["logger"] = TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False)
    trainer = bench.make_trainer(callbacks=callbacks, **arguments)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    except SystemExit:  # Lightning's way out of Ctrl-C
        raise KeyboardInterrupt from None
    return trainer


def fit_folder(folder: Path) -> None:
    """Trains the run of a folder from its `config.yaml`, from the last checkpoint where there is one."""
    last = folder / LAST
    train(folder, load_document(folder / CONFIG), last if last.is_file() else None, bar=False)


def load_document(path: Path) -> dict[str, Any]:
    """The composed document of a run folder's `config.yaml`."""
    return compose([path])


def evaluate(document: Mapping[str, Any], checkpoint: Path, stage: str) -> dict[str, float]:
    """Metrics of a checkpoint on the validation or test set: `validate` or `test`."""
    bench = Workbench(complete(document))
    data, model = bench.make_data(), bench.make_model()
    load_weights(model, checkpoint)
    trainer = bench.make_trainer(logger=False, enable_model_summary=False, enable_checkpointing=False,
                                 enable_progress_bar=sys.stdout.isatty())  # fmt: skip
    found = getattr(trainer, stage)(model, datamodule=data, verbose=False)
    return {name: float(value) for name, value in found[0].items()}


def predict(document: Mapping[str, Any], checkpoint: Path) -> tuple[torch.Tensor, list[str]]:
    """Class probabilities of the test set `(N, num_classes)`, and the names of the classes."""
    bench = Workbench(complete(document))
    data, model = bench.make_data(), bench.make_model()
    load_weights(model, checkpoint)
    data.setup("test")
    trainer = bench.make_trainer(logger=False, enable_model_summary=False, enable_checkpointing=False,
                                 enable_progress_bar=sys.stdout.isatty())  # fmt: skip
    found = trainer.predict(model, dataloaders=data.test_dataloader())
    return torch.cat([part for part in found or [] if isinstance(part, torch.Tensor)]), data.class_names


def load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Loads a checkpoint's weights into a net that must be the same. Raises ConfigError where it is not."""
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:  # a file from anywhere
        reason = (str(error).splitlines() or [""])[0]
        raise ConfigError(f"--ckpt_path: {checkpoint} is no checkpoint of this program: {reason[:200]}") from error
    own = model.state_dict()
    wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        raise ConfigError(
            f"--ckpt_path: {checkpoint} holds another net than the config: {len(wrong)} keys differ, the first: {wrong[0]}"
        )
    model.load_state_dict(state)
