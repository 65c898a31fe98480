"""What a run records: its state for a study, random states for an exact resume, samples and hparams for TensorBoard."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from framework.ablation.state import Status, read_status, write_status


def scalars(trainer: Trainer) -> dict[str, float]:
    """What was logged last, as floats."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if np.isscalar(float(value))}


class RunState(Callback):
    """Keeps `status.json` of a run folder true, and leaves a checkpoint to go on from before the first step.

    The metrics of a finished run are those of its last epoch, not of its best one, which would favour noisy nets.

    Args:
        folder: the run folder.
        last: the checkpoint that the run goes on from after an interruption.
        measures: what is known before training (params, MACs).
    """

    def __init__(self, folder: Path, last: Path, measures: dict[str, float]) -> None:
        self.folder, self.last, self.measures = folder, last, dict(measures)
        self.started = time.monotonic()
        self.before = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["seconds"]

    def _seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def _write(self, trainer: Trainer, state: Any, error: str = "") -> None:
        if trainer.is_global_zero:
            epochs = trainer.max_epochs or 0
            measures = {**self.measures, "seconds": round(self._seconds(), 2)}
            done = epochs if state == "finished" else trainer.current_epoch
            # A run that had nothing left to do keeps what it had.
            metrics = scalars(trainer) or read_status(self.folder).metrics
            write_status(self.folder, Status(state, done, epochs, metrics, measures, error))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.started = time.monotonic()
        self._write(trainer, "running")
        if trainer.global_step == 0:
            trainer.save_checkpoint(self.last)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, "running")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self._write(trainer, "interrupted")
        else:
            text = str(exception).strip().splitlines()
            self._write(trainer, "failed", f"{type(exception).__name__}: {text[0] if text else ''}")


class RandomState(Callback):
    """Stores the random generators with every checkpoint and puts them back at the first epoch after a resume."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        kind, keys, at, has_gauss, gauss = np.random.get_state()  # what timm and others draw from
        state["numpy"] = (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), at, has_gauss, gauss)
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.loaded is None:
            return
        state, self.loaded = self.loaded, None
        torch.set_rng_state(state["torch"].cpu())
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, at, has_gauss, cached = state["numpy"]
        np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), at, has_gauss, cached))
        if torch.cuda.is_available() and "cuda" in state:
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


class Record(Callback):
    """Sample images at the start and a row of TensorBoard's hparams table at the end.

    Args:
        hparams: the columns of the table.
        metrics: names of the metrics that the table shows.
    """

    def __init__(self, hparams: dict[str, Any], metrics: tuple[str, ...] = ("val/acc1", "val/loss")) -> None:
        self.hparams, self.metrics = hparams, metrics

    def _board(self, trainer: Trainer) -> TensorBoardLogger | None:
        return next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        board = self._board(trainer)
        data: Any = getattr(trainer, "datamodule", None)
        if board is None or not trainer.is_global_zero or data is None or trainer.current_epoch > 0:
            return
        images, targets = data.sample(16)
        board.experiment.add_images("samples", images, 0)
        names = data.class_names
        board.experiment.add_text("samples", ", ".join(names[int(t)] for t in targets), 0)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        board = self._board(trainer)
        if board is not None and trainer.is_global_zero:
            last = scalars(trainer)
            shown = {f"hparams/{name}": last[name] for name in self.metrics if name in last}
            board.log_hyperparams(self.hparams, shown)
