"""The shared layout: a batch of pairs as one packed row that computes every common prefix once. Exact, and faster.

A collator adds `plan(batch)` under `KEY`; `install(model)` lets a model that TRL trains compute on it; `why_not` says
in which cases padded rows must be used instead.
"""

from __future__ import annotations

from sp2dpo.train.layout.install import KEY, install
from sp2dpo.train.layout.plan import plan
from sp2dpo.train.layout.support import why_not

__all__ = ["KEY", "install", "plan", "why_not"]
