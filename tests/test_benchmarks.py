"""The benchmark of annotation runs, and what it says of answers and requests holds at any speed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def measured(name: str) -> list[dict[str, str]]:
    """The table that a measurement prints, a row for each line."""
    command = [sys.executable, str(ROOT / "benchmarks" / "annotate.py"), "--quick", "--only", name]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    head, _, *lines = (re.split(r" ?\| ?", line)[1:-1] for line in printed.splitlines() if line.startswith("|"))
    return [dict(zip(head, line, strict=True)) for line in lines]


@pytest.mark.slow
def test_every_answer_is_got_with_the_requests_of_an_ideal_client_and_none_is_wrong() -> None:
    sp2dpo = measured("faults")[-1]
    assert (sp2dpo["client"], sp2dpo["answers"], sp2dpo["wrong answers"]) == ("sp2dpo", "54 of 54", "0")
    assert sp2dpo["requests"] == sp2dpo["ideal requests"]


@pytest.mark.slow
def test_after_kills_nothing_answered_is_asked_again() -> None:
    row = measured("kills")[0]
    assert (row["answers"], row["answered, asked again"]) == ("540 of 540", "0")
    assert int(row["kills"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["throughput", "limits", "restart"])
def test_a_measurement_runs(name: str) -> None:
    assert all(row for row in measured(name))
