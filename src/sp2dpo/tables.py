"""Files on disk: Parquet and CSV written whole or not at all, each with a manifest.

A manifest names the hashes of what it describes and of what that was made from, and under `self` its own. It is written
last, so its presence means that the files beside it are complete.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from sp2dpo.errors import RunDirError
from sp2dpo.hashing import sha256_file, sha256_json

__all__ = [
    "amend_manifest",
    "is_current",
    "manifest_hash",
    "manifest_text",
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
    try:
        write(partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def write_table(path: Path, table: pa.Table) -> None:
    write_atomic(path, lambda partial: pa.parquet.write_table(table, partial, compression="zstd"))


def write_csv(path: Path, table: pa.Table) -> None:
    write_atomic(path, lambda partial: pa.csv.write_csv(table, partial))


def read_table(path: Path, made_by: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a Parquet file of a run; `made_by` is the command named in the error if it is not there.

    Args:
        columns: only those of these that it has; None: all.

    Raises:
        RunDirError: the file is missing or is not Parquet.
    """
    if not path.is_file():
        raise RunDirError(f"{path} is missing; make it with: {made_by}")
    try:
        with pa.parquet.ParquetFile(path) as file:
            return file.read(columns=None if columns is None else list(columns))
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
    """Write `<stem>.manifest.json` beside `artifact`: file hashes, input hashes, λ's hash, versions, other facts.

    One that says the same is left as it is, with its date.
    """
    manifest = {
        "artifact": artifact.name,
        "files": dict(files),
        "inputs": dict(inputs),
        "lambda": lambda_hash,
        **facts,
        "versions": _versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    plain: dict[str, Any] = json.loads(json.dumps(manifest))
    there = _there(artifact)
    if there is None or _undated(there) != _undated(plain):
        _write(artifact, plain)


def amend_manifest(artifact: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest again, with what was changed in it, and its own hash."""
    _write(artifact, {name: value for name, value in manifest.items() if name != "self"})


def _write(artifact: Path, manifest: dict[str, Any]) -> None:
    text = manifest_text(manifest | {"self": manifest_hash(manifest)})
    write_atomic(_manifest_path(artifact), lambda partial: partial.write_text(text, encoding="utf-8"))


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """A manifest as it is on disk."""
    return json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """What a manifest says under `self`: the hash of all else that is in it."""
    return sha256_json({name: value for name, value in manifest.items() if name != "self"})


def _there(artifact: Path) -> dict[str, Any] | None:
    """The manifest that is there, if it is whole; an older one, without its own hash, is not."""
    try:
        manifest = read_manifest(artifact)
    except RunDirError:
        return None
    return manifest if manifest is not None and manifest.get("self") == manifest_hash(manifest) else None


def _undated(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in manifest.items() if name not in ("created", "self")}


def read_manifest(artifact: Path) -> dict[str, Any] | None:
    """The manifest of `artifact`, or None if it has none yet."""
    path = _manifest_path(artifact)
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunDirError(f"{path} is not readable JSON ({error}); delete it and run the stage again") from error
    if not isinstance(manifest, dict):
        raise RunDirError(f"{path} is no manifest; delete it and run the stage again")
    return manifest


def is_current(artifact: Path, *, inputs: Mapping[str, str], lambda_hash: str) -> bool:
    """Whether `artifact` is complete, unchanged, and made from just these inputs under this λ.

    A manifest of an older version, which does not have its own hash, is taken at its word.
    """
    manifest = read_manifest(artifact)
    if manifest is None or manifest["lambda"] != lambda_hash or manifest["inputs"] != dict(inputs):
        return False
    if manifest.get("self", manifest_hash(manifest)) != manifest_hash(manifest):
        return False
    files = {artifact.with_name(name): sha for name, sha in manifest["files"].items() if "/" not in name}
    return all(path.is_file() and sha256_file(path) == sha for path, sha in files.items())
