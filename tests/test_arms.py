"""Training arms: what each does to β and weight, as numbers over a schedule, before any model is there."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sp2dpo.arms import ARMS, CONTROLS, WITH_KNOBS, Arm, arm_of
from sp2dpo.errors import InputError, ScheduleError
from sp2dpo.methods.catalogue import METHODS
from sp2dpo.settings import Train
from sp2dpo.train.data import ArmColumns, arm_columns, check_arm, held_out

BETA = [0.03, 0.30, 0.165, 0.10, 0.05, 0.25, 0.20, 0.07, 0.11, 0.29]
OUT = np.array([False] * 8 + [True] * 2)


def schedule(beta: list[float | None] | None = None) -> pa.Table:
    values = BETA if beta is None else beta
    names = [f"pair-{n}" for n in range(len(values))]
    random = pa.array([0.04 + 0.02 * n for n in range(len(values))])
    return pa.table({"pair_id": names, "beta": pa.array(values, pa.float64()), "beta_random": random})


def columns(name: str, *, out: Any = OUT, seed: int = 42, beta: float = 0.1) -> ArmColumns:
    return arm_columns(schedule(), arm_of(name, beta=beta), held_out=out, seed=seed)


# What an arm is --------------------------------------------------------------------------------------------------


def test_the_controls_are_those_that_a_claim_about_semantics_needs() -> None:
    assert CONTROLS == (
        "untuned",
        "dpo_0.1",
        "dpo_0.3",
        "dpo_0.5",
        "rand_beta",
        "constant_beta",
        "shuffled_beta",
        "weighted_loss",
        "sp2dpo",
    )
    assert [arm_of(name).name for name in CONTROLS] == list(CONTROLS)


def test_only_the_untuned_student_is_not_trained() -> None:
    assert [name for name in CONTROLS if not arm_of(name).trained] == ["untuned"]


def test_dpo_takes_its_beta_from_the_settings_and_dpo_0_3_from_its_name() -> None:
    assert arm_of("dpo", beta=0.25).beta == 0.25
    assert arm_of("dpo_0.3", beta=0.25).beta == 0.3


@pytest.mark.parametrize("name", ["dpo_0", "dpo_0.0", "dpo_", "dpo_x", "dpo_-1", "dpo_1e-3", "dpo_nan", "dpo_inf"])
def test_a_beta_in_a_name_is_a_number_above_zero(name: str) -> None:
    with pytest.raises(InputError, match="a number above 0"):
        arm_of(name)


@pytest.mark.parametrize(("name", "other"), [("dpo_0.30", "dpo_0.3"), ("dpo_1.0", "dpo_1"), ("dpo_00.5", "dpo_0.5")])
def test_an_arm_has_one_spelling_and_so_one_folder(name: str, other: str) -> None:
    with pytest.raises(InputError, match=f"is written {other},"):
        arm_of(name)


@pytest.mark.parametrize(("name", "meant"), [("sp3dpo", "sp2dpo"), ("rand-beta", "rand_beta"), ("simp", "simpo")])
def test_an_unknown_arm_is_refused_with_the_nearest_name(name: str, meant: str) -> None:
    with pytest.raises(InputError, match=f"no training method '{name}' .did you mean '{meant}'"):
        arm_of(name)


@pytest.mark.parametrize("name", WITH_KNOBS)
def test_a_method_of_the_catalogue_is_an_arm_with_its_own_beta_and_knobs(name: str) -> None:
    defaults = METHODS[name].settings({})
    plain, moved = arm_of(name), arm_of(name, knobs={name: {"beta": 0.7}, "other": {"beta": 9.0}})
    assert (plain.loss, plain.beta, moved.beta) == (name, defaults["beta"], 0.7)
    assert plain.knobs == moved.knobs == {knob: value for knob, value in defaults.items() if knob != "beta"}


def test_the_methods_that_are_arms_are_those_whose_beta_is_theirs() -> None:
    assert set(WITH_KNOBS) == {"ipo", "simpo", "cdpo", "robust"}
    assert not set(WITH_KNOBS) & set(ARMS)


# In the process file ---------------------------------------------------------------------------------------------


def test_the_settings_of_a_process_make_its_arms() -> None:
    train = Train.model_validate({"beta": 0.2, "knobs": {"simpo": {"gamma": 0.5}}, "methods": ["dpo", "simpo"]})
    assert train.arm("dpo").beta == 0.2
    assert train.arm("simpo").knobs["gamma"] == 0.5
    assert (train.held_out, train.merge, train.layout) == (0.0, True, "auto")


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"methods": ["sp3dpo"]}, "did you mean 'sp2dpo'"),
        ({"methods": ["dpo", "dpo"]}, "names 'dpo' twice"),
        ({"methods": ["untuned"]}, "train.held_out is 0"),
        ({"methods": []}, "at least 1"),
        ({"held_out": 0.6}, "0.5"),
        ({"held_out": -0.1}, "greater than or equal to 0"),
        ({"merge": "yes"}, "boolean"),
        ({"layout": "packed"}, "shared"),
        ({"knobs": {"sp2dpo": {"beta": 1.0}}}, "has no knobs"),
        ({"knobs": {"ipo": {"bta": 1.0}}}, "did you mean 'beta'"),
        ({"knobs": {"robust": {"label_smoothing": 0.5}}}, "label_smoothing is 0.5"),
    ],
)
def test_a_bad_setting_of_the_arms_is_refused_by_name(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Train.model_validate(bad)


def test_the_untuned_student_may_be_named_where_pairs_are_held_out() -> None:
    assert Train.model_validate({"methods": ["untuned"], "held_out": 0.1}).methods == ("untuned",)


# β and weights ---------------------------------------------------------------------------------------------------


def test_each_arm_reads_its_beta() -> None:
    assert columns("sp2dpo").beta.tolist() == BETA
    assert columns("rand_beta").beta.tolist() == schedule()["beta_random"].to_pylist()
    assert columns("dpo_0.5").beta.tolist() == [0.5] * 10
    assert columns("cdpo").beta.tolist() == [0.1] * 10
    assert np.isnan(columns("untuned").beta).all()


def test_the_constant_is_the_mean_over_the_trained_pairs_alone() -> None:
    mean = columns("constant_beta").beta
    assert np.abs(mean - math.fsum(BETA[:8]) / 8).max() < 1e-12
    assert abs(mean[0] - math.fsum(BETA) / 10) > 1e-3


def test_the_weights_have_mean_one_and_rank_the_pairs_as_the_schedule_does() -> None:
    beta, weight = columns("weighted_loss")
    assert abs(weight[:8].mean() - 1) < 1e-12
    assert np.allclose(beta * weight, BETA, rtol=0, atol=1e-15)  # at a margin of zero the step of SP²DPO itself


@pytest.mark.parametrize("name", [name for name in CONTROLS if name != "weighted_loss"])
def test_no_other_arm_weights_its_loss(name: str) -> None:
    assert columns(name).weight.tolist() == [1.0] * 10


@given(st.integers(0, 2**32 - 1))
def test_shuffling_moves_the_same_values_within_each_part(seed: int) -> None:
    shuffled = columns("shuffled_beta", seed=seed).beta.tolist()
    assert Counter(shuffled[:8]) == Counter(BETA[:8])
    assert Counter(shuffled[8:]) == Counter(BETA[8:])


def test_shuffling_is_decided_by_the_seed() -> None:
    one, again, other = (columns("shuffled_beta", seed=seed).beta.tolist() for seed in (42, 42, 43))
    assert one == again != other
    assert one != BETA


BAD = [(None, "missing"), (math.nan, "NaN"), (0.0, "positive"), (-0.1, "positive"), (0.31, "outside")]


@pytest.mark.parametrize(("value", "words"), BAD)
@pytest.mark.parametrize("name", ["sp2dpo", "constant_beta", "shuffled_beta", "weighted_loss"])
def test_every_arm_that_reads_the_schedule_refuses_its_bad_beta(name: str, value: float | None, words: str) -> None:
    with pytest.raises(ScheduleError, match=words) as refused:
        check_arm(schedule([*BETA[:9], value]), arm_of(name), 0.03, 0.3)
    assert "pair-9" in str(refused.value)


@pytest.mark.parametrize("name", ["dpo", "dpo_0.5", "ipo", "untuned"])
def test_an_arm_that_does_not_read_the_schedule_does_not_mind_it(name: str) -> None:
    check_arm(schedule([math.nan] * 10), arm_of(name), 0.03, 0.3)


def test_an_arm_is_a_value() -> None:
    assert arm_of("dpo_0.3") == Arm("dpo_0.3", ARMS["dpo"].says, "one", 0.3)


# Held out --------------------------------------------------------------------------------------------------------


def prompts(of: list[int]) -> pa.Table:
    return pa.table({"prompt": [[{"role": "user", "content": f"question {n}"}] for n in of]})


@given(st.lists(st.integers(0, 30), min_size=20, max_size=60), st.sampled_from([0.05, 0.1, 0.25, 0.5]))
def test_pairs_of_one_prompt_stay_together(of: list[int], share: float) -> None:
    rows = prompts([*of, *range(100, 140)])
    out = held_out(rows, share, seed=1)
    kept = {n for n, held in zip([*of, *range(100, 140)], out, strict=True) if not held}
    held = {n for n, held in zip([*of, *range(100, 140)], out, strict=True) if held}
    assert held
    assert not kept & held
    assert out.sum() <= max(1, round(share * len(out)))


def test_the_share_is_met_where_each_pair_has_a_prompt_of_its_own() -> None:
    rows = prompts(list(range(200)))
    assert [int(held_out(rows, share, 7).sum()) for share in (0.0, 0.05, 0.1, 0.5)] == [0, 10, 20, 100]


def test_a_prompt_that_is_held_out_stays_so_in_a_larger_share_and_in_another_order() -> None:
    rows = prompts(list(range(100)))
    few, many = held_out(rows, 0.1, 7), held_out(rows, 0.3, 7)
    assert not (few & ~many).any()
    backwards = held_out(rows.take(list(range(100))[::-1]), 0.1, 7)
    assert (backwards[::-1] == few).all()
    assert (held_out(rows, 0.1, 8) != few).any()


@pytest.mark.parametrize(
    ("of", "words"), [([0], "1 pair with 1 prompt cannot"), ([0, 0, 0, 0], "4 pairs with 1 prompt cannot")]
)
def test_pairs_that_cannot_be_split_are_refused(of: list[int], words: str) -> None:
    with pytest.raises(ScheduleError, match=f"{words} be split"):
        held_out(prompts(of), 0.1, 7)
