"""What training has seen of its pairs: margins by row and step, and the metrics of the log, by category too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import torch
from torch import Tensor

from sp2dpo.loss import gradient_coefficient
from sp2dpo.train.data import MARGINS_SCHEMA

__all__ = ["Tally", "margins_table"]


@dataclass
class Tally:
    """β, Δ, weight and category of the pairs since the last line of the log."""

    beta: list[Tensor] = field(default_factory=list)
    margin: list[Tensor] = field(default_factory=list)
    weight: list[Tensor] = field(default_factory=list)
    category: list[Tensor] = field(default_factory=list)

    def metrics(self, categories: Sequence[str], *, saturates: bool) -> dict[str, float]:
        """`rewards/margins/…` (mean β_i Δ_i) and `rewards/accuracies/…` by category.

        Where the loss `saturates` in β_i Δ_i, as DPO's does, also `saturation`, mean w_i β_i σ(−β_i Δ_i), over all
        pairs and by category, and `beta_margin`, mean β times mean |Δ|.

        Eq. 8, 9.
        """
        beta, margin, weight = torch.cat(self.beta), torch.cat(self.margin), torch.cat(self.weight)
        pull, reward = -weight * gradient_coefficient(beta, margin), beta * margin
        told: dict[str, float] = {}
        if saturates:
            told |= {"saturation": pull.mean().item(), "beta_margin": (beta.mean() * margin.abs().mean()).item()}
        category = torch.cat(self.category) if self.category else torch.full(beta.shape, -1)
        for n, name in enumerate(categories):
            of = category == n
            if of.any():
                told[f"rewards/margins/{name}"] = reward[of].mean().item()
                told[f"rewards/accuracies/{name}"] = (reward[of] > 0).float().mean().item()
                if saturates:
                    told[f"saturation/{name}"] = pull[of].mean().item()
        return told


def margins_table(margins: list[tuple[int, int, float]]) -> pa.Table:
    """Rows of (step, row of the schedule, Δ in nats)."""
    columns = list(zip(*margins, strict=True)) or [(), (), ()]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, MARGINS_SCHEMA, strict=True)], schema=MARGINS_SCHEMA)
