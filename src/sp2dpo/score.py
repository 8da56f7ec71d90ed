"""Scores of benchmarks and the choice between processes. Sec. 1, F.1, F.3. Numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sp2dpo.errors import InputError

__all__ = ["best_process", "mt_bench_score", "win_rate"]


def win_rate(wins: int, losses: int, ties: int = 0) -> float:
    """100·(W + T/2)/N in percent.

    Eq. 58.
    """
    n = wins + losses + ties
    if n == 0 or min(wins, losses, ties) < 0:
        raise InputError(f"win_rate needs at least one game and no negative count, not {wins}, {losses}, {ties}")
    return 100.0 * (wins + ties / 2) / n


def mt_bench_score(scores: Sequence[Sequence[float]]) -> float:
    """Mean over all turns of all questions; `scores[q][t]` in 1 to 10.

    Eq. 59.
    """
    turns = [score for question in scores for score in question]
    if not turns or not all(1 <= score <= 10 for score in turns):
        raise InputError("mt_bench_score needs at least one turn and scores from 1 to 10")
    return sum(turns) / len(turns)


def best_process(metric: Mapping[str, float]) -> str:
    """λ* among the processes that were tried, by a held-out metric; of equals the first.

    Eq. 2.
    """
    if not metric or any(math.isnan(value) for value in metric.values()):
        raise InputError(f"best_process needs at least one process and a number for each, not {dict(metric)}")
    return max(metric, key=lambda name: metric[name])
