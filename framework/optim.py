"""Optimizers and learning-rate schedules as small config objects, and the parameter groups that they get."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices and kernels with decay; norms, biases and what modules name in `no_decay` without.

    The rule of timm and of all the papers' codes here: whatever has one dimension or fewer is not decayed, nor are
    positions and tokens. Frozen parameters are in neither.
    """
    spared: set[int] = set()
    for module in model.modules():
        for name in getattr(module, "no_decay", ()):
            parameter = getattr(module, name, None)
            if parameter is not None:
                spared.add(id(parameter))
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (plain if parameter.ndim <= 1 or id(parameter) in spared else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class Optimizer(ABC):
    """Makes the optimizer of a run. Has `lr`, the peak learning rate."""

    lr: float

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

    Source: Loshchilov and Hutter 2017, arXiv 1711.05101.
    """

    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def build(self, model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
        groups = parameter_groups(model, self.weight_decay)
        betas = self.betas[0], self.betas[1]
        return torch.optim.AdamW(groups, lr=self.lr, betas=betas, eps=self.eps, fused=fused or None)


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum.

    Args:
        lr: peak learning rate.
        momentum: decay of the running mean of gradients.
        weight_decay: on matrices and kernels only; never on norms, biases, positions and tokens.
        nesterov: whether the gradient is taken ahead of the momentum step.
    """

    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    nesterov: bool = True

    def build(self, model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
        groups = parameter_groups(model, self.weight_decay)
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=fused or None)


class Schedule(ABC):
    """Makes the learning-rate schedule of a run; it is stepped with every optimizer step."""

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

        def factor(peak: float) -> Callable[[int], float]:
            def at(step: int) -> float:
                if step < warmup:
                    return (self.warmup_lr + (peak - self.warmup_lr) * step / warmup) / peak
                part = min((step - warmup) / max(steps - warmup, 1), 1.0)
                return (self.min_lr + (peak - self.min_lr) * 0.5 * (1 + cos(pi * part))) / peak

            return at

        return LambdaLR(optimizer, [factor(group["lr"]) for group in optimizer.param_groups])


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
