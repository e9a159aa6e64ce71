"""Every task from its data to a scored, reloaded result: masked and image models, heads on encoders and decoders."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from leantune.adapters import merge_run
from leantune.core.errors import ConfigError, DataError, LeantuneError, MethodError
from leantune.data import ImageCollator, read_rows
from leantune.evaluate import evaluate
from leantune.models import facts, load_base
from leantune.testing.closeness import assert_close
from leantune.train import Run, RunConfig, dry_run, fit
from leantune.train.head import head_modules
from leantune.train.listener import MaskingEpoch
from leantune.train.record import read_metrics

WORDS = ["<pad>", "</s>", "<unk>", "<s>", "<mask>", "red", "green", "blue", "one", "two", "good", "bad", "film", "is"]
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,
}
STEADY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    pair = [("<s>", 3), ("</s>", 1)]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=pair
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>", **names, model_max_length=32)


def bert_config() -> BertConfig:
    return BertConfig(vocab_size=len(WORDS), max_position_embeddings=40, pad_token_id=0, **SIZES, **STEADY)


def roberta_config() -> RobertaConfig:
    return RobertaConfig(vocab_size=len(WORDS), max_position_embeddings=40, pad_token_id=0, **SIZES, **STEADY)


def distilbert_config() -> DistilBertConfig:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "dropout": 0.0, "attention_dropout": 0.0}
    settings = {
        **sizes,
        "initializer_range": 0.3,
        "seq_classif_dropout": 0.0,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
    }
    return DistilBertConfig(vocab_size=len(WORDS), **settings)


def llama() -> LlamaForCausalLM:
    tokens = {"bos_token_id": 3, "eos_token_id": 1, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=40, **SIZES, **tokens))


BASES: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertModel(bert_config()),
    "roberta": lambda: RobertaModel(roberta_config(), add_pooling_layer=False),
    "distilbert": lambda: DistilBertModel(distilbert_config()),
    "llama": llama,
    "bert-masked": lambda: BertForMaskedLM(bert_config()),
    "roberta-masked": lambda: RobertaForMaskedLM(roberta_config()),
}
TARGETS = {
    "llama": ["o_proj", "down_proj"],
    "distilbert": ["out_lin", "lin2"],
    "vit": ["o_proj", "fc2"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, made = tmp_path_factory.mktemp("bases"), {}

    def folder(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(1)
            made[kind] = root / kind
            BASES[kind]().save_pretrained(made[kind])
            tokenizer().save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.fixture(scope="module")
def image_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(1)
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, **SIZES, **STEADY)).save_pretrained(folder)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a class: red and blue squares, each a little different."""
    root = tmp_path_factory.mktemp("pictures")
    for number in range(16):
        name, colour = (("blue", (20 + number, 30, 220)), ("red", (220, 30, 20 + number)))[number % 2]
        (root / name).mkdir(exist_ok=True)
        Image.new("RGB", (20, 24), colour).save(root / name / f"{number:02}.png")
    return root


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Told apart by one word of the second text."""
    rows = [
        {"sentence1": f"film is {colour}", "sentence2": f"is {word}", "label": "same" if word == "good" else "other"}
        for colour in ("red", "green", "blue")
        for word in ("good", "bad")
    ]
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows * 4)


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = {"good": 1.5, "bad": -1.5, "film": 0.2}
    rows = [{"text": f"film is {word}", "score": value} for word, value in words.items()]
    return write(tmp_path_factory.mktemp("scores") / "scores.jsonl", rows * 6)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"text": f"film is {a} is {b} is {a}"} for a in ("red", "green") for b in ("one", "two")]
    return write(tmp_path_factory.mktemp("texts") / "texts.jsonl", rows * 4)


def settings(model: Path, data: Path, out: Path, task: str, **options: Any) -> RunConfig:
    kind = model.name if model.name in TARGETS else "vit" if "vit" in model.name else "bert"
    targets = TARGETS.get(kind, ["attention.output.dense", "intermediate.dense"])
    method = {"method": "s2ft", "method_options": {"heads": 1, "channels": 6, "target_modules": targets}}
    common = {"model": str(model), "data": data, "out": out, "task": task, "batch_size": 8, "lr": 2e-2}
    own = {"max_steps": 16, "device": "cpu", "save_steps": 0, "eval_data": data, "max_length": 32}
    return RunConfig(**{**common, **method, **own, **options})


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


@torch.no_grad()
def answers(model: Any, encoder: Any, task: str, pictures: Path | None = None) -> torch.Tensor:
    if task == "image-classification":
        assert pictures is not None
        image = Image.open(next((pictures / "red").iterdir())).convert("RGB")
        return model(**encoder([image], return_tensors="pt")).logits
    return model(**encoder(["film is good", "red is bad"], return_tensors="pt", padding=True)).logits


def check_reload(run: Run, task: str, pictures: Path | None = None) -> Any:
    expected = answers(run.model, run.tokenizer, task, pictures)
    base, model = Run.open(run.folder).load()
    assert torch.equal(answers(model, base.encoder, task, pictures), expected)
    return model


@pytest.mark.parametrize("kind", ["bert", "bert-masked", "roberta", "distilbert", "llama"])
def test_a_pair_classifier(folders: Any, pairs: Path, tmp_path: Path, kind: str) -> None:
    run = fit(settings(folders(kind), pairs, tmp_path / "run", "classification"), progress=False)
    lines = losses(tmp_path / "run")
    assert sum(lines[-4:]) < 0.7 * sum(lines[:4])
    assert run.summary["data"]["label_names"] == ["other", "same"]
    assert run.summary["evaluation"]["accuracy"] > 0.8
    model = check_reload(run, "classification")
    inner = model.get_base_model()
    assert inner.config.id2label == {0: "other", 1: "same"}
    saved = load_file(run.result / "adapter_model.safetensors")
    # All that began at random was trained and saved: both layers of DistilBERT's head, the pooler of a masked BERT.
    fresh = load_base(folders(kind), task="classification", num_labels=2)
    for name in fresh.new_parameters:
        key = next(key for key in saved if name.removesuffix(".weight").removesuffix(".bias") in key)
        assert key
        weight = dict(inner.named_parameters()).get(name)
        assert weight is None or not weight.requires_grad, f"{name} stands outside the saved head"
    found = evaluate(run.model, run.tokenizer, read_rows(pairs), task="classification", resamples=0)
    assert set(found.metrics) == {"cross_entropy", "accuracy", "f1", "mcc"}


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_regression(folders: Any, scores: Path, tmp_path: Path, kind: str) -> None:
    run = fit(settings(folders(kind), scores, tmp_path / "run", "regression"), progress=False)
    lines = losses(tmp_path / "run")
    assert sum(lines[-4:]) < 0.7 * sum(lines[:4])
    check_reload(run, "regression")
    found = evaluate(run.model, run.tokenizer, read_rows(scores), task="regression", resamples=0)
    assert set(found.metrics) == {"mse", "pearson", "spearman"}
    pearson = found.value("pearson")
    assert pearson is not None
    assert pearson > 0.5


@pytest.mark.parametrize("kind", ["bert-masked", "roberta-masked"])
def test_a_masked_language_model(folders: Any, texts: Path, tmp_path: Path, kind: str) -> None:
    run = fit(settings(folders(kind), texts, tmp_path / "run", "masked-lm", max_steps=30), progress=False)
    lines = losses(tmp_path / "run")
    assert sum(lines[-6:]) < 0.8 * sum(lines[:6])
    check_reload(run, "masked-lm")
    assert run.summary["evaluation"]["perplexity"] > 1
    rows = read_rows(texts)
    tuned = evaluate(run.model, run.tokenizer, rows, task="masked-lm", resamples=0)
    with run.model.disable_adapter():
        plain = evaluate(run.model, run.tokenizer, rows, task="masked-lm", resamples=0)
    again = evaluate(run.model, run.tokenizer, rows, task="masked-lm", batch_size=3, resamples=0)
    assert tuned.loss is not None
    assert plain.loss is not None
    assert tuned.loss < plain.loss
    assert again.loss == pytest.approx(tuned.loss, rel=1e-5)
    assert tuned.value("pseudo_perplexity") == pytest.approx(torch.tensor(tuned.loss).exp().item(), rel=1e-5)


def test_masked_training_stops_and_goes_on_as_if_it_had_not(folders: Any, texts: Path, tmp_path: Path) -> None:
    """Three passes over the rows; the second run is cut inside the second of them."""
    options = {"max_steps": 6, "save_steps": 3, "eval_data": None, "batch_size": 8}
    whole = fit(settings(folders("bert-masked"), texts, tmp_path / "whole", "masked-lm", **options), progress=False)
    expected = losses(tmp_path / "whole")
    from leantune.train import setup

    config = settings(folders("bert-masked"), texts, tmp_path / "again", "masked-lm", **options).resolved()
    prepared = setup.prepare(config)
    prepared.trainer.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoints/checkpoint-3"))
    resumed = [line["loss"] for line in prepared.trainer.state.log_history if "loss" in line]
    assert resumed == expected
    assert whole.summary["epochs"] == 3.0
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(dict(prepared.model.named_parameters())[name], parameter), name


def test_slices_are_chosen_from_hidden_tokens_and_from_images(
    folders: Any, texts: Path, image_base: Path, pictures: Path, tmp_path: Path
) -> None:
    for base, data, task in (
        (folders("bert-masked"), texts, "masked-lm"),
        (image_base, pictures, "image-classification"),
    ):
        config = settings(base, data, tmp_path / task, task, max_steps=1)
        options = {**config.method_options, "selection": "gradient"}
        run = fit(RunConfig(**{**config.model_dump(), "method_options": options}), progress=False)
        assert run.summary["calibration"]["rows"] == 16


def test_the_epoch_reaches_the_hidden_tokens_without_a_loader() -> None:
    """accelerate tells a data set its epoch in one process alone."""

    class Texts:
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    texts: Any = Texts()
    callback = MaskingEpoch(texts)
    for at, expected in ((None, 0), (1.0, 1), (1.5, 1), (2.0, 2)):
        callback.on_epoch_begin(None, SimpleNamespace(epoch=at), None)  # type: ignore[arg-type]
        assert texts.epoch == expected


def test_images_of_a_folder_a_class(image_base: Path, pictures: Path, tmp_path: Path) -> None:
    run = fit(settings(image_base, pictures, tmp_path / "run", "image-classification"), progress=False)
    lines = losses(tmp_path / "run")
    assert lines[-1] < 0.5 * lines[0]
    assert run.summary["data"]["label_names"] == ["blue", "red"]
    assert run.summary["evaluation"]["accuracy"] == 1.0
    assert (run.result / "preprocessor_config.json").is_file()
    check_reload(run, "image-classification", pictures)
    rows = read_rows(pictures)
    found = evaluate(run.model, run.tokenizer, rows, task="image-classification", label_names=["blue", "red"])
    assert found.value("accuracy") == 100.0


def test_a_dry_run_counts_images_without_reading_them(
    image_base: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> dict[str, Any]:
        pytest.fail("a batch of images was read")

    monkeypatch.setattr(ImageCollator, "__call__", read)
    options = {"max_steps": None, "epochs": 1.5, "batch_size": 6}
    steps = dry_run(settings(image_base, pictures, tmp_path / "run", "image-classification", **options))["steps"]
    assert (steps["batches_an_epoch"], steps["counted_batches"], steps["rows"]) == (3, 3, 16)
    assert (steps["tokens"], steps["computed_positions"], steps["padding_share"]) == (16, 16, 0.0)
    assert steps["steps"] == 5


def test_images_have_no_chat_template(image_base: Path, pictures: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^chat_template: .*chat\.jinja with task image-classification, .* no tok"):
        settings(image_base, pictures, tmp_path / "run", "image-classification", chat_template=template)


def test_facts_of_an_image_model(image_base: Path) -> None:
    found = facts(image_base)
    assert json.loads(json.dumps(found)) == found
    assert (found["architecture"], found["image_size"], found["patch_size"]) == ("ViTForImageClassification", 16, 8)
    assert [found[name] for name in ("vocab", "chat_template", "pad_token", "pad_note")] == [None] * 4
    assert found["parameters"] == load_base(image_base, task="image-classification").model.num_parameters()
    assert not found["tied_embeddings"]
    assert {"q_proj", "fc2", "classifier"} <= {row["name"] for row in found["modules"]}


def test_images_of_a_file_of_rows(image_base: Path, pictures: Path, tmp_path: Path) -> None:
    files = sorted(pictures.rglob("*.png"))
    for path in files:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = write(tmp_path / "rows.jsonl", [{"image": path.name, "label": path.parent.name} for path in files])
    options = {"max_steps": 1, "method": "full", "method_options": {}, "lr": 1e-3}
    run = fit(settings(image_base, data, tmp_path / "run", "image-classification", **options), progress=False)
    assert run.summary["data"]["rows"] == len(files)
    check_reload(run, "image-classification", pictures)
    bad = write(tmp_path / "bad.jsonl", [{"image": "none.png", "label": 0}, {"image": "rows.jsonl", "label": 1}])
    with pytest.raises(DataError) as caught:
        fit(settings(image_base, bad, tmp_path / "bad", "image-classification"), progress=False)
    assert "bad.jsonl:1: its image cannot be read (no file none.png, here or in" in str(caught.value)
    assert "bad.jsonl:2: its image cannot be read" in str(caught.value)


@pytest.mark.parametrize("task", ["image-classification", "masked-lm", "classification"])
def test_a_run_is_merged_into_a_plain_model(
    image_base: Path, pictures: Path, folders: Any, texts: Path, pairs: Path, tmp_path: Path, task: str
) -> None:
    base, data = {
        "image-classification": (image_base, pictures),
        "masked-lm": (folders("roberta-masked"), texts),
        "classification": (folders("bert"), pairs),
    }[task]
    run = fit(settings(base, data, tmp_path / "run", task, max_steps=4), progress=False)
    result = merge_run(run.folder, tmp_path / "merged")
    assert result["parity"]["ok"]
    assert result["parity"]["adapter_effect"] > 0
    record = json.loads((tmp_path / "merged/leantune.json").read_text(encoding="utf-8"))
    assert record["task"] == task
    labels = 2 if "classification" in task else None
    merged = load_base(tmp_path / "merged", task=task, num_labels=labels)
    assert merged.new_parameters == ()
    assert_close(
        answers(merged.model, merged.encoder, task, pictures),
        answers(run.model, run.tokenizer, task, pictures).double(),
        torch.float32,
        4,
        48,
        what="merged logits",
    )


def test_a_fresh_process_reads_head_and_slices_back(folders: Any, pairs: Path, tmp_path: Path) -> None:
    run = fit(settings(folders("distilbert"), pairs, tmp_path / "run", "classification", max_steps=2), progress=False)
    code = (
        "import sys, torch, leantune; torch.set_num_threads(1); from safetensors.torch import save_file;"
        "from leantune.train import Run; base, model = Run.open(sys.argv[1]).load();"
        "batch = base.tokenizer(['film is good', 'red is bad'], return_tensors='pt', padding=True);"
        "save_file({'logits': model(**batch).logits.detach().contiguous()}, sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(run.folder), str(tmp_path / "o")], check=True, capture_output=True)
    expected = answers(run.model, run.tokenizer, "classification")
    assert torch.equal(load_file(tmp_path / "o")["logits"], expected)


def test_the_head_is_found_under_any_name(folders: Any, image_base: Path) -> None:
    found = {
        kind: head_modules(load_base(folders(kind), task="classification", num_labels=2))
        for kind in TARGETS
        if kind != "vit"
    }
    assert found == {"llama": ["score"], "distilbert": ["pre_classifier", "classifier"]}
    assert head_modules(load_base(image_base, task="image-classification", num_labels=2)) == ["classifier"]


def test_a_head_that_is_a_target_too_is_refused(folders: Any, pairs: Path, tmp_path: Path) -> None:
    options = {"method_options": {"channels": 2, "target_modules": ["classifier", "intermediate.dense"]}}
    with pytest.raises(MethodError, match=r"target_modules: classifier, the head that .* trains whole"):
        fit(settings(folders("bert"), pairs, tmp_path / "run", "classification", **options), progress=False)


def test_all_linear_leaves_the_head_alone(image_base: Path, pictures: Path, tmp_path: Path) -> None:
    options = {"method": "lora", "method_options": {"r": 2, "target_modules": "all-linear"}, "max_steps": 1}
    run = fit(settings(image_base, pictures, tmp_path / "run", "image-classification", **options), progress=False)
    saved = load_file(run.result / "adapter_model.safetensors")
    assert [key for key in saved if "classifier" in key] == [
        "base_model.model.classifier.bias",
        "base_model.model.classifier.weight",
    ]


def test_a_head_of_other_classes_is_fresh_and_labels_that_are_not_known_are_named(
    folders: Any, pairs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "three"
    torch.manual_seed(1)
    config = bert_config()
    config.num_labels = 3
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    run = fit(settings(folder, pairs, tmp_path / "run", "classification", max_steps=1), progress=False)
    assert run.base is not None
    assert run.base.new_parameters == ("classifier.bias", "classifier.weight")
    rows = write(tmp_path / "other.jsonl", [{"text": "film", "label": "neither"}])
    with pytest.raises(LeantuneError, match=r"other\.jsonl:1: label 'neither'; one of other, same"):
        evaluate(
            run.model, run.tokenizer, read_rows(rows), task="classification", label_names=["other", "same"], resamples=0
        )


def test_a_causal_model_is_no_masked_one(folders: Any, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(LeantuneError) as caught:
        fit(settings(folders("llama"), texts, tmp_path / "run", "masked-lm"), progress=False)
    assert "masked-lm" in str(caught.value)
