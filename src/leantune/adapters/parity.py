"""Does the exported or merged model behave as the trained one? Measured on real prompts, in a process of its own.

Weights that agree are not enough (a wrong scale field, a misread key or another base still break the result), so the
folder is loaded by stock transformers and PEFT alone and asked the same prompts as the trained model in this process.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from peft import PeftModel
from torch import Tensor, nn

from leantune.adapters import probe, record
from leantune.core.errors import ParityError, describe

DEFAULT_PROMPTS = (
    "The capital of France is",
    "Write a short sentence about the weather today.",
    "Facts: name = The Mill, food = Italian, area = riverside, price = cheap\nSentence:",
    "def fibonacci(n):\n    ",
    "Q: If a train leaves at 3 pm and travels for two hours, when does it arrive?\nA:",
    "Once upon a time, in a village by the sea,",
    "Translate to French: Good morning, my friend.",
    "The three most important rules of writing are",
)
MAX_PROMPT_TOKENS = 256

# Rounding differs in the order of sums only. Each of `depth` layers adds an error of about eps times its output, signs
# at random, so the sum grows with sqrt(depth); 16 covers the constants (three to four products a layer, the largest of
# some 10^6 logits instead of the typical one). Measured on SmolLM2-135M in float32: merged a fifth of it, as LoRA 0.
ROUNDING_FACTOR = 16.0
# Beside that, an export must be clearly nearer to the trained model than the base is: half the change (a scaling
# of 1/2, one matrix of two left out) stands at 0.5, none of it at 1.
LARGEST_SHARE = 1 / 3


@dataclass(frozen=True)
class Parity:
    """How far two models are apart on the same prompts.

    Attributes:
        prompts: how many.
        positions: token positions compared (rows of logits).
        max_abs_logit_difference: over all of them.
        mean_kl: mean KL divergence of the next-token distributions, trained against exported, in nats.
        max_kl: the largest one.
        argmax_agreement: share of positions where both put the same token first.
        greedy_agreement: share of prompts whose greedy continuation is the same token for token; ``None`` untested.
        new_tokens: length of these continuations.
        ties: positions and continuations that differ where the trained model itself was undecided within the tolerance.
        adapter_effect: root mean square logit difference between the trained model and its base.
        remaining_share: root mean square difference left after the export, as a share of that effect.
        tolerance: allowed ``max_abs_logit_difference``.
        reason: where the tolerance comes from.
        problems: what does not hold; empty when the export is proven.
    """

    prompts: int
    positions: int
    max_abs_logit_difference: float
    mean_kl: float
    max_kl: float
    argmax_agreement: float
    greedy_agreement: float | None
    new_tokens: int
    ties: int
    adapter_effect: float
    remaining_share: float | None
    tolerance: float
    reason: str
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {**asdict(self), "problems": list(self.problems), "ok": self.ok}

    def require(self, what: str) -> Parity:
        """Itself when everything holds.

        Raises:
            ParityError: it does not; the numbers are in the text.
        """
        if self.ok:
            return self
        raise ParityError(
            describe(
                what,
                "does not behave as the trained model (" + "; ".join(self.problems) + ")",
                f"the same answers up to rounding; max logit difference {self.max_abs_logit_difference:.3g}, mean KL "
                f"{self.mean_kl:.3g} nats, argmax agreement {self.argmax_agreement:.2%}",
                "do not ship it; in float32 it may hold where reduced precision does not",
            )
        )


@dataclass
class Exported:
    """How stock transformers (and PEFT) load the model to compare with.

    Attributes:
        model: path or Hub id for ``from_pretrained``.
        adapter: LoRA folder on top of it, or ``None``.
        auto_class: name of the transformers Auto class.
        options: more arguments of ``from_pretrained`` (e.g. ``gguf_file``).
    """

    model: str
    adapter: str | None = None
    auto_class: str = "AutoModelForCausalLM"
    options: dict[str, Any] | None = None


def prompt_ids(prompts: Sequence[str] | Sequence[list[int]] | None, tokenizer: Any) -> list[list[int]]:
    """Token ids of prompts; of a few built-in texts when none are given.

    Raises:
        ParityError: there are texts but no tokenizer.
    """
    chosen: list[Any] = list(prompts or ())
    if not chosen and hasattr(tokenizer, "image_mean"):
        raise ParityError(describe("prompts", "none for an image model", "images as numbers", "pass prompts=..."))
    chosen = chosen or list(DEFAULT_PROMPTS)
    if not any(isinstance(prompt, str) for prompt in chosen):
        found: list[Any] = [prompt if isinstance(prompt, numpy.ndarray) else list(prompt) for prompt in chosen]
        return found
    if tokenizer is None:
        raise ParityError(describe("prompts", "texts without a tokenizer", "token ids", "pass the tokenizer"))
    return [list(tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt) for prompt in chosen]


def stop_ids(tokenizer: Any) -> list[int]:
    """The token ids that end a continuation."""
    token = getattr(tokenizer, "eos_token_id", None)
    return [] if token is None else [int(token)]


def compare(
    native: nn.Module,
    exported: Exported,
    prompts: Sequence[list[int]],
    *,
    new_tokens: int = 32,
    stop: Sequence[int] = (),
    adapter_name: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Parity:
    """Ask both models the same prompts; the exported one in a process that cannot import leantune.

    Args:
        native: the trained model in this process (its active adapter, or ``adapter_name``).
        exported: what to compare with.
        prompts: token ids of each prompt.
        new_tokens: length of the greedy continuations; 0 for none (classifiers have none).
        stop: token ids that end a continuation.
        adapter_name: which adapter of ``native``.
        progress: told what happens, in words.

    Raises:
        ParityError: no prompt, or the exported model could not be loaded.
    """
    images = [prompt for prompt in prompts if isinstance(prompt, numpy.ndarray)]
    ids: list[Any] = images or [list(prompt)[:MAX_PROMPT_TOKENS] for prompt in prompts if len(prompt)]
    if not ids:
        raise ParityError(describe("prompts", "none", "at least one with a token in it", "give prompts"))
    say = progress or (lambda _: None)
    with tempfile.TemporaryDirectory(prefix="leantune-parity-") as scratch, _asked(native, adapter_name):
        say("asking the exported model in a process without leantune")
        answers = _ask_elsewhere(exported, ids, native, Path(scratch), new_tokens, list(stop))
        say("asking the trained model")
        return _measure(native, ids, Path(scratch), answers, new_tokens, list(stop))


@contextmanager
def _asked(model: nn.Module, adapter_name: str | None) -> Iterator[None]:
    """Evaluation mode and the named adapter while asking; everything as before afterwards."""
    modes = {name: module.training for name, module in model.named_modules()}
    tuner: Any = model.base_model if isinstance(model, PeftModel) else None
    before = tuner.active_adapters if tuner is not None else None
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    switch = tuner is not None and adapter_name is not None and before != [adapter_name]
    try:
        model.eval()
        if switch:
            tuner.set_adapter(adapter_name)
        yield
    finally:
        if switch:
            tuner.set_adapter(before)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(flags[name])
        for name, module in model.named_modules():
            module.training = modes[name]


def _ask_elsewhere(
    exported: Exported, ids: list[list[int]], native: nn.Module, scratch: Path, new_tokens: int, stop: list[int]
) -> list[list[int]]:
    inner = native.get_base_model() if isinstance(native, PeftModel) else native
    job = {
        "path": sys.path,
        "threads": torch.get_num_threads(),
        "auto_class": exported.auto_class,
        "dtype": record.model_dtype(inner),
        "options": {"attn_implementation": _attention(inner), **(exported.options or {})},
        "model": exported.model,
        "adapter": exported.adapter,
        "out": str(scratch),
        "prompts": [None if isinstance(prompt, numpy.ndarray) else prompt for prompt in ids],
        "new_tokens": new_tokens,
        "stop": stop,
    }
    for number, prompt in enumerate(ids):
        if isinstance(prompt, numpy.ndarray):
            numpy.save(scratch / f"image-{number}.npy", prompt)
    job_path = scratch / "job.json"
    job_path.write_text(json.dumps(job), encoding="utf-8")
    # -I: neither the current folder nor PYTHONPATH may bring modules in; the job names where packages are.
    result = subprocess.run(
        [sys.executable, "-I", str(Path(probe.__file__)), str(job_path)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        check=False,
    )
    answers = scratch / "answers.json"
    if result.returncode or not answers.exists():
        tail = " | ".join(result.stderr.strip().splitlines()[-3:]) or f"exit status {result.returncode}"
        raise ParityError(
            describe(
                str(exported.adapter or exported.model),
                f"stock transformers and PEFT could not load and run it ({tail})",
                "a folder that works without leantune",
                "check that the base model is where the config says",
            )
        )
    return list(json.loads(answers.read_text(encoding="utf-8")))


def _attention(model: nn.Module) -> str:
    # The same attention code on both sides: another one rounds otherwise, and that is not the export's doing.
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return str(name) if name in ("eager", "sdpa") else "sdpa"


class _Sums:
    """Running numbers over prompts, so that no more than one prompt's logits are ever held."""

    def __init__(self) -> None:
        self.positions = 0
        self.values = 0
        self.max_difference = 0.0
        self.squared_difference = 0.0
        self.squared_effect = 0.0
        self.kl = 0.0
        self.max_kl = 0.0
        self.agree = 0
        self.scale = 0.0
        self.disagreement_leads: list[float] = []

    def add(self, native: Tensor, other: Tensor, base: Tensor | None) -> None:
        if native.shape != other.shape:
            got = f"{tuple(other.shape)} from the exported model"
            raise ParityError(describe("logits", got, f"{tuple(native.shape)}", "check the base model"))
        answers = [native, other] if base is None else [native, other, base]
        # In blocks of rows: float64 copies of a whole prompt's logits would be the largest thing in memory.
        for block in zip(*(logits.reshape(-1, logits.shape[-1]).split(64) for logits in answers), strict=True):
            self._add_rows(*(logits.double() for logits in block))

    def _add_rows(self, native: Tensor, other: Tensor, base: Tensor | None = None) -> None:
        difference = (native - other).abs()
        self.positions += native.shape[0]
        self.values += native.numel()
        # A value that is not a number must not pass: every comparison with it is false.
        self.max_difference = max(self.max_difference, _worst(difference.max()))
        self.squared_difference += float((difference**2).sum())
        self.scale = max(self.scale, float(native.abs().max()))
        kl = (native.log_softmax(-1).exp() * (native.log_softmax(-1) - other.log_softmax(-1))).sum(-1)
        self.kl += float(kl.sum())
        self.max_kl = max(self.max_kl, _worst(kl.max()))
        same = native.argmax(-1) == other.argmax(-1)
        self.agree += int(same.sum())
        if native.shape[-1] > 1:
            best = native.topk(2, dim=-1).values
            self.disagreement_leads += (best[:, 0] - best[:, 1])[~same].tolist()
        if base is not None:
            self.squared_effect += float(((native - base) ** 2).sum())


def _worst(value: Tensor) -> float:
    return math.inf if math.isnan(value.item()) else float(value)


def _measure(
    native: nn.Module, ids: list[list[int]], scratch: Path, answers: list[list[int]], new_tokens: int, stop: list[int]
) -> Parity:
    sums = _Sums()
    continuations: list[tuple[bool, float]] = []
    for number, prompt in enumerate(ids):
        other = torch.from_numpy(numpy.load(scratch / f"{number}.npy"))
        base = None
        if isinstance(native, PeftModel):
            with native.disable_adapter():
                base = probe.logits_of(native, prompt)
        sums.add(probe.logits_of(native, prompt), other, base)
        if new_tokens:
            chosen, leads = probe.greedy(native, prompt, new_tokens, stop)
            continuations.append(_first_difference(chosen, leads, answers[number]))
    return _judge(native, sums, continuations, len(ids), new_tokens)


def _first_difference(chosen: list[int], leads: list[float], other: list[int]) -> tuple[bool, float]:
    """Whether two continuations are the same, and how sure the trained model was where they part."""
    if chosen == other:
        return True, 0.0
    for position, token in enumerate(chosen):
        if position >= len(other) or other[position] != token:
            return False, leads[position]
    return False, math.inf


def _judge(
    native: nn.Module, sums: _Sums, continuations: list[tuple[bool, float]], prompts: int, new_tokens: int
) -> Parity:
    inner = native.get_base_model() if isinstance(native, PeftModel) else native
    dtype = record.model_dtype(inner)
    depth = int(getattr(getattr(inner, "config", None), "num_hidden_layers", 1) or 1)
    eps = torch.finfo(getattr(torch, dtype)).eps
    tolerance = ROUNDING_FACTOR * math.sqrt(depth) * eps * max(sums.scale, 1.0)
    reason = (
        f"{ROUNDING_FACTOR:g} * sqrt(depth {depth}) * eps({dtype}) {eps:.3g} * largest logit {max(sums.scale, 1.0):.3g}"
    )
    rms = math.sqrt(sums.squared_difference / sums.values)
    effect = math.sqrt(sums.squared_effect / sums.values)
    share = rms / effect if effect > 0 else None
    undecided = 2 * tolerance
    ties = sum(lead <= undecided for lead in sums.disagreement_leads)
    wrong = len(sums.disagreement_leads) - ties
    parted = [lead for same, lead in continuations if not same]
    ties += sum(lead <= undecided for lead in parted)
    wrong_texts = sum(lead > undecided for lead in parted)
    problems = []
    if not sums.max_difference <= tolerance:
        problems.append(f"max logit difference {sums.max_difference:.3g} above {tolerance:.3g} = {reason}")
    if effect > tolerance and share is not None and not share <= LARGEST_SHARE:
        problems.append(
            f"{share:.0%} of the adapter's effect is lost (root mean square {rms:.3g} of {effect:.3g}), "
            f"allowed {LARGEST_SHARE:.0%}"
        )
    if wrong:
        problems.append(f"another first token at {wrong} of {sums.positions} positions")
    if wrong_texts:
        problems.append(f"another greedy text for {wrong_texts} of {prompts} prompts")
    same_texts = sum(same for same, _ in continuations)
    return Parity(
        prompts=prompts,
        positions=sums.positions,
        max_abs_logit_difference=sums.max_difference,
        mean_kl=sums.kl / sums.positions,
        max_kl=sums.max_kl,
        argmax_agreement=sums.agree / sums.positions,
        greedy_agreement=same_texts / len(continuations) if continuations else None,
        new_tokens=new_tokens,
        ties=ties,
        adapter_effect=effect,
        remaining_share=share,
        tolerance=tolerance,
        reason=reason,
        problems=tuple(problems),
    )
