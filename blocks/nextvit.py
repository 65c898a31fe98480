"""Next-ViT's convolution block (NCB) and transformer block (NTB), with norm and activation as slots.

Paper: arXiv 2207.05501. Code: bytedance/Next-ViT classification/nextvit.py. All 1×1 convolutions are Linear layers
on the tokens of a channels_last map, which are a view. In the authors' code the keys of E-MHSA are means of
sr² tokens that follow each other in raster order (not of a 2-D window), and the last N mod sr² tokens are dropped;
so it is here, since the published weights need it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocks.attention import attend_on, score_position
from blocks.base import (
    ActFactory,
    Block,
    BuildError,
    Features,
    FeedForward,
    Grid,
    Mixer,
    Norm,
    NormFactory,
    Position,
    ScorePosition,
    Shape,
    Site,
    linear,
    to_map,
    tokens,
)
from blocks.kernels import branch
from blocks.kernels.conv_branch import conv_branch
from blocks.kernels.folded import added, adds, conv_norm_act, linear_norm, norm_into_linear
from blocks.kernels.infer import Attending, convolved_onto, linear_onto, mixed, mlp_onto
from blocks.kernels.linear import unhooked
from blocks.mlp import Mlp, ReLU, round_width
from blocks.norms import BatchNorm
from blocks.positions import NetPosition
from blocks.residual import Residual, ResidualFactory

SOURCE = "Next-ViT, arXiv 2207.05501; bytedance/Next-ViT (Apache-2.0)"


class MHCA(Mixer):
    """Multi-head convolutional attention: a 3×3 convolution in groups (heads), norm, activation, and a Linear.

    Works on maps without prefix tokens.

    Args:
        head_dim: channels of a group; must divide the width.
        norm: the normalisation behind the convolution.
        act: the activation behind the norm.

    Raises:
        BuildError: `head_dim` does not divide the width, or prefix tokens come in.

    Source: arXiv 2207.05501, equation 2; bytedance/Next-ViT, class MHCA.
    """

    source = SOURCE

    def __init__(self, site: Site, head_dim: int = 32, norm: NormFactory = BatchNorm, act: ActFactory = ReLU) -> None:
        super().__init__()
        site.no_prefix(self)
        dim = site.inp.dim
        groups = site.divides(self, dim, head_dim, "head_dim")
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=groups, bias=False)
        nn.init.trunc_normal_(self.conv.weight, std=0.02)
        self.norm = norm(dim)
        self.act = act()
        self.proj = linear(dim, dim, bias=False)

    def forward(self, x: Tensor, grid: Grid, rows: int | None = None) -> Tensor:
        return self.proj(tokens(conv_norm_act(self.conv, self.norm, self.act, to_map(x, grid))))


class EMHSA(Mixer):
    """Efficient multi-head self-attention: keys and values are means of `sr_ratio²` tokens, normalised.

    Works on maps without prefix tokens.

    Args:
        head_dim: channels of a head; must divide the width.
        sr_ratio: `sr_ratio²` tokens make one key; 1 is plain attention with separate projections.
        norm: the normalisation of the pooled tokens.
        position: encoding on the scores, the net's by default.

    Raises:
        BuildError: `head_dim` does not divide the width, prefix tokens come in, fewer tokens come in than make one
            key, or a position on scores meets keys that lie on no grid.

    Source: arXiv 2207.05501, equation 5; bytedance/Next-ViT, class E_MHSA.
    """

    source = SOURCE

    def __init__(
        self,
        site: Site,
        head_dim: int = 32,
        sr_ratio: int = 1,
        norm: NormFactory = BatchNorm,
        position: Position = NetPosition(),
    ) -> None:
        super().__init__()
        site.no_prefix(self)
        dim = site.inp.dim
        self.heads = site.divides(self, dim, head_dim, "head_dim")
        if sr_ratio < 1:
            raise site.error(self, f"needs an sr_ratio of at least 1, got {sr_ratio}")
        self.pool = sr_ratio**2
        if site.inp.positions < self.pool:
            raise site.error(
                self, f"has {site.inp.positions} tokens here, too few for one key of sr_ratio {sr_ratio} "
                f"({self.pool} tokens); use sr_ratio: {max(int(site.inp.positions**0.5) // 2, 1)}"
            )  # fmt: skip
        chosen = site.position if isinstance(position, NetPosition) else position
        if self.pool > 1 and chosen.on_scores:
            raise site.error(
                self, f"cannot use {type(chosen).__name__} with sr_ratio {sr_ratio}: its keys are means of "
                f"{self.pool} tokens in a row, which lie on no grid; give it sr_ratio: 1 or position: NoPosition"
            )  # fmt: skip
        self.position = score_position(chosen, site, site.inp, self.heads, head_dim, site.inp.grid)
        self.q = linear(dim, dim)
        self.k = linear(dim, dim)
        self.v = linear(dim, dim)
        self.norm = norm(dim) if self.pool > 1 else None
        self.proj = linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid, rows: int | None = None) -> Tensor:
        return self.proj(self.attend(x, grid))

    def attend(self, x: Tensor, grid: Grid) -> Tensor:
        """What the heads give, before the last layer."""
        b, n, c = x.shape
        y = x
        if self.norm is not None:
            count = n // self.pool
            y = self.norm(x[:, : count * self.pool].reshape(b, count, self.pool, c).mean(2))
        return attend_on(self.position, self.heads, self.q(x), self.k(y), self.v(y), grid, grid, None)


class Downsample(nn.Module):
    """Next-ViT's patch embedding in front of a block: mean over stride×stride, Linear to the new width, norm.

    Where neither stride nor width changes it is the identity and has no parameters. Edge windows average only real
    pixels.
    """

    def __init__(self, dim: int, out: int, stride: int, norm: NormFactory) -> None:
        super().__init__()
        self.stride = stride
        same = stride == 1 and dim == out
        self.proj = None if same else linear(dim, out, bias=False)
        self.norm = None if same else norm(out)

    @property
    def idle(self) -> bool:
        """Whether it is the identity, and nobody looks."""
        return self.proj is None and unhooked(self)

    def forward(self, map: Tensor) -> Tensor:
        if self.proj is None or self.norm is None:
            return map
        if self.stride > 1:
            map = F.avg_pool2d(map, self.stride, self.stride, ceil_mode=True)
        grid = (map.shape[2], map.shape[3])
        x = linear_norm(self.proj, self.norm, tokens(map))
        return self.norm.on_map(to_map(self.proj(tokens(map)), grid)) if x is None else to_map(x, grid)


def normed_mlp(norm: Norm, mlp: FeedForward, x: Tensor, grid: Grid) -> Tensor:
    """`mlp(norm(x))`, with the norm in the MLP's first layer where that is possible."""
    if type(mlp) is Mlp and unhooked(mlp):
        folded = norm_into_linear(norm, mlp.fc1, x)
        if folded is not None:
            return mlp.behind(*folded, x)
    return mlp(tokens(norm.on_map(to_map(x, grid))), grid)


def added_mlp(residual: Residual, norm: Norm, mlp: FeedForward, x: Tensor, grid: Grid, fresh: bool = True) -> Tensor:
    """`residual(x, mlp(norm(x)))`; `fresh` says that nobody else has `x`."""
    if branch.serves(residual, norm, mlp, x):
        return branch.branch(residual, norm, mlp, x)
    made = mlp_onto(norm, mlp, x) if fresh and adds(residual) else None
    if made is not None:
        return made
    last = mlp.fc2 if type(mlp) is Mlp and unhooked(mlp, mlp.drop) and not mlp.drops else mlp
    return added(residual, x, normed_mlp(norm, mlp, x, grid), last)


def added_mhca(
    residual: Residual,
    mixer: Mixer,
    x: Tensor,
    grid: Grid,
    behind: tuple[Residual, Norm, FeedForward] | None = None,
) -> Tensor:
    """`residual(x, mixer(x, grid))`, and of that `added_mlp`, if there is something behind it."""
    made = inferred_mhca(residual, mixer, x, grid, behind)
    if made is not None:
        return made
    known = _known_mhca(mixer)
    if known is not None:
        made = conv_branch(residual, x, grid, (known.conv, known.norm, known.act), known.proj)
    x = added(residual, x, mixer(x, grid), mixer if known is None else known.proj) if made is None else made
    return x if behind is None else added_mlp(*behind, x, grid, fresh=adds(residual))


def inferred_mhca(
    residual: Residual,
    mixer: Mixer,
    x: Tensor,
    grid: Grid,
    behind: tuple[Residual, Norm, FeedForward] | None = None,
) -> Tensor | None:
    """`added_mhca` in one call without gradients; None where that is not possible."""
    known = _known_mhca(mixer)
    if known is None or not adds(residual) or not (behind is None or adds(behind[0])):
        return None
    parts = (known.conv, known.norm, known.act)
    return convolved_onto(x, grid, parts, known.proj, None if behind is None else behind[1:])


def _known_mhca(mixer: Mixer) -> MHCA | None:
    """A mixer that is an MHCA, no subclass of it, at which nobody looks."""
    return mixer if isinstance(mixer, MHCA) and type(mixer) is MHCA and unhooked(mixer) else None


def added_emhsa(residual: Residual, mixer: Mixer, x: Tensor, normed: Tensor, grid: Grid) -> Tensor:
    """`residual(x, mixer(normed, grid))`."""
    if not (isinstance(mixer, EMHSA) and type(mixer) is EMHSA and unhooked(mixer)):
        return residual(x, mixer(normed, grid))
    seen = mixer.attend(normed, grid)
    made = linear_onto(x, seen, mixer.proj) if adds(residual) else None
    return added(residual, x, mixer.proj(seen), mixer.proj) if made is None else made


def _reduced(site: Site, who: Block, dim: int) -> Shape:
    """The shape behind a block that takes the offered stride; words and prefix stay as they are."""
    h, w = site.inp.grid
    if site.inp.prefix and dim != site.inp.dim:
        raise site.error(
            who, f"changes the width from {site.inp.dim} to {dim}, but {site.inp.prefix} prefix token(s) of width "
            f"{site.inp.dim} come along; put ClassToken behind it"
        )  # fmt: skip
    return replace(site.inp, dim=dim, grid=(-(-h // site.stride), -(-w // site.stride)))


class NCB(Block):
    """Next-ViT's convolution block: patch embedding (takes stride and width), MHCA, norm and MLP.

    Prefix tokens and words pass unchanged.

    Args:
        head_dim: channels of a head of the MHCA; must divide the width.
        mlp_ratio: hidden width of the MLP, rounded to a multiple of 32.
        norm: every normalisation in the block.
        act: every activation in the block.
        mixer_residual: how the MHCA's branch is added.
        mlp_residual: how the MLP's branch is added.

    Raises:
        BuildError: `head_dim` does not divide the width, or the width changes while prefix tokens are there.

    Source: arXiv 2207.05501, section 3.2; bytedance/Next-ViT, class NCB.
    """

    source = SOURCE

    def __init__(
        self,
        site: Site,
        head_dim: int = 32,
        mlp_ratio: float = 3.0,
        norm: NormFactory = BatchNorm,
        act: ActFactory = ReLU,
        mixer_residual: ResidualFactory = Residual,
        mlp_residual: ResidualFactory = Residual,
    ) -> None:
        super().__init__()
        self.out = _reduced(site, self, site.dim)
        here = replace(site, inp=replace(self.out, prefix=0), stride=1)
        self.embed = Downsample(site.inp.dim, site.dim, site.stride, norm)
        self.mixer = MHCA(here.inside("mixer"), head_dim, norm, act)
        self.mixer_residual = mixer_residual(here)
        self.norm = norm(site.dim)
        self.mlp = Mlp(here.inside("mlp"), mlp_ratio, act, round_to=32)
        self.mlp_residual = mlp_residual(here)

    def planned(self, features: Features) -> Features | None:
        if not self.embed.idle:
            return None
        x, grid = tokens(features.map), (features.map.shape[2], features.map.shape[3])
        made = inferred_mhca(self.mixer_residual, self.mixer, x, grid, (self.mlp_residual, self.norm, self.mlp))
        return None if made is None else features.replace(map=to_map(made, grid))

    def forward(self, features: Features) -> Features:
        map = self.embed(features.map)
        grid = (map.shape[2], map.shape[3])
        x = tokens(map)
        x = added_mhca(self.mixer_residual, self.mixer, x, grid, (self.mlp_residual, self.norm, self.mlp))
        return features.replace(map=to_map(x, grid))


class NTB(Block):
    """Next-ViT's transformer block: E-MHSA on a share of the width, MHCA on the rest, then norm and MLP on both.

    Prefix tokens and words pass unchanged.

    Args:
        head_dim: channels of a head, in both mixers.
        sr_ratio: `sr_ratio²` tokens make one key of the E-MHSA.
        shrink: share of the width that goes through the E-MHSA ("r" in the paper, mix_block_ratio in the code),
            rounded to a multiple of 32; below 1, so that the MHCA gets at least one head.
        mlp_ratio: hidden width of the MLP, rounded to a multiple of 32.
        norm: every normalisation in the block.
        act: every activation in the block.
        position: encoding on the attention scores, the net's by default.
        attn_residual: how the E-MHSA's branch is added; its drop-path rate is the block's times `shrink`.
        conv_residual: how the MHCA's branch is added; its drop-path rate is the block's times 1 - `shrink`.
        mlp_residual: how the MLP's branch is added.

    Raises:
        BuildError: `shrink` leaves a part without a whole number of heads, or the width changes while prefix tokens
            are there.

    Source: arXiv 2207.05501, section 3.3; bytedance/Next-ViT, class NTB.
    """

    source = SOURCE

    def __init__(
        self,
        site: Site,
        head_dim: int = 32,
        sr_ratio: int = 1,
        shrink: float = 0.75,
        mlp_ratio: float = 2.0,
        norm: NormFactory = BatchNorm,
        act: ActFactory = ReLU,
        position: Position = NetPosition(),
        attn_residual: ResidualFactory = Residual,
        conv_residual: ResidualFactory = Residual,
        mlp_residual: ResidualFactory = Residual,
    ) -> None:
        super().__init__()
        self.out = _reduced(site, self, site.dim)
        site.divides(self, site.dim, head_dim, "head_dim")
        attn = round_width(int(site.dim * shrink), 32)
        conv = site.dim - attn
        if not 0 < shrink < 1 or conv < head_dim or conv % head_dim or attn % head_dim:
            fits = [a / site.dim for a in range(32, site.dim, 32) if a % head_dim == 0 == (site.dim - a) % head_dim]
            raise BuildError(
                f"{site.where}: NTB with shrink {shrink} splits width {site.dim} into {attn} + {conv}, and both need "
                f"whole heads of {head_dim}; shares that fit: {', '.join(f'{f:.3g}' for f in fits) or 'none'}"
            )
        here = replace(site, inp=replace(self.out, prefix=0), stride=1)
        attn_site = replace(here, inp=replace(here.inp, dim=attn), dim=attn, drop_path=site.drop_path * shrink)
        conv_site = replace(here, inp=replace(here.inp, dim=conv), dim=conv, drop_path=site.drop_path * (1 - shrink))
        self.embed = Downsample(site.inp.dim, attn, site.stride, norm)
        self.norm1 = norm(attn)
        self.attn = EMHSA(attn_site.inside("attn"), head_dim, sr_ratio, norm, position)
        self.attn_residual = attn_residual(attn_site)
        self.project = Downsample(attn, conv, 1, norm)
        self.conv = MHCA(conv_site.inside("conv"), head_dim, norm, act)
        self.conv_residual = conv_residual(conv_site)
        self.norm2 = norm(site.dim)
        self.mlp = Mlp(here.inside("mlp"), mlp_ratio, act, round_to=32)
        self.mlp_residual = mlp_residual(here)

    def forward(self, features: Features) -> Features:
        map = self.embed(features.map)
        grid = (map.shape[2], map.shape[3])
        x = tokens(map)
        made = self.inferred(x, grid)
        if made is not None:
            return features.replace(map=to_map(made, grid))
        x = added_emhsa(self.attn_residual, self.attn, x, tokens(self.norm1.on_map(map)), grid)
        y = added_mhca(self.conv_residual, self.conv, tokens(self.project(to_map(x, grid))), grid)
        x = torch.cat([x, y], dim=2)
        x = added_mlp(self.mlp_residual, self.norm2, self.mlp, x, grid)
        return features.replace(map=to_map(x, grid))

    def planned(self, features: Features) -> Features | None:
        if not self.embed.idle:
            return None
        grid = (features.map.shape[2], features.map.shape[3])
        made = self.inferred(tokens(features.map), grid)
        return None if made is None else features.replace(map=to_map(made, grid))

    def inferred(self, x: Tensor, grid: Grid) -> Tensor | None:
        """What comes of tokens behind `embed`, in one call without gradients; None where that is not possible."""
        attn, conv = self.attn, self.conv
        if torch.is_grad_enabled() or type(attn) is not EMHSA or _known_mhca(conv) is None:
            return None
        if type(attn.position) is not ScorePosition or not unhooked(attn, attn.position, self.project):
            return None
        if not all(adds(each) for each in (self.attn_residual, self.conv_residual, self.mlp_residual)):
            return None
        if self.project.proj is None or self.project.norm is None:
            return None
        attending = Attending(self.norm1, (attn.q, attn.k, attn.v, attn.proj), attn.heads, attn.pool, attn.norm)
        project, parts = (self.project.proj, self.project.norm), (conv.conv, conv.norm, conv.act)
        return mixed(x, grid, attending, project, parts, conv.proj, (self.norm2, self.mlp))
