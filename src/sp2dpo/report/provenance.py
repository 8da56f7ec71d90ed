"""Where everything came from: files with their hashes, versions, settings asked for and sent. J.4. Judges nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sp2dpo.hashing import sha256_file
from sp2dpo.report.tally import Tally
from sp2dpo.report.training import arms_of
from sp2dpo.runs import Run
from sp2dpo.tables import read_manifest

__all__ = ["FileRow", "Setting", "files_of", "inputs_of", "settings_of", "versions_of"]


@dataclass(frozen=True)
class FileRow:
    """A file as its manifest describes it, and whether it still is so."""

    stage: str
    name: str
    sha256: str
    state: str


@dataclass(frozen=True)
class Setting:
    """One decoding setting of one annotator's calls."""

    annotator: str
    calls: int
    name: str
    asked: str
    sent: str
    note: str


def inputs_of(run: Run, calls_hash: str) -> dict[str, str]:
    """Hashes of all that the report is made from."""
    paths = [run.path / "process.yaml", run.pairs, run.schedule, run.excluded]
    paths += [run.path / f"{stem}.manifest.json" for stem in ("pairs", "calls", "gaps", "schedule")]
    of_training = ("margins.parquet", "held_out.parquet", "trainer_state.json", "metrics.manifest.json")
    paths += [run.training(arm.name) / name for arm in arms_of(run) for name in of_training]
    hashes = {path.relative_to(run.path).as_posix(): sha256_file(path) for path in paths if path.is_file()}
    return hashes | {run.calls.name: calls_hash}


def files_of(run: Run, calls_hash: str) -> list[FileRow]:
    """The artifacts of each stage; those of the run itself are hashed again, models are not."""
    rows = [_file(run, "λ", "process.yaml", None)]
    for stage, artifact in (("pairs", run.pairs), ("gaps", run.gaps), ("schedule", run.schedule)):
        files: Mapping[str, str] = (read_manifest(artifact) or {"files": {artifact.name: None}})["files"]
        rows += [_file(run, stage, name, sha) for name, sha in files.items()]
    logged = (read_manifest(run.calls) or {}).get("content")
    rows.insert(3, FileRow("calls", "calls.sqlite (its rows)", calls_hash, _state(calls_hash, logged)))
    for arm in arms_of(run):
        manifest = read_manifest(run.training(arm.name) / "metrics.json") or {"files": {}}
        rows += [
            FileRow(f"train {arm.name}", f"train/{arm.name}/{name}", sha, "not hashed again")
            for name, sha in manifest["files"].items()
            if name.endswith((".safetensors", ".parquet", ".json")) and "token" not in name
        ]
    return rows


def _file(run: Run, stage: str, name: str, described: str | None) -> FileRow:
    path = run.path / name
    if not path.is_file():
        return FileRow(stage, name, described or "", "missing")
    now = sha256_file(path)
    return FileRow(stage, name, now, "holds its own hash, λ" if stage == "λ" else _state(now, described))


def _state(now: str, described: str | None) -> str:
    if described is None:
        return "no manifest"
    return "as its manifest says" if now == described else "differs from its manifest"


def versions_of(run: Run) -> list[tuple[str, str]]:
    """What wrote each stage."""
    stages = {"pairs": run.pairs, "calls": run.calls, "gaps": run.gaps, "schedule": run.schedule}
    stages |= {f"train {arm.name}": run.training(arm.name) / "metrics.json" for arm in arms_of(run)}
    found = {name: (read_manifest(path) or {}).get("versions", {}) for name, path in stages.items()}
    told = {name: ", ".join(f"{what} {version}" for what, version in of.items()) for name, of in found.items()}
    return [(name, text) for name, text in told.items() if text]


def settings_of(tally: Tally) -> list[Setting]:
    """Each setting that was asked for or sent, for each annotator; the most frequent set of settings first."""
    rows = []
    for (annotator, asked, sent), calls in tally.params.most_common():
        wanted, wire = json.loads(asked), json.loads(sent)
        rows += [_setting(annotator, calls, name, wanted, wire) for name in dict.fromkeys([*wanted, *wire])]
    return rows


def _setting(annotator: str, calls: int, name: str, wanted: Mapping[str, Any], wire: Mapping[str, Any]) -> Setting:
    asked, sent = (json.dumps(of[name], ensure_ascii=False) if name in of else "–" for of in (wanted, wire))
    note = ""
    if name not in wire:
        note = "nothing to send" if wanted[name] is None else "not sent"
    elif name not in wanted:
        note = "added for this model"
    elif asked != sent:
        note = "changed"
    return Setting(annotator, calls, name, asked, sent, note)
