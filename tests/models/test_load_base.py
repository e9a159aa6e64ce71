"""``load_base`` on tiny models saved as a user's folder would be."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import logging

from leantune.core.errors import LeantuneError, ModelError
from leantune.models import content_hash, load_base, load_tokenizer

TEXT = "Facts: name[Aromi]\nSentence:"


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(TEXT, return_tensors="pt")).logits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_folder_round_trip_gives_the_same_logits(
    saved: Callable[..., Path], build: dict[str, Callable[..., Any]], kind: str, tmp_path: Path
) -> None:
    base = load_base(saved(kind))
    assert base.source == "folder"
    assert base.hub_id is None
    assert base.note is None
    assert base.pad_note is None
    assert base.new_parameters == ()
    assert not base.model.training
    assert base.model.dtype == torch.float32
    assert base.content_hash == content_hash(base.model)
    base.model.save_pretrained(tmp_path / "again")
    base.tokenizer.save_pretrained(tmp_path / "again")
    again = load_base(str(tmp_path / "again"))
    assert again.content_hash == base.content_hash
    assert torch.equal(logits(base.model, base.tokenizer), logits(again.model, again.tokenizer))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
        ("float64", torch.float64),
        (torch.float64, torch.float64),
        ("auto", torch.bfloat16),
        ("float32", torch.float32),
    ],
)
def test_the_dtype_is_the_one_asked_for(
    saved: Callable[..., Path], build: dict[str, Callable[..., Any]], dtype: Any, expected: torch.dtype
) -> None:
    folder = saved("llama", model=build["llama"]().to(torch.bfloat16))
    model = load_base(folder, dtype=dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {expected}


@pytest.mark.parametrize("dtype", ["float31", "int8", torch.int8])
def test_an_unknown_dtype_is_refused(saved: Callable[..., Path], dtype: Any) -> None:
    with pytest.raises(ModelError, match=r"^dtype: .*; one of float32, .*auto; "):
        load_base(saved("llama"), dtype=dtype)


def test_a_near_dtype_is_suggested(saved: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="did you mean 'bfloat16'"):
        load_base(saved("llama"), dtype="bfloat15")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_classification_head_is_fresh_but_the_same_every_time(saved: Callable[..., Path], kind: str) -> None:
    folder = saved(kind)
    torch.manual_seed(1)
    first = load_base(folder, task="classification", num_labels=3)
    torch.manual_seed(2)
    second = load_base(folder, task="classification", num_labels=3)
    assert first.content_hash == second.content_hash
    assert any(name.endswith(("score.weight", "classifier.weight")) for name in first.new_parameters)
    assert first.model.config.num_labels == 3
    assert first.model.config.pad_token_id is not None
    batch = first.tokenizer(["one", "a longer row"], return_tensors="pt", padding=True)
    assert first.model(**batch).logits.shape == (2, 3)


def test_the_callers_random_state_is_left_alone(saved: Callable[..., Path]) -> None:
    folder = saved("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_base(folder, task="classification", num_labels=2)
    assert torch.equal(torch.rand(3), expected)


def test_a_saved_head_is_kept_and_another_width_replaces_it(saved: Callable[..., Path], tmp_path: Path) -> None:
    fresh = load_base(saved("bert"), task="classification", num_labels=3)
    with torch.no_grad():
        fresh.model.classifier.weight.fill_(0.5)
    fresh.model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    folder = saved("bert", model=fresh.model, name="with_head")
    for num_labels in (None, 3):
        kept = load_base(folder, task="classification", num_labels=num_labels)
        assert kept.new_parameters == ()
        assert torch.equal(kept.model.classifier.weight, fresh.model.classifier.weight)
        assert kept.model.config.id2label == {0: "bad", 1: "fair", 2: "good"}
    wider = load_base(folder, task="classification", num_labels=5)
    assert set(wider.new_parameters) == {"classifier.weight", "classifier.bias"}
    assert wider.model.classifier.weight.shape[0] == 5


def test_regression_has_one_output_and_its_loss(saved: Callable[..., Path]) -> None:
    base = load_base(saved("bert"), task="regression")
    assert base.model.config.problem_type == "regression"
    batch = base.tokenizer(["one", "two"], return_tensors="pt", padding=True)
    result = base.model(**batch, labels=torch.tensor([0.5, 1.5]))
    assert result.logits.shape == (2, 1)
    assert torch.allclose(result.loss, ((result.logits[:, 0] - torch.tensor([0.5, 1.5])) ** 2).mean())


def test_padding_does_not_move_the_classification(saved: Callable[..., Path]) -> None:
    base = load_base(saved("llama"), task="classification", num_labels=2)
    alone = base.model(**base.tokenizer(["short"], return_tensors="pt")).logits
    padded = base.model(**base.tokenizer(["short", "a much longer row"], return_tensors="pt", padding=True)).logits
    assert torch.allclose(alone[0], padded[0], atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"task": "causal"}, "task: 'causal'; one of causal-lm"),
        ({"task": "classification"}, "say how many classes there are"),
        ({"task": "classification", "num_labels": 0}, "num_labels: 0"),
        ({"task": "causal-lm", "num_labels": 3}, "labels only for classification"),
        ({"task": "regression", "num_labels": 2}, "labels only for classification"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(saved: Callable[..., Path], arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ModelError, match=text):
        load_base(saved("llama"), **arguments)


def test_an_encoder_is_no_causal_language_model(saved: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match=r"weights are not in the file \(cls\."):
        load_base(saved("bert"))


def test_a_missing_weight_of_the_body_is_refused_for_every_task(saved: Callable[..., Path]) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved("llama")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for task, num_labels in (("causal-lm", None), ("classification", 2)):
        with pytest.raises(
            ModelError, match=r"1 weights are not in the file \(model\.layers\.0\.mlp\.up_proj\.weight\)"
        ):
            load_base(folder, task=task, num_labels=num_labels)


def test_a_tokenizer_without_padding_gets_one_of_its_own_tokens(saved: Callable[..., Path]) -> None:
    folder = saved("llama", specials={"bos_token": "<s>", "eos_token": "</s>"})
    base = load_base(folder)
    assert base.tokenizer.pad_token == "</s>"
    assert base.pad_note is not None
    assert "'</s>'" in base.pad_note
    assert base.model.get_input_embeddings().weight.shape[0] == 260, "the embeddings keep their size"
    assert base.model.generation_config.pad_token_id == base.tokenizer.pad_token_id
    assert load_tokenizer(folder).pad_token == "</s>"


def test_a_tokenizer_that_cannot_pad_is_refused(saved: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="a token that can pad"):
        load_base(saved("llama", specials={"bos_token": "<s>"}))


def test_pickled_weights_are_never_opened(saved: Callable[..., Path]) -> None:
    folder = saved("llama")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\)"):
        load_base(folder)


def test_a_folder_without_weights(saved: Callable[..., Path]) -> None:
    folder = saved("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights; model\.safetensors"):
        load_base(folder)


def test_torn_weights_are_named(saved: Callable[..., Path]) -> None:
    folder = saved("llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"cannot read it as a model for causal-lm \(SafetensorError"):
        load_base(folder)


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-model"}', "[]"])
def test_a_broken_config_is_named(saved: Callable[..., Path], text: str) -> None:
    folder = saved("llama")
    (folder / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=str(folder.name)):
        load_base(folder)


def test_a_missing_tokenizer_is_named(saved: Callable[..., Path]) -> None:
    folder = saved("llama")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_base(folder)


def test_code_of_a_repository_is_not_run_unasked(saved: Callable[..., Path], tmp_path: Path) -> None:
    import json

    folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "own-model"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError, match="trust_remote_code=True"):
        load_base(folder)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_is_not_a_base_model(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = saved("llama")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="an adapter, not a base model"):
        load_base(folder)
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    with pytest.raises(ModelError, match="this is a run folder"):
        load_base(run)


def test_loading_says_nothing_and_leaves_the_voices_as_they_were(
    saved: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    folder = saved("llama")
    logging.set_verbosity_info()
    had_bars = logging.is_progress_bar_enabled()
    capfd.readouterr()
    try:
        load_base(folder, task="classification", num_labels=2)
        captured = capfd.readouterr()
        assert captured.out + captured.err == ""
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled() == had_bars
    finally:
        logging.set_verbosity_warning()


def test_every_failure_is_a_house_error_of_four_parts(saved: Callable[..., Path]) -> None:
    folder = saved("llama")
    shutil.copy(folder / "config.json", folder / "weights.zip")
    for name in ("./nowhere", "smolm2-135m", str(folder / "weights.zip"), "nobody/none", "two words", ""):
        with pytest.raises(LeantuneError) as caught:
            load_base(name)
        where, _, rest = str(caught.value).partition(": ")
        assert where
        assert rest.count(";") >= 2, str(caught.value)
