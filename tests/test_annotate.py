"""The engine against a transport that answers as each test says: outcomes, retries, resuming, recordings, secrets."""

from __future__ import annotations

import json
import re
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from conftest import GOOD, NewRun, rows, teacher
from sp2dpo.annotate import run as engine
from sp2dpo.annotate.run import Account, annotate
from sp2dpo.calls import Call, open_calls
from sp2dpo.errors import ProcessError, RunDirError
from sp2dpo.runs import Run

Handler = Callable[[httpx2.Request], httpx2.Response]


def completion(content: Any = GOOD, finish: str = "stop", **more: Any) -> httpx2.Response:
    message = {"role": "assistant", "content": content} | more.pop("message", {})
    usage = {"prompt_tokens": 1000, "completion_tokens": 50}
    body = {"choices": [{"index": 0, "finish_reason": finish, "message": message}], "usage": usage} | more
    return as_json(json.dumps(body))


def as_json(body: str | bytes, status: int = 200) -> httpx2.Response:
    return httpx2.Response(status, content=body, headers={"content-type": "application/json"})


def ask(run: Run, handler: Handler, **options: Any) -> Account:
    return annotate(run, http_client=httpx2.AsyncClient(transport=httpx2.MockTransport(handler)), **options)


def logged(run: Run) -> list[Call]:
    with open_calls(run.calls) as log:
        return list(log)


def raising(error: BaseException) -> Handler:
    def handler(request: httpx2.Request) -> httpx2.Response:
        raise error

    return handler


# Outcomes -----------------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[Handler, str, int | None]] = {
    "400": (lambda r: httpx2.Response(400, json={"error": {"message": "no seed"}}), "bad_request", 400),
    "422": (lambda r: httpx2.Response(422, text="no"), "bad_request", 422),
    "redirect": (lambda r: httpx2.Response(302, headers={"location": "/elsewhere"}), "bad_request", 302),
    "408": (lambda r: httpx2.Response(408), "timeout", 408),
    "429": (lambda r: httpx2.Response(429), "rate_limited", 429),
    "429 with a date": (
        lambda r: httpx2.Response(429, headers={"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}),
        "rate_limited",
        429,
    ),
    "429 for ever": (lambda r: httpx2.Response(429, headers={"retry-after": "inf"}), "rate_limited", 429),
    "500": (lambda r: httpx2.Response(500, text="<html>oops</html>"), "server_error", 500),
    "503": (lambda r: httpx2.Response(503, headers={"retry-after": "0"}), "server_error", 503),
    "503 with a huge nest": (lambda r: as_json("[" * 100_000, 503), "server_error", 503),
    "read timeout": (raising(httpx2.ReadTimeout("slow")), "timeout", None),
    "connect timeout": (raising(httpx2.ConnectTimeout("slow")), "timeout", None),
    "no connection": (raising(httpx2.ConnectError("refused")), "connection", None),
    "cut": (raising(httpx2.RemoteProtocolError("peer closed")), "connection", None),
    "not gzip": (
        lambda r: httpx2.Response(200, content=b"no gzip", headers={"content-encoding": "gzip"}),
        "connection",
        None,
    ),
    "cut json": (lambda r: as_json('{"choices": ['), "bad_response", 200),
    "no body": (lambda r: as_json(""), "bad_response", 200),
    "204": (lambda r: httpx2.Response(204), "bad_response", 200),
    "bad utf-8": (lambda r: as_json(b"\xff\xfe{"), "bad_response", 200),
    "nest": (lambda r: as_json("[" * 100_000), "bad_response", 200),
    "html": (lambda r: httpx2.Response(200, text="<html>"), "bad_response", 200),
    "error in a 200": (lambda r: httpx2.Response(200, json={"error": "quota"}), "bad_response", 200),
    "no choices": (lambda r: completion(choices=[]), "bad_response", 200),
    "null choices": (lambda r: completion(choices=None), "bad_response", 200),
    "choice without message": (lambda r: completion(choices=[{"index": 0}]), "bad_response", 200),
    "content in parts": (lambda r: completion([{"type": "text", "text": GOOD}]), "bad_response", 200),
    "list": (lambda r: httpx2.Response(200, json=[1]), "bad_response", 200),
    "null content": (lambda r: completion(None), "empty", 200),
    "empty": (lambda r: completion(""), "empty", 200),
    "cut at the cap": (lambda r: completion(GOOD, "length"), "truncated", 200),
    "filtered": (lambda r: completion(GOOD, "content_filter"), "filtered", 200),
    "refused": (lambda r: completion(GOOD, message={"refusal": "I won't"}), "refused", 200),
    "prose": (lambda r: completion("Sorry, no."), "no_object", 200),
    "two objects": (lambda r: completion(GOOD + GOOD), "several_objects", 200),
    "out of range": (lambda r: completion(GOOD.replace("0.5", "5")), "out_of_range", 200),
    "half a surrogate": (lambda r: completion("\ud800", model="\udfff"), "no_object", 200),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_failed_attempt_is_a_row_of_its_kind_and_is_repeated_so_often(new_run: NewRun, name: str) -> None:
    handler, outcome, status = FAULTS[name]
    run = new_run(pairs=rows(1))
    account = ask(run, handler)
    assert [call.outcome for call in logged(run)] == [outcome] * 3  # 1 + retry_attempts
    assert [call.attempt for call in logged(run)] == [1, 2, 3]
    assert {call.http_status for call in logged(run)} == {status}
    assert {call.category for call in logged(run)} == {None}
    assert (account.questions, account.valid, account.missing) == (1, 0, 1)
    assert account.outcomes == Counter({outcome: 3})


@pytest.mark.parametrize("status", [401, 403, 404])
def test_no_access_stops_that_annotator_at_once_and_no_other(new_run: NewRun, status: int) -> None:
    run = new_run(pairs=rows(4), panel={"annotators": [teacher("shut"), teacher("open")]})

    def handler(request: httpx2.Request) -> httpx2.Response:
        return completion() if request.url.host == "open.invalid" else httpx2.Response(status, text="go away")

    account = ask(run, handler, concurrency=1)
    assert Counter((call.annotator, call.outcome) for call in logged(run)) == {
        ("shut", "no_access"): 1,
        ("open", "ok"): 4,
    }
    assert set(account.stopped) == {"shut"}
    assert "go away" in account.stopped["shut"]


def test_a_silent_endpoint_is_given_up_after_so_many_attempts_in_a_row(new_run: NewRun) -> None:
    run = new_run(pairs=rows(30))
    account = ask(run, lambda r: httpx2.Response(503), concurrency=1)
    assert len(logged(run)) == engine.BREAKER
    assert "20 attempts in a row" in account.stopped["teacher"]
    assert "server_error" in account.stopped["teacher"]


def test_an_answer_in_between_keeps_the_endpoint_in_use(new_run: NewRun) -> None:
    run, calls = new_run(pairs=rows(30)), iter(range(10_000))
    account = ask(run, lambda r: completion() if next(calls) % 15 == 14 else httpx2.Response(503), concurrency=1)
    assert len(logged(run)) > 3 * engine.BREAKER
    assert not account.stopped


def test_a_fenced_answer_is_repaired_and_the_mend_is_named(new_run: NewRun) -> None:
    run = new_run(pairs=rows(1))
    account = ask(run, lambda r: completion(f"```json\n{GOOD}\n```"))
    call = logged(run)[0]
    assert (call.outcome, call.mends, call.magnitude) == ("repaired", '["code_fence"]', 0.5)
    assert call.raw_text == f"```json\n{GOOD}\n```"
    assert account.mends == Counter(code_fence=1)


def test_a_retry_that_succeeds_ends_the_question(new_run: NewRun) -> None:
    run, answers = new_run(pairs=rows(1)), iter([httpx2.Response(500), completion("?"), completion()])
    assert ask(run, lambda r: next(answers)).valid == 1
    assert [call.outcome for call in logged(run)] == ["server_error", "no_object", "ok"]


def test_the_delay_doubles_with_jitter_and_is_never_below_retry_after() -> None:
    for retry in range(4):
        delays = [engine._delay(5, retry, None) for _ in range(200)]
        assert 5 * 2**retry * 0.75 <= min(delays) < max(delays) <= 5 * 2**retry * 1.25
    assert engine._delay(5, 0, 60.0) == 60.0


def test_the_log_keeps_tokens_cost_model_and_settings(new_run: NewRun) -> None:
    price = {"input": 1.6, "output": 6.4, "as_of": "2025-04-22"}
    omit, extra = ["temperature", "seed"], {"reasoning_effort": "minimal"}
    run = new_run(pairs=rows(1), panel={"annotators": [teacher(price=price, omit=omit, extra=extra)]})
    bodies = []

    def handler(request: httpx2.Request) -> httpx2.Response:
        bodies.append(json.loads(request.content))
        return completion(model="model-of-teacher", system_fingerprint="fp_1")

    ask(run, handler)
    call = logged(run)[0]
    assert (call.prompt_tokens, call.completion_tokens, call.system_fingerprint) == (1000, 50, "fp_1")
    assert call.cost_usd == pytest.approx((1000 * 1.6 + 50 * 6.4) / 1e6)
    sent = {name: value for name, value in bodies[0].items() if name not in ("model", "messages")}
    assert json.loads(call.params_sent) == sent
    assert sent == {"top_p": 0.8, "max_tokens": 64, "frequency_penalty": 0.0, "presence_penalty": 0.0, "n": 1} | extra
    assert set(json.loads(call.params_requested)) >= {"temperature", "seed", "top_k", "stop", "repetition_penalty"}


def test_another_served_model_is_reported(new_run: NewRun) -> None:
    account = ask(new_run(pairs=rows(1)), lambda r: completion(model="cheaper"))
    assert account.swapped == {"teacher: asked model-of-teacher, served cheaper"}


@pytest.mark.parametrize("count", [10**30, -5, "12", True, None, 1.5])
def test_a_count_of_tokens_that_is_none_is_left_out(new_run: NewRun, count: Any) -> None:
    run = new_run(pairs=rows(1))
    assert ask(run, lambda r: completion(usage={"prompt_tokens": count})).valid == 1
    assert logged(run)[0].prompt_tokens is None


# Resuming -----------------------------------------------------------------------------------------------------------


def test_an_answered_question_is_not_asked_again_and_a_failed_one_is(new_run: NewRun) -> None:
    run = new_run(pairs=rows(6))

    def moody(request: httpx2.Request) -> httpx2.Response:
        return completion() if re.search(r"question [024]\b", request.content.decode()) else completion("?")

    assert ask(run, moody).valid == 3
    second = ask(run, lambda r: completion())
    assert (second.valid, second.attempts) == (6, 3)
    assert sorted(call.attempt for call in logged(run) if call.valid) == [1, 1, 1, 4, 4, 4]
    assert ask(run, raising(AssertionError("asked again"))).attempts == 0


def test_a_limit_takes_the_first_pairs_and_the_rest_can_follow(new_run: NewRun) -> None:
    run = new_run(pairs=rows(5), panel={"variants": ["v1", "v2"]})
    first = ask(run, lambda r: completion(), limit=2)
    assert (first.questions, first.attempts, first.valid) == (4, 4, 4)
    rest = ask(run, lambda r: completion())
    assert (rest.questions, rest.attempts, rest.valid) == (10, 6, 10)


def test_what_was_answered_before_a_crash_is_kept(new_run: NewRun) -> None:
    run, answers = new_run(pairs=rows(5)), iter([completion(), completion()])

    def handler(request: httpx2.Request) -> httpx2.Response:
        return next(answers, None) or raising(KeyboardInterrupt())(request)

    with pytest.raises(KeyboardInterrupt):
        ask(run, handler, concurrency=1)
    assert [call.outcome for call in logged(run)] == ["ok", "ok"]
    assert ask(run, lambda r: completion()).attempts == 3


# Recordings and reuse -----------------------------------------------------------------------------------------------


def recorded(calls: Any, name: str = "teacher", **more: Any) -> dict[str, Any]:
    return {"name": name, "kind": "recorded", "model": f"model-of-{name}", "calls": str(calls)} | more


def test_a_recorded_log_answers_the_same_questions_without_a_request(new_run: NewRun) -> None:
    source = new_run("source", pairs=rows(3))
    ask(source, lambda r: completion(served="x"))
    run = new_run("copy", pairs=rows(3), panel={"annotators": [recorded(source.calls)]})
    assert ask(run, raising(AssertionError("asked"))).valid == 3
    assert [call.origin for call in logged(run)] == ["recorded"] * 3
    assert [c.request_hash for c in logged(run)] == [c.request_hash for c in logged(source)]


def test_a_recorded_answer_to_another_prompt_is_not_taken(new_run: NewRun, tmp_path: Path) -> None:
    source = new_run("source", pairs=rows(3))
    ask(source, lambda r: completion(f"So: {GOOD}"))
    pack = source.path / "prompts"
    (pack / "v1.txt").write_text((pack / "v1.txt").read_text() + "\nBe strict.\n")
    run = new_run("copy", pairs=rows(3), panel={"prompts": str(pack), "annotators": [recorded(source.calls)]})
    account = ask(run, raising(AssertionError("asked")))
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
    from sp2dpo.pairs import read_pairs

    ids: list[str] = read_pairs(run.pairs, "")["pair_id"].to_pylist()
    return ids


def test_a_recorded_jsonl_gives_its_first_answer(new_run: NewRun, tmp_path: Path) -> None:
    texts = (GOOD, GOOD.replace("0.5", "0.9"))
    run = jsonl(new_run, tmp_path, lambda p: [{"pair_id": p, "variant": "v1", "raw_text": text} for text in texts])
    assert ask(run, raising(AssertionError("asked"))).valid == 1
    assert logged(run)[0].magnitude == 0.5


@pytest.mark.parametrize(
    "odd", [{"prompt_tokens": "many"}, {"request_hash": "00"}, {"http_status": "OK"}, {"finish_reason": 3}, {"x": 1}]
)
def test_other_fields_of_a_recorded_line_do_no_harm(new_run: NewRun, tmp_path: Path, odd: dict[str, Any]) -> None:
    run = jsonl(new_run, tmp_path, lambda p: [{"pair_id": p, "variant": "v1", "raw_text": GOOD} | odd])
    assert ask(run, raising(AssertionError("asked"))).valid == 1


def test_half_a_surrogate_in_a_recorded_line_is_a_row_not_a_crash(new_run: NewRun, tmp_path: Path) -> None:
    run = jsonl(new_run, tmp_path, lambda p: [{"pair_id": p, "variant": "v1", "raw_text": "\ud800"}])
    assert ask(run, raising(AssertionError("asked"))).outcomes == Counter(no_object=1)


def test_a_question_that_was_not_recorded_is_a_failure_of_that_name(new_run: NewRun, tmp_path: Path) -> None:
    run = jsonl(new_run, tmp_path, lambda p: [{"pair_id": "other", "variant": "v1", "raw_text": GOOD}])
    assert ask(run, raising(AssertionError("asked"))).outcomes == Counter(not_recorded=1)


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
        ask(run, raising(AssertionError("asked")))
    assert not run.calls.exists()


def test_reuse_takes_over_answers_to_the_same_questions_only(new_run: NewRun) -> None:
    old = new_run("old", pairs=rows(3), panel={"variants": ["v1", "v2"]})
    ask(old, lambda r: completion())
    new = new_run("new", pairs=[*rows(3), {"prompt": "new", "chosen": "a", "rejected": "b"}], name="other")
    account = ask(new, lambda r: completion(), reuse=old.path)
    assert (account.reused, account.attempts, account.valid) == (3, 1, 4)
    assert Counter(call.origin for call in logged(new)) == {"reused": 3, "live": 1}
    assert account.cost_usd == 0.0


@pytest.mark.parametrize("change", [{"decoding": {"temperature": 0.9}}, {"annotators": [teacher(model="other")]}])
def test_reuse_takes_nothing_over_from_another_setting_or_model(new_run: NewRun, change: dict[str, Any]) -> None:
    old = new_run("old")
    ask(old, lambda r: completion())
    new = new_run("new", panel=change)
    assert ask(new, lambda r: completion(), reuse=old.path).reused == 0


def test_reuse_of_a_folder_without_a_log_is_refused(new_run: NewRun, tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"calls\.sqlite is missing"):
        ask(new_run("new"), lambda r: completion(), reuse=tmp_path)


# Secrets ------------------------------------------------------------------------------------------------------------


def echo(where: str) -> Handler:
    """An endpoint that repeats the authorization header in one place of its answer."""

    def handler(request: httpx2.Request) -> httpx2.Response:
        key = request.headers["authorization"]
        places = {
            "content": lambda: completion(f"{key} {GOOD}"),
            "extra key": lambda: completion(GOOD[:-1] + f', "key": "{key}"}}'),
            "model": lambda: completion(model=key),
            "fingerprint": lambda: completion(system_fingerprint=key),
            "finish": lambda: completion(finish=key),
            "refusal": lambda: completion(message={"refusal": key}),
            "parts": lambda: completion([{"text": key}]),
            "json": lambda: as_json(f"{key}"),
            "html": lambda: httpx2.Response(200, text=key),
            "400": lambda: httpx2.Response(400, json={"error": {"message": f"bad {key}"}}),
            "401": lambda: httpx2.Response(401, json={"error": {"message": f"bad {key}"}}),
            "500": lambda: httpx2.Response(500, text=f"bad {key}"),
            "429": lambda: httpx2.Response(429, text=key, headers={"retry-after": "0", "x-key": key}),
        }
        return places[where]()

    return handler


ECHOES = ("content", "extra key", "model", "fingerprint", "finish", "refusal", "parts", "json", "html")
SECRETS = {f"echo in {name}": echo(name) for name in (*ECHOES, "400", "401", "500", "429")}
SECRETS |= {name: handler for name, (handler, _, _) in FAULTS.items()}


@pytest.mark.parametrize("name", SECRETS)
def test_the_key_is_nowhere_in_the_run_nor_in_what_is_said(
    new_run: NewRun, key: str, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    run = new_run(pairs=rows(1), panel={"annotators": [teacher(api_key_env="TEACHER_KEY")]})
    account = ask(run, SECRETS[name])
    assert logged(run)
    assert key not in repr(account) + "".join(capfd.readouterr())
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert run.calls in files
    assert not [path for path in files if key.encode() in path.read_bytes()]


def test_the_key_is_sent_as_a_bearer_token(new_run: NewRun, key: str) -> None:
    seen = set()

    def handler(request: httpx2.Request) -> httpx2.Response:
        seen.add(request.headers["authorization"])
        return completion()

    ask(new_run(panel={"annotators": [teacher(api_key_env="TEACHER_KEY")]}), handler)
    assert seen == {f"Bearer {key}"}


def test_a_short_key_is_no_secret_and_does_not_alter_answers(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "0")
    run = new_run(pairs=rows(1), panel={"annotators": [teacher(api_key_env="TEACHER_KEY")]})
    assert ask(run, lambda r: completion()).valid == 1
    assert logged(run)[0].raw_text == GOOD


@pytest.mark.parametrize("value", ["", "  ", "sk-secret\nsk-secret2", "sk-\u0441ecret", "sk-sec\x00ret"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(
    new_run: NewRun, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    run = new_run(panel={"annotators": [teacher(api_key_env="TEACHER_KEY")]})
    monkeypatch.setattr("os.environ", {"TEACHER_KEY": value})
    with pytest.raises(ProcessError, match="TEACHER_KEY") as caught:
        ask(run, raising(AssertionError("asked")))
    assert "sk-" not in "".join(traceback.format_exception(caught.value))
    assert not run.calls.exists()
