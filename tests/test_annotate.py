"""The engine against a server that answers as each test says: outcomes, retries, resuming, recordings, secrets."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conftest import GOOD, NewRun, completion, rows, teacher
from sp2dpo.annotate import asking, engine, health
from sp2dpo.annotate.account import Account
from sp2dpo.annotate.pace import Pace
from sp2dpo.annotate.run import annotate
from sp2dpo.calls import Call, open_calls
from sp2dpo.errors import ProcessError, RunDirError
from sp2dpo.evidence import read_evidence
from sp2dpo.pairs import read_pairs
from sp2dpo.report.build import build_report
from sp2dpo.report.money import money_rows
from sp2dpo.report.tally import tally_calls
from sp2dpo.runs import Run
from sp2dpo.stages import schedule_run
from teacher_server import Answer, Asked, Handler, teacher_server, to_port


def ask(run: Run, handler: Handler, **options: Any) -> Account:
    with teacher_server(handler) as server:
        return annotate(run, connector=server.connector, **options)


def logged(run: Run) -> list[Call]:
    with open_calls(run.calls) as log:
        return list(log)


def no_one(asked: Asked) -> Answer:
    raise AssertionError("asked")


def always(answer: Answer) -> Handler:
    return lambda asked: answer


def in_turn(*answers: Answer) -> Handler:
    """One answer after another; an error if more is asked."""
    rest = iter(answers)
    return lambda asked: next(rest)


def after(seconds: float) -> str:
    """The value of a Retry-After header as a date."""
    return format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes at once where the pace waits."""
    skipped = 0.0

    def clock() -> float:
        return time.monotonic() + skipped

    async def sleep(seconds: float) -> None:
        nonlocal skipped
        skipped += seconds
        await asyncio.sleep(0)

    monkeypatch.setattr(asking, "Pace", partial(Pace, clock=clock, sleep=sleep))


# Outcomes -----------------------------------------------------------------------------------------------------------

QUOTA = {"error": {"message": "Check your plan.", "type": "insufficient_quota", "code": "insufficient_quota"}}

FAULTS: dict[str, tuple[Answer, str, int | None]] = {
    "408": (Answer(status=408), "timeout", 408),
    "500": (Answer("<html>oops</html>", 500), "server_error", 500),
    "503": (Answer(status=503, headers={"retry-after": "0"}), "server_error", 503),
    "503 until a day that is past": (Answer(status=503, headers={"retry-after": after(-60)}), "server_error", 503),
    "503 with a huge nest": (Answer("[" * 100_000, 503), "server_error", 503),
    "no answer": (Answer(how="never"), "timeout", None),
    "cut before an answer": (Answer(how="closed"), "connection", None),
    "cut in mid-body": (replace(completion(), how="cut"), "connection", None),
    "not gzip": (Answer(b"no gzip", headers={"content-encoding": "gzip"}), "connection", None),
    "cut json": (Answer('{"choices": ['), "bad_response", 200),
    "no body": (Answer(""), "bad_response", 200),
    "bad utf-8": (Answer(b"\xff\xfe{"), "bad_response", 200),
    "nest": (Answer("[" * 100_000), "bad_response", 200),
    "html": (Answer("<html>"), "bad_response", 200),
    "error in a 200": (Answer({"error": "quota"}), "bad_response", 200),
    "no choices": (completion(choices=[]), "bad_response", 200),
    "null choices": (completion(choices=None), "bad_response", 200),
    "choice without message": (completion(choices=[{"index": 0}]), "bad_response", 200),
    "content in parts": (completion([{"type": "text", "text": GOOD}]), "bad_response", 200),
    "list": (Answer([1]), "bad_response", 200),
    "null content": (completion(None), "empty", 200),
    "empty": (completion(""), "empty", 200),
    "cut at the cap": (completion(GOOD, "length"), "truncated", 200),
    "filtered": (completion(GOOD, "content_filter"), "filtered", 200),
    "refused": (completion(GOOD, message={"refusal": "I won't"}), "refused", 200),
    "prose": (completion("Sorry, no."), "no_object", 200),
    "two objects": (completion(GOOD + GOOD), "several_objects", 200),
    "out of range": (completion(GOOD.replace("0.5", "5")), "out_of_range", 200),
    "half a surrogate": (completion("\ud800"), "no_object", 200),
}
"""Faults that are asked again at most `retry_attempts` times: what the server does, the outcome, the status."""

NOT_TAKEN: dict[str, tuple[Answer, str, int | None]] = {
    "400": (Answer({"error": {"message": "no seed"}}, 400), "bad_request", 400),
    "413": (Answer(status=413), "bad_request", 413),
    "422": (Answer("no", 422), "bad_request", 422),
    "redirect": (Answer(status=302, headers={"location": "/elsewhere"}), "bad_request", 302),
    "204": (Answer(status=204), "bad_request", 204),
}
"""Faults that the same request would meet again."""

LIMITED: dict[str, tuple[Answer, str, int | None]] = {
    "429": (Answer(status=429), "rate_limited", 429),
    "429 with a wait": (Answer(status=429, headers={"retry-after": "0.01"}), "rate_limited", 429),
    "429 with milliseconds": (Answer(status=429, headers={"retry-after-ms": "10"}), "rate_limited", 429),
    "429 until a day that is past": (Answer(status=429, headers={"retry-after": after(-60)}), "rate_limited", 429),
    "429 for ever": (Answer(status=429, headers={"retry-after": "inf"}), "rate_limited", 429),
}
"""Faults that do not count as retries."""

STOPPING: dict[str, tuple[Answer, str, int | None]] = {
    "401": (Answer(status=401), "no_access", 401),
    "402": (Answer(status=402), "quota", 402),
    "quota": (Answer(QUOTA, 429), "quota", 429),
    "429 until 2099": (
        Answer(status=429, headers={"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}),
        "rate_limited",
        429,
    ),
    "other model": (completion(model="cheaper"), "other_model", 200),
}
"""Faults after which an annotator is not asked any more."""


@pytest.fixture
def one_question(new_run: NewRun) -> Run:
    """Patient for a quarter of a second."""
    decoding = {"retry_attempts": 2, "retry_delay_base": 0, "timeout": 0.25}
    return new_run(pairs=rows(1), panel={"decoding": decoding})


@pytest.mark.parametrize("name", FAULTS)
def test_a_failed_attempt_is_a_row_of_its_kind_and_is_repeated_so_often(one_question: Run, name: str) -> None:
    answer, outcome, status = FAULTS[name]
    account = ask(one_question, lambda asked: answer)
    calls = logged(one_question)
    assert [call.outcome for call in calls] == [outcome] * 3  # 1 + retry_attempts
    assert [call.attempt for call in calls] == [1, 2, 3]
    assert {call.http_status for call in calls} == {status}
    assert {call.category for call in calls} == {None}
    assert (account.questions, account.valid, account.missing) == (1, 0, 1)
    assert account.outcomes == account.missing_by_cause + Counter({outcome: 2}) == Counter({outcome: 3})


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_a_request_that_is_not_taken_is_not_repeated_before_the_next_start(one_question: Run, name: str) -> None:
    answer, outcome, status = NOT_TAKEN[name]
    for start in (1, 2):
        account = ask(one_question, lambda asked: answer)
        assert [(call.outcome, call.http_status) for call in logged(one_question)] == [(outcome, status)] * start
        assert account.missing_by_cause == {outcome: 1}


@pytest.mark.usefixtures("no_pauses")
@pytest.mark.parametrize("name", LIMITED)
def test_a_rate_limit_uses_up_no_retries_and_has_a_bound_of_its_own(one_question: Run, name: str) -> None:
    answer, outcome, status = LIMITED[name]
    account = ask(one_question, lambda asked: answer)
    calls = [(call.outcome, call.http_status) for call in logged(one_question)]
    assert calls == [(outcome, status)] * engine.RATE_LIMITED_AT_MOST
    assert not account.stopped


@pytest.mark.usefixtures("no_pauses")
def test_after_rate_limits_there_are_as_many_retries_as_before(one_question: Run) -> None:
    limited, broken = Answer(status=429), Answer(status=500)
    account = ask(one_question, in_turn(*[limited] * 4, broken, broken, completion()))
    assert (account.valid, account.attempts) == (1, 7)


@pytest.mark.parametrize("name", STOPPING)
def test_a_fault_that_time_does_not_mend_stops_the_annotator(new_run: NewRun, name: str) -> None:
    answer, outcome, status = STOPPING[name]
    run = new_run(pairs=rows(30))
    account = ask(run, lambda asked: answer)
    most = health.FIRST_PROBES if outcome == "quota" else 1
    assert [(call.outcome, call.http_status) for call in logged(run)] == [(outcome, status)] * most
    assert set(account.stopped) == {"teacher"} or account.stopped_all
    assert account.missing_by_cause == {outcome: most, "not asked yet": 30 - most}


@pytest.mark.parametrize("status", [401, 403, 404])
def test_no_access_stops_that_annotator_at_once_and_no_other(new_run: NewRun, status: int) -> None:
    run = new_run(pairs=rows(4), panel={"annotators": [teacher("shut"), teacher("open")]})
    account = ask(
        run,
        lambda asked: completion() if asked.host == "open.invalid" else Answer("go away", status),
        concurrency=1,
    )
    assert Counter((call.annotator, call.outcome) for call in logged(run)) == {
        ("shut", "no_access"): 1,
        ("open", "ok"): 4,
    }
    assert set(account.stopped) == {"shut"}
    assert "go away" in account.stopped["shut"]


def test_a_date_far_off_in_retry_after_is_told_in_minutes(new_run: NewRun) -> None:
    header = after(engine.LONGEST_RETRY_AFTER_S + 305)
    account = ask(new_run(), lambda asked: Answer(status=503, headers={"retry-after": header}))
    assert account.attempts == 1
    assert "it asks to wait for 20 minutes" in account.stopped["teacher"]


def test_an_endpoint_that_never_answered_is_given_up_after_a_few_attempts(new_run: NewRun) -> None:
    run = new_run(pairs=rows(30))
    account = ask(run, lambda asked: Answer(status=503))
    assert len(logged(run)) == health.FIRST_PROBES
    assert "3 attempts in a row without an answer" in account.stopped["teacher"]
    assert "HTTP 503" in account.stopped["teacher"]


def test_an_endpoint_that_answered_before_is_given_up_later(new_run: NewRun) -> None:
    run, calls = new_run(pairs=rows(30)), iter(range(1000))
    account = ask(run, lambda asked: completion() if next(calls) < 2 else Answer(status=503), concurrency=1)
    failed = health.CROWD + health.PROBES - 1
    assert [call.outcome for call in logged(run)] == ["ok", "ok"] + ["server_error"] * failed
    assert f"{failed} attempts in a row without an answer" in account.stopped["teacher"]


def test_an_answer_in_between_keeps_the_endpoint_in_use(new_run: NewRun) -> None:
    run, calls = new_run(pairs=rows(60)), iter(range(10_000))
    period = health.CROWD + health.PROBES - 1
    account = ask(run, lambda a: Answer(status=503) if next(calls) % period else completion(), concurrency=1)
    assert len(logged(run)) > 8 * period
    assert not account.stopped


def test_an_address_where_nobody_listens_is_a_connection_that_cost_nothing(new_run: NewRun) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        price = {"input": 1.0, "output": 1.0, "as_of": "2026-01-01"}
        run = new_run(pairs=rows(1), panel={"annotators": [teacher(price=price)]})
        account = annotate(run, connector=to_port(taken.getsockname()[1]))
    assert {call.outcome for call in logged(run)} == {"connection"}
    assert {(call.cost_usd, call.cost_bound_usd) for call in logged(run)} == {(None, None)}
    assert (account.spent_usd, account.unknown_usd) == (0.0, 0.0)


def test_a_fenced_answer_is_repaired_and_the_mend_is_named(new_run: NewRun) -> None:
    run = new_run(pairs=rows(1))
    account = ask(run, lambda asked: completion(f"```json\n{GOOD}\n```"))
    call = logged(run)[0]
    assert (call.outcome, call.mends, call.magnitude) == ("repaired", '["code_fence"]', 0.5)
    assert call.raw_text == f"```json\n{GOOD}\n```"
    assert account.mends == Counter(code_fence=1)


def test_a_retry_that_succeeds_ends_the_question(new_run: NewRun) -> None:
    run = new_run(pairs=rows(1))
    assert ask(run, in_turn(Answer(status=500), completion("?"), completion())).valid == 1
    assert [call.outcome for call in logged(run)] == ["server_error", "no_object", "ok"]


def test_the_delay_doubles_with_jitter_and_is_never_below_retry_after() -> None:
    for retry in range(4):
        delays = [health.delay_s(5, retry, None) for _ in range(200)]
        assert 5 * 2**retry * 0.75 <= min(delays) < max(delays) <= 5 * 2**retry * 1.25
    assert health.delay_s(5, 0, 60.0) == 60.0


def test_the_log_keeps_tokens_cost_model_and_settings(new_run: NewRun) -> None:
    price = {"input": 1.6, "output": 6.4, "as_of": "2025-04-22"}
    omit, extra = ["temperature", "seed"], {"reasoning_effort": "minimal"}
    run = new_run(pairs=rows(1), panel={"annotators": [teacher(price=price, omit=omit, extra=extra)]})
    with teacher_server(
        lambda asked: replace(
            completion(model="model-of-teacher", system_fingerprint="fp_1"), headers={"x-request-id": "req_1"}
        )
    ) as server:
        account = annotate(run, connector=server.connector)
    call = logged(run)[0]
    assert (call.prompt_tokens, call.completion_tokens, call.system_fingerprint) == (1000, 50, "fp_1")
    assert (call.request_id, call.kind, call.transport, call.origin) == ("req_1", "chat_json", "sync", "live")
    assert call.cost_usd == account.spent_usd == pytest.approx((1000 * 1.6 + 50 * 6.4) / 1e6)
    sent = {name: value for name, value in server.asked[0].json.items() if name not in ("model", "messages")}
    assert json.loads(call.params_sent) == sent
    assert sent == {"top_p": 0.8, "max_tokens": 64, "frequency_penalty": 0.0, "presence_penalty": 0.0, "n": 1} | extra
    assert set(json.loads(call.params_requested)) >= {"temperature", "seed", "top_k", "stop", "repetition_penalty"}


@pytest.mark.parametrize("count", [10**30, -5, "12", True, None, 1.5])
def test_a_count_of_tokens_that_is_none_is_left_out(new_run: NewRun, count: Any) -> None:
    run = new_run(pairs=rows(1))
    assert ask(run, lambda asked: completion(usage={"prompt_tokens": count})).valid == 1
    assert logged(run)[0].prompt_tokens is None


def test_a_failed_answer_that_was_billed_is_counted(new_run: NewRun) -> None:
    price = {"input": 1.0, "output": 10.0, "as_of": "2026-01-01"}
    run = new_run(pairs=rows(1), panel={"annotators": [teacher(price=price)]})
    account = ask(run, in_turn(completion("?"), completion(None), completion()))
    assert account.spent_usd == pytest.approx(3 * (1000 * 1.0 + 50 * 10.0) / 1e6)
    assert account.unknown_usd == 0.0


def test_an_answer_whose_bill_is_not_known_counts_with_what_it_may_cost_at_most(new_run: NewRun) -> None:
    price = {"input": 1.0, "output": 10.0, "as_of": "2026-01-01"}
    run = new_run(pairs=rows(1), panel={"annotators": [teacher(price=price)]})
    account = ask(run, in_turn(completion(usage=None)))
    call = logged(run)[0]
    assert call.cost_usd is None
    assert account.unknown_usd == call.cost_bound_usd
    assert (call.cost_bound_usd or 0) > (len(GOOD) + 64 * 10.0) / 1e6


def test_hidden_tokens_are_kept_even_where_only_the_total_shows_them(new_run: NewRun) -> None:
    run = new_run(pairs=rows(1))
    ask(run, lambda a: completion(usage={"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 100}))
    call = logged(run)[0]
    assert (call.prompt_tokens, call.completion_tokens, call.reasoning_tokens) == (10, 90, 85)


# Another model ------------------------------------------------------------------------------------------------------


def test_another_model_stops_the_whole_run_and_its_answer_is_none(new_run: NewRun) -> None:
    annotators, decoding = [teacher("swapped"), teacher("other")], {"retry_attempts": 0, "timeout": 0.5}
    run = new_run(pairs=rows(20), panel={"annotators": annotators, "decoding": decoding})
    account = ask(
        run,
        lambda a: completion(model="cheaper") if a.host == "swapped.invalid" else Answer(how="never"),
        concurrency=1,
    )
    calls = [call for call in logged(run) if call.annotator == "swapped"]
    assert [(call.outcome, call.served_model, call.category) for call in calls] == [("other_model", "cheaper", None)]
    assert account.stopped_all is not None
    assert "was asked as model-of-swapped, and cheaper answered" in account.stopped_all
    assert "served_as: cheaper" in account.stopped_all
    assert account.missing_by_cause == {"other_model": 1, "timeout": 1, "not asked yet": 38}


@pytest.mark.parametrize(
    ("requested", "served"),
    [
        ("gpt-5", "gpt-5-2025-08-07"),
        ("qwen-max", "qwen-max-0125"),
        ("gemini-2.5-flash", "models/gemini-2.5-flash"),
        ("llama3", "llama3:latest"),
        ("Qwen/Qwen3-4B", "qwen/qwen3-4b"),
    ],
)
def test_a_snapshot_of_the_requested_model_is_that_model(new_run: NewRun, requested: str, served: str) -> None:
    run = new_run(panel={"annotators": [teacher(model=requested, provider="generic")]})
    assert ask(run, lambda asked: completion(model=served)).valid == 2


@pytest.mark.parametrize(
    ("requested", "served"),
    [
        ("gpt-5", "gpt-5-mini"),
        ("gpt-5", "gpt-5-mini-2025-08-07"),
        ("gpt-5-2025-08-07", "gpt-5"),
        ("gpt-5-2025-08-07", "gpt-5-2026-01-01"),
        ("qwen-max", "qwen-max-latest-flash"),
        ("qwen-max", ""),
    ],
)
def test_a_model_of_another_name_is_another_model(new_run: NewRun, requested: str, served: str) -> None:
    run = new_run(panel={"annotators": [teacher(model=requested, provider="generic")]})
    assert ask(run, lambda asked: completion(model=served)).outcomes == {"other_model": 1}


def test_a_name_that_is_expected_is_no_other_model_and_the_requested_one_then_is(new_run: NewRun) -> None:
    run = new_run(panel={"annotators": [teacher(served_as="weights-7")]})
    assert ask(run, lambda asked: completion(model="weights-7"), limit=1).valid == 1
    assert ask(run, lambda asked: completion(model="model-of-teacher")).outcomes == {"other_model": 1}
    schedule_run(run)
    with open_calls(run.calls) as log:
        served = tally_calls(log, read_evidence(run)).served.values()
    assert {one.served: one.swapped for one in served} == {"weights-7": False, "model-of-teacher": True}


def test_another_snapshot_later_in_one_run_is_another_model(new_run: NewRun) -> None:
    run = new_run(pairs=rows(3), panel={"annotators": [teacher(model="m")]})
    assert ask(run, lambda asked: completion(model="m-2026-01-01"), limit=1).valid == 1
    again = ask(run, in_turn(completion(model="m-2026-01-01"), completion(model="m-2026-02-02")), concurrency=1)
    assert again.outcomes == {"ok": 1, "other_model": 1}
    assert "m-2026-02-02 answered" in str(again.stopped_all)


def test_an_endpoint_that_names_no_model_is_taken_at_its_word(new_run: NewRun) -> None:
    assert ask(new_run(), lambda asked: completion(model=None)).valid == 2


# Resuming -----------------------------------------------------------------------------------------------------------


def moody(asked: Asked) -> Answer:
    """Answers about the even ones."""
    return completion() if re.search(r"question [024]\b", asked.text) else completion("?")


def test_an_answered_question_is_not_asked_again_and_a_failed_one_is(new_run: NewRun) -> None:
    run = new_run(pairs=rows(6))
    assert ask(run, moody).valid == 3
    second = ask(run, lambda asked: completion())
    assert (second.valid, second.attempts) == (6, 3)
    assert sorted(call.attempt for call in logged(run) if call.valid) == [1, 1, 1, 4, 4, 4]
    assert ask(run, no_one).attempts == 0


def test_only_the_chosen_kinds_of_failure_are_asked_again(new_run: NewRun) -> None:
    run = new_run(pairs=rows(4), panel={"decoding": {"retry_attempts": 0}})
    kinds = in_turn(completion("?"), completion(None), Answer(status=400), completion())
    assert ask(run, kinds, concurrency=1).valid == 1
    account = ask(run, lambda asked: completion(), retry=("empty", "bad_request"))
    assert (account.attempts, account.valid, account.missing_by_cause) == (2, 3, {"no_object": 1})
    assert ask(run, no_one, retry=("empty",)).missing == 1


def test_questions_that_were_never_asked_are_no_retries(new_run: NewRun) -> None:
    run = new_run(pairs=rows(3), panel={"decoding": {"retry_attempts": 0}})
    ask(run, lambda asked: completion("?"), limit=1)
    account = ask(run, lambda asked: completion(), retry=("no_object",))
    assert (account.attempts, account.missing_by_cause) == (1, {"not asked yet": 2})


def test_the_flags_for_the_rest_name_the_failures_unless_something_was_never_asked(new_run: NewRun) -> None:
    run = new_run(pairs=rows(3), panel={"decoding": {"retry_attempts": 0}})
    first = ask(run, in_turn(completion("?"), Answer(status=400)), concurrency=1, limit=2)
    assert first.retry_flags() == ["--retry", "bad_request", "--retry", "no_object"]
    assert ask(run, lambda asked: Answer(status=401), concurrency=1).missing_by_cause["not asked yet"] == 1
    assert ask(run, no_one, retry=("empty",)).retry_flags() == []


def test_the_report_puts_the_estimate_beside_what_was_spent_on_answers_and_failures(new_run: NewRun) -> None:
    price = {"input": 1.0, "output": 2.0, "as_of": "2026-01-01"}
    run = new_run(pairs=rows(2), panel={"annotators": [teacher(price=price)]})
    ask(run, in_turn(completion("?"), completion(), Answer(how="cut"), completion()), concurrency=1)
    schedule_run(run)
    with open_calls(run.calls) as log:
        (row,) = money_rows(run, tally_calls(log, read_evidence(run)))
    one_call = (1000 * 1.0 + 50 * 2.0) / 1e6
    assert row.spent == pytest.approx(3 * one_call)
    assert row.spent_per_1000 == pytest.approx(1500 * one_call)
    assert row.on_failed == pytest.approx(one_call)
    assert row.unknown_at_most is not None
    assert row.unknown_at_most > one_call
    made = json.loads((run.path / "estimate.json").read_text())
    assert row.estimated == made["usd"] > 0
    assert row.estimated_per_1000 == pytest.approx(500 * made["usd"])
    assert "guessed" in row.basis
    build_report(run.path)
    assert "Estimated before, and spent" in run.report.read_text()


def test_a_kind_of_failure_that_there_is_not_is_refused_with_the_nearest(new_run: NewRun) -> None:
    run = new_run()
    with pytest.raises(ProcessError, match=r"--retry tiemout: no such kind of failure .*'timeout'"):
        ask(run, no_one, retry=("tiemout",))
    assert not run.calls.exists()


def test_a_limit_takes_the_first_pairs_and_the_rest_can_follow(new_run: NewRun) -> None:
    run = new_run(pairs=rows(5), panel={"variants": ["v1", "v2"]})
    first = ask(run, lambda asked: completion(), limit=2)
    assert (first.questions, first.attempts, first.valid) == (4, 4, 4)
    rest = ask(run, lambda asked: completion())
    assert (rest.questions, rest.attempts, rest.valid) == (10, 6, 10)


def test_a_sample_is_spread_over_the_file_and_the_rest_can_follow(new_run: NewRun) -> None:
    run = new_run(pairs=rows(10))
    with teacher_server(lambda asked: completion()) as server:
        sampled = annotate(run, connector=server.connector, sample=5)
        numbers = {int(n) for asked in server.asked for n in re.findall(r"question (\d)", asked.text)}
        assert (sampled.questions, numbers) == (5, {0, 2, 4, 6, 8})
        assert annotate(run, connector=server.connector).attempts == 5


def test_a_pair_that_stands_in_the_data_twice_is_asked_about_once(new_run: NewRun) -> None:
    run = new_run(pairs=[*rows(2), *rows(2)], data={"source": "pairs.jsonl", "filters": []})
    account = ask(run, lambda asked: completion())
    assert (account.questions, account.attempts, account.valid) == (2, 2, 2)


def test_variants_of_a_pair_are_asked_after_each_other(new_run: NewRun) -> None:
    run = new_run(pairs=rows(3), panel={"variants": ["v1", "v2", "v3"]})
    ask(run, lambda asked: completion(), concurrency=1)
    ids = read_ids(run)
    assert [(call.pair_id, call.variant) for call in logged(run)] == [(p, v) for p in ids for v in ("v1", "v2", "v3")]


def test_ctrl_c_keeps_what_was_answered_and_what_is_in_flight(new_run: NewRun) -> None:
    run, calls = new_run(pairs=rows(5)), iter(range(10))

    def handler(asked: Asked) -> Answer:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return completion()

    with pytest.raises(KeyboardInterrupt):
        ask(run, handler, concurrency=1)
    assert [call.outcome for call in logged(run)] == ["ok", "ok", "ok"]
    assert ask(run, lambda asked: completion()).attempts == 2


# Recordings and reuse -----------------------------------------------------------------------------------------------


def recorded(calls: Any, name: str = "teacher", **more: Any) -> dict[str, Any]:
    return {"name": name, "kind": "recorded", "model": f"model-of-{name}", "calls": str(calls)} | more


def test_a_recorded_log_answers_the_same_questions_without_a_request(new_run: NewRun) -> None:
    source = new_run("source", pairs=rows(3))
    ask(source, lambda asked: completion(served="x"))
    run = new_run("copy", pairs=rows(3), panel={"annotators": [recorded(source.calls)]})
    assert ask(run, no_one).valid == 3
    assert [call.origin for call in logged(run)] == ["recorded"] * 3
    assert {c.request_hash for c in logged(run)} == {c.request_hash for c in logged(source)}


def test_a_recorded_answer_to_another_prompt_is_not_taken(new_run: NewRun, tmp_path: Path) -> None:
    source = new_run("source", pairs=rows(3))
    ask(source, lambda asked: completion(f"So: {GOOD}"))
    pack = source.path / "prompts"
    (pack / "v1.txt").write_text((pack / "v1.txt").read_text() + "\nBe strict.\n")
    run = new_run("copy", pairs=rows(3), panel={"prompts": str(pack), "annotators": [recorded(source.calls)]})
    account = ask(run, no_one)
    assert account.outcomes == Counter(other_question=3)
    assert not account.mends
    assert {(c.raw_text, c.category, c.magnitude, c.confidence) for c in logged(run)} == {(None,) * 4}


def jsonl(new_run: NewRun, tmp_path: Path, lines: Callable[[str], list[Any]]) -> Run:
    """A run whose annotator is a JSONL file: `lines` makes it from the id of the only pair."""
    source = new_run("ids", pairs=rows(1))
    answers = tmp_path / "answers.jsonl"
    pair = read_ids(source)[0]
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines(pair)), encoding="utf-8")
    return new_run("run", pairs=rows(1), panel={"annotators": [recorded(answers)]})


def read_ids(run: Run) -> list[str]:
    return [str(pair) for pair in read_pairs(run.pairs, "")["pair_id"].to_pylist()]


def test_a_recorded_jsonl_gives_its_first_answer(new_run: NewRun, tmp_path: Path) -> None:
    texts = (GOOD, GOOD.replace("0.5", "0.9"))
    run = jsonl(new_run, tmp_path, lambda p: [{"pair_id": p, "variant": "v1", "raw_text": text} for text in texts])
    assert ask(run, no_one).valid == 1
    assert logged(run)[0].magnitude == 0.5


@pytest.mark.parametrize(
    "odd", [{"prompt_tokens": "many"}, {"request_hash": "00"}, {"http_status": "OK"}, {"finish_reason": 3}, {"x": 1}]
)
def test_other_fields_of_a_recorded_line_do_no_harm(new_run: NewRun, tmp_path: Path, odd: dict[str, Any]) -> None:
    run = jsonl(new_run, tmp_path, lambda p: [{"pair_id": p, "variant": "v1", "raw_text": GOOD} | odd])
    assert ask(run, no_one).valid == 1


def test_half_a_surrogate_in_a_recorded_line_is_a_row_not_a_crash(new_run: NewRun, tmp_path: Path) -> None:
    run = jsonl(new_run, tmp_path, lambda p: [{"pair_id": p, "variant": "v1", "raw_text": "\ud800"}])
    assert ask(run, no_one).outcomes == Counter(no_object=1)


def test_a_question_that_was_not_recorded_is_a_failure_of_that_name(new_run: NewRun, tmp_path: Path) -> None:
    run = jsonl(new_run, tmp_path, lambda p: [{"pair_id": "other", "variant": "v1", "raw_text": GOOD}])
    assert ask(run, no_one).outcomes == Counter(not_recorded=1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"pair_id": "p", "variant": "v1"}, "line 1: an answer needs .* no raw_text"),
        ({"pair_id": 1, "variant": "v1", "raw_text": ""}, "no pair_id"),
        ([1], "line 1"),
        ({"annotator": "someone", "pair_id": "p", "variant": "v1", "raw_text": GOOD}, "it has: someone"),
    ],
)
def test_a_bad_recording_is_refused_before_anything_is_logged(
    new_run: NewRun, tmp_path: Path, line: Any, message: str
) -> None:
    run = jsonl(new_run, tmp_path, lambda p: [line])
    with pytest.raises(ProcessError, match=message):
        ask(run, no_one)
    assert not run.calls.exists()


def test_reuse_takes_over_answers_to_the_same_questions_only(new_run: NewRun) -> None:
    old = new_run("old", pairs=rows(3), panel={"variants": ["v1", "v2"]})
    ask(old, lambda asked: completion())
    new = new_run("new", pairs=[*rows(3), {"prompt": "new", "chosen": "a", "rejected": "b"}], name="other")
    account = ask(new, lambda asked: completion(), reuse=old.path)
    assert (account.reused, account.live, account.valid) == (3, 1, 4)
    assert Counter(call.origin for call in logged(new)) == {"reused": 3, "live": 1}
    assert account.cost_usd == 0.0


@pytest.mark.parametrize("change", [{"decoding": {"temperature": 0.9}}, {"annotators": [teacher(model="other")]}])
def test_reuse_takes_nothing_over_from_another_setting_or_model(new_run: NewRun, change: dict[str, Any]) -> None:
    old = new_run("old")
    ask(old, lambda asked: completion())
    new = new_run("new", panel=change)
    assert ask(new, lambda asked: completion(), reuse=old.path).reused == 0


def test_reuse_of_a_folder_without_a_log_is_refused(new_run: NewRun, tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"calls\.sqlite is missing"):
        ask(new_run("new"), lambda asked: completion(), reuse=tmp_path)


# Secrets ------------------------------------------------------------------------------------------------------------


def spelt(key: str) -> dict[str, str]:
    """A key as the other side of a wire may write it, and the beginning of it."""
    escapes = "".join(f"\\u{ord(letter):04x}" for letter in key)
    return {"plain": key, "slashes": key.replace("/", "\\/"), "escapes": escapes, "cut": key[:12]}


ECHOES: dict[str, Callable[[str], Answer]] = {
    "content": lambda key: completion(f"{key} {GOOD}"),
    "extra key": lambda key: completion(GOOD[:-1] + f', "key": "{key}"}}'),
    "escapes": lambda key: Answer('{"choices": [{"message": {"content": "' + spelt(key)["escapes"] + '"}}]}'),
    "model": lambda key: completion(model=key),
    "fingerprint": lambda key: completion(system_fingerprint=key),
    "finish": lambda key: completion(finish=key),
    "refusal": lambda key: completion(message={"refusal": key}),
    "parts": lambda key: completion([{"text": key}]),
    "json": lambda key: Answer(json.dumps(key)),
    "html": lambda key: Answer(key),
    "400": lambda key: Answer({"error": {"message": f"bad {key}"}}, 400),
    "400 with slashes": lambda key: Answer('{"error": "' + spelt(key)["slashes"] + '"}', 400),
    "401": lambda key: Answer({"error": {"message": f"bad {key}"}}, 401),
    "401 in escapes": lambda key: Answer('{"error": "' + spelt(key)["escapes"] + '"}', 401),
    "500": lambda key: Answer(f"bad {key}", 500),
    "500 to be cut": lambda key: Answer("x" * (2000 - len("Bearer sk-recognise-")) + key, 500),
    "429": lambda key: Answer(key, 429, {"retry-after": "1000", "x-key": key, "x-request-id": key}),
    "request id": lambda key: replace(completion(), headers={"x-request-id": key}),
}
"""Where an endpoint may repeat the authorization header."""


def echo(where: str) -> Handler:
    return lambda asked: ECHOES[where](asked.headers["authorization"])


SECRETS = {f"echo in {name}": echo(name) for name in ECHOES}
SECRETS |= {name: always(answer) for name, (answer, _, _) in {**FAULTS, **NOT_TAKEN, **STOPPING}.items()}


@pytest.mark.parametrize("name", SECRETS)
def test_the_key_is_nowhere_in_the_run_nor_in_what_is_said(
    new_run: NewRun, key: str, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    decoding = {"retry_attempts": 0, "timeout": 0.25}
    run = new_run(pairs=rows(1), panel={"annotators": [teacher(api_key_env="TEACHER_KEY")], "decoding": decoding})
    account = ask(run, SECRETS[name])
    assert logged(run)
    assert key not in repr(account) + "".join(account.lines()) + "".join(capfd.readouterr())
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert run.calls in files
    assert not [path for path in files if any(word.encode() in path.read_bytes() for word in spelt(key).values())]


def test_the_key_is_sent_as_a_bearer_token(new_run: NewRun, key: str) -> None:
    run = new_run(panel={"annotators": [teacher(api_key_env="TEACHER_KEY")]})
    with teacher_server(lambda asked: completion()) as server:
        annotate(run, connector=server.connector)
    assert {asked.headers["authorization"] for asked in server.asked} == {f"Bearer {key}"}


def test_a_short_key_is_no_secret_and_does_not_alter_answers(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "0")
    run = new_run(pairs=rows(1), panel={"annotators": [teacher(api_key_env="TEACHER_KEY")]})
    assert ask(run, lambda asked: completion()).valid == 1
    assert logged(run)[0].raw_text == GOOD


@pytest.mark.parametrize("value", ["", "  ", "sk-secret\nsk-secret2", "sk-\u0441ecret", "sk-sec\x00ret"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    run = new_run(panel={"annotators": [teacher(api_key_env="TEACHER_KEY")]})
    monkeypatch.setattr("os.environ", {"TEACHER_KEY": value})
    with pytest.raises(ProcessError, match="TEACHER_KEY") as caught:
        ask(run, no_one)
    assert "sk-" not in "".join(traceback.format_exception(caught.value))
    assert not run.calls.exists()
