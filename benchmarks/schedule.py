"""From a full call log to a verified schedule and a report, beside bare numpy. One command, five minutes:

    python benchmarks/schedule.py [--pairs N] [--cache FOLDER] [--write]

The run is made once by `big_run.py` and kept in the cache folder; what it amounts to is made again in each measurement,
which is a process of its own. `--write` puts the table into docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

from big_run import PAIRS, make_big_run
from pages import ROOT, Row, table, where, write

CACHE: Final = Path(tempfile.gettempdir()) / "sp2dpo-benchmark"
READ: Final = "pair_id, annotator, variant, magnitude, confidence"


def bare(run_dir: Path) -> str:
    """What a user would write: the columns of the answers into an array, median, mean, line; nothing is written."""
    with closing(sqlite3.connect(f"{(run_dir / 'calls.sqlite').as_uri()}?mode=ro", uri=True)) as db:
        rows = db.execute(f"SELECT {READ} FROM calls WHERE outcome IN ('ok', 'repaired')").fetchall()
    axes: tuple[dict[str, int], ...] = ({}, {}, {})
    at = [[axis.setdefault(name, len(axis)) for axis, name in zip(axes, row, strict=False)] for row in rows]
    magnitude, confidence = np.array([row[3:] for row in rows]).T
    gap_ijk = np.full([len(axis) for axis in axes], np.nan)
    gap_ijk[tuple(np.array(at).T)] = magnitude * confidence
    beta_ij = 0.03 + 0.27 * np.clip(np.nanmedian(gap_ijk, axis=2), 0, 1)
    return f"{len(rows):,} answers, mean β {np.nanmean(beta_ij, axis=1).mean():.4f}"


def schedule(run_dir: Path) -> str:
    """sp2dpo schedule: each text read again; Parquet, CSV, excluded pairs, checklist and manifests written."""
    return _command("schedule", str(run_dir.parent / "process.yaml"), "--run-dir", str(run_dir))


def verify(run_dir: Path) -> str:
    """sp2dpo verify: every hash, question, answer and β made again."""
    return _command("verify", str(run_dir))


def report(run_dir: Path) -> str:
    """sp2dpo report."""
    said = _command("report", str(run_dir))
    return f"{said} {(run_dir / 'report.html').stat().st_size / 2**20:.1f} MiB"


def _command(*words: str) -> str:
    from sp2dpo.cli import main

    try:
        main(list(words))
    except SystemExit as ended:
        return "" if not ended.code else f"failed: exit code {ended.code}"
    return ""


STEPS: Final[dict[str, tuple[str, Callable[[Path], str]]]] = {
    "bare": ("bare numpy: reads five columns, writes nothing", bare),
    "schedule": ("sp2dpo schedule", schedule),
    "verify": ("sp2dpo verify", verify),
    "report": ("sp2dpo report", report),
}


def _measured(step: str, run_dir: Path) -> tuple[float, float, float, str]:
    """Seconds, CPU seconds, peak MiB of all its processes together, and the last thing that was said."""
    command = [sys.executable, __file__, "--step", step, "--cache", str(run_dir)]
    peak, began = 0, time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        while process.poll() is None:
            peak = max(peak, _resident(process))
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        out.seek(0)
        said = " ".join((out.read().strip().splitlines() or [""])[-1].replace(str(run_dir), "RUN_DIR").split())
    said = said if process.returncode == 0 else f"failed: exit code {process.returncode}"
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, peak / 2**20, said


def _resident(process: psutil.Process) -> int:
    """Bytes in memory of a process and all that it started."""
    total = 0
    with suppress(psutil.Error):
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += one.memory_info().rss
    return total


def measure(cache: Path, pairs: int) -> Iterator[Row]:
    """Each step on a copy of the run; the log and the pairs are read once before, so that none waits for the disk."""
    made = make_big_run(cache / str(pairs), pairs)
    with tempfile.TemporaryDirectory(prefix="sp2dpo-benchmark-", dir=cache) as folder:
        run_dir = Path(folder) / "run"
        shutil.copytree(made.path, run_dir)
        for name in ("process.yaml", "pairs.jsonl"):
            (Path(folder) / name).symlink_to(cache / str(pairs) / name)
        peer = None
        for step, (name, _) in STEPS.items():
            seconds, cpu, peak, said = _measured(step, run_dir)
            peer = peer or seconds
            row: dict[str, Any] = {
                "what": name,
                "seconds": f"{seconds:.1f}",
                "of bare numpy": f"{seconds / peer:.1f} ×",
            }
            yield row | {"CPU s": f"{cpu:.1f}", "peak MiB": f"{peak:.0f}", "note": said}


def main() -> None:
    """Measure, print and perhaps write."""
    parser = argparse.ArgumentParser(description="Measure schedule, verify and report beside bare numpy.")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the run is kept for the next time")
    parser.add_argument("--write", action="store_true", help="into docs/benchmarks.md")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        said = STEPS[args.step][1](args.cache)
        print(f"\n{said}")
        sys.exit("failed" in said)
    text = f"{where('aiohttp', 'openai')}\n\n{table([*measure(args.cache.resolve(), args.pairs)])}"
    print(f"\nschedule: {args.pairs:,} pairs\n\n{text}", flush=True)
    if args.write:
        write(ROOT / "docs" / "benchmarks.md", "schedule", text)


if __name__ == "__main__":
    main()
