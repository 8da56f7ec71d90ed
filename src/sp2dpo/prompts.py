"""Prompt packs: what an annotator is asked. Appendix B.

A pack is a folder with one system prompt per variant (`v1.txt`, `v2.txt`, …) and the template of the user message
(`user.txt`). The text of a pair is hostile: it is put into the template in one pass and never looked at again, between
boundary lines that carry a code which occurs nowhere in the pair.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Final

from sp2dpo.errors import ProcessError
from sp2dpo.hashing import sha256_text

__all__ = ["Message", "PromptPack", "load_pack", "render", "write_pack"]

Message = Mapping[str, str]

_MARKERS: Final = {
    "prompt": "prompt",
    "prompt_text": "prompt",
    "chosen": "chosen",
    "winning_response_text": "chosen",
    "rejected": "rejected",
    "losing_response_text": "rejected",
    "tag": "tag",
}
"""Markers of user.txt; the paper's names for them (B.1) do as well."""

_MARKER = re.compile(r"\{(" + "|".join(_MARKERS) + r")\}")


@dataclass(frozen=True)
class PromptPack:
    """System prompts by variant, and the template of the user message."""

    systems: Mapping[str, str]
    user: str

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of each file of the pack; part of λ."""
        return {name: sha256_text(text) for name, text in {**self.systems, "user": self.user}.items()}


def load_pack(folder: Path | None, variants: Iterable[str]) -> PromptPack:
    """Read a pack from a folder, or the built-in one.

    Raises:
        ProcessError: a file is missing or empty, a variant is called `user`, or user.txt lacks the place of one of the
            three texts.
    """
    variants = tuple(variants)
    if "user" in variants:
        raise ProcessError("panel.variants: 'user' is the template of the user message; give the variant another name")
    where: Path | Traversable = folder if folder is not None else resources.files("sp2dpo").joinpath("packs/builtin")
    pack = PromptPack({variant: _read(where, variant) for variant in variants}, _read(where, "user"))
    markers = {_MARKERS[name] for name in _MARKER.findall(pack.user)}
    for needed in ("prompt", "chosen", "rejected"):
        if needed not in markers:
            raise ProcessError(f"{where}/user.txt has no {{{needed}}}: the {needed} text would never be shown")
    return pack


def _read(where: Path | Traversable, name: str) -> str:
    file = where.joinpath(f"{name}.txt")
    if not file.is_file():
        raise ProcessError(f"panel.prompts: {where} has no {name}.txt")
    try:
        text = file.read_bytes().decode("utf-8")  # as it is, line ends too
    except UnicodeDecodeError as error:
        raise ProcessError(f"panel.prompts: {where}/{name}.txt is not UTF-8: {error}") from error
    if not text.strip():
        raise ProcessError(f"panel.prompts: {where}/{name}.txt is empty")
    return text


def write_pack(pack: PromptPack, folder: Path) -> None:
    """Keep a copy of the pack in a run directory."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {**pack.systems, "user": pack.user}.items():
        (folder / f"{name}.txt").write_bytes(text.encode("utf-8"))


def render(
    pack: PromptPack, variant: str, prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]
) -> list[dict[str, str]]:
    """The two messages of one call."""
    contents = [message["content"] for message in (*prompt, *chosen, *rejected)]
    tag = _tag(contents) if "{tag}" in pack.user else ""
    texts = {
        "prompt": _conversation(prompt, tag, alone="user"),
        "chosen": _conversation(chosen, tag, alone="assistant"),
        "rejected": _conversation(rejected, tag, alone="assistant"),
        "tag": tag,
    }
    user = _MARKER.sub(lambda marker: texts[_MARKERS[marker.group(1)]], pack.user)
    return [{"role": "system", "content": pack.systems[variant]}, {"role": "user", "content": user}]


def _conversation(messages: Sequence[Message], tag: str, alone: str) -> str:
    """A single message of the expected role as it is; a conversation with a heading for each turn."""
    if len(messages) == 1 and messages[0]["role"] == alone:
        return messages[0]["content"]
    heading = f"----- {tag} " if tag else "----- "
    return "\n\n".join(f"{heading}{message['role']}\n{message['content']}" for message in messages)


def _tag(contents: Sequence[str]) -> str:
    """Eight hexadecimal digits made from the texts that occur in none of them."""
    whole = "\x00".join(contents)
    tag = sha256_text(whole)
    while tag[:8] in whole.lower():
        tag = sha256_text(tag)
    return tag[:8]
