"""The call log of a whole panel: reading it takes no more memory than that of a small one, and indexes are used."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any, Final

import pytest

from sp2dpo.calls import Call, CallLog, open_calls, open_ledger

PANEL: Final = (("qwen", "openai", "gemini"), ("v1", "v2", "v3"))
SLACK_MIB: Final = 10
"""More than what SQLite and Python keep for themselves, and less than half of what 30,000 calls take in memory."""


def pair_ids(start: int, stop: int) -> list[str]:
    return [hashlib.sha256(str(n).encode()).hexdigest() for n in range(start, stop)]


def calls(pairs: int) -> Iterator[Call]:
    """Nine answers for each pair, some of them after a timeout, and some questions without an answer."""
    text = '{"semantic_gap_category": "Style", "semantic_gap_magnitude": 0.5, "semantic_gap_confidence": 0.4}'
    sent = '{"max_tokens":64,"response_format":{"type":"json_object"},"seed":42,"temperature":0.1}' + " " * 200
    for n, (pair, annotator, variant) in enumerate(product(pair_ids(0, pairs), *PANEL)):
        asked = (pair, annotator, variant, 1, "live", "m", "m-1", "https://a/v1", "0" * 64, sent, sent, "2026-01-01")
        if n % 50 == 0:
            failed = ("timeout", "[]", None, None, None, None, None, None, None, None, "no answer within 180 s")
            yield Call(*asked, 180.0, None, None, *failed)
        if n % 100:
            yield Call(*asked, 0.5, 200, "stop", "ok", "[]", text, "Style", 0.5, 0.4, 900, 40, 1e-5, None, None)


def fill(path: Path, pairs: int) -> Path:
    rows = calls(pairs)
    with open_ledger(path) as ledger:
        while some := list(islice(rows, 2000)):
            ledger.append(*some)
    return path


READINGS: dict[str, Callable[[CallLog, int], Any]] = {
    "rows": lambda log, _: sum(1 for _ in log),
    "answers": lambda log, _: sum(1 for _ in log.answers()),
    "failures": lambda log, _: sum(1 for _ in log.failures()),
    "state": lambda log, pairs: sum(len(log.state(pair_ids(n, min(n + 300, pairs)))) for n in range(0, pairs, 300)),
    "counts": lambda log, _: sum(count.attempts for count in log.counts()),
    "hash": lambda log, _: log.recomputed_hash() == log.content_hash(),
}


def grown_mib(path: Path, pairs: int, reading: str, opened: str = "open_calls") -> float:
    """By how much the peak of the memory of a process grows when it reads a log in one way."""
    command = [sys.executable, __file__, str(path), str(pairs), reading, opened]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return float(ran.stdout)


def measure(path: Path, pairs: int, reading: str, opened: str) -> float:
    """The same in this process."""
    with {"open_calls": open_calls, "open_ledger": open_ledger}[opened](path) as log:
        before = peak_mib()
        (READINGS | {"held": lambda log, _: list(log)})[reading](log, pairs)
        return peak_mib() - before


def peak_mib() -> float:
    """Of this process; `getrusage` would begin with the peak of the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30,000 questions."""
    return fill(tmp_path_factory.mktemp("scale") / "calls.sqlite", 30_000 // 9)


@pytest.mark.parametrize("reading", READINGS)
def test_reading_30_000_calls_takes_hardly_any_memory(path: Path, reading: str) -> None:
    assert grown_mib(path, 30_000 // 9, reading) < SLACK_MIB


def test_the_measure_sees_a_log_that_is_held_in_memory(path: Path) -> None:
    assert grown_mib(path, 30_000 // 9, "held") > 2 * SLACK_MIB


@pytest.mark.parametrize(
    ("ask", "index"),
    [
        (lambda log: log.state(["p", "q"]), "SEARCH calls USING COVERING INDEX calls_by_cell (pair_id=?)"),
        (lambda log: list(log.answers(["p"])), "SEARCH calls USING INDEX calls_by_cell (pair_id=?)"),
        (lambda log: list(log.answers()), "SCAN calls USING INDEX calls_by_cell"),
        (lambda log: list(log.failures()), "SCAN calls USING INDEX calls_by_cell"),
        (lambda log: log.content_hash(), "SCAN calls"),
    ],
)
def test_no_question_to_the_log_sorts_or_searches_without_an_index(
    path: Path, ask: Callable[[CallLog], Any], index: str
) -> None:
    with open_calls(path) as log:
        asked: list[str] = []
        log._db.set_trace_callback(asked.append)
        ask(log)
        log._db.set_trace_callback(None)
        plan = [step[3] for step in log._db.execute(f"EXPLAIN QUERY PLAN {asked[0]}")]
    assert index in plan
    assert not [step for step in plan if "TEMP B-TREE" in step]


@pytest.mark.slow
@pytest.mark.parametrize("opened", ["open_calls", "open_ledger"])
def test_a_whole_panel_takes_no_more_memory_than_a_part_of_it(tmp_path: Path, opened: str) -> None:
    """61,023 pairs × 3 annotators × 3 prompts."""
    path = fill(tmp_path / "calls.sqlite", 61_023)
    assert {name: grown_mib(path, 61_023, name, opened) < SLACK_MIB for name in READINGS} == dict.fromkeys(
        READINGS, True
    )


if __name__ == "__main__":
    print(measure(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
