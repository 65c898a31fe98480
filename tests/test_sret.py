"""SReT: the authors' numbers, what weights of a shared block are accepted, and what a recursion keeps and tells."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blocks.attention import Attention
from blocks.base import Block, BuildError, Features, Site, tokens
from blocks.heads import AveragePoolHead
from blocks.mlp import Mlp
from blocks.nextvit import NCB
from blocks.norms import LayerNorm, NoNorm
from blocks.positions import LearnedPosition, RelativeBias
from blocks.residual import LearnedResidual
from blocks.sret import NLL, SlicedAttention
from blocks.stems import ConvStem
from blocks.structure import ConvEmbed, Recursive
from blocks.transformer import Encoder
from framework.backbones import Pyramid, Stage
from framework.config import compose
from framework.data.base import Image
from framework.errors import ConfigError
from framework.measure import meta_model
from framework.optim import parameter_groups
from framework.tasks.classification import Classification
from framework.weights import FAMILIES, convert
from tests.conftest import EXPERIMENTS
from tests.contract import features, randomise
from tests.settings import GRID, at
from tests.vectors import Net, assert_near, load, shapes

NORM = partial(LayerNorm, eps=1e-6)
NAMES = ("sret_noslice_64", "sret_sliced_64")


def sret(args: dict[str, Any], entry: bool = False) -> Net:
    """SReT, with the official names of arguments; `entry`: the embeddings stand there, not in the pattern."""
    sliced = "groups1" in args
    stages, stride = {}, 1
    for s, (base, heads, runs, shared) in enumerate(
        zip(args["base_dims"], args["heads"], args["depth"], args["recursive_num"], strict=True)
    ):
        mixer = partial(Attention, heads=heads, qkv_bias=True)
        if sliced:
            groups = (args["groups1"][s], args["groups2"][s])
            mixer = partial(SlicedAttention, heads=heads, qkv_bias=True, groups=groups, draw_in_eval=True)
        block = partial(
            Encoder, mixer=mixer, mlp=partial(Mlp, ratio=args["mlp_ratio"]), norm=NORM, mixer_residual=LearnedResidual,
            mlp_residual=LearnedResidual,
        )  # fmt: skip
        after = partial(NLL, mlp=partial(Mlp, ratio=args["np_mlp_ratio"]), norm=NORM)
        rec = partial(Recursive, block=block, times=runs // shared, after=after)
        down = "down " if s and not entry else ""
        stages[f"s{s + 1}"] = Stage(
            base * heads, f"{down}rec*{shared}", stride, blocks={"rec": rec}, entry="down" if s and entry else ""
        )
        stride = 2
    width = stages["s1"].dim
    backbone = Pyramid(
        Image(args["image_size"], 3),
        stages,
        {"down": partial(ConvEmbed, kernel=3, depthwise=True, norm=NoNorm)},
        partial(ConvStem, dims=(width // 2, width, width), strides=(2, 2, 2), bias=True),
        LearnedPosition(),
        norm=NoNorm,
    )
    return Net(backbone, partial(AveragePoolHead, norm=NORM), args["num_classes"])


def given_by(module: nn.Module) -> list[Any]:
    """Filled with what a module gives each time it runs."""
    found: list[Any] = []
    module.register_forward_hook(lambda module, args, out: found.append(out))
    return found


def shared(net: Net, key: str = "stages.s1.blocks.0") -> Any:
    return next(block for found, _, block in net.backbone.steps() if found == key)


@pytest.mark.parametrize("entry", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_sret_equals_the_authors(name: str, entry: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = load(name)
    net = sret(vector.args, entry).imported(vector.state)
    drawn = [vector[key] for key in sorted(vector.tensors) if key.startswith("perm.")]
    monkeypatch.setattr(torch, "randperm", lambda n, device=None: drawn.pop(0))
    steps = {key: given_by(block) for key, _, block in net.backbone.steps()}
    first = shared(net)
    inside = [given_by(part) for part in (first.block.mixer, first.block, *first.after)]
    normed = given_by(net.head.norm)
    stem = given_by(net.backbone.stem.layers[2]["act"])
    assert_near(net(vector["input"]), vector["logits"], "logits")
    assert not drawn
    official = "out.transformers.0.blocks"
    assert_near(stem[0], vector["out.patch_embed"], "stem")
    mixed, encoded, *projected = inside
    for run, mark in enumerate(("", "@1")):
        assert_near(mixed[run], vector[f"{official}.0.attn{mark}"], f"attention {run}")
        assert_near(tokens(encoded[run].map), vector[f"{official}.0{mark}"], f"block {run}")
        assert_near(tokens(projected[run][0].map), vector[f"{official}.{2 * run + 1}"], f"projection {run}")
    lasts = {
        "transformers.0": "s1.blocks.1",
        "pools.0": "s2.entry" if entry else "s2.blocks.0",
        "transformers.1": "s2.blocks.0" if entry else "s2.blocks.1",
        "pools.1": "s3.entry" if entry else "s3.blocks.0",
        "transformers.2": "s3.blocks.0" if entry else "s3.blocks.1",
    }
    for theirs, ours in lasts.items():
        assert_near(steps[f"stages.{ours}"][0].map, vector[f"out.{theirs}"], theirs)
    assert_near(normed[0], vector["out.norm"], "norm")


# ---- published weights


@pytest.fixture
def net() -> Net:
    return sret(load("sret_sliced_64").args)


@pytest.fixture
def state() -> dict[str, Tensor]:
    return dict(load("sret_sliced_64").state)


def test_one_family_recognises_it(state: dict[str, Tensor]) -> None:
    assert [family.NAME for family in FAMILIES if family.recognises(state)] == ["SReT"]


def test_a_shared_tensor_arrives_once(net: Net, state: dict[str, Tensor]) -> None:
    twice = {key for key in state if re.match(r"transformers\.\d\.blocks\.(2|6)\.", key)}
    assert len(twice) == 4 * 16
    converted = convert(state, shapes(net))
    assert sum(value.numel() for value in converted.values()) == sum(
        value.numel() for key, value in state.items() if key not in twice
    )
    once = {key: value for key, value in state.items() if key not in twice}
    for key, value in convert(once, shapes(net)).items():
        assert torch.equal(converted[key], value)


def test_copies_that_differ_are_refused(net: Net, state: dict[str, Tensor]) -> None:
    state["transformers.1.blocks.2.attn.proj.bias"] = state["transformers.1.blocks.2.attn.proj.bias"] + 1
    with pytest.raises(
        ConfigError, match=r"model: differs from its copy: transformers\.1\.blocks\.2\.attn\.proj\.bias$"
    ):
        convert(state, shapes(net))


def test_another_number_of_runs_is_refused(net: Net, state: dict[str, Tensor]) -> None:
    lean = {key: value for key, value in state.items() if not re.match(r"transformers\.1\.blocks\.[23]\.", key)}
    with pytest.raises(ConfigError, match=r"missing: backbone\.stages\.s2\.blocks\.1\.after\.1\.norm\.weight"):
        convert(lean, shapes(net))


def test_the_norm_of_the_head_goes_with_it(net: Net, state: dict[str, Tensor]) -> None:
    backbone = {key for key in shapes(net) if key.startswith("backbone.")}
    assert convert(state, shapes(net), head=False).keys() == backbone
    assert "head.norm.weight" in convert(state, shapes(net))


# ---- the zoo


@pytest.mark.parametrize(("name", "rate"), [("sret_t", 0.1), ("sret_s", 0.2)])
def test_drop_path_is_as_released(name: str, rate: float) -> None:
    net = meta_model(compose([EXPERIMENTS / f"zoo/{name}.yaml"])).backbone
    released = [rate * (first + i) / 20 for first, count in ((0, 2), (4, 5), (14, 3)) for i in range(count)]
    blocks = [block for _, _, block in net.steps() if isinstance(block, Recursive)]
    for part in ("mixer_residual", "mlp_residual"):
        assert [getattr(block.block, part).rate for block in blocks] == pytest.approx(released)
    assert {after.residual.rate for block in blocks for after in block.after} == {0.0}


def test_linears_may_start_as_torch_has_them() -> None:
    args = {**load("sret_sliced_64").args, "base_dims": [16, 16, 16]}
    made = {}
    for init in ("own", "torch"):
        torch.manual_seed(0)
        net = sret(args)
        task = Classification(
            lambda image, net=net: net.backbone, Image(64), 10, partial(AveragePoolHead, norm=NORM), init=init
        )
        made[init] = dict(task.named_modules())
    rec = "backbone.stages.s2.blocks.1"
    linears = {f"{rec}.block.mixer.qkv": 64, f"{rec}.after.1.mlp.fc1": 64, "backbone.stem.layers.2.conv": 9 * 32}
    for name, inputs in {**linears, "head.fc": 128}.items():
        bound = inputs**-0.5
        weight = made["torch"][name].weight
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert made["own"][name].weight.std().item() == pytest.approx(0.02, rel=0.1)
    for modules in made.values():
        assert modules[f"{rec}.block.norm1"].weight.eq(1).all()
        assert modules["backbone.stem.position"].table.std().item() == pytest.approx(0.02, rel=0.1)


# ---- recursion


def test_a_recursion_is_its_block_and_its_projections_in_turn() -> None:
    rec = Recursive(at(), partial(Encoder, mixer=partial(Attention, heads=4)), 3, NLL).eval()
    randomise(rec)
    want = given = features(at().inp)
    for after in rec.after:
        want = after(rec.block(want))
    assert torch.equal(rec(given).map, want.map)
    assert not torch.allclose(rec.after[0](rec.block(given)).map, want.map)


def test_weights_of_a_shared_block_are_there_once() -> None:
    block = Encoder(at(), partial(Attention, heads=4), mixer_residual=LearnedResidual)
    rec = Recursive(at(), lambda site: block, 3)
    count = sum(parameter.numel() for parameter in block.parameters())
    assert sum(parameter.numel() for parameter in rec.parameters()) == count
    assert sum(value.numel() for value in rec.state_dict().values()) == count
    decayed, plain = sorted(parameter_groups(rec, 0.1), key=lambda group: -group["weight_decay"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(block.parameters()))
    assert block.mixer_residual.skip in set(plain["params"])


def test_a_batch_norm_takes_statistics_in_each_run() -> None:
    rec = Recursive(at(), NCB, 3).train()
    rec(features(at().inp))
    assert rec.block.norm.bn.num_batches_tracked == 3


class Turn(Block):
    """Notes which run it is in."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.out = site.inp

    def forward(self, given: Features) -> Features:
        self.seen.append(given.turn)
        return given


def test_parts_see_which_run_it_is() -> None:
    rec = Recursive(at(), partial(Recursive, block=Turn, times=2), 3, Turn)
    given = features(at().inp).replace(turn=7)
    assert rec(given).turn == 7
    assert rec.block.block.seen == [0, 1] * 3
    assert [after.seen for after in rec.after] == [[0], [1], [2]]


def sliced(groups: tuple[int, ...] = (6, 2), **options: Any) -> Any:
    mixer = partial(SlicedAttention, heads=4, groups=groups, **options)
    residual = {"mixer_residual": LearnedResidual, "mlp_residual": LearnedResidual}
    return partial(Encoder, mixer=mixer, **residual)


def gradients(rec: Recursive) -> dict[str, Tensor]:
    torch.manual_seed(3)
    given = features(rec.out)
    torch.manual_seed(4)
    rec(given).map.square().sum().backward()
    return {name: parameter.grad for name, parameter in rec.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("part", ["block", "block.mixer"])
def test_what_is_computed_again_sees_the_run_that_it_had(part: str) -> None:
    """Checkpointing inside the recursion, not only round it."""
    rec = Recursive(at(), sliced(), 3, NLL).train()
    randomise(rec)
    want = gradients(copy.deepcopy(rec))
    module = rec.get_submodule(part)
    run = module.forward
    module.forward = lambda *args, **kwargs: checkpoint(run, *args, use_reentrant=False, **kwargs)  # type: ignore[method-assign]
    got = gradients(rec)
    assert got.keys() == want.keys()
    for name, grad in want.items():
        assert torch.equal(got[name], grad), name


@pytest.fixture
def one_process(tmp_path: Any) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_gradients_of_all_runs_are_there_under_ddp() -> None:
    rec = Recursive(at(), sliced(), 2, NLL).train()
    want = gradients(copy.deepcopy(rec))
    parallel = nn.parallel.DistributedDataParallel(rec, static_graph=False)
    torch.manual_seed(3)
    given = features(at().inp)
    torch.manual_seed(4)
    parallel(given).map.square().sum().backward()
    for name, parameter in rec.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, want[name])


@pytest.mark.parametrize("training", [False, True])
def test_drawn_groups_compile_without_a_break(training: bool) -> None:
    torch._dynamo.reset()
    rec = Recursive(at(), sliced(draw_in_eval=True), 2, NLL).train(training)
    given = features(at().inp)
    compiled = torch.compile(rec, fullgraph=True, backend="eager")
    torch.manual_seed(5)
    got = compiled(given).map
    torch.manual_seed(5)
    torch.testing.assert_close(got, rec(given).map)  # outside of the compiler attention is a kernel of our own


def test_drawn_groups_are_exported_as_a_draw() -> None:
    rec = Recursive(at(), sliced(draw_in_eval=True), 2).eval()
    given = features(at().inp)
    program = torch.export.export(rec, (given,))
    assert [str(node.target) for node in program.graph.nodes].count("aten.randperm.default") == 1
    torch.manual_seed(5)
    got = program.module()(given).map
    torch.manual_seed(5)
    torch.testing.assert_close(got, rec(given).map)


# ---- slices


def sees(mixer: SlicedAttention, turn: int) -> Tensor:
    """`(N, N)`: whether the result of a token depends on another one."""
    x = torch.randn(1, 24, 32, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(6)
    y = mixer(x, GRID, turn=turn)
    rows = [torch.autograd.grad(y[0, i].sum(), x, retain_graph=True)[0][0].abs().sum(1) > 0 for i in range(24)]
    return torch.stack(rows)


def blocks_of(members: Tensor) -> Tensor:
    """`(N, N)`: whether two tokens are in one group, of the number of each token's group."""
    return members[:, None] == members[None]


def test_the_first_run_s_groups_are_strips_and_the_next_ones_are_dealt() -> None:
    mixer = SlicedAttention(at(), 4, groups=(6, 2)).double().eval()
    assert torch.equal(sees(mixer, 0), blocks_of(torch.arange(24) // 4))
    for turn in (1, 2, 5):
        assert torch.equal(sees(mixer, turn), blocks_of(torch.arange(24) % 2))


def test_later_groups_are_drawn_in_training() -> None:
    mixer = SlicedAttention(at(), 4, groups=(6, 2)).double().train()
    torch.manual_seed(6)
    members = torch.empty(24, dtype=torch.long)
    members[torch.randperm(24)] = torch.arange(24) // 12
    assert torch.equal(sees(mixer, 1), blocks_of(members))
    assert torch.equal(sees(mixer, 0), blocks_of(torch.arange(24) // 4))


def test_evaluation_draws_only_where_that_is_asked_for() -> None:
    x = torch.randn(2, 24, 32)
    for asked in (False, True):
        mixer = SlicedAttention(at(), 4, groups=(1, 2), draw_in_eval=asked).eval()
        assert torch.equal(mixer(x, GRID, turn=1), mixer(x, GRID, turn=1)) != asked
        assert torch.equal(mixer(x, GRID), mixer(x, GRID))


def test_one_group_is_plain_attention() -> None:
    mixer = SlicedAttention(at(), 4, groups=(1,)).eval()
    plain = Attention(at(), 4).eval()
    plain.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 24, 32)
    assert torch.equal(mixer(x, GRID, turn=1), plain(x, GRID))


def test_an_image_that_the_groups_do_not_divide_is_refused() -> None:
    encoder = sliced((6,))(at()).eval()
    assert encoder(features(at(grid=(3, 4)).inp)).map.shape == (2, 32, 3, 4)
    with pytest.raises(
        BuildError, match=r"^mixer: SlicedAttention cannot share 20 tokens out to 6 groups; .* 2, 4, 5, 10$"
    ):
        encoder(features(at(grid=(5, 4)).inp))


MISTAKES = [
    (SlicedAttention, at(), {"heads": 4, "groups": (5,)}, "cannot share 24 tokens out to 5 groups; near numbers"),
    (SlicedAttention, at(), {"heads": 4, "groups": (2, 0)}, "to 0 groups; near numbers that fit: 1, 2, 3, 4"),
    (SlicedAttention, at(), {"heads": 4, "groups": ()}, "needs a number of groups"),
    (SlicedAttention, at(), {"heads": 5}, "cannot split width 32 by heads: 5"),
    (SlicedAttention, at(prefix=1), {}, "1 prefix token(s) come in"),
    (SlicedAttention, at(position=RelativeBias()), {}, "cannot use RelativeBias"),
    (NLL, at(dim=64), {}, "keeps its width, but gets 32 and should give 64"),
    (Recursive, at(), {"block": NLL, "times": 0}, "at least once, got times: 0"),
    (
        Recursive,
        at(dim=64, stride=2),
        {"block": NCB},
        "cannot have NCB as block: it makes 64 × 3×2 of 32 × 6×4; put",
    ),
    (Recursive, at(dim=64), {"block": Turn, "after": NCB}, "cannot have NCB as after: it makes 64 × 6×4 of 32 × 6×4"),
]


@pytest.mark.parametrize(("cls", "site", "args", "text"), MISTAKES)
def test_a_mistake_is_one_line_that_says_what_is_wrong(cls: type, site: Site, args: dict[str, Any], text: str) -> None:
    with pytest.raises(BuildError, match=re.escape(text)) as caught:
        cls(replace(site, where="model.here"), **args)
    assert str(caught.value).startswith("model.here")
    assert "\n" not in str(caught.value)
