"""Locks on run folders, and what they are for: launchers on one folder, killed owners, full disks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from framework.ablation import lock
from framework.ablation.launch import local
from framework.ablation.launch.local import Local
from framework.ablation.lock import held, hold, turn
from framework.ablation.state import Status, read_status, write_status
from framework.errors import ConfigError
from tests.test_study import REPO, Program, linux


def python(code: str, *arguments: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True, **options)


def wait(done, limit: float = 20) -> None:
    end = time.monotonic() + limit
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


# Races

RACE = """
import multiprocessing, os, sys
from pathlib import Path
from framework.ablation import lock

def race(root, barrier, i):
    for n in range(40):
        barrier.wait()
        with lock.hold(root / str(n)) as mine:
            if mine:
                (root / str(n) / f"winner{i}").touch()
            barrier.wait()  # nobody gives it back before all have tried

if __name__ == "__main__":
    root = Path(sys.argv[1])
    for n in range(40):
        (root / str(n) / ".lock").mkdir(parents=True)
        if n % 2:  # of an owner that is dead
            (root / str(n) / ".lock" / "1").touch()
            os.utime(root / str(n) / ".lock" / "1", (1e9, 1e9))
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(8)
    racers = [context.Process(target=race, args=(root, barrier, i)) for i in range(8)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
"""


def test_of_eight_processes_one_gets_the_folder(tmp_path):
    assert python(RACE, tmp_path).wait(60) == 0
    winners = [len(list((tmp_path / str(n)).glob("winner*"))) for n in range(40)]
    assert winners == [1] * 40


def test_a_turn_ends_and_the_next_can_begin(tmp_path):
    assert not held(tmp_path)
    for _ in range(3):
        with hold(tmp_path, "job 7") as mine:
            assert mine
            assert held(tmp_path)
            assert (turn(tmp_path).pid, turn(tmp_path).job) == (os.getpid(), "job 7")
            with hold(tmp_path) as again:
                assert not again
        assert not held(tmp_path)
    assert sorted(path.name for path in (tmp_path / ".lock").iterdir()) == ["1", "2", "3"]


# Owners that end, and that seem to

OWNER = """
import sys, time
from pathlib import Path
from framework.ablation import lock

lock.BEAT, lock.LIMIT = 0.1, 1.0
if sys.argv[2]:
    lock._machine = lambda: sys.argv[2]
with lock.hold(Path(sys.argv[1])) as mine:
    print(mine, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def owner(tmp_path, monkeypatch):
    """Starts a process that holds `tmp_path`, on this machine or another."""
    monkeypatch.setattr(lock, "LIMIT", 1.0)
    started = []

    def start(machine: str = "") -> subprocess.Popen:
        process = python(OWNER, tmp_path, machine)
        started.append(process)
        assert process.stdout.readline() == "True\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@linux
def test_a_killed_owner_on_this_machine_is_seen_at_once(tmp_path, owner):
    first = owner()
    assert held(tmp_path)
    first.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    assert held(tmp_path)  # it has stopped, and has its memory and its files yet
    first.kill()
    wait(lambda: not held(tmp_path), limit=0.5)
    with hold(tmp_path) as mine:
        assert mine


def test_a_killed_owner_on_another_machine_is_dead_after_missed_beats(tmp_path, owner):
    first = owner("elsewhere")
    time.sleep(1.5)
    assert held(tmp_path)
    first.kill()
    time.sleep(0.3)
    assert held(tmp_path)
    wait(lambda: not held(tmp_path), limit=1.5)


def test_an_owner_that_was_stopped_for_too_long_ends_when_another_has_taken_over(tmp_path, owner):
    first = owner("elsewhere")
    first.send_signal(signal.SIGSTOP)
    wait(lambda: not held(tmp_path))
    with hold(tmp_path) as mine:
        assert mine
        first.send_signal(signal.SIGCONT)
        assert first.wait(5) == lock.LOST
        assert held(tmp_path)


def test_an_owner_without_a_name_counts_by_its_age(tmp_path, monkeypatch):
    """A full disk, or the moment before the name is written."""
    (tmp_path / ".lock").mkdir()
    (tmp_path / ".lock" / "1").touch()
    assert held(tmp_path)
    monkeypatch.setattr(lock, "LIMIT", 0.2)
    wait(lambda: not held(tmp_path), limit=1)


# Two launchers

PROGRAM = """
import sys, time
from pathlib import Path
from framework.ablation.launch import local
from framework.ablation.state import Status, write_status
from framework.ablation.study import run_study
from tests.studies import document, dump, measure, override

def task(folder):
    with (folder / "trained").open("a") as count:
        count.write("x")
    time.sleep(0.4)
    write_status(folder, Status("finished", epoch=2, metrics={"val/acc1": 0.5}))

if __name__ == "__main__":
    local.PRELOAD = ["tests.test_study"]
    run_study(document(), Path(sys.argv[1]), local.Local(2), task, override, measure, dump)
"""


@linux
def test_two_launchers_share_a_study_and_both_show_its_whole_table(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.test_study.PROGRAM", PROGRAM)
    programs = [Program(tmp_path), Program(tmp_path)]
    outs = [program.process.communicate(timeout=60)[0] for program in programs]
    assert [program.process.returncode for program in programs] == [0, 0], outs
    assert [path.read_text() for path in (tmp_path / "pos").glob("*/*/trained")] == ["x"] * 8
    tables = [out[out.rindex("[8/8]") :].partition("\n")[2] for out in outs]
    assert tables[0] == tables[1] != ""


# A full disk


def fill(folder):
    write_status(folder, Status("running", epochs=3))
    if folder.name == "full":
        with (folder / "checkpoint").open("wb") as file:
            while True:
                file.write(b"x" * 4096)
                file.flush()
    write_status(folder, Status("finished"))


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.getuid() != 0, reason="only root can mount a small disk")
def test_a_full_disk_fails_the_run_and_harms_no_file(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(local, "PRELOAD", [])
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        folders = [disk / "small", disk / "full"]
        for folder in folders:
            folder.mkdir()
        Local(1, retries=0).run(folders, fill, lambda left: None)
        assert read_status(folders[0]).state == "finished"
        assert "No space left on device" in capfd.readouterr().err
        json.loads((folders[1] / "status.json").read_text())
        assert not held(folders[1])

        (folders[1] / "checkpoint").unlink()
        folders[1].rename(disk / "again")
        Local(1).run([disk / "again"], fill, lambda left: None)
        assert read_status(disk / "again").state == "finished"
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(not sys.platform.startswith("linux") or os.getuid() != 0, reason="only root can mount a small disk")
def test_a_checkpoint_that_does_not_fit_leaves_the_old_one(tmp_path):
    import torch

    from framework.checkpoints import WholeFiles

    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("cannot mount here")
    try:
        path = tmp_path / "checkpoints" / "last.ckpt"
        WholeFiles().save_checkpoint({"epoch": 1}, path)
        with pytest.raises((OSError, RuntimeError)):
            WholeFiles().save_checkpoint({"epoch": 2, "weights": torch.zeros(100_000)}, path)
        assert torch.load(path, weights_only=True) == {"epoch": 1}
        assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_the_number_of_retries_is_checked():
    with pytest.raises(ConfigError, match=r"launcher\.retries: got -1"):
        Local(retries=-1)
