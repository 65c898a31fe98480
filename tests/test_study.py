"""Studies: the cells of a config, the folder that is their state, and a program that is stopped in all ways.

Processes are real ones; what they run is trivial, and config and measuring are stand-ins, so that no torch is loaded.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from framework.ablation.grid import cells
from framework.ablation.launch import local
from framework.ablation.launch.local import Local
from framework.ablation.state import Status, read_status, read_study, write_status
from framework.ablation.study import plan, run_study
from framework.ablation.view import Progress, Run
from framework.commands.run import begin
from framework.errors import ConfigError
from tests.studies import document, dump, measure, override, prepared

REPO = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _nothing_heavy(monkeypatch):
    monkeypatch.setattr(local, "PRELOAD", [])


def study(root, launcher, task, **changes):
    return run_study(document(**changes), root, launcher, task, override, measure, dump)


# Whole studies


def train(folder):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    write_status(folder, Status("running"))
    broken = folder.parent.parent / "broken"
    if broken.exists() and config["seed"] == 1 and config["model"]["position"] == "LearnedPosition":
        raise ValueError("broken")
    with (folder / "trained").open("a") as count:
        count.write("x")
    write_status(folder, Status("finished", metrics={"val/acc1": 0.5 + config["seed"] / 10}, measures={"seconds": 3}))


def test_a_second_run_does_what_is_left(tmp_path, capfd):
    (tmp_path / "pos").mkdir()
    (tmp_path / "pos" / "broken").touch()
    folder = study(tmp_path, Local(2), train)
    assert folder == tmp_path / "pos"
    out = capfd.readouterr().out
    assert "pos: 8 runs (4 cells × 2 seeds), 0 of them finished" in out
    assert "sentence=none,word=learned seed=0  val/acc1 0.5  3 s" in out
    assert "sentence=learned,word=none seed=1  failed: ValueError: broken (test_study.py, line" in out
    assert "[1/8] " in out
    assert "[8/8] " in out
    assert str(folder / "table.md") in out
    written = {path.name for path in folder.iterdir()}
    assert written >= {"table.md", "table.csv", "table.tex", "table.html", "figure.png"}

    (folder / "broken").unlink()
    study(tmp_path, Local(2), train)
    out = capfd.readouterr().out
    assert "pos: 8 runs (4 cells × 2 seeds), 6 of them finished" in out
    assert "[7/8] " in out
    assert "[6/8] " not in out
    assert [path.read_text() for path in folder.glob("*/*/trained")] == ["x"] * 8

    class Never:
        def run(self, folders, task, watch):
            raise AssertionError("nothing is left to run")

    study(tmp_path, Never(), train)


def test_a_failure_that_is_tried_again_is_not_counted_as_done(tmp_path):
    runs = [Run("word=a", seed, tmp_path / str(seed)) for seed in (0, 1, 2)]
    for run, state in zip(runs, ("finished", "failed", "failed"), strict=True):
        run.folder.mkdir()
        write_status(run.folder, Status(state, error="of an earlier launcher"))
    left = [run.folder for run in runs[1:]]
    progress = Progress(runs, "acc", left)
    assert list(progress.refresh(left)) == []
    write_status(runs[1].folder, Status("finished", metrics={"acc": 0.5}))
    lines = [progress.line(run) for run in progress.refresh(left[1:])]
    assert lines == ["[2/3] word=a seed=1  acc 0.5"]
    lines = [progress.line(run) for run in progress.refresh()]
    assert lines == [f"[3/3] word=a seed=2  failed: of an earlier launcher  {left[1]}/log.txt"]


def test_a_plan_makes_nothing(tmp_path, capsys):
    left = plan(document(), tmp_path, override, measure, dump)
    assert len(left) == 8
    assert left[1] == tmp_path / "pos/sentence=none,word=none/seed=1"
    out = capsys.readouterr().out
    assert "8 runs (4 cells × 2 seeds), 0 of them finished" in out
    assert "8.0K" in out
    assert "2.0M" in out
    assert list(tmp_path.iterdir()) == []


def test_a_plan_counts_states_and_says_what_is_left_will_take(tmp_path, capsys):
    folders = prepared(tmp_path / "pos")
    write_status(folders[0], Status("finished"))
    write_status(folders[3], Status("failed"))
    asked = []

    def expect(left):
        asked.extend(run.folder for run in left)
        return "expected: an hour"

    left = plan(document(), tmp_path, override, measure, dump, expect=expect)
    assert left == folders[1:]
    assert asked == [str(folder.relative_to(tmp_path / "pos")) for folder in left]
    out = capsys.readouterr().out
    assert "1 waiting, 1 finished" in out
    assert "1 waiting, 1 failed" in out
    assert out.count("2 waiting") == 2
    assert "expected: an hour" in out


def test_only_some_cells_are_planned_and_run_but_all_are_kept(tmp_path, capfd):
    built = []

    def counted(document):
        built.append(document["model"])
        return measure(document)

    assert len(plan(document(), tmp_path, override, counted, dump, only=["word=learned"])) == 4
    assert len(built) == 2
    assert "4 runs (2 cells × 2 seeds)" in capfd.readouterr().out
    with pytest.raises(ConfigError, match="--only: there is no axis 'wrd'"):
        plan(document(), tmp_path, override, counted, dump, only=["wrd=learned"])
    gated = {"when": {"word": {"sentence": ["learned"]}}}
    with pytest.raises(ConfigError, match="--only sentence=none --only word=none: the study has no such cell"):
        plan(document(**gated), tmp_path, override, counted, dump, only=["sentence=none", "word=none"])

    only = ["word=learned", "sentence=none"]
    folder = run_study(document(), tmp_path, Local(2), train, override, measure, dump, only)
    assert [path.parent.parent.name for path in folder.glob("*/*/trained")] == ["sentence=none,word=learned"] * 2
    assert len(read_study(folder)["cells"]) == 4
    assert len(list(folder.glob("*/*/config.yaml"))) == 8
    out = capfd.readouterr().out
    assert "2 runs (1 cells × 2 seeds)" in out
    assert "[2/2] " in out
    assert (folder / "table.md").read_text().count("\n| ") == 2 + 4  # all cells of the study


def test_thousands_of_runs_are_prepared_and_found_again(tmp_path):
    from framework.config import dump as whole

    axes = {"dim": {str(i): {"model.dim": i} for i in range(400)}}
    folders = prepared(tmp_path, axes=axes, baseline={"dim": "0"}, seeds=list(range(5)), dump=whole)
    assert len(folders) == 2000
    assert prepared(tmp_path, axes=axes, baseline={"dim": "0"}, seeds=list(range(5)), dump=whole) == folders


def test_a_net_that_cannot_be_built_names_its_cell(tmp_path, monkeypatch):
    class BuildError(ValueError):
        pass

    monkeypatch.setitem(sys.modules, "blocks.base", SimpleNamespace(BuildError=BuildError))
    built = []

    def fails(document):
        built.append(document["seed"])
        if document["model"]["position"] == "LearnedPosition":
            raise BuildError("model.dim: does not fit")
        return measure(document)

    with pytest.raises(ConfigError, match=r"^cell learned/none: model\.dim: does not fit$"):
        run_study(document(), tmp_path, Local(), train, override, fails, dump)
    assert built == [0, 0, 0]
    assert list(tmp_path.iterdir()) == []


# A study in a program of its own, that is stopped in all ways

PROGRAM = """
import sys, time
from pathlib import Path
from framework.ablation.launch import local
from framework.ablation.state import Status, write_status
from framework.ablation.study import run_study
from tests.test_study import document, dump, measure, override

def task(folder):
    pause = folder.parent.parent / "pause"
    write_status(folder, Status("running", epoch=1))
    (folder / "begun").touch()
    try:
        while pause.exists():
            time.sleep(0.05)
    except KeyboardInterrupt:
        time.sleep(60 if (folder.parent.parent / "stubborn").exists() else 0.3)
        write_status(folder, Status("interrupted", epoch=1))
        raise
    write_status(folder, Status("finished", epoch=2, metrics={"val/acc1": 0.5}))

if __name__ == "__main__":
    local.PRELOAD = ["tests.test_study"]
    run_study(document(), Path(sys.argv[1]), local.Local(2), task, override, measure, dump)
"""


class Program:
    """The program in a session of its own, as a terminal gives it, and all processes that belong to it."""

    def __init__(self, root: Path) -> None:
        self.study = root / "pos"
        (root / "cli.py").write_text(PROGRAM)
        self.process = subprocess.Popen(
            [sys.executable, str(root / "cli.py"), str(root)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(REPO)},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def states(self) -> list[str]:
        folders = [
            self.study / cell["folder"] / f"seed={n}" for cell in read_study(self.study)["cells"] for n in (0, 1)
        ]
        return [read_status(folder).state for folder in folders]

    def wait(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
        while not done():
            assert time.monotonic() < end
            time.sleep(0.05)

    def begun(self, count: int) -> None:
        self.wait(lambda: len(list(self.study.glob("*/*/begun"))) == count)

    def gone(self) -> bool:
        return not any(self._belongs(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdigit())

    def _belongs(self, pid: int) -> bool:
        try:
            state, _, _, session, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return False
        return int(session) == self.process.pid and state != "Z"


@pytest.fixture
def program(tmp_path):
    (tmp_path / "pos").mkdir()
    (tmp_path / "pos" / "pause").touch()
    started = []

    def start():
        started.append(Program(tmp_path))
        return started[-1]

    yield start
    (tmp_path / "pos" / "pause").unlink(missing_ok=True)
    for each in started:
        each.process.kill()
        each.process.communicate()


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")


@linux
@pytest.mark.parametrize("how", ["ctrl-c", "terminate"])
def test_an_interrupt_reaches_the_runs_and_ends_them(program, how):
    first = program()
    first.begun(2)
    if how == "ctrl-c":  # a terminal sends it to the whole foreground group
        os.killpg(first.process.pid, signal.SIGINT)
    else:
        first.process.terminate()
    out, _ = first.process.communicate(timeout=20)
    assert first.process.returncode != 0
    assert "stopping 2 run(s)" in out
    assert "stopped with 0 of 8 runs finished; the same command goes on" in out
    assert out.rstrip().endswith("KeyboardInterrupt")
    assert first.states() == ["interrupted"] * 2 + ["waiting"] * 6
    first.wait(first.gone)


@linux
def test_a_second_interrupt_kills(program, tmp_path):
    (tmp_path / "pos" / "stubborn").touch()
    first = program()
    first.begun(2)
    first.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert first.process.poll() is None
    first.process.send_signal(signal.SIGINT)
    first.process.communicate(timeout=10)
    assert first.states() == ["interrupted"] * 2 + ["waiting"] * 6
    first.wait(first.gone)


@linux
def test_a_killed_study_goes_on_where_it_was(program, tmp_path):
    first = program()
    first.begun(2)
    first.process.kill()
    first.process.wait()
    # The same command at once: its runs wait until the old ones, which have lost their launcher, have ended.
    second = program()
    (tmp_path / "pos" / "pause").unlink()
    out, _ = second.process.communicate(timeout=20)
    assert second.process.returncode == 0, out
    assert second.states() == ["finished"] * 8
    first.wait(first.gone)
    second.wait(second.gone)
    assert json.loads((tmp_path / "pos" / "study.json").read_text())["name"] == "pos"


# The server


@pytest.mark.parametrize(
    ("text", "settings", "dry", "expected"),
    [
        ("ablation: {}", {}, False, 1),
        ("model: {}\nablation: {}", {"launcher": "Local", "launcher.processes": "2"}, False, 1),
        ("model: {}", {}, False, 0),
        ("ablation: {}", {}, True, 0),
        ("ablation: {}", {"launcher": "Slurm"}, False, 0),
        ("ablation: {}\nlauncher: Slurm", {}, False, 0),
    ],
)
def test_the_server_starts_before_the_config_is_read(tmp_path, monkeypatch, text, settings, dry, expected):
    started = []
    monkeypatch.setattr(local, "start_server", lambda: started.append(1))
    path = tmp_path / "study.yaml"
    path.write_text(text)
    begin(SimpleNamespace(config=[str(tmp_path / "none.yaml"), str(path)], settings=settings, dry_run=dry))
    begin(SimpleNamespace(config=None, settings=settings, dry_run=dry))
    assert len(started) == expected


# Many nets


def costs_by_process(document):
    if document["model"]["word"] == "LearnedPosition" and document["model"]["dim"] == 9:
        raise ConfigError("model.word: does not fit")
    return {"params": os.getpid(), "macs": document["model"]["dim"]}


def test_many_nets_are_built_in_several_processes_and_in_order(monkeypatch):
    from framework.ablation import study as module

    monkeypatch.setattr(module, "POOL_FROM", 2)
    runs = cells(document(), override)
    found = module._measure(runs, costs_by_process)
    assert list(found) == list(dict.fromkeys(run.group for run in runs))
    assert all(cost["params"] != os.getpid() for cost in found.values())
    made = document()
    made["model"]["dim"] = 9
    with pytest.raises(ConfigError, match=r"^cell none/learned: model.word: does not fit$"):
        module._measure(cells(made, override), costs_by_process)
