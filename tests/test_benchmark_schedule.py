"""The benchmark of schedules runs, on a run of invented judgements that verifies."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_every_measurement_runs_and_bare_numpy_reads_the_answers_that_there_are(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "schedule.py"), "--pairs", "200", "--cache", str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    notes = [re.split(r" ?\| ?", line)[-2] for line in printed.splitlines() if line.startswith("|")][2:]
    assert notes[0].startswith("1,797 answers")
    assert notes[2].startswith("schedule 197 β from the log; with 3 excluded")
    assert not [note for note in notes if "failed" in note]
