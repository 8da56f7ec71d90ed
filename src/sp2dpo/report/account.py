"""Rows and questions accounted for: every total with its parts, and whether they add up. E.2, E.3, J.4.

Reads manifests, excluded.csv and the call log's tally; knows nothing of β.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from sp2dpo.evidence import Evidence
from sp2dpo.llm import FAILURES
from sp2dpo.numbers import some
from sp2dpo.pairs.filters import REASONS
from sp2dpo.reply import INVALID
from sp2dpo.report.panel import panel_of, predictors_of
from sp2dpo.report.tally import Tally
from sp2dpo.schedule import EXCLUDED_SCHEMA, EXCLUSIONS
from sp2dpo.stages import read_excluded
from sp2dpo.tables import read_manifest

__all__ = ["Part", "Sum", "accounts", "notes_of_pairs"]


@dataclass(frozen=True)
class Part:
    """Some of a total: how many, and what they are."""

    n: int
    what: str
    why: str = ""


@dataclass(frozen=True)
class Sum:
    """A total and its parts."""

    total: int
    what: str
    parts: tuple[Part, ...]

    @property
    def parts_total(self) -> int:
        return sum(part.n for part in self.parts)

    @property
    def adds_up(self) -> bool:
        return self.total == self.parts_total


def accounts(evidence: Evidence, tally: Tally) -> list[Sum]:
    """Source rows → pairs; questions → answers; pairs → schedule; source rows → schedule."""
    excluded = _excluded(evidence)
    sums = [_questions(evidence, tally), _pairs(evidence, excluded)]
    manifest = read_manifest(evidence.run.pairs)
    if manifest is None:
        return sums
    counts = manifest["counts"]
    return [_source(counts), *sums, _whole(evidence, excluded, counts["raw"])]


def notes_of_pairs(evidence: Evidence) -> list[Part]:
    """Oddities among the pairs that were kept, those that occur."""
    notes: Mapping[str, int] = (read_manifest(evidence.run.pairs) or {}).get("notes", {})
    return [Part(n, name, REASONS.get(name, "")) for name, n in notes.items() if n]


def _source(counts: Mapping[str, int]) -> Sum:
    reasons = {name: n for name, n in counts.items() if name not in ("raw", "kept")}
    dropped = [Part(n, f"dropped: {name}", REASONS.get(name, "")) for name, n in reasons.items()]
    return Sum(counts["raw"], "rows of the source", (*dropped, Part(counts["kept"], "pairs")))


def _questions(evidence: Evidence, tally: Tally) -> Sum:
    j, k = len(evidence.annotators), len(evidence.variants)
    distinct = len(set(evidence.pair_ids))
    named = "pairs" if distinct == evidence.pairs.num_rows else "different pairs"
    mends = ", ".join(f"{name} {n:,}" for name, n in tally.mends.most_common())
    parts = [
        Part(tally.first_time, "valid as answered, first attempt"),
        Part(tally.later, "valid as answered, after a retry"),
        Part(tally.repaired, "valid after a mend", mends),
        *(Part(n, f"failed: {kind}", _failure(kind)) for kind, n in tally.failed.most_common()),
        Part(tally.not_asked, "not asked yet"),
    ]
    panel = f"({panel_of(evidence)})" if predictors_of(evidence) else some(j, "annotator")
    return Sum(distinct * j * k, f"questions: {distinct:,} {named} × {panel} × {some(k, 'prompt')}", tuple(parts))


def _failure(kind: str) -> str:
    return {**FAILURES, **INVALID}.get(kind, "")


def _excluded(evidence: Evidence) -> pa.Table:
    run = evidence.run
    return read_excluded(run) if run.excluded.is_file() else EXCLUDED_SCHEMA.empty_table()


def _reasons(excluded: pa.Table, stage: str) -> Counter[Any]:
    rows = zip(excluded["stage"].to_pylist(), excluded["reason"].to_pylist(), strict=True)
    return Counter(reason for at, reason in rows if at == stage)


def _pairs(evidence: Evidence, excluded: pa.Table) -> Sum:
    reasons = _reasons(excluded, "annotate").most_common()
    left_out = [Part(n, f"left out: {why}", EXCLUSIONS.get(why, "")) for why, n in reasons]
    kept = Part(evidence.n, "in the schedule, with a β")
    return Sum(evidence.pairs.num_rows, "pairs", (*left_out, kept))


def _whole(evidence: Evidence, excluded: pa.Table, raw: int) -> Sum:
    listed = Part(excluded.num_rows, "listed in excluded.csv, each with its reason")
    return Sum(raw, "the whole: rows of the source", (listed, Part(evidence.n, "in the schedule, with a β")))
