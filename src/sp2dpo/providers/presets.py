"""Panels by name. A preset whose model has ended refuses to start, and says what ended when."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from copy import deepcopy
from importlib import resources
from typing import Any, Final

import yaml

from sp2dpo.errors import ProcessError, nearest
from sp2dpo.providers.profiles import profile_of
from sp2dpo.settings import Annotator

__all__ = ["PRESETS", "preset_annotators"]

PRESETS: Final[Mapping[str, Mapping[str, Any]]] = yaml.safe_load(
    resources.files("sp2dpo.providers").joinpath("presets.yaml").read_text(encoding="utf-8")
)
"""Name → `about`, `as_of` and `annotators`, as in a process file."""


def preset_annotators(name: str, today: datetime.date) -> list[dict[str, Any]]:
    """The annotators of a preset, as a process file would list them.

    Raises:
        ProcessError: no preset of that name, or a model of it has ended; each model is named with its day.
    """
    if name not in PRESETS:
        raise ProcessError(f"panel.preset: no preset '{name}'{nearest(name, PRESETS)}; known: {', '.join(PRESETS)}")
    annotators: list[dict[str, Any]] = PRESETS[name]["annotators"]
    profiles = {one["model"]: profile_of(Annotator.model_validate(one)) for one in annotators}
    if any(profile.ends is not None and today >= profile.ends for profile in profiles.values()):
        states = (
            f"{model} {profile.lifecycle(today) or 'has no announced end'}" for model, profile in profiles.items()
        )
        raise ProcessError(
            f"panel.preset: {name} cannot be asked any more. {'. '.join(states)}. Take another preset "
            f"({', '.join(other for other in PRESETS if other != name)}) or name annotators; a run that has its "
            "answers goes on with the annotators that its process.yaml lists, in place of the preset"
        )
    return deepcopy(annotators)
