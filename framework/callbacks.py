"""What a run records and keeps: its state, its curves, checkpoints that lose nothing, samples and hparams."""

from __future__ import annotations

import csv
import io
import random
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from framework.ablation.state import Status, read_status, write_status, write_text
from framework.checkpoints import KEY, Kept, WholeFiles, link

MINUTES_BETWEEN_CHECKPOINTS = 10
PICTURES_A_SECOND = 5


def scalars(trainer: Trainer) -> dict[str, float]:
    """What was logged last, as floats."""
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


class RunState(Callback):
    """Keeps `status.json` and `curves.csv` of a run folder true.

    The metrics of a finished run are those of its last epoch, not of its best one, which would favour noisy nets.

    Args:
        folder: the run folder.
        measures: what is known before training (params, MACs).
    """

    def __init__(self, folder: Path, measures: dict[str, float]) -> None:
        self.folder, self.measures = folder, dict(measures)
        self.curves: list[dict[str, float]] = []
        self.metrics: dict[str, float] = {}  # of the last epoch
        self.validated = False  # in this epoch
        self.seconds = 0.0
        self.since = time.monotonic()
        self.timers = {"train_images_per_s": Timer(), "images_per_s": Timer()}

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds(), "curves": self.curves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds, self.curves = state_dict["seconds"], state_dict["curves"]
        for row in self.curves[-1:]:
            self.metrics = {name: value for name, value in row.items() if name != "epoch"}

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self.since

    def _write(self, trainer: Trainer, state: Any, error: str = "") -> None:
        if trainer.is_global_zero:
            epochs = max(trainer.max_epochs or 0, 0)
            speed = {name: timer.rate for name, timer in self.timers.items() if timer.rate}
            measures = {**self.measures, **speed, "seconds": round(self._seconds(), 2), "peak_mib": peak_mib()}
            done = epochs if epochs and state == "finished" else trainer.current_epoch
            # One that fails before it has read its checkpoint keeps the metrics that it had.
            metrics = self.metrics or read_status(self.folder).metrics
            write_status(self.folder, Status(state, done, epochs, metrics, measures, error))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.since = time.monotonic()
        self._write(trainer, "running")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.timers["train_images_per_s"].start(len(batch[0]))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.timers["train_images_per_s"].stop()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.timers["images_per_s"].start(len(batch[0]))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.timers["images_per_s"].stop()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning also knows what an earlier epoch has measured.
        self.metrics = {k: v for k, v in scalars(trainer).items() if self.validated or not k.startswith("val/")}
        # A task logs its rate behind this, so that the one that Lightning knows is of the epoch before.
        if trainer.optimizers:
            self.metrics["lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        self.curves.append({"epoch": float(trainer.current_epoch), **self.metrics})
        if trainer.is_global_zero:
            columns = list(dict.fromkeys(name for row in self.curves for name in row))
            text = io.StringIO()
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, "epoch": int(row["epoch"])} for row in self.curves)
            write_text(self.folder / "curves.csv", text.getvalue())
        self._write(trainer, "running")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):
            self._write(trainer, "interrupted")
        else:
            text = str(exception).strip().splitlines()
            self._write(trainer, "failed", f"{type(exception).__name__}: {text[0] if text else ''}")


class Timer:
    """Images a second, without the first batch, which warms up."""

    def __init__(self) -> None:
        self.images, self.seconds, self.warm = 0, 0.0, False
        self.now, self.size = 0.0, 0

    def start(self, size: int) -> None:
        self.now, self.size = time.perf_counter(), size

    def stop(self) -> None:
        if self.warm:
            self.images += self.size
            self.seconds += time.perf_counter() - self.now
        self.warm = True

    @property
    def rate(self) -> float:
        return round(self.images / self.seconds, 1) if self.seconds else 0.0


def peak_mib() -> int:
    """The most memory that this process has held: on the GPU where there is one, else its resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


class Checkpoints(Callback):
    """Leaves a checkpoint to go on from exactly: before the first step, every few minutes, and at Ctrl-C or SIGTERM.

    A signal lets the step end first, so that the checkpoint lies between two steps; a second one stops at once.
    (`Last` writes the same file behind every epoch.)

    Args:
        last: the file.
        minutes: between two checkpoints in the midst of an epoch.
    """

    def __init__(self, last: Path, minutes: float = MINUTES_BETWEEN_CHECKPOINTS) -> None:
        self.last, self.minutes = last, minutes
        self.saved = time.monotonic()
        self.asked = False
        self.before: dict[int, Any] = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._release()
        self.asked = True

    def _release(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.last)
        self.saved = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # configure_optimizers asks for the number of steps, which sets the loaders up before the checkpoint's loops are
        # restored; Lightning then never gives the loaders their state. No batch has been fetched yet.
        trainer.fit_loop._load_combined_loader_states()
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._ask)
        if trainer.global_step == 0:
            self._save(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.asked:  # during validation: the epoch's own checkpoint has been written
            raise KeyboardInterrupt

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self.asked and time.monotonic() - self.saved <= 60 * self.minutes:
            return
        steps_now = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        ends_epoch = batch_idx + 1 >= trainer.num_training_batches
        if not steps_now or ends_epoch:
            return
        self._save(trainer)
        if self.asked:
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved = time.monotonic()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()


class Last(ModelCheckpoint):
    """The checkpoint behind every epoch: the best one's file, where that has just been written by `WholeFiles`.

    Args:
        best: what writes the best one, before this in the list of callbacks.
        arguments: of ModelCheckpoint.
    """

    def __init__(self, best: ModelCheckpoint, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.best = best

    @property
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        best = self.best
        just_now = best._last_global_step_saved == trainer.global_step and best._should_save_on_train_epoch_end(trainer)
        # Another one may write it later, or elsewhere.
        written = type(trainer.strategy.checkpoint_io) is WholeFiles
        if just_now and written and trainer.world_size == 1:
            with suppress(OSError):  # a file system without links
                link(Path(best.best_model_path), Path(filepath))
                self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
                return
        super()._save_checkpoint(trainer, filepath)


class Keep(Callback):
    """Puts into every checkpoint what it takes to use it alone.

    Args:
        kept: that.
    """

    def __init__(self, kept: Kept) -> None:
        self.kept = kept

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = self.kept.plain()


class RandomState(Callback):
    """Stores the random generators with every checkpoint and puts them back before the first step of a resumed run."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
        kind, keys, at, has_gauss, gauss = np.random.get_state()
        state["numpy"] = (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), at, has_gauss, gauss)
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loaded = state_dict

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
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


class Bar(RichProgressBar):
    """Lightning's Rich progress bar, as often as one can read it: it draws itself in a thread that holds up the loop.

    It shows what the task calls its latest values, and not the number of the TensorBoard folder.
    """

    def __init__(self) -> None:
        super().__init__(refresh_rate=PICTURES_A_SECOND)
        self.due = 0.0

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
        return {**metrics, **getattr(pl_module, "latest", {})}

    def _now(self, batch_idx: int, batches: float) -> bool:
        """Whether this batch is to be seen: the last one is."""
        now = time.monotonic()
        if now < self.due and batch_idx + 1 < batches:
            return False
        self.due = now + 1 / PICTURES_A_SECOND
        return True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._now(batch_idx, self.total_train_batches):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._now(batch_idx, self.total_val_batches_current_dataloader):
            super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)


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
        if board is None or not trainer.is_global_zero or data is None or trainer.global_step > 0:
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
