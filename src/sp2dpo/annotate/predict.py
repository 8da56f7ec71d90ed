"""An annotator of kind `distilled`: a local predictor answers, offline and at no cost, the same under every prompt.

Its question is the pair and the hash of the predictor, since it reads no rubric: under all variants it is one voice.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from sp2dpo.annotate.plan import Plan, Question
from sp2dpo.annotate.replay import pieces
from sp2dpo.annotate.teacher import body_of, request_hash
from sp2dpo.calls import Call
from sp2dpo.hashing import canonical_json
from sp2dpo.predictor import Predictor, load_predictor
from sp2dpo.predictor.model import ABOUT, WEIGHTS
from sp2dpo.reply import parse_reply
from sp2dpo.runs import Run
from sp2dpo.settings import Annotator
from sp2dpo.tables import write_atomic

__all__ = ["Predictions", "Recomputed"]

_ENDPOINT: Final = "local"


def _pinned(run: Run, name: str) -> str:
    return str(run.process.resolved["pins"]["predictors"][name])


def _kept(run: Run, name: str) -> Path:
    """The copy of a predictor in the run directory, for those who verify it elsewhere."""
    return run.path / "predictors" / name


class Predictions:
    """The answers of one predictor.

    Raises:
        ProcessError: its files are missing, or are not those that λ pins.
    """

    def __init__(self, run: Run, annotator: Annotator) -> None:
        self.annotator, self.name = annotator, annotator.name
        self._pack = run.process.pack
        folder = run.process.base / annotator.model
        self._predictor = load_predictor(folder, _pinned(run, self.name))
        for file in (ABOUT, WEIGHTS):
            write_atomic(_kept(run, self.name) / file, partial(shutil.copyfile, folder / file))
        self.fitted_on = 0

    @property
    def note(self) -> str:
        """What is to be known before its answers are used."""
        statement = self._predictor.about["held_out"]["statement"]
        learnt = f"; it was fitted on {self.fitted_on:,} of the pairs that it answered now" if self.fitted_on else ""
        return f"annotator '{self.name}' is a predictor{learnt}. {statement}"

    def rows(self, plan: Plan) -> Iterator[list[Call]]:
        """The answers to all open questions, some at a time; `fitted_on` counts the pairs that it learnt from."""
        for some in pieces(plan.open(self.name, together=True)):
            texts = self._predictor.answers([question.pair for question in some])
            self.fitted_on += sum(self._predictor.knows(question.pair["pair_id"]) for question in some)
            yield [row for question, text in zip(some, texts, strict=True) for row in self._rows(question, text)]

    def _rows(self, question: Question, text: str) -> Iterator[Call]:
        gap = parse_reply(text).gap
        assert gap is not None
        sent = _params_sent(self._predictor)
        _, body = body_of(
            "distilled", self.annotator.model, self._pack, question.pair, question.variants, json.loads(sent)
        )
        for variant in question.variants:
            yield Call(
                pair_id=question.pair["pair_id"],
                annotator=self.name,
                variant=variant,
                attempt=question.asked + 1,
                origin="predicted",
                requested_model=self.annotator.model,
                served_model=self._predictor.name,
                endpoint=_ENDPOINT,
                request_hash=request_hash(_ENDPOINT, body),
                params_requested="{}",
                params_sent=sent,
                started_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
                latency_s=0.0,
                http_status=None,
                finish_reason=None,
                outcome="ok",
                mends="[]",
                raw_text=text,
                category=gap.category,
                magnitude=gap.magnitude,
                confidence=gap.confidence,
                prompt_tokens=None,
                completion_tokens=None,
                cost_usd=None,
                system_fingerprint=None,
                error=None,
                kind="distilled",
            )


class Recomputed:
    """What the predictors of a run must have answered, made again from the copies in the run directory.

    Raises:
        ProcessError: a predictor is missing from the run directory, or is not the one that λ pins.
    """

    def __init__(self, run: Run) -> None:
        pins: Mapping[str, str] = run.process.resolved["pins"].get("predictors", {})
        self._predictors = {name: load_predictor(_kept(run, name), sha) for name, sha in pins.items()}
        self._last: tuple[str, str, str] = "", "", ""

    def facts(self, call: Call, pair: Mapping[str, Any]) -> Iterator[tuple[str, object, object]]:
        """Column, what the log says and what it must say, for a call of a predictor; nothing for any other.

        The answer itself is made again only if it is the same on every machine; from embeddings it is not quite.
        """
        predictor = self._predictors.get(call.annotator)
        if predictor is None:
            return
        yield "kind", call.kind, "distilled"
        yield "origin", call.origin, "predicted"
        yield "endpoint", call.endpoint, _ENDPOINT
        yield "params_sent", call.params_sent, _params_sent(predictor)
        yield "served_model", call.served_model, predictor.name
        if predictor.exact:
            yield "raw_text", call.raw_text, self._answer(call, predictor, pair)

    def _answer(self, call: Call, predictor: Predictor, pair: Mapping[str, Any]) -> str:
        """Once for all variants, which follow each other in the log."""
        if self._last[:2] != (call.annotator, call.pair_id):
            self._last = call.annotator, call.pair_id, predictor.answers([pair])[0]
        return self._last[2]


def _params_sent(predictor: Predictor) -> str:
    return canonical_json({"sha256": predictor.sha256})
