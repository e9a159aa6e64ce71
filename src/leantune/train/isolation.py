"""How a model keeps the rows of a pack apart, found by trying it and never by its name.

Two packs of random tokens go through the model. Apart they are when the gradient of a row's logits with respect to
the embeddings of every other position is exactly zero (a masked score has a weight of exactly zero, in every dtype;
a recurrent state or a convolution that runs over the border has not), and when the row's logits are those it has
alone: its positions counted from zero.
"""

from __future__ import annotations

import inspect
import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from leantune.core.errors import ModelError, describe
from leantune.data.collator import Collator, Form, PackCollator
from leantune.data.packing import DOCUMENTS
from leantune.train.loss import without_adapter

_LENGTHS = ((5, 3), (4,))
# Beside another row a sum is split up otherwise: roundings of some sixteen operations a layer, never a tenth.
_OPERATIONS_A_LAYER, _MOST_ROUNDING = 16, 0.1


def packed_inputs(batch: dict[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """What a model is given of a batch, and the row of each position where rows are packed.

    A model with a cache takes positions that restart for a conversation that goes on, so it gets none.
    """
    if DOCUMENTS not in batch:
        return batch, None
    inputs = {name: value for name, value in batch.items() if name != DOCUMENTS}
    return inputs | {"use_cache": False}, batch[DOCUMENTS]


def packing_form(
    model: nn.Module, max_length: int, context: AbstractContextManager[Any] | None = None
) -> dict[str, Any]:
    """The form in which this model takes packs.

    Args:
        model: a causal language model, with or without adapter.
        max_length: tokens of a pack, which a sliding window may be shorter than.
        context: an autocast to run it in.

    Returns:
        ``form`` and ``mask_dtype``, as :class:`leantune.data.PackCollator` takes them.

    Raises:
        ModelError: no form keeps its rows apart.
    """
    base: Any = without_adapter(model)
    name = type(base).__name__
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise _refusal(name, "its forward takes no position_ids, by which a row of a pack is told from the next")
    attention = str(getattr(base.config, "_attn_implementation", None) or "eager")
    dtype = None if attention == "sdpa" else next(base.parameters()).dtype
    forms: list[Form] = ["varlen"] if "flash" in attention else ["positions", "mask"]
    why = ""
    was_training = model.training
    model.eval()
    try:
        with context if context is not None else nullcontext():
            for form in forms:
                window = getattr(base.config, "sliding_window", None)
                if form == "mask" and window is not None and window < max_length:
                    # One mask serves all layers, also those that should see a window of the row alone.
                    why = f"{why}, and a mask cannot say so beside its sliding window of {window} tokens"
                    continue
                found = {"form": form, "mask_dtype": dtype if form == "mask" else None}
                reason = _fault(model, found)
                if reason is None:
                    return found
                why = why or reason
    finally:
        model.train(was_training)
    raise _refusal(name, why)


def _refusal(name: str, why: str) -> ModelError:
    return ModelError(
        describe(f"packing with {name}", why, "rows of a pack that do not see each other", "drop packing")
    )


def _fault(model: nn.Module, found: dict[str, Any]) -> str | None:
    """Why a form does not do, or None."""
    base: Any = without_adapter(model)
    vocabulary = base.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    packs = [[torch.randint(vocabulary, (n,), generator=generator).tolist() for n in pack] for pack in _LENGTHS]
    examples = [{DOCUMENTS: [{"input_ids": row, "labels": row} for row in pack]} for pack in packs]
    device = next(base.parameters()).device
    batch = {key: _on(value, device) for key, value in PackCollator(0, **found)(examples).items()}
    inputs, documents = packed_inputs(batch)
    inputs.pop("labels")
    assert documents is not None, "the probe is a packed batch"
    embedded: list[Tensor] = []

    def watch(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        del module, args
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    try:
        handle = base.get_input_embeddings().register_forward_hook(watch)
        try:
            with torch.enable_grad():
                logits = model(**inputs).logits.float()
        finally:
            handle.remove()
        rows = [row for pack in packs for row in pack]
        for number, row in enumerate(rows):
            own = documents == number
            (gradient,) = torch.autograd.grad(logits[own].square().sum(), embedded[0], retain_graph=True)
            if not bool(gradient[own].any()):
                return "its output does not depend on its input embedding"
            if bool(gradient[~own].any()):
                return "a row of a pack sees another one"
            if not _same(logits[own].detach(), _alone(model, row, device), base, dtype=_dtype(base)):
                return "a row of a pack gets other logits than alone"
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return "its forward pass fails on a pack (" + " ".join(str(error).split())[:200] + ")"
    return None


def _on(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@torch.no_grad()
def _alone(model: nn.Module, row: list[int], device: torch.device) -> Tensor:
    batch = Collator(0)([{"input_ids": row}])
    logits: Tensor = model(**{key: value.to(device) for key, value in batch.items()}, use_cache=False).logits
    return logits[0].float()


def _dtype(base: nn.Module) -> torch.dtype:
    parameter = next(base.parameters())
    if torch.is_autocast_enabled(parameter.device.type):
        return torch.get_autocast_dtype(parameter.device.type)
    return parameter.dtype if parameter.dtype.is_floating_point else torch.bfloat16


def _same(packed: Tensor, alone: Tensor, base: Any, dtype: torch.dtype) -> bool:
    # Compared in float32: what is wrong by a rounding of that is not looked for.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    layers = getattr(base.config, "num_hidden_layers", 1)
    bound = min(8 * math.sqrt(_OPERATIONS_A_LAYER * layers) * eps, _MOST_ROUNDING)
    # Written so that a NaN is no agreement.
    return bool(torch.linalg.vector_norm(packed - alone) <= bound * torch.linalg.vector_norm(alone))
