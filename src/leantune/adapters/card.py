"""The model card (README.md) of an adapter, a LoRA export or a merged model."""

from __future__ import annotations

import json
from typing import Any

from leantune.models.base import AUTO_CLASSES

# The Hub's name of what a model does, by our task, or PEFT's in a record of an older version.
_PIPELINES = {
    "causal-lm": "text-generation",
    "CAUSAL_LM": "text-generation",
    "masked-lm": "fill-mask",
    "classification": "text-classification",
    "regression": "text-classification",
    "image-classification": "image-classification",
}


def render(facts: dict[str, Any], card: dict[str, Any] | None = None) -> str:
    """The text of a card.

    Args:
        facts: the folder's record (``leantune.json``); see :func:`leantune.adapters.folder.describe_adapter`.
        card: what the caller adds: ``title``, ``description`` (Markdown), ``license``, ``language``, ``datasets``,
            ``tags``, ``model_index`` (the Hub's table of results),
            ``sections`` (heading -> Markdown text, or a dictionary that becomes a table).
    """
    card = card or {}
    lines = [_front_matter(facts, card), "", f"# {card.get('title') or _title(facts)}", ""]
    if card.get("description"):
        lines += [str(card["description"]).strip(), ""]
    lines += [_base_text(facts), "", "## Use", "", _usage(facts), ""]
    for heading, body in (card.get("sections") or {}).items():
        lines += [f"## {heading}", "", _table(body) if isinstance(body, dict) else str(body).strip(), ""]
    lines += ["## Facts", "", _table(_facts_table(facts)), ""]
    return "\n".join(lines)


def _front_matter(facts: dict[str, Any], card: dict[str, Any]) -> str:
    base = facts.get("base") or {}
    kind = facts.get("kind")
    fields: dict[str, Any] = {"library_name": "transformers" if kind == "merged" else "peft"}
    tags = ["leantune", str(facts.get("method")), *card.get("tags", ())]
    if kind == "lora":
        tags.append("lora")
    hub_id = base.get("hub_id") if base.get("source") == "hub" else None
    if hub_id:
        # The Hub checks this field; it may only name a model whose very weights were the base.
        fields["base_model"] = hub_id
        fields["base_model_relation"] = "finetune" if kind == "merged" else "adapter"
        if kind != "merged":
            tags.append(f"base_model:adapter:{hub_id}")
    pipeline = _PIPELINES.get(facts.get("task") or str(facts.get("task_type") or "CAUSAL_LM"))
    if pipeline:
        fields["pipeline_tag"] = pipeline
    for name in ("license", "language", "datasets"):
        if card.get(name):
            fields[name] = card[name]
    fields["tags"] = list(dict.fromkeys(tags))
    if card.get("model_index"):
        fields["model-index"] = card["model_index"]
    # JSON is YAML: every value is quoted safely without a YAML library.
    body = "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items())
    return f"---\n{body}\n---"


def _title(facts: dict[str, Any]) -> str:
    base = (facts.get("base") or {}).get("name") or "a base model"
    kind = {"lora": "LoRA export of an adapter", "merged": "Merged model"}.get(str(facts.get("kind")), "Adapter")
    return f"{kind} ({facts.get('method')}) for {base}"


def _base_text(facts: dict[str, Any]) -> str:
    base = facts.get("base") or {}
    text = f"Base model: `{base.get('name')}`."
    if base.get("hub_id") and base.get("source") != "hub":
        text += f" Its weights come from `{base['hub_id']}` but are not byte for byte those on the Hub."
    if base.get("note"):
        text += f" The base is {base['note']}; every number here is on that copy."
    return text


def _usage(facts: dict[str, Any]) -> str:
    name = (facts.get("base") or {}).get("name")
    kind = facts.get("kind")
    if kind == "merged":
        auto_class = AUTO_CLASSES.get(str(facts.get("task")), "AutoModelForCausalLM")
        return (
            f"A plain transformers model:\n\n```python\nfrom transformers import {auto_class}\n"
            f'model = {auto_class}.from_pretrained("THIS_FOLDER")\n```'
        )
    if kind == "lora" or facts.get("method") == "lora":
        return (
            "Plain LoRA, which stock PEFT and LoRA servers read:\n\n```python\nfrom peft import PeftModel\n"
            'model = PeftModel.from_pretrained(base, "THIS_FOLDER")\n```'
        )
    return (
        f"```python\nimport leantune\n\nbase = leantune.load_base({load_arguments(facts, name)})\n"
        'model = leantune.load(base, "THIS_FOLDER")\n```\n\n'
        "PEFT alone does not know this method: `import leantune` first (in any order with `peft`), then "
        "`PeftModel.from_pretrained` works too. Without leantune it stops with a bare `KeyError`; "
        "`leantune export --format lora` writes a copy that needs no import."
    )


def load_arguments(facts: dict[str, Any], name: str | None) -> str:
    """What ``leantune.load_base`` is given to load the base as it was for training.

    Args:
        facts: the folder's record.
        name: the base, as the reader knows it.
    """
    task, base = facts.get("task"), facts.get("base") or {}
    options: dict[str, Any] = {} if task in (None, "causal-lm") else {"task": task}
    if task in ("classification", "image-classification") and facts.get("num_labels"):
        options["num_labels"] = facts["num_labels"]
    if base.get("dtype") not in (None, "float32"):
        options["dtype"] = base["dtype"]
    if packed := base.get("quantization"):
        options |= {"quantization": f"{packed['bits']}bit", "quantization_backend": packed["backend"]}
    return ", ".join([json.dumps(name), *(f"{key}={json.dumps(value)}" for key, value in options.items())])


def _facts_table(facts: dict[str, Any]) -> dict[str, Any]:
    base = facts.get("base") or {}
    rows: dict[str, Any] = {"method": facts.get("method"), "trained parameters": facts.get("parameters")}
    if facts.get("achieved_ratio") is not None:
        rows["share of the targeted weights"] = f"{facts['achieved_ratio']:.4%}"
    rows["base content hash"] = base.get("content_hash")
    rows["base dtype"] = base.get("dtype")
    if packed := base.get("quantization"):
        rows["base quantised"] = f"{packed['bits']} bits, {packed['backend']} {packed['version']}, {packed['format']}"
        rows["base bytes"] = packed["base_bytes"]
    if facts.get("merged_onto"):
        rows["merged onto"] = facts["merged_onto"]
    for name in ("rank", "padded_rank", "max_abs_error", "native_bytes", "lora_bytes", "advice"):
        if facts.get(name) is not None:
            rows[name.replace("_", " ")] = facts[name]
    if left_out := facts.get("recompression"):
        total, worst = left_out["total"]["relative"], left_out["layers"][left_out["worst"]]["relative"]
        rows["left out by the smaller rank"] = f"{total:.3%} of the change; at most {worst:.3%} of a layer's"
    for name, value in (facts.get("parity") or {}).items():
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            rows[f"parity: {name.replace('_', ' ')}"] = value
    rows["leantune"] = facts.get("leantune")
    return {name: value for name, value in rows.items() if value is not None}


def _table(rows: dict[str, Any]) -> str:
    body = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *body])


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value).replace("|", "\\|").replace("\n", " ")
