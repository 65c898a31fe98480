"""The command line: what each command prints, and that a mistake is one line which tells how to mend it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from framework.cli import main
from framework.config import dump
from tests.conftest import CONFIGS, EXPERIMENTS, REPO, Cli

TNT, NEXT_VIT, POS = CONFIGS / "tnt.yaml", CONFIGS / "pyramid.yaml", CONFIGS / "study.yaml"
RESNET = EXPERIMENTS / "zoo/timm_resnet50.yaml"


@pytest.fixture
def tiny_file(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump(tiny(name="tiny")))
    return path


# ---- mistakes

# NCB passes the class token by.
BLIND = ["--model.backbone.stem={class_path: PatchStem, init_args: {patch: 4}}", "--model.backbone.pattern=ncb*2",
         "--model.backbone.blocks={ncb: NCB}", "--model.backbone.dim=32"]  # fmt: skip
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
    "weight decay": ("fit", [TNT, "--model.optimizer.weight_decay=-1", "--trainer.fast_dev_run=true"],
        ["model.optimizer.weight_decay: got -1.0, must be at least 0"]),
    "label smoothing": (
        "fit", [TNT, "--model.objectives={ce: {class_path: CrossEntropy, init_args: {label_smoothing: 5}}}"],
        ["model.objectives.ce.label_smoothing: got 5.0, must be 0 to 1"]),
    "label smoothing of mixed images": (
        "describe", [TNT, "--model.mix={class_path: MixupCutmix, init_args: {label_smoothing: 5}}"],
        ["model.mix.label_smoothing: got 5.0, must be 0 to 1"]),
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
    "metric of a callback": ("fit",
        [TNT, "--trainer.callbacks=[{class_path: lightning.pytorch.callbacks.EarlyStopping, "
              "init_args: {monitor: val/los}}]"],
        ["trainer.callbacks: EarlyStopping watches 'val/los' (did you mean 'val/loss'?"]),
    "argument of a callback": ("fit",
        [TNT, "--trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitr: val/loss}}]"],
        ["trainer.callbacks[0].monitr: EarlyStopping has no such argument (did you mean 'monitor'?"]),
    "unknown callback": ("fit", [TNT, "--trainer.callbacks=[LearningRateMonitr]"],
        ["trainer.callbacks[0]: unknown Callback 'LearningRateMonitr' (did you mean 'LearningRateMonitor'?)"]),
    "no list": ("fit", [TNT, "--trainer.limit_val_batches=[1]"],
        ["trainer.limit_val_batches: expected int | float | null, got [1]"]),
    "no length": ("fit", [EXPERIMENTS / "zoo/deit_ti.yaml", "--trainer.max_epochs=null"],
        ["trainer.max_epochs: nothing says how long to train"]),
    "last epoch without validation": ("fit",
        [TNT, "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=2"],
        ["trainer.check_val_every_n_epoch: got 2, which does not divide trainer.max_epochs: 3", "or max_epochs: 4"]),
    "last epoch of a cell without validation": ("plan",
        [POS, "--trainer.max_epochs=3", "--trainer.check_val_every_n_epoch=5"],
        ["cell none/none: trainer.check_val_every_n_epoch: got 5, ", "give a divisor of 3, or max_epochs: 5"]),
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
    "metric of a study": (
        "plan", [POS, "--ablation.metric=val/acc"], ["ablation.metric: nothing logs 'val/acc'", "val/acc1"],
    ),
    "metric of a callback of a study": (
        "plan", [POS, "--trainer.callbacks=[{class_path: EarlyStopping, init_args: {monitor: nope}}]"],
        ["cell ", "trainer.callbacks: EarlyStopping watches 'nope'"],
    ),
    "optimizer of a cell": (
        "plan", [POS, "--ablation.axes.word.bad={model.optimizer.lr: -1}"],
        ["bad: model.optimizer: Invalid learning rate: -1"],
    ),
    "epochs of a cell": (
        "plan", [POS, "--ablation.axes.word.bad={trainer.max_epochs: 0}"],
        ["bad: trainer.max_epochs: nothing says how long to train"],
    ),
    "weights of a study": ("fit", [POS, "--weights=nope.pth"], ["cell ", "nope.pth"]),
    "clipping below nothing": (
        "fit", [TNT, "--trainer.gradient_clip_val=-1"], ["trainer.gradient_clip_val: got -1, must be at least 0"],
    ),
    "no batches": (
        "fit", [TNT, "--trainer.limit_train_batches=0"], ["trainer.limit_train_batches: got 0, must be above 0"],
    ),
    "class token that sees nothing": ("fit", [TNT, *BLIND], ["model.head: ClassTokenHead's logits do not depend on"]),
    "class token of a cell that sees nothing": ("plan", [POS, *BLIND],
        ["cell none/none: model.head: ClassTokenHead's logits do not depend on the image", "AveragePoolHead"]),
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


def test_the_end_waits_for_what_python_waits_for() -> None:
    code = (
        "import atexit, threading, time, cli\n"
        "atexit.register(print, 'at exit')\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), print('thread'))).start()\n"
        "print('main')\n"
        "cli.end(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (3, "main\nthread\nat exit\n", "")
