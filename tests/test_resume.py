"""Exact resume: stopped at any step and gone on with, a run ends with bit-identical weights."""

import csv
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image

from framework import run as runs
from framework.ablation.state import read_status
from framework.cli import main
from framework.config import compose, dump
from framework.data.pictures import PictureSet

# Everything that draws random numbers in training is on.
RANDOM = {
    "model.backbone.drop_path": 0.2,
    "model.backbone.stem.drop": 0.1,
    "model.backbone.pattern": "tnt*2",
    "model.mix": "MixupCutmix",
    "trainer.max_epochs": 3,
    "trainer.accelerator": "cpu",
}
EMA = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}}
# Pictures whose batches worker processes begin and the run's device finishes: on a GPU without being asked.
FINISHED = "finished on the device"
CONFIG = "experiments/base/tnt_digits.yaml"


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """An image folder of 3 classes, which is read from disk by worker processes."""
    root = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 6)):
        for name in "abc":
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(draw.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(
                    root / split / name / f"{i}.png"
                )
    return root


def settings(kind: str, photos: Path) -> dict:
    if kind == "memory":
        return {**RANDOM, "data.crop": 1}
    data = {
        "class_path": "Torchvision",
        "init_args": {"dataset": "ImageFolder", "root": str(photos), "size": 8, "batch_size": 12, "workers": 2},
    }
    extra = {"trainer.callbacks": [EMA], "trainer.accumulate_grad_batches": 2} if kind == "workers, EMA" else {}
    if kind in ("repeats", FINISHED):
        data["init_args"] |= {"repeats": 3, "auto_augment": "rand-m9-mstd0.5-inc1", "erase_prob": 0.25}
        data["init_args"]["workers"] = 2 if kind == FINISHED else 0
    return {**RANDOM, "data": data, **extra}


class Press(Callback):
    """A signal to this very process in the midst of a step."""

    def __init__(self, epoch: int, batch: int, number: int = signal.SIGINT) -> None:
        self.at, self.number = (epoch, batch), number

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx) == self.at:
            os.kill(os.getpid(), self.number)


def start(path: Path, chosen: dict, *callbacks: Callback, kind: str = "") -> None:
    """Trains in `path`, or goes on with it."""
    path.mkdir(exist_ok=True)
    document = compose([CONFIG], chosen)
    (path / "config.yaml").write_text(dump(document))
    made = runs.Workbench.make_trainer

    def with_more(self, **arguments):
        return made(self, **{**arguments, "callbacks": [*arguments.get("callbacks", []), *callbacks]})

    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Workbench, "make_trainer", with_more)
        if kind == FINISHED:
            patch.setattr(PictureSet, "near", PictureSet.to)
        try:
            runs.fit_folder(path)
        finally:
            signal.signal(signal.SIGINT, handler)  # Lightning leaves Ctrl-C ignored on its way out


def curves(path: Path) -> list[dict[str, str]]:
    with (path / "curves.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same(one: Path, two: Path) -> None:
    first, second = (torch.load(path / runs.LAST, weights_only=True) for path in (one, two))
    assert first["global_step"] == second["global_step"]
    for section in ("state_dict", "averaging_state", "current_model_state"):
        for key, value in first.get(section, {}).items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second[section][key])), (section, key)
    states = [c["optimizer_states"][0]["state"] for c in (first, second)]
    for number, state in states[0].items():
        assert all(torch.equal(value, states[1][number][name]) for name, value in state.items())
    assert first["lr_schedulers"] == second["lr_schedulers"]
    # With the means over an epoch's training steps, of which one process has had a part.
    assert read_status(one).metrics == read_status(two).metrics
    assert curves(one) == curves(two)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, photos):
    """Uninterrupted runs, made when they are asked for."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("whole") / "run"
            start(made[kind], settings(kind, photos), kind=kind)
        return made[kind]

    return of


@pytest.mark.parametrize(
    ("kind", "epoch", "batch", "number"),
    [
        ("memory", 0, 0, signal.SIGINT),
        ("memory", 1, 7, signal.SIGTERM),
        ("memory", 2, 17, signal.SIGINT),  # the last step of the last epoch
        ("workers", 1, 2, signal.SIGINT),
        ("workers, EMA", 1, 2, signal.SIGINT),
        ("workers, EMA", 2, 3, signal.SIGTERM),
        ("repeats", 1, 2, signal.SIGINT),
        (FINISHED, 1, 2, signal.SIGINT),
    ],
)
def test_a_run_stopped_in_a_step_goes_on_to_the_same_weights(
    whole, photos, tmp_path, kind: str, epoch: int, batch: int, number: int
) -> None:
    path, chosen = tmp_path / "run", settings(kind, photos)
    last_step = (epoch, batch) == (2, 17)
    if last_step:
        start(path, chosen, Press(epoch, batch, number), kind=kind)
    else:
        with pytest.raises(KeyboardInterrupt):
            start(path, chosen, Press(epoch, batch, number), kind=kind)
        assert read_status(path).state == "interrupted"
        start(path, chosen, kind=kind)
    assert read_status(path).state == "finished"
    same(whole(kind), path)


def test_a_run_stopped_twice_goes_on_to_the_same_weights(whole, photos, tmp_path) -> None:
    path, chosen = tmp_path / "run", settings("memory", photos)
    for at in ((0, 5), (1, 3), (1, 9)):
        with pytest.raises(KeyboardInterrupt):
            start(path, chosen, Press(*at))
    start(path, chosen)
    same(whole("memory"), path)
    assert (path / "curves.csv").read_text().splitlines()[0].startswith("epoch,")
    assert len((path / "curves.csv").read_text().splitlines()) == 4


def test_ctrl_c_names_the_command_that_goes_on(tmp_path, monkeypatch, capsys) -> None:
    made = runs.Workbench.make_trainer
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(
            runs.Workbench,
            "make_trainer",
            lambda self, **kw: made(self, **{**kw, "callbacks": [*kw.get("callbacks", []), Press(0, 3)]}),
        )
        command = ["fit", "--config", CONFIG, "--runs", str(tmp_path), "--trainer.max_epochs=2"]
        assert main(command) == 130
    signal.signal(signal.SIGINT, handler)
    words = capsys.readouterr().out.split("goes on with:")[1].split()
    assert words[:3] == ["python", "cli.py", "fit"]
    assert main(words[2:]) == 0
    assert os.listdir(tmp_path / "tnt_digits") == ["0"]
    assert read_status(tmp_path / "tnt_digits" / "0").state == "finished"
