"""`data.columns`: the user's names for the columns become the known ones, before any layout is tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from sp2dpo.errors import DataError, nearest
from sp2dpo.pairs.formats import NUMBERS, Row
from sp2dpo.pairs.schemas import SCHEMAS

__all__ = ["KNOWN", "column_names", "free_name", "rename"]

KNOWN: Final = tuple(
    dict.fromkeys([*(name for schema in SCHEMAS for name in (*schema.text, *schema.needs)), "prompt_id", *NUMBERS])
)
"""Every column name that means something here."""


def column_names(rows: Sequence[Row]) -> list[str]:
    """The columns of all rows, in the order in which they are first met."""
    return list(dict.fromkeys(name for row in rows for name in row))


def free_name(name: str, taken: set[str]) -> str:
    """`name`, or, if that is taken, `source_name` (again and again until it is free)."""
    while name in taken:
        name = f"source_{name}"
    return name


def rename(rows: Sequence[Row], columns: Mapping[str, str]) -> list[Row]:
    """The rows with `columns` (known name: source's name) applied at once; a column in the way becomes `source_…`.

    Raises:
        DataError: a name on either side that is not known.
    """
    if not columns:
        return list(rows)
    names = column_names(rows)
    _check(columns, names)
    new = {theirs: ours for ours, theirs in columns.items()}
    taken = {*names, *columns}
    new |= {name: free_name(name, taken) for name in names if name in columns and name not in new}
    return [{new.get(name, name): value for name, value in row.items()} for row in rows]


def _check(columns: Mapping[str, str], names: Sequence[str]) -> None:
    for ours, theirs in columns.items():
        if ours not in KNOWN:
            raise DataError(
                f"data.columns: '{ours}' is not a known column{nearest(ours, KNOWN)}; those are: {', '.join(KNOWN)}"
            )
        if theirs not in names:
            raise DataError(
                f"data.columns: the source has no column '{theirs}'{nearest(theirs, names)}; it has: {', '.join(names)}"
            )
    if len(set(columns.values())) < len(columns):
        raise DataError("data.columns gives one column of the source two names; each can have one")
