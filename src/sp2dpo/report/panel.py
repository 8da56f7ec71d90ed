"""Who is in the panel: annotators that judged, and local predictors among them."""

from __future__ import annotations

from sp2dpo.evidence import Evidence
from sp2dpo.numbers import some

__all__ = ["panel_of", "predictors_of"]


def predictors_of(evidence: Evidence) -> tuple[str, ...]:
    """The annotators that are local predictors, whose answers under all prompts are one voice."""
    return evidence.run.process.settings.panel.predictors


def panel_of(evidence: Evidence) -> str:
    """How many annotators there are, and how many predictors beside them."""
    predictors = len(predictors_of(evidence))
    judges = len(evidence.annotators) - predictors
    return " and ".join(some(n, what) for n, what in ((judges, "annotator"), (predictors, "predictor")) if n)
