"""The dataset folder: pairs with their β, the schedule, where both came from, a card and Croissant metadata.

README.md  croissant.json  process.yaml  excluded.csv  prompts/
data/train-00000-of-00001.parquet         pairs and β, as TRL reads them (left out without texts)
schedule/schedule.parquet, .csv           every judgement, in full precision
manifests/  figures/beta.png  publish.manifest.json
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet

from sp2dpo.errors import InputError
from sp2dpo.hashing import sha256_file
from sp2dpo.publish.card import CITATION, write_card
from sp2dpo.publish.croissant import Records, croissant
from sp2dpo.publish.facts import Facts, read_current, read_facts, trained_pairs
from sp2dpo.publish.folder import new_folder, write_listing
from sp2dpo.publish.picture import draw_beta
from sp2dpo.schedule import columns_of

__all__ = ["TRAIN", "Published", "publish_dataset"]

TRAIN: Final = "data/train-00000-of-00001.parquet"
_SCHEDULE: Final = "schedule/schedule.parquet"
_ROWS_AT_ONCE: Final = 4096

TRAIN_COLUMNS: Final = {
    "pair_id": "sha256 of prompt, chosen and rejected; the key of the schedule",
    "prompt_id": "the source's id of the pair",
    "prompt": "messages up to the reply",
    "chosen": "the preferred reply, as messages",
    "rejected": "the other reply, as messages",
    "beta": "the temperature that training reads, as float32; the schedule holds it as float64",
    "category": "majority over the annotators' categories, for audit only",
    "effective_gap": "magnitude × confidence over the panel; β is made from it",
    "valid_calls": "valid answers about the pair",
}
"""Columns of the default config, in order."""


@dataclass(frozen=True)
class Published:
    """A folder that was made; `notes` is what the person who publishes it should look at first."""

    path: Path
    pairs: int
    files: int
    lambda_hash: str
    notes: tuple[str, ...]


def publish_dataset(
    run_dir: Path, out: Path, *, license: str | None = None, texts: bool = True, repo: str | None = None
) -> Published:
    """Make the dataset folder of a run; `repo` is the OWNER/NAME that its card names.

    Raises:
        InputError: a licence that is no identifier of the hub.
        RunDirError: no run, no schedule, or `out` holds something else that is in the way.
        Unfinished: the schedule is not the one that its manifest describes.
        ScheduleError: a β or a text that training would refuse.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", license):
        raise InputError(
            f"--license {license!r} is no identifier of the hub, such as apache-2.0 or cc-by-4.0; they are listed at "
            "https://huggingface.co/docs/hub/repositories-licenses"
        )
    facts = read_facts(read_current(run_dir))
    with new_folder(out) as folder:
        _copy(facts, folder)
        tables = _write_tables(facts, folder, texts)
        draw_beta(
            facts.evidence.beta_i, *facts.run.process.settings.schedule.widest_envelope, folder / "figures" / "beta.png"
        )
        write_card(facts, folder, tables, TRAIN_COLUMNS, license=license, repo=repo)
        _write_croissant(facts, folder, tables, license)
        files = write_listing(
            folder,
            artifact="dataset",
            texts=texts,
            inputs={facts.run.schedule.name: sha256_file(facts.run.schedule), facts.run.calls.name: facts.calls_hash},
            **{"lambda": facts.run.process.lambda_hash},
        )
    return Published(out, facts.evidence.n, len(files), facts.run.process.lambda_hash, _notes(facts, license, texts))


def _write_tables(facts: Facts, folder: Path, texts: bool) -> dict[str, pa.Table]:
    """The Parquet files by path, in the order of the card."""
    tables = {}
    if texts:
        tables[TRAIN] = _train_table(facts)
        _write_parquet(folder / TRAIN, tables[TRAIN])
    return tables | {_SCHEDULE: facts.evidence.schedule}


def _train_table(facts: Facts) -> pa.Table:
    made, schedule = trained_pairs(facts.run), facts.evidence.schedule
    columns = [(made if name in made.column_names else schedule)[name] for name in TRAIN_COLUMNS]
    return pa.Table.from_arrays(columns, names=list(TRAIN_COLUMNS))


def _write_parquet(path: Path, table: pa.Table) -> None:
    """Row groups and a page index of the size that the hub's viewer reads in parts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(table, path, compression="zstd", row_group_size=_ROWS_AT_ONCE, write_page_index=True)


def _copy(facts: Facts, folder: Path) -> None:
    """Files of the run as they are."""
    run = facts.run
    names = {
        "process.yaml": "process.yaml",
        run.excluded.name: run.excluded.name,
        run.schedule.name: _SCHEDULE,
        "schedule.csv": "schedule/schedule.csv",
        **{
            f"{stem}.manifest.json": f"manifests/{stem}.manifest.json"
            for stem in ("pairs", "calls", "gaps", "schedule")
        },
        **{f"prompts/{path.name}": f"prompts/{path.name}" for path in sorted((run.path / "prompts").iterdir())},
    }
    for name, target in names.items():
        (folder / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(run.path / name, folder / target)


def _write_croissant(facts: Facts, folder: Path, tables: Mapping[str, pa.Table], license: str | None) -> None:
    described = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): (sha256_file(path), path.stat().st_size) for path in described}
    evidence, panel = facts.evidence, facts.run.process.settings.panel
    annotators, variants = len(evidence.annotators), len(evidence.variants)
    about: dict[str, Any] = {
        "name": facts.name,
        "description": f"Preference pairs of {facts.source}, each with a DPO temperature decided before training.",
        "license": license or "not stated",
        "keywords": ["dpo", "preference", "sp2dpo"],
        "version": f"{facts.schedule_manifest['versions']['sp2dpo']}+{facts.run.process.lambda_hash[:12]}",
        "datePublished": facts.created,
        "citeAs": CITATION,
        "rai:dataAnnotationProtocol": f"{annotators} annotators × {variants} prompts, described in README.md",
        "rai:machineAnnotationTools": [a.model for a in panel.annotators],
        "rai:annotationsPerItem": str(annotators * variants),
    }
    records = [_records(facts, path, table.schema) for path, table in tables.items()]
    text = json.dumps(croissant(files, records, **about), indent=1, ensure_ascii=False) + "\n"
    (folder / "croissant.json").write_text(text, encoding="utf-8")


def _records(facts: Facts, path: str, schema: pa.Schema) -> Records:
    if path == TRAIN:
        return Records("pairs", path, schema, "Preference pairs, each with its β.", TRAIN_COLUMNS)
    meaning = columns_of(facts.evidence.annotators, facts.evidence.variants)
    return Records("schedule", path, schema, "Every judgement of every pair, and what became of it.", meaning)


def _notes(facts: Facts, license: str | None, texts: bool) -> tuple[str, ...]:
    notes = []
    if license is None and texts:
        notes.append("no licence is stated; the texts are under that of their source: name it with --license")
    settings = facts.run.process.settings
    paths = [settings.data.source, settings.panel.prompts, *(a.calls or "" for a in settings.panel.annotators)]
    mine = [path for path in paths if PurePath(path).is_absolute()]
    if mine:
        notes.append(f"process.yaml is in the folder and names paths of this machine: {', '.join(mine)}")
    return tuple(notes)
