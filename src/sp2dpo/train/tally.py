"""What training has seen of its pairs: margins by row and step, and the metrics of the log, by category too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import torch
from torch import Tensor

from sp2dpo.loss import gradient_coefficient
from sp2dpo.methods.losses import Controls
from sp2dpo.train.data import MARGINS_SCHEMA

__all__ = ["Tally", "margins_table", "pull"]


@dataclass
class Tally:
    """Of the pairs since the last line of the log: β of the data, Δ, β as used, the pull of the loss, and category."""

    beta: list[Tensor] = field(default_factory=list)
    margin: list[Tensor] = field(default_factory=list)
    used: list[Tensor] = field(default_factory=list)
    pull: list[Tensor] = field(default_factory=list)
    category: list[Tensor] = field(default_factory=list)

    def metrics(self, categories: Sequence[str], *, saturates: bool) -> dict[str, float]:
        """`rewards/margins/…` (mean β_i Δ_i) and `rewards/accuracies/…` by category.

        Where the loss `saturates` in β_i Δ_i, as DPO's does, also `saturation`, the mean pull, over all pairs and by
        category, and `beta_margin`, mean β times mean |Δ|.

        Eq. 8, 9.
        """
        margin, pulls = torch.cat(self.margin), torch.cat(self.pull)
        reward = torch.cat(self.beta) * margin
        told: dict[str, float] = {}
        if saturates:
            told["beta_margin"] = (torch.cat(self.used).mean() * margin.abs().mean()).item()
            told["saturation"] = pulls.nanmean().item()
        category = torch.cat(self.category) if self.category else torch.full(margin.shape, -1)
        for n, name in enumerate(categories):
            of = category == n
            if of.any():
                told[f"rewards/margins/{name}"] = reward[of].mean().item()
                told[f"rewards/accuracies/{name}"] = (reward[of] > 0).float().mean().item()
                if saturates:
                    told[f"saturation/{name}"] = pulls[of].nanmean().item()
        return {name: value for name, value in told.items() if not math.isnan(value)}


def pull(controls: Controls, margin: Tensor) -> Tensor:
    """w_i β_i σ(−β_i (Δ_i − m_i)), what a pair pulls its margin with under a logistic loss, (B,); NaN for SFT.

    Eq. 8, 9.
    """
    rest = margin if controls.margin is None else margin - controls.margin
    strength = -gradient_coefficient(controls.beta, rest)
    if controls.weight is not None:
        strength = controls.weight * strength
    return strength if controls.sft is None else strength.masked_fill(controls.sft.bool(), math.nan)


def margins_table(margins: list[tuple[int, int, float]]) -> pa.Table:
    """Rows of (step, row of the schedule, Δ in nats)."""
    columns = list(zip(*margins, strict=True)) or [(), (), ()]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, MARGINS_SCHEMA, strict=True)], schema=MARGINS_SCHEMA)
