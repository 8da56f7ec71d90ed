"""Scores of benchmarks, the choice between processes, and what annotation costs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sp2dpo.cost import annotation_cost, cost_usd
from sp2dpo.errors import InputError
from sp2dpo.score import best_process, mt_bench_score, win_rate

counts = st.integers(0, 10_000)


@dataclass(frozen=True)
class Price:
    input: float
    output: float


QWEN, MINI = Price(1.60, 6.40), Price(0.25, 2.00)


# Scores ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wins", "rate"), [(134, 16.65), (156, 19.38), (105, 13.04), (144, 17.89), (218, 27.08)])
def test_win_rates_of_805_games(wins: int, rate: float) -> None:
    """All but the last are printed in Table 16; AlpacaEval 2 has 805 prompts and no ties."""
    assert win_rate(wins, 805 - wins) == pytest.approx(rate, abs=0.5e-2)


def test_a_tie_is_half_a_win() -> None:
    assert win_rate(3, 1, 4) == 62.5
    assert win_rate(0, 0, 7) == 50.0


@given(counts, counts, counts)
def test_the_win_rates_of_both_sides_add_up_to_100(wins: int, losses: int, ties: int) -> None:
    assume(wins + losses + ties > 0)
    assert win_rate(wins, losses, ties) + win_rate(losses, wins, ties) == pytest.approx(100)


@pytest.mark.parametrize("games", [(0, 0, 0), (-1, 5, 0), (5, -1, 0), (5, 5, -1)])
def test_a_win_rate_of_no_games_or_negative_ones_is_refused(games: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match="at least one game"):
        win_rate(*games)


def test_mt_bench_is_the_mean_over_turns_and_not_over_questions() -> None:
    assert mt_bench_score([[10, 8], [6]]) == 8.0
    assert mt_bench_score([[7.5, 8.5], [9, 3]]) == 7.0


@pytest.mark.parametrize("scores", [[], [[]], [[5, 0.5]], [[11]], [[float("nan")]]])
def test_mt_bench_without_turns_or_with_scores_off_the_scale_is_refused(scores: list[list[float]]) -> None:
    with pytest.raises(InputError, match="1 to 10"):
        mt_bench_score(scores)


def test_the_best_process_has_the_largest_metric_and_the_first_of_equals_wins() -> None:
    assert best_process({"dpo": 34.80, "jmamp": 34.19, "rand": 32.02}) == "dpo"
    assert best_process({"dpo": 34.19, "jmamp": 34.19}) == "dpo"
    assert best_process({"base": -1.0, "dpo": -0.5}) == "dpo"


def test_the_best_of_no_processes_is_refused() -> None:
    with pytest.raises(InputError, match="at least one process"):
        best_process({})


@pytest.mark.parametrize("metric", [{"failed": float("nan"), "dpo": 34.8}, {"dpo": 34.8, "failed": float("nan")}])
def test_the_best_of_processes_is_refused_if_one_has_no_metric(metric: dict[str, float]) -> None:
    with pytest.raises(InputError, match="a number for each"):
        best_process(metric)


# Cost -----------------------------------------------------------------------------------------------------------------


def test_the_cost_of_a_panel_worked_out_by_hand() -> None:
    """Of one pair: (1500·1.60 + 120·6.40 + 1500·0.25 + 120·2.00)/10⁶ = 0.003783 USD."""
    cost = annotation_cost(1000, [QWEN, MINI], [600, 500, 400], 40)
    assert cost == pytest.approx(3.783)
    assert annotation_cost(1000, [QWEN, MINI], [600, 500, 400], 40, retry=1.5) == pytest.approx(1.5 * cost)


@given(st.integers(1, 5), st.lists(st.floats(0, 5000), min_size=1, max_size=4), st.floats(0, 500))
def test_the_cost_of_a_panel_is_the_sum_over_its_calls(pairs: int, tokens_in: list[float], tokens_out: float) -> None:
    calls = [cost_usd(price, t, tokens_out) or 0.0 for _ in range(pairs) for price in (QWEN, MINI) for t in tokens_in]
    assert annotation_cost(pairs, [QWEN, MINI], tokens_in, tokens_out) == pytest.approx(sum(calls), abs=1e-15)


def test_each_annotator_has_its_own_tokens_retries_and_discount() -> None:
    """Of one pair: Qwen 1.2·½·(1500·1.60 + 120·6.40), the other, which reasons, 1500·0.25 + (340 + 440 + 540)·2.00."""
    tokens_out = [[40, 40, 40], [340, 440, 540]]
    cost = annotation_cost(1, [QWEN, MINI], [600, 500, 400], tokens_out, retry=[1.2, 1.0], batch_discount=[0.5, 0.0])
    assert cost == pytest.approx((1.2 * 0.5 * 3168 + 3015) / 1e6)


def test_each_annotator_may_count_the_tokens_of_a_prompt_in_its_own_way() -> None:
    same = annotation_cost(7, [QWEN, MINI], [600, 500], 40)
    assert annotation_cost(7, [QWEN, MINI], [[600, 500], [600, 500]], 40) == pytest.approx(same)
    more = annotation_cost(7, [QWEN, MINI], [[600, 500], [660, 550]], 40)
    assert more - same == pytest.approx(7 * 110 * MINI.input / 1e6)


@given(st.floats(0, 1), st.integers(0, 10_000), st.integers(0, 10_000))
def test_a_batch_discount_takes_its_share_of_the_whole_price(discount: float, tokens_in: int, tokens_out: int) -> None:
    full, batch = cost_usd(QWEN, tokens_in, tokens_out), cost_usd(QWEN, tokens_in, tokens_out, discount)
    assert batch == pytest.approx((1 - discount) * (full or 0.0))
    panel = annotation_cost(3, [QWEN], [tokens_in], tokens_out, batch_discount=discount)
    assert panel == pytest.approx(3 * (batch or 0.0))


def test_a_million_tokens_of_each_kind_cost_their_prices() -> None:
    assert cost_usd(QWEN, 1_000_000, 0) == pytest.approx(1.60)
    assert cost_usd(QWEN, 0, 1_000_000) == pytest.approx(6.40)


def test_a_panel_of_nobody_is_free() -> None:
    assert annotation_cost(1000, [], [600], 40) == 0
    assert annotation_cost(0, [QWEN], [600], 40) == 0


def test_an_unknown_price_or_count_gives_an_unknown_cost_and_not_zero() -> None:
    assert cost_usd(None, 100, 10) is None
    assert cost_usd(QWEN, None, 10) is None
    assert cost_usd(QWEN, 100, None) is None
