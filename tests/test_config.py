"""Documents: how files, what they extend and settings become one, and how nets come back out of what is saved."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import yaml

from framework.config import compose, dump, merge_layer, override, parse_value, resolve
from framework.construct import build_model, complete
from framework.errors import ConfigError
from framework.run import CONFIG, LAST, RESOLVED, train
from framework.tasks import Classification
from tests.conftest import CONFIGS, EXPERIMENTS, REPO

FILES = sorted(EXPERIMENTS.rglob("*.yaml"))
TNT, NEXT_VIT = CONFIGS / "tnt.yaml", CONFIGS / "pyramid.yaml"

Write = Callable[[str, str], Path]
Tiny = Callable[..., dict[str, Any]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
        return path

    return make


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def at(document: Any, path: str) -> Any:
    """The value at a dotted path as users write it."""
    for name in path.split("."):
        if "init_args" in document and name not in document:
            document = document["init_args"]
        document = document[name]
    return document


# ---- files


def test_a_file_goes_over_what_it_extends(write: Write) -> None:
    write("base/a.yaml", "{seed: 1, name: a, trainer: {max_epochs: 1, precision: 32}}")
    write("b.yaml", "{extends: base/a.yaml, seed: 2, trainer: {max_epochs: 2}}")
    document = compose([write("c.yaml", "{extends: b.yaml, trainer: {max_epochs: 3}}")])
    assert document["trainer"] == {"max_epochs": 3, "precision": 32}
    assert (document["seed"], document["name"]) == (2, "a")


def test_a_later_file_goes_over_an_earlier_one(write: Write) -> None:
    one, two = write("one.yaml", "{seed: 1, trainer: {max_epochs: 1}}"), write("two.yaml", "seed: 2")
    assert compose([write("both.yaml", "extends: [one.yaml, two.yaml]")])["seed"] == 2
    assert compose([write("turned.yaml", "extends: [two.yaml, one.yaml]")])["seed"] == 1
    assert compose([one, two])["seed"] == 2
    assert compose([one, two])["trainer"] == {"max_epochs": 1}
    assert compose([one, two])["name"] == "two"


def test_two_files_with_one_base_change_it_both(write: Write) -> None:
    write("root.yaml", "{seed: 7, trainer: {max_epochs: 1, precision: 32}}")
    left = write("left.yaml", "{extends: root.yaml, trainer: {max_epochs: 2}}")
    right = write("right.yaml", "{extends: root.yaml, trainer: {precision: 64}}")
    top = write("top.yaml", "extends: [left.yaml, right.yaml]")
    for files in ([top], [left, right], [right, left]):
        document = compose(files)
        assert document["seed"] == 7
        assert document["trainer"] == {"max_epochs": 2, "precision": 64}
    assert compose([left, right, left.with_name("root.yaml")])["trainer"] == {"max_epochs": 1, "precision": 32}


def test_a_circle_is_found(write: Write) -> None:
    write("a.yaml", "extends: b.yaml")
    write("b.yaml", "extends: sub/c.yaml")
    path = write("sub/c.yaml", "extends: ../a.yaml")
    assert "c.yaml: extends itself through c.yaml → a.yaml → b.yaml" in refusal(lambda: compose([path]))
    alone = write("alone.yaml", "extends: alone.yaml")
    assert refusal(lambda: compose([alone])) == f"{alone}: extends itself through alone.yaml"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("extends: nope.yaml", "x.yaml: extends: no such file: "),
        ("extends: 3", "x.yaml: extends: expected a file or a list of files, got 3"),
        ("extends: {a: b}", "x.yaml: extends: expected a file or a list of files"),
        ("[1, 2]", "x.yaml: must hold a mapping with keys such as model and data, got list"),
        ("model: {a: 1\nb: [", "x.yaml, line 2, column 2: not readable as YAML: "),
        ("model:\n\tdim: 3", "x.yaml, line 2, column 1: not readable as YAML: "),
        ("seed: 1\nname: a\nseed: 2", "x.yaml, line 3: 'seed' stands here twice"),
        ("trainer:\n  max_epochs: 1\n  max_epochs: 2", "x.yaml, line 3: 'max_epochs' stands here twice"),
        ("trainer: {callbacks: [{a: 1, a: 2}]}", "x.yaml, line 1: 'a' stands here twice"),
        ("model: !!python/object:os.system {}", "x.yaml, line 1, column 8: not readable as YAML: "),
        ("trainer: {on: 1}", "x.yaml: trainer: the key True is no name (YAML reads on, off"),
        ("trainer: {null: 1}", "x.yaml: trainer: the key None is no name"),
        ("modle: {}", "x.yaml: modle: no such section (did you mean 'model'?"),
        ("1: 2", "x.yaml: 1: no such section (allowed: ablation, data, extends, "),
        ("plugins: 3", "x.yaml: plugins: expected a list of files or import paths, got 3"),
        ("plugins: [1]", "x.yaml: plugins: expected a list of files or import paths, got [1]"),
        ("model: null", "x.yaml: model: null is not a value here; give a Task, or leave the key out"),
        ("seed: -1", "seed: got -1, must be 0 to 4294967295"),
        ("name: ../../etc", "name: got '../../etc', must be the name of a folder under runs"),
        ("name: /etc", "name: got '/etc'"),
        ("name: ''", "name: got ''"),
    ],
)
def test_a_mistake_in_a_file_names_file_and_place(write: Write, text: str, says: str) -> None:
    path = write("x.yaml", text)
    assert says in refusal(lambda: compose([path]))


def test_a_missing_file_is_suggested(write: Write) -> None:
    folder = write("ablation.yaml", "").parent
    assert refusal(lambda: compose([folder / "albation.yaml"])) == (
        f"{folder}/albation.yaml: no such file (did you mean {folder}/ablation.yaml?)"
    )
    assert refusal(lambda: compose([folder])) == f"{folder}: is a folder, not a file"
    (folder / "bytes.yaml").write_bytes(b"\xb5\xff")
    assert refusal(lambda: compose([folder / "bytes.yaml"])) == f"{folder}/bytes.yaml: is no text in UTF-8"


def test_an_empty_file_is_an_empty_layer(write: Write) -> None:
    document = compose([write("nothing.yaml", "")])
    assert document == {"name": "nothing", "seed": 0, "data": {"class_path": "Digits"}, "trainer": {}}
    assert refusal(lambda: resolve(document)).startswith("model: is missing")


def test_anchors_and_merge_keys_of_yaml(write: Write) -> None:
    text = """
    trainer: {max_epochs: 3}
    data: &digits {class_path: Digits, init_args: &args {size: 16}}
    """
    assert compose([write("anchor.yaml", text)])["data"]["init_args"] == {"size": 16}
    text = "model: {optimizer: &one {lr: 1e-3}, schedule: {class_path: Cosine, init_args: {<<: {min_lr: 1e-7}}}}"
    assert at(compose([write("merge.yaml", text)]), "model.schedule.min_lr") == 1e-7


# ---- settings by dotted path


SETTINGS = [
    ("model.backbone.stages.s3.pattern", "ncb*4"),
    ("model.backbone.init_args.stages.s3.pattern", "ncb*4"),
    ("model.init_args.backbone.init_args.stages.s3.pattern", "ncb*4"),
    ("model.backbone.stages.s3.dims.ntb", 96),
    ("model.backbone.stages.s2.blocks.ntb.sr_ratio", 4),
    ("model.backbone.stages.s2.blocks.ntb.init_args.sr_ratio", 4),
    ("model.backbone.blocks.ntb.shrink", 0.5),
    ("model.backbone.blocks.ntb.norm.eps", 1e-6),
    ("model.backbone.blocks.ntb.init_args.norm.init_args.eps", 1e-6),
    ("model.backbone.blocks.ncb.mixer_residual.layer_scale", 0.1),
    ("model.backbone.blocks.ncb.mixer_residual.gate.class_path", "SigmoidGate"),
    ("model.backbone.stem.dims", [8, 32]),
    ("model.backbone.norm.class_path", "LayerNorm"),
    ("model.optimizer.lr", 3e-4),
    ("model.schedule.warmup", 0.1),
    ("model.objectives", {"ce": {"class_path": "CrossEntropy", "init_args": {"label_smoothing": 0.1}}}),
    ("data.size", 16),
    ("trainer.max_epochs", 2),
    ("seed", 5),
    ("name", "other"),
]


@pytest.mark.parametrize(("path", "value"), SETTINGS, ids=[path for path, _ in SETTINGS])
def test_a_setting_reaches_every_value(path: str, value: Any) -> None:
    after = compose([NEXT_VIT], {path: value})
    assert at(after, path.replace(".init_args", "")) == value
    assert after != compose([NEXT_VIT])
    resolve(after)


def test_settings_go_one_after_the_other() -> None:
    settings = {"model.backbone.stem": "PatchStem", "model.backbone.stem.patch": 8, "model.head": "ClassTokenHead"}
    document = compose([NEXT_VIT], settings)
    assert at(document, "model.backbone.stem") == {"class_path": "PatchStem", "init_args": {"patch": 8}}


def test_a_bare_name_and_a_mapping_become_canonical() -> None:
    document = compose([TNT], {"model.backbone.blocks.tnt.outer.mlp_residual.gate": "TanhGate"})
    assert at(document, "model.backbone.blocks.tnt.outer.mlp_residual") == {
        "class_path": "Residual", "init_args": {"gate": {"class_path": "TanhGate"}}
    }  # fmt: skip
    assert at(document, "model.backbone.blocks.tnt.outer")["class_path"] == "Encoder"


def test_the_same_class_merges_and_another_one_replaces() -> None:
    path = "model.backbone.blocks.ntb"
    base = compose([NEXT_VIT], {path: {"shrink": 0.5, "sr_ratio": 2}})
    same = override(base, {path: {"class_path": "NTB", "init_args": {"sr_ratio": 4}}})
    assert at(same, path)["init_args"] == {"shrink": 0.5, "sr_ratio": 4}
    assert override(base, {path: "NTB"}) == base
    assert at(override(base, {path: "blocks.nextvit.NTB"}), path)["init_args"] == {"shrink": 0.5, "sr_ratio": 2}
    other = override(base, {path: {"class_path": "NCB", "init_args": {"mlp_ratio": 2.0}}})
    assert at(other, path) == {"class_path": "NCB", "init_args": {"mlp_ratio": 2.0}}
    assert at(override(base, {path: "NCB"}), path) == {"class_path": "NCB"}


def test_override_leaves_the_document_as_it_was() -> None:
    base = compose([NEXT_VIT])
    text = dump(base)
    override(base, {"model.backbone.stages.s3.blocks.ntb.sr_ratio": 2, "model.backbone.stages.s1": None})
    assert dump(base) == text


def test_null_takes_a_key_away() -> None:
    def keys(path: str, parent: str) -> set[str]:
        return set(at(compose([NEXT_VIT], {path: None}), parent))

    assert "s1" not in keys("model.backbone.stages.s1", "model.backbone.stages")
    assert "ntb" not in keys("model.backbone.stages.s2.dims.ntb", "model.backbone.stages.s2.dims")
    assert "ntb" not in keys("model.backbone.stages.s2.blocks.ntb", "model.backbone.stages.s2.blocks")
    assert "dims" not in keys("model.backbone.stages.s2.dims", "model.backbone.stages.s2")
    assert "size" not in keys("data.size", "data.init_args")
    assert compose([NEXT_VIT], {"trainer": None})["trainer"] == {}
    assert "ablation" not in compose([CONFIGS / "study.yaml"], {"ablation": None})


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("model", "model: null is not a value here; give a Task"),
        ("data", "data: null is not a value here"),
        ("model.backbone", "give a Backbone, or leave the key out"),
        ("model.backbone.stem", "give a Block (for nothing: Identity)"),
        ("model.backbone.norm", "give a Norm (for nothing: NoNorm)"),
        ("model.backbone.position", "give a Position (for nothing: NoPosition)"),
        ("model.backbone.blocks.ncb.mixer_residual.gate", "give a Gate (for nothing: NoGate)"),
        ("model.head", "give a Head, or leave"),
        ("model.backbone.drop_path", "model.backbone.drop_path: null is not a value here; give a number"),
        ("model.backbone.blocks.foo", "null takes away what is not there (allowed: ncb, ntb)"),
    ],
)
def test_null_is_no_class(path: str, says: str) -> None:
    message = refusal(lambda: compose([NEXT_VIT], {path: None}))
    assert message.startswith(f"{path}: null ")
    assert says in message


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1E-3", "1.0e-3"])
def test_numbers_with_an_exponent_are_numbers(write: Write, text: str) -> None:
    assert parse_value(text, "--lr") == 1e-3
    document = compose([TNT, write("lr.yaml", f"model: {{optimizer: {{lr: {text}}}}}")])
    assert at(document, "model.optimizer.lr") == 1e-3


def test_an_integer_is_a_fine_float() -> None:
    lr = at(compose([TNT], {"model.optimizer.lr": 1}), "model.optimizer.lr")
    assert isinstance(lr, float)


def test_a_number_is_a_fine_name(write: Write) -> None:
    path = write(
        "n.yaml", f"{{extends: {NEXT_VIT}, model: {{backbone: {{stages: {{4: {{dim: 64, pattern: ncb}}}}}}}}}}"
    )
    assert at(compose([path]), "model.backbone.stages.4.dim") == 64
    assert at(compose([path], {"model.backbone.stages.4.dim": 96}), "model.backbone.stages.4.dim") == 96


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "null"])
def test_a_word_that_yaml_reads_as_no_name_is_refused(write: Write, word: str) -> None:
    path = write("n.yaml", f"model: {{backbone: {{class_path: Isotropic, init_args: {{blocks: {{{word}: NCB}}}}}}}}")
    assert "model.backbone.blocks: the key " in refusal(lambda: compose([path]))
    fine = write("q.yaml", f"model: {{backbone: {{class_path: Isotropic, init_args: {{blocks: {{'{word}': NCB}}}}}}}}")
    assert at(compose([fine]), f"model.backbone.blocks.{word}") == {"class_path": "NCB"}


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("model.backbone.blocks.ntb", "NTP", "unknown Block 'NTP' (did you mean 'NTB'?"),
        ("model.backbone.blocks.ntb", "torch.nn.Linear", "'torch.nn.Linear' is no Block"),
        ("model.backbone.blocks.ntb", "nopackage.Block", "cannot import 'nopackage.Block'"),
        ("model.backbone.blocks.ntb", 3, "expected a Block (a name or a mapping of arguments), got 3"),
        ("model.backbone.blocks.ntb.norm", "ReLU", "unknown Norm 'ReLU' (allowed: BatchNorm, LayerNorm"),
        ("model.backbone.blocks.ntb.normm", "ReLU", "NTB has no such argument (did you mean 'norm'?"),
        ("model.backbone.stages.s3.patern", "ncb", "Stage has no such argument (did you mean 'pattern'?"),
        ("model.backbone.stages.s3", 3, "expected a mapping with the arguments of Stage, got 3"),
        ("model.backbone.stages.s3.dim", "x", "expected a whole number, got 'x'"),
        ("model.backbone.stages.s3.dim", 2.5, "expected a whole number, got 2.5"),
        ("model.backbone.stages.s3.dim", True, "expected a whole number, got True"),
        ("model.backbone.stem.dims", 3, "expected [int, …], got 3"),
        ("model.backbone.stem.dims", [8, "x"], "model.backbone.stem.dims[1]: expected a whole number, got 'x'"),
        ("model.optimizer.betas", [0.9], "expected [float, float], got [0.9]"),
        ("model.optimizer", {"class_path": "SGD", "lr": 1}, "model.optimizer.lr: stands beside class_path"),
        ("model.backbone", "Composed", "unknown Backbone 'Composed' (allowed: Isotropic, Pyramid, TimmBackbone)"),
        ("model.objectives.ce.weight", 2, "model.objectives.ce: names no Objective"),
        ("trainer.max_epoch", 2, "Trainer has no such argument (did you mean 'max_epochs'?"),
    ],
)
def test_a_wrong_setting_names_its_path(path: str, value: Any, says: str) -> None:
    message = refusal(lambda: resolve(compose([NEXT_VIT], {path: value})))
    assert message.startswith(path.rpartition(".")[0] if "." in path else path)
    assert says in message


# ---- what stages inherit


def shared(**stage: Any) -> dict[str, Any]:
    """Next-ViT with a shared NTB that shrinks to a half, and one more thing in the third stage's blocks."""
    settings = {"model.backbone.blocks.ntb.shrink": 0.5}
    return compose([NEXT_VIT], settings | {f"model.backbone.stages.s3.blocks.{k}": v for k, v in stage.items()})


def stage_block(document: dict[str, Any], name: str = "ntb") -> Any:
    return at(resolve(document), f"model.backbone.stages.s3.blocks.{name}")


def test_a_stage_inherits_class_and_arguments() -> None:
    document = shared(ntb={"sr_ratio": 2})
    assert stage_block(document) == {"class_path": "NTB", "init_args": {"shrink": 0.5, "sr_ratio": 2}}
    assert "class_path" not in at(document, "model.backbone.stages.s3.blocks.ntb")  # not before all is said


def test_a_later_change_of_the_shared_block_reaches_the_stage() -> None:
    document = shared(ntb={"sr_ratio": 2})
    changed = override(document, {"model.backbone.blocks.ntb.shrink": 0.25, "model.backbone.blocks.ntb.sr_ratio": 1})
    assert stage_block(changed)["init_args"] == {"shrink": 0.25, "sr_ratio": 2}
    other = override(shared(ncb={"mlp_ratio": 2}), {"model.backbone.blocks.ncb": "Encoder"})
    assert "Encoder has no such argument" in refusal(lambda: resolve(other))


def test_a_change_below_a_shared_slot_reaches_the_stage() -> None:
    document = override(shared(ntb={"norm": {"eps": 1e-3}}), {"model.backbone.blocks.ntb.norm": "LayerNorm"})
    assert stage_block(document)["init_args"]["norm"] == {"class_path": "LayerNorm", "init_args": {"eps": 1e-3}}


def test_a_stage_may_name_another_class() -> None:
    assert stage_block(shared(ntb="NCB")) == {"class_path": "NCB"}
    args = {"class_path": "NCB", "init_args": {"mlp_ratio": 2.0}}
    assert stage_block(shared(ntb=args)) == args
    assert stage_block(shared(ntb="NTB")) == {"class_path": "NTB", "init_args": {"shrink": 0.5}}


def test_a_stage_may_add_a_block_of_its_own() -> None:
    assert stage_block(shared(own="Identity"), "own") == {"class_path": "Identity"}
    message = refusal(lambda: resolve(shared(own={"head_dim": 8})))
    assert message.startswith("model.backbone.stages.s3.blocks.own: names no class for these arguments")


def test_a_mistake_in_what_a_stage_adds_is_found_at_the_end() -> None:
    message = refusal(lambda: resolve(shared(ntb={"sr_rato": 2})))
    assert message.startswith("model.backbone.stages.s3.blocks.ntb.sr_rato: NTB has no such argument (did you mean")


def test_what_is_missing_is_named() -> None:
    lone = compose([], {"model.backbone": "Isotropic"})
    assert refusal(lambda: resolve(lone)) == "model.backbone.blocks: Isotropic needs it: {name: Block}"
    stage = compose([NEXT_VIT], {"model.backbone.stages.s4.dim": 8})
    assert refusal(lambda: resolve(stage)) == "model.backbone.stages.s4.pattern: Stage needs it: str"


def test_image_and_classes_come_from_the_data(tiny: Tiny) -> None:
    args = complete(tiny(data__size=32))["model"]["init_args"]
    assert (args["image"], args["num_classes"]) == ({"size": 32, "channels": 1}, 10)
    assert complete(tiny(model__num_classes=20))["model"]["init_args"]["num_classes"] == 20
    few = refusal(lambda: complete(tiny(model__num_classes=3)))
    assert few == "model.num_classes: got 3, but the data has 10 classes"
    assert refusal(lambda: complete(tiny(model__image__size=8))).startswith(
        "model.image: got {'size': 8}, but the data"
    )


# ---- there and back


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(EXPERIMENTS)) for path in FILES])
def test_a_dumped_document_is_the_same_document(path: Path, write: Write) -> None:
    fragment = path.parent.name == "recipes" or path.name in ("cifar10.yaml", "fashion_mnist.yaml")  # without a net
    net = [EXPERIMENTS / "zoo/deit_ti.yaml"] if fragment else []
    document = compose([*net, path])
    text = dump(document)
    again = compose([write("config.yaml", text)])
    assert again == document
    assert dump(again) == text
    if "model" in document:
        resolved = resolve(document)
        assert resolve(again) == resolved
        assert resolve(compose([write("resolved.yaml", dump(resolved))])) == resolved


def test_merging_a_document_into_itself_changes_nothing() -> None:
    document = compose([NEXT_VIT])
    assert merge_layer(document, document, "") == document


# ---- a run folder


@dataclass
class Run:
    """A folder in which one step was trained, and the net at its end."""

    folder: Path
    document: dict[str, Any]
    model: Classification


FAST = {"enable_progress_bar": False, "logger": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, _tiny: dict[str, Any]) -> Run:
    folder = tmp_path_factory.mktemp("run")
    document = override(_tiny, {"trainer": FAST, "model.backbone.drop_path": 0.1})
    return Run(folder, document, train(folder, document, bar=False).lightning_module)


def test_both_files_of_a_run_folder_run_again(run: Run, tmp_path: Path) -> None:
    config, resolved = (compose([run.folder / name]) for name in (CONFIG, RESOLVED))
    assert config == run.document
    assert complete(config) == complete(resolved) == yaml.safe_load((run.folder / RESOLVED).read_text())
    train(tmp_path, resolved, bar=False)
    first, second = (
        torch.load(folder / LAST, weights_only=True)["state_dict"] for folder in (run.folder, tmp_path)
    )  # fmt: skip
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_change_over_a_saved_config_still_inherits(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(dump(shared(ntb={"sr_ratio": 2})))
    changed = compose([tmp_path / CONFIG], {"model.backbone.blocks.ntb.shrink": 0.25})
    assert stage_block(changed)["init_args"] == {"shrink": 0.25, "sr_ratio": 2}


def test_a_checkpoint_is_plain_data_and_rebuilds_the_net(run: Run) -> None:
    saved = torch.load(run.folder / LAST, weights_only=True)
    assert "backbone" in saved["hyper_parameters"]
    loaded = Classification.load_from_checkpoint(run.folder / LAST, weights_only=True).eval()
    assert type(loaded.backbone.blocks[0]).__name__ == "TNT"
    images = torch.randn_like(loaded.example(2))
    with torch.no_grad():
        assert torch.equal(loaded(images), run.model.eval()(images))


def test_a_net_from_python() -> None:
    document = compose([TNT], {"model.backbone.dim": 32, "model.backbone.pattern": "tnt"})
    model = build_model(document)
    assert isinstance(model, Classification)
    assert model(model.example()).shape == (1, 10)
    assert model.backbone.out.dim == 32


# ---- plug-ins

PLUGIN = """
from blocks.base import Block, Features, Site


class {name}(Block):
    '''A block from outside.

    Args:
        factor: what the map is multiplied with.
    '''

    def __init__(self, site: Site, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.out = site.inp

    def forward(self, features: Features) -> Features:
        return features.replace(map=features.map * self.factor)
"""


def uses(name: str) -> dict[str, Any]:
    block = {"class_path": name, "init_args": {"factor": 2.0}}
    return {"model.backbone.blocks.own": block, "model.backbone.pattern": "tnt own"}


def test_a_plug_in_by_import_path(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(write("tessera_by_path.py", PLUGIN.format(name="ByPath")).parent)
    document = compose([TNT], uses("tessera_by_path.ByPath"))
    assert build_model(document).backbone.blocks[1].factor == 2.0
    assert at(compose([TNT], uses("ByPath")), "model.backbone.blocks.own")["class_path"] == "ByPath"  # known by now
    message = refusal(lambda: compose([TNT], {"model.backbone.blocks.own": {"class_path": "ByPath", "init_args": {
        "facto": 1}}}))  # fmt: skip
    assert (
        message
        == "model.backbone.blocks.own.facto: ByPath has no such argument (did you mean 'factor'?; allowed: factor)"
    )


def test_a_plug_in_by_entry_point(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write("tessera_by_entry.py", PLUGIN.format(name="ByEntry")).parent
    write("tessera_by_entry-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tessera_by_entry\nVersion: 1.0\n")
    write("tessera_by_entry-1.0.dist-info/entry_points.txt", "[tessera.plugins]\nmine = tessera_by_entry\n")
    monkeypatch.syspath_prepend(folder)
    assert build_model(compose([TNT], uses("ByEntry"))).backbone.blocks[1].factor == 2.0


def test_an_entry_point_that_fails_is_one_line(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write("tessera_broken_entry.py", "raise ValueError('a\\nb')").parent
    write("tessera_broken-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tessera_broken\nVersion: 1.0\n")
    write("tessera_broken-1.0.dist-info/entry_points.txt", "[tessera.plugins]\nmine = tessera_broken_entry\n")
    monkeypatch.syspath_prepend(folder)
    assert refusal(lambda: compose([TNT])) == "plugins: plug-in tessera_broken_entry fails: ValueError: a b"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(:", "SyntaxError: invalid syntax (tessera_broken_0.py, line 1)"),
        ("import nopackage", "ModuleNotFoundError: No module named 'nopackage'"),
        ("raise ValueError('a\\nb')", "ValueError: a b"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_a_plug_in_that_fails_is_one_line(write: Write, text: str, says: str) -> None:
    path = write("tessera_broken_0.py", text)
    assert refusal(lambda: compose([TNT], plugins=[str(path)])) == f"plugins: plug-in {path} fails: {says}"


def test_a_plug_in_that_is_not_there_is_named(write: Write) -> None:
    assert refusal(lambda: compose([TNT], plugins=["nope.py"])) == "plugins: no such file: nope.py"
    assert "No module named 'nope'" in refusal(lambda: compose([TNT], plugins=["nope"]))
    path = write("torch.py", "")
    assert refusal(lambda: compose([TNT], plugins=[str(path)])).endswith("is loaded already; rename the file")


def test_a_plug_in_file_goes_with_the_run_folder(
    write: Write, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative in the config, absolute in the saved one, which a fresh process runs from anywhere."""
    write("own/tessera_by_file.py", PLUGIN.format(name="ByFile"))
    write("base.yaml", dump(tiny()))
    model = "{backbone: {blocks: {own: ByFile}, pattern: own}}"
    text = f"{{extends: ../base.yaml, plugins: [tessera_by_file.py], model: {model}}}"
    document = compose([write("own/net.yaml", text)])
    assert document["plugins"] == [str(tmp_path / "own/tessera_by_file.py")]
    saved = write("run/config.yaml", dump(document))
    monkeypatch.chdir("/")
    assert compose([saved]) == document
    command = [sys.executable, str(REPO / "cli.py"), "describe", "--config", str(saved)]
    found = subprocess.run(command, cwd="/", capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert found.returncode == 0, found.stderr
    assert "ByFile" in found.stdout


MANY = """
from enum import Enum
from typing import Any, Literal

from blocks.base import GateFactory, NormFactory, Site
from blocks.gates import NoGate
from blocks.nextvit import NCB
from blocks.structure import Identity

Speed = Enum("Speed", "FAST SLOW")


class Choosy(Identity):
    def __init__(
        self, site: Site, speed: Speed = Speed.FAST, kind: Literal["a", 3] = "a", norm: NormFactory | None = None,
        gate: GateFactory | None = NoGate, either: int | str = 1, anything: Any = None, untyped=3,
    ) -> None:
        super().__init__(site)
        self.got = {"speed": speed.name, "kind": kind, "either": either, "anything": anything, "untyped": untyped}
        self.norm, self.gate = norm and norm(8), gate and gate(8)


class Wider(NCB):
    def __init__(self, here: Site, own: int = 1, **kwargs) -> None:
        super().__init__(here, **kwargs)
        self.own = own


class Lazy(Identity):
    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)


class NoSite(Identity):
    def __init__(self, dim: int = 3) -> None:
        pass


class NoArguments(NCB):
    def __init__(self) -> None:
        pass
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    path = tmp_path_factory.mktemp("many") / "tessera_many.py"
    path.write_text(MANY)
    return [str(path)]


def built(many: list[str], name: str, **args: Any) -> Any:
    """The block `name` of the plug-in, made from a config."""
    settings = {"model.backbone.blocks.ncb": {"class_path": name, "init_args": args}}
    return build_model(compose([NEXT_VIT], settings, many)).backbone.stages["s1"].blocks[0]


def test_arguments_of_many_types(many: list[str]) -> None:
    given = {"speed": "SLOW", "kind": 3, "either": "x", "anything": {"a": [1, None]}, "untyped": "y"}
    block = built(many, "Choosy", **given, norm={"class_path": "LayerNorm", "init_args": {"eps": 1e-3}}, gate=None)
    assert block.got == given
    assert (block.norm.eps, block.gate) == (1e-3, None)
    assert type(built(many, "Choosy", norm="RMSNorm").norm).__name__ == "RMSNorm"


def test_arguments_that_a_class_passes_on(many: list[str]) -> None:
    block = built(many, "Wider", own=2, mlp_ratio=2.0, norm="LayerNorm", mixer_residual={"scale": 0.5})
    assert (block.own, type(block.norm).__name__, block.mixer_residual.scale) == (2, "LayerNorm", 0.5)
    assert type(built(many, "Lazy")).__name__ == "Lazy"


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("Choosy", {"speed": "NONE"}, "model.backbone.blocks.speed: Expected a member of <enum 'Speed'>: {FAST,SLOW}"),
        ("Choosy", {"kind": "b"}, "model.backbone.blocks.ncb.kind: got 'b' (allowed: 3, a)"),
        ("Choosy", {"norm": "GELU"}, "model.backbone.blocks.ncb.norm: unknown Norm 'GELU' (allowed: BatchNorm"),
        ("Choosy", {"gate": {"ratio": 1}}, "model.backbone.blocks.ncb.gate.ratio: NoGate has no such argument"),
        ("Choosy", {"either": 1.5}, "model.backbone.blocks.ncb.either: expected int | str, got 1.5"),
        ("Wider", {"norm": "GELU"}, "model.backbone.blocks.ncb.norm: unknown Norm 'GELU'"),
        ("Wider", {"wrong": 1}, "model.backbone.blocks: Option 'wrong' is not accepted"),
        ("NoArguments", {}, "model.backbone.blocks.ncb: NoArguments does not fit here: its constructor must take"),
        (
            "NoSite",
            {},
            "model.backbone.blocks.ncb: NoSite does not fit here: its argument 1, dim, must be Site, not int",
        ),
    ],
)
def test_a_wrong_argument_of_a_class_from_outside(many: list[str], name: str, args: dict[str, Any], says: str) -> None:
    assert refusal(lambda: built(many, name, **args)).startswith(says)


def test_plug_ins_of_layers_and_options_add_up(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = write("tessera_one.py", ""), write("tessera_two.py", "")
    write("a.yaml", "plugins: tessera_one.py")
    path = write("b.yaml", "{extends: a.yaml, plugins: [tessera_one.py]}")
    monkeypatch.chdir(two.parent)
    assert compose([path], plugins=["tessera_two.py"])["plugins"] == [str(one), str(two)]
