"""What a run will take, from a few steps: the extrapolation against a clock that ticks once a step, and real runs."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from framework.ablation import probe
from framework.ablation.grid import Cell
from framework.ablation.launch import Local
from framework.ablation.probe import Expectation, Probe, Prober
from framework.construct import build_model


@pytest.fixture
def ticks(monkeypatch):
    """Each look at the clock is a second later: the start takes one, a step one, a batch of validation one."""
    seconds = itertools.count()
    monkeypatch.setattr(probe, "_now", lambda: float(next(seconds)))


LENGTHS = {"trainer__max_epochs": 10, "trainer__limit_train_batches": 5, "trainer__limit_val_batches": 3}


@pytest.mark.parametrize(
    ("settings", "seconds"),
    [
        (LENGTHS, 1 + 10 * 5 + 10 * 3),
        ({**LENGTHS, "trainer__check_val_every_n_epoch": 5}, 1 + 10 * 5 + 2 * 3),
        ({**LENGTHS, "trainer__max_steps": 20}, 1 + 20 + 4 * 3),
        ({**LENGTHS, "trainer__max_steps": 20, "trainer__accumulate_grad_batches": 2}, 1 + 40 + 8 * 3),
        ({**LENGTHS, "trainer__limit_train_batches": 1, "trainer__limit_val_batches": 0}, 1 + 10),
        # 1,797 digits, 1,197 of them to train on, in 18 batches of 64 and a rest that is left out; 300 to validate on
        ({**LENGTHS, "trainer__max_epochs": -1, "trainer__max_steps": 20}, 1 + 20 + 4 * 3),
        # eight devices: each has three of the 18 batches, and one to validate on
        (
            {
                **LENGTHS,
                "trainer__devices": [0, 1, 2, 3],
                "trainer__num_nodes": 2,
                "trainer__limit_train_batches": None,
            },
            1 + 10 * 3 + 10 * 1,
        ),
        ({"trainer__limit_train_batches": None, "trainer__limit_val_batches": None}, 1 + 18 + 5),
        ({"trainer__limit_train_batches": 0.5, "trainer__limit_val_batches": 1.0}, 1 + 9 + 5),
    ],
)
def test_steps_are_extrapolated_to_the_whole_run(tiny, ticks, settings, seconds):
    assert Prober()(tiny(**settings)).seconds == seconds


def test_bytes_are_two_checkpoints_of_weights_and_optimizer(tiny):
    document = tiny()
    state = build_model(document).state_dict().values()
    weights = sum(tensor.nbytes for tensor in state)
    found = Prober()(document).bytes
    # Adam keeps two numbers for each weight, and a step for each tensor
    assert 2 * 3 * weights < found < 2 * 3 * weights + 2 * 8 * len(state) + 1000


def test_nothing_is_written_and_callbacks_are_not_called(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Prober()(tiny(trainer__callbacks=[{"class_path": "lightning.pytorch.callbacks.DeviceStatsMonitor"}]))
    assert list(tmp_path.iterdir()) == []


def cells(document, seeds=(0, 1, 2)):
    return [Cell({"dim": dim}, seed, document) for dim in ("a", "b") for seed in seeds]


def test_what_is_expected_is_shared_by_the_runs_at_a_time(monkeypatch):
    probes = iter([Probe(3600, 2**30), Probe(7200, 2**30)])
    monkeypatch.setattr(Prober, "__call__", lambda self, document: next(probes))
    monkeypatch.setattr(probe, "_parallel", lambda launcher, left: (2, 1))
    assert Expectation(Local(2))(cells({})) == (
        "expected, an estimate from 3 steps of each cell on this machine: 4.5 h with 2 run(s) at a time "
        "(9.0 h of computing), 6.0 GiB of checkpoints"
    )


def test_what_cannot_be_probed_is_said_in_one_line(tiny, tmp_path):
    missing = tiny(data={"class_path": "Torchvision", "init_args": {"dataset": "MNIST", "root": str(tmp_path)}})
    text = Expectation(Local(1))(cells(missing))
    assert text.startswith("expected time and disk: unknown, cell a: data.root: no MNIST under ")
    assert "\n" not in text


def test_a_plan_shows_everything_else_without_the_data(tmp_path: Path, capsys):
    from framework.cli import main
    from tests.conftest import CONFIGS

    words = ["plan", "--config", str(CONFIGS / "study.yaml"), "--runs", str(tmp_path), "--only", "word=none"]
    assert main(words) == 0
    assert "expected, an estimate from 3 steps" in capsys.readouterr().out
    assert main([*words, "--no-probe"]) == 0
    assert "expected" not in capsys.readouterr().out
    assert main([*words, f"--data={{class_path: Torchvision, init_args: {{dataset: MNIST, root: {tmp_path}}}}}"]) == 0
    out = capsys.readouterr().out
    assert "6 runs (2 cells × 3 seeds), 0 of them finished" in out
    assert "expected time and disk: unknown" in out
