"""What an adapter folder tells about itself, and its card."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_models import TARGETS
from peft import get_peft_model_state_dict

import leantune
from leantune.adapters import card, inspect_adapter
from leantune.adapters import folder as adapter_folder
from leantune.core.errors import AdapterError
from leantune.models import load_base

Maker = Callable[..., Any]


def test_s2ft(s2ft: Maker, base_folders: dict[str, Path], tmp_path: Path) -> None:
    base = load_base(str(base_folders["llama"]))
    model = s2ft()
    facts = inspect_adapter(adapter_folder.save(model, tmp_path / "adapter", base=base))
    assert json.loads(json.dumps(facts)) == facts
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert (facts["method"], facts["peft_type"], facts["task_type"]) == ("s2ft", "S2FT", "CAUSAL_LM")
    assert facts["parameters"] == trained == sum(module["parameters"] for module in facts["modules"].values())
    assert facts["bytes"] == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert facts["dtypes"] == ["float32"]
    assert facts["achieved_ratio"] == model.peft_config["default"].achieved_ratio
    assert facts["base"]["content_hash"] == base.content_hash
    assert facts["config"] == {
        "target_modules": sorted(TARGETS["llama"]),
        "heads": 1,
        "channels": 3,
        "achieved_ratio": facts["achieved_ratio"],
    }
    assert len(facts["modules"]) == 2 * len(TARGETS["llama"])
    module = facts["modules"]["model.layers.1.mlp.down_proj"]
    assert module["tensors"]["s2ft_slice.weight"] == {"shape": [16, 3], "dtype": "float32"}
    assert module["tensors"]["s2ft_slice.index"] == {"shape": [3], "dtype": "int64"}
    assert (module["parameters"], module["bytes"]) == (48, 48 * 4 + 3 * 8)


def test_stock_lora_without_a_record(lora: Maker, tmp_path: Path) -> None:
    model = lora(modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    facts = inspect_adapter(tmp_path)
    state = get_peft_model_state_dict(model)
    assert facts["parameters"] == sum(tensor.numel() for tensor in state.values())
    assert (facts["method"], facts["rank"], facts["achieved_ratio"]) == ("lora", 2, None)
    assert facts["base"] == {"name": model.peft_config["default"].base_model_name_or_path}
    assert facts["modules"]["lm_head"]["tensors"] == {"weight": {"shape": [40, 16], "dtype": "float32"}}
    assert json.dumps(facts)


def test_an_export(s2ft: Maker, tmp_path: Path) -> None:
    leantune.convert_to_lora(s2ft(), tmp_path / "lora")
    facts = inspect_adapter(tmp_path / "lora")
    assert (facts["method"], facts["peft_type"]) == ("lora", "LORA")
    assert facts["rank"] == facts["config"]["lora_alpha"]


def test_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="holds nothing"):
        inspect_adapter(tmp_path)


class TestCard:
    """The README of a folder."""

    FACTS: dict[str, Any] = {  # noqa: RUF012
        "kind": "adapter",
        "method": "s2ft",
        "task_type": "CAUSAL_LM",
        "base": {
            "name": "smollm2-135m",
            "source": "embedded",
            "hub_id": None,
            "note": "a copy",
            "content_hash": "sha256:1",
        },
        "parameters": 1234,
        "achieved_ratio": 0.02,
        "leantune": "0",
    }

    def test_says_how_to_load_it(self) -> None:
        text = card.render(self.FACTS)
        assert 'leantune.load_base("smollm2-135m")' in text
        assert "`import leantune` first" in text
        assert "bare `KeyError`" in text
        assert "a copy" in text
        assert "2.0000%" in text
        assert "sha256:1" in text

    def test_says_how_the_base_was_loaded(self) -> None:
        """Over another packing or with another head the adapter would be refused."""
        packed = {"bits": 4, "backend": "bitsandbytes", "version": "1", "format": "nf4", "base_bytes": 9}
        base = {**self.FACTS["base"], "dtype": "bfloat16", "quantization": packed}
        text = card.render({**self.FACTS, "base": base, "task": "classification", "num_labels": 3})
        options = 'task="classification", num_labels=3, dtype="bfloat16", quantization="4bit"'
        assert f'leantune.load_base("smollm2-135m", {options}, quantization_backend="bitsandbytes")' in text

    def test_a_merged_model_is_loaded_for_its_task(self) -> None:
        text = card.render({**self.FACTS, "kind": "merged", "task": "masked-lm"})
        assert "AutoModelForMaskedLM.from_pretrained" in text
        assert "AutoModelForCausalLM.from_pretrained" in card.render({**self.FACTS, "kind": "merged"})

    def test_what_the_caller_adds(self) -> None:
        added = {
            "title": "My title",
            "description": "Some words.",
            "license": "apache-2.0",
            "tags": ["food"],
            "sections": {"Result": {"BLEU": 60.5, "a|b": "c|d"}, "Notes": "free text"},
        }
        text = card.render(self.FACTS, added)
        assert "# My title\n\nSome words." in text
        assert "## Result\n\n| | |\n|---|---|\n| BLEU | 60.5 |" in text
        assert r"c\|d" in text
        assert "## Notes\n\nfree text" in text
        assert '"food"' in text

    def test_front_matter_is_yaml(self) -> None:
        yaml = pytest.importorskip("yaml")
        facts = {**self.FACTS, "base": {"name": "a/b", "hub_id": "a/b", "source": "hub"}}
        head = card.render(facts, {"license": 'x: "y"'}).split("---\n")[1]
        value = yaml.safe_load(head)
        assert value["license"] == 'x: "y"'
        assert (value["base_model"], value["base_model_relation"]) == ("a/b", "adapter")
        assert value["library_name"] == "peft"
        assert "base_model:adapter:a/b" in value["tags"]
