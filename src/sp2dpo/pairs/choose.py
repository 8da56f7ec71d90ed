"""Which files of a folder are meant: by split, by glob, or all of them. Names in, names out; opens nothing."""

from __future__ import annotations

import glob
import re
from collections import defaultdict
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Final

from sp2dpo.errors import DataError
from sp2dpo.pairs.formats import SUFFIXES, is_readable

__all__ = ["choose", "patterns"]

METADATA: Final = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
SPLIT_WORDS: Final = {"train", "test", "validation", "valid", "val", "dev", "eval"}
SHARD: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d+)-of-(?P<total>\d+)")


def choose(names: Sequence[str], split: str | None, files: str | None, where: str) -> list[str]:
    """The names to read, sorted; `split` and `files` both narrow the choice.

    Raises:
        DataError: nothing matches, several splits and none named, or a shard is missing.
    """
    known = sorted(name for name in names if _is_data(name))
    chosen = [name for name in known if _has_word(name, split) and _globs(name, files)]
    if not chosen:
        raise DataError(_nothing(known or sorted(names), split, files, where))
    if files is None:
        _check_shards(chosen, where)
        if split is None:
            _check_one_split(chosen, where)
    return chosen


def patterns(split: str | None, files: str | None) -> list[str]:
    """Globs, of which `*` also crosses `/`, that let through at least what `choose` will pick."""
    if files is not None:
        return [files, files.replace("**/", "")]
    word = f"*{glob.escape(split)}" if split else ""
    return [f"{word}*{suffix}" for suffix in SUFFIXES]


def _is_data(name: str) -> bool:
    path = PurePosixPath(name)
    return is_readable(name) and path.name not in METADATA and not any(part.startswith(".") for part in path.parts)


def _has_word(name: str, split: str | None) -> bool:
    return split is None or re.search(rf"(?<!\w){re.escape(split)}(?!\w)", name) is not None


def _globs(name: str, files: str | None) -> bool:
    return files is None or any(fnmatchcase(name, pattern) for pattern in patterns(None, files))


def _nothing(names: Sequence[str], split: str | None, files: str | None, where: str) -> str:
    wanted = " and ".join(f"data.{key} '{value}'" for key, value in (("split", split), ("files", files)) if value)
    there = ", ".join(names[:12]) + (f", … ({len(names)} files)" if len(names) > 12 else "")
    return (
        f"no data file in {where}{f' fits {wanted}' if wanted else ''}; splits there: "
        f"{', '.join(_splits(names)) or 'none'}; files there: {there or 'none'}"
    )


def _splits(names: Sequence[str]) -> list[str]:
    """Words such as `train_prefs` that the names hold, shard and part numbers left off."""
    words = (word for name in names for word in re.findall(r"\w+", name))
    return sorted({re.sub(r"_?\d+$", "", word) for word in words if SPLIT_WORDS & set(word.split("_"))})


def _check_one_split(names: Sequence[str], where: str) -> None:
    splits = _splits(names)
    if len(splits) > 1:
        raise DataError(f"{where} holds several splits ({', '.join(splits)}); name one of them as data.split")


def _check_shards(names: Sequence[str], where: str) -> None:
    """A folder that was copied or downloaded in part must not pass for the whole."""
    found: dict[tuple[str, int], int] = defaultdict(int)
    for name in names:
        if shard := SHARD.match(name):
            found[shard["stem"], int(shard["total"])] += 1
    for (stem, total), count in found.items():
        if count < total:
            raise DataError(f"{where} has {count} of the {total} parts of {stem}; get the others too")
