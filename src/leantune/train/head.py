"""The head of a task: trained whole, saved beside the adapter, and no target of the adapter itself."""

from __future__ import annotations

from typing import Any

from torch import nn

from leantune.core.errors import MethodError, describe
from leantune.methods import Method
from leantune.models import BaseModel

# PEFT adds these by itself to an adapter of its task SEQ_CLS.
_ADDED_BY_PEFT = ("classifier", "score")


def head_modules(base: BaseModel) -> list[str]:
    """The modules that make up a task's head: those outside the body, and what of the body is not in the file.

    DistilBERT's head is two layers, DeBERTa's pooler stands outside the body and BERT's, fresh as the head, inside: all
    that begins at random must train, and be saved.

    Args:
        base: a base model of a task with a head.
    """
    model = base.model
    body = str(model.base_model_prefix)
    found = [
        name
        for name, module in model.named_children()
        if name != body and any(True for _ in module.parameters()) and not isinstance(module, nn.ModuleList)
    ]
    for name in base.new_parameters:
        if name.startswith(f"{body}.") and ".pooler." in name:
            found.append(name[: name.index(".pooler.")] + ".pooler")
    return list(dict.fromkeys(found))


def settle_head(options: dict[str, Any], base: BaseModel, method: Method) -> None:
    """Have the head trained whole and saved, by the options of an adapter.

    Args:
        options: of the method's config; ``modules_to_save`` gains the head.
        base: the base model.
        method: an adapter method.

    Raises:
        MethodError: the head is named as a target too.
    """
    heads = head_modules(base)
    targets = options.get("target_modules")
    named = sorted({targets} if isinstance(targets, str) and targets != "all-linear" else set(targets or ()))
    leaves = {head.rpartition(".")[2] for head in heads}
    both = [name for name in named if targets != "all-linear" and (name in heads or name.split(".")[0] in leaves)]
    if both:
        got = f"{', '.join(both)}, the head that {base.name} trains whole for this task"
        do = f"leave it out of target_modules; {method.name} adapts the layers below it"
        raise MethodError(describe("target_modules", got, "modules of the body", do))
    own = [name for name in heads if options.get("task_type") != "SEQ_CLS" or name not in _ADDED_BY_PEFT]
    kept = list(options.get("modules_to_save") or ())
    if kept or own:
        options["modules_to_save"] = list(dict.fromkeys([*kept, *own]))
