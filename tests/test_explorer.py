"""What the page packs for its list of all pairs, against the arrays that it is made from; the steps of β in words."""

from __future__ import annotations

import base64
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import Sp2dpo
from report_runs import HOSTILE, judged, make_run, pair
from sp2dpo.errors import InputError
from sp2dpo.evidence import read_evidence
from sp2dpo.report.build import build_report
from sp2dpo.report.cards import visible
from sp2dpo.report.pipeline import NO_ANSWER, number, pipeline_of, worked
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import Run

ARRAYS = {"u1": np.uint8, "u2": np.uint16, "u4": np.uint32, "f4": np.float32}


def unpacked(html: str) -> dict[str, bytes]:
    """The content of every data block."""
    blocks = re.findall(r'<script type="application/octet-stream;base64" id="data-([\w-]+)">([^<]*)</script>', html)
    return {name: zlib.decompress(base64.b64decode(content, validate=True)) for name, content in blocks}


class Packed:
    """What a page holds, read back."""

    def __init__(self, run: Run, max_mb: float = 20) -> None:
        self.html = build_report(run.path, max_mb).read_text(encoding="utf-8")
        self.blocks = unpacked(self.html)
        self.facts = self.json("facts")

    def json(self, name: str) -> Any:
        return json.loads(self.blocks[name])

    def column(self, name: str) -> Any:
        described = self.json("columns")[name]
        codes = np.frombuffer(self.blocks[name], ARRAYS[described["type"]])
        if described["values"] is None:
            return codes
        return np.array([np.nan if one is None else one for one in described["values"]])[codes]

    @property
    def records(self) -> list[Any]:
        chunks = sorted((name for name in self.blocks if name.startswith("texts-")), key=lambda one: int(one[6:]))
        return [record for name in chunks for record in self.json(name)]


def varied(n: int, annotator: str, variant: str) -> str:
    """Judgements that differ by pair, annotator and prompt; those of pair 3 lack one answer."""
    if (n, annotator, variant) == (3, "b", "v2"):
        return ""
    magnitude = (7 * n + 3 * ord(annotator[0]) + 5 * int(variant[1])) % 20 / 20
    return judged(CATEGORIES[(n + int(variant[1]) * (annotator == "b")) % 6], magnitude, 0.4 + int(variant[1]) / 10)


def small(tmp_path: Path, n: int = 8, text: str = "", schedule: dict[str, Any] | None = None, **own: Any) -> Run:
    names = {"annotators": ("a", "b", "c"), "variants": ("v1", "v2", "v3")}
    rows = [pair(i, text, **own) for i in range(n)]
    return make_run(tmp_path, rows, varied, **names, schedule={"min_calls": 8} | (schedule or {}))


def test_every_judgement_of_every_pair_is_in_the_page_to_the_last_bit(tmp_path: Path) -> None:
    run = small(tmp_path)
    evidence, packed = read_evidence(run), Packed(run)
    assert packed.facts["n"] == 8
    for name, array in {"magnitude": evidence.magnitude_ijk, "confidence": evidence.confidence_ijk}.items():
        np.testing.assert_array_equal(packed.column(name), array.ravel())
    names = np.array([*CATEGORIES, None], object)[np.minimum(packed.column("call_category"), 6)]
    assert names.tolist() == evidence.category_ijk.ravel().tolist()
    assert (packed.column("call_category") == 255).sum() == 1
    np.testing.assert_array_equal(packed.column("beta"), evidence.beta_i)
    np.testing.assert_array_equal(packed.column("gap_j"), evidence.gap_ij.ravel())
    np.testing.assert_array_equal(packed.column("tie_j").astype(bool), evidence.tie_ij.ravel())
    keys = packed.column("key").reshape(-1, 6)
    assert [bytes(key).hex() for key in keys] == [one[:12] for one in evidence.pair_ids]


def test_a_call_that_was_not_simply_answered_says_what_came_before(tmp_path: Path) -> None:
    def answer(n: int, annotator: str, variant: str) -> str:
        text = judged("Style", 0.5, 0.9)
        return {(1, "v2"): f"```json\n{text}\n```", (2, "v3"): "no idea"}.get((n, variant), text)

    run = make_run(tmp_path, [pair(n) for n in range(3)], answer, schedule={"min_calls": 2})
    assert Packed(run).facts["odd"] == {"4": "mended: code_fence", "8": "no_object, attempt 1"}


def test_all_texts_are_whole_where_they_fit(tmp_path: Path) -> None:
    run = small(tmp_path, text=HOSTILE, own="value", many=[1, 2])
    packed, evidence = Packed(run), read_evidence(run)
    assert packed.facts["texts"]["whole"] == 8
    for record, row in zip(packed.records, evidence.pairs.to_pylist(), strict=True):
        assert record[:2] == [row["pair_id"], row["prompt_id"]]
        for shown, side in zip(record[2:5], ("prompt", "chosen", "rejected"), strict=True):
            assert shown == [0, row[side][0]["role"], visible(row[side][0]["content"])]
        assert record[5] == {"source_row": row["source_row"], "own": "value", "many": "[1, 2]"}


def noise(n: int) -> str:
    """Text that hardly compresses, as that of many different pairs does not."""
    return np.random.default_rng(n).bytes(3000).hex()


def test_the_page_keeps_to_its_size_and_says_how_much_it_holds(tmp_path: Path) -> None:
    def answer(n: int, annotator: str, variant: str) -> str:
        return judged("Style", 0.5, 0.1 if n == 399 else 0.9)

    rows = [pair(n, noise(n)) for n in range(1200)]
    run = make_run(tmp_path, rows, answer, variants=("v1",))
    all_texts = len(Packed(run, 100).html.encode()) / 1e6
    assert all_texts > 5
    packed = Packed(run, 3)
    texts = packed.facts["texts"]
    held = [sum(side[0] for side in record[2:5]) == 0 for record in packed.records]
    assert 2.6e6 < len(packed.html.encode()) <= 3e6
    assert 100 < sum(held) == texts["whole"] < 1200
    assert held[399], "the likely label error"
    assert 0.9 * all_texts < texts["all_mb"] < 1.5 * all_texts
    for n, record in enumerate(packed.records):
        if not held[n]:
            left, role, shown = record[3]
            assert (role, len(shown)) == ("assistant", texts["excerpt"])
            assert left + len(shown) == len(f"Good answer {n} {noise(n)}")


def test_a_conversation_is_cut_as_a_whole_and_one_huge_pair_does_not_push_out_the_others(tmp_path: Path) -> None:
    talk = [
        {"role": role, "content": "".join(map(noise, range(n, n + 60)))}
        for n, role in enumerate(("user", "assistant", "user"))
    ]
    rows = [pair(0) | {"prompt": talk}, *(pair(n, noise(n)) for n in range(1, 60))]
    packed = Packed(make_run(tmp_path, rows, variants=("v1",)), 1.2)
    assert packed.facts["texts"]["whole"] == 59
    excerpt = packed.facts["texts"]["excerpt"]
    assert packed.records[0][2] == [3 * 360_000 - excerpt, "user", talk[0]["content"][:excerpt]]


def test_a_bound_below_what_the_judgements_take_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    run = small(tmp_path)
    with pytest.raises(
        InputError, match=r"even without the texts of the pairs, and --max-mb is 0.1; give \d+\.\d or"
    ) as told:
        build_report(run.path, 0.1)
    enough = float(re.findall(r"give ([\d.]+)", str(told.value))[0])
    assert build_report(run.path, enough).stat().st_size <= enough * 1e6


def test_the_bound_is_an_option_of_the_command(tmp_path: Path, sp2dpo: Sp2dpo) -> None:
    run = small(tmp_path)
    refused = sp2dpo("report", run.path, "--max-mb", "0.1")
    assert (refused.code, "--max-mb is 0.1; give" in refused.err) == (2, True)
    assert sp2dpo("report", run.path, "--max-mb", 2).code == 0


def test_long_ids_are_cut_where_they_are_listed_and_whole_where_the_pair_is(tmp_path: Path) -> None:
    own = "0123456789abcdef" * 4
    run = make_run(tmp_path, [pair(0) | {"prompt_id": own}, pair(1)])
    packed = Packed(run)
    assert packed.json("openings")["ids"] == [own[:16], "p1"]
    assert packed.records[0][1] == own


def test_a_number_that_a_browser_would_change_is_kept_as_text(tmp_path: Path) -> None:
    run = make_run(tmp_path, [pair(n, big=2**60 + 1, ratio=float("nan"), flag=True, half=0.5) for n in range(2)])
    assert Packed(run).records[0][5] == {
        "source_row": 0, "big": str(2**60 + 1), "ratio": "nan", "flag": True, "half": 0.5,
    }  # fmt: skip


# How β was made

SETTINGS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "mean over prompts": {"over_prompts": "mean"},
    "weighted prompts": {"over_prompts": "mean", "prompt_weights": {"v1": 2, "v2": 1, "v3": 0.5}},
    "weighted annotators": {"annotator_weights": {"a": 3, "b": 1, "c": 0.5}},
    "median over annotators": {"over_annotators": "median"},
    "trimmed": {"over_annotators": "trimmed_mean", "trim": 0.34},
    "huber": {"over_annotators": "huber", "huber_delta": 0.05},
    "exponential damping": {"damping": {"strength": 2.0, "form": "exponential"}},
    "rational damping": {"damping": {"strength": 2.0, "form": "rational"}},
    "debiased": {"debias": 1.0},
    "pooled": {"over_calls": "mean", "annotator_weights": {"a": 3, "b": 1, "c": 0.5}},
    "median of all": {"over_calls": "median", "debias": 0.5},
    "envelopes": {"envelopes": {"Safety": {"beta_min": 0.1, "beta_max": 0.5}}, "beta_max": 0.2},
}
"""One for each operator of the schedule."""

WORDS = {
    "the paper's": [
        "magnitude × confidence",
        "Median over the prompt",
        "Envelope",
        "Mean over the annotators (3) (eq. 17)",
    ],
    "mean over prompts": [
        "magnitude",
        "Mean over the prompt variants (3), for each annotator (eq. 41)",
        "Envelope",
        "Mean",
    ],
    "weighted prompts": ["magnitude", "Weighted mean over the prompt", "Envelope", "Mean"],
    "weighted annotators": ["magnitude", "Median", "Envelope", "Weighted mean over the annotators (3) (eq. 42)"],
    "median over annotators": ["magnitude", "Median", "Envelope", "Median over the annotators"],
    "trimmed": ["magnitude", "Median", "Envelope", "Mean without 0.34 at each end over the annotators"],
    "huber": ["magnitude", "Median", "Huber mean (δ = 0.05) over the annotators", "Envelope"],
    "exponential damping": ["magnitude", "Median", "Less where the prompts disagree", "Envelope", "Mean"],
    "rational damping": ["magnitude", "Median", "Less where the prompts disagree", "Envelope", "Mean"],
    "debiased": [
        "magnitude",
        "Offsets of annotators and prompts taken out (eq. 44, ridge 1)",
        "Median",
        "Envelope",
        "Mean",
    ],
    "pooled": ["magnitude", "Weighted mean over all judgements of the pair at once (eq. 43)", "Envelope"],
    "median of all": ["magnitude", "Offsets", "Median over all judgements of the pair at once", "Envelope"],
    "envelopes": ["magnitude", "Median", "bounds of the pair's category", "Mean"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_steps_are_those_that_the_process_names(tmp_path: Path, name: str) -> None:
    run = small(tmp_path, schedule=SETTINGS[name])
    evidence = read_evidence(run)
    steps = worked(evidence, pipeline_of(evidence), 0)
    assert len(steps) == len(WORDS[name])
    for n, (step, words) in enumerate(zip(steps, WORDS[name], strict=True), start=1):
        assert step.title.startswith(f"{n}. ")
        assert words in step.title


def value(text: str) -> float:
    """What an expression of the report amounts to."""
    text = text.replace("−", "-").replace("×", "*").replace("·", "*").replace("exp", "np.exp")
    return float(eval(text, {"np": np}))


@pytest.mark.parametrize("name", SETTINGS)
def test_the_arithmetic_of_a_pair_is_right_line_by_line(tmp_path: Path, name: str) -> None:
    """Every line but those of robust means is computed again from its own numbers, to their last shown decimal."""
    run = small(tmp_path, schedule=SETTINGS[name])
    evidence = read_evidence(run)
    checked = 0
    for i in range(evidence.n):
        for step in worked(evidence, pipeline_of(evidence), i):
            for line in step.lines:
                if NO_ANSWER in line.partition(" = ")[0] and " of " not in line:
                    assert line.endswith(NO_ANSWER)
                    continue
                if " of " in line:
                    checked += centre_is_right(line)
                    continue
                left, _, right = re.sub(r"^.*: |^β = ", "", line).rpartition(" = ")
                assert value(left) == pytest.approx(value(right), abs=3e-4), line
                checked += 1
        assert worked(evidence, pipeline_of(evidence), i)[-1].lines[-1].endswith(f"= {number(evidence.beta_i[i])}")
    assert checked > 8 * 9


def centre_is_right(line: str) -> bool:
    """A mean or median of listed numbers; what is missing takes no part. Whether it was checked."""
    operator, _, rest = re.sub(r"^\w+: ", "", line).partition(" of ")
    listed, _, result = rest.rpartition(" = ")
    terms = [one.rpartition(" × ") for one in listed.split(", ") if NO_ANSWER not in one]
    numbers, weights = [value(one) for _, _, one in terms], [value(weight or "1") for weight, _, _ in terms]
    if operator in ("mean", "weighted mean"):
        expected = np.average(numbers, weights=weights)
    elif operator == "median":
        expected = np.median(numbers)
    else:
        return False
    assert value(result) == pytest.approx(float(expected), abs=3e-4), line
    return True


def test_the_example_of_the_page_is_the_pair_with_the_highest_beta(tmp_path: Path) -> None:
    run = small(tmp_path)
    evidence, html = read_evidence(run), Packed(run).html
    best = int(np.argmax(evidence.beta_i))
    for step in worked(evidence, pipeline_of(evidence), best):
        for line in step.lines:
            assert f"<dd>{line}</dd>" in html


def test_a_missing_cell_is_shown_as_no_answer(tmp_path: Path) -> None:
    run = small(tmp_path)
    evidence = read_evidence(run)
    lines = [line for step in worked(evidence, pipeline_of(evidence), 3) for line in step.lines]
    assert "b, v2: no answer × no answer = no answer" in lines
    assert any(line.startswith("b: median of") and NO_ANSWER in line for line in lines)
