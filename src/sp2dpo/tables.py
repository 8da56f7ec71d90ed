"""Files on disk: Parquet and CSV written whole or not at all, each with a manifest.

A manifest names the hashes of what it describes and of what that was made from. It is written last, so its presence
means that the files beside it are complete.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from sp2dpo.errors import RunDirError
from sp2dpo.hashing import sha256_file

__all__ = [
    "is_current",
    "read_manifest",
    "read_table",
    "schema_of",
    "write_atomic",
    "write_csv",
    "write_manifest",
    "write_table",
]


def schema_of(**columns: pa.DataType) -> pa.Schema:
    """A schema from column names and types, in this order."""
    return pa.schema([pa.field(name, kind) for name, kind in columns.items()])


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Call `write` with a temporary neighbour of `path`, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.replace(path)


def write_table(path: Path, table: pa.Table) -> None:
    write_atomic(path, lambda partial: pa.parquet.write_table(table, partial, compression="zstd"))


def write_csv(path: Path, table: pa.Table) -> None:
    write_atomic(path, lambda partial: pa.csv.write_csv(table, partial))


def read_table(path: Path, made_by: str) -> pa.Table:
    """Read a Parquet file of a run; `made_by` is the command named in the error if it is not there.

    Raises:
        RunDirError: the file is missing or is not Parquet.
    """
    if not path.is_file():
        raise RunDirError(f"{path} is missing; make it with: {made_by}")
    try:
        with pa.parquet.ParquetFile(path) as file:
            return file.read()
    except pa.ArrowInvalid as error:
        raise RunDirError(f"{path} is not a readable Parquet file ({error}); make it again with: {made_by}") from error


def _manifest_path(artifact: Path) -> Path:
    return artifact.with_name(artifact.name.split(".")[0] + ".manifest.json")


def _versions() -> dict[str, str]:
    names = ("sp2dpo", "numpy", "pyarrow")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in names}


def write_manifest(
    artifact: Path,
    *,
    files: Mapping[str, str],
    inputs: Mapping[str, str],
    lambda_hash: str,
    **facts: Any,
) -> None:
    """Write `<stem>.manifest.json` beside `artifact`: file hashes, input hashes, λ's hash, versions, other facts."""
    manifest = {
        "artifact": artifact.name,
        "files": dict(files),
        "inputs": dict(inputs),
        "lambda": lambda_hash,
        **facts,
        "versions": _versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    write_atomic(_manifest_path(artifact), lambda partial: partial.write_text(text, encoding="utf-8"))


def read_manifest(artifact: Path) -> dict[str, Any] | None:
    """The manifest of `artifact`, or None if it has none yet."""
    path = _manifest_path(artifact)
    if not path.is_file():
        return None
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirError(f"{path} is not readable JSON ({error}); delete it and run the stage again") from error
    return manifest


def is_current(artifact: Path, *, inputs: Mapping[str, str], lambda_hash: str) -> bool:
    """Whether `artifact` is complete, unchanged, and made from just these inputs under this λ."""
    manifest = read_manifest(artifact)
    if manifest is None or manifest["lambda"] != lambda_hash or manifest["inputs"] != dict(inputs):
        return False
    files = {artifact.with_name(name): sha for name, sha in manifest["files"].items() if "/" not in name}
    return all(path.is_file() and sha256_file(path) == sha for path, sha in files.items())
