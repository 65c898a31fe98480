"""Studies on a real Ray: one of its own, and a cluster of two machines of which one is lost."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from framework.ablation.launch.ray import Ray
from framework.ablation.lock import turn
from framework.ablation.state import read_status
from framework.errors import ConfigError
from tests.engines import Machine, launchers, machines, wait

installed = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="no ray; uv sync --extra ray")


@contextmanager
def cluster(pair: list[Machine]):
    """A Ray node with one core on each machine; gives the address."""
    head, other = pair
    address = f"{head.address}:6399"
    env = {
        **os.environ,
        "RAY_AUTH_MODE": "disabled",  # a token of this machine would keep the other one out; nobody else is there
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "2",
    }
    ray = str(Path(sys.executable).parent / "ray")
    options = ["--block", "--num-cpus=1", "--object-store-memory=80000000"]
    files = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # short: names of sockets must be
    joins = ["--head", "--port=6399", "--include-dashboard=false", f"--temp-dir={files}"], [f"--address={address}"]
    nodes: list[subprocess.Popen] = []
    try:
        for machine, join in zip((head, other), joins, strict=True):
            command = [*machine.prefix, ray, "start", *options, f"--node-ip-address={machine.address}", *join]
            pipe = subprocess.PIPE
            nodes.append(subprocess.Popen(command, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True))
            lines = []
            for line in nodes[-1].stdout:
                lines.append(line)
                if "Ray runtime started" in line:
                    break
            else:
                pytest.fail("".join(lines))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_MODE", "disabled")
            yield address
    finally:
        for machine in pair:
            machine.kill()
        for node in nodes:
            node.communicate()
        shutil.rmtree(files)


@pytest.mark.engine
@installed
def test_a_study_outlives_one_of_two_machines(tmp_path):
    with launchers() as start:
        whole = start(tmp_path, "Local(2)", seeds=[0]).tables()
    with machines() as pair, cluster(pair) as address, launchers() as start:
        head, other = pair
        study = start(tmp_path / "ray", f"Ray({address!r})", head.prefix, pause=True, seeds=[0])
        wait(lambda: len(study.at_five()) == 2)
        there = subprocess.run(["ip", "netns", "pids", other.name], capture_output=True, text=True).stdout.split()
        lost = [folder for folder in study.at_five() if str(turn(folder).pid) in there]
        assert len(lost) == 1
        other.kill()
        study.go()
        assert study.tables() == whole
        assert len((lost[0] / "nodes").read_text().splitlines()) == 2
        assert len((lost[0] / "trained").read_text()) == 10  # it went on, and did not begin again


@pytest.mark.engine
@installed
def test_ctrl_c_interrupts_and_the_same_command_goes_on(tmp_path):
    with launchers() as start:
        first = start(tmp_path, "Ray(cpus=0.5)", pause=True, seeds=[0])
        wait(lambda: len(first.at_five()) == 4)
        killed = first.at_five()[0]
        os.kill(turn(killed).pid, signal.SIGKILL)
        wait(lambda: len((killed / "nodes").read_text().splitlines()) == 2)  # Ray has started it again
        os.killpg(first.process.pid, signal.SIGINT)
        out, _ = first.process.communicate(timeout=60)
        states = [read_status(path.parent).state for path in first.study.glob("*/*/config.yaml")]
        assert states == ["interrupted"] * 4, out
        assert "the same command goes on" in out
        second = start(tmp_path, "Ray(cpus=0.5)", seeds=[0])
        second.go()
        second.tables()


def test_what_would_be_asked_for(tmp_path):
    folders = [tmp_path / "pos" / "cell" / f"seed={n}" for n in range(5)]
    pytest.importorskip("ray")
    text = Ray("head:6379", cpus=4, gpus=0.5, memory_gib=2).plan(folders)
    assert text == (
        "5 tasks on the cluster at head:6379, each with 4 CPU, 0.5 GPU, 2 GiB; started again after a loss up to 2 times"
    )


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"launcher\.gpus: got -1; give at least 0"):
        Ray(gpus=-1)
    if importlib.util.find_spec("ray"):
        with pytest.raises(ConfigError, match=r"launcher\.address: no Ray answers at 127\.0\.0\.1:9"):
            Ray("127.0.0.1:9").run([tmp_path], wait, lambda left: None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="uv sync --extra ray"):
        Ray().run([tmp_path], wait, lambda left: None)
