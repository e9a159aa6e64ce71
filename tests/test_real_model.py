"""One run on a real pretrained model: S2FT learns, comes back from its folder, and is the same as plain LoRA."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

import leantune
from leantune import RunConfig, convert_to_lora, fit, load_base
from leantune.models import EMBEDDED_NOTE
from leantune.testing.closeness import assert_close, assert_same
from leantune.train.record import read_metrics

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

DATA = Path(__file__).parent.parent / "examples" / "data" / "e2e_nlg"
# Four rounds over eight rows, in batches of four.
STEPS = 8
# The sums of 30 layers come in another order; each layer rounds in attention, feed-forward network and two norms.
DEPTH = 30 * 4


def logits(model: Any, tokenizer: Any) -> Tensor:
    """Logits of two real prompts, in float64."""
    lines = (DATA / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:2]
    batch = tokenizer([json.loads(line)["prompt"] for line in lines], return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model.eval()(**batch).logits
    return out[batch["attention_mask"].bool()].double()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A few steps on a few real rows."""
    folder = tmp_path_factory.mktemp("real")
    rows = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()[:8]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = RunConfig(
        model="smollm2-135m",
        data=folder / "rows.jsonl",
        out=folder / "run",
        method="s2ft",
        method_options={"ratio": 0.02},
        max_steps=STEPS,
        batch_size=4,
        warmup_ratio=0.0,
        schedule="constant",
        save_steps=0,
    )
    return fit(config, progress=False)


def test_the_loss_falls(trained: Any) -> None:
    losses = [entry["loss"] for entry in read_metrics(trained.folder / "metrics.jsonl") if "loss" in entry]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)
    # The same rows in the first and the last round.
    assert sum(losses[-2:]) < 0.85 * sum(losses[:2])


def test_the_result_says_what_the_base_is(trained: Any) -> None:
    assert EMBEDDED_NOTE in (trained.folder / "adapter" / "README.md").read_text(encoding="utf-8")


def test_saved_reloaded_and_exported_it_is_the_same_model(trained: Any, tmp_path: Path) -> None:
    tokenizer = trained.tokenizer
    native = logits(trained.model, tokenizer)
    with trained.model.disable_adapter():
        plain = logits(trained.model, tokenizer)

    base = load_base("smollm2-135m")
    assert_same(logits(base.model, tokenizer), plain, "logits of the base, before and after training beside it")
    reloaded = leantune.load(base, trained.folder / "adapter")
    assert_same(logits(reloaded, tokenizer), native, "logits after reloading")

    conversion = convert_to_lora(trained.folder / "adapter", tmp_path / "lora")
    assert conversion.max_abs_error == 0
    as_lora = PeftModel.from_pretrained(load_base("smollm2-135m").model, tmp_path / "lora")
    exported = logits(as_lora, tokenizer)
    assert_close(exported, native, torch.float32, 4, DEPTH, wrong=(plain,), what="logits of the LoRA export")
    merged = reloaded.merge_and_unload()
    assert_close(logits(merged, tokenizer), native, torch.float32, 4, DEPTH, wrong=(plain,), what="logits, merged")
