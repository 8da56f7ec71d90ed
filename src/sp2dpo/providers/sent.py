"""What goes over the wire of what the process file asks for. Table 6.

The settings are the same for all annotators; no provider takes them all. What is left out, and what is known to have no
effect, is named, so that an auditor sees which settings were in force.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from sp2dpo.errors import ProcessError
from sp2dpo.llm.chat import GAP_SCHEMA
from sp2dpo.providers.profiles import CAPS, Profile
from sp2dpo.settings import Annotator, Decoding

__all__ = ["Sent", "params_requested", "params_sent"]

_CLIENT_SIDE: Final = ("timeout", "retry_attempts", "retry_delay_base")

_OFF: Final = {"frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0, "n": 1}
"""Values that ask for nothing: in force without being sent, unless the endpoint has defaults of its own."""


@dataclass(frozen=True)
class Sent:
    """What is sent beside model and messages, and of what was asked for: what is not sent, and what has no effect."""

    params: Mapping[str, Any]
    refused: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


def params_requested(decoding: Decoding) -> dict[str, Any]:
    """All settings of Table 6 that concern the model, null ones too."""
    return {name: value for name, value in decoding.model_dump(mode="json").items() if name not in _CLIENT_SIDE}


def params_sent(annotator: Annotator, decoding: Decoding, profile: Profile) -> Sent:
    """What is sent to an annotator.

    Requested settings, less those that are null, refused, without effect, or in `omit`; the cap under the name that the
    endpoint has for it; hidden reasoning off; JSON mode; and `extra` on top. A setting that is off is sent where the
    endpoint takes it, because a server may have another default. What is not documented is sent: preflight tells.

    Typed decisions have no decoding settings; their `params` are `api`, the dialect, and `extra`.

    Raises:
        ProcessError: typed decisions from an endpoint that is not known to have them, and no `api`.
    """
    requested = {name: value for name, value in params_requested(decoding).items() if value is not None}
    if annotator.kind == "decisions":
        return Sent({"api": _api(annotator, profile), **annotator.extra}, refused=tuple(requested))
    params, left_out = _settings(requested, annotator, profile)
    mode = profile.json_mode if annotator.response_format == "auto" else annotator.response_format
    if mode != "none":
        params["response_format"] = _FORMATS[mode]
        if profile.json[mode] == "ignored":
            left_out["response_format"] = "ignores"
    by_status = {status: tuple(name for name, why in left_out.items() if why == status) for status in left_out.values()}
    return Sent(
        {**params, **profile.reasoning, **annotator.extra},
        refused=by_status.get("refuses", ()),
        ignored=by_status.get("ignores", ()),
    )


def _settings(
    requested: Mapping[str, Any], annotator: Annotator, profile: Profile
) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings that are sent, and those that are not, each with `refuses` or `ignores`."""
    params: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name, value in requested.items():
        status = "refuses" if name in annotator.omit else profile.settings[name]
        off = _OFF.get(name) == value
        if name == "max_tokens" and name not in annotator.omit:
            params |= {} if set(CAPS) & set(annotator.extra) else {profile.cap: value}
        elif name == "max_output_tokens" and value == requested["max_tokens"] and "max_tokens" not in annotator.omit:
            continue  # the same cap
        elif status == "takes" or (status == "unknown" and not off):
            params[name] = value
        elif not off:
            left_out[name] = status
    return params, left_out


def _api(annotator: Annotator, profile: Profile) -> str:
    if annotator.api is not None:
        return annotator.api
    if profile.decisions_path is None:
        raise ProcessError(
            f"annotator '{annotator.name}' is of kind decisions, and {profile.provider} ({profile.family}) is not "
            "known to have them: give 'api' (decisions or systemone), or 'provider'"
        )
    return profile.decisions_path.removeprefix("/")


_FORMATS: Final[Mapping[str, Any]] = {
    "json_object": {"type": "json_object"},
    "json_schema": {
        "type": "json_schema",
        "json_schema": {"name": "semantic_gap", "strict": True, "schema": GAP_SCHEMA},
    },
}
