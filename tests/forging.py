"""Changes to a run directory that hide themselves: what `verify` has to find."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from sp2dpo.calls.rows import COLUMNS, line_of
from sp2dpo.hashing import sha256_file
from sp2dpo.tables import manifest_hash, manifest_text


def rewrite_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(manifest_text(manifest | {"self": manifest_hash(manifest)}), encoding="utf-8")


def cover_up(run_dir: Path) -> None:
    """Make the chain of the log again, and write the hashes of the files as they now are into all manifests.

    As a careful forger would.
    """
    content = ""
    with unguarded(run_dir / "calls.sqlite") as db:
        for number, *row in db.execute(f"SELECT id, {', '.join(COLUMNS)} FROM calls ORDER BY id").fetchall():
            content = hashlib.sha256((content + line_of(row)).encode()).hexdigest()
            db.execute("UPDATE calls SET chain = ? WHERE id = ?", (content, number))
    now = {path.name: sha256_file(path) for path in run_dir.iterdir() if path.is_file()}

    def fit(manifest: dict[str, Any]) -> None:
        for part, known in (("files", now), ("inputs", now | {"calls.sqlite": content})):
            manifest[part] = {name: known.get(name, sha) for name, sha in manifest[part].items()}
        if "content" in manifest:
            manifest["content"] = content

    for path in run_dir.glob("*.manifest.json"):
        rewrite_manifest(path, fit)


@contextmanager
def unguarded(path: Path) -> Iterator[sqlite3.Connection]:
    """A call log without its triggers."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            db.execute(f"DROP TRIGGER {name}")
        yield db
        for _, create in triggers:
            db.execute(create)


def forge_call(run_dir: Path, sql: str) -> None:
    """Change the call log past its triggers."""
    with unguarded(run_dir / "calls.sqlite") as db:
        assert db.execute(sql).rowcount >= 1
