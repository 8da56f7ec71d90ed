"""Answers whose maker knows what they say: plain ones, mended ones, spoilt ones, and noise. Calls no reader of sp2dpo.

A case has a text and what it says: the values that a reading must give, or None if it must be refused. An answer is
spoilt in a value, in a key, and last of all in its syntax or in what stands around it; no spoiling can undo another.
What noise says nobody knows beforehand; for it `reading` is a second reader, written from the rules alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final, Literal

from sp2dpo.rubric import CATEGORIES, CATEGORY_ALIASES

__all__ = [
    "KEYS",
    "Case",
    "Gap",
    "fragment",
    "good",
    "judged",
    "mutant",
    "mutated",
    "noise",
    "prefixes",
    "random_json",
    "reading",
    "spoilt",
    "written_json",
]

Gap = tuple[str, float, float]
"""Category, magnitude, confidence."""

KEYS: Final = ("semantic_gap_category", "semantic_gap_magnitude", "semantic_gap_confidence")
NAMES: Final = {name.lower(): name for name in CATEGORIES} | CATEGORY_ALIASES


@dataclass(frozen=True)
class Case:
    """One input; `mends` are those that reading it takes."""

    kind: str
    text: str
    says: Gap | None
    mends: frozenset[str] = frozenset()


@dataclass
class Item:
    """A key, and how it and its value are written."""

    key: str
    name: str
    value: str


@dataclass
class Draft:
    """An answer in parts, as they are written."""

    says: Gap
    items: list[Item]
    opening: str = "{"
    closing: str = "}"
    comma: str = ", "
    colon: str = ": "
    before: str = ""
    after: str = ""
    mends: set[str] = field(default_factory=set)

    @property
    def inside(self) -> str:
        pairs = self.comma.join(f"{item.name}{self.colon}{item.value}" for item in self.items)
        return f"{self.opening}{pairs}{self.closing}"

    @property
    def text(self) -> str:
        return f"{self.before}{self.inside}{self.after}"

    def of(self, key: str) -> Item:
        return next(item for item in self.items if item.key == key)


# Answers that count --------------------------------------------------------------------------------------------------

SPACING: Final = ((", ", ": "), (",", ":"), (",\n  ", ": "), (" ,\t", " :\r\n"))
BRACES: Final = (("{", "}"), ("{\n  ", "\n}"), ("{ ", " }"))
ARRAYS: Final = (("[", "]"), ("[\n  ", "\n]"), ("[ ", " ]"))
FENCES: Final = ("```json\n", "```\n", "```JSON", "```json\r\n")
PROSE: Final = (
    *("Here you go:", "So: [see below]", 'It\'s "close", I think.', "½ – ok", "回答如下：", "NaN, Infinity; 0.5 / 0.5"),
    *("1) I read both. 2) The second is worse by 0.3, or 30%.", "# Answer\n\n* one *", "<think>Style? No.</think>"),
    *("The semantic_gap_category was hard to choose.", "Magnitude and confidence follow."),
    *("\ufeff", "\u200b\u2060", "\x00\x07", "a \ud800 half"),
)
EXTRAS: Final = (
    ("rationale", '"a } and a {, too"'),
    ("beta", "0.1"),
    ("n", '[1, {"x": null}, [[]], "[{"]'),
    ("magnitude", "0.3"),
    ("semantic_gap", "true"),
    ("", '""'),
    ("ключ", '"\\ud83d\\ude00 \\" \\\\"'),
    ("why", '"The semantic_gap_category was hard to choose."'),
    ("big", "1e999"),
)


def in_letters(rng: Random, text: str) -> str:
    """`text` as a JSON string, some of its letters as escapes."""
    share = rng.choice((0.0, 0.0, 0.0, 0.0, 0.2, 1.0))
    if not share:
        return json.dumps(text)
    return '"' + "".join(f"\\u{ord(c):04x}" if rng.random() < share else json.dumps(c)[1:-1] for c in text) + '"'


def number(rng: Random) -> tuple[float, str]:
    """A number in [0, 1], and a way to write it."""
    n = rng.choice((rng.randint(0, 100) / 100, rng.randint(0, 1000) / 1000, rng.random(), 0.0, 1.0))
    form = rng.choice(("", "", "", ".25f", ".17e", ".17E"))
    return n, format(n, form) if form else {0.0: "-0", 1.0: "1"}.get(n, repr(n))


def as_text(rng: Random, number: str) -> str:
    """A number as a string."""
    plain = number.removeprefix("0") if number.startswith("0.") and rng.random() < 0.2 else number
    sign = "+" if rng.random() < 0.2 and not plain.startswith("-") else ""
    return json.dumps(rng.choice(("", " ", "\n")) + sign + plain + rng.choice(("", " ", "\t")))


def spelt_otherwise(rng: Random, category: str) -> str:
    """A category under another name, in another case, or with more space."""
    name = rng.choice([category, *(alias for alias, of in CATEGORY_ALIASES.items() if of == category)])
    name = rng.choice((name.upper(), name.lower(), name.title(), name.swapcase()))
    return name if name != category else f" {name} \n"


def with_extras(rng: Random, draft: Draft) -> None:
    draft.items += [Item(name, json.dumps(name), value) for name, value in rng.sample(EXTRAS, rng.randint(1, 3))]


def with_comma(rng: Random, draft: Draft) -> None:
    draft.closing = rng.choice((",", " , ", ",\n")) + draft.closing


def in_array(rng: Random, draft: Draft) -> None:
    draft.before, draft.after = rng.choice(ARRAYS)


def in_fence(rng: Random, draft: Draft) -> None:
    draft.before, draft.after = rng.choice(FENCES) + draft.before, draft.after + rng.choice(("\n```", "```\n\n"))


def in_prose(rng: Random, draft: Draft) -> None:
    """Text before, behind, or both; or a fence that opens and never closes, or the other way round."""
    first, last, between = rng.choice(PROSE), rng.choice(PROSE), rng.choice("\n ")
    if "code_fence" not in draft.mends and rng.random() < 0.1:
        first, last = rng.choice((("```json", ""), ("", "```")))
    elif rng.random() < 0.5:
        first, last = rng.choice(((first, ""), ("", last)))
    draft.before, draft.after = first + between + draft.before, draft.after + between + last


def untouched(rng: Random, draft: Draft) -> None:
    """It was made when the values were written."""


MENDED: Final[Mapping[str, Callable[[Random, Draft], None]]] = {
    "numeric_string": untouched,
    "category_alias": untouched,
    "extra_keys": with_extras,
    "trailing_comma": with_comma,
    "array_of_one": in_array,
    "code_fence": in_fence,
    "prose": in_prose,
}
"""The seven mends, from the inside out."""


def answer(rng: Random, share: float) -> Draft:
    """An answer that counts, with each mend at this share."""
    mends = {name for name in MENDED if rng.random() < share}
    category, one, other = rng.choice(CATEGORIES), number(rng), number(rng)
    alias = "category_alias" in mends
    values = [in_letters(rng, spelt_otherwise(rng, category) if alias else category), one[1], other[1]]
    for i in rng.choice(([1], [2], [1, 2])) if "numeric_string" in mends else ():
        values[i] = as_text(rng, values[i])
    items = [Item(key, in_letters(rng, key), value) for key, value in zip(KEYS, values, strict=True)]
    draft = Draft((category, one[0], other[0]), items, mends=mends)
    draft.comma, draft.colon = rng.choice(SPACING)
    draft.opening, draft.closing = rng.choice(BRACES)
    for name in MENDED:
        if name in mends:
            MENDED[name](rng, draft)
    rng.shuffle(draft.items)
    return draft


def good(rng: Random) -> Case:
    """An answer that counts, plain or under any of the mends."""
    draft = answer(rng, rng.choice((0.0, 0.2, 0.5)))
    kind = "mended" if draft.mends else "plain"
    return Case(kind, draft.text, draft.says, frozenset(draft.mends))


# Spoilt values -------------------------------------------------------------------------------------------------------

Choice = Sequence[str] | Callable[[Random], str]

OUT_OF_RANGE: Final = (
    *("1.01", "-0.01", "2", "72", "100", "-1", "1.0000001", "-1e-9", "1e1", "1e999", "-1e999", "1e308", "-5e-324"),
    *("9" * 400, "-" + "9" * 400, "1" + "0" * 30, "1.0000000000000003"),
)
BAD_NUMBERS: Final[Mapping[str, Choice]] = {
    "out of range": OUT_OF_RANGE,
    "out of range, any": lambda rng: repr(rng.choice((-1, 1)) * (1 + rng.random()) * 10.0 ** rng.randint(1, 300)),
    "out of range, just": lambda rng: repr(rng.choice((1 + 10.0 ** -rng.randint(1, 15), -(0.1 ** rng.randint(1, 99))))),
    "out of range, in a string": [f'"{text}"' for text in OUT_OF_RANGE],
    "a word": ('"high"', '"very large"', '"half"', '"zero point five"', '"n/a"', '""', '" "', '"O.5"', "high"),
    "NaN": ("NaN", "nan", "Infinity", "-Infinity", "inf", '"NaN"', '"nan"', '"Infinity"', '"-inf"', '"INF"', '"∞"'),
    "hexadecimal": ("0x1", "0x0", "0b1", "0o1", '"0x1"', '"0x1p-1"', '"0b1"', '"1h"', '"0x0.8"'),
    "other digits": ('"٠.٥"', '"０.５"', "０.５", "½", '"½"', '"⁰"', '"𝟎.𝟓"', "٠", '"०.५"', '"0．5"', '"一"', '"0٫5"'),
    "percent": ("50%", '"50%"', '"50 %"', '"0.5%"', "0.5%", '"50 percent"', '"50 pct"', '"5‰"'),
    "a fraction": ("1/2", '"1/2"', '"3/4"', '"5/10"', '"0.5/1"', "1/1", '"1:2"', '"0.5 out of 1"'),
    "null": ("null", "None", "undefined", '"null"', "nil"),
    "true or false": ("true", "false", "True", '"true"', "yes", '"yes"'),
    "nested": ("[0.5]", '{"value": 0.5}', "[0.5, 0.6]", "{}", "[]", "[[0.5]]", '["0.5"]', '{"0": 0.5}', "[null]"),
    "no JSON number": ("+0.5", ".5", "00.5", "0.5.5", "0,5", "0_5", "1e", "0.5e+", "--0.5", "0.5f", "0. 5", "0.", "-"),
    "no number": ('"0,5"', '"0_5"', '"0.5.5"', '"1e"', '"--0.5"', '"0.5f"', '"0. 5"', '"."', '"+"', '"e5"'),
    "about": ('"~0.5"', '"<0.5"', '"≥0.5"', '"0.5 (high)"', '"0.5 to 0.6"', '"0.5 0.6"', '"ca. 0.5"', "~0.5", '"0.5!"'),
    "a sum": ("1-0.5", '"0.25+0.25"', "0.5*1", '"1-0.5"', "0.5 + 0", "(0.5)", '"(0.5)"', "=0.5"),
    "hidden characters": ('"0.5\u200b"', '"\u00a00.5"', '"0.5\\u0000"', '"\\u20280.5"', '"\ufeff0.5"', "0.5\u200b"),
    "a quoted quote": ('"\\"0.5\\""', "\"'0.5'\"", "'0.5'", "“0.5”", '"`0.5`"', '""0.5""'),
    "nothing": ("", " ", "?", "...", "TODO", "<number>", "0.0-1.0", "[0, 1]"),
}  # fmt: skip

LOOKALIKE: Final = str.maketrans("aecopyxisSIHFR", "аесорухіѕЅІНϜЯ")
TRANSLATED: Final = ("安全", "Sicherheit", "Sécurité", "Безопасность", "स्टाइल", "ΣΤΥΛ", "スタイル", "Stil")
WRAPPED: Final = (
    "{}.", '"{}"', "*{}*", "**{}**", "({})", "{} (0.9)", "The category is {}", "{}!", "#{}", "{}:", "1. {}", "not {}",
    "`{}`", "<{}>", "{}\\n{}", "- {}", "{}?", "{},", "[{}]", "None, {}", "{}\n\n{}", "{} – 0.5",
)  # fmt: skip
NO_CATEGORY: Final = (
    "Other", "None", "none", "N/A", "Tie", "Both", "Equal", "A", "B", "1", "unknown", "category", "Honesty", "Quality",
    "Safety|Factuality|Instruction|Reasoning|Helpfulness|Style", "<category>", "Safety or Style", "...", "?", "0.5",
)  # fmt: skip
INVISIBLE: Final = "\u200b\u00ad\ufeff\u2060\u00a0\u3000\u2028\u0301\ud800"
CONTROL: Final = "".join(map(chr, (*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F)))


def squeezed(name: str) -> str:
    """A name without case, spaces and marks."""
    return re.sub(r"[\W_]", "", name).casefold()


SQUEEZED_NAMES: Final = {squeezed(name) for name in NAMES}
SQUEEZED_KEYS: Final = {squeezed(key) for key in KEYS}


def misspelt(rng: Random, word: str, taken: set[str]) -> str:
    """`word` with a letter more, less, other, or moved; in no dress one of `taken`."""
    while True:
        i, letter = rng.randrange(len(word)), rng.choice("abcdefghijklmnopqrstuvwxyz")
        moved = word[:i] + word[i + 1 : i + 2] + word[i] + word[i + 2 :]
        other = rng.choice(
            (word[:i] + word[i + 1 :], word[:i] + letter + word[i:], word[:i] + letter + word[i + 1 :], moved)
        )
        if squeezed(other) not in taken:
            return other


def two_categories(rng: Random) -> str:
    between = rng.choice((", ", "/", " and ", "|", " > ", ";", " & ", "+", "\n", " ", "", " / ", ",", " vs ", "-"))
    return between.join(rng.sample(CATEGORIES, rng.randint(2, 3)))


def hidden(rng: Random, marks: str) -> str:
    """A category, or another spelling of one, with a character put somewhere or in place of a space."""
    name, mark = rng.choice((rng.choice(CATEGORIES), rng.choice(sorted(CATEGORY_ALIASES)))), rng.choice(marks)
    i = rng.randrange(len(name) + 1)
    return name.replace(" ", mark) if " " in name and rng.random() < 0.5 else name[:i] + mark + name[i:]


def lookalike(rng: Random) -> str:
    """A category in letters that only look so."""
    name = rng.choice(CATEGORIES)
    wide = "".join(chr(ord(letter) + 0xFEE0) for letter in name)
    return rng.choice((name.translate(LOOKALIKE), wide, name[0] + "\u0301" + name[1:], name[::-1] + "\u202e"))


def around_a_category(rng: Random, *forms: str) -> str:
    return rng.choice(forms).replace("{}", rng.choice(CATEGORIES))


BAD_CATEGORIES: Final[Mapping[str, Choice]] = {
    "misspelt": lambda rng: json.dumps(misspelt(rng, rng.choice(CATEGORIES), SQUEEZED_NAMES)),
    "joined": lambda rng: json.dumps(two_categories(rng)),
    "in another script": lambda rng: json.dumps(
        rng.choice((rng.choice(TRANSLATED), lookalike(rng))), ensure_ascii=rng.random() < 0.5
    ),
    "empty": ('""', '" "', '"\\n"', '"\u200b"', '"\\u0000"', "''"),
    "no text": ("null", "true", "false", "0", "3", "0.5", "[]", "{}", "NaN", ""),
    "nested": lambda rng: around_a_category(
        rng, '["{}"]', '{"name": "{}"}', '["{}", "Style"]', '[["{}"]]', '{"{}": 1}'
    ),
    "wrapped": lambda rng: json.dumps(around_a_category(rng, *WRAPPED)),
    "none of the six": [json.dumps(name) for name in NO_CATEGORY],
    "hidden characters": lambda rng: json.dumps(hidden(rng, INVISIBLE), ensure_ascii=rng.random() < 0.5),
    "control characters": lambda rng: json.dumps(hidden(rng, CONTROL)),
    "raw control characters": lambda rng: f'"{hidden(rng, CONTROL[:-1] + chr(9) + chr(10))}"',
    "not quoted": lambda rng: around_a_category(rng, "{}", "'{}'", "“{}”", "`{}`", '"{}', '{}"'),
}


def of_choice(rng: Random, choice: Choice) -> str:
    return choice(rng) if callable(choice) else rng.choice(choice)


def spoil_number(rng: Random, draft: Draft) -> str:
    kind = rng.choice(list(BAD_NUMBERS))
    for key in rng.choice((KEYS[1:2], KEYS[2:], KEYS[1:])):
        draft.of(key).value = of_choice(rng, BAD_NUMBERS[kind])
    return f"number: {kind}"


def spoil_category(rng: Random, draft: Draft) -> str:
    kind = rng.choice(list(BAD_CATEGORIES))
    draft.of(KEYS[0]).value = of_choice(rng, BAD_CATEGORIES[kind])
    return f"category: {kind}"


def swap_values(rng: Random, draft: Draft) -> str:
    one, other = draft.of(KEYS[0]), draft.of(rng.choice(KEYS[1:]))
    one.value, other.value = other.value, one.value
    return "value: under another key"


# Spoilt keys ---------------------------------------------------------------------------------------------------------


def in_another_case(rng: Random, key: str) -> str:
    camel = key.title().replace("_", "")
    cases = (key.upper(), key.title(), camel, camel[0].lower() + camel[1:])
    return rng.choice(
        (*cases, key.replace("_", "-"), key.replace("_", " "), f" {key}", f"{key}:", f"*{key}*", f'"{key}"')
    )


RENAMED: Final[Mapping[str, Callable[[Random, str], str]]] = {
    "misspelt": lambda rng, key: json.dumps(misspelt(rng, key, SQUEEZED_KEYS)),
    "in another case": lambda rng, key: json.dumps(in_another_case(rng, key)),
    "in part": lambda rng, key: json.dumps(key.removeprefix(rng.choice(("semantic_gap_", "semantic_")))),
    "in another script": lambda rng, key: json.dumps(key.translate(LOOKALIKE), ensure_ascii=rng.random() < 0.5),
    "hidden characters": lambda rng, key: json.dumps(key[:8] + rng.choice("\u200b\ufeff\u00ad\x00\x1f") + key[8:]),
    "not quoted": lambda rng, key: rng.choice((key, f"'{key}'", f"“{key}”", f'"{key}', f"`{key}`", f'\\"{key}\\"')),
    "no name": lambda rng, key: rng.choice(('""', "1", "null", '"key"', '["a"]', "")),
    "Markdown": lambda rng, key: '"' + key.replace("_", "\\_") + '"',
}
BESIDE: Final = (
    '"{k}": {v}', "{k}: {v}", "{k} = {v}", "{k}={v}", "'{k}': {v}", "`{k}`: {v}", "**{k}**: {v}", "**{k}:** {v}",
    "| {k} | {v} |", "{k} -> {v}", "{k} → {v}", "{k} is {v}", "“{k}”: {v}", '\\"{k}\\": {v}', "<{k}>{v}</{k}>",
    "{k}\t{v}", "{k} {v}", "{k}:\n{v}", "{k}：{v}", "* {k} – {v}", "({k} {v})", "[{k}={v}]",
)  # fmt: skip
"""A second judgement that is no object."""


def beside(rng: Random) -> str:
    """A key of an answer, in some dress, and a value that it is given."""
    key = rng.choice(KEYS)
    dress = rng.choice((key, key, key, key.upper(), key.replace("_", " ").title(), key.replace("_", "\\_")))
    value = rng.choice(CATEGORIES) if key == KEYS[0] else rng.choice(("0.1", "0.9", "1", "0"))
    return rng.choice(BESIDE).replace("{k}", dress).replace("{v}", value)


def drop_keys(rng: Random, draft: Draft) -> str:
    gone = rng.sample(KEYS, rng.randint(1, 3))
    draft.items = [item for item in draft.items if item.key not in gone]
    return "key: missing"


def rename_keys(rng: Random, draft: Draft) -> str:
    kind = rng.choice(list(RENAMED))
    for key in rng.sample(KEYS, rng.randint(1, 3)):
        draft.of(key).name = RENAMED[kind](rng, key)
    return f"key: {kind}"


def again(rng: Random, draft: Draft, name: Callable[[str], str]) -> None:
    """One of the keys once more, with the same value or another."""
    item = draft.of(rng.choice(KEYS))
    value = rng.choice((item.value, rng.choice(('"Style"', '"Safety"')) if item.key == KEYS[0] else number(rng)[1]))
    draft.items.insert(rng.randint(0, len(draft.items)), Item("", name(item.key), value))


def double_a_key(rng: Random, draft: Draft) -> str:
    again(rng, draft, lambda key: in_letters(rng, key))
    return "key: doubled"


def double_a_key_in_another_case(rng: Random, draft: Draft) -> str:
    again(rng, draft, lambda key: json.dumps(in_another_case(rng, key)))
    return "key: doubled in another case"


def judge_inside(rng: Random, draft: Draft) -> str:
    """A second judgement, or a part of one, in the value of a fourth key."""
    whole = dict(zip(KEYS, (rng.choice(CATEGORIES), 0.5, 0.5), strict=True))
    inner = json.dumps(rng.choice((whole, {rng.choice(KEYS): 0.5})))
    kind, value = rng.choice(
        (
            ("an object", inner),
            ("an object in an array", f"[1, {inner}]"),
            ("an object deep inside", f'{{"a": [[{{"b": {inner}}}]]}}'),
            ("an object in a string", json.dumps(inner)),
            ("a line in a string", json.dumps(f"On second thought: {beside(rng)}.")),
        )
    )
    draft.items.insert(rng.randint(0, len(draft.items)), Item("", '"revised"', value))
    return f"inside: {kind}"


# Spoilt syntax, and what stands around -------------------------------------------------------------------------------

COMMAS: Final = (
    " ",
    ";",
    ",,",
    ", ,",
    "|",
    ", // why\n",
    ", /* why */ ",
    ", # why\n",
    "\n",
    ",\u00a0",
    ", ...,",
    "},{",
)
COLONS: Final = (" ", "=", " => ", "::", ";", ":\u00a0", ":\u200b", ",", ": :", " -> ")
CLOSINGS: Final = ("", "]", ")", ",,}", "...", ">", "\u200b}", ";}", "// }", ", ...}")
OPENINGS: Final = ("", "{,", "{{", "(", "<", "{\u200b", "{;", "[", "{:", "{...")


def other_marks(rng: Random, draft: Draft) -> tuple[str, str]:
    part: Literal["comma", "colon", "closing", "opening"] = rng.choice(("comma", "colon", "closing", "opening"))
    setattr(draft, part, rng.choice({"comma": COMMAS, "colon": COLONS, "closing": CLOSINGS, "opening": OPENINGS}[part]))
    return f"syntax: {part}", draft.text


def other_quotes(rng: Random, draft: Draft) -> tuple[str, str]:
    quote = rng.choice(("'", "”", "`", "", '\\"', '""', "&quot;", "''"))
    return "syntax: quotes", draft.before + draft.inside.replace('"', quote) + draft.after


def lost_quote(rng: Random, draft: Draft) -> tuple[str, str]:
    inside = draft.inside
    places = [m.start() for m in re.finditer(r'(?<!\\)"', inside)]
    i = rng.choice(places) if places else 0
    return "syntax: a quote lost", draft.before + inside[:i] + inside[i + 1 :] + draft.after


def cut(rng: Random, draft: Draft) -> tuple[str, str]:
    text, start, end = draft.text, len(draft.before), len(draft.before) + len(draft.inside.rstrip())
    if rng.random() < 0.8:
        return "cut: at its end", text[: rng.randrange(end)]
    return "cut: at its beginning", text[rng.randint(start + 1, len(text)) :]


def two_objects(rng: Random, draft: Draft) -> tuple[str, str]:
    other = rng.choice(
        (answer(rng, 0.2).text, draft.text, '{"semantic_gap_magnitude": 0.1}', "{}", '{"a": 1}', "{0.5}")
    )
    between = rng.choice(("", "\n", " or ", ",", "\n```\n```json\n", "\n\nCorrection:\n", " ", "\x00", "\u2028"))
    return "around: a second object", between.join(rng.sample((draft.text, other), 2))


def stray_brace(rng: Random, draft: Draft) -> tuple[str, str]:
    form = rng.choice(("{}}", "{{}", "{{}}", "Use {braces}: {}", "{} {note}", "{}\n}", "}\n{}", "{} {", "${{}}"))
    i = form.index("{}")
    return "around: a stray brace", form[:i] + draft.text + form[i + 2 :]


def wrap(rng: Random, draft: Draft) -> tuple[str, str]:
    inside, text = draft.inside, draft.text
    kind, wrapped = rng.choice(
        (
            ("an object", f'{{"answer": {inside}}}'),
            ("an object", f'{{"a": 1, "b": [{inside}]}}'),
            ("an array of several", rng.choice((f"[1, {inside}]", f"[{inside}, 1]", f"[null, {inside}, {inside}]"))),
            ("two arrays", rng.choice((f"[[{inside}]]", f"[[{inside}],]", f"[[], {inside}]"))),
            ("half an array", rng.choice((f"[{inside}", f"{inside}]", f"[{inside},", f"[1, {inside}"))),
            ("a string", json.dumps(text)),
            ("a string", json.dumps([text])),
            ("a string in an object", json.dumps({"answer": text})),
            ("a string in a string", json.dumps(json.dumps(text))),
        )
    )
    return f"around: {kind}", wrapped


def judge_beside(rng: Random, draft: Draft) -> tuple[str, str]:
    line = beside(rng)
    return "around: a judgement in words", rng.choice(
        (f"{draft.text}\n{line}", f"{line}\n{draft.text}", f"{line}. {draft.text}")
    )


NO_OBJECT: Final = (
    "Category: {c}, magnitude {m}, confidence {n}", "{k}: {c}\n{l}: {m}\n{o}: {n}", "{c} {m} {n}", "({c}, {m}, {n})",
    '["{c}", {m}, {n}]', "<{k}>{c}</{k}><{l}>{m}</{l}><{o}>{n}</{o}>", "{k},{l},{o}\n{c},{m},{n}", "\\boxed{{c}}",
    "| {k} | {l} | {o} |\n|---|---|---|\n| {c} | {m} | {n} |", 'judge({k}="{c}", {l}={m}, {o}={n})', "{{c} {m}}",
    '{k} = "{c}"\n{l} = {m}\n{o} = {n}', "{category: '{c}', magnitude: {m}}", "{{c}: {m}}", "**{c}** ({m})", "{m}",
    '"{k}": "{c}", "{l}": {m}, "{o}": {n}', "- {k}: {c}\n- {l}: {m}", "[{k}: {c}]", "{c}", "{}", "{{c}, {m}}",
)  # fmt: skip


def no_object(rng: Random, draft: Draft) -> tuple[str, str]:
    values = dict(zip("klo", KEYS, strict=True)) | {
        "c": draft.says[0],
        "m": str(draft.says[1]),
        "n": str(draft.says[2]),
    }
    form = rng.choice(NO_OBJECT)
    for letter, value in values.items():
        form = form.replace("{" + letter + "}", value)
    return "no object", form


VALUES: Final = (spoil_number, spoil_number, spoil_number, spoil_category, spoil_category, spoil_category, swap_values)
OF_KEYS: Final = (drop_keys, rename_keys, rename_keys, double_a_key, double_a_key_in_another_case, judge_inside)
LAST: Final = (other_marks, other_quotes, lost_quote, cut, cut, two_objects, stray_brace, wrap, judge_beside, no_object)


def spoilt(rng: Random) -> Case:
    """An answer that must be refused, for one reason or for up to three."""
    draft = answer(rng, rng.choice((0.0, 0.3)))
    layers = rng.sample((VALUES, OF_KEYS, LAST), rng.choice((1, 1, 1, 2, 3)))
    kinds = [rng.choice(layer)(rng, draft) for layer in (VALUES, OF_KEYS) if layer in layers]
    text = draft.text
    if LAST in layers:
        kind, text = rng.choice(LAST)(rng, draft)
        kinds.append(kind)
    return Case(kinds[0] if len(kinds) == 1 else f"{len(kinds)} spoilings", text, None)


def prefixes(rng: Random) -> Iterator[Case]:
    """An answer that counts, broken off at every place."""
    draft = answer(rng, 0.3)
    for end in range(len(draft.before) + len(draft.inside.rstrip())):
        yield Case("every prefix", draft.text[:end], None)


# Noise ---------------------------------------------------------------------------------------------------------------


def decoded(data: bytes) -> str:
    """As a response is read: what is no UTF-8 is written as an escape."""
    return data.decode("utf-8", "backslashreplace")


def noise(rng: Random) -> str:
    """Bytes, or marks of JSON, of no meaning."""
    if rng.random() < 0.5:
        return decoded(rng.randbytes(rng.randint(0, 80)))
    return "".join(rng.choices('{}[]":,.-+eE0123456789 \n\t\\untrfalse', k=rng.randint(0, 120)))


def mutated(rng: Random, text: str) -> str:
    """`text`, of which up to four bytes or stretches were changed."""
    data = bytearray(text.encode("utf-8", "backslashreplace"))
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(len(data) + 1)
        j = min(len(data), i + rng.choice((1, 1, 1, 1, 2, 5, 20)))
        old = bytes(data[i:j])
        flipped = bytes([old[0] ^ 1 << rng.randrange(8)]) + old[1:] if old else b""
        mark = bytes([rng.choice(b'",{}[]:09-e\\\x00\xff')])
        data[i:j] = rng.choice((flipped, rng.randbytes(len(old)), b"", mark + old, old[::-1], old * 2))
    return decoded(bytes(data))


def mutant(rng: Random) -> str:
    """An answer that counts, a few bytes of which were changed."""
    return mutated(rng, answer(rng, rng.choice((0.0, 0.3))).text)


TOKENS: Final = (
    '{"', '"}', "{", "}", "```json\n", "```", "[", "]", ", ", ": ", "\n", '"', ",", ":", " ", "...", "0.5", "1", "0",
    "Assistant: ", "The ", "response", " A", " B", "is better", "**", "Category", "magnitude", "confidence", "½",
    '{"semantic_gap_category": "Style", "semantic_gap_magnitude": 0.2, "semantic_gap_confidence": 0.9}', "<|end|>",
    '{"semantic_gap_category": "Safety", "semantic_gap_magnitude": 0.8', ', "semantic_gap_confidence": 0.7}', "\ufffd",
    *(f'"{key}": ' for key in KEYS), *KEYS, *(f'"{name}"' for name in CATEGORIES), *CATEGORIES,
)  # fmt: skip


def fragment(rng: Random) -> str:
    """What a model that is too small, or too warm, comes up with: pieces of answers, and loops of them."""
    pieces = rng.choices(TOKENS, k=rng.randint(1, 14))
    if rng.random() < 0.3:
        i = rng.randrange(len(pieces))
        pieces[i:i] = pieces[i : i + rng.randint(1, 3)] * rng.randint(2, 6)
    return "".join(pieces)[: rng.choice((1000, 1000, 200, 64))]


# Random JSON, and what it says ---------------------------------------------------------------------------------------


class Pairs(list[tuple[str, Any]]):
    """An object, in which a key may stand twice."""


class Word(str):
    """A number or a constant as it is written."""

    __slots__ = ()


NUMBERS: Final = [
    Word(text) for text in ("0", "1", "0.5", "1.0", "-0.0", "1e-3", "2", "-0.1", "1e999", "NaN", "true", "null")
]
TEXTS: Final = ["0.5", " 1 ", "", "high", "semantic_gap_magnitude", "a {b}", "Honesty", "["]


def random_json(rng: Random, depth: int = 0) -> Any:
    """A value of any shape, often close to an answer."""
    shape = rng.random()
    if depth == 0 and shape < 0.7:
        return near_answer(rng)
    if depth > 2 or shape < 0.5:
        return rng.choice(rng.choice((NUMBERS, TEXTS, list(CATEGORIES))))
    if shape < 0.75:
        return [random_json(rng, depth + 1) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    names = rng.choices((*KEYS, "a", "b", "note", "Semantic_Gap_Category"), k=rng.randint(0, 4))
    return Pairs((name, random_json(rng, depth + 1)) for name in names)


def near_answer(rng: Random) -> Any:
    pairs = Pairs(
        (key, rng.choice([*CATEGORIES, "tone", "HARM"] if key == KEYS[0] else [*NUMBERS[:6], "0.5"])) for key in KEYS
    )
    for _ in range(rng.choice((0, 0, 1, 2))):
        i = rng.randrange(len(pairs)) if pairs else 0
        change = rng.randrange(4)
        if change == 0 and pairs:
            pairs[i] = (pairs[i][0], random_json(rng, 1))
        elif change == 1 and pairs:
            del pairs[i]
        else:
            pairs.insert(i, (rng.choice(("a", "b", "note", "beta", *KEYS)), random_json(rng, 1)))
    rng.shuffle(pairs)
    return rng.choice((pairs, pairs, pairs, [pairs], [[pairs]], [pairs, "x"], Pairs([("answer", pairs)])))


def written_json(value: Any) -> str:
    """The value as JSON."""
    if isinstance(value, Word):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(name)}: {written_json(inner)}" for name, inner in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written_json, value)) + "]"
    return json.dumps(value)


def judged(value: Any) -> Gap | None:
    """What a JSON value says, by the rules: one object, the three keys once, each with a value that needs no guess."""
    if isinstance(value, list) and not isinstance(value, Pairs) and len(value) == 1:
        value = value[0]
    if not isinstance(value, Pairs) or unclean(value):
        return None
    given = dict(value)
    extras = [pair for pair in value if pair[0] not in KEYS]
    if not all(key in given for key in KEYS) or says_more(Pairs(extras)):
        return None
    category = given[KEYS[0]]
    if not isinstance(category, str) or isinstance(category, Word) or not re.fullmatch(r"[ -~\t\r\n]*", category):
        return None
    name = NAMES.get(re.sub(r"[ \t\r\n]+", " ", category).strip().lower())
    magnitude, confidence = (share(given[key]) for key in KEYS[1:])
    return None if name is None or magnitude is None or confidence is None else (name, magnitude, confidence)


def unclean(value: Any) -> bool:
    """A key twice in one object, or a constant that JSON has not."""
    if isinstance(value, Pairs):
        names = [name for name, _ in value]
        return len(names) > len(set(names)) or any(unclean(inner) for _, inner in value)
    if isinstance(value, list):
        return any(map(unclean, value))
    return isinstance(value, Word) and value in ("NaN", "Infinity", "-Infinity")


def says_more(value: Any) -> bool:
    """Whether a key of an answer is in it, in any dress, or a text gives one a value."""
    if isinstance(value, Pairs):
        return any(squeezed(name) in SQUEEZED_KEYS or gives_a_key(name) or says_more(inner) for name, inner in value)
    if isinstance(value, list):
        return any(map(says_more, value))
    return isinstance(value, str) and gives_a_key(value)


def gives_a_key(text: str) -> bool:
    """Whether a key is followed by a sign of a value, or by a number or a category."""
    for match in re.finditer(r"semantic[\W_]*gap[\W_]*(?:category|magnitude|confidence)", text, re.IGNORECASE):
        tail = text[match.end() :]
        marks = re.match(r"[\W_]*(?:is\W+)?", tail, re.IGNORECASE)
        assert marks is not None
        if re.search(r"[:=：>|→]", marks.group()) or re.match(
            rf"\d|{'|'.join(CATEGORIES)}", tail[marks.end() :], re.IGNORECASE
        ):
            return True
    return False


def share(value: Any) -> float | None:
    """A number in [0, 1], perhaps in a string."""
    if isinstance(value, Word):
        text = str(value)
    elif isinstance(value, str) and re.fullmatch(
        r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?", value.strip(" \t\r\n")
    ):
        text = value
    else:
        return None
    n = {"true": 2.0, "false": 2.0, "null": 2.0}.get(text) or float(text)
    return n if 0 <= n <= 1 else None


# A second reader -----------------------------------------------------------------------------------------------------

TOKEN: Final = re.compile(
    r'[ \t\r\n]*(?:(?P<string>"(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*")|(?P<mark>[{}\[\]:,])'
    r"|(?P<word>-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?|true|false|null))"
)


class _Reader:
    """JSON from a place in a text on, in which a comma may stand before a closing bracket. ValueError if it is none."""

    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at

    def token(self) -> tuple[str, str]:
        match = TOKEN.match(self.text, self.at)
        if match is None or match.lastgroup is None:
            raise ValueError("no JSON")
        self.at = match.end()
        return match.lastgroup, match[match.lastgroup]

    def value(self, token: tuple[str, str] | None = None) -> Any:
        kind, text = token or self.token()
        if kind == "string":
            return json.loads(text)
        if kind == "word":
            return Word(text)
        if text == "{":
            return Pairs(self.listed("}", self.pair))
        if text == "[":
            return list(self.listed("]", self.value))
        raise ValueError("no value")

    def listed(self, closing: str, item: Callable[[tuple[str, str]], Any]) -> Iterator[Any]:
        while (token := self.token())[1] != closing or token[0] == "string":
            yield item(token)
            kind, text = self.token()
            if (kind, text) == ("mark", closing):
                return
            if (kind, text) != ("mark", ","):
                raise ValueError("no comma")

    def pair(self, token: tuple[str, str]) -> tuple[str, Any]:
        if token[0] != "string" or self.token() != ("mark", ":"):
            raise ValueError("no key")
        return json.loads(token[1]), self.value()


def reading(text: str) -> Gap | None:
    """What a text says, by the rules: the one object in it, perhaps alone in an array, and no other judgement."""
    start = text.find("{")
    if start < 0:
        return None
    reader = _Reader(text, start)
    try:
        value = reader.value()
    except (ValueError, RecursionError):
        return None
    before, after = text[:start].rstrip(), text[reader.at :].lstrip()
    array = re.match(r",?\s*\]", after)
    if array and before.endswith("["):
        before, after = before[:-1].rstrip(), after[array.end() :].lstrip()
    if before.endswith(("[", ",")) or after.startswith((",", "]")):
        return None
    if any(brace in before + after for brace in "{}") or gives_a_key(before) or gives_a_key(after):
        return None
    return judged(value)
