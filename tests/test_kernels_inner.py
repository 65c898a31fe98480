"""The inner block's kernel against the encoder's own forward: in float64 for the numbers, in float32 for the net."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from statistics import fmean
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from blocks.attention import Attention
from blocks.base import Features, Site, Words, to_map, tokens
from blocks.gates import TanhGate
from blocks.kernels import inner, native
from blocks.mlp import Mlp, ReLU
from blocks.norms import LayerNorm, RMSNorm
from blocks.positions import RelativeBias, RoPE
from blocks.residual import Residual
from blocks.tnt import TNT
from blocks.transformer import Encoder
from framework.weights import convert
from tests.kernels import encoder, error, reference, worst
from tests.vectors import load, shapes, tnt

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler, or a processor without a kernel")

# side of the words' grid, width, heads, ratio of the hidden width, biases of queries, keys and values, token sets
CASES = [
    (4, 24, 4, 4.0, False, 37),
    (4, 12, 2, 4.0, True, 70),
    (4, 40, 4, 4.0, True, 9),
    (2, 24, 4, 4.0, False, 21),
    (2, 12, 2, 4.0, False, 33),
    (1, 8, 2, 2.0, True, 19),
    (3, 10, 2, 3.0, True, 7),
    (5, 20, 5, 1.5, False, 3),
    (7, 6, 6, 5.0, False, 4),
    (8, 64, 8, 2.0, True, 3),
    (3, 9, 3, 5 / 3, True, 5),
]


def errors(
    block: Encoder,
    run: Callable[[Encoder, Tensor], Tensor],
    words: Tensor,
    grad: Tensor,
    measure: Callable[[Any, Any], float] = worst,
) -> list[float]:
    """Relative errors against float64 of the result, the input's gradient, and the parameters'."""
    exact = deepcopy(block).double()
    x, x64 = words.clone().requires_grad_(), words.double().requires_grad_()
    with torch.autocast("cpu", enabled=False):
        want = reference(exact, x64)
        want.backward(grad.double())
    got = run(block, x)
    got.backward(grad)
    pairs = zip(block.parameters(), exact.parameters(), strict=True)
    return [measure(got, want), measure(x.grad, x64.grad), *(measure(p.grad, q.grad) for p, q in pairs)]


@pytest.fixture(params=["this processor", "AVX2"])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each form of the kernel."""
    if request.param == "AVX2":
        found = native.load("AVX2", native.cache_folder())
        monkeypatch.setattr(native, "library", lambda: found)
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_torch(case: tuple[Any, ...], capability: str) -> None:
    side, dim, heads, ratio, bias, sets = case
    torch.manual_seed(0)
    block = encoder(side, dim, heads, ratio, bias)
    words, grad = torch.randn(sets, side * side, dim), torch.randn(sets, side * side, dim)
    assert inner.serves(block, words)
    ours = errors(deepcopy(block), inner.run, words, grad)
    theirs = errors(deepcopy(block), reference, words, grad)
    assert len(ours) == (14 if bias else 13)
    assert max(ours) < 2 * max(theirs) + 1e-6


@pytest.mark.skipif(not inner.multiplies(), reason="a processor that does not multiply bfloat16")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16_is_more_exact_than_autocast(case: tuple[Any, ...]) -> None:
    side, dim, heads, ratio, bias, sets = case
    torch.manual_seed(0)
    block = encoder(side, dim, heads, ratio, bias)
    words, grad = torch.randn(sets, side * side, dim), torch.randn(sets, side * side, dim)
    with torch.autocast("cpu", torch.bfloat16):
        assert inner.precision(words) == "bf16"
        ours = errors(deepcopy(block), inner.run, words, grad, error)
        theirs = errors(deepcopy(block), reference, words, grad, error)
    assert 1e-4 < ours[0] < 0.9 * theirs[0]
    assert ours[1] < theirs[1]
    assert fmean(ours[2:]) < fmean(theirs[2:])
    assert inner.precision(words) == "ieee"  # outside


def test_threads_share_the_work(capability: str, threads: int) -> None:
    torch.manual_seed(0)
    block = encoder(4, 24, 4)
    words, grad = torch.randn(100, 16, 24), torch.randn(100, 16, 24)
    assert max(errors(block, inner.run, words, grad)) < 2e-6
    again = deepcopy(block)
    first = [p.grad.clone() for p in block.parameters() if p.grad is not None]
    again.zero_grad()
    errors(again, inner.run, words, grad)
    for p, q in zip(again.parameters(), first, strict=True):
        assert p.grad is not None
        assert p.grad.equal(q)  # bit by bit


def test_threads_without_openmp(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    from ctypes import c_void_p

    monkeypatch.setattr(native, "threads", c_void_p)
    torch.manual_seed(0)
    words, grad = torch.randn(100, 16, 24), torch.randn(100, 16, 24)
    assert max(errors(encoder(4, 24, 4), inner.run, words, grad)) < 2e-6


def test_stochastic_depth_draws_the_same(capability: str) -> None:
    torch.manual_seed(0)
    block = encoder(4, 12, drop_path=0.4)
    words, grad = torch.randn(50, 16, 12), torch.randn(50, 16, 12)
    results = []
    for run in (reference, inner.run):
        torch.manual_seed(7)
        block.zero_grad()
        out = run(block, words)
        out.backward(grad)
        results.append([out.detach(), *(p.grad.clone() for p in block.parameters() if p.grad is not None)])
        after = torch.rand(1)
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.manual_seed(7)
    reference(block, words)
    assert after == torch.rand(1)
    assert not results[0][0].allclose(reference(block.eval(), words), atol=1e-2)


@pytest.mark.parametrize("autocast", [False, True])
def test_not_a_number_stays_one(autocast: bool) -> None:
    block, words = encoder(4, 24, 4), torch.randn(8, 16, 24)
    words[3, 5, 7] = float("nan")
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = inner.run(block, words)
        assert out[3].isnan().all()
        assert out[[0, 1, 2, 4, 5, 6, 7]].isfinite().all()
        for name in ("norm1.weight", "mixer.qkv.weight", "mlp.fc1.weight", "mlp.fc2.bias"):
            broken = deepcopy(block)
            broken.get_parameter(name).data.view(-1)[0] = float("nan")
            assert inner.run(broken, words)[0].isnan().any(), name


def test_operators_are_well_formed() -> None:
    block = encoder(2, 12)
    x = torch.randn(5, 12, 4, requires_grad=True)
    args = (x, *inner.parameters(block), None, torch.rand(5), 2, 1e-5, 1e-5, "ieee")
    torch.library.opcheck(
        inner.inner, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_second_derivatives(frozen: bool) -> None:
    """Of a penalty on the gradient of the words, as those of the encoder in float64."""
    block, words = encoder(2, 12), torch.randn(5, 4, 12)
    block.mixer.qkv.requires_grad_(not frozen)

    def penalties(block: Encoder, run: Callable[[Tensor], Tensor], words: Tensor) -> list[Tensor]:
        words.requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # torch's other forms have no second derivative
            (grad,) = torch.autograd.grad(run(words).square().sum(), words, create_graph=True)
            wanted = [p for p in block.parameters() if p.requires_grad]
            found = torch.autograd.grad(grad.square().sum(), [words, *wanted], allow_unused=True)
        return [grad, *(t for t in found if t is not None)]

    got = penalties(block, lambda words: inner.run(block, words), words)
    exact = deepcopy(block).double()
    want = penalties(exact, lambda words: tokens(exact(Features(to_map(words, (2, 2)))).map), words.detach().double())
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=1e-4 * b.abs().max().item())


# ---- where it stands, and where not


OTHERS: dict[str, Callable[[], Encoder]] = {
    "scores": lambda: encoder(4, 12, mixer=partial(Attention, heads=2, position=RelativeBias())),
    "rotation": lambda: encoder(4, 12, mixer=partial(Attention, heads=2, position=RoPE())),
    "gate": lambda: encoder(4, 12, mixer=partial(Attention, heads=2, gate=TanhGate)),
    "residual gate": lambda: encoder(4, 12, mlp_residual=partial(Residual, gate=TanhGate)),
    "layer scale": lambda: encoder(4, 12, mixer_residual=partial(Residual, layer_scale=0.1)),
    "factor": lambda: encoder(4, 12, mlp_residual=partial(Residual, scale=0.5)),
    "activation": lambda: encoder(4, 12, mlp=partial(Mlp, act=ReLU)),
    "norm": lambda: encoder(4, 12, norm=RMSNorm),
    "no eps": lambda: encoder(4, 12, norm=partial(LayerNorm, eps=0.0)),
    "normed stream": lambda: encoder(4, 12, norm_stream=True),
    "dropout": lambda: encoder(4, 12, mlp=partial(Mlp, drop=0.1)),
    "attention dropout": lambda: encoder(4, 12, mixer=partial(Attention, heads=2, attn_drop=0.1)),
    "float64": lambda: encoder(4, 12).double(),
    "bfloat16": lambda: encoder(4, 12).bfloat16(),
    "subclass": lambda: type("Own", (Encoder,), {"__module__": "own"})(Site.at(16, 4)),
    "width": lambda: encoder(4, 72),
}


@pytest.mark.parametrize("name", OTHERS)
def test_leaves_other_blocks_alone(name: str) -> None:
    block = OTHERS[name]()
    dim, dtype = block.norm1.weight.shape[0], block.norm1.weight.dtype
    assert not inner.serves(block, torch.randn(3, 16, dim, dtype=dtype))


def test_dropout_is_none_in_evaluation() -> None:
    words = torch.randn(3, 16, 12)
    assert inner.serves(OTHERS["dropout"]().eval(), words)
    assert inner.serves(OTHERS["attention dropout"]().eval(), words)


@pytest.mark.parametrize("part", ["", "norm1", "mixer", "mixer.qkv", "mlp.fc2", "mlp_residual"])
def test_hooks_are_called(part: str) -> None:
    block = tnt_block()
    called = []
    handle = block.inner.get_submodule(part).register_forward_hook(lambda *args: called.append(1))
    block(features())
    assert called
    handle.remove()
    assert inner.serves(block.inner, torch.randn(3, 16, 12))


def tnt_block(**parts: Any) -> TNT:
    site = Site.at(32, 2, prefix=1, words=Words(12, (4, 4), over=(2, 2)))
    small = partial(Encoder, mixer=partial(Attention, heads=2))
    torch.manual_seed(3)
    block = TNT(site, inner=small, outer=small, **parts)
    for p in block.parameters():
        nn.init.normal_(p, std=0.2)
    return block


def features(**options: Any) -> Features:
    torch.manual_seed(4)
    map = torch.randn(3, 32, 2, 2, **options).contiguous(memory_format=torch.channels_last)
    return Features(map, torch.randn(3, 1, 32, **options), torch.randn(12, 16, 12, **options))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each run of the kernel."""
    found: list[int] = []
    run = inner.run
    monkeypatch.setattr(inner, "run", lambda *args: (found.append(1), run(*args))[1])
    return found


@pytest.mark.parametrize("legacy", [False, True])
def test_words_stay_where_the_kernel_wants_them(legacy: bool, calls: list[int]) -> None:
    block = tnt_block(legacy=legacy)
    first = block(features())
    second = block(first)
    assert len(calls) == 2
    assert second.words is not None
    assert second.words.shape == (12, 16, 12)
    assert second.words.transpose(1, 2).is_contiguous()
    exact = deepcopy(block).double()
    want = exact(exact(Features(*(t if t is None else t.double() for t in features()[:3]))))
    assert len(calls) == 2
    for got, expected in zip(second[:3], want[:3], strict=True):
        assert got is not None
        assert worst(got, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_the_type_that_the_encoder_gives(dtype: torch.dtype) -> None:
    block, words = encoder(4, 24, 4), torch.randn(6, 16, 24).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert inner.serves(block, words)
        got, want = inner.run(block, words), reference(block, words)
    assert got.dtype == want.dtype == dtype
    exact = reference(deepcopy(block).double(), words.double())
    assert worst(got, exact) <= 1.1 * worst(want, exact)
    assert not inner.serves(block, words.bfloat16())  # outside


def gradients(block: nn.Module, run: Callable[[Features], Features]) -> list[Tensor]:
    block.zero_grad()
    out = run(features())
    (out.map.square().sum() + out.words.square().sum()).backward()  # type: ignore[union-attr]
    return [out.map.detach(), *(p.grad.clone() for p in block.parameters() if p.grad is not None)]


@pytest.mark.parametrize("autocast", [False, True])
def test_compiles_checkpoints_and_copies(autocast: bool, calls: list[int]) -> None:
    context = partial(torch.autocast, "cpu", torch.bfloat16, enabled=autocast)
    block = tnt_block().train()
    want = gradients(block, context()(block))
    runs = len(calls)
    assert runs == 1
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    again = deepcopy(block)
    results = [
        gradients(block, context()(compiled)),
        gradients(block, context()(lambda x: checkpoint(block, x, use_reentrant=False))),
        gradients(again, context()(again)),
    ]
    assert len(calls) > runs + 2
    for found in results:
        for got, expected in zip(found, want, strict=True):
            assert error(got, expected) < (1e-2 if autocast else 1e-6)


def test_exports_in_plain_operators(calls: list[int]) -> None:
    block = tnt_block().eval()
    want = block(features())
    program = torch.export.export(block, (features(),))
    assert len(calls) == 1
    assert not any("tessera" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(features()).map, want.map, rtol=1e-4, atol=1e-4)
    with torch.device("meta"):
        assert tnt_block()(features()).map.shape == want.map.shape


# ---- whole nets


@pytest.mark.parametrize("name", ["tnt_m16_basic", "tnt_m16_se", "tnt_m4"])
def test_golden_nets_in_float32(name: str, calls: list[int]) -> None:
    vector = load(name)
    args = vector.args
    net = tnt(
        args["img_size"], args["patch_size"], args["num_classes"], args["outer_dim"], args["inner_dim"],
        args["depth"], args["inner_num_heads"], args["outer_num_heads"], args["inner_stride"], se=bool(args["se"]),
    ).imported(vector.state).float()  # fmt: skip
    torch.testing.assert_close(net(vector["input"].float()).double(), vector["logits"], rtol=0, atol=1e-5)
    assert len(calls) == args["depth"]


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("name", ["tnt_s_patch16_224", "tnt_s_legacy_patch16_224"])
def test_tnt_s_equals_timm(name: str, calls: list[int]) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model(name, depth=3).eval()
    for p in theirs.parameters():
        if p.dim() == 1:
            nn.init.normal_(p.data, p.data.mean().item(), 0.1)
    ours = tnt(legacy="legacy" in name, depth=3)
    ours.load_state_dict(convert(theirs.state_dict(), shapes(ours)))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs(images), rtol=0, atol=1e-5)
    assert len(calls) == 3


def test_training_takes_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    images, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 10

    def losses() -> list[float]:
        torch.manual_seed(0)
        net = tnt(8, 2, 10, 48, 12, 3, 2, 4, 1)
        optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
        found = []
        for _ in range(12):
            loss = nn.functional.cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    ours = losses()
    monkeypatch.setattr(inner, "serves", lambda block, words: False)
    theirs = losses()
    assert theirs[-1] < theirs[0] - 0.3
    assert ours == pytest.approx(theirs, abs=2e-3)
