"""All that is wrong with one file, collected and raised as one :class:`DataError`."""

from __future__ import annotations

from leantune.core.errors import DataError, describe

SHOWN = 20


class Problems:
    """Collects problems of one source; keeps the text of the first twenty and counts the rest.

    Args:
        source: the file (or data set) the problems belong to, as the reader should see it.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self.count = 0
        self._texts: list[str] = []

    def add(self, where: str, got: str, wanted: str, do: str) -> None:
        """Note one problem in the form of :func:`leantune.core.errors.describe`."""
        self.count += 1
        if len(self._texts) < SHOWN:
            self._texts.append(describe(where, got, wanted, do))

    def raise_if_any(self) -> None:
        """Raise everything at once.

        Raises:
            DataError: there is at least one problem. Twenty are spelled out, the others are counted.
        """
        if not self.count:
            return
        if self.count == 1:
            raise DataError(self._texts[0])
        lines = [f"{self.source}: {self.count} problems:", *(f"  - {text}" for text in self._texts)]
        hidden = self.count - len(self._texts)
        if hidden:
            lines.append(f"  ... and {hidden} more")
        raise DataError("\n".join(lines))
