"""The command line: what each command prints, and that a mistake is one line which tells how to mend it."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from framework.cli import main
from framework.config import compose, dump
from tests.conftest import CONFIGS, EXPERIMENTS, REPO

TNT, NEXT_VIT, POS = CONFIGS / "tnt.yaml", CONFIGS / "pyramid.yaml", CONFIGS / "study.yaml"
RESNET = EXPERIMENTS / "zoo/timm_resnet50.yaml"


@dataclass
class Result:
    """What a command ended with."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a mistake."""
        assert self.code == 2, f"exit code {self.code}: {self.out}"
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in lines[0] + self.out
        assert len(lines[0]) < 500
        return lines[0]


Cli = Callable[..., Result]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    def run(*words: str | Path) -> Result:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture
def tiny_file(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny(name="tiny")))
    return path


# ---- mistakes

MISTAKES: dict[str, tuple[str, list[Any], list[str]]] = {
    "misspelt block": ("describe", [TNT, "--model.backbone.blocks.tnt=TMT"],
        ["model.backbone.blocks.tnt: ", "'TMT'", "did you mean 'TNT'?"]),
    "misspelt stem": ("describe", [TNT, "--model.backbone.stem=SentenceSteam"],
        ["model.backbone.stem: ", "did you mean 'SentenceStem'?"]),
    "misspelt argument": ("describe", [TNT, "--model.backbone.dmi=96"],
        ["model.backbone.dmi: Isotropic ", "did you mean 'dim'?"]),
    "misspelt argument in a stage": ("describe", [NEXT_VIT, "--model.backbone.stages.s3.strid=1"],
        ["model.backbone.stages.s3.strid: Stage ", "did you mean 'stride'?"]),
    "misspelt argument of a stage's block": ("describe", [NEXT_VIT, "--model.backbone.stages.s3.blocks.ntb.sr_rati=1"],
        ["model.backbone.stages.s3.blocks.ntb.sr_rati: NTB ", "did you mean 'sr_ratio'?"]),
    "misspelt argument in a slot": ("describe", [TNT, "--model.backbone.blocks.tnt.inner.mixer.hads=2"],
        ["model.backbone.blocks.tnt.inner.mixer.hads: Attention ", "did you mean 'heads'?"]),
    "misspelt section": ("describe", [TNT, "--modle.backbone.dim=96"], ["did you mean --model.backbone.dim?"]),
    "unknown pattern name": ("describe", [NEXT_VIT, "--model.backbone.stages.s3.pattern=ncb*3 nbt"],
        ["model.backbone.stages.s3.pattern: ", "'nbt'", "did you mean 'ntb'?", "column 7 of 'ncb*3 nbt'"]),
    "open group": ("describe", [TNT, "--model.backbone.pattern=(tnt*2"], ["model.backbone.pattern: '('", "column 1"]),
    "wrong type": ("describe", [TNT, "--model.backbone.dim=wide"],
        ["model.backbone.dim: expected a whole number, got 'wide'"]),
    "negative width": ("describe", [TNT, "--model.backbone.dim=-4"],
        ["model.backbone.dim: got -4, must be at least 1"]),
    "width and heads": ("describe", [TNT, "--model.backbone.blocks.tnt.outer.mixer.heads=5"],
        ["model.backbone.blocks.tnt.outer.mixer: ", "cannot split width", "heads: 5", "near values that fit: "]),
    "missing words": ("describe", [TNT, "--model.backbone.stem=PatchStem", "--model.backbone.stem.patch=2"],
        ["model.backbone.blocks.tnt: TNT needs words", "stem: SentenceStem", "MakeWords"]),
    "image and patch": ("describe", [TNT, "--data.size=30", "--model.backbone.stem.patch=4"],
        ["model.backbone.stem: SentenceStem", "30×30", "patches of 4", "28 or 32"]),
    "head without token": ("describe", [NEXT_VIT, "--model.head=ClassTokenHead"],
        ["model.head: ClassTokenHead", "ClassToken", "AveragePoolHead"]),
    "dropout rate": ("describe", [NEXT_VIT, "--model.head.drop=1.5"],
        ["model: ValueError: dropout", "heads.py, line "]),
    "drop path": ("describe", [NEXT_VIT, "--model.backbone.drop_path=1.5"], ["model.backbone.drop_path: got 1.5"]),
    "missing file": ("describe", [TNT.with_name("tnnt.yaml")],
        ["tnnt.yaml: no such file", "did you mean", "tests/configs/tnt.yaml?"]),
    "folder": ("describe", [EXPERIMENTS], ["is a folder, not a file"]),
    "no config": ("describe", [], ["name a config, for example --config experiments/"]),
    "no model": ("describe", [EXPERIMENTS / "base/imagenet.yaml"], ["model: is missing"]),
    "unknown option": ("describe", [TNT, "--jsn"], ["--jsn", "did you mean --json?"]),
    "unknown word": ("describe", [TNT, "json"], ["unexpected 'json'"]),
    "option without value": ("describe", [TNT, "--model.backbone.dim"], ["--model.backbone.dim needs a value"]),
    "option before another": ("describe", [TNT, "--name", "--seed=1"], ["--name needs a value: --name=…"]),
    "option twice": ("describe", [TNT, "--seed=1", "--seed", "2"], ["--seed is given twice"]),
    "unreadable value": ("describe", [TNT, "--model.backbone={a: 1"], ["--model.backbone: not readable as YAML"]),
    "unknown command": ("descrbe", [], ["'descrbe'", "did you mean 'describe'?"]),
    "unknown timm model": ("describe", [RESNET, "--model.backbone.name=resnet5o"],
        ["model.backbone.name: ", "did you mean 'resnet50'?"]),
    "timm's arguments": ("describe", [RESNET, "--model.backbone.args={foo: 1}"], ["model.backbone: timm", "'foo'"]),
    "unknown data set name": ("describe", [RESNET, "--data.dataset=ImageNot"],
        ["data.dataset: ", "'ImageNot'", "did you mean 'ImageNet'?"]),
    "unknown data module": ("describe", [TNT, "--data=Digit"], ["data: unknown ImageData", "did you mean 'Digits'?"]),
    "timm's arguments that are ours": ("describe", [RESNET, "--model.backbone.args={num_classes: 5}"],
        ["model.backbone.args: num_classes is not set here"]),
    "optimizer's value": ("fit", [TNT, "--model.optimizer.lr=-1", "--trainer.fast_dev_run=true"],
        ["model.optimizer: Invalid learning rate: -1.0"]),
    "name of many classes": (
        "describe", [TNT, "--model.backbone.stem={class_path: FromModule, init_args: {module: Linear}}"],
        ["model.backbone.stem.module: 'Linear' means several classes", "torch.nn.modules.linear.Linear", "…"]),
    "data argument": ("describe", [TNT, "--data.size=0"], ["data.size: got 0, must be at least 1"]),
    "missing plug-in": ("describe", [TNT, "--plugins", "nope.py"], ["plugins: no such file: nope.py"]),
    "unknown class": ("blocks", ["NTP"], ["no class 'NTP' (did you mean 'NTB'?)"]),
    "unknown trainer argument": ("fit", [TNT, "--trainer.max_epoch=1"],
        ["trainer.max_epoch: Trainer ", "did you mean 'max_epochs'?"]),
    "wrong trainer type": ("fit", [TNT, "--trainer.max_epochs=many"], ["trainer.max_epochs: expected", "'many'"]),
    "wrong trainer value": ("fit", [TNT, "--trainer.accelerator=gpux"], ["trainer: ", "'gpux'", "cpu"]),
    "wrong trainer value of its own kind": ("fit", [TNT, "--trainer.val_check_interval=x"], ["trainer: ", "'x'"]),
    "no length": ("fit", [EXPERIMENTS / "zoo/deit_ti.yaml", "--trainer.max_epochs=null"],
        ["trainer.max_epochs: nothing says how long to train"]),
    "data files missing": ("fit", [EXPERIMENTS / "zoo/deit_ti.yaml", "--trainer.max_epochs=1", "--data.root=/nowhere"],
        ["data.root: no ImageNet under /nowhere"]),
    "missing data file": ("fit", [TNT, "--data={class_path: Npz, init_args: {path: /nowhere/x.npz}}"],
        ["data.path: no file /nowhere/x.npz"]),
    "seed": ("fit", [TNT, "--seed=-1"], ["seed: got -1, must be 0 to"]),
    "missing checkpoint": ("test", [TNT, "--ckpt_path", "/nowhere/x.ckpt"],
        ["--ckpt_path: no such file: /nowhere/x.ckpt"]),
    "no checkpoint": ("predict", [TNT], ["name the weights with --ckpt_path"]),
    "checkpoint of no kind": ("test", [TNT, "--ckpt_path", TNT], ["--ckpt_path: ", "is no checkpoint of this program"]),
    "going on from no checkpoint": ("fit", [TNT, "--ckpt_path", TNT], ["is no checkpoint of this program"]),
    "checkpoint of a study": ("fit", [POS, "--ckpt_path", TNT], ["--ckpt_path: a study goes on by itself"]),
    "nothing to plan": ("plan", [TNT], ["tnt.yaml: has no ablation section to plan"]),
    "cell that cannot be built": (
        "plan", [POS, "--ablation.axes.word.bad={model.backbone.blocks.tnt.outer.mixer.heads: 7}"],
        ["cell none/bad: model.backbone.blocks.tnt.outer.mixer: ", "heads: 7"]),
    "setting of an axis": ("plan", [POS, "--ablation.axes.word.bad={model.backbone.dmi: 7}"],
        ["ablation.axes.word.bad: model.backbone.dmi: ", "did you mean 'dim'?"]),
    "argument of the study": ("plan", [POS, "--ablation.seed=[0]"], ["ablation.seed: ", "did you mean 'seeds'?"]),
    "no study": ("report", ["/nowhere"], ["/nowhere: is not the folder of a study"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    command, words, says = MISTAKES[name]
    config = ["--config"] if words and isinstance(words[0], Path) else []
    message = cli(command, *config, *words).error
    assert not [part for part in says if part not in message], message
    assert not list(tmp_path.rglob("*.yaml")), "a run folder is left behind"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("extends: nope.yaml", ["x.yaml: extends: no such file: ", "nope.yaml"]),
        ("model: {a: 1\nb: [", ["x.yaml, line 2, column 2: not readable as YAML"]),
        ("seed: 1\nseed: 2", ["x.yaml, line 2: 'seed' stands here twice"]),
        ("modle: {}", ["x.yaml: modle: ", "did you mean 'model'?"]),
        ("model: {backbone: {class_path: Isotropc}}", ["x.yaml: model.backbone: ", "did you mean 'Isotropic'?"]),
        (f"{{extends: {NEXT_VIT}, model: {{backbone: {{stages: {{s3: {{patern: ncb}}}}}}}}}}",
            ["x.yaml: model.backbone.stages.s3.patern: ", "did you mean 'pattern'?"]),
        ("plugins: [nope.py]", ["plugins: no such file: ", "nope.py"]),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_one_line(cli: Cli, tmp_path: Path, text: str, says: list[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    message = cli("describe", "--config", path).error
    assert not [part for part in says if part not in message], message


def test_an_empty_data_set_is_one_line(cli: Cli, tiny_file: Path, tmp_path: Path) -> None:
    arrays = {"train_images": np.zeros((0, 8, 8), np.uint8), "train_labels": np.zeros((0,), np.int64)}
    np.savez(tmp_path / "empty.npz", **arrays)
    data = f"{{class_path: Npz, init_args: {{path: {tmp_path / 'empty.npz'}}}}}"
    for command in ("fit", "describe"):
        message = cli(command, "--config", tiny_file, f"--data={data}").error
        assert "empty.npz has no images for training" in message


def test_a_block_with_a_wrong_shape_is_one_line(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "tessera_wrong_shape.py"
    path.write_text(
        "from blocks.base import Block, Features, Site\n"
        "class HalfMap(Block):\n"
        "    def __init__(self, site: Site) -> None:\n"
        "        super().__init__()\n"
        "        self.out = site.inp\n"
        "    def forward(self, features: Features) -> Features:\n"
        "        return features.replace(map=features.map[:, :, ::2])\n"
    )
    own = ["--model.backbone.blocks.own=HalfMap", "--model.backbone.pattern=tnt own"]
    message = cli("describe", "--config", TNT, "--plugins", path, *own).error
    assert "model.backbone, block 1 'own': HalfMap.forward gives map (2, " in message
    assert "but its out declares (2, " in message


def test_a_folder_that_cannot_be_made_is_one_line(cli: Cli, tiny_file: Path) -> None:
    assert "Not a directory" in cli("fit", "--config", tiny_file, "--runs", tiny_file).error


# ---- help and the catalogue


@pytest.mark.parametrize(
    "command", ["fit", "validate", "test", "predict", "export", "plan", "report", "describe", "blocks"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert f"usage: cli.py {command}" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from framework.cli import main\n"
        "for words in (['--help'], ['fit', '--help'], ['blocks', '--help'], [], ['descrbe'], ['fit', '--confg']):\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'yaml', 'jsonargparse', 'rich', 'numpy', 'timm', 'blocks'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "examples:" in found.stdout


def test_blocks_lists_every_class(cli: Cli) -> None:
    out = cli("blocks").out
    for name in ("Isotropic", "NTB", "TanhGate", "RoPE", "DistilledHead", "AdamW", "Digits", "CrossEntropy"):
        assert f"\n{name} " in out
    assert "Composed" not in out


def test_blocks_shows_one_class(cli: Cli) -> None:
    found = cli("blocks", "NTB")
    assert found.code == 0
    for text in ("blocks.nextvit.NTB", "source: Next-ViT, arXiv 2207.05501", "sr_ratio", "0.75", "BatchNorm"):
        assert text in found.out
    assert cli("blocks", "ntb").out == found.out


def test_the_catalogue_as_json_is_complete(cli: Cli) -> None:
    entries = json.loads(cli("blocks", "--json").out)
    own = [entry for entry in entries if entry["path"].startswith(("blocks.", "framework."))]
    assert len(own) > 45
    for entry in own:
        where = entry["path"]
        assert set(entry) == {"name", "kind", "path", "summary", "text", "source", "arguments"}, where
        assert entry["summary"], where
        for argument in entry["arguments"]:
            assert set(argument) == {"name", "type", "default", "text"}, where
            assert all(argument.values()), (where, argument)
    by_name = {entry["name"]: entry for entry in own}
    assert len(by_name) == len(own)
    ntb = {argument["name"]: argument for argument in by_name["NTB"]["arguments"]}
    assert (ntb["shrink"]["type"], ntb["shrink"]["default"]) == ("float", "0.75")
    assert (ntb["norm"]["type"], ntb["norm"]["default"]) == ("Norm", "BatchNorm")
    assert "site" not in ntb
    needed = {a["name"] for a in by_name["Isotropic"]["arguments"] if a["default"] == "required"}
    assert needed == {"blocks", "pattern", "dim"}
    assert "1711.05101" in by_name["AdamW"]["source"]
    assert json.loads(cli("blocks", "NTB", "--json").out) == [by_name["NTB"]]


# ---- describe and plan


def test_describe_as_json(cli: Cli) -> None:
    found = json.loads(cli("describe", "--config", NEXT_VIT, "--json").out)
    assert {"name", "params", "macs", "frozen", "image", "levels", "blocks"} == set(found)
    assert found["levels"][0] == {"name": "s1", "channels": 32, "stride": 2}
    blocks = found["blocks"]
    assert [b["key"] for b in blocks][:2] == ["stages.s1.blocks.0", "stages.s2.blocks.0"]
    assert set(blocks[0]) == {"key", "name", "kind", "out", "params", "macs"}
    assert (blocks[2]["name"], blocks[2]["kind"], blocks[2]["out"]["dim"]) == ("ntb", "NTB", 128)
    assert 0 < sum(b["params"] for b in blocks) < found["params"]
    assert 0 < sum(b["macs"] for b in blocks) < found["macs"]


def test_describe_as_text_is_whole(cli: Cli) -> None:
    out = cli("describe", "--config", EXPERIMENTS / "zoo/tnt_s.yaml").out
    assert "tnt_s: 23,768,584 parameters, 5.22G MACs for a 224×224 image with 3 channel(s)" in out
    assert "levels: block3 384 @ 1/16, block6 384 @ 1/16, block9 384 @ 1/16, block12 384 @ 1/16\n" in out
    row = next(line for line in out.splitlines() if "blocks.11" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "blocks.11", "tnt", "TNT", "384 × 14×14 + 1 prefix, 16 words of 24", "1,929,456", "431.4M"
    ]  # fmt: skip


def test_describe_ignores_an_ablation_and_takes_settings(cli: Cli) -> None:
    words = ["--config", POS, "--model.backbone.pattern", "tnt", "--name=short", "--json"]
    found = json.loads(cli("describe", *words).out)
    assert (found["name"], len(found["blocks"])) == ("short", 1)


def test_plan_prints_the_cells_and_makes_nothing(cli: Cli, tmp_path: Path) -> None:
    found = cli("plan", "--config", POS, "--runs", tmp_path)
    assert found.code == 0
    assert "pos: 12 runs (4 cells × 3 seeds), 0 of them finished" in found.out
    assert len([line for line in found.out.splitlines() if "learned" in line or "none" in line]) == 4
    assert not list(tmp_path.iterdir())


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
