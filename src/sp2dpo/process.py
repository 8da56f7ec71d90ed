"""The process file (λ): YAML to settings, pinned and hashed. Sec. 1, J.1, J.2.

Whatever changes the artifact is in it and in the hash; what changes only speed or extent is a flag of a command.
Knows nothing of run directories but how to read back their `process.yaml`.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sp2dpo.errors import ProcessError, nearest
from sp2dpo.hashing import sha256_json, sha256_path
from sp2dpo.pairs.formats import is_readable
from sp2dpo.pairs.hub import is_hub_id
from sp2dpo.predictor import load_predictor
from sp2dpo.prompts import PromptPack, load_pack
from sp2dpo.providers import params_sent, preset_annotators, profile_of
from sp2dpo.settings import SECTIONS, Annotator, DataSettings, Panel, ProcessFile, Student
from sp2dpo.yamls import load_yaml

__all__ = ["Process", "load_process", "process_of"]


@dataclass(frozen=True)
class Process:
    """A process file that was read, checked and pinned."""

    settings: ProcessFile
    base: Path
    pack: PromptPack
    resolved: dict[str, Any]
    lambda_hash: str

    def sent(self, annotator: str) -> Mapping[str, Any]:
        """What is sent to an annotator beside the question, as it was pinned: `params`, `ignored` and `refused`.

        Raises:
            ProcessError: a process that was pinned before that was part of λ.
        """
        sent: Mapping[str, Mapping[str, Any]] = self.resolved["pins"].get("sent", {})
        if annotator not in sent:
            raise ProcessError(
                f"the process does not say what is sent to annotator '{annotator}': its run directory was made by an "
                "older sp2dpo. Begin a new one, and take the answers over with --reuse"
            )
        return sent[annotator]


def _on_hub(source: str, base: Path) -> bool:
    """Whether `source` is `org/name`, and neither an existing path below `base` nor the name of a data file."""
    return is_hub_id(source) and not is_readable(source) and not (base / source).exists()


def load_process(path: Path) -> Process:
    """Read, check and pin a process file.

    Raises:
        ProcessError: not YAML; a key that is missing, unknown or mistyped; a file that is not there; a hub id without
            a revision; a judge that is also an annotator; a preset whose models have ended. The message names the key
            and the way out.
    """
    if not path.is_file():
        raise ProcessError(f"{path}: no such process file")
    return _pin(_validated(_expanded(_read(path), str(path)), str(path)), path.resolve().parent)


def process_of(run_dir: Path) -> Process:
    """The process that a run directory was made by, read back from its own `process.yaml` and prompts.

    Raises:
        ProcessError: the file is missing, or was edited (its hash does not fit).
    """
    path = run_dir / "process.yaml"
    if not path.is_file():
        raise ProcessError(f"{run_dir} is no run directory: it has no process.yaml")
    resolved = _read(path)
    if "lambda" not in resolved:
        raise ProcessError(f"{path} was not written by a run (it has no λ); {run_dir} is no run directory")
    stored = resolved.pop("lambda")
    if stored != sha256_json(resolved):
        raise ProcessError(f"{path} was changed after it was written: its content does not give λ {str(stored)[:12]}")
    settings = _validated({key: value for key, value in resolved.items() if key != "pins"}, str(path))
    pack = _pack_of(run_dir / "prompts", settings.panel)
    return Process(settings, run_dir, pack, resolved, stored)


def _read(path: Path) -> dict[str, Any]:
    try:
        keys = load_yaml(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:  # its own text would repeat the line, with whatever was pasted there
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ProcessError(f"{path} is not readable YAML: {error.problem or error.context}{line}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProcessError(f"{path} is not readable YAML: {error}") from None
    if not isinstance(keys, dict):
        raise ProcessError(f"{path} holds no keys; a process file begins with name, data and panel")
    return keys


def _expanded(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """A preset in the panel replaced by its annotators."""
    panel = raw.get("panel")
    if not isinstance(panel, dict) or panel.get("preset") is None:
        return raw
    if "annotators" in panel:
        raise ProcessError(f"{where}: panel.preset names the annotators; give it, or panel.annotators, not both")
    rest = {key: value for key, value in panel.items() if key != "preset"}
    return raw | {"panel": rest | {"annotators": preset_annotators(str(panel["preset"]), datetime.date.today())}}


def _validated(raw: dict[str, Any], where: str) -> ProcessFile:
    try:
        return ProcessFile.model_validate(raw)
    except ValidationError as error:
        problems: list[dict[str, Any]] = [dict(problem) for problem in error.errors()]
        deepest = [
            p for p in problems if not any(p["loc"] == q["loc"][: len(p["loc"])] for q in problems if q is not p)
        ]
        lines = [_explain(problem) for problem in deepest or problems]
        raise ProcessError(f"{where}: " + "; ".join(lines)) from error


def _explain(problem: dict[str, Any]) -> str:
    """One pydantic error as `key: what is wrong`, with the nearest known key for an unknown one."""
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _fields_at(problem["loc"][:-1])
        return f"unknown key '{key}'{nearest(str(problem['loc'][-1]), known)}; known here: {', '.join(known)}"
    if problem["type"] == "missing":
        return f"missing key '{key}'"
    if problem["type"] == "value_error":
        message = str(problem["ctx"]["error"])
        return f"{key}: {message}" if key else message
    if problem["type"] == "model_type":
        return f"{key}: it takes the keys {', '.join(_fields_at(problem['loc']))}{_shown(problem)}"
    if problem["loc"][-1] == "[key]":
        *table, name, _ = problem["loc"]
        known = re.findall(r"'(\w+)'", problem["ctx"]["expected"])
        return f"unknown name '{name}' in {'.'.join(table)}{nearest(str(name), known)}; known here: {', '.join(known)}"
    return f"{key}: {problem['msg']}{_shown(problem)}"


def _shown(problem: dict[str, Any]) -> str:
    """The value that does not fit, unless a key may have been pasted there."""
    value, where = problem["input"], problem["loc"]
    harmless = not isinstance(value, dict | list) and not {"api_key_env", "base_url", "extra"} & set(where)
    return f" (it is {value!r})" if harmless else ""


def _fields_at(loc: tuple[Any, ...]) -> list[str]:
    """Field names of the model that `loc` leads to."""
    model: Any = ProcessFile
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = str(model.model_fields[part].annotation) if part in model.model_fields else ""
        model = next((m for m in SECTIONS if re.search(rf"\b{m.__name__}\b", annotation)), model)
    return list(model.model_fields)


def _pin(settings: ProcessFile, base: Path) -> Process:
    """Hash what the process file points to, and the whole."""
    panel = settings.panel
    pack = _pack_of(None if panel.prompts == "builtin" else base / panel.prompts, panel)
    pins: dict[str, Any] = {
        "data": _pin_source(settings.data, base),
        "prompts": pack.hashes,
        "calls": {
            a.name: _pin_file(base / a.calls, f"calls of annotator '{a.name}'") for a in panel.annotators if a.calls
        },
        "sent": {a.name: _pin_sent(a, panel, pack) for a in panel.asked},
    }
    predictors = {a.name: _pin_predictor(base / a.model, a.name) for a in panel.annotators if a.kind == "distilled"}
    if predictors:
        pins["predictors"] = predictors
    if settings.student:
        pins["student"] = _pin_student(settings.student, base)
    resolved = json.loads(settings.model_dump_json()) | {"pins": pins}
    return Process(settings, base, pack, resolved, sha256_json(resolved))


def _pack_of(folder: Path | None, panel: Panel) -> PromptPack:
    decisions = any(annotator.kind == "decisions" for annotator in panel.annotators)
    return load_pack(folder, panel.variants, decisions=decisions)


def _pin_sent(annotator: Annotator, panel: Panel, pack: PromptPack) -> dict[str, Any]:
    """What is sent to an annotator, so that a later profile makes another λ only if that changes."""
    profile = profile_of(annotator)
    sent = params_sent(annotator, panel.decoding, profile)
    pinned = {"params": dict(sent.params), "ignored": list(sent.ignored), "refused": list(sent.refused)}
    if sent.params.get("response_format") == {"type": "json_object"} and profile.json_needs_word:
        _check_word(annotator, pack)
    return json.loads(json.dumps(pinned))  # type: ignore[no-any-return]


def _check_word(annotator: Annotator, pack: PromptPack) -> None:
    for variant, system in pack.systems.items():
        if "json" not in (system + pack.user).casefold():
            raise ProcessError(
                f"annotator '{annotator.name}' takes response_format json_object only if the messages hold the word "
                f"JSON; write it into {variant}.txt or user.txt, or give response_format: none"
            )


def _pin_source(data: DataSettings, base: Path) -> str:
    if not _on_hub(data.source, base):
        return _pin_file(base / data.source, "data.source")
    if data.revision is None:
        raise ProcessError(
            f"data.source {data.source} is no path below {base}, so it is read as a hub id, which needs data.revision: "
            f"the commit shown under 'Files and versions' of https://huggingface.co/datasets/{data.source}"
        )
    return data.revision


def _pin_file(path: Path, what: str) -> str:
    if not path.exists():
        raise ProcessError(f"{what}: {path} does not exist (paths are relative to the process file)")
    return sha256_path(path)


def _pin_predictor(folder: Path, name: str) -> str:
    """The hash of `model.json`, which has that of the weights; a broken one is found before a run begins."""
    try:
        return load_predictor(folder).sha256
    except ProcessError as error:
        raise ProcessError(f"model of annotator '{name}': {error}") from error


def _pin_student(student: Student, base: Path) -> str:
    """The revision of a hub model; of a folder, a hash of its names, sizes and small files (weights take minutes)."""
    if student.model == "toy":
        return "toy"
    if (base / student.model).is_dir():
        files = [path for path in sorted((base / student.model).rglob("*")) if path.is_file()]
        sizes = {path.name: path.stat().st_size for path in files}
        return sha256_json([sizes, {path.name: sha256_path(path) for path in files if sizes[path.name] < 2**24}])
    if not _on_hub(student.model, base):
        raise ProcessError(f"student.model: {student.model} is neither a hub id (org/name), a folder, nor 'toy'")
    if student.revision is None:
        raise ProcessError(
            f"student.model is the hub id {student.model}, which needs student.revision: the commit shown under "
            f"'Files and versions' of https://huggingface.co/{student.model}"
        )
    return student.revision
