"""What the features of a frozen backbone are worth: taken once, then read by k-NN and by a linear classifier.

Settings (k, the strength of the penalty) are chosen on validation images; only what is chosen meets the test images.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from framework.construct import Workbench
from framework.data import ImageData
from framework.data.base import Batch
from framework.errors import ConfigError
from framework.tasks import Classification

KS = (10, 20, 100, 200)
TEMPERATURE = 0.07
STRENGTHS = tuple(10.0**-power for power in range(7))  # of the penalty, the strongest first
STEPS = 200  # of L-BFGS, for each strength

# A piece of the bank against a piece of the images: half a gigabyte at work, however large the sets are.
IMAGES, BANK = 1024, 16_384
ROWS = 8192  # of the linear classifier at once

_SIGN, _LAST = 0x7FFFFFFF, 0xFFFFFFFF


@dataclass(frozen=True)
class Row:
    """One setting of a probe: accuracies (fractions) on validation images, and where it is chosen on test images."""

    probe: str
    setting: float
    val: dict[str, float]
    test: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Findings:
    """What a probe found.

    Args:
        images: number of images in each split.
        features: width of the features.
        rows: every setting that was tried.
        seconds: how long each part took.
        same: whether the test images are the validation images, so that settings were chosen on them.
    """

    images: dict[str, int]
    features: int
    rows: list[Row]
    seconds: dict[str, float]
    same: bool


class Extractor(LightningModule):
    """Gives the features that a task's head reads, and the targets, on the CPU in float32."""

    def __init__(self, task: Classification) -> None:
        super().__init__()
        self.task = task

    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        return self.task.pooled(batch[0]).float().cpu(), batch[1].cpu()


def extract(
    bench: Workbench, data: ImageData, task: Classification, bar: bool
) -> tuple[dict[str, Batch], torch.device]:
    """Features `(N, n)` and targets `(N,)` of each split, without augmentation, and the device to go on with.

    Args:
        bench: gives the trainer, of which one device is used.
        data: the images.
        task: what gives the features.
        bar: whether to show progress.

    Raises:
        BuildError: the head does not tell what it reads.
        ConfigError: the features are not finite.
    """
    trainer = bench.make_trainer(logger=False, enable_model_summary=False, enable_checkpointing=False,
                                 enable_progress_bar=bar, devices=1, num_nodes=1, strategy="auto")  # fmt: skip
    found: dict[str, Batch] = {}
    for split in ("train", "val", "test"):
        batches = cast(list[Any], trainer.predict(Extractor(task), dataloaders=data.plain_dataloader(split)))
        features, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        if not features.isfinite().all():
            raise ConfigError(f"the net gives features that are not finite for images of the {split} split")
        found[split] = features, targets
    device = trainer.strategy.root_device
    return found, device if device.type == "cuda" else torch.device("cpu")


def nearest(bank: Tensor, images: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosine similarity `(N, k)` and place in the bank of the k nearest, the nearest first; of equals, the first.

    Both are `(N, n)` of length one. The bank may lie in another memory; its pieces go over one by one.
    """
    best = torch.empty(len(images), 0, dtype=torch.int64, device=images.device)
    for start in range(0, len(bank), BANK):
        part = bank[start : start + BANK].to(images.device)
        # topk takes any of equals. A float32's bits in the order of its value, above the place counted backwards, make
        # one whole number in which no two are equal.
        bits = (images @ part.T + 0.0).view(torch.int32)  # + 0: of zeros there are two
        keys = (bits ^ ((bits >> 31) & _SIGN)).long() << 32
        keys |= _LAST - torch.arange(start, start + len(part), device=images.device)
        best = torch.cat([best, keys], dim=1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
    ordered = (best >> 32).int()
    return (ordered ^ ((ordered >> 31) & _SIGN)).view(torch.float32), _LAST - (best & _LAST)


def knn(train: Batch, images: Tensor, ks: Sequence[int], classes: int, device: torch.device) -> dict[int, Tensor]:
    """The classes `(N,)` that the k nearest training images vote for, for each k.

    A vote weighs exp(cosine similarity / .07); of classes with equal votes the first wins.

    Source: Wu et al. 2018, arXiv 1805.01978, as DINO, arXiv 2104.14294, measures: facebookresearch/dino eval_knn.py.
    """
    bank, labels = F.normalize(train[0]), train[1].to(device)
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    for part in images.split(IMAGES):
        similarity, places = nearest(bank, F.normalize(part.to(device)), max(ks))
        weights, voters = (similarity / TEMPERATURE).exp(), labels[places]
        votes = torch.zeros(len(part), classes, device=device)
        for place in range(max(ks)):  # one vote of each image at a time: the order of a sum is its result
            votes.scatter_add_(1, voters[:, place : place + 1], weights[:, place : place + 1])
            if place + 1 in found:
                found[place + 1].append(votes.argmax(1).cpu())
    return {k: torch.cat(parts) for k, parts in found.items()}


def linear_classifiers(train: Batch, classes: int, device: torch.device) -> Iterator[tuple[float, nn.Module]]:
    """Logistic regression for each strength: the mean cross-entropy plus strength / 2 · |weights|², by L-BFGS.

    Features are standardised by the training images', as MAE's batch norm without parameters does (arXiv 2111.06377,
    appendix A.1; facebookresearch/mae main_linprobe.py). The objective is convex, so it has no learning rate to sweep.
    Each starts from the one before it; the same module is given again and again.
    """
    features, targets = train[0].to(device), train[1].to(device)
    norm = nn.BatchNorm1d(features.shape[1], eps=1e-6, affine=False)
    variance, mean = torch.var_mean(features, dim=0, correction=0)
    norm.load_state_dict({"running_mean": mean, "running_var": variance, "num_batches_tracked": torch.tensor(0)})
    layer = nn.Linear(features.shape[1], classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    model = nn.Sequential(norm, layer).to(device).eval()
    for strength in STRENGTHS:
        optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=STEPS, tolerance_grad=1e-6, tolerance_change=1e-9,
                                      history_size=10, line_search_fn="strong_wolfe")  # fmt: skip

        def loss(optimizer: torch.optim.Optimizer = optimizer, strength: float = strength) -> float:
            optimizer.zero_grad()
            penalty = strength / 2 * layer.weight.square().sum()
            penalty.backward()
            total = penalty.detach().double()
            for x, y in zip(features.split(ROWS), targets.split(ROWS), strict=True):
                part = F.cross_entropy(model(x), y, reduction="sum") / len(features)
                part.backward()
                total += part.detach()
            return float(total)

        optimizer.step(loss)
        yield strength, model


def neighbours(ks: Sequence[int], count: int) -> list[int]:
    """The numbers of neighbours in order; of none given, the usual ones as far as there are `count` training images.

    Raises:
        ConfigError: there are not so many.
    """
    ks = sorted(set(ks)) or [k for k in KS if k <= count] or [count]
    if not 1 <= ks[0] <= ks[-1] <= count:
        wrong = ks[0] if ks[0] < 1 else ks[-1]
        raise ConfigError(f"--k: got {wrong}, must be 1 to {count}, the number of training images")
    return ks


def probe(splits: Mapping[str, Batch], classes: int, ks: Sequence[int], device: torch.device) -> Findings:
    """Both probes of the features and targets of the splits train, val and test.

    Args:
        splits: features `(N, n)` and targets `(N,)` of each.
        classes: number of classes.
        ks: numbers of neighbours, as `neighbours` takes them.
        device: where to compute.

    Raises:
        ConfigError: there are not so many neighbours.
    """
    train, val, test = (splits[name] for name in ("train", "val", "test"))
    ks = neighbours(ks, len(train[0]))

    def accuracy(found: Tensor, targets: Tensor, top: int) -> float:
        return float(multiclass_accuracy(found.cpu(), targets, classes, average="micro", top_k=top))

    start = time.perf_counter()
    values = {k: accuracy(found, val[1], 1) for k, found in knn(train, val[0], ks, classes, device).items()}
    best_k = max(ks, key=values.__getitem__)
    chosen = {"acc1": accuracy(knn(train, test[0], [best_k], classes, device)[best_k], test[1], 1)}
    rows = [Row("k-NN", k, {"acc1": values[k]}, chosen if k == best_k else {}) for k in ks]
    between = time.perf_counter()

    @torch.no_grad()
    def measured(model: nn.Module, batch: Batch) -> dict[str, float]:
        logits = torch.cat([model(part.to(device)).cpu() for part in batch[0].split(ROWS)])
        return {"acc1": accuracy(logits, batch[1], 1), "acc5": accuracy(logits, batch[1], min(5, classes))}

    best, best_model, tried = (-1.0, 0.0), None, {}
    for strength, model in linear_classifiers(train, classes, device):
        tried[strength] = measured(model, val)
        if tried[strength]["acc1"] > best[0]:  # of equals the strongest
            best, best_model = (tried[strength]["acc1"], strength), deepcopy(model)
    assert best_model is not None
    chosen = measured(best_model, test)
    rows += [Row("linear", strength, found, chosen if strength == best[1] else {}) for strength, found in tried.items()]
    seconds = {"k-NN": round(between - start, 2), "linear": round(time.perf_counter() - between, 2)}
    same = torch.equal(val[1], test[1]) and torch.equal(val[0], test[0])
    return Findings({name: len(batch[1]) for name, batch in splits.items()}, train[0].shape[1], rows, seconds, same)
