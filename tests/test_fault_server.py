"""The fault server does what each fault says, the same each time, and counts what it is asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from fault_server import BATCH_FAULTS, FAULTS, FaultServer, Options, cures, fault_server, question_key
from faults import CATEGORY, CONFIDENCE, MAGNITUDE, judgement
from sp2dpo.reply import MENDS, parse_reply

SPOILT_TEXTS = {
    "empty": "empty",
    "malformed": "no_object",
    "out_of_range": "out_of_range",
    "nan": "not_a_number",
    "unknown_category": "unknown_category",
    "two_objects": "several_objects",
    "missing_key": "missing_key",
}
"""Fault → the problem that `parse_reply` finds in its text."""

Answer = tuple[int, dict[str, str], str]


def body(text: str, model: str = "judge", **more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": f"Report {CATEGORY}."}, {"role": "user", "content": text}]
    return {"model": model, "messages": messages} | more


async def exchange(session: aiohttp.ClientSession, method: str, url: str, **options: Any) -> Answer:
    async with session.request(method, url, **options) as response:
        return response.status, {name.lower(): value for name, value in response.headers.items()}, await response.text()


def call(server: FaultServer, path: str, method: str = "GET", **options: Any) -> Answer:
    async def once() -> Answer:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
            return await exchange(session, method, server.base_url + path, **options)

    return asyncio.run(once())


def ask(server: FaultServer, text: str, **more: Any) -> Answer:
    headers = {"Authorization": f"Bearer {more.pop('key')}"} if "key" in more else {}
    return call(server, "/chat/completions", "POST", json=body(text, **more), headers=headers)


def content(answer: Answer) -> Any:
    return json.loads(answer[2])["choices"][0]["message"]["content"]


def expected(text: str) -> dict[str, Any]:
    return judgement(question_key(body(text)))


@pytest.fixture(scope="module")
def server() -> Iterator[FaultServer]:
    with fault_server(retry_after=2.5) as running:
        yield running


# Faults -------------------------------------------------------------------------------------------------------------


def test_without_a_fault_the_answer_is_a_valid_judgement_that_depends_on_the_question(server: FaultServer) -> None:
    judgements = [json.loads(content(ask(server, f"plain {i}"))) for i in range(20)]
    assert all(parse_reply(json.dumps(gap)).mends == () for gap in judgements)
    assert judgements == [expected(f"plain {i}") for i in range(20)]
    assert len({(gap[MAGNITUDE], gap[CONFIDENCE]) for gap in judgements}) > 15
    assert len({gap[CATEGORY] for gap in judgements}) > 3


def test_every_fault_has_a_cure_and_all_texts_to_mend_are_covered() -> None:
    assert {cure for cure, _ in FAULTS.values()} == {"mend", "retry", "stop"}
    assert len(cures("mend")) == len(MENDS)


@pytest.mark.parametrize("kind", cures("mend"))
def test_a_fault_to_mend_is_read_as_the_judgement_with_one_mend(server: FaultServer, kind: str) -> None:
    server.script(f"mend {kind}", kind)
    parsed = parse_reply(content(ask(server, f"mend {kind}")))
    gap = expected(f"mend {kind}")
    assert parsed.gap is not None
    assert (parsed.gap.category, parsed.gap.magnitude, parsed.gap.confidence) == tuple(gap.values())
    assert len(parsed.mends) == 1


@pytest.mark.parametrize(("kind", "problem"), SPOILT_TEXTS.items())
def test_a_spoilt_text_is_no_answer(server: FaultServer, kind: str, problem: str) -> None:
    server.script(f"spoilt {kind}", kind)
    answer = ask(server, f"spoilt {kind}")
    assert answer[0] == 200
    assert parse_reply(content(answer)).problem == problem


@pytest.mark.parametrize("kind", ["429", "429_silent", "500", "503", "quota"])
def test_a_fault_by_status_has_the_shape_of_an_error(server: FaultServer, kind: str) -> None:
    server.script(f"status {kind}", kind)
    status, headers, text = ask(server, f"status {kind}")
    assert status == (429 if kind in ("429_silent", "quota") else int(kind))
    assert headers.get("retry-after") == ("2.5" if kind == "429" else None)
    assert ("insufficient_quota" in text) == (kind == "quota")
    assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}


def test_truncated_refused_filtered_and_swapped_answers_say_so(server: FaultServer) -> None:
    kinds = ("truncated", "refused", "filtered", "other_model")
    server.script("say so", *kinds)
    bodies = [json.loads(ask(server, "say so")[2]) for _ in kinds]
    truncated, refused, filtered, other = (body["choices"][0] for body in bodies)
    assert (truncated["finish_reason"], filtered["finish_reason"]) == ("length", "content_filter")
    assert parse_reply(truncated["message"]["content"]).gap is None
    assert refused["message"]["content"] is None
    assert refused["message"]["refusal"]
    assert bodies[3]["model"] != "judge"
    assert parse_reply(other["message"]["content"]).gap is not None


def test_a_web_page_comes_with_200(server: FaultServer) -> None:
    server.script("a page", "html")
    status, headers, text = ask(server, "a page")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert text.startswith("<html>")


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("cut", aiohttp.ServerDisconnectedError),
        ("cut_body", aiohttp.ClientPayloadError),
        ("garbage_gzip", aiohttp.ClientPayloadError),
    ],
)
def test_a_fault_of_the_transport_is_no_response(server: FaultServer, kind: str, problem: type[Exception]) -> None:
    server.script(f"transport {kind}", kind)
    with pytest.raises(problem):
        ask(server, f"transport {kind}")
    assert parse_reply(content(ask(server, f"transport {kind}"))).gap is not None


def test_a_timeout_holds_the_connection(server: FaultServer) -> None:
    server.script("for ever", "timeout")
    with pytest.raises(TimeoutError):
        call(server, "/chat/completions", "POST", json=body("for ever"), timeout=aiohttp.ClientTimeout(0.3))
    assert ask(server, "for ever")[0] == 200


def test_the_faults_of_a_seed_are_the_same_each_time_and_end_as_told() -> None:
    met = []
    for seed in (1, 1, 2):
        with fault_server(
            seed=seed, fault_rate=0.5, faults=("500", "fenced", "empty"), faults_per_question=2
        ) as server:
            for _ in range(3):
                for i in range(40):
                    ask(server, f"question {i}")
            met.append(server.questions())
            stats = server.stats()
    assert met[0] == met[1] != met[2]
    kinds = [kind for question in met[0].values() for kind in question[:2]]
    assert set(kinds) == {"valid", "500", "fenced", "empty"}
    assert 0.3 < sum(kind != "valid" for kind in kinds) / len(kinds) < 0.7
    assert all(question[2] == "valid" for question in met[0].values())
    assert stats["requests"] == 120


# Counting -----------------------------------------------------------------------------------------------------------


def test_an_ideal_client_needs_one_request_more_for_each_fault_that_cannot_be_mended() -> None:
    with fault_server() as server:
        server.script("two", "500", "empty", "fenced", "500")
        server.script("one", "chatty")
        assert server.stats()["ideal_requests"] == 0
        for text in ("two", "one", "plain"):
            ask(server, text)
        assert server.stats()["ideal_requests"] == 3 + 1 + 1
        for text in ("two", "two", "two", "one", "plain"):
            ask(server, text)
        stats = server.stats()
    assert (stats["requests"], stats["questions"], stats["answered"], stats["most_asked"]) == (8, 3, 3, 4)
    assert stats["asked_again"] == {"valid": 1, "mend": 2}
    assert stats["by_kind"] == {"500": 2, "empty": 1, "fenced": 1, "chatty": 1, "valid": 3}


def test_calls_in_flight_are_counted_and_a_caller_that_hangs_up_was_not_answered() -> None:
    async def all_at_once(url: str) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(0.3)) as session:
            calls = (exchange(session, "POST", url, json=body(f"question {i}")) for i in range(7))
            await asyncio.gather(*calls, return_exceptions=True)

    with fault_server(latency_ms=60_000) as server:
        asyncio.run(all_at_once(server.base_url + "/chat/completions"))
        stats = server.stats()
    assert (stats["most_in_flight"], stats["requests"], stats["answered"]) == (7, 7, 0)


# Limits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "admitted"),
    [
        ({"rpm": 1, "burst_seconds": 180}, 3),
        ({"rpm": 1, "burst_seconds": 0}, 1),
        ({"rpm": 5, "window": "fixed", "window_seconds": 60}, 5),
        ({"tpm": 2, "burst_seconds": 3600}, 2),
    ],
)
def test_a_limit_admits_what_it_says_at_once_and_the_rest_gets_429(options: dict[str, Any], admitted: int) -> None:
    with fault_server(**options) as server:
        answers = [ask(server, "a") for _ in range(7)]
        stats = server.stats()
    assert [answer[0] for answer in answers] == [200] * admitted + [429] * (7 - admitted)
    assert "retry-after" in answers[-1][1]
    assert stats["by_kind"] == {"valid": admitted, "limit": 7 - admitted}
    assert stats["requests"] == admitted


def test_a_bucket_fills_again_and_a_window_opens_again() -> None:
    for options in ({"rpm": 120, "burst_seconds": 0}, {"rpm": 120, "window": "fixed", "window_seconds": 0.5}):
        with fault_server(**options) as server:
            statuses = [ask(server, "a")[0]]
            while statuses.count(200) < 3:
                statuses.append(ask(server, "a")[0])
        assert 429 in statuses


def test_limits_are_told_in_headers_unless_they_are_hidden() -> None:
    with fault_server(rpm=1, tpm=1000, burst_seconds=3600) as server:
        headers = [ask(server, "a")[1] for _ in range(2)]
    left = [int(each["x-ratelimit-remaining-requests"]) for each in headers]
    assert (headers[0]["x-ratelimit-limit-requests"], left) == ("1", [59, 58])
    assert headers[0]["x-ratelimit-limit-tokens"] == "1000"
    assert int(headers[0]["x-ratelimit-remaining-tokens"]) < 60_000
    assert headers[0]["x-ratelimit-reset-requests"].endswith("s")
    with fault_server(rpm=1, limit_headers=False, limit_retry_after=False) as server:
        answers = [ask(server, "a") for _ in range(2)]
    assert [answer[0] for answer in answers] == [200, 429]
    assert not any(name.startswith(("x-ratelimit", "retry")) for answer in answers for name in answer[1])


# What a provider takes ----------------------------------------------------------------------------------------------


def test_a_wrong_key_is_refused_and_never_repeated() -> None:
    with fault_server(key="sk-right-0123456789") as server:
        answers = [
            ask(server, "a"),
            ask(server, "a", key="sk-wrong-0123456789"),
            ask(server, "a", key="sk-right-0123456789"),
        ]
        assert server.stats()["by_kind"] == {"unauthorised": 2, "valid": 1}
    assert [answer[0] for answer in answers] == [401, 401, 200]
    assert not any("0123456789" in answer[2] for answer in answers)


def test_models_are_listed_with_the_date_of_their_end() -> None:
    with fault_server(models=("old", "older"), shutdown_date="2026-12-11") as server:
        listed = json.loads(call(server, "/models")[2])["data"]
        one = json.loads(call(server, "/models/old")[2])
        assert call(server, "/models/new")[0] == ask(server, "a", model="new")[0] == 404
    assert [model["id"] for model in listed] == ["old", "older"]
    assert one == listed[0]
    assert one["shutdown_date"] == "2026-12-11"


def test_a_named_parameter_is_refused_with_its_name() -> None:
    with fault_server(refuse=("temperature", "seed")) as server:
        status, _, text = ask(server, "a", seed=42)
        assert ask(server, "a", top_p=1.0)[0] == 200
    assert status == 400
    assert json.loads(text)["error"]["param"] == "seed"
    assert json.loads(text)["error"]["code"] == "unsupported_parameter"


def test_json_mode_is_enforced_ignored_or_refused() -> None:
    schema = {"type": "object", "properties": {"colour": {"enum": ["teal"]}, "n": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    poem = {"model": "judge", "messages": [{"role": "user", "content": "A poem, please."}], "response_format": form}
    answers = {}
    for mode in ("enforced", "ignored", "refused"):
        with fault_server(json_mode=mode) as server:
            answers[mode] = call(server, "/chat/completions", "POST", json=poem)
    assert json.loads(content(answers["enforced"])) == {"colour": "teal", "n": 0}
    assert "{" not in content(answers["ignored"])
    assert (answers["refused"][0], "response_format" in answers["refused"][2]) == (400, True)


def test_hidden_tokens_are_in_the_usage() -> None:
    with fault_server(reasoning_tokens=300) as server:
        usage = json.loads(ask(server, "a")[2])["usage"]
    assert usage["completion_tokens_details"] == {"reasoning_tokens": 300}
    assert usage["completion_tokens"] > 300
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_real_server_behind_it_answers_and_its_answers_are_spoilt(server_url: str) -> None:
    gap = {CATEGORY: {"enum": ["Style"]}, MAGNITUDE: {"enum": [0.25]}, CONFIDENCE: {"enum": [0.75]}}
    schema = {"type": "object", "properties": gap, "required": [*gap], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "gap", "strict": True, "schema": schema}}
    with fault_server(upstream=server_url) as server:
        server.script("a", "500", "fenced")
        answers = [ask(server, "a", response_format=form, max_tokens=64) for _ in range(3)]
    assert answers[0][0] == 500
    assert content(answers[1]).startswith("```json")
    parsed = [parse_reply(content(answer)).gap for answer in answers[1:]]
    assert parsed[0] == parsed[1]
    assert parsed[0] is not None
    assert (parsed[0].category, parsed[0].magnitude, parsed[0].confidence) == ("Style", 0.25, 0.75)


# Files and batches --------------------------------------------------------------------------------------------------


def upload(server: FaultServer, texts: list[str]) -> Answer:
    lines = [{"custom_id": text, "method": "POST", "url": "/v1/chat/completions", "body": body(text)} for text in texts]
    form = aiohttp.FormData({"purpose": "batch"})
    form.add_field("file", "".join(json.dumps(line) + "\n" for line in lines), filename="shard.jsonl")
    return call(server, "/files", "POST", data=form)


def create(server: FaultServer, texts: list[str]) -> dict[str, Any]:
    head = {
        "input_file_id": json.loads(upload(server, texts)[2])["id"],
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        "metadata": {"shard": texts[0]},
    }
    return dict(json.loads(call(server, "/batches", "POST", json=head)[2]))


def rows(server: FaultServer, file_id: str | None) -> list[dict[str, Any]]:
    if file_id is None:
        return []
    return [json.loads(line) for line in call(server, f"/files/{file_id}/content")[2].splitlines()]


TEXTS = [f"batch question {i}" for i in range(9)]


def run_batch(fault: str) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    with fault_server(batch_faults=(fault,)) as server:
        job = create(server, TEXTS)
        return job, rows(server, job["output_file_id"]), rows(server, job["error_file_id"]), server.stats()


def test_a_batch_goes_through_its_states_and_answers_every_line() -> None:
    with fault_server(batch_seconds=0.8) as server:
        job = create(server, TEXTS)
        states = [job["status"]]
        while states[-1] != "completed":
            job = json.loads(call(server, f"/batches/{job['id']}")[2])
            states += [job["status"]] if job["status"] != states[-1] else []
        output = rows(server, job["output_file_id"])
        assert server.stats()["answered"] == len(TEXTS)
    assert states == ["validating", "in_progress", "completed"]
    assert job["request_counts"] == {"total": 9, "completed": 9, "failed": 0}
    assert [row["custom_id"] for row in output] == TEXTS
    for row in output:
        assert (row["error"], row["response"]["status_code"]) == (None, 200)
        text = row["response"]["body"]["choices"][0]["message"]["content"]
        assert json.loads(text) == expected(row["custom_id"])


OUTCOMES = {
    "-": ("completed", 9, 0, 0),
    "rows_4xx": ("completed", 6, 3, 0),
    "rows_missing": ("completed", 6, 0, 0),
    "rows_in_error_file": ("completed", 6, 0, 3),
    "no_output": ("completed", 0, 0, 0),
    "all_failed": ("completed", 0, 0, 9),
    "failed": ("failed", 0, 0, 0),
    "expired": ("expired", 6, 0, 3),
    "duplicated": ("completed", 18, 0, 0),
    "shuffled": ("completed", 9, 0, 0),
}
"""Fault → status of a job of nine lines, rows with 200 and with 400, rows of the error file."""


@pytest.mark.parametrize("fault", OUTCOMES)
def test_a_batch_goes_wrong_as_told(fault: str) -> None:
    job, output, errors, stats = run_batch(fault)
    codes = [row["response"]["status_code"] for row in output]
    assert (job["status"], codes.count(200), codes.count(400), len(errors)) == OUTCOMES[fault]
    assert all(row["error"] is None for row in output)
    assert all(row["error"]["code"] and row["response"] is None for row in errors)
    assert bool(job["errors"]) == (fault == "failed")
    assert stats["answered"] == len({row["custom_id"] for row in output if row["response"]["status_code"] == 200})


def test_every_way_in_which_a_batch_goes_wrong_is_tested() -> None:
    assert {*OUTCOMES, "cut_reply", "cut_download"} - {"-"} == {*BATCH_FAULTS}


def test_rows_come_in_another_order_and_duplicates_differ() -> None:
    shuffled = [row["custom_id"] for row in run_batch("shuffled")[1]]
    assert sorted(shuffled) == TEXTS != shuffled
    twice = run_batch("duplicated")[1]
    first, second = twice[0], twice[1]
    assert first["custom_id"] == second["custom_id"]
    assert first["response"]["body"]["choices"] != second["response"]["body"]["choices"]


def test_a_job_whose_reply_was_cut_is_found_by_its_metadata() -> None:
    with fault_server(batch_faults=("-", "cut_reply")) as server:
        create(server, ["first"])
        with pytest.raises(aiohttp.ServerDisconnectedError):
            create(server, ["second"])
        page = json.loads(call(server, "/batches?limit=1")[2])
        rest = json.loads(call(server, f"/batches?limit=1&after={page['last_id']}")[2])
    assert [job["metadata"] for job in page["data"] + rest["data"]] == [{"shard": "second"}, {"shard": "first"}]
    assert (page["has_more"], rest["has_more"]) == (True, False)


def test_a_download_breaks_off_once() -> None:
    with fault_server(batch_faults=("cut_download",)) as server:
        job = create(server, TEXTS)
        with pytest.raises(aiohttp.ClientPayloadError):
            rows(server, job["output_file_id"])
        assert len(rows(server, job["output_file_id"])) == 9


def test_a_file_beyond_the_limits_is_refused() -> None:
    with fault_server(max_file_requests=3, max_file_bytes=4000) as server:
        assert upload(server, TEXTS[:3])[0] == 200
        assert upload(server, TEXTS[:4])[0] == 400
        assert upload(server, ["x" * 4000])[0] == 400


def test_a_file_can_be_looked_at_and_deleted() -> None:
    with fault_server() as server:
        made = json.loads(upload(server, TEXTS)[2])
        assert json.loads(call(server, f"/files/{made['id']}")[2]) == made
        assert json.loads(call(server, f"/files/{made['id']}", "DELETE")[2])["deleted"]
        assert call(server, f"/files/{made['id']}/content")[0] == 404


def test_a_batch_with_a_custom_id_twice_fails_and_a_running_one_can_be_cancelled() -> None:
    with fault_server(batch_seconds=0.2) as server:
        job = create(server, ["same", "same"])
        while job["status"] == "validating":
            job = json.loads(call(server, f"/batches/{job['id']}")[2])
        assert (job["status"], job["errors"]["data"][0]["code"]) == ("failed", "duplicate_custom_id")
    with fault_server(batch_seconds=60) as server:
        job = create(server, TEXTS)
        cancelled = json.loads(call(server, f"/batches/{job['id']}/cancel", "POST")[2])
    assert (cancelled["status"], cancelled["output_file_id"]) == ("cancelled", None)


# The options --------------------------------------------------------------------------------------------------------


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(ValueError, match="flying_pigs"):
        Options(faults=("flying_pigs",))
