"""Equal weights for two nets, and the proof that they compute the same: unequal nets are not timed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from framework.errors import ConfigError
from framework.tasks import Task
from framework.weights.transfer import start_from

# How far logits may be apart, for each unit of the largest one but at least 1.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


class Unequal(ConfigError):
    """Two nets with the same weights give different logits."""


def liven(net: nn.Module, images: Tensor) -> None:
    """Gives a net weights under which every part counts.

    At their start norms do nothing, biases and some tables are zero, and attention is nearly uniform: what differs
    there would not show in the logits. Batch norms get the statistics of `images`, or values would grow from layer to
    layer, and rounding errors with them. The net is left in eval mode.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in net.modules():
            own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
            for name, value in own:
                if not value.is_floating_point():
                    continue
                noise = torch.randn(value.shape, generator=generator)
                if isinstance(module, nn.Linear | nn.Conv2d) and name == "weight":
                    value.copy_(noise * value[0].numel() ** -0.5)
                else:
                    value.add_(0.1 * (noise.abs() if name == "running_var" else noise))
        norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        if norms:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # stochastic depth draws, and another process should get the same weights
                net.train()(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    net.eval()


def share(reference: nn.Module, net: nn.Module) -> str:
    """Gives `net` the weights of `reference`. Says in a few words why that cannot be; empty where it was done."""
    state = reference.state_dict()
    own = net.state_dict()
    if own.keys() == state.keys() and all(own[key].shape == state[key].shape for key in own):
        net.load_state_dict(state)
        return ""
    if not isinstance(net, Task):
        return "its state dict has other keys or shapes"
    before = {key: value.clone() for key, value in own.items()}
    try:
        report = start_from(net, state)
    except ConfigError as error:
        why = str(error)
        return f"{why[:100]}…" if len(why) > 100 else why
    if report.resized or report.fresh:
        net.load_state_dict(before)
        return f"other shapes: {', '.join((*report.resized, *report.fresh))}"
    return ""


def difference(logits: Tensor, reference: Tensor) -> float:
    """The largest difference for each unit of the largest logit, or of 1 where that is less; inf for other shapes."""
    if logits.shape != reference.shape:
        return float("inf")
    scale = max(1.0, reference.abs().max().item())
    found = (logits.double() - reference.double()).abs().max().item() / scale
    return found if found == found else float("inf")


def check(name: str, logits: Tensor, other: str, reference: Tensor, dtype: str) -> float:
    """The difference of logits. Raises Unequal where it is too large."""
    found = difference(logits, reference)
    if found > TOLERANCE[dtype]:
        raise Unequal(
            f"{name} and {other}: with the same weights their logits differ by {found:.2g} in {dtype} "
            f"(at most {TOLERANCE[dtype]:g}): not timed"
        )
    return found
