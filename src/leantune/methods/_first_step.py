r"""The first step that an optimizer would take on a whole weight matrix, in closed form.

With ``G = dL/dW (out, in)`` and ``eta`` the learning rate of that step, the state still empty::

    AdamW, Adam, Lion, Adagrad   -eta sign(G)                     LoRA-SB, eqs. 6 and 7
    SGD (with momentum too)      -eta G
    RMSprop (alpha 0.99)         -eta sign(G) / sqrt(1 - alpha)
    Adafactor                    -eta u / max(1, rms(u)),         u = G / sqrt(r c^T / mean(r)),
                                 r = row means, c = column means of G^2 + 1e-30

Adafactor is as transformers' Trainer makes it: no relative step, no parameter scale; its second-moment decay is 0 in
the first step, so that the averages are those of this gradient alone. The small ``eps`` beside the square root of Adam
and Adagrad is left out, as in the paper: an entry whose gradient is exactly zero takes no step, any other a whole one.

Left out as well: weight decay (its share ``-eta lambda W`` points to zero and knows nothing of the data, and in an
adapter decay pulls towards the base model instead), and clipping of the gradient's norm (which only the raw
gradient of SGD would show).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from leantune.core.errors import MethodError, describe

DEFAULT_OPTIMIZER = "adamw_torch"
Step = Callable[[Tensor, float], Tensor]
"""``(gradient (out, in), step_size) -> step (out, in)``, of the same dtype; it may write into the gradient."""

# By the beginning of transformers' names: adamw_torch_fused, paged_adamw_8bit, lion_32bit, ...
_SIGN = ("adamw", "paged_adamw", "lion", "paged_lion")
_SIGN_EXACTLY = ("adam", "adagrad")
_RMSPROP_SCALE = (1 - 0.99) ** -0.5
_ADAFACTOR_FLOOR = 1e-30
KNOWN = ("adamw_torch", "adam", "lion_32bit", "adagrad", "sgd", "rmsprop", "adafactor")
"""One name of each kind, for messages."""


def first_step(optimizer: str | Step, gradient: Tensor, step_size: float) -> Tensor:
    """The first step on a whole weight; see the module's text. May write into ``gradient``.

    Args:
        optimizer: transformers' name of it, or a function that gives the step of any other.
        gradient: ``dL/dW (out, in)`` of the complete sum over the batches.
        step_size: its learning rate.

    Raises:
        MethodError: the optimizer is not known here.
    """
    if not isinstance(optimizer, str):
        return optimizer(gradient, step_size)
    return step_of(optimizer)(gradient, step_size)


def step_of(optimizer: str) -> Step:
    """The rule of the optimizer of that name.

    Raises:
        MethodError: it is not known here.
    """
    name = optimizer.lower()
    if name.startswith(_SIGN) or name in _SIGN_EXACTLY:
        return lambda gradient, step_size: gradient.sign_().mul_(-step_size)
    if name == "sgd":
        return lambda gradient, step_size: gradient.mul_(-step_size)
    if name == "rmsprop":
        return lambda gradient, step_size: gradient.sign_().mul_(-step_size * _RMSPROP_SCALE)
    if name == "adafactor":
        return _adafactor
    raise MethodError(
        describe(
            f"optimizer '{optimizer}'",
            "its first step is not known in closed form",
            "one of " + ", ".join(KNOWN),
            "name one of these, or give initialize(optimizer=...) a function (gradient, step_size) -> step",
        )
    )


def _adafactor(gradient: Tensor, step_size: float) -> Tensor:
    squares = gradient.square() + _ADAFACTOR_FLOOR
    rows, columns = squares.mean(1), squares.mean(0)
    del squares
    update = gradient.mul_((rows / rows.mean()).rsqrt_()[:, None]).mul_(columns.rsqrt_())
    rms = torch.linalg.vector_norm(update) / update.numel() ** 0.5
    return update.mul_(-step_size / rms.clamp(min=1.0))
