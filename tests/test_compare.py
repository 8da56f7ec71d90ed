"""Runs side by side: figures recomputed from the CSV files in plain Python, the command, and the page in a browser."""

from __future__ import annotations

import csv
import functools
import json
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import krippendorff
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from scipy.stats import spearmanr

from conftest import Sp2dpo
from report_browser import chromium, needs_chromium
from report_runs import HOSTILE, judged, make_run, pair
from sp2dpo.annotate.run import annotate
from sp2dpo.cli.compare_tables import print_comparison
from sp2dpo.compare import Comparison, compare
from sp2dpo.compare.page import write_page
from sp2dpo.errors import InputError, ProcessError, RunDirError
from sp2dpo.process import load_process
from sp2dpo.report.build import build_report
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import Run, open_run
from sp2dpo.stages import prepare_run, schedule_run

N = 24
NEW_STYLE = 10
"""The pair that the later answers put into another category."""


def first_answers(n: int, annotator: str, variant: str) -> str:
    magnitude = (n * 7 % 10) / 10 + {"a": 0.0, "b": 0.05, "c": -0.3}[annotator] * (n % 3)
    return judged(CATEGORIES[n % 6], min(max(magnitude + int(variant[1]) / 100, 0.0), 1.0), 0.9)


def later_answers(n: int, annotator: str, variant: str) -> str:
    """Annotator b takes pair 3 for a wide gap, the panel takes one pair for Style, and pair 7 gets no answer."""
    if n == 7 and annotator == "a":
        return ""
    if n == 3 and annotator == "b":
        return judged(CATEGORIES[3], 1.0, 1.0)
    if n == NEW_STYLE:
        return judged("Style", 0.5, 0.5)
    return first_answers(n, annotator, variant)


def rows(text: str = "") -> list[dict[str, Any]]:
    return [pair(n, text) for n in range(N)]


def rescheduled(run: Run, folder: Path, **schedule: Any) -> Run:
    """The same answers under other settings of the schedule, as `annotate --reuse` takes them over."""
    folder.mkdir()
    source = run.path.parent
    settings = yaml.safe_load((source / "process.yaml").read_text(encoding="utf-8"))
    settings["data"]["source"] = str(source / "pairs.jsonl")
    for annotator in settings["panel"]["annotators"]:
        annotator["calls"] = str(source / annotator["calls"])
    (folder / "process.yaml").write_text(yaml.safe_dump(settings | {"schedule": schedule}), encoding="utf-8")
    other = open_run(load_process(folder / "process.yaml"), folder / "run")
    prepare_run(other)
    annotate(other)
    schedule_run(other)
    return other


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """One panel of three; the same answers under a median; other answers; other pairs."""
    folder = tmp_path_factory.mktemp("runs")
    first = make_run(folder / "first", rows(), first_answers, annotators=("a", "b", "c"))
    return {
        "first": first,
        "median": rescheduled(first, folder / "median", over_annotators="median", random_seed=7),
        "later": make_run(
            folder / "later", rows()[2:], lambda n, a, v: later_answers(n + 2, a, v), annotators=("a", "b")
        ),
        "strange": make_run(folder / "strange", [pair(n, "other text") for n in range(3)]),
    }


def schedule_of(run: Run) -> dict[str, dict[str, str]]:
    """Rows of schedule.csv by pair_id."""
    with (run.path / "schedule.csv").open(encoding="utf-8", newline="") as lines:
        return {row["pair_id"]: row for row in csv.DictReader(lines)}


def both(one: Run, other: Run) -> list[tuple[dict[str, str], dict[str, str]]]:
    rows_one, rows_other = schedule_of(one), schedule_of(other)
    return [(row, rows_other[pair_id]) for pair_id, row in rows_one.items() if pair_id in rows_other]


@pytest.mark.parametrize("other", ["median", "later"])
def test_the_change_of_beta_is_that_of_the_two_csv_files(runs: dict[str, Run], other: str) -> None:
    [moves] = compare([runs["first"].path, runs[other].path]).moves
    betas = [(float(a["beta"]), float(b["beta"])) for a, b in both(runs["first"], runs[other])]
    deltas = [b - a for a, b in betas]
    assert moves.both == moves.all.n == len(betas) > 15
    assert moves.all.beta_one == pytest.approx(statistics.mean(a for a, _ in betas), abs=1e-9)
    assert moves.all.beta_other == pytest.approx(statistics.mean(b for _, b in betas), abs=1e-9)
    assert moves.all.mean == pytest.approx(statistics.mean(deltas), abs=1e-9)
    assert moves.all.mean_absolute == pytest.approx(statistics.mean(map(abs, deltas)), abs=1e-9)
    assert moves.all.up == sum(d > 0.01 for d in deltas) / len(deltas)
    assert moves.all.down == sum(d < -0.01 for d in deltas) / len(deltas)
    assert moves.all.moved == sum(abs(d) > 0.01 for d in deltas) / len(deltas) > 0
    assert moves.spearman == pytest.approx(float(spearmanr(*zip(*betas, strict=True)).statistic), abs=1e-9)


@pytest.mark.parametrize("other", ["median", "later"])
def test_each_category_has_its_own_change_and_where_its_pairs_went(runs: dict[str, Run], other: str) -> None:
    [moves] = compare([runs["first"].path, runs[other].path]).moves
    assert [each.name for each in moves.categories] == list(CATEGORIES)
    for each in moves.categories:
        of = [(a, b) for a, b in both(runs["first"], runs[other]) if a["category"] == each.name]
        deltas = [float(b["beta"]) - float(a["beta"]) for a, b in of]
        assert each.n == len(of) > 0
        assert each.mean == pytest.approx(statistics.mean(deltas), abs=1e-9)
        assert each.up == sum(d > 0.01 for d in deltas) / len(of)
        assert {name: n for name, n in each.to.items() if n} == Counter(b["category"] for _, b in of)
        assert each.same_category == sum(b["category"] == each.name for _, b in of) / len(of)


def test_the_pairs_that_moved_most_come_in_order_with_the_annotator_that_moved(runs: dict[str, Run]) -> None:
    [moves] = compare([runs["first"].path, runs["later"].path]).moves
    expected = sorted(
        both(runs["first"], runs["later"]), key=lambda ab: -abs(float(ab[0]["beta"]) - float(ab[1]["beta"]))
    )
    found = [abs(pair.beta[1] - pair.beta[0]) for pair in moves.moved_most]
    assert len(found) == 10
    assert found == pytest.approx([abs(float(a["beta"]) - float(b["beta"])) for a, b in expected[:10]], abs=1e-9)
    why = {pair.prompt_id: pair.why for pair in moves.moved_most}
    a, b = next((a, b) for a, b in both(runs["first"], runs["later"]) if a["prompt_id"] == "p3")
    gaps = (float(row["effective_gap_b_ens"]) for row in (a, b))
    assert why["p3"] == "gap of b {:.2f} → {:.2f}; c only in A".format(*gaps)


def test_the_same_answers_under_other_settings_name_the_setting(runs: dict[str, Run]) -> None:
    compared = compare([runs["first"].path, runs["median"].path])
    keys = {setting.key: setting.values for setting in compared.settings}
    assert keys["schedule.over_annotators"] == ("mean", "median")
    assert keys["schedule.random_seed"] == ("42", "7")
    assert set(keys) <= {"schedule.over_annotators", "schedule.random_seed", "data.source", "annotators.a.calls",
                         "annotators.b.calls", "annotators.c.calls"}  # fmt: skip
    assert {pair.why for pair in compared.moves[0].moved_most} == {"settings: over_annotators"}


def test_a_changed_median_over_prompts_names_annotator_and_setting(runs: dict[str, Run], tmp_path: Path) -> None:
    mean = rescheduled(runs["first"], tmp_path / "mean", over_prompts="mean", debias=0.5)
    [moves] = compare([runs["first"].path, mean.path]).moves
    assert all(one.why.startswith("gap of ") for one in moves.moved_most)
    assert all(one.why.endswith("; settings: debias, over_prompts") for one in moves.moved_most)


def test_a_pair_that_moved_into_another_envelope_says_so(tmp_path: Path) -> None:
    def other(n: int, annotator: str, variant: str) -> str:
        return judged("Style" if n == 1 else "Safety", 0.5, 0.5)

    settings = {"envelopes": {"Style": {"beta_min": 0.01, "beta_max": 0.02}}}
    one = make_run(tmp_path / "one", rows()[:3], lambda *_: judged("Safety", 0.5, 0.5))
    two = make_run(tmp_path / "two", rows()[:3], other)
    one, two = rescheduled(one, tmp_path / "1", **settings), rescheduled(two, tmp_path / "2", **settings)
    [moved] = compare([one.path, two.path]).moves[0].moved_most
    assert (moved.prompt_id, moved.category, moved.why) == (
        "p1",
        ("Safety", "Style"),
        "the envelope of another category",
    )
    assert moved.beta == pytest.approx((0.03 + 0.27 * 0.25, 0.01 + 0.01 * 0.25))


def test_with_debiasing_a_pair_moves_because_others_got_other_answers(tmp_path: Path) -> None:
    def other(n: int, annotator: str, variant: str) -> str:
        return judged("Safety", 1.0, 1.0) if n > 3 and annotator == "b" else first_answers(n, annotator, variant)

    runs = [
        make_run(tmp_path / str(n), rows()[:8], how, annotators=("a", "b", "c"))
        for n, how in enumerate((first_answers, other))
    ]
    settings = {"debias": 1.0, "over_annotators": "median"}
    one, two = (rescheduled(run, tmp_path / f"d{n}", **settings) for n, run in enumerate(runs))
    why = {pair.prompt_id: pair.why for pair in compare([one.path, two.path]).moves[0].moved_most}
    assert why["p1"].endswith("; same answers; the offsets of debiasing come from all pairs")
    assert "debiasing" not in why["p6"]


def test_pairs_that_only_one_run_has_come_with_the_reason_of_the_other(runs: dict[str, Run]) -> None:
    [moves] = compare([runs["first"].path, runs["later"].path]).moves
    assert moves.lost.reasons == {"not_in_source": 2, "no_valid_answer": 1}
    assert [(one.prompt_id, one.reason) for one in moves.lost.first] == [
        ("p0", "not_in_source"), ("p1", "not_in_source"), ("p7", "no_valid_answer")
    ]  # fmt: skip
    assert moves.gained.n == 0
    [back] = compare([runs["later"].path, runs["first"].path]).moves
    assert (back.gained, back.lost) == (replace_label(moves.lost, "B"), replace_label(moves.gained, "A"))


def replace_label(lone: Any, label: str) -> Any:
    return type(lone)(**{**vars(lone), "label": label})


def test_the_row_of_a_run_has_its_counts_and_its_beta(runs: dict[str, Run]) -> None:
    [row] = compare([runs["later"].path]).runs
    betas = [float(one["beta"]) for one in schedule_of(runs["later"]).values()]
    assert (row.label, row.name, row.pairs, row.excluded) == ("A", "small", N - 3, 1)
    assert (row.annotators, row.variants) == (("a", "b"), ("v1", "v2", "v3"))
    assert (row.calls, row.live_calls, row.cost_usd) == ((N - 2) * 2 * 3, 0, 0)
    assert (row.beta_min, row.beta_max) == pytest.approx((min(betas), max(betas)), abs=1e-9)
    assert (row.beta_mean, row.beta_std) == pytest.approx((statistics.mean(betas), statistics.pstdev(betas)), abs=1e-9)


def test_the_alpha_of_a_run_is_that_of_the_library(runs: dict[str, Run]) -> None:
    first, single = compare([runs["first"].path, runs["strange"].path]).runs
    gaps = [[float(row[f"effective_gap_{a}_ens"]) for row in schedule_of(runs["first"]).values()] for a in "abc"]
    assert first.alpha == pytest.approx(krippendorff.alpha(gaps, level_of_measurement="interval"), abs=1e-9)
    assert single.alpha is None


def test_three_runs_are_each_compared_with_the_first(runs: dict[str, Run]) -> None:
    compared = compare([runs[name].path for name in ("first", "median", "later")])
    assert [row.label for row in compared.runs] == ["A", "B", "C"]
    assert [moves.labels for moves in compared.moves] == [("A", "B"), ("A", "C")]
    assert all(len(setting.values) == 3 for setting in compared.settings)
    panel = next(setting for setting in compared.settings if setting.key == "panel.annotators")
    assert panel.values == ("a, b, c", "a, b, c", "a, b")


def test_runs_without_a_common_pair_have_their_rows_and_nothing_that_moved(runs: dict[str, Run]) -> None:
    compared = compare([runs["first"].path, runs["strange"].path])
    [moves] = compared.moves
    assert (moves.both, moves.lost.n, moves.gained.n) == (0, N, 3)
    assert (moves.all.mean, moves.spearman, moves.moved_most) == (None, None, ())


def test_two_rows_with_the_same_texts_count_as_one_pair(tmp_path: Path) -> None:
    twins = [pair(0), pair(1), pair(1) | {"prompt_id": "twin"}]
    one = make_run(tmp_path / "one", twins)
    other = make_run(tmp_path / "other", rows()[:2])
    for order in ([one, other], [other, one]):
        [moves] = compare([run.path for run in order]).moves
        assert (moves.both, moves.lost.n, moves.gained.n) == (2, 0, 0)


def test_answers_that_are_missing_on_one_side_are_told(tmp_path: Path) -> None:
    def gappy(n: int, annotator: str, variant: str) -> str:
        return "" if n == 1 and annotator == "b" else first_answers(n, annotator, variant)

    made = [
        make_run(tmp_path / str(n), rows()[:4], how, annotators=("a", "b"))
        for n, how in enumerate((first_answers, gappy))
    ]
    one, two = (rescheduled(run, tmp_path / f"m{n}", min_calls=3) for n, run in enumerate(made))
    [moved] = compare([one.path, two.path]).moves[0].moved_most
    assert moved.prompt_id == "p1"
    assert moved.why.endswith("→ no answer")


# Errors -------------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_named(runs: dict[str, Run], tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match="is no run directory"):
        compare([runs["first"].path, tmp_path])


def test_a_run_without_a_schedule_names_the_command_that_makes_it(runs: dict[str, Run], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(runs["first"].path, copy)
    (copy / "schedule.parquet").unlink()
    with pytest.raises(RunDirError, match=r"schedule\.parquet is missing; make it with: sp2dpo schedule"):
        compare([runs["first"].path, copy])


def test_one_directory_under_two_names_is_refused(runs: dict[str, Run], tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(runs["first"].path)
    with pytest.raises(InputError, match=r"link is given twice"):
        compare([runs["first"].path, link])


def test_more_runs_than_letters_are_refused() -> None:
    with pytest.raises(InputError, match="1 to 26 run directories, not 27"):
        compare([Path(str(n)) for n in range(27)])


# The command --------------------------------------------------------------------------------------------------------


def test_the_tables_are_on_stdout(sp2dpo: Sp2dpo, runs: dict[str, Run]) -> None:
    ran = sp2dpo("compare", runs["first"].path, runs["later"].path)
    assert (ran.code, ran.err) == (0, "")
    for text in ("21 pairs have a β in both, 3 only in A, 0 only in B", "Settings that differ", "By category of A",
                 "Pairs that moved most", "→ Style: 1", "only in A: 2 not in the source of B\n",
                 "only in A: 1 left out of B: at least one question was asked and never answered validly"
                 " (no_valid_answer)\n"):  # fmt: skip
        assert text in ran.out
    assert "\x1b" not in ran.out


def test_one_run_is_a_table_of_one_row(sp2dpo: Sp2dpo, runs: dict[str, Run]) -> None:
    ran = sp2dpo("compare", runs["first"].path)
    assert ran.code == 0
    assert ran.out.splitlines()[0].startswith("A  small  λ ")
    assert "Settings" not in ran.out


def test_json_has_all_of_it_and_only_that(sp2dpo: Sp2dpo, runs: dict[str, Run]) -> None:
    paths = [runs["first"].path, runs["median"].path]
    ran = sp2dpo("compare", *paths, "--json")
    assert ran.code == 0
    assert json.loads(ran.out) == json.loads(json.dumps(asdict(compare(paths))))


@pytest.mark.parametrize("option", ["-o", "--output"])
def test_the_page_is_written_where_the_option_says(
    sp2dpo: Sp2dpo, runs: dict[str, Run], tmp_path: Path, option: str
) -> None:
    ran = sp2dpo("compare", runs["first"].path, runs["median"].path, option, "deep/compare.html", "--json")
    assert (ran.code, ran.err) == (0, "compare   deep/compare.html\n")
    assert json.loads(ran.out)["moves"][0]["labels"] == ["A", "B"]
    assert (tmp_path / "deep" / "compare.html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.parametrize("name", ["compare.txt", "compare"])
def test_a_page_that_is_not_called_html_is_refused(
    sp2dpo: Sp2dpo, runs: dict[str, Run], tmp_path: Path, name: str
) -> None:
    ran = sp2dpo("compare", runs["first"].path, "-o", name)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.count("\n") == 1
    assert f"{name}: the page is HTML; give --output a name that ends in .html" in ran.err
    assert not (tmp_path / name).exists()


def test_large_numbers_are_whole_on_eighty_columns(
    runs: dict[str, Run], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    compared = compare([runs["first"].path, runs["later"].path])
    large = {"pairs": 61_023, "excluded": 12_345, "alpha": -0.05, "calls": 5_492_070, "cost_usd": 12_345.67}
    print_comparison(replace(compared, runs=tuple(replace(run, **large) for run in compared.runs)))
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if line.startswith("A  ") and "61,023" in line)
    assert row.split()[0::8] == ["A", "12,345.67"]
    assert row.split()[6:8] == ["−0.05", "5,492,070"]
    heads = next(line for line in shown.splitlines() if "mean Δβ" in line)
    assert ("mean β A" in heads, "mean β B" in heads) == (True, True)


def test_the_help_of_all_commands_is_not_cut(sp2dpo: Sp2dpo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    [line] = [line for line in sp2dpo("--help").out.splitlines() if line.startswith("  compare ")]
    assert line.endswith("trained arms side by side.")


def test_the_same_runs_say_that_nothing_moved(sp2dpo: Sp2dpo, runs: dict[str, Run], tmp_path: Path) -> None:
    shutil.copytree(runs["first"].path, tmp_path / "copy")
    ran = sp2dpo("compare", runs["first"].path, tmp_path / "copy")
    assert "All settings are the same." in ran.out
    assert "No β differs between A and B." in ran.out
    assert "moved most" not in ran.out


def test_runs_of_other_pairs_say_so(sp2dpo: Sp2dpo, runs: dict[str, Run]) -> None:
    ran = sp2dpo("compare", runs["first"].path, runs["strange"].path, "-o", "strange.html")
    assert ran.code == 0
    assert "With no pair in common there is nothing to compare." in ran.out


def test_the_same_directory_twice_is_one_line_and_exit_2(sp2dpo: Sp2dpo, runs: dict[str, Run]) -> None:
    ran = sp2dpo("compare", runs["first"].path, runs["first"].path)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith("sp2dpo: ")
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("library", ["matplotlib", "krippendorff"])
def test_without_its_libraries_the_command_names_the_extra(runs: dict[str, Run], library: str) -> None:
    code = f"import sys; sys.modules['{library}'] = None; from sp2dpo.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "compare", str(runs["first"].path)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "pip install 'sp2dpo[report]'" in ran.stderr


def test_what_a_prompt_id_holds_does_not_reach_the_terminal_as_it_is(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    hostile = [pair(n) | {"prompt_id": f"\x1b[2J[red]{n}"} for n in range(2)]
    one = make_run(tmp_path / "one", hostile)
    other = make_run(tmp_path / "other", hostile[:1], lambda *_: judged("Style", 1.0, 1.0))
    ran = sp2dpo("compare", one.path, other.path)
    assert "⟦U+001B⟧[2J[red]0" in ran.out
    assert "\x1b" not in ran.out


# The page -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hostile pairs; two runs with other answers, other panels and one with another pair."""
    folder = tmp_path_factory.mktemp("hostile")
    pairs = [pair(n, HOSTILE) | {"prompt_id": f"p{n}{HOSTILE}"} for n in range(N)]
    first = make_run(folder / "first", pairs, first_answers, annotators=("a", "b", "c"))
    later = make_run(folder / "later", pairs[2:], lambda n, a, v: later_answers(n + 2, a, v), annotators=("a", "b"))
    median = rescheduled(first, folder / "<b>median", over_annotators="median")
    write_page([first.path, later.path, median.path], folder / "compare.html")
    return folder / "compare.html"


@pytest.fixture(scope="module")
def browser(hostile_page: Path, runs: dict[str, Run]) -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    opened: list[Any] = []

    def open_at(path: Path, width: int = 1366, scheme: str = "light") -> tuple[Any, list[str]]:
        page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
        seen: list[str] = []
        page.on("request", lambda request: seen.append(request.url))
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("dialog", functools.partial(_dismiss, seen))
        page.goto(path.as_uri())
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        opened.append(page)
        return page, seen

    yield open_at
    for page in opened:
        page.close()


def _dismiss(seen: list[str], dialog: Any) -> None:
    seen.append(f"dialog: {dialog.message}")
    dialog.dismiss()


@needs_chromium
@pytest.mark.parametrize("width", [390, 1366])
def test_the_page_asks_for_nothing_runs_nothing_and_stays_within_its_width(
    open_page: Any, hostile_page: Path, width: int
) -> None:
    page, seen = open_page(hostile_page, width)
    assert seen == [hostile_page.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("script, img, iframe, body style").count() == 0
    assert page.locator("details.row").count() == 20
    assert "<script>alert(1)</script>" in page.locator(".side .text").first.inner_text()


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation(open_page: Any, hostile_page: Path, scheme: str) -> None:
    page, _ = open_page(hostile_page, 1366, scheme)
    found = Axe().run(page)
    assert found.response["violations"] == [], found.generate_report()


@needs_chromium
def test_every_chart_has_its_own_sentence_and_ids(open_page: Any, hostile_page: Path) -> None:
    page, _ = open_page(hostile_page)
    alts = page.eval_on_selector_all("figure [role=img]", "all => all.map(one => one.getAttribute('aria-label'))")
    assert len(alts) == len(set(alts)) == 6
    ids = page.eval_on_selector_all("[id]", "all => all.map(one => one.id)")
    assert len(ids) == len(set(ids))


@needs_chromium
def test_the_page_shows_the_numbers_of_the_comparison(open_page: Any, runs: dict[str, Run], tmp_path: Path) -> None:
    compared = write_page([runs["first"].path, runs["later"].path], tmp_path / "page.html")
    page, _ = open_page(tmp_path / "page.html")
    cells = page.eval_on_selector_all("tr", "all => all.map(row => [...row.children].map(c => c.innerText.trim()))")
    [moves] = compared.moves
    for each in moves.categories:
        assert expected_row(each) in cells
        assert [each.name, *(str(n) for n in each.to.values())] in cells
    answer = page.locator("details.row", has_text="p3 ·").locator("tbody tr", has_text="b").first
    assert answer.locator("td").last.inner_text() == "yes"
    assert "1.00 × 1.00" in answer.inner_text()


def expected_row(each: Any) -> list[str]:
    sign = "+" if each.mean > 0 else "−"
    return [
        each.name, str(each.n), f"{each.beta_one:.4f}", f"{each.beta_other:.4f}",
        f"{sign}{abs(each.mean):.4f}" if round(each.mean, 4) else "0.0000", f"{each.mean_absolute:.4f}",
        f"{each.up:.0%}", f"{each.down:.0%}", f"{each.same_category:.0%}",
    ]  # fmt: skip


def test_the_page_has_the_head_of_the_report_without_its_script(
    runs: dict[str, Run], hostile_page: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(runs["first"].path, copy)
    report = build_report(copy).read_text(encoding="utf-8")
    heads = [
        re.sub("<title>.*?</title>", "", text[: text.index("</head>")])
        for text in (report, hostile_page.read_text(encoding="utf-8"))
    ]
    assert "default-src 'none'; script-src 'sha256-" in heads[0]
    assert re.sub("script-src '[^']*'; ", "", heads[0]) == heads[1]


def test_the_same_runs_give_the_same_bytes(runs: dict[str, Run], tmp_path: Path) -> None:
    paths = [runs["first"].path, runs["later"].path]
    compared: list[Comparison] = [write_page(paths, tmp_path / name) for name in ("one.html", "two.html")]
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert compared[0] == compared[1]


def test_a_run_given_as_a_dot_is_shown_by_the_name_of_its_folder(
    runs: dict[str, Run], sp2dpo: Sp2dpo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs["first"].path)
    name = runs["first"].path.name
    ran = sp2dpo("compare", ".", "-o", tmp_path / "page.html")
    assert f"  {name}  (" in ran.out.splitlines()[0]
    assert f'<span class="quiet">{name}<br>' in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("names", [("first",), ("first", "strange"), ("strange", "first")])
def test_a_page_of_one_run_or_of_strangers_is_made(
    runs: dict[str, Run], tmp_path: Path, names: tuple[str, ...]
) -> None:
    write_page([runs[name].path for name in names], tmp_path / "page.html")
    assert "<figure>" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_page_of_two_runs_with_one_pair_and_one_beta_is_made(tmp_path: Path) -> None:
    one, two = (make_run(tmp_path / name, rows()[:1], annotators=("a",), variants=("v1",)) for name in "xy")
    compared = write_page([one.path, two.path], tmp_path / "page.html")
    assert (compared.moves[0].both, compared.moves[0].all.mean, compared.moves[0].spearman) == (1, 0.0, None)
