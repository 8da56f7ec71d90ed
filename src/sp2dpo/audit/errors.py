"""Likely label errors: pairs on which the panel agrees that the preference is wrong or debatable. A, B.

The rubric asks for a low confidence where the direction of a preference looks wrong or can be disputed; which of the
two it is, an answer does not say. A list for people to review: nothing is removed or turned round here.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sp2dpo.audit.cells import beginning, end, plain, safe_cell
from sp2dpo.ensemble import robust_median
from sp2dpo.evidence import Array, Evidence
from sp2dpo.tables import write_atomic

__all__ = ["COLUMNS", "DOUBT", "LabelErrors", "label_errors", "review_rows", "write_review"]

DOUBT: Final = 0.3
"""The highest confidence that the rubric allows where the direction of a preference looks wrong or can be disputed."""

COLUMNS: Final = {
    "rank": "1 is the likeliest",
    "pair_id": "as in the schedule",
    "prompt_id": "as in the schedule",
    "doubt": "share of the annotators who answered that doubt the pair",
    "doubting_annotators": "their names, with a comma between two",
    "confidence": "mean over all answers about the pair",
    "magnitude": "mean over all answers about the pair",
    "category": "of the pair",
    "beta": "of the pair",
    "effective_gap": "of the pair",
    "prompt": "the conversation before the two responses",
    "chosen": "the response that the source prefers",
    "rejected": "the other response",
}
"""Columns of the list, with what they are."""


@dataclass(frozen=True)
class LabelErrors:
    """Which pairs of the schedule the panel doubts.

    Attributes:
        rule: when a pair is listed, and in what order, in one sentence.
        doubt_i: share of the annotators who answered that doubt the pair, (N,) in [0, 1].
        doubt_ij: whether an annotator doubts the pair, (N, J).
        confidence_i: mean over all answers about the pair, (N,).
        magnitude_i: likewise.
        listed: rows of the schedule, the likeliest error first.
    """

    rule: str
    doubt_i: Array
    doubt_ij: NDArray[np.bool_]
    confidence_i: Array
    magnitude_i: Array
    listed: NDArray[np.int64]


RULE: Final = (
    f"more than half of the annotators doubt the pair, their median confidence over prompts being at most {DOUBT}; "
    "first by the share that doubts, then by the lower confidence, then by the larger magnitude"
)


def label_errors(evidence: Evidence) -> LabelErrors:
    """Pairs that more than half of the annotators doubt, ranked. An annotator without an answer does not count."""
    confidence_ij = robust_median(evidence.confidence_ijk)
    doubt_ij = confidence_ij <= DOUBT  # False for NaN
    answered_i = (~np.isnan(confidence_ij)).sum(axis=1)
    doubt_i = doubt_ij.sum(axis=1) / np.maximum(answered_i, 1)
    confidence_i, magnitude_i = (_over_calls(one) for one in (evidence.confidence_ijk, evidence.magnitude_ijk))
    order = np.lexsort((-magnitude_i, confidence_i, -doubt_i))
    return LabelErrors(RULE, doubt_i, doubt_ij, confidence_i, magnitude_i, order[doubt_i[order] > 0.5])


def _over_calls(value_ijk: Array) -> Array:
    there = (~np.isnan(value_ijk)).sum(axis=(1, 2))
    means: Array = np.nansum(value_ijk, axis=(1, 2)) / np.maximum(there, 1)
    return means


# The list for review ------------------------------------------------------------------------------------------------


def review_rows(evidence: Evidence, errors: LabelErrors, limit: int | None = None) -> list[dict[str, Any]]:
    """The listed pairs, or the first of them, as rows of `COLUMNS`."""
    listed = errors.listed[:limit]
    pairs = evidence.pairs.select(["pair_id", "prompt_id", "prompt", "chosen", "rejected"])
    texts = pairs.take(evidence.at_i[listed]).to_pylist()
    ranked = enumerate(zip(listed.tolist(), texts, strict=True), 1)
    return [_row(evidence, errors, rank, i, text) for rank, (i, text) in ranked]


def _row(evidence: Evidence, errors: LabelErrors, rank: int, i: int, pair: Mapping[str, Any]) -> dict[str, Any]:
    doubting = [a for a, doubts in zip(evidence.annotators, errors.doubt_ij[i], strict=True) if doubts]
    return {
        "rank": rank,
        "pair_id": pair["pair_id"],
        "prompt_id": pair["prompt_id"],
        "doubt": round(float(errors.doubt_i[i]), 6),
        "doubting_annotators": ", ".join(doubting),
        "confidence": round(float(errors.confidence_i[i]), 6),
        "magnitude": round(float(errors.magnitude_i[i]), 6),
        "category": evidence.category_i[i],
        "beta": float(evidence.beta_i[i]),
        "effective_gap": float(evidence.gap_i[i]),
        **{side: plain(pair[side]) for side in ("prompt", "chosen", "rejected")},
    }


def write_review(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The list as CSV for a spreadsheet: UTF-8 with a byte order mark, all text quoted, no cell a formula or too long.

    What is too long keeps the end of a prompt and the beginning of a response.
    """

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8-sig", newline="") as file:
            sheet = csv.DictWriter(file, list(COLUMNS), quoting=csv.QUOTE_NONNUMERIC)
            sheet.writeheader()
            sheet.writerows(map(_cells, rows))

    write_atomic(path, write)


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    fitted = {"prompt": end(row["prompt"]), "chosen": beginning(row["chosen"]), "rejected": beginning(row["rejected"])}
    return {name: safe_cell(value) for name, value in {**row, **fitted}.items()}
