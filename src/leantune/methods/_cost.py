r"""Multiply-accumulates of a low-rank layer, forward and in a training step: what the ``r x r`` in the middle costs.

For one token through a linear layer ``W (out, in)`` and an adapter beside it, not merged::

    forward                W           LoRA: B A          LoRA-XS: B R A
                           out in      r (out + in)       r (out + in) + r^2
    backward, frozen W     out in      2 r (out + in)     r (out + in) + 2 r^2

The backward of a frozen layer is the gradient of its input alone; that of LoRA forms both factors' gradients too, that
of LoRA-XS the gradient of ``R``, two products of width ``r``. A multiply-accumulate is two floating-point operations.
Additions, scalings, norms and attention scores are not counted: they are the same with either adapter, or of lower
order; nor are the ``2 r^3`` that a preconditioned gradient takes once a step, whatever its tokens.

Paper: LoRA-SB (arXiv 2411.19557), appendix D.4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Shape = tuple[int, int]


@dataclass(frozen=True)
class Cost:
    """Multiply-accumulates for one token.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass, down to the gradient of the layers' inputs.
    """

    forward: int
    backward: int

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of the forward pass."""
        return 2 * self.forward

    @property
    def step_flops(self) -> int:
        """Floating-point operations of forward and backward."""
        return 2 * (self.forward + self.backward)

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward + other.forward, self.backward + other.backward)


def frozen(shapes: Iterable[Shape]) -> Cost:
    """Of frozen linear layers.

    Args:
        shapes: ``(out, in)`` of each.
    """
    weights = sum(out * into for out, into in shapes)
    return Cost(weights, weights)


def lora(shapes: Iterable[Shape], rank: int) -> Cost:
    """Of LoRA's share beside the layers, both factors trained; without the layers themselves.

    Args:
        shapes: ``(out, in)`` of each adapted layer.
        rank: of every adapter, clamped to a layer's own.
    """
    factors = sum(min(rank, *shape) * sum(shape) for shape in shapes)
    return Cost(factors, 2 * factors)


def lora_xs(shapes: Iterable[Shape], rank: int) -> Cost:
    """Of the share of LoRA-XS or LoRA-SB beside the layers, ``R`` trained; without the layers themselves.

    Args:
        shapes: ``(out, in)`` of each adapted layer.
        rank: of every adapter, clamped to a layer's own.
    """
    layers = list(shapes)
    factors = sum(min(rank, *shape) * sum(shape) for shape in layers)
    middle = sum(min(rank, *shape) ** 2 for shape in layers)
    return Cost(factors + middle, factors + 2 * middle)
