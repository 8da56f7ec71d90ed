"""The source's own columns as Arrow arrays: numbers, texts and dates as they are, anything else as JSON text.

Knows nothing of which columns there are.
"""

from __future__ import annotations

import datetime
import decimal
import json
from collections.abc import Sequence
from typing import Any, Final

import pyarrow as pa

from sp2dpo.pairs.rename import free_name

__all__ = ["column", "extra_columns"]

PRIMITIVES: Final = {
    *(bool, int, float, str, bytes),
    *(datetime.datetime, datetime.date, datetime.time, datetime.timedelta, decimal.Decimal),
}


def extra_columns(extras: Sequence[dict[str, Any]], taken: Sequence[str]) -> dict[str, pa.Array[Any]]:
    """One array for each column of `extras`; a name in `taken` gets `source_` before it."""
    names = list(dict.fromkeys(name for extra in extras for name in extra))
    new: dict[str, pa.Array[Any]] = {}
    for name in names:
        rivals = {*taken, *new, *names} if name in taken else {*new}
        new[free_name(_encodable(name), rivals)] = column([extra.get(name) for extra in extras])
    return new


def column(values: Sequence[Any]) -> pa.Array[Any]:
    """Values of one primitive type keep it; mixed and nested ones become JSON."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        kinds, values = {float}, [None if value is None else float(value) for value in values]
    try:
        if len(kinds) == 1 and kinds <= PRIMITIVES - {str}:
            typed: pa.Array[Any] = pa.array(values)
            return typed
    except (pa.ArrowException, OverflowError):  # integers beyond 64 bits, datetimes of several zones
        pass
    return _text_column(values if kinds <= {str} else [_json(value) for value in values])


def _text_column(values: Sequence[str | None]) -> pa.Array[Any]:
    return pa.array([None if value is None else _encodable(value) for value in values], pa.string())


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, default=str)


def _encodable(text: str) -> str:
    """The text, with half surrogate pairs spelled out, which no file could hold."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode("utf-8")
