"""The charts of the data itself: lengths, overlap, diversity, scores, and whether β follows any of them. E.2, E.4.1.

Figures 3 to 15. Knows what is drawn and what is told about it, not how it is drawn or counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sp2dpo.correlation import rank_correlation, ranks
from sp2dpo.evidence import Array, Evidence
from sp2dpo.report import figures
from sp2dpo.report.charts import Chart
from sp2dpo.report.figures import Line
from sp2dpo.report.texts import SCORES, Texts, read_texts

__all__ = ["Followed", "data_charts", "explained", "features", "followed"]

MOST_BARS: Final = 40
TRIMMED: Final = 99.5
FEWEST: Final = 30
"""Pairs below which nothing is said about what β follows."""

Limits = tuple[float, float]


def data_charts(evidence: Evidence) -> list[tuple[str, list[Chart]]]:
    """Headings with their charts."""
    texts = read_texts(evidence)
    return [
        ("Lengths of prompts and responses", _length_charts(evidence, texts)),
        ("Chosen against rejected", [_delta(texts), _chosen_rejected(texts), *_score_chart(texts)]),
        ("Overlap and diversity of words", [_overlap(texts), _diversity(texts)]),
        ("What goes with what", [_heatmap(texts), _beta_chart(evidence, texts)]),
    ]


def _length_charts(evidence: Evidence, texts: Texts) -> list[Chart]:
    """Figures 3 to 9. Limits of training are drawn where lengths are in its tokens."""
    limits = _limits(evidence) if texts.unit == "tokens" else {}
    longest_prompt, longest = limits.get("max_prompt_length"), limits.get("max_length")
    both = np.concatenate([texts.total("chosen"), texts.total("rejected")])
    return [
        _length(texts, "prompt", texts.length["prompt"], longest_prompt, f"{_read(texts)} {texts.counted}"),
        _lengths_of_both(texts),
        _length(texts, "chosen response", texts.length["chosen"]),
        _length(texts, "rejected response", texts.length["rejected"]),
        _length(texts, "prompt + chosen", texts.total("chosen"), longest),
        _length(texts, "prompt + rejected", texts.total("rejected"), longest),
        _length(texts, "prompt + either response", both, longest, "Each pair counts twice."),
    ]


def _limits(evidence: Evidence) -> dict[str, Line]:
    """Where training cuts, as far as λ says it."""
    train = evidence.run.process.settings.train
    if train is None:
        return {}
    set_to = {"max_prompt_length": train.max_prompt_length, "max_length": (train.model_extra or {}).get("max_length")}
    return {name: Line(f"{name} {at:,}", at, ":") for name, at in set_to.items() if at}


def _read(texts: Texts) -> str:
    n = len(texts.row_i)
    if n == texts.of:
        return f"All {n:,} scheduled pairs."
    return f"There is much text: these charts show {n:,} of {texts.of:,} scheduled pairs, evenly spaced."


def _length(texts: Texts, what: str, values: Array, limit: Line | None = None, more: str = "") -> Chart:
    p99, longest = float(np.percentile(values, 99)), float(values.max())
    lines = [Line(f"99% up to {_whole(p99)}", p99, "--"), Line(f"longest {_whole(longest)}", longest)]
    beyond = ""
    if limit:
        lines.append(limit)
        n = int((values > limit.at).sum())
        beyond = f" Training cuts {n:,} of {len(values):,} ({n / len(values):.1%}) at {limit.name}."
    edges = _edges(0, max(np.percentile(values, TRIMMED), _near(limit, p99)))
    width = edges[1] - edges[0]
    name = "length-" + what.replace(" + ", "-").replace(" ", "-")
    told = f"median {_whole(np.median(values))}, 99th percentile {_whole(p99)}, longest {_whole(longest)}"
    return Chart(
        name,
        figures.lengths(name, values, edges, f"{what}, {texts.unit}", lines),
        f"Histogram of the length of {what} in {texts.unit}, {len(values):,} values: {told}.{beyond}",
        f"{_capital(what)}, median {_whole(np.median(values))}; bins of {_whole(width)}.{beyond} {more}".strip(),
    )


def _near(limit: Line | None, p99: float) -> float:
    """A limit that is worth an axis up to it."""
    return limit.at if limit and limit.at <= 1.5 * p99 else 0.0


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _edges(low: float, high: float) -> Array:
    """Edges of bins that are a power of two wide, from `low` or before to `high` or beyond, and hold 0."""
    width = 1
    while high - low > width * MOST_BARS:
        width *= 2
    edges: Array = width * np.arange(np.floor(low / width), max(np.ceil(high / width), np.floor(low / width) + 1) + 1.0)
    return edges


def _lengths_of_both(texts: Texts) -> Chart:
    values = {side: texts.length[side] for side in ("chosen", "rejected")}
    edges = _edges(0, np.percentile(np.concatenate(list(values.values())), TRIMMED))
    return _overlay("length-responses", values, edges, f"length, {texts.unit}", "Lengths of both responses", 0)


def _overlay(name: str, values: Mapping[str, Array], edges: Array, label: str, caption: str, places: int) -> Chart:
    there = {side: of[np.isfinite(of)] for side, of in values.items()}
    told = "; ".join(f"{side}: {np.median(of):,.{places}f}" for side, of in there.items() if len(of))
    beyond = sum(int((of > edges[-1]).sum()) for of in there.values())
    cut = f" The axis leaves out {beyond:,} that are larger." if beyond else ""
    return Chart(
        name,
        figures.overlay(name, there, edges, label),
        f"{caption}, histograms of {' and '.join(there)}. Medians: {told}.{cut}",
        f"{caption}. Medians: {told}.{cut}",
    )


def _delta(texts: Texts) -> Chart:
    """Figure 10."""
    delta = texts.delta_i
    low, high = np.percentile(delta, (100 - TRIMMED, TRIMMED))
    median = float(np.median(delta))
    longer, equal = float((delta > 0).mean()), float((delta == 0).mean())
    told = f"The chosen response is longer in {longer:.1%} of the pairs, equally long in {equal:.1%}"
    lines = [Line("equally long", 0, ":"), Line(f"median {_signed(median)}", median, "--")]
    label = f"chosen less rejected, {texts.unit}"
    return Chart(
        "length-delta",
        figures.lengths("length-delta", delta, _edges(min(low, 0), max(high, 0)), label, lines),
        f"Histogram of the length of the chosen response less that of the rejected, in {texts.unit}. {told}; median "
        f"{_signed(median)}, mean {_signed(delta.mean())}.",
        f"{told}: mostly longer ones teach length too. The axis leaves out the outer 1%.",
    )


def _signed(value: float) -> str:
    return f"{value:+z,.1f}".replace("-", "−")


def _chosen_rejected(texts: Texts) -> Chart:
    """Figure 11."""
    x, y = texts.length["rejected"], texts.length["chosen"]
    top = float(_edges(0, max(np.percentile(x, TRIMMED), np.percentile(y, TRIMMED)))[-1])
    labels = (f"rejected, {texts.unit}", f"chosen, {texts.unit}")
    told = _density_told(x, y, (0, top), (0, top))
    names = " and ".join(SCORES[0])
    missing = (
        "" if texts.score else f" Scores against lengths are not drawn: the source has no columns such as {names}."
    )
    return Chart(
        "length-chosen-rejected",
        figures.density("length-chosen-rejected", x, y, labels, (0, top), (0, top), diagonal=True),
        f"Hexagons of the length of the chosen response over that of the rejected, in {texts.unit}. {told}",
        f"Fuller: more pairs. Above the line the chosen response is longer. {told}{missing}",
    )


def _density_told(x: Array, y: Array, xlim: Limits, ylim: Limits) -> str:
    there = (x >= xlim[0]) & (x <= xlim[1]) & (y >= ylim[0]) & (y <= ylim[1])
    out = len(x) - int(there.sum())
    left = f" {out:,} of {len(x):,} pairs lie beyond the axes." if out else ""
    return f"Rank correlation {_rho(rank_correlation(x, y))}.{left}"


def _rho(value: float | None) -> str:
    return "not defined" if value is None else f"{value:z.2f}".replace("-", "−")


def _score_chart(texts: Texts) -> list[Chart]:
    """Figure 12, if there are scores."""
    gap = texts.score_gap_i
    if gap is None or texts.scored_by is None:
        return []
    there = np.isfinite(gap)
    x, y = texts.delta_i[there], gap[there]
    xlim = _around(*np.percentile(x, (100 - TRIMMED, TRIMMED)))
    ylim = _around(*np.percentile(y, (100 - TRIMMED, TRIMMED)))
    told = _density_told(x, y, xlim, ylim)
    lower = int((y < 0).sum())
    label = (f"chosen less rejected, {texts.unit}", "score gap")
    source = f"Score gap: {' less '.join(texts.scored_by)}. {len(y):,} pairs have both"
    return [
        Chart(
            "score-gap-length-delta",
            figures.density("score-gap-length-delta", x, y, label, xlim, ylim),
            f"Hexagons of the score gap over the length delta in {texts.unit}. {source}; {lower:,} of them score the "
            f"chosen response lower. {told}",
            f"{source}; in {lower:,} the chosen response scores lower. {told}",
        )
    ]


def _around(low: float, high: float) -> Limits:
    """Limits of an axis that is never empty, and has room for the hexagons at its ends."""
    pad = 0.04 * (high - low) or 0.04 * abs(high) or 1.0
    return float(low - pad), float(high + pad)


def _overlap(texts: Texts) -> Chart:
    """Figure 13."""
    top = max(float(np.nanpercentile(of, TRIMMED)) if np.isfinite(of).any() else 0.0 for of in texts.overlap.values())
    edges = np.linspace(0, min(1.0, np.ceil(max(top, 0.02) * 20) / 20), 31)
    caption = "Words that prompt and response share, of all that either has (Jaccard)"
    return _overlay("overlap", texts.overlap, edges, "overlap with the prompt", caption, 3)


def _diversity(texts: Texts) -> Chart:
    """Figure 14."""
    caption = "Different words by all words of a text (type-token ratio); long texts have lower ones"
    return _overlay("diversity", texts.diversity, np.linspace(0, 1, 41), "type-token ratio", caption, 3)


def features(texts: Texts) -> dict[str, Array]:
    """Length, lexical and score features of the pairs, by the names that charts show."""
    named = {f"{side} length": of for side, of in texts.length.items()}
    named["length delta"] = texts.delta_i
    named |= {f"overlap, {side}": of for side, of in texts.overlap.items()}
    named |= {f"diversity, {side}": of for side, of in texts.diversity.items()}
    named |= {f"score, {side}": of for side, of in texts.score.items()}
    if texts.score_gap_i is not None:
        named["score gap"] = texts.score_gap_i
    return named


def _spearman(x: Array, y: Array) -> tuple[float | None, int]:
    """The rank correlation where both are known, and how many pairs that are."""
    there = np.isfinite(x) & np.isfinite(y)
    return rank_correlation(x[there], y[there]), int(there.sum())


def _heatmap(texts: Texts) -> Chart:
    """Figure 15."""
    named = features(texts)
    names, columns = list(named), list(named.values())
    rho = np.full((len(names), len(names)), np.nan)
    for row, column in zip(*np.tril_indices(len(names), -1), strict=True):
        value, _ = _spearman(columns[row], columns[column])
        rho[row, column] = np.nan if value is None else value
    strongest = np.argsort(-np.abs(np.nan_to_num(rho)), axis=None, kind="stable")[:3]
    places: list[NDArray[np.int64]] = [np.array(np.unravel_index(flat, rho.shape)) for flat in strongest]
    told = "; ".join(f"{names[c]} and {names[r]} {_rho(float(rho[r, c]))}" for r, c in places if np.isfinite(rho[r, c]))
    return Chart(
        "correlations",
        figures.heatmap("correlations", names, rho),
        f"Rank correlations of {len(names)} features with each other, {len(texts.row_i):,} pairs. "
        f"Strongest: {told or 'none is defined'}.",
        f"Rank correlation (Spearman) in hundredths; – is not defined. Strongest: {told or 'none is defined'}.",
    )


@dataclass(frozen=True)
class Followed:
    """Rank correlation of β with one feature, and its 95 % interval; NaN where it is not defined."""

    name: str
    rho: float
    low: float
    high: float


def followed(beta_i: Array, named: Mapping[str, Array]) -> list[Followed]:
    """β against each feature; the interval is Bonett and Wright's (2000, doi:10.1007/BF02294183)."""
    return [_followed(name, *_spearman(beta_i, of)) for name, of in named.items()]


def _followed(name: str, rho: float | None, n: int) -> Followed:
    if rho is None:
        return Followed(name, np.nan, np.nan, np.nan)
    if n <= 3 or abs(rho) > 1 - 1e-12:
        return Followed(name, rho, np.nan, np.nan)
    half = 1.96 * np.sqrt((1 + rho**2 / 2) / (n - 3))
    return Followed(name, rho, float(np.tanh(np.arctanh(rho) - half)), float(np.tanh(np.arctanh(rho) + half)))


def explained(beta_i: Array, columns: Sequence[Array]) -> float | None:
    """Adjusted R² of the ranks of β on those of the columns, at least 0; None of fewer than 30 pairs or constant β."""
    n = len(beta_i)
    if n < FEWEST or np.ptp(beta_i) < 1e-12:
        return None
    y, x = ranks(beta_i), np.stack([np.ones(n), *(ranks(column) for column in columns)], axis=1)
    fit, _, rank, _ = np.linalg.lstsq(x, y, rcond=None)
    share = 1 - ((y - x @ fit) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    return max(float(1 - (1 - share) * (n - 1) / (n - rank)), 0.0)


def _beta_chart(evidence: Evidence, texts: Texts) -> Chart:
    """E.4.1: whether β is a matter of length."""
    beta_i = evidence.beta_i[texts.row_i]
    distance = np.abs(texts.delta_i)
    found = followed(beta_i, {**features(texts), "length distance": distance})
    share = explained(beta_i, [*texts.length.values(), texts.delta_i, distance])
    known = [one for one in found if np.isfinite(one.rho)]
    most = max(known, key=lambda one: abs(one.rho), default=None)
    strongest = f" Strongest: {most.name}, {_rho(most.rho)}." if most else ""
    rho, low, high = (np.array([getattr(one, name) for one in found]) for name in ("rho", "low", "high"))
    label = "rank correlation with β"
    return Chart(
        "beta-features",
        figures.bars("beta-features", [one.name for one in found], rho, low, high, label),
        f"Rank correlation of β with each feature, {len(beta_i):,} pairs: "
        f"{'; '.join(f'{one.name} {_rho(one.rho)}' for one in known) or 'none is defined'}. {_verdict(share)}",
        f"{_verdict(share)}{strongest} Bars: 95% intervals. Length distance: length delta without its sign.",
    )


def _verdict(share: float | None) -> str:
    if share is None:
        return "Too few pairs, or too equal a β, to say whether β is a proxy of length."
    said = "is no proxy of length" if share < 0.1 else "follows length in part" if share < 0.5 else "is largely length"
    return f"β {said}: all lengths together explain {_percent(share)} of the variance of its ranks."


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else "less than 1%"
