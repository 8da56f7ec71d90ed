"""The dataset card: README.md with the front matter that the hub reads, from the facts of a run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import yaml

from sp2dpo.audit.agreement import agreement
from sp2dpo.audit.errors import label_errors
from sp2dpo.publish.facts import Facts
from sp2dpo.publish.markdown import templates
from sp2dpo.report.pipeline import pipeline_of
from sp2dpo.report.provenance import Setting
from sp2dpo.report.summary import warnings

__all__ = ["CITATION", "front_matter", "write_card"]

CITATION: Final = """@misc{he2026sp2dpo,
  title  = {SP2DPO: An LLM-assisted Semantic Per-Pair DPO Generalization},
  author = {He, Chaoyue and Zhou, Xin and Wang, Di and Xu, Hong and Liu, Wei and Miao, Chunyan},
  year   = {2026},
  eprint = {2601.22385},
  archivePrefix = {arXiv}
}"""

_SIZES: Final = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"))


@dataclass(frozen=True)
class Config:
    """One table of the folder, as `datasets` calls it."""

    name: str
    file: str
    table: pa.Table
    size: int


@dataclass(frozen=True)
class Decoding:
    """What was asked of an annotator and what was sent, over the calls that had both."""

    annotator: str
    calls: int
    asked: str
    sent: str
    not_sent: str


def write_card(
    facts: Facts,
    folder: Path,
    tables: Mapping[str, pa.Table],
    columns: Mapping[str, str],
    *,
    license: str | None,
    repo: str | None,
) -> None:
    """Write README.md; the first of `tables` is what loads by default, and `columns` are those of the pairs."""
    configs = [
        Config("schedule" if path.startswith("schedule/") else "default", path, table, (folder / path).stat().st_size)
        for path, table in tables.items()
    ]
    settings = facts.run.process.settings
    text = (
        templates()
        .get_template("card.md.jinja")
        .render(
            front_matter=front_matter(facts, configs, license),
            facts=facts,
            settings=settings,
            data=settings.data,
            evidence=facts.evidence,
            process=facts.run.process,
            license=license,
            repo=repo or "OWNER/NAME",
            columns=columns,
            texts=len(configs) > 1,
            decoding=_decoding(facts.decoding),
            kinds={a.name: a.kind for a in settings.panel.annotators},
            prompts={path.stem: path.name for path in (folder / "prompts").iterdir()},
            priced=[(a.name, a.price.as_of) for a in settings.panel.annotators if a.price],
            agreement=agreement(facts.evidence),
            doubted=label_errors(facts.evidence),
            warnings=warnings(facts.evidence),
            plain=_is_plain(settings.schedule),
            gaps_missing=settings.schedule.min_calls is not None,
            envelope=facts.run.process.settings.schedule.widest_envelope,
            steps=pipeline_of(facts.evidence).steps,
            citation=CITATION,
        )
    )
    (folder / "README.md").write_text(re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8")


def front_matter(facts: Facts, configs: Iterable[Config], license: str | None) -> str:
    """The YAML between the two rules, with the features of every config."""
    configs = list(configs)
    data, rows = facts.run.process.settings.data, facts.evidence.n
    keys: dict[str, Any] = {
        "pretty_name": f"{facts.name}: preference pairs with per-pair DPO temperatures",
        "license": license or "other",
        **({} if license else {"license_name": "not-stated", "license_link": "README.md"}),
        "task_categories": ["text-generation"],
        "tags": ["dpo", "preference", "rlhf", "sp2dpo"],
        "annotations_creators": ["machine-generated"],
        "size_categories": [next((name for below, name in _SIZES if rows < below), "n>1M")],
        **({"source_datasets": [data.source]} if data.revision else {}),
        "configs": [
            {
                "config_name": config.name,
                **({"default": True} if n == 0 else {}),
                "data_files": [{"split": "train", "path": config.file}],
            }
            for n, config in enumerate(configs)
        ],
        "dataset_info": [_info(config) for config in configs],
    }
    return yaml.safe_dump(keys, sort_keys=False, allow_unicode=True, width=120).rstrip()


def _info(config: Config) -> dict[str, Any]:
    table = config.table
    return {
        "config_name": config.name,
        "features": [_feature(column) for column in table.schema],
        "splits": [{"name": "train", "num_bytes": table.nbytes, "num_examples": table.num_rows}],
        "download_size": config.size,
        "dataset_size": table.nbytes,
    }


def _feature(column: pa.Field[Any]) -> dict[str, Any]:
    if pa.types.is_list(column.type):
        return {"name": column.name, "list": [_feature(part) for part in column.type.value_type]}
    names = {"double": "float64", "float": "float32"}
    return {"name": column.name, "dtype": names.get(str(column.type), str(column.type))}


def _decoding(settings: Iterable[Setting]) -> list[Decoding]:
    """One row for each set of settings that an annotator's calls had."""
    rows = []
    for (annotator, calls), group in groupby(settings, lambda one: (one.annotator, one.calls)):
        found = list(group)
        asked = ", ".join(f"{one.name} {_short(one.asked)}" for one in found if one.asked not in ("–", "null"))
        sent = ", ".join(f"{one.name} {_short(one.sent)}" for one in found if one.sent != "–")
        not_sent = [one.name for one in found if one.note == "not sent"]
        if "max_completion_tokens" in sent and "max_tokens" in not_sent:
            not_sent.remove("max_tokens")  # it was sent, under its new name
        rows.append(Decoding(annotator, calls, asked or "–", sent or "nothing", ", ".join(not_sent) or "–"))
    return rows


def _short(value: str) -> str:
    """JSON as it is, but an object that says its own type by that."""
    read = json.loads(value)
    return str(read["type"]) if isinstance(read, dict) and "type" in read else value


def _is_plain(schedule: Any) -> bool:
    """Whether β is that of the paper's operators, over the answers that are there."""
    changed = schedule.model_dump(exclude_defaults=True)
    return not changed.keys() - {"method", "min_calls", "beta_min", "beta_max", "random_seed"}
