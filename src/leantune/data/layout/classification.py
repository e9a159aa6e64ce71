"""``{"text": ..., "text_pair": ..., "label": ...}``: a class name or number, or (regression) a number."""

from __future__ import annotations

import math

from leantune.data.layout import Layout, check_text, extra_of, register, text_of
from leantune.data.problem import Problems
from leantune.data.reader import Record
from leantune.data.row import Label, Row


def _label(record: Record, problems: Problems) -> Label | None:
    value = record.columns.get("label")
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, str) and value.strip():
        return value
    got = "no 'label'" if "label" not in record.columns else f"'label' is {'null' if value is None else repr(value)}"
    problems.add(record.where, got, "a class name or a number", "fill it in, or delete the row")
    return None


def parse(record: Record, problems: Problems) -> Row | None:
    """A row with a text, perhaps its pair, and a label (``true`` and ``false`` become class names)."""
    text = text_of(record, "text", problems)
    pair = record.columns.get("text_pair")
    pair_is_good = pair is None or check_text(pair, record.where, "text_pair", problems) is not None
    label = _label(record, problems)
    if text is None or label is None or not pair_is_good:
        return None
    extra = extra_of(record, ("text", "text_pair", "label"))
    return Row(where=record.where, text=text, text_pair=pair, label=label, extra=extra)


register(
    Layout(
        name="classification",
        columns="'text' and 'label'",
        matches=lambda columns: {"text", "label"} <= columns and not {"messages", "prompt", "completion"} & columns,
        parse=parse,
    )
)
