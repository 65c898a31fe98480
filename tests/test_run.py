"""Runs: killed and gone on with to the same weights, interrupted with a checkpoint, recorded for TensorBoard."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from framework import run as runs
from framework.ablation.state import read_status, write_text
from framework.checkpoints import link
from framework.config import compose, dump

SETTINGS = {
    # everything that draws random numbers in training is on
    "model.backbone.drop_path": 0.2,
    "model.backbone.stem.drop": 0.1,
    "model.backbone.pattern": "tnt*2",
    "data.crop": 1,
    "trainer.max_epochs": 5,
    "trainer.accelerator": "cpu",
}


def folder(path: Path, **settings) -> Path:
    document = compose(["experiments/base/tnt_digits.yaml"], {**SETTINGS, **settings})
    path.mkdir()
    (path / "config.yaml").write_text(dump(document))
    return path


def weights(path: Path) -> dict:
    return torch.load(path / runs.LAST, weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = folder(tmp_path_factory.mktemp("run") / "whole")
    runs.fit_folder(path)
    return path


def test_a_run_ends_finished_with_its_metrics_and_files(whole: Path) -> None:
    status = read_status(whole)
    assert (status.state, status.epoch, status.epochs) == ("finished", 5, 5)
    assert 0 < status.metrics["val/acc1"] <= 1
    assert status.measures["params"] == sum(p.numel() for p in weights(whole)["state_dict"].values())
    assert (whole / runs.BEST).is_file()
    assert (whole / runs.RESOLVED).is_file()


def test_a_killed_run_goes_on_to_the_same_weights(whole: Path, tmp_path: Path) -> None:
    path = folder(tmp_path / "killed")
    threads = torch.get_num_threads()  # sums depend on how they are shared out
    code = f"""if True:
        import torch; torch.set_num_threads({threads})
        from pathlib import Path
        from framework.run import fit_folder
        fit_folder(Path({str(path)!r}))"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 120
    while read_status(path).epoch < 2 and time.monotonic() < limit:
        assert child.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert read_status(path).state == "running"
    runs.fit_folder(path)
    assert read_status(path).state == "finished"
    one, two = weights(whole), weights(path)
    assert one["global_step"] == two["global_step"]
    for key, value in one["state_dict"].items():
        assert torch.equal(value, two["state_dict"][key]), key
    assert read_status(whole).metrics == read_status(path).metrics


def test_an_epoch_without_validation_has_none_of_its_numbers(tmp_path: Path) -> None:
    path = folder(tmp_path / "a", **{"trainer.max_epochs": 3, "trainer.check_val_every_n_epoch": 2})
    runs.fit_folder(path)
    with (path / "curves.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [bool(row["val/acc1"]) for row in rows] == [False, True, False]
    assert all(row["train/loss"] for row in rows)
    assert not [name for name in read_status(path).metrics if name.startswith("val/")]


def test_a_run_that_ends_within_an_epoch_is_validated_there(tmp_path: Path) -> None:
    settings = {"trainer.max_epochs": -1, "trainer.max_steps": 3, "trainer.limit_train_batches": 2}
    path = folder(tmp_path / "a", **settings)
    runs.fit_folder(path)
    with (path / "curves.csv").open(newline="") as file:
        _, last = csv.DictReader(file)
    status = read_status(path)
    assert (status.state, status.epoch, status.metrics["val/loss"]) == ("finished", 2, float(last["val/loss"]))
    assert torch.load(path / runs.LAST, weights_only=True)["global_step"] == 3


def test_curves_have_the_learning_rate_of_each_epoch(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    logged = [event.value for event in events.Scalars("lr")]
    with (whole / "curves.csv").open(newline="") as file:
        assert [float(row["lr"]) for row in csv.DictReader(file)] == pytest.approx(logged)
    assert read_status(whole).metrics["lr"] == pytest.approx(logged[-1])


def test_tensorboard_has_curves_samples_and_a_row_of_hparams(whole: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "val/loss", "val/acc1", "val/acc5", "lr", "hparams/val/acc1"} <= set(tags["scalars"])
    assert tags["images"]
    assert len(events.Scalars("val/acc1")) == 5
    steps = [event.step for event in events.Scalars("train/loss_step")]
    assert steps == list(range(9, 5 * (events.Scalars("val/acc1")[0].step + 1), 10))
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"model.backbone.dim" in content


def test_no_decay_for_norms_biases_positions_and_tokens() -> None:
    from framework.construct import build_model
    from framework.optim import parameter_groups

    model = build_model(compose(["experiments/base/tnt_digits.yaml"]))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, spared = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    spared_names = {names[id(p)] for p in spared["params"]}
    assert {"backbone.stem.prefix", "backbone.stem.position.table", "backbone.stem.word_position.table"} <= spared_names
    assert all(name.endswith((".bias", "prefix", "table")) or "norm" in name for name in spared_names)
    assert all(names[id(p)].endswith("weight") and p.ndim > 1 for p in decayed["params"])
    assert len(spared_names) + len(decayed["params"]) == len(names)


def test_cosine_warms_up_and_ends_at_its_minimum() -> None:
    from framework.optim import Cosine

    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-3)
    schedule = Cosine(warmup_epochs=2, warmup_lr=1e-6, min_lr=1e-5).build(optimizer, steps=100, epochs=10)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(1e-6)
    assert rates[10] == pytest.approx((1e-6 + 1e-3) / 2)
    assert rates[20] == pytest.approx(1e-3)
    assert max(rates) == rates[20]
    assert rates[60] == pytest.approx((1e-5 + 1e-3) / 2)
    assert rates[100] == pytest.approx(1e-5)


def test_all_processes_of_a_run_share_one_new_folder(tmp_path, monkeypatch) -> None:
    for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK", *runs.JOB):
        monkeypatch.delenv(key, raising=False)
    with runs.shared_folder(tmp_path, "a") as alone:
        assert alone == tmp_path / "a" / "0"
        monkeypatch.setenv("LOCAL_RANK", "1")  # as Lightning starts the others, with this environment
        with runs.shared_folder(tmp_path, "a") as handed:
            assert handed == alone
    monkeypatch.setenv("MASTER_PORT", "29500")  # as torchrun starts them, each by itself
    monkeypatch.setenv("RANK", "0")
    with runs.shared_folder(tmp_path, "a") as first:
        handed_on = os.environ.pop(runs.HANDED)  # not by monkeypatch, which would put it back at the end
        monkeypatch.setenv("RANK", "1")
        with runs.shared_folder(tmp_path, "a") as second:
            assert first == second == tmp_path / "a" / "1"
        os.environ[runs.HANDED] = handed_on
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["0", "1"]
    assert runs.HANDED not in os.environ


def test_two_processes_do_not_train_in_one_folder(whole: Path, capsys) -> None:
    from framework.ablation.lock import hold
    from framework.cli import main

    with hold(whole) as mine:
        assert mine
        command = ["fit", "--config", str(whole / "config.yaml"), "--ckpt_path", str(whole / runs.LAST)]
        assert main(command) == 2
    assert "another process trains in this folder" in capsys.readouterr().err


def saved(path: Path) -> dict[str, dict]:
    return {name: torch.load(path / name, weights_only=True) for name in (runs.LAST, runs.BEST)}


def test_the_best_is_also_the_last_as_long_as_nothing_comes_behind_it(tmp_path: Path) -> None:
    for epochs in (1, 4):  # at a rate that makes some epochs worse
        path = folder(tmp_path / str(epochs), **{"trainer.max_epochs": epochs, "model.optimizer.lr": 0.1})
        runs.fit_folder(path)
        assert sorted(file.name for file in (path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
        found = saved(path)
        curves = found[runs.LAST]["callbacks"]["RunState"]["curves"]
        best = max(range(epochs), key=lambda epoch: curves[epoch]["val/acc1"])
        assert {name: each["epoch"] for name, each in found.items()} == {runs.LAST: epochs - 1, runs.BEST: best}
        assert found[runs.BEST]["callbacks"]["RunState"]["curves"] == curves[: best + 1]
        assert (path / runs.LAST).samefile(path / runs.BEST) == (best == epochs - 1)


def test_the_last_is_no_best_one_that_is_still_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = TorchCheckpointIO.save_checkpoint

    def slowly(self, checkpoint, path, storage_options=None) -> None:
        if Path(path).exists():  # the next best one
            time.sleep(1)
        write(self, checkpoint, path, storage_options)

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", slowly)
    io = "lightning.pytorch.plugins.io.AsyncCheckpointIO"
    path = folder(tmp_path / "a", **{"trainer.max_epochs": 2, "trainer.plugins": [{"class_path": io}]})
    runs.fit_folder(path)
    assert {name: each["epoch"] for name, each in saved(path).items()} == {runs.LAST: 1, runs.BEST: 1}


def test_a_text_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "a", []

    def fsync(number: int) -> None:
        synced.append((path.exists(), os.fstat(number).st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(path, "größe")
    assert synced == [(False, 7)]
    assert path.read_text(encoding="utf-8") == "größe"


def test_a_link_takes_the_place_of_a_file_and_is_kept_when_the_other_is_replaced(tmp_path: Path) -> None:
    best, last = tmp_path / "best", tmp_path / "last"
    for text in ("one", "two"):
        write_text(best, text)
        link(best, last)
        link(best, last)
        assert last.read_text() == text
    write_text(last, "three")
    assert best.read_text() == "two"
    with pytest.raises(FileNotFoundError):
        link(tmp_path / "none", last)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best", "last"]


def test_a_best_one_of_the_validation_is_not_the_last(tmp_path: Path) -> None:
    """Where it is written before the epoch has ended, it lacks what the end adds."""
    path = folder(tmp_path / "a", **{"trainer.max_epochs": 2, "trainer.check_val_every_n_epoch": 2})
    runs.fit_folder(path)
    found = saved(path)
    counts = {name: len(each["callbacks"]["RunState"]["curves"]) for name, each in found.items()}
    assert counts == {runs.LAST: 2, runs.BEST: 1}
    assert found[runs.LAST]["global_step"] == found[runs.BEST]["global_step"]
