"""Capability profiles: for each provider and model family, what it takes, when that was read, and where.

A profile says what is known, not what is so: `preflight` tries it. Knows nothing of the prompts or of HTTP.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from importlib import resources
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import ConfigDict, TypeAdapter

from sp2dpo.errors import ProcessError
from sp2dpo.settings import Annotator, Decoding, Price

__all__ = ["CAPS", "Batch", "Catalogue", "Model", "Profile", "Provider", "catalogue", "profile_of", "refuse_ended"]

Status = Literal["takes", "refuses", "ignores", "unknown"]
Severity = Literal["error", "warning", "note"]
Hidden = Literal["none", "little", "full", "unknown"]
JsonMode = Literal["none", "json_object", "json_schema"]

CAPS: Final = ("max_completion_tokens", "max_tokens", "max_output_tokens")
"""Names that an output cap has; one of them is sent."""

ENOUGH: Final = {"little": 256, "full": 2048}
"""Caps from which hidden reasoning should leave room for an answer of some forty tokens. Chosen, not measured."""

SOON: Final = datetime.timedelta(days=60)


@dataclass(frozen=True)
class Batch:
    """OpenAI-compatible Files and Batches: the share of the price that they save, and the limits of one file."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    discount: float
    window: str
    max_requests: int
    max_bytes: int


@dataclass(frozen=True)
class Profile:
    """What one model family at one provider takes, and, at the vendor's own endpoint, facts of the one model.

    Attributes:
        match: patterns of the names of models that it is for.
        sources: keys of `Catalogue.sources`.
        settings: each setting of Table 6 that concerns the model.
        reasoning: what is sent to switch hidden reasoning off; `hidden` is what is left of it then.
        json: whether each mode is enforced; `json_needs_word`: json_object wants the word "json" in the messages.
        decisions_path: of typed decisions, below the base URL.
        tokenize_path: of the server's tokenizer, below the server's root.
        ends: the day from which the model answers no more, or another in its place.
        price: of the price sheet; what a run costs is counted with the price of the process file.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    provider: str
    family: str
    match: tuple[str, ...]
    as_of: datetime.date
    sources: tuple[str, ...]
    settings: Mapping[str, Status]
    cap: str
    cap_covers_reasoning: bool
    hidden: Hidden
    json: Mapping[JsonMode, Literal["enforced", "ignored", "refused", "unknown"]]
    json_needs_word: bool = False
    reasoning: Mapping[str, Any] = field(default_factory=dict)
    batch: Batch | None = None
    decisions_path: str | None = None
    tokenize_path: str | None = None
    unverified: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    ends: datetime.date | None = None
    replacement: str | None = None
    price: Price | None = None

    @property
    def json_mode(self) -> JsonMode:
        """The best mode that is enforced."""
        modes: tuple[JsonMode, ...] = ("json_schema", "json_object")
        return next((mode for mode in modes if self.json[mode] == "enforced"), "none")

    def lifecycle(self, today: datetime.date) -> str | None:
        """`ended on 2026-06-01; replacement: …`, or `ends on …`; None if no end is announced."""
        if self.ends is None:
            return None
        text = f"{'ended' if today >= self.ends else 'ends'} on {self.ends}"
        return f"{text}; replacement: {self.replacement}" if self.replacement else text

    def problems(
        self, decoding: Decoding, today: datetime.date, annotator: Annotator | None = None
    ) -> list[tuple[Severity, str]]:
        """What stands against asking this model: an `error` makes the run pointless, a `note` is a fact to try.

        Args:
            annotator: its `extra`, `omit` and `response_format` are then taken into account.
        """
        chat = annotator is None or annotator.kind == "chat_json"
        found = [*self._ending(today)]
        if chat:
            found += [*self._empty_answers(decoding, annotator), *self._json_mode(annotator)]
        return found + [("note", f"not verified: {what}") for what in self.unverified]

    def _ending(self, today: datetime.date) -> Iterator[tuple[Severity, str]]:
        if self.ends is not None and today + SOON >= self.ends:
            yield "error" if today >= self.ends else "warning", f"the model {self.lifecycle(today)}"

    def _empty_answers(self, decoding: Decoding, annotator: Annotator | None) -> Iterator[tuple[Severity, str]]:
        extra = annotator.extra if annotator else {}
        if annotator and "max_tokens" in annotator.omit and not set(CAPS) & set(extra):
            return
        cap = next((extra[name] for name in CAPS if name in extra), decoding.max_tokens)
        changed = [name for name, value in self.reasoning.items() if extra.get(name, value) != value]
        hidden = "full" if changed else self.hidden
        if not self.cap_covers_reasoning or not isinstance(cap, int) or cap >= ENOUGH.get(hidden, 0):
            return
        text, way_out = f"{cap} tokens include hidden reasoning", f"raise max_tokens to {ENOUGH[hidden]} or more"
        if hidden == "little":
            yield "warning", f"{text}, of which little is left: answers may be cut; {way_out}"
        elif changed:
            yield "error", f"{text}, and extra.{changed[0]} switches it on: answers will be empty; {way_out}"
        else:
            yield "error", f"{text}, which cannot be switched off: answers will be empty; {way_out}"

    def _json_mode(self, annotator: Annotator | None) -> Iterator[tuple[Severity, str]]:
        mode = annotator.response_format if annotator else "auto"
        if mode == "json_object" or mode == "json_schema":
            how = self.json[mode]
            if how in ("refused", "ignored"):
                yield "error" if how == "refused" else "warning", f"response_format {mode} is {how} by {self.family}"


@dataclass(frozen=True)
class Model:
    """Facts of single models: when they end, what replaces them, what they cost."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    match: tuple[str, ...]
    sources: tuple[str, ...]
    ends: datetime.date | None = None
    replacement: str | None = None
    price: Price | None = None


@dataclass(frozen=True)
class Provider:
    """A provider: its hosts, its families in the order in which they are tried, and facts of its models."""

    hosts: tuple[str, ...]
    families: tuple[Profile, ...]
    models: tuple[Model, ...]


@dataclass(frozen=True)
class Catalogue:
    """All of profiles.yaml."""

    sources: Mapping[str, str]
    providers: Mapping[str, Provider]


@cache
def catalogue() -> Catalogue:
    """profiles.yaml, with what the families of a provider have in common written into each of them."""
    raw = yaml.safe_load(resources.files("sp2dpo.providers").joinpath("profiles.yaml").read_text(encoding="utf-8"))
    providers = {name: _provider(name, block) for name, block in raw["providers"].items()}
    return TypeAdapter(Catalogue).validate_python({"sources": raw["sources"], "providers": providers})


def _provider(name: str, block: Mapping[str, Any]) -> dict[str, Any]:
    common = block["common"]
    families = [_merged(common, family) | {"provider": name} for family in block["families"]]
    return {"hosts": block.get("hosts", []), "families": families, "models": block.get("models", [])}


def _merged(common: Mapping[str, Any], family: Mapping[str, Any]) -> dict[str, Any]:
    """A family's own word goes before that of all; sources and notes add up."""
    lists = {key: [*common.get(key, []), *family.get(key, [])] for key in ("sources", "notes")}
    return {**common, **family, **lists, "settings": common["settings"] | family.get("settings", {})}


def profile_of(annotator: Annotator) -> Profile:
    """The profile that fits an annotator.

    The provider is the one that it names, or the one that its host belongs to, or else `generic`. The family is the
    first whose pattern fits the last part of the model's name; each provider ends with one that fits any.
    """
    name, own_endpoint = _provider_of(annotator)
    provider = catalogue().providers[name]
    model = annotator.model.rpartition("/")[2].casefold()
    profile = next(family for family in provider.families if _fits(model, family.match))
    facts = [fact for fact in provider.models if own_endpoint and _fits(model, fact.match)]
    return replace(
        profile,
        ends=next((fact.ends for fact in facts if fact.ends), None),
        replacement=next((fact.replacement for fact in facts if fact.replacement), None),
        price=next((fact.price for fact in facts if fact.price), None),
    )


def _provider_of(annotator: Annotator) -> tuple[str, bool]:
    """Name of the provider, and whether the endpoint is its own."""
    host = (urlsplit(annotator.base_url or "").hostname or "").casefold()
    by_host = next((name for name, one in catalogue().providers.items() if _fits(host, one.hosts)), "generic")
    return (by_host if annotator.provider == "auto" else annotator.provider), annotator.provider in ("auto", by_host)


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def refuse_ended(annotators: Iterable[Annotator], today: datetime.date) -> None:
    """Stop before anything is spent on a model that is no more.

    Raises:
        ProcessError: a model has ended; all that have are named with their days and replacements.
    """
    ended = [
        f"annotator '{annotator.name}': {annotator.model} {profile.lifecycle(today)}"
        for annotator, profile in ((one, profile_of(one)) for one in annotators)
        if profile.ends is not None and today >= profile.ends
    ]
    if ended:
        raise ProcessError(
            f"{'. '.join(ended)}. Nothing was asked. Name another model; answers to questions that did not change are "
            "taken over with --reuse"
        )
