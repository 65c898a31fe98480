"""Attention by each of its forms against torch's own in float64: with the C++ kernel, and on a processor without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from blocks.attention import Attention
from blocks.base import Site
from blocks.kernels import attention, native
from tests.contract import randomise
from tests.kernels import draw, error, saved_bytes

DTYPES = [torch.float32, torch.bfloat16]


def has(dtype: torch.dtype) -> bool:
    library = native.library()
    return library is not None and (dtype is torch.float32 or hasattr(library, "attention_forward_bf16"))


@pytest.fixture(params=["kernel", "AVX2", "no kernel"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there is a kernel: this processor's, or the one for older processors."""
    if request.param == "no kernel":
        monkeypatch.setattr(native, "library", lambda: None)
        return False
    if native.library() is None or request.param == native.capability():
        pytest.skip("no compiler, or a processor without a kernel, or with no other")
    if request.param == "AVX2":
        found = native.load("AVX2", native.cache_folder())
        monkeypatch.setattr(native, "library", lambda: found)
    return True


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernel's functions that were called."""
    found: list[str] = []
    call = attention.call
    monkeypatch.setattr(attention, "call", lambda name, *rest: found.append(name) or call(name, *rest))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "n", "m", "d"),
    [(2, 5, 5, 6), (2, 70, 70, 32), (2, 1, 70, 32), (2, 12, 3, 16), (2, 197, 197, 64), (2, 103, 33, 18), (2, 2, 1, 2),
     (2, 7, 400, 130),
     # heads side by side: of the words of small nets, one query, more than a vector of channels, more keys or fewer
     (11, 17, 17, 12), (22, 5, 5, 64), (7, 10, 10, 16), (8, 26, 26, 34), (22, 1, 17, 12), (22, 1, 17, 64),
     (10, 20, 7, 130), (22, 3, 45, 20), (5, 64, 64, 8), (5, 1, 1, 2)],
)  # fmt: skip
def test_attention_equals_float64(
    kernel: bool, calls: list[str], dtype: torch.dtype, b: int, n: int, m: int, d: int
) -> None:
    """At strides as in a joint projection; the kernel no further off than matrix products and a softmax."""
    parts = [draw(b, length, 3, d).transpose(1, 2).to(dtype).requires_grad_() for length in (n, m, m + 1)]
    parts[2] = parts[2].detach()[:, :, :m].requires_grad_()
    exact = [p.detach().double().requires_grad_() for p in parts]
    grad = draw(b, 3, n, d).to(dtype)
    out, want = attention.attend(*parts), F.scaled_dot_product_attention(*exact)
    assert out.dtype == dtype
    theirs = [p.detach().requires_grad_() for p in parts]
    own = attention.spelled_out(*theirs)
    results = [(out, *torch.autograd.grad(out, parts, grad)), (own, *torch.autograd.grad(own, theirs, grad)),
               (want, *torch.autograd.grad(want, exact, grad.double()))]  # fmt: skip
    few = n < attention.FEW <= m and (m > attention.SHORT or 3 * b < attention.MANY)
    served = kernel and has(dtype) and not (dtype is torch.float32 and few)
    for a, b, c in zip(*results, strict=True):
        assert (a.double() - c).norm() <= (1.2 if served else 6) * (b.double() - c).norm() + 1e-7 * c.norm() + 1e-6
    assert len(calls) == (2 if served else 0)
    with torch.no_grad():
        torch.testing.assert_close(attention.attend(*parts), out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_in_two_threads(dtype: torch.dtype) -> None:
    """Equal to the last bit, also where few heads are cut into parts of their queries."""
    if not has(dtype):
        pytest.skip("no kernel here")
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for heads in (1, 3):
                qkv = draw(1, 230, 3, heads, 32).to(dtype).requires_grad_()
                out = attention.attend_joined(qkv)
                results.append((out.detach(), *torch.autograd.grad(out, qkv, torch.ones_like(out))))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(results[:2], results[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_scores_far_from_zero(kernel: bool) -> None:
    """All far below zero, or one so large that the others are none: no weight is lost and none is infinite."""
    q, k, v = draw(1, 1, 9, 16), draw(1, 1, 21, 16), draw(1, 1, 22, 16)[:, :, 1:]
    for by in (-300.0, 300.0):
        q1, k1 = torch.cat([q, q.new_full((1, 1, 9, 2), by)], -1), torch.cat([k, k.new_full((1, 1, 21, 2), 300.0)], -1)
        v1 = torch.cat([v, v[..., :2]], -1)
        want = F.scaled_dot_product_attention(q1.double(), k1.double(), v1.double())
        assert error(attention.attend(q1, k1, v1), want) < 1e-2  # scores of 4e4 in float32
        want = F.scaled_dot_product_attention(by * q.double(), k.double(), v.double())
        assert error(attention.attend(by * q, k, v), want) < 1e-4
    q[0, 0, 3, 2] = float("nan")
    assert attention.attend(q, k, v).isnan().any(-1).squeeze().tolist() == [i == 3 for i in range(9)]


def test_what_the_kernel_leaves_to_others(calls: list[str]) -> None:
    """Bias, dropout, long sequences, wide heads, float64, meta, odd channels or places in bfloat16, watched tensors,
    keys that are fewer than there are queries for.
    """
    q = draw(1, 2, 8, 16)
    attention.attend(q, q, q, bias=draw(1, 2, 8, 8))
    attention.attend(q, q, q, drop=0.5)
    attention.attend(q, long := draw(1, 2, attention.MOST_KEYS + 1, 16), long)
    attention.attend(wide := draw(1, 1, 8, attention.MOST_CHANNELS + 1), wide, wide)
    attention.attend(q.double(), q.double(), q.double())
    assert attention.attend(q.to("meta"), q.to("meta"), q.to("meta")).is_meta
    low = draw(1, 2, 8, 18).bfloat16()
    attention.attend(low[..., :15], low[..., :15], low[..., :15])
    attention.attend(low[..., 1:17], low[..., 1:17], low[..., 1:17])
    attention.attend(every := draw(1, 2, 8, 32)[..., ::2], every, every)
    attention.attend(none := draw(0, 2, 8, 16), none, none)
    torch.func.vmap(attention.attend)(*(draw(3, 1, 2, 8, 16),) * 3)
    attention.attend(draw(3, 2, 8, 16), draw(1, 2, 8, 16), draw(1, 2, 8, 16))
    assert calls == []


def test_attention_with_bias_and_drop() -> None:
    q, k, v = (draw(2, 3, 9, 8 * i)[..., :8].bfloat16() for i in (1, 2, 3))
    bias = draw(1, 3, 9, 9)
    want = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=bias)
    assert error(attention.attend(q, k, v, bias), want.double()) < 2e-2
    torch.manual_seed(0)
    mean = torch.stack([attention.attend(q, k, v, drop=0.5).float() for _ in range(400)]).mean(0)
    assert error(mean, F.scaled_dot_product_attention(q.float(), k.float(), v.float()).double()) < 0.1


def test_attention_keeps_what_is_smaller(kernel: bool) -> None:
    """The kernel: queries, keys and values and two numbers for each query. Without it: the weights of short ones."""
    kernel = kernel and has(torch.bfloat16)
    for n, weights in ((70, 0), (20, 2 * 3 * 20 * 20 * 2)):
        qkv = draw(2, n, 3, 3, 32).bfloat16().requires_grad_()
        least, more = 2 * n * 9 * 32 * 2, 2 * 3 * n * 2 * 4 if kernel else weights
        assert saved_bytes(lambda qkv=qkv: attention.attend_joined(qkv), []) == least + more


def test_attention_twice_differentiated(kernel: bool) -> None:
    q, k, v = (draw(1, 2, 5, 8 + i)[..., :8].requires_grad_() for i in range(3))
    (first,) = torch.autograd.grad(attention.attend(q, k, v).square().sum(), q, create_graph=True)
    got = torch.autograd.grad(first.square().sum(), [q, k, v])
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    exact = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1) @ v
    (first,) = torch.autograd.grad(exact.square().sum(), q, create_graph=True)
    for a, b in zip(got, torch.autograd.grad(first.square().sum(), [q, k, v]), strict=True):
        assert error(a, b) < 1e-5


# ---- the mixer


def mixer(**args: Any) -> Attention:
    torch.manual_seed(0)
    block = Attention(Site.at(32, 4), heads=4, **args)
    randomise(block)
    return block


def gradients(block: nn.Module, x: Tensor, low: bool, again: bool = False) -> list[Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        out = checkpoint(block, x, (4, 4), use_reentrant=False) if again else block(x, (4, 4))
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), [x, *block.parameters()])]


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_mixer_equals_float64(kernel: bool, calls: list[str], low: bool, bias: bool) -> None:
    block, x = mixer(qkv_bias=bias), draw(3, 17, 32)
    double = mixer(qkv_bias=bias).double()
    got = gradients(block, x, low)
    assert len(calls) == (2 if kernel and has(torch.bfloat16 if low else torch.float32) else 0)
    for a, b in zip(got, gradients(double, x.double(), False), strict=True):
        assert error(a, b) < (3e-2 if low else 2e-6)
    for a, b in zip(got, gradients(block, x, low, again=True), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("low", [False, True])
def test_mixer_of_prefix_rows(kernel: bool, low: bool) -> None:
    block, x = mixer(qkv_bias=True), draw(3, 17, 32)
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        torch.testing.assert_close(block(x, (4, 4), rows=2), block(x, (4, 4))[:, :2])


def test_compiled_and_exported_attention_is_torch_s(calls: list[str]) -> None:
    block, x = mixer().eval(), draw(2, 16, 32)
    program = torch.export.export(block, (x, (4, 4)))
    assert [node for node in program.graph.nodes if "scaled_dot_product_attention" in str(node.target)]
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="eager")(x, (4, 4))
    assert not calls
    torch.testing.assert_close(compiled, block(x, (4, 4)))
    torch.testing.assert_close(program.module()(x, (4, 4)), compiled)
