"""A folder that is made whole before anything in its place is touched, with a manifest of the hashes of its files.

A new folder appears by one rename. In a folder that is there, only files that its manifest lists, with the hash that it
lists, are replaced or deleted; all others stay. The manifest holds no date, so equal content gives equal bytes.
Knows nothing of what is in the folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Final

from sp2dpo.errors import RunDirError
from sp2dpo.hashing import sha256_file
from sp2dpo.tables import write_atomic

__all__ = ["MANIFEST", "listed_files", "new_folder", "write_listing"]

MANIFEST: Final = "publish.manifest.json"

_UNFINISHED: Final = "publish.unfinished.json"
"""Stands in the folder while files are exchanged: the hashes that each may have, so that the next start goes on."""

_MOST_NAMED: Final = 5


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary neighbour of `out`, whose files go to `out` if the block ends well; it is deleted in any case.

    Raises:
        RunDirError: `out` cannot be made; or it holds something that `sp2dpo publish` did not make, and that is in the
            way, or something of its own that was changed since. Nothing was touched.
    """
    place = Path(os.path.realpath(out))
    _ours(place, out)
    absent = [parent for parent in place.parents if not parent.exists()]
    partial = None
    try:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".partial", dir=place.parent))
        except OSError as error:
            raise RunDirError(f"{out} cannot be made: {error.strerror}; give another folder with -o") from None
        partial.chmod(0o755)
        yield partial
        if place.exists():
            _exchange(partial, place, _ours(place, out), out)
        else:
            partial.replace(place)
    finally:
        if partial:
            shutil.rmtree(partial, ignore_errors=True)
        for parent in absent:
            with suppress(OSError):  # what was made stays if something is in it
                parent.rmdir()


def listed_files(folder: Path) -> Mapping[str, str]:
    """The hash of each file by relative path, without the manifest itself.

    Raises:
        RunDirError: the manifest is not one that `sp2dpo publish` wrote.
    """
    return {name: sha for name, (sha,) in _listed(folder / MANIFEST).items()}


def _listed(path: Path) -> dict[str, list[str]]:
    """The hashes that each file may have."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        listed = {name: [of] if isinstance(of, str) else list(of) for name, of in files.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        listed = {"..": []}
    if any(PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts for name in listed):
        raise RunDirError(f"{path} is not as sp2dpo publish wrote it; give another folder with -o")
    return listed


def _ours(place: Path, out: Path) -> dict[str, list[str]]:
    """The files of an earlier publish in `place`, finished or not, each with the hashes that it may have."""
    if not place.exists():
        return {}
    if not place.is_dir():
        raise RunDirError(f"{out} is a file; give a folder with -o")
    listings = [place / name for name in (MANIFEST, _UNFINISHED) if os.path.lexists(place / name)]
    if not listings and any(place.iterdir()):
        raise RunDirError(
            f"{out} holds files that sp2dpo publish did not make (it has no {MANIFEST}); give another folder with -o, "
            "or empty it"
        )
    ours: dict[str, list[str]] = {}
    for listing in listings:
        for name, hashes in _listed(listing).items():
            ours.setdefault(name, []).extend(hashes)
    there = {name: hashes for name, hashes in ours.items() if os.path.lexists(place / name)}
    changed = [
        name for name, of in there.items() if not (place / name).is_file() or sha256_file(place / name) not in of
    ]
    if changed:
        raise RunDirError(
            f"changed in {out} since sp2dpo publish wrote it: {_named(changed)}. Nothing was touched; keep it under "
            "another name, or delete it, or give another folder with -o"
        )
    return there


def _exchange(partial: Path, place: Path, old: Mapping[str, list[str]], out: Path) -> None:
    """Put the files of `partial` in the place of the `old` ones; a stop in the middle leaves a list of both."""
    new = listed_files(partial)
    in_the_way = [name for name in new if _is_in_the_way(place, name, old)]
    if in_the_way:
        raise RunDirError(
            f"in {out}, files that sp2dpo publish did not make are in the way of {_named(in_the_way)}. Nothing was "
            "touched; move them, or give another folder with -o"
        )
    both = {name: sorted({*old.get(name, ()), *([new[name]] if name in new else ())}) for name in {*old, *new}}
    text = json.dumps({"files": both}, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_atomic(place / _UNFINISHED, lambda path: path.write_text(text, encoding="utf-8"))
    (place / MANIFEST).unlink(missing_ok=True)
    for name in old:
        (place / name).unlink()
    _delete_empty(place, old)
    for name in (*new, MANIFEST):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(partial / name, place / name)
    (place / _UNFINISHED).unlink()


def _is_in_the_way(place: Path, name: str, old: Iterable[str]) -> bool:
    """Whether something that is not of the `old` files has the name of a file, or of one of its folders."""
    parents = [parent for parent in PurePosixPath(name).parents if parent.name]
    names = [name, *(str(one) for one in parents if not (place / one).is_dir())]
    return any(one not in old and os.path.lexists(place / one) for one in names)


def _delete_empty(place: Path, names: Iterable[str]) -> None:
    """Delete the folders of these files that are empty now, the innermost first."""
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents if parent.name}
    for folder in sorted(folders, key=len, reverse=True):
        with suppress(OSError):
            (place / folder).rmdir()


def _named(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(sorted(names)[:_MOST_NAMED]) + more


def write_listing(folder: Path, **facts: Any) -> Mapping[str, str]:
    """Hash every file of `folder` and write the manifest, last; returns the hashes by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}
    versions = {name: importlib.metadata.version(name) for name in ("sp2dpo", "pyarrow")}
    manifest = {**facts, "versions": versions, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return files
