"""Launchers on the command line: chosen by the config, shown by `--dry-run`, no part of a run's own config."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from framework.cli import main

STUDY = """
extends: {base}/experiments/base/tnt_digits.yaml
model: {{backbone: {{init_args: {{dim: 16, pattern: tnt*2}}}}}}
launcher: {{class_path: Local, init_args: {{processes: 2}}}}
ablation:
  name: tiny
  seeds: [0, 1]
  axes: {{position: {{none: {{model.backbone.position: NoPosition}}, learned: {{}}}}}}
"""


@pytest.fixture
def study(tmp_path) -> list[str]:
    (tmp_path / "study.yaml").write_text(STUDY.format(base=Path(__file__).parent.parent))
    return ["fit", "--config", str(tmp_path / "study.yaml"), "--runs", str(tmp_path / "runs")]


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ([], "4 runs here, 2 at a time"),
        (["--launcher.processes=1"], "4 runs here, 1 at a time"),
        (["--launcher=Slurm", "--launcher.partition=gpu", "--launcher.time", "30"], "#SBATCH --partition=gpu"),
        (["--launcher=Ray", "--launcher.cpus=2"], "4 tasks on a Ray of its own on this machine, each with 2 CPU"),
    ],
)
def test_a_dry_run_shows_what_would_be_started(study, tmp_path, capsys, options, shown):
    if "--launcher=Slurm" in options:
        pytest.importorskip("submitit")
    if "--launcher=Ray" in options:
        pytest.importorskip("ray")
    assert main([*study, "--dry-run", *options]) == 0
    assert shown in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--launcher=Slrum"], "launcher: unknown Launcher 'Slrum' (did you mean 'Slurm'?"),
        (["--launcher=Slurm", "--launcher.tim=3"], "launcher.tim: Slurm has no such argument (did you mean 'time'?"),
        (["--launcher.processes=-1"], "launcher.processes: got -1"),
    ],
)
def test_mistakes_are_one_line(study, capsys, options, error):
    assert main([*study, *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {error}")
    assert said.count("\n") == 1


def test_a_single_run_has_no_launcher(capsys):
    assert main(["fit", "--config", "experiments/base/tnt_digits.yaml", "--launcher=Slurm"]) == 2
    assert "this config has no ablation" in capsys.readouterr().err


def test_a_run_does_not_know_its_launcher(study, tmp_path, monkeypatch, capsys):
    def run(self, folders, task, watch):
        for folder in folders:
            assert "launcher" not in yaml.safe_load((folder / "config.yaml").read_text())

    for name in ("Local", "Ray"):
        monkeypatch.setattr(f"framework.ablation.launch.{name.lower()}.{name}.run", run)
        main([*study, f"--launcher={name}"])  # the second one finds the folder of the first
    assert "error" not in capsys.readouterr().err
