"""Reading answers: each mend that is allowed is made and named, and nothing else is ever read as a gap."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sp2dpo import SemanticGap, parse_reply
from sp2dpo.reply import INVALID, KEYS, MENDS
from sp2dpo.rubric import CATEGORIES, CATEGORY_ALIASES

GAP = SemanticGap("Reasoning", 0.72, 0.95)
PLAIN = '{"semantic_gap_category": "Reasoning", "semantic_gap_magnitude": 0.72, "semantic_gap_confidence": 0.95}'


def answer(category: Any = "Reasoning", magnitude: Any = 0.72, confidence: Any = 0.95, **extra: Any) -> str:
    return json.dumps(dict(zip(KEYS, (category, magnitude, confidence), strict=True)) | extra)


def raw(magnitude: str) -> str:
    """An answer whose magnitude is written as it stands."""
    return PLAIN.replace("0.72", magnitude)


# Mends --------------------------------------------------------------------------------------------------------------


def test_a_plain_object_needs_no_mend() -> None:
    assert parse_reply(PLAIN).gap == GAP
    assert parse_reply(PLAIN).mends == ()


@pytest.mark.parametrize(
    ("text", "mends"),
    [
        (f"```json\n{PLAIN}\n```", ["code_fence"]),
        (f"```\n{PLAIN}```", ["code_fence"]),
        (f"```{PLAIN}```\n\n", ["code_fence"]),
        (f"Here it is: {PLAIN}", ["prose"]),
        (f"{PLAIN}\nI hope this helps.", ["prose"]),
        (f"\ufeff{PLAIN}", ["prose"]),
        (f'The "semantic_gap_category" was hard to choose.\n{PLAIN}', ["prose"]),
        (f"My answer:\n```json\n{PLAIN}\n```\nDone.", ["code_fence", "prose"]),
        (f"[{PLAIN}]", ["array_of_one"]),
        (f"[\n{PLAIN},\n]", ["array_of_one", "trailing_comma"]),
        (f"```json\n[{PLAIN}]\n```", ["code_fence", "array_of_one"]),
        (answer(rationale="Too short, {though} true."), ["extra_keys"]),
        (answer(nested={"a": [1, {"b": 2}]}), ["extra_keys"]),
        (answer(magnitude="0.72"), ["numeric_string"]),
        (answer(magnitude=" 7.2e-1 "), ["numeric_string"]),
        (PLAIN[:-1] + " , }", ["trailing_comma"]),
        (answer(why=[1])[:-2] + ",\n],}", ["trailing_comma", "extra_keys"]),
        (answer("reasoning"), ["category_alias"]),
        (answer(" REASONING\n"), ["category_alias"]),
        (answer("Reasoning  soundness"), ["category_alias"]),
    ],
)
def test_an_allowed_mend_is_made_and_named(text: str, mends: list[str]) -> None:
    parsed = parse_reply(text)
    assert parsed.gap == GAP
    assert sorted(parsed.mends) == sorted(mends)


def test_every_alias_is_read_as_its_category_in_any_case() -> None:
    for alias, category in CATEGORY_ALIASES.items():
        for spelling in (alias, alias.upper(), alias.title()):
            assert parse_reply(answer(spelling)).gap == SemanticGap(category, 0.72, 0.95)


def test_a_comma_inside_a_string_is_not_a_trailing_comma() -> None:
    parsed = parse_reply(answer(note=', } ,] "'))
    assert parsed.mends == ("extra_keys",)


@pytest.mark.parametrize(("number", "value"), [("0", 0.0), ("1", 1.0), ("1.0", 1.0), ("5e-2", 0.05), ("-0.0", 0.0)])
def test_the_ends_of_the_range_and_exponents_are_numbers(number: str, value: float) -> None:
    gap = parse_reply(raw(number)).gap
    assert gap is not None
    assert str(gap.magnitude) == str(value)


# Everything else is invalid -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "empty"),
        ("", "empty"),
        (" \n\t", "empty"),
        ("The gap is large.", "no_object"),
        ("{}", "no_object"),
        ('{"category": "Style"}', "no_object"),
        (PLAIN[:-1], "no_object"),
        (PLAIN.replace('"', "'"), "no_object"),
        (PLAIN.replace(", ", ", // why\n", 1), "no_object"),
        (PLAIN.replace(":", "=", 1), "no_object"),
        (PLAIN[:-1] + ",,}", "no_object"),
        (f'{{"answer": {PLAIN}}}', "no_object"),
        (f"[[{PLAIN}]]", "no_object"),
        (f"[1, {PLAIN}]", "no_object"),
        (f"[{PLAIN}, 1]", "no_object"),
        (f"[{PLAIN}", "no_object"),
        (f"{PLAIN}]", "no_object"),
        (json.dumps(PLAIN), "no_object"),
        (raw("00.5"), "no_object"),
        (raw(".5"), "no_object"),
        (raw("+0.5"), "no_object"),
        (raw("0,72"), "no_object"),
        (raw("½"), "no_object"),
        (raw("1" * 5000), "no_object"),
        ('{"a":' * 100_000, "no_object"),
        (PLAIN + PLAIN, "several_objects"),
        (f"[{PLAIN}, {PLAIN}]", "several_objects"),
        (f"```json\n{PLAIN}\n```\nor\n```json\n{PLAIN}\n```", "several_objects"),
        (PLAIN + "}", "several_objects"),
        (PLAIN + '\nCorrection: "semantic_gap_magnitude": 0.1', "several_objects"),
        ("semantic_gap_confidence = 0.2\n" + PLAIN, "several_objects"),
        (answer(revised=json.loads(answer("Safety"))), "several_objects"),
        (answer(history=[{"semantic_gap_magnitude": 0.1}]), "several_objects"),
        (PLAIN.replace(', "semantic_gap_confidence": 0.95', ""), "missing_key"),
        (PLAIN.replace("semantic_gap_confidence", "confidence"), "missing_key"),
        (PLAIN[:-1] + ', "semantic_gap_magnitude": 0.72}', "duplicate_key"),
        (PLAIN[:-1] + ', "a": 1, "a": 2}', "duplicate_key"),
        (answer("Honesty"), "unknown_category"),
        (answer("Safety, Style"), "unknown_category"),
        (answer("Safety|Style"), "unknown_category"),
        (answer(["Safety"]), "unknown_category"),
        (answer(None), "unknown_category"),
        (answer("\u017fafety"), "unknown_category"),
        (answer("S\u0430fety"), "unknown_category"),
        (raw("NaN"), "not_a_number"),
        (raw("-Infinity"), "not_a_number"),
        (answer(magnitude="NaN"), "not_a_number"),
        (answer(magnitude=True), "not_a_number"),
        (answer(magnitude=None), "not_a_number"),
        (answer(magnitude=[0.5]), "not_a_number"),
        (answer(magnitude=""), "not_a_number"),
        (answer(magnitude="high"), "not_a_number"),
        (answer(magnitude="50%"), "not_a_number"),
        (answer(magnitude="0,5"), "not_a_number"),
        (answer(magnitude="0_5"), "not_a_number"),
        (answer(magnitude="0.5 to 0.6"), "not_a_number"),
        (answer(magnitude="٠.٥"), "not_a_number"),
        (answer(magnitude="０.５"), "not_a_number"),
        (answer(magnitude="\u20280.5"), "not_a_number"),
        (raw("1.0000001"), "out_of_range"),
        (raw("-0.01"), "out_of_range"),
        (raw("72"), "out_of_range"),
        (raw("1e400"), "out_of_range"),
        (raw("1" + "0" * 400), "out_of_range"),
        (answer(confidence="1e999"), "out_of_range"),
    ],
)
def test_an_answer_that_needs_guessing_is_invalid(text: str | None, problem: str) -> None:
    parsed = parse_reply(text)
    assert parsed.gap is None
    assert parsed.problem == problem
    assert parsed.problem in INVALID
    assert parsed.mends == ()


# Corpora ------------------------------------------------------------------------------------------------------------

PROSE = ("Here you go:", "So: [see below]", 'It\'s "close", I think.', "½ – ok", "a, b", "# Answer", "1)")
EXTRAS = ({"rationale": "a } and a {, too"}, {"beta": 0.1}, {"n": [1, {"x": None}]})


def mended(rng: random.Random, gap: SemanticGap) -> tuple[str, set[str]]:
    """An answer that says `gap` under a random set of allowed mends, and the names of those mends."""
    mends = {name for name in MENDS if rng.random() < 0.4}
    category = gap.category
    if "category_alias" in mends:
        category = rng.choice([alias for alias, of in CATEGORY_ALIASES.items() if of == category])
    values = [json.dumps(category), repr(gap.magnitude), repr(gap.confidence)]
    if "numeric_string" in mends:
        values[1:] = [f'"{value}"' for value in values[1:]]
    items = [f'"{key}": {value}' for key, value in zip(KEYS, values, strict=True)]
    if "extra_keys" in mends:
        items += [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in rng.choice(EXTRAS).items()]
    rng.shuffle(items)
    text = "{" + rng.choice((", ", ",\n  ", ",")).join(items) + ("," if "trailing_comma" in mends else "") + "}"
    if "array_of_one" in mends:
        text = f"[{text}]"
    if "code_fence" in mends:
        text = f"```{rng.choice(('', 'json', 'JSON'))}\n{text}\n```"
    if "prose" in mends:
        text = f"{rng.choice(PROSE)}\n{text}\n{rng.choice(PROSE)}"
    return text, mends


def test_a_valid_answer_survives_every_combination_of_allowed_mends() -> None:
    rng = random.Random(0)
    for _ in range(5000):
        gap = SemanticGap(rng.choice(CATEGORIES), rng.randint(0, 100) / 100, rng.randint(0, 1000) / 1000)
        text, mends = mended(rng, gap)
        parsed = parse_reply(text)
        assert parsed.gap == gap, text
        assert set(parsed.mends) == mends, text


def strict(text: str) -> SemanticGap | None:
    """An independent reading: json.loads on what is left without fence, prose and array; or nothing."""
    body = text[text.find("{") : text.rfind("}") + 1]
    body = re.sub(r",(\s*})$", r"\1", body)
    try:
        value = json.loads(body, object_pairs_hook=lambda pairs: pairs, parse_constant=lambda name: [name])
    except (ValueError, RecursionError):
        return None
    found = [[v for k, v in value if k == key] for key in KEYS]
    if any(len(values) != 1 for values in found) or len(re.findall(r'semantic_gap_[a-z]+"?\s*[:=]', text)) != 3:
        return None
    category, *numbers = (values[0] for values in found)
    numbers = [float(n) if isinstance(n, str) and re.fullmatch(r" ?[0-9.eE+-]+ ?", n) else n for n in numbers]
    names = {c.lower(): c for c in CATEGORIES} | CATEGORY_ALIASES
    name = names.get(" ".join(str(category).lower().split()))
    if name is None or any(type(n) not in (int, float) or not 0 <= n <= 1 for n in numbers):
        return None
    return SemanticGap(name, abs(float(numbers[0])), abs(float(numbers[1])))


PIECES = (
    *"{}[]\":,\\.-+eE0123456789 \n\t'`/#",
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "true",
        "false",
        "null",
        "1e5",
        "1e-5",
        "1e999",
        "-0.3",
        "0.5",
        '"0.4"',
        "٣",
        "９",
        "½",
    ),
    *(
        "// no\n",
        "/* no */",
        "```",
        "```json\n",
        "{}",
        "[]",
        '{"a": 1}',
        '"x": 1,',
        ",,",
        ", }",
        "\ud800",
        "\x00",
        "\u2028",
    ),
    *(f'"{key}": 0.1, ' for key in KEYS),
    *(f'"{category}"' for category in (*CATEGORIES, "Safety/Harmlessness", "Honesty")),
    PLAIN,
)


def mutated(rng: random.Random, text: str) -> str:
    """One to three of: delete, double, swap or replace a stretch, or put something in."""
    for _ in range(rng.randint(1, 3)):
        i = rng.randrange(len(text) + 1)
        j = min(len(text), i + rng.choice((0, 1, 1, 1, 2, 5, 20)))
        middle = text[i:j]
        choices = ("", middle * 2, middle[::-1], rng.choice(PIECES), rng.choice(PIECES) + middle)
        text = text[:i] + rng.choice(choices) + text[j:]
    return text


def garbage() -> Iterator[str]:
    """About 24,000 damaged answers."""
    rng = random.Random(1)
    texts = [mended(rng, SemanticGap(rng.choice(CATEGORIES), 0.25, 0.75))[0] for _ in range(200)]
    for text in texts[:20]:
        yield from (text[:end] for end in range(len(text)))
        yield from (text[start:] for start in range(len(text)))
    yield from (one + two for one, two in itertools.product(texts[:20], repeat=2))
    for _ in range(18_000):
        yield mutated(rng, rng.choice((PLAIN, rng.choice(texts))))


def test_garbage_is_never_read_as_a_gap_that_a_strict_reading_does_not_give() -> None:
    texts = list(garbage())
    valid = 0
    for text in texts:
        parsed = parse_reply(text)
        if parsed.gap is None:
            assert parsed.problem in INVALID
        else:
            valid += 1
            assert parsed.gap == strict(text), text
            assert set(parsed.mends) <= set(MENDS)
    assert len(texts) >= 20_000
    assert 0 < valid < len(texts)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.text(), st.text('{}[]",:0.519e-`\\ tN', max_size=60), st.from_regex(r'\{"semantic_gap_[a-z]+": .*\}'))
)
def test_no_text_at_all_raises(text: str) -> None:
    parsed = parse_reply(text)
    assert (parsed.gap is None) == (parsed.problem in INVALID)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([*CATEGORIES, "0.5"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.sampled_from(KEYS), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(json_values, json_values, json_values, st.dictionaries(st.text(max_size=5), json_values, max_size=2))
def test_an_object_with_values_of_any_type_is_read_as_the_oracle_reads_it(c: Any, m: Any, f: Any, extra: Any) -> None:
    text = answer(c, m, f) if not extra else answer(c, m, f)[:-1] + ", " + json.dumps(extra)[1:]
    gap = parse_reply(text).gap
    assert gap is None or gap == strict(text)


@given(st.sampled_from(CATEGORIES), st.floats(0, 1), st.floats(0, 1))
def test_every_valid_gap_survives_a_round_trip(category: str, magnitude: float, confidence: float) -> None:
    assert parse_reply(answer(category, magnitude, confidence)).gap == SemanticGap(category, magnitude, confidence)
