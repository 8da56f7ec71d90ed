"""A run directory of the paper's size with invented pairs and judgements: 61,023 pairs × 3 annotators × 3 prompts.

    python benchmarks/big_run.py FOLDER [--pairs N]

Made by the code that makes real ones: `prepare` reads a source, each question is rendered and hashed, a response is
read and validated, and the rows go through the ledger. Only the endpoint is missing. Seeded; as many rows are dropped,
and as many pairs are left without a full set of answers, as in table 9 of the paper.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from sp2dpo.annotate.account import Account, write_account
from sp2dpo.annotate.plan import Plan, Question
from sp2dpo.annotate.teacher import Teacher
from sp2dpo.calls import Call, open_ledger
from sp2dpo.llm import Raw
from sp2dpo.process import load_process
from sp2dpo.reply import KEYS
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import Run, open_run
from sp2dpo.stages import prepare_run, schedule_run

__all__ = ["PAIRS", "make_big_run"]

PAIRS: Final = 61_023
VARIANTS: Final = ("v1", "v2", "v3")
_DUPLICATES: Final = 11 / PAIRS
_EMPTY: Final = 101 / PAIRS
_INCOMPLETE: Final = 1_063 / PAIRS

_ANNOTATORS: Final = (
    {
        "name": "qwen",
        "model": "qwen-max-2025-01-25",
        "base_url": "https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
        "price": {"input": 1.6, "output": 6.4, "as_of": "2025-04-22"},
    },
    {
        "name": "openai",
        "model": "gpt-5-mini-2025-08-07",
        "base_url": "https://api.openai.com/v1",
        "price": {"input": 0.25, "output": 2.0, "as_of": "2026-11-20"},
    },
    {
        "name": "gemini",
        "model": "gemini-2.0-flash",
        "base_url": "https://generativelanguage.googleapis.com/v1beta/openai",
        "price": {"input": 0.1, "output": 0.4, "as_of": "2025-02-05"},
    },
)
_SOURCES: Final = ("evol_instruct", "false_qa", "flan_v2", "sharegpt", "truthful_qa", "ultrachat")
_SYLLABLES: Final = (
    "ba",
    "con",
    "der",
    "el",
    "fi",
    "gen",
    "ha",
    "in",
    "ka",
    "lo",
    "mer",
    "no",
    "or",
    "per",
    "ra",
    "ti",
)
_BEGAN: Final = datetime(2026, 11, 1, tzinfo=UTC)
_FAILED: Final = ("timeout", "truncated", "filtered", "no_object", "server_error")
_ATTEMPTS: Final = 4
_ROWS_AT_ONCE: Final = 4096


def make_big_run(folder: Path, pairs: int = PAIRS) -> Run:
    """A scheduled run of so many pairs in `folder/run`, if it is not there yet; its source is `folder/pairs.jsonl`."""
    process = folder / "process.yaml"
    if process.is_file():
        run = open_run(load_process(process), folder / "run")
        if run.schedule.is_file():
            return run
    folder.mkdir(parents=True, exist_ok=True)
    _write_source(folder / "pairs.jsonl", pairs)
    settings = {
        "name": "big",
        "data": {"source": "pairs.jsonl"},
        "panel": {"variants": list(VARIANTS), "annotators": list(_ANNOTATORS)},
    }
    process.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    run = open_run(load_process(process), folder / "run")
    prepare_run(run)
    _answer(run, pairs)
    schedule_run(run)
    return run


# The source ---------------------------------------------------------------------------------------------------------


def _write_source(path: Path, pairs: int) -> None:
    """Prompts, two replies, scores and the name of a source, with texts as long as those of UltraFeedback."""
    dice = random.Random(0)
    words = [" ".join("".join(dice.choices(_SYLLABLES, k=dice.randint(1, 4))) for _ in range(6)) for _ in range(3000)]
    duplicates, empty = round(_DUPLICATES * pairs), round(_EMPTY * pairs)
    with path.open("w", encoding="utf-8") as lines:
        for n in range(pairs):
            lines.write(json.dumps(_source_row(dice, words, n)) + "\n")
        for n in range(duplicates):
            lines.write(json.dumps(_source_row(dice, words, n)) + "\n")
        for n in range(empty):
            lines.write(json.dumps(_source_row(dice, words, pairs + n) | {"chosen": " "}) + "\n")


def _source_row(dice: random.Random, words: Sequence[str], n: int) -> dict[str, Any]:
    better, worse = sorted((round(dice.triangular(1, 10, 7), 1) for _ in range(2)), reverse=True)
    return {
        "prompt_id": f"{n:06d}",
        "source": dice.choice(_SOURCES),
        "prompt": _text(dice, words, 450),
        "chosen": _text(dice, words, 1100),
        "rejected": _text(dice, words, 950),
        "score_chosen": better,
        "score_rejected": worse,
    }


def _text(dice: random.Random, words: Sequence[str], characters: int) -> str:
    """Sentences of invented words; lengths are log-normal around `characters`, 40 at least and 12,000 at most."""
    length = min(max(int(characters * dice.lognormvariate(0, 0.8)), 40), 12_000)
    sentences = [dice.choice(words).capitalize() + "." for _ in range(length // 38 + 1)]
    return " ".join(sentences)[:length].rstrip()


# The answers --------------------------------------------------------------------------------------------------------


class _Judgements:
    """What each call says: a gap of the pair, seen through an annotator and a prompt that lean one way and err."""

    def __init__(self, pairs: int) -> None:
        dice = np.random.default_rng(0)
        shape = (pairs, len(_ANNOTATORS), len(VARIANTS))
        meant = dice.choice(len(CATEGORIES), pairs, p=(0.04, 0.22, 0.2, 0.12, 0.34, 0.08))
        other = dice.choice(len(CATEGORIES), shape, p=(0.02, 0.18, 0.2, 0.15, 0.35, 0.1))
        self.category = np.where(dice.random(shape) < 0.7, meant[:, None, None], other)
        self.magnitude = self._numbers(dice, shape, dice.beta(2, 2, pairs), np.array([0.06, 0.0, -0.05]))
        self.confidence = self._numbers(dice, shape, dice.beta(6, 2, pairs), np.array([0.02, 0.05, -0.04]))
        self.dress = dice.random(shape)
        self.first_fails = dice.random(shape) < 0.01
        self.failure = dice.integers(len(_FAILED), size=shape)
        self.never = np.zeros(shape, bool)
        for i in dice.choice(pairs, round(_INCOMPLETE * pairs), replace=False):
            self.never[i, dice.integers(shape[1]), dice.integers(shape[2])] = True

    @staticmethod
    def _numbers(dice: np.random.Generator, shape: tuple[int, ...], of_pair: Any, lean_j: Any) -> NDArray[np.float64]:
        noise = dice.normal(0, 0.08, shape) + dice.normal(0, 0.06, shape[:2])[:, :, None]
        numbers: NDArray[np.float64] = np.clip(of_pair[:, None, None] + lean_j[:, None] + noise, 0, 1).round(2)
        return numbers

    def text(self, at: tuple[int, int, int]) -> str:
        """As a model writes it: bare mostly, sometimes in a fence, after a word, or with a number as a text."""
        category, dress = CATEGORIES[self.category[at]], self.dress[at]
        magnitude, confidence = float(self.magnitude[at]), float(self.confidence[at])
        shown: Any = str(magnitude) if 0.045 <= dress < 0.05 else magnitude
        said = json.dumps(dict(zip(KEYS, (category, shown, confidence), strict=True)))
        return f"```json\n{said}\n```" if dress < 0.03 else f"Here it is: {said}" if dress < 0.045 else said


def _answer(run: Run, pairs: int) -> None:
    panel = run.process.settings.panel
    teachers = [Teacher(run, annotator) for annotator in panel.annotators]
    with open_ledger(run.calls) as ledger:
        rows = _rows(run, teachers, _Judgements(pairs))
        while some := list(islice(rows, _ROWS_AT_ONCE)):
            ledger.append(*some)
        account = Account()
        account.settle(Plan(run.pairs, ledger, [one.name for one in teachers], panel.variants).standing())
        write_account(run, ledger, account)


def _rows(run: Run, teachers: Sequence[Teacher], judgements: _Judgements) -> Iterator[Call]:
    """Every attempt at every question, in the order of the pairs."""
    with pq.ParquetFile(run.pairs) as file:
        batches = file.iter_batches(256, columns=["pair_id", "prompt", "chosen", "rejected"])
        pairs = (pair for batch in batches for pair in batch.to_pylist())
        for i, pair in enumerate(pairs):
            for j, teacher in enumerate(teachers):
                for k, variant in enumerate(VARIANTS):
                    yield from _attempts(teacher, Question(pair, teacher.name, (variant,), 0), judgements, (i, j, k))


def _attempts(teacher: Teacher, question: Question, judgements: _Judgements, at: tuple[int, int, int]) -> list[Call]:
    request = teacher.request(question)
    failures = _ATTEMPTS if judgements.never[at] else int(judgements.first_fails[at])
    tokens = len(request.body["messages"][0]["content"] + request.body["messages"][1]["content"]) // 4
    rows: list[Call] = []
    for attempt in range(1, failures + (not judgements.never[at]) + 1):
        kind = _FAILED[judgements.failure[at]] if attempt <= failures else ""
        raw = _response(teacher, kind, judgements.text(at), tokens)
        started = _BEGAN + timedelta(seconds=at[0] * 2 + 3 * attempt)
        rows += teacher.rows(request, raw, attempt=attempt, started=started, transport="sync")
    return rows


def _response(teacher: Teacher, failure: str, text: str, tokens: int) -> Raw:
    """What the endpoint would have sent."""
    if failure == "timeout":
        return Raw(failure="timeout", error="no answer within 180 s", latency_s=180.0)
    if failure == "server_error":
        return Raw(status=503, body="busy", latency_s=0.3)
    finish = {"truncated": "length", "filtered": "content_filter"}.get(failure, "stop")
    content = "I cannot say." if failure == "no_object" else text[:20] if failure else text
    body = {
        "model": teacher.annotator.model,
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content}}],
        "usage": {"prompt_tokens": tokens, "completion_tokens": 38},
    }
    return Raw(status=200, body=json.dumps(body), latency_s=0.8, request_id=f"req-{tokens}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make a run directory of the paper's size.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    args = parser.parse_args()
    print(make_big_run(args.folder, args.pairs).path)
