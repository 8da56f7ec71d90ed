"""Prompt packs: what an annotator is asked. Appendix B.

A pack is a folder with one system prompt per variant (`v1.txt`, `v2.txt`, …) and the template of the user message
(`user.txt`); for typed decisions also `decisions.yaml`, with the template of the input and three questions per variant.
The text of a pair is hostile: it is put into a template in one pass and never looked at again, between boundary lines
that carry a code which occurs nowhere in the pair.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated, Final

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from sp2dpo.decision import LEVELS
from sp2dpo.errors import ProcessError
from sp2dpo.hashing import sha256_text
from sp2dpo.rubric import CATEGORIES
from sp2dpo.yamls import load_yaml

__all__ = ["DecisionPack", "Message", "PromptPack", "Questions", "load_pack", "render", "render_input", "write_pack"]

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

_DECISIONS: Final = "decisions.yaml"

_MARKER = re.compile(r"\{(" + "|".join(_MARKERS) + r")\}")


Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CategoryQuestion(_Part):
    """A choice among the six categories, each with its meaning."""

    question: Text
    options: dict[str, Text]

    @field_validator("options")
    @classmethod
    def _just_the_six(cls, options: dict[str, str]) -> dict[str, str]:
        """In the order of priority, whatever the order in the file."""
        if options.keys() != set(CATEGORIES):
            raise ValueError(f"the options are {', '.join(CATEGORIES)}, each of them and no other")
        return {category: options[category] for category in CATEGORIES}


class MagnitudeQuestion(_Part):
    """A place on an ordered scale, lowest level first."""

    question: Text
    levels: list[Text] = Field(min_length=len(LEVELS), max_length=len(LEVELS))


class ConfidenceQuestion(_Part):
    """A statement that holds or not."""

    statement: Text


class Questions(_Part):
    """What typed decisions are asked for in one variant; `about` stands before each of the three."""

    about: Text
    category: CategoryQuestion
    magnitude: MagnitudeQuestion
    confidence: ConfidenceQuestion


class _DecisionsFile(_Part):
    input: Text
    variants: dict[str, Questions]


@dataclass(frozen=True)
class DecisionPack:
    """The template of the input, and the questions of each variant; `text` is the file that holds them."""

    input: str
    variants: Mapping[str, Questions]
    text: str


@dataclass(frozen=True)
class PromptPack:
    """System prompts by variant, and the template of the user message; `decisions` if the panel asks for them."""

    systems: Mapping[str, str]
    user: str
    decisions: DecisionPack | None = None

    @property
    def files(self) -> dict[str, str]:
        """Name and text of each file of the pack."""
        texts = {f"{name}.txt": text for name, text in {**self.systems, "user": self.user}.items()}
        return texts if self.decisions is None else {**texts, _DECISIONS: self.decisions.text}

    @property
    def hashes(self) -> dict[str, str]:
        """sha256 of each file of the pack, by its name without the ending; part of λ."""
        return {file.rpartition(".")[0]: sha256_text(text) for file, text in self.files.items()}


def load_pack(folder: Path | None, variants: Iterable[str], *, decisions: bool = False) -> PromptPack:
    """Read a pack from a folder, or the built-in one.

    Args:
        decisions: an annotator of the panel is asked for typed decisions, so that decisions.yaml is needed.

    Raises:
        ProcessError: a file is missing, empty or not as described above, a variant has the name of another file, or a
            template lacks the place of one of the three texts.
    """
    variants = tuple(variants)
    for file in ("user.txt", *([_DECISIONS] if decisions else [])):
        name = file.partition(".")[0]
        if name in variants:
            raise ProcessError(f"panel.variants: '{name}' is the name of {file}; give the variant another name")
    where: Path | Traversable = folder if folder is not None else resources.files("sp2dpo").joinpath("packs/builtin")
    systems = {variant: _read(where, f"{variant}.txt") for variant in variants}
    user = _read(where, "user.txt")
    _check_places(user, f"{where}/user.txt")
    return PromptPack(systems, user, _read_decisions(where, variants) if decisions else None)


def _check_places(template: str, where: str) -> None:
    markers = {_MARKERS[name] for name in _MARKER.findall(template)}
    for needed in ("prompt", "chosen", "rejected"):
        if needed not in markers:
            raise ProcessError(f"{where} has no {{{needed}}}: the {needed} text would never be shown")


def _read_decisions(where: Path | Traversable, variants: Sequence[str]) -> DecisionPack:
    text, name = _read(where, _DECISIONS), f"{where}/{_DECISIONS}"
    try:
        keys = load_yaml(text)
        file = _DecisionsFile.model_validate(keys)
    except yaml.YAMLError as error:
        raise ProcessError(f"{name} is not readable YAML: {error}") from error
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, p['loc'])) or 'the file'}: {p['msg']}" for p in error.errors())
        raise ProcessError(f"{name}: {'; '.join(problems)}") from error
    for variant in variants:
        if variant not in file.variants:
            raise ProcessError(f"{name} has no questions for variant '{variant}'; it has: {', '.join(file.variants)}")
    _check_places(file.input, f"{name}, input,")
    return DecisionPack(file.input, file.variants, text)


def _read(where: Path | Traversable, name: str) -> str:
    file = where.joinpath(name)
    if not file.is_file():
        raise ProcessError(f"panel.prompts: {where} has no {name}")
    try:
        text = file.read_bytes().decode("utf-8")  # as it is, line ends too
    except UnicodeDecodeError as error:
        raise ProcessError(f"panel.prompts: {where}/{name} is not UTF-8: {error}") from error
    if not text.strip():
        raise ProcessError(f"panel.prompts: {where}/{name} is empty")
    return text


def write_pack(pack: PromptPack, folder: Path) -> None:
    """Keep a copy of the pack in a run directory."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in pack.files.items():
        (folder / name).write_bytes(text.encode("utf-8"))


def render(
    pack: PromptPack, variant: str, prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]
) -> list[dict[str, str]]:
    """The two messages of one call."""
    user = _fill(pack.user, prompt, chosen, rejected)
    return [{"role": "system", "content": pack.systems[variant]}, {"role": "user", "content": user}]


def render_input(
    decisions: DecisionPack, prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]
) -> str:
    """What the questions of all variants are about: the pair, and nothing that is asked."""
    return _fill(decisions.input, prompt, chosen, rejected)


def _fill(template: str, prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]) -> str:
    contents = [message["content"] for message in (*prompt, *chosen, *rejected)]
    tag = _tag(contents) if "{tag}" in template else ""
    texts = {
        "prompt": _conversation(prompt, tag, alone="user"),
        "chosen": _conversation(chosen, tag, alone="assistant"),
        "rejected": _conversation(rejected, tag, alone="assistant"),
        "tag": tag,
    }
    return _MARKER.sub(lambda marker: texts[_MARKERS[marker.group(1)]], template)


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
