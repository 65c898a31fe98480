"""What is logged of an epoch, and how it is shown."""

import io
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from rich.console import Console
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from framework import callbacks
from framework.callbacks import Bar
from framework.construct import build_model
from framework.tasks.mean import Mean

TWO = {"labels": {"class_path": "CrossEntropy", "init_args": {"weight": 0.3}}, "smooth": "CrossEntropy"}


class Watch(Callback):
    """Notes the loss and size of each batch, and what a validation batch gives."""

    def __init__(self) -> None:
        self.losses, self.logits, self.shown = [], [], []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self.losses, self.logits = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append((float(outputs["loss"]), len(batch[0])))

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self.logits.append((pl_module(batch[0]), batch[1]))


def batches(task) -> DataLoader:
    """Ten images in batches of 4, 4 and 2."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(10, *task.example().shape[1:], generator=draw)
    return DataLoader(list(zip(images, torch.arange(10) % task.num_classes, strict=True)), batch_size=4)


def fit(document, *more: Callback, **arguments) -> tuple[Trainer, Watch]:
    torch.manual_seed(0)
    task, watch = build_model(document), Watch()
    trainer = Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_model_summary=False,
        num_sanity_val_steps=0, log_every_n_steps=1, callbacks=[watch, *more],
        **{"enable_progress_bar": False, **arguments},
    )  # fmt: skip
    trainer.fit(task, batches(task), batches(task))
    return trainer, watch


def test_an_epoch_has_the_mean_over_its_images(tiny) -> None:
    trainer, watch = fit(tiny(model__objectives=TWO))
    logged, task = trainer.callback_metrics, trainer.lightning_module
    assert [size for _, size in watch.losses] == [4, 4, 2]
    assert logged["train/loss"] == pytest.approx(sum(loss * size for loss, size in watch.losses) / 10, rel=1e-6)
    terms = 0.3 * logged["train/labels"] + logged["train/smooth"]
    assert logged["train/loss"] == pytest.approx(float(terms), rel=1e-6)
    assert (float(logged["weight/labels"]), float(logged["weight/smooth"])) == pytest.approx((0.3, 1.0))
    logits, targets = (torch.cat(each) for each in zip(*watch.logits, strict=True))
    for name, k in (("acc1", 1), ("acc5", min(5, task.num_classes))):
        theirs = MulticlassAccuracy(task.num_classes, top_k=k, average="micro")(logits, targets)
        assert logged[f"val/{name}"] == theirs
    loss = torch.nn.functional.cross_entropy(logits, targets)
    assert logged["val/loss"] == pytest.approx(float(loss), rel=1e-6)
    assert not any("means" in key for key in task.state_dict())


def test_a_task_trains_again_with_fresh_means(tiny) -> None:
    document = tiny()
    trainer, watch = fit(document)
    task = trainer.lightning_module
    again = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[watch],
    )  # fmt: skip
    again.fit(task, batches(task), batches(task))
    expected = sum(loss * size for loss, size in watch.losses) / 10
    assert again.callback_metrics["train/loss"] == pytest.approx(expected, rel=1e-6)


def test_a_mean_adds_up_over_devices() -> None:
    mean = Mean()
    mean.update(torch.tensor(6.0), 4)
    mean.add(torch.tensor(3), 2)
    assert mean.compute() == 1.5
    mean.sync(dist_sync_fn=lambda state, group: [state, torch.ones_like(state)], distributed_available=lambda: True)
    assert (mean.total / mean.count).item() == pytest.approx(10 / 7)
    mean.unsync()
    mean.reset()
    assert (mean.total, mean.count) == (0, 0)


def test_the_bar_shows_accuracy_and_loss_and_ends_full(tiny, monkeypatch) -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=160)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.get_console", lambda: console)
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: 1.0))
    bar = Bar()
    done = []
    monkeypatch.setattr(bar, "_update", lambda number, current, **kw: done.append(current))
    trainer, watch = fit(tiny(), bar, enable_progress_bar=True)
    shown = bar.get_metrics(trainer, trainer.lightning_module)
    assert shown["val/acc1"] == pytest.approx(float(trainer.callback_metrics["val/acc1"]))
    assert shown["loss"] == pytest.approx(watch.losses[-1][0])
    assert done == [1, 3, 3, 3, 3]  # the first picture, then the last one of each stage


def test_a_task_keeps_plain_attributes_plain(tiny) -> None:
    task = build_model(tiny())
    task.note = None
    task.note = "a"
    assert task.note == "a"
    task.scale = torch.nn.Parameter(torch.ones(()))
    task.scale = None
    assert "scale" not in task.__dict__
    with pytest.raises(TypeError, match="cannot assign"):
        task.scale = "a"
