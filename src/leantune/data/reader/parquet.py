"""Parquet tables, read in batches through pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from leantune.core.errors import DataError, describe, require
from leantune.data.problem import Problems
from leantune.data.reader import Reader, Record, register

_BATCH_ROWS = 1024


def read(path: Path, _: Problems) -> Iterator[Record]:
    """Yield one record a table row; rows are counted from one.

    Raises:
        DependencyError: pyarrow is not installed.
        DataError: the file is no parquet file, or is damaged.
    """
    require("pyarrow", "train")
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                for columns in batch.to_pylist():
                    number += 1
                    yield Record(f"{path} row {number}", columns)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        place = f"{path} after row {number}" if number else str(path)
        raise DataError(
            describe(place, f"not readable as parquet ({reason})", "a whole parquet file", "copy or write it again")
        ) from error


register(Reader(name="parquet", suffixes=(".parquet",), read=read))
