"""``{"prompt": ..., "completion": ..., "references": [...]}``: what the model is given, and what it should say."""

from __future__ import annotations

from leantune.data.layout import Layout, check_references, extra_of, register, text_of
from leantune.data.problem import Problems
from leantune.data.reader import Record
from leantune.data.row import Row


def parse(record: Record, problems: Problems) -> Row | None:
    """A row; the prompt may be empty (plain text to continue from nothing), the completion may not."""
    prompt = text_of(record, "prompt", problems, blank=True)
    completion = text_of(record, "completion", problems)
    references = check_references(record, problems)
    if prompt is None or completion is None or references is None:
        return None
    extra = extra_of(record, ("prompt", "completion", "references"))
    return Row(where=record.where, prompt=prompt, completion=completion, references=references, extra=extra)


register(
    Layout(
        name="prompt-completion",
        columns="'prompt' and 'completion'",
        matches=lambda columns: bool({"prompt", "completion"} & columns) and "messages" not in columns,
        parse=parse,
    )
)
