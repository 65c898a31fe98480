"""A checkpoint by itself, moved away from its run folder: every command works from it, or says in one line why not."""

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from framework import run as runs
from framework.ablation.state import read_status
from framework.checkpoints import KEY, document_of, kept_in, read_checkpoint
from framework.cli import main
from framework.commands import kept_document
from framework.config import compose, dump
from framework.errors import ConfigError
from tests.conftest import CONFIGS

EMA = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.8}}
OWN = """
from blocks.base import Block, Features, Site

class Doubled(Block):
    def __init__(self, site: Site) -> None:
        super().__init__()
        self.out = site.inp

    def forward(self, features: Features) -> Features:
        return features.replace(map=features.map * 2)
"""


@dataclass
class Run:
    """A finished run and a copy of its checkpoint elsewhere."""

    folder: Path
    alone: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, _tiny: dict[str, Any]) -> Run:
    root = tmp_path_factory.mktemp("alone")
    (root / "tiny.yaml").write_text(dump({**_tiny, "name": "tiny", "seed": 3}))
    assert main(["fit", "--config", str(root / "tiny.yaml"), "--runs", str(root / "runs")]) == 0
    (root / "tiny.yaml").unlink()
    (root / "elsewhere").mkdir()
    folder = root / "runs/tiny/0"
    alone = Path(shutil.copy(folder / runs.LAST, root / "elsewhere/net.ckpt"))
    return Run(folder, alone)


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str | Path) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return code, *capfd.readouterr()

    return run


def changed(checkpoint: Path, path: Path, **changes: Any) -> Path:
    """The checkpoint with other parts, in another file; None takes one away."""
    found = torch.load(checkpoint, weights_only=True) | changes
    torch.save({key: value for key, value in found.items() if value is not None}, path)
    return path


def test_it_holds_the_document_of_its_run(trained: Run) -> None:
    checkpoint = read_checkpoint(trained.alone)
    document = document_of(checkpoint, trained.alone)
    assert document == compose([trained.folder / "config.yaml"])
    assert (document["name"], document["seed"], set(document)) == (
        "tiny", 3, {"name", "seed", "model", "data", "trainer"}
    )  # fmt: skip
    kept = kept_in(checkpoint, trained.alone)
    assert kept is not None
    assert kept.class_names == [str(digit) for digit in range(10)]
    assert (kept.image.size, kept.image.channels, kept.interpolation) == (16, 1, "bilinear")


@pytest.mark.parametrize("command", ["validate", "test"])
def test_it_is_measured_as_in_its_folder(cli, trained: Run, command: str) -> None:
    words = [command, "--trainer.limit_test_batches=1.0"]
    code, before, _ = cli(*words, "--config", trained.folder / "config.yaml")
    assert code == 0
    code, after, err = cli(*words, "--ckpt_path", trained.alone)
    assert (code, err) == (0, "")
    assert after.splitlines()[1:] == before.splitlines()[1:]
    assert "acc1" in after


def test_it_is_described_as_its_config(cli, trained: Run) -> None:
    by_config = cli("describe", "--config", trained.folder / "config.yaml", "--json")
    assert cli("describe", "--ckpt_path", trained.alone, "--json") == by_config
    assert json.loads(by_config[1])["blocks"]


def test_fit_goes_on_in_a_new_folder(cli, trained: Run, tmp_path: Path) -> None:
    code, out, _ = cli("fit", "--ckpt_path", trained.alone, "--runs", tmp_path, "--trainer.max_epochs=2")
    assert (code, "after 2 epochs" in out) == (0, True)
    folder = tmp_path / "tiny/0"
    assert read_status(folder).epoch == 2
    there = shutil.copytree(trained.folder, tmp_path / "there")
    words = ["--ckpt_path", there / runs.LAST, "--runs", tmp_path / "none", "--trainer.max_epochs=2"]
    code, out, _ = cli("fit", *words)
    assert (code, (tmp_path / "none").exists()) == (0, False)
    assert f"run folder: {there}\n" in out
    assert read_status(there).epoch == 2
    one, two = (torch.load(f / runs.LAST, weights_only=True) for f in (folder, there))
    assert all(torch.equal(one["state_dict"][key], two["state_dict"][key]) for key in one["state_dict"])
    assert document_of(one, folder)["trainer"]["max_epochs"] == 2


def test_the_moving_average_is_what_was_validated(trained: Run, tiny, tmp_path: Path) -> None:
    document = tiny(trainer__callbacks=[EMA], trainer__limit_train_batches=3)
    tmp_path.joinpath("run").mkdir()
    runs.train(tmp_path / "run", document, bar=False)
    alone = Path(shutil.copy(tmp_path / "run" / runs.LAST, tmp_path / "net.ckpt"))
    checkpoint = read_checkpoint(alone)
    averaged, current = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert any(not torch.equal(averaged[key], current[key]) for key in averaged)
    saved = read_status(tmp_path / "run").metrics
    found = runs.evaluate(document_of(checkpoint, alone), alone, "validate")
    assert found["val/loss"] == saved["val/loss"]
    other = changed(alone, tmp_path / "other.ckpt", state_dict=current)
    assert runs.evaluate(document, other, "validate")["val/loss"] != saved["val/loss"]


@pytest.mark.parametrize("command", ["validate", "test", "predict", "fit", "describe", "export"])
def test_without_its_document_it_asks_for_a_config(cli, trained: Run, tmp_path: Path, command: str) -> None:
    path = changed(trained.alone, tmp_path / "old.ckpt", **{KEY: None})
    words = ["--out", tmp_path / "net.pt2"] if command == "export" else []
    code, _, err = cli(command, "--ckpt_path", path, *words)
    assert (code, err) == (2, f"error: --ckpt_path: {path} does not hold the config of its run; "
                              "give it: --config FILE\n")  # fmt: skip


def test_without_its_document_it_names_the_config_beside_it(cli, trained: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(trained.folder, tmp_path / "run")
    path = changed(trained.alone, folder / runs.LAST, **{KEY: None})
    code, _, err = cli("test", "--ckpt_path", path)
    assert (code, err.count("\n")) == (2, 1)
    assert f"--config {folder / 'config.yaml'}" in err
    assert cli("test", "--ckpt_path", path, "--config", folder / "config.yaml")[0] == 0


class Evil:
    """Pickled so that loading it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_hostile_or_damaged_one_is_one_line(cli, trained: Run, tmp_path: Path) -> None:
    whole = trained.alone.read_bytes()
    path = tmp_path / "x.ckpt"
    (tmp_path / "folder.ckpt").mkdir()
    kept = torch.load(trained.alone, weights_only=True)[KEY]
    contents: list[tuple[bytes | dict[str, Any], str]] = [
        (whole[: len(whole) // 2], "is no checkpoint of this program"),
        (b"", "is no checkpoint of this program"),
        (pickle.dumps(Evil(tmp_path / "made")), "is no checkpoint of this program"),
        ({"state_dict": None}, "is no checkpoint of this program"),
        ({"state_dict": 5}, "is no checkpoint of this program"),
        ({"state_dict": {"a": "b"}}, "is no checkpoint of this program"),
        ({KEY: 5}, "what it keeps of its run is damaged"),
        ({KEY: {**kept, "image": {"size": 3}, "more": 1}}, "what it keeps of its run is damaged"),
        ({KEY: {**kept, "config": None}}, "what it keeps of its run is damaged"),
        ({KEY: {**kept, "image": {"size": "x", "channels": 1}}}, "what it keeps of its run is damaged"),
        ({KEY: {**kept, "mean": ["x"]}}, "what it keeps of its run is damaged"),
        ({KEY: {**kept, "config": {"model": 3}}}, "model: "),
        ({KEY: {**kept, "config": {**kept["config"], "plugins": 3}}}, "what it keeps of its run is damaged"),
        ({KEY: {**kept, "config": {**kept["config"], "plugins": ["nope.mine"]}}}, "plugins: "),
        ({KEY: {**kept, "config": {**kept["config"], "modle": 3}}}, "did you mean 'model'?"),
    ]
    for content, says in contents:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save({**torch.load(trained.alone, weights_only=True), **content}, path)
        code, _, err = cli("test", "--ckpt_path", path)
        assert (code, err.count("\n"), says in err) == (2, 1, True), (says, err)
    assert not (tmp_path / "made").exists()
    assert "no such file" in cli("test", "--ckpt_path", tmp_path / "folder.ckpt")[2]


def test_weights_alone_do_not_go_on(cli, trained: Run, tmp_path: Path) -> None:
    path = changed(trained.alone, tmp_path / "weights.ckpt", optimizer_states=None)
    code, _, err = cli("fit", "--ckpt_path", path, "--runs", tmp_path, "--trainer.max_epochs=2")
    assert (code, err.count("\n")) == (2, 1)
    assert f"has no optimizer_states, so nothing goes on from it; start from its weights: --weights={path}" in err
    assert cli("test", "--ckpt_path", path)[0] == 0


def test_a_plug_in_that_is_gone_is_named_and_can_be_given(cli, trained: Run, tmp_path: Path) -> None:
    plugin = tmp_path / "tessera_doubled.py"
    plugin.write_text(OWN)
    own = ["--model.backbone.blocks.own=Doubled", "--model.backbone.pattern=tnt own"]
    words = ["--config", CONFIGS / "tnt.yaml", "--plugins", plugin, *own, "--runs", tmp_path / "runs"]
    assert cli("fit", *words)[0] == 0
    alone = str(shutil.copy(tmp_path / "runs/tnt/0" / runs.LAST, tmp_path / "net.ckpt"))
    assert cli("test", "--ckpt_path", alone)[0] == 0
    (tmp_path / "new").mkdir()
    anew = str(shutil.move(plugin, tmp_path / "new" / plugin.name))
    code, _, err = cli("test", "--ckpt_path", alone)
    assert (code, err) == (2, f"error: --ckpt_path: {alone} needs a plug-in that is gone: {plugin}; "
                              "name it: --plugins FILE\n")  # fmt: skip
    assert kept_document(alone, [anew])["plugins"] == []  # the new one is loaded in its place
    assert (
        compose([], {}, [], (alone, kept_document(alone, [anew])))["model"]
        == document_of(read_checkpoint(Path(alone)), Path(alone))["model"]
    )


def test_data_that_are_gone_are_one_line(trained: Run, tmp_path: Path) -> None:
    document = {**compose([trained.folder / "config.yaml"]), "data": {"class_path": "Npz", "init_args": {"path": "x"}}}
    with pytest.raises(ConfigError, match=r"data\.path: no file x"):
        runs.evaluate(document, trained.alone, "test")
