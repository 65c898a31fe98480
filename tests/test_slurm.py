"""Studies on a real SLURM: two nodes on this machine, that `.ci/engines` starts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from framework.ablation.launch import slurm
from framework.ablation.launch.slurm import Slurm
from framework.ablation.lock import turn
from framework.ablation.state import Status, read_status, write_status
from framework.errors import ConfigError
from tests.engines import REPO, launchers, steps, wait

ENGINES = REPO / ".ci" / "engines"


@pytest.fixture(scope="module")
def _cluster():
    if not shutil.which("slurmctld") or os.getuid() != 0:
        pytest.skip("no slurmctld, or not root; .ci/engines installs it on Debian")
    started = subprocess.run([ENGINES], capture_output=True, text=True)
    where = (started.stdout.strip().splitlines() or [""])[-1:]
    if not where[0].endswith("slurm.conf"):
        pytest.skip(f"no SLURM: {where[0]} {started.stderr.strip()[-200:]}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", where[0])
        yield


def run(folders: list[Path], task, watch=lambda left: None, **options) -> None:
    """Runs them in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm, "ASK", 1.0)
        patch.setattr(slurm, "LOOK", 0.2)
        Slurm(**options).run(folders, task, watch)


@pytest.mark.engine
@pytest.mark.usefixtures("_cluster")
def test_a_study_with_accidents_ends_in_the_same_table(tmp_path):
    """A job is cancelled, another one killed, then the launcher; the same command goes on."""
    with launchers() as start:
        whole = start(tmp_path, "Local(2)").tables()

    with launchers() as start, cancelled_jobs():
        first = start(tmp_path / "broken", "Slurm()", pause=True)
        wait(lambda: len(first.at_five()) == 4)  # two on each node, and four that wait
        assert {(folder / "nodes").read_text() for folder in first.at_five()} == {"n1\n", "n2\n"}
        cancelled, killed, *others = first.at_five()
        job = (killed / slurm.JOB).read_text()
        subprocess.run(["scancel", (cancelled / slurm.JOB).read_text()], check=True)
        os.kill(turn(killed).pid, signal.SIGKILL)
        wait(lambda: read_status(cancelled).state == "interrupted")
        wait(lambda: (killed / slurm.JOB).read_text() != job)  # tried again
        first.process.kill()
        assert [read_status(folder).state for folder in others] == ["running", "running"]  # without a launcher

        jobs = {path.parent: path.read_text() for path in first.study.glob("*/*/" + slurm.JOB)}
        second = start(tmp_path / "broken", "Slurm()")
        wait(lambda: (cancelled / slurm.JOB).read_text() != jobs[cancelled])
        second.go()
        assert second.tables() == whole
        again = {folder for folder, job in jobs.items() if (folder / slurm.JOB).read_text() != job}
        assert again == {cancelled}, "jobs that were in the queue were submitted again"


@contextmanager
def cancelled_jobs():
    """Leaves no job in the queue."""
    try:
        yield
    finally:
        subprocess.run(["scancel", "--name=tessera-pos"], check=True)


@pytest.mark.engine
@pytest.mark.usefixtures("_cluster")
def test_a_job_at_its_time_limit_goes_on_to_the_same_weights(tmp_path):
    import torch

    from framework.config import compose, dump
    from framework.run import LAST, fit_folder

    settings = {
        "model.backbone.dim": 16,
        "model.backbone.pattern": "tnt*2",
        "model.backbone.drop_path": 0.2,
        "model.backbone.stem.word_dim": 4,
        "trainer": {"max_epochs": 15, "limit_train_batches": 3, "limit_val_batches": 1, "accelerator": "cpu"},
    }
    text = dump(compose([REPO / "experiments/base/tnt_digits.yaml"], settings))
    whole, warned = (tmp_path / "cell" / name for name in ("whole", "warned"))
    for folder in (whole, warned):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(text)
    numbers = []

    def watch(left) -> None:
        if not numbers and read_status(warned).epoch >= 2:
            # What SLURM sends before the limit. It measures time in minutes.
            numbers.append((warned / slurm.JOB).read_text())
            subprocess.run(["scancel", "--signal=USR2", numbers[0]], check=True)

    # Both as jobs: this process may have chosen other kernels.
    run([whole, warned], fit_folder, watch, retries=0)
    assert read_status(warned).state == "finished"
    assert (warned / slurm.JOB).read_text() == numbers[0], "it was submitted, not queued again"
    assert len(list((warned / ".lock").iterdir())) == 2
    one, two = (torch.load(folder / LAST, weights_only=True) for folder in (whole, warned))
    assert one["global_step"] == two["global_step"]
    assert all(torch.equal(value, two["state_dict"][key]) for key, value in one["state_dict"].items())


def meet(folder: Path) -> None:
    """Each rank says where it is; the first waits for the other."""
    rank = os.environ["SLURM_PROCID"]
    (folder / f"rank{rank}").write_text(os.environ["SLURMD_NODENAME"])
    while rank == "0" and not (folder / "rank1").exists():
        time.sleep(0.05)
    if rank == "0":
        write_status(folder, Status("finished"))


@pytest.mark.engine
@pytest.mark.usefixtures("_cluster")
def test_a_run_over_two_nodes_has_one_lock(tmp_path):
    from tests.test_slurm import meet  # by the name that a job can import

    folder = tmp_path / "cell" / "seed=0"
    folder.mkdir(parents=True)
    run([folder], meet, nodes=2)
    assert read_status(folder).state == "finished"
    assert {(folder / f"rank{rank}").read_text() for rank in (0, 1)} == {"n1", "n2"}
    assert len(list((folder / ".lock").iterdir())) == 1


def test_what_would_be_submitted_can_be_read_anywhere(tmp_path):
    options = {"partition": "gpu", "time": 90, "gpus": 2, "cpus": 8, "memory": "64G", "parallel": 3}
    more = {"options": {"account": "vision"}, "setup": ["module load cuda"]}
    folders = [tmp_path / "pos" / "cell" / f"seed={n}" for n in range(5)]
    text = Slurm(**options, **more).plan(folders)
    for line in (
        "#SBATCH --array=0-4%3",
        "#SBATCH --partition=gpu",
        "#SBATCH --time=90",
        "#SBATCH --gpus-per-node=2",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=64G",
        "#SBATCH --account=vision",
        "#SBATCH --requeue",
        "#SBATCH --job-name=tessera-pos",
        "module load cuda",
    ):
        assert line in text.splitlines()
    assert list(tmp_path.iterdir()) == []


class Controller:
    """A controller whose jobs do as `ends` says by folder; it does not answer `mute` questions."""

    folder = "."

    def __init__(self, ends: dict[Path, list[str]]) -> None:
        self.ends, self.mute, self.cancelled = ends, 0, ()

    def map_array(self, job, paths: list[Path], tasks) -> list[SimpleNamespace]:
        for path in paths:
            write_status(path, Status(self.ends[path].pop(0)))
        return [SimpleNamespace(job_id=path.name) for path in paths]

    def ask(self, *command: str) -> str:
        if self.mute:
            self.mute -= 1
            raise ConfigError("launcher Slurm: squeue: Unable to contact slurm controller")
        self.cancelled += command[1:] if command[0] == "scancel" else ()
        there = [path.name for path in self.ends if read_status(path).state == "running" and not self.cancelled]
        return " ".join(there) if command[0] == "squeue" else ""


@pytest.fixture
def controlled(tmp_path, monkeypatch):
    folders = [(tmp_path / "cell" / name) for name in ("long", "short")]
    for folder in folders:
        folder.mkdir(parents=True)
    controller = Controller({folders[0]: ["running"], folders[1]: ["failed", "finished"]})
    monkeypatch.setattr(slurm, "_ask", controller.ask)
    monkeypatch.setattr(slurm, "LOOK", 0.01)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(Slurm, "_executor", lambda self, folders: controller)
    return controller, *folders


def test_a_controller_that_is_silent_for_a_while_ends_no_study(controlled):
    controller, long, short = controlled
    silences: list[int] = []

    def watch(left) -> None:
        if read_status(short).state == "waiting" and not silences:
            silences.append(3)  # as it is to be tried again
            controller.mute = 3
        if read_status(short).state == "finished":
            write_status(long, Status("finished"))

    Slurm(retries=1).run([long, short], steps, watch)
    assert silences
    assert controller.mute == 0
    assert not any(controller.ends.values())
    assert not controller.cancelled


def test_a_study_is_stopped_beside_a_controller_that_is_silent_for_a_while(controlled, monkeypatch):
    controller, long, short = controlled

    def watch(left) -> None:
        raise KeyboardInterrupt

    def cancelled(*command: str) -> str:
        said = controller.ask(*command)
        controller.mute = 2 if command[0] == "scancel" else controller.mute
        return said

    monkeypatch.setattr(slurm, "_ask", cancelled)
    with pytest.raises(KeyboardInterrupt):
        Slurm(retries=0).run([long, short], steps, watch)
    assert controller.cancelled == ("long",)
    assert controller.mute == 0
    assert read_status(long).state == "interrupted"


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"launcher\.nodes: got 0; give at least 1"):
        Slurm(nodes=0)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="there is no sbatch here"):
        Slurm().run([tmp_path / "pos" / "cell" / "seed=0"], steps, lambda left: None)
    monkeypatch.setitem(sys.modules, "submitit.slurm.slurm", None)
    with pytest.raises(ConfigError, match="uv sync --extra slurm"):
        Slurm().plan([tmp_path])
