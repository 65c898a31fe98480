"""The base of all tasks: what commands and studies rely on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import Optimizer

from framework.backbones import Backbone
from framework.optim import AtOnce


class Task(LightningModule, ABC):
    """A LightningModule round a backbone.

    Attributes:
        backbone: the net under it.
        logged: names of the metrics that a fit logs each epoch, which callbacks may watch; none where it does not tell.
        latest: what a progress bar shows of the last steps, beside what was logged for it.
    """

    backbone: Backbone
    logged: frozenset[str] = frozenset()
    latest: Mapping[str, float] = {}

    @abstractmethod
    def read_parts(self) -> frozenset[str]:
        """Which parts of the backbone's final features this task reads."""

    @abstractmethod
    def example(self, batch: int = 1) -> Tensor:
        """Images of the size that the net was built for, on the net's device."""

    def check_values(self) -> None:
        """Raises ConfigError for values of this task that would end a run at its first step."""

    def configure_model(self) -> None:
        """Under Lightning's ModelParallelStrategy: shards each block, and the rest (FSDP2). Else does nothing."""
        mesh = self.device_mesh
        if mesh is None or self._sharded:
            return
        from torch.distributed.fsdp import fully_shard

        blocks = [block for _, _, block in self.backbone.steps()]
        # Not the task itself: Lightning calls its training_step, and only a forward brings the parameters together.
        called = [part for name, part in self.named_children() if name != "objectives"]
        called += list(getattr(self, "objectives", {}).values())
        for part in (*blocks, *called):
            for parameter in part.parameters():  # kernels of convolutions are in channels_last, which FSDP2 refuses
                parameter.data = parameter.data.contiguous()
            if any(True for _ in part.parameters()):
                fully_shard(part, mesh=mesh["data_parallel"])
        self._sharded = True

    _sharded = False  # Lightning calls configure_model for each of its stages

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if isinstance(optimizer, AtOnce) and gradient_clip_val and gradient_clip_algorithm in (None, "norm"):
            optimizer.clip(gradient_clip_val)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes on the task which hook it is in, 40 times a step: a plain attribute, which torch need not look
        # for among parameters, buffers and modules.
        if (value is None or type(value) is str) and name in self.__dict__:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

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
