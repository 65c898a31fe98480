"""`model.freeze: backbone`: what does not move, what is not computed, and that all else of a run goes on as usual."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import save_file
from torch import Tensor, nn

from blocks.base import Features
from framework import run as runs
from framework.cli import main
from framework.config import compose, dump, override
from framework.construct import build_model
from framework.measure import cost, meta_model
from framework.objectives import Objective, Step
from framework.optim import parameter_groups
from tests.conftest import CONFIGS

Tiny = Callable[..., dict[str, Any]]
EMA = "lightning.pytorch.callbacks.EMAWeightAveraging"
TRAINER = {"accelerator": "cpu", "max_epochs": 2, "limit_train_batches": 3, "limit_val_batches": 1, "logger": False}
FROZEN = {"model.freeze": "backbone", **{f"trainer.{key}": value for key, value in TRAINER.items()}}

# All that would draw random numbers or move statistics in training is on.
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tnt": ("tnt", {"model.backbone.drop_path": 0.5, "model.backbone.stem.drop": 0.5}),
    "next_vit": ("pyramid", {"model.backbone.drop_path": 0.5, "data.size": 16}),
    "distilled": ("tnt", {"model.backbone.stem.prefix": 2, "model.head": "DistilledHead"}),
}


def document(net: str, **settings: Any) -> dict[str, Any]:
    config, own = NETS[net]
    changes = {key.replace("__", "."): value for key, value in settings.items()}
    return override(compose([CONFIGS / f"{config}.yaml"]), {**own, **FROZEN, **changes})


class Watch(Callback):
    """The net before the first step, and what its backbone gives for the same images before and in training."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.task = pl_module
        self.before = deepcopy(pl_module.state_dict())
        self.images = torch.randn(4, *pl_module.example().shape[1:], generator=torch.Generator().manual_seed(0))
        self.modes: set[bool] = set()
        self.outs = [self.out()]

    def out(self) -> Tensor:
        return self.task.pooled(self.images).detach()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        assert pl_module.head.training
        self.modes |= {module.training for module in pl_module.backbone.modules()}
        self.outs.append(self.out())


def fit(folder: Path, document: dict[str, Any], checkpoint: Path | None = None) -> Watch:
    folder.mkdir(exist_ok=True)
    watch, made = Watch(), runs.Workbench.make_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            runs.Workbench,
            "make_trainer",
            lambda self, **kw: made(self, **{**kw, "callbacks": [*kw.get("callbacks", []), watch]}),
        )
        runs.train(folder, document, checkpoint, bar=False)
    return watch


def saved(folder: Path) -> dict[str, Any]:
    return torch.load(folder / runs.LAST, weights_only=True)


@pytest.mark.parametrize("net", NETS)
def test_nothing_of_a_frozen_backbone_moves_in_training(net: str, tmp_path: Path) -> None:
    watch = fit(tmp_path, document(net))
    after = saved(tmp_path)["state_dict"]
    assert [key for key in after if key.startswith("head.") and torch.equal(after[key], watch.before[key])] == []
    backbone = [key for key in after if key.startswith("backbone.")]
    assert (net == "next_vit") == any("running_mean" in key for key in backbone)
    assert all(torch.equal(after[key], watch.before[key]) for key in backbone)
    assert len(watch.outs) == 7
    assert all(torch.equal(out, watch.outs[0]) for out in watch.outs)
    assert watch.modes == {False}


def test_the_same_net_moves_where_it_is_not_frozen(tmp_path: Path) -> None:
    """Or the test above would pass for any reason."""
    watch = fit(tmp_path, document("next_vit", model__freeze="none"))
    after = saved(tmp_path)["state_dict"]
    still = [key for key in after if key.startswith("backbone.") and torch.equal(after[key], watch.before[key])]
    assert still == []
    assert not torch.equal(watch.outs[-1], watch.outs[0])
    assert watch.modes == {True}


def kept_for_backward(task: Any) -> int:
    """Bytes that autograd keeps of one training step."""
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        kept[value.data_ptr()] = value.nbytes
        return value

    images, targets = torch.randn(8, *task.example().shape[1:]), torch.zeros(8, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        step = task._step(images, targets)
        loss = sum(term(step) for term in task.terms.values())
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("net", NETS)
def test_no_gradient_is_computed_in_a_frozen_backbone(net: str) -> None:
    task, whole = build_model(document(net)), build_model(document(net, model__freeze="none"))
    assert kept_for_backward(task) < kept_for_backward(whole) / 10
    assert all(p.grad is None for p in task.backbone.parameters())
    assert all(p.grad is not None for p in task.head.parameters())
    assert task._step(torch.randn(2, *task.example().shape[1:]), torch.zeros(2).long()).features.map.grad_fn is None


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_the_optimizer_gets_the_head_alone_at_the_full_rate(layer_decay: float) -> None:
    task = build_model(document("distilled"))
    groups = parameter_groups(task, 0.1, lr=0.25, layer_decay=layer_decay)
    given = {id(p) for group in groups for p in group["params"]}
    assert given == {id(p) for p in task.head.parameters()}
    assert {group.get("lr", 0.25) for group in groups} == {0.25}


def test_describe_counts_what_is_frozen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frozen, whole = (cost(meta_model(document("tnt", model__freeze=freeze))) for freeze in ("backbone", "none"))
    assert (frozen.params, frozen.frozen) == (16 * 10 + 10, whole.params - 170)
    assert (frozen.macs, whole.frozen) == (whole.macs, 0)
    (tmp_path / "net.yaml").write_text(dump(document("tnt")))
    assert main(["describe", "--config", str(tmp_path / "net.yaml")]) == 0
    assert f"170 parameters and {frozen.frozen:,} frozen" in capsys.readouterr().out


def test_a_moving_average_leaves_a_frozen_backbone_alone(tmp_path: Path) -> None:
    average = [{"class_path": EMA, "init_args": {"decay": 0.5}}]
    watch = fit(tmp_path, document("next_vit", trainer__callbacks=average))
    found = saved(tmp_path)
    for key, value in found["state_dict"].items():
        if key.startswith("backbone."):
            assert torch.equal(value, watch.before[key]), key
    assert not torch.equal(found["state_dict"]["head.fc.weight"], found["current_model_state"]["head.fc.weight"])


@pytest.mark.parametrize("net", ["next_vit", "distilled"])
def test_ddp_needs_no_search_for_unused_parameters(net: str, tmp_path: Path) -> None:
    """Its reducer fails in the second step where a parameter that it has got no gradient."""
    watch = fit(tmp_path, document(net, trainer__strategy="ddp", trainer__devices=1))
    assert len(watch.outs) == 7
    assert torch.equal(watch.outs[-1], watch.outs[0])


def test_a_frozen_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    settings = {"model__schedule": "Constant"}  # one that does not know the number of epochs
    fit(tmp_path / "whole", document("next_vit", **settings))
    fit(tmp_path / "half", document("next_vit", **settings, trainer__max_epochs=1))
    watch = fit(tmp_path / "half", document("next_vit", **settings), tmp_path / "half" / runs.LAST)
    one, two = saved(tmp_path / "whole"), saved(tmp_path / "half")
    assert (one["global_step"], two["global_step"], len(watch.outs)) == (6, 6, 4)
    assert all(torch.equal(value, two["state_dict"][key]) for key, value in one["state_dict"].items())
    assert watch.modes == {False}


def test_a_frozen_run_starts_from_weights(tmp_path: Path) -> None:
    torch.manual_seed(3)
    weights = {key: value for key, value in build_model(document("tnt")).state_dict().items() if "backbone" in key}
    head = {"head.fc.weight": torch.zeros(3, 16), "head.fc.bias": torch.zeros(3)}  # of other classes
    save_file({**weights, **head}, tmp_path / "net.safetensors")
    fit(tmp_path / "run", {**document("tnt"), "weights": str(tmp_path / "net.safetensors")})
    after = saved(tmp_path / "run")["state_dict"]
    assert all(torch.equal(after[key], value) for key, value in weights.items())


class MapMatching(Objective):
    """A term with a projection of its own, which reads the map."""

    reads = frozenset({"map"})

    def setup(self, task: Any) -> None:
        self.project = nn.Linear(task.backbone.out.dim, 1)

    def forward(self, step: Step) -> Tensor:
        features: Features = step.features
        return self.project(features.map.mean((2, 3))).square().mean()


def test_a_loss_term_that_reads_features_learns(tmp_path: Path) -> None:
    terms = {"labels": "CrossEntropy", "map": f"{__name__}.MapMatching"}
    watch = fit(tmp_path, document("tnt", model__objectives=terms))
    after = saved(tmp_path)["state_dict"]
    moved = {key for key, value in after.items() if not torch.equal(value, watch.before[key])}
    mine = {"objectives.map.project.weight", "objectives.map.project.bias"}
    assert moved == {"head.fc.weight", "head.fc.bias", *mine}


def test_a_wrong_part_is_one_line_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(CONFIGS / "tnt.yaml")
    assert main(["describe", "--config", config, "--model.freeze=bakbone"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: model.freeze: got 'bakbone' (did you mean 'backbone'?")
    assert message.count("\n") == 1


def test_the_checkpoint_of_a_frozen_run_is_frozen_again(tmp_path: Path) -> None:
    from framework.tasks import Classification

    fit(tmp_path, document("tnt", trainer__max_epochs=1))
    task = Classification.load_from_checkpoint(tmp_path / runs.LAST).train()
    assert not any(p.requires_grad for p in task.backbone.parameters())
    assert not any(module.training for module in task.backbone.modules())
    thawed = Classification.load_from_checkpoint(tmp_path / runs.LAST, freeze="none").train()
    assert all(p.requires_grad for p in thawed.parameters())
    assert all(module.training for module in thawed.backbone.modules())
