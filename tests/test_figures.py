"""The charts of the report: their numbers against an independent count, their size, their bytes, and what is drawn."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers

from report_browser import chromium, needs_chromium
from report_runs import HOSTILE, judged, make_run, pair
from sp2dpo.evidence import Evidence, read_evidence
from sp2dpo.report import charts, figures, hexagons
from sp2dpo.report.agreement import between_annotators, between_prompts
from sp2dpo.report.charts import Chart
from sp2dpo.report.data_charts import data_charts, explained, features, followed
from sp2dpo.report.figures_folder import standalone, write_figures
from sp2dpo.report.texts import MOST_CHARACTERS, read_texts, words
from sp2dpo.runs import Run
from sp2dpo.settings import Envelope

CATEGORIES = ("Safety", "Factuality", "Instruction", "Reasoning", "Helpfulness", "Style")
LARGEST = 60_000
"""Bytes of one chart."""


def conversation(role: str, count: int, word: str) -> list[dict[str, str]]:
    return [{"role": role, "content": " ".join(f"{word}{n % 7}" for n in range(count))}]


def row(n: int, **own: Any) -> dict[str, Any]:
    """A pair whose texts have 3 + n, 5 + 2n and 40 − n words, each of which comes back after seven."""
    texts = {"prompt": conversation("user", 3 + n, "a"), "chosen": conversation("assistant", 5 + 2 * n, "b")}
    return {"prompt_id": f"p{n}", **texts, "rejected": conversation("assistant", max(40 - n, 1), "a"), **own}


def answer(n: int, annotator: str, variant: str) -> str:
    return judged(CATEGORIES[n % 6], (n % 10) / 10, 0.9 if annotator == "a" else 0.5 + int(variant[1]) / 10)


def evidence_of(folder: Path, rows: Sequence[dict[str, Any]], **more: Any) -> Evidence:
    return read_evidence(make_run(folder, rows, more.pop("answer", answer), **more))


def policy_charts(evidence: Evidence) -> list[Chart]:
    """What the panel made of the pairs: β by category and source, gap to β, agreement and disagreement."""
    source = charts.source_chart(evidence)
    return [
        charts.beta_chart(evidence),
        charts.policy_chart(evidence),
        *([source] if source else []),
        *charts.agreement_charts(between_annotators(evidence) + between_prompts(evidence)),
        *charts.disagreement_charts(evidence),
    ]


def all_charts(evidence: Evidence) -> list[Chart]:
    return [*policy_charts(evidence), *(chart for _, group in data_charts(evidence) for chart in group)]


def of_data(evidence: Evidence) -> dict[str, Chart]:
    return {chart.name: chart for _, group in data_charts(evidence) for chart in group}


def texts_in(chart: Chart) -> list[str]:
    return ["".join(one.itertext()).strip() for one in parsed(chart).iter("{http://www.w3.org/2000/svg}text")]


def parsed(chart: Chart) -> ET.Element:
    return ET.fromstring(standalone(chart))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Forty pairs with scores and sources, two annotators."""
    scores = [{"score_chosen": float(n % 5), "score_rejected": 2.0, "source": f"from {n % 3}"} for n in range(40)]
    rows = [row(n, **scores[n]) for n in range(40)]
    return make_run(tmp_path_factory.mktemp("figures"), rows, answer, annotators=("a", "b"))


@pytest.fixture(scope="module")
def evidence(run: Run) -> Evidence:
    return read_evidence(run)


@pytest.fixture(scope="module")
def told(evidence: Evidence) -> dict[str, Chart]:
    """All charts of the run by name, in order."""
    return {chart.name: chart for chart in all_charts(evidence)}


# What is counted


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The cat's 2nd_life, THE end!", ["the", "cat", "s", "2nd_life", "the", "end"]),
        ("Straße “Äpfel”", ["strasse", "äpfel"]),
        ("我爱AI模型", ["我", "爱", "ai", "模", "型"]),
        ("… !? —", []),
        ("", []),
    ],
)
def test_words_are_told_apart_without_regard_to_case(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_both_ways_to_find_words_agree_on_ascii() -> None:
    text = "".join(chr(n) for n in range(128)) + " Mixed_Case don't 3.14\tend"
    assert words(text) == words(text + " ä")[:-1]


def test_features_are_what_counting_by_hand_gives(evidence: Evidence) -> None:
    texts = read_texts(evidence)
    assert texts.unit == "words"
    assert "names no student" in texts.counted
    assert texts.length["prompt"].tolist() == [3 + n for n in range(40)]
    assert texts.delta_i.tolist() == [5 + 2 * n - (40 - n) for n in range(40)]
    assert texts.total("rejected").tolist() == [43.0] * 40
    assert texts.diversity["chosen"][10] == 7 / 25
    # prompts have the words a0 … a6, as far as they go; so have rejected responses, and chosen ones have none of them
    assert texts.overlap["chosen"].tolist() == [0.0] * 40
    assert texts.overlap["rejected"][:5].tolist() == [3 / 7, 4 / 7, 5 / 7, 6 / 7, 1.0]
    assert texts.score_gap_i is not None
    assert texts.score_gap_i.tolist() == [n % 5 - 2.0 for n in range(40)]


def test_all_messages_of_a_conversation_count(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    evidence = evidence_of(tmp_path, [{**row(0), "prompt": [*turns, {"role": "user", "content": "four two"}]}])
    texts = read_texts(evidence)
    assert texts.length["prompt"].tolist() == [5]
    assert texts.diversity["prompt"].tolist() == [4 / 5]


def test_features_follow_the_rows_of_the_schedule(tmp_path: Path) -> None:
    """Every third pair was not answered, so that rows of the schedule are not those of the pairs."""

    def some(n: int, annotator: str, variant: str) -> str:
        return "" if n % 3 == 0 else answer(n, annotator, variant)

    evidence = evidence_of(tmp_path, [row(n) for n in range(30)], answer=some)
    assert read_texts(evidence).length["prompt"].tolist() == [3 + n for n in range(30) if n % 3]


def test_of_very_much_text_every_nth_pair_is_read(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(evidence.pairs[side].nbytes for side in ("prompt", "chosen", "rejected"))
    monkeypatch.setitem(MOST_CHARACTERS, "words", size // 3 + 1)
    texts = read_texts(evidence)
    assert texts.row_i.tolist() == list(range(0, 40, 3))
    assert texts.length["prompt"].tolist() == [3 + n for n in range(0, 40, 3)]
    assert len(texts.score["chosen"]) == 14
    assert "14 of 40 scheduled pairs, evenly spaced" in of_data(evidence)["length-prompt"].caption


def put_tokenizer(path: Path) -> None:
    """One that splits at white space only, and would cut after two tokens if it were let."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=500)
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def with_student(run: Run, model: str, **train: Any) -> Evidence:
    settings = run.process.settings
    student = {"model": model, "revision": "0" * 40}
    other = type(settings).model_validate(settings.model_dump() | {"student": student, "train": train})
    return read_evidence(replace(run, process=replace(run.process, settings=other)))


def test_tokens_of_the_toy_are_counted_where_the_run_has_it(tmp_path: Path) -> None:
    hyphens = [{**row(n), "chosen": conversation("assistant", n + 1, "semi-colon's ")} for n in range(3)]
    run = make_run(tmp_path, hyphens, answer, methods=("sp2dpo",))
    before = read_texts(read_evidence(run))
    assert (before.unit, before.length["chosen"].tolist()) == ("words", [4, 8, 12])
    assert "(toy) is not on this machine" in before.counted
    put_tokenizer(run.path / "student" / "tokenizer.json")
    after = read_texts(read_evidence(run))
    assert (after.unit, after.length["chosen"].tolist()) == ("tokens", [2, 4, 6])


def test_tokens_of_a_local_student_are_counted(run: Run) -> None:
    put_tokenizer(run.process.base / "my-student" / "tokenizer.json")
    texts = read_texts(with_student(run, "my-student"))
    assert texts.unit == "tokens"
    assert texts.length["prompt"].tolist() == [3 + n for n in range(40)]


def test_a_student_of_the_hub_is_counted_from_its_cache_only(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert read_texts(with_student(run, "org/student")).unit == "words"
    put_tokenizer(tmp_path / "models--org--student" / "snapshots" / ("0" * 40) / "tokenizer.json")
    assert read_texts(with_student(run, "org/student")).unit == "tokens"


def test_a_broken_tokenizer_is_told_and_words_are_counted(run: Run) -> None:
    folder = run.process.base / "broken"
    folder.mkdir()
    (folder / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    texts = read_texts(with_student(run, "broken"))
    assert texts.unit == "words"
    assert "tokenizer.json of the student (broken) cannot be read" in texts.counted


@pytest.mark.parametrize("names", [("score_chosen", "score_rejected"), ("chosen-rating", "rejected-rating")])
def test_scores_are_known_by_the_names_that_sources_use(tmp_path: Path, names: tuple[str, str]) -> None:
    texts = read_texts(evidence_of(tmp_path, [row(n, **{names[0]: n, names[1]: 1}) for n in range(3)]))
    assert texts.scored_by == names
    assert texts.score["chosen"].tolist() == [0, 1, 2]


def test_scores_that_are_missing_or_no_numbers_are_left_out(tmp_path: Path) -> None:
    some = evidence_of(
        tmp_path / "some", [row(n, score_chosen=None if n == 2 else n + 0.5, score_rejected=1.0) for n in range(4)]
    )
    chart = of_data(some)["score-gap-length-delta"]
    assert "3 pairs have both; in 1 the chosen response scores lower" in chart.caption
    text = evidence_of(tmp_path / "text", [row(n, score_chosen="good", score_rejected="bad") for n in range(4)])
    assert "score-gap-length-delta" not in of_data(text)
    never = evidence_of(
        tmp_path / "never", [row(n, score_chosen=1 if n else None, score_rejected=None if n else 2) for n in range(4)]
    )
    assert "no columns such as score_chosen and score_rejected" in of_data(never)["length-chosen-rejected"].caption


# What is told


def numbers(text: str) -> list[float]:
    return [float(one.replace(",", "").replace("−", "-")) for one in re.findall(r"[+−]?\d[\d,]*(?:\.\d+)?", text)]


def test_the_lengths_told_are_those_counted_again(told: dict[str, Chart]) -> None:
    prompt = np.arange(40) + 3
    assert f"{np.median(prompt):.0f}, 99th percentile {np.percentile(prompt, 99):.0f}, longest 42." in (
        told["length-prompt"].alt
    )
    both = np.concatenate([8 + 3 * np.arange(40), np.full(40, 43)])
    assert f"80 values: median {np.median(both):.0f}," in told["length-prompt-either-response"].alt
    delta = 3 * np.arange(40) - 35
    assert f"longer in {(delta > 0).mean():.1%} of the pairs" in told["length-delta"].alt
    assert f"median +{np.median(delta)}, mean +{delta.mean()}" in told["length-delta"].alt


def test_the_limits_of_training_are_told_in_tokens_only(run: Run) -> None:
    put_tokenizer(run.process.base / "limited" / "tokenizer.json")
    limits = {"max_prompt_length": 12, "max_length": 100}
    told = of_data(with_student(run, "limited", **limits))
    prompt, total = np.arange(40) + 3, 8 + 3 * np.arange(40)
    n, m = (prompt > 12).sum(), (total > 100).sum()
    assert f"Training cuts {n} of 40 ({n / 40:.1%}) at max_prompt_length 12." in told["length-prompt"].alt
    assert f"Training cuts {m} of 40 ({m / 40:.1%}) at max_length 100." in told["length-prompt-chosen"].caption
    assert "max_length 100" in texts_in(told["length-prompt-chosen"])
    assert "max_prompt_length" not in of_data(with_student(run, "elsewhere/not-here", **limits))["length-prompt"].alt


def test_rank_correlations_are_those_of_scipy(evidence: Evidence, told: dict[str, Chart]) -> None:
    texts = read_texts(evidence)
    found = {one.name: one for one in followed(evidence.beta_i, features(texts))}
    for name, column in features(texts).items():
        if np.ptp(column) == 0:
            assert np.isnan(found[name].rho)
        else:
            assert found[name].rho == pytest.approx(stats.spearmanr(evidence.beta_i, column).statistic)
    one = found["score, chosen"]
    half = 1.96 * np.sqrt((1 + one.rho**2 / 2) / 37)
    assert np.arctanh([one.low, one.high]) == pytest.approx([np.arctanh(one.rho) - half, np.arctanh(one.rho) + half])
    assert f"score, chosen {one.rho:.2f}" in told["beta-features"].alt.replace("−", "-")


def test_the_heatmap_shows_each_correlation_in_hundredths(evidence: Evidence, told: dict[str, Chart]) -> None:
    columns = features(read_texts(evidence))
    names = list(columns)
    expected = []
    for n, one in enumerate(names):
        for other in names[:n]:
            constant = np.ptp(columns[one]) == 0 or np.ptp(columns[other]) == 0
            rho = None if constant else stats.spearmanr(columns[one], columns[other]).statistic
            expected.append("–" if rho is None else str(round(100 * rho)).replace("-", "−"))
    shown = [text for text in texts_in(told["correlations"]) if re.fullmatch(r"–|−?\d+", text)]
    assert sorted(shown) == sorted(expected)


def test_what_lengths_explain_of_beta_is_the_adjusted_share_of_a_regression_on_ranks() -> None:
    random = np.random.default_rng(0)
    x = random.random((200, 2))
    y = x @ (1, 2) + random.normal(0, 0.5, 200)
    ranks = np.stack([np.ones(200), *(stats.rankdata(column) for column in x.T)], 1)
    rest = stats.rankdata(y) - ranks @ np.linalg.solve(ranks.T @ ranks, ranks.T @ stats.rankdata(y))
    expected = 1 - (rest**2).sum() / 197 / np.var(stats.rankdata(y), ddof=1)
    assert explained(y, list(x.T)) == pytest.approx(expected)
    assert explained(y, [*x.T, x[:, 0]]) == pytest.approx(expected)
    assert explained(y[:29], list(x[:29].T)) is None
    assert explained(np.full(200, 0.1), list(x.T)) is None
    assert explained(random.random(200), [random.random(200)]) < 0.05


@pytest.mark.parametrize(("follows", "verdict"), [(True, "β is largely length"), (False, "β is no proxy of length")])
def test_beta_that_is_length_is_called_so(tmp_path: Path, follows: bool, verdict: str) -> None:
    magnitude = np.random.default_rng(1).random(60)

    def judge(n: int, annotator: str, variant: str) -> str:
        return judged("Style", round(n / 60 if follows else magnitude[n], 4), 1.0)

    evidence = evidence_of(tmp_path, [row(n % 60) for n in range(60)], answer=judge)
    assert verdict in of_data(evidence)["beta-features"].caption


def test_sources_are_named_with_their_median_beta(evidence: Evidence, told: dict[str, Chart]) -> None:
    chart = told["beta-by-source"]
    for n in range(3):
        of = evidence.beta_i[[int(name[1:]) % 3 == n for name in evidence.schedule["prompt_id"].to_pylist()]]
        assert f"from {n}: {np.median(of):.3f} (n = {len(of)})" in chart.alt


def test_many_sources_are_gathered_and_one_alone_is_not_drawn(tmp_path: Path) -> None:
    many = evidence_of(tmp_path / "many", [row(n, source=f"s{min(n, 11)}" if n else None) for n in range(30)])
    chart = charts.source_chart(many)
    assert chart is not None
    assert "(all others): " in chart.alt
    assert sum(int(n) for n in re.findall(r"n = (\d+)", chart.alt)) == 30
    assert charts.source_chart(evidence_of(tmp_path / "one", [row(n, source="s") for n in range(3)])) is None


def schedule(evidence: Evidence, **changes: Any) -> Evidence:
    settings = evidence.run.process.settings
    other = settings.model_copy(update={"schedule": settings.schedule.model_copy(update=changes)})
    return replace(evidence, run=replace(evidence.run, process=replace(evidence.run.process, settings=other)))


def test_the_policy_is_drawn_with_the_envelopes_of_the_process(evidence: Evidence) -> None:
    plain = charts.policy_chart(evidence)
    assert "Envelope: envelope: 0.03 to 0.3." in plain.alt
    assert "All pairs lie on the line" in plain.caption
    assert numbers(plain.alt)[3:6] == pytest.approx(np.quantile(evidence.gap_i, (0.25, 0.5, 0.75)), abs=5e-4)
    own = schedule(evidence, envelopes={"Style": Envelope(beta_min=0.05, beta_max=0.5)})
    style = evidence.category_i == "Style"
    chart = charts.policy_chart(own)
    assert "all others: 0.03 to 0.3; Style: 0.05 to 0.5" in chart.alt
    assert f"{style.sum()} of 40 pairs lie off the line of their envelope" in chart.caption
    assert {"all others", "Style"} <= set(texts_in(chart))
    assert "0.5" in texts_in(charts.beta_chart(own))


# What is drawn


def test_hexagons_count_every_point_once() -> None:
    random = np.random.default_rng(2)
    x, y = random.normal(0, 40, 61_023), random.exponential(3, 61_023)
    centres, counts = hexagons.hexagons(x, y, (-100, 100), (0, 10))
    inside = (np.abs(x) <= 100) & (y <= 10)
    assert counts.sum() == inside.sum()
    assert len(np.unique(centres, axis=0)) == len(centres) <= 2 * 20 * 12


def test_a_point_lies_in_the_hexagon_whose_centre_is_nearest() -> None:
    random = np.random.default_rng(3)
    points = random.random((500, 2))
    every, _ = hexagons.hexagons(*random.random((2, 100_000)), (0, 1), (0, 1))
    scale = np.array([1, np.sqrt(3)]) / hexagons.steps((0, 1), (0, 1))
    for x, y in points:
        ((centre,), counts) = hexagons.hexagons(np.array([x]), np.array([y]), (0, 1), (0, 1))
        distance = np.linalg.norm((every - (x, y)) * scale, axis=1)
        assert np.linalg.norm((centre - (x, y)) * scale) == pytest.approx(distance.min())
        assert counts.tolist() == [1]


@pytest.mark.parametrize("most", [1, 2, 3, 5, 17, 61_023])
def test_the_key_of_the_hexagons_covers_every_count_once(most: int) -> None:
    ranges = hexagons.levels(most)
    assert (ranges[0][0], ranges[-1][1]) == (1, most)
    assert all(high + 1 == low for (_, high), (low, _) in pairwise(ranges))
    assert 1 <= len(ranges) <= 5


def drawn_hexagons(svg: str) -> int:
    """Closed shapes of seven points."""
    return len(re.findall(r"M [^MLz]*(?:L [^MLz]*){5,6}z", svg))


def test_the_chart_draws_as_many_hexagons_as_hold_a_point() -> None:
    random = np.random.default_rng(4)
    x, y = random.random((2, 5000))
    _, counts = hexagons.hexagons(x, y, (0, 1), (0, 1))
    assert drawn_hexagons(figures.density("d", x, y, ("x", "y"), (0, 1), (0, 1))) == len(counts)


def test_few_pairs_are_dots_and_many_are_hexagons_of_bounded_size() -> None:
    random = np.random.default_rng(5)
    few = figures.joint("few", *random.random((2, figures.MOST_POINTS)), "x", "y")
    many = figures.joint("many", *random.random((2, 61_023)), "x", "y")
    assert (drawn_hexagons(few), few.count("<use")) > (0, figures.MOST_POINTS - 1)
    assert drawn_hexagons(many) > 300
    assert max(len(few), len(many)) < LARGEST


def test_a_value_beyond_the_axis_is_named_with_an_arrow(tmp_path: Path) -> None:
    rows = [row(0) | {"prompt_id": f"p{n}"} for n in range(300)]
    for n, one in enumerate(rows):
        one["prompt"] = conversation("user", 5000 if n == 7 else 10 + n % 20, "w")
    told = of_data(evidence_of(tmp_path, rows))
    assert "longest 5,000 →" in texts_in(told["length-prompt"])
    assert "longest 5,000." in told["length-prompt"].alt


# Whatever comes


def one_pair(n: int) -> list[dict[str, Any]]:
    return [row(n)]


DEGENERATE = {
    "one pair": one_pair(3),
    "two pairs": [row(3), row(4)],
    "all of one length": [
        {**row(7), "prompt_id": f"p{n}", "prompt": conversation("user", 5, f"x{n}"), "source": "s"} for n in range(5)
    ],
    "no words": [
        {
            "prompt_id": f"p{n}",
            "prompt": [{"role": "user", "content": "?" * (n + 1)}],
            "chosen": [{"role": "assistant", "content": "!" * (n + 1)}],
            "rejected": [{"role": "assistant", "content": "…" * (n + 1)}],
        }
        for n in range(4)
    ],
    "hostile": [pair(n, HOSTILE, source=f"{HOSTILE[:60]}{n} $x_1$ var(--x) #010203", score_chosen=n) for n in range(4)],
    "scores without an end": [
        row(n, score_chosen=1e300 if n else float("inf"), score_rejected=-1e300) for n in range(4)
    ],
}


@pytest.mark.parametrize("case", DEGENERATE)
def test_every_chart_is_drawn_of_whatever_data(tmp_path: Path, case: str) -> None:
    several = {} if case == "one pair" else {"annotators": ("a", "b")}
    evidence = evidence_of(tmp_path, DEGENERATE[case], variants=("v1", "v2") if several else ("v1",), **several)
    drawn = all_charts(evidence)
    assert len({chart.name for chart in drawn}) == len(drawn)
    for chart in drawn:
        assert len(parsed(chart)) > 2
        assert len(chart.svg) < LARGEST
        assert len(chart.alt) > 40
        assert not re.search(r"\bnan\b|\binf\b", chart.alt + chart.caption)
        assert not re.search(r"#0102|var\(--", standalone(chart).replace("var(--x)", "").replace("#010203", ""))


def test_missing_cells_are_left_out_of_every_chart(run: Run, evidence: Evidence) -> None:
    gap = evidence.gap_ijk.copy()
    gap[:, 0, 0] = np.nan
    gap[5:, 1, 1] = np.nan
    holes = replace(
        evidence,
        gap_ijk=gap,
        gap_ij=np.where(np.arange(40)[:, None] % 2, evidence.gap_ij, np.nan),
        disagreement_ij=np.where([True, False], evidence.disagreement_ij, np.nan),
    )
    told = {chart.name: chart for chart in policy_charts(holes)}
    assert "agreement-a+v1+v2" not in told
    assert "5 pairs" in told["agreement-b+v1+v2"].alt
    assert "20 pairs" in told["agreement-medians+a+b"].alt
    assert "disagreement-b" not in told
    assert not any(re.search(r"\bnan\b", chart.alt + chart.caption) for chart in told.values())


def test_names_of_a_source_cannot_leave_their_text(tmp_path: Path) -> None:
    evil = '</text></svg><script>alert(1)</script>" onload="x'
    chart = charts.source_chart(evidence_of(tmp_path, [row(n, source=evil[n:]) for n in range(2)]))
    assert chart is not None
    assert "<script" not in chart.svg
    assert {one.tag.rpartition("}")[2] for one in parsed(chart).iter()} <= {
        *("svg", "title", "desc", "rect", "g", "path", "defs", "use", "clipPath", "text"),
    }


# On paper and as files


def rgb(colour: str) -> np.ndarray[Any, Any]:
    return np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)]) / 255


def luminance(colour: np.ndarray[Any, Any]) -> float:
    linear = np.where(colour <= 0.03928, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_can_be_read_on_every_shade_of_the_heatmap(scheme: str) -> None:
    css = resources.files("sp2dpo.report").joinpath("style.css").read_text(encoding="utf-8")
    variables = dict(re.findall(r"(--[\w-]+):\s*(#[0-9a-f]{6})", css[: css.index("@media")]))
    if scheme == "dark":
        dark = css[css.index("prefers-color-scheme: dark") :]
        variables |= dict(re.findall(r"(--[\w-]+):\s*(#[0-9a-f]{6})", dark[: dark.index("} }")]))
    svg = figures.heatmap("h", ["a", "b", "c"], np.array([[np.nan] * 3, [0.99, np.nan, np.nan], [-0.99, 0.3, np.nan]]))
    shades = re.findall(r"fill: var\((--accent|--wrong)\); opacity: ([\d.]+)", svg)
    assert len(shades) == 3
    for colour, alpha in shades:
        behind = float(alpha) * rgb(variables[colour]) + (1 - float(alpha)) * rgb(variables["--paper"])
        bright, dim = sorted([luminance(behind), luminance(rgb(variables["--ink"]))], reverse=True)
        assert (bright + 0.05) / (dim + 0.05) >= 4.5


def test_the_same_run_gives_the_same_bytes(run: Run, told: dict[str, Chart]) -> None:
    again = all_charts(read_evidence(run))
    assert [standalone(chart) for chart in again] == [standalone(chart) for chart in told.values()]
    assert len(again) > 25


def test_figures_are_written_in_order_and_stale_ones_go(run: Run, told: dict[str, Chart]) -> None:
    drawn = list(told.values())
    folder = run.path / "figures"
    folder.mkdir(exist_ok=True)
    (folder / "99-old.svg").write_text("<svg/>", encoding="utf-8")
    (folder / "mine.svg").write_text("<svg/>", encoding="utf-8")
    paths = write_figures(run, drawn)
    assert [path.name[:3] for path in paths] == [f"{n:02}-" for n in range(1, len(drawn) + 1)]
    assert {path.name for path in folder.iterdir()} == {"mine.svg", *(path.name for path in paths)}
    assert "01-beta.svg" in {path.name for path in paths}
    for path, chart in zip(paths, drawn, strict=True):
        root = ET.parse(path).getroot()
        named = {one.tag.rpartition("}")[2]: one.text for one in root}
        assert (named["title"], named["desc"]) == (chart.caption, chart.alt)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


@needs_chromium
def test_a_figure_alone_in_a_browser_shows_its_text_within_its_edges(
    run: Run, told: dict[str, Chart], browser: Any
) -> None:
    seen = """() => [...document.querySelectorAll('text')].map(t => {
      const box = t.getBoundingClientRect(), all = document.documentElement.getBoundingClientRect();
      return [t.textContent.trim(), getComputedStyle(t).fill, box.width > 1 && box.height > 3
        && box.left >= all.left - 1 && box.right <= all.right + 1 && box.top >= all.top - 1
        && box.bottom <= all.bottom + 1]; })"""
    overlapping = """() => {
      const boxes = [...document.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
      return boxes.flatMap(([a, p], n) => boxes.slice(n + 1).filter(([b, q]) => p.left < q.right - 1
        && q.left < p.right - 1 && p.top < q.bottom - 3 && q.top < p.bottom - 3).map(([b]) => a + ' / ' + b)); }"""
    page = browser.new_page(viewport={"width": 800, "height": 700}, color_scheme="dark")
    for path in write_figures(run, list(told.values())):
        page.goto(path.as_uri())
        texts = page.evaluate(seen)
        assert len(texts) > 3, path
        assert [one for one in texts if not one[2]] == [], path
        assert {fill for _, fill, _ in texts} <= {"rgb(27, 31, 36)", "rgb(84, 92, 102)"}, path
        assert page.evaluate(overlapping) == [], path
    page.close()
