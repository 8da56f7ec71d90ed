"""What annotation costs. Appendix G, eq. 60. Knows prices and token counts, not where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

__all__ = ["PricePerMillion", "annotation_cost", "cost_usd"]


class PricePerMillion(Protocol):
    """USD per million tokens."""

    @property
    def input(self) -> float: ...

    @property
    def output(self) -> float: ...


def cost_usd(
    price: PricePerMillion | None, tokens_in: float | None, tokens_out: float | None, batch_discount: float = 0.0
) -> float | None:
    """USD for so many tokens, hidden reasoning counted as output; None if the price or a count is unknown.

    Args:
        batch_discount: share of the price that a batch call saves, 0 to 1.
    """
    if price is None or tokens_in is None or tokens_out is None:
        return None
    return (1 - batch_discount) * (tokens_in * price.input + tokens_out * price.output) / 1e6


def annotation_cost(
    n_pairs: int,
    prices: Sequence[PricePerMillion],
    tokens_in: ArrayLike,
    tokens_out: ArrayLike,
    retry: ArrayLike = 1.0,
    batch_discount: ArrayLike = 0.0,
) -> float:
    """USD to annotate `n_pairs` with every annotator j under every prompt variant k.

    Args:
        prices: one for each annotator j.
        tokens_in: mean input tokens of a call, one for each variant k, or a table annotators × variants.
        tokens_out: mean output tokens of a call, hidden reasoning among them: one number or such a table.
        retry: ρ ≥ 1, calls made for each call needed; one number, or one for each annotator j.
        batch_discount: share of the price that is saved, 0 to 1; one number, or one for each annotator j.

    Differs: the paper has one number of output tokens and one ρ for all annotators, and no discount.

    Eq. 60.
    """
    p_in_j = np.array([price.input for price in prices], dtype=float)[:, None]
    p_out_j = np.array([price.output for price in prices], dtype=float)[:, None]
    share_j = np.asarray(retry, dtype=float) * (1 - np.asarray(batch_discount, dtype=float))
    cost_jk = (np.asarray(tokens_in) * p_in_j + np.asarray(tokens_out) * p_out_j) / 1e6
    return float(n_pairs * (share_j * cost_jk.sum(axis=1)).sum())
