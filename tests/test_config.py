"""Documents: how files, what they extend and settings become one, and how nets come back out of what is saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from framework.config import compose, dump, override, parse_value, resolve
from framework.construct import complete
from framework.errors import ConfigError
from tests.conftest import CONFIGS, EXPERIMENTS, Write

FILES = sorted(EXPERIMENTS.rglob("*.yaml"))
TNT, NEXT_VIT = CONFIGS / "tnt.yaml", CONFIGS / "pyramid.yaml"

Tiny = Callable[..., dict[str, Any]]


TNT, NEXT_VIT = CONFIGS / "tnt.yaml", CONFIGS / "pyramid.yaml"
Tiny = Callable[..., dict[str, Any]]


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
        ("extends: ''", "x.yaml: extends: got '', must be a config file, or left out"),
        ("extends: [' ']", "x.yaml: extends: got ' ', must be a config file, or left out"),
        ("extends: ..", "x.yaml: extends: is a folder, not a file: "),
        ("extends: 3", "x.yaml: extends: expected a file or a list of files, got 3"),
        ("extends: {a: b}", "x.yaml: extends: expected a file or a list of files"),
        ("[1, 2]", "x.yaml: must hold a mapping with keys such as model and data, got list"),
        ("model: {a: 1\nb: [", "x.yaml, line 2, column 2: not readable as YAML: "),
        ("model:\n\tdim: 3", "x.yaml, line 2, column 1: not readable as YAML: "),
        ("seed: 1\nname: a\nseed: 2", "x.yaml, line 3: 'seed' stands here twice"),
        ("trainer:\n  max_epochs: 1\n  max_epochs: 2", "x.yaml, line 3: 'max_epochs' stands here twice"),
        ("seed: 1\nmodel: &a {backbone: *a}", "x.yaml, line 2: an anchor stands for what contains its own alias"),
        ("trainer: {callbacks: &a [*a]}", "x.yaml, line 1: an anchor stands for what contains its own alias"),
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


@pytest.mark.parametrize("text", ["&a {backbone: *a}", "&a [*a]"])
def test_a_setting_that_contains_itself_is_refused(text: str) -> None:
    says = "--model, line 1: an anchor stands for what contains its own alias"
    assert refusal(lambda: parse_value(text, "--model")) == says


def test_a_missing_file_is_suggested(write: Write) -> None:
    folder = write("ablation.yaml", "").parent
    assert refusal(lambda: compose([folder / "albation.yaml"])) == (
        f"{folder}/albation.yaml: no such file (did you mean {folder}/ablation.yaml?)"
    )
    assert refusal(lambda: compose([folder])) == f"{folder}: is a folder, not a file"
    assert refusal(lambda: compose([""])) == "--config: got '', must be a config file"
    (folder / "dir.yaml").mkdir()
    assert refusal(lambda: compose([folder / "dir.yaml"])) == f"{folder}/dir.yaml: is a folder, not a file"
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
        ("model.backbone.blocks.ntb", ".", "'.' is no import path; write package.module.Class"),
        ("model.backbone.blocks.ntb", ".blocks.NTB", "'.blocks.NTB' is no import path"),
        ("model.backbone.blocks.ntb", "blocks..NTB", "'blocks..NTB' is no import path"),
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
        ("model.backbone", "Composed", "unknown Backbone 'Composed' (allowed: Columns, Isotropic, Pyramid"),
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
