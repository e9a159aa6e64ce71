"""One answer, handed out while it is written."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from leantune.core.errors import DataError, describe
from leantune.evaluate.generation import _end_ids, _own_settings, _seeded
from leantune.evaluate.mode import device_of, evaluating

# How often a waiting reader looks up: an interrupt is noticed then on systems whose locks cannot be interrupted.
_TICK = 0.2  # seconds


class _Stop(StoppingCriteria):
    """Ends generation after the token in progress, once the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **keywords: Any) -> torch.Tensor:
        del scores, keywords
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class _Pieces(TextIteratorStreamer):
    """A streamer without the token that ends the text: a tokenizer need not count it among its special ones."""

    def __init__(self, tokenizer: Any, ends: list[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.ends = ends

    def put(self, value: torch.Tensor) -> None:
        """New tokens; the first call brings the prompt."""
        if self.next_tokens_are_prompt or int(value.reshape(-1)[-1]) not in self.ends:
            super().put(value)


def stream(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Continue one prompt; the text comes in pieces, as soon as a piece is sure.

    Settings the model was published with do not count, as in :func:`leantune.evaluate.generate`. Closing the iterator,
    or an exception where it is read (Ctrl-C), ends the generation after the token in progress.

    Args:
        model: a causal language model or a PeftModel over one.
        tokenizer: its tokenizer.
        prompt: token ids, taken as they stand.
        max_new_tokens: most new tokens; fewer where the model has fewer positions left.
        temperature: divides the logits; 0 takes the likeliest token each time.
        top_p: keep the likeliest tokens of this much probability, when drawing.
        seed: of the draws; the global random state is left alone. None: the global state is used.

    Raises:
        DataError: the prompt leaves no room for an answer.
    """
    new_tokens = min(max_new_tokens, _room(model, prompt))
    ends = _end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(ends), 0)
    sampling: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        sampling |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    config = GenerationConfig(max_new_tokens=new_tokens, eos_token_id=ends or None, pad_token_id=pad, **sampling)
    streamer = _Pieces(tokenizer, ends)
    stopping = threading.Event()
    failure: list[BaseException] = []
    tokens = torch.tensor([prompt], device=device_of(model))

    def work() -> None:
        try:
            model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=config,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_Stop(stopping)]),
            )
        except BaseException as error:
            failure.append(error)
            streamer.end()

    with evaluating(model), _own_settings(model), _seeded(seed):
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield from _pieces(streamer)
        finally:
            stopping.set()
            thread.join()
    if failure:
        raise failure[0]


def _pieces(streamer: _Pieces) -> Iterator[str]:
    while True:
        try:
            piece = streamer.text_queue.get(timeout=_TICK)
        except queue.Empty:
            continue
        if piece is streamer.stop_signal:
            return
        if piece:
            yield piece


def _room(model: Any, prompt: list[int]) -> int:
    """How many tokens may still come."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    room = 2**31 if positions is None else positions - len(prompt)
    if room < 1:
        raise DataError(
            describe("prompt", f"{len(prompt)} tokens", f"fewer than the model's {positions} positions", "shorten it")
        )
    return room
