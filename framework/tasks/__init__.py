"""What a net is trained for."""

from framework.tasks.base import Task
from framework.tasks.classification import Classification

__all__ = ["Classification", "Task"]
