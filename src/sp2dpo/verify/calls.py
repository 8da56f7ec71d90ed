"""Every logged call: it was the question that λ and the pair make, and its answer reads as the log says.

A long log is read in stretches by several processes; each link of the chain needs only the one before it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from sp2dpo.annotate.predict import Recomputed
from sp2dpo.annotate.teacher import body_of, request_hash
from sp2dpo.calls import Call, CallLog, open_sealed
from sp2dpo.errors import Unfinished
from sp2dpo.gaps import read_answer
from sp2dpo.hashing import canonical_json, sha256_text
from sp2dpo.llm import FAILURES
from sp2dpo.progress import Progress
from sp2dpo.prompts import render
from sp2dpo.runs import Run, read_run
from sp2dpo.tables import read_table
from sp2dpo.verify.files import check_links, same

__all__ = ["check_calls"]

_AT_ONCE: Final = 4096
_MOST_WORKERS: Final = 4
_WORTH_A_PROCESS: Final = 20_000
"""So many calls take about as long as starting a process."""

_TEXTS: Final = ("prompt", "chosen", "rejected")


def check_calls(run: Run, workers: int | None = 1) -> str:
    """Check the chain of the log, and every call in it.

    Raises:
        Unfinished: the first difference.
    """
    with open_sealed(run.calls) as log:
        last = log.last_id()
    stretches = [(first, min(first + _AT_ONCE - 1, last)) for first in range(1, last + 1, _AT_ONCE)]
    processes = min(_cpus() if workers is None else workers, last // _WORTH_A_PROCESS)
    with Progress("verify calls", last) as progress:
        count = 0
        for checked in _in_order(run, stretches, processes):
            count += checked
            progress.advance(checked)
    return f"calls     {count} attempts: questions rendered again, answers read again"


def _cpus() -> int:
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MOST_WORKERS)


def _in_order(run: Run, stretches: Sequence[tuple[int, int]], processes: int) -> Iterator[int]:
    """How many calls each stretch has, in order, so that the first difference is the first."""
    if processes < 2:
        with _checker(run) as checker:
            yield from map(checker.check, stretches)
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=_begin, initargs=(run.path,)) as pool:
        try:
            yield from pool.map(_check, stretches)
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _checker(run: Run) -> Iterator[_Checker]:
    with open_sealed(run.calls) as log:
        yield _Checker(run, log)


_OPEN: list[Any] = []
"""What a process of the pool has open until it ends."""


def _begin(run_dir: Path) -> None:
    opened = _checker(read_run(run_dir))
    _OPEN[:] = [opened, opened.__enter__()]


def _check(stretch: tuple[int, int]) -> int:
    checked: int = _OPEN[1].check(stretch)
    return checked


class _Checker:
    """Reads a call log beside the pairs that it is about."""

    def __init__(self, run: Run, log: CallLog) -> None:
        self._run, self._log, self._pack = run, log, run.process.pack
        self._annotators = {annotator.name: annotator for annotator in run.process.settings.panel.annotators}
        self._pairs = read_table(run.pairs, "sp2dpo annotate PROCESS.yaml", columns=["pair_id", *_TEXTS])
        self._ids = self._pairs["pair_id"].combine_chunks()
        self._pinned: Mapping[str, Any] = run.process.resolved["pins"].get("sent", {})
        self._predicted = Recomputed(run)

    def check(self, stretch: tuple[int, int]) -> int:
        """Check the rows with these numbers; returns how many there are.

        Raises:
            Unfinished: the first difference.
        """
        rows = list(self._log.stretch(*stretch))
        if self._log.linked:
            check_links(self._log.link_before(stretch[0]), rows)
        calls = [(number, Call(*row)) for number, _, row in rows]
        pairs = self._pairs_of(call.pair_id for _, call in calls)
        questions = _Questions(self._run, pairs)
        for number, call in calls:
            where = f"calls.sqlite, row {number} ({call.annotator}/{call.variant}, pair {call.pair_id[:12]})"
            if call.pair_id not in pairs:
                raise Unfinished(f"{where}: this pair is not in pairs.parquet")
            if call.variant not in self._pack.systems:
                raise Unfinished(f"{where}: the panel of λ has no such variant")
            same(where, "request_hash", call.request_hash, questions.hash_of(where, call))
            self._as_in_the_panel(where, call)
            _reads_as_logged(where, call)
            for what, found, expected in self._predicted.facts(call, pairs[call.pair_id]):
                same(where, what, found, expected)
        return len(calls)

    def _pairs_of(self, pair_ids: Iterable[str]) -> dict[str, Mapping[str, Any]]:
        wanted = pa.array(sorted(set(pair_ids)), pa.string())
        rows = pc.drop_null(pc.index_in(wanted, self._ids))
        return {pair["pair_id"]: pair for pair in self._pairs.take(rows).to_pylist()}

    def _as_in_the_panel(self, where: str, call: Call) -> None:
        """An annotator that is asked, is asked as λ says; a recorded one brings its own model and endpoint along."""
        annotator = self._annotators.get(call.annotator)
        if annotator is None:
            raise Unfinished(f"{where}: the panel of λ has no such annotator")
        if annotator.kind == "recorded":
            return
        same(where, "kind", call.kind, annotator.kind)
        same(where, "requested_model", call.requested_model, annotator.model)
        if annotator.base_url is not None:
            same(where, "endpoint", call.endpoint, annotator.base_url)
        pinned = self._pinned.get(call.annotator)
        if pinned is not None:
            asked = {"variants"} if call.kind == "decisions" else set()
            sent = {name: value for name, value in _sent(call.params_sent).items() if name not in asked}
            same(where, "params_sent", sent, pinned["params"])


class _Questions:
    """Hashes of questions about some pairs; what several have in common is made once."""

    def __init__(self, run: Run, pairs: Mapping[str, Mapping[str, Any]]) -> None:
        self._run, self._pack, self._pairs = run, run.process.pack, pairs
        self._messages = lru_cache(maxsize=None)(self._messages_json)

    def hash_of(self, where: str, call: Call) -> str:
        """The hash of the question, made again from the pair, the panel and what the log says was sent."""
        try:
            sent = _sent(call.params_sent)
        except (ValueError, TypeError) as error:
            raise Unfinished(f"{where}: params_sent is no JSON object") from error
        if call.kind == "chat_json" and not {"model", "messages"} & sent.keys():
            parts = (_json(call.endpoint), _json(call.requested_model), self._messages(call.pair_id, call.variant))
            return sha256_text(f"[{','.join(parts)},{_canonical(call.params_sent)}]")
        if call.kind == "decisions" and self._pack.decisions is None:
            raise Unfinished(f"{where}: the panel of λ asks for no decisions")
        try:
            variants = list(sent["variants"]) if call.kind == "decisions" else [call.variant]
            pair = self._pairs[call.pair_id]
            _, body = body_of(call.kind, call.requested_model, self._pack, pair, variants, sent)
        except (KeyError, TypeError, ValueError) as error:
            raise Unfinished(f"{where}: params_sent does not make a question ({error!r})") from error
        return request_hash(call.endpoint, body)

    def _messages_json(self, pair_id: str, variant: str) -> str:
        pair = self._pairs[pair_id]
        return canonical_json(render(self._pack, variant, *(pair[name] for name in _TEXTS)))


@lru_cache(maxsize=256)
def _json(text: str) -> str:
    return canonical_json(text)


@lru_cache(maxsize=256)
def _sent(params_sent: str) -> dict[str, Any]:
    return dict(json.loads(params_sent))


@lru_cache(maxsize=256)
def _canonical(params_sent: str) -> str:
    return canonical_json(_sent(params_sent))


def _reads_as_logged(where: str, call: Call) -> None:
    if call.outcome in FAILURES:
        return
    parsed = read_answer(call.kind, call.raw_text)
    gap = parsed.gap
    read = (gap.category, gap.magnitude, gap.confidence) if gap else (None, None, None)
    same(where, "judgement", (call.category, call.magnitude, call.confidence), read)
    same(where, "outcome", call.outcome, parsed.problem or ("repaired" if parsed.mends else "ok"))
