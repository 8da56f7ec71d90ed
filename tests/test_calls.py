"""The call log: rows are added and never changed, one process writes, and a file that is something else is refused."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import needs_mounts
from sp2dpo.calls import BatchEvent, Call, CellState, Usage, open_calls, open_ledger
from sp2dpo.calls.writer import Writer
from sp2dpo.errors import RunDirError, Unfinished

CALL = Call(
    pair_id="p1",
    annotator="a",
    variant="v1",
    attempt=1,
    origin="live",
    requested_model="m",
    served_model="m-1",
    endpoint="http://a/v1",
    request_hash="00",
    params_requested="{}",
    params_sent="{}",
    started_at="2026-01-01T00:00:00.000+00:00",
    latency_s=0.5,
    http_status=200,
    finish_reason="stop",
    outcome="ok",
    mends="[]",
    raw_text="½\x00\n",
    category="Style",
    magnitude=0.1,
    confidence=0.2,
    prompt_tokens=10,
    completion_tokens=5,
    cost_usd=1e-7,
    system_fingerprint=None,
    error=None,
)
FAILED = replace(CALL, outcome="timeout", raw_text=None, category=None, magnitude=None, confidence=None)
DECIDED = replace(
    CALL,
    kind="decisions",
    transport="batch",
    params_ignored='["seed"]',
    reasoning_tokens=7,
    cost_bound_usd=0.25,
    request_id="req-1",
)


def write(path: Path, *calls: Call) -> str:
    with open_ledger(path) as ledger:
        ledger.append(*calls)
        return ledger.content_hash()


def read(path: Path) -> list[Call]:
    with open_calls(path) as log:
        return list(log)


def add(path: Path, *groups: Sequence[Call]) -> None:
    """Add each group by a task of its own, all at once."""

    async def all_at_once() -> None:
        await asyncio.gather(*(ledger.add(*group) for group in groups))

    with open_ledger(path) as ledger:
        asyncio.run(all_at_once())


# Rows ----------------------------------------------------------------------------------------------------------------


def test_a_row_comes_back_as_it_was_appended(tmp_path: Path) -> None:
    write(tmp_path / "calls.sqlite", CALL, FAILED, DECIDED)
    with open_calls(tmp_path / "calls.sqlite") as log:
        assert list(log) == [CALL, FAILED, DECIDED]
        assert len(log) == 3


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NUMBER = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53)
VALUES = {"str": TEXT, "int": st.integers(-(2**63), 2**63 - 1), "float": NUMBER}
CALLS = st.builds(
    Call,
    **{
        field.name: (st.none() | kind) if str(field.type).endswith("None") else kind
        for field in fields(Call)
        for kind in [VALUES[str(field.type).removesuffix(" | None")]]
    },
)


@given(st.lists(CALLS, max_size=4), st.lists(CALLS, max_size=4))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_calls_come_back_and_their_hash_can_be_made_again(
    tmp_path: Path, some: list[Call], more: list[Call]
) -> None:
    path = tmp_path / "calls.sqlite"
    path.unlink(missing_ok=True)
    write(path, *some)
    content = write(path, *more)
    with open_calls(path) as log:
        assert list(log) == [*some, *more]
        assert log.content_hash() == log.recomputed_hash() == content


@pytest.mark.parametrize(
    "wrong",
    [
        {"latency_s": float("nan")},
        {"cost_usd": float("inf")},
        {"prompt_tokens": 2**63},
        {"prompt_tokens": 1.5},
        {"http_status": True},
        {"raw_text": "\ud800"},
        {"error": b"bytes"},
    ],
)
def test_a_value_that_the_file_cannot_hold_is_refused_and_others_are_not_held_up(
    tmp_path: Path, wrong: dict[str, Any]
) -> None:
    with open_ledger(tmp_path / "calls.sqlite") as ledger:
        with pytest.raises(ValueError, match=f"column {next(iter(wrong))}"):
            ledger.append(CALL, replace(CALL, **wrong))
        ledger.append(FAILED)
    assert read(tmp_path / "calls.sqlite") == [FAILED]


@pytest.mark.parametrize("table", ["calls", "batches"])
@pytest.mark.parametrize("sql", ["UPDATE {} SET annotator = 'b'", "DELETE FROM {}"])
def test_the_file_itself_refuses_to_change_or_lose_a_row(tmp_path: Path, table: str, sql: str) -> None:
    with open_ledger(tmp_path / "calls.sqlite") as ledger:
        ledger.append(CALL)
        ledger.note_batch(BatchEvent("a", "intended", "00", "2026-01-01"))
    with (
        closing(sqlite3.connect(tmp_path / "calls.sqlite")) as db,
        pytest.raises(sqlite3.IntegrityError, match="append-only"),
    ):
        db.execute(sql.format(table))


def test_a_log_that_is_opened_again_goes_on_where_it_stopped(tmp_path: Path) -> None:
    write(tmp_path / "calls.sqlite", FAILED)
    write(tmp_path / "calls.sqlite", CALL)
    assert [call.outcome for call in read(tmp_path / "calls.sqlite")] == ["timeout", "ok"]


def test_a_row_is_on_disk_before_append_and_add_return(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    with open_ledger(path) as ledger:
        ledger.append(CALL)
        assert read(path) == [CALL]
        asyncio.run(ledger.add(FAILED))
        assert read(path) == list(ledger) == [CALL, FAILED]


def test_rows_of_many_tasks_are_all_there_and_those_of_one_stay_together(tmp_path: Path) -> None:
    groups = [[replace(CALL, pair_id=f"p{n}", variant=v) for v in ("v1", "v2", "v3")] for n in range(200)]
    add(tmp_path / "calls.sqlite", *groups)
    rows = read(tmp_path / "calls.sqlite")
    assert {tuple(rows[n : n + 3]) for n in range(0, 600, 3)} == {tuple(group) for group in groups}


def test_the_row_of_a_task_that_is_cancelled_is_written_all_the_same(tmp_path: Path) -> None:
    async def cancel_at_once() -> None:
        task = asyncio.create_task(ledger.add(CALL))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with open_ledger(tmp_path / "calls.sqlite") as ledger:
        asyncio.run(cancel_at_once())
    assert read(tmp_path / "calls.sqlite") == [CALL]


def test_what_is_queued_together_is_committed_together(tmp_path: Path) -> None:
    statements: list[str] = []
    begun, go = threading.Event(), threading.Event()
    db = sqlite3.connect(tmp_path / "any.sqlite", isolation_level=None, check_same_thread=False)
    db.execute("CREATE TABLE t (x)")
    db.set_trace_callback(statements.append)
    writer = Writer(tmp_path / "any.sqlite", db)
    written = [writer.submit(lambda _: begun.set() or go.wait(60))]
    assert begun.wait(60)
    written += [writer.submit(lambda db: db.execute("INSERT INTO t VALUES (1)")) for _ in range(9)]
    assert not any(future.done() for future in written)
    go.set()
    writer.stop()
    db.close()
    assert all(future.done() for future in written)
    assert statements.count("COMMIT") == 2


def test_every_commit_is_synced_to_the_disk(tmp_path: Path) -> None:
    found: list[Any] = []
    with open_ledger(tmp_path / "calls.sqlite") as ledger:
        for name in ("journal_mode", "synchronous"):
            ledger._writer.submit(lambda db, name=name: found.extend(db.execute(f"PRAGMA {name}").fetchone())).result()
    assert found == ["wal", 2]


def test_a_log_that_was_closed_takes_nothing_more(tmp_path: Path) -> None:
    with open_ledger(tmp_path / "calls.sqlite") as ledger:
        pass
    with pytest.raises(Unfinished, match="closed"):
        ledger.append(CALL)


def test_a_reader_sees_the_log_as_it_was_at_its_first_question(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    write(path, CALL)
    with open_calls(path) as log:
        assert len(log) == 1
        content = write(path, FAILED)
        assert list(log) == [CALL]
        assert log.content_hash() != content
    assert len(read(path)) == 2


# Questions to the log ------------------------------------------------------------------------------------------------


def test_answers_are_the_first_valid_ones_in_the_order_of_the_questions(tmp_path: Path) -> None:
    first, second = replace(CALL, outcome="repaired", attempt=2, magnitude=0.3), replace(CALL, attempt=3)
    elsewhere, early = replace(CALL, variant="v2"), replace(CALL, pair_id="p0", annotator="z")
    write(tmp_path / "calls.sqlite", FAILED, elsewhere, first, second, early, replace(FAILED, variant="v3"))
    with open_calls(tmp_path / "calls.sqlite") as log:
        assert list(log.answers()) == [early, first, elsewhere]
        assert list(log.answers(["p1", "p2"])) == [first, elsewhere]
        assert list(log.answers([])) == []


def test_failures_are_the_last_attempts_at_questions_without_an_answer(tmp_path: Path) -> None:
    last = replace(FAILED, outcome="no_object", attempt=2, variant="v2")
    early = replace(FAILED, pair_id="p0")
    write(tmp_path / "calls.sqlite", FAILED, CALL, FAILED, replace(FAILED, variant="v2"), last, early)
    with open_calls(tmp_path / "calls.sqlite") as log:
        assert list(log.failures()) == [early, last]


def test_the_state_of_a_question_is_how_often_it_was_asked_and_how_that_ended(tmp_path: Path) -> None:
    other = replace(FAILED, pair_id="p2", outcome="no_object")
    write(tmp_path / "calls.sqlite", other, CALL, FAILED, replace(other, outcome="empty"), replace(CALL, pair_id="p3"))
    with open_calls(tmp_path / "calls.sqlite") as log:
        assert log.state(["p1", "p2", "p9"]) == {
            ("p1", "a", "v1"): CellState(asked=2, valid=True, last_outcome="timeout"),
            ("p2", "a", "v1"): CellState(asked=2, valid=False, last_outcome="empty"),
        }
        assert log.state([]) == {}


def test_money_and_tokens_are_counted_by_annotator_outcome_and_origin(tmp_path: Path) -> None:
    unknown = replace(FAILED, cost_usd=None, cost_bound_usd=0.5, prompt_tokens=None, completion_tokens=None)
    copied = replace(CALL, origin="reused", cost_usd=9.0)
    write(tmp_path / "calls.sqlite", CALL, DECIDED, unknown, copied, replace(CALL, annotator="b", cost_usd=2.0))
    with open_calls(tmp_path / "calls.sqlite") as log:
        counts = {(c.annotator, c.outcome, c.origin): c for c in log.counts()}
        live = counts["a", "ok", "live"]
        assert (live.attempts, live.prompt_tokens, live.completion_tokens, live.reasoning_tokens) == (2, 20, 10, 7)
        assert (live.cost_usd, live.cost_bound_usd) == (pytest.approx(2e-7), 0.0)
        assert counts["a", "timeout", "live"].cost_bound_usd == 0.5
        assert counts["a", "ok", "reused"].cost_usd == 9.0
        assert sum(c.attempts for c in counts.values()) == 5
        assert log.spent(["a"]) == pytest.approx(0.5 + 2e-7)
        assert log.spent(["a", "b"]) == pytest.approx(2.5 + 2e-7)
        assert log.spent([]) == 0.0


def test_usage_is_of_live_calls(tmp_path: Path) -> None:
    silent = replace(FAILED, prompt_tokens=None, completion_tokens=None)
    write(tmp_path / "calls.sqlite", CALL, DECIDED, silent, replace(CALL, origin="imported"))
    with open_calls(tmp_path / "calls.sqlite") as log:
        assert log.usage("a") == Usage(3, 2, 2, 20, 10, 7)


@pytest.mark.parametrize("origin", ["live", "reused", "imported"])
def test_the_served_model_is_that_of_the_first_valid_answer_wherever_it_is_from(tmp_path: Path, origin: str) -> None:
    rows = [
        replace(FAILED, outcome="other_model", served_model="m-9"),
        replace(CALL, served_model=None),
        replace(CALL, origin=origin, served_model="m-2"),
        CALL,
    ]
    write(tmp_path / "calls.sqlite", *rows)
    with open_calls(tmp_path / "calls.sqlite") as log:
        assert log.served("a") == "m-2"
        assert log.served("b") is None


def test_the_steps_of_batch_jobs_come_back_in_order(tmp_path: Path) -> None:
    steps = [
        BatchEvent("a", "intended", "00", "2026-01-01", detail='{"questions": []}'),
        BatchEvent("b", "intended", "11", "2026-01-01"),
        BatchEvent("a", "submitted", "00", "2026-01-02", batch_id="batch-1"),
    ]
    with open_ledger(tmp_path / "calls.sqlite") as ledger:
        for step in steps:
            ledger.note_batch(step)
        assert ledger.batch_events("a") == [steps[0], steps[2]]


def test_what_an_unclean_end_left_in_flight_is_known_to_later_starts(tmp_path: Path) -> None:
    def start(*usd: float, clean: bool) -> float:
        with open_ledger(tmp_path / "calls.sqlite") as ledger:
            ledger.start()
            for one in usd:
                asyncio.run(ledger.reserve(one))
            if clean:
                ledger.end()
            return ledger.unaccounted_usd()

    assert start(0.25, 2.0, 1.0, clean=False) == 0.0
    assert start(8.0, clean=True) == 2.0
    assert start(0.5, clean=False) == 2.0
    assert start(clean=True) == 2.5


# The chain -----------------------------------------------------------------------------------------------------------


def line(call: Call) -> str:
    """What the documentation says a row adds to the hash."""
    default = {"kind": "chat_json", "transport": None, "params_ignored": "[]"}
    default |= {"reasoning_tokens": None, "cost_bound_usd": None, "request_id": None}
    fields = {name: value for name, value in vars(call).items() if name not in default or value != default[name]}
    return json.dumps(fields, sort_keys=True, separators=(",", ":")) + "\n"


def test_the_hash_is_the_head_of_a_chain_over_the_rows(tmp_path: Path) -> None:
    head = ""
    for call in (CALL, FAILED, DECIDED):
        head = hashlib.sha256((head + line(call)).encode()).hexdigest()
        assert write(tmp_path / "calls.sqlite", call) == head
    assert write(tmp_path / "at-once", CALL, FAILED, DECIDED) == head


def test_the_hash_of_nothing_is_that_of_the_empty_text(tmp_path: Path) -> None:
    assert write(tmp_path / "calls.sqlite") == hashlib.sha256(b"").hexdigest()


def test_the_content_hash_depends_on_every_field_and_the_order_and_nothing_else(tmp_path: Path) -> None:
    same = {write(tmp_path / name, CALL, FAILED) for name in ("a", "b")}
    assert len(same) == 1
    others = [write(tmp_path / "order", FAILED, CALL), write(tmp_path / "fewer", CALL)]
    for n, field in enumerate(fields(Call)):
        kind = str(field.type).removesuffix(" | None")
        other = {"str": "other", "int": 7, "float": 7.5}[kind]
        others.append(write(tmp_path / f"field{n}", replace(CALL, **{field.name: other}), FAILED))
    assert len({*others, *same}) == len(others) + 1


def forge(path: Path, sql: str) -> None:
    """Change the call log past its triggers."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("DROP TRIGGER calls_no_update")
        db.execute("DROP TRIGGER calls_no_delete")
        assert db.execute(sql).rowcount == 1


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE calls SET magnitude = 0.9 WHERE id = 2",
        "UPDATE calls SET request_id = 'x' WHERE id = 3",
        "UPDATE calls SET chain = NULL WHERE id = 2",
        "DELETE FROM calls WHERE id = 1",
        "DELETE FROM calls WHERE id = 3",
        "UPDATE calls SET id = 9 WHERE id = 1",
        "INSERT INTO calls (pair_id, annotator, variant, outcome) VALUES ('p', 'a', 'v', 'ok')",
    ],
)
def test_a_change_of_the_rows_is_seen_when_the_hash_is_made_again(tmp_path: Path, sql: str) -> None:
    path = tmp_path / "calls.sqlite"
    written = write(path, CALL, FAILED, DECIDED, replace(CALL, attempt=4))
    forge(path, sql)
    with open_calls(path) as log:
        assert log.recomputed_hash() != written


# What is no call log of today ----------------------------------------------------------------------------------------


def test_a_log_that_is_not_there_is_not_made_by_reading_it(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="sp2dpo annotate"), open_calls(tmp_path / "calls.sqlite"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    for content in (b"pair_id,annotator\n" * 100, b""):
        path.write_bytes(content)
        with pytest.raises(RunDirError, match="call log"), open_calls(path):
            pass
        assert path.read_bytes() == content
    path.write_bytes(b"pair_id,annotator\n" * 100)
    with pytest.raises(RunDirError, match="call log"), open_ledger(path):
        pass
    assert path.read_bytes() == b"pair_id,annotator\n" * 100


def test_a_damaged_page_is_an_error_of_the_file_and_not_a_bug(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    write(path, *[replace(CALL, raw_text="x" * 5000, attempt=n) for n in range(50)])
    whole = bytearray(path.read_bytes())
    whole[20_000:60_000] = random.Random(0).randbytes(40_000)
    path.write_bytes(whole)
    with open_calls(path) as log, pytest.raises(RunDirError, match=r"calls\.sqlite"):
        list(log)


@pytest.mark.parametrize("opened", [open_calls, open_ledger])
@pytest.mark.parametrize(("version", "hint"), [(0, "version is 0"), (99, "version 99.*pip install --upgrade")])
def test_a_log_of_another_version_is_refused_and_left_alone(
    tmp_path: Path, opened: Any, version: int, hint: str
) -> None:
    path = tmp_path / "calls.sqlite"
    write(path, CALL)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute(f"PRAGMA user_version = {version}")
    before = path.read_bytes()
    with pytest.raises(RunDirError, match=hint), opened(path):
        pass
    assert path.read_bytes() == before


def test_reading_a_log_changes_no_file_and_leaves_none(tmp_path: Path) -> None:
    write(tmp_path / "calls.sqlite", CALL)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(read(tmp_path / "calls.sqlite")) == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


# Version 1 -----------------------------------------------------------------------------------------------------------

NAMES_1 = [field.name for field in fields(Call)][:26]
REAL_1, INTEGER_1 = "latency_s magnitude confidence cost_usd", "attempt http_status prompt_tokens completion_tokens"


def write_version_1(path: Path, *calls: Call) -> str:
    """A call log as version 1 wrote it, and the content hash that it gave."""
    kinds = dict.fromkeys(NAMES_1, "TEXT") | dict.fromkeys(REAL_1.split(), "REAL")
    kinds |= dict.fromkeys(INTEGER_1.split(), "INTEGER")
    rows = [tuple(vars(call)[name] for name in NAMES_1) for call in calls]
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        columns = ", ".join(f"{name} {kind}" for name, kind in kinds.items())
        db.execute(f"CREATE TABLE calls (id INTEGER PRIMARY KEY, {columns}) STRICT")
        db.execute("CREATE INDEX calls_by_cell ON calls (pair_id, annotator, variant)")
        for name, event in (("calls_no_update", "UPDATE"), ("calls_no_delete", "DELETE")):
            refuse = "SELECT RAISE(ABORT, 'the call log is append-only')"
            db.execute(f"CREATE TRIGGER {name} BEFORE {event} ON calls BEGIN {refuse}; END")
        marks = ", ".join("?" * len(NAMES_1))
        db.executemany(f"INSERT INTO calls ({', '.join(NAMES_1)}) VALUES ({marks})", rows)
        db.execute("PRAGMA user_version = 1")
        db.commit()
    lines = [json.dumps(dict(zip(NAMES_1, row, strict=True)), sort_keys=True, separators=(",", ":")) for row in rows]
    return hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()


def version_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        return version


def test_a_log_of_version_1_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    content = write_version_1(path, FAILED, CALL)
    before = path.read_bytes()
    with open_calls(path) as log:
        assert list(log) == [FAILED, CALL]
        assert log.content_hash() == log.recomputed_hash() == content
        assert list(log.answers()) == [CALL]
        assert log.state(["p1"]) == {CALL.cell: CellState(2, True, "ok")}
        assert [count.attempts for count in log.counts()] == [1, 1]
        assert log.spent(["a"]) == pytest.approx(2e-7)
        assert log.usage("a").reasoning_tokens == 0
        assert log.batch_events("a") == []
    assert path.read_bytes() == before


@pytest.mark.parametrize("rows", [(), (CALL,), (FAILED, CALL, replace(CALL, attempt=3))])
def test_a_log_of_version_1_keeps_its_rows_and_its_hash_when_it_is_brought_up_to_date(
    tmp_path: Path, rows: tuple[Call, ...]
) -> None:
    path = tmp_path / "calls.sqlite"
    content = write_version_1(path, *rows)
    assert write(path) == content
    assert version_of(path) == 2
    assert read(path) == list(rows)
    more = write(path, DECIDED)
    assert more == hashlib.sha256(((content if rows else "") + line(DECIDED)).encode()).hexdigest()
    with open_calls(path) as log:
        assert list(log) == [*rows, DECIDED]
        assert log.recomputed_hash() == more


def test_a_log_that_was_brought_up_to_date_is_built_like_a_new_one(tmp_path: Path) -> None:
    write_version_1(tmp_path / "old", CALL)
    write(tmp_path / "old")
    write(tmp_path / "new")

    def built(path: Path) -> list[Any]:
        with closing(sqlite3.connect(path)) as db:
            names = db.execute("SELECT type, name, tbl_name FROM sqlite_master ORDER BY 1, 2").fetchall()
            return [*names, *(db.execute(f"PRAGMA table_info({name})").fetchall() for _, name, _ in names)]

    assert built(tmp_path / "old") == built(tmp_path / "new")
    for sql in ("UPDATE calls SET attempt = 2", "DELETE FROM calls"):
        with (
            closing(sqlite3.connect(tmp_path / "old")) as db,
            pytest.raises(sqlite3.IntegrityError, match="append-only"),
        ):
            db.execute(sql)


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


DIES_BEFORE_THE_COMMIT = """
import os, signal, sys
from pathlib import Path
from sp2dpo.calls import open_ledger, schema
migrate = schema.migrate
def and_die(*arguments):
    migrate(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
schema.migrate = and_die
with open_ledger(Path(sys.argv[1])):
    pass
"""


def test_a_kill_while_a_log_is_brought_up_to_date_leaves_it_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    content = write_version_1(path, FAILED, CALL)
    with python(DIES_BEFORE_THE_COMMIT, path) as process:
        assert process.wait(60) == -signal.SIGKILL
    assert version_of(path) == 1
    with open_calls(path) as log:
        assert (list(log), log.content_hash()) == ([FAILED, CALL], content)
    assert write(path) == content
    assert version_of(path) == 2


# One writer ----------------------------------------------------------------------------------------------------------

HOLDS_THE_LOCK = """
import sys
from pathlib import Path
from sp2dpo.calls import open_ledger
with open_ledger(Path(sys.argv[1])):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_and_told_who_is_first_and_readers_are_not(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    write(path, CALL)
    with python(HOLDS_THE_LOCK, path) as first:
        assert first.stdout is not None
        assert first.stdin is not None
        assert first.stdout.readline() == "open\n"
        for _ in range(2):
            with pytest.raises(RunDirError, match=rf"process {first.pid} on .*again"), open_ledger(path):
                pass
        assert read(path) == [CALL]
        first.stdin.close()
        assert first.wait(60) == 0
    assert write(path, FAILED)


def test_the_lock_of_a_killed_writer_is_free(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    with python(HOLDS_THE_LOCK, path) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "open\n"
        first.kill()
        first.wait(60)
    assert write(path, CALL)


def test_one_file_under_two_names_has_one_lock(tmp_path: Path) -> None:
    write(tmp_path / "calls.sqlite", CALL)
    (tmp_path / "link").symlink_to(tmp_path / "calls.sqlite")
    with (
        open_ledger(tmp_path / "calls.sqlite"),
        pytest.raises(RunDirError, match=f"process {os.getpid()}"),
        open_ledger(tmp_path / "link"),
    ):
        pass


# Disks ---------------------------------------------------------------------------------------------------------------

WRITES_UNTIL_IT_FAILS = """
import asyncio, resource, sys
from dataclasses import replace
from pathlib import Path
from sp2dpo.calls import Call, open_ledger
from sp2dpo.errors import Unfinished

path, limit = Path(sys.argv[1]), int(sys.argv[2])
call = Call("p", "a", "v", 1, "live", "m", None, "e", "00", "{}", "{}", "t", 0.5, 200, "stop", "ok", "[]", "x" * 3000,
            "Style", 0.5, 0.5, 1, 1, None, None, None)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
done, failed = [], []

async def work(ledger, worker):
    for n in range(100_000):
        try:
            await ledger.add(replace(call, pair_id=f"{worker}-{n}"))
        except Unfinished as error:
            failed.append(str(error))
            return
        done.append(f"{worker}-{n}")

async def work_all(ledger):
    await asyncio.gather(*(work(ledger, worker) for worker in range(8)))

try:
    with open_ledger(path) as ledger:
        asyncio.run(work_all(ledger))
        try:
            ledger.append(call)
        except Unfinished:
            print("no more")
except Unfinished as error:
    print(error)
print(len(failed), *set(failed), sep="\\n")
print(*done)
"""


def durable_rows(output: str) -> set[str]:
    """What the script above says was written, after checking what it says of the failure."""
    closed, whole, n, message, done = output.splitlines()
    assert (closed, n) == ("no more", "8")
    assert "could not be written" in message
    assert "run the same command again" in message
    assert whole == message
    return set(done.split())


def test_a_disk_that_takes_no_more_stops_every_writer_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    limited = [sys.executable, "-c", WRITES_UNTIL_IT_FAILS, str(path), str(400_000)]
    ran = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=True)
    durable = durable_rows(ran.stdout)
    assert len(durable) > 50
    with open_ledger(path) as ledger:
        assert durable <= {call.pair_id for call in ledger}
        assert ledger.recomputed_hash() == ledger.content_hash()
        ledger.append(CALL)


ON_A_SMALL_DISK = """
set -e
mount -t tmpfs -o size=1m none "$1"
head -c 300000 /dev/zero > "$1/ballast"
"$2" -c "$3" "$1/calls.sqlite" 0
"$2" -c "$4" "$1/calls.sqlite" < /dev/null
rm "$1/ballast"
"$2" -c "$5" "$1/calls.sqlite"
"""

READS = """
import sys
from pathlib import Path
from sp2dpo.calls import open_calls
with open_calls(Path(sys.argv[1])) as log:
    assert log.recomputed_hash() == log.content_hash()
    print(*(call.pair_id for call in log))
"""

GOES_ON = """
import sys
from pathlib import Path
from sp2dpo.calls import open_ledger
with open_ledger(Path(sys.argv[1])) as ledger:
    ledger.append(next(iter(ledger)))
    assert ledger.recomputed_hash() == ledger.content_hash()
    print(*(call.pair_id for call in ledger))
"""


@needs_mounts
def test_a_full_disk_loses_nothing_and_can_be_gone_on_with_after_space_was_made(tmp_path: Path) -> None:
    scripts = [sys.executable, WRITES_UNTIL_IT_FAILS, READS, GOES_ON]
    command = ["unshare", "-rm", "sh", "-c", ON_A_SMALL_DISK, "sh", str(tmp_path), *scripts]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    *output, read_after, written_after = ran.stdout.splitlines()
    durable = durable_rows("\n".join(output))
    assert "disk is full; what was answered before is safe; free some space" in output[1]
    assert len(durable) > 50
    assert durable <= set(read_after.split()) <= set(written_after.split())


ON_A_READ_ONLY_DISK = """
set -e
mount --bind "$1" "$1"
mount -o remount,ro,bind "$1"
"$2" -c "$3" "$1/calls.sqlite"
"$2" -c "$4" "$1/calls.sqlite" 0
"""


@needs_mounts
def test_a_log_on_a_read_only_disk_can_be_read_but_not_written(tmp_path: Path) -> None:
    write(tmp_path / "calls.sqlite", CALL)
    scripts = [sys.executable, READS, WRITES_UNTIL_IT_FAILS]
    command = ["unshare", "-rm", "sh", "-c", ON_A_READ_ONLY_DISK, "sh", str(tmp_path), *scripts]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[0] == "p1"
    assert "could not be written" in ran.stdout
    assert "make it and its folder writable" in ran.stdout
