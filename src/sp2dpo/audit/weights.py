"""Annotator weights learnt from people's verdicts, α_j of eq. 42. Numbers in, numbers and YAML out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from sp2dpo.settings import Schedule
from sp2dpo.yamls import load_yaml

__all__ = ["FEWEST_OF_A_CLASS", "learnt_weights", "weights_yaml"]

FEWEST_OF_A_CLASS: Final = 10
"""Right labels, and wrong ones, below which no weights are made."""

SHRINKAGE: Final = 20
"""Verdicts of the rarer class at which weights are half way between equal and what the AUC say."""


def learnt_weights(auc_of: Mapping[str, float | None], rarer: int) -> dict[str, float]:
    """α_j of eq. 42 from the AUC of each annotator's gap; the formula is ours, the paper leaves it open.

    With g_j = max(0, 2·AUC_j − 1) and λ = m / (m + 20): α_j = λ·g_j / mean(g) + 1 − λ. They average 1, and few verdicts
    leave them close to equal.

    Args:
        auc_of: by annotator.
        rarer: m, the verdicts of the rarer class.

    Returns:
        Rounded to three places; empty with one annotator, fewer than ten verdicts of a class, or if no AUC is above ½.
    """
    g = {name: max(0.0, 2 * (value or 0.0) - 1) for name, value in auc_of.items()}
    mean = sum(g.values()) / max(len(g), 1)
    if len(g) < 2 or rarer < FEWEST_OF_A_CLASS or mean == 0:
        return {}
    lam = rarer / (rarer + SHRINKAGE)
    return {name: round(lam * value / mean + 1 - lam, 3) for name, value in g.items()}


def weights_yaml(weights: Mapping[str, float], settings: Schedule) -> str:
    """The keys of a process file that make these weights count; names that YAML would misread are quoted."""
    mean = "over_annotators: mean" if settings.over_calls is None else "over_calls: mean"
    lines = ["schedule:", f"  {mean}", "  annotator_weights:"]
    return "\n".join([*lines, *(f"    {_key(name)}: {weight}" for name, weight in weights.items())])


def _key(name: str) -> str:
    return name if load_yaml(f"{name}: 1") == {name: 1} else json.dumps(name)
