"""Ways to fine-tune, one file each. The registry finds them; shared code never asks which one it has."""

from leantune.methods._plan import TrainingPlan
from leantune.methods._registry import Method, get, names, of_config, register

# Last, and before any method file: PEFT's import registers our methods, which must not find one of them half imported.
import peft  # noqa: F401  isort:skip

__all__ = ["Method", "TrainingPlan", "get", "names", "of_config", "register"]
