"""Files and the manifests that describe them: each file has the hash that is written there, each manifest its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from sp2dpo.calls import open_sealed, unwritten
from sp2dpo.calls.rows import line_of
from sp2dpo.errors import RunDirError, Unfinished
from sp2dpo.progress import Progress
from sp2dpo.runs import Run
from sp2dpo.tables import manifest_hash, manifest_text, read_manifest

__all__ = ["Manifests", "check_links", "same"]

_SUFFIX: Final = ".manifest.json"
_MIB: Final = 2**20
_LONG_MIB: Final = 256
"""From so much on, hashing shows how far it is."""

_MADE_BY: Final = {
    "pairs": "sp2dpo annotate PROCESS.yaml",
    "calls": "sp2dpo annotate PROCESS.yaml",
    "gaps": "sp2dpo schedule PROCESS.yaml",
    "schedule": "sp2dpo schedule PROCESS.yaml",
}
"""Manifests without which nothing can be said, and what makes them."""


def same(where: str, what: str, found: object, expected: object) -> None:
    """Compare what is there with what it should be.

    Raises:
        Unfinished: they differ.
    """
    if found != expected:
        raise Unfinished(f"{where}: {what} is {_short(found)}, recomputed it is {_short(expected)}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 400 else f"{text[:200]} … {text[-100:]}"


class Manifests:
    """Every manifest below a run directory, and what they say of its files."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._paths = sorted(path for path in run.path.rglob(f"*{_SUFFIX}") if path.is_file())
        self._hashes: dict[str, str] = {}
        self._stale: list[str] = []

    def check(self) -> str:
        """Each manifest is as it was written and names this λ, the files as they are, and inputs as they are.

        Raises:
            Unfinished: the first difference.
        """
        run = self._run
        whole = {path: self._whole(path) for path in self._paths}
        for stem, made_by in _MADE_BY.items():
            if run.path / f"{stem}{_SUFFIX}" not in whole:
                raise Unfinished(
                    f"{stem}{_SUFFIX} is missing: {stem} was not made, or not finished; make it with: {made_by}"
                )
        self._hash(whole)
        calls = whole.pop(run.path / f"calls{_SUFFIX}")
        as_left = bool(calls["files"]) and calls["files"] == {run.calls.name: self._hashes.get(run.calls.name)}
        content = self._content(as_left)
        own = {run.calls.name: content, "source": run.process.resolved["pins"]["data"]}
        for path, manifest in whole.items():
            self._check_files(path, manifest)
            self._check_inputs(path, manifest, own)
        self._check_log(calls, content, as_left)
        return f"manifests {len(self._hashes)} files and their inputs"

    def remarks(self) -> Iterator[str]:
        """What is not wrong, but should be known."""
        yield from self._stale
        known = {"process.yaml", f"{self._run.calls.name}.lock", *self._hashes, *map(self._name, self._paths)}
        known |= {f"prompts/{name}" for name in self._run.process.pack.files}
        pinned = self._run.process.resolved["pins"].get("predictors", {})  # `Recomputed` checks both hashes
        known |= {f"predictors/{name}/{file}" for name in pinned for file in ("model.json", "model.npz")}
        there = {self._name(path) for path in self._run.path.rglob("*") if path.is_file()}
        unknown = sorted(name for name in there - known if not self._names_itself(name))
        if unknown:
            more = f" and {len(unknown) - 6} more" if len(unknown) > 6 else ""
            yield f"uncovered {', '.join(unknown[:6])}{more}: described by no manifest, so not checked"

    def _name(self, path: Path) -> str:
        return path.relative_to(self._run.path).as_posix()

    def _names_itself(self, name: str) -> bool:
        """Whether a file is named for the hash of its bytes, as those of batch jobs are.

        Raises:
            Unfinished: it should be, and is not.
        """
        stem = re.fullmatch(r"batches/.*?([0-9a-f]{64})\.jsonl", name)
        if stem is None:
            return False
        same(name, "sha256", stem[1], _sha256(self._run.path / name, None))
        return True

    def _whole(self, path: Path) -> dict[str, Any]:
        """A manifest, if its bytes are those that were written."""
        name = self._name(path)
        try:
            manifest = read_manifest(path.with_name(path.name.removesuffix(_SUFFIX))) or {}
        except RunDirError as error:
            raise Unfinished(str(error)) from error
        if "self" not in manifest:
            raise Unfinished(f"{name} was made by an older version, without its own hash; run sp2dpo schedule again")
        same(name, "hash of itself", manifest["self"], manifest_hash(manifest))
        same(name, "content", path.read_bytes(), manifest_text(manifest).encode())
        return manifest

    def _hash(self, manifests: Mapping[Path, Mapping[str, Any]]) -> None:
        """Hash every file that a manifest describes, once."""
        files = {path.parent / name for path, manifest in manifests.items() for name in manifest["files"]}
        there = sorted(file for file in files if file.is_file())
        size = sum(file.stat().st_size for file in there) // _MIB
        with Progress("hashing MiB", size if size >= _LONG_MIB else 0) as progress:
            self._hashes = {self._name(file): _sha256(file, progress if size >= _LONG_MIB else None) for file in there}

    def _check_files(self, path: Path, manifest: Mapping[str, Any]) -> None:
        name = self._name(path)
        same(name, "λ", manifest["lambda"], self._run.process.lambda_hash)
        for file, sha in manifest["files"].items():
            same(name, f"hash of {file}", sha, self._hashes.get(self._name(path.parent / file), "missing"))

    def _check_inputs(self, path: Path, manifest: Mapping[str, Any], own: Mapping[str, str]) -> None:
        """Inputs as they are; what comes after the schedule may have been made from an earlier one."""
        name, now = self._name(path), {**self._hashes, **own}
        for source, sha in manifest["inputs"].items():
            if name.removesuffix(_SUFFIX) in _MADE_BY:
                same(name, f"hash of its input {source}", sha, now.get(source, "missing"))
            elif now.get(source, sha) != sha:
                self._stale.append(f"stale     {name.removesuffix(_SUFFIX)} was made from an earlier {source}")
                return

    def _content(self, as_left: bool) -> str:
        """The head of the chain of the call log.

        Raises:
            Unfinished: the file is not as its writer left it, and a row is not either.
        """
        calls = self._run.calls
        problem = unwritten(calls)
        if problem:
            raise Unfinished(problem)
        with open_sealed(calls) as log:
            if not log.linked:
                same(calls.name, "head of the chain", log.content_hash(), log.recomputed_hash())
            elif not as_left:
                with closing(log.stretch(1, log.last_id())) as rows:
                    check_links("", rows)
            return log.content_hash()

    def _check_log(self, manifest: Mapping[str, Any], content: str, as_left: bool) -> None:
        name, calls = f"calls{_SUFFIX}", self._run.calls.name
        same(name, "λ", manifest["lambda"], self._run.process.lambda_hash)
        same(name, "content hash", manifest["content"], content)
        if not manifest["files"]:
            raise Unfinished(f"{name}: {calls} was still being read as its writer ended; run sp2dpo schedule again")
        if not as_left:
            raise Unfinished(
                f"{calls}: its rows are as they were logged, and other bytes of the file are not: an index, a trigger, "
                "free space, or notes of starts and batch jobs"
            )


def _sha256(path: Path, progress: Progress | None) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while piece := file.read(_MIB):
            digest.update(piece)
            if progress:
                progress.advance()
    return digest.hexdigest()


def check_links(before: str, rows: Iterable[tuple[int, str | None, tuple[Any, ...]]]) -> None:
    """Check the links of the chain of some rows, the first of which is bound to the link `before`.

    Raises:
        Unfinished: a row was changed, or one before it is not there.
    """
    for number, link, row in rows:
        try:
            made = sha256((before + line_of(row)).encode()).hexdigest()
        except (TypeError, ValueError):
            made = "that of a row that no call log can hold"
        same(f"calls.sqlite, row {number}", "link of the chain", link, made)
        before = link or ""
