"""Loss terms as classes: a task adds them up, each logged by its name."""

from framework.objectives.base import Objective, Step
from framework.objectives.cross_entropy import CrossEntropy

__all__ = ["CrossEntropy", "Objective", "Step"]
