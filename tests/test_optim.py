"""Optimizers and schedules, where they differ from torch's own."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import Callback
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay
from timm.scheduler import CosineLRScheduler
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from framework import run as runs
from framework.config import compose
from framework.construct import build_model
from framework.errors import ConfigError
from framework.optim import SGD, AdamW, AtOnce, DeiTCosine, OneCycle, Schedule, parameter_groups
from framework.run import train
from tests.conftest import EXPERIMENTS

GOLDEN = Path(__file__).parent / "golden"


def rates(make: Callable[[torch.optim.Optimizer], LRScheduler], steps: int, lr: float = 0.7) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = make(optimizer)
    found = []
    for step in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps - 1:
            schedule.step()
    return found


@pytest.mark.parametrize("steps", [2, 3, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3, 0.9])
def test_one_cycle_is_that_of_torch(steps: int, warmup: float) -> None:
    ours = rates(lambda optimizer: OneCycle(warmup).build(optimizer, steps, 1), steps)
    theirs = rates(lambda optimizer: OneCycleLR(
        optimizer, 0.7, total_steps=steps, pct_start=warmup, final_div_factor=1e4, cycle_momentum=False), steps
    )  # fmt: skip
    assert ours == pytest.approx(theirs, abs=1e-15)


def test_one_cycle_without_a_way_down() -> None:
    assert rates(lambda optimizer: OneCycle(1.0).build(optimizer, 5, 1), 5)[-1] == pytest.approx(0.7)


def test_gradients_are_clipped_in_mixed_precision(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Which Lightning refuses for fused optimizers."""
    document = tiny(trainer__gradient_clip_val=1.0, trainer__precision="bf16-mixed", trainer__fast_dev_run=True)
    assert train(tmp_path, document, bar=False).global_step == 1


def test_the_step_at_once_is_that_of_torch() -> None:
    """Bit by bit; where some have no gradient, and with a state of the other one."""
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 3))
    theirs = deepcopy(ours)
    made = AdamW(lr=0.02).build(ours)
    torchs = torch.optim.AdamW(parameter_groups(theirs, 0.05), lr=0.02, fused=True)
    assert type(made) is AtOnce

    def step(*without: int) -> None:
        for i, (own, other) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            own.grad = None if i in without else torch.randn_like(own)
            other.grad = None if own.grad is None else own.grad.clone()
        made.step()
        torchs.step()
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))

    for without in ((), (), (1, 4), (), (0, 1, 2, 3, 4, 5), ()):
        step(*without)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    own, other = torch.load(file, weights_only=True), deepcopy(torchs.state_dict())
    assert own["param_groups"] == other["param_groups"]
    assert [int(state["step"]) for state in own["state"].values()] == [5, 4, 4, 5, 5, 5]
    made.load_state_dict(other)
    torchs.load_state_dict(own)
    step()
    step(2)


@pytest.mark.parametrize("most", [1e-3, 3.0, 1e3])
@pytest.mark.parametrize("factor", [1.0, float("nan"), float("inf")])
def test_gradients_are_clipped_as_by_torch(most: float, factor: float) -> None:
    """Of tensors of all sizes, a kernel in channels_last among them; and one that is in no piece is torch's."""

    def net() -> torch.nn.Module:
        random = torch.Generator().manual_seed(0)
        made = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.Linear(300, 77), torch.nn.Linear(77, 3))
        for p in made.to(memory_format=torch.channels_last).parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=random))
        made[1].bias.grad[0] *= factor
        made[2].bias.grad = None
        return made

    for pieces in (True, False):
        ours, theirs = net(), net()
        if not pieces:
            ours[2].weight.grad = theirs[2].weight.grad.t().contiguous().t()
        AdamW().build(ours).clip(most)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), most)
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert own.grad is other.grad is None or torch.allclose(own.grad, other.grad, 1e-5, 0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_parameters_have_torchs_own_step(dtype: torch.dtype) -> None:
    assert type(AdamW().build(torch.nn.Linear(2, 2, dtype=dtype))) is torch.optim.AdamW
    assert type(AdamW().build(torch.nn.Linear(2, 2, device="meta"), fused=False)) is torch.optim.AdamW


def epoch_rates(schedule: Schedule, epochs: int, lr: float) -> list[float]:
    """The rate of every epoch of a schedule that is stepped per epoch."""
    assert schedule.interval == "epoch"
    return rates(lambda optimizer: schedule.build(optimizer, 10 * epochs, epochs), epochs + 1, lr)


@pytest.mark.parametrize(("shifted", "table"), [(True, "lr_used_epoch"), (False, "lr_function_t")])
def test_deit_cosine_has_the_rates_of_deit(shifted: bool, table: str) -> None:
    golden = json.loads((GOLDEN / "deit_lr_schedule.json").read_text())
    found = epoch_rates(DeiTCosine(shifted=shifted), 300, golden["base_lr"])
    assert {int(epoch): found[int(epoch)] for epoch in golden[table]} == pytest.approx(
        {int(epoch): rate for epoch, rate in golden[table].items()}, rel=1e-12
    )


@pytest.mark.parametrize(("warmup", "cooldown"), [(5, 0), (0, 0), (20, 10)])
def test_deit_cosine_is_the_schedule_of_timm(warmup: int, cooldown: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    theirs, length = [], 40
    timms = CosineLRScheduler(optimizer, length, lr_min=1e-5, warmup_t=warmup, warmup_lr_init=1e-6)
    for epoch in range(length + cooldown + 1):
        timms.step(epoch)
        theirs.append(optimizer.param_groups[0]["lr"])
    ours = epoch_rates(DeiTCosine(warmup, shifted=False, cooldown=cooldown), length + cooldown, 2e-3)
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_deit_cosine_needs_epochs() -> None:
    with pytest.raises(ConfigError, match="the cosine has 0 epochs"):
        epoch_rates(DeiTCosine(cooldown=10), 10, 1e-3)


class Rates(Callback):
    """The rates of all groups in every step, by epoch; presses Ctrl-C in one step."""

    def __init__(self, stop: tuple[int, int] | None = None) -> None:
        self.stop = stop
        self.found: dict[int, set[tuple[float, ...]]] = {}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.stop:
            os.kill(os.getpid(), signal.SIGINT)
        now = tuple(group["lr"] for group in trainer.optimizers[0].param_groups)
        self.found.setdefault(trainer.current_epoch, set()).add(now)


@pytest.mark.parametrize("stop", [(3, 0), (2, 1)])  # in the midst of an epoch, and at its end
def test_rates_go_on_behind_an_interruption(
    tiny: Callable[..., dict[str, Any]], tmp_path: Path, stop: tuple[int, int]
) -> None:
    """DeiT's own script jumps by one epoch here. The rates of layers keep their ratio to that of the head."""
    document = tiny(
        model__schedule={"class_path": "DeiTCosine", "init_args": {"warmup_epochs": 2}},
        model__optimizer={"class_path": "AdamW", "init_args": {"lr": 1e-3, "layer_decay": 0.5}},
        trainer__max_epochs=6,
        trainer__limit_train_batches=2,
        trainer__accelerator="cpu",
    )

    def fit(name: str, watch: Rates, checkpoint: Path | None = None) -> Rates:
        (tmp_path / name).mkdir(exist_ok=True)
        made, handler = runs.Workbench.make_trainer, signal.getsignal(signal.SIGINT)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                runs.Workbench,
                "make_trainer",
                lambda self, **kw: made(self, **{**kw, "callbacks": [*kw.get("callbacks", []), watch]}),
            )
            try:
                train(tmp_path / name, document, checkpoint, bar=False)
            finally:
                signal.signal(signal.SIGINT, handler)  # Lightning leaves Ctrl-C ignored on its way out
        return watch

    whole = fit("whole", Rates()).found
    want = [epoch_rates(DeiTCosine(2), 6, 1e-3)[epoch] for epoch in range(6)]
    layers = 4  # stem, two blocks, and the head with the final norm
    for epoch, rate in enumerate(want):
        assert len(whole[epoch]) == 1, "one rate for an epoch"
        assert next(iter(whole[epoch])) == pytest.approx(
            tuple(rate * 0.5**below for below in range(layers) for _ in range(2)), rel=1e-9
        )
    first = Rates(stop)
    with pytest.raises(KeyboardInterrupt):
        fit("stopped", first)
    second = fit("stopped", Rates(), tmp_path / "stopped" / runs.LAST)
    assert min(second.found) == 3
    for epoch in range(6):
        both = first.found.get(epoch, set()) | second.found.get(epoch, set())
        assert both == whole[epoch], epoch


def test_layers_are_those_of_timm() -> None:
    """On one ViT; but timm puts the final norm to the last block, and BEiT, MAE and this program to the head."""
    decay = 0.7
    task = build_model(compose([EXPERIMENTS / "zoo/deit_ti.yaml"], {"model.backbone.pattern": "enc*3"}))
    net = timm.create_model("deit_tiny_patch16_224", depth=3)
    ours = parameter_groups(task, 0.05, 1.0, decay)
    theirs = param_groups_layer_decay(net, 0.05, net.no_weight_decay(), layer_decay=decay)

    def kinds(groups: list[dict[str, Any]], rate: str, norm: torch.nn.Module) -> Counter[tuple[float, float, int]]:
        """How many parameters there are of each rate, weight decay and size, without those of the final norm."""
        spared = {id(parameter) for parameter in norm.parameters()}
        return Counter(
            (round(group[rate], 9), group["weight_decay"], parameter.numel())
            for group in groups
            for parameter in group["params"]
            if id(parameter) not in spared
        )

    assert kinds(ours, "lr", task.backbone.norm) == kinds(theirs, "lr_scale", net.norm)
    rates = {id(parameter): group["lr"] for group in ours for parameter in group["params"]}
    for name, parameter in task.named_parameters():
        block = re.match(r"backbone\.blocks\.(\d+)\.", name)
        layer = 0 if name.startswith("backbone.stem.") else int(block[1]) + 1 if block else 4
        assert rates[id(parameter)] == pytest.approx(decay ** (4 - layer)), name


def test_layers_of_a_pyramid_and_of_a_net_of_timms() -> None:
    """A block that is no layer, as Merge, goes with what is before it; timm's nets keep timm's layers."""
    pyramid = build_model(compose([EXPERIMENTS / "base/next_vit_digits.yaml"]))
    layers = pyramid.backbone.layers()
    blocks = [block for _, _, block in pyramid.backbone.steps() if block.counts]
    assert set(layers.values()) == set(range(len(blocks) + 1))
    given = {"class_path": "TimmBackbone", "init_args": {"name": "resnet18"}}
    net = build_model(compose([EXPERIMENTS / "zoo/timm_resnet50.yaml"], {"model.backbone": given}))
    their_net = timm.create_model("resnet18")
    theirs = group_parameters(their_net, their_net.group_matcher(coarse=False), reverse=True)
    assert {
        f"net.{name}": layer for name, layer in theirs.items() if not name.startswith("fc.")
    } == net.backbone.layers()
    assert theirs["fc.weight"] == max(net.backbone.layers().values()) + 1


@pytest.mark.parametrize("kind", [AdamW, SGD])
@pytest.mark.parametrize("decay", [-0.05, float("nan")])
def test_weight_decay_out_of_range(kind: type[AdamW | SGD], decay: float) -> None:
    with pytest.raises(ConfigError, match=f"model.optimizer.weight_decay: got {decay}, must be at least 0"):
        kind(weight_decay=decay).build(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_layer_decay_out_of_range(decay: float) -> None:
    with pytest.raises(ConfigError, match=f"model.optimizer.layer_decay: got {decay}, must be more than 0, at most 1"):
        AdamW(layer_decay=decay).build(torch.nn.Linear(1, 1))
