"""Trained arms side by side: in one run, between runs and over seeds; the command, its JSON, and the page."""

from __future__ import annotations

import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from conftest import Sp2dpo
from report_browser import Seen, chromium, folded, needs_chromium
from report_runs import judged, make_run, pair, put_arms, put_margins
from sp2dpo.arms import CONTROLS
from sp2dpo.cli.compare_tables import print_comparison
from sp2dpo.compare import compare
from sp2dpo.compare.page import write_page
from sp2dpo.evidence import read_evidence
from sp2dpo.report.marks import read_marks
from sp2dpo.report.measured import training_of
from sp2dpo.report.training import courses
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import Run

N = 48


def answer(n: int, annotator: str, variant: str) -> str:
    return judged(CATEGORIES[n % 6], (n % 10) / 10, 0.9)


def run_of(folder: Path, *, skip: int = 0, train: dict[str, Any] | None = None, **schedule: Any) -> Run:
    rows = [pair(n) for n in range(skip, N)]
    return make_run(
        folder, rows, lambda n, a, v: answer(n + skip, a, v), methods=("sp2dpo",), schedule=schedule, train=train
    )


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All controls and one method with a loss of its own."""
    run = run_of(tmp_path_factory.mktemp("swept"))
    put_arms(run, (*CONTROLS, "ipo"))
    return run


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Other pairs in part, another envelope, fewer arms."""
    run = run_of(tmp_path_factory.mktemp("other"), skip=6, beta_max=0.5)
    put_arms(run, ("constant_beta", "sp2dpo"))
    return run


def loss(margin: float) -> float:
    return math.log1p(math.exp(-0.1 * margin))


# Numbers


def test_one_run_has_its_arms_as_the_report_tells_them(swept: Run) -> None:
    evidence = read_evidence(swept)
    [found] = compare([swept.path]).training
    assert found.label == "A"
    assert found.training == training_of(evidence, read_marks(evidence), courses(evidence))
    assert [arm.arm for arm in found.training.arms] == [*CONTROLS, "ipo"]


def test_a_run_without_training_has_no_arms(tmp_path: Path) -> None:
    assert compare([make_run(tmp_path, [pair(0)]).path]).training == ()


def test_an_arm_in_two_runs_is_compared_on_the_pairs_that_both_have_held_out(tmp_path: Path) -> None:
    one, two = (run_of(tmp_path / name, skip=skip) for name, skip in (("one", 0), ("two", 2)))
    margins = {"one": {0: 9.0, 4: 1.0, 6: -2.0, 7: 3.0}, "two": {2: 0.5, 4: 4.0, 5: 2.5}}  # rows of the schedules
    put_margins(one, "sp2dpo", [(0, 1, 1.0)], held_out=margins["one"])
    put_margins(two, "sp2dpo", [(0, 1, 1.0)], held_out=margins["two"])
    put_margins(two, "dpo", [(0, 1, 1.0)], held_out=margins["two"])
    compared = compare([one.path, two.path])
    [between] = compared.between
    assert (between.labels, between.arm, between.contrast.n) == (("A", "B"), "sp2dpo", 3)
    changes = [loss(b) - loss(a) for a, b in ((1.0, 0.5), (-2.0, 4.0), (3.0, 2.5))]
    assert between.contrast.loss.value == pytest.approx(statistics.mean(changes), abs=1e-6)
    half = 4.302652730 * statistics.stdev(changes) / math.sqrt(3)  # Student's t, two degrees of freedom
    assert between.contrast.loss.low == pytest.approx(statistics.mean(changes) - half, abs=1e-6)
    assert between.contrast.accuracy.value == pytest.approx(1 / 3)


def seed_of(folder: Path, seed: int, gain: float, **train: Any) -> Run:
    """A run with that seed, in which two held-out pairs have a margin of 1, and with the schedule of 1 + `gain`."""
    run = run_of(folder, train={"seed": seed} | train)
    for name, margin in (("constant_beta", 1.0), ("sp2dpo", 1.0 + gain)):
        put_margins(run, name, [(0, 9, 1.0)], held_out={0: margin, 1: margin})
    return run


def test_runs_that_differ_in_the_seed_alone_are_taken_together(tmp_path: Path, sp2dpo: Sp2dpo) -> None:
    runs = [seed_of(tmp_path / str(n), n, gain=n) for n in range(3)]
    compared = compare([run.path for run in runs])
    [over] = compared.over_seeds
    gains = [loss(1.0 + n) - loss(1.0) for n in range(3)]
    assert (over.against, over.runs) == ("constant_beta", 3)
    assert over.loss.value == pytest.approx(statistics.mean(gains), abs=1e-6)
    half = 4.302652730 * statistics.stdev(gains) / math.sqrt(3)
    assert over.loss.high == pytest.approx(statistics.mean(gains) + half, abs=1e-6)
    shown = sp2dpo("compare", *(run.path for run in runs))
    assert (
        "Over 3 seeds: Does it help that pairs have different β? sp2dpo less constant_beta, held-out loss" in shown.out
    )


@pytest.mark.parametrize(("seed", "steps"), [(1, 5), (2, 6)])
def test_runs_of_one_seed_or_that_differ_in_more_than_seeds_are_not(tmp_path: Path, seed: int, steps: int) -> None:
    runs = [seed_of(tmp_path / "a", 1, 0.5, max_steps=5), seed_of(tmp_path / "b", seed, 1.5, max_steps=steps)]
    compared = compare([run.path for run in runs])
    assert [run.training.n for run in compared.training] == [2, 2]
    assert compared.over_seeds == ()


def test_comparing_loads_no_torch() -> None:
    script = "import sys, sp2dpo.compare, sp2dpo.compare.page; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"
    )


# The command


def test_the_tables_of_all_arms_fit_eighty_columns(
    swept: Run, other: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    compared = compare([swept.path, other.path])
    print_comparison(replace(compared, moves=()))
    lines = capsys.readouterr().out.splitlines()
    training = compared.training[0].training
    ours = next(arm for arm in training.arms if arm.arm == "sp2dpo")
    [row] = [line for line in lines if line.startswith("A sp2dpo  ") and "±" in line]
    every = ours.groups["all pairs"]
    assert ours.held_out_loss is not None
    assert row.split()[2] == f"{ours.held_out_loss:.3f}"
    assert row.split()[-5:] == [
        f"{every.accuracy:.0%}", f"{every.margin:.2f}", f"{every.beta_margin:.2f}",
        f"{every.saturation:.4f}", f"{every.left:.0%}",
    ]  # fmt: skip
    heads = [line for line in lines if line.startswith("arm ")]
    assert [head.split()[1:] for head in heads[1:]] == [[*CATEGORIES]] * 3
    tables = [line for line in lines if re.match(r"(arm |[AB] \w+  |───)", line)]
    assert max(map(len, tables)) <= 80
    assert not [line for line in tables if "…" in line]
    assert {line.split()[1] for line in tables if line.startswith("B ")} == {"constant_beta", "sp2dpo"}


def test_what_the_numbers_are_of_and_how_little_one_seed_says_is_told(
    sp2dpo: Sp2dpo, swept: Run, tmp_path: Path
) -> None:
    shown = sp2dpo("compare", swept.path).out
    assert "Training, A: 12 held-out pairs" in shown
    assert "differences of one seed are mostly noise" in shown
    run = run_of(tmp_path)
    put_arms(run, ("sp2dpo",), share=0.0)
    put_margins(run, "dpo", [(0, 0, 1.0)])
    run.training("rand_beta").mkdir()
    shown = sp2dpo("compare", run.path).out
    assert f"Training, A: {N} training pairs, each when it was last seen in training" in shown
    assert "A rand_beta: not trained to the end" in shown
    assert "one seed" not in shown


def test_columns_that_would_be_empty_are_left_out(sp2dpo: Sp2dpo, tmp_path: Path) -> None:
    run = run_of(tmp_path)
    put_arms(run, ("dpo", "sp2dpo"))

    def heads() -> list[str]:
        told = sp2dpo("compare", run.path).out.split("Training, A")[1]
        return re.split(r"  +", told.splitlines()[1].strip())

    pull = ["acc.", "mean Δ", "β̄·|Δ|", "satur.", "left"]
    assert heads() == ["arm", "loss", *pull]
    put_arms(run, ("constant_beta",))
    assert heads() == ["arm", "loss", "less constant_beta", *pull]
    for name in ("dpo", "sp2dpo", "constant_beta"):
        shutil.rmtree(run.training(name))
    put_arms(run, ("dpo", "sp2dpo"), share=0.0)
    assert heads() == ["arm", *pull]


def test_json_has_the_arms_and_what_was_compared(sp2dpo: Sp2dpo, swept: Run, other: Run) -> None:
    given = json.loads(sp2dpo("compare", swept.path, other.path, "--json").out)
    compared = compare([swept.path, other.path])
    assert given == json.loads(json.dumps(asdict(compared)))
    arms = {arm["arm"]: arm for arm in given["training"][0]["training"]["arms"]}
    assert arms["weighted_loss"]["groups"]["Safety"]["saturation"] > 0
    assert {one["arm"] for one in given["between"]} == {"constant_beta", "sp2dpo"}


# The page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, swept: Run, other: Run) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page([swept.path, other.path], path)
    return path


def test_the_page_of_one_run_has_its_arms(swept: Run, tmp_path: Path) -> None:
    compared = write_page([swept.path], tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    for arm in compared.training[0].training.arms:
        assert f'<th scope="row">A {arm.arm}</th>' in html
    assert 'but its own <a href="#training">arms of training</a>' in html
    assert "Does it matter which pair has which β?" in html


def test_a_page_without_the_constant_or_held_out_pairs_has_no_column_for_them(tmp_path: Path) -> None:
    run, path = run_of(tmp_path), tmp_path / "page.html"
    for share, measured in ((0.25, True), (0.0, False)):
        for arm in ("dpo", "sp2dpo"):
            shutil.rmtree(run.training(arm), ignore_errors=True)
        put_arms(run, ("dpo", "sp2dpo"), share=share)
        write_page([run.path], path)
        html = path.read_text(encoding="utf-8")
        heads = re.findall(r"<th [^>]*>([^<]*)</th>", html.split('class="arms fold"')[1].split("</thead>")[0])
        assert "less that of constant_beta" not in heads
        assert ("Loss" in heads, "Ranking" in heads) == (measured, measured)


def test_a_page_of_runs_without_training_has_no_section_for_it(tmp_path: Path) -> None:
    write_page([make_run(tmp_path, [pair(0), pair(1)]).path], tmp_path / "page.html")
    assert "#training" not in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser(page: Path) -> Iterator[Any]:
    with chromium() as started:
        yield started


@needs_chromium
@pytest.mark.parametrize("width", [390, 1366])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_many_arms_stay_within_the_page_and_can_be_read(browser: Any, page: Path, width: int, scheme: str) -> None:
    Seen(browser, page.as_uri(), width, scheme).check(page.as_uri(), width)


@needs_chromium
def test_on_a_phone_the_arms_need_no_scrolling_and_every_number_has_its_name(browser: Any, page: Path) -> None:
    seen = Seen(browser, page.as_uri(), 390)
    tables = folded(seen.page)
    assert [re.split("[;,]", caption)[0] for caption in tables] == [
        "What each arm reached", "sp2dpo less each control", "The same arm in two runs"
    ]  # fmt: skip
    for beyond, cells in tables.values():
        assert beyond == 0
        assert all(name == head for name, head, words in cells if head not in ("Arm", "Question") and not words)
    seen.page.close()
