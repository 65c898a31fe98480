"""Optimizers and learning-rate schedules as small config objects, and the parameter groups that they get."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from blocks.kernels.clip import clip
from framework.errors import ConfigError


def parameter_groups(
    model: nn.Module, weight_decay: float, lr: float = 0.0, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels with decay; norms, biases and what modules name in `no_decay` without.

    The rule of timm and of all the papers' codes here: whatever has one dimension or fewer is not decayed, nor are
    positions and tokens. Frozen parameters are in neither.

    With `layer_decay`, two such groups for each layer of the model's `backbone`, the last ones first: layer l of L has
    the rate `lr · layer_decay^(L − l)`. The last one is the head with all else that is in no layer of the backbone,
    as its final norm (so in BEiT and MAE; timm puts that norm into the layer of the last block).
    """
    spared: set[int] = set()
    for module in model.modules():
        for name in getattr(module, "no_decay", ()):
            parameter = getattr(module, name, None)
            if parameter is not None:
                spared.add(id(parameter))
    layers: dict[str, int] = {} if layer_decay == 1 else cast(Any, model).backbone.layers()
    last = max(layers.values(), default=-1) + 1
    found: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or id(parameter) in spared
            layer = layers.get(name.removeprefix("backbone."), last)
            found.setdefault((last - layer, plain), []).append(parameter)
    groups = []
    for (below, plain), parameters in sorted(found.items(), key=lambda item: item[0]):
        group: dict[str, Any] = {"params": parameters, "weight_decay": 0.0 if plain else weight_decay}
        groups.append({**group, "lr": lr * layer_decay**below} if layers else group)
    return groups


class Optimizer(ABC):
    """Makes the optimizer of a run.

    Attributes:
        lr: the peak learning rate.
        weight_decay: on matrices and kernels only.
        layer_decay: factor of the learning rate from each layer to the one before it.
    """

    lr: float
    weight_decay: float
    layer_decay: float

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The parameter groups of `model`. Raises ConfigError where a decay is out of range."""
        if not self.weight_decay >= 0:
            raise ConfigError(f"model.optimizer.weight_decay: got {self.weight_decay}, must be at least 0")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(f"model.optimizer.layer_decay: got {self.layer_decay}, must be more than 0, at most 1")
        return parameter_groups(model, self.weight_decay, self.lr, self.layer_decay)

    @abstractmethod
    def build(self, model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
        """The optimizer of `model`'s parameters; `fused` where its step may run as one kernel."""


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay.

    Args:
        lr: peak learning rate.
        weight_decay: on matrices and kernels only; never on norms, biases, positions and tokens.
        betas: decay of the two running means.
        eps: added to the root of the second.
        layer_decay: factor of the learning rate from each layer to the one before it, from the head down; 1 for one
            rate, 0.65 to 0.75 to fine-tune.

    Source: Loshchilov and Hutter 2017, arXiv 1711.05101.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    layer_decay: float = 1.0

    def build(self, model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
        betas, groups = (self.betas[0], self.betas[1]), self.groups(model)
        own = fused and all(at_hand(parameter) for group in groups for parameter in group["params"])
        kind = AtOnce if own else torch.optim.AdamW
        return kind(groups, lr=self.lr, betas=betas, eps=self.eps, fused=fused or None)


def at_hand(parameter: nn.Parameter) -> bool:
    """Whether this is an ordinary parameter on the CPU."""
    return type(parameter) is nn.Parameter and parameter.is_cpu and parameter.dtype is torch.float32


class AtOnce(torch.optim.AdamW):
    """torch's fused AdamW for float32 on the CPU: the same kernel and the same state, without what a step takes more.

    Around its kernel torch sorts tensors by device and type, and counts the steps of each parameter by itself, which
    for small nets takes longer than the kernel.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_supports_amp_scaling = False  # a scaler has to do it

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                if params := [p for p in group["params"] if p.grad is not None]:
                    self._update(group, params)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        if not set_to_none:
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def clip(self, limit: float) -> None:
        """What torch's `clip_grad_norm_` does to all parameters."""
        params = [p for group in self.param_groups for p in group["params"]]
        if not clip([p.grad for p in params if p.grad is not None], limit):
            torch.nn.utils.clip_grad_norm_(params, limit)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                state["step"] = torch.zeros(())
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        steps = [state["step"] for state in states]
        # Parts of one tensor, so that all are counted at once; they are not, or no more, where a state was loaded or
        # other parameters have gradients.
        count = steps[0]._base
        if count is None or len(count) != len(steps) or any(step._base is not count for step in steps):
            count = torch.stack(steps)
            steps = list(count.unbind())
            for state, step in zip(states, steps, strict=True):
                state["step"] = step
        count += 1
        torch._fused_adamw_(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum.

    Args:
        lr: peak learning rate.
        momentum: decay of the running mean of gradients.
        weight_decay: on matrices and kernels only; never on norms, biases, positions and tokens.
        nesterov: whether the gradient is taken ahead of the momentum step.
        layer_decay: factor of the learning rate from each layer to the one before it, from the head down.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = True
    layer_decay: float = 1.0

    def build(self, model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
        groups = self.groups(model)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=fused or None)


class Schedule(ABC):
    """Makes the learning-rate schedule of a run: a factor of every group's own rate.

    Attributes:
        interval: what it is stepped with: every optimizer step or every epoch.
    """

    interval: ClassVar[Literal["step", "epoch"]] = "step"

    @abstractmethod
    def build(self, optimizer: torch.optim.Optimizer, steps: int, epochs: int) -> LRScheduler:
        """The schedule over `steps` optimizer steps in `epochs` epochs."""


@dataclass(frozen=True)
class Cosine(Schedule):
    """Linear warm-up, then half a cosine down to `min_lr` at the last step.

    Args:
        warmup_epochs: length of the warm-up; may be a fraction.
        warmup_lr: learning rate of the first step.
        min_lr: learning rate at the end.

    Source: SGDR, arXiv 1608.03983; warm-up of arXiv 1706.02677.
    """

    warmup_epochs: float = 5.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5

    def build(self, optimizer: torch.optim.Optimizer, steps: int, epochs: int) -> LRScheduler:
        warmup = min(round(self.warmup_epochs * steps / max(epochs, 1)), steps - 1)

        peak = optimizer.defaults["lr"]

        def factor(step: int) -> float:
            if step < warmup:
                return (self.warmup_lr + (peak - self.warmup_lr) * step / warmup) / peak
            part = min((step - warmup) / max(steps - warmup, 1), 1.0)
            return (self.min_lr + (peak - self.min_lr) * 0.5 * (1 + cos(pi * part))) / peak

        return LambdaLR(optimizer, factor)


@dataclass(frozen=True)
class DeiTCosine(Schedule):
    """The schedule of DeiT's script, and of its many descendants: one rate for each epoch.

    A linear warm-up, then the cosine of the whole run, whose clock has run since the first epoch: the warm-up hides
    its start and does not move it.

    Args:
        warmup_epochs: epochs of the warm-up.
        warmup_lr: learning rate of the first epoch.
        min_lr: learning rate at the end of the cosine.
        shifted: each epoch has the rate that was meant for the one before it, and the first two have that of the
            first, as in the released scripts, which step with the number of the epoch that has just ended.
        cooldown: last epochs at `min_lr`, among `trainer.max_epochs`; the cosine ends before them.

    Raises:
        ConfigError: the run has no more epochs than `cooldown`.

    Source: facebookresearch/deit main.py and timm's CosineLRScheduler without `warmup_prefix`.
    """

    warmup_epochs: int = 5
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    shifted: bool = True
    cooldown: int = 0

    interval = "epoch"

    def build(self, optimizer: torch.optim.Optimizer, steps: int, epochs: int) -> LRScheduler:
        length, peak = epochs - self.cooldown, optimizer.defaults["lr"]
        if length < 1:
            raise ConfigError(
                f"model.schedule: the cosine has {length} epochs: trainer.max_epochs is {epochs}, "
                f"cooldown {self.cooldown}"
            )

        def factor(epoch: int) -> float:
            at = max(epoch - self.shifted, 0)
            if at < self.warmup_epochs:
                return (self.warmup_lr + (peak - self.warmup_lr) * at / self.warmup_epochs) / peak
            part = min(at / length, 1.0)
            return (self.min_lr + (peak - self.min_lr) * 0.5 * (1 + cos(pi * part))) / peak

        return LambdaLR(optimizer, factor)


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Smith's one-cycle policy: up along a cosine, then down along a longer one, far below the start.

    Args:
        warmup: share of the steps that go up.
        start: the first learning rate is the peak divided by this.
        end: the last learning rate is the first divided by this.

    Source: arXiv 1708.07120; the same numbers as torch's OneCycleLR without momentum cycling.
    """

    warmup: float = 0.3
    start: float = 25.0
    end: float = 1e4

    def build(self, optimizer: torch.optim.Optimizer, steps: int, epochs: int) -> LRScheduler:
        # Not torch's class, which keeps its number of steps in the checkpoint: no run could go on for longer.
        top, last = self.warmup * steps - 1, max(steps - 1, 1)
        first, final = 1 / self.start, 1 / (self.start * self.end)

        def factor(step: int) -> float:
            if step < top:
                return 1 + (first - 1) * 0.5 * (1 + cos(pi * step / top))
            part = min((step - top) / max(last - top, 1e-9), 1.0)
            return final + (1 - final) * 0.5 * (1 + cos(pi * part))

        return LambdaLR(optimizer, factor)


@dataclass(frozen=True)
class Constant(Schedule):
    """One learning rate from the first step to the last."""

    def build(self, optimizer: torch.optim.Optimizer, steps: int, epochs: int) -> LRScheduler:
        return LambdaLR(optimizer, lambda step: 1.0)
