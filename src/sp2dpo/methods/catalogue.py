"""The methods as a table: what each compares, how its knobs act, where it comes from and what of it was checked.

Every method is one loss per pair, w·f(β, u − m). u compares the two responses, the target m shifts u, f turns the
residual into a loss at the temperature β, w weights the pair. For the logistic f this is w·f(β(u − m)). Log-probs are
in nats; y_w is the chosen response, y_l the rejected one, |y| its completion tokens. Knows nothing of torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Final, Literal

from sp2dpo.errors import InputError, nearest

__all__ = [
    "INPUTS",
    "LOSSES",
    "MARGINS",
    "METHODS",
    "SIGNALS",
    "Flag",
    "Interval",
    "Knob",
    "Method",
    "Settings",
    "Signal",
    "log_ratio_margin",
    "method_of",
]

Settings = Mapping[str, float | bool]
"""Values of all knobs of a method."""


@dataclass(frozen=True)
class Interval:
    """Numbers from low to high; a round end is not part of it."""

    low: float
    high: float
    ends: Literal["[]", "[)", "(]", "()"]

    def holds(self, value: Any) -> Any:
        """Whether a number, or each number of an array or a tensor, is inside; NaN never is."""
        above = value >= self.low if self.ends[0] == "[" else value > self.low
        below = value <= self.high if self.ends[1] == "]" else value < self.high
        return above & below

    def __str__(self) -> str:
        low, high = (f"{end:g}".replace("inf", "∞").replace("-", "−") for end in (self.low, self.high))
        return f"in {self.ends[0]}{low}, {high}{self.ends[1]}"


@dataclass(frozen=True)
class Flag:
    """Yes or no."""

    def holds(self, value: Any) -> Any:
        """Whether a number, or each number of an array or a tensor, is 0 or 1."""
        return (value == 0) | (value == 1)

    def __str__(self) -> str:
        return "true or false"


POSITIVE: Final = Interval(0.0, math.inf, "()")
NOT_NEGATIVE: Final = Interval(0.0, math.inf, "[)")
FINITE: Final = Interval(-math.inf, math.inf, "()")
UP_TO_HALF: Final = Interval(0.0, 0.5, "[]")
BELOW_HALF: Final = Interval(0.0, 0.5, "[)")


@dataclass(frozen=True)
class Signal:
    """A value for each pair: a column of the data, or made anew at each step."""

    valid: Interval | Flag
    meaning: str
    unit: str


SIGNALS: Final = {
    "beta": Signal(POSITIVE, "β of the pair, in place of the knob", "1 per nat; τ of IPO: 1 per unit of u"),
    "margin": Signal(FINITE, "added to the target m of the method", "the unit of u, inside β"),
    "weight": Signal(NOT_NEGATIVE, "factor of the whole loss of the pair", "none"),
    "keep": Signal(Flag(), "whether the pair counts at this step, in the sum and in the number of pairs", "0 or 1"),
    "sft": Signal(Flag(), "the loss is −log π(y_w)/|y_w| in place of the preference loss", "0 or 1"),
    "label_smoothing": Signal(UP_TO_HALF, "ε of the pair, in place of the knob", "probability"),
}
"""Signals of `pair_losses`; (B,) each."""

MARGINS: Final = {
    "implicit_margin": "h = log π(y_w)/π_ref(y_w) − log π(y_l)/π_ref(y_l)",
    "mean_log_ratio_margin": "h̄ = log π(y_w)/π_ref(y_w) / |y_w| − log π(y_l)/π_ref(y_l) / |y_l|",
    "mean_logp_margin": "d = log π(y_w) / |y_w| − log π(y_l) / |y_l|",
}
"""What u can be, under its name in `PairBatch`."""

SUMMED: Final = {"mean_log_ratio_margin": "implicit_margin"}
"""A margin of per-token means → the same of sums."""

_REFERENCE: Final = ("ref_chosen_logps", "ref_rejected_logps")
_LENGTHS: Final = ("chosen_lengths", "rejected_lengths")

INPUTS: Final = {
    "implicit_margin": _REFERENCE,
    "mean_log_ratio_margin": (*_REFERENCE, *_LENGTHS),
    "mean_logp_margin": _LENGTHS,
}
"""What a margin needs besides the log-probs of the policy."""

LOSSES: Final = {
    "logistic": "ℓ(βr), ℓ(z) = −log σ(z)",
    "smoothed": "(1 − ε)·ℓ(βr) + ε·ℓ(−βr)",
    "debiased": "((1 − ε)·ℓ(βr) − ε·ℓ(−βr)) / (1 − 2ε)",
    "square": "r²",
}
"""What f can be, of the residual r = u − m. The square has no factor β: there β acts through the target m alone."""


@dataclass(frozen=True)
class Knob:
    """One number, or a yes or no, that holds for all pairs."""

    name: str
    default: float | bool
    valid: Interval | Flag
    meaning: str
    unit: str

    def checked(self, method: str, value: Any) -> float | bool:
        """The value as a float, or as a bool where the knob is one.

        Raises:
            InputError: of the wrong type, not finite, or outside the range.
        """
        if isinstance(self.default, bool) and isinstance(value, bool):
            return value
        number = isinstance(value, Real) and not isinstance(value, bool)
        if number and not isinstance(self.default, bool) and self.valid.holds(value):
            return float(value)
        raise InputError(f"{method}: {self.name} is {value!r}; it has to be {self.valid} ({self.meaning})")


@dataclass(frozen=True)
class Method:
    """One line of the catalogue.

    Attributes:
        formula: the loss of one pair of weight 1, in plain text.
        u: a name of `MARGINS`; `u_of` tells what it is at given knobs.
        f: a name of `LOSSES`.
        m: the target in plain text; `target` computes it from β and the knobs, None where it is 0.
        signals: signals that it cannot do without.
        source: where it was published.
        trl: its name in TRL 1.16; empty where TRL has no such loss.
        status: what was checked, against what, and what was chosen here.
    """

    name: str
    title: str
    formula: str
    u: str
    f: str
    knobs: tuple[Knob, ...]
    source: str
    trl: str
    status: str
    m: str = "0"
    target: Callable[[Any, Settings], Any] | None = None
    signals: tuple[str, ...] = ()

    @property
    def reference(self) -> bool:
        """Whether log-probs of the reference are needed."""
        return set(_REFERENCE) <= set(INPUTS[self.u])

    def settings(self, knobs: Mapping[str, Any]) -> dict[str, float | bool]:
        """All knobs: those given, and the defaults of the rest.

        Raises:
            InputError: an unknown knob, or a value outside its range.
        """
        known = {knob.name: knob for knob in self.knobs}
        for name in knobs:
            if name not in known:
                raise InputError(f"{self.name} has no knob '{name}'{self._instead(name, tuple(known))}")
        return {name: knob.checked(self.name, knobs.get(name, knob.default)) for name, knob in known.items()}

    def _instead(self, name: str, known: tuple[str, ...]) -> str:
        if name in self.signals:
            return f": '{name}' is a signal, one value for each pair"
        return f"{nearest(name, known)}; its knobs: {', '.join(known) or 'none'}"

    def u_of(self, settings: Settings) -> str:
        """The name of u at these knobs: the sum in place of the per-token mean where `average` is false."""
        return self.u if settings.get("average", True) else SUMMED[self.u]


def log_ratio_margin(margin: Any, beta: Any, margin_units: str) -> Any:
    """A margin in the units of u, as m is: papers that write β·u − γ give it in "reward" units, and m = γ/β.

    Numbers, arrays or tensors. `margin_units` "logratio": it is in the units of u already.

    Raises:
        InputError: other units.
    """
    if margin_units not in ("logratio", "reward"):
        raise InputError(f"margin_units is '{margin_units}'; it has to be 'logratio' or 'reward'")
    return margin / beta if margin_units == "reward" else margin


def _beta(default: float, meaning: str, unit: str = "1 per nat") -> Knob:
    return Knob("beta", default, POSITIVE, meaning, unit)


def _smoothing(default: float, valid: Interval, meaning: str) -> Knob:
    return Knob("label_smoothing", default, valid, meaning, "probability")


_TEMPERATURE: Final = _beta(0.1, "inverse temperature of the log-ratio margin, for all pairs")

_CATALOGUE: Final = (
    Method(
        name="sp2dpo",
        title="SP²DPO: a temperature for each pair, fixed before training",
        formula="−log σ(β_i·h_i)",
        u="implicit_margin",
        f="logistic",
        knobs=(),
        signals=("beta",),
        source="https://arxiv.org/abs/2601.22385, eq. 5 and 6",
        trl="",
        status="Verified: losses and gradients against the paper's eq. 6 and 8 and finite differences; with one β for "
        "all pairs, against TRL.",
    ),
    Method(
        name="dpo",
        title="Direct Preference Optimization",
        formula="−log σ(β·h)",
        u="implicit_margin",
        f="logistic",
        knobs=(_TEMPERATURE,),
        source="https://arxiv.org/abs/2305.18290",
        trl="DPOConfig(loss_type=['sigmoid'])",
        status="Verified: loss and gradients against TRL 1.16.",
    ),
    Method(
        name="ipo",
        title="IPO: the margin is regressed onto a constant",
        formula="(h̄ − 1/(2β))², β = τ of the paper",
        u="mean_log_ratio_margin",
        f="square",
        m="1/(2β)",
        target=lambda beta, settings: 1 / (2 * beta),
        knobs=(
            _beta(0.1, "τ of the paper: sets the target 1/(2τ) and does not scale the loss", "1 per unit of u"),
            Knob(
                "average",
                True,
                Flag(),
                "per-token means of the log-ratios, as TRL has it; false: their sums, the other form in use",
                "none",
            ),
        ),
        source="https://arxiv.org/abs/2310.12036, eq. 17",
        trl="DPOConfig(loss_type=['ipo'])",
        status="Verified: loss and gradients of the averaged form against TRL 1.16; of the sum against its closed form "
        "only.",
    ),
    Method(
        name="simpo",
        title="SimPO: mean log-probs with a target margin, without a reference",
        formula="(1 − ε)·ℓ(β·d − γ) + ε·ℓ(γ − β·d), ℓ(z) = −log σ(z)",
        u="mean_logp_margin",
        f="smoothed",
        m="γ/β",
        target=lambda beta, settings: log_ratio_margin(settings["gamma"], beta, "reward"),
        knobs=(
            _beta(2.0, "scale of the mean log-prob margin; 2 to 10 are in use", "1 per nat per token"),
            Knob(
                "gamma",
                1.0,
                NOT_NEGATIVE,
                "target margin of β·d; the ratio γ/β, which other programs ask for, is 0.1 to 0.8 in published runs",
                "reward (β times nats per token)",
            ),
            _smoothing(0.0, UP_TO_HALF, "ε, the share of labels taken to be flipped; 0 in the paper"),
        ),
        source="https://arxiv.org/abs/2405.14734",
        trl="trl.experimental.cpo.CPOConfig(loss_type='simpo', cpo_alpha=0)",
        status="Verified: loss and gradients against TRL 1.16, with and without ε.",
    ),
    Method(
        name="cdpo",
        title="cDPO: DPO with smoothed labels",
        formula="(1 − ε)·ℓ(β·h) + ε·ℓ(−β·h), ℓ(z) = −log σ(z)",
        u="implicit_margin",
        f="smoothed",
        knobs=(
            _TEMPERATURE,
            _smoothing(
                0.1, UP_TO_HALF, "ε, the share of labels taken to be flipped; h comes to rest at logit(1 − ε)/β"
            ),
        ),
        source="E. Mitchell, A note on DPO with noisy preferences, https://ericmitchell.ai/cdpo.pdf",
        trl="",
        status="Verified: loss and gradients against TRL 1.16's 'aot' with label_smoothing, which is this loss where a "
        "batch is one pair; TRL has it under no name of its own.",
    ),
    Method(
        name="robust",
        title="Robust DPO: the DPO loss without the bias of flipped labels",
        formula="((1 − ε)·ℓ(β·h) − ε·ℓ(−β·h)) / (1 − 2ε), ℓ(z) = −log σ(z)",
        u="implicit_margin",
        f="debiased",
        knobs=(
            _TEMPERATURE,
            _smoothing(
                0.1,
                BELOW_HALF,
                "ε, the share of labels taken to be flipped; the loss has no lower bound for ε > 0, and above 0.4 the "
                "division makes it more than five times as steep",
            ),
        ),
        source="https://arxiv.org/abs/2403.00409",
        trl="DPOConfig(loss_type=['robust'])",
        status="Verified: loss and gradients against TRL 1.16.",
    ),
)

METHODS: Final[Mapping[str, Method]] = {method.name: method for method in _CATALOGUE}


def method_of(name: str) -> Method:
    """Raises:
    InputError: no method of that name.
    """
    if name not in METHODS:
        raise InputError(f"unknown method '{name}'{nearest(name, METHODS)}; known: {', '.join(METHODS)}")
    return METHODS[name]
