"""Ways to fine-tune, one file each. The registry finds them; shared code never asks which one it has."""

from leantune.methods._plan import TrainingPlan
from leantune.methods._registry import Method, get, names, of_config, register

__all__ = ["Method", "TrainingPlan", "get", "names", "of_config", "register"]
