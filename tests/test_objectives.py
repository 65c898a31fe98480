"""Loss terms against the authors' code, and what a frozen teacher must not be part of."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from blocks.base import BuildError, Features, Shape
from blocks.heads import DistilledHead
from framework.construct import build_model
from framework.data.base import Image
from framework.errors import ConfigError
from framework.mix import MixupCutmix
from framework.objectives import CrossEntropy, HardDistillation, Objective, SoftDistillation, Step, Teacher
from framework.objectives.teachers import Frozen
from framework.optim import parameter_groups
from framework.run import LAST, train
from framework.tasks import Classification
from tests.conftest import REPO

GOLDEN = Path(__file__).parent / "golden"
EMA = {"class_path": "lightning.pytorch.callbacks.EMAWeightAveraging", "init_args": {"decay": 0.9}}
CLOSE = {"rtol": 1e-5, "atol": 1e-7}


class Says(nn.Module):
    """A net that gives fixed logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


@dataclass(frozen=True)
class Fixed(Teacher):
    logits: Any

    def build(self, image: Image, num_classes: int) -> nn.Module:
        return Says(self.logits)


@dataclass
class Student:
    """What `start` reads of a task."""

    image: Any = None
    num_classes: int = 10


def step_of(by_class: Tensor, by_distillation: Tensor, targets: Tensor) -> Step:
    nothing = torch.zeros(len(targets), 3, 8, 8)
    mean = (by_class + by_distillation) / 2
    return Step(nothing, targets, Features(nothing), mean, by_class, by_distillation)


def total(terms: list[Objective], step: Step) -> Tensor:
    for term in terms:
        term.start(Student())  # type: ignore[arg-type]
    return torch.stack([term.weight * term(step) for term in terms]).sum()


SCALARS = {
    "none_a0.5_t1.0": 2.655766487121582,
    "hard_a0.5_t1.0": 2.8646421432495117,
    "soft_a0.5_t1.0": 1.4264030456542969,
    "soft_a0.1_t3.0": 2.4283595085144043,
}


def terms_of(kind: str, alpha: float, tau: float, logits: Tensor) -> list[Objective]:
    """DeiT's total as the weights of two terms."""
    teacher = Fixed(logits)
    match kind:
        case "none":
            return [CrossEntropy()]
        case "hard":
            return [CrossEntropy(weight=1 - alpha), HardDistillation(teacher, weight=alpha)]
    return [CrossEntropy(weight=1 - alpha), SoftDistillation(teacher, tau, weight=alpha)]


@pytest.mark.parametrize("name", SCALARS)
def test_distillation_has_the_loss_and_gradients_of_deit(name: str) -> None:
    golden = load_file(GOLDEN / "deit_distillation.safetensors")
    kind, alpha, tau = name.split("_")
    leaves = [golden[key].clone().requires_grad_() for key in ("cls_logits", "dist_logits")]
    terms = terms_of(kind, float(alpha[1:]), float(tau[1:]), golden["teacher_logits"])
    loss = total(terms, step_of(*leaves, golden["soft_targets"]))
    torch.testing.assert_close(loss, torch.tensor(SCALARS[name]), **CLOSE)
    loss.backward()
    for leaf, side in zip(leaves, ("cls", "dist"), strict=True):
        want = golden.get(f"grad_{side}_{name}")
        if want is None:
            assert leaf.grad is None, "without distillation the second token learns nothing"
        else:
            torch.testing.assert_close(leaf.grad, want, **CLOSE)


@pytest.mark.parametrize(
    "name", ["none_alpha0.0_tau1.0", "hard_alpha0.5_tau1.0", "soft_alpha0.5_tau1.0", "soft_alpha0.1_tau3.0"]
)
def test_distillation_has_the_loss_of_deit_in_float64(name: str) -> None:
    golden = {key[2:]: value for key, value in load_file(GOLDEN / "deit_distillation_losses.safetensors").items()}
    kind, alpha, tau = name.split("_")
    terms = terms_of(kind, float(alpha[5:]), float(tau[3:]), golden["teacher"])
    loss = total(terms, step_of(golden["outputs"], golden["outputs_kd"], golden["target_soft"]))
    torch.testing.assert_close(loss, golden[f"loss_{name}"][0], rtol=1e-12, atol=0)


def test_batchmean_is_the_formula_of_timm() -> None:
    golden = load_file(GOLDEN / "deit_distillation.safetensors")
    step = step_of(golden["cls_logits"], golden["dist_logits"], golden["soft_targets"])
    term = SoftDistillation(Fixed(golden["teacher_logits"]), 3.0, "batchmean", weight=1.0)
    torch.testing.assert_close(total([term], step), torch.tensor(3.8169682025909424), **CLOSE)
    on_class = SoftDistillation(Fixed(golden["teacher_logits"]), 3.0, token="class", weight=1.0)
    swapped = step_of(golden["dist_logits"], golden["cls_logits"], golden["soft_targets"])
    torch.testing.assert_close(total([on_class], swapped), torch.tensor(3.8169682025909424 / 10), **CLOSE)


def test_soft_distillation_works_in_float32() -> None:
    half = [torch.randn(4, 10).to(torch.bfloat16) for _ in range(2)]
    term = SoftDistillation(Fixed(half[1]), 3.0)
    found = total([term], step_of(half[0], half[0], torch.zeros(4).long()))
    assert found.dtype == torch.float32
    wide = SoftDistillation(Fixed(half[1].float()), 3.0)
    assert torch.equal(found, total([wide], step_of(half[0].float(), half[0].float(), torch.zeros(4).long())))


def test_mixed_targets_and_their_loss_are_those_of_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load_file(GOLDEN / "timm_mixup_target.safetensors")
    monkeypatch.setattr(np.random, "beta", lambda a, b: 0.7)
    images = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 1, 8, 8)
    mixed, targets = MixupCutmix(cutmix_alpha=0.0)(images, golden["labels"], 10, step=0)
    torch.testing.assert_close(targets, golden["target"], **CLOSE)
    torch.testing.assert_close(mixed, 0.7 * images + 0.3 * images.flip(0))
    one, two = (torch.randn(4, 10, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2))
    ours, theirs = CrossEntropy()(step_of(one, one, targets)), SoftTargetCrossEntropy()(two, targets)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    ours.backward()
    theirs.backward()
    torch.testing.assert_close(one.grad, two.grad, **CLOSE)


def test_a_distilled_head_evaluates_the_mean_in_both_modes() -> None:
    head = DistilledHead(Shape(6, (2, 2), prefix=2), 5)
    features = Features(torch.zeros(3, 6, 2, 2), torch.randn(3, 2, 6))
    by_class, by_distillation = head.each(features)
    assert torch.equal(head(features), (by_class + by_distillation) / 2)
    assert torch.equal(head.eval()(features), (by_class + by_distillation) / 2)


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 8, 8, device="meta"), torch.zeros(2, 3, 8, 8).double()])
def test_a_teacher_follows_the_images(images: Tensor) -> None:
    net = Frozen(nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten()))
    found = net(images)
    assert (found.device, found.dtype, found.requires_grad) == (images.device, images.dtype, False)


# Whole tasks

STUDENT = {
    "model.backbone.stem.prefix": 2,
    "model.head": "DistilledHead",
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": 1,
    "trainer.limit_train_batches": 2,
    "trainer.limit_val_batches": 1,
}
NET = "resnet10t"  # it has BatchNorm, whose statistics would drift


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The config of a teacher of timm's on digits, with its weights in a file."""
    net = timm.create_model(NET, in_chans=1, num_classes=10)
    path = tmp_path_factory.mktemp("teacher") / "net.safetensors"
    save_file(net.state_dict(), path)
    return {"class_path": "TimmTeacher", "init_args": {"name": NET, "weights": str(path)}}


def objectives(teacher: dict[str, Any], kind: str = "HardDistillation", **args: Any) -> dict[str, Any]:
    return {
        "labels": {"class_path": "CrossEntropy", "init_args": {"weight": 0.5}},
        "teacher": {"class_path": kind, "init_args": {"teacher": teacher, **args}},
    }


class Keep(Callback):
    """Keeps the task, and the images that net and teacher see."""

    def __init__(self) -> None:
        self.task: Any = None
        self.images: dict[str, list[Tensor]] = {"net": [], "teacher": []}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.task = pl_module
        self.before = deepcopy(self.net.state_dict())
        for name, net in (("net", pl_module.backbone), ("teacher", self.net)):
            net.register_forward_pre_hook(lambda net, args, name=name: self.images[name].append(args[0].clone()))
        assert pl_module.training
        assert not self.net.training

    @property
    def net(self) -> nn.Module:
        return self.task.objectives["teacher"].net.net


def run(document: dict[str, Any], folder: Path) -> tuple[Keep, Any]:
    from framework import run as runs

    keep, made = Keep(), runs.Workbench.make_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            runs.Workbench,
            "make_trainer",
            lambda self, **kw: made(self, **{**kw, "callbacks": [*kw.get("callbacks", []), keep]}),
        )
        return keep, fit(document, folder)


def fit(document: dict[str, Any], folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    return train(folder, document, bar=False)


def test_a_teacher_is_no_part_of_what_is_trained_and_saved(
    tiny: Callable[..., dict[str, Any]], teacher: dict[str, Any], tmp_path: Path
) -> None:
    chosen = {
        **STUDENT,
        "model.mix": "MixupCutmix",
        "model.objectives": objectives(teacher),
        "trainer.callbacks": [EMA],
    }
    document = tiny(**chosen)
    keep, trainer = run(document, tmp_path)
    task = keep.task
    theirs = {id(p) for p in keep.net.parameters()}
    assert theirs
    assert not theirs & {id(p) for p in task.parameters()}, "neither DDP nor the optimizer may see it"
    assert not theirs & {id(p) for group in parameter_groups(task, 0.05) for p in group["params"]}
    assert not any(parameter.requires_grad for parameter in keep.net.parameters())
    assert not any(key.startswith("objectives") for key in task.state_dict())
    saved = torch.load(tmp_path / LAST, weights_only=True)
    assert set(saved["state_dict"]) == set(task.state_dict()) == set(saved["current_model_state"])
    assert not any("resnet" in key or key.startswith("objectives") for key in saved["state_dict"])
    # Its BatchNorms have not moved, though the task was in training mode.
    task.train()
    assert not keep.net.training
    for key, value in keep.net.state_dict().items():
        assert torch.equal(value, keep.before[key]), key
    # A copy, as a moving average is one, shares it.
    assert deepcopy(task).objectives["teacher"].net is task.objectives["teacher"].net
    # The very images of the student: augmented and mixed.
    assert len(keep.images["teacher"]) == 2
    assert all(map(torch.equal, keep.images["net"], keep.images["teacher"]))
    logged = trainer.callback_metrics
    assert logged["train/loss"] == pytest.approx(float(0.5 * logged["train/labels"] + 0.5 * logged["train/teacher"]))
    assert (logged["weight/labels"], logged["weight/teacher"]) == (0.5, 0.5)
    # What evaluates does not need the teacher's file.
    Path(teacher["init_args"]["weights"]).rename(tmp_path / "away")
    try:
        loaded = Classification.load_from_checkpoint(tmp_path / LAST)
        assert loaded.objectives["teacher"].net is None
    finally:
        (tmp_path / "away").rename(teacher["init_args"]["weights"])


def test_a_teacher_shifts_no_draw_of_the_student(
    tiny: Callable[..., dict[str, Any]], teacher: dict[str, Any], tmp_path: Path
) -> None:
    """A term of weight 0 leaves the run as it is without it."""
    settings = {**STUDENT, "model.backbone.drop_path": 0.2, "model.head": "ClassTokenHead"}
    zero = objectives(teacher, token="class", weight=0.0)
    for name, more in (("with", zero), ("without", {"labels": zero["labels"]})):
        fit(tiny(**settings, **{"model.objectives": more}), tmp_path / name)
    one, two = (torch.load(tmp_path / name / LAST, weights_only=True)["state_dict"] for name in ("with", "without"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_class_logits_are_the_mean_unless_the_other_token_is_taught(
    tiny: Callable[..., dict[str, Any]], teacher: dict[str, Any]
) -> None:
    images, targets = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    for terms, apart in (
        ({}, False),
        (objectives(teacher, token="class"), False),
        (objectives(teacher, "SoftDistillation"), True),
    ):
        task = build_model(tiny(**STUDENT, **{"model.objectives": terms}))
        step = task._step(images, targets)
        by_class, by_distillation = task.head.each(step.features)
        torch.testing.assert_close(step.logits, (by_class + by_distillation) / 2)
        assert torch.equal(step.class_logits, by_class if apart else step.logits)
        assert torch.equal(step.distillation_logits, by_distillation)


def test_a_run_teaches_another(tiny: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    short = {key: value for key, value in STUDENT.items() if key.startswith("trainer")}
    fit(tiny(**short), tmp_path / "teacher")
    given = {"class_path": "CheckpointTeacher", "init_args": {"path": str(tmp_path / "teacher" / LAST)}}
    document = tiny(**{**STUDENT, "model.objectives": objectives(given, "SoftDistillation", tau=3)})
    keep, _ = run(document, tmp_path / "student")
    saved = torch.load(tmp_path / "teacher" / LAST, weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[key]) for key, value in keep.net.state_dict().items())
    with pytest.raises(ConfigError, match=r"was trained on .* 10 classes, the student gets .*size=8"):
        fit({**document, "data": {"class_path": "Digits", "init_args": {"size": 8}}}, tmp_path / "other")


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"teacher": {"name": "resnet10"}}, "timm has no net 'resnet10'"),
        ({"teacher": {"weights": "/no/file.pth"}}, "cannot take its weights: no such weights file: /no/file.pth"),
        ({"teacher": {"name": "resnet18"}}, "the teacher resnet18 cannot take its weights: Error"),
        ({"teacher": {"class_path": "CheckpointTeacher", "init_args": {"path": "/no.ckpt"}}}, "no such checkpoint"),
        ({"teacher": {"class_path": "CheckpointTeacher", "init_args": {"path": "README.md"}}}, "gives no teacher"),
        ({"class_path": "SoftDistillation", "init_args": {"tau": 0.0}}, "tau must be more than 0, got 0.0"),
    ],
)
def test_mistakes_are_told_before_the_first_step(
    tiny: Callable[..., dict[str, Any]],
    teacher: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    term: dict[str, Any],
    message: str,
) -> None:
    from framework.config import override

    monkeypatch.chdir(REPO)
    document = tiny(**STUDENT, **{"model.objectives": objectives(teacher)})
    if "class_path" in term:
        term = {**term, "init_args": {"teacher": teacher, **term["init_args"]}}
    with pytest.raises((ConfigError, BuildError), match=message) as caught:
        fit(override(document, {"model.objectives.teacher": term}), tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["CrossEntropy", "IntermediateCrossEntropy"])
@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"label_smoothing": 5.0}, "label_smoothing: got 5.0, must be 0 to 1"),
        ({"label_smoothing": -0.1}, "label_smoothing: got -0.1, must be 0 to 1"),
        ({"weight": -1.0}, "weight: got -1.0, must be at least 0"),
    ],
)
def test_values_out_of_range_are_told_when_the_net_is_built(
    tiny: Callable[..., dict[str, Any]], kind: str, args: dict[str, float], says: str
) -> None:
    with pytest.raises((ConfigError, BuildError)) as caught:
        build_model(tiny(**{"model.objectives": {"own": {"class_path": kind, "init_args": args}}}))
    assert str(caught.value) == f"model.objectives.own.{says}"


def test_the_distillation_token_needs_a_head_for_it(
    tiny: Callable[..., dict[str, Any]], teacher: dict[str, Any]
) -> None:
    with pytest.raises(BuildError, match="teaches the distillation token, but ClassTokenHead reads none"):
        build_model(tiny(**{"model.objectives": objectives(teacher)}))
