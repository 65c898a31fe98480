"""Where the runs of a study run: one launcher a file. Imports no engine."""

from framework.ablation.launch.base import Launcher
from framework.ablation.launch.local import Local
from framework.ablation.launch.ray import Ray
from framework.ablation.launch.slurm import Slurm

__all__ = ["Launcher", "Local", "Ray", "Slurm"]
