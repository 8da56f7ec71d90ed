"""Files and Batches of the fault server, as OpenAI has them, with the ways in which a batch can go wrong.

Knows nothing of chat completions: a line of a batch is answered by whoever made the `Batches`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web

from faults import broken_off, close, error, judgement, question_key

__all__ = ["BATCH_FAULTS", "Answer", "Batches"]

BAD_REQUEST: Final = {
    "error": {"message": "Bad request.", "type": "invalid_request_error", "param": None, "code": None}
}

Answer = Callable[[Mapping[str, Any]], Awaitable[tuple[int, dict[str, Any]]]]
"""Body of a request → status and body of its answer."""

BATCH_FAULTS: Final = {
    "rows_4xx": "each third row is an HTTP 400 inside the output file, its error null",
    "rows_missing": "each third row is in no file",
    "rows_in_error_file": "each third row is in the error file only",
    "no_output": "completed, without any file",
    "all_failed": "completed, every row in the error file",
    "failed": "failed at validation",
    "expired": "expired, each third row in the error file",
    "duplicated": "every row comes twice, the second time with another judgement",
    "shuffled": "the rows come in another order",
    "cut_reply": "the job is made, the reply to POST /batches is cut",
    "cut_download": "the first download of the output breaks off in mid-body",
}


@dataclass
class Job:
    """A batch; its end is worked out when somebody looks."""

    number: int
    head: dict[str, Any]
    fault: str
    lines: list[dict[str, Any]] = field(default_factory=list)
    made: float = field(default_factory=time.time)
    problem: str | None = None
    state: dict[str, Any] = field(default_factory=dict)


class Batches:
    """The files and jobs of a server.

    Args:
        answer: answers one line.
        max_file_requests, max_file_bytes: limits of an input file.
        seconds: from the creation of a job to its end.
        faults: of the first job, the second, …; `-` for none.
    """

    def __init__(
        self, answer: Answer, max_file_requests: int, max_file_bytes: int, seconds: float, faults: Sequence[str]
    ) -> None:
        self.answer, self.seconds, self.faults = answer, seconds, faults
        self.max_file_requests, self.max_file_bytes = max_file_requests, max_file_bytes
        self.kept = 0
        self.files: dict[str, dict[str, Any]] = {}
        self.contents: dict[str, bytes] = {}
        self.cut_downloads: set[str] = set()
        self.jobs: dict[str, Job] = {}
        self.ending = asyncio.Lock()

    def routes(self) -> list[web.RouteDef]:
        """The routes."""
        return [
            web.post("/v1/files", self.upload),
            web.get("/v1/files/{id}", self.get_file),
            web.get("/v1/files/{id}/content", self.download),
            web.delete("/v1/files/{id}", self.delete_file),
            web.post("/v1/batches", self.make_batch),
            web.get("/v1/batches", self.list_batches),
            web.get("/v1/batches/{id}", self.get_batch),
            web.post("/v1/batches/{id}/cancel", self.cancel_batch),
        ]

    def keep(self, data: bytes, name: str, purpose: str) -> dict[str, Any]:
        """Keep a file."""
        self.kept += 1
        number = f"file-{self.kept}"
        self.files[number] = {"id": number, "object": "file", "bytes": len(data), "created_at": int(time.time())}
        self.files[number] |= {"filename": name, "purpose": purpose, "status": "processed"}
        self.contents[number] = data
        return self.files[number]

    async def upload(self, request: web.Request) -> web.Response:
        """Take a file for a batch."""
        form = await request.post()
        part = form.get("file")
        if form.get("purpose") != "batch" or not isinstance(part, web.FileField):
            return error(400, "A file of purpose batch is wanted.", param="purpose")
        data = part.file.read()
        if len(data) > self.max_file_bytes or data.count(b"\n") > self.max_file_requests:
            return error(400, "The file is beyond the limits of a batch.", "file_too_large", "file")
        return web.json_response(self.keep(data, part.filename, "batch"))

    async def get_file(self, request: web.Request) -> web.Response:
        """What is known of a file."""
        found = self.files.get(request.match_info["id"])
        return web.json_response(found) if found else error(404, "There is no such file.")

    async def download(self, request: web.Request) -> web.StreamResponse:
        """The content of a file."""
        name = request.match_info["id"]
        if name not in self.contents:
            return error(404, "There is no such file.")
        if name in self.cut_downloads:
            self.cut_downloads.remove(name)
            return await broken_off(request, self.contents[name])
        return web.Response(body=self.contents[name], content_type="application/octet-stream")

    async def delete_file(self, request: web.Request) -> web.Response:
        """Forget a file."""
        name = request.match_info["id"]
        self.contents.pop(name, None)
        gone = self.files.pop(name, None)
        return web.json_response({"id": name, "object": "file", "deleted": gone is not None})

    async def make_batch(self, request: web.Request) -> web.StreamResponse:
        """Start a job."""
        head = await request.json()
        data = self.contents.get(head.get("input_file_id"))
        if data is None:
            return error(400, "There is no such input file.", param="input_file_id")
        number = len(self.jobs)
        fault = self.faults[number] if number < len(self.faults) else "-"
        job = self.jobs[f"batch_{number}"] = Job(number, head, fault)
        try:
            job.lines = [json.loads(line) for line in data.splitlines()]
            job.problem = problem_of(job)
        except (ValueError, KeyError, TypeError):
            job.problem = "invalid_json_line"
        if job.fault == "cut_reply":
            close(request)
        return web.json_response(await self.look(job))

    async def look(self, job: Job) -> dict[str, Any]:
        """A job as it stands now."""
        age = (time.time() - job.made) / self.seconds if self.seconds else 1.0
        async with self.ending:
            if not job.state and age >= 0.25 and job.problem:
                data = [{"code": job.problem, "message": "The batch cannot be run.", "param": None, "line": None}]
                job.state = {"status": "failed", "errors": {"object": "list", "data": data}}
            elif not job.state and age >= 1.0:
                job.state = await self.ended(job)
        counts = {"total": len(job.lines), "completed": int(len(job.lines) * min(1.0, age)), "failed": 0}
        known = {"id": f"batch_{job.number}", "object": "batch", "created_at": int(job.made), "errors": None}
        known |= {key: job.head.get(key) for key in ("endpoint", "input_file_id", "completion_window", "metadata")}
        known |= {"status": "validating" if age < 0.25 else "in_progress", "request_counts": counts}
        return known | {"output_file_id": None, "error_file_id": None} | job.state

    async def ended(self, job: Job) -> dict[str, Any]:
        """Answer the questions of a job, and spoil the result."""
        output, errors = [], []
        for i, line in enumerate(job.lines):
            third, row = i % 3 == 0, {"id": f"row_{job.number}_{i}", "custom_id": line["custom_id"], "error": None}
            if job.fault == "all_failed" or (third and job.fault in ("rows_in_error_file", "expired")):
                code = "batch_expired" if job.fault == "expired" else "server_error"
                errors.append(row | {"response": None, "error": {"code": code, "message": "Not done."}})
            elif third and job.fault == "rows_4xx":
                response = {"status_code": 400, "request_id": row["id"], "body": BAD_REQUEST}
                output.append(row | {"response": response})
            elif job.fault != "no_output" and not (third and job.fault == "rows_missing"):
                output += await self.rows(line, row, twice=job.fault == "duplicated")
        output = output[::-1] if job.fault == "shuffled" else output
        named = [("output_file_id", output), ("error_file_id", errors)]
        ids = {name: self.keep(as_jsonl(rows), f"{name}.jsonl", "batch_output")["id"] for name, rows in named if rows}
        if job.fault == "cut_download" and output:
            self.cut_downloads.add(ids["output_file_id"])
        done = len(job.lines) - len(errors)
        counts = {"total": len(job.lines), "completed": done, "failed": len(errors)}
        return ids | {"status": "expired" if job.fault == "expired" else "completed", "request_counts": counts}

    async def rows(self, line: Mapping[str, Any], row: Mapping[str, Any], twice: bool) -> list[dict[str, Any]]:
        """The row, or two, of an output file for a line of the input."""
        status, body = await self.answer(line["body"])
        rows = [{**row, "response": {"status_code": status, "request_id": row["id"], "body": body}}]
        if twice:
            other = json.dumps(judgement(question_key(line["body"])[::-1]))
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": other}}
            response = {"status_code": 200, "request_id": row["id"], "body": {**body, "choices": [choice]}}
            rows.append({**row, "response": response})
        return rows

    def found(self, request: web.Request) -> Job:
        """The job that a request is about."""
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            raise web.HTTPNotFound
        return job

    async def get_batch(self, request: web.Request) -> web.Response:
        """A job."""
        return web.json_response(await self.look(self.found(request)))

    async def list_batches(self, request: web.Request) -> web.Response:
        """The jobs, the latest first, in pages."""
        names, after = [*self.jobs][::-1], request.query.get("after")
        names = names[names.index(after) + 1 :] if after in names else names
        page = names[: int(request.query.get("limit", 20))]
        ends = {"first_id": page[0], "last_id": page[-1]} if page else {}
        data = [await self.look(self.jobs[name]) for name in page]
        return web.json_response({"object": "list", "data": data, "has_more": len(page) < len(names)} | ends)

    async def cancel_batch(self, request: web.Request) -> web.Response:
        """Stop a job that has not ended."""
        job = self.found(request)
        await self.look(job)
        job.state = job.state or {"status": "cancelled"}
        return web.json_response(await self.look(job))


def problem_of(job: Job) -> str | None:
    """Why a job fails at validation."""
    if job.fault == "failed":
        return "token_limit_exceeded"
    if len({line["custom_id"] for line in job.lines}) < len(job.lines):
        return "duplicate_custom_id"
    if not job.lines or any(line["url"] != job.head["endpoint"] for line in job.lines):
        return "mismatched_endpoint"
    return None


def as_jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """One row a line."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
