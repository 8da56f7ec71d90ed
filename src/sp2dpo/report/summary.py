"""What a reader in a hurry is told: a handful of answers, each from numbers that the sections below show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sp2dpo.audit.agreement import AgreementReport, Among
from sp2dpo.audit.errors import LabelErrors
from sp2dpo.evidence import Evidence
from sp2dpo.hashing import sha256_file
from sp2dpo.numbers import dec, percent, signed, some
from sp2dpo.report.account import Sum
from sp2dpo.report.marks import Marks
from sp2dpo.report.measured import ArmRow, Contrast, Training
from sp2dpo.report.panel import panel_of, predictors_of
from sp2dpo.report.provenance import FileRow
from sp2dpo.report.sections import CategoryRow, Reversed
from sp2dpo.report.tally import Spent, Tally
from sp2dpo.runs import Run
from sp2dpo.tables import read_manifest

__all__ = ["WIDE", "Told", "agreeing", "in_short", "warnings"]

WIDE = 0.2
"""Judgements of a pair that lie further apart than this are called far apart."""

MOST_NAMED = 4
MOST_ARMS = 4


@dataclass(frozen=True)
class Told:
    """An answer to one question; `show` is the filter of the list of pairs that shows what it is about."""

    what: str
    sentences: tuple[str, ...]
    show: str | None = None
    bad: bool = False


def in_short(
    evidence: Evidence,
    tally: Tally,
    spent: Spent,
    sums: Sequence[Sum],
    rows: Sequence[CategoryRow],
    agreed: AgreementReport,
    errors: LabelErrors,
    reversed: Reversed | None,
    marks: Marks,
    training: Training,
    files: Sequence[FileRow],
) -> list[Told]:
    """About ten answers, the most important first."""
    doubted = len(errors.listed)
    told = [
        Told("Pairs", (_rows(evidence), *_left_out(sums))),
        Told("Judged by", (_panel(evidence), *_served(tally))),
        Told("β", (_beta(evidence), _categories(rows))),
        Told("Agreement", (*_alpha(evidence, agreed), _spread(evidence))),
        Told("Likely label errors", (_doubted(evidence, doubted),), "f-errors" if doubted else None),
        Told("Known to be reversed", (_reversed(reversed, marks),), "f-reversed" if marks.usable else None),
        Told("Checked by people", _people(evidence.run)),
        Told("Cost", (_cost(spent),)),
        Told("Training", tuple(_training(training))),
        Told("Missing", (_missing(tally, training),)),
        _state(files),
    ]
    return [one for one in told if one.sentences]


def warnings(evidence: Evidence) -> list[str]:
    """What must be known before any number is read."""
    settings = evidence.run.process.settings
    toy = [_TOY] if settings.student and settings.student.model == "toy" else []
    names = [f"{a.name} (model: {a.model})" for a in settings.panel.annotators if a.kind == "recorded"]
    recorded = [f"Recorded answers, for which no model was asked in this run: {', '.join(names)}."] if names else []
    kinds = {a.name: a.kind for a in settings.panel.asked}
    listed = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
    typed = [f"Typed decisions are not the paper's protocol ({listed})."] if "decisions" in kinds.values() else []
    local = ", ".join(predictors_of(evidence))
    predicted = [f"{_PREDICTED}: {local}. {_ONE_VOICE}"] if local else []
    return toy + recorded + typed + predicted


_PREDICTED = "Predicted by a local model, not judged"
_ONE_VOICE = "A predictor repeats what another panel said, and its answers under all prompts are one voice."

_TOY = (
    "The student is a toy: a tiny random model made in the run and trained for minutes. Its margins show that training "
    "works and how β acts; nothing about the quality of any model follows from them."
)


def _rows(evidence: Evidence) -> str:
    manifest = read_manifest(evidence.run.pairs)
    total = manifest["counts"]["raw"] if manifest else evidence.pairs.num_rows
    out = total - evidence.n
    left_out = f"{out:,} were left out, each with a reason" if out else "none was left out"
    return f"{evidence.n:,} of {total:,} source rows have a β; {left_out}."


def _left_out(sums: Sequence[Sum]) -> list[str]:
    parts = {
        part.what.partition(": ")[2]: part.n
        for one in sums
        for part in one.parts
        if part.n and part.what.startswith(("dropped: ", "left out: "))
    }
    if not parts:
        return []
    most = sorted(parts.items(), key=lambda item: -item[1])
    named = ", ".join(f"{name} {n:,}" for name, n in most[:MOST_NAMED])
    more = "; " + some(len(most) - MOST_NAMED, "more reason") if len(most) > MOST_NAMED else ""
    return [f"Left out: {named}{more}."]


def _panel(evidence: Evidence) -> str:
    answers = int(np.isfinite(evidence.gap_ijk).sum())
    who = f"{panel_of(evidence)} under {some(len(evidence.variants), 'prompt')}"
    return f"{who}: {some(answers, 'answer')} about the pairs of the schedule."


def _served(tally: Tally) -> list[str]:
    """Each annotator with the models that answered for it, and when."""
    found: dict[str, list[str]] = {}
    for one in tally.served.values():
        days = sorted({one.first[:10], one.last[:10]} - {""})
        named = one.served or f"{one.requested} asked for, the name of what answered not reported"
        named = f"{one.requested} (recorded answers)" if one.origin == "recorded" else named
        named = f"{named} (predicted)" if one.origin == "predicted" else named
        asked = f" (asked for: {one.requested})" if one.swapped else ""
        text = f"{named}{asked}" + (f", {' to '.join(days)}" if days else "")
        if text not in found.setdefault(one.annotator, []):
            found[one.annotator].append(text)
    return [f"{name}: {'; '.join(models)}." for name, models in found.items()]


def _beta(evidence: Evidence) -> str:
    beta, bounds = evidence.beta_i, evidence.run.process.settings.schedule
    envelope = f"the envelope [{bounds.beta_min:g}, {bounds.beta_max:g}]"
    own = f", with bounds of their own for {', '.join(bounds.envelopes)}" if bounds.envelopes else ""
    return f"β runs from {beta.min():.4f} to {beta.max():.4f}, mean {beta.mean():.4f}, in {envelope}{own}."


def _categories(rows: Sequence[CategoryRow]) -> str:
    there = [row for row in rows if row.mean is not None]
    if len(there) == 1:
        return f"All pairs are of one category: {there[0].name}."
    ordered = sorted(there, key=lambda row: row.mean or 0)
    low, high = (f"{row.name} ({row.mean:.3f}, n = {row.n:,})" for row in (ordered[0], ordered[-1]))
    return f"The highest mean β has {high}, the lowest {low}."


def agreeing(agreed: AgreementReport) -> list[Among]:
    """All groups of raters, that of the annotators first."""
    return [one for one in (agreed.annotators, agreed.calls, *agreed.prompts) if one is not None]


def _alpha(evidence: Evidence, agreed: AgreementReport) -> list[str]:
    groups, predictors = agreeing(agreed), predictors_of(evidence)
    if _alone(evidence) or not groups or groups[0].alpha_gap.value is None:
        return []
    one = groups[0]
    alpha = groups[0].alpha_gap.value
    said = "reliable" if alpha >= 0.8 else "good for tentative conclusions only" if alpha >= 0.667 else "not reliable"
    interval = ""
    if one.alpha_gap.low is not None and one.alpha_gap.high is not None:
        interval = f" ({dec(one.alpha_gap.low, 2)} to {dec(one.alpha_gap.high, 2)})"
    who = panel_of(evidence) if agreed.annotators and predictors else f"the {one.of}"
    told = (
        f"α = {dec(alpha, 2)}{interval} between {who}, of the gap (Krippendorff). 1 is full agreement, 0 is chance; "
        f"by the usual marks, 0.8 and 0.667, this is {said}."
    )
    alone = "One annotator: this is how far it agrees with itself under other prompts, not whether others would agree."
    return [told] if agreed.annotators else [told, alone]


def _alone(evidence: Evidence) -> bool:
    """Whether the panel is one predictor."""
    return len(evidence.annotators) == len(predictors_of(evidence)) == 1


def _spread(evidence: Evidence) -> str:
    judged, spread = evidence.gap_ijk[0].size, evidence.spread_i
    if _alone(evidence):
        return "One predictor: its answers under all prompts are one, so nothing is known about disagreement."
    if judged == 1:
        return "Each pair was judged once, so nothing is known about disagreement."
    return (
        f"The {judged} judgements of a pair lie {np.median(spread):.3f} apart in effective gap (range, median over "
        f"pairs); in {(spread > WIDE).mean():.0%} of pairs they lie more than {WIDE} apart."
    )


def _doubted(evidence: Evidence, doubted: int) -> str:
    if not doubted:
        return "None: on no pair does more than half of the panel doubt the label."
    return f"On {doubted:,} of {evidence.n:,} pairs ({doubted / evidence.n:.1%}) most of the panel doubts the label."


def _reversed(of: Reversed | None, marks: Marks) -> str:
    if of is not None:
        return (
            f"The {of.n:,} pairs known to point the wrong way got mean β {of.mean:.3f}, all others "
            f"{of.mean_others:.3f} (AUC of the gap {of.auc:.3f}); {of.fooled:,} of them fooled the panel, with a β "
            "above the median of the others."
        )
    if marks.column is None:
        return "No pairs are marked as known to be reversed, so this run cannot show whether wrong labels get a low β."
    return f"Known reversed pairs: {marks.problem or f'{marks.n:,} in the schedule, nothing to compare'}."


def _people(run: Run) -> tuple[str, ...]:
    """What `sp2dpo audit score` left, if it is about this schedule."""
    path, manifest = run.path / "audit.json", read_manifest(run.path / "audit.json")
    if manifest is None or not path.is_file():
        return (
            "No person has checked these labels. Draw pairs for it: sp2dpo audit sample RUN_DIR -n 200 -o sheet.csv",
        )
    if manifest["inputs"].get(run.schedule.name) != sha256_file(run.schedule):
        return ("People checked the labels of another schedule than the one here; score their sheets again.",)
    score: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    read, right, panel = score["right"] + score["wrong"] + score["ties"], score["agreement"], score["judges"][0]
    said = [f"People gave verdicts on {some(read, 'pair')}, {score['ties']:,} of them ties."]
    if right["value"] is not None:
        said.append(f"By them {right['value']:.0%} of the labels are right{_interval(right, '.0%')}.")
    if panel["auc_gap"]["value"] is not None:
        auc = f"{panel['auc_gap']['value']:.2f}{_interval(panel['auc_gap'], '.2f')}"
        said.append(f"The gap tells right labels from wrong ones with AUC {auc}; 0.5 would be chance.")
    return (*said, *score["warnings"])


def _interval(of: dict[str, Any], form: str) -> str:
    return "" if of["low"] is None else f" (95 % interval {of['low']:{form}} to {of['high']:{form}})"


def _cost(spent: Spent) -> str:
    if not spent.live:
        return "Nothing was spent in this run; no call was live."
    if spent.usd is None:
        return f"Unknown: λ has no price for {', '.join(spent.unpriced)}."
    more = f"; {spent.uncounted:,} of them came back without a token count" if spent.uncounted else ""
    return f"{spent.usd:,.2f} USD for {spent.live:,} live attempts, at the prices in λ{more}."


def _training(training: Training) -> list[str]:
    """Of the schedule and its controls, or of the first arms where these are not there."""
    done = [arm for arm in training.trained if arm.steps]
    named = [arm for arm in done if arm.arm in ("sp2dpo", *(one.against for one in training.questions))]
    shown, more = (named or done)[:MOST_ARMS], len(done)
    if not shown:
        return []
    rest = f" ({more} arms were trained; all are below)" if more > len(shown) else ""
    if training.measured_on == "held-out pairs":
        told = ", ".join(f"{arm.arm} {percent(arm.groups['all pairs'].accuracy)}" for arm in shown)
        said = [f"Share of the {training.n:,} held-out pairs with a margin above 0: {told}{rest}."]
        said += [_against(one.contrast) for one in training.questions[:1] if one.contrast]
        alone = "Mean margin of the training pairs known to be reversed"
    else:
        said = [f"Mean margin of the training pairs at the end, in nats: {_means(shown, 'all pairs')}{rest}."]
        alone = "Of the reversed pairs alone"
    reversed = "known reversed"
    return [*said, f"{alone}: {_means(shown, reversed)}."] if reversed in shown[0].seen else said


def _means(arms: Sequence[ArmRow], group: str) -> str:
    return ", ".join(f"{arm.arm} {dec(arm.seen[group].margin, 1)}" for arm in arms)


def _against(one: Contrast) -> str:
    loss = one.loss
    interval = "" if loss.low is None else f" (95 % interval {signed(loss.low, 3)} to {signed(loss.high, 3)})"
    return f"Held-out loss of sp2dpo less that of {one.against}: {signed(loss.value, 3)}{interval}, with one seed."


def _missing(tally: Tally, training: Training) -> str:
    failed = tally.failed.total() + tally.not_asked
    missing = [f"{failed:,} answers of the panel"] if failed else []
    missing += [] if training.arms else ["training (the process has none)"]
    missing += [f"the training of {arm.arm} ({arm.problem})" for arm in training.arms if arm.problem]
    held_out = "" if training.measured_on == "held-out pairs" else "held-out data or "
    return ", ".join([*missing, f"any score on {held_out}a benchmark"]).capitalize() + "."


def _state(files: Sequence[FileRow]) -> Told:
    wrong = [file.name for file in files if file.state == "missing" or file.state.startswith("differs")]
    if wrong:
        return Told("Files", (f"Not as their manifests say: {', '.join(wrong)}. See: sp2dpo verify RUN_DIR",), bad=True)
    said = "All are as their manifests say. To make every hash, gap and β again: sp2dpo verify RUN_DIR"
    return Told("Files", (said,))
