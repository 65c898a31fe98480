"""Blocks one behind the other, without gradients: what Python does for their kernels is done for several at once.

Behind a kernel, which has been through all of the processor's caches, the same takes Python four to five times as long.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from blocks.base import Block, Features
from blocks.kernels import native
from blocks.kernels.linear import eager, unhooked


def through(blocks: Sequence[Block], features: Features) -> Features:
    """What the last block gives."""
    if torch.is_grad_enabled() or not eager(features.map):
        for block in blocks:
            features = block(features)
        return features
    plan, read = native.Plan(), [features]  # what calls read is to live until they are made
    for block in blocks:
        made, count = None, len(plan.calls)
        # A subclass may have a forward of its own, for which this does not stand.
        if "planned" in vars(type(block)) and unhooked(block):
            with plan:
                made = block.planned(features)
        if made is None:
            del plan.calls[count:]
            plan.run()
            made, read = block(features), []
        features = made
        read.append(features)
    plan.run()
    return features
