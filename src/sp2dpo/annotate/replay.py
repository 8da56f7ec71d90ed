"""Answers that are there already: recordings, and the log of another run. Nothing is asked and nothing is paid."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final

from sp2dpo.annotate.plan import Plan, Question
from sp2dpo.annotate.teacher import Teacher, body_of, request_hash
from sp2dpo.calls import Call, open_calls
from sp2dpo.llm.recorded import Recording, read_recording
from sp2dpo.prompts import PromptPack
from sp2dpo.reply import parse_reply
from sp2dpo.runs import Run
from sp2dpo.settings import Annotator

__all__ = ["Replay", "pieces", "take_over"]

_AT_ONCE: Final = 200
_FIELDS: Final = tuple(field.name for field in fields(Call))


class Replay:
    """An annotator of kind `recorded`; there is no `note` on it.

    Raises:
        ProcessError: not a call log or JSONL of answers, or it holds none of this annotator.
    """

    note = None

    def __init__(self, run: Run, annotator: Annotator) -> None:
        self.annotator, self.name = annotator, annotator.name
        path = run.process.base / str(annotator.calls)
        self._pack: PromptPack = run.process.pack
        self._endpoint = f"recorded:{path.name}"
        self._recording: Recording = read_recording(path, annotator.name)

    def rows(self, plan: Plan) -> Iterator[list[Call]]:
        """The answers to all questions that were not replayed before, some at a time."""
        fresh = (question for question in plan.open(self.name) if not question.asked)
        for some in pieces(fresh):
            yield [self._row(question) for question in some]

    def _row(self, question: Question) -> Call:
        """The recorded answer to a question, or the reason why there is none."""
        row = self._recording.get((question.pair["pair_id"], question.variants[0]))
        if row is None:
            return self._call(question, {}, "not_recorded")
        if "request_hash" not in row:
            return self._call(question, row)
        _, body = body_of(
            row["kind"], row["requested_model"], self._pack, question.pair, question.variants, _params(row)
        )
        if request_hash(row["endpoint"], body) != row["request_hash"]:
            return self._call(question, {}, "other_question")
        known = {name: row[name] for name in _FIELDS}
        return replace(Call(**known), attempt=question.asked + 1, origin="recorded", annotator=self.name)

    def _call(self, question: Question, row: Mapping[str, Any], failure: str | None = None) -> Call:
        parsed = None if failure else parse_reply(row.get("raw_text"))
        gap = parsed.gap if parsed else None
        outcome = failure or (parsed and (parsed.problem or ("repaired" if parsed.mends else "ok"))) or ""
        _, body = body_of("recorded", self.annotator.model, self._pack, question.pair, question.variants, {})
        return Call(
            pair_id=question.pair["pair_id"],
            annotator=self.name,
            variant=question.variants[0],
            attempt=question.asked + 1,
            origin="recorded",
            requested_model=self.annotator.model,
            served_model=row.get("served_model"),
            endpoint=self._endpoint,
            request_hash=request_hash(self._endpoint, body),
            params_requested="{}",
            params_sent="{}",
            started_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
            latency_s=0.0,
            http_status=None,
            finish_reason=row.get("finish_reason"),
            outcome=outcome,
            mends=json.dumps(parsed.mends if parsed else ()),
            raw_text=row.get("raw_text"),
            category=gap.category if gap else None,
            magnitude=gap.magnitude if gap else None,
            confidence=gap.confidence if gap else None,
            prompt_tokens=None,
            completion_tokens=None,
            cost_usd=None,
            system_fingerprint=row.get("system_fingerprint"),
            error=None,
        )


def _params(row: Mapping[str, Any]) -> dict[str, Any]:
    return dict(json.loads(row["params_sent"]))


def take_over(plan: Plan, path: Path, teachers: Sequence[Teacher], keep: Callable[[list[Call]], None]) -> int:
    """Copy valid answers to the same questions from another run's log; returns how many.

    Raises:
        RunDirError: there is no readable log at `path`.
    """
    taken = 0
    with open_calls(path) as other:
        for teacher in teachers:
            for some in pieces(plan.open(teacher.name, together=teacher.decides)):
                known = {call.cell: call for call in other.answers([question.pair["pair_id"] for question in some])}
                rows = [row for question in some for row in _same(teacher, question, known)]
                taken += len(rows)
                keep(rows)
    return taken


def pieces(questions: Iterable[Question]) -> Iterator[list[Question]]:
    """Questions, some at a time."""
    rest = iter(questions)
    while some := list(islice(rest, _AT_ONCE)):
        yield some


def _same(teacher: Teacher, question: Question, known: Mapping[tuple[str, str, str], Call]) -> Iterator[Call]:
    hashed = teacher.request(question).hash
    for variant in question.variants:
        call = known.get((question.pair["pair_id"], teacher.name, variant))
        if call is not None and call.request_hash == hashed and teacher.is_same(call.served_model):
            yield replace(call, origin="reused", attempt=question.asked + 1)
