"""The first and last positions of the prompts of a batch, found as a stack of blocks is called."""

from __future__ import annotations

import inspect
import re
from contextvars import Token
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from leantune.core.errors import ConfigError, MethodError, describe
from leantune.core.prompt import forget, prompt_lengths, tell


def parse(text: str) -> tuple[int, int]:
    """``(first, last)`` of the authors' notation: ``f7+l7``, ``f3``, ``l1``.

    Raises:
        ConfigError: it is none of these.
    """
    found = re.fullmatch(r"f(?P<first>\d+)(?:\+l(?P<last>\d+))?|l(?P<alone>\d+)", text)
    first, last, alone = (int(number or 0) for number in found.groups()) if found else (0, 0, 0)
    last += alone
    if first + last == 0:
        wanted = "how many of the first and last positions, as f7+l7, f3 or l1"
        raise ConfigError(describe("LoReFTConfig.positions", repr(text), wanted, "try f7+l7"))
    return first, last


class Positions:
    """A forward pre-hook of one stack of blocks, and what it saw of the batch that is going through.

    Attributes:
        shape: ``(rows, length)`` of the batch; None where blocks make it up themselves (an image).
        behind_prefix: the batch goes on from a cache, so that its tokens are generated ones.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, int] | None = None
        self.behind_prefix = False
        # Of each real token its number among the row's real ones; padding has -1.
        self._number: Tensor | None = None
        self._lengths: Tensor | None = None
        self._found: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the arguments of the stack's forward."""
        given = inspect.signature(stack.forward).bind_partial(*args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        source = given.get("input_ids")
        source = given.get("inputs_embeds") if source is None else source
        self._found, self._number, self._lengths, self.shape = {}, None, None, None
        cache: Any = given.get("past_key_values")
        self.behind_prefix = hasattr(cache, "get_seq_length") and int(cache.get_seq_length()) > 0
        # An image has as many positions as its blocks are given, all of them real.
        if source is None or self.behind_prefix:
            return
        self.shape = (source.shape[0], source.shape[1])
        real = self._real(given.get("attention_mask"), source)
        self._refuse_packs(given, real)
        self._number = torch.where(real, real.cumsum(1) - 1, -1)
        self._lengths = prompt_lengths(real)

    def _real(self, mask: Any, source: Tensor) -> Tensor:
        if mask is None:
            return torch.ones(source.shape[:2], dtype=torch.bool, device=source.device)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            got = "an attention mask of its own making" if not isinstance(mask, Tensor) else f"a {mask.dim()}-D mask"
            do = "pass the mask of real tokens, without packing and without a static cache"
            raise MethodError(describe("LoReFT", got, "(rows, length), by which real tokens are counted", do))
        return mask[:, -source.shape[1] :].to(source.device).bool()

    def _refuse_packs(self, given: dict[str, Any], real: Tensor) -> None:
        places = given.get("position_ids")
        packed = given.get("cu_seq_lens_q") is not None
        if isinstance(places, Tensor) and places.dim() == 2 and places.shape == real.shape:
            both = real[:, 1:] & real[:, :-1]
            packed = packed or bool((both & (places[:, 1:] <= places[:, :-1])).any())
        if packed:
            got = "several rows packed into one, of which each has a prompt"
            raise MethodError(describe("LoReFT", got, "one row a sequence", "drop packing"))

    def find(self, first: int, last: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Which positions are the first and which the last ones, both bool ``(rows, length)``; none is both.

        Args:
            first: how many from the start of the prompt, as far as they are not among the last.
            last: how many up to its end.
            hidden: what they are positions of, ``(rows, length, width)``.

        Raises:
            MethodError: it has not the rows and positions that the stack was given.
        """
        shape = (hidden.shape[0], hidden.shape[1])
        if hidden.dim() != 3 or (self.shape is not None and shape != self.shape):
            got = f"hidden states of shape {tuple(hidden.shape)} for a batch of {self.shape}"
            raise MethodError(describe("LoReFT", got, "(rows, length, width)", "target blocks, or layers inside them"))
        if (first, last) not in self._found:
            number, lengths = self._number, self._lengths
            if number is None or lengths is None:
                number = torch.arange(shape[1], device=hidden.device).expand(shape)
                lengths = number.new_full((shape[0],), shape[1])
            end = lengths[:, None]
            inside = (number >= 0) & (number < end)
            at_end = inside & (number >= end - last)
            self._found[first, last] = (inside & (number < first) & ~at_end, at_end)
        return self._found[first, last]


class LabelHook:
    """Hooks of a whole model, whose labels tell where its prompts end for as long as it runs."""

    def __init__(self) -> None:
        self._tokens: list[Token[Tensor | None] | None] = []

    def before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A pre-hook."""
        del model, args
        labels = kwargs.get("labels")
        self._tokens.append(tell(labels) if isinstance(labels, Tensor) and labels.dim() == 2 else None)

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """A hook that is always called."""
        del model, args, output
        token = self._tokens.pop() if self._tokens else None
        if token is not None:
            forget(token)


def listen(model: nn.Module) -> None:
    """Hook a model that predicts text, once."""
    if any(isinstance(getattr(hook, "__self__", None), LabelHook) for hook in model._forward_hooks.values()):
        return
    hook = LabelHook()
    model.register_forward_pre_hook(hook.before, with_kwargs=True)
    model.register_forward_hook(hook.after, always_call=True)


def stack_of(model: nn.Module, path: str) -> nn.Module | None:
    """The innermost transformers model that holds the module at ``path``: it is given the mask; None without one."""
    parts = path.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        module = model.get_submodule(".".join(parts[:depth])) if depth else model
        if isinstance(module, PreTrainedModel):
            return module
    return None


def positions_on(stack: nn.Module, *, attach: bool = False) -> Positions | None:
    """The stack's hook, put there where ``attach`` asks for it and it is not."""
    for hook in stack._forward_pre_hooks.values():
        if isinstance(hook, Positions):
            return hook
    if not attach:
        return None
    positions = Positions()
    # First of all: a hook of somebody else's may change the arguments, and what it makes of them is not asked for.
    stack.register_forward_pre_hook(positions, with_kwargs=True, prepend=True)
    return positions


def detach(model: nn.Module) -> None:
    """Take all these hooks off a model."""
    for module in model.modules():
        hooks = (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs)
        hooks += (module._forward_hooks, module._forward_hooks_always_called)  # type: ignore[assignment]
        ours = [key for each in hooks[::2] for key, hook in each.items() if _is_ours(hook)]
        for key in ours:
            for each in hooks:
                each.pop(key, None)


def _is_ours(hook: Any) -> bool:
    return isinstance(hook, Positions) or isinstance(getattr(hook, "__self__", None), LabelHook)
