"""The benchmark of training and the checks on a GPU run, small and without one; nothing here holds a time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

PARTS = {
    "step": ["TRL, random batches", "TRL again (A/A control)", "TRL, batches grouped by length", "sp2dpo, padded"],
    "overhead": ["TRL again (A/A control)", "sp2dpo, padded"],
    "end-to-end": ["TRL, random batches", "sp2dpo, shared layout", "sp2dpo, another β, reference cached"],
    "memory": ["TRL, random batches", "TRL, batches grouped by length", "sp2dpo, shared layout"],
}


def measured(part: str) -> tuple[list[dict[str, str]], list[str]]:
    """The rows of the table that a part prints, and the lines below it."""
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step.py"), "--quick", "--part", part]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    head, _, *lines = (re.split(r" ?\| ?", line)[1:-1] for line in printed if line.startswith("|"))
    return [dict(zip(head, line, strict=True)) for line in lines], [line for line in printed if line.startswith("- ")]


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_a_part_prints_a_row_for_each_variant_and_says_of_each_target_whether_it_is_reached(part: str) -> None:
    rows, notes = measured(part)
    named = [value for row in rows for value in row.values()]
    assert [name for name in PARTS[part] if name not in named] == []
    wanted = [note for note in notes if "wanted" in note]
    assert wanted
    assert all(re.search(r": \d+\.\d\d, wanted .+: (reached|NOT reached)$", note) for note in wanted)


@pytest.mark.slow
def test_losses_end_to_end_are_those_of_trl() -> None:
    _, notes = measured("end-to-end")
    off = [float(note.rsplit(" ", 1)[1]) for note in notes if "relative difference" in note]
    assert off
    assert max(off) < 1e-4


@pytest.mark.parametrize("batch", [4, 8])
def test_a_sample_has_the_padding_of_the_whole(batch: int) -> None:
    from train_work import make_sample, token_law

    sample = make_sample(batch, 6)
    assert sorted(row for rows in sample.random for row in rows) == list(range(6 * batch))
    assert sorted(row for rows in sample.grouped for row in rows) == list(range(6 * batch))
    np.testing.assert_allclose(sample.ratios(), token_law(batch), rtol=0.1)


def test_lengths_are_like_the_published_ones_of_ultrafeedback() -> None:
    from train_work import draw_lengths

    prompt, chosen, rejected = draw_lengths(60_000, seed=0).T
    assert np.median(prompt + chosen) == pytest.approx(409, rel=0.05)
    assert np.median(prompt / chosen) == pytest.approx(0.42, rel=0.05)
    assert (prompt + np.maximum(chosen, rejected)).max() <= 2048


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_to_its_end_without_one(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    checks = {check["check"] for check in found["checks"]}
    assert checks == {"attention", "exact", "fallback", "launch", "optimizer", "qlora"}
    assert {check["state"] for check in found["checks"]} <= {"ok", "skipped"}
    assert [row["variant"] for row in found["times"]].count("sp2dpo, shared layout") == 2
    assert (tmp_path / "gpu.md").read_text().startswith("no GPU: a rehearsal")
