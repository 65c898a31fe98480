"""What a run leaves out of Lightning's loop: nothing that anybody asked for, and no number."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader

from framework.callbacks import Checkpoints, RandomState, RunState
from framework.construct import build_model
from framework.loop import TRAINING, WITHIN_A_STEP, Trainer, Unprofiled, moved, passed_over


class Watch(Callback):
    def on_train_batch_end(self, *args) -> None:
        pass


class Clip(Callback):
    """Notes the norm of the gradients as the optimizer gets them."""

    def __init__(self) -> None:
        self.norms = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.norms.append(torch.nn.utils.get_total_norm(gradients))


class Ten(LightningDataModule):
    """Ten images in batches of 4, 4 and 2."""

    def __init__(self, task) -> None:
        super().__init__()
        images = torch.randn(10, *task.example().shape[1:], generator=torch.Generator().manual_seed(0))
        self.pairs = list(zip(images, torch.arange(10) % task.num_classes, strict=True))

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.pairs, batch_size=4)

    val_dataloader = train_dataloader


class Negative(Ten):
    def on_after_batch_transfer(self, batch, dataloader_idx):
        return -batch[0], batch[1]


def trainer(*callbacks: Callback, **arguments) -> Trainer:
    return Trainer(
        accelerator="cpu", max_epochs=2, logger=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=list(callbacks), **{"enable_progress_bar": False, "enable_checkpointing": False, **arguments},
    )  # fmt: skip


def fit(document, over: bool, kind: type[Ten] = Ten, *callbacks: Callback, **arguments) -> dict[str, torch.Tensor]:
    """The weights and the metrics after two epochs, with the hooks passed over or called."""
    torch.manual_seed(0)
    task = build_model(document)
    runs, data = trainer(*callbacks, **arguments), kind(task)
    if over:
        with passed_over(runs, task, data):
            runs.fit(task, datamodule=data)
    else:
        runs.fit(task, datamodule=data)
    return {**task.state_dict(), **runs.callback_metrics}


@pytest.mark.parametrize("kind", [Ten, Negative])
def test_what_is_trained_is_the_same_to_the_bit(tiny, kind) -> None:
    document = tiny(model__backbone__drop_path=0.1)
    called, passed = (fit(document, over, kind) for over in (False, True))
    assert called.keys() == passed.keys()
    assert "val/acc1" in called
    assert all(torch.equal(called[key], passed[key]) for key in called)
    other = fit(document, True, Negative if kind is Ten else Ten)
    assert not all(torch.equal(passed[key], other[key]) for key in passed)  # the data module's own hook is called


def test_gradients_are_clipped_all_the_same(tiny) -> None:
    clip = Clip()
    first = fit(tiny(), True, Ten, clip, gradient_clip_val=1e-3)
    second = fit(tiny(), False, Ten, gradient_clip_val=1e-3)
    assert all(torch.equal(first[key], second[key]) for key in first)
    unclipped = fit(tiny(), True)
    assert not all(torch.equal(first[key], unclipped[key]) for key in first)
    assert len(clip.norms) == 6  # a callback's own hook


def test_a_checkpoint_within_an_epoch_is_saved_all_the_same(tiny, tmp_path: Path) -> None:
    often = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    fit(tiny(), True, Ten, often, enable_checkpointing=True)
    assert {path.stem.split("step=")[1] for path in tmp_path.iterdir()} == {"2", "4", "6"}


def test_hooks_that_do_nothing_are_passed_over_and_put_back(tiny, tmp_path: Path) -> None:
    task = build_model(tiny())
    state, saves = RunState.__new__(RunState), Checkpoints.__new__(Checkpoints)
    watch, random, best = Watch(), RandomState(), ModelCheckpoint(tmp_path)
    runs = trainer(watch, state, saves, random, best, enable_checkpointing=True)
    parts = (watch, state, saves, random, best)
    before = [dict(vars(part)) for part in (*parts, task)]
    with passed_over(runs, task, Ten(task)):
        left = [{name for name in WITHIN_A_STEP if getattr(each, name)} for each in parts]
        assert not any(getattr(task, name) for name in (*TRAINING, "configure_gradient_clipping"))
        assert task.on_validation_batch_end
        assert task._on_before_batch_transfer([1]) == [1]
    train, val = ({f"on_{stage}_batch_{end}" for end in ("start", "end")} for stage in ("train", "validation"))
    assert left == [
        {"on_train_batch_end"}, train | val, {"on_train_batch_end"}, {"on_train_batch_start"}, set()
    ]  # fmt: skip
    assert [dict(vars(part)) for part in (*parts, task)] == before


def test_a_model_that_overrides_a_hook_keeps_it(tiny) -> None:
    class Own(LightningModule):
        def on_after_backward(self) -> None:
            pass

        def transfer_batch_to_device(self, batch, device, dataloader_idx):
            return batch

    own = Own()
    with passed_over(trainer(), own, Ten(build_model(tiny()))):
        assert callable(own.on_after_backward)
        assert own.on_before_backward is None
        assert "_apply_batch_transfer_handler" not in vars(own)


def test_a_batch_goes_where_it_belongs() -> None:
    batch = [torch.ones(2), torch.arange(2)]
    assert moved(batch, torch.device("cpu")) is batch
    assert [part.device.type for part in moved(batch, torch.device("meta"))] == ["meta"] * 2
    assert moved({"x": batch}, torch.device("meta"))["x"][0].device.type == "meta"


def test_a_trainer_knows_when_it_trains() -> None:
    runs = trainer()
    for stage in (None, *RunningStage):
        runs.state.stage = stage
        assert runs.training == (stage == RunningStage.TRAINING)
    runs.training = True
    assert runs.state.stage is RunningStage.TRAINING
    runs.training = False
    assert runs.state.stage is None


def test_without_a_profiler_nothing_is_kept_between_hooks() -> None:
    profiler = Unprofiled()
    with profiler.profile("outer"), profiler.profile("inner"):
        pass
    with pytest.raises(KeyError), profiler.profile("fails"):
        raise KeyError
    assert profiler.summary() == ""
