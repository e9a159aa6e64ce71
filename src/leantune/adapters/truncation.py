"""A boosted adapter cut back to its first rounds, for the commands that open one."""

from __future__ import annotations

from typing import Any

from leantune.core.errors import AdapterError, describe
from leantune.methods import of_config


def keep_rounds(model: Any, rounds: int | None, *, drop: bool = False) -> None:
    """Let only the first rounds of the active adapter count, exactly; more of them than training kept as best, too.

    Args:
        model: a ``PeftModel``.
        rounds: how many; None leaves it as it is.
        drop: forget the others, so that a saved file is smaller.

    Raises:
        AdapterError: the adapter has no rounds, or not as many.
    """
    if rounds is None:
        return
    tuner, where = getattr(model, "base_model", model), f"{rounds} rounds"
    if not hasattr(tuner, "set_iteration_range"):
        configs = getattr(model, "peft_config", {})
        got = f"a run of {of_config(configs[model.active_adapter]).name}" if configs else "a model without an adapter"
        raise AdapterError(describe(where, got, "an adapter that is trained in rounds (xgblora)", "leave --rounds out"))
    known = tuner.num_boosted_rounds()
    if not 1 <= rounds <= known:
        raise AdapterError(describe(where, f"the adapter has {known}", f"1 to {known}", "choose one of these"))
    tuner.set_iteration_range((0, rounds), drop=drop)
