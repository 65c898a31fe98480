"""T2T-ViT: images to tokens by soft splits, windows that overlap, with a small transformer between every two of them.

Paper: arXiv 2101.11986 (ICCV 2021). Code: yitu-opensource/T2T-ViT, models/t2t_vit.py,
token_transformer.py and token_performer.py. Its backbone is the standard `Encoder` behind `SinusoidPosition`.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.base import (
    Block,
    BlockFactory,
    Features,
    Grid,
    Mixer,
    NoPosition,
    NormFactory,
    Shape,
    Site,
    linear,
    show_grid,
    to_map,
    token_parameter,
    tokens,
)
from blocks.kernels.attention import attend
from blocks.mlp import Mlp
from blocks.norms import LayerNorm
from blocks.residual import Residual, ResidualFactory

SOURCE = "T2T-ViT, arXiv 2101.11986; yitu-opensource/T2T-ViT (Clear BSD)"


class SoftSplit(Block):
    """Joins the positions of each window of the map to one token; takes the offered stride, and has no parameters.

    Windows overlap where they are larger than the stride. The width becomes kernel² times what came in, each channel's
    positions side by side; a block behind it, or a Linear, brings that to a width of choice.

    Args:
        kernel: side of a window.

    Raises:
        BuildError: the kernel is smaller than the stride or larger than the map, or prefix tokens come in.

    Source: arXiv 2101.11986, equation 3; yitu-opensource/T2T-ViT models/t2t_vit.py.
    """

    source = SOURCE
    counts = False

    def __init__(self, site: Site, kernel: int = 3) -> None:
        super().__init__()
        site.no_prefix(self)
        s, (h, w) = site.stride, site.inp.grid
        if kernel < s:
            raise site.error(self, f"with kernel {kernel} skips pixels at stride {s}; use a kernel of at least {s}")
        # the published paddings: a map that the stride divides shrinks by just the stride
        self.kernel, self.stride, self.padding = kernel, s, (kernel - s + 1) // 2
        grid = self.split_grid((h, w))
        if min(grid) < 1:
            raise site.error(self, f"with kernel {kernel} does not fit a {show_grid((h, w))} map; use larger images")
        self.out = replace(site.inp, dim=site.inp.dim * kernel**2, grid=grid)

    def split_grid(self, grid: Grid) -> Grid:
        """The grid of windows on a map."""
        h, w = ((side + 2 * self.padding - self.kernel) // self.stride + 1 for side in grid)
        return h, w

    def forward(self, features: Features) -> Features:
        map, k, s, p = features.map, self.kernel, self.stride, self.padding
        if torch.is_grad_enabled() and map.requires_grad:
            # torch's own, whose backward pass is the faster: the sum over windows in one piece
            x = F.unfold(map, k, padding=p, stride=s).transpose(1, 2).contiguous()
            return features.replace(map=to_map(x, self.split_grid((map.shape[2], map.shape[3]))))
        windows = F.pad(map.permute(0, 2, 3, 1), (0, 0, p, p, p, p)).unfold(1, k, s).unfold(2, k, s)
        return features.replace(map=windows.flatten(3).permute(0, 3, 1, 2))


class PerformerAttention(Mixer):
    """Attention of linear cost: `φ(q) (φ(k)ᵀ v) / (φ(q) Σφ(k))` with fixed random features φ of queries and keys.

    `φ(u) = exp(w u - |u|² / 2) / √m`, always computed in float32 or better. Its mean over draws of w is what a softmax
    over `q kᵀ` without a scale gives. As a mixer of the standard encoder it keeps the width; in `PerformerToken` it
    gives the width that its site asks for.

    Args:
        heads: number of heads, which share their random features; must divide the width.
        features: number m of random features, as a multiple of a head's width.
        proj_drop: dropout rate on the output.

    Raises:
        BuildError: `heads` does not divide the width, there is no random feature, or the net has a position on scores,
            which are never formed here.

    Source: Performer, arXiv 2009.14794; yitu-opensource/T2T-ViT models/token_performer.py.
    """

    source = "Performer, arXiv 2009.14794; yitu-opensource/T2T-ViT (Clear BSD)"
    per_token = True

    w: Tensor

    def __init__(self, site: Site, heads: int = 8, features: float = 0.5, proj_drop: float = 0.0) -> None:
        super().__init__()
        dim = site.dim
        self.heads, self.head_dim = heads, site.divides(self, dim, heads, "heads")
        count = int(self.head_dim * features)
        if count < 1:
            raise site.error(self, f"has no random features: {self.head_dim} × {features}; give features above that")
        if site.position.on_scores:
            raise site.error(
                self, f"forms no scores for {type(site.position).__name__}; use a position on tokens (LearnedPosition)"
            )
        self.kqv = linear(site.inp.dim, 3 * dim)  # in this order, as published
        self.register_buffer("w", nn.init.orthogonal_(torch.empty(count, self.head_dim)) * count**0.5)
        self.proj = linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, grid: Grid, rows: int | None = None) -> Tensor:
        return self.mix(x, rows)[1]

    def mix(self, x: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """The values `(B, N, dim)` of `(B, N, C)` tokens, and what attention makes of them; the latter of `rows`."""
        b, n, _ = x.shape
        kqv = self.kqv(x)
        k, q, v = kqv.view(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = random_feature_attention(q if rows is None else q[:, :, :rows], k, v, self.w)
        y = y.to(x.dtype).transpose(1, 2).flatten(2)
        return kqv[..., -y.shape[-1] :], self.proj_drop(self.proj(y))


def random_feature_attention(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """Attention of `(B, heads, N, d)` queries, keys and values through the random features of `w` `(m, d)`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    # an exponential of squares: in half precision it would overflow
    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        q, k, v, w = (tensor.to(dtype) for tensor in (q, k, v, w))
        q, k = (
            (u @ w.t() - u.square().sum(-1, keepdim=True) / 2).exp() * w.shape[0] ** -0.5 for u in (q, k)
        )  # fmt: skip
        return q @ (k.transpose(-2, -1) @ v) / (q @ k.sum(-2).unsqueeze(-1) + 1e-8)


class TokenBlock(Block):
    """`x ← residual(v, attention(norm(x)))`, then `x ← residual(x, mlp(norm(x)))`, over prefix and map tokens.

    The first residual comes from the values v, not from what came in, so the width may change.
    """

    source = SOURCE

    def __init__(
        self,
        site: Site,
        mlp_ratio: float,
        norm: NormFactory,
        mixer_residual: ResidualFactory,
        mlp_residual: ResidualFactory,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.out = replace(site.inp, dim=site.dim)
        here = replace(site, inp=self.out)
        self.norm1 = norm(site.inp.dim)
        self.mixer_residual = mixer_residual(here.inside("mixer_residual"))
        self.norm2 = norm(site.dim)
        self.mlp = Mlp(here.inside("mlp"), mlp_ratio)
        self.mlp_residual = mlp_residual(here.inside("mlp_residual"))
        self.drop = nn.Dropout(drop)

    @abstractmethod
    def mix(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """The values of normalised tokens, in the width to give, and what attention makes of them."""

    def forward(self, features: Features) -> Features:
        map, prefix = features.map, features.prefix
        grid, count = (map.shape[2], map.shape[3]), 0
        x = tokens(map)
        if prefix is not None:
            x, count = torch.cat([prefix, x], dim=1), prefix.shape[1]
        x = self.mixer_residual(*self.mix(self.norm1(x), grid))
        x = self.mlp_residual(x, self.drop(self.mlp(self.norm2(x), grid)))
        if prefix is None:
            return features.replace(map=to_map(x, grid))
        return features.replace(map=to_map(x[:, count:], grid), prefix=x[:, :count])


class PerformerToken(TokenBlock):
    """T2T-ViT's performer: attention of linear cost whose residual comes from the values, then an MLP.

    Changes the width where that is asked for. In training the released code drops a tenth of what attention and MLP
    give, whatever the net's own dropout; `drop: 0` is without.

    Args:
        features: number of random features, as a multiple of the width.
        mlp_ratio: hidden width of the MLP, as a multiple of the width.
        norm: the normalisation before each of the two.
        mixer_residual: how attention is added to the values.
        mlp_residual: how the MLP's branch is added.
        drop: dropout rate on the output of attention and of the MLP.

    Raises:
        BuildError: there is no random feature, or the net has a position on scores.

    Source: arXiv 2101.11986, section 3.1; yitu-opensource/T2T-ViT models/token_performer.py.
    """

    def __init__(
        self,
        site: Site,
        features: float = 0.5,
        mlp_ratio: float = 1.0,
        norm: NormFactory = LayerNorm,
        mixer_residual: ResidualFactory = Residual,
        mlp_residual: ResidualFactory = Residual,
        drop: float = 0.1,
    ) -> None:
        super().__init__(site, mlp_ratio, norm, mixer_residual, mlp_residual, drop)
        self.mixer = PerformerAttention(site.inside("mixer"), 1, features, drop)

    def mix(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        return self.mixer.mix(x)


class TransformerToken(TokenBlock):
    """T2T-ViT's transformer: attention with one head whose residual comes from the values, then an MLP.

    Changes the width where that is asked for. Scores are divided by the root of the width that comes in, as in the
    released code, not by that of the head.

    Args:
        mlp_ratio: hidden width of the MLP, as a multiple of the width.
        norm: the normalisation before each of the two.
        mixer_residual: how attention is added to the values.
        mlp_residual: how the MLP's branch is added.

    Source: arXiv 2101.11986, section 3.1; yitu-opensource/T2T-ViT models/token_transformer.py.
    """

    def __init__(
        self,
        site: Site,
        mlp_ratio: float = 1.0,
        norm: NormFactory = LayerNorm,
        mixer_residual: ResidualFactory = Residual,
        mlp_residual: ResidualFactory = Residual,
    ) -> None:
        super().__init__(site, mlp_ratio, norm, mixer_residual, mlp_residual)
        self.qkv = linear(site.inp.dim, 3 * site.dim, bias=False)
        self.position = site.position.scores(site.inp, 1, site.dim, site.inp.grid)
        self.proj = linear(site.dim, site.dim)
        # `attend` divides by √dim, the released code by the root of the width that comes in
        self.scale = (site.dim / site.inp.dim) ** 0.5

    def mix(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        bias = self.position.bias(grid)
        q, k = self.position.rotate(q * self.scale, grid), self.position.rotate(k, grid)
        y = attend(q, k, v, None if bias is None else bias.to(q.dtype))
        return v.squeeze(1), self.proj(y.squeeze(1))


class TokensToTokenStem(Block):
    """Images to tokens by soft splits with a block between every two; then a Linear, prefix tokens and positions.

    Takes images of any shape, square or not.

    Args:
        token_dim: width behind each block between two splits.
        mixer: the block between two splits, which is asked for `token_dim`: `PerformerToken`, `TransformerToken`, or
            any that keeps the grid.
        kernels: side of each split's windows.
        strides: stride of each split; their product is the stem's stride.
        prefix: number of prefix tokens: 1 class token, 2 class and distillation token (in this order), 0 none.
        drop: dropout rate on the tokens, behind the positions.

    Raises:
        BuildError: `kernels` and `strides` differ in length or are empty, a split's windows leave gaps or do not fit,
            or the block between two splits changes the grid or makes prefix tokens.

    Source: arXiv 2101.11986, section 3.1; yitu-opensource/T2T-ViT models/t2t_vit.py, class T2T_module.
    """

    source = SOURCE
    counts = False
    no_decay = frozenset({"prefix"})

    def __init__(
        self,
        site: Site,
        token_dim: int = 64,
        mixer: BlockFactory = PerformerToken,
        kernels: tuple[int, ...] = (7, 3, 3),
        strides: tuple[int, ...] = (4, 2, 2),
        prefix: int = 1,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if not kernels or len(kernels) != len(strides):
            raise site.error(
                self, f"needs one stride for each kernel, got kernels {list(kernels)} and strides {list(strides)}"
            )
        self.splits, self.mixers = nn.ModuleList(), nn.ModuleList()
        shape = site.inp
        for kernel, stride in zip(kernels, strides, strict=True):
            if self.splits:
                at = site.inside("mixer", inp=shape, dim=token_dim, position=NoPosition(), word_position=NoPosition())
                block = mixer(at)
                if (block.out.grid, block.out.prefix) != (shape.grid, 0):
                    raise at.error(block, f"should keep the {show_grid(shape.grid)} map between two splits, and make "
                                          "no prefix tokens; use PerformerToken or TransformerToken")  # fmt: skip
                self.mixers.append(block)
                shape = block.out
            split = SoftSplit(site.inside("kernels", inp=shape, stride=stride), kernel)
            self.splits.append(split)
            shape = split.out
        self.proj = linear(shape.dim, site.dim)
        self.out = Shape(site.dim, shape.grid, prefix)
        self.prefix = token_parameter(1, prefix, site.dim) if prefix else None
        self.position = site.position.tokens(self.out)
        self.drop = nn.Dropout(drop)

    def forward(self, features: Features) -> Features:
        first, *splits = self.splits
        x = first(features)
        for mixer, split in zip(self.mixers, splits, strict=True):
            x = split(mixer(x))
        map = to_map(self.proj(tokens(x.map)), (x.map.shape[2], x.map.shape[3]))
        prefix = None if self.prefix is None else self.prefix.expand(map.shape[0], -1, -1)
        map, prefix = self.position(map, prefix)
        return features.replace(map=self.drop(map), prefix=None if prefix is None else self.drop(prefix))
