"""Which runs of a study are hopeless, by Ray's rule: asynchronous successive halving (ASHA)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.ablation.state import Status, read_study
from framework.ablation.tables import Metric
from framework.errors import ConfigError


@dataclass(frozen=True)
class Trial:
    """All that the rule needs to know of a trial of Ray Tune, and none of the rest."""

    trial_id: str


class Asha:
    """Ray's scheduler, which is told the epochs of the runs and says which run is to be stopped.

    At epoch `grace` and at each `factor` times as many, a run is compared with those that were there before: it stops
    if it is not among the best 1/`factor` of them. Runs of different lengths are not compared. A diverged one (nan,
    or of a loss that is) is not stopped.

    Args:
        metric: what is compared.
        grace: epochs before a run may be stopped.
        factor: one of so many goes on.

    Raises:
        ConfigError: a part of Ray is missing.
    """

    def __init__(self, metric: Metric, grace: int, factor: int) -> None:
        self.metric, self.grace, self.factor = metric, grace, factor
        self.scheduler = scheduler()
        self.rules: dict[int, Any] = {}  # by the epochs of a run
        self.seen: dict[tuple[int, Path], int] = {}  # the last epoch that a rule was told of

    def hopeless(self, folder: Path, status: Status) -> bool:
        """Whether the run is to be stopped; to be asked again whenever its status may have changed."""
        epochs, key = status.epochs, (status.epochs, folder)
        # The last epoch is over before a stop could save anything.
        if status.state != "running" or not self.seen.get(key, 0) < status.epoch < epochs or epochs <= self.grace:
            return False
        if self.metric.name not in status.metrics:
            return False
        trial = Trial(str(folder))
        rule = self.rules.get(epochs)
        if rule is None:
            rule = self.rules[epochs] = self.scheduler(
                time_attr="epoch",
                metric=self.metric.name,
                mode="min" if self.metric.lower else "max",
                max_t=epochs,
                grace_period=self.grace,
                reduction_factor=self.factor,
                stop_last_trials=False,  # else a late look at a run would count for an earlier epoch
            )
        if key not in self.seen:
            rule.on_trial_add(None, trial)
        self.seen[key] = status.epoch
        result = {**status.values, "epoch": status.epoch}
        return bool(rule.on_trial_result(None, trial, result) == rule.STOP)


def of_study(folder: Path, grace: int, factor: int) -> Asha:
    """The rule for the study that has this run folder.

    Raises:
        ConfigError: there is no study, or a part of Ray is missing.
    """
    names = read_study(folder.parent.parent)["metric"]
    return Asha(Metric(names if isinstance(names, str) else names[0]), grace, factor)


def scheduler() -> Any:
    """Ray's class.

    Raises:
        ConfigError: a part of Ray is missing.
    """
    try:
        from ray.tune.schedulers import AsyncHyperBandScheduler
    except ImportError:
        raise ConfigError("launcher.asha needs ray[tune], which has pandas and pyarrow: uv sync --extra ray") from None
    return AsyncHyperBandScheduler
