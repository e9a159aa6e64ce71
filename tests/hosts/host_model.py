"""The tiny base, adapter and tokenizer that the host tests train."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import tiny
from leantune.testing.subject import trained

OPTIONS: dict[str, Any] = {"heads": 1, "channels": 3, "task_type": "CAUSAL_LM"}


def base() -> Any:
    return tiny.model("llama", torch.float32)


def values(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the parameters that train."""
    return {name: value.detach().clone() for name, value in trained(model).items()}


def frozen(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the base weights under the names that they have without an adapter."""
    state = model.get_base_model().state_dict()
    plain = {name.replace(".base_layer.", "."): value.clone() for name, value in state.items()}
    known = base().state_dict()
    return {name: value for name, value in plain.items() if name in known}


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{number}" for number in range(tiny.VOCABULARY - 4))]
    inner = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    )
