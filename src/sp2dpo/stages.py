"""The arrows from a process to a verified schedule. Each reads files of the run directory and writes files there.

A stage whose manifest names the same inputs and the same λ is already done and is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from sp2dpo.calls import open_calls
from sp2dpo.errors import RunDirError
from sp2dpo.gaps import gaps_table
from sp2dpo.hashing import sha256_file
from sp2dpo.pairs import prepare, read_pairs, write_prepared
from sp2dpo.pairs.store import DROPPED_SCHEMA, dropped_path
from sp2dpo.runs import Run
from sp2dpo.schedule import EXCLUDED_SCHEMA, excluded_table, schedule_table
from sp2dpo.tables import is_current, read_manifest, read_table, write_csv, write_manifest, write_table

__all__ = [
    "Scheduled",
    "build_schedule",
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
    return _read_csv(dropped_path(run.pairs), DROPPED_SCHEMA, "sp2dpo annotate PROCESS.yaml")


def read_schedule(run: Run) -> pa.Table:
    """The schedule of a run."""
    return read_table(run.schedule, "sp2dpo schedule PROCESS.yaml")


def read_excluded(run: Run) -> pa.Table:
    """Rows of the source that are not in the schedule."""
    return _read_csv(run.excluded, EXCLUDED_SCHEMA, "sp2dpo schedule PROCESS.yaml")


def _read_csv(path: Path, schema: pa.Schema, made_by: str) -> pa.Table:
    if not path.is_file():
        raise RunDirError(f"{path} is missing; make it with: {made_by}")
    types = dict(zip(schema.names, schema.types, strict=True))
    return pa.csv.read_csv(path, convert_options=pa.csv.ConvertOptions(column_types=types, strings_can_be_null=True))


@dataclass(frozen=True)
class Scheduled:
    """What the call log amounts to."""

    gaps: pa.Table
    schedule: pa.Table
    excluded: pa.Table
    calls_hash: str
    kinds: Mapping[str, str]


def build_schedule(run: Run) -> Scheduled:
    """Call log → gaps → schedule and excluded, in memory; writes nothing."""
    settings = run.process.settings
    annotators, variants = [a.name for a in settings.panel.annotators], settings.panel.variants
    pairs = read_pairs(run.pairs, "sp2dpo annotate PROCESS.yaml")
    with open_calls(run.calls) as log:
        gaps = gaps_table(log.answers())
        failures = {call.cell: call.outcome for call in log.failures()}
        content = log.content_hash()
    schedule = schedule_table(pairs, gaps, annotators, variants, settings.schedule)
    excluded = excluded_table(pairs, read_dropped(run), gaps, schedule, failures, annotators, variants)
    return Scheduled(gaps, schedule, excluded, content, {a.name: a.kind for a in settings.panel.annotators})


def schedule_run(run: Run) -> Scheduled:
    """Call log → gaps.parquet → schedule.parquet, schedule.csv, excluded.csv, each with its manifest."""
    made = build_schedule(run)
    pairs, lam = sha256_file(run.pairs), run.process.lambda_hash
    write_table(run.gaps, made.gaps)
    gaps = sha256_file(run.gaps)
    write_manifest(
        run.gaps,
        files={run.gaps.name: gaps},
        inputs={run.pairs.name: pairs, run.calls.name: made.calls_hash},
        lambda_hash=lam,
        rows=made.gaps.num_rows,
    )
    csv = run.schedule.with_suffix(".csv")
    write_table(run.schedule, made.schedule)
    write_csv(csv, made.schedule)
    write_csv(run.excluded, made.excluded)
    write_manifest(
        run.schedule,
        files={path.name: sha256_file(path) for path in (run.schedule, csv, run.excluded)},
        inputs={run.pairs.name: pairs, run.gaps.name: gaps, run.calls.name: made.calls_hash},
        lambda_hash=lam,
        counts={"scheduled": made.schedule.num_rows, "excluded": made.excluded.num_rows},
        kinds=dict(made.kinds),
    )
    return made
