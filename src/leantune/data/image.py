"""Images with a class: opened by Pillow, turned into numbers by the model's own image processor, batch by batch.

An image is a path (also beside the data file), the bytes of a file, or what Parquet files of the Hub hold, a
dictionary of ``bytes`` and ``path``. Only its head is read beforehand; the pixels of a data set seldom fit in memory.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leantune.core.errors import DataError, describe, require
from leantune.data.classification import class_number, find_label_names
from leantune.data.encoding import Encoded
from leantune.data.problem import Problems
from leantune.data.row import Row

_PLACE = re.compile(r"(.+?)(?::\d+| row \d+)")
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,(.+)", re.DOTALL)


def image_source(row: Row) -> Path | bytes:
    """Where the pixels of a row are: an existing file, or the bytes of one.

    Args:
        row: a row with ``image``.

    Raises:
        ValueError: with the reason, in words.
    """
    image: Any = row.image
    if isinstance(image, dict):
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, (bytes, bytearray)):
        return bytes(image)
    if isinstance(image, str) and (inline := _DATA_URL.fullmatch(image)):
        try:
            return base64.b64decode(inline[1], validate=True)
        except binascii.Error as error:
            raise ValueError(f"broken base64 ({error})") from error
    if not isinstance(image, (str, Path)) or not str(image):
        raise ValueError(f"{type(image).__name__} as image")
    path = Path(image).expanduser()
    place = _PLACE.fullmatch(row.where)
    beside = Path(place[1]).parent / path if place else path
    for candidate in (path, beside):
        if candidate.is_file():
            return candidate
    raise ValueError(f"no file {image}" + ("" if path.is_absolute() else f", here or in {beside.parent}"))


def open_image(source: Path | bytes) -> Any:
    """The image in RGB, as a Pillow image.

    Raises:
        OSError: it is none, or torn.
    """
    from PIL import Image

    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        return image.convert("RGB")


def _problem(row: Row) -> tuple[Path | bytes | None, str]:
    """Where an image is, or what is wrong with it, found without decoding its pixels."""
    from PIL import Image

    try:
        source = image_source(row)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.verify()
    except (ValueError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        return None, f"its image cannot be read ({' '.join(str(error).split())})"
    return source, ""


def encode_images(rows: Sequence[Row], *, label_names: list[str] | None = None) -> Encoded:
    """Check every image and give each its class number; the pixels are read batch by batch, by the collator.

    Args:
        rows: rows with ``image`` and ``label``.
        label_names: class names in the order of their numbers; found in the rows and sorted when not given.

    Returns:
        Examples with ``image`` (a path or bytes), ``labels`` and ``row``. An image counts as one token.

    Raises:
        DataError: an image is not there or is none, or a label is not among the names. All rows are named.
        DependencyError: Pillow is not installed.
    """
    require("PIL", "train")
    names = list(label_names) if label_names is not None else find_label_names(rows)
    problems = Problems("data")
    encoded = Encoded(label_names=names)
    for index, row in enumerate(rows):
        if row.image is None:
            got = "no 'image'"
            problems.add(row.where, got, "rows with 'image' and 'label'", "name another task, or mend the data")
            continue
        source, wrong = _problem(row)
        if wrong:
            problems.add(row.where, wrong, "a path (also beside the data file) or bytes", "mend or delete the row")
        label = class_number(row, names, problems)
        if label is None or source is None:
            continue
        encoded.examples.append({**row.extra, "image": source, "labels": label, "row": index})
        encoded.lengths.append(1)
    problems.raise_if_any()
    encoded.total_tokens = encoded.loss_tokens = len(encoded)
    return encoded


def pixels(row: Row, processor: Any) -> Any:
    """The numbers that a model is given for the image of a row: ``(channels, height, width)``, a numpy array.

    Raises:
        ValueError: it is not there.
        OSError: it is no image.
    """
    return processor([open_image(image_source(row))], return_tensors="np")["pixel_values"][0]


class ImageCollator:
    """Reads the images of a batch and turns them into numbers as the model was trained to see them.

    Args:
        processor: the model's image processor.
        columns: names of extra columns to carry, as lists.
    """

    def __init__(self, processor: Any, columns: Sequence[str] = ()) -> None:
        self.processor = processor
        self.columns = tuple(columns)

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Join examples to a batch.

        Returns:
            ``pixel_values`` (batch, channels, height, width), ``labels`` (batch,), and the extra columns.

        Raises:
            DataError: an image was changed or lost since it was checked.
        """
        import torch

        images = []
        for example in examples:
            try:
                images.append(open_image(example["image"]))
            except OSError as error:
                source = example["image"]
                where = f"row {example['row'] + 1}" if isinstance(source, bytes) else str(source)
                do = "put it back, or start again without it"
                raise DataError(describe(where, f"cannot be read any more ({error})", "an image", do)) from error
        batch: dict[str, Any] = {"pixel_values": self.processor(images, return_tensors="pt")["pixel_values"]}
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return batch | {name: [example[name] for example in examples] for name in self.columns}
