"""The layouts in which preference data is published, each read into one shape. Their order is their priority.

Knows nothing of files or filters: a row in, a `RawPair` or the reason why not out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from sp2dpo.errors import DataError
from sp2dpo.pairs.messages import Message, Unusable, as_messages, as_text, assistant, joined, split_prompt, user

__all__ = ["SCHEMAS", "RawPair", "Schema", "read_row", "schema_of"]

Row = Mapping[str, Any]
Texts = tuple[list[Message], list[Message], list[Message]]

TURN: Final = re.compile(r"\n\n(Human|Assistant):")
SAMPLE: Final = 1000


@dataclass(frozen=True, slots=True)
class RawPair:
    """One pair in canonical messages; `extra` holds the source's other columns as they were."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    prompt_id: str | None
    extra: dict[str, Any]


@dataclass(frozen=True)
class Schema:
    """A layout: `needs` and `text` are column names, `looks` inspects some rows, `read` gives prompt and replies."""

    name: str
    needs: tuple[str, ...]
    text: tuple[str, ...]
    read: Callable[[Row], Texts]
    looks: Callable[[Sequence[Row]], bool] = lambda rows: True

    def matches(self, columns: Iterable[str], rows: Sequence[Row]) -> bool:
        return set(self.needs) <= set(columns) and self.looks(rows)


def _is_blank(value: Any) -> bool:
    return value is None or value in ("", [])


def _conversation(value: Any, prompt: list[Message], prompt_is_text: bool) -> list[Message] | None:
    """Prompt and reply as one conversation, however much of the prompt `value` repeats; None if it is blank."""
    if _is_blank(value):
        return None
    if isinstance(value, str):
        return [*prompt, assistant(as_text(value))]
    turns = as_messages(value)
    # As in TRL: beside whole conversations, a prompt in plain text is only a label.
    whole = prompt_is_text and turns[0]["role"] != "assistant"
    return turns if whole else joined(prompt, turns)


def _split(chosen: list[Message] | None, rejected: list[Message] | None, prompt: list[Message]) -> Texts:
    """`split_prompt`, where a blank side becomes an empty reply to whatever the other side answers."""
    known = chosen or rejected or [*prompt, assistant("")]
    silence = [*known[:-1], assistant("")]
    return split_prompt(chosen or silence, rejected or silence)


def _read_explicit(row: Row) -> Texts:
    value = row.get("prompt")
    is_text = _is_blank(value) or isinstance(value, str)
    prompt = [user(as_text(value or ""))] if is_text else as_messages(value)
    chosen, rejected = (_conversation(row.get(side), prompt, is_text) for side in ("chosen", "rejected"))
    return _split(chosen, rejected, prompt)


def _read_implicit(row: Row) -> Texts:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_text(as_text(chosen), as_text(rejected))
    if any(isinstance(side, str) and side for side in (chosen, rejected)):
        raise Unusable("unreadable")
    sides = [None if _is_blank(side) else as_messages(side) for side in (chosen, rejected)]
    return _split(sides[0], sides[1], [])


def _split_text(chosen: str, rejected: str) -> Texts:
    """Plain texts: the shared beginning, cut back to white space, which the replies keep."""
    longest = min(len(chosen), len(rejected))
    shared = chosen[: next((i for i in range(longest) if chosen[i] != rejected[i]), longest)]
    end = len(_whole_words(shared))
    if not shared[:end].strip():
        raise Unusable("prompts_differ")
    return [user(shared[:end])], [assistant(chosen[end:])], [assistant(rejected[end:])]


def _whole_words(text: str) -> str:
    """`text` without the white space at its end, or, if it may end inside a word, without that word."""
    if not text or text[-1].isspace():
        return text.rstrip()
    head, *last = text.rsplit(None, 1)
    return head if last else ""


def _read_transcript(row: Row) -> Texts:
    """Differs: TRL keeps a pair whose sides part before their last reply; here both must answer one conversation.

    Where they part earlier, one side runs on in turns that the other never saw.
    """
    prompt = as_text(row.get("prompt"))
    chosen, rejected = (_transcript(prompt, as_text(row.get(side))) for side in ("chosen", "rejected"))
    texts = _split(chosen, rejected, [])
    if len(texts[1]) != 1 or len(texts[2]) != 1:
        raise Unusable("prompts_differ")
    return texts


def _transcript(prompt: str, text: str) -> list[Message] | None:
    whole = text if text.startswith(prompt) else prompt + text
    if not whole.strip():
        return None
    before, *turns = TURN.split(whole)
    if before.strip() or not turns:
        raise Unusable("unreadable")
    speakers = {"Human": user, "Assistant": assistant}
    return [speakers[who](said.strip()) for who, said in zip(turns[::2], turns[1::2], strict=True)]


def _are_transcripts(rows: Sequence[Row]) -> bool:
    """Most rows begin with `\\n\\nHuman:`; one plain text that happens to do so is not a transcript."""
    starts = [row.get("prompt") or row.get("chosen") for row in rows[:SAMPLE]]
    return 2 * sum(isinstance(text, str) and text.startswith("\n\nHuman:") for text in starts) > len(starts)


def _read_helpsteer3(row: Row) -> Texts:
    """Negative: response 1 is better; positive: response 2; zero: a tie."""
    preference = row.get("overall_preference")
    if isinstance(preference, bool) or not isinstance(preference, (int, float)) or preference != preference:
        raise Unusable("unreadable")
    if preference == 0:
        raise Unusable("tie")
    better, worse = ("response1", "response2") if preference < 0 else ("response2", "response1")
    return _read_explicit({"prompt": row.get("context"), "chosen": row.get(better), "rejected": row.get(worse)})


_PAIR: Final = ("prompt", "chosen", "rejected")
_HELPSTEER3: Final = ("context", "response1", "response2")

SCHEMAS: Final = (
    Schema("argilla", (*_PAIR, "chosen-rating", "rejected-rating"), _PAIR, _read_explicit),
    Schema("helpsteer3", (*_HELPSTEER3, "overall_preference"), _HELPSTEER3, _read_helpsteer3),
    Schema("hh-rlhf", ("chosen", "rejected"), _PAIR, _read_transcript, _are_transcripts),
    Schema("trl-explicit", _PAIR, _PAIR, _read_explicit),
    Schema("trl-implicit", ("chosen", "rejected"), _PAIR, _read_implicit),
)


def schema_of(columns: Sequence[str], rows: Sequence[Row]) -> Schema:
    """The first schema that fits.

    Raises:
        DataError: none does; the columns, and those that would be accepted, are listed.
    """
    fits = next((schema for schema in SCHEMAS if schema.matches(columns, rows)), None)
    if fits is None:
        accepted = "; ".join(f"{schema.name}: {', '.join(schema.needs)}" for schema in SCHEMAS)
        raise DataError(
            f"the source has the columns {', '.join(columns) or '(none)'}, which fit no known layout ({accepted}); "
            "name yours with data.columns, for example {prompt: question}"
        )
    return fits


def _prompt_id(value: Any) -> str | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return as_text(value) or None


def read_row(schema: Schema, row: Row) -> RawPair | str:
    """The pair, or the reason (`unreadable`, `tie`, `prompts_differ`) why the row is none."""
    extra = {name: value for name, value in row.items() if name not in schema.text and name != "prompt_id"}
    try:
        return RawPair(*schema.read(row), _prompt_id(row.get("prompt_id")), extra)
    except Unusable as problem:
        return problem.reason
