"""The call log: rows are added and never changed, and a file that is something else is refused."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from sp2dpo.calls import Call, open_calls
from sp2dpo.errors import RunDirError

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


def write(path: Path, *calls: Call) -> str:
    with open_calls(path, create=True) as log:
        for call in calls:
            log.append(call)
        return log.content_hash()


def test_a_row_comes_back_as_it_was_appended(tmp_path: Path) -> None:
    write(tmp_path / "calls.sqlite", CALL, FAILED)
    with open_calls(tmp_path / "calls.sqlite") as log:
        assert list(log) == [CALL, FAILED]
        assert len(log) == 2


@pytest.mark.parametrize("sql", ["UPDATE calls SET magnitude = 1.0", "DELETE FROM calls"])
def test_the_file_itself_refuses_to_change_or_lose_a_row(tmp_path: Path, sql: str) -> None:
    write(tmp_path / "calls.sqlite", CALL)
    with (
        closing(sqlite3.connect(tmp_path / "calls.sqlite")) as db,
        pytest.raises(sqlite3.IntegrityError, match="append-only"),
    ):
        db.execute(sql)


def test_a_log_that_is_opened_again_goes_on_where_it_stopped(tmp_path: Path) -> None:
    write(tmp_path / "calls.sqlite", FAILED)
    write(tmp_path / "calls.sqlite", CALL)
    with open_calls(tmp_path / "calls.sqlite") as log:
        assert [call.outcome for call in log] == ["timeout", "ok"]


def test_a_row_is_on_disk_before_append_returns(tmp_path: Path) -> None:
    with open_calls(tmp_path / "calls.sqlite", create=True) as log:
        log.append(CALL)
        with open_calls(tmp_path / "calls.sqlite") as other:
            assert list(other) == [CALL]


def test_answers_takes_the_first_valid_one_of_each_question(tmp_path: Path) -> None:
    first, second = replace(CALL, outcome="repaired", attempt=2, magnitude=0.3), replace(CALL, attempt=3)
    elsewhere = replace(CALL, variant="v2")
    write(tmp_path / "calls.sqlite", FAILED, first, second, elsewhere)
    with open_calls(tmp_path / "calls.sqlite") as log:
        assert log.answers() == {("p1", "a", "v1"): first, ("p1", "a", "v2"): elsewhere}
        assert log.valid_cells() == set(log.answers())
        assert log.attempts() == {("p1", "a", "v1"): 3, ("p1", "a", "v2"): 1}


def test_failures_are_the_last_attempts_at_questions_without_an_answer(tmp_path: Path) -> None:
    last = replace(FAILED, outcome="no_object", attempt=2, variant="v2")
    write(tmp_path / "calls.sqlite", FAILED, CALL, replace(FAILED, variant="v2"), last)
    with open_calls(tmp_path / "calls.sqlite") as log:
        assert log.failures() == {("p1", "a", "v2"): last}


def test_the_content_hash_depends_on_every_field_and_the_order_and_nothing_else(tmp_path: Path) -> None:
    same = {write(tmp_path / name, CALL, FAILED) for name in ("a", "b")}
    assert len(same) == 1
    others = [write(tmp_path / "order", FAILED, CALL), write(tmp_path / "fewer", CALL)]
    for n, field in enumerate(vars(CALL)):
        value = vars(CALL)[field]
        other = 7 if isinstance(value, int | float) else f"other {value}"
        others.append(write(tmp_path / f"field{n}", replace(CALL, **{field: other}), FAILED))
    assert len({*others, *same}) == len(others) + 1


def test_a_log_that_is_not_there_is_not_made_by_reading_it(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="sp2dpo annotate"), open_calls(tmp_path / "calls.sqlite"):
        pass
    assert not (tmp_path / "calls.sqlite").exists()


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    for content in (b"pair_id,annotator\n" * 100, b""):
        path.write_bytes(content)
        with pytest.raises(RunDirError, match="call log"), open_calls(path):
            pass
        assert path.read_bytes() == content


@pytest.mark.parametrize("version", [0, 2, 99])
def test_a_log_of_another_version_is_refused(tmp_path: Path, version: int) -> None:
    write(tmp_path / "calls.sqlite", CALL)
    with closing(sqlite3.connect(tmp_path / "calls.sqlite")) as db:
        db.execute(f"PRAGMA user_version = {version}")
    for create in (False, True):
        with (
            pytest.raises(RunDirError, match=f"version {version}"),
            open_calls(tmp_path / "calls.sqlite", create=create),
        ):
            pass


def test_reading_a_log_does_not_change_the_file(tmp_path: Path) -> None:
    path = tmp_path / "calls.sqlite"
    write(path, CALL)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA journal_mode = DELETE")
    before = path.read_bytes()
    with open_calls(path) as log:
        assert len(log) == 1
    assert path.read_bytes() == before
