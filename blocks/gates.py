"""Squeeze-and-excitation, as a gate on a branch and as a block of its own.

Both forms pool over all tokens, prefix included, as the original codes do (Hu et al. 2017, arXiv 1709.01507;
TNT's form: arXiv 2103.00112, section 4.4, huawei-noah/Efficient-AI-Backbones tnt_pytorch/tnt.py).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from blocks.base import (
    Block,
    Features,
    Gate,
    GateFactory,
    Site,
    linear,
    to_map,
    tokens,
)


class NoGate(Gate):
    """No gate: the branch as it is."""

    per_token = True

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x


class SigmoidGate(Gate):
    """Classic squeeze-and-excitation: `x · sigmoid(W₂ relu(W₁ mean(x)))`.

    Args:
        reduction: the width is divided by this inside the gate.
        bias: whether its two layers have biases; T2T-ViT's have none.

    Source: arXiv 1709.01507; on tokens as in yitu-opensource/T2T-ViT models/transformer_block.py.
    """

    source = "SE-Net, arXiv 1709.01507; yitu-opensource/T2T-ViT (Clear BSD)"

    def __init__(self, dim: int, reduction: int = 16, bias: bool = False) -> None:
        super().__init__()
        hidden = max(dim // reduction, 1)
        self.fc1 = linear(dim, hidden, bias)
        self.fc2 = linear(hidden, dim, bias)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean(1, keepdim=True)))))


class TanhGate(Gate):
    """TNT's squeeze-and-excitation: `x + x · tanh(W₂ relu(W₁ norm(mean(x))))`, which starts near the identity.

    Args:
        ratio: width inside the gate, as a share of the width outside.

    Source: huawei-noah/Efficient-AI-Backbones tnt_pytorch/tnt.py, class SE.
    """

    source = "TNT, arXiv 2103.00112; huawei-noah/Efficient-AI-Backbones"

    def __init__(self, dim: int, ratio: float = 0.25) -> None:
        super().__init__()
        hidden = max(int(dim * ratio), 1)
        self.norm = nn.LayerNorm(dim)
        self.fc1 = linear(dim, hidden)
        self.fc2 = linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.tanh(self.fc2(torch.relu(self.fc1(self.norm(x.mean(1, keepdim=True))))))
        return x + x * gate


class SE(Block):
    """Squeeze-and-excitation as a block of its own: gates map and prefix tokens together.

    Args:
        gate: which form: `SigmoidGate` or `TanhGate`.

    Source: arXiv 1709.01507.
    """

    source = "SE-Net, arXiv 1709.01507"
    counts = False

    def __init__(self, site: Site, gate: GateFactory = SigmoidGate) -> None:
        super().__init__()
        site.keeps_width(self)
        self.gate = gate(site.inp.dim)
        self.out = site.inp

    def forward(self, features: Features) -> Features:
        map, prefix = features.map, features.prefix
        grid = (map.shape[2], map.shape[3])
        x = tokens(map)
        if prefix is None:
            return features.replace(map=to_map(self.gate(x), grid))
        count = prefix.shape[1]
        x = self.gate(torch.cat([prefix, x], dim=1))
        return features.replace(map=to_map(x[:, count:], grid), prefix=x[:, :count])
