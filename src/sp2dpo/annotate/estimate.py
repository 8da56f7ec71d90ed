"""What a panel will ask, and what that costs, before it is asked. Appendix G."""

from __future__ import annotations

from typing import Any

from sp2dpo.cost import annotation_cost
from sp2dpo.pairs import prepare
from sp2dpo.process import Process
from sp2dpo.prompts import render

__all__ = ["estimate"]

CHARACTERS_PER_TOKEN = 4
OUTPUT_TOKENS = 40


def estimate(process: Process, limit: int | None = None) -> dict[str, Any]:
    """Calls, tokens and USD of a whole panel; tokens are guessed from characters, and no call fails.

    USD is None if an annotator that is asked over the network has no price.
    """
    settings = process.settings
    pairs = prepare(settings.data, process.base).pairs.slice(0, limit).to_pylist()
    asked = [a for a in settings.panel.annotators if a.kind != "recorded"]
    tokens = []
    for variant in settings.panel.variants:
        messages = (render(process.pack, variant, p["prompt"], p["chosen"], p["rejected"]) for p in pairs)
        tokens.append(sum(len(m["content"]) for two in messages for m in two) / CHARACTERS_PER_TOKEN / len(pairs))
    prices = [a.price for a in asked if a.price is not None]
    known = len(prices) == len(asked)
    return {
        "pairs": len(pairs),
        "calls": len(pairs) * len(asked) * len(tokens),
        "recorded_answers": len(pairs) * (len(settings.panel.annotators) - len(asked)) * len(tokens),
        "input_tokens": round(len(pairs) * len(asked) * sum(tokens)),
        "output_tokens": len(pairs) * len(asked) * len(tokens) * OUTPUT_TOKENS,
        "usd": annotation_cost(len(pairs), prices, tokens, OUTPUT_TOKENS) if known else None,
        "oldest_price": min(price.as_of for price in prices).isoformat() if prices else None,
    }
