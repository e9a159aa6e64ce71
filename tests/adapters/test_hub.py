"""Push and pull against a Hub in a folder: what lands there, that it opens everywhere, and every way it can fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from adapter_models import PROMPTS, TARGETS, answers, fill
from hub_fixture import FolderHub, http_error
from huggingface_hub import ModelCard, errors
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import leantune
from leantune import S2FTConfig
from leantune.adapters import folder as adapter_folder
from leantune.adapters import hub, parity, probe, publication
from leantune.core.errors import AdapterError, HubError
from leantune.models import load_base

Maker = Callable[..., Any]
REPO = "someone/facts-s2ft"


def ask_here(exported: parity.Exported, ids: Any, native: Any, scratch: Path, new_tokens: int, stop: list[int]) -> Any:
    """The LoRA form through stock PEFT in this process instead of another one, which takes seconds."""
    model = AutoModelForCausalLM.from_pretrained(exported.model).eval()
    model = PeftModel.from_pretrained(model, exported.adapter).eval()
    for number, prompt in enumerate(ids):
        numpy.save(scratch / f"{number}.npy", probe.logits_of(model, prompt).numpy())
    return [probe.greedy(model, prompt, new_tokens, stop)[0] for prompt in ids]


@pytest.fixture(scope="module")
def made(base_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run``: a run folder as training leaves it; ``built``: what a push of it uploads."""
    place = tmp_path_factory.mktemp("made")
    base = load_base(str(base_folders["llama"]))
    base.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    options = {"target_modules": TARGETS["llama"], "heads": 1, "channels": 3, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base.model, S2FTConfig(**options))
    fill(model)
    folder = place / "run"
    adapter_folder.save(model.eval(), folder / "adapter", base=base, tokenizer=base.tokenizer)
    score = {"title": "BLEU (sacrebleu)", "value": 41.5, "low": 40.0, "high": 43.0}
    scores = {"task": "causal-lm", "metrics": {"bleu": score, "perplexity": {"title": "perplexity", "value": None}}}
    summary = {
        "status": "complete",
        "base": {"name": base.name},
        "data": {"path": str(place / "rows.jsonl"), "source": {"format": "prompt-completion"}},
        "config": {"model": base.name, "data": str(place / "rows.jsonl"), "out": str(folder), "method": "s2ft"},
        "environment": {"versions": {"torch": "2"}, "python": "3.11", "platform": "a machine of mine"},
        "exports": [{"folder": str(place / "lora")}],
        "evaluation": {"files": {str(place / "test.jsonl"): {"hash": "sha256:12", "tuned": scores}}},
    }
    (folder / "run.json").write_text(json.dumps(summary))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "_ask_elsewhere", ask_here)
        publication.prepare(folder, REPO, place / "built", card={"license": "apache-2.0", "datasets": ["owner/rows"]})
    return place


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other process."""
    monkeypatch.setattr(parity, "_ask_elsewhere", ask_here)


@pytest.fixture
def run(made: Path) -> Path:
    """The run folder; a push leaves it as it is."""
    return made / "run"


@pytest.fixture
def built(made: Path, tmp_path: Path) -> Path:
    """What a push uploads."""
    return Path(shutil.copytree(made / "built", tmp_path / "built"))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FolderHub:
    """The Hub, in a folder."""
    found = FolderHub(tmp_path / "hub")
    found.install(monkeypatch)
    return found


@pytest.fixture
def pushed(built: Path, fake: FolderHub) -> Path:
    """A repository after a push."""
    hub.push(built, REPO)
    return fake.repository(REPO)


def front_matter(folder: Path) -> dict[str, Any]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text.split("---")[1]))


def test_the_folder_has_plain_lora_at_its_root_and_the_native_adapter_below(pushed: Path, run: Path) -> None:
    files = {path.relative_to(pushed).as_posix() for path in pushed.rglob("*") if path.is_file()}
    assert files >= {
        *("adapter_config.json", "adapter_model.safetensors", "README.md", "leantune.json", "tokenizer.json"),
        *("chat_template.jinja", "native/adapter_config.json", "native/adapter_model.safetensors", "native/run.json"),
        "native/leantune.json",
    }
    root, native = (json.loads((pushed / place / "adapter_config.json").read_text()) for place in (".", "native"))
    assert (root["peft_type"], native["peft_type"]) == ("LORA", "S2FT")
    assert root["r"] == root["lora_alpha"]
    weights = "adapter_model.safetensors"
    assert (pushed / "native" / weights).read_bytes() == (run / "adapter" / weights).read_bytes()
    record = json.loads((pushed / "leantune.json").read_text())
    assert record["parity"]["ok"]
    assert set(record["files"]) == files - {"leantune.json"}


def test_nothing_of_the_machine_is_in_it(pushed: Path, run: Path, made: Path) -> None:
    for path in pushed.rglob("*"):
        if path.is_file():
            text = path.read_bytes().decode("latin-1")
            assert str(made) not in text, path
            assert str(made.parent) not in text, path
            assert "a machine of mine" not in text, path
    # Building it leaves no trace in the run either.
    assert len(json.loads((run / "run.json").read_text())["exports"]) == 1


def test_the_card_says_what_the_hub_wants_to_know(pushed: Path) -> None:
    meta = front_matter(pushed)
    assert (meta["library_name"], meta["pipeline_tag"], meta["license"]) == ("peft", "text-generation", "apache-2.0")
    assert meta["datasets"] == ["owner/rows"]
    assert meta["tags"] == ["leantune", "lora", "s2ft"]
    # A base from a folder is no model of the Hub.
    assert "base_model" not in meta
    [entry] = meta["model-index"]
    [result] = entry["results"]
    assert entry["name"] == "facts-s2ft"
    assert result["dataset"] == {"name": "test.jsonl", "type": "test", "revision": "sha256:12"}
    assert result["metrics"] == [{"type": "bleu", "name": "BLEU (sacrebleu)", "value": 41.5}]
    text = (pushed / "README.md").read_text(encoding="utf-8")
    assert "parity: max abs logit difference" in text
    assert "no id of the Hub was shown to have the same weights" in text
    assert "THIS_FOLDER" not in text
    card = ModelCard.load(pushed / "README.md")
    assert card.data.model_name == "facts-s2ft"
    assert card.data.eval_results[0].metric_value == 41.5


def test_the_root_opens_with_stock_peft_that_never_heard_of_leantune(
    pushed: Path, s2ft: Maker, base_folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "logits.npy"
    script = (
        "import sys, numpy, torch\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(base_folders['llama'])!r})\n"
        f"model = PeftModel.from_pretrained(model, {str(pushed)!r}).eval()\n"
        f"found = [model(input_ids=torch.tensor([ids])).logits[0].detach().numpy() for ids in {PROMPTS!r}]\n"
        f"numpy.savez({str(out.with_suffix(''))!r}, *found)\n"
        "assert 'leantune' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = numpy.load(out.with_suffix(".npz"))
    for number, wanted in enumerate(answers(s2ft())):
        torch.testing.assert_close(torch.from_numpy(found[f"arr_{number}"]), wanted, rtol=1e-5, atol=2e-5)


def test_load_by_id_takes_the_native_adapter(pushed: Path, s2ft: Maker, base_folders: dict[str, Path]) -> None:
    model = leantune.load(load_base(str(base_folders["llama"])), REPO)
    assert type(model.peft_config["default"]).__name__ == "S2FTConfig"
    for found, wanted in zip(answers(model.eval()), answers(s2ft()), strict=True):
        assert torch.equal(found, wanted)


def test_pull_leaves_a_run_folder(pushed: Path, s2ft: Maker, base_folders: dict[str, Path], tmp_path: Path) -> None:
    from leantune.train import Run

    said: list[str] = []
    result = hub.pull(REPO, tmp_path / "pulled", base=str(base_folders["llama"]), progress=said.append)
    assert result["method"] == "s2ft"
    assert result["verified"] == "every tensor is there, finite, and fits the base"
    run = Run.open(tmp_path / "pulled")
    assert run.config.out == tmp_path / "pulled"
    assert run.summary["data"]["source"]["format"] == "prompt-completion"
    _, model = run.load()
    for found, wanted in zip(answers(model), answers(s2ft()), strict=True):
        assert torch.equal(found, wanted)
    assert run.tokenizer is not None
    assert {path.name for path in (tmp_path / "pulled").iterdir()} == {"adapter", "lora", "run.json"}
    assert (tmp_path / "pulled" / "adapter" / "chat_template.jinja").is_file()
    # Without a base argument the record still names it.
    assert type(leantune.load(None, tmp_path / "pulled")).__name__ == "PeftModelForCausalLM"


def test_pull_where_the_base_is_not(pushed: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = hub.pull(REPO, tmp_path / "pulled", progress=said.append)
    assert "its base is not here" in result["verified"]
    assert any("not compared" in line for line in said)


def test_pull_of_somebody_elses_lora(
    fake: FolderHub, lora: Maker, base_folders: dict[str, Path], tmp_path: Path
) -> None:
    from leantune.train import Run

    lora().save_pretrained(fake.repository("them/plain"))
    hub.pull("them/plain", tmp_path / "pulled", base=str(base_folders["llama"]))
    run = Run.open(tmp_path / "pulled")
    assert (run.config.method, run.config.task) == ("lora", "causal-lm")
    _, model = run.load()
    for found, wanted in zip(answers(model), answers(lora()), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)


def spoil_flip(folder: Path) -> None:
    path = folder / "native" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def spoil_missing(folder: Path) -> None:
    (folder / "native" / "adapter_model.safetensors").unlink()


def spoil_nan(folder: Path) -> None:
    (folder / "leantune.json").unlink()
    path = folder / "native" / "adapter_model.safetensors"
    tensors = load_file(path)
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).view(-1)[0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})


def spoil_key(folder: Path) -> None:
    (folder / "leantune.json").unlink()
    path = folder / "native" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (spoil_flip, "other bytes than were pushed"),
        (spoil_missing, "missing"),
        (spoil_nan, "not finite"),
        (spoil_key, "missing"),
    ],
)
def test_what_came_torn_is_not_written(
    spoil: Callable[[Path], None], text: str, pushed: Path, base_folders: dict[str, Path], tmp_path: Path
) -> None:
    spoil(pushed)
    with pytest.raises(AdapterError, match=text):
        hub.pull(REPO, tmp_path / "pulled", base=str(base_folders["llama"]))
    assert not (tmp_path / "pulled").exists()


def test_an_edited_card_does_not_stop_a_pull(pushed: Path, tmp_path: Path) -> None:
    (pushed / "README.md").write_text("my own words", encoding="utf-8")
    hub.pull(REPO, tmp_path / "pulled")
    assert (tmp_path / "pulled" / "adapter" / "README.md").read_text(encoding="utf-8") == "my own words"
    with pytest.raises(AdapterError, match="already there"):
        hub.pull(REPO, tmp_path / "pulled")


def test_a_second_push_replaces_the_first(pushed: Path, fake: FolderHub, tmp_path: Path) -> None:
    (pushed / "native" / "old.json").write_text("{}")
    (pushed / "LICENSE").write_text("mine")
    assert hub.check_target(REPO)["exists"]
    assert hub.push(tmp_path / "built", REPO).endswith("/commit/1")
    assert not (pushed / "native" / "old.json").exists()
    assert (pushed / "LICENSE").exists()


def test_private_branch_and_pull_request(built: Path, fake: FolderHub, tmp_path: Path) -> None:
    hub.push(built, REPO, private=True, revision="v2")
    assert fake.private == {REPO}
    assert (fake.repository(REPO, "v2") / "adapter_config.json").is_file()
    assert hub.push(built, REPO, create_pr=True).endswith("/discussions/1")
    hub.pull(REPO, tmp_path / "pulled", revision="v2")
    with pytest.raises(HubError, match="no revision 'v3'"):
        hub.pull(REPO, tmp_path / "other", revision="v3")


def test_a_hub_id_only_where_the_weights_are_the_same(
    run: Path, base: Maker, base_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = load_base(str(base_folders["llama"]))
    monkeypatch.setattr("leantune.models.load_base", lambda name, **options: honest)
    honest.revision = "abc"
    built = publication.prepare(run, REPO, tmp_path / "built", base_id="owner/base")
    assert (built["base"]["name"], built["base"]["source"]) == ("owner/base", "hub")
    meta = front_matter(tmp_path / "built")
    assert (meta["base_model"], meta["base_model_relation"]) == ("owner/base", "adapter")
    assert "base_model:adapter:owner/base" in meta["tags"]
    for place in (".", "native"):
        config = json.loads((tmp_path / "built" / place / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", "abc")
    honest.content_hash = "sha256:other"
    with pytest.raises(AdapterError, match="are not those trained on"):
        publication.prepare(run, REPO, tmp_path / "other", base_id="owner/base")


def test_a_base_is_compared_as_it_was_trained_on(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash of a base that was packed, or has a head of its own, is of all that."""
    asked: dict[str, Any] = {}

    def load(name: str, **options: Any) -> Any:
        asked.update(options, name=name)
        raise AdapterError("far enough")

    copied = Path(shutil.copytree(run, tmp_path / "run"))
    path = copied / "adapter" / "leantune.json"
    facts = json.loads(path.read_text())
    facts |= {"task": "classification", "task_type": "SEQ_CLS", "num_labels": 3}
    facts["base"]["quantization"] = {"bits": 4, "backend": "bitsandbytes"}
    path.write_text(json.dumps(facts))
    monkeypatch.setattr("leantune.models.load_base", load)
    with pytest.raises(AdapterError, match="far enough"):
        publication.prepare(copied, REPO, tmp_path / "built", base_id="owner/base")
    packed = {"quantization": "4bit", "quantization_backend": "bitsandbytes", "dtype": "float32"}
    assert asked == {"name": "owner/base", "task": "classification", "num_labels": 3, **packed}


@pytest.mark.parametrize(("task", "kind"), [("masked-lm", "fill-mask"), ("image-classification",) * 2])
def test_an_evaluation_names_the_task_as_the_hub_does(task: str, kind: str) -> None:
    tuned = {"task": task, "metrics": {"accuracy": {"value": 0.5}}}
    index = publication.model_index({"evaluation": {"files": {"a.jsonl": {"tuned": tuned}}}}, REPO)
    assert index is not None
    assert index[0]["results"][0]["task"]["type"] == kind


def test_the_embedded_base_is_named_for_what_it_is() -> None:
    base = publication.public_base({"name": "smollm2-135m", "source": "embedded", "hub_id": None})
    assert base["name"] == "smollm2-135m"
    assert "dequantised 4-bit copy of `HuggingFaceTB/SmolLM2-135M-Instruct`" in publication._base_text(base)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        ("whoami", errors.LocalTokenNotFoundError("no token"), "no token here"),
        ("whoami", http_error(errors.HfHubHTTPError, 401), "does not accept the token"),
        ("whoami", errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        ("whoami", ConnectionError("no route to host"), "cannot be reached (no route to host)"),
        ("create_repo", http_error(errors.HfHubHTTPError, 403), "the token has no right to it"),
        ("upload_folder", http_error(errors.HfHubHTTPError, 500), "the Hub refused"),
        ("snapshot_download", http_error(errors.GatedRepoError, 403), "gated on the Hub"),
        ("snapshot_download", errors.LocalEntryNotFoundError("nothing cached"), "nothing cached"),
    ],
)
def test_every_refusal_is_one_line_that_says_what_to_do(
    call: str, error: Exception, text: str, fake: FolderHub, tmp_path: Path
) -> None:
    fake.failing[call] = error
    (tmp_path / "built").mkdir()
    with pytest.raises(HubError) as caught:
        hub.check_target(REPO)
        hub.push(tmp_path / "built", REPO)
        hub.pull(REPO, tmp_path / "pulled")
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(REPO)


def test_a_repository_of_others_is_left_alone(fake: FolderHub) -> None:
    folder = fake.repository(REPO)
    folder.mkdir(parents=True)
    (folder / ".gitattributes").write_text("")
    assert hub.check_target(REPO)["exists"]
    (folder / "model.safetensors").write_text("")
    with pytest.raises(HubError, match=r"leantune did not push \(model.safetensors"):
        hub.check_target(REPO)
    assert hub.check_target(REPO, create_pr=True)["exists"]
    with pytest.raises(HubError, match="not on the Hub"):
        hub.check_target("someone/new", create_pr=True)
    for wrong in ("name", "a/b/c", "../up", "owner/na me"):
        with pytest.raises(HubError, match="no Hub id"):
            hub.check_target(wrong)
    with pytest.raises(HubError, match="not on the Hub"):
        hub.pull("someone/none", folder / "x")


def test_paths_become_names() -> None:
    given = {"/home/me/a.jsonl": ["C:\\data\\b.csv", "~/c", "owner/name", 3, None, "two\n/lines"], "d": {"e": "../f/g"}}
    wanted = {"a.jsonl": ["b.csv", "c", "owner/name", 3, None, "two\n/lines"], "d": {"e": "g"}}
    assert publication.without_paths(given) == wanted
