"""Command-line options made from the fields of a config class: one text for --help, YAML and the reference.

A method's options are the fields of its dataclass (``metadata["help"]``), a run's options those of its pydantic
model (``description``). Values stay text here; the run configuration brings them to their types.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import typer

_WORD = {str: "text", Path: "path", bool: "bool", int: "int", float: "float"}


@dataclasses.dataclass(frozen=True)
class Option:
    """One option: a field of a config class as the command line sees it."""

    name: str
    type_name: str
    default: Any
    help: str
    annotation: Any = dataclasses.field(repr=False, default=str)
    is_repeated: bool = False
    synonym: str | None = None

    @property
    def flag(self) -> str:
        """How it is typed, e.g. ``--max-length``."""
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        """It is on or off and takes no value."""
        return _without_none(self.annotation) == (bool,)


def options_of(config: type, set_by_name: Mapping[str, Any] | None = None) -> list[Option]:
    """The options of a method's config dataclass, in the order of its fields.

    Args:
        config: the dataclass.
        set_by_name: what the method's name sets instead of the dataclass's own defaults.
    """
    from leantune.train.option import user_options

    hints = typing.get_type_hints(config)
    found = []
    for name, field in user_options(config).items():
        if field.metadata.get("is_result"):
            # The method writes it; a file carries it.
            continue
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        text = " ".join(str(field.metadata.get("help", "")).split())
        shown = None if default is dataclasses.MISSING else default
        shown = (set_by_name or {}).get(name, shown)
        found.append(Option(name, type_name(hints[name]), shown, text, hints[name]))
    return found


def run_options(config: type, *, without: Iterable[str] = ()) -> list[Option]:
    """The options of a run: the fields of a pydantic model."""
    skipped = set(without)
    return [
        Option(
            name,
            type_name(field.annotation),
            None if field.is_required() or field.default_factory else field.default,
            field.description or "",
            field.annotation,
            is_repeated=bool((field.json_schema_extra or {}).get("is_repeated")),
            synonym=(field.json_schema_extra or {}).get("synonym"),
        )
        for name, field in config.model_fields.items()  # type: ignore[attr-defined]
        if name not in skipped
    ]


def _without_none(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(part for part in typing.get_args(annotation) if part is not type(None))
    return (annotation,)


def type_name(annotation: Any) -> str:
    """A type as a reader of --help wants it: ``int``, ``random|weight``, ``name,name``."""
    names = []
    for part in _without_none(annotation):
        origin = typing.get_origin(part)
        if origin is Literal:
            name = "|".join(str(value) for value in typing.get_args(part))
        elif part in (list, tuple, set) or origin in (list, tuple, set):
            name = "int,int" if typing.get_args(part)[:1] == (int,) else "name,name"
        elif origin is dict and typing.get_args(part) == (str, str):
            name = "name=name,name=name"
        else:
            name = _WORD.get(part, "yaml")
        if name not in names:
            names.append(name)
    # A list may be given as one name too, so "text" beside it says nothing more.
    if "name,name" in names and "text" in names:
        names.remove("text")
    return "|".join(names)


def with_options(function: Callable[..., Any], options: Iterable[tuple[Option, str]]) -> Callable[..., Any]:
    """Give a function one more keyword per option, so that typer makes flags of them.

    Args:
        function: takes ``**given``; receives each option's text (a bool for a switch), or None when not given.
        options: each option with the title of the box it stands in under --help.
    """
    signature = inspect.signature(function, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    taken = {parameter.name for parameter in own}
    added = []
    for option, box in options:
        if option.name in taken:
            continue
        taken.add(option.name)
        names = [f"{option.flag}/--no-{option.flag[2:]}" if option.is_switch else option.flag]
        if option.synonym is not None:
            names.append("--" + option.synonym.replace("_", "-"))
        default = "" if option.default is None or option.default is False else f" [default: {option.default}]"
        added.append(
            inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=typer.Option(
                    None,
                    *names,
                    help=option.help + default,
                    metavar=None if option.is_switch else option.type_name + "|name=file" * option.is_repeated,
                    show_default=False,
                    rich_help_panel=box,
                ),
                annotation=bool | None if option.is_switch else list[str] | None if option.is_repeated else str | None,
            )
        )

    def command(*words: Any, **given: Any) -> Any:
        return function(*words, **given)

    command.__name__, command.__doc__ = function.__name__, function.__doc__
    # typer reads both the signature and the annotations.
    command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*own, *added]}
    return command
