"""Nets compiled block by block: the same training, the same keys, and one line where nothing can be compiled."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blocks.kernels import native
from framework import compiled
from framework import run as runs
from framework.bench import nets
from framework.bench.nets import Form, Setting
from framework.checkpoints import read_checkpoint
from framework.cli import main
from framework.compiled import regions
from framework.config import dump, load_yaml
from framework.construct import build_model
from framework.data.base import Image
from framework.tasks import Classification

EMA = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}}
TIMM = {"class_path": "TimmBackbone", "init_args": {"name": "test_vit", "args": {"depth": 3}}}


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What has been compiled; it runs as it was."""
    found: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor], **_: Any) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=8):  # whatever is set is put back
        yield found
    torch._dynamo.reset()


def fit(document: dict[str, Any], root: Path, *words: str | Path) -> Path:
    """The run folder of a document that has been trained."""
    (root / "tiny.yaml").write_text(dump({**document, "name": "tiny"}))
    assert main(["fit", "--config", str(root / "tiny.yaml"), "--runs", str(root / "runs"), *map(str, words)]) == 0
    return max((root / "runs/tiny").iterdir(), key=lambda path: int(path.name))


def test_regions_are_the_blocks(tiny: Callable[..., dict[str, Any]]) -> None:
    task = build_model(tiny())
    assert regions(task) == list(task.backbone.blocks)  # type: ignore[union-attr, arg-type]
    wrapped = build_model(tiny(model__backbone=TIMM, model__head="ClassTokenHead"))
    assert [type(region).__name__ for region in regions(wrapped)] == ["Block"] * 3
    staged = nn.ModuleDict({"stages": nn.Sequential(nn.ModuleDict({"blocks": nn.Sequential(nn.ReLU())}))})
    assert [type(region).__name__ for region in regions(staged)] == ["ReLU"]
    alone = nn.Linear(2, 2)
    assert regions(alone) == [alone]


def test_a_compiled_run_trains_goes_on_and_is_read_as_any_other(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path, graphs: list[Any]
) -> None:
    document = tiny(trainer__max_epochs=1, trainer__limit_train_batches=2, trainer__callbacks=[EMA])
    eager = read_checkpoint(fit(document, tmp_path) / runs.LAST)
    assert not graphs
    document["model"]["init_args"]["compile"] = True
    folder = fit(document, tmp_path)
    assert graphs
    assert all(load_yaml(folder / name)["model"]["init_args"]["compile"] for name in (runs.CONFIG, runs.RESOLVED))
    saved = read_checkpoint(folder / runs.LAST)
    assert saved["state_dict"].keys() == eager["state_dict"].keys()
    for key, weight in saved["state_dict"].items():
        torch.testing.assert_close(weight, eager["state_dict"][key], rtol=1e-3, atol=1e-4)
    assert main(["fit", "--ckpt_path", str(folder / runs.LAST), "--trainer.max_epochs=2"]) == 0
    assert read_checkpoint(folder / runs.LAST)["epoch"] == 1
    before = len(graphs)
    task = Classification.load_from_checkpoint(folder / runs.LAST)
    assert task.compiled
    assert task.eval()(task.example(2)).shape == (2, 10)
    assert len(graphs) == before  # for training alone


def test_without_a_compiler_one_line_says_so(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import torch._inductor.config as config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    (tmp_path / "tiny.yaml").write_text(dump({**tiny(model__compile=True), "name": "t"}))
    with config.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert main(["fit", "--config", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: model.compile: torch can compile nothing for cpu here: ")
    assert "no-such-compiler" in said[-1]
    assert not any("Traceback" in line for line in said)
    assert not list((tmp_path / "runs/t").iterdir())


# ---- frozen, as rivals in benchmarks are

FROZEN = Form(compile=True, freezing=True)
CPU, IMAGE = Setting("inference", "float32", 2, 1, "cpu"), Image(4, 1)


def linear(form: Form) -> nn.Module:
    torch.manual_seed(0)
    return nets.formed(nn.Sequential(nn.Flatten(), nn.Linear(16, 8)), form, CPU)


def test_frozen_code_has_weights_as_constants_though_other_code_would_serve(graphs: list[Any]) -> None:
    logits = [nets.step(linear(form), form, CPU, IMAGE)() for form in (Form(compile=True), FROZEN)]
    assert torch.equal(*logits)
    inputs = [[node.name for node in graph.graph.nodes if node.op == "placeholder"] for graph in graphs]
    assert list(map(len, inputs)) == [3, 1]


@pytest.mark.skipif(native.library() is None, reason="no compiler, or a processor without a kernel")
def test_what_was_compiled_is_let_go_of_with_the_weights_of_frozen_code() -> None:
    net = linear(FROZEN)
    weight = weakref.ref(net[1].weight)  # type: ignore[index]
    nets.step(net, FROZEN, CPU, IMAGE)()
    del net
    compiled.forget()
    assert weight() is None
