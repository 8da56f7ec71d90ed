"""Files and Batches of an OpenAI-compatible API: upload, create, find, look, fetch.

https://platform.openai.com/docs/api-reference/batch. A job that may have been created is looked for before another one
is, because each is paid for. Knows nothing of questions or of the call log.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sp2dpo.errors import Unfinished
from sp2dpo.llm import Raw
from sp2dpo.llm.chat import json_of, text_of
from sp2dpo.llm.http import Endpoint

__all__ = ["BatchClient", "Status"]

WINDOW: Final = "24h"
FILE_KEY: Final = "sp2dpo_file"
"""In a job's metadata, the id of its file: by it the job is found where a list of jobs spells the id in another way."""

_ENDED: Final = ("completed", "failed", "expired", "cancelled")
_NO_ROOM = re.compile(r"enqueued|token_limit_exceeded|RESOURCE_EXHAUSTED", re.IGNORECASE)
_PAGE: Final = "100"
_TRIES: Final = 20
_GROWTH: Final = 1.5
_LONGEST_RETRY_AFTER_S: Final = 900.0


@dataclass(frozen=True)
class Status:
    """A batch job as the provider tells of it.

    `files` are the names of its file. `completed` and `failed` are the provider's counts, and prove nothing.
    """

    batch_id: str
    state: str
    files: tuple[str | None, ...] = ()
    output_file: str | None = None
    error_file: str | None = None
    completed: int = 0
    failed: int = 0
    errors: str = ""

    @property
    def ended(self) -> bool:
        return self.state in _ENDED

    @property
    def refused(self) -> bool:
        """Whether it failed as a whole, without having asked anything."""
        return self.state == "failed" and not (self.output_file or self.error_file)

    @property
    def no_room(self) -> bool:
        """Whether it was refused because too much is queued already."""
        return self.refused and bool(_NO_ROOM.search(self.errors))


class BatchClient:
    """The batch jobs of one key at one endpoint, whose `timeout` must leave time to upload a whole file.

    Args:
        poll_seconds: the first wait, and the longest.

    Raises (every method):
        Unfinished: the endpoint refuses, or does not answer for a long time. Nothing that was submitted is lost.
    """

    def __init__(self, endpoint: Endpoint, poll_seconds: tuple[float, float] = (5.0, 60.0)) -> None:
        self._endpoint = endpoint
        self.poll_seconds = poll_seconds

    def waits(self) -> Iterator[float]:
        """Seconds to wait: each time longer, up to the longest."""
        wait, longest = self.poll_seconds
        while True:
            yield wait
            wait = min(wait * _GROWTH, longest)

    async def upload(self, file: Path) -> str:
        """The id of the file at the provider."""
        raw = await self._asked(
            lambda: self._endpoint.upload("/files", file, purpose="batch"), "an upload of questions"
        )
        file_id = text_of(_field(json_of(raw), "id"))
        if raw.status != 200 or not file_id:
            advice = ". Has it Files and Batches at all? Without: --transport sync" if raw.status in (404, 405) else ""
            raise Unfinished(f"{self._endpoint.base_url} does not take a file of questions: {_said(raw)}{advice}")
        return file_id

    async def create(self, file_id: str, path: str, known: Collection[str]) -> Status | None:
        """Create a job; None if there is no room for it now. `known`: ids of jobs that are others."""
        job = {"input_file_id": file_id, "endpoint": f"/v1{path}", "completion_window": WINDOW}
        named = job | {"metadata": {FILE_KEY: file_id}}
        raw = Raw()
        for _, wait in zip(range(_TRIES), self.waits(), strict=False):
            raw = await self._endpoint.post("/batches", named)
            status = _status(json_of(raw)) if raw.status == 200 else None
            if status is not None:
                return status
            if _NO_ROOM.search(raw.body):
                return None
            if not _silent(raw):
                break
            await asyncio.sleep(max(wait, _retry_after(raw)))
            status = await self.find(file_id, known)
            if status is not None:
                return status
        raise Unfinished(f"{self._endpoint.base_url} does not take a batch job: {_said(raw)}")

    async def find(self, file_id: str, known: Collection[str]) -> Status | None:
        """The job that asks the questions of a file, if there is one that is not known."""
        after: dict[str, str] = {}
        while True:
            page = await self._page(after)
            for status in map(_status, page["data"]):
                if status is not None and file_id in status.files and status.batch_id not in known:
                    return status
            last = text_of(_field(page["data"][-1], "id")) if page["data"] else None
            if not page.get("has_more") or last is None or after == {"after": last}:
                return None
            after = {"after": last}

    async def _page(self, after: Mapping[str, str]) -> dict[str, Any]:
        raw = await self._asked(lambda: self._endpoint.get("/batches", limit=_PAGE, **after), "for its batch jobs")
        page = json_of(raw)
        if raw.status != 200 or not isinstance(page, dict) or not isinstance(page.get("data"), list):
            raise Unfinished(
                f"{self._endpoint.base_url} does not list its batch jobs ({_said(raw)}), so that it is not known "
                "whether one with these questions is paid for. The same command looks again; --transport sync asks anew"
            )
        return page

    async def sees(self, file_id: str) -> bool:
        """Whether the file is there for this key. If not, its jobs would not be seen either."""
        raw = await self._asked(lambda: self._endpoint.get(f"/files/{file_id}"), "for a file")
        return raw.status == 200

    async def look(self, batch_id: str) -> Status:
        """A job as it stands."""
        raw = await self._asked(lambda: self._endpoint.get(f"/batches/{batch_id}"), "for a batch job")
        status = _status(json_of(raw))
        if raw.status != 200 or status is None:
            raise Unfinished(
                f"{self._endpoint.base_url} does not tell how batch job {batch_id} stands: {_said(raw)}. If it was "
                "submitted with a key of another project, use that one; --transport sync asks its questions anew"
            )
        return status

    async def fetch(self, file_id: str, to: Path) -> bool:
        """Download a file; false if it is not there any more."""
        raw = await self._asked(lambda: self._endpoint.download(f"/files/{file_id}/content", to), "for a file")
        if raw.status not in (200, 404, 410):
            raise Unfinished(f"{self._endpoint.base_url} does not give file {file_id}: {_said(raw)}")
        return raw.status == 200

    async def _asked(self, ask: Callable[[], Awaitable[Raw]], what: str) -> Raw:
        """The first response that is more than silence."""
        raw = Raw()
        for _, wait in zip(range(_TRIES), self.waits(), strict=False):
            raw = await ask()
            if not _silent(raw):
                return raw
            await asyncio.sleep(max(wait, _retry_after(raw)))
        raise Unfinished(
            f"{self._endpoint.base_url} was asked {_TRIES} times {what} and does not answer: {_said(raw)}. "
            "What was submitted stays submitted; the same command goes on with it"
        )


def _silent(raw: Raw) -> bool:
    """No answer that would be another one a moment later for any other reason than the moment."""
    status = raw.status or 0
    return raw.failure is not None or status in (408, 429) or status >= 500


def _retry_after(raw: Raw) -> float:
    return min(raw.retry_after or 0.0, _LONGEST_RETRY_AFTER_S)


def _said(raw: Raw) -> str:
    return f"{raw.failure}: {raw.error}" if raw.failure else f"HTTP {raw.status} {raw.body[:500]}".rstrip()


def _status(job: Any) -> Status | None:
    """A job from its JSON; None if that has no id or no status."""
    batch_id, state = text_of(_field(job, "id")), text_of(_field(job, "status"))
    if not batch_id or not state:
        return None
    counts, errors = _field(job, "request_counts"), _field(_field(job, "errors"), "data")
    return Status(
        batch_id=batch_id,
        state=state.lower(),
        files=(text_of(_field(job, "input_file_id")), text_of(_field(_field(job, "metadata"), FILE_KEY))),
        output_file=text_of(_field(job, "output_file_id")) or None,
        error_file=text_of(_field(job, "error_file_id")) or None,
        completed=_count(_field(counts, "completed")),
        failed=_count(_field(counts, "failed")),
        errors="; ".join(map(_words, errors[:5])) if isinstance(errors, list) else "",
    )


def _words(error: Any) -> str:
    parts = [str(_field(error, name)) for name in ("code", "message") if _field(error, name)]
    line = _field(error, "line")
    return ": ".join(parts) + (f" (line {line})" if line is not None else "")


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else None


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0
