"""The columns of a dataset that control training: checked before any step, and what they decide before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from sp2dpo.errors import ScheduleError
from sp2dpo.train.config import PairwiseDPOConfig

__all__ = ["categories_of", "check_columns", "in_order", "names_of", "refuse_long_prompts"]


def names_of(dataset: Any) -> dict[int, str]:
    """Pair id of each row number, where a dataset has both."""
    if not isinstance(dataset, Dataset) or not {"row", "pair_id"} <= set(dataset.column_names):
        return {}
    return {row: f"pair {pair}" for row, pair in zip(dataset["row"], dataset["pair_id"], strict=True)}


def categories_of(found: Sequence[Any]) -> tuple[str, ...]:
    named = [dataset for dataset in found if isinstance(dataset, Dataset) and "category" in dataset.column_names]
    return tuple(sorted({name for dataset in named for name in dataset.unique("category") if name is not None}))


def in_order(dataset: Any, args: PairwiseDPOConfig) -> Any:
    """The pairs to keep, in their order if they have one."""
    if not isinstance(dataset, Dataset):
        return dataset
    if "keep" in dataset.column_names:
        dataset = dataset.select([n for n, keep in enumerate(dataset["keep"]) if keep])
    if "order" in dataset.column_names:
        dataset = dataset.select(np.argsort(dataset["order"], kind="stable"))
        args.train_sampling_strategy = "sequential"
    return dataset


def check_columns(dataset: Any, name: str, args: PairwiseDPOConfig) -> None:
    names = getattr(dataset, "column_names", None)
    if {"image", "images"} & set(names or ()):
        raise ScheduleError(f"the {name} dataset has images, which per-pair control does not train on here")
    if names is not None and "beta" not in names:
        raise ScheduleError(f"the {name} dataset has no column 'beta'; its columns: {', '.join(names)}")
    if not isinstance(dataset, Dataset):
        return
    neutral = {"margin": [0], "weight": [1], "route": ["preference"]}
    shaping = [
        column
        for column, value in neutral.items()
        if column in dataset.column_names and dataset.unique(column) != value
    ]
    if shaping and args.reshaped:
        raise ValueError(
            f"the {name} dataset has the columns {', '.join(shaping)}, which do nothing under TRL's {args.reshaped[0]}"
        )
    _check(dataset, name, "beta", lambda beta: 0.0 < beta < float("inf"), "a positive finite number")
    _check(dataset, name, "margin", lambda margin: abs(margin) < float("inf"), "a finite number of nats")
    _check(dataset, name, "weight", lambda weight: 0.0 <= weight < float("inf"), "a finite number, not negative")
    _check(dataset, name, "keep", lambda keep: keep in (0, 1), "0 or 1")
    _check(dataset, name, "route", lambda route: route in ("preference", "sft"), "'preference' or 'sft'")
    _check(dataset, name, "order", lambda order: abs(order) < float("inf"), "a finite number")


def _check(dataset: Dataset, name: str, column: str, fits: Any, must_be: str) -> None:
    if column not in dataset.column_names:
        return
    for n, value in enumerate(dataset[column]):
        if value is None or not fits(value):
            raise ScheduleError(f"row {n} of the {name} dataset has {column} {value}; it must be {must_be}")


def refuse_long_prompts(dataset: Dataset, name: str, max_length: int) -> None:
    long = [n for n, ids in enumerate(dataset["prompt_ids"]) if len(ids) >= max_length]
    if long:
        raise ScheduleError(
            f"{len(long)} rows of the {name} dataset have {max_length} or more prompt tokens (first: row {long[0]}); "
            "max_length would leave nothing of their responses; set max_prompt_length below max_length"
        )
