"""The report on training: which arms it finds, what it measures of each, how sure that is, and its section."""

from __future__ import annotations

import itertools
import math
import re
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

from report_browser import Seen, chromium, folded, needs_chromium
from report_runs import judged, make_run, pair, put_arms, put_margins
from sp2dpo.arms import CONTROLS
from sp2dpo.evidence import read_evidence
from sp2dpo.hashing import sha256_file
from sp2dpo.report.build import build_report
from sp2dpo.report.canvas import METHOD_COLOURS
from sp2dpo.report.marks import read_marks
from sp2dpo.report.measured import Training, measure, paired, reading, training_of
from sp2dpo.report.training import Course, courses, curve, from_log, step_edges
from sp2dpo.report.training_charts import group_charts, log_charts, main_arms
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import Run
from sp2dpo.tables import read_manifest

ALL = np.ones(10, bool)


def ten(**own: object) -> list[dict[str, object]]:
    return [pair(n, **own) for n in range(10)]


def of_run(run: Run) -> dict[str, Course]:
    return {course.method: course for course in courses(read_evidence(run))}


def numbers(run: Run) -> Training:
    evidence = read_evidence(run)
    return training_of(evidence, read_marks(evidence), courses(evidence))


def once(margins: dict[int, float]) -> list[tuple[int, int, float]]:
    """Each row at a step of its own."""
    return [(step, row, margin) for step, (row, margin) in enumerate(margins.items())]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def section_of(run: Run) -> str:
    """The text of the section, without tags."""
    html = build_report(run.path).read_text(encoding="utf-8")
    section = re.search(r'<section aria-labelledby="training">.*?</section>', html, re.DOTALL)
    assert section
    return " ".join(re.sub("<svg.*?</svg>|<[^>]*>", " ", section[0], flags=re.DOTALL).split())


# What is found


def test_arms_outside_of_lambda_are_found_and_all_come_in_one_order(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("sp2dpo", "dpo"))
    for name in ("sp2dpo", "dpo_0.5", "dpo_0.05", "weighted_loss", "ipo", "dpo"):
        put_margins(run, name, [(0, 0, 1.0)])
    assert [*of_run(run)] == ["dpo", "dpo_0.05", "dpo_0.5", "weighted_loss", "sp2dpo", "ipo"]


def test_a_folder_that_was_set_aside_is_no_arm(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("dpo",))
    put_margins(run, "dpo", [(0, 0, 1.0)])
    shutil.copytree(run.training("dpo"), run.training("dpo.1"))
    assert [*of_run(run)] == ["dpo"]


def test_an_arm_that_is_not_there_or_of_another_schedule_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("dpo", "sp2dpo", "rand_beta"))
    put_margins(run, "dpo", [(0, 0, 77.25)])
    manifest = run.training("dpo") / "metrics.manifest.json"
    manifest.write_text(manifest.read_text().replace(sha256_file(run.schedule), "0" * 64))
    run.training("sp2dpo").mkdir()
    problems = {name: course.problem for name, course in of_run(run).items()}
    assert problems["dpo"] == "trained on another schedule than the one here"
    assert (problems["sp2dpo"], problems["rand_beta"]) == ("not trained to the end", "not trained")
    assert "77.25" not in section_of(run)


@pytest.mark.parametrize("name", ["margins", "held_out"])
def test_rows_beyond_the_schedule_are_not_shown(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path, ten(), methods=("dpo",))
    rows = {"margins": 0, "held_out": 1} | {name: 10}
    put_margins(run, "dpo", [(0, rows["margins"], 1.0)], held_out={rows["held_out"]: 2.0})
    assert of_run(run)["dpo"].problem == f"its {name}.parquet does not fit the schedule"


def test_each_arm_has_the_beta_that_it_was_trained_with(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("sp2dpo",))
    put_arms(run, CONTROLS, share=0.2, batch=2)
    arms, schedule = of_run(run), read_evidence(run).schedule
    beta = schedule["beta"].to_numpy()
    trained = np.isfinite(arms["sp2dpo"].last_i)
    assert trained.sum() == 8
    assert arms["sp2dpo"].beta_i.tolist() == beta.tolist()
    assert arms["rand_beta"].beta_i.tolist() == schedule["beta_random"].to_pylist()
    assert arms["constant_beta"].beta_i == pytest.approx(np.full(10, math.fsum(beta[trained]) / 8), abs=1e-12)
    assert sorted(arms["shuffled_beta"].beta_i[trained]) == sorted(beta[trained])
    assert arms["shuffled_beta"].beta_i.tolist() != beta.tolist()
    assert arms["weighted_loss"].weight_i[trained].mean() == pytest.approx(1.0)
    assert set(arms["dpo_0.3"].beta_i) == {0.3}
    assert np.isnan(arms["untuned"].beta_i).all()


def test_of_a_training_on_the_first_pairs_the_constant_is_their_mean(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("sp2dpo",))
    put_margins(run, "constant_beta", [(0, row, 1.0) for row in range(4)], rows="4")
    beta = read_evidence(run).beta_i
    found = of_run(run)["constant_beta"].beta_i
    assert found[:4] == pytest.approx(np.full(4, beta[:4].mean()), abs=1e-12)
    assert np.isnan(found[4:]).all()


# What is measured


def test_the_last_margin_of_a_pair_is_the_one_of_its_last_step(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("dpo",))
    put_margins(run, "dpo", [(1, 0, 5.0), (0, 0, 1.0), (0, 1, -2.0)])
    course = of_run(run)["dpo"]
    found = measure(course, ALL)
    assert (found.n, found.margin, found.accuracy) == (2, 1.5, 0.5)
    assert course.passes == 1.5
    assert measure(course, np.arange(10) > 4).margin is None


def test_a_curve_is_the_mean_margin_of_each_bin_of_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("dpo",))
    put_margins(run, "dpo", [(step, row, float(step + row)) for step in range(8) for row in (0, 1)])
    course = of_run(run)["dpo"]
    edges = step_edges([course], [ALL])
    line = curve(course, np.arange(10) == 1, edges)
    assert edges.tolist() == [0, 2, 4, 6, 8]
    assert line["x"].tolist() == [1, 3, 5, 7]
    assert line["y"].tolist() == [1.5, 3.5, 5.5, 7.5]


def test_a_long_log_is_drawn_as_means_of_stretches(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("dpo",))
    log: list[dict[str, float]] = [{"step": n, "loss": float(n)} for n in range(60)]
    put_margins(run, "dpo", [(0, 0, 1.0)], log=[*log, {"step": 60, "loss": math.nan}, {"step": 60, "train_loss": 9.0}])
    line = from_log(of_run(run)["dpo"], "loss")
    assert line["x"].tolist() == line["y"].tolist() == [n + 0.5 for n in range(0, 60, 2)]


@pytest.mark.parametrize("name", ["sp2dpo", "weighted_loss"])
def test_saturation_is_the_mean_pull_of_each_category(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path, ten(), methods=(name,))
    margins = {row: 4.0 * row - 7 for row in range(10)}
    put_margins(run, name, once(margins))
    evidence = read_evidence(run)
    beta = evidence.beta_i
    mean = beta.mean()
    [arm] = numbers(run).arms
    for category, of in (("Safety", range(0, 10, 2)), ("Style", range(1, 10, 2))):
        used = [mean if name == "weighted_loss" else beta[n] for n in of]
        weight = [beta[n] / mean if name == "weighted_loss" else 1.0 for n in of]
        pull = [w * b * sigma(-b * margins[n]) for w, b, n in zip(weight, used, of, strict=True)]
        found = arm.groups[category]
        assert found.saturation == pytest.approx(sum(pull) / 5, rel=1e-6)
        half = sum(w * b / 2 for w, b in zip(weight, used, strict=True))
        assert found.left == pytest.approx(sum(pull) / half, rel=1e-6)
        assert found.beta_margin == pytest.approx(sum(used) / 5 * sum(abs(margins[n]) for n in of) / 5, rel=1e-6)


def test_at_a_margin_of_zero_the_whole_pull_is_left_and_weights_pull_as_the_schedule_does(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("sp2dpo",))
    for name in ("sp2dpo", "weighted_loss"):
        put_margins(run, name, [(0, row, 0.0) for row in range(10)])
    weighted, ours = numbers(run).arms
    assert ours.groups["Safety"].left == pytest.approx(1.0)
    assert ours.groups["Safety"].saturation == pytest.approx(weighted.groups["Safety"].saturation)


def test_a_loss_without_such_a_pull_has_margins_and_no_saturation(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("ipo",))
    put_margins(run, "ipo", [(0, row, 1.0) for row in range(10)])
    found = numbers(run).arms[0].groups["all pairs"]
    assert (found.margin, found.accuracy, found.saturation) == (1.0, 1.0, None)


def test_held_out_pairs_come_before_training_pairs(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("sp2dpo",))
    put_margins(run, "sp2dpo", once(dict.fromkeys(range(8), 9.0)), held_out={8: 1.0, 9: -3.0})
    training = numbers(run)
    [arm] = training.arms
    assert (training.measured_on, training.n) == ("held-out pairs", 2)
    assert (arm.groups["all pairs"].margin, arm.groups["all pairs"].accuracy) == (-1.0, 0.5)
    assert arm.seen["all pairs"].margin == 9.0
    expected = sum(math.log1p(math.exp(-0.1 * margin)) for margin in (1.0, -3.0)) / 2
    assert arm.held_out_loss == pytest.approx(expected, rel=1e-9)
    # the chosen one at −20 + Δ/2 against −20.5
    assert arm.ranking == 0.5


def test_the_untuned_student_has_the_loss_of_a_coin_and_no_accuracy(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("sp2dpo",))
    put_arms(run, ("untuned", "constant_beta"), batch=2)
    untuned = numbers(run).arms[0]
    assert untuned.held_out_loss == pytest.approx(math.log(2))
    assert (untuned.groups["all pairs"].accuracy, untuned.steps) == (None, 0)
    assert untuned.versus is not None
    assert untuned.versus.accuracy.value is None
    assert "the untuned student is its own reference" in section_of(run)


# How sure that is


def test_with_one_pair_for_each_prompt_the_interval_is_that_of_a_paired_t_test() -> None:
    random = np.random.default_rng(3)
    one, other = random.normal(0.1, 1, 30), random.normal(0, 1, 30)
    found, expected = paired(one, other, np.arange(30)), ttest_rel(one, other).confidence_interval(0.95)
    assert found.value == pytest.approx((one - other).mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_pairs_that_repeat_a_prompt_add_no_certainty() -> None:
    random = np.random.default_rng(4)
    one, other, prompt = random.normal(0.1, 1, 20), random.normal(0, 1, 20), np.arange(20)
    plain = paired(one, other, prompt)
    assert paired(np.tile(one, 3), np.tile(other, 3), np.tile(prompt, 3)).low == pytest.approx(plain.low)
    assert paired(np.tile(one, 3), np.tile(other, 3), np.arange(60)).low > (plain.low or math.inf)


@pytest.mark.parametrize(("differs", "prompts"), [(0.0, 6), (1.0, 1)])
def test_there_is_no_interval_of_one_prompt_or_where_nothing_differs(differs: float, prompts: int) -> None:
    found = paired(np.full(6, differs), np.zeros(6), np.arange(6) % prompts)
    assert (found.value, found.low, found.high) == (differs, None, None)


def test_pairs_with_the_same_prompt_count_as_one_draw(tmp_path: Path) -> None:
    rows = [pair(n) | {"prompt": [{"role": "user", "content": f"Question {n % 2}"}]} for n in range(8)]
    run = make_run(tmp_path, rows, methods=("sp2dpo",))
    for name, shift in (("constant_beta", 0.0), ("sp2dpo", 1.0)):
        put_margins(run, name, [(0, 7, 1.0)], held_out={n: shift * (n % 2 + n / 10) for n in range(7)})
    [arm] = [one for one in numbers(run).arms if one.versus]
    assert arm.versus is not None
    delta = [n % 2 + n / 10 for n in range(7)]
    gain = [math.log1p(math.exp(-0.1 * margin)) - math.log(2) for margin in delta]
    mean = sum(gain) / 7
    sums = [sum(gain[n] - mean for n in range(part, 7, 2)) for part in (0, 1)]
    half = 12.706204736 * math.sqrt(2 * sum(one * one for one in sums)) / 7  # Student's t, one degree of freedom
    assert arm.versus.loss.value == pytest.approx(mean)
    assert arm.versus.loss.low == pytest.approx(mean - half)


def test_a_control_answers_only_as_far_as_its_interval_goes(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("sp2dpo",))
    held = {
        "sp2dpo": [3.0, 3.1, 2.9, 3.2],
        "constant_beta": [1.0, 1.2, 0.9, 1.1],
        "shuffled_beta": [3.1, 3.0, 3.0, 3.1],
    }
    for name, margins in held.items():
        put_margins(run, name, [(0, 9, 1.0)], held_out=dict(enumerate(margins)))
    asked = {one.against: one for one in numbers(run).questions}
    help_at_all, which, weights = asked["constant_beta"], asked["shuffled_beta"], asked["weighted_loss"]
    assert help_at_all.contrast is not None
    assert which.contrast is not None
    assert reading(help_at_all.contrast) == "lower loss than constant_beta on these 4 pairs, with this seed"
    assert reading(which.contrast) == "cannot be told on these 4 pairs"
    assert weights.contrast is None
    text = section_of(run)
    assert "Does it matter which pair has which β? shuffled_beta" in text
    assert "not both trained and measured" in text
    assert "Differences of one seed are mostly noise" in text


# The page


def test_a_margin_below_zero_has_a_minus_sign_in_short_and_in_the_charts(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("dpo",))
    put_margins(run, "dpo", [(1, row, -1.4) for row in range(10)])
    html = build_report(run.path).read_text(encoding="utf-8")
    assert "Mean margin of the training pairs at the end, in nats: dpo −1.4." in html
    [drawn] = re.findall('aria-label="(Mean margin over training[^"]*, all pairs[^"]*)"', html)
    assert drawn.endswith(": dpo −1.4.")


def test_margins_of_training_pairs_are_called_so_and_what_one_pass_means(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("dpo", "sp2dpo"))
    put_arms(run, ("dpo", "sp2dpo"), share=0.0, passes=1, batch=2)
    text = section_of(run)
    assert "No pairs were held out, so the arms are measured on the training pairs themselves" in text
    assert "Each pair was seen about once, so these are means over the whole course of training" in text
    assert "held-out data or a benchmark" in build_report(run.path).read_text(encoding="utf-8")
    put_arms(run, ("dpo", "sp2dpo"), share=0.0, passes=3, batch=2)
    assert "seen about once" not in section_of(run)


def test_in_short_has_the_held_out_accuracy_and_the_difference_to_the_constant(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("sp2dpo",))
    put_arms(run, CONTROLS, batch=2)
    page = build_report(run.path).read_text(encoding="utf-8")
    training = numbers(run)
    ours = next(arm for arm in training.arms if arm.arm == "sp2dpo")
    assert ours.versus is not None
    assert f"Share of the {training.n} held-out pairs with a margin above 0: constant_beta " in page
    assert "Held-out loss of sp2dpo less that of constant_beta: " in page
    assert "held-out data or a benchmark" not in page


def test_without_the_constant_there_is_no_column_of_differences_to_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("sp2dpo",))
    put_arms(run, ("dpo", "sp2dpo"), batch=2)
    assert "less that of constant_beta" not in section_of(run)
    put_arms(run, ("constant_beta",), batch=2)
    assert "less that of constant_beta" in section_of(run)


def test_every_arm_has_a_line_of_its_own_and_charts_of_groups_have_few(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("sp2dpo",))
    put_arms(run, (*CONTROLS, "dpo", "ipo", "cdpo"), batch=2)
    evidence = read_evidence(run)
    arms = courses(evidence)
    looks = {(arm.stroke.colour, arm.stroke.dash) for arm in arms if arm.moved}
    assert len(looks) == len([arm for arm in arms if arm.moved]) == 11
    kept = [arm.method for arm in main_arms(arms)]
    assert kept == ["sp2dpo", "rand_beta", "constant_beta", "shuffled_beta", "weighted_loss"]
    told = [chart.alt for chart in group_charts(evidence, read_marks(evidence), arms)]
    assert len(told) == 2
    assert all("dpo_0.1" not in one for one in told)


def test_a_loss_of_another_scale_is_not_drawn_with_the_others(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("sp2dpo",))
    put_arms(run, ("sp2dpo", "ipo"), batch=2)
    loss, norm, rate = log_charts(courses(read_evidence(run)))
    assert [("ipo" in chart.alt, "sp2dpo" in chart.alt) for chart in (loss, norm, rate)] == [
        (False, True), (True, True), (True, True)
    ]  # fmt: skip


def test_held_out_pairs_that_are_known_to_be_reversed_are_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path, [*ten(wrong=False), pair(10, wrong=True)], methods=("sp2dpo",), known_reversed="wrong")
    put_margins(run, "sp2dpo", [(0, 0, 1.0)], held_out={9: 1.0, 10: -1.0})
    assert ": 1 are known to be reversed, and what all others show is below" in section_of(run)


def test_all_that_the_section_is_made_from_is_an_input_of_the_report(tmp_path: Path) -> None:
    run = make_run(tmp_path, ten(), methods=("sp2dpo",))
    put_arms(run, ("constant_beta", "sp2dpo"), batch=2)
    build_report(run.path)
    manifest = read_manifest(run.report)
    assert manifest is not None
    for name, file in itertools.product(
        ("constant_beta", "sp2dpo"), ("margins.parquet", "held_out.parquet", "trainer_state.json")
    ):
        assert manifest["inputs"][f"train/{name}/{file}"] == sha256_file(run.training(name) / file)


def contrast_of(one: str, other: str) -> float:
    """WCAG 2, of two colours #rrggbb."""
    light = []
    for colour in (one, other):
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_every_line_stands_out_from_the_page_in_light_dark_and_print() -> None:
    style = resources.files("sp2dpo.report").joinpath("style.css").read_text(encoding="utf-8")
    themes = [
        dict(re.findall(r"(--[\w-]+):\s*(#[0-9a-f]{3,6})", part)) for part in re.findall(r":root \{[^}]*\}", style)
    ]
    assert len(themes) == 3
    for theme in themes:
        paper = theme["--paper"] if len(theme["--paper"]) == 7 else "#ffffff"
        lines = [theme[f"--m{n}"] for n in range(len(METHOD_COLOURS))]
        assert len(set(lines)) == len(METHOD_COLOURS)
        assert min(contrast_of(line, paper) for line in lines) >= 4.5


def answer(n: int, annotator: str, variant: str) -> str:
    return judged(CATEGORIES[n % 6], (n % 10) / 10, 0.9)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten arms on 48 pairs of all categories, some held out, some known to be reversed."""
    rows = [pair(n, wrong=n % 7 == 3) for n in range(48)]
    run = make_run(tmp_path_factory.mktemp("arms"), rows, answer, methods=("sp2dpo",), known_reversed="wrong")
    put_arms(run, (*CONTROLS, "ipo"))
    return build_report(run.path)


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[Any]:
    with chromium() as started:
        yield started


@needs_chromium
@pytest.mark.parametrize("width", [390, 1366])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_ten_arms_stay_within_the_page_and_can_be_read(browser: Any, page: Path, width: int, scheme: str) -> None:
    Seen(browser, page.as_uri(), width, scheme).check(page.as_uri(), width, "section[aria-labelledby=training]")


@needs_chromium
def test_on_a_phone_what_each_arm_reached_needs_no_scrolling_and_every_number_has_its_name(
    browser: Any, page: Path
) -> None:
    seen = Seen(browser, page.as_uri(), 390)
    tables = folded(seen.page)
    assert [caption.split(";")[0] for caption in tables] == [
        "What was trained", "What it reached on the held-out pairs", "sp2dpo less each control, on the held-out pairs",
    ]  # fmt: skip
    for beyond, cells in tables.values():
        assert beyond == 0
        assert all(name == head for name, head, words in cells if head not in ("Arm", "Question") and not words)
    seen.page.close()


@needs_chromium
def test_the_name_of_an_arm_stays_in_sight_when_its_table_is_scrolled(browser: Any, page: Path) -> None:
    seen = Seen(browser, page.as_uri(), 390)
    place = seen.page.evaluate(
        """() => { const box = document.querySelector('table.arms:not(.fold)').parentElement; box.scrollLeft = 9999;
        const cell = box.querySelector('tbody th'); return [box.scrollLeft,
        cell.getBoundingClientRect().left - box.getBoundingClientRect().left]; }"""
    )
    assert place[0] > 50
    assert abs(place[1]) < 2
    seen.page.close()
