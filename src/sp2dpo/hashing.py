"""Canonical bytes and their sha256. Everything that is pinned, is pinned by these functions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["canonical_json", "sha256_file", "sha256_json", "sha256_path", "sha256_text"]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and ASCII only: equal values give equal bytes on every machine."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_json(value: Any) -> str:
    return sha256_text(canonical_json(value))


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_path(path: Path) -> str:
    """Hash of a file, or of a folder: the names and hashes of all files below it."""
    if path.is_file():
        return sha256_file(path)
    files: Iterable[Path] = (p for p in sorted(path.rglob("*")) if p.is_file())
    names: Mapping[str, str] = {p.relative_to(path).as_posix(): sha256_file(p) for p in files}
    return sha256_json(names)
