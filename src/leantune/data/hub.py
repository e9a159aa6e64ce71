"""Data sets of the Hub, through the ``datasets`` library: ``owner/name``, with ``/config`` and ``:split`` behind it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from leantune.core.errors import DataError, describe, require
from leantune.data.reader import Record

_PART = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"({_PART}/{_PART})(?:/({_PART}))?(?::([\w.\[\]:%+-]+))?")
_SPLIT = "train"


@dataclass(frozen=True)
class HubId:
    """A data set of the Hub.

    Attributes:
        repository: ``owner/name``.
        config: one of its configurations (subsets), or None.
        split: the split, or a slice of it as ``datasets`` writes them (``train[:1000]``); None when not named.
    """

    repository: str
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        config = f"/{self.config}" if self.config else ""
        return f"{self.repository}{config}:{self.split or _SPLIT}"


def parse_id(text: str) -> HubId | None:
    """The data set that a text names, or None where it has another form."""
    match = _ID.fullmatch(text)
    return HubId(*match.groups()) if match else None


def records(found: HubId) -> Iterator[Record]:
    """Yield one record a row; rows are counted from one.

    Raises:
        DependencyError: datasets is not installed.
        DataError: the data set, its configuration or its split cannot be reached.
    """
    rows = _load(found)
    for number, columns in enumerate(rows, start=1):
        yield Record(f"{found} row {number}", dict(columns))


def _load(found: HubId) -> Any:
    require("datasets", "train")
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        rows = datasets.load_dataset(found.repository, found.config, split=found.split or _SPLIT)
    except (DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, ConnectionError):
            do = "check the network, or download it and name the folder"
            wanted = "a data set that can be reached or is cached"
        elif isinstance(error, FileNotFoundError):
            do = "check the id and your access to it (hf auth login), or name a local file"
            wanted = "a local file or folder, or a data set of the Hub"
        else:
            wanted, do = "a configuration and split that it has", "write owner/name/config:split"
        raise DataError(describe(str(found), reason, wanted, do)) from error
    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            # The file as it is: decoded, it would be an object that has no content to hash and nothing to read again.
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows
