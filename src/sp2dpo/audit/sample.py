"""A stratified sample of the schedule for people to judge. Knows nothing of files and verdicts.

Pairs are drawn within category × third of β × disagreement. All that is random follows from sha256 of a seed and the
pair_id: the same seed and schedule give the same sample with any version of any library, in any order of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from sp2dpo.errors import InputError
from sp2dpo.evidence import Evidence
from sp2dpo.hashing import sha256_json, sha256_text

__all__ = ["Strata", "allocate", "chosen_is_a", "digest", "draw", "strata_of"]

THIRDS: Final = ("low", "middle", "high")
HALVES: Final = ("low", "high")


class Strata(NamedTuple):
    """Which stratum each pair of the schedule is in; a pair that is there twice counts once.

    Attributes:
        at: row of each pair in the schedule.
        stratum: name of its stratum, such as `Safety, β high, spread low`.
    """

    at: NDArray[np.int64]
    stratum: NDArray[np.object_]


def strata_of(evidence: Evidence) -> Strata:
    """Category × third of β × whether the gaps of its calls spread more than those of the middle pair."""
    ids = np.array(evidence.schedule["pair_id"].to_pylist(), object)
    at = np.sort(np.unique(ids, return_index=True)[1])
    beta, spread = evidence.beta_i[at], evidence.spread_i[at]
    third = np.searchsorted(np.quantile(beta, (1 / 3, 2 / 3)), beta)
    half = (spread > np.median(spread)).astype(int)
    named = zip(evidence.category_i[at], third, half, strict=True)
    return Strata(at, np.array([f"{c}, β {THIRDS[t]}, spread {HALVES[h]}" for c, t, h in named], object))


def allocate(sizes: ArrayLike, n: int) -> NDArray[np.int64]:
    """How many to draw from strata of these sizes: one of each if `n` allows, the rest in proportion to what is left.

    Fractions go to the largest remainders, ties to the first stratum. `n` is at most the sum of the sizes.
    """
    size = np.asarray(sizes, np.int64)
    base = np.ones_like(size) if n >= len(size) else np.zeros_like(size)
    left, rest = size - base, n - int(base.sum())
    whole, remainder = np.divmod(rest * left, max(int(left.sum()), 1))
    first = np.argsort(-remainder, kind="stable")[: rest - int(whole.sum())]
    taken = base + whole
    taken[first] += 1
    return taken


def draw(evidence: Evidence, n: int, seed: int) -> pa.Table:
    """A sample of `n` pairs, or of all if there are fewer, in an order that tells nothing.

    Returns:
        Columns `row` (from 1), `pair_id`, `at` (row of the schedule), `stratum`, `size` (pairs in it, N_h), `drawn`
        (of those, n_h) and `weight` (N_h / n_h: how many pairs of the schedule this one stands for).

    Raises:
        InputError: `n` is less than 1, or `seed` less than 0.
    """
    if n < 1 or seed < 0:
        raise InputError(
            f"a sample of {n} pairs with seed {seed} cannot be drawn; ask for 1 or more, with seed 0 or more"
        )
    at, stratum = strata_of(evidence)
    every = evidence.schedule["pair_id"].to_pylist()
    ids = [str(every[row]) for row in at]
    names, code, size = np.unique(stratum.astype(str), return_inverse=True, return_counts=True)
    taken = allocate(size, min(n, len(at)))
    chosen = [_first(np.flatnonzero(code == h), ids, seed, int(taken[h])) for h in range(len(names))]
    order = sorted(np.concatenate(chosen).tolist(), key=lambda i: _random(seed, "row", ids[i]))
    h = code[order]
    columns: dict[str, Any] = {
        "row": np.arange(1, len(order) + 1),
        "pair_id": [ids[i] for i in order],
        "at": at[order],
        "stratum": names[h].tolist(),
        "size": size[h],
        "drawn": taken[h],
        "weight": size[h] / taken[h],
    }
    return pa.table({name: pa.array(values) for name, values in columns.items()})


def _first(members: NDArray[Any], ids: Sequence[str], seed: int, n: int) -> NDArray[np.int64]:
    """`n` of the members, each set of `n` as likely as any other."""
    drawn = sorted(members.tolist(), key=lambda i: _random(seed, "draw", ids[i]))[:n]
    return np.array(drawn, np.int64)


def chosen_is_a(seed: int, pair_id: str) -> bool:
    """Whether the response that the source prefers is shown as A: a fair coin for each pair."""
    return int(_random(seed, "side", pair_id)[0], 16) < 8


def digest(drawn: pa.Table) -> str:
    """16 hexadecimal digits that tell this sample, with its strata, from any other."""
    return sha256_json(drawn.select(["pair_id", "stratum", "size"]).to_pylist())[:16]


def _random(seed: int, purpose: str, pair_id: str) -> str:
    return sha256_text(f"{seed} {purpose} {pair_id}")
