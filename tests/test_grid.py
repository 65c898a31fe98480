"""The cells of a config, and the folder that is the state of their study."""

from __future__ import annotations

import json
import os

import pytest
import yaml

from framework.ablation.grid import Ablation, cells
from framework.ablation.state import Status, read_status, read_study, write_status, write_text
from framework.ablation.tables import collect
from framework.errors import ConfigError
from tests.studies import document, dump, override, prepared

# The grid


def test_cells_come_in_the_order_of_axes_and_seeds():
    made = cells(document(), override)
    names = ["none/none", "none/learned", "learned/none", "learned/learned"]
    assert [(cell.name, cell.seed) for cell in made] == [(name, seed) for name in names for seed in (0, 1)]
    cell = made[3]
    assert cell.choices == {"sentence": "none", "word": "learned"}
    assert cell.folder == "sentence=none,word=learned/seed=1"
    assert cell.document == {
        "seed": 1,
        "name": "pos/sentence=none,word=learned/seed=1",
        "model": {"position": "NoPosition", "word": "LearnedPosition", "dim": 8},
    }


def test_settings_are_applied_once_per_choice():
    calls = []

    def counted(document, settings, where):
        calls.append(where)
        return override(document, settings, where)

    cells(document(seeds=[0, 1, 2, 3]), counted)
    words = ["ablation.axes.word.none", "ablation.axes.word.learned"]
    assert calls == [*words, "ablation.axes.sentence.learned", *words]


def test_names_that_are_no_file_names_are_made_so():
    made = cells(
        document(name="a b", axes={"lr/x": {"1e-3, big": {}, 8: {"model.dim": 9}}}, baseline={"lr/x": 8}), override
    )
    assert [cell.group for cell in made[::2]] == ["lr_x=1e-3_big", "lr_x=8"]
    assert made[0].name == "1e-3, big"
    assert made[0].document["name"] == "a_b/lr_x=1e-3_big/seed=0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {}}, "ablation.axes: nothing varies"),
        ({"axes": {"word": {}}}, "ablation.axes.word: has no values"),
        (
            {"axes": {"word": {"x": {"seed": 3}}}},
            "ablation.axes.word.x: seed would vary nothing; list seeds under ablation.seeds",
        ),
        (
            {"axes": {"word": {"x": {"ablation.name": "y"}}}},
            "ablation.axes.word.x: ablation.name would vary nothing; set it under ablation itself",
        ),
        (
            {"axes": {"word": {"x": {"launcher.jobs": 2}}}},
            "ablation.axes.word.x: launcher.jobs would vary nothing; all",
        ),
        ({"axes": {"word": {"x": {"name": "y"}}}}, "ablation.axes.word.x: name would vary nothing; each run is named"),
        ({"published": {"rows": {"none/none": 80.0}}}, "ablation.published.source: is missing; give the paper"),
        ({"published": {"source": "x"}}, "ablation.published.rows: is missing; give the paper's number"),
        ({"axes": {"word": {True: {}}}}, "ablation.axes.word: YAML reads a name here as True; put it in quotes"),
        ({"seeds": []}, "ablation.seeds: is empty"),
        ({"seeds": [3, 4, 3]}, "ablation.seeds: 3 is there twice"),
        ({"name": "/.."}, None),
        ({"name": ".."}, "ablation.name: got '..'"),
        ({"baseline": {"words": "none"}}, "ablation.baseline: there is no axis 'words'; did you mean 'word'?"),
        (
            {"baseline": {"word": "lerned"}},
            "ablation.baseline.word: there is no value 'lerned'; did you mean 'learned'?",
        ),
        (
            {"published": {"source": "x", "rows": {"none/lerned": 80.0}}},
            "ablation.published.rows: there is no cell 'none/lerned'; did you mean 'none/learned'?",
        ),
        (
            {"axes": {"word": {"a b": {}, "a,b": {}}}, "baseline": {}},
            "ablation.axes: a b and a,b would share the folder word=a_b",
        ),
        (
            {"axes": {"a": {"x": {"model.dim": 1}}, "b": {"y": {"model.dim": 2}}}, "baseline": {}},
            "ablation.axes: a and b both set model.dim",
        ),
        ({"axes": {"word": {"x": {"model.dims": 1}}}, "baseline": {}}, "ablation.axes.word.x: there is no model.dims"),
    ],
)
def test_mistakes_are_one_line(changes, message):
    if message is None:
        assert Ablation.read(document(**changes)).folder == "_.."
        return
    with pytest.raises(ConfigError) as caught:
        cells(document(**changes), override)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["name", "axes"])
def test_what_a_study_needs_is_named(key):
    made = document()
    del made["ablation"][key]
    with pytest.raises(ConfigError, match=rf"^ablation\.{key}: is missing; give "):
        cells(made, override)


# The folder


def test_a_status_is_read_back(tmp_path):
    status = Status("running", 3, 9, {"val/acc1": 0.5, "loss": float("inf")}, {"params": 12}, "why")
    write_status(tmp_path, status)
    assert read_status(tmp_path) == status
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"state": "fin',
        "[]",
        "3",
        '{"state": "done"}',
        '{"state": ["finished"]}',
        '{"state": "finished", "epoch": "3"}',
        '{"state": "finished", "metrics": {"val/acc1": null}}',
        '{"state": "finished", "metrics": {"val/acc1": "0.9"}}',
        '{"state": "finished", "metrics": [0.9]}',
        '{"state": "finished", "measures": {"seconds": null}}',
        '{"state": "failed", "error": null}',
    ],
)
def test_what_cannot_be_read_waits(tmp_path, text):
    assert read_status(tmp_path) == Status("waiting")
    (tmp_path / "status.json").write_text(text)
    assert read_status(tmp_path) == Status("waiting")


def test_a_writer_that_dies_leaves_the_old_text(tmp_path, monkeypatch):
    write_status(tmp_path, Status("finished"))

    def die(part, path):
        assert part.parent == path.parent
        raise OSError("the machine stops here")

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="stops here"):
        write_status(tmp_path, Status("running"))
    assert read_status(tmp_path).state == "finished"


def test_a_prepared_folder_holds_the_whole_study(tmp_path):
    folders = prepared(tmp_path)
    assert [str(folder.relative_to(tmp_path)) for folder in folders[:2]] == [
        "sentence=none,word=none/seed=0",
        "sentence=none,word=none/seed=1",
    ]
    assert yaml.safe_load((folders[1] / "config.yaml").read_text())["seed"] == 1
    about = read_study(tmp_path)
    assert about["axes"] == {"sentence": ["none", "learned"], "word": ["none", "learned"]}
    assert about["cells"][1] == {
        "folder": "sentence=none,word=learned",
        "choices": {"sentence": "none", "word": "learned"},
        "params": 8000,
        "macs": 2_000_000,
    }
    with pytest.raises(ConfigError, match="is not the folder of a study"):
        read_study(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (lambda about: about.clear(), ": is damaged at 'name'; delete it"),
        (lambda about: about.pop("axes"), ": is damaged at 'axes'; delete it"),
        (lambda about: about.update(seeds=None), ": is damaged at 'seeds'; delete it"),
        (lambda about: about["cells"][1].pop("macs"), ": cells[1]: is damaged at 'macs'; delete it"),
        (lambda about: about["cells"].append(3), ": cells[4]: is damaged at 'folder'; delete it"),
    ],
)
def test_a_damaged_study_is_named(tmp_path, damage, where):
    prepared(tmp_path)
    about = read_study(tmp_path)
    damage(about)
    (tmp_path / "study.json").write_text(json.dumps(about))
    for read in (read_study, collect, prepared):
        with pytest.raises(ConfigError) as caught:
            read(tmp_path)
        assert str(caught.value).startswith(f"{tmp_path}/study.json{where}")
    (tmp_path / "study.json").unlink()
    prepared(tmp_path)


def test_other_configs_in_the_folder_are_refused(tmp_path):
    folders = prepared(tmp_path)
    before = (folders[0] / "config.yaml").read_text()
    write_text(folders[0] / "config.yaml", before + "# a note changes nothing\n")
    prepared(tmp_path)

    other = yaml.safe_load(before)
    other["model"].update(dim=4, heads=2, position="x", word="y" * 99)
    write_text(folders[0] / "config.yaml", dump(other))
    with pytest.raises(ConfigError) as caught:
        prepared(tmp_path)
    assert str(caught.value) == (
        f"{folders[0]}: was made with another config: model.position: x → NoPosition, "
        f"model.word: {'y' * 59}… → NoPosition, model.dim: 4 → 8 and 1 more; "
        "take another ablation.name, or move the folder away"
    )


@pytest.mark.parametrize("damaged", [b"a: {b\nc: [" * 20, b"a: \xff", b"a: 2026-99-99"])
def test_a_damaged_config_in_the_folder_is_named(tmp_path, damaged):
    folders = prepared(tmp_path)
    (folders[1] / "config.yaml").write_bytes(damaged)
    with pytest.raises(ConfigError) as caught:
        prepared(tmp_path)
    assert str(caught.value).startswith(f"{folders[1]}/config.yaml: is damaged (")
    assert str(caught.value).endswith("; delete it, or move the folder away")
    (folders[1] / "config.yaml").unlink()
    prepared(tmp_path)


def test_a_study_may_grow_but_not_change_its_axes(tmp_path):
    assert len(prepared(tmp_path)) == 8
    assert len(prepared(tmp_path, seeds=[0, 1, 2])) == 12
    axes = {"word": document()["ablation"]["axes"]["word"]}
    with pytest.raises(ConfigError, match=r"has the axes sentence, word, not word; take another ablation\.name"):
        prepared(tmp_path, axes=axes, baseline={})
