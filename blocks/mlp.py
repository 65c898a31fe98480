"""Activations and the feed-forward part of a block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.base import Act, ActFactory, FeedForward, Grid, Site, linear
from blocks.kernels.gelu import gelu_linear
from blocks.kernels.layers import two_layers
from blocks.kernels.linear import Linear, eager, in_pieces, linear_gelu, recomputable, unhooked
from blocks.kernels.linear import linear as fast_linear


class GELU(Act):
    """Gaussian error linear unit, the exact erf form that TNT, DeiT and T2T use (arXiv 1606.08415)."""

    def forward(self, x: Tensor) -> Tensor:
        return recomputable(F.gelu, x)


class ReLU(Act):
    """Rectified linear unit; Next-ViT's, since deployment runtimes run it fastest."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class SiLU(Act):
    """Sigmoid linear unit, also called swish (arXiv 1702.03118)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


class Hardswish(Act):
    """Piecewise linear form of swish (arXiv 1905.02244)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(x)


class QuickGELU(Act):
    """`x · sigmoid(1.702 x)`, the quick approximation of GELU that CvT and CLIP use (arXiv 1606.08415)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


# What may be applied to some tokens at a time, and of that what a kernel knows.
ELEMENTWISE = (GELU, ReLU, SiLU, Hardswish, QuickGELU)
KERNELS: dict[type[Act], str] = {GELU: "gelu", ReLU: "relu"}


def round_width(width: float, to: int) -> int:
    """The multiple of `to` nearest to `width`, at least `to`, and never less than 0.9 of `width`.

    Source: bytedance/Next-ViT classification/nextvit.py and, before it, MobileNet's channel rule.
    """
    rounded = max(to, int(width + to / 2) // to * to)
    return rounded + to if rounded < 0.9 * width else rounded


class Mlp(FeedForward):
    """Two Linear layers with an activation between them, on each token.

    Args:
        ratio: hidden width, as a multiple of the width.
        act: the activation.
        drop: dropout rate behind each of the two layers.
        round_to: the hidden width is rounded to a multiple of this (Next-ViT: 32).

    Source: arXiv 2010.11929, section 3.1; with ReLU and rounding, the 1×1 convolutions of Next-ViT's MLP.
    """

    source = "ViT, arXiv 2010.11929"
    per_token = True

    def __init__(
        self, site: Site, ratio: float = 4.0, act: ActFactory = GELU, drop: float = 0.0, round_to: int = 1
    ) -> None:
        super().__init__()
        dim = site.inp.dim
        hidden = int(dim * ratio) if round_to == 1 else round_width(dim * ratio, round_to)
        if hidden < 1:
            raise site.error(self, f"has no hidden width: {dim} × ratio {ratio}; give a ratio above {1 / dim:.3g}")
        self.fc1 = linear(dim, hidden)
        self.act = act()
        self.fc2 = linear(hidden, dim)
        self.drop = nn.Dropout(drop)

    @property
    def drops(self) -> bool:
        """Whether something is dropped now, which the module for it decides: who samples nets leaves it in training."""
        return self.drop.training and self.drop.p > 0

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        if type(self.fc1) is Linear and unhooked(self.fc1):
            return self.behind(self.fc1.weight, self.fc1.bias, x)
        return self._rest(self.fc1(x))

    def behind(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """The MLP with these in its first layer, of which nobody may see what goes in and comes out."""
        plain = type(self.fc2) is Linear and unhooked(self.act, self.fc2, self.drop)
        if not plain or type(self.act) not in ELEMENTWISE:
            return self._rest(fast_linear(x, weight, bias))
        if type(self.act) in KERNELS and not self.drops:
            made = two_layers(x, weight, bias, self.fc2.weight, self.fc2.bias, KERNELS[type(self.act)])
            if made is not None:
                return made
        return in_pieces(lambda x: self._piece(weight, bias, x), x, self.fc1.out_features)

    def _piece(self, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        hidden = linear_gelu(x, weight, bias) if type(self.act) is GELU else None
        return self._rest(fast_linear(x, weight, bias)) if hidden is None else self.drop(self.fc2(self.drop(hidden)))

    def _rest(self, hidden: Tensor) -> Tensor:
        if type(self.act) is GELU and type(self.fc2) is Linear and unhooked(self.act, self.fc2, self.drop):
            made = None if self.drops else gelu_linear(hidden, self.fc2.weight, self.fc2.bias)
            if made is not None:
                return made
        overwrite = type(self.act) is ReLU and type(self.fc1) is Linear and unhooked(self.fc1, self.act)
        if overwrite and eager(hidden) and not (hidden.requires_grad and hidden._is_view()):
            hidden = F.relu_(hidden)
        else:
            hidden = self.act(hidden)
        return self.drop(self.fc2(self.drop(hidden)))
