"""What the tests of engines share: a task that can be watched, launchers in programs of their own, two machines."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from framework.ablation.state import Status, read_status, write_status

REPO = Path(__file__).parent.parent


def wait(done: Callable[[], object], limit: float = 60) -> None:
    end = time.monotonic() + limit
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def steps(folder: Path) -> None:
    """Ten steps, each of which is kept; waits after the fifth while the study has a file `pause`."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    with (folder / "nodes").open("a") as nodes:
        nodes.write(os.environ.get("SLURMD_NODENAME", "") + "\n")
    try:
        while (done := read_status(folder).epoch) < 10:
            while done == 5 and (folder.parent.parent / "pause").exists():
                time.sleep(0.05)
            with (folder / "trained").open("a") as trained:
                trained.write("x")
            write_status(folder, Status("running", done + 1, 10))
    except KeyboardInterrupt:
        write_status(folder, Status("interrupted", read_status(folder).epoch, 10))
        raise
    score = (len(config["model"]["position"] + config["model"]["word"]) + config["seed"]) / 100
    write_status(folder, Status("finished", 10, 10, {"val/acc1": score}))


def races(folder: Path) -> None:
    """Eight epochs of one good run; the others come late, are bad, and stay at their first epoch until interrupted."""
    with (folder / "trained").open("a") as trained:
        trained.write("x")
    good = folder.parent.parent / "sentence=learned,word=learned" / folder.name
    if folder != good:
        wait(lambda: read_status(good).epoch >= 2)
        write_status(folder, Status("running", 1, 8, {"val/acc1": 0.1}))
        wait(lambda: False, 30)
    for epoch in range(1, 9):
        write_status(folder, Status("running", epoch, 8, {"val/acc1": 0.9}))
        time.sleep(1 if epoch == 1 else 0.1)
    write_status(folder, Status("finished", 8, 8, {"val/acc1": 0.9}))


PROGRAM = """
import sys
from pathlib import Path
from framework.ablation.launch import Local, Ray, Slurm, local, slurm
from framework.ablation.study import run_study
from tests.engines import steps
from tests.test_study import document, dump, measure, override

if __name__ == "__main__":
    local.PRELOAD, slurm.ASK, slurm.LOOK = [], 0.5, 0.2
    run_study(document(seeds=eval(sys.argv[3])), Path(sys.argv[1]), eval(sys.argv[2]), steps, override, measure, dump)
"""


class Launched:
    """A launcher of the study `pos` in a program of its own.

    Args:
        root: the folder of all studies.
        launcher: a Python expression.
        prefix: what the command begins with.
        pause: whether runs stop after five steps, until `go`.
        seeds: of the study, which has four cells.
    """

    def __init__(
        self, root: Path, launcher: str, prefix: Sequence[str] = (), pause: bool = False, seeds: Sequence[int] = (0, 1)
    ) -> None:
        self.study = root / "pos"
        self.runs = 4 * len(seeds)
        if pause:
            self.study.mkdir(parents=True)
            (self.study / "pause").touch()
        (root / "program.py").write_text(PROGRAM)
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(root / "program.py"), str(root), launcher, str(list(seeds))],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(REPO)},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def at_five(self) -> list[Path]:
        return [path.parent for path in self.study.glob("*/*/status.json") if read_status(path.parent).epoch == 5]

    def go(self) -> None:
        (self.study / "pause").unlink()

    def tables(self) -> list[str]:
        """What the study has come to, when it has ended well."""
        out, _ = self.process.communicate(timeout=90)
        assert self.process.returncode == 0, out
        assert [path.read_text() for path in self.study.glob("*/*/trained")] == ["x" * 10] * self.runs
        return [(self.study / name).read_text() for name in ("table.csv", "table.md")]


@contextmanager
def launchers() -> Iterator[Callable[..., Launched]]:
    """Gives what starts launchers; none of them is left at the end."""
    started: list[Launched] = []

    def start(*args, **kwargs) -> Launched:
        started.append(Launched(*args, **kwargs))
        return started[-1]

    try:
        yield start
    finally:
        for each in started:
            each.process.kill()
            each.process.communicate()


@dataclass
class Machine:
    """A network namespace: a machine, as far as networks go."""

    name: str
    address: str
    interface: str

    @property
    def prefix(self) -> list[str]:
        """What a command that runs in it begins with."""
        return ["ip", "netns", "exec", self.name]

    def kill(self) -> None:
        """Ends all its processes, as a power cut does."""
        pids = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True).stdout.split()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)


@contextmanager
def machines() -> Iterator[list[Machine]]:
    """Two machines with a cable between them; skips where the system gives none."""
    if not shutil.which("ip") or os.getuid() != 0:
        pytest.skip("network namespaces need root and ip")
    pid = os.getpid()
    pair = [Machine(f"tess{pid}{x}", f"10.{77 + pid % 100}.{pid // 100 % 250}.{n}", f"te{pid}{x}")
            for n, x in ((1, "a"), (2, "b"))]  # fmt: skip
    one, two = pair
    commands = [f"ip netns add {each.name}" for each in pair]
    commands.append(f"ip link add {one.interface} netns {one.name} type veth peer {two.interface} netns {two.name}")
    for each in pair:
        commands.append(f"ip -n {each.name} addr add {each.address}/24 dev {each.interface}")
        commands += [f"ip -n {each.name} link set {device} up" for device in ("lo", each.interface)]
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
        yield pair
    finally:
        for each in pair:
            each.kill()
            subprocess.run(["ip", "netns", "del", each.name], capture_output=True)
