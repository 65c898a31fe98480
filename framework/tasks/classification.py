"""Image classification."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal, Self, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from blocks.base import BuildError
from blocks.heads import AveragePoolHead, HeadFactory
from framework.backbones import BackboneFactory
from framework.data.base import Image
from framework.errors import ConfigError
from framework.mix import Mix, NoMix
from framework.objectives import CrossEntropy, Objective, Step
from framework.optim import AdamW, Cosine, Optimizer, Schedule
from framework.tasks.base import Task


class Classification(Task):
    """One label for each image: a backbone, a head, and a sum of loss terms.

    Logs, each epoch: `train/loss` and each loss term, `val/loss`, `val/acc1`, `val/acc5` (fractions), the same for
    test, and `lr`. Of two terms or more, the values (`train/<name>`) and factors (`weight/<name>`).

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
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if num_classes < 2:
            raise BuildError(f"model.num_classes: needs at least 2 classes, got {num_classes}")
        self.image, self.num_classes = image, num_classes
        self.backbone = backbone(image)
        self.head = head(self.backbone.out, num_classes)
        self.objectives = nn.ModuleDict(objectives or {"cross_entropy": CrossEntropy()})
        for term in self.terms.values():
            term.setup(self)
        self.backbone.keep(self.read_parts())
        self.mix, self.optimizer, self.schedule = mix, optimizer, schedule
        self.frozen = freeze == "backbone"
        if self.frozen:
            self.backbone.requires_grad_(False).eval()
        top5 = min(5, num_classes)
        self.metrics = nn.ModuleDict(
            {
                f"{stage}_{name}": MulticlassAccuracy(num_classes, top_k=k, average="micro")
                for stage in ("val", "test")
                for name, k in (("acc1", 1), ("acc5", top5))
            }
        )

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
        images, targets = self.mix(*batch, self.num_classes, self.trainer.fit_loop.total_batch_idx)
        step, terms = self._step(images, targets), self.terms
        values = {name: term(step) for name, term in terms.items()}
        loss = torch.stack([terms[name].weight * value for name, value in values.items()]).sum()
        self.log("train/loss", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images))
        if len(values) > 1:
            logged = {f"train/{name}": value for name, value in values.items()}
            logged |= {f"weight/{name}": terms[name].weight for name in values}
            self.log_dict(logged, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images))
        return loss

    def _step(self, images: Tensor, targets: Tensor) -> Step:
        with torch.no_grad() if self.frozen else nullcontext():
            features = self.backbone(images)
        first, *others = each = self.head.each(features)
        logits = torch.stack(each).mean(dim=0) if others else first
        apart = any(term.token == "distillation" for term in self.terms.values())
        return Step(images, targets, features, logits, first if apart else logits, others[0] if others else None)

    def on_train_epoch_end(self) -> None:
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"], sync_dist=True)

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str) -> None:
        images, targets = batch
        logits = self(images)
        self.log(f"{stage}/loss", nn.functional.cross_entropy(logits, targets), sync_dist=True, batch_size=len(images))
        for name in ("acc1", "acc5"):
            metric = cast(Any, self.metrics[f"{stage}_{name}"])
            metric(logits, targets)
            self.log(f"{stage}/{name}", metric, prog_bar=name == "acc1", batch_size=len(images))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self(batch[0]).softmax(dim=1)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # Lightning does not clip gradients that a fused optimizer unscales by itself; torch has no fused SGD for
        # sharded parameters.
        scaled = self.trainer.gradient_clip_val and "mixed" in str(self.trainer.precision)
        fused = not scaled and self.device_mesh is None
        try:
            optimizer = self.optimizer.build(self, fused)
        except ValueError as error:  # torch checks the values here
            raise ConfigError(f"model.optimizer: {error}") from error
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ConfigError("trainer.max_epochs: the schedule needs an end; give max_epochs or max_steps")
        scheduler = self.schedule.build(optimizer, int(steps), self.trainer.max_epochs or 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.schedule.interval}}
