"""The base of all tasks: what commands and studies rely on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from framework.backbones import Backbone


class Task(LightningModule, ABC):
    """A LightningModule round a backbone.

    Attributes:
        backbone: the net under it.
    """

    backbone: Backbone

    @abstractmethod
    def read_parts(self) -> frozenset[str]:
        """Which parts of the backbone's final features this task reads."""

    @abstractmethod
    def example(self, batch: int = 1) -> Tensor:
        """Images of the size that the net was built for, on the net's device."""

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = "cpu",
        strict: bool = True,
        weights_only: bool = True,
        **changes: Any,
    ) -> Self:
        """The task of a checkpoint, on the CPU: its hyper-parameters rebuild the whole composed net.

        In place of Lightning's own form, which parses them beside the defaults of each slot; where a class there
        shares an argument with the slot's default class, that takes the wrong default.

        Args:
            checkpoint_path: the file.
            map_location: where its tensors go, as in `torch.load`.
            strict: whether the weights must be those of the net, no more and no less.
            weights_only: as in `torch.load`; what this program saves needs no more.
            changes: other hyper-parameters, as a config writes them.

        Raises:
            ConfigError, BuildError: the net cannot be built here, for example because a plug-in is not loaded.
        """
        from framework.construct import Workbench

        saved = torch.load(checkpoint_path, map_location=map_location, weights_only=weights_only)
        args = {key: value for key, value in saved["hyper_parameters"].items() if not key.startswith("_")}
        model = {"class_path": saved["hyper_parameters"]["_class_path"], "init_args": {**args, **changes}}
        task = Workbench({"model": model}).make_model()
        if not isinstance(task, cls):
            raise TypeError(f"{checkpoint_path} holds a {type(task).__name__}, not a {cls.__name__}")
        task.on_load_checkpoint(saved)
        task.load_state_dict(saved["state_dict"], strict=strict)
        return task
