"""Multiply-accumulates by formula, against torch's own count on real layers, and against the paper's table 6."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from leantune import LoraXSConfig
from leantune.methods import _cost
from leantune.methods._cost import Shape

TOKENS = 6
SHAPES = [(12, 9), (7, 12)]


class Two(nn.Module):
    """Two linear layers; the input takes a gradient, as behind a layer that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(9, 12, bias=False), nn.Linear(12, 7, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def counted(model: nn.Module, once: int = 0) -> tuple[int, int]:
    """Floating-point operations of a forward and of a whole step, for one token, but for ``once`` in each backward."""
    x = torch.randn(TOKENS, 9, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        y = model(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    ahead, back = forward.get_total_flops(), backward.get_total_flops() - once
    assert ahead % TOKENS == 0
    assert back % TOKENS == 0
    return ahead // TOKENS, (ahead + back) // TOKENS


def test_frozen_layers() -> None:
    cost = _cost.frozen(SHAPES)
    assert counted(Two().requires_grad_(False)) == (cost.forward_flops, cost.step_flops)


@pytest.mark.parametrize("rank", [2, 5])
def test_stock_lora(rank: int) -> None:
    model = get_peft_model(Two(), LoraConfig(target_modules=["first", "second"], r=rank))
    cost = _cost.frozen(SHAPES) + _cost.lora(SHAPES, rank)
    assert counted(model) == (cost.forward_flops, cost.step_flops)


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("rank", [2, 5])
def test_lora_xs(rank: int, precondition: bool) -> None:
    model = get_peft_model(Two(), LoraXSConfig(target_modules=["first", "second"], r=rank, precondition=precondition))
    if precondition:
        # The two inverses are formed once, in the first step; each step then multiplies by both, whatever its tokens.
        model(torch.randn(TOKENS, 9)).sum().backward()
    cost = _cost.frozen(SHAPES) + _cost.lora_xs(SHAPES, rank)
    once = 2 * len(SHAPES) * 2 * rank**3 if precondition else 0
    forward, step = counted(model, once)
    assert (forward, step) == (cost.forward_flops, cost.step_flops)


def test_a_rank_above_a_layers_own_is_clamped() -> None:
    assert _cost.lora_xs([(12, 3)], 8) == _cost.lora_xs([(12, 3)], 3)
    assert _cost.lora([(12, 3)], 8) == _cost.lora([(12, 3)], 3)


# The dimensions of table 6's models: base weights that every token meets (without embeddings), and adapted layers.
ROBERTA = [(1024, 1024)] * 4 + [(4096, 1024), (1024, 4096)]
# The public code adapts query, value and both output layers; with these the table's figures come out.
ROBERTA_ADAPTED = [(1024, 1024)] * 3 + [(1024, 4096)]


def decoder(width: int, heads: int, groups: int, inner: int) -> list[Shape]:
    return [(heads, width), (groups, width), (groups, width), (width, heads)] + [(inner, width)] * 2 + [(width, inner)]


LLAMA, MISTRAL, GEMMA = (
    decoder(3072, 3072, 1024, 8192),
    decoder(4096, 4096, 1024, 14336),
    decoder(3584, 4096, 2048, 14336),
)
# model: (layers of a block, adapted ones, blocks, head)
MODELS: dict[str, tuple[list[Shape], list[Shape], int, list[Shape]]] = {
    "roberta-large": (ROBERTA, ROBERTA_ADAPTED, 24, []),
    "llama-3.2-3b": (LLAMA, LLAMA, 28, [(128256, 3072)]),
    "mistral-7b": (MISTRAL, MISTRAL, 32, [(32000, 4096)]),
    "gemma-2-9b": (GEMMA, GEMMA, 42, [(256000, 3584)]),
}
# Printed MACs at 256 tokens, and the unit of the last digit. "92" is the table's own rank for Mistral.
TABLE_6 = [
    ("roberta-large", "lora", 8, 77.86e9, 0.01e9),
    ("roberta-large", "lora-sb", 16, 78.42e9, 0.01e9),
    ("roberta-large", "lora-sb", 24, 78.97e9, 0.01e9),
    ("llama-3.2-3b", "lora", 32, 0.84e12, 0.01e12),
    ("llama-3.2-3b", "lora-sb", 64, 0.85e12, 0.01e12),
    ("llama-3.2-3b", "lora-sb", 96, 0.86e12, 0.01e12),
    ("mistral-7b", "lora", 32, 1.84e12, 0.01e12),
    ("mistral-7b", "lora-sb", 64, 1.86e12, 0.01e12),
    ("mistral-7b", "lora-sb", 92, 1.88e12, 0.01e12),
]


def macs(model: str, method: str, rank: int) -> int:
    block, adapted, blocks, head = MODELS[model]
    share = _cost.lora(adapted, rank) if method == "lora" else _cost.lora_xs(adapted, rank)
    return 256 * (blocks * (_cost.frozen(block) + share).forward + _cost.frozen(head).forward)


@pytest.mark.parametrize(("model", "method", "rank", "printed", "unit"), TABLE_6)
def test_table_6_comes_out_up_to_its_last_digit(
    model: str, method: str, rank: int, printed: float, unit: float
) -> None:
    assert abs(macs(model, method, rank) - printed) <= 1.5 * unit


def test_the_table_leaves_out_the_middle_factor() -> None:
    """RoBERTa's row is printed finely enough to tell: 78.97 G is ``B A`` at rank 24, ``B R A`` is 78.98 G."""
    block, adapted, blocks, _ = MODELS["roberta-large"]
    without = 256 * blocks * (_cost.frozen(block) + _cost.lora(adapted, 24)).forward
    assert round(without / 1e9, 2) == 78.97
    assert round(macs("roberta-large", "lora-sb", 24) / 1e9, 2) == 78.98


def test_gemmas_row_is_not_at_256_tokens() -> None:
    """Printed 3.89 T; the model's dimensions give 2.39 T, and about 416 tokens would give the printed figure."""
    assert macs("gemma-2-9b", "lora", 32) / 1e12 == pytest.approx(2.39, abs=0.01)
    assert 256 * 3.89e12 / macs("gemma-2-9b", "lora", 32) == pytest.approx(416, abs=2)
