"""Losses of the catalogue against known values, closed forms, finite differences and identities between methods."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="needs the train extra")

from sp2dpo.errors import InputError  # noqa: E402
from sp2dpo.loss import gradient_coefficient, matching_weight  # noqa: E402
from sp2dpo.methods import METHODS, mean_loss, method_of, pair_losses  # noqa: E402
from sp2dpo.methods.catalogue import INPUTS, LOSSES, MARGINS, SIGNALS, log_ratio_margin  # noqa: E402
from sp2dpo.methods.losses import Controls, PairBatch, StepControl, losses  # noqa: E402


def f64(*values: float) -> Any:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Any, expected: Any, rtol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-12)


# Four pairs: sums of log-probs of policy and reference, completion tokens; h is their implicit margin.
PAIRS = {
    "chosen_logps": f64(-12, -20, -9, -15),
    "rejected_logps": f64(-14, -18.5, -9.5, -22),
    "ref_chosen_logps": f64(-13, -19, -9.2, -16),
    "ref_rejected_logps": f64(-13.5, -18, -9, -20),
    "chosen_lengths": torch.tensor([10, 16, 8, 12]),
    "rejected_lengths": torch.tensor([12, 14, 9, 20]),
}
H = f64(1.5, -0.5, 0.7, 3.0)
BETA_I = f64(0.03, 0.165, 0.3, 0.1)
DPO = f64(0.6209570477895321, 0.7184596480132863, 0.6587595555486971, 0.5543552444685271)


def found(method: str, signals: Any = None, pairs: Any = PAIRS, **knobs: Any) -> Any:
    if method == "sp2dpo" and "beta" not in (signals or {}):
        signals = {"beta": BETA_I, **(signals or {})}
    return pair_losses(method, **pairs, signals=signals, **knobs)


# Values ---------------------------------------------------------------------------------------------------------------

CASES: list[tuple[str, dict[str, Any], dict[str, Any], Any]] = [
    ("sp2dpo", {}, {}, f64(0.6709002842054063, 0.7352477206431228, 0.5936495810217839, 0.5543552444685271)),
    ("dpo", {"beta": 0.1}, {}, DPO),
    ("ipo", {"beta": 0.1}, {}, f64(23.603402777777777, 25.26857461734694, 24.200933641975308, 23.200277777777774)),
    ("ipo", {"beta": 0.1, "average": False}, {}, f64(12.25, 30.25, 18.49, 4.0)),
    (
        "simpo",
        {"beta": 2, "gamma": 1},
        {},
        f64(1.3624313269726627, 1.2108744656905124, 1.4166528696041027, 1.541008453832992),
    ),
    ("cdpo", {}, {}, f64(0.6359570477895321, 0.7134596480132863, 0.6657595555486971, 0.5843552444685272)),
    (
        "cdpo",
        {},
        {"label_smoothing": f64(0, 0.4, 0.25, 0.5)},
        f64(0.6209570477895321, 0.6984596480132863, 0.6762595555486971, 0.7043552444685272),
    ),
    ("robust", {}, {}, f64(0.602207047789532, 0.7247096480132862, 0.6500095555486971, 0.5168552444685272)),
]


@pytest.mark.parametrize(("method", "knobs", "signals", "expected"), CASES)
def test_four_pairs_have_the_losses_worked_out_by_hand(method: str, knobs: Any, signals: Any, expected: Any) -> None:
    close(found(method, signals, **knobs), expected)


def test_the_knobs_in_published_use_are_the_defaults() -> None:
    assert {name: method.settings({}) for name, method in METHODS.items()} == {
        "sp2dpo": {},
        "dpo": {"beta": 0.1},
        "ipo": {"beta": 0.1, "average": True},
        "simpo": {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0},
        "cdpo": {"beta": 0.1, "label_smoothing": 0.1},
        "robust": {"beta": 0.1, "label_smoothing": 0.1},
    }


def test_margins_of_a_batch_are_those_of_its_sums_and_means() -> None:
    batch = PairBatch(**PAIRS)
    close(batch.chosen_log_ratio, f64(1, -1, 0.2, 1))
    close(batch.rejected_log_ratio, f64(-0.5, -0.5, -0.5, -2))
    close(batch.implicit_margin, H)
    close(batch.mean_logp_margin, f64(-1 / 30, 1 / 14, -5 / 72, -0.15))
    close(batch.mean_log_ratio_margin, f64(1 / 10 + 0.5 / 12, -1 / 16 + 0.5 / 14, 0.2 / 8 + 0.5 / 9, 1 / 12 + 0.1))


def test_a_completion_without_tokens_counts_as_one_token_as_in_trl() -> None:
    batch = PairBatch(f64(0), f64(-3), f64(0), f64(-1), torch.tensor([0]), torch.tensor([2]))
    close(batch.mean_logp_margin, f64(1.5))


# The controls of other methods, computed by hand, through the same loss.
OTHERS: list[tuple[str, dict[str, Any], dict[str, Any], Any]] = [
    # α-DPO: SimPO with β 2.5, γ/β 0.6, and 0.2·z of the pair as further margin
    (
        "simpo",
        {"beta": 2.5, "gamma": 1.5},
        {"margin": 0.2 * f64(0.5143649857348102, -1.3301793559287718, -0.15479833256010667, 0.9706127027540683)},
        f64(1.9878451721479984, 1.074224579433648, 1.7807500129454743, 2.4505046713708323),
    ),
    # AMaPO: margins in reward units only
    (
        "simpo",
        {"beta": 2, "gamma": 0, "margin_units": "reward"},
        {"margin": f64(0, 0, 1.9763444932697474, 1.8993089997513082)},
        f64(0.7270359665986486, 0.6242674632512728, 2.229102224394494, 2.3044612685757366),
    ),
    # γ-PO on DPO: margins in reward units, less their mean
    (
        "dpo",
        {"margin_units": "reward"},
        {"margin": f64(0.40116417540167565, 0.3937419920153217, 0.39815133475776116, 0.40694249782524183) - 0.4},
        f64(0.6214957290536762, 0.7152573277357548, 0.6578679880287838, 0.5573155696234124),
    ),
    # MADPO: weights; DA-DPO: β; MixDPO: SFT for the two hardest pairs
    (
        "dpo",
        {},
        {"weight": f64(1.0, 1.0976032553557773, 1.0, 0.9422725963310581)},
        f64(0.6209570477895321, 0.788583648501149, 0.6587595555486971, 0.5223537554950974),
    ),
    (
        "dpo",
        {},
        {"beta": f64(0.18, 0.11, 0.1, 0.16)},
        f64(0.5672321351223193, 0.7210252579100492, 0.6587595555486971, 0.4816748743957433),
    ),
    (
        "dpo",
        {},
        {"sft": torch.tensor([False, True, True, False])},
        f64(0.6209570477895321, 1.25, 1.125, 0.5543552444685271),
    ),
]


@pytest.mark.parametrize(("method", "knobs", "signals", "expected"), OTHERS)
def test_controls_of_other_methods_give_their_losses(method: str, knobs: Any, signals: Any, expected: Any) -> None:
    close(found(method, signals, **knobs), expected)


# Gradients ------------------------------------------------------------------------------------------------------------

FULL = {
    "beta": BETA_I,
    "margin": f64(0.1, -0.2, 0.3, 0.0),
    "weight": f64(1.0, 0.5, 2.0, 1.5),
    "sft": f64(0, 0, 1, 0),
    "keep": f64(1, 0, 1, 1),
}


@pytest.mark.parametrize("signals", [{}, FULL], ids=["plain", "all signals"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_of_finite_differences(method: str, signals: Any) -> None:
    def loss(chosen: Any, rejected: Any) -> Any:
        return found(method, signals, {**PAIRS, "chosen_logps": chosen, "rejected_logps": rejected})

    policy = [PAIRS[name].clone().requires_grad_() for name in ("chosen_logps", "rejected_logps")]
    assert torch.autograd.gradcheck(loss, policy, rtol=1e-6, atol=1e-8)


def gradients(method: str, signals: Any = None, **knobs: Any) -> tuple[Any, Any]:
    """∂loss/∂log-probs of the chosen and of the rejected responses."""
    chosen, rejected = (PAIRS[name].clone().requires_grad_() for name in ("chosen_logps", "rejected_logps"))
    found(method, signals, {**PAIRS, "chosen_logps": chosen, "rejected_logps": rejected}, **knobs).sum().backward()
    return chosen.grad, rejected.grad


def test_the_gradient_of_sp2dpo_is_that_of_eq_8() -> None:
    chosen, rejected = gradients("sp2dpo")
    close(chosen, gradient_coefficient(BETA_I, H))
    close(rejected, -chosen)


def test_the_gradient_of_dpo_is_minus_beta_sigma_of_minus_beta_h() -> None:
    known = f64(-0.04625701546562505, -0.051249739648421035, -0.04825071423336104, -0.0425557483188341)
    close(gradients("dpo")[0], known)
    close(known, -0.1 * torch.sigmoid(-0.1 * H))


@pytest.mark.parametrize("tau", [0.05, 0.7])
def test_the_gradient_of_ipo_has_no_factor_tau(tau: float) -> None:
    batch = PairBatch(**PAIRS)
    slope = 2 * (batch.mean_log_ratio_margin - 1 / (2 * tau))
    close(gradients("ipo", beta=tau), (slope / PAIRS["chosen_lengths"], -slope / PAIRS["rejected_lengths"]))
    slope = 2 * (H - 1 / (2 * tau))
    close(gradients("ipo", beta=tau, average=False), (slope, -slope))


def test_the_gradient_of_simpo_is_spread_over_the_tokens_of_each_response() -> None:
    z = 2.5 * PairBatch(**PAIRS).mean_logp_margin - 0.75
    slope = -2.5 * torch.sigmoid(-z)
    expected = (slope / PAIRS["chosen_lengths"], -slope / PAIRS["rejected_lengths"])
    close(gradients("simpo", beta=2.5, gamma=0.75), expected)


def test_gradients_with_flipped_labels_are_their_mixtures() -> None:
    right, wrong = 0.8 * torch.sigmoid(-0.1 * H), 0.2 * torch.sigmoid(0.1 * H)
    close(gradients("cdpo", label_smoothing=0.2)[0], -0.1 * (right - wrong))
    close(gradients("robust", label_smoothing=0.2)[0], -0.1 * (right + wrong) / 0.6)


def at_margin(h: Any) -> dict[str, Any]:
    """Pairs with these implicit margins, and no lengths."""
    zero = torch.zeros_like(h)
    return {"chosen_logps": h, "rejected_logps": zero, "ref_chosen_logps": zero, "ref_rejected_logps": zero}


def test_cdpo_comes_to_rest_where_the_model_is_as_sure_as_the_labels() -> None:
    h = f64(math.log(0.9 / 0.1) / 0.3).requires_grad_()
    found("cdpo", pairs=at_margin(h), beta=0.3).sum().backward()
    close(h.grad, f64(0))


def test_a_loss_of_extreme_margins_is_finite_and_so_is_its_gradient() -> None:
    for method in ("sp2dpo", "dpo", "cdpo", "robust"):
        h = torch.tensor([-1e4, 1e4, 0.0]).requires_grad_()
        signals = {"beta": torch.tensor([5.0, 5.0, 5.0])}
        per_pair = found(method, signals, at_margin(h))
        per_pair.sum().backward()
        assert torch.isfinite(per_pair).all()
        assert torch.isfinite(h.grad).all()


# Identities -----------------------------------------------------------------------------------------------------------


def test_sp2dpo_with_equal_beta_is_dpo() -> None:
    signals = {"beta": torch.full_like(H, 0.1)}
    assert torch.equal(found("sp2dpo", signals), found("dpo", beta=0.1))
    assert torch.equal(found("dpo", signals), found("dpo", beta=0.1))


@pytest.mark.parametrize("method", ["cdpo", "robust"])
def test_without_flipped_labels_it_is_dpo(method: str) -> None:
    assert torch.equal(found(method, label_smoothing=0), found("dpo"))
    assert torch.equal(found(method, {"label_smoothing": torch.zeros_like(H)}), found("dpo"))


@given(epsilon=st.floats(0, 0.49), h=st.floats(-50, 50), beta=st.floats(1e-3, 10))
def test_robust_averaged_over_flips_is_dpo_on_the_right_labels(epsilon: float, h: float, beta: float) -> None:
    right, flipped = found("robust", pairs=at_margin(f64(h, -h)), beta=beta, label_smoothing=epsilon)
    expected = found("dpo", pairs=at_margin(f64(h)), beta=beta)[0]
    close((1 - epsilon) * right + epsilon * flipped, expected, rtol=1e-9)


@given(epsilon=st.floats(0, 0.5), h=st.floats(-50, 50), beta=st.floats(1e-3, 10))
def test_cdpo_is_dpo_averaged_over_flips(epsilon: float, h: float, beta: float) -> None:
    right, flipped = found("dpo", pairs=at_margin(f64(h, -h)), beta=beta)
    smoothed = found("cdpo", pairs=at_margin(f64(h)), beta=beta, label_smoothing=epsilon)[0]
    close(smoothed, (1 - epsilon) * right + epsilon * flipped)


def from_the_reference(method: str, signals: Any, **knobs: Any) -> Any:
    """Gradient with respect to h at the first step, where the policy is the reference."""
    h = torch.zeros_like(BETA_I).requires_grad_()
    mean_loss(found(method, signals, at_margin(h), **knobs)).backward()
    return h.grad


def test_the_first_step_of_sp2dpo_is_loss_weighting_and_later_ones_are_not() -> None:
    mean = float(BETA_I.mean())
    first = from_the_reference("sp2dpo", {"beta": BETA_I})
    close(first, from_the_reference("dpo", {"weight": BETA_I / mean}, beta=mean))
    later, weighted = gradients("sp2dpo")[0], gradients("dpo", {"weight": BETA_I / mean}, beta=mean)[0]
    assert (later - weighted).abs().max() > 1e-3
    close(later, gradients("dpo", {"weight": matching_weight(BETA_I, mean, H)}, beta=mean)[0])


@pytest.mark.parametrize("method", ["sp2dpo", "dpo", "cdpo", "robust"])
def test_a_margin_acts_as_if_the_reference_preferred_the_chosen_by_as_much(method: str) -> None:
    margin = f64(0.5, -1.0, 2.0, 0.0)
    shifted = PAIRS | {"ref_chosen_logps": PAIRS["ref_chosen_logps"] + margin}
    close(found(method, {"margin": margin}), found(method, pairs=shifted))


def test_a_margin_is_added_to_the_target_of_the_method() -> None:
    margin = torch.full_like(H, 0.25)
    close(found("simpo", {"margin": margin}, gamma=1), found("simpo", gamma=1.5))
    close(found("ipo", {"margin": margin}, beta=0.5), found("ipo", beta=1 / (2 * 1.25)))


def test_gamma_of_simpo_is_a_margin_in_reward_units() -> None:
    alone = found("simpo", {"margin": torch.full_like(H, 0.9)}, beta=2.5, gamma=0, margin_units="reward")
    close(alone, found("simpo", beta=2.5, gamma=0.9))
    assert log_ratio_margin(0.9, 2.5, "reward") == 0.9 / 2.5
    assert log_ratio_margin(0.9, 2.5, "logratio") == 0.9


def test_margins_in_reward_units_are_divided_by_the_beta_of_their_pair() -> None:
    gamma = f64(0.1, 0.2, 0.3, 0.4)
    close(found("sp2dpo", {"margin": gamma}, margin_units="reward"), found("sp2dpo", {"margin": gamma / BETA_I}))


finite = st.floats(-100, 100)
batches = (
    st.integers(1, 5)
    .flatmap(
        lambda n: st.fixed_dictionaries(
            {name: st.lists(finite, min_size=n, max_size=n) for name in PAIRS if name.endswith("logps")}
            | {
                name: st.lists(st.integers(1, 500), min_size=n, max_size=n)
                for name in PAIRS
                if name.endswith("lengths")
            }
            | {"beta": st.lists(st.floats(1e-3, 10), min_size=n, max_size=n)}
            | {"weight": st.lists(st.floats(0, 10), min_size=n, max_size=n)}
        )
    )
    .map(lambda columns: {name: f64(*values) for name, values in columns.items()})
)
"""Pairs with any numbers, and signals for them."""


def split(columns: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {name: columns[name] for name in PAIRS}, {name: columns[name] for name in ("beta", "weight")}


@pytest.mark.parametrize("method", METHODS)
@given(columns=batches, shift=finite)
def test_only_the_change_from_the_reference_counts_where_there_is_one(method: str, columns: Any, shift: float) -> None:
    pairs, signals = split(columns)
    sides = ("chosen_logps", "ref_chosen_logps") if METHODS[method].reference else ("ref_chosen_logps",)
    moved = pairs | {name: pairs[name] + shift for name in sides}
    torch.testing.assert_close(found(method, signals, moved), found(method, signals, pairs), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@given(columns=batches, data=st.data())
def test_the_loss_of_a_pair_depends_on_no_other_pair(method: str, columns: Any, data: Any) -> None:
    order = torch.tensor(data.draw(st.permutations(range(len(columns["beta"])))))
    some = order[: data.draw(st.integers(1, len(order)))]
    picked = split({name: values[some] for name, values in columns.items()})
    pairs, signals = split(columns)
    close(found(method, picked[1], picked[0]), found(method, signals, pairs)[some])


@pytest.mark.parametrize("method", METHODS)
@given(columns=batches)
def test_a_weight_is_a_factor_of_the_whole_loss_of_its_pair(method: str, columns: Any) -> None:
    pairs, signals = split(columns)
    sft = {"sft": torch.arange(len(signals["beta"])) % 2 == 0}
    plain = found(method, {"beta": signals["beta"], **sft}, pairs)
    close(found(method, signals | sft, pairs), signals["weight"] * plain)


@given(columns=batches)
def test_swapping_the_responses_turns_the_margin_of_dpo_around(columns: Any) -> None:
    pairs, signals = split(columns)
    other = {"chosen": "rejected", "rejected": "chosen"}
    swapped = {name.replace(side, other[side]): pairs[name] for name in pairs for side in other if side in name}
    z = signals["beta"] * PairBatch(**pairs).implicit_margin
    signals = {"beta": signals["beta"]}
    difference = found("dpo", signals, swapped) - found("dpo", signals, pairs)
    torch.testing.assert_close(difference, z, rtol=1e-8, atol=1e-8)


# Precision ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_comes_out_as_float32_and_float64_stays(method: str) -> None:
    half = {name: values.bfloat16() if values.is_floating_point() else values for name, values in PAIRS.items()}
    low = found(method, {"beta": BETA_I.bfloat16()}, half)
    assert low.dtype == torch.float32
    high = {name: values.to(torch.float64) for name, values in half.items()}
    close(low.double(), found(method, {"beta": BETA_I.bfloat16().double()}, high), rtol=1e-5)
    assert found(method).dtype == torch.float64


def test_a_knob_is_not_rounded_to_the_precision_of_the_log_probs() -> None:
    half = {name: values.bfloat16() for name, values in at_margin(H).items()}
    close(found("dpo", pairs=half), found("dpo", pairs=at_margin(H.bfloat16().float())), rtol=1e-7)


# keep and SFT ---------------------------------------------------------------------------------------------------------


def test_a_pair_that_is_not_kept_counts_neither_in_the_sum_nor_in_the_number_of_pairs() -> None:
    keep = f64(1, 0, 1, 0)
    per_pair = found("dpo", {"keep": keep})
    close(per_pair, f64(DPO[0], 0, DPO[2], 0))
    close(mean_loss(per_pair, keep), (DPO[0] + DPO[2]) / 2)
    close(mean_loss(DPO, keep), (DPO[0] + DPO[2]) / 2)
    close(mean_loss(DPO), DPO.mean())
    assert (gradients("dpo", {"keep": keep})[0] == 0).tolist() == [False, True, False, True]


def test_with_no_pair_kept_the_loss_is_0_with_a_gradient_of_0() -> None:
    h = H.clone().requires_grad_()
    keep = torch.zeros_like(H)
    loss = mean_loss(found("dpo", {"keep": keep}, at_margin(h)), keep)
    loss.backward()
    assert loss.item() == 0.0
    assert h.grad.tolist() == [0.0] * 4


def test_a_loss_that_is_not_finite_and_not_kept_does_not_reach_the_mean() -> None:
    assert mean_loss(f64(1.0, math.nan, 3.0, math.inf), torch.tensor([True, False, True, False])).item() == 2.0


def test_a_pair_routed_to_sft_learns_from_the_chosen_response_alone() -> None:
    chosen, rejected = gradients("sp2dpo", {"sft": torch.tensor([True, False, False, False]), "weight": 3 * BETA_I})
    close(chosen[0], -3 * BETA_I[0] / 10)
    assert rejected[0] == 0
    assert rejected[1] != 0


# Errors ---------------------------------------------------------------------------------------------------------------


def without(*names: str) -> dict[str, Any]:
    return {name: values for name, values in PAIRS.items() if name not in names}


REFERENCE, LENGTHS = ("ref_chosen_logps", "ref_rejected_logps"), ("chosen_lengths", "rejected_lengths")

MISTAKES: list[tuple[str, Callable[[], Any]]] = [
    (r"unknown method 'simp' \(did you mean 'simpo'\?\); known: sp2dpo, dpo", lambda: found("simp")),
    (r"simpo has no knob 'gama' \(did you mean 'gamma'\?\); its knobs: beta, gamma", lambda: found("simpo", gama=1)),
    ("sp2dpo has no knob 'tau'; its knobs: none", lambda: found("sp2dpo", tau=1)),
    ("sp2dpo has no knob 'beta': 'beta' is a signal", lambda: pair_losses("sp2dpo", **PAIRS, beta=0.1)),
    ("sp2dpo needs the signal 'beta'", lambda: pair_losses("sp2dpo", **PAIRS)),
    (r"dpo: beta is 0; it has to be in \(0, ∞\)", lambda: found("dpo", beta=0)),
    ("dpo: beta is nan", lambda: found("dpo", beta=math.nan)),
    ("dpo: beta is inf", lambda: found("dpo", beta=math.inf)),
    ("dpo: beta is '0.1'", lambda: found("dpo", beta="0.1")),
    ("dpo: beta is True", lambda: found("dpo", beta=True)),
    ("ipo: average is 1; it has to be true or false", lambda: found("ipo", average=1)),
    (r"robust: label_smoothing is 0.5; it has to be in \[0, 0.5\)", lambda: found("robust", label_smoothing=0.5)),
    (r"cdpo: label_smoothing is 0.6; it has to be in \[0, 0.5\]", lambda: found("cdpo", label_smoothing=0.6)),
    (r"simpo: gamma is -1; it has to be in \[0, ∞\)", lambda: found("simpo", gamma=-1)),
    (r"unknown signal 'wieght' \(did you mean 'weight'\?\)", lambda: found("dpo", {"wieght": H})),
    ("dpo: 'beta' is given as a knob and as a signal", lambda: found("dpo", {"beta": BETA_I}, beta=0.1)),
    ("dpo has no label_smoothing", lambda: found("dpo", {"label_smoothing": BETA_I})),
    (r"signal 'beta' of pair 2 is -0.1; it has to be in \(0, ∞\)", lambda: found("dpo", {"beta": f64(1, 1, -0.1, 1)})),
    ("signal 'beta' of pair 1 is nan", lambda: found("dpo", {"beta": f64(1, math.nan, 1, 1)})),
    ("signal 'weight' of pair 0 is -1", lambda: found("dpo", {"weight": f64(-1, 1, 1, 1)})),
    ("signal 'margin' of pair 3 is inf", lambda: found("dpo", {"margin": f64(0, 0, 0, math.inf)})),
    ("signal 'keep' of pair 1 is 0.5; it has to be true or false", lambda: found("dpo", {"keep": f64(1, 0.5, 1, 1)})),
    ("signal 'label_smoothing' of pair 3 is 0.5", lambda: found("robust", {"label_smoothing": f64(0, 0, 0, 0.5)})),
    ("margin_units is 'nats'; it has to be 'logratio' or", lambda: found("dpo", {"margin": H}, margin_units="nats")),
    ("^dpo needs ref_chosen_logps and ref_rejected_logps$", lambda: found("dpo", pairs=without(*REFERENCE))),
    ("^dpo needs ref_rejected_logps$", lambda: found("dpo", pairs=without("ref_rejected_logps"))),
    ("^simpo needs chosen_lengths and rejected_lengths$", lambda: found("simpo", pairs=without(*LENGTHS))),
    ("^ipo needs ref_chosen_logps and .* rejected_lengths$", lambda: found("ipo", pairs=without(*REFERENCE, *LENGTHS))),
    ("routed to SFT needs chosen_lengths", lambda: found("dpo", {"sft": f64(0, 0, 0, 1)}, without(*LENGTHS))),
    (
        "rejected_logps has 3 pairs and chosen_logps has 4",
        lambda: found("dpo", pairs=PAIRS | {"rejected_logps": H[:3]}),
    ),
    (r"chosen_logps has to be a tensor .* of shape \(2, 2\)", lambda: PairBatch(H.view(2, 2), H)),
    (r"chosen_lengths has to be a tensor .* not list", lambda: PairBatch(H, H, chosen_lengths=[1, 2, 3, 4])),  # type: ignore[arg-type]
    ("weight has 3 pairs and beta has 4", lambda: found("dpo", {"beta": BETA_I, "weight": H[:3]})),
    ("the controls are for 3 pairs, the batch has 4", lambda: found("dpo", {"beta": BETA_I[:3]})),
]


@pytest.mark.parametrize(("message", "mistake"), MISTAKES, ids=[message[:40] for message, _ in MISTAKES])
def test_a_mistake_is_named(message: str, mistake: Callable[[], Any]) -> None:
    with pytest.raises(InputError, match=message):
        mistake()


def test_what_a_method_does_not_use_may_be_missing() -> None:
    close(found("simpo", pairs=without(*REFERENCE)), found("simpo"))
    close(found("dpo", pairs=without(*LENGTHS)), found("dpo"))
    close(found("ipo", pairs=without(*LENGTHS), average=False), found("ipo", average=False))


# The catalogue --------------------------------------------------------------------------------------------------------


def test_every_method_is_made_of_parts_that_exist() -> None:
    assert set(LOSSES) == {method.f for method in METHODS.values()}
    assert set(MARGINS) == set(INPUTS) == {method.u for method in METHODS.values()}
    assert all(isinstance(getattr(PairBatch, name), property) for name in MARGINS)
    assert {name for method in METHODS.values() for name in method.signals} <= set(SIGNALS)
    assert set(SIGNALS) == set(Controls.__dataclass_fields__)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_line_of_the_catalogue_is_complete_and_its_defaults_are_in_their_ranges(method: Any) -> None:
    assert METHODS[method.name] is method is method_of(method.name)
    assert all([method.title, method.formula, method.source, method.status, method.m])
    assert "https://" in method.source
    assert (method.target is None) == (method.m == "0")
    assert all(knob.valid.holds(knob.default) and knob.meaning and knob.unit for knob in method.knobs)
    assert {knob.name for knob in method.knobs}.isdisjoint(method.signals)


def test_only_simpo_does_without_a_reference() -> None:
    assert [name for name, method in METHODS.items() if not method.reference] == ["simpo"]


def test_the_settings_of_a_method_go_through_its_loss_and_only_the_control_is_its_beta() -> None:
    controls = Controls(torch.full_like(H, 0.1))
    whole = losses("cdpo", PairBatch(**PAIRS), controls, METHODS["cdpo"].settings({"beta": 7.0}))
    close(whole, found("cdpo", beta=0.1))


def python(script: str) -> str:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()


def test_the_catalogue_is_read_without_torch() -> None:
    assert python("import sys, sp2dpo.methods; print(len(sp2dpo.methods.METHODS), 'torch' in sys.modules)") == "6 False"


def test_without_torch_the_extra_to_install_is_named() -> None:
    script = "import sys; sys.modules['torch'] = None\ntry: from sp2dpo.methods import pair_losses\n"
    assert "pip install 'sp2dpo[train]'" in python(script + "except ValueError as error: print(error)")


# Controls of a step ---------------------------------------------------------------------------------------------------


class MarginBeta:
    """β of the whole batch from how its mean margin stands to a running mean, as in β-DPO without its sampling."""

    def __init__(self, sensitivity: float = 0.6, momentum: float = 0.9) -> None:
        self.sensitivity, self.momentum, self.mean = sensitivity, momentum, 0.0

    def __call__(self, batch: PairBatch, controls: Controls, gather: Callable[[Any], Any]) -> Controls:
        margins = gather(batch.implicit_margin)
        kept = margins if controls.keep is None else margins[gather(controls.keep).bool()]
        self.mean = self.momentum * self.mean + (1 - self.momentum) * margins.mean().item()
        factor = 1 + self.sensitivity * (kept.mean() - self.mean)
        return replace(controls, beta=controls.beta * factor)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


def alone(values: Any) -> Any:
    return values


def test_a_step_control_gives_the_beta_and_loss_worked_out_by_hand() -> None:
    control = MarginBeta()
    control.load_state_dict({"mean": 1.0})
    controls = control(
        PairBatch(**PAIRS).detach(), Controls(torch.full_like(H, 0.1), keep=torch.tensor([1, 1, 1, 0])), alone
    )
    assert control.mean == pytest.approx(1.0175, abs=1e-12)
    close(controls.beta, torch.full_like(H, 0.07295))
    loss = mean_loss(losses("dpo", PairBatch(**PAIRS), controls, {}), controls.keep)
    assert loss.item() == pytest.approx(0.6731407457416717, abs=1e-12)


def stepped(control: StepControl, batches: list[Any]) -> list[list[float]]:
    """β of each step."""
    return [control(PairBatch(**at_margin(h)), Controls(torch.full_like(h, 0.1)), alone).beta.tolist() for h in batches]


def test_a_step_control_goes_on_from_its_saved_state_as_if_never_stopped() -> None:
    steps = [torch.randn(4, generator=torch.Generator().manual_seed(n)) for n in range(8)]
    whole = MarginBeta()
    expected = stepped(whole, steps)
    before, after = MarginBeta(), MarginBeta()
    first = stepped(before, steps[:3])
    after.load_state_dict(json.loads(json.dumps(copy.deepcopy(before.state_dict()))))
    assert first + stepped(after, steps[3:]) == expected
    assert after.state_dict() == whole.state_dict()
    assert stepped(MarginBeta(), steps[3:]) != expected[3:]


def test_a_step_control_sees_the_margins_of_all_ranks() -> None:
    whole, rank = MarginBeta(), MarginBeta()
    expected = whole(PairBatch(**at_margin(H)), Controls(torch.full_like(H, 0.1)), alone).beta[:2]
    here = PairBatch(**at_margin(H[:2]))
    found = rank(here, Controls(torch.full_like(H[:2], 0.1)), lambda values: torch.cat([values, H[2:]])).beta
    assert torch.equal(found, expected)
    assert rank.state_dict() == whole.state_dict()


def test_a_detached_batch_has_the_same_numbers_without_gradients() -> None:
    policy = PairBatch(**{name: values.float().requires_grad_() for name, values in PAIRS.items()})
    assert all(values.requires_grad for values in policy.given().values())
    assert not any(values.requires_grad for values in policy.detach().given().values())
    assert torch.equal(policy.detach().mean_log_ratio_margin, policy.mean_log_ratio_margin)
