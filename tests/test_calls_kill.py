"""A writer is killed at random moments: every row that it reported durable is there, whole and in its chain."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from sp2dpo.calls import Call, Ledger, open_calls, open_ledger

KILLS = 25
WORKERS = 8
TOGETHER = ("v1", "v2", "v3")


def calls(name: str) -> list[Call]:
    """Rows that are added together."""
    rest = (1, "live", "m", "m", "e", "00", "{}", "{}", "2026-01-01", 0.5, 200, "stop", "ok", "[]", "text " * 50)
    values = ("Style", 0.5, 0.5, 10, 5, 1e-6, None, None)
    return [Call(name, "a", variant, *rest, *values) for variant in TOGETHER]


async def work(ledger: Ledger, start: str, worker: int) -> None:
    n = 0
    while True:
        name = f"{start}-{worker}-{n}"
        await ledger.add(*calls(name))
        print(name, flush=True)
        n += 1


async def write_until_killed(path: Path, start: str) -> None:
    with open_ledger(path) as ledger:
        await asyncio.gather(*(work(ledger, start, worker) for worker in range(WORKERS)))


def killed_after(path: Path, start: int, seconds: float) -> set[str]:
    """Names of what a writer reported durable before it was killed, so long after its first word or its start."""
    command = [sys.executable, __file__, str(path), str(start)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = process.stdout.readline() if start % 5 else ""
        time.sleep(seconds)
        process.kill()
        rest = process.stdout.read()
        assert process.wait(60) == -signal.SIGKILL
    lines = (first + rest).splitlines(keepends=True)
    return {line.strip() for line in lines if line.endswith("\n")}


def test_a_kill_at_any_moment_loses_no_row_that_was_reported_durable(tmp_path: Path) -> None:
    path, moments = tmp_path / "calls.sqlite", random.Random()
    durable: set[str] = set()
    for start in range(KILLS):
        durable |= killed_after(path, start, moments.uniform(0.0, 0.2 if start % 5 == 0 else 0.05))
        if not durable:
            continue
        with open_calls(path) as log:
            names = [call.pair_id for call in log]
            assert durable <= set(names)
            assert len(names) == len(TOGETHER) * len(set(names)), "rows of one call were torn apart"
            assert log.recomputed_hash() == log.content_hash()
    with open_ledger(path) as ledger:
        ledger.append(*calls("after all"))
        assert ledger.recomputed_hash() == ledger.content_hash()
    assert len(durable) > 100 * KILLS // 5


if __name__ == "__main__":
    asyncio.run(write_until_killed(Path(sys.argv[1]), sys.argv[2]))
