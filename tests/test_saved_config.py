"""A document written and read again, and what a run folder and a checkpoint keep of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from framework.config import compose, dump, merge_layer, override, resolve
from framework.construct import build_model, complete
from framework.run import CONFIG, LAST, RESOLVED, train
from framework.tasks import Classification
from tests.conftest import EXPERIMENTS, Write
from tests.test_config import NEXT_VIT, TNT, shared, stage_block

FILES = sorted(EXPERIMENTS.rglob("*.yaml"))

# ---- there and back


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(EXPERIMENTS)) for path in FILES])
def test_a_dumped_document_is_the_same_document(path: Path, write: Write) -> None:
    fragment = path.parent.name == "recipes" or path.name in ("cifar10.yaml", "fashion_mnist.yaml")  # without a net
    net = [EXPERIMENTS / "zoo/deit_ti.yaml"] if fragment else []
    document = compose([*net, path])
    text = dump(document)
    again = compose([write("config.yaml", text)])
    assert again == document
    assert dump(again) == text
    if "model" in document:
        resolved = resolve(document)
        assert resolve(again) == resolved
        assert resolve(compose([write("resolved.yaml", dump(resolved))])) == resolved


def test_merging_a_document_into_itself_changes_nothing() -> None:
    document = compose([NEXT_VIT])
    assert merge_layer(document, document, "") == document


# ---- a run folder


@dataclass
class Run:
    """A folder in which one step was trained, and the net at its end."""

    folder: Path
    document: dict[str, Any]
    model: Classification


FAST = {"enable_progress_bar": False, "logger": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, _tiny: dict[str, Any]) -> Run:
    folder = tmp_path_factory.mktemp("run")
    document = override(_tiny, {"trainer": FAST, "model.backbone.drop_path": 0.1})
    return Run(folder, document, train(folder, document, bar=False).lightning_module)


def test_both_files_of_a_run_folder_run_again(run: Run, tmp_path: Path) -> None:
    config, resolved = (compose([run.folder / name]) for name in (CONFIG, RESOLVED))
    assert config == run.document
    assert complete(config) == complete(resolved) == yaml.safe_load((run.folder / RESOLVED).read_text())
    train(tmp_path, resolved, bar=False)
    first, second = (
        torch.load(folder / LAST, weights_only=True)["state_dict"] for folder in (run.folder, tmp_path)
    )  # fmt: skip
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_change_over_a_saved_config_still_inherits(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(dump(shared(ntb={"sr_ratio": 2})))
    changed = compose([tmp_path / CONFIG], {"model.backbone.blocks.ntb.shrink": 0.25})
    assert stage_block(changed)["init_args"] == {"shrink": 0.25, "sr_ratio": 2}


def test_a_checkpoint_is_plain_data_and_rebuilds_the_net(run: Run) -> None:
    saved = torch.load(run.folder / LAST, weights_only=True)
    assert "backbone" in saved["hyper_parameters"]
    loaded = Classification.load_from_checkpoint(run.folder / LAST, weights_only=True).eval()
    assert type(loaded.backbone.blocks[0]).__name__ == "TNT"
    images = torch.randn_like(loaded.example(2))
    with torch.no_grad():
        assert torch.equal(loaded(images), run.model.eval()(images))


def test_a_net_from_python() -> None:
    document = compose([TNT], {"model.backbone.dim": 32, "model.backbone.pattern": "tnt"})
    model = build_model(document)
    assert isinstance(model, Classification)
    assert model(model.example()).shape == (1, 10)
    assert model.backbone.out.dim == 32
