"""Frozen teachers: made before the first step, and no part of the module that learns from them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framework.data.base import Image
from framework.errors import ConfigError, reason

WHERE = "model.objectives"


class Frozen:
    """A net in eval mode, without gradients, outside of every module tree.

    So `train()` does not reach it, and it is in no state dict, optimizer, moving average or gradient exchange. A copy
    of what holds it shares it; it follows the images to their device and number type by itself.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        first = next(self.net.parameters(), images)
        if first.device != images.device or first.dtype != images.dtype:
            self.net.to(images.device, images.dtype)
        return self.net(images)


class Teacher(ABC):
    """Makes a teacher: a net from the student's images, normalised as the student's are, to logits."""

    @abstractmethod
    def build(self, image: Image, num_classes: int) -> nn.Module:
        """The net with its weights, on the CPU.

        Raises:
            ConfigError: it cannot be made, or has other images or classes.
        """


@dataclass(frozen=True)
class TimmTeacher(Teacher):
    """A net of timm's with weights from a file; nothing is fetched.

    Args:
        name: timm's name of the net, for example `regnety_160`.
        weights: its state dict, as .safetensors or as `torch.save` wrote it; it must have been trained on the
            student's classes, with the normalisation of the student's data.

    Raises:
        BuildError: timm knows no such net.
    """

    name: str
    weights: str

    def __post_init__(self) -> None:
        from framework.backbones import need_timm_name

        need_timm_name(self.name, WHERE)

    def build(self, image: Image, num_classes: int) -> nn.Module:
        import timm

        from framework.backbones import timm_net
        from framework.weights import read

        net = timm_net(timm.create_model, self.name, image, {"num_classes": num_classes}, WHERE)
        try:
            net.load_state_dict(read(self.weights))
        except (ConfigError, RuntimeError) as error:
            why = " ".join(str(error).split())[:300]
            raise ConfigError(f"{WHERE}: the teacher {self.name} cannot take its weights: {why}") from error
        return net


@dataclass(frozen=True)
class CheckpointTeacher(Teacher):
    """The net of a run of this program, with the weights of its checkpoint.

    Args:
        path: the checkpoint, such as `runs/teacher/0/checkpoints/last.ckpt`.
    """

    path: str

    def build(self, image: Image, num_classes: int) -> nn.Module:
        from framework.tasks.classification import Classification

        if not Path(self.path).is_file():
            raise ConfigError(f"{WHERE}: no such checkpoint of a teacher: {self.path}")
        try:
            net = Classification.load_from_checkpoint(self.path)
        except Exception as error:  # a file from anywhere
            raise ConfigError(f"{WHERE}: {self.path} gives no teacher: {reason(error)}") from error
        if (net.image, net.num_classes) != (image, num_classes):
            raise ConfigError(
                f"{WHERE}: the teacher in {self.path} was trained on {net.image} and {net.num_classes} classes, "
                f"the student gets {image} and {num_classes}"
            )
        return net
