"""What was estimated before anything was asked, beside what was spent. Appendix G."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sp2dpo.annotate.estimate import ESTIMATE, AnnotatorCost
from sp2dpo.report.tally import Tally
from sp2dpo.runs import Run

__all__ = ["MoneyRow", "money_rows"]


@dataclass(frozen=True)
class MoneyRow:
    """One annotator's money in USD; None where a price or the estimate is missing. `per_1000` is for valid answers."""

    annotator: str
    estimated: float | None
    estimated_per_1000: float | None
    basis: str
    spent: float | None
    spent_per_1000: float | None
    on_failed: float | None
    unknown_at_most: float | None
    hidden_tokens: int


def money_rows(run: Run, tally: Tally) -> list[MoneyRow]:
    """Annotators of which a call was live, with the estimate that was there before."""
    path = run.path / ESTIMATE
    made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"annotators": []}
    estimates = {part["annotator"]: AnnotatorCost(**part) for part in made["annotators"]}
    priced = {a.name for a in run.process.settings.panel.annotators if a.price is not None}
    questions = len(run.process.settings.panel.variants) * made.get("pairs", 0)
    rows = []
    for used in tally.used.values():
        if used.origin != "live":
            continue
        before, known = estimates.get(used.annotator), used.annotator in priced
        estimated = before.usd if before else None
        rows.append(
            MoneyRow(
                annotator=used.annotator,
                estimated=estimated,
                estimated_per_1000=None if estimated is None or not questions else 1000 * estimated / questions,
                basis=before.basis if before else "no estimate was made",
                spent=used.cost_usd if known else None,
                spent_per_1000=1000 * used.cost_usd / used.valid if known and used.valid else None,
                on_failed=used.failed_usd if known else None,
                unknown_at_most=used.bound_usd if known else None,
                hidden_tokens=used.reasoning_tokens,
            )
        )
    return rows
