"""The options that every adapter of ours has."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft import PeftConfig

from leantune.core.errors import ConfigError, describe


@dataclass
class AdapterConfig(PeftConfig):
    """Options that every adapter layer of ours has, with PEFT's names and meaning."""

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the modules to adapt (path endings), a regular expression, or 'all-linear'. "
            "Default: what the method's paper trains, where the model's family is known."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of modules to leave out."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train whole and save beside the adapter, e.g. a classifier head."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the blocks to adapt; default: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks, where layers_to_transform needs it."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True starts from the base model's function; False starts from noise (for tests)."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))
        targets = self.target_modules
        if self.layers_to_transform is not None and isinstance(targets, str) and targets.lower() != "all-linear":
            got = f"layers_to_transform beside the regular expression {targets!r}"
            do = "name the blocks in the expression, or give names of modules"
            raise ConfigError(describe(type(self).__name__, got, "one choice of blocks", do))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ConfigError(
                describe(
                    type(self).__name__,
                    "layers_pattern without layers_to_transform",
                    "both or none",
                    "When `layers_pattern` is specified, `layers_to_transform` must also be specified.",
                )
            )
