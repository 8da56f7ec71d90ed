"""Batch jobs: rows are counted, nothing is asked twice, and a job is found again after an end at any moment."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from fault_server import FaultServer, fault_server
from sp2dpo.annotate.batch import batch_calls
from sp2dpo.annotate.batch_api import BatchClient
from sp2dpo.annotate.batch_shard import jobs_in_flight
from sp2dpo.annotate.bring import request_line
from sp2dpo.calls import Call, open_calls, open_ledger
from sp2dpo.errors import Unfinished
from sp2dpo.hashing import sha256_json, sha256_text
from sp2dpo.llm import Raw, Request
from sp2dpo.llm.chat import read_chat
from sp2dpo.llm.http import Endpoint
from sp2dpo.reply import Parsed, parse_reply

VARIANTS = ("v1", "v2", "v3")
LIMITS = (50_000, 200 * 2**20)


# What an engine does, in short ---------------------------------------------------------------------------------------


def hash_of(body: Mapping[str, Any]) -> str:
    return sha256_json(["here", dict(body)])


def request(n: int, variant: str = "v1", asked: int = 0) -> Request:
    text = f"Question {n} of {variant}: give the semantic_gap_category. ½ \ud800"
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "temperature": 0.1}
    return Request(sha256_text(f"pair {n}"), (variant,), "/chat/completions", body, hash_of(body), asked)


def row(asked: Request, raw: Raw) -> Call:
    reply = read_chat(raw)
    parsed = Parsed(None, problem=reply.failure) if reply.failure else parse_reply(reply.raw_text)
    return Call(
        **{"pair_id": asked.pair_id, "annotator": "a", "variant": asked.variants[0], "attempt": asked.asked + 1},
        **{"origin": "live", "transport": "batch", "requested_model": "m", "endpoint": "here"},
        **{"request_hash": asked.hash, "params_requested": "{}", "params_sent": "{}", "mends": "[]"},
        **{"started_at": "2026-01-01T00:00:00.000+00:00", "latency_s": 0.0, "http_status": reply.http_status},
        **dict.fromkeys(("served_model", "finish_reason", "category", "magnitude", "confidence", "cost_usd")),
        **dict.fromkeys(("prompt_tokens", "completion_tokens", "system_fingerprint")),
        **{"raw_text": reply.raw_text, "error": reply.error, "request_id": reply.request_id},
        outcome=parsed.problem or ("repaired" if parsed.mends else "ok"),
    )


class Run:
    """A folder with a ledger, and all that was said in its starts."""

    def __init__(self, folder: Path, base_url: str, pairs: int, limits: tuple[int, int] = LIMITS) -> None:
        self.folder, self.base_url, self.pairs, self.limits = folder, base_url, pairs, limits
        self.said: list[str] = []
        self.shown: list[str] = []

    def open(self) -> Iterator[Request]:
        """The questions without a valid answer."""
        with open_calls(self.folder / "calls.sqlite") as log:
            for n in range(self.pairs):
                state = log.state([sha256_text(f"pair {n}")])
                for variant in VARIANTS:
                    cell = state.get((sha256_text(f"pair {n}"), "a", variant))
                    if cell is None or not cell.valid:
                        yield request(n, variant, cell.asked if cell else 0)

    async def ask(self, tick: Callable[[str], None] = lambda step: None) -> list[tuple[Request, Raw]]:
        """One start; `tick` is called before and after all that leaves a trace."""
        endpoint = Endpoint(self.base_url, "a-key-of-some-length", timeout=30)
        got = []
        with open_ledger(self.folder / "calls.sqlite") as ledger:
            client = BatchClient(endpoint, poll_seconds=(0.02, 0.1))
            for owner, name in ((client, "upload"), (client, "create"), (client, "fetch")):
                setattr(owner, name, _watched(getattr(owner, name), tick))
            note = ledger.note_batch
            ledger.note_batch = lambda event: (tick(event.event), note(event), tick(event.event))  # type: ignore[method-assign]
            calls = batch_calls(
                self.open(),
                client,
                ledger,
                "a",
                folder=self.folder / "batches",
                limits=self.limits,
                hash_of=hash_of,
                say=self.said.append,
                show=self.shown.append,
            )
            try:
                async with aclosing(calls):
                    async for rows in calls:
                        tick("rows")
                        half = len(rows) // 2
                        await ledger.add(*(row(*one) for one in rows[:half]))
                        tick("half of the rows")
                        await ledger.add(*(row(*one) for one in rows[half:]))
                        got += rows
            finally:
                await endpoint.close()
        return got

    def start(self) -> list[tuple[Request, Raw]]:
        return asyncio.run(self.ask())

    def rows(self) -> list[Call]:
        with open_calls(self.folder / "calls.sqlite") as log:
            return list(log)

    def events(self) -> list[str]:
        with open_calls(self.folder / "calls.sqlite") as log:
            return [event.event for event in log.batch_events("a")]

    def outcomes(self) -> Counter[str]:
        return Counter(call.outcome for call in self.rows())


def _watched(method: Any, tick: Callable[[str], None]) -> Any:
    async def watched(*args: Any) -> Any:
        tick(method.__name__)
        answer = await method(*args)
        tick(method.__name__)
        return answer

    return watched


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Run]:
    return lambda server, pairs=4, limits=LIMITS: Run(tmp_path, server.base_url, pairs, limits)


NewRun = Callable[..., Run]


# Going well ----------------------------------------------------------------------------------------------------------


def test_every_question_is_asked_once_and_its_answer_is_logged(new_run: NewRun) -> None:
    with fault_server(batch_seconds=0.2, reasoning_tokens=7) as server:
        run = new_run(server)
        got = run.start()
        assert {one.pair_id + one.variants[0] for one, _ in got} == {
            request(n, v).pair_id + v for n in range(4) for v in VARIANTS
        }
        assert run.outcomes() == {"ok": 12}
        assert server.stats()["requests"] == server.stats()["answered"] == 12
        assert run.events() == ["intended", "submitted", "collected"]
        assert list((run.folder / "batches").iterdir()) == []
        assert any("by the provider's count; rows are counted" in text for text in run.shown)
        assert run.said == ["a: batch job batch_0: completed; of 12 calls 12 HTTP 200"]


def test_a_request_comes_back_as_it_went(new_run: NewRun) -> None:
    with fault_server() as server:
        run = new_run(server)
        back = {(one.pair_id, one.variants): one for one, _ in run.start()}
        assert back == {((r := request(n, v)).pair_id, (v,)): r for n in range(4) for v in VARIANTS}


def test_a_second_start_finds_nothing_to_do(new_run: NewRun) -> None:
    with fault_server() as server:
        run = new_run(server)
        run.start()
        assert run.start() == []
        assert server.stats()["requests"] == 12
        assert len(run.rows()) == 12


def test_files_stay_within_the_limits_of_calls(new_run: NewRun) -> None:
    with fault_server(max_file_requests=5) as server:
        run = new_run(server, limits=(5, 10**6))
        run.start()
        assert run.outcomes() == {"ok": 12}
        assert run.events().count("submitted") == 3
        assert server.stats()["most_asked"] == 1


def test_files_stay_within_the_limits_of_bytes(new_run: NewRun) -> None:
    line = len(request_line(request(0, "v1")))
    with fault_server(max_file_bytes=4 * line) as server:
        run = new_run(server, limits=(100, 4 * line))
        run.start()
        assert run.outcomes() == {"ok": 12}
        assert run.events().count("submitted") == 3


def test_a_call_that_no_file_can_hold_is_handed_back_as_a_failure_at_no_cost(new_run: NewRun) -> None:
    with fault_server() as server:
        run = new_run(server, pairs=1, limits=(100, len(request_line(request(0, "v1"))) - 1))
        got = run.start()
        assert [(raw.failure, raw.sent) for _, raw in got] == [("batch_failed", False)] * 3
        assert server.stats()["requests"] == 0


def test_a_call_that_asks_several_variants_comes_back_with_them(tmp_path: Path) -> None:
    body = request(0).body
    several = [
        Request(sha256_text(f"pair {n}"), variants, "/decisions", body, hash_of(body))
        for n, variants in enumerate((("v1", "v2", "v3"), ("v2",), ("v1", "v3")))
    ]
    with fault_server() as server:
        run = Run(tmp_path, server.base_url, 0)
        run.open = lambda: iter(several)  # type: ignore[method-assign]
        assert [one for one, _ in run.start()] == several


# Jobs that go wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "outcomes"),
    [
        ("rows_4xx", {"ok": 8, "bad_request": 4}),
        ("rows_missing", {"ok": 8, "batch_failed": 4}),
        ("rows_in_error_file", {"ok": 8, "batch_failed": 4}),
        ("no_output", {"batch_failed": 12}),
        ("all_failed", {"batch_failed": 12}),
        ("expired", {"ok": 8, "batch_expired": 4}),
        ("duplicated", {"ok": 12}),
        ("shuffled", {"ok": 12}),
        ("cut_download", {"ok": 12}),
        ("cut_reply", {"ok": 12}),
        ("failed", {"ok": 12}),
    ],
)
def test_what_a_job_says_of_itself_is_not_believed(new_run: NewRun, fault: str, outcomes: dict[str, int]) -> None:
    with fault_server(batch_faults=(fault,)) as server:
        run = new_run(server)
        got = run.start()
        assert run.outcomes() == outcomes
        assert len(got) == 12
        assert server.stats()["most_asked"] <= 1
        assert jobs_of(run) == []


def test_a_row_of_the_error_file_says_what_went_wrong(new_run: NewRun) -> None:
    with fault_server(batch_faults=("rows_in_error_file",)) as server:
        run = new_run(server)
        run.start()
        assert {call.error for call in run.rows() if not call.valid} == {
            '{"code": "server_error", "message": "Not done."}'
        }


def jobs_of(run: Run) -> list[Any]:
    with open_calls(run.folder / "calls.sqlite") as log:
        return jobs_in_flight(log, "a")


def test_rows_that_did_not_come_are_said_to_cost_nothing_and_asked_in_the_next_start(new_run: NewRun) -> None:
    with fault_server(batch_faults=("rows_missing", "-")) as server:
        run = new_run(server)
        missing = [raw for _, raw in run.start() if raw.failure]
        assert [raw.sent for raw in missing] == [False] * 4
        assert missing[0].error == "batch job batch_0 ended as 'completed' without a row for it"
        assert len(run.start()) == 4
        assert run.outcomes() == {"ok": 12, "batch_failed": 4}
        assert server.stats()["most_asked"] == 1


def test_the_same_questions_again_are_another_job(new_run: NewRun) -> None:
    with fault_server(batch_faults=("all_failed", "all_failed")) as server:
        run = new_run(server)
        run.start()
        run.start()
        run.start()
        assert run.outcomes() == {"batch_failed": 24, "ok": 12}
        assert run.events() == ["intended", "submitted", "collected"] * 3


def test_of_two_answers_to_a_question_the_first_counts_and_the_other_is_said(new_run: NewRun) -> None:
    with fault_server() as plain, fault_server(batch_faults=("duplicated",)) as doubled:
        once, twice = new_run(plain), Run(new_run(plain).folder / "twice", doubled.base_url, 4)
        twice.folder.mkdir()
        once.start()
        twice.start()
        texts = [{(c.pair_id, c.variant): c.raw_text for c in run.rows()} for run in (once, twice)]
        assert texts[0] == texts[1]
        assert "12 said again" in twice.said[-1]


def test_a_job_that_is_cancelled_by_hand_hands_its_calls_back(new_run: NewRun) -> None:
    with fault_server(batch_seconds=600.0) as server:
        run = new_run(server)

        def cancel(step: str) -> None:
            if step == "submitted":
                with suppress(OSError):
                    post(server.base_url + "/batches/batch_0/cancel")

        assert {raw.failure for _, raw in asyncio.run(run.ask(cancel))} == {"batch_failed"}
        assert "cancelled" in run.said[-1]


def post(url: str) -> None:
    subprocess.run([sys.executable, "-c", f"import urllib.request as u; u.urlopen({url!r}, b'')"], check=True)


def test_a_provider_without_files_is_named_with_the_way_out(new_run: NewRun) -> None:
    with fault_server() as server:
        run = new_run(server)
        run.base_url = server.base_url.replace("/v1", "/v2")
        with pytest.raises(Unfinished, match=r"/v2 does not take a file.*HTTP 404.*--transport sync"):
            run.start()


def test_no_key_is_in_what_is_said_when_the_provider_refuses_it(new_run: NewRun) -> None:
    with fault_server(key="another") as server:
        run = new_run(server)
        with pytest.raises(Unfinished, match="HTTP 401") as refused:
            run.start()
        assert "a-key-of-some-length" not in str(refused.value) + "".join(run.said + run.shown)
        assert run.events() == []


def test_a_disk_without_space_for_the_questions_stops_the_run_and_submits_nothing(new_run: NewRun) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with fault_server() as server:
        run = new_run(server, pairs=2000)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, before[1]))
        try:
            with pytest.raises(Unfinished, match=r"next.partial could not be written: File too large.*free space"):
                run.start()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert run.events() == []
        run.pairs = 4
        run.start()
        assert run.outcomes() == {"ok": 12}


# A provider whose jobs do what a test says ---------------------------------------------------------------------------


class Provider:
    """Files and Batches in this process. `room`: calls that may be in jobs at once; `verdict`: of the n-th job."""

    def __init__(self, room: int = 10**6, verdict: Callable[[int], str] = lambda n: "completed") -> None:
        self.room, self.verdict = room, verdict
        self.files: dict[str, bytes] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.looks: Counter[str] = Counter()
        self.spelling = "{}"
        self.lost = False
        self.row_status = 200
        self.name_of: Callable[[bytes], str] = lambda data: f"file-{len(self.files)}"
        self.create_status: list[int] = []

    async def upload(self, asked: web.Request) -> web.Response:
        part = (await asked.post())["file"]
        assert isinstance(part, web.FileField)
        name = self.name_of(data := part.file.read())
        self.files[name] = data
        return web.json_response({"id": name})

    async def create(self, asked: web.Request) -> web.Response:
        if self.create_status and (status := self.create_status.pop(0)) != 200:
            return web.json_response({"error": {"message": "enqueued" if status == 429 else "no"}}, status=status)
        head = await asked.json()
        name, file = f"job-{len(self.jobs)}", head["input_file_id"]
        calls = self.files[file].count(b"\n")
        busy = sum(job["calls"] for job in self.jobs.values() if job["status"] == "in_progress")
        self.jobs[name] = {"id": name, "status": "validating", "calls": calls, "metadata": head["metadata"]}
        self.jobs[name] |= {
            "input_file_id": self.spelling.format(file),
            "file": file,
            "fits": busy + calls <= self.room,
        }
        return web.json_response(self.jobs[name])

    async def look(self, asked: web.Request) -> web.Response:
        job = self.jobs[asked.match_info["id"]]
        self.looks[job["id"]] += 1
        verdict = self.verdict(int(job["id"][4:]))
        if not job["fits"]:
            data = [{"code": "token_limit_exceeded", "message": "Enqueued token limit reached."}]
            job |= {"status": "failed", "errors": {"data": data}}
        elif verdict == "refused":
            job |= {"status": "failed", "errors": {"data": [{"code": "model_not_found", "line": 1}]}}
        elif self.looks[job["id"]] == 1:
            job["status"] = "in_progress"
        elif self.looks[job["id"]] > 3:
            rows = [self.row(json.loads(line)) for line in self.files[job["file"]].splitlines()]
            self.files[f"out-{job['id']}"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
            job |= {"status": verdict, "output_file_id": f"out-{job['id']}", "error_file_id": ""}
        return web.json_response(job)

    def row(self, line: Mapping[str, Any]) -> dict[str, Any]:
        message = {"content": '{"semantic_gap_category": "Style", "semantic_gap_magnitude": 0.5, '}
        message["content"] += '"semantic_gap_confidence": 0.4}'
        body = {"choices": [{"message": message}]}
        return {
            "custom_id": line["custom_id"],
            "response": {"status_code": self.row_status, "body": body},
            "error": None,
        }

    async def content(self, asked: web.Request) -> web.Response:
        name = asked.match_info["id"]
        return web.Response(status=404) if self.lost and "out" not in name else web.Response(body=self.files[name])

    async def listed(self, asked: web.Request) -> web.Response:
        names = list(self.jobs)[::-1]
        after = names.index(asked.query["after"]) + 1 if "after" in asked.query else 0
        page = [self.jobs[name] for name in names[after : after + 2]]
        return web.json_response({"data": page, "has_more": after + 2 < len(names)})

    async def known_file(self, asked: web.Request) -> web.Response:
        return web.json_response({}, status=200 if asked.match_info["id"] in self.files else 404)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application()
        app.add_routes([web.post("/v1/files", self.upload), web.get("/v1/files/{id}", self.known_file)])
        app.add_routes([web.get("/v1/files/{id}/content", self.content), web.get("/v1/batches", self.listed)])
        app.add_routes([web.post("/v1/batches", self.create), web.get("/v1/batches/{id}", self.look)])
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        finally:
            await runner.cleanup()


def ask(provider: Provider, run: Run, tick: Callable[[str], None] = lambda step: None) -> list[tuple[Request, Raw]]:
    async def together() -> list[tuple[Request, Raw]]:
        async with provider.running() as run.base_url:
            return await run.ask(tick)

    return asyncio.run(together())


def asked_how_often(provider: Provider) -> Counter[str]:
    """By call, in how many jobs it was that ended with an answer."""
    files = [provider.files[job["file"]] for job in provider.jobs.values() if job["status"] == "completed"]
    return Counter(json.loads(line)["custom_id"] for file in files for line in file.splitlines())


def test_without_room_for_all_jobs_at_once_fewer_are_in_flight(tmp_path: Path) -> None:
    provider, run = Provider(room=6), Run(tmp_path, "", 4, limits=(3, 10**6))
    ask(provider, run)
    assert run.outcomes() == {"ok": 12}
    assert {*asked_how_often(provider).values()} == {1}
    assert "a: the provider has no room for more than 2 of its batch jobs at once" in run.said


def test_without_room_for_one_job_it_is_made_smaller(tmp_path: Path) -> None:
    provider, run = Provider(room=3), Run(tmp_path, "", 4)
    ask(provider, run)
    assert run.outcomes() == {"ok": 12}
    assert {*asked_how_often(provider).values()} == {1}
    assert "a: the provider has no room for 12 calls; 6 are tried" in run.said


def test_without_room_for_a_single_call_the_run_stops_and_nothing_is_lost(tmp_path: Path) -> None:
    provider, run = Provider(room=0), Run(tmp_path, "", 1)
    with pytest.raises(Unfinished, match="no room for a single call"):
        ask(provider, run)
    assert jobs_of(run) == []
    provider.room = 100
    ask(provider, run)
    assert run.outcomes() == {"ok": 3}


def test_a_429_that_speaks_of_the_queue_is_no_room(tmp_path: Path) -> None:
    provider, run = Provider(), Run(tmp_path, "", 4, limits=(6, 10**6))
    provider.create_status = [200, 429]
    ask(provider, run)
    assert run.outcomes() == {"ok": 12}
    assert "no room for more than 1" in run.said[0]


def test_a_job_that_is_refused_as_a_whole_stops_the_run_after_the_others_are_collected(tmp_path: Path) -> None:
    verdicts = {2: "refused"}
    provider = Provider(verdict=lambda n: verdicts.get(n, "completed"))
    run = Run(tmp_path, "", 4, limits=(3, 10**6))
    with pytest.raises(Unfinished, match=r"refuses batch job job-2 .*model_not_found \(line 1\).*--transport sync"):
        ask(provider, run)
    assert run.outcomes() == {"ok": 6}
    assert len(provider.jobs) == 3
    assert jobs_of(run) == []


def test_a_provider_that_takes_no_job_is_asked_once(tmp_path: Path) -> None:
    provider, run = Provider(), Run(tmp_path, "", 4)
    provider.create_status = [400, 400]
    with pytest.raises(Unfinished, match="does not take a batch job: HTTP 400"):
        ask(provider, run)
    assert provider.create_status == [400]


def test_a_5xx_at_creation_is_asked_again(tmp_path: Path) -> None:
    provider, run = Provider(), Run(tmp_path, "", 4)
    provider.create_status = [503, 500]
    ask(provider, run)
    assert run.outcomes() == {"ok": 12}
    assert len(provider.jobs) == 1


# Ends and starts -----------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """An end that leaves things as they are."""


def stop_at(wanted: str, n: int = 1) -> Callable[[str], None]:
    """Ends the start when a step is met for the n-th time."""
    met: Counter[str] = Counter()

    def tick(step: str) -> None:
        met[step] += 1
        if step == wanted and met[step] == n:
            raise Stop

    return tick


def test_questions_in_a_job_of_an_earlier_start_are_not_asked_again(new_run: NewRun) -> None:
    with fault_server(batch_seconds=0.5) as server:
        run = new_run(server, limits=(5, 10**6))
        with pytest.raises(Stop):
            asyncio.run(run.ask(stop_at("submitted", 4)))
        assert len(jobs_of(run)) == 2
        run.start()
        assert run.said[0].startswith("a: batch jobs batch_0, batch_1 with 10 calls in flight at the provider.")
        assert run.said[1] == "a: batch jobs batch_0, batch_1 with 10 calls of an earlier start"
        assert run.outcomes() == {"ok": 12}
        assert server.stats()["requests"] == 12


def test_ctrl_c_while_a_job_runs_cancels_nothing_and_says_what_is_in_flight(new_run: NewRun) -> None:
    with fault_server(batch_seconds=1.0) as server:
        run = new_run(server)
        command = [sys.executable, __file__, str(run.folder), run.base_url, "4", "50000"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while "submitted" not in process.stdout.readline():
                assert process.poll() is None
            process.send_signal(signal.SIGINT)
            said, _ = process.communicate(timeout=30)
        assert "Nothing is cancelled; the same command goes on with it" in said
        assert process.returncode != 0
        run.start()
        assert run.outcomes() == {"ok": 12}
        assert server.stats()["requests"] == 12


def test_a_job_whose_creation_was_not_logged_is_found_on_a_later_page(tmp_path: Path) -> None:
    provider, run = Provider(), Run(tmp_path, "", 4)
    with pytest.raises(Stop):
        ask(provider, run, stop_at("create", 2))
    for n in range(1, 6):
        provider.jobs[f"job-{n}"] = {"id": f"job-{n}", "status": "completed", "input_file_id": "x"}
    ask(provider, run)
    assert len(provider.jobs) == 6
    assert run.outcomes() == {"ok": 12}


def test_a_job_is_found_where_the_provider_spells_the_id_of_its_file_in_another_way(tmp_path: Path) -> None:
    provider, run = Provider(), Run(tmp_path, "", 4)
    provider.spelling = "files/{}"
    with pytest.raises(Stop):
        ask(provider, run, stop_at("create", 2))
    ask(provider, run)
    assert len(provider.jobs) == 1
    assert run.outcomes() == {"ok": 12}


def test_a_job_that_is_collected_is_not_taken_for_a_later_one_with_the_same_file(tmp_path: Path) -> None:
    provider, run = Provider(), Run(tmp_path, "", 1)
    provider.name_of, provider.row_status = lambda data: f"file-{hash(data)}", 500
    ask(provider, run)
    provider.row_status = 200
    with pytest.raises(Stop):
        ask(provider, run, stop_at("create", 1))
    ask(provider, run)
    assert run.outcomes() == {"server_error": 3, "ok": 3}
    assert len(provider.jobs) == 2


def test_a_job_that_was_intended_and_never_created_leaves_its_questions_open(new_run: NewRun) -> None:
    with fault_server() as server:
        run = new_run(server)
        with pytest.raises(Stop):
            asyncio.run(run.ask(stop_at("create", 1)))
        run.start()
        assert run.events() == ["intended", "gone", "intended", "submitted", "collected"]
        assert server.stats()["requests"] == 12


def test_with_the_key_of_another_project_nothing_is_asked_on_the_guess_that_it_was_not(new_run: NewRun) -> None:
    with fault_server() as ours, fault_server() as other:
        run = new_run(ours)
        with pytest.raises(Stop):
            asyncio.run(run.ask(stop_at("create", 2)))
        run.base_url = other.base_url
        with pytest.raises(Unfinished, match="this key does not see"):
            run.start()
        assert other.stats()["requests"] == 0
        run.base_url = ours.base_url
        run.start()
        assert ours.stats()["requests"] == 12


def test_a_job_that_the_provider_does_not_know_any_more_is_not_asked_again_unasked(new_run: NewRun) -> None:
    with fault_server(batch_seconds=60.0) as ours, fault_server() as other:
        run = new_run(ours)
        with pytest.raises(Stop):
            asyncio.run(run.ask(stop_at("submitted", 2)))
        run.base_url = other.base_url
        with pytest.raises(Unfinished, match="does not tell how batch job batch_0 stands"):
            run.start()
        assert other.stats()["requests"] == 0


def test_a_file_of_questions_that_is_lost_here_comes_back_from_the_provider(new_run: NewRun) -> None:
    with fault_server() as server:
        run = new_run(server)
        with pytest.raises(Stop):
            asyncio.run(run.ask(stop_at("submitted", 2)))
        for file in (run.folder / "batches").iterdir():
            file.write_bytes(b"something else")
        run.start()
        assert run.outcomes() == {"ok": 12}
        assert server.stats()["requests"] == 12


def test_a_file_of_questions_that_is_lost_everywhere_stops_the_run(tmp_path: Path) -> None:
    provider, run = Provider(), Run(tmp_path, "", 4)
    with pytest.raises(Stop):
        ask(provider, run, stop_at("submitted", 2))
    (kept,) = (run.folder / "batches").iterdir()
    questions = kept.read_bytes()
    kept.unlink()
    provider.lost = True
    with pytest.raises(Unfinished, match="Put it back"):
        ask(provider, run)
    kept.write_bytes(questions)
    ask(provider, run)
    assert run.outcomes() == {"ok": 12}


def test_rows_that_were_handed_out_and_not_logged_leave_the_job_uncollected(new_run: NewRun) -> None:
    with fault_server() as server:
        run = new_run(server)
        with pytest.raises(Stop):
            asyncio.run(run.ask(stop_at("half of the rows")))
        assert run.outcomes() == {"ok": 6}
        assert run.events() == ["intended", "submitted"]
        assert len(run.start()) == 6
        assert run.outcomes() == {"ok": 12}


def test_a_failure_that_was_logged_is_not_logged_again_when_its_job_is_collected_again(new_run: NewRun) -> None:
    with fault_server(batch_faults=("all_failed",)) as server:
        run = new_run(server)
        with pytest.raises(Stop):
            asyncio.run(run.ask(stop_at("collected")))
        run.pairs = 0
        assert run.start() == []
        assert run.outcomes() == {"batch_failed": 12}


STEPS = 42
"""Moments at which `main` can end a start of three jobs."""


def killed(run: Run, step: int) -> bool:
    command = [sys.executable, __file__, str(run.folder), run.base_url, str(run.pairs), str(run.limits[0]), str(step)]
    return subprocess.run(command, stdout=subprocess.DEVNULL, timeout=60).returncode == -signal.SIGKILL


def check_after_kills(run: Run, server: FaultServer, *steps: int) -> None:
    assert killed(run, steps[0])
    for step in steps[1:]:
        killed(run, step)
    run.start()
    run.start()
    stats = server.stats()
    assert run.outcomes()["ok"] == stats["questions"] == stats["requests"] == 6
    assert run.outcomes()["batch_failed"] == 1
    assert len({(call.pair_id, call.variant, call.attempt) for call in run.rows()}) == len(run.rows())
    assert jobs_of(run) == []


@pytest.mark.parametrize("step", range(1, STEPS + 1, 4))
def test_after_kill_9_nothing_is_asked_twice_and_nothing_is_lost(new_run: NewRun, step: int) -> None:
    with fault_server(batch_seconds=0.1, batch_faults=("-", "rows_missing", "-")) as server:
        check_after_kills(new_run(server, pairs=2, limits=(2, 10**6)), server, step)


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_after_kill_9_at_every_step_and_twice_more_nothing_is_lost_either(new_run: NewRun, step: int) -> None:
    with fault_server(batch_seconds=0.1, batch_faults=("-", "rows_missing", "-")) as server:
        check_after_kills(new_run(server, pairs=2, limits=(2, 10**6)), server, step, step // 2 + 1, step // 3 + 1)


def main(folder: str, base_url: str, pairs: str, calls: str, step: str = "0") -> None:
    """A start in a process of its own, which ends itself at a step."""
    left = int(step)

    def tick(name: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    run = Run(Path(folder), base_url, int(pairs), (int(calls), 10**6))
    run.said = run.shown = _Printed()  # type: ignore[assignment]
    asyncio.run(run.ask(tick))
    print(int(step) - left, "steps", flush=True)


class _Printed(list[str]):
    def append(self, text: str) -> None:
        print(text, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
