"""One JSON document: a list of objects, or an object that holds one such list, as ``{"data": [...]}``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leantune.core.errors import DataError, describe
from leantune.data.problem import Problems
from leantune.data.reader import Reader, Record, jsonl, lines_of, register

_SPACE = " \t\r\n"
_WANTED = 'a list of objects, or an object with one list of them, as {"data": [...]}'


class _Document:
    """A JSON text, walked value by value, so that the line of each is known."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self._decoder = json.JSONDecoder()
        self._counted = 0
        self._line = 1

    @property
    def line(self) -> int:
        """The line of the next sign that is not white space."""
        self._line += self.text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._line

    def seek(self, position: int) -> None:
        """Go on at a place of the text."""
        self.position, self._counted, self._line = position, 0, 1

    def peek(self) -> str:
        """The next sign that is not white space; nothing at the end."""
        while self.text[self.position : self.position + 1] in _SPACE and self.position < len(self.text):
            self.position += 1
        return self.text[self.position : self.position + 1]

    def take(self, signs: str) -> str:
        """Step over one of these signs.

        Raises:
            JSONDecodeError: something else stands there.
        """
        found = self.peek()
        if not found or found not in signs:
            raise json.JSONDecodeError(
                f"Expecting {' or '.join(repr(sign) for sign in signs)}", self.text, self.position
            )
        self.position += 1
        return found

    def value(self) -> Any:
        """The next value.

        Raises:
            JSONDecodeError: it is not JSON.
        """
        self.peek()
        found, self.position = self._decoder.raw_decode(self.text, self.position)
        return found

    def items(self) -> Iterator[tuple[int, Any]]:
        """The items of the list that comes next, each with its line."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            self.peek()
            line = self.line
            yield line, self.value()
            if self.take(",]") == "]":
                return


def _position_of_the_list(path: Path, document: _Document) -> int:
    """Where the one list of a document's object begins.

    Raises:
        DataError: it holds none, or several.
        JSONDecodeError: it is not JSON.
    """
    places: dict[str, int] = {}
    document.take("{")
    while document.peek() != "}":
        key = document.value()
        document.take(":")
        is_list, place = document.peek() == "[", document.position
        document.value()
        if is_list:
            places[str(key)] = place
        if document.take(",}") == "}":
            break
    if len(places) != 1:
        held = "no list" if not places else "several lists (" + ", ".join(f"'{key}'" for key in places) + ")"
        do = (
            "write each list, or the object itself as one row, to a file of its own; columns as lists become rows first"
        )
        raise DataError(describe(str(path), f"an object with {held}", _WANTED, do))
    return next(iter(places.values()))


def _is_lines(text: str) -> bool:
    """Whether this is JSON lines under another name: its first line is an object, and more follows."""
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and isinstance(json.loads(first), dict)
    except ValueError:
        return False


def read(path: Path, problems: Problems) -> Iterator[Record]:
    """Yield one record an object of the list; a file of JSON lines is read as such.

    Raises:
        DataError: the document has another form.
    """
    parts = [(line, is_good) for _, line, is_good in lines_of(path, problems)]
    if not all(is_good for _, is_good in parts):
        return
    text = "".join(line for line, _ in parts)
    if not text.strip():
        return
    if _is_lines(text):
        yield from jsonl.read(path, problems)
        return
    document = _Document(text)
    try:
        if document.peek() == "{":
            document.seek(_position_of_the_list(path, document))
        if document.peek() != "[":
            raise DataError(
                describe(str(path), jsonl.KINDS[type(document.value())], _WANTED, "write it as such a list")
            )
        for number, (line, value) in enumerate(document.items(), start=1):
            where = f"{path}:{line} (item {number})"
            if isinstance(value, dict):
                yield Record(where, value)
            else:
                problems.add(
                    where, jsonl.KINDS[type(value)], "an object with the row's columns", "mend or delete the item"
                )
    except json.JSONDecodeError as error:
        got = f"not JSON ({error.msg} at column {error.colno})"
        problems.add(f"{path}:{error.lineno}", got, _WANTED, "mend the file; what follows was not read")
    except RecursionError:
        problems.add(str(path), "not JSON (nested too deeply)", _WANTED, "mend the file")


register(Reader(name="json", suffixes=(".json",), read=read, compressed=True))
