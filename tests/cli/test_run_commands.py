"""generate, eval, merge, export and inspect on a run of a tiny model."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import ViTImageProcessorPil

import tiny as tiny_models
from leantune.data import data_hash

Command = Callable[..., tuple[int, str, str]]


def asked(leantune: Command, trained: Path, *words: object) -> list[str]:
    code, out, _ = leantune("generate", trained, *words, "--json", "--max-new-tokens", 6)
    assert code == 0
    return [pair["text"] for pair in json.loads(out)]


def test_generate_answers_each_prompt_and_differs_from_the_base(trained: Path, leantune: Command) -> None:
    prompts = ["--prompt", "name 1:", "--prompt", "name 2:"]
    tuned = asked(leantune, trained, *prompts)
    base = asked(leantune, trained, *prompts, "--base")
    assert len(tuned) == len(base) == 2
    assert tuned != base


def test_generate_prints_the_answer_alone_for_one_prompt(trained: Path, leantune: Command) -> None:
    [text] = asked(leantune, trained, "--prompt", "name 1:")
    _, out, _ = leantune("generate", trained, "--prompt", "name 1:", "--max-new-tokens", 6)
    assert out.strip() == text.strip()


def test_generate_reads_files(trained: Path, rows: Path, tmp_path: Path, leantune: Command) -> None:
    assert len(asked(leantune, trained, "--file", rows)) == 8
    lines = tmp_path / "prompts.txt"
    lines.write_text("name 1:\n\nname 2:\n")
    assert len(asked(leantune, trained, "--file", lines)) == 2


def test_generate_reads_standard_input_as_one_prompt(
    trained: Path, leantune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("name 1:\nname 2:\n"))
    assert len(asked(leantune, trained)) == 1


def test_generate_through_the_chat_template_asks_another_question(trained: Path, leantune: Command) -> None:
    assert asked(leantune, trained, "--prompt", "name 1:") != asked(leantune, trained, "--prompt", "name 1:", "--chat")


def test_sampling_is_seeded(trained: Path, leantune: Command) -> None:
    words = ["--prompt", "name 1:", "--temperature", 2.0]
    assert asked(leantune, trained, *words, "--seed", 1) == asked(leantune, trained, *words, "--seed", 1)
    assert asked(leantune, trained, *words, "--seed", 1) != asked(leantune, trained, *words, "--seed", 2)


def test_generate_without_a_prompt_is_told(trained: Path, leantune: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, _, err = leantune("generate", trained)
    assert code == 1
    assert "--prompt" in err


def test_bad_lines_of_a_prompt_file_are_all_named(trained: Path, tmp_path: Path, leantune: Command) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"question": "b"}\nnot json\n')
    code, _, err = leantune("generate", trained, "--file", path)
    assert code == 1
    assert "prompts.jsonl:2" in err
    assert "prompts.jsonl:3" in err


def test_inspect_model_of_images(tmp_path: Path, leantune: Command) -> None:
    tiny_models.model("vit", torch.float32).save_pretrained(tmp_path / "vit")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    code, out, _ = leantune("inspect", "model", tmp_path / "vit")
    assert code == 0
    for line in (r"image size +8", r"patch size +4", r"ViTForImageClassification", r"attention, .*heads"):
        assert re.search(line, out), line
    assert "pad token" not in out


@pytest.mark.parametrize("name", ["generate", "eval", "merge", "export"])
def test_a_folder_that_is_no_run_is_one_line(name: str, tmp_path: Path, leantune: Command) -> None:
    more = {"generate": ["--prompt", "a"], "eval": ["--data", "x"]}.get(name, ["--out", tmp_path / "out"])
    code, _, err = leantune(name, tmp_path / "nothing", *more)
    assert code == 1
    assert "nothing" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_eval_shows_both_models_and_writes_the_record(trained: Path, rows: Path, leantune: Command) -> None:
    before = json.loads((trained / "run.json").read_text(encoding="utf-8"))
    code, out, _ = leantune("eval", trained, "--data", rows, "--max-new-tokens", 8)
    assert code == 0
    for word in ("loss", "perplexity", "exact match", "BLEU", "base", "tuned", "8 inputs from 16 rows"):
        assert word in out
    after = json.loads((trained / "run.json").read_text(encoding="utf-8"))
    scores = after["evaluation"]["files"][rows.as_posix()]
    assert scores["tuned"]["metrics"]["loss"]["value"] < scores["base"]["metrics"]["loss"]["value"]
    gain = scores["tuned"]["metrics"]["loss"]["value"] - scores["base"]["metrics"]["loss"]["value"]
    assert scores["difference"]["loss"]["value"] == pytest.approx(gain, abs=1e-12)
    assert after["base"] == before["base"]
    assert after["config"] == before["config"]


def test_eval_of_the_folder_trained_on_records_the_files_it_scored(
    trained: Path, rows: Path, tmp_path: Path, leantune: Command
) -> None:
    """A folder holds rows to train on and others to evaluate on; the hash is that of the ones that were scored."""
    lines = rows.read_text(encoding="utf-8").splitlines(keepends=True)
    run, folder = tmp_path / "run", tmp_path / "set"
    folder.mkdir()
    for name, part in (("train.jsonl", lines[:8]), ("validation.jsonl", lines[8:])):
        (folder / name).write_text("".join(part), encoding="utf-8")
    shutil.copytree(trained, run)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record["config"]["data"] = folder.as_posix()
    (run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    assert leantune("eval", run, "--data", folder, "--metrics", "loss")[0] == 0
    after = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert after["evaluation"]["files"][folder.as_posix()]["hash"] == data_hash(folder, split="validation")


def test_eval_as_json_with_some_metrics(trained: Path, rows: Path, leantune: Command) -> None:
    code, out, _ = leantune("eval", trained, "--data", rows, "--metrics", "loss", "--json", "--limit", 4)
    assert code == 0
    found = json.loads(out)
    assert list(found["difference"]) == ["loss"]
    assert found["tuned"]["rows"] == 4


def test_eval_without_rows_asks_for_them(trained: Path, leantune: Command) -> None:
    code, _, err = leantune("eval", trained)
    assert code == 1
    assert "--data" in err


def test_export_proves_and_prints_its_cost(trained: Path, tmp_path: Path, leantune: Command) -> None:
    code, out, _ = leantune("export", trained, "--out", tmp_path / "lora")
    assert code == 0
    for word in ("same answers", "max logit difference", "mean KL", "argmax agreement", "MB as LoRA", "padded to 8"):
        assert word in out
    assert (tmp_path / "lora" / "adapter_config.json").is_file()
    assert json.loads((trained / "run.json").read_text(encoding="utf-8"))["exports"]


def test_export_that_does_not_hold_fails(
    trained: Path, tmp_path: Path, leantune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leantune.adapters import conversion

    original = conversion._pad
    monkeypatch.setattr(conversion, "_pad", lambda B, A, rank: original(B / 2, A, rank))
    code, out, err = leantune("export", trained, "--out", tmp_path / "lora")
    assert code == 1
    assert "same answers" not in out
    assert "does not behave as the trained model" in err
    assert not (tmp_path / "lora").exists()


def test_merge_proves_and_loads_as_a_model(trained: Path, tmp_path: Path, leantune: Command) -> None:
    code, out, _ = leantune("merge", trained, "--out", tmp_path / "merged")
    assert code == 0
    assert "same answers" in out
    assert (tmp_path / "merged" / "config.json").is_file()
    code, out, _ = leantune("inspect", "model", tmp_path / "merged", "--json")
    assert json.loads(out)["architecture"] == "LlamaForCausalLM"


def test_an_occupied_folder_is_left_alone(trained: Path, tmp_path: Path, leantune: Command) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("mine")
    code, _, err = leantune("export", trained, "--out", tmp_path / "mine")
    assert code == 1
    assert "--overwrite" in err or "overwrite" in err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_inspect_data_counts_and_shows_the_mask(tiny: Path, rows: Path, leantune: Command) -> None:
    code, out, _ = leantune("inspect", "data", rows, "--model", tiny, "--rows", 1)
    assert code == 0
    assert "name 0: item 0</s>" in out
    assert "rows          16" in out
    assert "8 prompts asked before" in out
    code, out, _ = leantune("inspect", "data", rows, "--model", tiny, "--json")
    facts = json.loads(out)
    assert facts["rows"] == 16
    assert 0 < facts["loss_share"] < 1


def test_inspect_data_colours_what_carries_loss(
    tiny: Path, rows: Path, leantune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    _, out, _ = leantune("inspect", "data", rows, "--model", tiny, "--rows", 1)
    assert "\x1b[2mname 0:\x1b[0m\x1b[1;4;32m item 0</s>\x1b[0m" in out


def test_inspect_adapter_groups_the_blocks(trained: Path, leantune: Command) -> None:
    code, out, _ = leantune("inspect", "adapter", trained)
    assert code == 0
    assert "model.layers.*.mlp.down_proj" in out
    code, out, _ = leantune("inspect", "adapter", trained, "--json")
    assert json.loads(out)["method"] == "s2ft"


def test_inspect_model_lists_the_modules(tiny: Path, leantune: Command) -> None:
    code, out, _ = leantune("inspect", "model", tiny)
    assert code == 0
    assert "LlamaForCausalLM" in out
    assert "down_proj" in out
    assert "by name" in out
    code, out, _ = leantune("inspect", "model", tiny, "--json")
    attention, ffn, head = json.loads(out)["structures"]
    assert (attention["kind"], ffn["kind"], head["kind"]) == ("attention", "ffn", "plain")
    assert attention["block"] == ffn["block"] == "model.layers.*"
    assert [each["found"] for each in (attention, ffn, head)] == ["by name", "by name", "not coupled"]
    assert any(part.startswith("down model.layers.*.mlp.down_proj: ") for part in ffn["parts"])


def test_inspect_needs_a_kind(leantune: Command) -> None:
    code, out, err = leantune("inspect", "dat")
    assert code == 2
    assert "data" in out + err


def test_export_at_a_smaller_rank_says_what_is_left_out(trained: Path, tmp_path: Path, leantune: Command) -> None:
    code, out, _ = leantune("export", trained, "--out", tmp_path / "small", "--rank", 1)
    assert code == 0
    assert "left out" in out
    assert "worst layer" in out
    code, _, err = leantune("export", trained, "--out", tmp_path / "exact", "--rank", 1, "--exact")
    assert code == 1
    assert "leaves out" in err
    assert not (tmp_path / "exact").exists()
