"""Likely label errors as records of Argilla 2, and the settings of the dataset that takes them. Files only, no client.

Two files, since a dataset is made from its settings and then takes records:

    dataset = rg.Dataset(name="label-errors", settings=rg.Settings.from_json("errors.settings.json"))
    dataset.create()
    dataset.records.from_json("errors.json")

Source: https://docs.argilla.io/latest/how_to_guides/import_export and
https://docs.argilla.io/latest/reference/argilla/records/records
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from sp2dpo.rubric import CATEGORIES
from sp2dpo.tables import write_atomic

__all__ = ["records", "settings", "settings_path", "write_argilla"]

GUIDELINES: Final = (
    "The panel of annotators, all of them models, doubts that the chosen response is the better one: it finds the "
    "preference wrong or debatable. Read the prompt and both responses and decide for yourself. The texts come from "
    "strangers; nothing in them is an instruction to you."
)

FIELDS: Final = {"prompt": "Prompt", "chosen": "Chosen response", "rejected": "Rejected response"}

QUESTIONS: Final = {
    "better": ("Which response is better?", {"chosen": "the chosen", "rejected": "the rejected", "neither": "neither"}),
    "label_wrong": ("Is the label wrong?", {"yes": "yes, wrong or debatable", "no": "no, it is right"}),
}
"""Name, title, and answers with what the reviewer reads."""

METADATA: Final = {
    "rank": "integer",
    "prompt_id": "terms",
    "doubt": "float",
    "doubting_annotators": "terms",
    "confidence": "float",
    "magnitude": "float",
    "category": "terms",
    "beta": "float",
    "effective_gap": "float",
}
"""What reviewers can filter and sort by, with its type in Argilla."""


def records(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `audit.errors.review_rows` in the form of `rg.Record.to_dict`.

    Rows with the same texts are one record, that of the first: the pair_id is the record's id. The panel suggests an
    answer to one question only: a low confidence says that the label is doubtful, not which response is better.
    """
    first: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        first.setdefault(row["pair_id"], row)
    return [_record(row) for row in first.values()]


def _record(row: Mapping[str, Any]) -> dict[str, Any]:
    doubting = row["doubting_annotators"].split(", ")
    plural = "annotator" if len(doubting) == 1 else "annotators"
    suggested = {"value": "yes", "score": row["doubt"], "agent": f"{len(doubting)} {plural} of the panel"}
    return {
        "id": row["pair_id"],
        "fields": {name: row[name] for name in FIELDS},
        "metadata": {name: row[name] for name in METADATA} | {"doubting_annotators": doubting},
        "suggestions": {"label_wrong": suggested},
        "responses": {},
        "vectors": {},
    }


def settings() -> dict[str, Any]:
    """The dataset's settings as `rg.Settings.from_json` reads them: three texts shown as they are, two questions."""
    shown_as_is = {"type": "text", "use_markdown": False}
    return {
        "guidelines": GUIDELINES,
        "allow_extra_metadata": False,
        "distribution": {"strategy": "overlap", "min_submitted": 1},
        "fields": [{"name": n, "title": t, "required": True, "settings": shown_as_is} for n, t in FIELDS.items()],
        "questions": [_question(name, title, answers) for name, (title, answers) in QUESTIONS.items()],
        "metadata": [_metadata(name, kind) for name, kind in METADATA.items()],
        "vectors": [],
    }


def _question(name: str, title: str, answers: Mapping[str, str]) -> dict[str, Any]:
    options = [{"value": value, "text": text} for value, text in answers.items()]
    kind = {"type": "label_selection", "options": options}
    return {"name": name, "title": title, "description": None, "required": True, "settings": kind}


def _metadata(name: str, kind: str) -> dict[str, Any]:
    known = {"values": list(CATEGORIES)} if name == "category" else {}
    title = name.replace("_", " ")
    return {
        "name": name,
        "title": title,
        "type": kind,
        "visible_for_annotators": True,
        "settings": {"type": kind} | known,
    }


def settings_path(path: Path) -> Path:
    """Where the settings go that belong to the records at `path`: `errors.settings.json` beside `errors.json`."""
    return path.with_name(f"{path.stem}.settings.json")


def write_argilla(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Records to `path` and settings to `settings_path(path)`, in ASCII: Argilla reads them as the machine decodes."""
    _write_json(path, records(rows))
    _write_json(settings_path(path), settings())


def _write_json(path: Path, data: Any) -> None:
    text = json.dumps(data, indent=1) + "\n"
    write_atomic(path, lambda partial: partial.write_text(text, encoding="ascii"))
