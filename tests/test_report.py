"""The report: its numbers, its bytes, and what it does with text that means harm."""

from __future__ import annotations

import base64
import csv
import hashlib
import itertools
import json
import re
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from report_runs import HOSTILE, by_number, judged, make_run, pair, put_margins, with_predictor
from sp2dpo.audit.sample import draw
from sp2dpo.audit.score import score, write_score
from sp2dpo.audit.sheet import read_sheet, write_sheet
from sp2dpo.calls import Call, open_calls, open_ledger
from sp2dpo.correlation import correlation
from sp2dpo.errors import RunDirError
from sp2dpo.evidence import read_evidence
from sp2dpo.hashing import sha256_file
from sp2dpo.report.account import Part, Sum, accounts
from sp2dpo.report.agreement import between_annotators, between_prompts
from sp2dpo.report.build import build_report
from sp2dpo.report.cards import LONGEST, card, visible
from sp2dpo.report.charts import Chart, agreement_charts, disagreement_charts
from sp2dpo.report.marks import auc, read_marks
from sp2dpo.report.provenance import settings_of
from sp2dpo.report.sections import category_rows, extremes, most_disagreed, reversed_section
from sp2dpo.report.tally import Tally, spend, tally_calls
from sp2dpo.runs import Run
from sp2dpo.settings import Price
from sp2dpo.tables import read_manifest


class Page(HTMLParser):
    """Tags in order, the text of the page outside of style sheets and scripts, and the content of the scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def page_of(run: Run) -> Page:
    return Page(build_report(run.path).read_text(encoding="utf-8"))


def tally_of(run: Run) -> Tally:
    with open_calls(run.calls) as log:
        return tally_calls(log, read_evidence(run))


def ten(**own: object) -> list[dict[str, object]]:
    return [pair(n, **own) for n in range(10)]


# The numbers


def test_auc_is_the_share_of_pairs_in_the_right_order_with_ties_half() -> None:
    assert auc(np.array([0.9, 0.5]), np.array([0.1, 0.5])) == (1 + 1 + 1 + 0.5) / 4
    assert auc(np.array([0.1]), np.array([0.2, 0.3])) == 0.0
    assert auc(np.array([]), np.array([0.2])) is None


def test_auc_agrees_with_counting_every_pair() -> None:
    random = np.random.default_rng(0)
    higher, lower = random.integers(0, 9, 40) / 9, random.integers(0, 7, 30) / 9
    counted = np.mean([[1.0 if h > w else 0.5 if h == w else 0.0 for w in lower] for h in higher])
    assert auc(higher, lower) == pytest.approx(counted, abs=1e-12)


def test_correlation_is_undefined_for_constants_and_for_two_points() -> None:
    x = np.array([0.1, 0.2, 0.4])
    assert correlation(x, 2 * x) == pytest.approx(1.0)
    assert correlation(x, np.full(3, 0.3)) is None
    assert correlation(x[:2], x[:2]) is None


def test_a_category_row_holds_its_own_pairs_only(tmp_path: Path) -> None:
    rows = {row.name: row for row in category_rows(read_evidence(make_run(tmp_path, ten())))}
    assert (rows["Safety"].n, rows["Style"].n, rows["Reasoning"].n) == (5, 5, 0)
    # pairs 1, 3, 5, 7, 9 have magnitude n/10 and confidence 0.9: β = 0.03 + 0.27·0.09·n
    assert rows["Style"].low == pytest.approx(0.03 + 0.27 * 0.09)
    assert rows["Style"].mean == pytest.approx(0.03 + 0.27 * 0.09 * 5)
    assert rows["Style"].magnitude == pytest.approx(0.5)
    assert rows["Reasoning"].mean is None


def test_a_tie_of_categories_is_counted_once_for_a_pair(tmp_path: Path) -> None:
    def answer(n: int, annotator: str, variant: str) -> str:
        return judged({"v1": "Style", "v2": "Safety"}[variant], 0.5, 0.5)

    run = make_run(tmp_path, [pair(0), pair(1)], answer, annotators=("a", "b"), variants=("v1", "v2"))
    rows = {row.name: row for row in category_rows(read_evidence(run))}
    assert (rows["Safety"].n, rows["Safety"].ties, rows["Style"].n) == (2, 2, 0)


def test_extremes_are_sorted_and_share_no_pair(tmp_path: Path) -> None:
    evidence = read_evidence(make_run(tmp_path, [pair(n) for n in range(7)]))
    top, low = extremes(evidence, read_marks(evidence))
    assert [one.name for one in top] == ["p6", "p5", "p4", "p3"]
    assert [one.name for one in low] == ["p0", "p1", "p2"]


def test_the_reversed_pairs_are_told_from_the_others(tmp_path: Path) -> None:
    rows = [pair(n, wrong=n in (1, 9)) for n in range(10)]
    evidence = read_evidence(make_run(tmp_path, rows, known_reversed="wrong"))
    found = reversed_section(evidence, read_marks(evidence))
    assert found is not None
    assert [one.name for one in found.cards] == ["p9", "p1"]
    assert found.above == [1.0, 1 / 8]
    # of the others (0, 2 … 8) seven exceed pair 1, none exceeds pair 9
    assert found.auc == 7 / 16
    assert (found.n, found.n_others, found.fooled) == (2, 8, 1)


def test_marks_and_texts_stay_with_their_pair_when_an_earlier_one_is_left_out(tmp_path: Path) -> None:
    rows = [pair(n, wrong=n == 3) for n in range(5)]
    run = make_run(tmp_path, rows, lambda n, a, v: by_number(n, a, v) if n else "", known_reversed="wrong")
    evidence = read_evidence(run)
    marks = read_marks(evidence)
    assert marks.reversed_i.tolist() == [False, False, True, False]
    assert (marks.in_source, marks.n) == (1, 1)
    assert card(evidence, 2).chosen[0].text.strip() == "Good answer 3"


def test_a_column_that_is_not_there_or_not_true_and_false_is_named(tmp_path: Path) -> None:
    for number, (column, told) in enumerate({"nowhere": "no column 'nowhere'", "note": "holds string"}.items()):
        run = make_run(tmp_path / str(number), ten(note="x"), known_reversed=column)
        assert told in page_of(run).text


def test_most_disagreed_goes_by_the_range_which_one_outlier_moves(tmp_path: Path) -> None:
    def answer(n: int, annotator: str, variant: str) -> str:
        return judged("Style", 0.9 if (n, variant) == (2, "v3") else 0.1 + n / 100, 1.0)

    evidence = read_evidence(make_run(tmp_path, [pair(n) for n in range(4)], answer))
    worst = most_disagreed(evidence, read_marks(evidence))
    assert [one.name for one in worst] == ["p2"]
    assert worst[0].spread == pytest.approx(0.9 - 0.12)
    assert evidence.disagreement_ij[2, 0] == 0.0


def test_two_prompts_are_compared_pair_by_pair(tmp_path: Path) -> None:
    def answer(n: int, annotator: str, variant: str) -> str:
        return judged("Style" if variant == "v1" or n else "Safety", n / 10 + (0.2 if variant == "v2" else 0), 1.0)

    one = between_prompts(
        read_evidence(make_run(tmp_path, [pair(n) for n in range(4)], answer, variants=("v1", "v2")))
    )[0]
    assert one.correlation == pytest.approx(1.0)
    assert one.difference == pytest.approx(0.2)
    assert one.same_category == 3 / 4


def test_in_short_tells_the_range_of_beta_and_how_many_pairs_are_judged_far_apart(tmp_path: Path) -> None:
    def answer(n: int, annotator: str, variant: str) -> str:
        return judged(
            "Style" if n else "Safety", {0: 1.0, 1: 0.0}.get(n, 0.5), 0.5 if (n, variant) == (2, "v3") else 1.0
        )

    text = page_of(make_run(tmp_path, [pair(n) for n in range(4)], answer)).text
    # medians 1, 0, 0.5, 0.5; judgements of pair 2 alone differ, by 0.25
    assert "β runs from 0.0300 to 0.3000, mean 0.1650, in the envelope [0.03, 0.3]." in text
    assert "The highest mean β has Safety (0.300, n = 1), the lowest Style (0.120, n = 3)." in text
    assert (
        "lie 0.000 apart in effective gap (range, median over pairs); in 25% of pairs they lie more than 0.2 apart."
        in text
    )


def test_in_short_tells_what_a_reviewer_asks_first(tmp_path: Path) -> None:
    """Of ten pairs both annotators doubt pair 9, and one of them pair 8; one row is a duplicate."""

    def answer(n: int, annotator: str, variant: str) -> str:
        doubts = n == 9 or (n == 8 and annotator == "a")
        return judged("Style", n / 10, 0.2 if doubts else 0.8)

    rows = [*(pair(n) for n in range(10)), pair(0, "again")]
    text = page_of(make_run(tmp_path, rows, answer, annotators=("a", "b"))).text
    assert "10 of 11 source rows have a β; 1 were left out" in text
    assert "Left out: duplicate_prompt_id 1." in text
    assert "2 annotators under 3 prompts: 60 answers about the pairs of the schedule." in text
    assert "a: model-of-a (recorded answers), 20" in text
    assert "On 1 of 10 pairs (10.0%) most of the panel doubts the label." in text
    assert "Nothing was spent in this run; no call was live." in text
    assert "No person has checked these labels." in text
    assert re.search(r"α = 0\.\d\d \(.*\) between the annotators, of the gap \(Krippendorff\)", text)


def test_verdicts_of_people_are_told_while_they_are_about_this_schedule(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), annotators=("a", "b"))
    evidence, sheet = read_evidence(run), tmp_path / "sheet.csv"
    write_sheet(sheet, evidence, draw(evidence, 10, 0), 10, 0)
    lines = sheet.read_text(encoding="utf-8-sig").splitlines()
    column = next(csv.reader([lines[0]])).index("verdict")
    filled = [next(csv.reader([line])) for line in lines]
    for n, row in enumerate(filled[1:]):
        row[column] = "AB"[n % 2]
    with sheet.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(filled)
    scored = score(evidence, [read_sheet(sheet)])
    write_score(run, scored, [read_sheet(sheet)])
    text = page_of(run).text
    assert "People gave verdicts on 10 pairs, 0 of them ties." in text
    assert f"By them {scored.agreement.value:.0%} of the labels are right (95 % interval" in text
    manifest = run.path / "audit.manifest.json"
    manifest.write_text(manifest.read_text().replace(sha256_file(run.schedule), "0" * 64))
    assert "People checked the labels of another schedule than the one here" in page_of(run).text


# Accounts


def test_a_sum_says_whether_it_adds_up() -> None:
    assert Sum(5, "rows", (Part(2, "x"), Part(3, "y"))).adds_up
    assert not Sum(5, "rows", (Part(2, "x"), Part(2, "y"))).adds_up


def test_every_row_and_question_is_accounted_for(tmp_path: Path) -> None:
    """Pair 1 has no answer to v2, pair 2 a fenced one, pair 3 nonsense under v1; the last row is a duplicate."""

    def answer(n: int, annotator: str, variant: str) -> str:
        text = by_number(n, annotator, variant)
        odd = {(1, "v2"): "", (2, "v1"): f"```json\n{text}\n```", (3, "v1"): "no idea"}
        return odd.get((n, variant), text) if annotator == "b" else text

    run = make_run(tmp_path, [*(pair(n) for n in range(5)), pair(4, "again")], answer, annotators=("a", "b", "c"))
    source, questions, pairs, whole = accounts(read_evidence(run), tally_of(run))
    assert all(one.adds_up for one in (source, questions, pairs, whole))
    assert {part.what: part.n for part in source.parts}["dropped: duplicate_prompt_id"] == 1
    counted = {part.what: part.n for part in questions.parts}
    assert (questions.total, counted["valid after a mend"], counted["valid as answered, first attempt"]) == (45, 1, 42)
    assert (counted["failed: not_recorded"], counted["failed: no_object"]) == (1, 1)
    assert {part.what: part.n for part in pairs.parts}["left out: no_valid_answer"] == 2
    assert (whole.total, whole.parts[0].n, whole.parts[1].n) == (6, 3, 3)
    assert "All 4 totals add up." in page_of(run).text


def test_a_total_that_does_not_add_up_is_shown_as_such(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten())
    run.excluded.write_text(
        '"stage","source_row","prompt_id","pair_id","reason","detail"\n"annotate",1,"p","q","not_asked",\n'
    )
    page = page_of(run)
    assert "does not add up: the parts make 11" in page.text
    assert "All 4 totals" not in page.text


def one_bad(n: int, annotator: str, variant: str) -> str:
    """The answer to the first question is nonsense, all others are valid."""
    return "no idea" if (n, variant) == (0, "v1") else by_number(n, annotator, variant)


def append(run: Run, call: Call, **changed: Any) -> None:
    with open_ledger(run.calls) as ledger:
        ledger.append(replace(call, **changed))


def test_an_answer_after_a_retry_is_neither_a_first_one_nor_a_failure(tmp_path: Path) -> None:
    run = make_run(tmp_path, [pair(0), pair(1)], one_bad)
    with open_calls(run.calls) as log:
        bad, good = list(log)[:2]
    append(run, good, variant=bad.variant, attempt=2)
    tally = tally_of(run)
    assert (tally.first_time, tally.later, tally.failed.total(), tally.attempts) == (5, 1, 0, 7)


def test_what_follows_a_valid_answer_does_not_change_how_the_question_ended(tmp_path: Path) -> None:
    run = make_run(tmp_path, [pair(0), pair(1)], one_bad)
    with open_calls(run.calls) as log:
        bad, good = list(log)[:2]
    append(run, bad, variant=good.variant, attempt=2)
    append(run, bad, outcome="timeout", attempt=2)
    tally = tally_of(run)
    assert (tally.first_time, tally.later, dict(tally.failed)) == (5, 0, {"timeout": 1})


def test_spend_counts_live_calls_and_is_unknown_without_a_price(tmp_path: Path) -> None:
    run = make_run(tmp_path, [pair(0), pair(1)])
    (annotator,) = run.process.settings.panel.annotators
    with open_calls(run.calls) as log:
        call = next(iter(log))
    append(run, call, cost_usd=5.0)
    assert spend(tally_of(run), [annotator]).usd == 0
    append(run, call, origin="live", cost_usd=0.25, prompt_tokens=100, served_model="other")
    assert spend(tally_of(run), [annotator]).usd is None
    price = Price(input=1, output=1, as_of=date(2026, 1, 1))
    assert spend(tally_of(run), [annotator.model_copy(update={"price": price})]).usd == 0.25
    assert "not what was asked for" in page_of(run).text


def test_a_setting_that_was_not_sent_is_named() -> None:
    tally = Tally()
    tally.params[
        "a", json.dumps({"seed": 42, "top_k": None, "top_p": 0.8}), json.dumps({"top_p": 0.8, "effort": "low"})
    ] = 7
    notes = {setting.name: (setting.asked, setting.sent, setting.note) for setting in settings_of(tally)}
    assert notes["seed"] == ("42", "–", "not sent")
    assert notes["top_k"] == ("null", "–", "nothing to send")
    assert notes["top_p"] == ("0.8", "0.8", "")
    assert notes["effort"] == ("–", '"low"', "added for this model")


# The page


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, [pair(n, HOSTILE, wrong=n == 1) for n in range(4)], known_reversed="wrong"))
    assert [of for of in page.all("script") if of.get("type") != "application/octet-stream;base64"] == [{}]
    assert all(re.fullmatch("[A-Za-z0-9+/=]*", data) for data in page.scripts[:-1])
    assert "alert(" not in page.scripts[-1]
    assert not page.all("img")
    assert len(page.all("style")) == 1
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert "</script><script>alert(1)</script> {{ 7*7 }} {% raw %} <img src=x onerror=alert(2)>" in page.text
    assert "⟦U+0000⟧⟦U+0007⟧⟦U+001B⟧[31m ⟦U+202E⟧desrever⟦U+202C⟧ שלום" in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", page.text)


def test_the_page_loads_nothing_and_says_so_in_its_policy(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, ten()))
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    only = base64.b64encode(hashlib.sha256(page.scripts[-1].encode()).digest()).decode()
    assert re.findall("script-src ([^;]*)", policy) == [f"'sha256-{only}'"]
    links = [
        value for _, of in page.tags for name, value in of.items() if name in ("href", "src", "xlink:href") and value
    ]
    assert links
    assert all(link.startswith(("#", "data:,")) for link in links)
    assert not re.search("fetch|XMLHttp|WebSocket|import|eval|innerHTML|insertAdjacentHTML", page.scripts[-1])
    assert not page.all("link")[1:]


def test_ids_are_unique_and_every_reference_has_its_target(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("dpo", "sp2dpo"), annotators=("a", "b"))
    put_margins(run, "dpo", [(step, row, 1.0) for step in range(4) for row in range(10)])
    page = page_of(run)
    ids = [of["id"] for _, of in page.tags if "id" in of]
    used = {
        value[1:]
        for _, of in page.tags
        for name, value in of.items()
        if name in ("href", "xlink:href") and value and value[0] == "#"
    }
    used |= {of["aria-labelledby"] for _, of in page.tags if "aria-labelledby" in of}
    used |= set(re.findall(r"url\(#([^)]*)\)", run.report.read_text(encoding="utf-8")))
    assert len(ids) == len(set(ids))
    assert used <= set(ids)


def test_headings_go_down_one_level_at_a_time_and_tables_have_captions(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, ten()))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(page.all("caption")) == len(page.all("table")) > 0
    assert all("scope" in of for of in page.all("th"))


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(wrong=False), methods=("dpo",))
    put_margins(run, "dpo", [(step, row, 0.5 * step) for step in range(4) for row in range(10)])
    first = build_report(run.path).read_bytes()
    assert build_report(run.path).read_bytes() == first


def test_the_manifest_names_the_page_and_all_inputs(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("dpo",))
    put_margins(run, "dpo", [(0, 0, 1.0)])
    build_report(run.path)
    manifest = read_manifest(run.report)
    assert manifest is not None
    drawn = sorted((run.path / "figures").iterdir())
    assert manifest["files"] == {
        path.relative_to(run.path).as_posix(): sha256_file(path) for path in [run.report, *drawn]
    }
    assert len(drawn) == len(page_of(run).all("figure")) > 10
    assert manifest["inputs"]["schedule.parquet"] == sha256_file(run.schedule)
    assert manifest["inputs"]["train/dpo/margins.parquet"] == sha256_file(run.training("dpo") / "margins.parquet")
    with open_calls(run.calls) as log:
        assert manifest["inputs"]["calls.sqlite"] == log.content_hash()


def test_a_changed_file_is_said_to_differ_from_its_manifest(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten())
    assert "differs from its manifest" not in page_of(run).text
    csv = run.schedule.with_suffix(".csv")
    csv.write_bytes(csv.read_bytes() + b"\n")
    assert "differs from its manifest" in page_of(run).text


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_very_few_pairs_still_make_a_page(tmp_path: Path, rows: int) -> None:
    text = page_of(
        make_run(tmp_path, [pair(n, wrong=True) for n in range(rows)], methods=("sp2dpo",), known_reversed="wrong")
    ).text
    assert f"{rows} of {rows} source rows have a β" in text
    assert "a comparison needs marked and unmarked ones" in text


def test_one_annotator_and_one_prompt_have_no_disagreement(tmp_path: Path) -> None:
    text = page_of(make_run(tmp_path, ten(), variants=("v1",))).text
    assert "so there is nothing to compare" in text


def test_conversations_show_every_turn_with_its_role(tmp_path: Path) -> None:
    """As in hh-rlhf: two transcripts, no prompt_id."""
    turns = [("user", "first words"), ("assistant", "a reply"), ("user", "and then?")]
    talk = [{"role": role, "content": text} for role, text in turns]
    row = {"prompt": talk, **{side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}}
    evidence = read_evidence(make_run(tmp_path, [row]))
    one = card(evidence, 0)
    assert [(m.role, m.text) for m in one.prompt] == turns
    assert one.name == one.pair_id[:12]


def test_a_very_long_message_is_cut_and_says_by_how_much(tmp_path: Path) -> None:
    run = make_run(tmp_path, [pair(0, "x" * 5000)])
    length = len("Question 0 ") + 5000
    message = card(read_evidence(run), 0).prompt[0]
    assert (len(message.text), message.left_out) == (LONGEST, length - LONGEST)
    assert f"Cut after 4,000 characters; {length - LONGEST:,} more are in pairs.parquet." in page_of(run).text


def test_hidden_characters_are_shown_by_their_code_point() -> None:
    assert visible("a\x00b\u202ec\u200bd") == "a⟦U+0000⟧b⟦U+202E⟧c⟦U+200B⟧d"
    assert visible("line\r\nnext\ttab é שלום 👍") == "line\nnext\ttab é שלום 👍"


def test_a_toy_and_a_recording_are_named_as_such(tmp_path: Path) -> None:
    told = "The student is a toy"
    with_toy, without = make_run(tmp_path / "a", ten(), methods=("dpo",)), make_run(tmp_path / "b", ten())
    assert told in page_of(with_toy).text
    assert told not in page_of(without).text
    assert "no model was asked in this run: a (model: model-of-a)." in page_of(without).text


def many(words: str = "fox owl elk ape bee") -> list[dict[str, Any]]:
    """Pairs whose prompts open with different words, as many as a predictor needs."""
    rows = [pair(n) for n in range(60)]
    for n, row in enumerate(rows):
        row["prompt"][0]["content"] = " ".join(words.split()[n // 5**k % 5] for k in range(3)) + f" {n}"
    return rows


def test_a_predictor_is_named_as_such_and_is_no_swapped_model(tmp_path: Path) -> None:
    run = with_predictor(make_run(tmp_path, many()))
    served = {one.annotator: one for one in tally_of(run).served.values()}
    assert served["local"].served != served["local"].requested
    assert not served["local"].swapped
    page = page_of(run)
    assert "1 annotator and 1 predictor under 3 prompts: 360 answers" in page.text
    assert re.search(r"α = .* between 1 annotator and 1 predictor, of the gap", page.text)
    assert re.search(r"local: text-1@\w+ \(predicted\), 20", page.text)
    for wrong in ("not what was asked for", "asked for:", "2 annotators"):
        assert wrong not in page.text
    # in the tables of attempts, of medians compared, and of offsets
    assert page.text.count("local (predictor)") == 3
    assert "a (predictor)" not in page.text
    names = {chart.name for chart in _charts_of(run)}
    assert {"agreement-a+v1+v2", "agreement-medians+a+local", "disagreement-a"} <= names
    assert not {"agreement-local+v1+v2", "disagreement-local"} & names


def test_a_predictor_alone_is_not_said_to_agree_with_itself(tmp_path: Path) -> None:
    text = page_of(with_predictor(make_run(tmp_path, many()), alone=True)).text
    assert "1 predictor under 3 prompts" in text
    assert "One predictor: its answers under all prompts are one, so nothing is known about disagreement." in text
    assert "Krippendorff" not in text


def _charts_of(run: Run) -> list[Chart]:
    evidence = read_evidence(run)
    return agreement_charts(between_annotators(evidence) + between_prompts(evidence)) + disagreement_charts(evidence)


def test_a_run_without_a_schedule_names_the_command_that_makes_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten())
    run.schedule.unlink()
    with pytest.raises(RunDirError, match="sp2dpo schedule"):
        build_report(run.path)
