"""What Lightning does in every step that nobody asked for, and how a run goes without it. No number changes.

And what it leaves out: a run that `max_steps` ends within an epoch is validated in the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning import pytorch as lightning
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from framework.tasks.base import Task

NOTHING = nullcontext()
TRAINING = ("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward",
            "on_before_optimizer_step", "on_train_batch_end")  # fmt: skip
WITHIN_A_STEP = (*TRAINING, "on_validation_batch_start", "on_validation_batch_end")
TRANSFER = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class Trainer(lightning.Trainer):
    """Lightning's, which asks itself 13 times a step whether it trains, and compares letters to know."""

    @property
    def training(self) -> bool:
        return self.state.stage is RunningStage.TRAINING

    @training.setter
    def training(self, val: bool) -> None:
        lightning.Trainer.training.fset(self, val)  # type: ignore[attr-defined]


class Unprofiled(PassThroughProfiler):
    """Lightning's default, without the generator that it makes for each hook of each callback, 70 times a step."""

    def profile(self, action_name: str) -> Any:
        return NOTHING


def validate_last(trainer: lightning.Trainer) -> None:
    """Has a fit that `max_steps` ends validated behind its last step, wherever in an epoch that is."""
    loop = trainer.fit_loop.epoch_loop
    asked = loop._should_check_val_fx

    def asked_or_over(fetcher: Any) -> bool:
        return asked(fetcher) or (trainer.enable_validation and 0 < trainer.max_steps <= trainer.global_step)

    loop._should_check_val_fx = asked_or_over  # type: ignore[method-assign, assignment]


@contextmanager
def passed_over(trainer: lightning.Trainer, model: LightningModule, data: LightningDataModule) -> Iterator[None]:
    """Takes away, for one fit, the hooks within a step that do nothing: Lightning calls only what is callable.

    Args:
        trainer: of the fit.
        model: what it trains.
        data: what it trains on.
    """
    put: list[tuple[Any, str]] = []

    def take(part: Any, name: str, instead: Any = None) -> None:
        if name not in vars(part):
            put.append((part, name))
            setattr(part, name, instead)

    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for name in TRAINING:  # Lightning wants to see what a model's hooks of validation take
        if inherits(model, LightningModule, name):
            take(model, name)
    for callback in callbacks:
        for name in WITHIN_A_STEP:
            if inherits(callback, Callback, name):
                take(callback, name)
        # Its two ways to save within an epoch are off; where Lightning calls them otherwise, it is asked as before.
        off = vars(callback).get("_every_n_train_steps") == 0 and vars(callback).get("_train_time_interval", 0) is None
        if off and inherits(callback, ModelCheckpoint, "on_train_batch_end"):
            take(callback, "on_train_batch_end")
    if not trainer.gradient_clip_val and inherits(model, Task, "configure_gradient_clipping"):
        take(model, "configure_gradient_clipping")
    # In each step Lightning asks what the model's step takes.
    if is_param_in_hook_signature(model.training_step, "batch_idx", min_args=2):
        take(trainer.fit_loop.epoch_loop, "_build_kwargs", whole)
    # For each batch Lightning asks of three hooks whether the model or the data module overrides them.
    if all(inherits(model, LightningModule, name) and inherits(data, LightningDataModule, name) for name in TRANSFER):
        for name, instead in (("_on_before_batch_transfer", same), ("_apply_batch_transfer_handler", moved)):
            if hasattr(model, name) and inherits(model, LightningModule, name):
                take(model, name, instead)
    try:
        yield
    finally:
        for part, name in put:
            delattr(part, name)


def inherits(part: Any, base: type, name: str) -> bool:
    """Whether a part does not override a hook of its base class."""
    return name not in vars(part) and getattr(type(part), name, None) is getattr(base, name, None)


def whole(kwargs: dict[str, Any], batch: Any, batch_idx: int) -> dict[str, Any]:
    """The arguments of a training step that takes both."""
    return {"batch": batch, "batch_idx": batch_idx}


def same(batch: Any, dataloader_idx: int = 0) -> Any:
    """What the hook before a batch's transfer does by default."""
    return batch


def moved(batch: Any, device: torch.device, dataloader_idx: int = 0) -> Any:
    """What the hooks of a batch's transfer do by default; at once where it is on the device."""
    if type(batch) in (list, tuple) and all(type(part) is Tensor and part.device == device for part in batch):
        return batch
    return move_data_to_device(batch, device)
