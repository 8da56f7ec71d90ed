"""How λ makes β: the steps that are in force, and the arithmetic of one pair in words. Sec. 4.3, C.

A step is a title and a line with `{names}`. The page fills the lines for the pair that a reader opens, this module for
the example in the report; the numbers are those of the schedule, not made again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sp2dpo.ensemble import Additive, additive_fit, damping
from sp2dpo.evidence import Array, Evidence
from sp2dpo.rubric import CATEGORIES
from sp2dpo.settings import Schedule
from sp2dpo.temperature import clip01

__all__ = ["NO_ANSWER", "Pipeline", "Setting", "Step", "Worked", "number", "pipeline_of", "schedule_settings", "worked"]

NO_ANSWER = "no answer"

_ENVELOPE = "{low} + {width} × {clipped} = {beta}"


@dataclass(frozen=True)
class Step:
    """One step; its line is filled once for each call, once for each annotator, or once for the pair."""

    title: str
    of: Literal["call", "annotator", "pair"]
    line: str


@dataclass(frozen=True)
class Pipeline:
    """The steps of λ and the constants in them, as text: weights, and the lower end and width of each envelope."""

    steps: tuple[Step, ...]
    weights_j: tuple[str, ...] | None
    weights_k: tuple[str, ...] | None
    bounds: Mapping[str, tuple[str, str]]
    offsets: Additive | None
    damping: tuple[float, str] | None


@dataclass(frozen=True)
class Worked:
    """A step with the numbers of one pair."""

    title: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """A setting of the schedule, as the process file would have it."""

    name: str
    value: str
    what: str


def schedule_settings(settings: Schedule) -> list[Setting]:
    """All of them, those that λ does not name too."""
    fields = type(settings).model_fields
    return [
        Setting(name, json.dumps(value, ensure_ascii=False), fields[name].description or "")
        for name, value in settings.model_dump(mode="json").items()
    ]


def pipeline_of(evidence: Evidence) -> Pipeline:
    """The steps from judgements to β in the order in which they are taken."""
    settings = evidence.run.process.settings.schedule
    envelopes = {name: settings.envelopes.get(name, settings) for name in CATEGORIES}
    return Pipeline(
        steps=tuple(
            Step(f"{n}. {one.title}", one.of, one.line) for n, one in enumerate(_steps(settings, evidence), start=1)
        ),
        weights_j=_weights(settings.annotator_weights, evidence.annotators),
        weights_k=_weights(settings.prompt_weights, evidence.variants),
        bounds={name: (f"{one.beta_min:g}", f"{one.beta_max - one.beta_min:g}") for name, one in envelopes.items()},
        offsets=None if settings.debias is None else additive_fit(evidence.gap_ijk, settings.debias),
        damping=(settings.damping.strength, settings.damping.form) if settings.damping else None,
    )


def _weights(weights: Mapping[str, float] | None, names: Sequence[str]) -> tuple[str, ...] | None:
    return None if weights is None else tuple(f"{weights[name]:g}" for name in names)


def _steps(settings: Schedule, evidence: Evidence) -> list[Step]:
    call = "{annotator}, {variant}: "
    steps = [
        Step("Gap of a judgement: magnitude × confidence (eq. 29)", "call", call + "{magnitude} × {confidence} = {gap}")
    ]
    if settings.debias is not None:
        title = f"Offsets of annotators and prompts taken out (eq. 44, ridge {settings.debias:g})"
        steps.append(Step(title, "call", call + "{gap} − ({offset_j}) − ({offset_k}) = {debiased}"))
    return steps + (_over_calls(settings) if settings.over_calls else _in_two(settings, evidence))


def _over_calls(settings: Schedule) -> list[Step]:
    weighted = bool(settings.annotator_weights or settings.prompt_weights)
    name, source = _operator(str(settings.over_calls), weighted, settings, "eq. 43")
    title = f"{_capital(name)} over all judgements of the pair at once ({source}), clipped to [0, 1]"
    return [Step(title, "pair", f"{name} of {{calls}} = {{clipped}}"), _envelope("pair", settings)]


def _in_two(settings: Schedule, evidence: Evidence) -> list[Step]:
    k, j = len(evidence.variants), len(evidence.annotators)
    weighted = settings.prompt_weights is not None
    over = "median" if settings.over_prompts == "median" else "weighted mean" if weighted else "mean"
    source = "eq. 16" if over == "median" else "eq. 41"
    title = f"{_capital(over)} over the prompt variants ({k}), for each annotator ({source})"
    steps = [Step(title, "annotator", f"{{annotator}}: {over} of {{gaps}} = {{centre}}")]
    if settings.damping:
        strength, form = f"{settings.damping.strength:g}", settings.damping.form
        factor = f"exp(−{strength} × {{mad}})" if form == "exponential" else f"1 / (1 + {strength} × {{mad}})"
        title = "Less where the prompts disagree, by their median absolute deviation (eq. 36, 39, 40)"
        steps.append(Step(title, "annotator", f"{{annotator}}: {{centre}} × {factor} = {{gap}}"))
    name, source = _operator(settings.over_annotators, settings.annotator_weights is not None, settings, "eq. 17")
    title = f"{_capital(name)} over the annotators ({j}) ({source})"
    if settings.over_annotators == "huber":
        title += ", of gaps clipped to [0, 1]"
        return [*steps, Step(title, "pair", f"{name} of {{gaps}} = {{clipped}}"), _envelope("pair", settings)]
    return [*steps, _envelope("annotator", settings), Step(title, "pair", f"{name} of {{betas}} = {{beta}}")]


def _operator(name: str, weighted: bool, settings: Schedule, mean: str) -> tuple[str, str]:
    """What an operator over annotators or calls is called, and where it is from."""
    if weighted:
        return "weighted mean", "eq. 43" if mean == "eq. 43" else "eq. 42"
    if name == "trimmed_mean":
        return f"mean without {settings.trim:g} at each end", "C.5.3"
    if name == "huber":
        return f"Huber mean (δ = {settings.huber_delta:g})", "C.5.3"
    return name, mean if name == "mean" else "C.5.3"


def _envelope(of: Literal["annotator", "pair"], settings: Schedule) -> Step:
    title = "Envelope: β_min + (β_max − β_min) × gap, the gap clipped to [0, 1] (eq. 15)"
    if settings.envelopes:
        title += ", with the bounds of the pair's category (J.5)"
    return Step(title, of, ("{annotator}: " if of == "annotator" else "β = ") + _ENVELOPE)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def number(value: float) -> str:
    """Four decimals; what is missing in words."""
    return f"{value:.4f}".replace("-", "−") if np.isfinite(value) else NO_ANSWER


def worked(evidence: Evidence, pipeline: Pipeline, i: int) -> list[Worked]:
    """The steps with the numbers of the pair in row `i` of the schedule."""
    values = {
        "call": [v for j in range(len(evidence.annotators)) for v in _of_calls(evidence, pipeline, i, j)],
        "annotator": [_of_annotator(evidence, pipeline, i, j) for j in range(len(evidence.annotators))],
        "pair": [_of_pair(evidence, pipeline, i)],
    }
    return [
        Worked(one.title, tuple(re.sub(r"{(\w+)}", lambda m, v=v: v[m[1]], one.line) for v in values[one.of]))  # type: ignore[misc]
        for one in pipeline.steps
    ]


def _debiased(evidence: Evidence, pipeline: Pipeline, i: int) -> Array:
    gap_jk: Array = evidence.gap_ijk[i]
    offsets = pipeline.offsets
    return gap_jk if offsets is None else gap_jk - offsets.b[:, None] - offsets.d


def _of_calls(evidence: Evidence, pipeline: Pipeline, i: int, j: int) -> list[dict[str, str]]:
    debiased, offsets = _debiased(evidence, pipeline, i), pipeline.offsets
    return [
        {
            "annotator": evidence.annotators[j],
            "variant": variant,
            "magnitude": number(evidence.magnitude_ijk[i, j, k]),
            "confidence": number(evidence.confidence_ijk[i, j, k]),
            "gap": number(evidence.gap_ijk[i, j, k]),
            "offset_j": number(offsets.b[j] if offsets else 0.0),
            "offset_k": number(offsets.d[k] if offsets else 0.0),
            "debiased": number(debiased[j, k]),
        }
        for k, variant in enumerate(evidence.variants)
    ]


def _of_annotator(evidence: Evidence, pipeline: Pipeline, i: int, j: int) -> dict[str, str]:
    gap, mad = float(evidence.gap_ij[i, j]), float(evidence.disagreement_ij[i, j])
    factor = float(damping(mad, pipeline.damping[0], pipeline.damping[1])) if pipeline.damping else 1.0  # type: ignore[arg-type]
    low, width = pipeline.bounds[str(evidence.category_i[i])]
    return {
        "annotator": evidence.annotators[j],
        "gaps": _listed(_debiased(evidence, pipeline, i)[j], pipeline.weights_k),
        "centre": number(gap / factor if factor > 0 else np.nan),
        "mad": number(mad),
        "gap": number(gap),
        "low": low,
        "width": width,
        "clipped": number(float(clip01(gap))),
        "beta": number(evidence.beta_ij[i, j]),
    }


def _of_pair(evidence: Evidence, pipeline: Pipeline, i: int) -> dict[str, str]:
    low, width = pipeline.bounds[str(evidence.category_i[i])]
    debiased, w_j, w_k = _debiased(evidence, pipeline, i), pipeline.weights_j, pipeline.weights_k
    w_jk = None
    if w_j or w_k:
        w_jk = tuple("·".join(w for w in (w_j and w_j[j], w_k and w_k[k]) if w) for j, k in np.ndindex(debiased.shape))
    return {
        "calls": _listed(debiased.ravel(), w_jk),
        "gaps": _listed(clip01(evidence.gap_ij[i]), None),
        "betas": _listed(evidence.beta_ij[i], w_j),
        "low": low,
        "width": width,
        "clipped": number(evidence.gap_i[i]),
        "beta": number(evidence.beta_i[i]),
    }


def _listed(values: Array, weights: Sequence[str] | None) -> str:
    """Numbers with their weights, if they have any."""
    shown = [number(value) for value in values]
    return ", ".join(shown if weights is None else [f"{w} × {one}" for w, one in zip(weights, shown, strict=True)])
