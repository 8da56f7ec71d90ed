"""Questions out and answers in around a whole run: what comes back in a file stands as if it had been asked."""

from __future__ import annotations

import gzip
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from conftest import GOOD, NewRun, Sp2dpo, completion, rows, teacher, write_process
from faults import judgement, question_key
from sp2dpo.annotate.exchange import export_open, import_answers
from sp2dpo.annotate.run import annotate
from sp2dpo.calls import Call, open_calls, open_ledger
from sp2dpo.decision import LEVELS
from sp2dpo.errors import DataError, ProcessError, RunDirError
from sp2dpo.pairs import read_pairs
from sp2dpo.process import load_process
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import Run, open_run
from sp2dpo.stages import prepare_run, schedule_run
from sp2dpo.verify import verify
from teacher_server import Answer, Asked, teacher_server

Line = dict[str, Any]


def logged(run: Run) -> list[Call]:
    with open_calls(run.calls) as log:
        return list(log)


def read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, lines: Iterable[Any]) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def body(question: Line, text: str | None = None, **more: Any) -> Line:
    """A chat completion with the judgement that this question always gets."""
    content = json.dumps(judgement(question_key(question["body"]))) if text is None else text
    usage = {"prompt_tokens": 1000, "completion_tokens": 50}
    message = {"role": "assistant", "content": content}
    choices = [{"index": 0, "finish_reason": "stop", "message": message}]
    return {"model": question["body"]["model"], "choices": choices, "usage": usage} | more


def answered(question: Line, text: str | None = None, **more: Any) -> Line:
    """A line of a batch's output, as OpenAI writes it."""
    response = {"status_code": 200, "request_id": "req-1", "body": body(question, text, **more)}
    return {"id": "batch_req_1", "custom_id": question["custom_id"], "response": response, "error": None}


def questions(run: Run, **options: Any) -> list[Line]:
    path = run.path.parent / "questions.jsonl"
    assert export_open(run, path, **options) == len(read(path))
    return read(path)


def answers(run: Run, lines: Iterable[Any], name: str = "answers.jsonl") -> Path:
    return write(run.path.parent / name, lines)


# There and back -----------------------------------------------------------------------------------------------------


def test_answers_from_a_file_stand_as_if_they_had_been_asked(new_run: NewRun) -> None:
    panel = {"variants": ["v1", "v3"]}
    asked, brought = new_run("asked", pairs=rows(20), panel=panel), new_run("brought", pairs=rows(20), panel=panel)

    def handler(one: Asked) -> Answer:
        return Answer(body({"body": one.json}), headers={"x-request-id": "req-1"})

    with teacher_server(handler) as server:
        annotate(asked, connector=server.connector)
        sent = {one.text for one in server.asked}
    lines = questions(brought)
    assert {(line["method"], line["url"]) for line in lines} == {("POST", "/v1/chat/completions")}
    assert [*map(len, (sent, lines))] == [40, 40]
    assert [json.loads(text) for text in sorted(sent)] == sorted((line["body"] for line in lines), key=key_of(sent))
    random.Random(0).shuffle(lines)
    made = import_answers(brought, answers(brought, map(answered, lines)))
    assert (made.lines, made.taken, made.unused, made.duplicates, made.torn) == (40, 40, 0, 0, None)
    assert (made.account.questions, made.account.valid, made.account.imported) == (40, 40, 40)
    assert {call.origin for call in logged(brought)} == {"imported"}
    assert content(brought) == content(asked)
    for run in (asked, brought):
        schedule_run(run)
        assert list(verify(run.path))
    assert brought.schedule.with_suffix(".csv").read_text() == asked.schedule.with_suffix(".csv").read_text()


def key_of(sent: set[str]) -> Callable[[Line], int]:
    order = [json.loads(text) for text in sorted(sent)]
    return order.index


def content(run: Run) -> list[tuple[Any, ...]]:
    """What the rows say of questions and answers, whatever the way they came."""
    fields = (
        "pair_id annotator variant attempt outcome category magnitude confidence raw_text requested_model served_model "
        "endpoint request_hash params_requested params_sent finish_reason prompt_tokens completion_tokens request_id"
    )
    return sorted(tuple(getattr(call, name) for name in fields.split()) for call in logged(run))


def test_what_was_imported_was_paid_elsewhere(new_run: NewRun) -> None:
    price = {"input": 1.0, "output": 1.0, "as_of": "2026-01-01"}
    run = new_run(panel={"annotators": [teacher(price=price)]})
    made = import_answers(run, answers(run, map(answered, questions(run))))
    assert {(call.cost_usd, call.transport, call.prompt_tokens) for call in logged(run)} == {(None, "import", 1000)}
    assert made.account.spent_usd in (None, 0.0)


def test_only_what_is_open_is_exported_and_only_the_rest_is_asked(new_run: NewRun) -> None:
    run = new_run(pairs=rows(6), panel={"variants": ["v1", "v2"]})
    first = questions(run, limit=2)
    assert len(first) == 4
    import_answers(run, answers(run, map(answered, first)))
    rest = questions(run)
    assert len(rest) == 8
    assert not {line["custom_id"] for line in first} & {line["custom_id"] for line in rest}
    with teacher_server(lambda asked: completion()) as server:
        account = annotate(run, connector=server.connector)
    assert (len(server.asked), account.valid) == (8, 12)
    assert questions(run) == []


def test_an_export_asks_and_logs_nothing(new_run: NewRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEACHER_KEY", raising=False)
    run = new_run(panel={"annotators": [teacher(api_key_env="TEACHER_KEY")]})
    assert len(questions(run)) == 2
    assert logged(run) == []


def test_a_compressed_export_and_answers_that_are_compressed_work_alike(new_run: NewRun) -> None:
    run = new_run(pairs=rows(9))
    packed = run.path.parent / "questions.jsonl.gz"
    assert export_open(run, packed) == 9
    lines = [json.loads(line) for line in gzip.decompress(packed.read_bytes()).splitlines()]
    assert lines == questions(run)
    assert import_answers(run, answers(run, map(answered, lines), "answers.jsonl.gz")).account.valid == 9


def test_typed_decisions_may_come_as_bare_texts_variant_by_variant(new_run: NewRun) -> None:
    one = teacher(kind="decisions", api="decisions")
    run = new_run(pairs=rows(3), panel={"variants": ["v1", "v2"], "annotators": [one]})
    assert [line["url"] for line in questions(run)] == ["/v1/decisions"] * 3
    category = dict.fromkeys(CATEGORIES, 0.0) | {"Style": 1.0}
    magnitude = dict.fromkeys(LEVELS, 0.0) | {LEVELS[2]: 1.0}
    text = json.dumps({"category": category, "magnitude": magnitude, "confidence": 0.25})
    pairs = read_pairs(run.pairs, "")["pair_id"].to_pylist()
    lines = [{"pair_id": pair, "variant": variant, "raw_text": text} for pair in pairs for variant in ("v1", "v2")]
    made = import_answers(run, answers(run, lines[:-1]))
    assert (made.account.valid, made.account.missing) == (5, 1)
    assert {(call.category, call.magnitude, call.confidence) for call in logged(run)} == {("Style", 0.5, 0.25)}
    (rest,) = questions(run)
    assert rest["custom_id"].startswith(str(pairs[-1])[:32])


# What is not a valid answer -----------------------------------------------------------------------------------------

SPOILT: dict[str, tuple[Callable[[Line], Line], str]] = {
    "prose": (lambda q: answered(q, "Sorry, no."), "no_object"),
    "empty": (lambda q: answered(q, ""), "empty"),
    "other model": (lambda q: answered(q, model="cheaper"), "other_model"),
    "no completion": (lambda q: answered(q, choices=[]), "bad_response"),
    "500": (
        lambda q: {"custom_id": q["custom_id"], "response": {"status_code": 500, "body": {"error": {}}}, "error": None},
        "server_error",
    ),
    "expired": (
        lambda q: {"custom_id": q["custom_id"], "response": None, "error": {"code": "batch_expired"}},
        "batch_expired",
    ),
    "vLLM refuses": (
        lambda q: {
            "id": "vllm-1",
            "custom_id": q["custom_id"],
            "response": {"status_code": 400, "request_id": "vllm-batch-1", "body": None},
            "error": {"message": "The prompt is too long.", "type": "BadRequestError", "param": None, "code": 400},
        },
        "bad_request",
    ),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_failed_answer_is_a_row_of_its_kind_and_its_question_stays_open(new_run: NewRun, name: str) -> None:
    run = new_run(pairs=rows(3))
    spoil, outcome = SPOILT[name]
    lines = questions(run)
    made = import_answers(run, answers(run, [spoil(lines[0]), *map(answered, lines[1:])]))
    assert made.account.outcomes == {outcome: 1, "ok": 2}
    assert (made.account.valid, made.account.missing_by_cause) == (2, {outcome: 1})
    open_now = questions(run)
    assert [line["custom_id"] for line in open_now] == [lines[0]["custom_id"]]
    assert import_answers(run, answers(run, map(answered, open_now))).account.valid == 3
    assert [call.attempt for call in logged(run) if call.pair_id.startswith(lines[0]["custom_id"][:32])] == [1, 2]


def test_the_words_of_vllm_about_a_failure_are_kept(new_run: NewRun) -> None:
    run = new_run(pairs=rows(1))
    import_answers(run, answers(run, map(SPOILT["vLLM refuses"][0], questions(run))))
    (call,) = logged(run)
    assert (call.http_status, call.request_id) == (400, "vllm-batch-1")
    assert "The prompt is too long." in str(call.error)


def test_the_lines_that_vllm_run_batch_writes_are_taken(new_run: NewRun) -> None:
    def vllm(question: Line) -> Line:
        own = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "prompt_logprobs": None}
        response = {"status_code": 200, "request_id": "vllm-batch-1", "body": body(question) | own}
        return {"id": "vllm-1", "custom_id": question["custom_id"], "response": response, "error": None}

    run = new_run(pairs=rows(5), panel={"annotators": [teacher(provider="vllm")]})
    assert import_answers(run, answers(run, map(vllm, questions(run)))).account.valid == 5
    assert {call.request_id for call in logged(run)} == {"vllm-batch-1"}


GARBAGE: dict[str, Any] = {
    "prose": "Here are your answers:",
    "half a line": '{"custom_id": "a", "resp',
    "an array": [1],
    "a line of questions": {"custom_id": "a", "method": "POST", "url": "/v1/x", "body": {}},
    "no name": {"custom_id": 7, "response": None, "error": {}},
    "a nest": "[" * 100_000,
    "a number": 7,
}


@pytest.mark.parametrize("name", GARBAGE)
def test_a_line_that_is_no_answer_is_named_and_nothing_is_logged(new_run: NewRun, name: str) -> None:
    run = new_run(pairs=rows(5))
    good = [*map(answered, questions(run))]
    with pytest.raises(DataError, match=r"answers\.jsonl, line 3: "):
        import_answers(run, answers(run, [*good[:2], GARBAGE[name], *good[2:]]))
    assert logged(run) == []


def test_a_last_line_that_was_cut_is_left_out_and_the_rest_is_taken(new_run: NewRun) -> None:
    run = new_run(pairs=rows(5))
    path = answers(run, map(answered, questions(run)))
    path.write_bytes(path.read_bytes()[:-20])
    made = import_answers(run, path)
    assert (made.taken, made.torn, made.account.valid) == (4, 5, 4)
    assert len(questions(run)) == 1


def test_answers_to_other_questions_are_counted_and_not_taken(new_run: NewRun) -> None:
    run = new_run(pairs=rows(3))
    lines = questions(run)
    other = {**answered(lines[0]), "custom_id": "of-another-program"}
    made = import_answers(run, answers(run, [other, answered(lines[1]), answered(lines[1], "second")]))
    assert (made.lines, made.taken, made.unused, made.duplicates) == (2, 1, 1, 1)
    assert [call.outcome for call in logged(run)] == ["ok"]


def test_the_same_file_twice_changes_nothing(new_run: NewRun) -> None:
    run = new_run(pairs=rows(5))
    path = answers(run, map(answered, questions(run)))
    import_answers(run, path)
    before = logged(run)
    made = import_answers(run, path)
    assert (made.taken, made.unused, made.account.valid) == (0, 5, 5)
    assert logged(run) == before


# Several annotators -------------------------------------------------------------------------------------------------

BOTH = {"annotators": [teacher("one"), teacher("two")]}


def test_of_several_annotators_one_must_be_chosen(new_run: NewRun) -> None:
    run = new_run(panel=BOTH)
    with pytest.raises(ProcessError, match="has 2 annotators that are asked; choose one: --annotator"):
        export_open(run, run.path / "questions.jsonl")
    with pytest.raises(ProcessError, match=r"--annotator too: no annotator of that name is asked.*two"):
        export_open(run, run.path / "questions.jsonl", annotator="too")
    path = answers(run, map(answered, questions(run, annotator="two")))
    with pytest.raises(ProcessError, match="choose one"):
        import_answers(run, path)
    assert logged(run) == []


def test_answers_go_to_the_annotator_that_was_chosen(new_run: NewRun) -> None:
    run = new_run(panel=BOTH)
    lines = questions(run, annotator="two")
    assert {line["body"]["model"] for line in lines} == {"model-of-two"}
    made = import_answers(run, answers(run, map(answered, lines)), annotator="two")
    assert (made.account.questions, made.account.valid) == (4, 2)
    assert Counter(call.annotator for call in logged(run)) == {"two": 2}
    assert (len(questions(run, annotator="one")), len(questions(run, annotator="two"))) == (2, 0)


def test_answers_of_another_annotator_are_not_taken_for_this_ones(new_run: NewRun) -> None:
    """Their names in the file are the same; the model that answered is not."""
    run = new_run(panel=BOTH)
    made = import_answers(run, answers(run, map(answered, questions(run, annotator="two"))), annotator="one")
    assert (made.account.valid, made.account.outcomes) == (0, {"other_model": 2})


def test_bare_texts_of_another_annotator_are_left_out(new_run: NewRun) -> None:
    run = new_run(panel=BOTH)
    pairs = read_pairs(run.pairs, "")["pair_id"].to_pylist()
    lines = [
        {"pair_id": pair, "variant": "v1", "raw_text": GOOD, "annotator": name}
        for pair, name in zip(pairs, ("one", "two"), strict=True)
    ]
    with pytest.raises(DataError, match="no answers of annotator 'one'; of others: 1"):
        import_answers(run, answers(run, lines[1:]), annotator="one")
    assert import_answers(run, answers(run, lines), annotator="one").taken == 1
    assert [(call.annotator, call.pair_id) for call in logged(run)] == [("one", pairs[0])]


def test_a_recorded_annotator_has_nothing_to_export(new_run: NewRun, tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text(json.dumps({"pair_id": "x", "variant": "v1", "raw_text": GOOD}) + "\n")
    old = {"name": "old", "kind": "recorded", "model": "m", "calls": "old.jsonl"}
    run = new_run(panel={"annotators": [old, teacher()]})
    assert len(questions(run)) == 2
    with pytest.raises(ProcessError, match="--annotator old: no annotator of that name is asked"):
        export_open(run, run.path / "questions.jsonl", annotator="old")


# Kills and locks ----------------------------------------------------------------------------------------------------


COMMAND = "from sp2dpo.cli import main; main()"


def test_an_import_that_is_killed_is_finished_by_the_next(tmp_path: Path) -> None:
    path = write_process(tmp_path, pairs=rows(4000))
    run = open_run(load_process(path), tmp_path / "run")
    prepare_run(run)
    file = answers(run, map(answered, questions(run)))
    command = [sys.executable, "-c", COMMAND, "import", str(path), str(file), "--run-dir", str(run.path)]
    kept, killed = 0, 0
    while killed < 2:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and count(run) <= kept:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            assert process.wait(60) == -signal.SIGKILL, "it ended before it was killed: give it more to do"
        before, kept = kept, count(run)
        assert before < kept < 4000
        killed += 1
    made = import_answers(run, file)
    assert (made.taken, made.unused, made.account.valid) == (4000 - kept, kept, 4000)
    calls = logged(run)
    assert len(calls) == len({call.cell for call in calls}) == 4000
    with open_calls(run.calls) as log:
        assert log.recomputed_hash() == log.content_hash()


def count(run: Run) -> int:
    if not run.calls.is_file():
        return 0
    with open_calls(run.calls) as log:
        return len(log)


def test_no_file_is_imported_while_another_process_writes(new_run: NewRun) -> None:
    run = new_run()
    path = answers(run, map(answered, questions(run)))
    with open_ledger(run.calls), pytest.raises(RunDirError, match="is being written by process"):
        import_answers(run, path)
    assert import_answers(run, path).account.valid == 2


# The commands -------------------------------------------------------------------------------------------------------


def test_the_commands_say_what_they_did(tmp_path: Path, sp2dpo: Sp2dpo) -> None:
    path, run = write_process(tmp_path, pairs=rows(5)), tmp_path / "run"
    file, back = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    ran = sp2dpo("export", path, "-o", file, "--run-dir", run)
    assert ran.code == 0
    assert "5 questions" in ran.err
    lines = [answered(line, "no" if n == 4 else None) for n, line in enumerate(read(file))]
    write(back, [*lines, lines[0], {**lines[0], "custom_id": "other"}])
    said = sp2dpo("import", path, back, "--run-dir", run, "--json")
    assert said.code == 0
    found = json.loads(said.out)
    assert (found["questions"], found["valid"], found["imported"]) == (5, 4, 5)
    assert "5 of 6 answers taken; 4 of 5 questions have a valid answer" in said.err
    assert "1 answers are about no open question" in said.err
    assert "1 lines answer a question again" in said.err
    assert "missing 1: no_object 1" in said.err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is missing: no answers to import"),
        ("", "no answers of annotator 'teacher'"),
        ("x\n", "line 1: not JSON"),
    ],
)
def test_a_file_that_cannot_be_imported_ends_with_2_and_one_line(
    tmp_path: Path, sp2dpo: Sp2dpo, content: str | None, says: str
) -> None:
    path, back = write_process(tmp_path), tmp_path / "answers.jsonl"
    if content is not None:
        back.write_text(content)
    ran = sp2dpo("import", path, back, "--run-dir", tmp_path / "run")
    assert ran.code == 2
    last = ran.err.splitlines()[-1]
    assert last.startswith("sp2dpo: ")
    assert says in last


def test_an_export_to_what_is_no_file_ends_with_2_and_changes_nothing(tmp_path: Path, sp2dpo: Sp2dpo) -> None:
    path, taken = write_process(tmp_path / "p"), tmp_path / "taken"
    taken.mkdir()
    ran = sp2dpo("export", path, "-o", taken, "--run-dir", tmp_path / "run")
    assert ran.code == 2
    last = ran.err.splitlines()[-1]
    assert last.startswith("sp2dpo: ")
    assert "taken" in last
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p", "run", "taken"]


def test_an_export_makes_the_folder_that_it_goes_to(tmp_path: Path, sp2dpo: Sp2dpo) -> None:
    output = tmp_path / "new" / "questions.jsonl"
    assert sp2dpo("export", write_process(tmp_path), "-o", output, "--run-dir", tmp_path / "run").code == 0
    assert len(read(output)) == 2
