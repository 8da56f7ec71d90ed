"""What annotation costs. Appendix G, eq. 60. Knows prices and token counts, not where they come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["PricePerMillion", "annotation_cost", "cost_usd"]


class PricePerMillion(Protocol):
    """USD per million tokens."""

    @property
    def input(self) -> float: ...

    @property
    def output(self) -> float: ...


def cost_usd(price: PricePerMillion | None, tokens_in: float | None, tokens_out: float | None) -> float | None:
    """USD for so many tokens; None if the price or the count is unknown."""
    if price is None or tokens_in is None or tokens_out is None:
        return None
    return (tokens_in * price.input + tokens_out * price.output) / 1e6


def annotation_cost(
    n_pairs: int,
    prices: Sequence[PricePerMillion],
    tokens_in: Sequence[float],
    tokens_out: float,
    retry: float = 1.0,
) -> float:
    """USD to annotate `n_pairs` with every annotator under every prompt variant.

    Args:
        prices: one for each annotator j.
        tokens_in: mean input tokens of a call, one for each prompt variant k.
        tokens_out: mean output tokens of a call.
        retry: ρ ≥ 1, calls made for each call needed.

    Eq. 60.
    """
    return n_pairs * retry * sum((t * p.input + tokens_out * p.output) / 1e6 for p in prices for t in tokens_in)
