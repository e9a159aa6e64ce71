"""Tokenizers and language models made in code, small enough to check token by token."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from leantune.testing.model import exact_norms, scatter_weights

CORPUS = [
    "Facts: name[Blue Spice], area[city centre]\nSentence: The Blue Spice is in the city centre.",
    "Facts: name[Loch Fyne], food[French]\nSentence: Loch Fyne serves French food.",
    "user: hello there\nassistant: good evening, how can I help?",
    "abcabcabc abc bcd bcd bcd, one two three four",
]

CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MARKED_CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# As reasoning models do: what an earlier assistant turn thought is gone once another message follows.
FORGETFUL = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@cache
def _byte_model(merged: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 if merged else 256,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


def byte_tokenizer(
    *, opening: bool = False, closing: bool = False, template: str | None = None
) -> PreTrainedTokenizerFast:
    """A byte-level BPE, as GPT-2, Llama 3 and SmolLM have: every text goes there and back.

    Args:
        opening: whether it puts its begin-of-text token before a text.
        closing: whether it puts its end-of-text token after a text.
        template: chat template.
    """
    tokenizer = Tokenizer.from_str(_byte_model(True))
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>", "<|pad|>", "<|start|>"])
    single = f"{'<|begin|> ' if opening else ''}$A{' <|end|>' if closing else ''}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single,
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("<|begin|>", "<|end|>")],
    )
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>"
    )
    found.chat_template = template
    return found


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE over words that carry their leading space as a mark, put before the first word too, as Llama 2 has."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def llama(
    vocabulary: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, positions: int = 256
) -> LlamaForCausalLM:
    """A two-layer Llama with grouped-query attention whose weights are all noise; exact in float64."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    exact_norms(scatter_weights(model, seed, dtype))
    with torch.no_grad():
        # Peaked outputs: greedy choices are far apart, and texts differ from prompt to prompt.
        model.lm_head.weight.mul_(6.0)
    return model.eval()
