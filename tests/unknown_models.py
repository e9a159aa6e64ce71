"""Models that no table knows, made in code: an invented decoder, two small CNNs, a falcon with grouped fused heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
)

import tiny
from leantune.testing.model import scatter_weights


class Weaver(nn.Module):
    """An attention of odd names: one layer for queries, one for keys and values side by side in each group."""

    def __init__(self, width: int, spools: int, pairs: int, thread: int) -> None:
        super().__init__()
        self.spools, self.pairs, self.thread = spools, pairs, thread
        self.ask = nn.Linear(width, spools * thread)
        self.tell = nn.Linear(width, pairs * 2 * thread, bias=False)
        self.tie = nn.Linear(spools * thread, width)

    def forward(self, x: Tensor) -> Tensor:
        rows, length, _ = x.shape
        asked = self.ask(x).view(rows, length, self.spools, self.thread).transpose(1, 2)
        told = self.tell(x).view(rows, length, self.pairs, 2, self.thread).permute(3, 0, 2, 1, 4)
        key, value = (each.repeat_interleave(self.spools // self.pairs, 1) for each in told)
        woven = F.scaled_dot_product_attention(asked, key, value, is_causal=True)
        return self.tie(woven.transpose(1, 2).reshape(rows, length, -1))


class Dyer(nn.Module):
    """A gated network whose gate and value rows alternate: g0, v0, g1, v1, ..."""

    def __init__(self, width: int, vats: int) -> None:
        super().__init__()
        self.dip = nn.Linear(width, 2 * vats)
        self.wring = nn.Linear(vats, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.dip(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.wring(F.silu(gate) * value)


class Strand(nn.Module):
    """A block."""

    def __init__(self) -> None:
        super().__init__()
        self.smooth, self.smooth_again = nn.LayerNorm(24), nn.LayerNorm(24)
        self.weave, self.dye = Weaver(24, 6, 2, 4), Dyer(24, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.weave(self.smooth(x))
        return x + self.dye(self.smooth_again(x))


class Loom(nn.Module):
    """A decoder that nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.yarn = nn.Embedding(tiny.VOCABULARY, 24)
        self.strands = nn.ModuleList([Strand() for _ in range(2)])
        self.smooth = nn.LayerNorm(24)
        self.cloth = nn.Linear(24, tiny.VOCABULARY)
        # Evaluation, and no gradient, until somebody trains it.
        self.dummy_inputs = {"input_ids": torch.arange(16).view(2, 8)}

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.yarn(input_ids)
        for strand in self.strands:
            x = strand(x)
        return self.cloth(self.smooth(x))


class Camera(nn.Module):
    """A small CNN: convolution, batch norm, ReLU, twice; then a flattened map into a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.lens = nn.Conv2d(3, 8, 3, padding=1)
        self.settle = nn.BatchNorm2d(8)
        self.film = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.develop = nn.BatchNorm2d(12)
        self.name = nn.Linear(12 * 16, 5)
        self.dummy_inputs = {"pixel_values": torch.zeros(2, 3, 8, 8)}

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = F.relu(self.settle(self.lens(pixel_values)))
        x = F.relu_(self.develop(self.film(x)))
        return self.name(x.flatten(1))


class Bottleneck(nn.Module):
    """Residual: wide, by channel, and narrow again; channels of the depthwise middle belong to both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.widen = nn.ModuleList([nn.Conv2d(6, 10, 1) for _ in range(2)])
        self.by_channel = nn.ModuleList([nn.Conv2d(10, 10, 3, padding=1, groups=10) for _ in range(2)])
        self.narrow = nn.ModuleList([nn.Conv2d(10, 6, 1) for _ in range(2)])
        self.name = nn.Linear(6, 5)
        self.example_input_array = torch.zeros(2, 3, 8, 8)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values)
        for widen, middle, narrow in zip(self.widen, self.by_channel, self.narrow, strict=True):
            x = x + narrow(F.relu(middle(F.relu(widen(x)))))
        return self.name(x.mean((2, 3)))


def _falcon() -> nn.Module:
    # Each group holds its query heads, then its key and its value.
    config = FalconConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_kv_heads=2,
        new_decoder_architecture=True,
        ffn_hidden_size=20,
        bos_token_id=1,
        eos_token_id=2,
    )
    return FalconForCausalLM(config)


def _bloom() -> nn.Module:
    config = BloomConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=24,
        n_layer=2,
        n_head=6,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return BloomForCausalLM(config)


def _bart() -> nn.Module:
    config = BartConfig(
        vocab_size=tiny.VOCABULARY,
        d_model=24,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        max_position_embeddings=32,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    return BartForConditionalGeneration(config)


UNKNOWN: dict[str, Callable[[], nn.Module]] = {
    "loom": Loom,
    "camera": Camera,
    "bottleneck": Bottleneck,
    "falcon": _falcon,
    "bloom": _bloom,
    "bart": _bart,
}


def model(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Any:
    """One of them, the same weights for the same seed, in eval mode."""
    made = UNKNOWN[name]()
    scatter_weights(made, seed, dtype)
    return made.eval()


def inputs(name: str, rows: int = 3) -> dict[str, Tensor]:
    """Arguments of a forward."""
    if name in ("camera", "bottleneck"):
        generator = torch.Generator().manual_seed(3)
        return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator, dtype=torch.float64)}
    if name == "bart":
        return {"input_ids": tiny.ids(rows), "decoder_input_ids": tiny.ids(rows, length=5, seed=4)}
    return {"input_ids": tiny.ids(rows)}
