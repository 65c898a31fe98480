"""RevCol's intermediate supervision: columns before the last learn labels, and to keep the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.base import BlockFactory, BuildError, NormFactory
from blocks.convnext import ConvNeXt
from blocks.norms import LayerNorm
from blocks.revcol import QUARTERS, Decoder, need_quarters
from framework.objectives.base import Objective, Step

if TYPE_CHECKING:
    from framework.tasks.classification import Classification

WHERE = "model.objectives"


class IntermediateCrossEntropy(Objective):
    """Cross-entropy of a head's classifiers but the last: of n, the i-th counts i/n.

    Args:
        label_smoothing: share of each target that is spread over all classes.
        weight: factor in the sum of all terms.

    Raises:
        BuildError: the head has no such classifiers.

    Source: RevCol, arXiv 2212.11696, section 2.4; megvii-research/RevCol loss.py.
    """

    def __init__(self, label_smoothing: float = 0.0, weight: float = 0.7) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.weight = weight

    def setup(self, task: Classification) -> None:
        if task.head.classifiers < 2 or task.head.distilled:
            raise BuildError(
                f"{WHERE}: {type(self).__name__} teaches classifiers before the last, but {type(task.head).__name__} "
                "has none; set head: QuarterHead"
            )

    def forward(self, step: Step) -> Tensor:
        total, count = step.logits.new_zeros(()), len(step.each)
        for i, logits in enumerate(step.each[:-1], 1):
            total = total + i / count * F.cross_entropy(logits, step.targets, label_smoothing=self.label_smoothing)
        return total


class Reconstruction(Objective):
    """Images decoded from behind each quarter of the columns but the last, held against those that came in.

    Binary cross-entropy with the pixels, in 0..1 before normalisation and kept from 0.01 to 0.99; of n decoders the
    i-th counts 1 - (i - 1)/n. The decoders are of use in training alone.

    Args:
        block: the decoders' block: RevCol's is a ConvNeXt with `kernel: 3` and `mlp: {ratio: 1}`.
        norm: the decoders' normalisation.
        weight: factor in the sum of all terms.

    Raises:
        BuildError: the backbone gives no maps behind quarters, or its positions do not span whole pixels.

    Source: RevCol, arXiv 2212.11696, section 2.4; megvii-research/RevCol loss.py and models/modules.py.
    """

    reads = frozenset({"map"})

    def __init__(self, block: BlockFactory = ConvNeXt, norm: NormFactory = LayerNorm, weight: float = 3.0) -> None:
        super().__init__()
        self.block, self.norm = block, norm
        self.weight = weight
        self.decoders = nn.ModuleList()
        self.mean: Tensor
        self.std: Tensor

    def setup(self, task: Classification) -> None:
        backbone, image = task.backbone, task.image
        need_quarters(WHERE, self, backbone.out)
        up = list(reversed(backbone.levels))
        if any(image.size % level.stride for level in up):
            raise BuildError(
                f"{WHERE}: {type(self).__name__} needs an image of a multiple of {up[0].stride} px, got {image.size}"
            )
        steps = [(level.channels, (image.size // level.stride,) * 2) for level in up[1:]]
        for _ in QUARTERS:
            last = (image.channels, up[-1].stride)
            self.decoders.append(Decoder(backbone.out.dim, steps, last, self.block, self.norm, WHERE))  # type: ignore[arg-type]
        # What the data normalises with; nothing until there is data.
        self.register_buffer("mean", torch.zeros(image.channels, 1, 1), persistent=False)
        self.register_buffer("std", torch.ones(image.channels, 1, 1), persistent=False)

    def start(self, task: Classification) -> None:
        images = task.trainer.datamodule.split("train")  # type: ignore[attr-defined]
        self.mean.copy_(images.mean[:, None, None])
        self.std.copy_(images.std[:, None, None])

    def images(self, step: Step) -> list[Tensor]:
        """What each decoder gives, before the sigmoid."""
        assert step.features.extra is not None
        maps = [step.features.extra[name] for name in QUARTERS]
        return [decoder(map) for decoder, map in zip(self.decoders, maps, strict=True)]

    def forward(self, step: Step) -> Tensor:
        target = (step.images * self.std + self.mean).clamp(0.01, 0.99)
        total, count = step.images.new_zeros(()), len(self.decoders)
        for i, image in enumerate(self.images(step)):
            total = total + (1 - i / count) * F.binary_cross_entropy_with_logits(image, target)
        return total
