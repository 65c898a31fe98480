"""Nets compiled by regions: each block by itself and in place, so that the keys of its weights stay as they are."""

from __future__ import annotations

import gc
import re
import sys

import torch
from torch import Tensor, nn

from framework.backbones import Backbone
from framework.errors import ConfigError, reason

BACKEND = "inductor"

# Modules that inductor has written, each with its constants.
CODE = "torch._inductor.runtime.compile_tasks."

# A region is a module with such a path that has none below it: a block of most of timm's nets.
REGION = re.compile(r"(?:.*\.)?(?:blocks|stages|layers|features|layer\d+)\.\d+")


def regions(net: nn.Module) -> list[nn.Module]:
    """The blocks of a net, each of which is compiled by itself; the net where it has none."""
    backbone = getattr(net, "backbone", None)
    if isinstance(backbone, Backbone):
        return [block for _, _, block in backbone.steps()] or regions(backbone)
    found = {name: module for name, module in net.named_modules() if REGION.fullmatch(name)}
    inner = [module for name, module in found.items() if not any(other.startswith(f"{name}.") for other in found)]
    return inner or [net]


def compile_regions(net: nn.Module, freezing: bool = False) -> None:
    """Compiles each region of a net at its first call.

    Args:
        net: whose regions.
        freezing: with its weights as constants, for inference; the first call needs inductor's setting of that name.
    """
    import torch._dynamo.config

    # One piece of code serves all blocks, and is compiled again for each rate of stochastic depth.
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 4096
    # The option tells frozen code from other code, which would serve as well as far as torch can see.
    options = {"freezing": True} if freezing else None
    for region in regions(net):
        region.compile(backend=BACKEND, options=options)


def forget() -> None:
    """Lets go of all that torch has compiled in this process, and of the weights that frozen code holds."""
    if "torch._dynamo" in sys.modules:  # which takes seconds to import
        torch._dynamo.reset()
    if "torch._inductor.codecache" in sys.modules:
        sys.modules["torch._inductor.codecache"].PyCodeCache.cache_clear()
        for name in [name for name in sys.modules if name.startswith(CODE)]:
            del sys.modules[name]
    gc.collect()


def need_compiler(device: torch.device, where: str) -> None:
    """Raises ConfigError at `where` if torch can compile nothing for a device, as where there is no C++ compiler."""

    def probe(x: Tensor) -> Tensor:
        return x.relu() + 1

    try:
        torch.compile(probe, backend=BACKEND)(torch.ones(8, device=device))
    except Exception as error:  # a compiler's: anything
        raise ConfigError(f"{where}: torch can compile nothing for {device.type} here: {reason(error)}") from error
