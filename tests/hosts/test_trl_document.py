"""The scripts in docs/trl.md, run as they stand there but for the model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from host_model import frozen
from peft import PeftModel
from transformers import AutoModelForCausalLM

import tiny
from leantune.testing.closeness import assert_differs, assert_same_state
from leantune.testing.subject import no_grad_logits

DOCUMENT = Path(__file__).parents[2] / "docs" / "trl.md"
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


# 2026-11-23: TRL 1.16.0 sets transformers' old name of activation checkpointing.
# 2026-11-25: transformers pins memory unless told otherwise, also where there is nothing to pin it for.
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_the_scripts_run(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    original = AutoModelForCausalLM.from_pretrained(base_folder).state_dict()
    for kind, script in zip(("sft", "dpo", "grpo"), scripts, strict=True):
        assert script.count(MODEL) == 1
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(script.replace(MODEL, base_folder.as_posix()), f"{DOCUMENT.name}: {kind}", "exec"), names)
        trainer = names["trainer"]
        assert trainer.state.global_step == trainer.args.max_steps
        assert_same_state(frozen(trainer.model), original, "the base after training")
        base = AutoModelForCausalLM.from_pretrained(base_folder).eval()
        plain = no_grad_logits(base, tiny.ids())
        loaded = PeftModel.from_pretrained(base, tmp_path / "runs" / kind / "adapter").eval()
        assert_differs(no_grad_logits(loaded, tiny.ids()), plain, "logits of the saved adapter")
