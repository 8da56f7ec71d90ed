"""One loss for all methods: w·f(β, u − m) of each pair, as the catalogue composes it. Tensors in, (B,) tensors out.

A method is a choice of u, f and m; nothing here asks which method it is. What is given per pair may change from step to
step (`StepControl`). Knows nothing of models, datasets or trainers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from sp2dpo.errors import InputError, nearest
from sp2dpo.loss import implicit_margin, log_ratio, pair_loss
from sp2dpo.methods.catalogue import INPUTS, SIGNALS, Method, Settings, log_ratio_margin, method_of

__all__ = ["Controls", "PairBatch", "StepControl", "losses", "mean_loss", "pair_losses"]


def _wide(values: Tensor) -> Tensor:
    """As float32; float64 stays."""
    return values if values.dtype == torch.float64 else values.float()


@dataclass(frozen=True)
class _Columns:
    """Named (B,) tensors or None, of one length, in float32 or better."""

    def __post_init__(self) -> None:
        first = None
        for name, values in self.given().items():
            if not isinstance(values, Tensor) or values.ndim != 1:
                kind = f"of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
                raise InputError(f"{name} has to be a tensor of shape (B,), one value for each pair, not {kind}")
            first = first or (name, len(values))
            if len(values) != first[1]:
                raise InputError(f"{name} has {len(values)} pairs and {first[0]} has {first[1]}")
            object.__setattr__(self, name, _wide(values))

    def given(self) -> dict[str, Tensor]:
        """What is not None, by name."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: values for name, values in columns.items() if values is not None}


@dataclass(frozen=True)
class PairBatch(_Columns):
    """Log-probs of B pairs, (B,) each: nats, summed over the completion tokens; lengths: the number of those tokens.

    Whatever comes in is kept in float32, or float64 if it is that. A length of 0 counts as 1, as in TRL.

    Raises:
        InputError: something that is not a tensor (B,), or other numbers of pairs; and, at a margin, what it lacks.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None

    def detach(self) -> PairBatch:
        """The same numbers without their gradients."""
        return PairBatch(**{name: values.detach() for name, values in self.given().items()})

    def needs(self, *names: str, by: str) -> tuple[Tensor, ...]:
        """The columns of these names.

        Raises:
            InputError: some are None; they are named.
        """
        missing = [name for name in names if getattr(self, name) is None]
        if missing:
            raise InputError(f"{by} needs {' and '.join(missing)}")
        return tuple(getattr(self, name) for name in names)

    @property
    def chosen_log_ratio(self) -> Tensor:
        """log π(y_w)/π_ref(y_w), in nats."""
        return log_ratio(self.chosen_logps, *self.needs("ref_chosen_logps", by="the log-ratio"))

    @property
    def rejected_log_ratio(self) -> Tensor:
        """log π(y_l)/π_ref(y_l), in nats."""
        return log_ratio(self.rejected_logps, *self.needs("ref_rejected_logps", by="the log-ratio"))

    @property
    def implicit_margin(self) -> Tensor:
        """h, the chosen log-ratio less the rejected one, in nats and without β."""
        reference = self.needs(*INPUTS["implicit_margin"], by="the implicit margin")
        return implicit_margin(self.chosen_logps, self.rejected_logps, *reference)

    @property
    def mean_log_ratio_margin(self) -> Tensor:
        """The same of log-ratios divided by their lengths, in nats per token."""
        self.needs(*INPUTS["mean_log_ratio_margin"], by="the mean log-ratio margin")
        return self._per_token(self.chosen_log_ratio, self.rejected_log_ratio)

    @property
    def mean_logp_margin(self) -> Tensor:
        """d, the difference of the mean log-probs under the policy, in nats per token."""
        return self._per_token(self.chosen_logps, self.rejected_logps)

    @property
    def chosen_nll(self) -> Tensor:
        """−log π(y_w)/|y_w|, in nats per token."""
        (lengths,) = self.needs("chosen_lengths", by="the loss of pairs routed to SFT")
        return -self.chosen_logps / lengths.clamp(min=1)

    def _per_token(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        chosen_lengths, rejected_lengths = self.needs(*INPUTS["mean_logp_margin"], by="the mean log-prob margin")
        return chosen / chosen_lengths.clamp(min=1) - rejected / rejected_lengths.clamp(min=1)


@dataclass(frozen=True)
class Controls(_Columns):
    """How each pair is enforced at this step, (B,) each; None is neutral.

    Gradients flow into whatever carries one: detach what is data.

    Attributes:
        beta: β_i; for IPO its τ.
        margin: added to the method's own target m, in the units of u, inside β.
        weight: factor of the whole loss, SFT too.
        keep: 0 or 1; for `mean_loss`, not for `losses`.
        sft: 0 or 1; 1 has the loss −log π(y_w)/|y_w| in place of the preference loss.
        label_smoothing: ε_i in place of the knob, for methods that have it.
    """

    beta: Tensor
    margin: Tensor | None = None
    weight: Tensor | None = None
    keep: Tensor | None = None
    sft: Tensor | None = None
    label_smoothing: Tensor | None = None


class StepControl(Protocol):
    """Controls made anew at each step, and the running statistics behind them, which checkpoints keep.

    Called on every rank at every training step, so that all ranks hold the same statistics.
    """

    def __call__(self, batch: PairBatch, controls: Controls, gather: Callable[[Tensor], Tensor]) -> Controls:
        """Controls for this step. `batch` is detached and of this rank; `gather` concatenates over all ranks."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The statistics; a control that loads them goes on exactly as this one would."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


# The f of `catalogue.LOSSES`: of β, the residual r = u − m, and the knobs.

_Knobs = Mapping[str, Any]


def _logistic(beta: Tensor, residual: Tensor, knobs: _Knobs) -> Tensor:
    return pair_loss(beta, residual)


def _smoothed(beta: Tensor, residual: Tensor, knobs: _Knobs) -> Tensor:
    flipped: Tensor | float = knobs["label_smoothing"]
    return (1 - flipped) * pair_loss(beta, residual) + flipped * pair_loss(beta, -residual)


def _debiased(beta: Tensor, residual: Tensor, knobs: _Knobs) -> Tensor:
    flipped: Tensor | float = knobs["label_smoothing"]
    clean = (1 - flipped) * pair_loss(beta, residual) - flipped * pair_loss(beta, -residual)
    return clean / (1 - 2 * flipped)


def _square(beta: Tensor, residual: Tensor, knobs: _Knobs) -> Tensor:
    return residual**2


_LOSSES: Final = {"logistic": _logistic, "smoothed": _smoothed, "debiased": _debiased, "square": _square}


def losses(method: str, batch: PairBatch, controls: Controls, knobs: Mapping[str, Any]) -> Tensor:
    """w·f(β, u − m) of each pair, (B,), in float32 or better; neither averaged nor masked by `keep`.

    `knobs` may be the method's whole settings: the knob `beta` is checked and not used, `controls.beta` is.

    Raises:
        InputError: an unknown method or knob, a knob out of range, an input or control that the method lacks or that
            has another number of pairs. Values of tensors are not looked at: a GPU need not wait.
    """
    line = method_of(method)
    settings = line.settings(knobs)
    if len(controls.beta) != len(batch.chosen_logps):
        raise InputError(f"the controls are for {len(controls.beta)} pairs, the batch has {len(batch.chosen_logps)}")
    batch.needs(*INPUTS[line.u_of(settings)], by=method)
    residual = _residual(line, batch, controls, settings)
    per_pair = _LOSSES[line.f](controls.beta, residual, _knobs_of_pairs(line, controls, settings))
    if controls.sft is not None:
        per_pair = torch.where(controls.sft.bool(), batch.chosen_nll, per_pair)
    return per_pair if controls.weight is None else controls.weight * per_pair


def _residual(line: Method, batch: PairBatch, controls: Controls, settings: Settings) -> Tensor:
    """r = u − m, (B,)."""
    residual: Tensor = getattr(batch, line.u_of(settings))
    if line.target is not None:
        residual = residual - line.target(controls.beta, settings)
    return residual if controls.margin is None else residual - controls.margin


def _knobs_of_pairs(line: Method, controls: Controls, settings: Settings) -> _Knobs:
    """The knobs, with the ε of each pair in the place of that for all."""
    if controls.label_smoothing is None:
        return settings
    if "label_smoothing" not in settings:
        raise InputError(f"{line.name} has no label_smoothing, neither for all pairs nor for each")
    return {**settings, "label_smoothing": controls.label_smoothing}


def mean_loss(losses: Tensor, keep: Tensor | None = None) -> Tensor:
    """Σ keep·l / Σ keep, a scalar; 0, with gradients of 0, where no pair is kept. `keep`: (B,) of 0 and 1."""
    if keep is None:
        return losses.mean()
    kept = keep.bool()
    return _kept(losses, kept).sum() / kept.sum().clamp(min=1)


def _kept(losses: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, losses, torch.zeros_like(losses))


def pair_losses(
    name: str,
    *,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    signals: Mapping[str, Tensor] | None = None,
    margin_units: str = "logratio",
    **knobs: Any,
) -> Tensor:
    """The loss of each pair under a method of the catalogue, (B,), in float32 or better, for any training loop.

    Args:
        name: a name of `METHODS`.
        chosen_logps: nats, summed over completion tokens; so are the other log-probs. All tensors are (B,).
        chosen_lengths: completion tokens, for methods with per-token means and for pairs routed to SFT.
        signals: names of `catalogue.SIGNALS`. A pair with `keep` 0 has the loss 0 and no gradient; `mean_loss(losses,
            keep)` does not count it either.
        margin_units: of the signal `margin`: "logratio", the units of u, or "reward", those of β·u.
        knobs: of the method; the catalogue has their defaults and ranges.

    Raises:
        InputError: an unknown name; a knob or a signal out of range, missing, or given twice; shapes that differ.
    """
    method = method_of(name)
    signals = dict(signals or {})
    batch = PairBatch(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths
    )
    settings = method.settings(knobs)
    _check_signals(method, signals, knobs)
    if "beta" not in signals:
        signals["beta"] = torch.full_like(batch.chosen_logps, settings["beta"])
    controls = Controls(**signals)
    _check_values(method, controls)
    if controls.margin is not None:
        controls = replace(controls, margin=log_ratio_margin(controls.margin, controls.beta, margin_units))
    per_pair = losses(name, batch, controls, settings)
    return per_pair if controls.keep is None else _kept(per_pair, controls.keep.bool())


def _check_signals(method: Method, signals: Mapping[str, Tensor], knobs: Mapping[str, Any]) -> None:
    for name in signals:
        if name not in SIGNALS:
            raise InputError(f"unknown signal '{name}'{nearest(name, SIGNALS)}; known: {', '.join(SIGNALS)}")
        if name in knobs:
            raise InputError(f"{method.name}: '{name}' is given as a knob and as a signal; give one of them")
    for name in method.signals:
        if name not in signals:
            raise InputError(
                f"{method.name} needs the signal '{name}' ({SIGNALS[name].meaning}): signals={{'{name}': …}}"
            )


def _check_values(method: Method, controls: Controls) -> None:
    """As narrow as the knob of the same name, if the method has one."""
    knobs = {knob.name: knob.valid for knob in method.knobs}
    for name, values in controls.given().items():
        valid = knobs.get(name, SIGNALS[name].valid)
        bad = ~valid.holds(values)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise InputError(f"signal '{name}' of pair {row} is {values[row].item():g}; it has to be {valid}")
