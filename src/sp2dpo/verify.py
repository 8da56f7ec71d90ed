"""Recompute every hash, gap and β of a run from its call log, and name the first difference. J.4."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from sp2dpo.annotate.teacher import body_of, request_hash
from sp2dpo.calls import Call, open_calls
from sp2dpo.errors import InputError, RunDirError, Unfinished
from sp2dpo.gaps import read_answer
from sp2dpo.hashing import sha256_file
from sp2dpo.llm import FAILURES
from sp2dpo.pairs import pair_id, read_pairs
from sp2dpo.runs import Run, read_run
from sp2dpo.stages import build_schedule
from sp2dpo.tables import read_manifest, read_table

__all__ = ["verify"]


def verify(run_dir: Path) -> Iterator[str]:
    """Yield one line for each thing that was recomputed and found equal.

    Raises:
        Unfinished: the first difference, with the file, row and column; or a file is missing or unreadable.
        RunDirError: not a run directory.
    """
    if not (run_dir / "process.yaml").is_file():
        raise RunDirError(f"{run_dir} is no run directory: it has no process.yaml")
    try:
        yield from _checks(run_dir)
    except InputError as error:
        raise Unfinished(str(error)) from error


def _checks(run_dir: Path) -> Iterator[str]:
    run = read_run(run_dir)
    yield f"process   λ {run.process.lambda_hash}"
    for name, sha in run.process.resolved["pins"]["prompts"].items():
        _same(f"prompts/{name}.txt", "sha256", run.process.pack.hashes[name], sha)
    yield f"prompts   {len(run.process.pack.hashes)} files as pinned in λ"
    checks: tuple[Callable[[Run], str], ...] = (_manifests, _pairs, _calls, _schedule)
    for check in checks:
        yield check(run)


def _same(where: str, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise Unfinished(f"{where}: {what} is {found!r}, recomputed it is {expected!r}")


def _manifests(run: Run) -> str:
    """Each manifest names this λ, the files as they are, and inputs as they are."""
    with open_calls(run.calls) as log:
        content = log.recomputed_hash()
        _same(run.calls.name, "head of the chain", log.content_hash(), content)
    now = {run.calls.name: content, "source": run.process.resolved["pins"]["data"]}
    files = 0
    for artifact in (run.pairs, run.gaps, run.schedule):
        manifest = read_manifest(artifact)
        if manifest is None:
            raise Unfinished(
                f"{artifact} has no manifest: it was not made, or not finished; sp2dpo schedule PROCESS.yaml makes it"
            )
        _same(artifact.name, "λ", manifest["lambda"], run.process.lambda_hash)
        for name, sha in manifest["files"].items():
            path = run.path / name
            now[name] = sha256_file(path) if path.is_file() else "missing"
            _same(f"{artifact.stem}.manifest.json", f"hash of {name}", sha, now[name])
            files += 1
        for name, sha in manifest["inputs"].items():
            _same(f"{artifact.stem}.manifest.json", f"hash of its input {name}", sha, now.get(name, "missing"))
    calls = read_manifest(run.calls)
    _same("calls.manifest.json", "content hash", calls and calls["content"], now[run.calls.name])
    return f"manifests {files} files and their inputs"


def _pairs(run: Run) -> str:
    pairs = read_pairs(run.pairs, "sp2dpo annotate PROCESS.yaml")
    for n, row in enumerate(pairs.select(["pair_id", "prompt", "chosen", "rejected"]).to_pylist()):
        made = pair_id(row["prompt"], row["chosen"], row["rejected"])
        _same(f"pairs.parquet, row {n}", "pair_id", row["pair_id"], made)
    manifest = read_manifest(run.pairs) or {}
    reasons = {name: n for name, n in manifest["counts"].items() if name not in ("raw", "kept")}
    _same("pairs.manifest.json", "raw count", manifest["counts"]["raw"], sum(reasons.values()) + pairs.num_rows)
    return f"pairs     {pairs.num_rows} pair_ids from their text; {manifest['counts']['raw']} source rows accounted for"


def _calls(run: Run) -> str:
    """Each logged call was the question that λ and the pair make, and reads as the log says."""
    pairs = read_pairs(run.pairs, "sp2dpo annotate PROCESS.yaml").select(["pair_id", "prompt", "chosen", "rejected"])
    rows = {pair: row for row, pair in enumerate(pairs["pair_id"].to_pylist())}

    @lru_cache(maxsize=64)
    def pair_in(row: int) -> dict[str, Any]:
        return pairs.slice(row, 1).to_pylist()[0]

    count = 0
    with open_calls(run.calls) as log:
        for count, call in enumerate(log, 1):
            where = f"calls.sqlite, row {count} ({call.annotator}/{call.variant}, pair {call.pair_id[:12]})"
            if call.pair_id not in rows:
                raise Unfinished(f"{where}: this pair is not in pairs.parquet")
            if call.variant not in run.process.pack.systems:
                raise Unfinished(f"{where}: the panel of λ has no such variant")
            asked = _request_hash_of(run, where, call, pair_in(rows[call.pair_id]))
            _same(where, "request_hash", call.request_hash, asked)
            _reads_as_logged(where, call)
    return f"calls     {count} attempts: questions rendered again, answers read again"


def _request_hash_of(run: Run, where: str, call: Call, pair: Mapping[str, Any]) -> str:
    """The hash of the question, made again from the pair, the panel and what the log says was sent."""
    sent = _sent(where, call)
    if call.kind == "decisions" and run.process.pack.decisions is None:
        raise Unfinished(f"{where}: the panel of λ asks for no decisions")
    try:
        variants = list(sent["variants"]) if call.kind == "decisions" else [call.variant]
        _, body = body_of(call.kind, call.requested_model, run.process.pack, pair, variants, sent)
    except (KeyError, TypeError, ValueError) as error:
        raise Unfinished(f"{where}: params_sent does not make a question ({error!r})") from error
    return request_hash(call.endpoint, body)


def _sent(where: str, call: Call) -> dict[str, Any]:
    try:
        return dict(json.loads(call.params_sent))
    except (ValueError, TypeError) as error:
        raise Unfinished(f"{where}: params_sent is no JSON object") from error


def _reads_as_logged(where: str, call: Call) -> None:
    if call.outcome in FAILURES:
        return
    parsed = read_answer(call)
    gap = parsed.gap
    read = (gap.category, gap.magnitude, gap.confidence) if gap else (None, None, None)
    _same(where, "judgement", (call.category, call.magnitude, call.confidence), read)
    _same(where, "outcome", call.outcome, parsed.problem or ("repaired" if parsed.mends else "ok"))


def _schedule(run: Run) -> str:
    made = build_schedule(run)
    _equal_tables("gaps.parquet", read_table(run.gaps, "sp2dpo schedule"), made.gaps)
    _equal_tables("schedule.parquet", read_table(run.schedule, "sp2dpo schedule"), made.schedule)
    for name, table in (("schedule.csv", made.schedule), (run.excluded.name, made.excluded)):
        _equal_csv(run.path / name, table)
    source_rows = (read_manifest(run.pairs) or {})["counts"]["raw"]
    scheduled, excluded = made.schedule.num_rows, made.excluded.num_rows
    _same("excluded.csv", "scheduled + excluded", scheduled + excluded, source_rows)
    return f"schedule  {scheduled} β from the log; with {excluded} excluded, all source rows accounted for"


def _equal_csv(path: Path, expected: pa.Table) -> None:
    buffer = io.BytesIO()
    pa.csv.write_csv(expected, buffer)
    pairs = itertools.zip_longest(path.read_bytes().splitlines(), buffer.getvalue().splitlines())
    for line, (found, wanted) in enumerate(pairs, 1):
        _same(f"{path.name}, line {line}", "content", found, wanted)


def _equal_tables(name: str, found: pa.Table, expected: pa.Table) -> None:
    _same(name, "columns", found.column_names, expected.column_names)
    _same(name, "number of rows", found.num_rows, expected.num_rows)
    for column in expected.column_names:
        if not found[column].equals(expected[column]):
            pairs = zip(found[column].to_pylist(), expected[column].to_pylist(), strict=True)
            row, (one, other) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
            _same(f"{name}, row {row}", column, one, other)
