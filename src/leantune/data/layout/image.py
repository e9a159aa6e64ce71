"""``{"image": ..., "label": ...}``: an image (a path, bytes, or the Hub's dictionary of both) and its class."""

from __future__ import annotations

from leantune.data.layout import Layout, Roles, extra_of, register
from leantune.data.layout.classification import LABELS, label_of
from leantune.data.problem import Problems
from leantune.data.reader import Record
from leantune.data.row import Row

IMAGES = ("image", "img", "image_path", "file_name")


def parse(record: Record, problems: Problems) -> Row | None:
    """A row with an image, not yet opened, and a label."""
    image, name = record.columns.get("image"), record.name_of("image")
    if not image:
        got = f"no '{name}'" if "image" not in record.columns else f"'{name}' is empty"
        problems.add(record.where, got, "a path or bytes", "fill it in, or delete the row")
    label = label_of(record, problems)
    if not image or label is None:
        return None
    return Row(where=record.where, image=image, label=label, extra=extra_of(record, ("image", "label")))


def _find(columns: frozenset[str]) -> Roles | None:
    image = next((name for name in IMAGES if name in columns), None)
    label = next((name for name in LABELS if name in columns), None)
    return None if image is None or label is None else {"image": image, "label": label}


register(
    Layout(
        name="image",
        rank=45,
        columns="'image' and 'label'",
        find=_find,
        parse=parse,
        roles=("image", "label"),
        needed=("image", "label"),
        aliases={"image": IMAGES[1:], "label": LABELS[1:]},
        hint="a class for each image",
    )
)
