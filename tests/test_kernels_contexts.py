"""What somebody does to a block or around it counts where kernels stand for torch's operators, as it does without."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from blocks.attention import Attention
from blocks.base import PARTS, Block, Features, Shape, Site, Words, to_map
from blocks.kernels.ahead import through
from blocks.kernels.folded import conv_norm_act
from blocks.kernels.linear import Linear
from blocks.mlp import GELU, Mlp, ReLU
from blocks.nextvit import NCB, NTB
from blocks.norms import BatchNorm, LayerNorm
from blocks.tnt import TNT, SentenceStem
from blocks.transformer import Encoder
from tests.contract import features

pytestmark = pytest.mark.usefixtures("ours")


class Plain(TorchDispatchMode):
    """Changes nothing; but as something watches, no kernel stands for torch's operators."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def encoder(prefix: int = 0, **parts: Any) -> Encoder:
    mixer = parts.pop("mixer", partial(Attention, heads=3, qkv_bias=True))
    return Encoder(Site.at(192, 8, prefix=prefix), mixer=mixer, **parts)


def nested() -> TNT:
    at = Shape(192, (8, 8), 1, Words(24, (4, 4), over=(8, 8)))
    inner = partial(Encoder, mixer=partial(Attention, heads=4), mlp=partial(Mlp, drop=0.5))
    return TNT(Site.at(192, 8).inside("", inp=at, dim=192), inner, partial(Encoder, mixer=partial(Attention, heads=3)))


def convolutional() -> NCB:
    block = NCB(Site.at(96, 16))
    assert isinstance(block.mlp, Mlp)
    block.mlp.drop.p = 0.5
    return block


def given(block: Block, batch: int = 2) -> Features:
    found = features(block.out, batch=batch)
    return Features(*(None if t is None else t.detach() for t in (found.map, found.prefix, found.words)))


def normal(block: nn.Module) -> None:
    """No parameter and no statistic at its start, where signs and scales could not be told apart."""
    for p in [*block.parameters(), *(b for b in block.buffers() if b.is_floating_point())]:
        p.data.copy_(torch.rand_like(p) * 0.2 + 0.01)


# ---- numbers that are none


RELU: dict[str, tuple[Callable[[], Block], list[str]]] = {
    "NCB": (lambda: NCB(Site.at(96, 16)), ["mixer.conv.weight", "mlp.fc1.weight", "mlp.fc1.bias"]),
    "NTB": (lambda: NTB(Site.at(256, 8)), ["conv.conv.weight", "mlp.fc1.weight", "mlp.fc1.bias"]),
    "Encoder": (lambda: encoder(mlp=partial(Mlp, act=ReLU)), ["mlp.fc1.weight"]),
}


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", RELU)
def test_nan_goes_through_relu(name: str, training: bool, low: bool) -> None:
    make, places = RELU[name]
    for place in places:
        block = make().train(training)
        block.get_parameter(place).data.fill_(torch.nan)
        x = given(block)
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16, enabled=low):
            x = x.replace(map=x.map.bfloat16()) if low and name != "Encoder" else x
            assert block(x).map.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_nan_goes_through_a_folded_convolution(stride: int, dtype: torch.dtype) -> None:
    conv, norm = nn.Conv2d(32, 32, 3, stride, 1, bias=False), BatchNorm(32).eval()
    map = torch.full((1, 32, 16, 16), torch.nan, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        assert conv_norm_act(conv, norm, ReLU(), map).isnan().all()


# ---- dropout that is on, in a block that is evaluated


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        partial(encoder, mixer=partial(Attention, heads=3, proj_drop=0.5)),
        partial(encoder, mlp=partial(Mlp, drop=0.5)),
        nested,
        convolutional,
    ],
)
def test_dropout_alone_is_in_training(make: Callable[[], Block], grad: bool) -> None:
    block = make().eval()
    x = given(block)
    with torch.set_grad_enabled(grad):
        assert torch.equal(block(x).map, block(x).map)
        for part in block.modules():
            part.train(isinstance(part, nn.Dropout))
        assert not torch.equal(block(x).map, block(x).map)


@pytest.mark.parametrize("grad", [False, True])
def test_stochastic_depth_alone_is_in_training(grad: bool) -> None:
    block = Encoder(Site.at(192, 8, drop_path=0.5), mixer=partial(Attention, heads=3)).eval()
    x = given(block, 8)
    block.mixer_residual.train()
    with torch.set_grad_enabled(grad):
        assert not torch.equal(block(x).map, block(x).map)


# ---- other code in place of ours


class Sevens(NCB):
    def forward(self, features: Features) -> Features:
        return super().forward(features).replace(map=torch.full_like(features.map, 7))


def test_a_subclass_has_its_own_forward() -> None:
    block = Sevens(Site.at(96, 8)).eval()
    with torch.no_grad():
        assert (through([NCB(Site.at(96, 8)).eval(), block], given(block)).map == 7).all()


@pytest.mark.parametrize("part", ["", "mixer", "mixer.qkv", "mixer.proj", "norm1", "mlp", "mlp.fc1", "mlp.act"])
def test_a_forward_that_is_replaced_on_an_instance(part: str) -> None:
    block = encoder().eval()
    module, seen = block.get_submodule(part), []
    forward = module.forward

    def noted(*args: Any, **names: Any) -> Any:
        seen.append(part)
        return forward(*args, **names)

    module.forward = noted  # type: ignore[method-assign]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            through([block], given(block))
    assert len(seen) == 2


@pytest.mark.parametrize("training", [False, True])
def test_hooks_on_a_batch_norm(training: bool) -> None:
    block, seen = NTB(Site.at(256, 8)).train(training), []
    norms = [module for module in block.modules() if isinstance(module, BatchNorm)]
    for norm in norms:
        norm.register_forward_hook(lambda norm, args, out: seen.append(norm))
    with torch.set_grad_enabled(training):
        block(given(block))
    assert {id(norm) for norm in seen} == {id(norm) for norm in norms}
    assert len(seen) == len(norms)


class Adapter(nn.Module):
    """Stands for a Linear, which it calls."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features))
        self.up = nn.Parameter(torch.randn(base.out_features, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def test_an_adapter_on_the_block_that_serves_the_class_token_alone() -> None:
    block = encoder(prefix=1)
    block.mixer.qkv = Adapter(block.mixer.qkv)  # type: ignore[assignment]
    x = given(block)
    block.keep(frozenset({"prefix"}))
    got = block(x).prefix
    got.sum().backward()
    assert block.mixer.qkv.up.grad.abs().max() > 0
    block.keep(PARTS)
    torch.testing.assert_close(got, block(x).prefix)


def test_pruning_on_the_block_that_serves_the_class_token_alone() -> None:
    block = encoder(prefix=1)
    prune.random_unstructured(block.mixer.qkv, "weight", 0.5)
    block.keep(frozenset({"prefix"}))
    for _ in range(2):
        block(given(block)).prefix.sum().backward()


@pytest.mark.parametrize(
    "conv",
    [
        partial(nn.Conv2d, padding=3, padding_mode="circular"),
        partial(nn.Conv2d, padding=3, bias=False),
        partial(nn.Conv2d, padding=6, dilation=2),
        partial(nn.Conv2d, padding=3, groups=3),
    ],
)
def test_another_convolution_in_the_stem_of_words(conv: Callable[..., nn.Conv2d]) -> None:
    stem = SentenceStem(Site.at(3, 16, dim=192), patch=4, words=4, word_dim=24)
    stem.conv = conv(3, 24, 7, stride=2)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        got = stem(Features(images)).map
        with Plain():
            torch.testing.assert_close(got, stem(Features(images)).map)


# ---- gradients


def test_a_bias_alone_is_trained() -> None:
    block = encoder()
    biases = [module.bias for module in block.modules() if isinstance(module, nn.Linear)]
    block.requires_grad_(False)
    for bias in biases:
        bias.requires_grad_()
    block(given(block, 16)).map.sum().backward()
    assert all(bias.grad is not None for bias in biases)
    layer, x = Linear(256, 256), torch.randn(1024, 256)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((256,), 1024.0))


@pytest.mark.parametrize("make", [GELU, lambda: LayerNorm(256)])
def test_what_an_activation_was_made_of_is_changed(make: Callable[[], nn.Module]) -> None:
    layer, x = Linear(256, 256), torch.randn(1024, 256, requires_grad=True) * 1.0
    y = make()(x)
    want = y.detach().clone()
    with torch.no_grad():
        x.mul_(3)
    (got,) = torch.autograd.grad(layer(y).sum(), layer.weight)
    torch.testing.assert_close(got, want.sum(0).expand(256, 256), rtol=1e-4, atol=1e-3)


SECOND: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "Linear": lambda: (Linear(256, 256), torch.randn(512, 256)),
    "NCB": lambda: (Tokens(NCB(Site.at(96, 16))).eval(), torch.randn(2, 256, 96)),
}


class Tokens(nn.Module):
    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(Features(to_map(x, self.block.out.grid))).map


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives(name: str, low: bool) -> None:
    net, x = SECOND[name]()
    x.requires_grad_()

    def penalty() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            y = net(x)
        first = torch.autograd.grad(y.float().square().sum(), list(net.parameters()), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), x)[0]

    got = penalty()
    with Plain():
        want = penalty()
    assert ((got - want).norm() / want.norm()).item() < (3e-2 if low else 1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_tangents(grad: bool) -> None:
    block, layer = NCB(Site.at(96, 16)).eval(), Linear(256, 256)
    x, map = torch.randn(1024, 256), given(block).map
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent
        torch.testing.assert_close(tangent, x @ layer.weight.T, rtol=1e-4, atol=1e-4)
        assert forward_ad.unpack_dual(block(Features(forward_ad.make_dual(map, map))).map).tangent is not None


# ---- modes, devices, types, files


def test_a_mode_that_counts_functions_sees_them() -> None:
    class Counts(TorchFunctionMode):
        seen: list[str] = []  # noqa: RUF012

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    block = encoder().eval()
    with torch.no_grad(), Counts():
        block(given(block))
    assert Counts.seen.count("linear") == 4
    assert {"layer_norm", "gelu"} <= set(Counts.seen)


@pytest.mark.parametrize("training", [False, True])
def test_a_default_device_is_not_that_of_the_net(training: bool) -> None:
    block = NCB(Site.at(96, 16)).train(training)
    x = given(block)
    with torch.set_grad_enabled(training):
        want = block(x).map
        with torch.device("meta"):
            got = block(x).map
    assert got.device.type == "cpu"
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [lambda: NCB(Site.at(96, 8, stride=2)), lambda: NTB(Site.at(128, 8, dim=256))])
def test_a_net_in_bfloat16_with_norms_in_float32(make: Callable[[], Block]) -> None:
    block = make().eval()
    normal(block)
    width, side = (96, 8) if isinstance(block, NCB) else (128, 8)
    x = Features(torch.rand(2, width, side, side).contiguous(memory_format=torch.channels_last))
    with torch.no_grad():
        want = block(x).map
        block.bfloat16()
        for part in block.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.float()
        got = block(x.replace(map=x.map.bfloat16())).map
    assert ((got.float() - want).norm() / want.norm()).item() < 0.05


def test_a_batch_norm_without_weights() -> None:
    block = NCB(Site.at(96, 16)).eval()
    block.norm.bn = nn.BatchNorm2d(96, affine=False).eval()
    with torch.no_grad():
        assert block(given(block)).map.isfinite().all()


@pytest.mark.parametrize("make", [lambda: LayerNorm(64), GELU])
def test_what_a_hook_has_caught_is_saved_and_loaded(make: Callable[[], nn.Module]) -> None:
    made, file = make()(torch.randn(2, 64, requires_grad=True)), io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    assert torch.equal(torch.load(file), made)


def test_a_sparse_weight() -> None:
    layer, x = Linear(256, 256), torch.randn(1024, 256)
    with torch.no_grad():
        want = layer(x)
        layer.weight = nn.Parameter(layer.weight.detach().to_sparse_csr(), requires_grad=False)
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)


def test_no_image_at_all() -> None:
    stem = SentenceStem(Site.at(3, 32, dim=192), patch=4, words=16, word_dim=24)
    block = TNT(Site.at(192, 8).inside("", inp=stem.out, dim=192))
    assert block(stem(Features(torch.randn(0, 3, 32, 32)))).map.shape == (0, 192, 8, 8)
