"""A branch of convolution, norm, ReLU and Linear that is trained as one function, against its parts and float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from blocks import nextvit, residual
from blocks.base import Features, Site
from blocks.kernels import conv, native
from blocks.kernels.conv_branch import conv_branch
from blocks.mlp import GELU
from blocks.nextvit import MHCA, NCB
from blocks.norms import LayerNorm
from blocks.residual import Residual
from tests.contract import features, randomise
from tests.kernels import FORMS, again_alike, error, in_form, saved_bytes, trained

pytestmark = [
    pytest.mark.skipif(native.library() is None, reason="no kernels on this machine"),
    pytest.mark.usefixtures("ours"),
]

WIDTH, SIDE = 64, conv.SIDE


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with in_form(request.param, monkeypatch):
        yield request.param


class Branch(nn.Module):
    """The branch alone, in a residual that may drop samples."""

    def __init__(self, drop_path: float = 0.0) -> None:
        super().__init__()
        site = Site.at(WIDTH, SIDE, drop_path=drop_path)
        self.mixer, self.residual = MHCA(site), Residual(site)

    def forward(self, given: Features) -> Features:
        x = given.map.permute(0, 2, 3, 1).flatten(1, 2)
        made = nextvit.added_mhca(self.residual, self.mixer, x, (SIDE, SIDE))
        return Features(made.unflatten(1, (SIDE, SIDE)).permute(0, 3, 1, 2))


def branch(drop_path: float = 0.0) -> Branch:
    torch.manual_seed(0)
    made = Branch(drop_path)
    randomise(made)
    return made.train()


def given(batch: int = 5) -> Tensor:
    return features(Site.at(WIDTH, SIDE).inp, batch=batch).map.detach()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    run = native.run
    monkeypatch.setattr(native, "run", lambda name, *args: seen.append(name) or run(name, *args))
    return seen


def without(made: nn.Module, map: Tensor, monkeypatch: pytest.MonkeyPatch, low: bool = False) -> dict[str, Tensor]:
    """The same by the parts."""
    with monkeypatch.context() as plain:
        plain.setattr(nextvit, "conv_branch", lambda *args: None)
        return trained(made, map, low)


@pytest.mark.parametrize("lies", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("low", [False, True])
def test_as_near_to_float64_as_the_parts(
    low: bool, lies: torch.memory_format, form: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if low and not native.has("conv_branch_forward", torch.bfloat16):
        pytest.skip("no bfloat16 kernels on this machine")
    made, map = branch().to(memory_format=lies), given()
    exact = trained(copy.deepcopy(made).double(), map.double())
    map = map.bfloat16() if low else map
    got = trained(copy.deepcopy(made), map, low)
    assert [name for name in calls if "branch_room" not in name] == ["conv_branch_forward", "conv_branch_backward"]
    plain = without(made, map, monkeypatch, low)
    for key, value in exact.items():
        assert error(got[key], value) < 2 * error(plain[key], value) + (1e-2 if low else 1e-6), key


def test_drops_the_same_samples(form: str, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made, map = branch(0.5), given(9)
    got = trained(copy.deepcopy(made), map)
    assert "conv_branch_backward" in calls
    for key, value in without(made, map, monkeypatch).items():
        assert error(got[key], value) < 1e-5, key


def test_where_all_samples_are_dropped(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics are brought on, and no parameter learns anything."""
    made, map = branch(0.5), given()
    monkeypatch.setattr(residual, "kept", lambda x, rate: x.new_zeros(len(x), 1, 1))
    got = trained(copy.deepcopy(made), map)
    assert "conv_branch_backward" in calls
    assert not any(got[key].any() for key, _ in made.named_parameters())
    for key, value in without(made, map, monkeypatch).items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-6)


def test_gradients_lie_as_their_parameters(calls: list[str]) -> None:
    """Or torch would copy each into another order."""
    made = branch().to(memory_format=torch.channels_last)
    trained(made, given())
    assert "conv_branch_backward" in calls
    for p in made.parameters():
        assert p.grad is not None
        assert p.grad.stride() == p.stride()


def test_keeps_what_the_convolution_and_relu_gave() -> None:
    made, map = branch(), given().requires_grad_()
    size, small = map.numel(), 2 * 8 * WIDTH + 3 * 4 * WIDTH
    assert saved_bytes(lambda: made(Features(map)).map, list(made.parameters())) == 3 * 4 * size + small


def test_differentiated_twice(calls: list[str]) -> None:
    made, map = branch(), given(2)

    def penalty(made: nn.Module, map: Tensor) -> Tensor:
        map = map.clone(memory_format=torch.preserve_format).requires_grad_()
        (first,) = torch.autograd.grad(made(Features(map)).map.square().sum(), map, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), map)
        return second

    got = penalty(copy.deepcopy(made), map)
    assert "conv_branch_forward" in calls
    assert error(got, penalty(made.double(), map.double())) < 1e-5


def test_under_checkpointing() -> None:
    """Gradients are the same, and statistics are counted as torch counts them: once more."""
    made = branch()
    again_alike(made, given())
    assert made.mixer.norm.bn.num_batches_tracked == 2


def test_statistics_that_change_under_a_graph_are_seen() -> None:
    made = branch()
    mean = made.mixer.norm.bn.running_mean
    before = mean._version
    made(Features(given()))
    assert mean._version > before


CHANGES: list[Callable[[Branch], object]] = [
    lambda b: b.eval(),
    lambda b: b.mixer.norm.bn.eval(),
    lambda b: setattr(b.mixer.norm.bn, "momentum", None),
    lambda b: setattr(b.mixer, "norm", nn.SyncBatchNorm.convert_sync_batchnorm(b.mixer.norm)),
    lambda b: setattr(b.mixer, "norm", LayerNorm(WIDTH)),
    lambda b: setattr(b.mixer, "act", GELU()),
    lambda b: setattr(b.mixer, "proj", nn.Linear(WIDTH, WIDTH, bias=False)),
    lambda b: setattr(b, "residual", partial(Residual, layer_scale=0.1)(Site.at(WIDTH, SIDE))),
    lambda b: b.mixer.act.register_forward_hook(lambda *args: None),
    lambda b: b.residual.register_full_backward_hook(lambda *args: None),
    lambda b: b.mixer.conv.weight.requires_grad_(False),
    lambda b: b.bfloat16(),
]


def serves(made: Branch, x: Tensor) -> bool:
    parts = (made.mixer.conv, made.mixer.norm, made.mixer.act)
    return conv_branch(made.residual, x, (SIDE, SIDE), parts, made.mixer.proj) is not None


@pytest.mark.parametrize("change", CHANGES)
def test_what_it_does_not_serve(change: Callable[[Branch], object]) -> None:
    made, x = branch(), torch.randn(2, SIDE * SIDE, WIDTH)
    assert serves(made, x)
    change(made)
    assert not serves(made, x)


def test_which_tokens_it_does_not_serve() -> None:
    made, x = branch(), torch.randn(2, SIDE * SIDE, WIDTH)
    for other in (x.double(), x.to("meta"), x[:0], x.transpose(1, 2).contiguous().transpose(1, 2)):
        assert not serves(made, other)
    with torch.no_grad():
        assert not serves(made, x)
    with torch.autocast("cpu", torch.bfloat16):  # the sum would be in float32
        assert not serves(made, x)
        assert serves(made, x.bfloat16()) == native.has("conv_branch_forward", torch.bfloat16)


def test_a_whole_block_is_two_calls_each_way(calls: list[str]) -> None:
    torch.manual_seed(0)
    trained(NCB(Site.at(WIDTH, SIDE)).train(), given())
    assert sorted(name for name in calls if "room" not in name) == [
        "branch_backward", "branch_forward", "conv_branch_backward", "conv_branch_forward"
    ]  # fmt: skip
