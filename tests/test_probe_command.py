"""`probe`: k-NN and a linear classifier on features, against scikit-learn's, and the command round them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn import functional as F

from blocks.base import BuildError, Features
from blocks.heads import AveragePoolHead, ClassTokenHead, DistilledHead, Head
from framework import frozen
from framework.cli import main
from framework.config import compose, dump, override
from framework.construct import Workbench, build_model, complete
from framework.errors import ConfigError
from framework.frozen import extract, knn, linear_classifiers, nearest, probe
from tests.conftest import CONFIGS

CPU = torch.device("cpu")
VIT = {
    "model.backbone.stem": {"class_path": "PatchStem", "init_args": {"patch": 4}},
    "model.backbone.blocks": {"enc": {"class_path": "Encoder", "init_args": {"mixer": {"heads": 4}}}},
    "model.backbone.pattern": "enc*2",
    "model.backbone.word_position": "NoPosition",
}
DISTILLED = {"model.backbone.stem.prefix": 2, "model.head": "DistilledHead"}
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tnt": ("tnt", {}),
    "vit": ("tnt", VIT),
    "distilled": ("tnt", {**VIT, **DISTILLED}),
    "next_vit": ("pyramid", {"data.size": 16}),
}
ROUGH = {"data.crop": 2, "trainer.accelerator": "cpu", "trainer.limit_train_batches": 1.0}


def document(net: str, **settings: Any) -> dict[str, Any]:
    config, own = NETS[net]
    return override(compose([CONFIGS / f"{config}.yaml"]), {**own, **ROUGH, **settings})


def drawn(count: int, width: int, classes: int, seed: int = 0, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Features round one centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    targets = torch.randint(classes, (count,), generator=generator)
    return centres[targets] + noise * torch.randn(count, width, generator=generator), targets


@pytest.mark.parametrize("pieces", [(1024, 16_384), (7, 13)])
def test_knn_is_that_of_scikit_learn(pieces: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "IMAGES", pieces[0])
    monkeypatch.setattr(frozen, "BANK", pieces[1])
    train, (images, _) = drawn(300, 12, 5, 0, 3.0), drawn(100, 12, 5, 1, 3.0)
    found = knn(train, images, [1, 5, 20, 300], 5, CPU)
    for k, classes in found.items():
        theirs = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ).fit(train[0].double().numpy(), train[1].numpy())
        assert classes.tolist() == theirs.predict(images.double().numpy()).tolist(), k
    plain = KNeighborsClassifier(20, metric="cosine").fit(train[0].numpy(), train[1].numpy()).predict(images.numpy())
    assert found[20].tolist() != plain.tolist(), "weights must matter here, or nothing is shown"


@pytest.mark.parametrize("bank", [16_384, 5, 1])
@pytest.mark.parametrize("k", [1, 6, 24])
def test_of_equally_near_images_the_first_are_taken(bank: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "BANK", bank)
    kinds = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-1.0, 0.0], [0.0, -1.0], [-0.0, 1.0], [0.6, 0.8]])
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-0.6, -0.8]])
    stored = kinds.repeat(4, 1)
    similarity, places = nearest(stored, images, k)
    for i, image in enumerate(images):
        order = sorted(range(len(stored)), key=lambda place, image=image: -float(stored[place] @ image))  # stable
        assert places[i].tolist() == order[:k]
        assert torch.equal(similarity[i], stored[order[:k]] @ image)


def test_of_classes_with_equal_votes_the_first_wins() -> None:
    train = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([2, 1])
    assert knn(train, torch.tensor([[1.0, 0.0]]), [1, 2], 3, CPU) == {1: torch.tensor([2]), 2: torch.tensor([1])}


@pytest.mark.parametrize("rows", [8192, 50])
def test_the_linear_classifier_is_that_of_scikit_learn(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen, "ROWS", rows)
    features, targets = drawn(200, 6, 4, noise=2.0)
    features = features * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0, 1.0]) + 3
    standard = ((features - features.mean(0)) / features.std(0, correction=0)).double().numpy()
    for strength, model in linear_classifiers((features, targets), 4, CPU):
        theirs = LogisticRegression(C=1 / (strength * 200), tol=1e-8, max_iter=5000).fit(standard, targets.numpy())
        want = torch.from_numpy(theirs.predict_proba(standard)).float()
        assert torch.allclose(model(features).softmax(1), want, atol=2e-3), strength
        if strength >= 1e-3:
            assert torch.allclose(model[1].weight, torch.from_numpy(theirs.coef_).float(), atol=2e-3)


def test_a_separable_set_is_classified_without_a_mistake() -> None:
    splits = {name: drawn(90, 8, 3, seed, 0.05) for seed, name in enumerate(("train", "val", "test"))}
    found = probe(splits, 3, [5], CPU)
    assert [(row.probe, row.test) for row in found.rows if row.test] == [
        ("k-NN", {"acc1": 1.0}),
        ("linear", {"acc1": 1.0, "acc5": 1.0}),
    ]
    assert (found.images, found.features, found.same) == ({"train": 90, "val": 90, "test": 90}, 8, False)


def test_settings_are_chosen_on_validation_images_and_of_equals_the_first() -> None:
    splits = {name: drawn(60, 4, 3, seed, 2.0) for seed, name in enumerate(("train", "val", "test"))}
    found = probe(splits, 3, [30, 1, 5, 5], CPU)
    assert [row.setting for row in found.rows] == [1, 5, 30, *frozen.STRENGTHS]
    for name in ("k-NN", "linear"):
        rows = [row for row in found.rows if row.probe == name]
        best = max(rows, key=lambda row: row.val["acc1"])
        assert [row for row in rows if row.test] == [best]
    again = probe(splits, 3, [30, 1, 5], CPU)
    assert again.rows == found.rows
    assert probe({**splits, "test": splits["val"]}, 3, [], CPU).same


def test_neighbours_are_as_many_as_there_are_images() -> None:
    splits = dict.fromkeys(("train", "val", "test"), drawn(15, 4, 3))
    assert [row.setting for row in probe(splits, 3, [], CPU).rows if row.probe == "k-NN"] == [10]
    for k in (16, 0):
        with pytest.raises(ConfigError, match=f"--k: got {k}, must be 1 to 15"):
            probe(splits, 3, [5, k], CPU)


def test_features_with_constant_channels_give_finite_classifiers() -> None:
    features, targets = drawn(60, 4, 3)
    features[:, 1] = 7.0
    models = [model(features).isfinite().all() for _, model in linear_classifiers((features, targets), 3, CPU)]
    assert all(models)


@pytest.mark.parametrize("head", [ClassTokenHead, AveragePoolHead, DistilledHead])
def test_what_a_head_pools_is_what_its_classifiers_read(head: type[Head]) -> None:
    from blocks.base import Shape

    torch.manual_seed(0)
    made = head(Shape(6, (2, 2), prefix=2), 5).eval()
    features = Features(torch.randn(3, 6, 2, 2), torch.randn(3, 2, 6))
    read: list[Tensor] = []
    for name, part in made.named_children():
        if name.startswith("fc"):
            part.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    made(features)
    assert torch.equal(made.pooled(features), torch.cat(read, dim=1))


@pytest.mark.parametrize("net", NETS)
def test_features_are_what_the_head_gets_of_images_as_they_are(net: str) -> None:
    torch.manual_seed(0)
    bench = Workbench(complete(document(net)))
    data, task = bench.make_data(), bench.make_model().eval()
    found, _ = extract(bench, data, task, bar=False)
    for split, (features, targets) in found.items():
        images, labels = data.read(split)
        stored = data.split("train")
        read: list[Tensor] = []
        parts = [part for name, part in task.head.named_children() if name.startswith("fc")]
        hooks = [part.register_forward_pre_hook(lambda module, args, read=read: read.append(args[0])) for part in parts]
        with torch.no_grad():
            task((images / 255 - stored.mean[:, None, None]) / stored.std[:, None, None])
        for hook in hooks:
            hook.remove()
        assert torch.equal(targets, labels)
        torch.testing.assert_close(features, torch.cat(read, dim=1), atol=1e-5, rtol=1e-4)
        assert features.requires_grad is False


class Silent(Head):
    """A head that does not tell what it reads."""

    reads = frozenset({"map"})

    def __init__(self, shape: Any, num_classes: int) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(shape.dim, num_classes)

    def forward(self, features: Features) -> Tensor:
        return self.fc(features.map.amax((2, 3)))


def test_what_cannot_be_probed_is_one_line() -> None:
    bench = Workbench(complete(document("vit", **{"model.head": f"{__name__}.Silent"})))
    with pytest.raises(BuildError, match="Silent does not tell what it reads; give it a method `pooled`"):
        extract(bench, bench.make_data(), bench.make_model(), bar=False)
    bench = Workbench(complete(document("vit")))
    task = bench.make_model()
    torch.nn.init.constant_(task.backbone.norm.weight, math.nan)
    with pytest.raises(ConfigError, match="not finite for images of the train split"):
        extract(bench, bench.make_data(), task, bar=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a small Next-ViT, of which four epochs on digits make something."""
    root = tmp_path_factory.mktemp("probe")
    (root / "net.yaml").write_text(dump(document("next_vit", **{"trainer.max_epochs": 4, "name": "net"})))
    assert main(["fit", "--config", str(root / "net.yaml"), "--runs", str(root / "runs")]) == 0
    return root / "runs/net/0"


def chosen(found: dict[str, Any]) -> dict[str, Any]:
    return {row["probe"]: row for row in found["rows"] if row["test"]}


def test_a_trained_net_has_better_features_than_a_fresh_one(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained / "checkpoints/last.ckpt"
    assert main(["probe", "--ckpt_path", str(checkpoint), "--json"]) == 0
    text = capsys.readouterr().out
    learned = json.loads(text)
    assert json.loads((checkpoint.parent / "probe.json").read_text()) == learned
    assert (learned["weights"], learned["features"]) == (str(checkpoint), 128)
    assert learned["images"] == {"train": 1197, "val": 300, "test": 300}
    assert set(learned["seconds"]) == {"features", "k-NN", "linear"}

    torch.manual_seed(0)
    state = build_model(document("next_vit")).state_dict()
    ours = {key: value.contiguous() for key, value in state.items() if key.startswith(("backbone.", "head."))}
    save_file(ours, tmp_path / "new.safetensors")
    config = ["--config", str(trained / "config.yaml")]
    assert main(["probe", *config, f"--weights={tmp_path / 'new.safetensors'}", "--json"]) == 0
    shown = capsys.readouterr()
    assert "tensors loaded" in shown.err
    fresh = json.loads(shown.out)
    for name in ("k-NN", "linear"):
        for split in ("val", "test"):
            assert chosen(learned)[name][split]["acc1"] > chosen(fresh)[name][split]["acc1"] + 0.01, (name, split)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.safetensors"]


def test_the_table_has_the_numbers_of_the_file(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["probe", "--config", str(trained / "config.yaml"), "--k", "3,7", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "probe.json").read_text())
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if "│" in line]
    assert [line[1] for line in lines[:2]] == ["k = 3", "k = 7"]
    assert len(lines) == len(found["rows"]) == 2 + len(frozen.STRENGTHS)
    for line, row in zip(lines, found["rows"], strict=True):
        assert line[0] == row["probe"]
        for place, split, name in ((2, "val", "acc1"), (3, "val", "acc5"), (4, "test", "acc1"), (5, "test", "acc5")):
            value = row[split].get(name)
            assert line[place] == ("" if value is None else f"{value:.4g}")
    assert "1,197 train, 300 val, 300 test; 128 features" in out
    assert str(tmp_path / "probe.json") in out.replace("\n", "")


def test_weights_of_other_classes_and_another_size_are_probed(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What transfer is about: the features of one set, measured on another."""
    draw = np.random.default_rng(0)
    labels = {f"{split}_labels": np.arange(60) % 3 for split in ("train", "val", "test")}
    arrays = {
        f"{split}_images": draw.integers(0, 256, (60, 20, 20), dtype=np.uint8) for split in ("train", "val", "test")
    }
    np.savez(tmp_path / "set.npz", **arrays, **labels)
    data = json.dumps({"class_path": "Npz", "init_args": {"path": str(tmp_path / "set.npz")}})
    command = ["probe", "--config", str(trained / "config.yaml"), f"--data={data}", "--json"]
    assert main([*command, f"--weights={trained / 'checkpoints/last.ckpt'}"]) == 0
    shown = capsys.readouterr()
    assert "for other classes: head.fc.weight, head.fc.bias" in shown.err
    found = json.loads(shown.out)
    assert found["images"] == {"train": 60, "val": 60, "test": 60}
    assert [row["setting"] for row in found["rows"]][:2] == [10, 20]
    assert 0 <= chosen(found)["linear"]["test"]["acc1"] <= 1
    assert main([*command, "--ckpt_path", str(trained / "checkpoints/last.ckpt")]) == 2
    assert "holds another net than the config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--k", "10,x"], "--k: got '10,x', must be whole numbers with commas between"),
        (["--k", "2000"], "--k: got 2000, must be 1 to 1197"),
        (["--k=-5"], "--k: got -5, must be 1 to 1197"),
        (["--out", "/no/folder"], "--out: no such folder: /no/folder"),
        (["--ckpt_path", "{}/checkpoints/lst.ckpt"], "--ckpt_path: no such file"),
        (["--ckpt_path", "{}/checkpoints/last.ckpt", "--weights=x.pth"], "--weights: --ckpt_path names weights too"),
        (["--weights=x.pth"], "no such weights file"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], text: str, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [word.replace("{}", str(trained)) for word in words]
    assert main(["probe", "--config", str(trained / "config.yaml"), *given]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_a_fresh_net_is_not_probed_by_accident(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.yaml").write_text(dump(document("vit")))
    assert main(["probe", "--config", str(tmp_path / "net.yaml")]) == 2
    assert "name the weights" in capsys.readouterr().err


def test_vectors_of_no_length_are_near_to_nothing() -> None:
    train = torch.zeros(4, 3), torch.tensor([0, 1, 1, 1])
    assert F.normalize(train[0]).isfinite().all()
    assert knn(train, torch.ones(1, 3), [1, 4], 2, CPU) == {1: torch.tensor([0]), 4: torch.tensor([1])}
