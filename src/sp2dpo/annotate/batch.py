"""Batch jobs: questions in shards to an OpenAI-compatible batch API, for half the price and within a day.

A shard is a file of questions. Before its job is created the call log says which questions it asks, and afterwards the
job's id; so a job is found again after an end at any moment, and its questions are in no other one. An answer counts if
its row is there, whatever the job says of itself. Rows that did not come are handed back as failures at no cost.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final

from sp2dpo.annotate.batch_api import BatchClient, Status
from sp2dpo.annotate.batch_shard import Job, Place, ShardFile, jobs_in_flight, outcomes, places_of
from sp2dpo.annotate.bring import request_line
from sp2dpo.calls import BatchEvent, Ledger
from sp2dpo.errors import Unfinished
from sp2dpo.hashing import canonical_json, sha256_file
from sp2dpo.llm import Raw, Request

__all__ = ["batch_calls"]

Say = Callable[[str], None]
Rows = list[tuple[Request, Raw]]

_ROWS_AT_ONCE: Final = 300


async def batch_calls(
    requests: Iterator[Request],
    client: BatchClient,
    ledger: Ledger,
    annotator: str,
    *,
    folder: Path,
    limits: tuple[int, int],
    hash_of: Callable[[Mapping[str, Any]], str],
    say: Say,
    show: Say,
) -> AsyncGenerator[Rows, None]:
    """Ask in batch jobs: those of earlier starts are collected, and new ones submitted.

    Yields calls with what came back for them, some hundreds at a time. All of them must be in the ledger before the
    next are asked for. A call is yielded once, and not at all if its attempt is in the ledger already.

    Args:
        requests: calls to make, read as there is room for them (what is read is submitted, unless the run stops); those
            in a job of an earlier start are passed over.
        folder: where files of questions are kept while their job is in flight; of this annotator alone.
        limits: calls and bytes of one file.
        hash_of: the hash of a request from its body.
        say: told what should stay to be read.
        show: told how a job stands.

    Raises:
        Unfinished: the endpoint is silent, or refuses; then the jobs that it took before are collected first. Jobs in
            flight stay so, and the same command goes on with them.
    """
    work = _Work(client, ledger, annotator, folder, limits, hash_of, say, show)
    try:
        await work.recover(requests)
        waits, seen = client.waits(), None
        while True:
            for job, status in await work.ended():
                if status.refused:
                    work.give_back(job, status)
                else:
                    async for rows in work.collect(job, status):
                        yield rows
            await work.submit()
            if work.aside:
                yield work.aside
                work.aside = []
            if not work.live and not work.left:
                break
            now = [(job.shard, job.status and job.status.state) for job in work.live]
            if now != seen:
                waits, seen = client.waits(), now
            await asyncio.sleep(next(waits))
        if work.refusal is not None:
            raise work.refusal
    finally:
        work.leave()


@dataclass
class _Work:
    """The jobs of one annotator in one start.

    `sources`: where calls come from, the last first. `waiting`: shards that found no room, `at_once` the number of jobs
    for which there was. `aside`: calls that no file can hold. `refusal`: why no more jobs are created.
    """

    client: BatchClient
    ledger: Ledger
    annotator: str
    folder: Path
    limits: tuple[int, int]
    hash_of: Callable[[Mapping[str, Any]], str]
    say: Say
    show: Say
    sources: list[Iterator[Request]] = field(default_factory=list)
    live: list[Job] = field(default_factory=list)
    waiting: list[Job] = field(default_factory=list)
    aside: Rows = field(default_factory=list)
    at_once: int | None = None
    refusal: Unfinished | None = None
    known: set[str] = field(default_factory=set)

    @property
    def left(self) -> bool:
        """Whether there may be calls that are in no job yet."""
        return self.refusal is None and bool(self.sources or self.waiting)

    async def recover(self, requests: Iterator[Request]) -> None:
        """Take up the jobs of earlier starts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.known = {event.batch_id for event in self.ledger.batch_events(self.annotator) if event.batch_id}
        for job in jobs_in_flight(self.ledger, self.annotator):
            if job.batch_id is None:
                await self._search(job)
            else:
                self.live.append(job)
        for file in set(self.folder.iterdir()) - {self._file(job) for job in self.live}:
            file.unlink()
        taken: dict[str, set[str]] = {}
        for job in self.live:
            for pair, calls in job.questions.items():
                taken.setdefault(pair, set()).update(*calls)
        self.sources = [(r for r in requests if taken.get(r.pair_id, set()).isdisjoint(r.variants))]
        if self.live:
            self.say(f"{self.annotator}: {_of(self.live)} of an earlier start")

    async def _search(self, job: Job) -> None:
        """Find out whether a job that was intended has been created."""
        assert job.file_id is not None
        status = await self.client.find(job.file_id, self.known)
        if status is not None:
            self._submitted(job, status)
        elif await self.client.sees(job.file_id):
            self._note(job, "gone", why="never created")
        else:
            raise Unfinished(
                f"annotator '{self.annotator}': an earlier start was about to create a batch job from file "
                f"{job.file_id}, which this key does not see, so that it is not known whether it was. Use the key of "
                "that project; --forget-batches asks its questions anew"
            )

    async def ended(self) -> list[tuple[Job, Status]]:
        """Ask how all jobs stand; returns those that ended, those that were refused last."""
        ended = []
        for job in self.live:
            assert job.batch_id is not None
            before, job.status = job.status, await self.client.look(job.batch_id)
            if job.status != before:
                self.show(_standing(job, job.status))
            if job.status.ended:
                ended.append((job, job.status))
        return sorted(ended, key=lambda one: one[1].refused)

    def give_back(self, job: Job, status: Status) -> None:
        """Take back a job that was refused as a whole."""
        self.live.remove(job)
        self._note(job, "gone", why=status.errors)
        if status.no_room:
            self._no_room(job)
        else:
            self.refusal = Unfinished(
                f"annotator '{self.annotator}': the provider refuses {job} as a whole, and asked nothing of it: "
                f"{status.errors or 'it gives no reason'}. --transport sync asks one by one, at the full price"
            )

    def _no_room(self, job: Job) -> None:
        """Fewer jobs at once; or smaller ones, if this was the only one."""
        job.batch_id = job.status = None
        if self.live:
            self.at_once = len(self.live)
            self.waiting.append(job)
            self.say(
                f"{self.annotator}: the provider has no room for more than {self.at_once} of its batch jobs at once"
            )
        elif job.calls > 1:
            self.limits = ((job.calls + 1) // 2, self.limits[1])
            self.sources.append(self._given_back(job))
            self.say(
                f"{self.annotator}: the provider has no room for {job.calls:,} calls; {self.limits[0]:,} are tried"
            )
        else:
            raise Unfinished(
                f"annotator '{self.annotator}': the provider has no room for a single call; try again later"
            )

    async def submit(self) -> None:
        """Create jobs while there is room and calls are left; one at a time is being validated."""
        while self.left and not any(job.status is None or job.status.state == "validating" for job in self.live):
            if self.at_once is not None and len(self.live) >= self.at_once:
                return
            try:
                job = self.waiting.pop(0) if self.waiting else await self._next_shard()
                if job is None or not await self._create(job):
                    return
            except Unfinished as refusal:
                self.refusal = refusal

    async def _create(self, job: Job) -> bool:
        """False if there is no room."""
        job.file_id = job.file_id or await self.client.upload(self._file(job))
        self._note(job, "intended", **job.facts)
        status = await self.client.create(job.file_id, job.path, self.known)
        if status is None:
            self._note(job, "gone", why="no room")
            self._no_room(job)
            return False
        self._submitted(job, status)
        self.show(f"{job} with {job.calls:,} calls is submitted")
        return True

    def _submitted(self, job: Job, status: Status) -> None:
        job.batch_id = status.batch_id
        self.live.append(job)
        self.known.add(status.batch_id)
        self._note(job, "submitted")

    async def _next_shard(self) -> Job | None:
        """The next file of questions, as large as the limits allow; None if no calls are left."""
        shard = ShardFile(self.folder / "next.partial", *self.limits)
        with shard.file.open("wb", buffering=0) as file:
            while (request := self._pull()) is not None:
                line = request_line(request)
                if len(line) > self.limits[1]:
                    self.aside.append((request, _too_long(line, self.limits[1])))
                elif not shard.takes(request, line):
                    self.sources.append(iter([request]))
                    break
                else:
                    _write(file, line, shard.file)
                if shard.calls % _ROWS_AT_ONCE == 0:
                    await asyncio.sleep(0)
        return shard.job()

    def _pull(self) -> Request | None:
        while self.sources:
            request = next(self.sources[-1], None)
            if request is not None:
                return request
            self.sources.pop()
        return None

    def _given_back(self, job: Job) -> Iterator[Request]:
        """The calls of a shard that is in no job."""
        with self._file(job).open("rb") as file:
            for place in places_of(job, self._file(job)).values():
                yield self._request(file, place)
        self._file(job).unlink()

    async def collect(self, job: Job, status: Status) -> AsyncIterator[Rows]:
        """What came back for each call of a job that ended, but for what the ledger has already."""
        await self._restore(job)
        places = await asyncio.to_thread(places_of, job, self._file(job))
        outputs = []
        for n, file_id in enumerate((status.output_file, status.error_file)):
            output = self.folder / f"{job.shard}.{n}"
            if file_id is not None and await self.client.fetch(file_id, output):
                outputs.append(output)
        tally: Counter[str] = Counter()
        rows = outcomes(job, status, places, outputs, tally)
        with self._file(job).open("rb") as file:
            while some := list(islice(rows, _ROWS_AT_ONCE)):
                fresh = self._not_logged([place for place, _ in some])
                if fresh:
                    yield [(self._request(file, place), raw) for place, raw in some if place in fresh]
                await asyncio.sleep(0)
        self._close(job, status, places, tally)
        for kept in (self._file(job), *outputs):
            kept.unlink()

    def _close(self, job: Job, status: Status, places: Mapping[str, Place], tally: Counter[str]) -> None:
        every = iter(places.values())
        while some := list(islice(every, _ROWS_AT_ONCE)):
            assert not self._not_logged(some), "rows of a batch job were handed out and not logged"
        self._note(job, "collected", state=status.state, **tally)
        self.live.remove(job)
        self.say(f"{self.annotator}: {job}: {status.state}; of {job.calls:,} calls {_listed(tally)}")

    async def _restore(self, job: Job) -> None:
        """See to it that the file of questions is there, as it was uploaded."""
        file = self._file(job)
        for fetched in (False, True):
            if fetched and not (job.file_id and await self.client.fetch(job.file_id, file)):
                break
            if file.is_file() and await asyncio.to_thread(sha256_file, file) == job.shard:
                return
        raise Unfinished(
            f"{file} is missing or changed, and the provider does not give its copy ({job.file_id}): without it the "
            f"answers of {job} cannot be told apart. Put it back; --forget-batches asks its questions anew"
        )

    def _request(self, file: IO[bytes], place: Place) -> Request:
        file.seek(place.at)
        line = json.loads(file.readline())
        path, body = line["url"].removeprefix("/v1"), line["body"]
        return Request(place.pair_id, place.variants, path, body, self.hash_of(body), place.asked)

    def _not_logged(self, places: Sequence[Place]) -> set[Place]:
        """Those whose question the ledger does not know to have been asked or answered since."""
        state = self.ledger.state(list({place.pair_id for place in places}))

        def logged(place: Place) -> bool:
            cells = (state.get((place.pair_id, self.annotator, variant)) for variant in place.variants)
            return any(cell is not None and (cell.valid or cell.asked > place.asked) for cell in cells)

        return {place for place in places if not logged(place)}

    def _file(self, job: Job) -> Path:
        return self.folder / f"{job.shard}.jsonl"

    def _note(self, job: Job, event: str, **detail: Any) -> None:
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.ledger.note_batch(BatchEvent(self.annotator, event, job.shard, at, job.batch_id, canonical_json(detail)))

    def leave(self) -> None:
        """Say what goes on at the provider without this process."""
        if self.live:
            self.say(
                f"{self.annotator}: {_of(self.live)} in flight at the provider. Nothing is cancelled; the same command "
                "goes on with it"
            )


def _too_long(line: bytes, most: int) -> Raw:
    words = f"its line has {len(line):,} bytes, and a file of the provider takes {most:,}"
    return Raw(failure="batch_failed", error=words, sent=False)


def _write(file: IO[bytes], line: bytes, path: Path) -> None:
    """All of a line to a file without a buffer, which would try again when it is closed."""
    try:
        while line:
            line = line[file.write(line) :]
    except OSError as error:
        raise Unfinished(
            f"{path} could not be written: {error.strerror}. What was answered before is safe; free space and run the "
            "same command again"
        ) from error


def _standing(job: Job, status: Status) -> str:
    counts = f"{status.completed:,} of {job.calls:,} done, {status.failed:,} failed"
    return f"{job}: {status.state}, {counts} by the provider's count; rows are counted when it ended"


def _of(jobs: Sequence[Job]) -> str:
    names = ", ".join(str(job.batch_id) for job in jobs)
    return f"batch job{'s' * (len(jobs) > 1)} {names} with {sum(job.calls for job in jobs):,} calls"


def _listed(tally: Counter[str]) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in tally.most_common())
