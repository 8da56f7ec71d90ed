"""`pairs.parquet` on disk: its columns, how it is written, how it is read back. Knows nothing of sources or layouts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.parquet

from sp2dpo import tables
from sp2dpo.errors import DataError
from sp2dpo.hashing import sha256_file

if TYPE_CHECKING:
    from sp2dpo.pairs.prepare import Prepared

__all__ = ["DROPPED_SCHEMA", "MESSAGES", "PAIRS_SCHEMA", "check_pairs", "dropped_path", "read_pairs", "write_prepared"]

MESSAGES: Final[pa.DataType] = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

PAIRS_SCHEMA: Final = pa.schema(
    [
        pa.field("pair_id", pa.string()),
        pa.field("prompt_id", pa.string()),
        pa.field("prompt", MESSAGES),
        pa.field("chosen", MESSAGES),
        pa.field("rejected", MESSAGES),
        pa.field("source_row", pa.int64()),
    ]
)
"""The columns that every pairs table begins with; the source's own follow."""

_DROPPED: Final[dict[str, pa.DataType]] = {
    "source_row": pa.int64(),
    "prompt_id": pa.string(),
    "pair_id": pa.string(),
    "reason": pa.string(),
}
DROPPED_SCHEMA: Final = pa.schema(_DROPPED)

OPTIONAL: Final = {"source_row"}
_ROWS_AT_ONCE: Final = 1024


def dropped_path(path: Path) -> Path:
    """Where the dropped rows of the pairs in `path` are listed."""
    return path.with_name(path.stem + ".dropped.csv")


def write_prepared(prepared: Prepared, path: Path, *, inputs: Mapping[str, str], lambda_hash: str) -> None:
    """Pairs, dropped rows, and last the manifest with the counts."""
    dropped = dropped_path(path)
    tables.write_table(path, prepared.pairs)
    tables.write_csv(dropped, prepared.dropped)
    tables.write_manifest(
        path,
        files={file.name: sha256_file(file) for file in (path, dropped)},
        inputs=inputs,
        lambda_hash=lambda_hash,
        counts=dict(prepared.counts),
        notes=dict(prepared.notes),
        schema=prepared.schema,
        source_files=list(prepared.files),
    )


def read_pairs(path: Path, made_by: str) -> pa.Table:
    """The pairs of a run, or a table made by hand with the same columns (`source_row` may be left out).

    Raises:
        RunDirError: no such file, or not Parquet.
        DataError: a column is missing, of another type, or empty somewhere.
    """
    return _checked(tables.read_table(path, made_by), path, made_by)


def _checked(table: pa.Table, path: Path, made_by: str) -> pa.Table:
    missing = [name for name in PAIRS_SCHEMA.names if name not in table.column_names and name not in OPTIONAL]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}; make it with: {made_by}")
    for field in PAIRS_SCHEMA:
        if field.name in table.column_names:
            table = _typed(table, field, path, made_by)
    return table


def check_pairs(path: Path, made_by: str) -> None:
    """The same checks without keeping the texts.

    Raises:
        RunDirError, DataError: as `read_pairs`.
    """
    if not path.is_file():
        read_pairs(path, made_by)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            there = [name for name in PAIRS_SCHEMA.names if name in file.schema_arrow.names]
            _checked(file.schema_arrow.empty_table(), path, made_by)
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=there):
                _checked(pa.Table.from_batches([batch]), path, made_by)
    except pa.ArrowInvalid:
        read_pairs(path, made_by)


def _typed(table: pa.Table, field: pa.Field[Any], path: Path, made_by: str) -> pa.Table:
    column = table.column(field.name)
    wrong = f"{path}: column {field.name}"
    try:
        typed = column if column.type == field.type else column.cast(field.type)
    except pa.ArrowException as error:
        raise DataError(f"{wrong} is {column.type}, not {field.type}; make it with: {made_by}") from error
    if typed.null_count:
        raise DataError(f"{wrong} is empty in {typed.null_count} rows; make it with: {made_by}")
    return table.set_column(table.column_names.index(field.name), field, typed)
