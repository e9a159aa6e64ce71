"""The list of methods. A method file registers itself in its last line; nothing else is edited.

Every module of this package whose name has no leading underscore is imported on first use, as are outsiders'
methods offered through the entry-point group ``leantune.methods``.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from torch import nn

from leantune.core.errors import MethodError, describe, did_you_mean
from leantune.methods._plan import TrainingPlan

if TYPE_CHECKING:
    from leantune.methods._calibration import Calibration


METHOD_CONFIG = "leantune_config"
"""Where a model whose own weights train keeps the config of its method, which its plan reads."""


def _never(config: Any) -> bool:
    del config
    return False


def _no_start(model: nn.Module, adapters: list[str], data: Calibration) -> None:
    del model, data
    got = "its method takes nothing from data"
    raise MethodError(describe(f"adapter '{adapters[0]}'", got, "a method that does", "train it as it is"))


def _as_it_is(config: Any) -> Any:
    return config


def _empty_plan(model: nn.Module) -> TrainingPlan:
    del model
    return TrainingPlan()


@dataclass(frozen=True)
class Method:
    """A way to fine-tune, with the facts that shared code needs; nobody asks which method it has.

    Attributes:
        name: what users type, e.g. ``"s2ft"``.
        title: the name in words.
        config: the dataclass of its options; each field of ours has ``metadata["help"]``.
        formula: the change of a weight in one line.
        paper: where it comes from.
        is_adapter: it leaves an adapter file beside an untouched base (else a whole model).
        mergeable: its change can be written into the base weights.
        identity_at_init: the wrapped model equals the base bit for bit before the first step.
        needs_batches: ``(config) -> bool``: with this config the start is computed from data, by
            ``leantune.initialize``.
        start: ``(tuner, adapters, calibration) -> None``: computes that start, where the tuner is PEFT's own (a model
            of ours does it in ``start_from_data``).
        calibration_share: of the training rows, what a run computes that start from unless it is told otherwise.
        lora_form: its change is exactly ``B A`` with factors from ``AdapterLayer.lora_factors``.
        cannot_merge: of an adapter that is not mergeable: why, in a clause that follows its name.
        has_tasks: several adapters of one config train side by side, each on its own task's rows of a mixed batch; its
            tuner model has ``set_row_tasks(names)``, one name a row.
        default_learning_rate: where a run starts when no rate is given.
        trainable_parameters: ``(config, out_features, in_features) -> count`` for one linear layer.
        apply: ``(model, config) -> model`` made trainable.
        plan: ``(model) -> TrainingPlan``.
        options: options that the method's name sets, below those a user gives; see :meth:`preset`.
        prepare: ``(config) -> config``: what a config of PEFT's own needs beside its options.
        toy_options: options that make sense on the tiny models of the contract suite.
        gaps: checks of the contract that an implementation of PEFT's own does not pass, and why.
    """

    name: str
    title: str
    config: type
    formula: str
    paper: str
    trainable_parameters: Callable[[Any, int, int], int]
    apply: Callable[[nn.Module, Any], nn.Module]
    is_adapter: bool = True
    mergeable: bool = True
    identity_at_init: bool = True
    needs_batches: Callable[[Any], bool] = _never
    start: Callable[[Any, list[str], Calibration], None] = _no_start
    calibration_share: float = 0.01
    lora_form: bool = True
    cannot_merge: str = ""
    has_tasks: bool = False
    default_learning_rate: float = 1e-3
    plan: Callable[[nn.Module], TrainingPlan] = _empty_plan
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], Any] = _as_it_is
    toy_options: Mapping[str, Any] = field(default_factory=dict)
    gaps: Mapping[str, str] = field(default_factory=dict)

    def preset(self, name: str, options: Mapping[str, Any], **changes: Any) -> Method:
        """Another method over the same config: its own name, the options that this name sets, and what else differs.

        Example:
            ``register(LORA.preset("rslora", {"use_rslora": True}, title="Rank-stabilised LoRA", paper="..."))``

        Args:
            name: what users type.
            options: options of the config that the name sets; a user's own win over them.
            changes: other fields of :class:`Method`.
        """
        return replace(self, name=name, options={**self.options, **options}, **changes)

    def make_config(self, **options: Any) -> Any:
        """A config object: the given options over those that the name sets.

        Raises:
            LeantuneError: the config refuses them.
        """
        return self.prepare(self.config(**{**self.options, **options}))


_METHODS: dict[str, Method] = {}
_discovered = False


def register(method: Method) -> Method:
    """Add a method to the list.

    Raises:
        MethodError: another method has that name.
    """
    known = _METHODS.get(method.name)
    if known is not None and known.config is not method.config:
        raise MethodError(
            describe(f"method '{method.name}'", "registered twice", "one owner a name", "rename one of the two")
        )
    _METHODS[method.name] = method
    return method


def _discover() -> None:
    global _discovered
    if _discovered:
        return
    _discovered = True
    package = importlib.import_module("leantune.methods")
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"leantune.methods.{module.name}")
    for entry in entry_points(group="leantune.methods"):
        entry.load()


def names() -> list[str]:
    """The names of all methods, sorted."""
    _discover()
    return sorted(_METHODS)


def get(name: str) -> Method:
    """The method of that name.

    Raises:
        MethodError: there is none; the nearest name is suggested.
    """
    _discover()
    if name not in _METHODS:
        raise MethodError(
            describe(f"method '{name}'", "unknown", did_you_mean(name, _METHODS), "leantune methods lists them")
        )
    return _METHODS[name]


def of_config(config: object) -> Method:
    """The method that a config object belongs to: among those of its type, the one most of whose options it carries.

    Raises:
        MethodError: no registered method has a config of that type.
    """
    _discover()
    found = [method for method in _METHODS.values() if type(config) is method.config and _carries(config, method)]
    if found:
        # Of equals the first one registered: a method before its presets.
        return max(found, key=lambda method: len(method.options))
    raise MethodError(
        describe(
            f"config {type(config).__name__}",
            "of no registered method",
            "one of " + ", ".join(sorted(m.config.__name__ for m in _METHODS.values())),
            "use one of these, or register a method",
        )
    )


def _carries(config: object, method: Method) -> bool:
    # A default instance of the preset knows how the config class writes a value (a list becomes a set).
    wanted = method.make_config()
    return all(getattr(config, name, None) == getattr(wanted, name) for name in method.options)
