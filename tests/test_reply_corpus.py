"""No garbage is ever read as an answer, and no answer is lost: hundreds of thousands of texts, responses and decisions.

Each test prints how many inputs of each class there were, and how many of them were accepted (`pytest -rP`).
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus import (
    KEYS,
    Case,
    Gap,
    Pairs,
    Word,
    fragment,
    good,
    judged,
    mutant,
    mutated,
    noise,
    prefixes,
    random_json,
    reading,
    spoilt,
    written_json,
)
from sp2dpo.decision import DECISION_KEYS, LEVELS, parse_decision
from sp2dpo.llm import FAILURES, Raw
from sp2dpo.llm.chat import read_chat
from sp2dpo.llm.decisions import Api, read_decisions
from sp2dpo.reply import INVALID, Parsed, parse_reply
from sp2dpo.rubric import CATEGORIES

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 10))]
PLAIN = '{"semantic_gap_category": "Reasoning", "semantic_gap_magnitude": 0.72, "semantic_gap_confidence": 0.95}'


@dataclass
class Tally:
    """Inputs by class, how many of them were accepted, and those that were read wrongly."""

    inputs: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def note(self, kind: str, text: str, says: object, found: object) -> None:
        """`found` is None for what was refused."""
        self.inputs[kind] += 1
        self.accepted[kind] += found is not None
        if found != says:
            self.wrong.append(f"{kind}: {text!r} says {says}, and was read as {found}")

    def check(self, each: int = 1) -> None:
        """None was read wrongly, and there were at least so many of each class."""
        total, accepted = self.inputs.total(), self.accepted.total()
        lines = [
            f"{kind:40} {n:9,} inputs {self.accepted[kind]:9,} accepted" for kind, n in sorted(self.inputs.items())
        ]
        print("\n".join([*lines, f"{'all':40} {total:9,} inputs {accepted:9,} accepted {len(self.wrong):,} wrongly"]))
        shortest = sorted(self.wrong, key=len)[:12]
        assert not self.wrong, "\n".join([f"{len(self.wrong):,} of {total:,} inputs were read wrongly", *shortest])
        assert min(self.inputs.values()) >= each


def gap_of(parsed: Parsed) -> Gap | None:
    """The values that were read; whatever is not read must be named."""
    assert (parsed.gap is None) == (parsed.problem in INVALID)
    return None if parsed.gap is None else (parsed.gap.category, parsed.gap.magnitude, parsed.gap.confidence)


# Texts ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_every_answer_that_counts_is_read_as_it_was_meant_and_its_mends_are_named(seed: int) -> None:
    rng, tally = Random(f"good {seed}"), Tally()
    for case in (good(rng) for _ in range(40_000)):
        parsed = parse_reply(case.text)
        tally.note(case.kind, case.text, (case.says, case.mends), (gap_of(parsed), frozenset(parsed.mends)))
    tally.check(each=5000)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_spoilt_answer_is_read(seed: int) -> None:
    rng, tally = Random(f"spoilt {seed}"), Tally()
    for case in (spoilt(rng) for _ in range(100_000)):
        tally.note(case.kind, case.text, None, gap_of(parse_reply(case.text)))
    assert len(tally.inputs) >= 60
    tally.check(each=50)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_answer_that_breaks_off_is_read_wherever_it_does(seed: int) -> None:
    rng, tally = Random(f"prefixes {seed}"), Tally()
    for case in itertools.chain.from_iterable(prefixes(rng) for _ in range(250)):
        tally.note(case.kind, case.text, None, gap_of(parse_reply(case.text)))
    tally.check(each=20_000)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_json_is_read_just_where_it_is_an_answer(seed: int) -> None:
    rng, tally = Random(f"json {seed}"), Tally()
    for value in (random_json(rng) for _ in range(40_000)):
        text, says = written_json(value), judged(value)
        kind = "random JSON, no answer" if says is None else "random JSON, an answer"
        tally.note(kind, text, says, gap_of(parse_reply(text)))
    tally.check(each=2000)


def note_noise(tally: Tally, kind: str, text: str, found: Gap | None, read_again: Callable[[str], Gap | None]) -> None:
    """Noise may be refused for any reason; what is accepted must be what the second reader finds."""
    tally.note(kind, text, None if found is None else read_again(text), found)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_read_in_noise_is_what_a_second_reader_finds_there(seed: int) -> None:
    rng, tally = Random(f"noise {seed}"), Tally()
    for kind, make, n in (("mutants", mutant, 40_000), ("noise", noise, 30_000), ("fragments", fragment, 50_000)):
        for text in (make(rng) for _ in range(n)):
            note_noise(tally, kind, text, gap_of(parse_reply(text)), reading)
    tally.check()
    assert tally.accepted["mutants"] > 500
    assert tally.accepted["fragments"] > 100


def test_the_second_reader_finds_what_the_makers_put_in() -> None:
    rng, tally = Random("second reader"), Tally()
    for case in (make(rng) for make in (good, spoilt) for _ in range(5000)):
        tally.note(case.kind, case.text, case.says, reading(case.text))
    for value in (random_json(rng) for _ in range(5000)):
        tally.note("random JSON", written_json(value), judged(value), reading(written_json(value)))
    tally.check()


leaves = st.one_of(
    st.sampled_from(["0", "1", "0.5", "-0.1", "1.5", "NaN", "true", "null", "1e400"]).map(Word),
    st.floats().map(lambda n: Word(json.dumps(n))),
    st.sampled_from([*CATEGORIES, "tone", "0.5", "semantic_gap_magnitude: 1"]),
    st.text(max_size=8),
)
objects = st.deferred(
    lambda: st.lists(st.tuples(st.sampled_from([*KEYS, *KEYS, "a"]) | st.text(max_size=5), values), max_size=5).map(
        Pairs
    )
)
values: st.SearchStrategy[Any] = st.deferred(lambda: leaves | objects | st.lists(values, max_size=2))
answers = st.tuples(*(leaves for _ in KEYS), objects).map(
    lambda parts: Pairs([*zip(KEYS, parts, strict=False), *parts[3]])
)


@settings(max_examples=1500)
@given(answers | answers.map(lambda one: [one]) | values)
def test_any_json_is_read_just_where_it_is_an_answer(value: Any) -> None:
    assert gap_of(parse_reply(written_json(value))) == judged(value)


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"a":[', '{"a":1,"b":[[],'])
def test_no_depth_at_all_raises(opening: str) -> None:
    closing = "".join({"[": "]", "{": "}"}.get(mark, "") for mark in reversed(opening))
    for depth in (*range(0, 1100, 7), 5000, 100_000):
        nested = opening * depth + "1" + closing * depth
        text = PLAIN[:-1] + f', "deep": {nested}}}'
        assert gap_of(parse_reply(text)) in (None, ("Reasoning", 0.72, 0.95))
        assert gap_of(parse_reply(nested)) is None
        assert parse_decision(nested).gap is None
        for body in (f'{{"choices": {nested}}}', f'{{"choices": [{{"message": {{"refusal": {nested}}}}}]}}'):
            assert gap_in(200, body) is None
        for api in ("decisions", "systemone"):
            assert set(decided(api, f'{{"answers": {nested}}}', ("v1",)).values()) == {None}
            assert set(decided(api, f'{{"answers": {{"category_v1": {nested}}}}}', ("v1",)).values()) == {None}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "part", [*'"\\,[{:} 1`_', '\\"', '"\\', ", ", "},", "```", "semantic ", "semantic_gap_", f"{KEYS[1]} is "]
)
def test_no_length_keeps_a_reader_busy(part: str) -> None:
    filling = part * 300_000
    for text in (
        filling,
        "{" + filling,
        PLAIN + filling,
        filling + PLAIN,
        PLAIN[:-1] + filling,
        PLAIN[:-1] + f', "{filling}"}}',
    ):
        assert gap_of(parse_reply(text)) in (None, ("Reasoning", 0.72, 0.95))
        assert parse_decision(text).gap is None
    text = PLAIN[:-1] + f', "long": {json.dumps(filling)}}}'
    assert gap_of(parse_reply(text)) in (None, ("Reasoning", 0.72, 0.95))


# Responses of a chat endpoint ----------------------------------------------------------------------------------------


def gap_in(status: int, body: str) -> Gap | None:
    """What the engine takes from a response."""
    reply = read_chat(Raw(status=status, body=body))
    assert reply.failure is None or reply.failure in FAILURES
    return None if reply.failure else gap_of(parse_reply(reply.raw_text))


def completion(content: Any, finish: Any = "stop", **message: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content} | message}
    return {"id": "1", "model": "m", "choices": [choice], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}


Body = Callable[[Random, str], tuple[int, str]]


def of(**message: Any) -> Body:
    """A completion with these fields beside the content."""
    return lambda rng, text: (200, json.dumps(completion(text, **message), ensure_ascii=rng.random() < 0.5))


def whole(body: str) -> Body:
    """A body in which % stands for the text as JSON."""
    return lambda rng, text: (200, body.replace("%", json.dumps(text)))


def status(code: int) -> Body:
    return lambda rng, text: (code, json.dumps(completion(text)))


def cut_off(rng: Random, text: str) -> tuple[int, str]:
    body = json.dumps(completion(text))
    return 200, body[: rng.randrange(len(body))]


SOUND: Mapping[str, Body] = {
    "a completion": of(),
    "no finish_reason": of(finish=None),
    "empty fields": of(refusal=None, tool_calls=[], annotations=[], audio=None),
    "an empty refusal": of(refusal=""),
    "hidden reasoning": of(reasoning_content=PLAIN, reasoning=PLAIN),
    "hardly anything": whole('{"choices": [{"message": {"content": %}}]}'),
    "much else": whole(
        '\n {"x": NaN, "usage": "?", "model": 7, "choices": [{"message": {"x": [], "content": %}, "y": 1}]} '
    ),
}
UNSOUND: Mapping[str, Body] = {
    "cut at the cap": of(finish="length"),
    "filtered": of(finish="content_filter"),
    "refused": of(refusal="I will not judge this."),
    "refused in another way": of(refusal={"reason": "no"}),
    "content in parts": whole('{"choices": [{"message": {"content": [{"type": "text", "text": %}]}}]}'),
    "content as an object": whole('{"choices": [{"message": {"content": {"text": %}}}]}'),
    "content as JSON, not as a text": lambda rng, text: (200, json.dumps(completion(json.loads(PLAIN)))),
    "content under another key": whole('{"choices": [{"message": {"Content": %, "text": %}}]}'),
    "no content": whole('{"choices": [{"message": {"content": null, "reasoning_content": %}}]}'),
    "a tool call": whole('{"choices": [{"message": {"tool_calls": [{"function": {"arguments": %}}]}}]}'),
    "a delta": whole('{"choices": [{"delta": {"content": %}}]}'),
    "a text completion": whole('{"choices": [{"text": %}]}'),
    "a message beside": whole('{"choices": [], "message": {"content": %}}'),
    "choices as an object": whole('{"choices": {"0": {"message": {"content": %}}}}'),
    "a choice as a text": whole('{"choices": [%]}'),
    "a message as a text": whole('{"choices": [{"message": %}]}'),
    "choices in choices": whole('{"choices": [[{"message": {"content": %}}]]}'),
    "two choices": whole('{"choices": [{"message": {"content": %}}, {"message": {"content": "no"}}]}'),
    "choices twice": whole('{"choices": [{"message": {"content": "no"}}], "choices": [{"message": {"content": %}}]}'),
    "a message twice": whole('{"choices": [{"message": {"content": "no"}, "message": {"content": %}}]}'),
    "content twice": whole('{"choices": [{"message": {"content": "no", "content": %}}]}'),
    "an array": whole('[{"choices": [{"message": {"content": %}}]}]'),
    "two bodies": whole('{"choices": [{"message": {"content": %}}]}{"choices": []}'),
    "a stream": whole('data: {"choices": [{"message": {"content": %}}]}\n\ndata: [DONE]'),
    "a byte order mark": whole('\ufeff{"choices": [{"message": {"content": %}}]}'),
    "a page": whole("<html><body>%</body></html>"),
    "the text as JSON": whole("%"),
    "the text alone": lambda rng, text: (200, text),
    "an error": whole('{"error": {"message": %, "code": 400}}'),
    "nothing": whole(""),
    "broken off": cut_off,
    **{f"HTTP {code}": status(code) for code in (0, 201, 204, 206, 302, 400, 401, 408, 429, 500, 503)},
}


def texts(rng: Random) -> Iterator[Case]:
    """Answers that count, every third spoilt."""
    while True:
        yield rng.choice((good, good, spoilt))(rng)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_response_is_read_only_if_it_is_whole_and_its_text_is_an_answer(seed: int) -> None:
    rng, tally = Random(f"bodies {seed}"), Tally()
    shapes = [(name, body, True) for name, body in SOUND.items()] * 4 + [
        (name, body, False) for name, body in UNSOUND.items()
    ]
    for case, (name, body, sound) in zip(texts(rng), shapes * 700, strict=False):
        answer = body(rng, case.text)
        kind = f"unsound: {name}" if not sound else "sound" if case.says else "sound, with a spoilt text"
        tally.note(kind, answer[1], case.says if sound else None, gap_in(*answer))
    tally.check(each=500)
    assert tally.accepted["sound"] > 10_000


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)


def in_body(body: str) -> Gap | None:
    """What the second reader finds in a response."""
    try:
        (choice,) = json.loads(body, object_pairs_hook=unique)["choices"]
        message = choice["message"]
        stopped = choice.get("finish_reason") not in ("length", "content_filter") and not message.get("refusal")
        text = message["content"].encode("utf-8", "backslashreplace").decode()  # as a file can hold it
        return reading(text) if stopped else None
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_read_in_a_damaged_response_is_what_a_second_reader_finds_there(seed: int) -> None:
    rng, tally = Random(f"damaged {seed}"), Tally()
    for case in (good(rng) for _ in range(25_000)):
        body = mutated(rng, of()(rng, case.text)[1])
        note_noise(tally, "damaged responses", body, gap_in(200, body), in_body)
    tally.check()
    assert tally.accepted["damaged responses"] > 1000


# Typed decisions -----------------------------------------------------------------------------------------------------

VARIANTS = ("v1", "v2", "v3")
KINDS = {
    "decisions": dict(zip(DECISION_KEYS, ("choice", "score", "predicate"), strict=True)),
    "systemone": dict(zip(DECISION_KEYS, ("choice", "score", "noul"), strict=True)),
}
OPTIONS = {"category": CATEGORIES, "magnitude": LEVELS}
Shares = dict[str, Any]


def decided(api: Api, body: str, variants: Sequence[str] = VARIANTS) -> dict[str, Gap | None]:
    """What the engine takes from a response, for each variant."""
    replies = read_decisions(api, Raw(status=200, body=body), variants)
    return {v: None if one.failure else gap_of(parse_decision(one.raw_text)) for v, one in replies.items()}


def shares(rng: Random, options: Sequence[str]) -> Shares:
    """A probability for each option, as a model or a server that rounds would give it."""
    weights = [rng.choice((0.0, rng.random(), rng.random(), 1.0)) for _ in options]
    weights[rng.randrange(len(weights))] += 0.1
    digits = rng.choice((17, 17, 6, 3))
    found = {option: round(weight / sum(weights), digits) for option, weight in zip(options, weights, strict=True)}
    return dict(rng.sample(list(found.items()), len(found)))


def meant(category: Shares, magnitude: Shares, confidence: float) -> Gap:
    """The judgement that three whole answers come to."""
    most = max(category.values())
    mean = sum(place * magnitude[level] for place, level in enumerate(LEVELS)) / sum(magnitude.values()) / 4
    return next(name for name in CATEGORIES if category[name] == most), mean, confidence


def rounded(found: Gap | None, says: Gap | None) -> Gap | None:
    """`found`, or what it was meant to be if only the rounding of a mean differs."""
    if found is None or says is None or not math.isclose(found[1], says[1], abs_tol=1e-12):
        return found
    return found[0], says[1], found[2]


def told(api: Api, key: str, value: Any) -> dict[str, Any]:
    """An answer to a question, as an endpoint writes it."""
    kind = KINDS[api][key]
    if key == "confidence":
        return {"type": kind, ("noul" if kind == "noul" else "probability"): value}
    if api == "systemone":
        return {"type": kind, "probabilities": value}
    rows = [{("label" if key == "magnitude" else "value"): option, "probability": p} for option, p in value.items()]
    return {"type": kind, "confidence": 0.5, "probabilities": rows}


BAD_SHARES: Sequence[Any] = (
    *(1.5, -0.1, 1.0000001, -1e-9, 72, 10**400, math.nan, math.inf, -math.inf, "0.5", "", None, True, False, [0.5]),
    *({"value": 0.5}, [], {}, "high", "50%"),
)


def bad_number(rng: Random, key: str, value: Any) -> Any:
    wrong = rng.choice(BAD_SHARES)
    return wrong if key == "confidence" else value | {rng.choice(OPTIONS[key]): wrong}


def bad_sum(rng: Random, key: str, value: Any) -> Any:
    if key == "confidence":
        return -value - 0.1
    factor = rng.choice((0.0, 0.5, 0.96, 1.04, 2.0))
    return {option: p * factor for option, p in value.items()}


def bad_options(rng: Random, key: str, value: Any) -> Any:
    if key == "confidence":
        return {"true": value}
    one = rng.choice(list(value))
    other = rng.choice((one + " ", one.upper() + "S", "Tone", "5", "", "Safety, Style", one + "\u200b"))
    rest = {option: p for option, p in value.items() if option != one}
    return rng.choice((rest, value | {other: 0.0}, rest | {other: value[one]}))


SPOILT_VALUES = {"a number": bad_number, "a sum": bad_sum, "the options": bad_options}
SPOILT_ANSWERS: Mapping[str, Callable[[Random, dict[str, Any], Any], Any]] = {
    "another type": lambda rng, answer, value: (
        answer | {"type": rng.choice(("text", "", None, "Choice", 1, ["choice"]))}
    ),
    "no type": lambda rng, answer, value: {name: inner for name, inner in answer.items() if name != "type"},
    "the bare value": lambda rng, answer, value: value,
    "the best one alone": lambda rng, answer, value: {"type": answer["type"], "choice": "Safety", "score": 0.5},
    "refused": lambda rng, answer, value: {"type": "refusal"},
    "a list": lambda rng, answer, value: [answer],
    "a text": lambda rng, answer, value: json.dumps(answer),
    "nothing": lambda rng, answer, value: rng.choice((None, {}, [], "", 0, False, "Safety")),
}


def swap(answers: list[tuple[str, Any]], i: int) -> None:
    """Answers to two questions of one variant under each other's name."""
    j = i + 1 if i % 3 < 2 else i - 1
    answers[i], answers[j] = (answers[i][0], answers[j][1]), (answers[j][0], answers[i][1])


SPOILT_LISTS: Mapping[str, Callable[[list[tuple[str, Any]], int], object]] = {
    "left out": lambda answers, i: answers.pop(i),
    "twice": lambda answers, i: answers.append(answers[i]),
    "swapped": swap,
}


def response(api: Api, answers: Sequence[tuple[str, Any]]) -> str:
    """The whole response; an object in which a name may stand twice."""
    if api == "systemone":
        listed = ", ".join(f"{json.dumps(name)}: {json.dumps(answer)}" for name, answer in answers)
        return f'{{"model": "m", "answers": {{{listed}}}}}'
    rows = [{"name": name, **answer} if isinstance(answer, dict) else answer for name, answer in answers]
    return json.dumps({"model": "m", "answers": rows})


Says = dict[str, Gap | None]


def decisions_case(rng: Random, api: Api) -> tuple[str, str, Says]:
    """Class, body, and what it says for each variant: all is sound but for what was done to one question."""
    values: dict[str, Any] = {}
    says: Says = {}
    for variant in VARIANTS:
        three = shares(rng, CATEGORIES), shares(rng, LEVELS), rng.random()
        says[variant] = meant(*three)
        values |= {f"{key}_{variant}": value for key, value in zip(DECISION_KEYS, three, strict=True)}
    answers = [(name, told(api, name[:-3], value)) for name, value in values.items()]
    kind = rng.choice(("sound", "sound", *SPOILT_VALUES, *SPOILT_ANSWERS, *SPOILT_LISTS))
    if kind != "sound":
        spoil(rng, api, kind, answers, values, says)
    return kind, response(api, rng.sample(answers, len(answers))), says


def spoil(rng: Random, api: Api, kind: str, answers: list[tuple[str, Any]], values: Shares, says: Says) -> None:
    """One of the answers, so that its variant says nothing."""
    i = rng.randrange(len(answers))
    name, answer = answers[i]
    says[name[-2:]] = None
    if kind in SPOILT_VALUES:
        answers[i] = name, told(api, name[:-3], SPOILT_VALUES[kind](rng, name[:-3], values[name]))
    elif kind in SPOILT_ANSWERS:
        answers[i] = name, SPOILT_ANSWERS[kind](rng, answer, values[name])
    else:
        SPOILT_LISTS[kind](answers, i)
    if kind == "twice" and api == "systemone":  # one object that names a key twice
        says |= dict.fromkeys(VARIANTS)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("api", ["decisions", "systemone"])
def test_a_typed_decision_is_read_only_if_every_answer_of_its_variant_is_whole(api: Api, seed: int) -> None:
    rng, tally = Random(f"decisions {api} {seed}"), Tally()
    for kind, body, says in (decisions_case(rng, api) for _ in range(8000)):
        found = decided(api, body)
        for variant in VARIANTS:
            read = f"spoilt: {kind}" if says[variant] is None else "sound"
            tally.note(read, body, says[variant], rounded(found[variant], says[variant]))
    tally.check(each=200)
    assert tally.accepted["sound"] > 10_000


def in_decision(text: str) -> Gap | None:
    """The judgement in a text, if it is just the three whole answers."""
    try:
        value = json.loads(text, object_pairs_hook=unique)
        category, magnitude, confidence = (value[key] for key in DECISION_KEYS)
        numbers = [*category.values(), *magnitude.values(), confidence]
        sound = len(value) == 3 and sorted(category) == sorted(CATEGORIES) and sorted(magnitude) == sorted(LEVELS)
        sound = sound and all(type(n) in (int, float) and 0 <= n <= 1 for n in numbers)
        sound = sound and all(abs(sum(shares.values()) - 1) < 0.0301 for shares in (category, magnitude))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return meant(category, magnitude, confidence) if sound else None


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_read_in_a_damaged_decision_is_a_whole_distribution(seed: int) -> None:
    rng, tally = Random(f"damaged decisions {seed}"), Tally()
    for _ in range(15_000):
        answers = {"category": shares(rng, CATEGORIES), "magnitude": shares(rng, LEVELS), "confidence": rng.random()}
        text = json.dumps(answers)
        for kind, body in (("damaged", mutated(rng, text)), ("broken off", text[: rng.randrange(len(text))])):
            says = in_decision(body)
            found = rounded(gap_of(parse_decision(body)), says)
            tally.note(f"decisions, {kind}", body, None if found is None else says, found)
    tally.check()
    assert tally.accepted["decisions, damaged"] > 1000
