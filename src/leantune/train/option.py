"""A method's options from outside: which there are, and their values brought to the type the method declares."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from leantune.core.errors import LeantuneError, describe, did_you_mean

if TYPE_CHECKING:
    from leantune.methods import Method

# PEFT's bookkeeping: the run decides these, never a recipe.
_NOT_FOR_USERS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
}


def user_options(config: type) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a method's config that a recipe may set."""
    fields = dataclasses.fields(config)
    return {field.name: field for field in fields if field.init and field.name not in _NOT_FOR_USERS}


def method_options(method: Method, options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Options with their declared types, and what is wrong with them.

    Args:
        method: the method they are for.
        options: names and values as YAML or the command line gave them; text is converted.
    """
    known = user_options(method.config)
    hints = _type_hints(method.config)
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in options.items():
        where = f"method_options.{name}"
        if name not in known:
            guess = did_you_mean(str(name), known)
            problems.append(
                describe(where, f"no option of {method.name}", guess, f"see leantune methods {method.name}")
            )
            continue
        try:
            values[name] = _coerce(value, hints.get(name, Any))
        except ValidationError as error:
            wanted = " or ".join(dict.fromkeys(item["msg"][0].lower() + item["msg"][1:] for item in error.errors()))
            problems.append(describe(where, f"{value!r}", wanted, f"see leantune methods {method.name}"))
    return values, problems or _contradictions(method, values)


def _contradictions(method: Method, values: dict[str, Any]) -> list[str]:
    """What the method's own config says against options that are fine one by one."""
    try:
        method.make_config(**values)
    except LeantuneError as error:
        return [str(error)]
    except (ValueError, TypeError) as error:
        text = " ".join(str(error).split())
        return [describe("method_options", text, "options that fit together", f"see leantune methods {method.name}")]
    return []


def _type_hints(config: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(config)
    except (NameError, TypeError):
        # A hint that only a type checker can resolve: the config's own checks decide then.
        return {}


def _coerce(value: Any, hint: Any) -> Any:
    if isinstance(value, str):
        value = _as_names(value, hint)
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:
        adapter = TypeAdapter(hint)
    except PydanticSchemaGenerationError:
        return value
    return adapter.validate_python(value)


def _as_names(value: str, hint: Any) -> Any:
    """``o_proj,down_proj`` as a list where a list of names is taken: PEFT would read plain text as one regex."""
    takes_names = any(typing.get_origin(part) in (list, set) for part in (hint, *typing.get_args(hint)))
    if takes_names and value != "all-linear" and re.fullmatch(r"[\w\-]+(\s*,\s*[\w\-.]+)*", value):
        return [name.strip() for name in value.split(",")]
    return value
