"""Shards: files of questions, the batch jobs that ask them, and the rows that come back. Talks to nobody."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

from sp2dpo.annotate.batch_api import Status
from sp2dpo.annotate.bring import custom_id, raw_of
from sp2dpo.calls import CallLog
from sp2dpo.llm import Raw, Request

__all__ = ["Job", "Place", "ShardFile", "jobs_in_flight", "outcomes", "places_of"]

_NAME_AT: Final = len(b'{"custom_id":"')


@dataclass(eq=False)
class Job:
    """A shard and the batch job that asks it.

    `questions` has for each pair_id the variants of each of its calls; `asked` how often a call, by its `custom_id`,
    was made before, if it was. `calls` and `path` are of the file.
    """

    shard: str
    path: str
    calls: int
    questions: Mapping[str, Sequence[Sequence[str]]]
    asked: Mapping[str, int]
    file_id: str | None = None
    batch_id: str | None = None
    status: Status | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What a later start has to know to collect the rows."""
        return {name: getattr(self, name) for name in ("path", "calls", "questions", "asked", "file_id")}

    def __str__(self) -> str:
        return f"batch job {self.batch_id}"


def jobs_in_flight(log: CallLog, annotator: str) -> list[Job]:
    """Jobs that were intended or submitted and whose rows are not collected: they may be paid for already."""
    jobs: dict[str, Job] = {}
    for event in log.batch_events(annotator):
        if event.event == "intended":
            jobs[event.shard] = Job(shard=event.shard, **json.loads(event.detail))
        elif event.event == "submitted":
            jobs[event.shard].batch_id = event.batch_id
        else:
            del jobs[event.shard]
    return list(jobs.values())


class ShardFile:
    """A file of questions that is being written. Its name will be the hash of its bytes."""

    def __init__(self, file: Path, calls: int, size: int) -> None:
        self.file, self._most_calls, self._most_bytes = file, calls, size
        self._digest, self._size, self._path = sha256(), 0, ""
        self._names: set[str] = set()
        self._known: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._questions: dict[str, list[tuple[str, ...]]] = {}
        self._asked: dict[str, int] = {}

    @property
    def calls(self) -> int:
        return len(self._names)

    def takes(self, request: Request, line: bytes) -> bool:
        """Whether the line fits; then it is counted in, and has to be written."""
        name = custom_id(request.pair_id, request.variants)
        full = self.calls >= self._most_calls or self._size + len(line) > self._most_bytes
        if full or name in self._names or self._path not in ("", request.path):
            return False
        self._digest.update(line)
        self._size, self._path = self._size + len(line), request.path
        self._names.add(name)
        variants = self._known.setdefault(request.variants, request.variants)
        self._questions.setdefault(request.pair_id, []).append(variants)
        if request.asked:
            self._asked[name] = request.asked
        return True

    def job(self) -> Job | None:
        """The job that this file is for; None if it is empty."""
        if not self._names:
            self.file.unlink()
            return None
        shard = self._digest.hexdigest()
        self.file.rename(self.file.with_name(f"{shard}.jsonl"))
        return Job(shard, self._path, self.calls, self._questions, self._asked)


class Place(NamedTuple):
    """A call in a file of questions: where its line begins, and which it is."""

    at: int
    pair_id: str
    variants: tuple[str, ...]
    asked: int


def places_of(job: Job, file: Path) -> dict[str, Place]:
    """Calls of a job by name, in the order of its file."""
    ids = {custom_id(pair, tuple(v)): (pair, tuple(v)) for pair, calls in job.questions.items() for v in calls}
    places, at = {}, 0
    with file.open("rb") as lines:
        for line in lines:
            name = line[_NAME_AT : line.index(b'"', _NAME_AT)].decode()
            places[name] = Place(at, *ids[name], job.asked.get(name, 0))
            at += len(line)
    return places


def outcomes(
    job: Job, status: Status, places: Mapping[str, Place], outputs: Sequence[Path], tally: Counter[str]
) -> Iterator[tuple[Place, Raw]]:
    """What the files of a job say of each call: the first line about it, or in the end that there is none.

    `tally` counts the calls by what came, and the lines that say nothing new.
    """
    left = dict(places)
    for output in outputs:
        with output.open("rb") as lines:
            for row in map(_row, lines):
                name = str(row.get("custom_id"))
                if name in left:
                    raw = raw_of(row)
                    tally[raw.failure or f"HTTP {raw.status}"] += 1
                    yield left.pop(name), raw
                else:
                    tally["said again" if name in places else "lines of no call"] += 1
    missing = _missing(job, status)
    for place in left.values():
        tally["without a row"] += 1
        yield place, missing


def _missing(job: Job, status: Status) -> Raw:
    why = f" ({status.errors})" if status.errors else ""
    kind = "batch_expired" if status.state == "expired" else "batch_failed"
    return Raw(failure=kind, error=f"{job} ended as '{status.state}' without a row for it{why}", sent=False)


def _row(line: bytes) -> Mapping[str, Any]:
    """A line of a job's output; empty if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return row if isinstance(row, Mapping) else {}
