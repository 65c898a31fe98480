"""Runs as processes of this machine: real ones, of which what they run is trivial and loads no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from framework.ablation.launch import local
from framework.ablation.launch.local import Local
from framework.ablation.state import Status, read_status, write_status
from framework.errors import ConfigError


@pytest.fixture(autouse=True)
def _nothing_heavy(monkeypatch):
    monkeypatch.setattr(local, "PRELOAD", [])


def finish(folder):
    start = time.time()
    time.sleep(0.5 if folder.name.startswith("slow") else 0)
    print("hello from", folder.name)
    write_status(folder, Status("finished", metrics={"start": start, "end": time.time(), "pid": os.getpid()}))


def misbehave(folder):
    write_status(folder, Status("running", epoch=2, epochs=5))
    if folder.name == "raises":
        raise ValueError("no such thing")
    if folder.name == "exits":
        print("CUDA error: too hot", flush=True)
        print("bye", flush=True)
        os._exit(3)
    if folder.name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if folder.name == "judges":
        write_status(folder, Status("failed", error="its own reason"))
        os._exit(1)


def run_local(root: Path, names: list[str], task: Callable, processes: int = 2, retries: int = 0) -> dict[str, Status]:
    folders = [root / name for name in names]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    calls = []
    Local(processes, retries).run(folders, task, lambda left: calls.append(len(left)))
    assert calls[-1] == 0
    return {folder.name: read_status(folder) for folder in folders}


def test_two_at_a_time_overlap_and_each_has_its_process(tmp_path):
    status = run_local(tmp_path, ["slow0", "slow1", "slow2"], finish)
    assert {each.state for each in status.values()} == {"finished"}
    first, second, third = (status[f"slow{i}"].metrics for i in range(3))
    assert first["start"] < second["end"]
    assert second["start"] < first["end"]
    assert third["start"] >= min(first["end"], second["end"])
    assert len({first["pid"], second["pid"], third["pid"], os.getpid()}) == 4
    assert (tmp_path / "slow1" / "log.txt").read_text() == "hello from slow1\n"


@pytest.mark.parametrize("devices", [[], ["0"]])
def test_the_kernels_are_built_before_the_first_run(tmp_path, monkeypatch, devices):
    """Here, where one sees it; and not where the runs have GPUs."""
    asked = []
    monkeypatch.setattr(local, "devices", lambda: devices)
    monkeypatch.setattr(
        "blocks.kernels.native.library", lambda: asked.append([path.name for path in tmp_path.rglob("log.txt")])
    )
    run_local(tmp_path, ["fast0", "fast1"], finish)
    assert asked == ([] if devices else [[]])


def test_what_dies_is_failed_with_its_reason(tmp_path):
    (tmp_path / "silent").mkdir()
    (tmp_path / "silent" / "log.txt").write_text("ValueError: of an earlier try\n")
    status = run_local(tmp_path, ["raises", "exits", "killed", "judges", "silent"], misbehave, processes=0)
    assert {name: each.error.partition(" (test_local.py")[0] for name, each in status.items()} == {
        "raises": "ValueError: no such thing",
        "exits": "exit code 3: CUDA error: too hot",
        "killed": "killed by SIGKILL (out of memory?)",
        "judges": "its own reason",
        "silent": "ended without a result",
    }
    assert {each.state for each in status.values()} == {"failed"}
    assert (status["killed"].epoch, status["killed"].epochs) == (2, 5)


def test_an_error_in_the_launcher_leaves_no_process(tmp_path):
    (tmp_path / "slow").mkdir()

    def watch(left):
        raise RuntimeError("the view is broken")

    with pytest.raises(RuntimeError, match="broken"):
        Local().run([tmp_path / "slow"], finish, watch)
    assert read_status(tmp_path / "slow").state != "running"
    assert local.multiprocessing.active_children() == []


def works_at_last(folder):
    with (folder / "tries").open("a") as tries:
        tries.write("x")
    if len((folder / "tries").read_text()) < 3:
        os.kill(os.getpid(), signal.SIGKILL)
    write_status(folder, Status("finished"))


def test_a_failure_is_tried_again_up_to_the_limit(tmp_path):
    status = run_local(tmp_path, ["run"], works_at_last, retries=1)["run"]
    assert (status.state, status.error) == ("failed", "killed by SIGKILL (out of memory?)")
    assert (tmp_path / "run" / "tries").read_text() == "xx"
    assert run_local(tmp_path, ["run"], works_at_last, retries=1)["run"] == Status("finished")


def begins_another_rank(folder):
    """What Lightning does for a second device: the same command again, with a number."""
    (folder / f"rank{os.environ.get('LOCAL_RANK', '0')}").write_text(str(folder))
    if "LOCAL_RANK" not in os.environ:
        subprocess.run([sys.executable, *sys.argv], env={**os.environ, "LOCAL_RANK": "1"}, check=True)
        write_status(folder, Status("finished"))


def test_a_run_on_two_devices_begins_no_second_study(tmp_path):
    from tests import test_local  # by the name that another program can import

    status = run_local(tmp_path, ["run"], test_local.begins_another_rank)["run"]
    assert status == Status("finished"), (tmp_path / "run" / "log.txt").read_text()
    assert (tmp_path / "run" / "rank1").read_text() == str(tmp_path / "run")


def see_device(folder):
    time.sleep(0.3)
    (folder / "device").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
    write_status(folder, Status("finished"))


@pytest.mark.parametrize(("processes", "at_a_time"), [(0, 3), (2, 2)])
def test_each_run_has_one_of_the_devices(tmp_path, monkeypatch, processes, at_a_time):
    monkeypatch.setattr(local, "devices", lambda: ["0", "2", "GPU-5"])
    names = [f"run{i}" for i in range(5)]
    assert f"{at_a_time} at a time" in Local(processes).plan([tmp_path / name for name in names])
    run_local(tmp_path, names, see_device, processes=processes)
    seen = [(tmp_path / name / "device").read_text() for name in names]
    assert seen[:at_a_time] == ["0", "2", "GPU-5"][:at_a_time]
    assert set(seen) == set(seen[:at_a_time])


def test_the_number_of_processes_is_checked():
    with pytest.raises(ConfigError, match="processes: got -1"):
        Local(-1)
