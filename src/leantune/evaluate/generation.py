"""Batched generation: prompts in, new text out, in the order they came."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig

from leantune.core.errors import DataError, describe
from leantune.data import text_ids
from leantune.evaluate.mode import device_of, evaluating

Progress = Callable[[str, int, int], None]

# After so many new tokens the rows that have ended leave the batch: their places cost as much as live ones.
_STRETCH_TOKENS = 8


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a text: the tokenizer's and those the model was published with."""
    published = getattr(model.generation_config, "eos_token_id", None)
    ids = list(published) if isinstance(published, (list, tuple)) else [published]
    return list(dict.fromkeys(token for token in [tokenizer.eos_token_id, *ids] if token is not None))


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Hide the generation settings a model was published with: a temperature or repetition penalty is not greedy."""
    holders = [module for module in model.modules() if getattr(module, "generation_config", None) is not None]
    published = [module.generation_config for module in holders]
    for module in holders:
        module.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for module, config in zip(holders, published, strict=True):
            module.generation_config = config


def _check_room(model: Any, prompts: list[list[int]], max_new_tokens: int) -> None:
    room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    if room is not None and len(prompts[longest]) + max_new_tokens > room:
        raise DataError(
            describe(
                f"prompt {longest + 1}",
                f"{len(prompts[longest])} tokens",
                f"at most {room - max_new_tokens}: the model has {room} positions, and {max_new_tokens} are to come",
                "shorten the prompt or lower max_new_tokens",
            )
        )


class _Decoder:
    """Continues one batch of prompts at a time, letting rows that have ended leave early."""

    def __init__(
        self, model: Any, tokenizer: Any, stop: Sequence[str], max_new_tokens: int, sampling: dict[str, Any]
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.stop = stop
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling
        self.ends = _end_ids(model, tokenizer)
        self.pad = next((token for token in [tokenizer.pad_token_id, *self.ends] if token is not None), 0)
        self.device = device_of(model)
        # PEFT puts a trained prompt in front whenever it is given a cache: it gets none that has one already.
        is_prompted = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
        self.stretch = max_new_tokens if is_prompted else _STRETCH_TOKENS

    def _config(self, new_tokens: int) -> GenerationConfig:
        return GenerationConfig(
            max_new_tokens=new_tokens,
            eos_token_id=self.ends or None,
            pad_token_id=self.pad,
            use_cache=True,
            return_dict_in_generate=True,
            **self.sampling,
        )

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _new_text(self, prompt: list[int], new: list[int]) -> tuple[str, bool]:
        """The text of new ids, and whether it has ended: at a token that ends a text, or before a stop string."""
        ends = [position for position, token in enumerate(new) if token in self.ends]
        kept = new[: ends[0]] if ends else new
        # Decoded behind the prompt: some tokenizers drop the space before the first token they are given.
        before = self._text(prompt)
        text = self._text(prompt + kept)[len(before) :]
        marks = [place for mark in self.stop if (place := text.find(mark)) >= 0]
        return text[: min(marks, default=len(text))], bool(ends or marks)

    def __call__(self, prompts: list[list[int]]) -> list[str]:
        """The new text of each prompt."""
        width = max(len(prompt) for prompt in prompts)
        padded = [[self.pad] * (width - len(prompt)) + prompt for prompt in prompts]
        seen = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        tokens = torch.tensor(padded, device=self.device)
        mask = torch.tensor(seen, device=self.device)
        texts = [""] * len(prompts)
        live, cache = list(range(len(prompts))), None
        while live and (made := tokens.shape[1] - width) < self.max_new_tokens:
            config = self._config(min(self.stretch, self.max_new_tokens - made))
            result = self.model.generate(
                input_ids=tokens, attention_mask=mask, past_key_values=cache, generation_config=config
            )
            cache = result.past_key_values
            ended = []
            for place, index in enumerate(live):
                texts[index], is_done = self._new_text(prompts[index], result.sequences[place, width:].tolist())
                ended.append(is_done)
            keep = [place for place, is_done in enumerate(ended) if not is_done]
            tokens = result.sequences[keep]
            mask = torch.nn.functional.pad(mask[keep], (0, tokens.shape[1] - mask.shape[1]), value=1)
            if keep and len(keep) < len(live):
                cache.batch_select_indices(torch.tensor(keep, device=self.device))
            live = [live[place] for place in keep]
        return texts


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[list[int]],
    *,
    max_new_tokens: int = 48,
    batch_size: int = 32,
    stop: str | Sequence[str] | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Continue prompts, greedily unless asked to sample.

    Settings the model was published with (a repetition penalty, a temperature) do not count.

    Args:
        model: a causal language model or a PeftModel over one. Its training flags are left as they were.
        tokenizer: its tokenizer; left as it is.
        prompts: texts, tokenised as training prompts are; or token ids (:func:`leantune.data.prompt_ids`), taken as
            they stand.
        max_new_tokens: most new tokens a prompt.
        batch_size: prompts at once. Prompts are sorted by length, padded on the left, and answered in the order given.
        stop: a string or strings to end at besides the end-of-text token; they are not part of the result.
        do_sample: draw from the distribution instead of taking the likeliest token.
        temperature: divides the logits, when sampling.
        top_p: keep the likeliest tokens of this much probability, when sampling.
        seed: seed of the draws; the global random state is left alone. None: the global state is used.
        progress: called as ``progress("generate", done, total)`` after each batch, in prompts.

    Returns:
        The new text of each prompt, without special tokens; leading white space is kept.

    Raises:
        DataError: a prompt and its new tokens do not fit the model's positions.
    """
    ids = [text_ids(prompt, tokenizer) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    if not ids:
        return []
    _check_room(model, ids, max_new_tokens)
    marks = [stop] if isinstance(stop, str) else list(stop or [])
    sampling: dict[str, Any] = {"do_sample": do_sample}
    if do_sample:
        sampling.update(temperature=temperature, top_p=top_p, top_k=0)
    decode = _Decoder(model, tokenizer, marks, max_new_tokens, sampling)
    # Longest first, so that a batch too big for the memory fails at once.
    order = sorted(range(len(ids)), key=lambda index: -len(ids[index]))
    texts = [""] * len(ids)
    with evaluating(model), _own_settings(model), _seeded(seed):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for index, text in zip(chosen, decode([ids[index] for index in chosen]), strict=True):
                texts[index] = text
            if progress is not None:
                progress("generate", start + len(chosen), len(order))
    return texts


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
