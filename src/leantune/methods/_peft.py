"""The only file that touches how PEFT registers a method.

PEFT (0.21) keeps its types in a closed enum and refuses names that are not in it. We add ours at run time. Should a
later PEFT bring a method of the same name, ours is registered as ``LEANTUNE_<NAME>`` instead, and its files say so.
"""

from __future__ import annotations

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

_OURS: dict[str, PeftType] = {}


def add_peft_type(name: str) -> PeftType:
    """The enum member for our method ``name`` (lower case), added when it is not there.

    ``PeftType.S2FT``, ``PeftType("S2FT")`` and ``list(PeftType)`` then all know it, as does whatever PEFT and
    transformers look up by ``config.peft_type.value``.
    """
    if name in _OURS:
        return _OURS[name]
    value = name.upper()
    if value in PeftType.__members__:
        value = f"LEANTUNE_{value}"
    member = str.__new__(PeftType, value)
    member._name_ = value
    member._value_ = value
    PeftType._member_map_[value] = member
    PeftType._member_names_.append(value)
    PeftType._value2member_map_[value] = member
    type.__setattr__(PeftType, value, member)
    _OURS[name] = member
    return member


def prefix_of(name: str) -> str:
    """The key prefix that PEFT and transformers expect of our method ``name``: its type in lower case and ``_``."""
    return add_peft_type(name).value.lower() + "_"


def register_with_peft(name: str, config: type, model: type) -> None:
    """Make ``peft.get_peft_model``, saving and loading know the method; a second call changes nothing.

    Args:
        name: our name of the method, lower case with underscores.
        config: its ``PeftConfig`` subclass, whose ``peft_type`` is ``add_peft_type(name)``.
        model: its ``BaseTuner`` subclass, whose ``prefix`` is ``prefix_of(name)``.
    """
    peft_type = add_peft_type(name)
    known: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if known is config:
        return
    register_peft_method(name=peft_type.value.lower(), config_cls=config, model_cls=model, prefix=prefix_of(name))
