"""Recompute every hash, gap and β of a run from its call log, and name the first difference. J.4.

Reads only, and leaves no trace: a run directory can be verified where nothing can be written.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sp2dpo.errors import InputError, RunDirError, Unfinished
from sp2dpo.runs import dump, read_run
from sp2dpo.verify.calls import check_calls
from sp2dpo.verify.files import Manifests, same
from sp2dpo.verify.schedule import check_pairs, check_schedule

__all__ = ["verify"]


def verify(run_dir: Path, *, workers: int | None = 1) -> Iterator[str]:
    """Yield one line for each thing that was recomputed and found equal, and one for files that nothing describes.

    Args:
        workers: processes that read a long call log; None: one for each CPU, at most four.

    Raises:
        Unfinished: the first difference, with the file, row and column; or a file is missing or unreadable.
        RunDirError: not a run directory.
    """
    if not (run_dir / "process.yaml").is_file():
        raise RunDirError(f"{run_dir} is no run directory: it has no process.yaml")
    try:
        yield from _checks(run_dir, workers)
    except InputError as error:
        raise Unfinished(str(error)) from error


def _checks(run_dir: Path, workers: int | None) -> Iterator[str]:
    run = read_run(run_dir)
    same("process.yaml", "content", (run_dir / "process.yaml").read_bytes(), dump(run.process).encode())
    yield f"process   λ {run.process.lambda_hash}"
    for name, sha in run.process.resolved["pins"]["prompts"].items():
        same(f"prompts/{name}.txt", "sha256 in λ", sha, run.process.pack.hashes[name])
    yield f"prompts   {len(run.process.pack.hashes)} files as pinned in λ"
    manifests = Manifests(run)
    yield manifests.check()
    yield check_pairs(run)
    yield check_calls(run, workers)
    yield check_schedule(run)
    yield from manifests.remarks()
