"""Filled sheets put together: one verdict for each pair, what it counts for, and how far people agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sp2dpo.audit.agreement import nominal_alpha
from sp2dpo.audit.intervals import Measured, share
from sp2dpo.audit.sample import chosen_is_a, strata_of
from sp2dpo.audit.sheet import Sheet, Verdict
from sp2dpo.errors import DataError
from sp2dpo.evidence import Array, Evidence

__all__ = ["Raters", "Verdicts", "raters_of", "verdicts_of"]


@dataclass(frozen=True)
class Verdicts:
    """The pairs that people judged.

    Attributes:
        at: row of each in the schedule.
        pair_id: of each.
        verdict: of each; of several people what most of them say, and a tie where no verdict leads.
        weight: pairs of the schedule that it stands for.
        covered: share of the schedule's pairs that are in a stratum with a verdict.
    """

    at: NDArray[np.int64]
    pair_id: tuple[str, ...]
    verdict: NDArray[np.object_]
    weight: Array
    covered: float

    @property
    def decided(self) -> NDArray[np.bool_]:
        """Those that are no tie."""
        return np.asarray(self.verdict != "tie", bool)

    @property
    def right(self) -> NDArray[np.bool_]:
        return np.asarray(self.verdict == "right", bool)


@dataclass(frozen=True)
class Raters:
    """Several people on the same pairs: Krippendorff's α of A, B and tie, and how often all say the same."""

    names: tuple[str, ...]
    pairs: int
    alpha: float | None
    same: Measured


def verdicts_of(evidence: Evidence, sheets: Sequence[Sheet]) -> Verdicts:
    """The verdicts of all sheets on pairs of the schedule, with their weights.

    Raises:
        DataError: as `score`.
    """
    paths = ", ".join(str(sheet.path) for sheet in sheets)
    if len({sheet.name for sheet in sheets}) < len(sheets):
        raise DataError(f"two sheets have the same name ({paths}); name each after who filled it in")
    strata = strata_of(evidence)
    ids = evidence.schedule["pair_id"].to_pylist()
    row_of = {str(ids[at]): n for n, at in enumerate(strata.at)}
    given: dict[str, list[Verdict]] = {}
    for sheet in sheets:
        _check_known(sheet, row_of)
        for row in sheet.rows:
            given.setdefault(row.pair_id, []).append(row.verdict)
    if not given:
        raise DataError(f"{paths}: no verdict is filled in; write A, B or tie into the column 'verdict'")
    stratum = strata.stratum.astype(str)
    rows = np.array([row_of[pair_id] for pair_id in given])
    size, answered = Counter(stratum.tolist()), Counter(stratum[rows].tolist())
    return Verdicts(
        at=strata.at[rows],
        pair_id=tuple(given),
        verdict=np.array([_most(several) for several in given.values()], object),
        weight=np.array([size[h] / answered[h] for h in stratum[rows].tolist()]),
        covered=sum(size[h] for h in answered) / len(stratum),
    )


def _check_known(sheet: Sheet, row_of: Mapping[str, int]) -> None:
    unknown = [row.pair_id for row in sheet.rows if row.pair_id not in row_of]
    if unknown:
        raise DataError(
            f"{sheet.path}: {len(unknown):,} of {len(sheet.rows):,} judged pairs are not in the schedule of this run, "
            f"the first is {unknown[0][:16]}…; score the sheet with the run that it was drawn from, or draw one from "
            "this run with: sp2dpo audit sample"
        )


def _most(several: Sequence[Verdict]) -> Verdict:
    first, *others = Counter(several).most_common()
    return "tie" if others and others[0][1] == first[1] else first[0]


def raters_of(sheets: Sequence[Sheet]) -> Raters:
    """In A and B as the first sheet shows them: people who see no labels agree by chance on sides, not on labels."""
    seed = sheets[0].seed
    codes: dict[str, list[int]] = {}
    for place, sheet in enumerate(sheets):
        for row in sheet.rows:
            side = (row.verdict == "right") == chosen_is_a(seed, row.pair_id)
            codes.setdefault(row.pair_id, [-1] * len(sheets))[place] = 2 if row.verdict == "tie" else int(side)
    both = np.array([several for several in codes.values() if sum(code >= 0 for code in several) > 1], np.int64)
    same = [len({*several} - {-1}) == 1 for several in both.reshape(-1, len(sheets)).tolist()]
    names = tuple(sheet.name for sheet in sheets)
    alpha = nominal_alpha(both) if len(both) else None
    return Raters(names, len(both), alpha, share(same, np.ones(len(both))))
