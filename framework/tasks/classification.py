"""Image classification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import reduce
from inspect import signature
from operator import add
from typing import Any, Literal, Self, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from blocks.base import BuildError
from blocks.heads import AveragePoolHead, HeadFactory
from framework.backbones import BackboneFactory
from framework.compiled import compile_regions, need_compiler
from framework.data.base import Image
from framework.errors import ConfigError
from framework.mix import Mix, NoMix
from framework.objectives import CrossEntropy, Objective, Step
from framework.optim import AdamW, Cosine, Optimizer, Schedule
from framework.tasks.base import Task
from framework.tasks.mean import Mean

# The means over training steps.
TRAINED = ("train/", "weight/")


class Classification(Task):
    """One label for each image: a backbone, a head, and a sum of loss terms.

    Logs, each epoch: `train/loss` and each loss term, `val/loss`, `val/acc1`, `val/acc5` (fractions), the same for
    test, and `lr`. Of two terms or more, the values (`train/<name>`) and factors (`weight/<name>`). Loggers alone get
    `train/loss_step`, the loss of every `trainer.log_every_n_steps`-th step.

    Args:
        backbone: the net.
        image: size and channels of its images; from the data module where it is left out.
        num_classes: number of classes; from the data module where it is left out.
        head: final features to logits.
        mix: how training images are mixed with each other.
        objectives: the loss terms by name, cross-entropy alone by default; they are added up with their weights.
        optimizer: how weights are updated.
        schedule: how the learning rate changes.
        freeze: what is not trained: the backbone stays as its weights are, in eval mode (batch statistics kept, no
            dropout, no drop path) and without gradients; the head and the loss terms learn.
        compile: whether torch.compile compiles each block of the backbone by itself, for training. Minutes at the
            start, which long runs may win back on a GPU; on a CPU what it makes is slower than the kernels here.
        init: how every Linear and convolution of the net starts: as its part here has it (`own`: N(0, .02²) for most),
            or as torch has it (`torch`: uniform, by the number of inputs), which SReT leaves as it is.

    Raises:
        BuildError: the parts do not fit together.
    """

    def __init__(
        self,
        backbone: BackboneFactory,
        image: Image,
        num_classes: int,
        head: HeadFactory = AveragePoolHead,
        mix: Mix = NoMix(),
        objectives: dict[str, Objective] = {},  # noqa: B006 (read only)
        optimizer: Optimizer = AdamW(),
        schedule: Schedule = Cosine(),
        freeze: Literal["none", "backbone"] = "none",
        compile: bool = False,
        init: Literal["own", "torch"] = "own",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if num_classes < 2:
            raise BuildError(f"model.num_classes: needs at least 2 classes, got {num_classes}")
        self.image, self.num_classes = image, num_classes
        self.backbone = backbone(image)
        self.head = head(self.backbone.out, num_classes)
        if init == "torch":
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.reset_parameters()
        self.objectives = nn.ModuleDict(objectives or {"cross_entropy": CrossEntropy()})
        for name, term in self.terms.items():
            term.check(f"model.objectives.{name}")
            term.setup(self)
        self._apart = any(term.token == "distillation" for term in self.terms.values())
        self.backbone.keep(self.read_parts())
        self.mix, self.optimizer, self.schedule = mix, optimizer, schedule
        self.frozen, self.compiled = freeze == "backbone", compile
        if self.frozen:
            self.backbone.requires_grad_(False).eval()
        names = ["train/loss", *(f"{stage}/{name}" for stage in ("val", "test") for name in ("loss", "acc1", "acc5"))]
        if len(self.objectives) > 1:
            names += [f"{kind}/{name}" for kind in ("train", "weight") for name in self.objectives]
        self.means = nn.ModuleDict({name: Mean() for name in names})
        self.logged = frozenset({"lr", *(name for name in names if not name.startswith("test/"))})
        self._known: set[str] = set()  # those of `means` that Lightning knows of in this epoch
        self._sums: dict[str, list[Tensor]] = {}  # of a checkpoint

    @property
    def terms(self) -> dict[str, Objective]:
        """The loss terms by name."""
        return {name: cast(Objective, term) for name, term in self.objectives.items()}

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def setup(self, stage: str) -> None:
        if stage == "fit":
            if self.compiled:  # before the net is sharded: each device compiles what it computes
                need_compiler(self.trainer.strategy.root_device, "model.compile")
                compile_regions(self)
            for term in self.terms.values():
                term.start(self)

    def read_parts(self) -> frozenset[str]:
        return self.head.reads.union(*(term.reads for term in self.terms.values()))

    def example(self, batch: int = 1) -> Tensor:
        size, device = self.image.size, next(self.parameters()).device
        return torch.zeros(batch, self.image.channels, size, size, device=device)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))

    def pooled(self, images: Tensor) -> Tensor:
        """The features `(B, n)` that the head's classifiers read. Raises BuildError where the head does not tell."""
        return self.head.pooled(self.backbone(images))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        at = self.trainer.fit_loop.total_batch_idx
        images, targets = self.mix(*batch, self.num_classes, at)
        step, terms = self._step(images, targets), self.terms
        values = {name: term(step) for name, term in terms.items()}
        # A factor of 1 is left out: it changes nothing, and is a step of its own there and back.
        weights = {name: term.weight for name, term in terms.items()}
        loss = reduce(add, [value if weights[name] == 1 else weights[name] * value for name, value in values.items()])
        count = len(images)
        sums: dict[str, Tensor | float] = {"train/loss": loss.detach() * count}
        if len(values) > 1:
            sums |= {f"train/{name}": value.detach() * count for name, value in values.items()}
            sums |= {f"weight/{name}": weight * count for name, weight in weights.items()}
        self._note(sums, count)
        every = cast(Any, self.trainer).log_every_n_steps
        if every and (at + 1) % every == 0:
            self.latest = {"loss": float(loss.detach())}
            for logger in self.loggers:
                logger.log_metrics({"train/loss_step": self.latest["loss"]}, self.global_step)
        return loss

    training_step.__signature__ = signature(training_step)  # type: ignore[attr-defined]  # Lightning asks in each step

    def _note(self, sums: Mapping[str, Tensor | float], count: int) -> None:
        """Adds to the means over the epoch what the images of a batch add up to."""
        for name, total in sums.items():
            mean = cast(Mean, self.means[name])
            if name in self._known:
                mean.add(total, count)
            else:
                self._known.add(name)
                mean.update(total, count)
                self.log(name, mean, on_step=False, on_epoch=True, prog_bar=name == "val/acc1")

    def _step(self, images: Tensor, targets: Tensor) -> Step:
        with torch.no_grad() if self.frozen else nullcontext():
            features = self.backbone(images)
        each = self.head.each(features)
        logits = self.head.evaluated(each)
        token = each[1] if self.head.distilled else None
        return Step(images, targets, features, logits, each[0] if self._apart else logits, token, each)

    def _forget(self, *stages: str) -> None:
        """Starts the means of these stages anew."""
        for name, mean in self._means(*stages):
            mean.reset()
            self._known.discard(name)

    def _means(self, *stages: str) -> Iterator[tuple[str, Mean]]:
        return ((name, cast(Mean, mean)) for name, mean in self.means.items() if name.startswith(stages))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        total = self.trainer.strategy.reduce  # in place
        checkpoint["sums"] = {
            name: [total(state.clone(), reduce_op="sum") for state in (mean.total, mean.count)]
            for name, mean in self._means(*TRAINED)
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._sums = checkpoint.get("sums", {})

    def on_train_start(self) -> None:
        self._forget(*TRAINED)
        # A run goes on in the midst of an epoch; on the first device alone, as they are those of all of them.
        if self.trainer.is_global_zero:
            for name, mean in self._means(*TRAINED):
                mean.add(*self._sums.get(name, (0, 0)))
        self._sums = {}

    def on_train_epoch_start(self) -> None:
        self._forget(*TRAINED)

    def on_validation_epoch_start(self) -> None:
        self._forget("val/")

    def on_test_epoch_start(self) -> None:
        self._forget("test/")

    def on_train_epoch_end(self) -> None:
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], sync_dist=True)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, targets = batch
        logits = self(images)
        count = len(images)
        ranked = logits.topk(min(5, self.num_classes)).indices == targets[:, None]
        sums = {
            f"{stage}/loss": nn.functional.cross_entropy(logits, targets) * count,
            f"{stage}/acc1": (logits.argmax(dim=1) == targets).sum(),
            f"{stage}/acc5": ranked.sum(),
        }
        self._note(sums, count)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).softmax(dim=1)

    def check_values(self) -> None:
        self._made_optimizer(fused=False)

    def _made_optimizer(self, fused: bool) -> torch.optim.Optimizer:
        try:
            return self.optimizer.build(self, fused)
        except ValueError as error:  # torch checks the values here
            raise ConfigError(f"model.optimizer: {error}") from error

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # Lightning does not clip gradients that a fused optimizer unscales by itself; torch has no fused SGD for
        # sharded parameters.
        scaled = self.trainer.gradient_clip_val and "mixed" in str(self.trainer.precision)
        optimizer = self._made_optimizer(fused=not scaled and self.device_mesh is None)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ConfigError("trainer.max_epochs: the schedule needs an end; give max_epochs or max_steps")
        scheduler = self.schedule.build(optimizer, int(steps), self.trainer.max_epochs or 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.schedule.interval}}
