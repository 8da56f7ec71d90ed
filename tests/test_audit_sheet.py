"""The sheet that people fill in, and what their verdicts say: sampling, blindness, what spreadsheets do, figures."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
import random
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Sp2dpo, teacher, write_process
from report_runs import HOSTILE, judged, make_run, pair
from sp2dpo.audit.cells import LONGEST
from sp2dpo.audit.intervals import auc, effective_number, share, wilson
from sp2dpo.audit.sample import allocate, chosen_is_a, digest, draw, strata_of
from sp2dpo.audit.score import Score, reliability, score
from sp2dpo.audit.sheet import COLUMNS, Sheet, read_sheet, write_sheet
from sp2dpo.audit.verdicts import verdicts_of
from sp2dpo.audit.weights import learnt_weights, weights_yaml
from sp2dpo.errors import DataError, InputError
from sp2dpo.evidence import Evidence, read_evidence
from sp2dpo.process import load_process
from sp2dpo.tables import read_manifest

N = 240
Fill = Callable[[dict[str, str]], str]


def wrong(n: int) -> bool:
    """Which labels of the run are wrong: a fifth of them."""
    return n % 5 == 0


def answered(n: int, annotator: str, variant: str) -> str:
    """`good` is less sure of wrong labels; `blind` is as sure of any."""
    chance = random.Random(f"{n} {annotator} {variant}")
    mean = (0.35 if wrong(n) else 0.7) if annotator == "good" else 0.6
    category = "Safety" if n % 3 == 0 else "Style" if n % 3 == 1 else "Reasoning"
    magnitude, confidence = chance.uniform(0.4, 1.0), chance.gauss(mean, 0.15)
    return judged(category, round(magnitude, 3), round(min(max(confidence, 0.0), 1.0), 3))


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    rows = [pair(n) for n in range(N)]
    return read_evidence(make_run(tmp_path_factory.mktemp("audited"), rows, answered, annotators=("good", "blind")))


def number_of(evidence: Evidence) -> dict[str, int]:
    """The number of each pair, by its pair_id."""
    prompts = evidence.schedule["prompt_id"].to_pylist()
    return dict(zip(evidence.schedule["pair_id"].to_pylist(), (int(p[1:]) for p in prompts), strict=True))


def person(evidence: Evidence, accuracy: float = 1.0, ties: float = 0.0, who: str = "", seed: int = 0) -> Fill:
    """Fills the column verdict; sees which label is wrong this often."""
    number = number_of(evidence)

    def verdict(row: dict[str, str]) -> str:
        chance = random.Random(f"{who} {row['pair_id']}")
        if chance.random() < ties:
            return "tie"
        right = wrong(number[row["pair_id"]]) != (chance.random() < accuracy)
        return "A" if right == chosen_is_a(seed, row["pair_id"]) else "B"

    return verdict


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def text_of(rows: Sequence[dict[str, str]], mark: str = ",") -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=mark)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def put(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.write_text(text_of(rows), encoding="utf-8", newline="")
    return path


def sheet(evidence: Evidence, path: Path, n: int = N, seed: int = 0) -> Path:
    write_sheet(path, evidence, draw(evidence, n, seed), n, seed)
    return path


def filled(evidence: Evidence, path: Path, fill: Fill, n: int = N, seed: int = 0) -> Sheet:
    rows = rows_of(sheet(evidence, path, n, seed))
    return read_sheet(put(path, [{**row, "verdict": fill(row)} for row in rows]))


# The sample --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.data())
def test_every_stratum_has_one_if_that_is_possible_and_the_rest_is_in_proportion(sizes: list[int], data: Any) -> None:
    n = data.draw(st.integers(1, sum(sizes)))
    taken = allocate(sizes, n)
    one = 1 if n >= len(sizes) else 0
    left = sum(sizes) - one * len(sizes)
    fair = [one + (n - one * len(sizes)) * (size - one) / max(left, 1) for size in sizes]
    assert taken.sum() == n
    assert all(one <= count <= size for count, size in zip(taken, sizes, strict=True))
    assert all(abs(count - share) < 1 for count, share in zip(taken, fair, strict=True))


@settings(max_examples=40)
@given(st.integers(1, N + 50), st.integers(0, 1000))
def test_a_sample_is_of_different_pairs_and_its_weights_sum_to_the_strata_that_it_covers(
    evidence: Evidence, n: int, seed: int
) -> None:
    drawn = draw(evidence, n, seed)
    ids, weights = drawn["pair_id"].to_pylist(), drawn["weight"].to_numpy()
    strata = Counter(strata_of(evidence).stratum.tolist())
    assert len({*ids}) == drawn.num_rows == min(n, N)
    assert weights.sum() == pytest.approx(sum(strata[h] for h in {*drawn["stratum"].to_pylist()}))
    if n >= len(strata):
        assert {*drawn["stratum"].to_pylist()} == {*strata}
    at = drawn["at"].to_pylist()
    assert [evidence.schedule["pair_id"][row].as_py() for row in at] == ids


def test_strata_are_category_third_of_beta_and_half_of_the_spread(evidence: Evidence) -> None:
    at, stratum = strata_of(evidence)
    assert {name.split(", ")[0] for name in stratum} == {"Safety", "Style", "Reasoning"}
    thirds = Counter(name.split(", ")[1] for name in stratum)
    assert thirds == {"β low": N / 3, "β middle": N / 3, "β high": N / 3}
    halves = Counter(name.split(", ")[2] for name in stratum)
    assert halves == {"spread low": N / 2, "spread high": N / 2}
    highest_low = max(evidence.beta_i[i] for i, name in zip(at, stratum, strict=True) if "β low" in name)
    lowest_high = min(evidence.beta_i[i] for i, name in zip(at, stratum, strict=True) if "β high" in name)
    assert highest_low < lowest_high


def test_each_pair_of_a_stratum_is_as_likely_as_any_other(evidence: Evidence) -> None:
    drawn = Counter(pair_id for seed in range(200) for pair_id in draw(evidence, 40, seed)["pair_id"].to_pylist())
    at, stratum = strata_of(evidence)
    ids = evidence.schedule["pair_id"].to_pylist()
    large = max({*stratum}, key=[*stratum].count)
    counts = [drawn[ids[i]] for i, name in zip(at, stratum, strict=True) if name == large]
    p = sum(counts) / len(counts) / 200
    assert max(abs(count - 200 * p) for count in counts) < 4.5 * math.sqrt(200 * p * (1 - p))


def test_the_same_seed_draws_the_same_pairs_and_another_one_others(evidence: Evidence) -> None:
    assert draw(evidence, 60, 7).equals(draw(evidence, 60, 7))
    assert digest(draw(evidence, 60, 7)) != digest(draw(evidence, 60, 8)) != digest(draw(evidence, 61, 8))


def test_a_pair_that_is_in_the_schedule_twice_is_judged_once(tmp_path: Path) -> None:
    rows = [pair(n) for n in range(6)]
    twice = read_evidence(make_run(tmp_path, [*rows, {**rows[2], "prompt_id": "again"}]))
    assert twice.n == 7
    assert sorted(draw(twice, 10, 0)["at"].to_pylist()) == [0, 1, 2, 3, 4, 5]


def test_a_run_of_one_pair_one_annotator_and_one_prompt_can_be_sampled(tmp_path: Path) -> None:
    one = read_evidence(make_run(tmp_path, [pair(3)], variants=("v1",)))
    assert draw(one, 200, 0)["stratum"].to_pylist() == ["Safety, β low, spread low"]
    scored = score(one, [filled(one, tmp_path / "s.csv", lambda row: "A", 1)])
    assert scored.right + scored.wrong == 1
    assert scored.judges[0].auc_gap.value is None
    json.dumps(scored.as_json(), allow_nan=False)


@pytest.mark.parametrize(("n", "seed"), [(0, 0), (10, -1)])
def test_an_impossible_sample_is_refused(evidence: Evidence, n: int, seed: int) -> None:
    with pytest.raises(InputError, match="cannot be drawn"):
        draw(evidence, n, seed)


# The sheet is blind ------------------------------------------------------------------------------------------------


def test_the_sheet_of_all_pairs_is_the_same_whatever_the_panel_says(evidence: Evidence, tmp_path: Path) -> None:
    other = read_evidence(make_run(tmp_path / "other", [pair(n) for n in range(N)]))
    columns = [name for name in COLUMNS if name != "sheet"]
    one, two = rows_of(sheet(evidence, tmp_path / "one.csv")), rows_of(sheet(other, tmp_path / "two.csv"))
    assert [[row[c] for c in columns] for row in one] == [[row[c] for c in columns] for row in two]
    assert len({row["sheet"] for row in one}) == 1


def test_the_chosen_response_is_a_as_often_as_b_and_the_columns_name_no_side(
    evidence: Evidence, tmp_path: Path
) -> None:
    rows = rows_of(sheet(evidence, tmp_path / "s.csv"))
    first = sum("Good" in row["response_a"] for row in rows)
    assert abs(first - N / 2) < 4 * math.sqrt(N) / 2
    assert all(("Good" in row["response_a"]) != ("Good" in row["response_b"]) for row in rows)
    assert all(("Good" in row["response_a"]) == chosen_is_a(0, row["pair_id"]) for row in rows)
    assert tuple(rows[0]) == COLUMNS
    assert all(not row[name] for row in rows for name in ("verdict", "category", "notes"))


def test_the_order_of_the_sheet_does_not_follow_beta(evidence: Evidence) -> None:
    beta = evidence.beta_i[draw(evidence, 200, 0)["at"].to_numpy()]
    assert abs(np.corrcoef(np.arange(200), beta.argsort().argsort())[0, 1]) < 4 / math.sqrt(200)


def test_no_cell_is_a_formula_and_each_text_fits_into_one(tmp_path: Path) -> None:
    texts = [HOSTILE, "=1+1", "  +2", "@x", "- a list", "\t=3", "\uff1dcmd", "🙂" * 40_000, "a\r\nb\rc\x00"]
    rows = [
        {
            "prompt": [{"role": "system", "content": text}, {"role": "user", "content": text}],
            "chosen": [{"role": "assistant", "content": text}],
            "rejected": [{"role": "assistant", "content": f"{text}!"}],
        }
        for text in texts
    ]
    hostile = read_evidence(make_run(tmp_path, rows))
    path = sheet(hostile, tmp_path / "s.csv", 100)
    shown = rows_of(path)
    cells = [cell for row in shown for cell in row.values()]
    assert len(shown) == len(texts)
    assert not [cell for cell in cells if cell.lstrip()[:1] in set("=+-@\uff1d") or cell[:1] in set("\t\r\n")]
    assert max(len(cell.encode("utf-16-le")) // 2 for cell in cells) <= LONGEST + 100 < 32_767
    assert not {chr(n) for n in range(32) if n not in (9, 10)} & {c for cell in cells for c in cell}
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    long = next(row for row in shown if len(row["response_a"]) > 10_000)
    assert long["response_a"].endswith("characters do not fit into a cell]")
    assert long["prompt"].startswith("[the first")
    assert "assistant: a\nb\nc␀" in cells


def test_a_sheet_that_is_there_is_never_overwritten(evidence: Evidence, tmp_path: Path) -> None:
    path = sheet(evidence, tmp_path / "s.csv", 5)
    before = path.read_bytes()
    with pytest.raises(InputError, match="may hold verdicts"):
        sheet(evidence, path, 6)
    assert path.read_bytes() == before


# What spreadsheets and people do to it -----------------------------------------------------------------------------


def as_saved_elsewhere(text: str, how: str) -> bytes:
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    if how == "semicolons, reordered, a column of their own":
        return text_of([{"mine": "x", **row} for row in reversed(rows)], ";").encode("utf-8")
    if how == "UTF-16 with tabs":
        return text_of(rows, "\t").encode("utf-16")
    if how == "old Windows letters":
        return text_of([{**row, "notes": "für später"} for row in rows], ";").encode("cp1252")
    if how == "blank lines and a total below":
        blank = dict.fromkeys(COLUMNS, "")
        return text_of([blank, *rows, blank, {**blank, "notes": "200 done"}]).encode("utf-8-sig")
    if how == "a line that names the separator":
        return ("sep=;\r\n" + text_of(rows, ";")).encode("utf-8-sig")
    spelt = {"A": " response a ", "B": "b", "tie": "Equal."}
    headed = text_of([{**row, "verdict": spelt.get(row["verdict"], "")} for row in rows])
    return headed.replace("pair_id", "Pair ID", 1).replace("verdict", "Verdict", 1).encode("utf-8")


@pytest.mark.parametrize(
    "how",
    [
        "semicolons, reordered, a column of their own",
        "UTF-16 with tabs",
        "old Windows letters",
        "blank lines and a total below",
        "a line that names the separator",
        "lower case and other words",
    ],
)
def test_a_sheet_comes_back_from_any_program(evidence: Evidence, tmp_path: Path, how: str) -> None:
    fill = person(evidence, 0.9, ties=0.2)
    whole = filled(evidence, tmp_path / "whole.csv", lambda row: fill(row) if int(row["row"]) % 3 else "", 60)
    other = tmp_path / "other.csv"
    other.write_bytes(as_saved_elsewhere((tmp_path / "whole.csv").read_bytes().decode("utf-8"), how))
    back = read_sheet(other)
    assert {*back.rows} == {*whole.rows}
    assert {*back.unanswered} == {*whole.unanswered}
    assert (len(whole.rows), len(whole.unanswered)) == (40, 20)
    assert {row.verdict for row in whole.rows} == {"right", "wrong", "tie"}
    assert (back.seed, back.asked, back.draw) == (whole.seed, whole.asked, whole.draw)


Change = Callable[[list[dict[str, str]]], list[dict[str, str]]]


def _first(**cells: str) -> Change:
    return lambda rows: [{**rows[0], **cells}, *rows[1:]]


def _without(column: str) -> Change:
    return lambda rows: [{name: cell for name, cell in row.items() if name != column} for row in rows]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: [{**row, "sheet": row["sheet"].replace("seed 0", "seed 1")} for row in rows], "was changed: its"),
        (lambda rows: [{**row, "sheet": row["sheet"].replace("n 20", "n 21")} for row in rows], "was changed: its"),
        (_first(verdict="C"), r"row 2: 'C'"),
        (lambda rows: [{**row, "verdict": "?"} for row in rows], r"row 2: '\?'.*row 6: '\?' and 15 more"),
        (_first(pair_id="", verdict="A"), "row 2: no pair_id"),
        (_first(sheet="seed 9, n 20, draw 0123456789abcdef"), "'sheet' must say the same in every row"),
        (lambda rows: [{**row, "sheet": "mine"} for row in rows], "'sheet' must say the same in every row"),
        (_without("verdict"), "no row with the headings pair_id, verdict, sheet"),
        (_without("pair_id"), "no row with the headings"),
        (lambda rows: [*rows, {**rows[0], "verdict": "B"}, {**rows[0], "verdict": "tie"}], "twice with different"),
    ],
)
def test_a_sheet_that_cannot_be_read_says_where(evidence: Evidence, tmp_path: Path, change: Change, says: str) -> None:
    path = sheet(evidence, tmp_path / "s.csv", 20)
    put(path, change(rows_of(path)))
    with pytest.raises(DataError, match=says):
        read_sheet(path)


def test_a_workbook_and_a_file_that_is_not_there_are_told_from_a_sheet(tmp_path: Path) -> None:
    (tmp_path / "s.xlsx").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match="save it as CSV"):
        read_sheet(tmp_path / "s.xlsx")
    with pytest.raises(DataError, match="is not there"):
        read_sheet(tmp_path / "none.csv")
    with pytest.raises(DataError, match="is a folder"):
        read_sheet(tmp_path)
    with pytest.raises(DataError, match="is no file but a device"):
        read_sheet(Path("/dev/null"))


def test_a_sheet_has_the_name_of_the_csv_that_it_is(evidence: Evidence, sp2dpo: Sp2dpo) -> None:
    refused = sp2dpo("audit", "sample", evidence.run.path, "-o", "sheet.xlsx")
    assert refused.code == 2
    assert "sheet.xlsx: a sheet is CSV" in refused.err
    assert not Path("sheet.xlsx").exists()


def test_errors_name_a_sheet_by_the_path_that_was_given(evidence: Evidence, tmp_path: Path) -> None:
    path = sheet(evidence, tmp_path / "s.csv", 20)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: no verdict"):
        score(evidence, [read_sheet(path)])


def test_a_sheet_without_verdicts_says_what_to_fill_in(evidence: Evidence, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no verdict is filled in; write A, B or tie"):
        score(evidence, [read_sheet(sheet(evidence, tmp_path / "s.csv", 20))])


def test_a_sheet_of_another_run_is_refused(evidence: Evidence, tmp_path: Path) -> None:
    other = read_evidence(make_run(tmp_path, [pair(n, "of another source") for n in range(20)]))
    theirs = filled(other, tmp_path / "s.csv", lambda row: "A", 20)
    with pytest.raises(
        DataError, match=r"20 of 20 judged pairs are not in the schedule.*the run that it was drawn from"
    ):
        score(evidence, [theirs])


def test_a_sheet_of_another_schedule_of_the_same_pairs_counts_with_a_warning(
    evidence: Evidence, tmp_path: Path
) -> None:
    fill = person(evidence)
    other = read_evidence(make_run(tmp_path, [pair(n) for n in range(N)]))
    theirs = filled(other, tmp_path / "s.csv", fill, 100)
    assert not [text for text in score(other, [theirs]).warnings if "another schedule" in text]
    ours = score(evidence, [theirs])
    assert [text for text in ours.warnings if "s.csv was drawn from another schedule" in text]
    assert ours.verdicts == score(other, [theirs]).verdicts


def test_two_sheets_of_one_name_are_refused(evidence: Evidence, tmp_path: Path) -> None:
    one = filled(evidence, tmp_path / "s.csv", person(evidence), 20)
    with pytest.raises(DataError, match="same name"):
        score(evidence, [one, one])


# Figures -----------------------------------------------------------------------------------------------------------


def plain_auc(right: Sequence[bool], values: Sequence[float], weights: Sequence[float]) -> float:
    won = total = 0.0
    for (r, x, v), (q, y, w) in itertools.product(zip(right, values, weights, strict=True), repeat=2):
        if r and not q:
            total += v * w
            won += v * w * (1.0 if x > y else 0.5 if x == y else 0.0)
    return won / total


def plain_agreement(evidence: Evidence, scored: Score) -> tuple[list[int], list[bool], list[float]]:
    """Rows of the schedule, whether the label is right, and the weight, of all pairs that are no tie."""
    row = {pair_id: n for n, pair_id in enumerate(evidence.schedule["pair_id"].to_pylist())}
    at, stratum = strata_of(evidence)
    name = dict(zip(at.tolist(), stratum.tolist(), strict=True))
    answered_in = Counter(name[row[pair_id]] for pair_id in scored.verdicts)
    pairs_in = Counter(name.values())
    decided = [pair_id for pair_id, verdict in scored.verdicts.items() if verdict != "tie"]
    weight = [pairs_in[name[row[p]]] / answered_in[name[row[p]]] for p in decided]
    return [row[p] for p in decided], [scored.verdicts[p] == "right" for p in decided], weight


@pytest.fixture(scope="module")
def scored(evidence: Evidence, tmp_path_factory: pytest.TempPathFactory) -> Score:
    """150 pairs, judged by one who is right nine times of ten and sees no difference once of ten."""
    path = tmp_path_factory.mktemp("sheet") / "ann.csv"
    return score(evidence, [filled(evidence, path, person(evidence, 0.9, 0.1), 150)])


def test_agreement_and_auc_are_those_of_plain_python(evidence: Evidence, scored: Score) -> None:
    at, right, weight = plain_agreement(evidence, scored)
    assert (scored.right, scored.wrong) == (sum(right), len(right) - sum(right))
    assert scored.right + scored.wrong + scored.ties == scored.rows == 150
    expected = sum(w for r, w in zip(right, weight, strict=True) if r) / sum(weight)
    assert scored.agreement.value == pytest.approx(expected)
    tied = 1 - sum(weight) / N
    assert scored.tied.value == pytest.approx(tied)
    panel, good, blind = scored.judges
    assert (panel.name, good.name, blind.name) == ("panel", "good", "blind")
    assert panel.auc_gap.value == pytest.approx(plain_auc(right, evidence.gap_i[at].tolist(), weight))
    for j, one in enumerate((good, blind)):
        assert one.auc_gap.value == pytest.approx(plain_auc(right, evidence.gap_ij[at, j].tolist(), weight))
        confidence = [float(np.median(evidence.confidence_ijk[i, j])) for i in at]
        assert one.auc_confidence.value == pytest.approx(plain_auc(right, confidence, weight))
        assert one.claimed == pytest.approx(np.dot(confidence, weight) / sum(weight))


def test_reliability_and_its_error_are_those_of_plain_python(evidence: Evidence, scored: Score) -> None:
    at, right, weight = plain_agreement(evidence, scored)
    claimed = np.median(evidence.confidence_ijk[at], axis=2).mean(axis=1).tolist()
    rows = list(zip(claimed, right, weight, strict=True))
    off = 0.0
    for one in scored.judges[0].curve:
        inside = [(c, r, w) for c, r, w in rows if one.low <= c <= one.high]
        of_it = sum(w for _, _, w in inside)
        assert one.right.n == len(inside) >= 20
        assert one.claimed == pytest.approx(sum(c * w for c, _, w in inside) / of_it)
        assert one.right.value == pytest.approx(sum(w for _, r, w in inside if r) / of_it)
        interval = wilson(one.right.value, of_it**2 / sum(w * w for _, _, w in inside))
        assert (one.right.low, one.right.high) == pytest.approx(interval)
        off += abs(one.claimed - one.right.value) * of_it
    assert len(scored.judges[0].curve) == 5
    assert sum(one.right.n for one in scored.judges[0].curve) == len(at)
    assert scored.judges[0].error == pytest.approx(off / sum(weight))


def test_a_perfect_person_over_all_pairs_finds_the_share_of_wrong_labels(evidence: Evidence, tmp_path: Path) -> None:
    exact = score(evidence, [filled(evidence, tmp_path / "s.csv", person(evidence))])
    assert (exact.right, exact.wrong, exact.ties) == (N * 4 // 5, N // 5, 0)
    assert exact.agreement.value == pytest.approx(0.8)
    assert exact.covered == 1
    assert exact.warnings == ()
    number = number_of(evidence)
    assert all((verdict == "wrong") == wrong(number[pair_id]) for pair_id, verdict in exact.verdicts.items())


def test_a_sample_is_right_on_average_also_where_strata_are_drawn_unequally(evidence: Evidence, tmp_path: Path) -> None:
    fill, found = person(evidence), []
    for seed in range(40):
        drawn = draw(evidence, 40, seed)
        is_wrong = [wrong(n) for n in map(number_of(evidence).get, drawn["pair_id"].to_pylist()) if n is not None]
        found.append(float(np.average(is_wrong, weights=drawn["weight"].to_numpy())))
    assert np.mean(found) == pytest.approx(0.2, abs=4 * np.std(found) / math.sqrt(40))
    one = score(evidence, [filled(evidence, tmp_path / "s.csv", fill, 40)])
    assert 1 - (one.agreement.value or 0) == pytest.approx(found[0])


def test_the_annotator_that_knows_gets_the_larger_weight(scored: Score) -> None:
    _, good, blind = scored.judges
    assert good.auc_gap.low is not None
    assert blind.auc_gap.low is not None
    assert good.auc_gap.low > 0.5 > blind.auc_gap.low
    assert scored.weights["good"] > 1 > scored.weights["blind"] > 0
    m = min(scored.right, scored.wrong)
    g = [max(0, 2 * (one.auc_gap.value or 0) - 1) for one in (good, blind)]
    expected = [m / (m + 20) * 2 * value / sum(g) + 20 / (m + 20) for value in g]
    assert list(scored.weights.values()) == pytest.approx(expected, abs=6e-4)


def test_categories_with_twenty_verdicts_have_figures_of_their_own(evidence: Evidence, tmp_path: Path) -> None:
    fill = person(evidence)
    drawn = filled(evidence, tmp_path / "s.csv", lambda row: fill(row) if int(row["row"]) <= 62 else "")
    scored = score(evidence, [drawn])
    counts = {one.category: one.decided for one in scored.categories}
    assert list(counts) == ["Safety", "Reasoning", "Style"]
    assert sum(counts.values()) == 62
    assert min(counts.values()) < 20 <= max(counts.values())
    for one in scored.categories:
        assert (one.panel is not None) == (one.right is not None) == (one.decided >= 20)
    large = next(one for one in scored.categories if one.panel and one.right)
    at, right, weight = plain_agreement(evidence, scored)
    inside = [(i, r, w) for i, r, w in zip(at, right, weight, strict=True) if evidence.category_i[i] == large.category]
    at, right, weight = (list(column) for column in zip(*inside, strict=True))
    assert large.panel is not None
    assert large.panel.auc_gap.value == pytest.approx(plain_auc(right, evidence.gap_i[at].tolist(), weight))


def test_few_verdicts_give_figures_with_a_warning_and_no_weights(evidence: Evidence, tmp_path: Path) -> None:
    few = score(evidence, [filled(evidence, tmp_path / "s.csv", person(evidence), 25)])
    assert few.wrong < 10
    assert few.weights == {}
    assert few.agreement.value is not None
    [said] = [text for text in few.warnings if "fewer than 10" in text]
    assert f"{few.wrong} wrong labels among the verdicts" in said
    assert "no weights are made" in said


def test_one_annotator_gets_one_warning_of_few_verdicts_and_none_about_weights(tmp_path: Path) -> None:
    alone = read_evidence(make_run(tmp_path, [pair(n) for n in range(12)], answered, annotators=("good",)))
    warnings = score(alone, [filled(alone, tmp_path / "s.csv", person(alone))]).warnings
    [said] = [text for text in warnings if "fewer than 10" in text]
    assert said.startswith("9 right and 3 wrong labels")
    assert not [text for text in warnings if "weights" in text]


def test_only_ties_leave_nothing_but_their_share(evidence: Evidence, tmp_path: Path) -> None:
    tied = score(evidence, [filled(evidence, tmp_path / "s.csv", lambda row: "tie", 40)])
    assert (tied.right, tied.wrong, tied.ties, tied.tied.value) == (0, 0, 40, 1.0)
    assert tied.agreement.value is None
    assert all(one.auc_gap.value is one.error is None and one.curve == () for one in tied.judges)
    json.dumps(tied.as_json(), allow_nan=False)


def test_an_annotator_that_is_surer_of_wrong_labels_is_named(evidence: Evidence, tmp_path: Path) -> None:
    turned = dataclasses.replace(evidence, gap_ij=1 - evidence.gap_ij)
    scored = score(turned, [filled(turned, tmp_path / "s.csv", person(evidence))])
    assert [text for text in scored.warnings if "larger gaps for wrong labels than for right ones: good;" in text]


def test_a_panel_that_knows_nothing_gets_no_weights_and_is_told_so(evidence: Evidence, tmp_path: Path) -> None:
    judged_by_heart = filled(evidence, tmp_path / "s.csv", person(evidence))
    flat = dataclasses.replace(evidence, gap_ij=np.full_like(evidence.gap_ij, 0.5))
    scored = score(flat, [judged_by_heart])
    assert [one.auc_gap.value for one in scored.judges[1:]] == [0.5, 0.5]
    assert scored.weights == {}
    assert [text for text in scored.warnings if "no annotator's AUC is above ½" in text]


def test_weights_that_may_be_chance_come_with_a_warning(evidence: Evidence, tmp_path: Path) -> None:
    gap = np.column_stack([1 - evidence.gap_ij[:, 1], np.full(N, 0.5)])
    scored = score(dataclasses.replace(evidence, gap_ij=gap), [filled(evidence, tmp_path / "s.csv", person(evidence))])
    first = scored.judges[1].auc_gap
    assert first.low is not None
    assert first.value is not None
    assert first.low < 0.5 < first.value
    assert scored.weights["good"] > scored.weights["blind"]
    assert [text for text in scored.warnings if "may be worse than equal ones" in text]


def test_a_sheet_filled_in_part_covers_what_it_covers(evidence: Evidence, tmp_path: Path) -> None:
    fill, skipped = person(evidence), "Safety"
    category = dict(zip(evidence.schedule["pair_id"].to_pylist(), evidence.category_i, strict=True))
    part = filled(
        evidence, tmp_path / "s.csv", lambda row: "" if category[row["pair_id"]] == skipped else fill(row), 200
    )
    scored = score(evidence, [part])
    assert scored.covered == pytest.approx(2 / 3)
    assert [text for text in scored.warnings if "33.3% of the pairs" in text]
    assert verdicts_of(evidence, [part]).weight.sum() == pytest.approx(N * 2 / 3)


def test_missing_answers_are_left_out_of_an_annotators_figures(evidence: Evidence, tmp_path: Path) -> None:
    gap, confidence = evidence.gap_ij.copy(), evidence.confidence_ijk.copy()
    gap[::2, 1], confidence[::2, 1] = np.nan, np.nan
    holed = dataclasses.replace(evidence, gap_ij=gap, confidence_ijk=confidence)
    panel, good, blind = score(holed, [filled(holed, tmp_path / "s.csv", person(evidence))]).judges
    assert (panel.auc_gap.n, good.auc_gap.n, blind.auc_gap.n) == (N, N, N / 2)
    assert sum(one.right.n for one in blind.curve) == N / 2
    assert sum(one.right.n for one in panel.curve) == N


def plain_alpha(pairs: Sequence[tuple[str, str]]) -> float:
    """Nominal α of two raters from the definition."""
    n = Counter(itertools.chain.from_iterable(pairs))
    total = sum(n.values())
    observed = sum(one != other for one, other in pairs) * 2 / total
    expected = sum(n[c] * n[k] for c in n for k in n if c != k) / (total * (total - 1))
    return 1 - observed / expected


def test_two_people_are_compared_on_the_sides_that_they_saw(evidence: Evidence, tmp_path: Path) -> None:
    sheets, said = [], []
    for who in ("ann", "bob"):
        path = tmp_path / f"{who}.csv"
        sheets.append(filled(evidence, path, person(evidence, 0.85, 0.1, who), 80))
        said.append([row["verdict"] for row in rows_of(path)])
    both = score(evidence, sheets)
    assert both.raters is not None
    assert both.raters.names == ("ann.csv", "bob.csv")
    assert both.raters.pairs == 80
    assert both.raters.alpha == pytest.approx(plain_alpha(list(zip(*said, strict=True))))
    same = [one == other for one, other in zip(*said, strict=True)]
    assert both.raters.same.value == pytest.approx(sum(same) / 80)
    assert both.right + both.wrong == sum(one == other != "tie" for one, other in zip(*said, strict=True))


def test_sheets_of_two_seeds_are_put_together(evidence: Evidence, tmp_path: Path) -> None:
    one = filled(evidence, tmp_path / "one.csv", person(evidence), 60, seed=0)
    two = filled(evidence, tmp_path / "two.csv", person(evidence, seed=5), 60, seed=5)
    both = score(evidence, [one, two])
    overlap = {row.pair_id for row in one.rows} & {row.pair_id for row in two.rows}
    assert overlap
    assert both.raters is not None
    assert both.raters.pairs == len(overlap)
    assert both.raters.same.value == 1
    assert both.raters.alpha == 1
    assert both.rows == 120 - len(overlap) == both.right + both.wrong
    number = number_of(evidence)
    assert all((verdict == "wrong") == wrong(number[pair_id]) for pair_id, verdict in both.verdicts.items())


def test_categories_that_people_give_are_compared_with_the_schedules(evidence: Evidence, tmp_path: Path) -> None:
    path = sheet(evidence, tmp_path / "s.csv", 30)
    named = {"1": "safety", "2": " Tone ", "3": "nonsense"}
    put(path, [{**row, "verdict": "a", "category": named.get(row["row"], "")} for row in rows_of(path)])
    read = read_sheet(path)
    scored = score(evidence, [read])
    assert read.odd_categories == ("nonsense",)
    assert scored.same_category is not None
    assert scored.same_category.n == 2
    assert [text for text in scored.warnings if "none of the six: 'nonsense'" in text]


# Intervals and weights ---------------------------------------------------------------------------------------------


def test_wilsons_interval_is_the_published_one() -> None:
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-5)
    assert wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=5e-5)
    assert share([], []).value is None


def test_equal_weights_count_as_many_and_unequal_ones_as_fewer() -> None:
    assert effective_number([3.0] * 7) == pytest.approx(7)
    assert effective_number([1.0, 0.0]) == pytest.approx(1)


@settings(max_examples=40)
@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 10_000))
def test_the_ends_of_an_auc_interval_are_z_standard_errors_of_their_own_away(m: int, n: int, seed: int) -> None:
    chance = np.random.default_rng(seed)
    right, values = np.array([True] * m + [False] * n), np.round(chance.normal(size=m + n), 1)
    found = auc(right, values, np.ones(m + n))
    assert found.value is not None
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low <= found.value <= found.high <= 1
    for end in (found.low, found.high):
        q1, q2 = end / (2 - end), 2 * end * end / (1 + end)
        of_many = ((m + n) / 2 - 1) * (q1 - end**2 + q2 - end**2)
        se = math.sqrt(max(end * (1 - end) + of_many, 0) / (m * n))
        assert abs(found.value - end) == pytest.approx(1.959964 * se, abs=1e-6) or end in (0, 1)
    turned = auc(right, -values, np.ones(m + n))
    assert (turned.low, turned.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-9)


def test_an_auc_interval_holds_the_truth_as_often_as_it_says() -> None:
    chance, held = np.random.default_rng(3), 0
    right = np.array([True] * 60 + [False] * 15)
    for _ in range(300):
        found = auc(right, chance.normal(size=75) + 1.19 * right, np.ones(75))  # Φ(1.19 / √2) = .80
        assert found.low is not None
        assert found.high is not None
        held += found.low < 0.7999 < found.high
    assert held / 300 == pytest.approx(0.95, abs=0.03)


def test_equal_confidences_stay_in_one_bin() -> None:
    bins = reliability(np.array([True, False] * 30), np.full(60, 0.8), np.ones(60))
    assert [(one.low, one.high, one.right.n, one.right.value) for one in bins] == [(0.8, 0.8, 60, 0.5)]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=5), st.integers(10, 500))
def test_weights_average_one_and_follow_the_auc(aucs: list[float], rarer: int) -> None:
    weights = learnt_weights({f"a{n}": value for n, value in enumerate(aucs)}, rarer)
    if max(aucs) <= 0.5:
        assert weights == {}
        return
    assert np.mean([*weights.values()]) == pytest.approx(1, abs=1e-3)
    assert min(weights.values()) >= 0
    by_auc = [weights[f"a{n}"] for n in np.argsort(aucs)]
    assert by_auc == sorted(by_auc)


def test_more_verdicts_move_weights_further_from_equal() -> None:
    spread = [learnt_weights({"a": 0.9, "b": 0.6}, m)["a"] for m in (10, 40, 400)]
    assert 1 < spread[0] < spread[1] < spread[2] < 1.6


@pytest.mark.parametrize(("aucs", "rarer"), [({"a": 0.9}, 50), ({"a": 0.9, "b": 0.8}, 9), ({"a": 0.5, "b": None}, 50)])
def test_no_weights_without_a_reason(aucs: dict[str, float | None], rarer: int) -> None:
    assert learnt_weights(aucs, rarer) == {}


@pytest.mark.parametrize("over_calls", [None, "mean"])
def test_the_process_file_takes_the_weights_as_they_are_printed(tmp_path: Path, over_calls: str | None) -> None:
    names = ["gpt-5", "5e-6", "true", "1.0", "null"]
    panel = {"annotators": [teacher(name) for name in names]}
    path = write_process(tmp_path, panel=panel, schedule={"over_calls": over_calls} if over_calls else {})
    path.write_text(json.dumps(yaml.safe_load(path.read_text(encoding="utf-8"))), encoding="utf-8")
    weights = {name: 0.5 + n / 4 for n, name in enumerate(names)}
    printed = weights_yaml(weights, load_process(path).settings.schedule)
    process = yaml.safe_load(path.read_text(encoding="utf-8"))
    lines = [f"{key}: {json.dumps(value)}" for key, value in process.items() if key != "schedule"]
    path.write_text("\n".join([*lines, printed]), encoding="utf-8")
    schedule = load_process(path).settings.schedule
    assert schedule.annotator_weights == weights
    assert schedule.over_calls == over_calls
    assert "gpt-5: 0.5" in printed


# Commands ----------------------------------------------------------------------------------------------------------


def test_from_a_sample_to_weights_on_the_command_line(evidence: Evidence, sp2dpo: Sp2dpo) -> None:
    run = evidence.run.path
    drawn = sp2dpo("audit", "sample", run, "-n", 150, "-o", "sheet.csv", "--seed", 3)
    assert (drawn.code, drawn.out) == (0, "")
    assert f"150 of {N} pairs, from 18 strata" in drawn.err
    assert f"sp2dpo audit score {run} sheet.csv" in drawn.err
    spaced = sp2dpo("audit", "sample", run, "-n", 5, "-o", "my sheet.csv")
    assert f"sp2dpo audit score {run} 'my sheet.csv'" in spaced.err
    again = sp2dpo("audit", "sample", run, "-o", "sheet.csv")
    assert again.code == 2
    assert "may hold verdicts" in again.err
    fill, path = person(evidence, 0.95, seed=3), Path("sheet.csv")
    put(path, [{**row, "verdict": fill(row)} for row in rows_of(path)])
    scored = sp2dpo("audit", "score", run, path, "--json")
    figures = json.loads(scored.out)
    assert scored.code == 0
    assert figures == json.loads((run / "audit.json").read_text(encoding="utf-8"))
    assert figures["right"] + figures["wrong"] == 150
    manifest = read_manifest(run / "audit.json")
    assert manifest is not None
    assert {*manifest["inputs"]} == {"schedule.parquet", "sheet.csv"}
    shown = sp2dpo("audit", "score", run, path)
    assert f"  annotator_weights:\n    good: {figures['weights']['good']}" in shown.out
    assert "labels that are right, without ties" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 90
    assert f"sp2dpo report {run}" in shown.err
    assert "\n\n\n" not in shown.out


def test_two_peoples_sheets_and_warnings_on_the_command_line(evidence: Evidence, sp2dpo: Sp2dpo) -> None:
    for who in ("ann", "bob"):
        filled(evidence, Path(f"{who}.csv"), person(evidence, 0.9, 0.1, who), 30)
    shown = sp2dpo("audit", "score", evidence.run.path, "ann.csv", "bob.csv")
    assert shown.code == 0
    assert "Krippendorff's α between 2 people: 0." in shown.out
    assert shown.out.count("ties or split") == 2, "of the count and of the share"
    assert not [line for line in shown.out.splitlines() if line.startswith("  category")]
    assert "\n\n\n" not in shown.out
    assert "too few verdicts without ties for figures of their own:" in shown.out
    assert "wrong labels among the verdicts, fewer than 10" in shown.err
    assert "annotator_weights" not in shown.out
    filled(evidence, Path("none.csv"), lambda row: "", 30)
    empty = sp2dpo("audit", "score", evidence.run.path, "none.csv")
    assert empty.code == 2
    assert "no verdict is filled in" in empty.err


def test_a_sheet_is_drawn_without_the_extra_and_a_score_names_it(
    evidence: Evidence, sp2dpo: Sp2dpo, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("sp2dpo.audit.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("krippendorff", "sklearn.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    assert sp2dpo("audit", "sample", evidence.run.path, "-o", "sheet.csv").code == 0
    scored = sp2dpo("audit", "score", evidence.run.path, "sheet.csv")
    assert scored.code == 2
    assert "pip install 'sp2dpo[report]'" in scored.err


@pytest.mark.parametrize("group", [(), ("audit",)])
def test_help_tells_each_command_of_the_audit_in_one_whole_line(
    sp2dpo: Sp2dpo, monkeypatch: pytest.MonkeyPatch, group: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = sp2dpo(*group, "--help").out.splitlines()
    told = [line for line in lines if line.split()[:1] in [["audit"], ["agreement"], ["errors"], ["sample"], ["score"]]]
    assert len(told) == (4 if group else 1)
    assert all(line.endswith(".") and not line.endswith("...") for line in told)
