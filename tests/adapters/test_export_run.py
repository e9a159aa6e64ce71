"""From a run folder to a proven export, with the numbers in run.json whether they hold or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from adapter_models import PROMPTS, answers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from leantune.adapters import conversion as converting
from leantune.adapters import export, export_run, merge_run, parity, probe
from leantune.adapters import folder as adapter_folder
from leantune.core.errors import AdapterError, ParityError
from leantune.models import load_base

Maker = Callable[..., Any]


@pytest.fixture
def run(s2ft: Maker, base_folders: dict[str, Path], tmp_path: Path) -> Path:
    """A run folder as training leaves it."""
    base = load_base(str(base_folders["llama"]))
    adapter_folder.save(s2ft(), tmp_path / "run" / "adapter", base=base, tokenizer=base.tokenizer)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"status": "complete", "base": {"name": base.name}}))
    rows = [{"prompt": f"w{number} w{number + 1}", "completion": " w3"} for number in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "run" / "config.yaml").write_text(f"data: {(tmp_path / 'rows.jsonl').as_posix()}\neval_data: null\n")
    return tmp_path / "run"


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[parity.Exported]:
    """Load the export by stock PEFT here instead of in another process, which takes seconds; returns what was asked."""
    asked = []

    def ask(exported: parity.Exported, ids: Any, native: Any, scratch: Path, new_tokens: int, stop: list[int]) -> Any:
        asked.append(exported)
        model = AutoModelForCausalLM.from_pretrained(exported.model).eval()
        if exported.adapter:
            model = PeftModel.from_pretrained(model, exported.adapter).eval()
        for number, prompt in enumerate(ids):
            numpy.save(scratch / f"{number}.npy", probe.logits_of(model, prompt).numpy())
        return [probe.greedy(model, prompt, new_tokens, stop)[0] for prompt in ids]

    monkeypatch.setattr(parity, "_ask_elsewhere", ask)
    return asked


def exports(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "run.json").read_text())["exports"]


@pytest.mark.slow
def test_export_and_merge_in_processes_of_their_own(run: Path, s2ft: Maker, base: Maker, tmp_path: Path) -> None:
    said: list[str] = []
    result = export_run(run, tmp_path / "lora", new_tokens=6, progress=said.append)
    assert result["parity"]["ok"]
    assert result["parity"]["prompts"] == 8
    assert result["conversion"]["max_abs_error"] == 0
    exported = PeftModel.from_pretrained(base(), tmp_path / "lora")
    torch.testing.assert_close(answers(exported)[0], answers(s2ft())[0], rtol=1e-5, atol=2e-5)
    assert any("without leantune" in line for line in said)
    merge_run(run, tmp_path / "merged", new_tokens=6)
    assert [entry["format"] for entry in exports(run)] == ["lora", "merged"]
    assert all(entry["parity"]["ok"] and entry["created"] for entry in exports(run))
    assert json.loads((run / "run.json").read_text())["status"] == "complete"


def test_an_export(run: Path, in_this_process: list[parity.Exported], tmp_path: Path) -> None:
    result = export_run(run, tmp_path / "lora", prompts=["w1 w2 w3", "w9"], new_tokens=4, pad_rank="server")
    assert (result["format"], result["folder"]) == ("lora", str(tmp_path / "lora"))
    assert result["conversion"]["padded_rank"] == 8
    assert (result["parity"]["prompts"], result["parity"]["positions"]) == (2, 4)
    assert exports(run)[0]["conversion"] == result["conversion"]
    record = json.loads((tmp_path / "lora" / "leantune.json").read_text())
    assert record["parity"] == result["parity"]
    assert (record["method"], record["converted_from"]) == ("lora", "s2ft")
    assert (tmp_path / "lora" / "tokenizer.json").exists()
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "parity: mean kl" in card
    assert "| rank |" in card


@pytest.mark.parametrize("fault", ["scale", "keys", "transposed"])
def test_a_wrong_export_fails_and_is_not_written(
    fault: str, run: Path, in_this_process: list[parity.Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "scale":
        honest = converting._config
        monkeypatch.setattr(converting, "_config", lambda *args: honest(*args) | {"lora_alpha": 99})
    elif fault == "keys":
        save_file = converting.save_file

        def misnamed(tensors: dict[str, Any], *args: Any, **options: Any) -> None:
            save_file(
                {name.replace("layers.0.mlp", "layers.9.mlp"): t for name, t in tensors.items()}, *args, **options
            )

        monkeypatch.setattr(converting, "save_file", misnamed)
    else:
        pad = converting._pad
        monkeypatch.setattr(converting, "_pad", lambda B, A, rank: (pad(B, A, rank)[0].roll(1, 0), pad(B, A, rank)[1]))
    if fault == "keys":
        # What PEFT says of it; the verdict must not depend on anyone reading warnings.
        with pytest.warns(UserWarning, match="missing adapter keys"), pytest.raises(ParityError):
            export_run(run, tmp_path / "lora", new_tokens=4)
    else:
        with pytest.raises(ParityError, match="does not behave as the trained model"):
            export_run(run, tmp_path / "lora", new_tokens=4)
    assert not (tmp_path / "lora").exists()
    assert exports(run)[0]["parity"]["ok"] is False
    assert exports(run)[0]["parity"]["problems"]


def test_a_wrong_merge_fails_and_keeps_what_was_there(
    run: Path, in_this_process: list[parity.Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Maker
) -> None:
    merge_run(run, tmp_path / "merged", new_tokens=4)
    good = (tmp_path / "merged" / "model.safetensors").read_bytes()
    plain = dict(base().state_dict())
    monkeypatch.setattr(export.merging, "merged_state", lambda *_: plain)
    with pytest.raises(ParityError):
        merge_run(run, tmp_path / "merged", new_tokens=4, overwrite=True)
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == good
    assert [entry["parity"]["ok"] for entry in exports(run)] == [True, False]


def test_the_base_is_the_one_on_disk(
    run: Path, base_folders: dict[str, Path], in_this_process: list[Any], tmp_path: Path
) -> None:
    export_run(run, tmp_path / "lora", new_tokens=0)
    assert in_this_process[0].model == str(base_folders["llama"])
    assert in_this_process[0].auto_class == "AutoModelForCausalLM"


def test_a_base_that_changed_since_is_refused(run: Path, base: Maker, tmp_path: Path) -> None:
    other = base()
    other.lm_head.weight.data[0, 0] += 1
    other.save_pretrained(tmp_path / "other")
    load_base(
        str(json.loads((run / "adapter" / "leantune.json").read_text())["base"]["name"])
    ).tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="loaded over another base"):
        export_run(run, tmp_path / "lora", base=str(tmp_path / "other"))


def test_an_adapter_without_a_run(run: Path, in_this_process: list[Any], tmp_path: Path) -> None:
    (run / "adapter").rename(tmp_path / "alone")
    assert export_run(tmp_path / "alone", tmp_path / "lora", new_tokens=0)["parity"]["ok"]
    assert "exports" not in json.loads((run / "run.json").read_text())


@pytest.mark.parametrize("spoil", ["gone", "no yaml", "no config"])
def test_built_in_prompts_where_the_data_is_gone(
    spoil: str, run: Path, in_this_process: list[Any], tmp_path: Path
) -> None:
    if spoil == "gone":
        (tmp_path / "rows.jsonl").unlink()
    elif spoil == "no yaml":
        (run / "config.yaml").write_text("- a\n- b\n")
    else:
        (run / "config.yaml").unlink()
    assert export_run(run, tmp_path / "lora", new_tokens=0)["parity"]["prompts"] == len(parity.DEFAULT_PROMPTS)


def test_refusals(run: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"format: 'gguf'; known: lora"):
        export_run(run, tmp_path / "x", format="gguf")
    (run / "adapter").rename(tmp_path / "elsewhere")
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    for command in (export_run, merge_run):
        with pytest.raises(AdapterError, match="a run that trained the whole model"):
            command(run, tmp_path / "x")


def test_a_classifier_is_merged_with_its_head(tmp_path: Path, in_this_process: list[Any], monkeypatch: Any) -> None:
    from adapter_models import fill, make_llama, make_tokenizer
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    from leantune import S2FTConfig

    make_llama().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    base = load_base(str(tmp_path / "base"), task="classification", num_labels=3)
    model = get_peft_model(base.model, S2FTConfig(target_modules=["down_proj"], channels=3, task_type="SEQ_CLS"))
    fill(model)
    adapter_folder.save(model.eval(), tmp_path / "run" / "adapter", base=base, tokenizer=base.tokenizer)
    with pytest.raises(AdapterError, match=r"whole modules beside the adapter \(score\)"):
        export_run(tmp_path / "run", tmp_path / "lora")

    def ask(exported: parity.Exported, ids: Any, native: Any, scratch: Path, new_tokens: int, stop: Any) -> Any:
        assert (exported.auto_class, new_tokens) == ("AutoModelForSequenceClassification", 0)
        plain = AutoModelForSequenceClassification.from_pretrained(exported.model).eval()
        for number, prompt in enumerate(ids):
            numpy.save(scratch / f"{number}.npy", probe.logits_of(plain, prompt).numpy())
        return []

    monkeypatch.setattr(parity, "_ask_elsewhere", ask)
    result = merge_run(tmp_path / "run", tmp_path / "merged", prompts=["w1 w2", "w5"])
    assert result["parity"]["ok"]
    assert result["parity"]["greedy_agreement"] is None
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([PROMPTS[0]])
    torch.testing.assert_close(plain(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=2e-5)


def test_a_smaller_rank_is_measured_and_written(
    run: Path, in_this_process: list[parity.Exported], tmp_path: Path
) -> None:
    """Parity cannot hold where a part of the change is left out: it is said, and the folder is there."""
    result = export_run(run, tmp_path / "lora", prompts=["w1 w2 w3"], new_tokens=2, rank=1)
    left_out = result["conversion"]["recompression"]
    assert 0 < left_out["total"]["relative"] < 1
    assert left_out["needed_rank"] > result["conversion"]["rank"] == 1
    assert not result["parity"]["ok"]
    assert 0 < result["parity"]["remaining_share"] < 1
    assert exports(run)[-1]["conversion"]["recompression"] == left_out
    assert (tmp_path / "lora" / "adapter_model.safetensors").is_file()


def test_a_rank_that_suffices_is_held_to_parity(
    run: Path, in_this_process: list[parity.Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = export_run(run, tmp_path / "lora", prompts=["w1 w2 w3"], new_tokens=2, rank=16, exact=True)
    assert result["conversion"]["recompression"]["is_exact"]
    assert result["parity"]["ok"]
    monkeypatch.setattr(parity, "LARGEST_SHARE", -1.0)
    with pytest.raises(ParityError):
        export_run(run, tmp_path / "again", prompts=["w1 w2 w3"], new_tokens=2, rank=16)
    assert not (tmp_path / "again").exists()


def test_an_export_asked_to_be_exact_is_refused_at_a_smaller_rank(
    run: Path, in_this_process: list[parity.Exported], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=r"rank 1 leaves out .* give --rank"):
        export_run(run, tmp_path / "lora", prompts=["w1"], new_tokens=2, rank=1, exact=True)
    assert not (tmp_path / "lora").exists()
    assert not in_this_process
