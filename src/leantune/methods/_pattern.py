"""From which units each row of a layer meets to parts: regular stretches of rows, one for each unit or group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leantune.methods.structure import Part, Role


@dataclass(frozen=True)
class Rows:
    """What every row of one layer is to an activation, each ``(rows,)``.

    Attributes:
        first: the first unit it meets.
        spread: how many neighbouring units it meets.
        local: it is needed at its own position alone.
        dense: it meets several entries of a unit.
    """

    first: Tensor
    spread: Tensor
    local: Tensor
    dense: Tensor

    @classmethod
    def channels(cls, column: Tensor) -> Rows:
        """Rows that meet one column each."""
        return cls(column, torch.ones_like(column), torch.ones_like(column).bool(), torch.zeros_like(column).bool())

    @classmethod
    def of(cls, met: Tensor, local: Tensor, dense: Tensor) -> Rows | None:
        """From which units each row meets, bool ``(units, rows)``; None unless those are aligned groups of units."""
        units = len(met)
        spread = met.sum(0)
        first = met.int().argmax(0)
        number = torch.arange(units)[:, None]
        aligned = (met == ((number >= first) & (number < first + spread))).all()
        if not bool(aligned) or not bool((spread > 0).all()):
            return None
        if bool((units % spread != 0).any()) or bool((first % spread != 0).any()):
            return None
        return cls(first, spread, local, dense)

    def role(self, row: int) -> Role:
        """What the row does in an attention."""
        if self.dense[row]:
            return "query" if self.local[row] else "key"
        return "up" if self.local[row] else "value"


def parts_of_rows(path: str, rows: Rows, units: int, width: int) -> list[Part] | None:
    """The parts of a layer, in the order in which they begin; None when its rows are not regular.

    Args:
        path: of the layer.
        rows: what its rows are.
        units: how many units the activation has.
        width: parameters of a row.
    """
    by_class: dict[tuple[bool, bool, int], list[int]] = {}
    classes = torch.stack([rows.local.long(), rows.dense.long(), rows.spread], 1).tolist()
    for row, (local, dense, spread) in enumerate(classes):
        by_class.setdefault((bool(local), bool(dense), spread), []).append(row)
    found: list[Part] = []
    for (_, _, spread), members in by_class.items():
        of_unit: dict[int, list[tuple[int, int]]] = {}
        for row, first in zip(members, rows.first[members].tolist(), strict=True):
            stretches = of_unit.setdefault(first // spread, [])
            if stretches and sum(stretches[-1]) == row:
                stretches[-1] = (stretches[-1][0], stretches[-1][1] + 1)
            else:
                stretches.append((row, 1))
        if len(of_unit) != units // spread or len({len(each) for each in of_unit.values()}) != 1:
            return None
        for number in range(len(of_unit[0])):
            stretches = [of_unit[unit][number] for unit in range(units // spread)]
            part = _regular(path, rows.role(members[0]), stretches, width)
            if part is None:
                return None
            found.append(part)
    return sorted(found, key=lambda part: part.offset)


def _regular(path: str, role: Role, stretches: list[tuple[int, int]], width: int) -> Part | None:
    """One part of stretches ``(start, size)``, unit by unit; None unless they follow ``Part``'s formula."""
    sizes = {size for _, size in stretches}
    if len(sizes) != 1:
        return None
    size, units, offset = sizes.pop(), len(stretches), stretches[0][0]
    starts = torch.tensor([start for start, _ in stretches])
    side_by_side = starts == offset + torch.arange(units) * size
    run = units if bool(side_by_side.all()) else int(side_by_side.int().argmin())
    if run == units:
        return Part(path, role, "out", units, size, offset, width)
    part = Part(path, role, "out", units, size, offset, width, run, int(starts[run]) - offset)
    told = part.entries(torch.arange(units), units).view(units, size)[:, 0]
    return part if torch.equal(told, starts) else None
