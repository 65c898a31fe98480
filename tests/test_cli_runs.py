"""The commands that train, and those that need a checkpoint."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from framework.cli import main
from framework.config import compose, dump
from tests.conftest import CONFIGS, Cli

TNT, NEXT_VIT, POS = CONFIGS / "tnt.yaml", CONFIGS / "pyramid.yaml", CONFIGS / "study.yaml"

# ---- fit and what follows


@dataclass
class Trained:
    """A run of `fit`: its folder and what was printed."""

    folder: Path
    out: str


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, _tiny: dict[str, Any]) -> Trained:
    import contextlib
    import io

    root = tmp_path_factory.mktemp("fit")
    (root / "tiny.yaml").write_text(dump({**_tiny, "name": "tiny"}))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["fit", "--config", str(root / "tiny.yaml"), "--runs", str(root / "runs")]) == 0
    return Trained(root / "runs/tiny/0", out.getvalue())


def test_fit_leaves_a_run_folder(trained: Trained) -> None:
    for name in ("config.yaml", "resolved.yaml", "status.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt"):
        assert (trained.folder / name).is_file(), name
    status = json.loads((trained.folder / "status.json").read_text())
    assert (status["state"], status["epoch"]) == ("finished", 1)
    assert {"val/acc1", "val/loss", "train/loss"} <= set(status["metrics"])
    for text in (f"run folder: {trained.folder}", "after 1 epochs", "val/acc1", "last.ckpt", "tensorboard --logdir"):
        assert text in trained.out


def test_fit_again_makes_a_new_folder(cli: Cli, trained: Trained) -> None:
    """From the run folder's own config.yaml, which gives the same weights."""
    runs = trained.folder.parent.parent
    assert cli("fit", "--config", trained.folder / "config.yaml", "--runs", runs).code == 0
    again = runs / "tiny/1"
    assert (again / "config.yaml").read_text() == (trained.folder / "config.yaml").read_text()
    first, second = (torch.load(f / "checkpoints/last.ckpt", weights_only=True) for f in (trained.folder, again))
    assert all(torch.equal(first["state_dict"][key], second["state_dict"][key]) for key in first["state_dict"])


def test_fit_goes_on_in_place(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    folder = tmp_path / "tiny/0"
    shutil.copytree(trained.folder, folder)
    words = ["--config", folder / "config.yaml", "--ckpt_path", folder / "checkpoints/last.ckpt", "--runs", tmp_path]
    before = json.loads((folder / "status.json").read_text())["metrics"]
    (folder / "status.json").write_text("")  # a disk that was full
    done = cli("fit", *words)
    assert "nothing left to train after 1 epochs" in done.out
    assert json.loads((folder / "status.json").read_text())["metrics"] == before
    more = cli("fit", *words, "--trainer.max_epochs=3")
    assert (more.code, "after 3 epochs" in more.out) == (0, True)
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == ["0"]
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["epoch"]) == ("finished", 3)
    assert yaml.safe_load((folder / "config.yaml").read_text())["trainer"]["max_epochs"] == 3
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 2


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (
            "data.batch_size=7",
            "was made with another config: data.batch_size: 64 → 7; start another run from its weights: --weights=",
        ),
        ("seed=7", "was made with another config: seed: 0 → 7"),
        ("model.optimizer=SGD", "was made with another config: model.optimizer: AdamW → SGD"),
        ("model.optimizer.lr=-1", "was made with another config: model.optimizer.lr: "),
        ("trainer.max_epochs=1", "trainer.max_epochs: got 1, but"),
    ],
)
def test_a_run_goes_on_as_the_one_that_it_was(
    cli: Cli, trained: Trained, tmp_path: Path, setting: str, says: str
) -> None:
    """And what it was stays written down."""
    folder = tmp_path / "tiny/0"
    shutil.copytree(trained.folder, folder)
    last = folder / "checkpoints/last.ckpt"
    if setting.startswith("trainer"):
        content = torch.load(last, weights_only=True)
        content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] = 2
        torch.save(content, last)
    files = [folder / name for name in ("config.yaml", "resolved.yaml", "status.json")]
    before = [path.read_text() for path in files]
    words = ["--config", folder / "config.yaml", "--ckpt_path", last, "--trainer.max_steps=99", f"--{setting}"]
    assert says in cli("fit", *words).error
    assert [path.read_text() for path in files] == before


@pytest.mark.filterwarnings("error:.*non-meta")
def test_a_run_starts_from_the_weights_of_another_without_a_word_too_much(
    cli: Cli, trained: Trained, tmp_path: Path
) -> None:
    words = ["--config", trained.folder / "config.yaml", "--weights", trained.folder / "checkpoints/best.ckpt"]
    assert cli("fit", *words, "--runs", tmp_path, "--dry-run").code == 0


@pytest.mark.parametrize("command", ["fit", "test", "validate", "predict"])
def test_a_checkpoint_of_another_net_is_one_line(cli: Cli, trained: Trained, command: str) -> None:
    last = trained.folder / "checkpoints/last.ckpt"
    words = ["--config", trained.folder / "config.yaml", "--ckpt_path", last, "--model.backbone.dim=32"]
    message = cli(command, *words).error
    assert f"--ckpt_path: {last} holds another net than the config" in message
    assert "backbone.stem." in message


@pytest.mark.parametrize("command", ["fit", "test"])
def test_a_damaged_checkpoint_is_one_line(cli: Cli, trained: Trained, tmp_path: Path, command: str) -> None:
    path = tmp_path / "half.ckpt"
    whole = (trained.folder / "checkpoints/last.ckpt").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"nothing like it"):
        path.write_bytes(content)
        message = cli(command, "--config", trained.folder / "config.yaml", "--ckpt_path", path).error
        assert f"--ckpt_path: {path} is no checkpoint of this program, or a damaged one" in message
    torch.save({"weights": 1}, path)
    assert "is no checkpoint" in cli(command, "--config", trained.folder / "config.yaml", "--ckpt_path", path).error


def test_a_missing_checkpoint_names_those_that_are_there(cli: Cli, trained: Trained) -> None:
    folder = trained.folder / "checkpoints"
    message = cli("test", "--config", TNT, "--ckpt_path", folder / "lst.ckpt").error
    assert f"there are {folder / 'best.ckpt'}, {folder / 'last.ckpt'}" in message


@pytest.mark.parametrize("command", ["validate", "test"])
def test_validate_and_test_measure_the_last_checkpoint(cli: Cli, trained: Trained, command: str) -> None:
    split = "val" if command == "validate" else "test"
    found = cli(command, "--config", trained.folder / "config.yaml")
    assert (found.code, found.err) == (0, "")
    assert "checkpoints/last.ckpt" in found.out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in found.out.splitlines() if "│" in line]
    values = {name: float(value) for name, value in cells}
    assert set(values) == {f"{split}/acc1", f"{split}/acc5", f"{split}/loss"}
    if command == "validate":
        saved = json.loads((trained.folder / "status.json").read_text())["metrics"]
        assert values == {name: float(f"{saved[name]:.4g}") for name in values}


def test_predict_writes_probabilities(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    found = cli("predict", "--config", trained.folder / "config.yaml", "--out", path)
    assert (found.code, found.out, found.err) == (0, f"300 images → {path}\n", "")
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["index", "label", "prediction", "confidence", *map(str, range(10))]
    assert [int(row[0]) for row in rows] == list(range(300))
    values = np.array([[float(p) for p in row[4:]] for row in rows])
    np.testing.assert_allclose(values.sum(1), 1, atol=1e-5)
    assert [int(row[2]) for row in rows] == values.argmax(1).tolist()
    np.testing.assert_array_equal([float(row[3]) for row in rows], values.max(1))


def test_predict_is_what_the_net_gives(cli: Cli, trained: Trained, tmp_path: Path) -> None:
    from framework.construct import Workbench, complete
    from framework.tasks import Classification

    path = tmp_path / "p.csv"
    cli("predict", "--config", trained.folder / "config.yaml", "--out", path)
    data = Workbench(complete(compose([trained.folder / "config.yaml"]))).make_data()
    model = Classification.load_from_checkpoint(trained.folder / "checkpoints/last.ckpt").eval()
    images, _ = next(iter(data.test_dataloader()))
    with torch.no_grad():
        want = model(images[:5]).softmax(1)
    rows = list(csv.reader(path.open(newline="")))[1:6]
    np.testing.assert_allclose([[float(p) for p in row[4:]] for row in rows], want.numpy(), atol=2e-6)


def test_predict_needs_a_folder_to_write_to(cli: Cli, trained: Trained) -> None:
    config = trained.folder / "config.yaml"
    assert "--out: no such folder: /nowhere" in cli("predict", "--config", config, "--out", "/nowhere/p.csv").error
    assert "Is a directory" in cli("predict", "--config", config, "--out", trained.folder).error
