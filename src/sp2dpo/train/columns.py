"""The columns of a dataset that control training: checked before any step, and what they decide before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Final

import numpy as np
from datasets import Dataset

from sp2dpo.errors import ScheduleError
from sp2dpo.methods.catalogue import SIGNALS, method_of
from sp2dpo.train.config import PairwiseDPOConfig

__all__ = ["categories_of", "check_columns", "in_order", "names_of", "refuse_long_prompts"]

SHOWN: Final = 12
"""Characters of a pair id in messages."""

_NEUTRAL: Final = {"margin": [0], "weight": [1], "route": ["preference"], "label_smoothing": []}
"""Columns that reshape the loss, and what they hold where they do not."""


def names_of(dataset: Dataset) -> dict[int, str]:
    """Pair id of each row number, where a dataset has both."""
    if not {"row", "pair_id"} <= set(dataset.column_names):
        return {}
    return {row: f"pair {pair[:SHOWN]}" for row, pair in zip(dataset["row"], dataset["pair_id"], strict=True)}


def categories_of(datasets: Sequence[Dataset]) -> tuple[str, ...]:
    """Names of categories in any of the datasets, in the order of the alphabet."""
    named = [dataset for dataset in datasets if "category" in dataset.column_names]
    return tuple(sorted({name for dataset in named for name in dataset.unique("category") if name is not None}))


def in_order(dataset: Dataset) -> Dataset:
    """The pairs to keep, in their order if they have one."""
    if "keep" in dataset.column_names:
        dataset = dataset.select([n for n, keep in enumerate(dataset["keep"]) if keep])
    if "order" in dataset.column_names:
        dataset = dataset.select(np.argsort(dataset["order"], kind="stable"))
    return dataset


def check_columns(dataset: Any, name: str, args: PairwiseDPOConfig) -> None:
    """Refuse a dataset whose controls are missing, cannot be used, or would not be.

    Raises:
        ScheduleError: names the dataset, the column and the first row.
        ValueError: a column that the method, or a key of TRL, leaves without effect.
    """
    if not isinstance(dataset, Dataset):
        raise ScheduleError(f"the {name} dataset is a stream, whose controls cannot be checked; load it as a whole")
    if {"image", "images"} & set(dataset.column_names):
        raise ScheduleError(f"the {name} dataset has images, which per-pair control does not train on here")
    if "beta" not in dataset.column_names:
        raise ScheduleError(f"the {name} dataset has no column 'beta'; its columns: {', '.join(dataset.column_names)}")
    _refuse_idle(dataset, name, args)
    for column in ("beta", "margin", "weight", "keep", "label_smoothing"):
        valid = SIGNALS[column].valid
        _check(dataset, name, column, valid.holds, f"{valid} ({SIGNALS[column].meaning})")
    _check(dataset, name, "order", math.isfinite, "a finite number")
    _check(dataset, name, "row", lambda row: isinstance(row, int), "a whole number")
    if "route" in dataset.column_names:
        other = [route for route in dataset.unique("route") if route not in ("preference", "sft")]
        if other:
            row = list(dataset["route"]).index(other[0])
            raise ScheduleError(f"row {row} of the {name} dataset has route {other[0]}; give 'preference' or 'sft'")
    if "keep" in dataset.column_names and not any(dataset["keep"]):
        raise ScheduleError(f"the {name} dataset keeps no pair: its column 'keep' is 0 in every row")


def _refuse_idle(dataset: Dataset, name: str, args: PairwiseDPOConfig) -> None:
    there = [column for column in _NEUTRAL if column in dataset.column_names]
    shaping = [column for column in there if dataset.unique(column) != _NEUTRAL[column]]
    if shaping and args.reshaped:
        raise ValueError(
            f"the {name} dataset has {', '.join(shaping)}, which do nothing under TRL's {args.reshaped[0]}"
        )
    if "label_smoothing" in there and "label_smoothing" not in {knob.name for knob in method_of(args.method).knobs}:
        raise ValueError(f"the {name} dataset has label_smoothing, which does nothing in the method '{args.method}'")


def _check(dataset: Dataset, name: str, column: str, fits: Callable[[Any], Any], must_be: str) -> None:
    if column not in dataset.column_names:
        return
    for n, value in enumerate(dataset[column]):
        if not isinstance(value, Real) or not fits(value):
            raise ScheduleError(f"row {n} of the {name} dataset has {column} {value}; it must be {must_be}")


def refuse_long_prompts(dataset: Dataset, name: str, max_length: int) -> None:
    """Raises:
    ScheduleError: a prompt fills `max_length`, and nothing of its responses would be left.
    """
    long = [n for n, ids in enumerate(dataset["prompt_ids"]) if len(ids) >= max_length]
    if long:
        raise ScheduleError(
            f"{len(long)} rows of the {name} dataset have {max_length} or more prompt tokens (first: row {long[0]}); "
            "max_length would leave nothing of their responses; set max_prompt_length below max_length"
        )
