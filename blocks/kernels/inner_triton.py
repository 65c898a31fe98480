"""The inner block's kernel for CUDA, in Triton: forward and backward, and only the input kept between them.

A program takes tiles of TOK tokens, several sets each, with all their channels. Attention runs over all tokens of a
tile at once, one head at a time: other heads' channels are masked out of the queries and other sets' tokens out of the
scores. That wastes products and saves everything else. Each program sums its own share of the weights' gradients, so
that the result does not depend on the order in which programs run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS = 64  # in a tile, at least
HIDDEN = 32  # hidden channels at a time
PROGRAMS = 512  # of the backward pass, at most


@triton.jit
def _dot(a, b, PREC: tl.constexpr):
    """a·b in float32, from operands of the precision that was asked for."""
    if PREC == "bf16":
        out = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif PREC == "fp16":
        out = tl.dot(a.to(tl.float16), b.to(tl.float16))
    else:
        out = tl.dot(a, b, input_precision=PREC)
    return out


@triton.jit
def _norm(x, ch_ok, c, eps):
    """The normalised rows, and what they were multiplied by."""
    d = tl.where(ch_ok[None, :], x - (tl.sum(x, 1) / c)[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(d * d, 1) / c + eps)
    return d * r[:, None], r


@triton.jit
def _norm_back(dn, n, r, ch_ok, c):
    mean = (tl.sum(dn, 1) / c)[:, None]
    slope = (tl.sum(dn * n, 1) / c)[:, None]
    return tl.where(ch_ok[None, :], (dn - mean - n * slope) * r[:, None], 0.0)


@triton.jit
def _matrix(p, rows, cols, row0, stride, row_end, c):
    """Rows `row0 + rows` below `row_end` and columns `cols` of a matrix, zero outside."""
    ok = ((row0 + rows) < row_end)[:, None] & (cols < c)[None, :]
    return tl.load(p + (row0 + rows)[:, None] * stride + cols[None, :], mask=ok, other=0.0)


@triton.jit
def _add(p, value, rows, cols, row0, stride, row_end, c):
    ok = ((row0 + rows) < row_end)[:, None] & (cols < c)[None, :]
    p += (row0 + rows)[:, None] * stride + cols[None, :]
    tl.store(p, tl.load(p, mask=ok, other=0.0) + value, mask=ok)


@triton.jit
def _add_row(p, value, at, ok):
    tl.store(p + at, tl.load(p + at, mask=ok, other=0.0) + value, mask=ok)


@triton.jit
def _weights(q, k, ch, h, d, scale, own, PREC: tl.constexpr):
    """Attention weights of head `h`."""
    s = _dot(tl.where((ch // d == h)[None, :], q, 0.0), tl.trans(k), PREC) * scale
    s = tl.where(own, s, -1e30)
    e = tl.exp(s - tl.max(s, 1)[:, None])
    return e / tl.sum(e, 1)[:, None]


@triton.jit
def _phi(x):
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def _place(tile, sets, m, c, ch, ch_ok, TOK: tl.constexpr, MP: tl.constexpr):
    """Of a tile's tokens: set, addresses of all channels, which of them exist, and which tokens see which."""
    token = tl.arange(0, TOK)
    set_ = tile * (TOK // MP) + token // MP
    word = token % MP
    ok = (word < m) & (set_ < sets)
    at = set_.to(tl.int64)[:, None] * (c * m) + ch[None, :] * m + word[:, None]
    own = ((token // MP)[:, None] == (token // MP)[None, :]) & (word < m)[None, :]
    return set_, at, ok, ok[:, None] & ch_ok[None, :], own


@triton.jit
def _forward(
    x_p, y_p, g1_p, b1_p, qkv_p, qkv_b_p, proj_p, proj_b_p, g2_p, b2_p, fc1_p, fc1_b_p, fc2_p, fc2_b_p, s1_p, s2_p,
    sets, m, c, d, heads, hidden, scale, eps1, eps2,
    TOK: tl.constexpr, MP: tl.constexpr, CP: tl.constexpr, HB: tl.constexpr,
    BIAS: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    ch = tl.arange(0, CP)
    ch_ok = ch < c
    set_, at, ok, both, own = _place(tl.program_id(0), sets, m, c, ch, ch_ok, TOK, MP)
    x = tl.load(x_p + at, mask=both, other=0.0)

    n, _ = _norm(x, ch_ok, c, eps1)
    n = n * tl.load(g1_p + ch, mask=ch_ok, other=0.0)[None, :] + tl.load(b1_p + ch, mask=ch_ok, other=0.0)[None, :]
    q = _dot(n, tl.trans(_matrix(qkv_p, ch, ch, 0, c, c, c)), PREC)
    k = _dot(n, tl.trans(_matrix(qkv_p, ch, ch, c, c, 2 * c, c)), PREC)
    v = _dot(n, tl.trans(_matrix(qkv_p, ch, ch, 2 * c, c, 3 * c, c)), PREC)
    if BIAS:
        q += tl.load(qkv_b_p + ch, mask=ch_ok, other=0.0)[None, :]
        k += tl.load(qkv_b_p + c + ch, mask=ch_ok, other=0.0)[None, :]
        v += tl.load(qkv_b_p + 2 * c + ch, mask=ch_ok, other=0.0)[None, :]
    o = tl.zeros([TOK, CP], tl.float32)
    for h in range(heads):
        p = _weights(q, k, ch, h, d, scale, own, PREC)
        o += _dot(p, tl.where((ch // d == h)[None, :], v, 0.0), PREC)
    z = _dot(o, tl.trans(_matrix(proj_p, ch, ch, 0, c, c, c)), PREC)
    z += tl.load(proj_b_p + ch, mask=ch_ok, other=0.0)[None, :]
    if S1:
        z *= tl.load(s1_p + set_, mask=ok, other=0.0)[:, None]
    x += z

    n, _ = _norm(x, ch_ok, c, eps2)
    n = n * tl.load(g2_p + ch, mask=ch_ok, other=0.0)[None, :] + tl.load(b2_p + ch, mask=ch_ok, other=0.0)[None, :]
    z = tl.zeros([TOK, CP], tl.float32)
    unit = tl.arange(0, HB)
    for u in range(0, hidden, HB):
        a = _dot(n, tl.trans(_matrix(fc1_p, unit, ch, u, c, hidden, c)), PREC)
        a += tl.load(fc1_b_p + u + unit, mask=u + unit < hidden, other=0.0)[None, :]
        z += _dot(a * _phi(a), tl.trans(_matrix(fc2_p + u, ch, unit, 0, hidden, c, hidden - u)), PREC)
    z += tl.load(fc2_b_p + ch, mask=ch_ok, other=0.0)[None, :]
    if S2:
        z *= tl.load(s2_p + set_, mask=ok, other=0.0)[:, None]
    tl.store(y_p + at, x + z, mask=both)


@triton.jit
def _backward(
    x_p, dy_p, dx_p, g1_p, b1_p, qkv_p, qkv_b_p, proj_p, proj_b_p, g2_p, b2_p, fc1_p, fc1_b_p, fc2_p, fc2_b_p,
    s1_p, s2_p,
    dg1_p, db1_p, dqkv_p, dqkv_b_p, dproj_p, dproj_b_p, dg2_p, db2_p, dfc1_p, dfc1_b_p, dfc2_p, dfc2_b_p,
    sets, m, c, d, heads, hidden, scale, eps1, eps2, tiles,
    TOK: tl.constexpr, MP: tl.constexpr, CP: tl.constexpr, HB: tl.constexpr,
    BIAS: tl.constexpr, S1: tl.constexpr, S2: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    ch = tl.arange(0, CP)
    ch_ok = ch < c
    unit = tl.arange(0, HB)
    me = tl.program_id(0).to(tl.int64)
    # this program's share of each gradient
    dg1_p += me * c
    db1_p += me * c
    dg2_p += me * c
    db2_p += me * c
    dqkv_p += me * 3 * c * c
    dqkv_b_p += me * 3 * c
    dproj_p += me * c * c
    dproj_b_p += me * c
    dfc1_p += me * hidden * c
    dfc1_b_p += me * hidden
    dfc2_p += me * hidden * c
    dfc2_b_p += me * c
    g1 = tl.load(g1_p + ch, mask=ch_ok, other=0.0)[None, :]
    g2 = tl.load(g2_p + ch, mask=ch_ok, other=0.0)[None, :]
    b1 = tl.load(b1_p + ch, mask=ch_ok, other=0.0)[None, :]
    b2 = tl.load(b2_p + ch, mask=ch_ok, other=0.0)[None, :]

    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        set_, at, ok, both, own = _place(tile, sets, m, c, ch, ch_ok, TOK, MP)
        x = tl.load(x_p + at, mask=both, other=0.0)
        dy = tl.load(dy_p + at, mask=both, other=0.0)

        # forward again, up to the second norm
        n1, r1 = _norm(x, ch_ok, c, eps1)
        n = n1 * g1 + b1
        q = _dot(n, tl.trans(_matrix(qkv_p, ch, ch, 0, c, c, c)), PREC)
        k = _dot(n, tl.trans(_matrix(qkv_p, ch, ch, c, c, 2 * c, c)), PREC)
        v = _dot(n, tl.trans(_matrix(qkv_p, ch, ch, 2 * c, c, 3 * c, c)), PREC)
        if BIAS:
            q += tl.load(qkv_b_p + ch, mask=ch_ok, other=0.0)[None, :]
            k += tl.load(qkv_b_p + c + ch, mask=ch_ok, other=0.0)[None, :]
            v += tl.load(qkv_b_p + 2 * c + ch, mask=ch_ok, other=0.0)[None, :]
        o = tl.zeros([TOK, CP], tl.float32)
        for h in range(heads):
            p = _weights(q, k, ch, h, d, scale, own, PREC)
            o += _dot(p, tl.where((ch // d == h)[None, :], v, 0.0), PREC)
        z = _dot(o, tl.trans(_matrix(proj_p, ch, ch, 0, c, c, c)), PREC)
        z += tl.load(proj_b_p + ch, mask=ch_ok, other=0.0)[None, :]
        if S1:
            s1 = tl.load(s1_p + set_, mask=ok, other=0.0)[:, None]
            z *= s1
        n2, r2 = _norm(x + z, ch_ok, c, eps2)
        n = n2 * g2 + b2

        # back through the MLP
        dz = dy
        if S2:
            dz = dy * tl.load(s2_p + set_, mask=ok, other=0.0)[:, None]
        _add_row(dfc2_b_p, tl.sum(dz, 0), ch, ch_ok)
        dn = tl.zeros([TOK, CP], tl.float32)
        for u in range(0, hidden, HB):
            w1 = _matrix(fc1_p, unit, ch, u, c, hidden, c)
            w2 = _matrix(fc2_p + u, ch, unit, 0, hidden, c, hidden - u)
            a = _dot(n, tl.trans(w1), PREC)
            a += tl.load(fc1_b_p + u + unit, mask=u + unit < hidden, other=0.0)[None, :]
            phi = _phi(a)
            da = _dot(dz, w2, PREC) * (phi + a * 0.3989422804014327 * tl.exp(-0.5 * a * a))
            _add(dfc2_p + u, _dot(tl.trans(dz), a * phi, PREC), ch, unit, 0, hidden, c, hidden - u)
            _add(dfc1_p, _dot(tl.trans(da), n, PREC), unit, ch, u, c, hidden, c)
            _add_row(dfc1_b_p, tl.sum(da, 0), u + unit, u + unit < hidden)
            dn += _dot(da, w1, PREC)
        _add_row(dg2_p, tl.sum(dn * n2, 0), ch, ch_ok)
        _add_row(db2_p, tl.sum(dn, 0), ch, ch_ok)
        dx = dy + _norm_back(dn * g2, n2, r2, ch_ok, c)

        # back through attention
        dz = dx
        if S1:
            dz = dx * s1
        _add_row(dproj_b_p, tl.sum(dz, 0), ch, ch_ok)
        _add(dproj_p, _dot(tl.trans(dz), o, PREC), ch, ch, 0, c, c, c)
        do = _dot(dz, _matrix(proj_p, ch, ch, 0, c, c, c), PREC)
        dq = tl.zeros([TOK, CP], tl.float32)
        dk = tl.zeros([TOK, CP], tl.float32)
        dv = tl.zeros([TOK, CP], tl.float32)
        for h in range(heads):
            head = (ch // d == h)[None, :]
            mine = tl.where(head, do, 0.0)
            p = _weights(q, k, ch, h, d, scale, own, PREC)
            dp = _dot(mine, tl.trans(v), PREC)
            ds = p * (dp - tl.sum(mine * o, 1)[:, None]) * scale
            dv += _dot(tl.trans(p), mine, PREC)
            dq += _dot(ds, tl.where(head, k, 0.0), PREC)
            dk += _dot(tl.trans(ds), tl.where(head, q, 0.0), PREC)
        n = n1 * g1 + b1
        _add(dqkv_p, _dot(tl.trans(dq), n, PREC), ch, ch, 0, c, c, c)
        _add(dqkv_p, _dot(tl.trans(dk), n, PREC), ch, ch, c, c, 2 * c, c)
        _add(dqkv_p, _dot(tl.trans(dv), n, PREC), ch, ch, 2 * c, c, 3 * c, c)
        if BIAS:
            _add_row(dqkv_b_p, tl.sum(dq, 0), ch, ch_ok)
            _add_row(dqkv_b_p + c, tl.sum(dk, 0), ch, ch_ok)
            _add_row(dqkv_b_p + 2 * c, tl.sum(dv, 0), ch, ch_ok)
        dn = _dot(dq, _matrix(qkv_p, ch, ch, 0, c, c, c), PREC)
        dn += _dot(dk, _matrix(qkv_p, ch, ch, c, c, 2 * c, c), PREC)
        dn += _dot(dv, _matrix(qkv_p, ch, ch, 2 * c, c, 3 * c, c), PREC)
        _add_row(dg1_p, tl.sum(dn * n1, 0), ch, ch_ok)
        _add_row(db1_p, tl.sum(dn, 0), ch, ch_ok)
        tl.store(dx_p + at, dx + _norm_back(dn * g1, n1, r1, ch_ok, c), mask=both)


def _sizes(x: Tensor, heads: int, hidden: int, eps1: float, eps2: float) -> tuple[tuple[Any, ...], dict[str, int]]:
    """The kernels' numbers, and the sides of a tile: powers of two, and 16 at least, as products need them."""
    sets, c, m = x.shape
    padded = triton.next_power_of_2(m)
    sides = {"TOK": max(TOKENS, padded), "MP": padded, "CP": max(16, triton.next_power_of_2(c)), "HB": HIDDEN}
    return (sets, m, c, c // heads, heads, hidden, (c // heads) ** -0.5, eps1, eps2), sides


def _options(params: list[Tensor | None], factors: list[Tensor | None], precision: str) -> dict[str, Any]:
    return {"BIAS": params[3] is not None, "S1": factors[0] is not None, "S2": factors[1] is not None,
            "PREC": precision, "num_stages": 1}  # fmt: skip


def _filled(x: Tensor, tensors: list[Tensor | None]) -> list[Tensor]:
    """Something to point to where there is nothing; it is never read."""
    return [x if t is None else t for t in tensors]


def forward(
    x: Tensor, params: list[Tensor | None], factors: list[Tensor | None], settings: tuple[int, float, float], prec: str
) -> Tensor:
    """As `inner.inner`; `settings` are heads and both eps, `prec` one of ieee, tf32, bf16, fp16."""
    fc1 = params[8]
    assert fc1 is not None
    y = torch.empty_like(x)
    numbers, sides = _sizes(x, settings[0], fc1.shape[0], *settings[1:])
    tiles = triton.cdiv(x.shape[0], sides["TOK"] // sides["MP"])
    _forward[(tiles,)](
        x, y, *_filled(x, params), *_filled(x, factors), *numbers,
        **sides, **_options(params, factors, prec), num_warps=4,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor, x: Tensor, params: list[Tensor | None], factors: list[Tensor | None],
    settings: tuple[int, float, float], prec: str,
) -> list[Tensor]:  # fmt: skip
    """As `inner.inner_backward`."""
    fc1 = params[8]
    assert fc1 is not None
    dx = torch.empty_like(x)
    numbers, sides = _sizes(x, settings[0], fc1.shape[0], *settings[1:])
    tiles = triton.cdiv(x.shape[0], sides["TOK"] // sides["MP"])
    programs = min(tiles, PROGRAMS)
    grads = [None if p is None else x.new_zeros(programs, *p.shape) for p in params]
    _backward[(programs,)](
        x, dy, dx, *_filled(x, params), *_filled(x, factors), *_filled(x, grads), *numbers, tiles,
        **sides, **_options(params, factors, prec), num_warps=8,
    )  # fmt: skip
    return [dx, *(g.sum(0) for g in grads if g is not None)]
