"""Answers that are already there: a `calls.sqlite` of another run, or a JSONL of answers.

An answer out of a call log is replayed only to the very question that it was given to (the request hashes must agree).
A line of JSONL has `pair_id`, `variant`, `raw_text` and no such hash; there the `pair_id` pins the text of the pair,
and the prompt is taken on trust.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sp2dpo.calls import open_calls
from sp2dpo.errors import ProcessError
from sp2dpo.llm import storable

__all__ = ["Recording", "read_recording"]

Recording = Mapping[tuple[str, str], Mapping[str, Any]]
"""(pair_id, variant) → fields of a call."""

_REQUIRED = ("pair_id", "variant", "raw_text")
_OPTIONAL = ("annotator", "served_model", "finish_reason", "system_fingerprint")


def read_recording(path: Path, annotator: str) -> Recording:
    """The answers of one annotator; if a question was answered more than once, the first.

    Raises:
        ProcessError: not a call log or JSONL of answers, or it holds none of this annotator.
    """
    rows = _from_log(path) if path.suffix == ".sqlite" else _from_jsonl(path)
    answers: dict[tuple[str, str], Mapping[str, Any]] = {}
    others: set[str] = set()
    for row in rows:
        if row.get("annotator", annotator) == annotator:
            answers.setdefault((row["pair_id"], row["variant"]), row)
        else:
            others.add(str(row["annotator"]))
    if not answers:
        raise ProcessError(
            f"{path} has no answers of annotator '{annotator}'; it has: {', '.join(sorted(others)) or 'none'}"
        )
    return answers


def _from_log(path: Path) -> Iterator[Mapping[str, Any]]:
    with open_calls(path) as log:
        for call in log.answers():
            yield vars(call)


def _from_jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ProcessError(f"{path}, line {number}: not JSON ({error})") from error
            missing = [key for key in _REQUIRED if not isinstance(row, dict) or not isinstance(row.get(key), str)]
            if missing:
                raise ProcessError(
                    f"{path}, line {number}: an answer needs the texts {', '.join(_REQUIRED)}; no {missing[0]}"
                )
            texts = {key: row[key] for key in (*_REQUIRED, *_OPTIONAL) if isinstance(row.get(key), str)}
            yield {key: storable(text) for key, text in texts.items()}
