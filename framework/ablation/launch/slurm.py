"""Runs as jobs of a SLURM cluster, submitted by submitit as one job array."""

from __future__ import annotations

import getpass
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from framework.ablation.launch.base import Ended, Launcher
from framework.ablation.launch.work import (
    LOG,
    REPO,
    SKIPPED,
    Task,
    interruptible,
    last_error,
    log_size,
    log_to,
    work,
)
from framework.ablation.lock import held
from framework.ablation.state import read_status, write_text
from framework.errors import ConfigError

# Seconds between two questions to the controller, which serves the whole cluster.
ASK = 10.0

# Seconds between two looks at the statuses, which lie on a shared disk.
LOOK = 2.0

# Seconds that a job has before its time limit to write its checkpoint and to be queued again.
WARNING = 90

JOB = "job.txt"  # in a run folder: the job that was submitted for it last


class Slurm(Launcher):
    """Each run as a job of a SLURM cluster, whose nodes share the run folders and this program's folder.

    A job that reaches its time limit, or is pre-empted, is queued again and goes on from its last checkpoint. Jobs go
    on when the launcher is killed; the same command finds them again. Ctrl-C cancels them.

    Args:
        partition: of the cluster; empty: the default one.
        time: limit of one job in minutes; a run that needs longer takes several jobs.
        gpus: of each node.
        cpus: of each task.
        nodes: of one run.
        tasks_per_node: processes of a run on each node; the trainer's `devices` must be the same.
        memory: of each node, such as 16G; empty: the partition's default.
        parallel: how many jobs at a time; 0: as many as the cluster starts.
        options: further options of sbatch, such as {account: vision, constraint: a100}.
        setup: shell commands before the run, such as [module load cuda].
        retries: how often a failed run is tried again.
    """

    def __init__(
        self,
        partition: str = "",
        time: int = 60,
        gpus: int = 0,
        cpus: int = 1,
        nodes: int = 1,
        tasks_per_node: int = 1,
        memory: str = "",
        parallel: int = 0,
        options: dict[str, Any] = {},  # noqa: B006 (read only)
        setup: list[str] = [],  # noqa: B006
        retries: int = 1,
    ) -> None:
        super().__init__(retries)
        for name, value, least in (
            ("time", time, 5),  # the warning comes up to 150 s before the limit
            ("gpus", gpus, 0),
            ("cpus", cpus, 1),
            ("nodes", nodes, 1),
            ("tasks_per_node", tasks_per_node, 1),
            ("parallel", parallel, 0),
        ):
            if value < least:
                raise ConfigError(f"launcher.{name}: got {value}; give at least {least}")
        path = shlex.quote(str(REPO)) + '"${PYTHONPATH:+:$PYTHONPATH}"'
        self.parameters: dict[str, Any] = {
            "time": time,
            "nodes": nodes,
            "ntasks_per_node": tasks_per_node,
            "cpus_per_task": cpus,
            "signal_delay_s": WARNING,
            "stderr_to_stdout": True,
            # One rank that dies ends the others, which would wait for it.
            "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}"],
            "setup": [
                *setup,
                f"export PYTHONPATH={path} OMP_NUM_THREADS={cpus}",
            ],
            "additional_parameters": {"requeue": True, **({"mem": memory} if memory else {}), **options},
        }
        if partition:
            self.parameters["partition"] = partition
        if gpus:
            self.parameters["gpus_per_node"] = gpus
        self.parallel = parallel

    def plan(self, folders: list[Path]) -> str:
        executor = self._executor(folders)
        executor.parameters["map_count"] = len(folders)
        return executor._make_submission_file_text(executor._submitit_command_str, "")

    def _executor(self, folders: list[Path]) -> Any:
        try:
            from submitit.slurm.slurm import SlurmExecutor
        except ImportError:
            raise ConfigError("launcher Slurm needs submitit: uv sync --extra slurm") from None

        class Executor(SlurmExecutor):
            @classmethod
            def affinity(cls) -> int:
                return 2  # also where there is no SLURM, to show what would be submitted

        study = folders[0].absolute().parents[1]  # <study>/<cell>/seed=<n>
        executor = Executor(study / "slurm")
        parallel = self.parallel or len(folders)
        executor.update_parameters(job_name=f"tessera-{study.name}", array_parallelism=parallel, **self.parameters)
        return executor

    @contextmanager
    def session(self, folders: list[Path], task: Task) -> Iterator[None]:
        self.executor = self._executor(folders)
        if not shutil.which("sbatch"):
            raise ConfigError("launcher Slurm: there is no sbatch here; start it on a login node of the cluster")
        found = re.search(r"MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config"))
        self.most = int(found[1]) - 1 if found else 1000
        self.task = task
        self.jobs: dict[Path, _Job] = {}
        self.refused: Ended = []
        self.next = 0.0
        yield

    def room(self) -> int:
        return self.most

    def start(self, folders: list[Path]) -> None:
        try:
            queued = set(_queued())
        except ConfigError:
            if not self.jobs:
                raise
            self.refused = [(folder, None) for folder in folders]  # the jobs go on, and these come later
            return
        new = []
        for folder in folders:
            # Of a launcher that was killed, or of another one.
            number = (folder / JOB).read_text().strip() if (folder / JOB).exists() else ""
            if number in queued:
                self.jobs[folder] = _Job(number, log_size(folder), own=False)
            else:
                new.append(folder)
        if not new:
            return
        paths = [folder.absolute() for folder in new]
        try:
            made = self.executor.map_array(_job, paths, [self.task] * len(paths))
        except Exception as error:  # what sbatch says, in one of submitit's several classes
            said = f"sbatch refuses: {' '.join(str(error).split())[:300]}"
            if not self.jobs:
                raise ConfigError(f"launcher Slurm: {said}") from error
            self.refused = [(folder, said) for folder in new]  # the other jobs go on
            return
        for folder, job in zip(new, made, strict=True):
            self.jobs[folder] = _Job(job.job_id, log_size(folder))
            write_text(folder / JOB, job.job_id)

    def poll(self) -> Ended:
        time.sleep(LOOK)
        # The folder knows it first. What is interrupted may have been queued again.
        over = [f for f in self.jobs if read_status(f).state in ("finished", "failed", "stopped") and not held(f)]
        ended = self.refused + [(folder, "") for folder in over]
        self.refused = []
        for folder in over:
            del self.jobs[folder]
        if self.jobs and time.monotonic() >= self.next:
            with suppress(ConfigError):  # a controller that does not answer may do so later
                ended += self._gone()
            self.next = time.monotonic() + ASK
        return ended

    def _gone(self) -> Ended:
        """The runs whose jobs are in the queue no more."""
        queued = set(_queued())
        gone = {folder: job for folder, job in self.jobs.items() if job.number not in queued}
        for folder in gone:
            del self.jobs[folder]
        return [(folder, self._how(folder, job)) for folder, job in gone.items()]

    def _how(self, folder: Path, job: _Job) -> str | None:
        try:
            shown = _ask("scontrol", "--oneliner", "show", "job", job.number)
        except ConfigError:  # SLURM forgets after some minutes, sooner than sacct, which not every cluster has
            shown = ""
        state, code = (re.search(rf"\b{key}=(\S+)", shown) for key in ("JobState", "ExitCode"))
        if code and code[1] == f"{SKIPPED}:0":
            return None
        how = f"job {job.number} ended as {state[1]}" if state else f"job {job.number} ended without a result"
        # What goes wrong before the run begins is in the job's own log.
        early = Path(self.executor.folder, f"{job.number}_0_log.out")
        return how + (last_error(folder / LOG, job.log_start) or f"{last_error(early)}, see {early}")

    def stop(self) -> Ended:
        """Cancels the jobs of this launcher, and waits until they have ended or until a second Ctrl-C."""
        own = {folder: job for folder, job in self.jobs.items() if job.own}
        if len(own) < len(self.jobs):
            print(f"{len(self.jobs) - len(own)} job(s) of another launcher go on; see squeue --me", file=sys.stderr)
        self.jobs = own
        if not own:
            return []
        print(f"cancelling {len(own)} job(s), those that run leave a checkpoint", file=sys.stderr)
        if numbers := {job.number for job in own.values()} & set(_queued()):
            _ask("scancel", *numbers)
        ended: Ended = []
        with suppress(KeyboardInterrupt):
            while self.jobs:
                with suppress(ConfigError):
                    ended += self._gone()
                time.sleep(0.5)
        return ended


@dataclass
class _Job:
    """A job in SLURM's queue.

    Args:
        number: SLURM's name of it, such as 12_3.
        log_start: where its part of the run's log begins.
        own: whether this launcher has submitted it.
    """

    number: str
    log_start: int
    own: bool = True


def _ask(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ConfigError(f"launcher Slurm: {' '.join(command[:3])}: {said[-1]}")
    return done.stdout


def _queued() -> list[str]:
    """The jobs of this user that wait, run or are about to end."""
    return _ask("squeue", "--noheader", "--array", f"--user={getpass.getuser()}", "--format=%i").split()


def _job(folder: Path, task: Task) -> None:
    """The process of one run, or of one of its ranks."""
    env = os.environ
    rank = int(env.get("SLURM_PROCID", 0))
    # A job that is queued again keeps its number.
    job = f"{env['SLURM_JOB_ID']}.{env.get('SLURM_RESTART_COUNT', 0)}"
    again = False

    def warn(number: int, frame: FrameType | None) -> None:
        nonlocal again
        again = True
        signal.raise_signal(signal.SIGINT)  # as Ctrl-C, which the training may handle by itself

    log_to(folder)
    interruptible()
    signal.signal(signal.SIGUSR2, warn)  # in place of submitit's, which would leave no checkpoint
    try:
        if not work(folder, task, job, rank):
            sys.exit(SKIPPED)
    except KeyboardInterrupt:
        if rank:
            return  # without an error, for which the first rank would be killed while it writes
        if not again:
            raise
        array = env.get("SLURM_ARRAY_JOB_ID")
        number = f"{array}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"]
        _ask("scontrol", "requeue", number)
