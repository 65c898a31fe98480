"""The inner block's Triton kernel in Triton's interpreter, in a process of its own that knows from the start."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from blocks.base import Features, to_map, tokens
from blocks.kernels import inner
from tests.kernels import encoder, worst

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

# side of the words' grid, width, heads, ratio, biases of queries, keys and values, sets, drop path, precision, bound
CASES = [
    (4, 24, 4, 4.0, False, 9, False, "ieee", 2e-6),
    (2, 12, 2, 4.0, True, 33, True, "tf32", 2e-6),  # the interpreter rounds nothing off
    (3, 10, 2, 3.0, True, 7, False, "ieee", 2e-6),
    (8, 40, 4, 1.5, False, 2, True, "fp16", 5e-3),
]


def check() -> None:
    from blocks.kernels import inner_triton

    for side, dim, heads, ratio, bias, sets, drop, precision, bound in CASES:
        torch.manual_seed(0)
        block = encoder(side, dim, heads, ratio, bias)
        words, grad = torch.randn(sets, side * side, dim), torch.randn(sets, side * side, dim)
        factors = [torch.rand(sets), torch.rand(sets)] if drop else [None, None]
        exact, x = deepcopy(block).double(), words.double().requires_grad_()
        s1, s2 = (1.0 if s is None else s.double().view(-1, 1, 1) for s in factors)
        y = x + s1 * exact.mixer(exact.norm1(x), (side, side))
        want = y + s2 * exact.mlp(exact.norm2(y), (side, side))
        if not drop:
            assert want.equal(tokens(exact(Features(to_map(x, (side, side)))).map))
        want.backward(grad.double())
        params = [None if p is None else p.detach() for p in inner.parameters(block)]
        settings = (heads, block.norm1.eps, block.norm2.eps)
        turned = words.transpose(1, 2).contiguous()
        out = inner_triton.forward(turned, params, factors, settings, precision)
        grads = inner_triton.backward(grad.transpose(1, 2).contiguous(), turned, params, factors, settings, precision)
        pairs = [(out.transpose(1, 2), want), (grads[0].transpose(1, 2), x.grad)]
        pairs += zip(grads[1:], (p.grad for p in inner.parameters(exact) if p is not None), strict=True)
        assert len(pairs) == (14 if bias else 13)
        errors = [worst(got, expected) for got, expected in pairs]
        assert max(errors) < bound, (side, dim, precision, errors)
        print(f"{side}×{side} words of {dim}: {max(errors):.1e}")


def test_equals_float64() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", "from tests.test_kernels_triton import check; check()"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(CASES)


def test_without_a_gpu_the_encoder_runs(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    assert not inner.works(16, 24, 4, 96, False, "bf16")
    assert capsys.readouterr().err.startswith("no Triton kernel for the words of TNT")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["highest", "high", "bf16"])
def test_on_a_gpu(precision: str) -> None:
    block = encoder(4, 24, 4).cuda()
    words, grad = torch.randn(40, 16, 24).cuda(), torch.randn(40, 16, 24).cuda()
    exact, x64 = deepcopy(block).double(), words.double().requires_grad_()
    want = tokens(exact(Features(to_map(x64, (4, 4)))).map)
    want.backward(grad.double())
    x, before = words.clone().requires_grad_(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "high" else "highest")
    try:
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            assert inner.serves(block, x)
            out = inner.run(block, x)
        out.backward(grad)
    finally:
        torch.set_float32_matmul_precision(before)
    pairs = [(out, want), (x.grad, x64.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(block.parameters(), exact.parameters(), strict=True)]
    bound = {"highest": 1e-5, "high": 1e-2, "bf16": 5e-2}[precision]
    assert max(worst(got, expected) for got, expected in pairs) < bound
