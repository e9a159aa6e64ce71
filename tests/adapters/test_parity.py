"""The judge of exports: it must tell right from wrong, in a process that really has no leantune."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from adapter_models import PROMPTS, make_tokenizer, state_of
from peft import PeftModel

import leantune
from leantune.adapters import folder as adapter_folder
from leantune.adapters import layer as layers
from leantune.adapters import parity, probe
from leantune.core.errors import ParityError
from leantune.testing.closeness import assert_same_state

Maker = Callable[..., Any]


@pytest.fixture
def ask_here(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Let a model of this process stand for the exported one, so that many faults can be tried quickly."""

    def stand_in(model: Any) -> None:
        def ask(exported: Any, ids: Any, native: Any, scratch: Path, new_tokens: int, stop: list[int]) -> Any:
            for number, prompt in enumerate(ids):
                numpy.save(scratch / f"{number}.npy", probe.logits_of(model, prompt).numpy())
            return [probe.greedy(model, prompt, new_tokens, stop)[0] for prompt in ids] if new_tokens else []

        monkeypatch.setattr(parity, "_ask_elsewhere", ask)

    return stand_in


def judge(native: Any, **options: Any) -> parity.Parity:
    return parity.compare(native, parity.Exported("unused"), PROMPTS, **{"new_tokens": 6, "stop": [1], **options})


def scaled(model: PeftModel, factor: float) -> PeftModel:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data *= factor
    return model


def test_the_same_model_passes(s2ft: Maker, family: str, ask_here: Maker) -> None:
    ask_here(s2ft(family))
    result = judge(s2ft(family))
    assert result.require("it").ok
    assert result.max_abs_logit_difference == result.mean_kl == 0
    assert result.argmax_agreement == result.greedy_agreement == 1
    assert (result.prompts, result.positions) == (len(PROMPTS), sum(len(prompt) for prompt in PROMPTS))
    assert result.adapter_effect > 0.1
    assert 0 < result.tolerance < 1e-3
    assert json.loads(json.dumps(result.to_dict()))["ok"] is True


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.98, 2.0, -1.0])
def test_a_wrong_scaling_fails(factor: float, s2ft: Maker, ask_here: Maker) -> None:
    ask_here(scaled(s2ft(), factor))
    result = judge(s2ft())
    assert not result.ok
    with pytest.raises(ParityError, match=r"max logit difference .* above"):
        result.require("LoRA export")


def test_one_wrong_module_fails(s2ft: Maker, ask_here: Maker) -> None:
    other = s2ft()
    layer: Any = layers.adapted_modules(other, "default")[0][1]
    layer.s2ft_slice["default"].weight.data[0] *= -1
    ask_here(other)
    assert not judge(s2ft()).ok


def test_a_value_that_is_no_number_fails(s2ft: Maker, ask_here: Maker) -> None:
    ask_here(scaled(s2ft(), math.nan))
    result = judge(s2ft(), new_tokens=0)
    assert not result.ok
    assert result.max_abs_logit_difference == math.inf


def test_rounding_passes(s2ft: Maker, ask_here: Maker) -> None:
    """The same function in float64: what rounding alone does stays below the tolerance."""
    ask_here(s2ft().double())
    result = judge(s2ft())
    assert result.ok
    assert 0 < result.max_abs_logit_difference < result.tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_the_adapter_fails_in_low_precision_too(dtype: torch.dtype, s2ft: Maker, ask_here: Maker) -> None:
    """There the tolerance of the largest logit is wide; the share of the adapter's effect still tells."""
    native = s2ft().to(dtype)
    ask_here(s2ft().to(dtype))
    assert judge(native).ok
    for factor in (0.0, 0.5):
        ask_here(scaled(s2ft(), factor).to(dtype))
        result = judge(native)
        assert any("of the adapter's effect is lost" in problem for problem in result.problems)


def test_a_tie_is_no_difference(s2ft: Maker) -> None:
    """Where the trained model cannot tell two tokens apart, either is right; where it can, only one is."""
    sums = parity._Sums()
    native = torch.tensor([[1.0, 1.0 - 1e-7, 0.0], [3.0, 1.0, 0.0]])
    flipped = native[:, [1, 0, 2]]
    sums.add(native[:1], flipped[:1], None)
    result = parity._judge(s2ft(), sums, [(True, 0.0), (False, 1e-7)], 2, 4)
    assert (result.ok, result.ties, result.argmax_agreement, result.greedy_agreement) == (True, 2, 0.0, 0.5)
    result = parity._judge(s2ft(), sums, [(True, 0.0), (False, 2.0)], 2, 4)
    assert result.problems == ("another greedy text for 1 of 2 prompts",)
    sums.add(native[1:], flipped[1:], None)
    sums.max_difference = 0.0
    assert "another first token at 1 of 2 positions" in parity._judge(s2ft(), sums, [], 2, 0).problems


@pytest.mark.parametrize(
    ("other", "expected"),
    [([5, 6, 7], (True, 0.0)), ([5, 9, 7], (False, 0.2)), ([5, 6], (False, 0.3)), ([5, 6, 7, 8], (False, math.inf))],
)
def test_where_texts_part(other: list[int], expected: tuple[bool, float]) -> None:
    assert parity._first_difference([5, 6, 7], [0.1, 0.2, 0.3], other) == expected


def test_kl_is_that_of_the_distributions(s2ft: Maker, ask_here: Maker) -> None:
    other = scaled(s2ft(), 0.5)
    ask_here(other)
    result = judge(s2ft())
    native = s2ft()
    total, worst, positions = 0.0, 0.0, 0
    for prompt in PROMPTS:
        p, q = (torch.distributions.Categorical(logits=probe.logits_of(m, prompt).double()) for m in (native, other))
        kl = torch.distributions.kl_divergence(p, q)
        total, worst, positions = total + kl.sum().item(), max(worst, kl.max().item()), positions + len(prompt)
    assert result.mean_kl == pytest.approx(total / positions, rel=1e-9)
    assert result.max_kl == pytest.approx(worst, rel=1e-9)


def test_asking_changes_nothing(s2ft: Maker, ask_here: Maker, tmp_path: Path) -> None:
    model = s2ft().train()
    leantune.load(model, adapter_folder.save(s2ft(seed=9), tmp_path / "other"), adapter_name="other")
    model.train()
    ask_here(s2ft(seed=9))
    before, active = state_of(model), list(model.active_adapters)
    assert judge(model, adapter_name="other").ok
    assert_same_state(state_of(model), before)
    assert model.active_adapters == active
    assert not judge(model).ok


def test_prompts(s2ft: Maker, ask_here: Maker) -> None:
    ask_here(s2ft())
    with pytest.raises(ParityError, match="prompts: none"):
        parity.compare(s2ft(), parity.Exported("unused"), [[]])
    tokenizer = make_tokenizer()
    assert parity.prompt_ids(["w1 w2", [7]], tokenizer) == [[4, 5], [7]]
    assert len(parity.prompt_ids(None, tokenizer)) == len(parity.DEFAULT_PROMPTS)
    with pytest.raises(ParityError, match="without a tokenizer"):
        parity.prompt_ids(None, None)
    assert parity.stop_ids(tokenizer) == [1]
    assert parity.stop_ids(None) == []


def test_greedy_is_what_the_model_generates(s2ft: Maker, base: Maker) -> None:
    model = s2ft()
    for prompt in PROMPTS:
        chosen, leads = probe.greedy(model, prompt, 8, [1])
        text = model.generate(input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        assert chosen == text.tolist()
        assert len(leads) == len(chosen)


@pytest.mark.slow
def test_the_other_process_has_no_leantune(s2ft: Maker, base_folders: dict[str, Path], tmp_path: Path) -> None:
    """A native folder, which stock PEFT cannot read, must fail there, though leantune is installed for this Python."""
    saved = adapter_folder.save(s2ft(), tmp_path / "adapter")
    with pytest.raises(ParityError, match=r"could not load and run it .*S2FT"):
        parity.compare(s2ft(), parity.Exported(str(base_folders["llama"]), str(saved)), PROMPTS)


@pytest.mark.slow
def test_a_scale_that_a_reader_takes_otherwise_fails(
    s2ft: Maker, base_folders: dict[str, Path], tmp_path: Path
) -> None:
    leantune.convert_to_lora(s2ft("gpt2"), tmp_path / "lora")
    exported = parity.Exported(str(base_folders["gpt2"]), str(tmp_path / "lora"))
    path = tmp_path / "lora" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": True}))
    assert not parity.compare(s2ft("gpt2"), exported, PROMPTS, new_tokens=6).ok
