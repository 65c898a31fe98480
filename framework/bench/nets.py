"""What is timed of a net: one of ours or of timm's, in some form, at inference or training, on given images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from blocks.base import BuildError
from framework.backbones import need_timm_name, timm_net
from framework.bench.harness import CLOCKS, Act, Stopwatch, cpu_time, cuda_time, wall_time
from framework.compiled import compile_regions
from framework.config import load_plugins
from framework.construct import build_model
from framework.data.base import Image
from framework.errors import reason
from framework.measure import cost, meta_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Form:
    """How a net is run.

    Args:
        channels_last: weights and images in this memory format.
        compile: each block compiled by itself.
        freezing: with the weights as constants; inference only.
        low: weights and images in the low precision too, without autocast; inference only.
    """

    channels_last: bool = False
    compile: bool = False
    freezing: bool = False
    low: bool = False

    @property
    def name(self) -> str:
        words = {"channels_last": self.channels_last, "compiled": self.compile and not self.freezing,
                 "compiled with freezing": self.freezing, "all in bfloat16": self.low}  # fmt: skip
        return ", ".join(word for word, on in words.items() if on)


@dataclass(frozen=True)
class Setting:
    """What a net is timed at: inference or training, float32 or bfloat16, so many images, threads and which device."""

    mode: str
    dtype: str
    batch: int
    threads: int
    device: str

    @property
    def stopwatch(self) -> Stopwatch:
        return cuda_time if self.device == "cuda" else cpu_time if self.threads == 1 else wall_time

    @property
    def clock(self) -> str:
        return CLOCKS[self.stopwatch]  # type: ignore[index]

    @property
    def title(self) -> str:
        where = "GPU" if self.device == "cuda" else f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.mode}, {self.dtype}, {where}"

    def autocast(self, form: Form) -> AbstractContextManager[Any]:
        low = self.dtype == "bfloat16" and not form.low
        return torch.autocast(self.device, torch.bfloat16, enabled=low)


class Entrant(ABC):
    """A net that can be made anew, here or in another process.

    Attributes:
        name: of its rows.
        image: what it takes.
    """

    name: str
    image: Image

    @abstractmethod
    def make(self) -> nn.Module:
        """The net with fresh weights, the same ones each time, on the CPU."""

    @abstractmethod
    def cost(self) -> tuple[int, int]:
        """Trainable parameters, and MACs for one image."""


@dataclass(frozen=True)
class Ours(Entrant):
    """The net of a composed document, and what it costs."""

    name: str
    document: Mapping[str, Any]
    image: Image
    params: int
    macs: int

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Ours:
        found = cost(meta_model(document))
        image = Image(found.image[1], found.image[0])
        return cls(str(document["name"]), document, image, found.params, found.macs)

    def make(self) -> nn.Module:
        load_plugins(self.document.get("plugins", []))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build_model(self.document)

    def cost(self) -> tuple[int, int]:
        return self.params, self.macs


@dataclass(frozen=True)
class Timm(Entrant):
    """One of timm's nets.

    Args:
        name: of its rows.
        net: timm's name of it.
        image: what it is made for.
        classes: of its classifier.
        drop_path: timm's `drop_path_rate`, where the net has it.
        args: further arguments of `timm.create_model`.

    Raises:
        BuildError: timm has no such net, or it does not take the image.
    """

    name: str
    net: str
    image: Image
    classes: int
    drop_path: float = 0.0
    args: tuple[tuple[str, Any], ...] = ()

    def make(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._make("cpu")

    def _make(self, device: str) -> Any:
        import timm

        need_timm_name(self.net, "--against")
        args = {"num_classes": self.classes, **dict(self.args)}
        if self.drop_path:
            try:
                return timm_net(timm.create_model, self.net, self.image,
                                {**args, "drop_path_rate": self.drop_path}, "--against", device)  # fmt: skip
            except BuildError:
                pass  # a net without it
        return timm_net(timm.create_model, self.net, self.image, args, "--against", device)

    @cache  # noqa: B019 (few of them, and they live as long as the process)
    def cost(self) -> tuple[int, int]:
        net = self._make("meta").eval()
        params = sum(p.numel() for p in net.parameters() if p.requires_grad)
        net.requires_grad_(False)
        size = self.image.size
        with FlopCounterMode(display=False) as counter:
            try:
                net(torch.empty(1, self.image.channels, size, size, device="meta"))
            except Exception as error:  # a net of timm may fail in any way
                raise BuildError(
                    f"--against: timm's {self.net} does not run at {size} px with {self.image.channels} channel(s): "
                    f"{reason(error)}; name another net, or set data.size"
                ) from error
        return params, counter.get_total_flops() // 2


def images_for(image: Image, setting: Setting) -> Tensor:
    """Images of noise, the same ones for every net that takes them."""
    generator = torch.Generator().manual_seed(0)
    size = image.size
    return torch.randn(setting.batch, image.channels, size, size, generator=generator).to(setting.device)


def formed(net: nn.Module, form: Form, setting: Setting) -> nn.Module:
    """A net in a form, on the setting's device and in its mode."""
    net = net.to(setting.device).train(setting.mode == "training")
    if form.channels_last:
        net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if form.low:
        net = net.to(torch.bfloat16)
    if form.compile:
        compile_regions(net, form.freezing)
    return net


def inputs(images: Tensor, form: Form) -> Tensor:
    if form.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    return images.to(torch.bfloat16) if form.low else images


def step(net: nn.Module, form: Form, setting: Setting, image: Image) -> Act:
    """One forward, or one whole step of training, of a net that `formed` gave.

    Training is cross-entropy, backward and torch's fused AdamW on all parameters. At inference the act gives logits;
    at training the loss.
    """
    images = inputs(images_for(image, setting), form)
    if setting.mode == "inference":
        return forward(net, images, form, setting)
    params = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-5, fused=True)
    loss_of = loss(net, images, form, setting)

    def train() -> Tensor:
        value = loss_of()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()  # here and not at the start, so that gradients count to the peak of a step
        return value.detach()

    return train


def forward(net: nn.Module, images: Tensor, form: Form, setting: Setting) -> Act:
    def infer() -> Tensor:
        with torch.no_grad(), setting.autocast(form):
            return net(images)

    if form.freezing:  # the weights are read when it is compiled
        with torch._inductor.config.patch(freezing=True):
            infer()
    return infer


def loss(net: nn.Module, images: Tensor, form: Form, setting: Setting) -> Act:
    def forward_loss() -> Tensor:
        with setting.autocast(form):
            logits = net(images)
        targets = torch.arange(len(images), device=images.device) % logits.shape[1]
        return F.cross_entropy(logits.float(), targets)

    return forward_loss
