"""Pairs and the schedule, made again and compared cell by cell."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from sp2dpo.calls import open_sealed
from sp2dpo.pairs import check_pairs as check_columns
from sp2dpo.pairs import pair_id
from sp2dpo.runs import Run
from sp2dpo.stages import build_schedule, checklist_of
from sp2dpo.tables import read_manifest, read_table
from sp2dpo.verify.files import same

__all__ = ["check_pairs", "check_schedule"]

_ROWS_AT_ONCE: Final = 1024
_TEXTS: Final = ("prompt", "chosen", "rejected")


def check_pairs(run: Run) -> str:
    """Each pair_id is that of its texts, and the counts add up.

    Raises:
        Unfinished: the first difference.
    """
    check_columns(run.pairs, "sp2dpo annotate PROCESS.yaml")
    kept = 0
    with pyarrow.parquet.ParquetFile(run.pairs) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["pair_id", *_TEXTS]):
            for row in batch.to_pylist():
                made = pair_id(*(row[name] for name in _TEXTS))
                same(f"pairs.parquet, row {kept}", "pair_id", row["pair_id"], made)
                kept += 1
    counts = (read_manifest(run.pairs) or {})["counts"]
    reasons = {name: n for name, n in counts.items() if name not in ("raw", "kept")}
    same("pairs.manifest.json", "raw count", counts["raw"], sum(reasons.values()) + kept)
    same("pairs.manifest.json", "kept count", counts["kept"], kept)
    return f"pairs     {kept} pair_ids from their text; {counts['raw']} source rows accounted for"


def check_schedule(run: Run) -> str:
    """Gaps, schedule, exclusions and checklist follow from the call log.

    Raises:
        Unfinished: the first difference.
    """
    made = build_schedule(run, open_sealed)
    _equal_tables("gaps.parquet", read_table(run.gaps, "sp2dpo schedule"), made.gaps)
    _equal_tables("schedule.parquet", read_table(run.schedule, "sp2dpo schedule"), made.schedule)
    for name, table in (("schedule.csv", made.schedule), (run.excluded.name, made.excluded)):
        _equal_csv(run.path / name, table)
    raw = (read_manifest(run.pairs) or {})["counts"]["raw"]
    scheduled, excluded = made.schedule.num_rows, made.excluded.num_rows
    same("excluded.csv", "scheduled + excluded", scheduled + excluded, raw)
    manifest = read_manifest(run.schedule) or {}
    where = "schedule.manifest.json"
    same(where, "counts", manifest["counts"], {"scheduled": scheduled, "excluded": excluded})
    same(where, "kinds", manifest["kinds"], dict(made.kinds))
    _equal_values(where, "checklist", manifest["checklist"], checklist_of(run, made, manifest["files"]))
    return f"schedule  {scheduled} β from the log; with {excluded} excluded, all source rows accounted for"


def _equal_values(where: str, what: str, found: Any, expected: Any) -> None:
    """Compare values of JSON, and name the innermost that differs."""
    if isinstance(found, dict) and isinstance(expected, dict) and found.keys() == expected.keys():
        for name, value in found.items():
            _equal_values(where, f"{what}.{name}", value, expected[name])
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        for number, pair in enumerate(zip(found, expected, strict=True)):
            _equal_values(where, f"{what}[{number}]", *pair)
    else:
        same(where, what, found, expected)


def _equal_csv(path: Path, expected: pa.Table) -> None:
    buffer = io.BytesIO()
    pa.csv.write_csv(expected, buffer)
    found, wanted = path.read_bytes(), buffer.getvalue()
    if found == wanted:
        return
    pairs = itertools.zip_longest(found.splitlines(keepends=True), wanted.splitlines(keepends=True))
    for line, (one, other) in enumerate(pairs, 1):
        same(f"{path.name}, line {line}", "content", one, other)


def _equal_tables(name: str, found: pa.Table, expected: pa.Table) -> None:
    same(name, "columns", found.column_names, expected.column_names)
    same(name, "number of rows", found.num_rows, expected.num_rows)
    for column in expected.column_names:
        if not found[column].equals(expected[column]):
            pairs = zip(found[column].to_pylist(), expected[column].to_pylist(), strict=True)
            row, (one, other) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
            same(f"{name}, row {row}", column, one, other)
