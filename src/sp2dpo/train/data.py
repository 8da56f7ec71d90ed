"""Pairs and schedule joined into what the trainer reads. Refuses whatever would train on a β that was not meant.

Tables in, tables out; no torch.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sp2dpo.arms import Arm, arm_of
from sp2dpo.errors import ScheduleError, nearest
from sp2dpo.hashing import sha256_json
from sp2dpo.numbers import some
from sp2dpo.pairs import pair_id
from sp2dpo.tables import schema_of

__all__ = [
    "HELD_OUT_SCHEMA",
    "MARGINS_SCHEMA",
    "ArmColumns",
    "arm_columns",
    "check_arm",
    "check_beta",
    "check_cover",
    "held_out",
    "scheduled_pairs",
    "training_table",
    "with_arm",
]

Array = NDArray[np.float64]

MARGINS_SCHEMA: Final = schema_of(step=pa.int64(), row=pa.int64(), margin=pa.float32())
"""`margins.parquet`: the implicit margin Δ, in nats and without β, of a row of the schedule at a training step."""

HELD_OUT_SCHEMA: Final = schema_of(
    row=pa.int64(),
    chosen_log_ratio=pa.float32(),
    rejected_log_ratio=pa.float32(),
    chosen_log_prob=pa.float32(),
    rejected_log_prob=pa.float32(),
)
"""`held_out.parquet`: for a row of the schedule that was not trained, the log-ratios to the reference and the
log-probabilities of its responses after training, in nats, summed over tokens."""


class ArmColumns(NamedTuple):
    """β_i and w_i of every row of the schedule, float64; NaN for an arm without β."""

    beta: Array
    weight: Array


def scheduled_pairs(pairs: pa.Table, schedule: pa.Table) -> pa.Table:
    """Rows of the schedule in its order: `prompt`, `chosen`, `rejected`, `category`, `row` (of the schedule).

    Raises:
        ScheduleError: a pair of the schedule that is not among the pairs, or whose text is not the one that was judged.
            The pair is named.
    """
    ids = [str(pair) for pair in schedule["pair_id"].to_pylist()]
    at = {pair: n for n, pair in enumerate(pairs["pair_id"].to_pylist())}
    for pair in ids:
        if pair not in at:
            raise ScheduleError(
                f"pair {pair} of the schedule is not among the pairs: the schedule was made from another dataset, or "
                "from other text; make it again with: sp2dpo schedule PROCESS.yaml"
            )
    rows = pairs.select(["prompt", "chosen", "rejected"]).take([at[pair] for pair in ids])
    _check_text(ids, rows)
    category = schedule["category"] if "category" in schedule.column_names else pa.nulls(len(ids), pa.string())
    return rows.append_column("category", category).append_column("row", pa.array(np.arange(len(ids)), pa.int64()))


def held_out(rows: pa.Table, share: float, seed: int) -> NDArray[np.bool_]:
    """Which of `scheduled_pairs` are held out: about `share` of them, whole prompts in an order drawn with `seed`.

    The order does not depend on which other prompts there are, so a prompt that is held out in one schedule is so in
    nearly every other that shares the seed.

    Raises:
        ScheduleError: no prompt can be held out without going far beyond `share`, or none would be left.
    """
    mask = np.zeros(rows.num_rows, dtype=np.bool_)
    if not share:
        return mask
    of_prompt: dict[str, list[int]] = {}
    for n, prompt in enumerate(rows["prompt"].to_pylist()):
        of_prompt.setdefault(sha256_json([seed, prompt]), []).append(n)
    wanted = max(1, round(share * rows.num_rows))
    for _, at in sorted(of_prompt.items()):
        if mask.sum() + len(at) <= wanted:
            mask[at] = True
    if not mask.any() or mask.all():
        raise ScheduleError(
            f"train.held_out is {share:g}, and {some(rows.num_rows, 'pair')} with {some(len(of_prompt), 'prompt')} "
            "cannot be split so that both parts have a prompt and no prompt is in both; take more pairs, or set "
            "held_out to 0"
        )
    return mask


def arm_columns(schedule: pa.Table, arm: Arm, *, held_out: NDArray[np.bool_], seed: int) -> ArmColumns:
    """β_i and w_i of an arm for every row of the schedule, held out or not.

    The mean β is that of the rows that are not held out. `shuffled` permutes β among these, and among those that are
    held out, with the generator of `seed`; weights are β_i over that mean, so they have mean 1 over the trained rows.

    Eq. 9.
    """
    n = schedule.num_rows
    ones = np.ones(n)
    if arm.source == "none":
        return ArmColumns(np.full(n, math.nan), ones)
    if arm.source == "one":
        assert arm.beta is not None
        return ArmColumns(np.full(n, arm.beta), ones)
    beta = np.array(_column(schedule, "beta_random" if arm.source == "beta_random" else "beta"))
    if arm.source == "shuffled":
        return ArmColumns(_shuffled(beta, held_out, seed), ones)
    if arm.source == "mean":
        mean = math.fsum(beta[~held_out]) / int((~held_out).sum())
        return ArmColumns(np.full(n, mean), beta / mean if arm.weighted else ones)
    return ArmColumns(beta, ones)


def _shuffled(beta: Array, held_out: NDArray[np.bool_], seed: int) -> Array:
    shuffled, random = beta.copy(), np.random.default_rng(seed)
    for part in (~held_out, held_out):
        shuffled[part] = random.permutation(beta[part])
    return shuffled


def with_arm(rows: pa.Table, columns: ArmColumns) -> pa.Table:
    """`scheduled_pairs` with the columns `beta` and `weight` of an arm, float32."""
    for name, values in columns._asdict().items():
        rows = rows.append_column(name, pa.array(values, pa.float32()))
    return rows


def check_arm(schedule: pa.Table, arm: Arm, beta_min: float, beta_max: float) -> None:
    """Refuse a β of the schedule that no loss can use, or that lies outside the envelope, for an arm that reads it.

    Raises:
        ScheduleError: names the column, the pair and the value.
    """
    if arm.source in ("none", "one"):
        return
    column = "beta_random" if arm.source == "beta_random" else "beta"
    ids = [str(pair) for pair in schedule["pair_id"].to_pylist()]
    check_beta(_column(schedule, column), ids, beta_min, beta_max, column)


def training_table(
    pairs: pa.Table, schedule: pa.Table, method: str, *, beta: float, beta_min: float, beta_max: float
) -> pa.Table:
    """`scheduled_pairs` with `beta` and `weight` (float32) of an arm, where nothing is held out.

    Raises:
        ScheduleError: as `scheduled_pairs` and `check_arm`.
    """
    rows, arm = scheduled_pairs(pairs, schedule), arm_of(method, beta=beta)
    check_arm(schedule, arm, beta_min, beta_max)
    return with_arm(rows, arm_columns(schedule, arm, held_out=np.zeros(rows.num_rows, dtype=np.bool_), seed=0))


def check_cover(pairs: pa.Table, schedule: pa.Table, excluded: pa.Table) -> None:
    """Refuse a schedule that leaves out a pair without saying so.

    Raises:
        ScheduleError: a pair is neither in the schedule nor among the excluded; it is named.
    """
    known = set(schedule["pair_id"].to_pylist()) | set(excluded["pair_id"].to_pylist())
    left_out = [pair for pair in pairs["pair_id"].to_pylist() if pair not in known]
    if left_out:
        raise ScheduleError(
            f"the schedule does not cover the pairs: {len(left_out)} are neither in it nor in excluded.csv, the first "
            f"is {left_out[0]}; make it again with sp2dpo schedule, or list them in excluded.csv"
        )


def _column(schedule: pa.Table, column: str) -> list[float]:
    if column not in schedule.column_names:
        raise ScheduleError(f"the schedule has no column '{column}'{nearest(column, schedule.column_names)}")
    if not pa.types.is_floating(schedule[column].type):
        raise ScheduleError(f"column '{column}' of the schedule holds {schedule[column].type}, not numbers")
    return [math.nan if value is None else value for value in schedule[column].to_pylist()]


def _check_text(ids: list[str], rows: pa.Table) -> None:
    for n, row in enumerate(rows.to_pylist()):
        if pair_id(row["prompt"], row["chosen"], row["rejected"]) != ids[n]:
            raise ScheduleError(
                f"the text of pair {ids[n]} is not the text that was judged (its hash differs): pairs.parquet was "
                "changed after the schedule was made; prepare it again, in a new --run-dir"
            )


def check_beta(values: list[float], ids: list[str], beta_min: float, beta_max: float, column: str) -> None:
    """Refuse the first β that no loss can use or that lies outside the envelope.

    Raises:
        ScheduleError: names the column, the pair and the value.
    """
    slack = 1e-6
    for pair, value in zip(ids, values, strict=True):
        if math.isnan(value):
            raise ScheduleError(f"{column} of pair {pair} is missing or NaN; every training pair needs a β")
        if not 0.0 < value < math.inf:
            raise ScheduleError(f"{column} of pair {pair} is {value}; β must be positive and finite")
        if not beta_min - slack <= value <= beta_max + slack:
            raise ScheduleError(
                f"{column} of pair {pair} is {value}, outside the envelope [{beta_min}, {beta_max}] of λ"
            )
