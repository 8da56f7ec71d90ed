"""The arrows from a process to a verified schedule. Each reads files of the run directory and writes files there.

A stage whose manifest names the same inputs and the same λ is already done and is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from sp2dpo.calls import CallLog, open_calls, open_ledger
from sp2dpo.checklist import SOURCE_COLUMN, LogCounts, checklist
from sp2dpo.errors import RunDirError, Unfinished
from sp2dpo.gaps import gaps_table
from sp2dpo.hashing import sha256_file
from sp2dpo.pairs import prepare, read_pairs, write_prepared
from sp2dpo.pairs.store import DROPPED_SCHEMA, dropped_path
from sp2dpo.runs import Run
from sp2dpo.schedule import EXCLUDED_SCHEMA, excluded_table, schedule_table
from sp2dpo.tables import (
    amend_manifest,
    is_current,
    read_manifest,
    read_table,
    write_csv,
    write_manifest,
    write_table,
)

__all__ = [
    "Scheduled",
    "build_schedule",
    "checklist_of",
    "prepare_run",
    "read_dropped",
    "read_excluded",
    "read_schedule",
    "schedule_run",
]


def prepare_run(run: Run) -> Mapping[str, Any]:
    """Source → pairs.parquet. Returns the manifest, with the table of counts."""
    inputs = {"source": run.process.resolved["pins"]["data"]}
    if not is_current(run.pairs, inputs=inputs, lambda_hash=run.process.lambda_hash):
        prepared = prepare(run.process.settings.data, run.process.base)
        write_prepared(prepared, run.pairs, inputs=inputs, lambda_hash=run.process.lambda_hash)
    manifest = read_manifest(run.pairs)
    assert manifest is not None
    return manifest


def read_dropped(run: Run) -> pa.Table:
    """Rows that `prepare` dropped."""
    return _read_csv(dropped_path(run.pairs), DROPPED_SCHEMA, run.command("annotate"))


def read_schedule(run: Run) -> pa.Table:
    """The schedule of a run."""
    return read_table(run.schedule, run.command("schedule"))


def read_excluded(run: Run) -> pa.Table:
    """Rows of the source that are not in the schedule."""
    return _read_csv(run.excluded, EXCLUDED_SCHEMA, run.command("schedule"))


def _read_csv(path: Path, schema: pa.Schema, made_by: str) -> pa.Table:
    if not path.is_file():
        raise RunDirError(f"{path} is missing; make it with: {made_by}")
    types = dict(zip(schema.names, schema.types, strict=True))
    return pa.csv.read_csv(path, convert_options=pa.csv.ConvertOptions(column_types=types, strings_can_be_null=True))


OpenLog = Callable[[Path], AbstractContextManager[CallLog]]


@dataclass(frozen=True)
class Scheduled:
    """What the call log amounts to; `pairs` without their texts."""

    pairs: pa.Table
    gaps: pa.Table
    schedule: pa.Table
    excluded: pa.Table
    log: LogCounts
    kinds: Mapping[str, str]


def build_schedule(run: Run, open_log: OpenLog = open_calls) -> Scheduled:
    """Call log → gaps → schedule and excluded, in memory; writes nothing."""
    settings = run.process.settings
    annotators, variants = [a.name for a in settings.panel.annotators], settings.panel.variants
    pairs = _names_of_pairs(run)
    gaps, counts = _read_log(run.calls, open_log)
    schedule = schedule_table(pairs, gaps, annotators, variants, settings.schedule)
    excluded = excluded_table(pairs, read_dropped(run), gaps, schedule, counts.failures, annotators, variants)
    return Scheduled(pairs, gaps, schedule, excluded, counts, {a.name: a.kind for a in settings.panel.annotators})


def _names_of_pairs(run: Run) -> pa.Table:
    """Pairs without their texts; all of them are read only to say what is wrong with a file."""
    made_by, needed = run.command("annotate"), ("pair_id", "prompt_id")
    pairs = read_table(run.pairs, made_by, columns=(*needed, "source_row", SOURCE_COLUMN))
    fit = [name in pairs.column_names and pairs[name].type == pa.string() for name in needed]
    return pairs if all(fit) and not any(pairs[name].null_count for name in needed) else read_pairs(run.pairs, made_by)


def _read_log(path: Path, open_log: OpenLog) -> tuple[pa.Table, LogCounts]:
    """The gaps, and beside them what SQLite counts without Python, of the log as it is at one time."""
    with open_log(path) as log, ThreadPoolExecutor(1) as beside:
        counting = beside.submit(_count_again, path, open_log)
        gaps, content = gaps_table(log), log.content_hash()
        counts = counting.result()
        return gaps, counts if counts.content == content else _count(log)


def _count_again(path: Path, open_log: OpenLog) -> LogCounts:
    with open_log(path) as log:
        return _count(log)


def _count(log: CallLog) -> LogCounts:
    failures = {call.cell: call.outcome for call in log.failures()}
    return LogCounts(log.content_hash(), log.attempts(), log.asked(), failures)


def checklist_of(run: Run, made: Scheduled, files: Mapping[str, str]) -> dict[str, Any]:
    """The checklist of a schedule whose files have these hashes.

    Raises:
        RunDirError: the pairs have no manifest.
    """
    prepared = read_manifest(run.pairs)
    if prepared is None:
        raise RunDirError(f"{run.pairs} has no manifest; make it with: {run.command('annotate')}")
    return checklist(run.process, prepared, made.log, made.pairs, made.gaps, made.schedule, files)


def schedule_run(run: Run) -> Scheduled:
    """Call log → gaps.parquet → schedule.parquet, schedule.csv, excluded.csv, each with its manifest."""
    made = build_schedule(run)
    csv, lam = run.schedule.with_suffix(".csv"), run.process.lambda_hash
    with ThreadPoolExecutor() as pool:
        writes = (write_table, write_table, write_csv, write_csv)
        paths, tables = (run.gaps, run.schedule, csv, run.excluded), (made.gaps, *[made.schedule] * 2, made.excluded)
        list(pool.map(lambda write, path, table: write(path, table), writes, paths, tables))
        pairs, *hashes = pool.map(sha256_file, (run.pairs, *paths))
    files = dict(zip([path.name for path in paths], hashes, strict=True))
    gaps = files.pop(run.gaps.name)
    write_manifest(
        run.gaps,
        files={run.gaps.name: gaps},
        inputs={run.pairs.name: pairs, run.calls.name: made.log.content},
        lambda_hash=lam,
        rows=made.gaps.num_rows,
    )
    write_manifest(
        run.schedule,
        files=files,
        inputs={run.pairs.name: pairs, run.gaps.name: gaps, run.calls.name: made.log.content},
        lambda_hash=lam,
        counts={"scheduled": made.schedule.num_rows, "excluded": made.excluded.num_rows},
        kinds=dict(made.kinds),
        checklist=checklist_of(run, made, files),
    )
    _renew_older(run)
    return made


def _renew_older(run: Run) -> None:
    """Give manifests of an older version their own hash, if they describe the files as they are."""
    calls = read_manifest(run.calls)
    if calls is not None and not calls["files"]:
        with suppress(RunDirError, Unfinished), open_ledger(run.calls):
            pass
    for path in sorted(run.path.rglob("*.manifest.json")):
        artifact = path.with_name(path.name.removesuffix(".manifest.json"))
        manifest = read_manifest(artifact) or {}
        files = {path.parent / name: sha for name, sha in manifest.get("files", {}).items()}
        if "self" not in manifest and all(file.is_file() and sha256_file(file) == sha for file, sha in files.items()):
            amend_manifest(artifact, manifest)
