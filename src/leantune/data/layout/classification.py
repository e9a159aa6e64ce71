"""``{"text": ..., "text_pair": ..., "label": ...}``: a class name or number, or (regression) a number.

Known under the names of the GLUE tasks too: ``sentence``, ``sentence1`` and ``sentence2``, ``premise`` and
``hypothesis``, ``question`` and ``passage``, with ``label`` or ``score``.
"""

from __future__ import annotations

import math
import re
from typing import Any

from leantune.data.layout import Layout, Roles, check_text, extra_of, register, text_of
from leantune.data.problem import Problems
from leantune.data.reader import Record
from leantune.data.row import Label, Row

PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "passage"),
    ("question", "sentence"),
    ("query", "passage"),
    ("text1", "text2"),
)
TEXTS = ("text", "sentence", "content", "review")
LABELS = ("label", "score", "labels", "class", "target")
_WHOLE = re.compile(r"[+-]?\d{1,18}")


def _spelled_out(text: str) -> Any:
    """The number that a table of text spells, or the text itself."""
    if _WHOLE.fullmatch(text.strip()):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def label_of(record: Record, problems: Problems) -> Label | None:
    """A record's label: a name, or a number where the file spells one."""
    value, name = record.columns.get("label"), record.name_of("label")
    if record.is_text and isinstance(value, str):
        value = _spelled_out(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, str) and value.strip():
        return value
    got = f"no '{name}'" if "label" not in record.columns else f"'{name}' is {'null' if value is None else repr(value)}"
    problems.add(record.where, got, "a class name or a number", "fill it in, or delete the row")
    return None


def parse(record: Record, problems: Problems) -> Row | None:
    """A row with a text, perhaps its pair, and a label (``true`` and ``false`` become class names)."""
    text = text_of(record, "text", problems)
    pair = record.columns.get("text_pair")
    name = record.name_of("text_pair")
    pair_is_good = pair is None or check_text(pair, record.where, name, problems) is not None
    label = label_of(record, problems)
    if text is None or label is None or not pair_is_good:
        return None
    extra = extra_of(record, ("text", "text_pair", "label"))
    return Row(where=record.where, text=text, text_pair=pair, label=label, extra=extra)


def _find(columns: frozenset[str]) -> Roles | None:
    label = next((name for name in LABELS if name in columns), None)
    if label is None:
        return None
    for first, second in PAIRS:
        if {first, second} <= columns:
            return {"text": first, "text_pair": second, "label": label}
    text = next((name for name in TEXTS if name in columns), None)
    return None if text is None else {"text": text, "label": label}


register(
    Layout(
        name="classification",
        rank=50,
        columns="'text' and 'label'",
        find=_find,
        parse=parse,
        roles=("text", "label", "text_pair"),
        needed=("text", "label"),
        aliases={
            "text": tuple(dict.fromkeys([*TEXTS[1:], *(first for first, _ in PAIRS)])),
            "text_pair": tuple(dict.fromkeys(second for _, second in PAIRS[1:])),
            "label": LABELS[1:],
        },
        hint="a label for each text, or pair of texts",
    )
)
