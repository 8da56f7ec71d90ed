"""Gaps to the schedule: its columns, which pairs get a row, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sp2dpo.calls import Cell
from sp2dpo.errors import Unfinished
from sp2dpo.gaps import GAPS_SCHEMA
from sp2dpo.schedule import EXCLUDED_SCHEMA, columns_of, excluded_table, schedule_table
from sp2dpo.settings import Panel, Schedule
from sp2dpo.temperature import random_beta

PANEL = (["qwen", "openai", "gemini"], ["v1", "v2", "v3"])

MAGNITUDE = [[0.9, 0.8, 0.85], [0.4, 0.9, 0.5], [0.2, 0.3, 0.25]]
CONFIDENCE = [[0.9, 0.95, 0.9], [0.5, 0.6, 0.4], [0.5, 0.4, 0.6]]


def pairs_of(pair_ids: Sequence[str], prompt_ids: Sequence[str] | None = None) -> pa.Table:
    rows = list(range(len(pair_ids)))
    return pa.table(
        {"pair_id": pair_ids, "prompt_id": prompt_ids or [f"prompt-{p}" for p in pair_ids], "source_row": rows}
    )


def gaps_of(
    pair_ids: Sequence[str],
    annotators: Sequence[str] = PANEL[0],
    variants: Sequence[str] = PANEL[1],
    gap: Any = None,
    category: str = "Style",
) -> pa.Table:
    """A full panel for each pair; the gap of a call is what `gap` says of (pair, annotator, variant), or 0.5."""
    cells = [(p, a, v) for p in pair_ids for a in annotators for v in variants]
    rows = [
        dict(zip(GAPS_SCHEMA.names, (*cell, category, value, 1.0, value), strict=True))
        for cell in cells
        for value in [0.5 if gap is None else gap[cell]]
    ]
    return pa.Table.from_pylist(rows, schema=GAPS_SCHEMA)


def without(gaps: pa.Table, *cells: Cell) -> pa.Table:
    rows = [row for row in gaps.to_pylist() if (row["pair_id"], row["annotator"], row["variant"]) not in cells]
    return pa.Table.from_pylist(rows, schema=GAPS_SCHEMA)


def scheduled(pairs: pa.Table, gaps: pa.Table, panel: tuple[list[str], list[str]] = PANEL, **settings: Any) -> pa.Table:
    return schedule_table(pairs, gaps, *panel, Schedule(**settings))


# Columns --------------------------------------------------------------------------------------------------------------


def test_a_panel_of_three_by_three_has_the_64_columns_that_the_paper_enumerates() -> None:
    per_call = ("category", "magnitude", "confidence", "effective_gap", "beta")
    annotators, variants = PANEL
    expected = ["prompt_id", "pair_id", "prompt_variant_count"]
    expected += [f"{metric}_{a}_{v}" for a in annotators for v in variants for metric in per_call]
    for a in annotators:
        expected += [f"category_{a}_ens", f"category_{a}_ens_tie_break", f"effective_gap_{a}_ens", f"beta_{a}_ens"]
    expected += ["beta_annotators_mean_v1", "beta_annotators_mean_v2", "beta_annotators_mean_v3"]
    expected += ["beta_annotators_mean_ens", "beta_random"]
    assert len(expected) == 64 + 1  # pair_id is this project's own
    assert list(columns_of(*PANEL))[:65] == expected


def test_diagnostics_follow_and_the_column_that_training_reads_is_last() -> None:
    assert list(columns_of(*PANEL))[65:] == [
        "prompt_disagreement_qwen",
        "prompt_disagreement_openai",
        "prompt_disagreement_gemini",
        "annotator_std",
        "annotator_mad",
        "category",
        "valid_calls",
        "effective_gap",
        "beta",
    ]


@pytest.mark.parametrize(("j", "k"), [(1, 1), (1, 3), (4, 1), (2, 5)])
def test_every_panel_has_the_columns_of_its_own_size(j: int, k: int) -> None:
    panel = [f"a{n}" for n in range(j)], [f"v{n}" for n in range(k)]
    table = scheduled(pairs_of(["p"]), gaps_of(["p"], *panel), panel)
    assert table.column_names == list(columns_of(*panel))
    assert table.num_columns == 3 + 5 * j * k + 4 * j + k + 1 + 1 + (j + 6)
    assert table["prompt_variant_count"].to_pylist() == [k]


def test_every_column_is_described() -> None:
    assert all(columns_of(*PANEL).values())


@pytest.mark.parametrize(("annotator", "variant"), [("qwen", "ens"), ("annotators_mean", "v1")])
def test_a_panel_whose_names_make_one_column_twice_is_refused(annotator: str, variant: str) -> None:
    source = {"kind": "recorded", "model": "m", "calls": "answers.jsonl"}
    with pytest.raises(ValueError, match=f"'beta_{annotator}_{variant}'"):
        Panel.model_validate({"variants": [variant], "annotators": [{"name": annotator, **source}]})


# Values ---------------------------------------------------------------------------------------------------------------


def test_a_row_worked_out_by_hand() -> None:
    """Medians 0.765, 0.2, 0.12; β 0.23655, 0.084, 0.0624; their mean 0.12765, their spreads 0.0775 and 0.0216."""
    rows = gaps_of(["p"]).to_pylist()
    for n, row in enumerate(rows):
        row["magnitude"], row["confidence"] = MAGNITUDE[n // 3][n % 3], CONFIDENCE[n // 3][n % 3]
        row["effective_gap"] = row["magnitude"] * row["confidence"]
    row = scheduled(pairs_of(["p"]), pa.Table.from_pylist(rows, schema=GAPS_SCHEMA)).to_pylist()[0]
    assert (row["magnitude_openai_v2"], row["confidence_openai_v2"]) == (0.9, 0.6)
    assert row["effective_gap_openai_v2"] == pytest.approx(0.54)
    assert row["beta_openai_v2"] == pytest.approx(0.1758)
    assert [row[f"effective_gap_{a}_ens"] for a in PANEL[0]] == pytest.approx([0.765, 0.2, 0.12])
    assert [row[f"beta_{a}_ens"] for a in PANEL[0]] == pytest.approx([0.23655, 0.084, 0.0624])
    assert [row[f"prompt_disagreement_{a}"] for a in PANEL[0]] == pytest.approx([0.005, 0.0, 0.02])
    assert row["beta"] == row["beta_annotators_mean_ens"] == pytest.approx(0.12765)
    assert row["beta_annotators_mean_v1"] == pytest.approx(0.03 + 0.27 * (0.81 + 0.2 + 0.1) / 3)
    assert row["annotator_mad"] == pytest.approx(0.084 - 0.0624)
    assert row["annotator_std"] == pytest.approx(np.std([0.23655, 0.084, 0.0624]))


def test_a_tie_between_prompts_goes_to_the_higher_priority_and_is_flagged() -> None:
    panel = ["a"], ["v1", "v2"]
    rows = gaps_of(["p"], *panel).to_pylist()
    rows[1]["category"] = "Reasoning"
    row = scheduled(pairs_of(["p"]), pa.Table.from_pylist(rows, schema=GAPS_SCHEMA), panel).to_pylist()[0]
    assert (row["category_a_ens"], row["category_a_ens_tie_break"], row["category"]) == ("Reasoning", True, "Reasoning")


def test_the_audit_category_is_a_vote_of_annotators_and_not_of_calls() -> None:
    """Five of nine calls say Safety, but only one annotator does on the whole."""
    rows = gaps_of(["p"]).to_pylist()
    for n in (0, 1, 2, 3, 6):
        rows[n]["category"] = "Safety"
    row = scheduled(pairs_of(["p"]), pa.Table.from_pylist(rows, schema=GAPS_SCHEMA)).to_pylist()[0]
    assert [row[f"category_{a}_ens"] for a in PANEL[0]] == ["Safety", "Style", "Style"]
    assert row["category"] == "Style"


def test_categories_never_enter_beta() -> None:
    tables = [scheduled(pairs_of(["p"]), gaps_of(["p"], category=name)) for name in ("Safety", "Style")]
    assert [table["category"].to_pylist() for table in tables] == [["Safety"], ["Style"]]
    assert tables[0]["beta"].equals(tables[1]["beta"])


def test_the_envelope_and_the_seed_of_the_process_are_obeyed() -> None:
    pairs, gaps = pairs_of(["p", "q"]), gaps_of(["p", "q"])
    table = scheduled(pairs, gaps, beta_min=0.1, beta_max=0.5, random_seed=7)
    assert table["beta"].to_pylist() == pytest.approx([0.3, 0.3])
    assert table["beta_qwen_v1"].to_pylist() == pytest.approx([0.3, 0.3])
    assert table["beta_random"].to_pylist() == random_beta(2, 0.1, 0.5, seed=7).tolist()


@given(st.permutations(PANEL[0]), st.permutations(PANEL[1]), st.lists(st.floats(0, 1), min_size=9, max_size=9))
@settings(max_examples=30)
def test_beta_does_not_depend_on_the_order_of_the_panel(
    annotators: list[str], variants: list[str], values: Any
) -> None:
    cells = [("p", a, v) for a in PANEL[0] for v in PANEL[1]]
    gaps = gaps_of(["p"], gap=dict(zip(cells, values, strict=True)))
    one, other = scheduled(pairs_of(["p"]), gaps), scheduled(pairs_of(["p"]), gaps, (annotators, variants))
    for name in ("beta", "beta_openai_ens", "beta_annotators_mean_v2", "prompt_disagreement_gemini"):
        assert one[name].to_pylist() == pytest.approx(other[name].to_pylist(), abs=1e-15)


# Which pairs ----------------------------------------------------------------------------------------------------------


def test_rows_keep_the_order_of_the_pairs() -> None:
    order = ["c", "a", "d", "b"]
    gap = {(p, a, v): n / 10 for n, p in enumerate("abcd") for a in PANEL[0] for v in PANEL[1]}
    table = scheduled(pairs_of(order), gaps_of(list("abcd"), gap=gap))
    assert table["pair_id"].to_pylist() == order
    assert table["prompt_id"].to_pylist() == ["prompt-c", "prompt-a", "prompt-d", "prompt-b"]
    assert table["beta"].to_pylist() == pytest.approx([0.084, 0.03, 0.111, 0.057])


def test_a_pair_that_lacks_one_of_nine_answers_has_no_row() -> None:
    gaps = without(gaps_of(["p", "q", "r"]), ("q", "gemini", "v3"))
    assert scheduled(pairs_of(["p", "q", "r"]), gaps)["pair_id"].to_pylist() == ["p", "r"]


def test_rand_beta_of_a_pair_does_not_depend_on_which_others_were_answered() -> None:
    gaps = without(gaps_of(["p", "q", "r"]), ("q", "gemini", "v3"))
    draws = random_beta(3)
    assert scheduled(pairs_of(["p", "q", "r"]), gaps)["beta_random"].to_pylist() == [draws[0], draws[2]]


def test_one_text_under_two_prompt_ids_gets_two_rows_with_one_beta() -> None:
    pairs = pairs_of(["p", "q", "p"], ["first", "other", "second"])
    gap = {(p, a, v): {"p": 0.2, "q": 0.6}[p] for p in "pq" for a in PANEL[0] for v in PANEL[1]}
    table = scheduled(pairs, gaps_of(["p", "q"], gap=gap))
    assert table["prompt_id"].to_pylist() == ["first", "other", "second"]
    assert table["beta"].to_pylist() == pytest.approx([0.084, 0.192, 0.084])
    assert len(set(table["beta_random"].to_pylist())) == 3


def test_answers_of_others_are_left_alone() -> None:
    """A larger call log serves a smaller panel: fewer annotators, variants and pairs."""
    gap = {
        (p, a, v): 0.1 if (p, a, v) == ("p", "qwen", "v1") else 0.9 for p in "pq" for a in PANEL[0] for v in PANEL[1]
    }
    table = scheduled(pairs_of(["p"]), gaps_of(["p", "q"], gap=gap), (["qwen"], ["v1"]))
    assert table["beta"].to_pylist() == pytest.approx([0.057])


def test_no_complete_pair_is_an_error_that_says_what_to_run() -> None:
    with pytest.raises(Unfinished, match="sp2dpo annotate"):
        scheduled(pairs_of(["p"]), without(gaps_of(["p"]), ("p", "qwen", "v1")))


# Excluded -------------------------------------------------------------------------------------------------------------


def excluded(pairs: pa.Table, missing: dict[Cell, str | None], dropped: Sequence[dict[str, Any]] = ()) -> list[Any]:
    """Rows of excluded.csv, where `missing` cells failed with an outcome or (None) were never asked."""
    gaps = without(gaps_of(sorted(set(pairs["pair_id"].to_pylist()))), *missing)
    table = excluded_table(
        pairs,
        pa.Table.from_pylist(list(dropped), schema=pa.schema(EXCLUDED_SCHEMA.field(n) for n in (1, 2, 3, 4))),
        gaps,
        scheduled(pairs, gaps),
        {cell: outcome for cell, outcome in missing.items() if outcome is not None},
        *PANEL,
    )
    assert table.schema == EXCLUDED_SCHEMA
    return table.to_pylist()


def test_a_failed_answer_is_named_with_its_failure() -> None:
    rows = excluded(pairs_of(["p", "q"]), {("q", "openai", "v2"): "timeout", ("q", "gemini", "v3"): "out_of_range"})
    assert rows == [
        {
            "stage": "annotate",
            "source_row": 1,
            "prompt_id": "prompt-q",
            "pair_id": "q",
            "reason": "no_valid_answer",
            "detail": "openai/v2: timeout; gemini/v3: out_of_range",
        }
    ]


def test_a_pair_that_was_not_asked_about_is_told_from_one_that_failed() -> None:
    missing: dict[Cell, str | None] = {
        ("p", "qwen", "v1"): None,
        ("q", "qwen", "v1"): None,
        ("q", "qwen", "v2"): "refused",
    }
    rows = excluded(pairs_of(["p", "q", "r"]), missing)
    assert [(row["reason"], row["detail"]) for row in rows] == [
        ("not_asked", "qwen/v1: not asked"),
        ("no_valid_answer", "qwen/v1: not asked; qwen/v2: refused"),
    ]


def test_rows_that_prepare_dropped_come_first_with_their_own_reason() -> None:
    dropped = {"source_row": 7, "prompt_id": "prompt-x", "pair_id": "x", "reason": "empty_field"}
    rows = excluded(pairs_of(["p", "q"]), {("p", "qwen", "v1"): "timeout"}, [dropped])
    assert rows[0] == {"stage": "prepare", **dropped, "detail": None}
    assert [row["stage"] for row in rows] == ["prepare", "annotate"]


def test_one_excluded_text_under_two_prompt_ids_is_listed_twice() -> None:
    rows = excluded(pairs_of(["p", "q", "p"], ["first", "other", "second"]), {("p", "qwen", "v1"): "timeout"})
    assert [(row["prompt_id"], row["source_row"]) for row in rows] == [("first", 0), ("second", 2)]


def test_a_complete_panel_excludes_nothing() -> None:
    assert excluded(pairs_of(["p", "q"]), {}) == []
