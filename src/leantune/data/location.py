"""Where rows come from: one file, the files of a folder, or a data set of the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from leantune.core.errors import DataError, describe, did_you_mean
from leantune.data import reader as readers
from leantune.data.hub import HubId, parse_id
from leantune.data.reader import Reader
from leantune.data.reader.image_file import class_files

# What the files of a split are called, in the order in which an evaluation asks for them.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
_SPLIT_NAME = re.compile(r"([A-Za-z]+)(?:[-_.].*)?")
_NO_ROWS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}


@dataclass(frozen=True)
class Location:
    """What a name of data stands for.

    Attributes:
        name: the name, as it was given.
        files: the files to read, in order; none for a data set of the Hub.
        reader: their type.
        hub: the data set of the Hub.
        offered: files of a folder that were not taken, by split.
    """

    name: str
    files: tuple[Path, ...] = ()
    reader: Reader | None = None
    hub: HubId | None = None
    offered: dict[str, list[Path]] = field(default_factory=dict)


def locate(name: Path | str, *, reader: str | None = None, split: str = "train") -> Location:
    """Find what to read.

    Args:
        name: a file, a folder, or the id of a data set of the Hub.
        reader: the file type, where the suffix does not tell.
        split: which of a folder's files to take, where they are named after splits: ``train``; ``validation`` takes
            those of a test where there is no validation.

    Raises:
        DataError: there is no such file, it is empty, or a folder holds no data files or several types.
    """
    path = Path(name)
    if path.is_dir():
        return _of_folder(path, reader, split)
    if not path.exists():
        found = parse_id(path.as_posix())
        if found is not None and not _looks_local(path):
            return Location(str(found), hub=found)
        raise _missing(path)
    if path.stat().st_size == 0:
        raise DataError(describe(str(path), "an empty file (0 bytes)", "at least one row", "check how it was written"))
    return Location(str(path), (path,), readers.find(path, reader))


def _looks_local(path: Path) -> bool:
    """Whether a name that is not there means a file all the same: it ends as one does, or its folder is there."""
    return readers.suffix_of(path) in readers.suffixes() or path.parent.is_dir()


def _missing(path: Path) -> DataError:
    beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(path.name, beside)
    do = hint if hint.startswith("did") else "check the path"
    return DataError(describe(str(path), "no such file", "a data file", do))


def _data_files(folder: Path) -> list[Path]:
    known = readers.suffixes()
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and readers.suffix_of(path) in known
        and not path.name.startswith((".", "_"))
        and path.name not in _NO_ROWS
    )


def split_of(path: Path) -> str | None:
    """The split that a file is named after (``train-00000-of-00002.parquet``: ``train``), or None."""
    match = _SPLIT_NAME.fullmatch(path.name)
    word = match[1].lower() if match else ""
    return next((split for split, words in SPLITS.items() if word in words), None)


def _class_images(folder: Path, split: str) -> list[Path]:
    """The images of a folder with a folder for each class, or with such a one for each split."""
    parts = {split_of(entry): entry for entry in sorted(folder.iterdir()) if entry.is_dir()}
    for name in (split,) if split == "train" else (split, "test"):
        if name in parts and (found := class_files(parts[name])):
            return found
    return class_files(folder) if not set(parts) - {None} else []


def _of_folder(folder: Path, reader: str | None, split: str) -> Location:
    files = _data_files(folder)
    if not files and (images := _class_images(folder, split)):
        return Location(str(folder), tuple(images), readers.find(images[0], "image-file"))
    if not files and (folder / "data").is_dir():
        # Where data sets of the Hub keep their files.
        files = _data_files(folder / "data")
    if not files:
        suffixes = " or ".join(sorted(each for each in readers.suffixes() if not each.endswith(".gz")))
        got = "a folder without data files" if any(folder.iterdir()) else "an empty folder"
        raise DataError(describe(str(folder), got, f"files ending in {suffixes}", "name a file, or another folder"))
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(split_of(path) or "", []).append(path)
    taken, offered = files, {}
    wanted = [split] if split == "train" else [split, "test"]
    if set(by_split) - {""}:
        chosen = next((name for name in wanted if name in by_split), None)
        if chosen is None:
            names = ", ".join(path.name for path in files[:8])
            got = f"a folder with {names}, and no {split} file"
            raise DataError(describe(str(folder), got, f"{split}.* among its files", "name the file to read"))
        taken = by_split[chosen]
        offered = {name or "other": paths for name, paths in by_split.items() if name != chosen}
    types = sorted({readers.find(path, reader).name for path in taken})
    if len(types) > 1:
        got = f"a folder with files of several types ({', '.join(types)})"
        raise DataError(describe(str(folder), got, "one type", "name one file, or move the others away"))
    empty = [path for path in taken if path.stat().st_size == 0]
    if empty:
        raise DataError(
            describe(str(empty[0]), "an empty file (0 bytes)", "at least one row", "delete it, or write it again")
        )
    return Location(str(folder), tuple(taken), readers.find(taken[0], reader), offered=offered)
