"""Single blocks against the authors' code, in float64: golden vectors of tests/golden."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from blocks.base import Block, Features, Site, Words, to_map
from blocks.gates import SigmoidGate, TanhGate
from blocks.nextvit import NCB, NTB
from blocks.tnt import TNT
from framework.weights import convert
from tests.vectors import Vector, assert_near, encoder, joined, load, shapes


def imported(block: Block, vector: Vector, theirs: str) -> Block:
    """`block` with the weights of a block, through the importer of whole nets."""
    ours = "backbone.blocks.0."
    target = {ours + key: shape for key, shape in shapes(block).items()}
    state = convert({theirs + key: value for key, value in vector.state.items()}, target)
    block.load_state_dict({key.removeprefix(ours): value for key, value in state.items()})
    return block.double().eval()


def sentences(vector: Vector) -> Features:
    x = vector["mid.outer_in"]
    return Features(to_map(x[:, 1:], (2, 2)), x[:, :1], vector.tensors.get("mid.inner_in"))


def test_tnt_block_with_se() -> None:
    vector = load("tnt_block_se")
    site = Site.at(32, 2, prefix=1, words=Words(8, (4, 4), over=(2, 2)))
    block = imported(TNT(site, inner=encoder(2), outer=encoder(4, se=True)), vector, "blocks.0.")
    out = block(sentences(vector))
    assert out.words is not None
    assert_near(out.words, vector["mid.inner_out"])
    assert_near(joined(out), vector["mid.outer_out"])


def test_tnt_block_without_words_is_an_encoder() -> None:
    vector = load("tnt_block_vanilla")
    block = imported(encoder(4)(Site.at(32, 2, prefix=1)), vector, "blocks.0.")
    assert_near(joined(block(sentences(vector))), vector["mid.outer_out"])


def test_se_with_sigmoid() -> None:
    vector = load("se_classic_sigmoid")
    gate = SigmoidGate(64, reduction=16)
    load_se(gate, vector, {"fc.0": "fc1", "fc.2": "fc2"})
    assert_near(gate(vector["input"]), vector["mid.output"])


def test_se_with_tanh() -> None:
    vector = load("se_tnt_tanh")
    gate = TanhGate(32)
    load_se(gate, vector, {"fc.0": "norm", "fc.1": "fc1", "fc.3": "fc2"})
    assert_near(gate(vector["input"]), vector["mid.output_plus_x"])
    assert_near(gate(vector["input"]) - vector["input"], vector["mid.output"])


def load_se(gate: nn.Module, vector: Vector, names: dict[str, str]) -> None:
    """SE by itself is no family of weights; its keys under TNT's blocks are tested with the block."""
    split = ((key.rpartition("."), value) for key, value in vector.state.items())
    gate.load_state_dict({f"{names[module]}.{leaf}": value for (module, _, leaf), value in split})
    gate.double()


@pytest.mark.parametrize(
    ("name", "factory"),
    [
        ("nextvit_block_ncb", NCB),
        ("nextvit_block_ntb_sr1", partial(NTB, sr_ratio=1, shrink=0.5)),
        ("nextvit_block_ntb_sr2", partial(NTB, sr_ratio=2, shrink=0.75)),
    ],
)
def test_next_vit_block(name: str, factory: partial[Block]) -> None:
    vector = load(name)
    images = vector["input"].contiguous(memory_format=torch.channels_last)
    args = vector.args
    site = Site.at(args["in_channels"], images.shape[2], stride=args["stride"], dim=args["out_channels"])
    block = imported(factory(site), vector, "features.0.")
    assert_near(block(Features(images)).map, vector["mid.output"])
