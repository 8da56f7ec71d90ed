"""Likely label errors: the rule on panels made by hand, the list as CSV and for Argilla, the command."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len

from conftest import Sp2dpo
from report_runs import HOSTILE, judged, make_run, pair
from sp2dpo.audit.argilla import FIELDS, METADATA, QUESTIONS, records, settings
from sp2dpo.audit.cells import LONGEST, beginning, end, plain, safe_cell
from sp2dpo.audit.errors import COLUMNS, DOUBT, label_errors, review_rows, write_review
from sp2dpo.evidence import Evidence, read_evidence
from sp2dpo.rubric import CATEGORIES

QUICKSTART = Path(__file__).resolve().parents[1] / "examples" / "quickstart" / "process.yaml"

SURE, UNSURE = 0.9, 0.2


def of_confidences(folder: Path, confidence: list[list[list[float]]], **rows: Any) -> Evidence:
    """A run of annotators a, b, c with the confidences given for pair, annotator, prompt; magnitude 0.5."""

    def answer(n: int, annotator: str, variant: str) -> str:
        return judged("Style", 0.5, confidence[n]["abc".index(annotator)][int(variant[1]) - 1])

    j, k = len(confidence[0]), len(confidence[0][0])
    pairs = [pair(n, **rows) for n in range(len(confidence))]
    variants = tuple(f"v{n + 1}" for n in range(k))
    return read_evidence(make_run(folder, pairs, answer, annotators="abc"[:j], variants=variants))


# The rule -----------------------------------------------------------------------------------------------------------


def test_a_pair_is_listed_if_more_than_half_of_the_annotators_doubt_it(tmp_path: Path) -> None:
    doubting = [0, 1, 2, 3]
    panel = [[[UNSURE if j < n else SURE] * 3 for j in range(3)] for n in doubting]
    found = label_errors(of_confidences(tmp_path, panel))
    np.testing.assert_allclose(found.doubt_i, [0, 1 / 3, 2 / 3, 1])
    assert found.listed.tolist() == [3, 2]


def test_half_of_the_annotators_is_not_more_than_half(tmp_path: Path) -> None:
    found = label_errors(of_confidences(tmp_path, [[[UNSURE] * 3, [SURE] * 3]]))
    assert found.doubt_i.tolist() == [0.5]
    assert found.listed.tolist() == []


def test_an_annotator_doubts_by_its_median_and_not_by_one_prompt(tmp_path: Path) -> None:
    found = label_errors(of_confidences(tmp_path, [[[0.1, SURE, SURE]], [[0.1, 0.1, SURE]]]))
    assert found.doubt_ij.tolist() == [[False], [True]]


@pytest.mark.parametrize(("confidence", "doubts"), [(DOUBT, True), (0.31, False)])
def test_the_highest_confidence_that_the_rubric_allows_is_doubt(
    tmp_path: Path, confidence: float, doubts: bool
) -> None:
    found = label_errors(of_confidences(tmp_path, [[[confidence] * 3]]))
    assert found.doubt_ij.item() is doubts


def test_the_rank_goes_by_share_then_by_low_confidence_then_by_large_magnitude(tmp_path: Path) -> None:
    told = {
        0: [(0.0, 0.5), (0.0, 0.5), (0.4, 0.5)],  # two of three, though less confident than 1
        1: [(0.2, 0.5), (0.2, 0.5), (0.2, 0.5)],
        2: [(0.1, 0.1), (0.1, 0.1), (0.1, 0.1)],  # less confident
        3: [(0.2, 0.8), (0.2, 0.8), (0.2, 0.8)],  # larger than 1
        4: [(0.9, 0.9), (0.9, 0.9), (0.9, 0.9)],
    }

    def answer(n: int, annotator: str, variant: str) -> str:
        confidence, magnitude = told[n]["abc".index(annotator)]
        return judged("Style", magnitude, confidence)

    evidence = read_evidence(make_run(tmp_path, [pair(n) for n in told], answer, annotators="abc"))
    found = label_errors(evidence)
    assert found.listed.tolist() == [2, 3, 1, 0]
    assert found.confidence_i[0] == pytest.approx(0.4 / 3)
    assert found.magnitude_i[3] == pytest.approx(0.8)


def test_an_annotator_without_an_answer_does_not_count(tmp_path: Path) -> None:
    evidence = of_confidences(tmp_path, [[[UNSURE], [SURE], [SURE]], [[UNSURE], [UNSURE], [SURE]]])
    holes = evidence.confidence_ijk.copy()
    holes[:, 2] = np.nan
    holes[0, 1] = np.nan
    found = label_errors(dataclasses.replace(evidence, confidence_ijk=holes))
    assert found.doubt_i.tolist() == [1, 1]
    assert found.doubt_ij.tolist() == [[True, False, False], [True, True, False]]
    np.testing.assert_allclose(found.confidence_i, [UNSURE, UNSURE])


# The list as CSV ----------------------------------------------------------------------------------------------------


def test_a_row_has_the_numbers_of_the_schedule_and_the_whole_texts(tmp_path: Path) -> None:
    evidence = of_confidences(tmp_path, [[[SURE] * 3] * 3, [[UNSURE] * 3, [0.1] * 3, [SURE] * 3]])
    [row] = review_rows(evidence, label_errors(evidence))
    assert list(row) == list(COLUMNS)
    assert (row["rank"], row["prompt_id"], row["category"]) == (1, "p1", "Style")
    assert (row["doubt"], row["doubting_annotators"]) == (pytest.approx(2 / 3, abs=1e-6), "a, b")
    assert row["pair_id"] == evidence.schedule["pair_id"][1].as_py()
    assert row["confidence"] == pytest.approx((UNSURE + 0.1 + SURE) / 3)
    assert (row["beta"], row["effective_gap"]) == (evidence.beta_i[1], evidence.gap_i[1])
    assert [row[side] for side in ("prompt", "chosen", "rejected")] == [
        "user: Question 1 ",
        "assistant: Good answer 1 ",
        "assistant: Bad answer 1 ",
    ]


def test_a_row_has_the_texts_of_its_own_pair_where_pairs_before_it_are_not_scheduled(tmp_path: Path) -> None:
    def answer(n: int, annotator: str, variant: str) -> str:
        return judged("Style", 0.5, UNSURE) if n else ""

    evidence = read_evidence(make_run(tmp_path, [pair(n) for n in range(3)], answer))
    rows = review_rows(evidence, label_errors(evidence))
    assert [(row["prompt_id"], row["prompt"]) for row in rows] == [
        ("p1", "user: Question 1 "),
        ("p2", "user: Question 2 "),
    ]
    assert [row["pair_id"] for row in rows] == evidence.schedule["pair_id"].to_pylist()


def test_a_conversation_is_shown_by_role_with_one_kind_of_line_end_and_no_control_characters() -> None:
    turns = [{"role": "user", "content": "a\r\nb\rc\td"}, {"role": "assistant", "content": "\0\x1b"}]
    assert plain(turns) == "user: a\nb\nc\td\n\nassistant: ␀␛"


@pytest.mark.parametrize("letter", ["x", "é", "😀"])
def test_a_text_that_a_cell_cannot_hold_is_cut_where_it_may_be_and_says_by_how_much(letter: str) -> None:
    units = len(letter.encode("utf-16-le")) // 2
    fits, long = letter * (LONGEST // units), letter * (LONGEST // units + 7)
    assert beginning(fits) == end(fits) == fits
    assert beginning(long) == f"{fits}\n[the last 7 characters do not fit into a cell]"
    assert end(long) == f"[the first 7 characters do not fit into a cell]\n{fits}"


def test_a_cut_through_a_character_leaves_it_out() -> None:
    long = "x" + "😀" * LONGEST
    assert beginning(long).split("\n")[0] == "x" + "😀" * (LONGEST // 2 - 1)
    assert end(long + "x").endswith("\n" + "😀" * (LONGEST // 2 - 1) + "x")


def test_a_long_text_is_cut_in_the_csv_and_not_for_argilla(tmp_path: Path) -> None:
    evidence = of_confidences(tmp_path, [[[UNSURE] * 3]], text="y" * LONGEST)
    rows = review_rows(evidence, label_errors(evidence))
    write_review(tmp_path / "errors.csv", rows)
    with (tmp_path / "errors.csv").open(encoding="utf-8-sig", newline="") as file:
        [read] = csv.DictReader(file)
    assert read["prompt"].startswith("[the first 17 characters")
    assert read["chosen"].endswith(" characters do not fit into a cell]")
    assert records(rows)[0]["fields"]["chosen"].endswith("y" * LONGEST)


def test_the_csv_is_read_back_as_it_was_written_with_hostile_texts(tmp_path: Path) -> None:
    evidence = of_confidences(tmp_path, [[[UNSURE] * 3]], text=HOSTILE + '",;\n=1+1')
    rows = review_rows(evidence, label_errors(evidence))
    write_review(tmp_path / "errors.csv", rows)
    with (tmp_path / "errors.csv").open(encoding="utf-8-sig", newline="") as file:
        [read] = csv.DictReader(file)
    assert read == {name: str(value) for name, value in rows[0].items()}
    assert "\0" not in read["prompt"]


@pytest.mark.parametrize("opening", ["=", "+", "-", "@", "  =", "\t", "\r", "\n", "＝", "＋", "－", "＠"])
def test_no_cell_opens_as_a_formula(tmp_path: Path, opening: str) -> None:
    evidence = of_confidences(tmp_path, [[[UNSURE] * 3]])
    [row] = review_rows(evidence, label_errors(evidence))
    harmful = {name: f"{opening}cmd|' /C calc'!A0" if isinstance(value, str) else value for name, value in row.items()}
    write_review(tmp_path / "errors.csv", [harmful])
    with (tmp_path / "errors.csv").open(encoding="utf-8-sig", newline="") as file:
        [read] = csv.DictReader(file)
    texts = [read[name] for name, value in row.items() if isinstance(value, str)]
    assert texts == [f"'{opening}cmd|' /C calc'!A0"] * len(texts)


def test_a_negative_number_is_no_formula() -> None:
    assert safe_cell(-0.5) == -0.5
    assert [safe_cell(text) for text in ("a=b", " a", "")] == ["a=b", " a", ""]


# The list for Argilla -----------------------------------------------------------------------------------------------

# What Argilla 2.8 refuses otherwise, from argilla_server/api/schemas/v1 of https://github.com/argilla-io/argilla.
NAME = re.compile(r"(?=.*[a-z0-9])[a-z0-9_-]{1,200}")
AGENT = re.compile(r"(?=.*[a-zA-Z0-9])[a-zA-Z0-9\-_:./\s]{1,200}")


def argilla_records(folder: Path) -> list[dict[str, Any]]:
    evidence = of_confidences(folder, [[[UNSURE] * 3, [0.1] * 3, [SURE] * 3], [[UNSURE] * 3] * 3], text=HOSTILE)
    return records(review_rows(evidence, label_errors(evidence)))


def test_a_record_has_the_parts_that_argilla_exports_and_imports(tmp_path: Path) -> None:
    """`rg.Record.to_dict`: https://docs.argilla.io/latest/reference/argilla/records/records."""
    made = argilla_records(tmp_path)
    assert [one["metadata"]["prompt_id"] for one in made] == ["p1", "p0"]
    for one in made:
        assert set(one) == {"id", "fields", "metadata", "suggestions", "responses", "vectors"}
        assert all(isinstance(text, str) and text and "\0" not in text for text in one["fields"].values())
        assert set(one["suggestions"]["label_wrong"]) == {"value", "score", "agent"}
        assert AGENT.fullmatch(one["suggestions"]["label_wrong"]["agent"])
    assert made[1]["suggestions"]["label_wrong"]["score"] == pytest.approx(2 / 3, abs=1e-6)
    assert made[1]["metadata"]["doubting_annotators"] == ["a", "b"]
    json.dumps(made, allow_nan=False)


def test_every_name_of_a_record_is_one_of_the_settings_and_suggested_answers_are_answers(tmp_path: Path) -> None:
    made, told = argilla_records(tmp_path), settings()
    names = {part: [one["name"] for one in told[part]] for part in ("fields", "questions", "metadata")}
    assert names == {"fields": list(FIELDS), "questions": list(QUESTIONS), "metadata": list(METADATA)}
    options = {one["name"]: [o["value"] for o in one["settings"]["options"]] for one in told["questions"]}
    for one in made:
        assert list(one["fields"]) == names["fields"]
        assert sorted(one["metadata"]) == sorted(names["metadata"])
        assert all(given["value"] in options[question] for question, given in one["suggestions"].items())


def test_the_settings_are_such_as_argilla_makes_a_dataset_of() -> None:
    """`rg.Settings.serialize`: https://docs.argilla.io/latest/reference/argilla/settings/settings."""
    told = settings()
    assert set(told) == {
        "guidelines",
        "allow_extra_metadata",
        "distribution",
        "fields",
        "questions",
        "metadata",
        "vectors",
    }
    every = [*told["fields"], *told["questions"], *told["metadata"]]
    assert len({one["name"] for one in every}) == len(every)
    assert all(NAME.fullmatch(one["name"]) and one["title"] for one in every)
    assert {one["settings"]["type"] for one in told["fields"]} == {"text"}
    assert {one["settings"]["type"] for one in told["questions"]} == {"label_selection"}
    assert all(one["type"] == one["settings"]["type"] for one in told["metadata"])
    assert {one["settings"]["type"] for one in told["metadata"]} == {"terms", "integer", "float"}
    [category] = [one for one in told["metadata"] if one["name"] == "category"]
    assert category["settings"]["values"] == list(CATEGORIES)


def test_texts_that_are_listed_twice_are_one_record(tmp_path: Path) -> None:
    evidence = of_confidences(tmp_path, [[[UNSURE] * 3], [[0.1] * 3]])
    rows = review_rows(evidence, label_errors(evidence))
    twice = [*rows, rows[0] | {"rank": 3, "prompt_id": "again"}]
    assert [(one["id"], one["metadata"]["rank"]) for one in records(twice)] == [
        (row["pair_id"], row["rank"]) for row in rows
    ]


# The command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def quickstart(sp2dpo: Sp2dpo, tmp_path: Path) -> Path:
    """The schedule of the quickstart's 192 pairs, 18 of which were reversed on purpose."""
    run = tmp_path / "run"
    assert [sp2dpo(verb, QUICKSTART, "--run-dir", run).code for verb in ("annotate", "schedule")] == [0, 0]
    return run


def test_the_reversed_pairs_of_the_quickstart_are_all_listed_and_lead_the_list(
    sp2dpo: Sp2dpo, quickstart: Path
) -> None:
    told = json.loads(sp2dpo("audit", "errors", quickstart, "--json").out)
    lines = (QUICKSTART.parent / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    turned = {row["prompt_id"] for row in map(json.loads, lines) if row["reversed_on_purpose"]}
    listed = [row["prompt_id"] for row in told["errors"]]
    assert len(turned) == 18
    assert turned <= set(listed)
    assert set(listed[:12]) <= turned
    assert (told["pairs"], told["listed"]) == (192, len(listed))
    assert str(DOUBT) in told["rule"]


def test_audit_errors_shows_the_first_twenty_and_says_that_there_are_more(sp2dpo: Sp2dpo, quickstart: Path) -> None:
    shown = sp2dpo("audit", "errors", quickstart)
    assert shown.code == 0
    assert len(re.findall(r" 100% ", shown.out)) == 20
    assert "55 of 192 pairs" in shown.err
    assert "first 20" in shown.err
    assert max(map(len, shown.err.splitlines())) <= 80
    few = sp2dpo("audit", "errors", quickstart, "--limit", 3)
    assert len(re.findall(r" 100% ", few.out)) == 3
    assert "first 20" not in few.err


@pytest.mark.parametrize("width", [80, 120])
def test_a_listed_pair_is_one_line_with_the_name_that_the_report_finds_it_by(
    sp2dpo: Sp2dpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    evidence = of_confidences(
        tmp_path / "long", [[[UNSURE] * 3], [[0.1] * 3]], text="测试 :smile: " + "long words " * 40
    )
    head, _, *lines = [line for line in sp2dpo("audit", "errors", evidence.run.path).out.splitlines() if line.strip()]
    assert head.split()[0] == "pair_id"
    assert [line.split()[0] for line in lines] == [i[:12] for i in evidence.schedule["pair_id"].to_pylist()[::-1]]
    assert all(line.endswith("…") and cell_len(line) <= width for line in lines)
    assert ":smile:" in lines[0] or width == 80


def test_audit_errors_writes_a_csv(sp2dpo: Sp2dpo, quickstart: Path, tmp_path: Path) -> None:
    ended = sp2dpo("audit", "errors", quickstart, "-o", tmp_path / "errors.csv")
    assert (ended.code, ended.out) == (0, "")
    with (tmp_path / "errors.csv").open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["rank"]) for row in rows] == list(range(1, 56))


def test_audit_errors_writes_argilla_records_and_settings(sp2dpo: Sp2dpo, quickstart: Path, tmp_path: Path) -> None:
    ended = sp2dpo("audit", "errors", quickstart, "-o", tmp_path / "errors.json", "--limit", 5)
    assert ended.code == 0
    assert "errors.settings.json" in ended.err
    assert len(json.loads((tmp_path / "errors.json").read_bytes())) == 5
    assert json.loads((tmp_path / "errors.settings.json").read_bytes()) == settings()
    assert (tmp_path / "errors.json").read_bytes().isascii()


def test_audit_errors_refuses_a_file_of_another_kind_before_it_reads(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    ended = sp2dpo("audit", "errors", tmp_path / "nowhere", "-o", "errors.xlsx")
    assert ended.code == 2
    assert "errors.xlsx" in ended.err
    assert not (tmp_path / "errors.xlsx").exists()


def test_what_strangers_wrote_moves_no_cursor_in_the_table(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    run = of_confidences(tmp_path / "hostile", [[[UNSURE] * 3]], text="\x1b[31m\u202ered [bold]x[/bold]").run
    shown = sp2dpo("audit", "errors", run.path)
    assert shown.code == 0
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u202a-\u202e]", shown.out)
    assert "Question 0" in shown.out


def test_a_run_without_doubts_has_an_empty_list(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    run = of_confidences(tmp_path / "sure", [[[SURE] * 3]]).run
    assert json.loads(sp2dpo("audit", "errors", run.path, "--json").out)["errors"] == []
    assert sp2dpo("audit", "errors", run.path).out == ""
    assert "0 of 1 pairs" in sp2dpo("audit", "errors", run.path, "-o", tmp_path / "errors.csv").err
    assert len((tmp_path / "errors.csv").read_text(encoding="utf-8-sig").splitlines()) == 1
