"""Loss terms as classes: a task adds them up, each logged by its name."""

from framework.objectives.base import Objective, Step
from framework.objectives.cross_entropy import CrossEntropy
from framework.objectives.distillation import Distillation, HardDistillation, SoftDistillation
from framework.objectives.supervision import IntermediateCrossEntropy, Reconstruction
from framework.objectives.teachers import CheckpointTeacher, Teacher, TimmTeacher

__all__ = [
    "CheckpointTeacher",
    "CrossEntropy",
    "Distillation",
    "HardDistillation",
    "IntermediateCrossEntropy",
    "Objective",
    "Reconstruction",
    "SoftDistillation",
    "Step",
    "Teacher",
    "TimmTeacher",
]
