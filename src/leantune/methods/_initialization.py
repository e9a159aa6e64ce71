"""Starts that come from data: what waits for one, what it may not do before, and :func:`initialize`.

The protocol has two ends. A layer says whether an adapter of its own still waits
(:meth:`StartingLayer.waits_for_data`); a model computes the start of its waiting adapters from a
:class:`~leantune.methods._calibration.Calibration` (:meth:`StartingModel.start_from_data`). Refusing to train, save or
merge before that is written here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from leantune.core.errors import MethodError, describe
from leantune.methods._calibration import GRADIENT_BYTES, Calibration
from leantune.methods._first_step import DEFAULT_OPTIMIZER, Step
from leantune.methods._registry import of_config

_expects_file: ContextVar[bool] = ContextVar("expects_file", default=False)


class StartingLayer:
    """The layer's end of the protocol."""

    def waits_for_data(self, adapter: str) -> bool:
        """Whether the adapter's start must still be computed from batches, or read from a file."""
        del adapter
        return False

    def require_start(self, adapters: Iterable[str]) -> None:
        """Raise MethodError when one of the adapters still waits."""
        for name in adapters:
            if self.waits_for_data(name):
                raise waits(name)


class StartingModel(BaseTuner):
    """The model's end of the protocol."""

    def start_from_data(self, adapters: list[str], data: Calibration) -> None:
        """Compute the start of waiting adapters that share one config object; a method that needs data overrides it.

        Args:
            adapters: their names.
            data: runs the model over the batches, as the base alone.
        """
        del data
        raise MethodError(
            describe(f"adapter '{adapters[0]}'", "takes nothing from data", "a method that does", "train it as it is")
        )

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        adapter = kwargs["adapter_name"] if "adapter_name" in kwargs else args[1]
        for module in model.modules() if not _expects_file.get() else ():
            if isinstance(module, StartingLayer):
                module.require_start([adapter])
        state: dict[str, Tensor] = super()._get_adapter_state_dict(model, *args, **kwargs)
        return state


def waiting(tuner: BaseTuner) -> list[list[str]]:
    """The adapters that wait for their start, those with one config object together."""
    layers = [module for module in tuner.modules() if isinstance(module, StartingLayer)]
    groups: dict[int, list[str]] = {}
    # In the order they were added, which is the same in every process.
    for name, config in tuner.peft_config.items():
        if any(layer.waits_for_data(name) for layer in layers):
            groups.setdefault(id(config), []).append(name)
    return list(groups.values())


def waits(adapter: str) -> MethodError:
    """The refusal of an adapter that has no start yet."""
    return MethodError(
        describe(
            f"adapter '{adapter}'",
            "its start is to be computed from data and has not been",
            "a start, before it is trained, saved or merged",
            "call leantune.initialize(model, batches)",
        )
    )


def expects_file() -> bool:
    """Whether the state of a waiting adapter may be listed now."""
    return _expects_file.get()


@contextmanager
def start_from_file() -> Iterator[None]:
    """Inside, the state of a waiting adapter can be listed, to be read from a file or for its shapes alone."""
    token = _expects_file.set(True)
    try:
        yield
    finally:
        _expects_file.reset(token)


def initialize(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    step_size: float | None = None,
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
    *,
    optimizer: str | Step = DEFAULT_OPTIMIZER,
    gradient_bytes: int = GRADIENT_BYTES,
) -> dict[str, Any]:
    """Compute the data-dependent starts of a model's waiting adapters, in place.

    The batches go through the base alone, in evaluation mode (no dropout); modes, random state, gradients and every
    weight are afterwards what they were. In several processes each one gives batches of its own, and all arrive at
    the same start: that of all batches together.

    Example:
        ``model = get_peft_model(base, S2FTConfig(selection="activation")); leantune.initialize(model, batches)``

    Args:
        model: a PEFT model with an adapter whose start comes from data.
        batches: what ``model(**batch)`` takes, as the collator of the training makes it: 2-D ``attention_mask``
            excludes padding, ``labels`` are needed where gradients are. A one-off iterator is read once and kept.
        step_size: for methods whose start is an optimizer's first step on the weights: its learning rate, that is, that
            of the first step above zero; others ignore it.
        loss: ``(model, batch) -> scalar``; the gradient is that of its sum over all batches. Default: the model's own
            mean loss times the number of labels in the batch, divided by their number in all batches, so that it does
            not matter how rows are put into batches.
        optimizer: for those methods: transformers' name of it, or a function ``(gradient, step_size) -> step``.
        gradient_bytes: most bytes of gradients at one time: fewer mean more passes over the batches.

    Returns:
        What was done: ``adapters``, ``batches``, ``rows``, ``tokens`` (without padding), ``passes`` over the batches,
        and what the method tells of its start.

    Raises:
        MethodError: no adapter waits, the batches are empty or of the wrong kind, or do not give finite numbers.
    """
    tuner: Any = getattr(model, "base_model", model)
    groups = waiting(tuner) if isinstance(tuner, BaseTuner) else []
    if not groups:
        raise MethodError(
            describe(
                f"initialize({type(model).__name__})",
                "no adapter of this model waits for data",
                "a PEFT model with an adapter that does, e.g. S2FTConfig(selection='activation')",
                "leave the call out",
            )
        )
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise MethodError(
            describe("initialize", "an adapter is merged", "the base's own weights", "call model.unmerge_adapter()")
        )
    data = Calibration(
        model, batches, step_size=step_size, optimizer=optimizer, loss=loss, gradient_bytes=gradient_bytes
    )
    with data.at_rest():
        for names in groups:
            if isinstance(tuner, StartingModel):
                tuner.start_from_data(names, data)
            else:
                # A tuner of PEFT's own: its method's file knows the start.
                of_config(tuner.peft_config[names[0]]).start(tuner, names, data)
    facts = {"batches": len(data.batches), "rows": data.rows, "tokens": data.tokens, "passes": data.passes}
    return {"adapters": [name for names in groups for name in names], **facts, **data.told}
