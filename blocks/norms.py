"""Normalisations as a slot: each works on tokens (last dimension) and on maps."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from blocks.base import BuildError, Norm
from blocks.kernels.batch_norm import batch_norm
from blocks.kernels.linear import recomputable, unhooked


def need_eps(norm: str, eps: float) -> None:
    """Raises BuildError where the root of a variance and `eps` may be none."""
    if not eps >= 0:
        raise BuildError(f"{norm} needs an eps of at least 0, got {eps}")


class LayerNorm(nn.LayerNorm, Norm):
    """Layer normalisation over the channels of each token or map position.

    Args:
        eps: added to the variance. TNT and T2T use 1e-5, ViT and DeiT 1e-6.

    Raises:
        BuildError: eps is below 0.

    Source: Ba et al. 2016, arXiv 1607.06450.
    """

    per_token = True

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        need_eps("LayerNorm", eps)
        super().__init__(dim, eps=eps)

    def forward(self, input: Tensor) -> Tensor:
        return recomputable(self._normalised, input, self.weight, self.bias)

    def _normalised(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.RMSNorm, Norm):
    """Root-mean-square normalisation over the channels, without a mean and without a bias.

    Args:
        eps: added to the mean square.

    Raises:
        BuildError: eps is below 0.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467.
    """

    per_token = True

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        need_eps("RMSNorm", eps)
        super().__init__(dim, eps=eps)


class BatchNorm(Norm):
    """Batch normalisation of each channel over batch and positions, with running statistics for evaluation.

    Args:
        eps: added to the variance.
        momentum: share of the new batch in the running statistics.

    Raises:
        BuildError: eps is below 0.

    Source: Ioffe and Szegedy 2015, arXiv 1502.03167.
    """

    def __init__(self, dim: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        need_eps("BatchNorm", eps)
        super().__init__()
        # A child, so that converting to SyncBatchNorm replaces it and leaves both of this class's forms.
        self.bn = nn.BatchNorm2d(dim, eps=eps, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        return self._normalised(x.reshape(-1, x.shape[-1], 1, 1)).reshape(x.shape)

    def on_map(self, map: Tensor) -> Tensor:
        return self._normalised(map) if unhooked(self) else super().on_map(map)

    def _normalised(self, map: Tensor) -> Tensor:
        made = batch_norm(self.bn, map)
        return self.bn(map) if made is None else made


class NoNorm(Norm):
    """No normalisation: the row of an ablation that goes without."""

    per_token = True

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x

    def on_map(self, map: Tensor) -> Tensor:
        return map
