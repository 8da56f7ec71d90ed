"""Messages in one shape, `{role, content}`, and where the prompt of two conversations ends.

Knows nothing of datasets: values in, messages out, or `Unusable` with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from sp2dpo.errors import DataError

__all__ = ["Message", "Unusable", "as_messages", "as_text", "assistant", "joined", "split_prompt", "user"]

Message = dict[str, str]

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
ROLE_ALIASES: Final = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "chatgpt": "assistant",
    "function": "tool",
    "observation": "tool",
}
ASKS: Final = ("user", "tool")
"""The roles of a message that an assistant answers."""


class Unusable(DataError):
    """One row that cannot become a pair; `reason` is what the table of counts calls it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def as_text(value: Any) -> str:
    """`value` as text that a file can hold; None is empty.

    Raises:
        Unusable: not text, or with half a surrogate pair in it.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unusable("unreadable")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise Unusable("unreadable") from error
    return value


def _as_message(value: Any) -> Message:
    if not isinstance(value, Mapping):
        raise Unusable("unreadable")
    name = as_text(value.get("role") or value.get("from")).strip().lower()
    role = ROLE_ALIASES.get(name, name)
    if role not in ROLES:
        raise Unusable("unreadable")
    content = value.get("content")
    return {"role": role, "content": as_text(value.get("value") if content is None else content)}


def as_messages(value: Any) -> list[Message]:
    """A list of messages, or one message, with ShareGPT's keys and roles translated.

    Raises:
        Unusable: anything else, or a role that no chat template knows.
    """
    if isinstance(value, Mapping):
        return [_as_message(value)]
    if not isinstance(value, list):
        raise Unusable("unreadable")
    return [_as_message(item) for item in value]


def joined(prompt: Sequence[Message], turns: Sequence[Message]) -> list[Message]:
    """The whole conversation, where `turns` may repeat the prompt, or its last messages, or begin with the reply."""
    head, tail = list(prompt), list(turns)
    for overlap in range(min(len(head), len(tail)), 0, -1):
        if head[-overlap:] == tail[:overlap]:
            return head + tail[overlap:]
    holds_prompt = any(tail[start : start + len(head)] == head for start in range(len(tail)))
    return tail if holds_prompt else head + tail


def split_prompt(
    chosen: Sequence[Message], rejected: Sequence[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Prompt, chosen and rejected reply. The prompt ends before the first message in which the two sides differ.

    It ends at the latest before the last message of either, so that no reply is without a message.

    Raises:
        Unusable: what is left is not a question that both sides answer.
    """
    longest = min(len(chosen), len(rejected)) - 1
    end = next((i for i in range(longest) if chosen[i] != rejected[i]), max(longest, 0))
    prompt, replies = list(chosen[:end]), (list(chosen[end:]), list(rejected[end:]))
    asked = bool(prompt) and prompt[-1]["role"] in ASKS
    if not (asked and all(reply and reply[0]["role"] == "assistant" for reply in replies)):
        raise Unusable("prompts_differ")
    return prompt, *replies
