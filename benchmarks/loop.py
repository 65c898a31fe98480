"""What a training loop costs beside its net: per step of a net that does next to nothing, over a bare PyTorch loop.

    uv run python benchmarks/loop.py

Every loop trains the same net on the same ready batches with the same optimizer, on the CPU with one thread. The net
itself notes the time at each of its steps, so start and end of a run, epochs and checkpoints are not in the numbers.
`process` counts all threads (progress bar, TensorBoard's writer), `thread` only that of the loop.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from blocks.base import Features, Shape
from framework.backbones import Backbone
from framework.bench import report
from framework.bench.harness import Candidate, Section, Spread, Timing, race, threads, told
from framework.config import compose, dump
from framework.data import Digits
from framework.data.base import Image
from framework.process import prepare
from framework.run import train

BATCH, SIZE, CLASSES = 16, 8, 10
WARM, STEPS = 50, 400

marks: list[tuple[float, float]] = []


class Flat(Backbone):
    """One linear layer, which notes the time of each step of training."""

    def __init__(self, image: Image) -> None:
        super().__init__()
        self.out = Shape(16, (1, 1))
        self.levels = []
        self.linear = nn.Linear(image.channels * image.size**2, 16)

    def forward(self, images: Tensor) -> Features:
        if self.training:
            marks.append((time.thread_time(), time.process_time()))
        return Features(self.linear(images.flatten(1))[:, :, None, None])

    def pyramid(self, images: Tensor) -> list[Tensor]:
        return []


class Batches(IterableDataset):
    """The same batch again and again."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        batch = torch.randn(BATCH, 1, SIZE, SIZE, generator=generator), torch.arange(BATCH) % CLASSES
        for _ in range(WARM + STEPS + 1):
            yield batch

    def __len__(self) -> int:
        return WARM + STEPS + 1


class Ready(Digits):
    """Digits, whose training batches are ready."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Batches(), batch_size=None)


class Plain(LightningModule):
    """The net as a user of Lightning writes it.

    Args:
        logs: how many values it logs in each step.
        schedule: whether the rate changes with each step.
    """

    def __init__(self, logs: int, schedule: bool) -> None:
        super().__init__()
        self.net, self.logs, self.schedule = net(), logs, schedule

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        for i in range(self.logs):
            self.log(f"train/loss{i or ''}", loss, on_step=True, on_epoch=True, prog_bar=not i)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)
        if not self.schedule:
            return optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Terminal(io.StringIO):
    """Something that progress bars take for a terminal."""

    def isatty(self) -> bool:
        return True


class Logits(nn.Module):
    """Backbone and classifier, without a task round them."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.fc = Flat(Image(SIZE, 1)), nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.backbone(images).map.mean((2, 3)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Logits()


def bare() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    for images, targets in DataLoader(Batches(), batch_size=None):
        loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def barebones() -> None:
    trainer = Trainer(barebones=True, accelerator="cpu", max_epochs=1)
    trainer.fit(Plain(0, False), DataLoader(Batches(), batch_size=None))


def default(logs: int, schedule: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        callbacks = [LearningRateMonitor("step")] if schedule else []
        trainer = Trainer(default_root_dir=folder, accelerator="cpu", max_epochs=1, callbacks=callbacks)
        trainer.fit(Plain(logs, schedule), DataLoader(Batches(), batch_size=None))


def ours() -> None:
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder), document())


def document() -> dict[str, Any]:
    """What ours trains: `Classification` with its own callbacks, bar, TensorBoard and schedule."""
    sections = {
        "model": {"backbone": "Flat", "head": "AveragePoolHead", "schedule": "OneCycle"},
        "data": {"class_path": "Ready", "init_args": {"size": SIZE, "batch_size": BATCH}},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "limit_val_batches": 1},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "loop.yaml"
        path.write_text(dump(sections))
        return compose([path])


LOOPS: dict[str, Callable[[], None]] = {
    "bare PyTorch loop": bare,
    "Lightning, barebones": barebones,
    "Lightning by default, 1 value logged": lambda: default(1, False),
    "Lightning by default, 4 values, rate monitored": lambda: default(4, True),
    "ours: callbacks, bar, TensorBoard, schedule": ours,
}


def per_step(loop: Callable[[], None], clock: int) -> float:
    """Seconds of a step, from the net's own notes."""
    marks.clear()
    with contextlib.redirect_stdout(Terminal()), contextlib.redirect_stderr(Terminal()):
        loop()
    noted = marks[-1 - STEPS :]
    return (noted[-1][clock] - noted[0][clock]) / STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="how often each is timed (default: 7)")
    args = parser.parse_args()
    prepare()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TERM", "xterm")
    before = report.circumstances()
    found = []
    with threads(1):
        for clock, name in enumerate(("thread", "process")):
            candidates = [
                Candidate(title, lambda loop=loop, clock=clock: per_step(loop, clock)) for title, loop in LOOPS.items()
            ]
            timings = race(candidates, told, args.rounds, warm_up=1, least=0)
            over(timings)
            found.append(Section("one step of a net that does next to nothing", f"CPU time of the {name}", timings))
    for section in found:
        report.show([section])
    print(report.write(report.where("loop"), "loop", report.sections(found), vars(args), **before))


def over(timings: list[Timing]) -> None:
    """Adds what each takes more than the first, in milliseconds."""
    first = timings[0].seconds
    for timing in timings[1:]:
        more = [own - bare for own, bare in zip(timing.seconds, first, strict=True)]
        timing.extra["ms more"] = 1000 * Spread.of(more).median


if __name__ == "__main__":
    main()
