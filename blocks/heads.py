"""Heads: final features to class logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from blocks.base import BuildError, Features, NormFactory, Shape, linear
from blocks.norms import NoNorm


class Head(nn.Module, ABC):
    """Final features to logits `(B, num_classes)`. Built with the features' shape and the number of classes.

    Attributes:
        reads: which parts of the features it reads: the net may skip the work for the others.
        classifiers: how many logits `each` gives.
        distilled: whether the second of them are a distillation token's.
    """

    reads: ClassVar[frozenset[str]]
    classifiers: ClassVar[int] = 1
    distilled: ClassVar[bool] = False
    source: ClassVar[str] = ""

    @abstractmethod
    def forward(self, features: Features) -> Tensor:
        """The logits that are evaluated."""

    def each(self, features: Features) -> tuple[Tensor, ...]:
        """The logits of each classifier, which may learn from different terms: class token, distillation token."""
        return (self(features),)

    def evaluated(self, each: tuple[Tensor, ...]) -> Tensor:
        """What `forward` gives, from what `each` gives: the mean."""
        return torch.stack(each).mean(dim=0) if len(each) > 1 else each[0]

    def pooled(self, features: Features) -> Tensor:
        """What its classifiers read of the features, `(B, n)`: what a probe of a frozen backbone measures.

        Raises:
            BuildError: this head does not tell.
        """
        raise BuildError(f"model.head: {type(self).__name__} does not tell what it reads; give it a method `pooled`")

    def need_prefix(self, shape: Shape, count: int) -> None:
        """Raises BuildError where fewer than `count` prefix tokens come in."""
        if shape.prefix < count:
            raise BuildError(
                f"model.head: {type(self).__name__} reads {count} prefix token(s), the backbone gives {shape.prefix}; "
                f"set prefix: {count} in its stem, put ClassToken into its pattern, or use AveragePoolHead"
            )


class ClassTokenHead(Head):
    """A Linear on the first prefix token.

    Raises:
        BuildError: the backbone gives no prefix token.

    Source: ViT, arXiv 2010.11929.
    """

    reads = frozenset({"prefix"})
    source = "ViT, arXiv 2010.11929"

    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__()
        self.need_prefix(shape, 1)
        self.fc = linear(shape.dim, num_classes)

    def pooled(self, features: Features) -> Tensor:
        assert features.prefix is not None
        return features.prefix[:, 0]

    def forward(self, features: Features) -> Tensor:
        return self.fc(self.pooled(features))


class AveragePoolHead(Head):
    """A Linear on the mean over the map; prefix tokens are not read.

    Args:
        drop: dropout rate before the Linear.
        norm: the normalisation of the mean (ConvNeXt, RevCol, SReT).

    Source: Lin et al. 2013, arXiv 1312.4400.
    """

    reads = frozenset({"map"})
    source = "Network in Network, arXiv 1312.4400"

    def __init__(self, shape: Shape, num_classes: int, drop: float = 0.0, norm: NormFactory = NoNorm) -> None:
        super().__init__()
        self.norm = norm(shape.dim)
        self.drop = nn.Dropout(drop)
        self.fc = linear(shape.dim, num_classes)

    def pooled(self, features: Features) -> Tensor:
        return self.norm(features.map.mean((2, 3)))

    def forward(self, features: Features) -> Tensor:
        return self.fc(self.drop(self.pooled(features)))


class DistilledHead(Head):
    """Two Linears, on the class and on the distillation token; the logits are their mean.

    The mean of the logits is what the released code evaluates (the paper's text adds softmax outputs).

    Raises:
        BuildError: the backbone gives fewer than two prefix tokens.

    Source: DeiT, arXiv 2012.12877, section 4; facebookresearch/deit models.py.
    """

    reads = frozenset({"prefix"})
    classifiers = 2
    distilled = True
    source = "DeiT, arXiv 2012.12877; facebookresearch/deit"

    def __init__(self, shape: Shape, num_classes: int) -> None:
        super().__init__()
        self.need_prefix(shape, 2)
        self.fc = linear(shape.dim, num_classes)
        self.fc_dist = linear(shape.dim, num_classes)

    def pooled(self, features: Features) -> Tensor:
        assert features.prefix is not None
        return features.prefix[:, :2].flatten(1)

    def forward(self, features: Features) -> Tensor:
        by_class, by_distillation = self.each(features)
        return (by_class + by_distillation) / 2

    def each(self, features: Features) -> tuple[Tensor, ...]:
        assert features.prefix is not None
        return self.fc(features.prefix[:, 0]), self.fc_dist(features.prefix[:, 1])


HeadFactory = Callable[[Shape, int], Head]
