"""A source to canonical pairs, with every row accounted for. Sec. E.2, Table 9.

raw = the rows of all reasons + kept, always. Knows nothing of annotation; writes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sp2dpo.errors import DataError
from sp2dpo.hashing import sha256_json
from sp2dpo.pairs.columns import extra_columns
from sp2dpo.pairs.filters import FILTERS, STRUCTURAL, Pair, check_filters
from sp2dpo.pairs.load import read_source
from sp2dpo.pairs.messages import Message
from sp2dpo.pairs.rename import column_names, rename
from sp2dpo.pairs.schemas import RawPair, read_row, schema_of
from sp2dpo.pairs.store import DROPPED_SCHEMA, PAIRS_SCHEMA

if TYPE_CHECKING:
    from sp2dpo.settings import DataSettings

__all__ = ["Prepared", "pair_id", "prepare"]

Dropped = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """Pairs and dropped rows as tables; `counts` adds up to raw, `notes` counts oddities among the kept."""

    pairs: pa.Table
    dropped: pa.Table
    counts: dict[str, int]
    notes: dict[str, int]
    schema: str
    files: tuple[str, ...] = ()


def pair_id(prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]) -> str:
    """sha256 of the canonical prompt, chosen and rejected: what a pair is called everywhere else."""
    return sha256_json([prompt, chosen, rejected])


def prepare(data: DataSettings, base: Path) -> Prepared:
    """Load, normalise, filter and count `data.source`; relative paths start at `base`.

    Raises:
        DataError: a setting, the source, or that no row of it can be used.
    """
    check_filters(data.filters)
    source = read_source(data, base)
    rows = rename(source.rows, data.columns)
    schema = schema_of(column_names(rows), rows)
    read = [read_row(schema, row) for row in rows]
    pairs = [_identified(raw, number) for number, raw in enumerate(read) if isinstance(raw, RawPair)]
    dropped = [_no_pair(rows[number], number, raw) for number, raw in enumerate(read) if isinstance(raw, str)]
    kept, filtered = _filter(pairs, data.filters)
    dropped = sorted(dropped + filtered, key=lambda row: row["source_row"])
    counts = _count(len(rows), dropped, data.filters)
    if not kept:
        table = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"no row of {data.source} can be used, read as {schema.name}: {table}")
    notes = {name: sum(marks(kept)) for name, marks in FILTERS.items() if name not in data.filters}
    dropped_table = pa.Table.from_pylist(dropped, DROPPED_SCHEMA)
    return Prepared(_pairs_table(kept), dropped_table, counts, notes, schema.name, source.files)


def _identified(raw: RawPair, source_row: int) -> Pair:
    identity = pair_id(raw.prompt, raw.chosen, raw.rejected)
    return Pair(identity, raw.prompt_id or identity, raw.prompt, raw.chosen, raw.rejected, source_row, raw.extra)


def _no_pair(row: Mapping[str, Any], number: int, reason: str) -> Dropped:
    name = row.get("prompt_id")
    shown = None if name is None else str(name).encode("utf-8", "backslashreplace").decode("utf-8")
    return {"source_row": number, "prompt_id": shown, "pair_id": None, "reason": reason}


def _filter(pairs: Sequence[Pair], names: Sequence[str]) -> tuple[list[Pair], list[Dropped]]:
    """What stays, and what goes with the first of `names` that applies to it."""
    marks = {name: FILTERS[name](pairs) for name in names}
    kept: list[Pair] = []
    dropped: list[Dropped] = []
    for i, pair in enumerate(pairs):
        reason = next((name for name in names if marks[name][i]), None)
        if reason is None:
            kept.append(pair)
        else:
            identity = {name: getattr(pair, name) for name in ("source_row", "prompt_id", "pair_id")}
            dropped.append(identity | {"reason": reason})
    return kept, dropped


def _count(raw: int, dropped: Sequence[Dropped], filters: Sequence[str]) -> dict[str, int]:
    found = Counter(row["reason"] for row in dropped)
    structural = {reason: found[reason] for reason in STRUCTURAL if found[reason]}
    return {"raw": raw} | structural | {name: found[name] for name in filters} | {"kept": raw - len(dropped)}


def _pairs_table(pairs: Sequence[Pair]) -> pa.Table:
    own = {field.name: pa.array([getattr(pair, field.name) for pair in pairs], field.type) for field in PAIRS_SCHEMA}
    return pa.table(own | extra_columns([pair.extra for pair in pairs], PAIRS_SCHEMA.names))
