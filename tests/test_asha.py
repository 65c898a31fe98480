"""Hopeless runs are stopped by Ray's ASHA: the rule on made-up statuses, a study on a real Ray, and its table."""

from __future__ import annotations

import csv
import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from framework.ablation import tables
from framework.ablation.launch import Local, Ray, asha, ray
from framework.ablation.launch.asha import Asha
from framework.ablation.state import Status, read_status, write_status
from framework.ablation.tables import Metric
from framework.ablation.view import Progress, Run, runs_of
from framework.errors import ConfigError
from tests.engines import races
from tests.test_study import study

installed = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("ray", "pandas", "pyarrow")),
    reason="no ray[tune]; uv sync --extra ray",
)

GOOD = "sentence=learned,word=learned"


def at(epoch, value, epochs=16, metric="val/acc1"):
    return Status("running", epoch, epochs, {metric: value})


def stopped(rule, epoch, values, **kwargs):
    """The numbers of the runs that the rule stops at an epoch, in the order in which they come there."""
    return [n for n, value in values.items() if rule.hopeless(Path(f"run{n}"), at(epoch, value, **kwargs))]


@installed
def test_hopeless_runs_are_stopped_and_good_ones_are_not():
    rule = Asha(Metric("val/acc1"), grace=1, factor=2)
    assert stopped(rule, 1, {0: 0.8, 1: 0.1, 2: 0.9, 3: 0.2}) == [1, 3]
    assert stopped(rule, 1, {4: 0.85, 5: 0.3}) == [5]
    assert stopped(rule, 2, {0: 0.9, 2: 0.95, 4: 0.1}) == [4]


@installed
def test_nothing_is_stopped_before_grace():
    rule = Asha(Metric("val/acc1"), grace=4, factor=2)
    values = {0: 0.8, 1: 0.1, 2: 0.01}
    for epoch in (0, 1, 2, 3):
        assert stopped(rule, epoch, values) == []
    assert stopped(rule, 4, values) == [1, 2]


@installed
def test_less_is_better_where_the_name_says_so():
    rule = Asha(Metric("val/loss"), grace=1, factor=2)
    assert stopped(rule, 1, {0: 0.5, 1: 2.0, 2: 0.4}, metric="val/loss") == [1]


@installed
def test_only_news_of_running_runs_of_the_same_length_are_judged():
    rule = Asha(Metric("val/acc1"), grace=1, factor=2)
    assert stopped(rule, 1, {0: 0.8}) == []
    bad = at(1, 0.1)
    for state in ("waiting", "finished", "interrupted", "failed", "stopped"):
        assert not rule.hopeless(Path("bad"), replace(bad, state=state))
    assert not rule.hopeless(Path("bad"), replace(bad, metrics={"other": 0.0}))
    assert not rule.hopeless(Path("bad"), at(16, 0.1))  # it is over anyway
    assert not rule.hopeless(Path("short"), at(1, 0.1, epochs=8))
    assert not rule.hopeless(Path("one"), at(1, 0.1, epochs=1))
    assert rule.hopeless(Path("bad"), bad)
    assert not rule.hopeless(Path("bad"), bad)  # once is enough


@installed
def test_an_accuracy_beside_a_loss_that_diverged_does_not_count():
    rule = Asha(Metric("val/acc1"), grace=1, factor=2)
    diverged = Status("running", 1, 16, {"val/acc1": 0.9, "val/loss": math.nan})
    assert not rule.hopeless(Path("diverged"), diverged)
    assert stopped(rule, 1, {0: 0.5, 1: 0.6}) == []


@installed
def test_a_late_look_counts_for_one_epoch_only():
    rule = Asha(Metric("val/acc1"), grace=1, factor=2)
    assert stopped(rule, 5, {0: 0.9}) == []  # for epoch 4
    assert stopped(rule, 6, {0: 0.9}) == []
    assert stopped(rule, 1, {1: 0.1}) == []  # the first that is seen there


@pytest.mark.engine
@installed
def test_hopeless_runs_of_a_study_are_stopped_for_good(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ray, "LOOK", 0.1)
    launcher = Ray(cpus=0.25, asha=True)
    folder = study(tmp_path, launcher, races, seeds=[0])
    statuses = {path.parent.parent.name: read_status(path.parent) for path in folder.glob("*/*/config.yaml")}
    good = statuses.pop(GOOD)
    assert good == Status("finished", 8, 8, {"val/acc1": 0.9})
    assert len(statuses) == 3
    assert {(status.state, status.epoch, status.error) for status in statuses.values()} == {("stopped", 1, "")}
    assert "1 finished, 3 stopped" in (capsys.readouterr().out + Progress(runs(folder), "val/acc1").counts)
    # Neither launcher starts any of them again.
    for again in (launcher, Local(2)):
        assert study(tmp_path, again, races, seeds=[0]) == folder
        assert "1 of them finished, 3 stopped" in capsys.readouterr().out
    assert [path.read_text() for path in folder.glob("*/*/trained")] == ["x"] * 4
    table = tables.collect(folder)
    assert table.failures == []  # so that the exit code is 0
    assert [row.stopped for row in table.rows].count({0: 1}) == 3


def runs(folder: Path) -> list[Run]:
    return runs_of(folder, lambda choices: True)


class Here(Local):
    """Runs in this process."""

    def run(self, folders, task, watch):
        for folder in folders:
            task(folder)


def finish(folder):
    write_status(folder, Status("finished", 8, 8, {"val/acc1": 0.9 if folder.name == "seed=0" else 0.7}))


def test_a_table_says_what_was_stopped_and_counts_it_for_no_mean(tmp_path, capsys):
    folder = study(tmp_path, Here(), finish)
    whole = (folder / "table.csv").read_text()
    assert "stopped" not in whole + (folder / "table.md").read_text()
    write_status(folder / GOOD / "seed=1", Status("stopped", 2, 8, {"val/acc1": 0.1}))
    for seed in (0, 1):
        write_status(folder / "sentence=none,word=learned" / f"seed={seed}", Status("stopped", 1 + 3 * seed, 8))
    capsys.readouterr()
    study(tmp_path, Here(), finish)
    out = " ".join(capsys.readouterr().out.split())
    assert "5 of them finished, 3 stopped" in out
    assert f"{GOOD} 1 of 2 (seed 1 at epoch 2)" in out
    assert "sentence=none,word=learned 2 of 2 (seed 0 at epoch 1, seed 1 at epoch 4)" in out
    assert "of the runs that survived, which were selected by their results" in out
    assert "not comparable to those of a full study" in out
    for name in ("table.md", "table.html", "table.tex"):
        assert "ASHA" in (folder / name).read_text()
    rows = {(row["sentence"], row["word"]): row for row in csv.DictReader((folder / "table.csv").open())}
    survived = rows["learned", "learned"]
    assert (survived["stopped"], survived["stopped at"]) == ("1", "seed=1 epoch 2")
    assert (survived["val/acc1 n"], survived["val/acc1 mean"], survived["error"]) == ("1", "0.9", "")
    gone = rows["none", "learned"]
    assert (gone["stopped"], gone["stopped at"]) == ("2", "seed=0 epoch 1; seed=1 epoch 4")
    assert (gone["val/acc1 n"], gone["val/acc1 mean"]) == ("0", "")
    assert rows["none", "none"]["stopped"] == "0"
    table = tables.collect(folder)
    assert table.failures == []
    assert next(column for column in tables.columns(table) if column.head == "stopped").texts == ["0", "2", "0", "1"]


def test_progress_has_a_line_for_a_stopped_run(tmp_path):
    run = Run("cell", 0, tmp_path)
    progress = Progress([run], "val/acc1")
    write_status(tmp_path, Status("stopped", 3, 8))
    assert list(progress.refresh()) == [run]
    assert progress.over
    assert progress.line(run) == "[1/1] cell seed=0  stopped as hopeless at epoch 3"


@installed
def test_a_plan_names_the_rule(tmp_path):
    text = Ray(asha=True, asha_grace=3).plan([tmp_path])
    assert text.endswith(
        "; ASHA (Ray's AsyncHyperBandScheduler) stops hopeless runs for good from epoch 3 on, where 1 of 4 goes on: "
        "the table is then of those that survive"
    )
    assert "ASHA" not in Ray().plan([tmp_path])


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"launcher\.asha_grace: got 0; give at least 1"):
        Ray(asha_grace=0)
    with pytest.raises(ConfigError, match=r"launcher\.asha_factor: got 1; give at least 2"):
        Ray(asha_factor=1)
    monkeypatch.setitem(sys.modules, "ray.tune.schedulers", None)
    with pytest.raises(ConfigError, match=r"launcher\.asha needs ray\[tune\].*uv sync --extra ray"):
        asha.scheduler()
