"""The engine as a whole against a server with known faults: nothing lost, asked twice or spent beyond the budget."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from conftest import GOOD, NewRun, completion, needs_mounts, rows, teacher, write_process
from fault_server import FaultServer, cures, fault_server, question_key
from faults import judgement
from sp2dpo.annotate import health
from sp2dpo.annotate.run import annotate
from sp2dpo.calls import Call, CallLog, open_calls
from sp2dpo.errors import ProcessError
from sp2dpo.pairs import read_pairs
from sp2dpo.process import load_process
from sp2dpo.prompts import render
from sp2dpo.runs import open_run
from sp2dpo.stages import prepare_run
from teacher_server import Answer, Asked, teacher_server

PATIENT = {"retry_attempts": 10, "retry_delay_base": 0.02, "timeout": 1.0}
USD_PER_MILLION = 10.0
PRICE = {"input": USD_PER_MILLION, "output": USD_PER_MILLION, "as_of": "2026-01-01"}
"""The same for both, so that the total of tokens that the server counts gives what it would bill."""


def at(server: FaultServer, name: str = "teacher", **more: Any) -> dict[str, Any]:
    return teacher(name, base_url=server.base_url, **more)


def logged(path: Path) -> list[Call]:
    with open_calls(path) as log:
        return list(log)


def keys_of(folder: Path) -> dict[tuple[str, str], str]:
    """Pair and variant → what the server calls that question."""
    run = open_run(load_process(folder / "process.yaml"), folder / "run")
    prepare_run(run)
    settings = run.process.settings.panel
    return {
        (pair["pair_id"], variant): question_key(
            {
                "model": settings.annotators[0].model,
                "messages": render(run.process.pack, variant, pair["prompt"], pair["chosen"], pair["rejected"]),
            }
        )
        for pair in read_pairs(run.pairs, "").to_pylist()
        for variant in settings.variants
    }


# Faults -------------------------------------------------------------------------------------------------------------


def test_with_40_percent_faults_of_every_kind_all_is_answered_with_no_request_in_vain(new_run: NewRun) -> None:
    """Each kind once for sure, and as the dice fall after it."""
    kinds = cures("retry", "mend")
    pairs = [{"prompt": f"about <{kind}>", "chosen": "a", "rejected": "b"} for kind in kinds] + rows(24)
    with fault_server(fault_rate=0.4, retry_after=0.05, latency_ms=5) as server:
        for kind in kinds:
            server.script(f"<{kind}>", kind)
        run = new_run(pairs=pairs, panel={"variants": ["v1", "v2"], "annotators": [at(server)], "decoding": PATIENT})
        account = annotate(run, concurrency=16)
        stats = server.stats()
    questions = 2 * len(pairs)
    assert (account.questions, account.valid, stats["answered"]) == (questions, questions, questions)
    assert set(stats["by_kind"]) == {*kinds, "valid"}
    assert stats["asked_again"] == {"valid": 0, "mend": 0}
    assert stats["requests"] == len(logged(run.calls)) <= 1.03 * stats["ideal_requests"]
    keys = keys_of(run.path.parent)
    for call in logged(run.calls):
        found = (call.category, call.magnitude, call.confidence)
        expected = tuple(judgement(keys[call.pair_id, call.variant]).values())
        assert found == (expected if call.valid else (None, None, None)), call.outcome


def test_a_retry_that_waits_holds_no_place(new_run: NewRun) -> None:
    order: list[int] = []

    def handler(asked: Asked) -> Answer:
        order.append(int(re.findall(r"question (\d)", asked.text)[0]))
        return Answer(status=503, headers={"retry-after": "0.5"}) if order == [0, 1] else completion()

    run = new_run(pairs=rows(6))
    with teacher_server(handler) as server:
        assert annotate(run, connector=server.connector, concurrency=1).valid == 6
    assert order == [0, 1, 2, 3, 4, 5, 1]


def test_a_dead_endpoint_is_asked_one_at_a_time_and_given_up(new_run: NewRun) -> None:
    with fault_server(fault_rate=1.0, faults=("503", "cut", "html"), faults_per_question=1000, latency_ms=20) as server:
        server.script("", *["503"] * 100)
        run = new_run(pairs=rows(100), panel={"annotators": [at(server)], "decoding": PATIENT})
        account = annotate(run, concurrency=16)
        stats = server.stats()
    assert (stats["requests"], stats["most_in_flight"]) == (health.FIRST_PROBES, 1)
    assert "3 attempts in a row without an answer" in account.stopped["teacher"]


@pytest.mark.parametrize("kind", ["503", "cut", "quota"])
def test_an_endpoint_that_dies_on_the_way_does_not_burn_retries_over_all_pairs(new_run: NewRun, kind: str) -> None:
    dead = [{"prompt": f"dead {n}", "chosen": "a", "rejected": "b"} for n in range(200)]
    with fault_server(latency_ms=20) as server:
        server.script("dead", *[kind] * 100)
        run = new_run(pairs=[*rows(40), *dead], panel={"annotators": [at(server)], "decoding": PATIENT})
        account = annotate(run, concurrency=16)
        stats = server.stats()
    assert account.valid == 40
    failed = 2 * 16 + health.PROBES  # what fails until it shows, what was in flight then, and single tries
    assert account.stopped.keys() == {"teacher"}
    assert stats["requests"] == 40 + sum(n for name, n in account.outcomes.items() if name != "ok") <= 40 + failed
    assert account.missing_by_cause["not asked yet"] >= 200 - failed


def test_an_endpoint_that_comes_back_is_asked_all_the_rest(new_run: NewRun) -> None:
    down = range(20, 20 + 16 + health.PROBES - 2)
    run = new_run(pairs=rows(60), panel={"decoding": PATIENT})
    with teacher_server(lambda _: Answer(status=503) if len(server.asked) - 1 in down else completion()) as server:
        account = annotate(run, connector=server.connector, concurrency=16)
    assert (account.valid, account.stopped) == (60, {})
    assert account.outcomes == {"ok": 60, "server_error": len(down)}


# Concurrency and pace -----------------------------------------------------------------------------------------------


def test_as_many_calls_are_in_flight_as_were_asked_for_after_a_first_one_alone(new_run: NewRun) -> None:
    with fault_server(latency_ms=250) as server:
        run = new_run(pairs=rows(25), panel={"annotators": [at(server)]})
        assert annotate(run, concurrency=12).valid == 25
        assert server.stats()["most_in_flight"] == 12


def test_two_annotators_are_asked_at_once_each_with_its_own_calls_in_flight(new_run: NewRun) -> None:
    with fault_server(latency_ms=250) as server:
        run = new_run(pairs=rows(17), panel={"annotators": [at(server, "one"), at(server, "two")]})
        account = annotate(run, concurrency=8)
        assert server.stats()["most_in_flight"] == 16
    assert Counter(call.annotator for call in logged(run.calls)) == {"one": 17, "two": 17}
    assert (account.questions, account.valid) == (34, 34)


@pytest.mark.parametrize(
    ("headers", "told"), [(False, {"rpm": {"": 1200}}), (True, {}), (False, {"rpm": {"": 9999, "teacher": 1200}})]
)
def test_a_limit_that_is_told_or_read_in_headers_is_kept_without_a_429(
    new_run: NewRun, headers: bool, told: dict[str, Any]
) -> None:
    with fault_server(rpm=1200, limit_headers=headers) as server:
        run = new_run(pairs=rows(50), panel={"annotators": [at(server)], "decoding": PATIENT})
        assert annotate(run, **told).valid == 50
        assert server.stats()["by_kind"] == {"valid": 50}


def test_a_limit_on_tokens_is_kept_without_a_429(new_run: NewRun) -> None:
    with fault_server(tpm=1_200_000, limit_headers=False) as server:
        run = new_run(pairs=rows(50), panel={"annotators": [at(server)], "decoding": PATIENT})
        assert annotate(run, tpm={"teacher": 1_200_000}).valid == 50
        assert server.stats()["by_kind"] == {"valid": 50}


# Money --------------------------------------------------------------------------------------------------------------


def spent_at(server: FaultServer) -> float:
    """USD by the server's own count of tokens."""
    return float(server.stats()["admitted_tokens"]) * USD_PER_MILLION / 1e6


def test_the_budget_is_never_passed_even_by_calls_that_failed_or_whose_bill_is_unknown(new_run: NewRun) -> None:
    billed = ("malformed", "cut_body", "timeout", "truncated", "html", "garbage_gzip", "empty")
    with fault_server(fault_rate=0.4, faults=billed, latency_ms=5) as server:
        panel = {"annotators": [at(server, price=PRICE)], "decoding": PATIENT | {"timeout": 0.5}}
        run = new_run(pairs=rows(100), panel=panel)
        account = annotate(run, concurrency=16, budget_usd=0.8)
        assert spent_at(server) <= 0.8
        assert 10 < account.valid < 100
        assert str(account.stopped_all).startswith("the budget of $0.8 is reached: $0.7")
        assert account.spent_usd is not None
        assert account.unknown_usd is not None
        assert 0 < account.spent_usd < account.spent_usd + account.unknown_usd <= 0.8
        again = annotate(run, concurrency=16, budget_usd=0.8)
        assert (again.attempts, again.valid) == (0, account.valid)
        more = annotate(run, concurrency=16, budget_usd=1.0)
        assert more.valid > account.valid
        assert spent_at(server) <= 1.0


def test_what_the_log_says_was_spent_is_what_the_server_counted(new_run: NewRun) -> None:
    with fault_server(fault_rate=0.4, faults=("malformed", "empty", "refused", "fenced", "nan")) as server:
        run = new_run(pairs=rows(30), panel={"annotators": [at(server, price=PRICE)], "decoding": PATIENT})
        account = annotate(run)
        assert account.attempts > 30
        assert account.spent_usd == pytest.approx(spent_at(server))
        assert account.unknown_usd == 0.0


def test_a_budget_without_an_output_cap_is_refused_before_anything_is_asked(new_run: NewRun) -> None:
    run = new_run(panel={"annotators": [teacher(price=PRICE, omit=["max_tokens"])]})
    with pytest.raises(ProcessError, match="'teacher' sends no output cap"):
        annotate(run, budget_usd=1.0)


# Interruption -------------------------------------------------------------------------------------------------------

COMMAND = (sys.executable, "-c", "from sp2dpo.cli import main; main()")


class Started:
    """The command line in a process of its own, with what it says."""

    def __init__(self, folder: Path, *args: object, verb: str = "annotate", command: Sequence[str] = COMMAND) -> None:
        run = str(folder / "run")
        line = [*command, verb, *([run] if verb == "report" else [str(folder / "process.yaml"), "--run-dir", run])]
        self.process = subprocess.Popen(
            [*line, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ended(self) -> tuple[int, str, str]:
        """Exit status, data and talk."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def at(self, server: FaultServer, requests: int) -> None:
        """Returns when the server was asked so often, or this has ended."""
        while self.process.poll() is None and server.stats()["requests"] < requests:
            time.sleep(0.005)


def run_folder(tmp_path: Path, server: FaultServer, n: int, timeout: float = 1.0, **more: Any) -> Path:
    decoding = PATIENT | {"timeout": timeout}
    panel = {"variants": ["v1", "v2", "v3"], "annotators": [at(server, **more)], "decoding": decoding}
    return write_process(tmp_path, rows(n), panel=panel).parent


def asked_about(server: FaultServer, keys: dict[tuple[str, str], str], log: CallLog) -> dict[str, int]:
    """How often each question was asked whose valid answer is in the log."""
    asked = server.questions()
    return {key: len(asked[key]) for call in log if call.valid for key in [keys[call.pair_id, call.variant]]}


def test_kill_9_at_any_moment_loses_no_answer_and_asks_none_again(tmp_path: Path) -> None:
    """Killed 3 times while it starts, 10 times while it asks."""
    concurrency, n, dice = 8, 100, random.Random(7)
    with fault_server(latency_ms=30) as server:
        folder = run_folder(tmp_path, server, n, price=PRICE)
        options = ("--concurrency", concurrency, "--json")
        for _ in range(3):
            started = Started(folder, *options)
            time.sleep(dice.random())
            started.process.kill()
            started.ended()
        keys = keys_of(folder)
        answered: dict[str, int] = {}
        lost = 0
        for kills, requests in enumerate(sorted(dice.sample(range(5, 3 * n - 20), 10)), 4):
            started = Started(folder, *options)
            started.at(server, requests + lost)
            time.sleep(dice.random() * 0.03)
            started.process.kill()
            assert started.ended()[0] == -signal.SIGKILL
            with open_calls(folder / "run/calls.sqlite") as log:
                now = asked_about(server, keys, log)
                assert {key: now[key] for key in answered} == answered
                lost, answered = server.stats()["requests"] - len(log), now
                assert lost <= kills * concurrency
        code, out, _ = Started(folder, *options).ended()
        account = json.loads(out)
        assert (code, account["valid"]) == (0, 3 * n)
        with open_calls(folder / "run/calls.sqlite") as log:
            now = asked_about(server, keys, log)
            assert {key: now[key] for key in answered} == answered
            assert len(log) == server.stats()["requests"] - lost == 3 * n
            assert log.content_hash() == log.recomputed_hash()
        assert account["spent_usd"] <= spent_at(server) <= account["spent_usd"] + account["unknown_usd"]


def test_the_budget_holds_over_kills(tmp_path: Path) -> None:
    with fault_server(latency_ms=30) as server:
        folder = run_folder(tmp_path, server, 60, price=PRICE)
        options = ("--concurrency", 4, "--budget-usd", 0.9)
        for requests in (10, 20, 30):
            started = Started(folder, *options)
            started.at(server, requests)
            started.process.kill()
            started.ended()
        code, _, err = Started(folder, *options).ended()
        assert code == 1
        assert "the budget of $0.9 is reached" in err
        assert "answers are missing" in err.splitlines()[-1]
        assert 0.3 < spent_at(server) <= 0.9


def test_ctrl_c_once_awaits_and_logs_what_is_in_flight(tmp_path: Path) -> None:
    with fault_server(latency_ms=300) as server:
        folder = run_folder(tmp_path, server, 20)
        started = Started(folder, "--concurrency", 8)
        started.at(server, 12)
        started.process.send_signal(signal.SIGINT)
        code, _, err = started.ended()
        stats = server.stats()
        assert code == 130
        assert "waiting for the calls in flight" in err
        assert err.splitlines()[-1].startswith("sp2dpo: interrupted")
        assert "Traceback" not in err
        assert [call.outcome for call in logged(folder / "run/calls.sqlite")] == ["ok"] * stats["requests"]
        assert 12 <= stats["requests"] < 60
        assert Started(folder, "--concurrency", 16).ended()[0] == 0
        assert server.stats()["requests"] == 60


def left_with_a_job(folder: Path) -> None:
    """One start that is ended by Ctrl-C when its batch job is in flight."""
    started = Started(folder, "--transport", "batch")
    assert started.process.stderr is not None
    while "estimate" not in started.process.stderr.readline():
        assert started.process.poll() is None
    while not events(folder)["submitted"]:
        assert started.process.poll() is None
        time.sleep(0.01)
    started.process.send_signal(signal.SIGINT)
    code, _, err = started.ended()
    assert code == 130
    assert "in flight at the provider. Nothing is cancelled" in err


def events(folder: Path) -> Counter[str]:
    with open_calls(folder / "run/calls.sqlite") as log:
        return Counter(event.event for event in log.batch_events("teacher"))


def test_no_question_of_a_job_in_flight_is_asked_in_another_way(tmp_path: Path) -> None:
    with fault_server(batch_seconds=1.0) as server:
        folder = run_folder(tmp_path, server, 2)
        left_with_a_job(folder)
        for verb, more in (("annotate", ()), ("export", ("-o", tmp_path / "questions.jsonl"))):
            code, _, err = Started(folder, *more, verb=verb).ended()
            assert code == 2
            assert "6 calls are in batch jobs of an earlier start (batch_0 of teacher)" in err.splitlines()[-1]
        code, _, err = Started(folder, "--transport", "batch").ended()
        assert code == 0
        assert "with 6 calls of an earlier start" in err
        assert server.stats()["requests"] == 6


@pytest.mark.parametrize("transport", ["sync", "batch"])
def test_the_questions_of_jobs_that_are_given_up_are_asked_anew(tmp_path: Path, transport: str) -> None:
    with fault_server(batch_seconds=1.0) as server:
        folder = run_folder(tmp_path, server, 2, price=PRICE)
        left_with_a_job(folder)
        code, out, err = Started(folder, "--transport", transport, "--forget-batches", "--json").ended()
        assert code == 0
        assert "teacher: batch job batch_0 with 6 calls is given up" in err
        account = json.loads(out)
        assert account["valid"] == 6
        assert account["spent_usd"] < account["unknown_usd"]
        assert events(folder)["gone"] == 1
        assert server.stats()["requests"] == 6
        while server.stats()["requests"] < 12:  # the provider goes on with the job, and bills it
            urlopen(f"{server.base_url}/batches/batch_0").close()
            time.sleep(0.05)
        assert spent_at(server) <= account["spent_usd"] + account["unknown_usd"]


def test_what_jobs_that_are_given_up_may_cost_counts_against_the_budget(tmp_path: Path) -> None:
    with fault_server(batch_seconds=60.0) as server:
        folder = run_folder(tmp_path, server, 2, price=PRICE)
        left_with_a_job(folder)
        code, out, _ = Started(folder, "--forget-batches", "--limit", 1, "--json").ended()
        spent, given_up = (json.loads(out)[name] for name in ("spent_usd", "unknown_usd"))
        assert (code, server.stats()["requests"]) == (0, 3)
        assert spent < given_up
        code, _, err = Started(folder, "--budget-usd", 1.01 * (spent + given_up)).ended()
        assert (code, server.stats()["requests"]) == (1, 3)
        assert "the budget of" in err


def test_a_second_process_on_the_same_run_is_refused_and_told_which_one_is_there(tmp_path: Path) -> None:
    with fault_server(fault_rate=1.0, faults=("timeout",), faults_per_question=1000) as server:
        folder = run_folder(tmp_path, server, 3, timeout=60)
        first = Started(folder)
        first.at(server, 1)
        code, out, err = Started(folder).ended()
        assert (code, out) == (2, "")
        assert f"is being written by process {first.process.pid} on " in err.splitlines()[-1]
        assert "Traceback" not in err
        first.process.kill()
        first.ended()
        server.script("", *[None] * 9)
        assert Started(folder).ended()[0] == 0


LITTLE_SPACE = """
import resource
from sp2dpo.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
main()
"""


def is_told_of_a_full_disk(code: int, out: str, err: str) -> bool:
    last = err.splitlines()[-1]
    told = last.startswith("sp2dpo: ") and "could not be written" in last and "run the same command again" in last
    return (code, out, told, "Traceback" in err) == (1, "", True, False)


def test_a_file_that_may_not_grow_ends_with_1_and_one_line_and_loses_nothing(tmp_path: Path) -> None:
    with fault_server() as server:
        folder = run_folder(tmp_path, server, 100)
        ended = Started(folder, command=(sys.executable, "-c", LITTLE_SPACE)).ended()
        assert is_told_of_a_full_disk(*ended), ended[2]
        answered = sum(call.valid for call in logged(folder / "run/calls.sqlite"))
        assert 0 < answered < server.stats()["requests"] <= answered + 16
        assert Started(folder).ended()[0] == 0
        assert sum(call.valid for call in logged(folder / "run/calls.sqlite")) == 300


ON_A_SMALL_DISK = """
mount -t tmpfs -o size=1m none "$1/run" || exit 99
shift
"$@" --json
code=$?
mount -o remount,size=50m none "$MOUNT" && "$@" --json > "$MOUNT.json" 2> /dev/null || exit 98
exit $code
"""


@needs_mounts
def test_a_full_disk_ends_with_1_and_one_line_and_with_more_space_the_rest_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOUNT", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    with fault_server() as server:
        folder = run_folder(tmp_path, server, 300)
        small = ("unshare", "-rm", "sh", "-c", ON_A_SMALL_DISK, "sh", str(folder), *COMMAND)
        ended = Started(folder, command=small).ended()
        assert is_told_of_a_full_disk(*ended), ended[2]
        account = json.loads((folder / "run.json").read_text())
        assert account["valid"] == 900
        assert account["live"] < 900
        assert server.stats()["requests"] <= 900 + 16


# Secrets ------------------------------------------------------------------------------------------------------------


ECHOES: dict[str, Callable[[str], Answer]] = {
    "500": lambda key: Answer(f"bad {key}", 500),
    "400": lambda key: Answer({"error": {"message": f"bad {key}"}}, 400),
    "refused": lambda key: completion(None, message={"refusal": key}),
    "prose": lambda key: completion(f"No, {key}."),
    "repaired": lambda key: completion(f"{key} {GOOD}"),
    "model": lambda key: completion(model=f"model-of-teacher@{key}"),
    "cut": lambda key: replace(completion(key), how="cut"),
    "request id": lambda key: Answer(key, 503, {"x-request-id": key}),
}
"""Where an endpoint may repeat the key, with and without an answer."""


def test_the_key_is_neither_in_the_run_nor_in_its_report_nor_in_what_was_said(tmp_path: Path, key: str) -> None:
    pytest.importorskip("matplotlib")

    def handler(asked: Asked) -> Answer:
        made = next((make for word, make in ECHOES.items() if f"<{word}>" in asked.text), None)
        return made(asked.headers["authorization"]) if made else completion()

    pairs = [{"prompt": f"about <{word}>", "chosen": "a", "rejected": "b"} for word in ("fine", *ECHOES)]
    with teacher_server(handler) as server:
        annotator = teacher(base_url=server.base_url, api_key_env="TEACHER_KEY")
        write_process(tmp_path, pairs, panel={"annotators": [annotator]})
        said = [Started(tmp_path, verb=verb).ended() for verb in ("annotate", "schedule", "report")]
    outcomes = {call.outcome for call in logged(tmp_path / "run/calls.sqlite")}
    assert outcomes >= {"ok", "repaired", "refused", "no_object", "bad_request", "server_error", "connection"}
    assert [code for code, _, _ in said] == [1, 0, 0]
    assert (tmp_path / "run/report.html").is_file()
    assert key not in "".join(out + err for _, out, err in said)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if key.encode() in path.read_bytes()]
