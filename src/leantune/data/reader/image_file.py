"""A file that is one image, in a folder that is named after its class: one record.

It has no suffix to be found by: images that lie beside a data file belong to that file's rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from leantune.data.problem import Problems
from leantune.data.reader import Reader, Record, register

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def read(path: Path, problems: Problems) -> Iterator[Record]:
    """Yield the one record; whether the image can be opened is asked when it is encoded."""
    del problems
    yield Record(where=str(path), columns={"image": str(path), "label": path.parent.name})


def class_files(folder: Path) -> list[Path]:
    """The images of a folder of folders, one a class, in order; none where it is no such folder."""
    classes = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith((".", "_"))]
    return [
        path
        for each in classes
        for path in sorted(each.iterdir())
        if path.is_file() and path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    ]


register(Reader(name="image-file", suffixes=(), read=read))
