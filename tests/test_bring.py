"""Questions out, answers in: each line reaches its own question, and a line that is no answer is named."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sp2dpo.annotate.bring import custom_id, export_requests, open_answers, raw_of, request_line
from sp2dpo.errors import DataError
from sp2dpo.hashing import sha256_text
from sp2dpo.llm import Raw, Reply, Request
from sp2dpo.llm.chat import read_chat

GOOD = '{"semantic_gap_category": "Style", "semantic_gap_magnitude": 0.5, "semantic_gap_confidence": 0.4}'


def pair(n: int) -> str:
    return sha256_text(f"pair {n}")


def request(n: int, *variants: str) -> Request:
    body = {"model": "m", "messages": [{"role": "user", "content": f"question {n} ½ 中 \ud800"}], "seed": 42}
    return Request(pair(n), variants or ("v1",), "/chat/completions", body, f"hash of {n}")


def completion(n: int) -> dict[str, Any]:
    return {"model": "m-1", "choices": [{"message": {"content": f"{GOOD} {n}"}}], "usage": {"prompt_tokens": n}}


def answered(n: int, *variants: str, status: int = 200) -> dict[str, Any]:
    """A line of OpenAI's output."""
    response = {"status_code": status, "request_id": f"req-{n}", "body": completion(n)}
    name = custom_id(pair(n), variants or ("v1",))
    return {"id": f"batch_req_{n}", "custom_id": name, "response": response, "error": None}


def simple(n: int, variant: str = "v1", **more: Any) -> dict[str, Any]:
    return {"pair_id": pair(n), "variant": variant, "raw_text": f"text {n} {variant}"} | more


WriteFile = Callable[..., Path]


@pytest.fixture
def answers_file(tmp_path: Path) -> WriteFile:
    def write(*rows: Any, name: str = "answers.jsonl", end: str = "\n") -> Path:
        path = tmp_path / name
        text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + end
        data = text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write


# Names and lines -----------------------------------------------------------------------------------------------------

variant_names = st.text(st.characters(codec="ascii", categories=("L", "N")), min_size=1, max_size=80)


@given(st.lists(variant_names, min_size=1, max_size=4, unique=True))
def test_a_name_is_short_and_begins_with_the_pair(variants: list[str]) -> None:
    name = custom_id(pair(0), tuple(variants))
    assert len(name) <= 64
    assert name.startswith(pair(0)[:32] + ".")


@given(st.sets(st.lists(variant_names, min_size=1, max_size=3, unique=True).map(tuple), min_size=2, max_size=8))
def test_different_calls_about_a_pair_have_different_names(calls: set[tuple[str, ...]]) -> None:
    assert len({custom_id(pair(0), variants) for variants in calls}) == len(calls)


def test_one_variant_can_be_read_from_the_name() -> None:
    assert custom_id(pair(0), ("v1",)) == f"{pair(0)[:32]}.v1"


def test_a_line_is_what_batch_apis_take() -> None:
    line = request_line(request(0))
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    row = json.loads(line)
    assert list(row) == ["custom_id", "method", "url", "body"]
    assert (row["method"], row["url"]) == ("POST", "/v1/chat/completions")
    assert row["body"] == request(0).body


# Out -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["questions.jsonl", "questions.jsonl.gz"])
def test_questions_go_to_a_file_line_by_line(tmp_path: Path, name: str) -> None:
    requests = [request(n) for n in range(3)]
    assert export_requests(iter(requests), tmp_path / name) == 3
    data = (tmp_path / name).read_bytes()
    assert (gzip.decompress(data) if name.endswith(".gz") else data) == b"".join(map(request_line, requests))
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_compressed_file_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        export_requests([request(0)], tmp_path / name)
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


# What a line says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "failure", "words"),
    [
        (answered(1), None, None),
        (answered(1, status=429), "rate_limited", "choices"),
        ({"response": {"status_code": 400, "body": {"error": {"message": "no"}}}, "error": None}, "bad_request", "no"),
        ({"response": {"status_code": 400, "request_id": "x"}, "error": "too long"}, "bad_request", "too long"),
        ({"response": {"status_code": 500, "body": "<html>"}}, "server_error", "<html>"),
        ({"response": {"status_code": 200, "body": None}}, "bad_response", "null"),
        ({"response": {"status_code": 200, "body": [1]}}, "bad_response", "1"),
        ({"response": None, "error": {"code": "batch_expired", "message": "late"}}, "batch_expired", "late"),
        ({"response": None, "error": {"code": "request_timeout", "message": "slow"}}, "timeout", "slow"),
        ({"response": None, "error": {"code": "batch_cancelled"}}, "batch_failed", "cancelled"),
        ({"response": None, "error": "boom"}, "batch_failed", "boom"),
        ({"response": {"status_code": "200"}, "error": None}, "batch_failed", "neither"),
        ({}, "batch_failed", "neither"),
    ],
)
def test_a_line_is_an_http_response_or_a_reason_why_there_is_none(
    row: dict[str, Any], failure: str | None, words: str | None
) -> None:
    reply = read_chat(raw_of(row))
    assert reply.failure == failure
    assert words is None or words in str(reply.error)


def test_a_line_without_a_response_was_not_billed() -> None:
    assert raw_of({"response": None, "error": {"code": "batch_expired"}}).sent is False
    assert raw_of(answered(1, status=500)).sent is True


def test_the_id_of_the_request_is_kept() -> None:
    assert raw_of(answered(7)).request_id == "req-7"
    assert raw_of({"id": "batch_req_7", "response": {"status_code": 200}}).request_id == "batch_req_7"


# In ------------------------------------------------------------------------------------------------------------------


def texts(path: Path, requests: Sequence[Request]) -> list[str | None]:
    with open_answers(path, "a") as answers:
        found = [answers.take(one) for one in requests]
    assert all(one is None or isinstance(one, Raw) for one in found)
    return [read_chat(one).raw_text if isinstance(one, Raw) else None for one in found]


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.jsonl.gz"])
def test_each_question_takes_its_own_answer_whatever_the_order(answers_file: WriteFile, name: str) -> None:
    rows = [answered(n, variant) for n in range(50) for variant in ("v1", "v2")]
    random.Random(0).shuffle(rows)
    path = answers_file(*rows, name=name)
    asked = [request(n, "v2") for n in range(50)]
    assert texts(path, asked) == [f"{GOOD} {n}" for n in range(50)]


def test_lines_that_no_question_took_are_counted(answers_file: WriteFile) -> None:
    other = {**answered(0), "custom_id": "of another program"}
    with open_answers(answers_file(answered(0), answered(1), other), "a") as answers:
        assert len(answers) == answers.unused == 3
        assert answers.take(request(0)) is not None
        assert answers.take(request(5)) is None
        assert answers.unused == 2


def test_of_several_answers_to_a_question_the_first_counts(answers_file: WriteFile) -> None:
    rows = [{**answered(n), "custom_id": custom_id(pair(n % 5), ("v1",))} for n in range(1000)]
    with open_answers(answers_file(*rows), "a") as answers:
        found = [answers.take(request(n)) for n in range(5)]
        assert [one.request_id for one in found if isinstance(one, Raw)] == [f"req-{n}" for n in range(5)]
        assert (len(answers), answers.duplicates, answers.unused) == (5, 995, 0)


def test_a_failure_of_the_batch_is_an_answer_too(answers_file: WriteFile) -> None:
    row = {"custom_id": custom_id(pair(0), ("v1",)), "response": None, "error": {"code": "batch_expired"}}
    with open_answers(answers_file(row), "a") as answers:
        found = answers.take(request(0))
    assert isinstance(found, Raw)
    assert found.failure == "batch_expired"


def test_bare_texts_come_as_replies_with_what_is_known_of_them(answers_file: WriteFile) -> None:
    row = simple(0, served_model="m-1", finish_reason="stop", prompt_tokens=7, completion_tokens=True, annotator="a")
    with open_answers(answers_file(row), "a") as answers:
        reply = Reply(raw_text="text 0 v1", served_model="m-1", finish_reason="stop", prompt_tokens=7)
        assert answers.take(request(0)) == {"v1": reply}


def test_bare_texts_answer_the_variants_of_a_call_that_asks_several(answers_file: WriteFile) -> None:
    with open_answers(answers_file(simple(0, "v1"), simple(0, "v3")), "a") as answers:
        found = answers.take(request(0, "v1", "v2", "v3"))
    assert isinstance(found, dict)
    assert {variant: reply.raw_text for variant, reply in found.items()} == {"v1": "text 0 v1", "v3": "text 0 v3"}


def test_a_response_to_several_variants_answers_just_the_call_that_asked_them(answers_file: WriteFile) -> None:
    with open_answers(answers_file(answered(0, "v1", "v2")), "a") as answers:
        assert answers.take(request(0, "v1")) is None
        assert isinstance(answers.take(request(0, "v1", "v2")), Raw)


def test_answers_of_other_annotators_are_left_out(answers_file: WriteFile) -> None:
    path = answers_file(simple(0, annotator="b"), simple(0, annotator="a", served_model="mine"))
    with open_answers(path, "a") as answers:
        assert answers.others == 1
        found = answers.take(request(0))
    assert isinstance(found, dict)
    assert found["v1"].served_model == "mine"


def test_a_file_without_answers_of_the_annotator_is_refused(answers_file: WriteFile) -> None:
    for path in (answers_file(simple(0, annotator="b")), answers_file("")):
        with pytest.raises(DataError, match="no answers of annotator 'a'"), open_answers(path, "a"):
            pass


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("no json", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a JSON object"),
        ('{"pair_id": "p", "variant": "v1"}', "no raw_text"),
        ('{"pair_id": "p", "variant": "v1", "raw_text": null}', "no raw_text"),
        ('{"custom_id": 7, "response": null}', "custom_id is no text"),
        (request_line(request(0)).decode(), "a line of questions"),
    ],
)
def test_a_line_that_is_no_answer_is_named_before_any_is_taken(answers_file: WriteFile, line: str, words: str) -> None:
    path = answers_file(answered(0), "", line.rstrip("\n"), answered(1))
    with pytest.raises(DataError, match=f"answers.jsonl, line 3: .*{words}"), open_answers(path, "a"):
        pass


def test_a_last_line_that_was_cut_off_is_left_out_and_told(answers_file: WriteFile) -> None:
    path = answers_file(answered(0), json.dumps(answered(1))[:-20], end="")
    with open_answers(path, "a") as answers:
        assert answers.torn == 2
        assert len(answers) == 1


def test_a_last_line_that_is_whole_and_no_answer_is_an_error(answers_file: WriteFile) -> None:
    with pytest.raises(DataError, match="line 2"), open_answers(answers_file(answered(0), "{}", end=""), "a"):
        pass


def test_a_last_line_without_an_end_counts_if_it_is_whole(answers_file: WriteFile) -> None:
    with open_answers(answers_file(answered(0), answered(1), end=""), "a") as answers:
        assert answers.torn is None
        assert len(answers) == 2


def test_a_compressed_file_that_was_cut_off_gives_what_it_has(answers_file: WriteFile) -> None:
    path = answers_file(*(answered(n) for n in range(2000)), name="answers.jsonl.gz")
    path.write_bytes(path.read_bytes()[:-2000])
    with open_answers(path, "a") as answers:
        assert 0 < len(answers) < 2000
        assert answers.torn == len(answers) + 1
        assert answers.take(request(0)) is not None


def test_a_file_that_is_not_there_or_no_gzip_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"), open_answers(tmp_path / "a.jsonl", "a"):
        pass
    (tmp_path / "a.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="no gzip file"), open_answers(tmp_path / "a.jsonl.gz", "a"):
        pass


def test_half_of_a_surrogate_pair_in_an_answer_can_be_stored(answers_file: WriteFile) -> None:
    with open_answers(answers_file(simple(0, raw_text="a \ud800 b")), "a") as answers:
        found = answers.take(request(0))
    assert isinstance(found, dict)
    assert found["v1"].raw_text == "a \\ud800 b"
