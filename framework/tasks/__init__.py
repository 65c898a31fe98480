"""What a net is trained for."""

import framework.columns  # noqa: F401 (registers its backbone)
from framework.tasks.base import Task
from framework.tasks.classification import Classification

__all__ = ["Classification", "Task"]
