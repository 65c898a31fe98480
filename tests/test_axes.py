"""The cells of an ablation: one axis at a time, axes that vary together, axes that apply only beside others, --only."""

from __future__ import annotations

import pytest

from framework.ablation.grid import Ablation, applying, cells, selection
from framework.config import compose
from framework.errors import ConfigError
from tests.studies import override

AXES = {
    "norm": {"batch": {"model.norm": "BatchNorm"}, "layer": {"model.norm": "LayerNorm"}},
    "dim": {"48": {"model.dim": 48}, "96": {"model.dim": 96}, "192": {"model.dim": 192}},
    "depth": {"2": {"model.depth": 2}, "4": {"model.depth": 4}, "8": {"model.depth": 8}},
}
BASELINE = {"norm": "batch", "dim": "96", "depth": "4"}


def document(**ablation):
    section = {"name": "s", "seeds": [0], "axes": AXES, **ablation}
    return {"model": {"norm": "?", "dim": 1, "depth": 1, "gate": "?"}, "ablation": section}


def names(**ablation):
    return [cell.name for cell in cells(document(**ablation), override)]


def test_a_grid_is_every_combination():
    assert len(names()) == 2 * 3 * 3
    assert names()[:4] == ["batch/48/2", "batch/48/4", "batch/48/8", "batch/96/2"]


def test_one_at_a_time_begins_with_the_baseline_and_changes_one_axis():
    made = cells(document(mode="one_at_a_time", baseline=BASELINE), override)
    assert [cell.name for cell in made] == [
        "batch/96/4",
        "layer/96/4",
        "batch/48/4",
        "batch/192/4",
        "batch/96/2",
        "batch/96/8",
    ]
    assert made[2].document["model"] == {"norm": "BatchNorm", "dim": 48, "depth": 4, "gate": "?"}
    assert made[2].folder == "norm=batch,dim=48,depth=4/seed=0"


def test_plug_ins_are_those_of_the_whole_study():
    axes = {"norm": {"batch": {}, "own": {"plugins": ["own.py"], "model.norm": "Own"}}}
    with pytest.raises(ConfigError, match=r"^ablation\.axes\.norm\.own: sets plugins, which all cells share; put it"):
        names(axes=axes)


def test_zipped_axes_vary_together():
    made = cells(document(**{"with": [["dim", "depth"]]}), override)
    assert [cell.name for cell in made] == [f"{n}/{d}" for n in ("batch", "layer") for d in ("48/2", "96/4", "192/8")]
    assert (made[2].document["model"]["dim"], made[2].document["model"]["depth"]) == (192, 8)
    # the group varies where its first axis stands, whatever stands between
    axes = {name: AXES[name] for name in ("dim", "norm", "depth")}
    assert names(axes=axes, **{"with": [["dim", "depth"]]})[:3] == ["48/batch/2", "48/layer/2", "96/batch/4"]


def test_a_zipped_group_changes_as_one_axis_at_a_time():
    found = names(mode="one_at_a_time", baseline=BASELINE, **{"with": [["dim", "depth"]]})
    assert found == ["batch/96/4", "layer/96/4", "batch/48/2", "batch/192/8"]


GATED = {
    "gate": {"none": {}, "tanh": {"model.gate": "Tanh"}, "sigmoid": {"model.gate": "Sigmoid"}},
    "ratio": {"4": {"model.dim": 4}, "16": {"model.dim": 16}},
}
WHEN = {"ratio": {"gate": ["tanh", "sigmoid"]}}


def test_a_conditional_axis_is_left_out_where_it_does_not_apply():
    made = cells(document(axes=GATED, when=WHEN), override)
    assert [cell.group for cell in made] == [
        "gate=none",
        "gate=tanh,ratio=4",
        "gate=tanh,ratio=16",
        "gate=sigmoid,ratio=4",
        "gate=sigmoid,ratio=16",
    ]
    assert made[0].choices == {"gate": "none"}
    assert made[0].document["model"]["dim"] == 1
    # also where it stands before the axis that it depends on
    turned = {name: GATED[name] for name in ("ratio", "gate")}
    found = [cell.group for cell in cells(document(axes=turned, when=WHEN), override)]
    assert found == [
        "gate=none",
        "ratio=4,gate=tanh",
        "ratio=4,gate=sigmoid",
        "ratio=16,gate=tanh",
        "ratio=16,gate=sigmoid",
    ]


def test_conditions_reach_through_each_other():
    when = {"a": {"b": ["on"]}, "b": {"c": ["on"]}}
    assert applying({"a": "1", "b": "on", "c": "on"}, when) == {"a": "1", "b": "on", "c": "on"}
    assert applying({"a": "1", "b": "on", "c": "off"}, when) == {"c": "off"}


def test_published_rows_of_conditional_cells_are_their_joined_values():
    rows = {"none": 80.0, "tanh/4": 81.0}
    assert len(names(axes=GATED, when=WHEN, published={"source": "x", "rows": rows})) == 5
    with pytest.raises(ConfigError, match="there is no cell 'none/4'"):
        names(axes=GATED, when=WHEN, published={"source": "x", "rows": {"none/4": 80.0}})


def test_numbers_and_several_metrics_are_taken():
    made = Ablation.read(
        document(axes={"dim": {1: {}, 2: {}}, "k": {"a": {}, "b": {}}}, when={"k": {"dim": [2]}}, metric=["x", "y"])
    )
    assert made.when == {"k": {"dim": ["2"]}}
    assert [list(choices.values()) for choices in made.choices()] == [["1"], ["2", "a"], ["2", "b"]]
    assert made.metrics == ["x", "y"]
    assert Ablation.read(document(metric="x")).metrics == ["x"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"mode": "one_at_a_time", "baseline": {"norm": "batch"}},
            "ablation.baseline: mode one_at_a_time needs a value of every axis; add dim, depth",
        ),
        ({"with": [["dim", "deth"]]}, "ablation.with: there is no axis 'deth'; did you mean 'depth'?"),
        ({"with": [["dim"]]}, "ablation.with: got ['dim']; a group is two axes or more"),
        ({"with": [["dim", "norm"]]}, "ablation.with: dim has 3 values and norm has 2; axes that vary together need"),
        ({"with": [["dim", "depth"], ["depth", "dim"]]}, "ablation.with: dim is there twice"),
        (
            {"with": [["dim", "depth"]], "baseline": {"dim": "96", "depth": "2"}},
            "ablation.baseline: dim and depth vary together; give dim: 96, depth: 4",
        ),
        (
            {"with": [["dim", "depth"]], "baseline": {"depth": "2"}},
            "ablation.baseline: dim and depth vary together; give dim: 48, depth: 2",
        ),
        ({"when": {"dims": {"norm": ["batch"]}}}, "ablation.when: there is no axis 'dims'; did you mean 'dim'?"),
        ({"when": {"dim": {"nrm": ["batch"]}}}, "ablation.when.dim: there is no axis 'nrm'; did you mean 'norm'?"),
        (
            {"when": {"dim": {"norm": ["btch"]}}},
            "ablation.when.dim.norm: there is no value 'btch'; did you mean 'batch'?",
        ),
        ({"when": {"dim": {"depth": ["2"]}, "depth": {"dim": ["48"]}}}, "ablation.when.dim: would depend on itself"),
        ({"when": {"dim": {"dim": ["48"]}}}, "ablation.when.dim: would depend on itself"),
        ({"when": {"dim": {"norm": []}}}, "ablation.when.dim: is never met, so no cell has dim=48"),
        (
            {"when": {"dim": {"norm": ["layer"]}}, "mode": "one_at_a_time", "baseline": BASELINE},
            "ablation.when.dim: is never met, so no cell has dim=48; mode one_at_a_time changes the baseline in one",
        ),
        ({"metric": []}, "ablation.metric: is empty"),
        ({"metric": ["x", "x"]}, "ablation.metric: x is there twice"),
        (
            {
                "axes": {"a": {"x/y": {}, "x": {}}, "b": {"y": {}, "y/y": {}}},
                "published": {"source": "x", "rows": {"x/y/y": 1.0}},
            },
            "ablation.published.rows: 'x/y/y' means several cells",
        ),
    ],
)
def test_mistakes_are_one_line(changes, message):
    with pytest.raises(ConfigError) as caught:
        cells(document(**changes), override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


AXIS_VALUES = {"word": ["none", "learned", "a,b"], "sentence": ["none", "learned"]}


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ([], ["none none", "none learned", "learned none", "learned learned"]),
        (["word=learned"], ["learned none", "learned learned"]),
        (["word=learned", "sentence=none"], ["learned none"]),
        (["word=none,learned", "sentence=none"], ["none none", "learned none"]),
        (["word=none", "word=learned", "sentence=none"], ["none none", "learned none"]),
    ],
)
def test_only_selects_cells(words, chosen):
    fits = selection(words, AXIS_VALUES)
    all_cells = [{"word": w, "sentence": s} for w in ("none", "learned") for s in ("none", "learned")]
    assert [" ".join(cell.values()) for cell in all_cells if fits(cell)] == chosen


def test_only_takes_a_value_with_a_comma_and_leaves_out_cells_without_the_axis():
    fits = selection(["word=a,b"], AXIS_VALUES)
    assert fits({"word": "a,b", "sentence": "none"})
    assert not fits({"sentence": "none"})


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("wrd=none", "--only: there is no axis 'wrd'; did you mean 'word'?"),
        ("word=non", "--only word: there is no value 'non'; did you mean 'none'?"),
        ("word=none,x", "--only word: there is no value 'x'"),
        ("word", "--only: got 'word'; give an axis and its values, as --only word=…"),
    ],
)
def test_only_says_what_is_wrong(word, message):
    with pytest.raises(ConfigError) as caught:
        selection([word], AXIS_VALUES)
    assert str(caught.value).startswith(message)


YAML = """
extends: {base}
ablation:
  name: all
  mode: one_at_a_time
  metric: [val/acc1, val/loss]
  with: [[dim, words]]
  when: {{heads: {{dim: [96]}}}}
  baseline: {{dim: 96, words: 24, heads: 4}}
  axes:
    dim: {{48: {{model.backbone.dim: 48}}, 96: {{model.backbone.dim: 96}}}}
    words: {{12: {{model.backbone.stem.word_dim: 12}}, 24: {{model.backbone.stem.word_dim: 24}}}}
    heads: {{2: {{model.backbone.blocks.tnt.outer.mixer.heads: 2}}, 4: {{}}}}
"""


def test_a_config_file_says_all_this(tmp_path):
    from framework.config import override
    from tests.conftest import EXPERIMENTS

    path = tmp_path / "all.yaml"
    path.write_text(YAML.format(base=EXPERIMENTS / "base/tnt_digits.yaml"))
    made = cells(compose([path], {"ablation.seeds": [5]}), override)
    assert [cell.folder for cell in made] == [
        "dim=96,words=24,heads=4/seed=5",
        "dim=48,words=12/seed=5",
        "dim=96,words=24,heads=2/seed=5",
    ]
    backbone = made[2].document["model"]["init_args"]["backbone"]["init_args"]
    outer = backbone["blocks"]["tnt"]["init_args"]["outer"]["init_args"]
    assert (backbone["dim"], outer["mixer"]["init_args"]["heads"]) == (96, 2)
    with pytest.raises(ConfigError, match=r"ablation\.mode: got 'grd' \(did you mean 'grid'\?"):
        compose([path], {"ablation.mode": "grd"})
