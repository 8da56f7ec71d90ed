"""The process file (λ): YAML to frozen, strict settings, pinned and hashed. Sec. 1, J.1, J.2.

Whatever changes the artifact is here and in the hash; what changes only speed or extent is a flag of a command.
Knows nothing of run directories.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from sp2dpo.errors import ProcessError, nearest
from sp2dpo.hashing import sha256_json, sha256_path
from sp2dpo.prompts import PromptPack, load_pack
from sp2dpo.temperature import BETA_MAX, BETA_MIN

__all__ = [
    "Annotator",
    "DataSettings",
    "Decoding",
    "Endpoint",
    "Process",
    "ProcessFile",
    "is_hub_id",
    "load_process",
    "process_of",
]

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Number = Annotated[float, Strict()]
Whole = Annotated[int, Strict()]


def _address(url: str) -> str:
    """An address without secrets in it; the message does not repeat what was given."""
    try:
        parts = urlsplit(url)
        ok = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        ok = False
    if not ok:
        raise ValueError("a base_url must be like https://host/v1 or http://127.0.0.1:8000/v1")
    if parts.username or parts.password:
        raise ValueError("a base_url must not hold a user or password; name the variable of the key in api_key_env")
    return url


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("api_key_env must be the name of an environment variable, such as OPENAI_API_KEY, not the key")
    return name


Address = Annotated[str, AfterValidator(_address)]
Variable = Annotated[str, AfterValidator(_variable)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataSettings(_Settings):
    """Which preference pairs, from where, and which of them are dropped."""

    source: str = Field(description="hub id, folder, .parquet, .jsonl, .jsonl.gz, .json or .csv")
    revision: str | None = Field(None, description="commit of the hub dataset; required for a hub id")
    split: str | None = Field(None, description="picks the files of a folder or hub dataset, e.g. train_prefs")
    files: str | None = Field(None, description="glob that picks files of a folder or hub dataset")
    columns: dict[str, str] = Field({}, description="this project's column name: the source's name")
    filters: tuple[str, ...] = Field(
        ("duplicate_prompt_id", "empty_field"), description="reasons for which a row is dropped, in this order"
    )


class Price(_Settings):
    """USD per million tokens, and when that was the price."""

    input: Number = Field(ge=0, description="USD per million input tokens")
    output: Number = Field(ge=0, description="USD per million output tokens")
    as_of: datetime.date = Field(description="day of that price")


class Endpoint(_Settings):
    """A model behind an OpenAI-compatible endpoint."""

    name: Name = Field(description="how reports call it")
    model: str = Field(description="identifier sent to the endpoint; a dated snapshot where there is one")
    base_url: Address = Field(description="https://…/v1")
    api_key_env: Variable | None = Field(None, description="the variable that holds the key, never the key")
    price: Price | None = Field(None, description="without it, cost is unknown")


class Decoding(_Settings):
    """The settings of Table 6, the same for all annotators. What is null, or off, is not sent."""

    temperature: Number = Field(0.1, ge=0, description="of sampling")
    top_p: Number = Field(0.8, gt=0, le=1, description="nucleus sampling")
    top_k: Whole | None = Field(None, description="null: not sent")
    max_tokens: Whole = Field(64, ge=1, description="output cap; a reasoning model spends it on hidden tokens too")
    max_output_tokens: Whole | None = Field(None, description="the same cap where an endpoint names it so")
    seed: Whole | None = Field(42, description="best effort, where the endpoint takes one")
    frequency_penalty: Number = Field(0.0, description="0: off")
    presence_penalty: Number = Field(0.0, description="0: off")
    repetition_penalty: Number = Field(1.0, description="1: off, and then not sent")
    n: Literal[1] = Field(1, description="one answer a call")
    stop: tuple[str, ...] | None = Field(None, description="null: not sent")
    timeout: Number = Field(180, gt=0, description="seconds")
    retry_attempts: Whole = Field(3, ge=0, description="after the first attempt")
    retry_delay_base: Number = Field(5, ge=0, description="seconds; doubled at every retry, with jitter")


class Annotator(_Settings):
    """A teacher: an endpoint (`chat_json`), or answers that are already there (`recorded`)."""

    name: Name = Field(description="part of column names")
    kind: Literal["chat_json", "recorded"] = Field(
        "chat_json", description="asked over the network, or answers that are already there"
    )
    model: str = Field(description="identifier sent to the endpoint; a dated snapshot where there is one")
    base_url: Address | None = Field(None, description="https://…/v1; required for chat_json")
    api_key_env: Variable | None = Field(None, description="the variable that holds the key, never the key")
    price: Price | None = Field(None, description="without it, cost is unknown")
    response_format: Literal["none", "json_object", "json_schema"] = Field(
        "none", description="how the endpoint is asked to enforce JSON"
    )
    omit: tuple[str, ...] = Field((), description="decoding settings that the model refuses; recorded as not sent")
    extra: dict[str, Any] = Field({}, description="further parameters sent as they are, e.g. reasoning_effort")
    calls: str | None = Field(None, description="recorded: a calls.sqlite or .jsonl of answers")

    @field_validator("omit")
    @classmethod
    def _settings_to_omit(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in Decoding.model_fields:
                raise ValueError(f"'{name}' is no decoding setting{nearest(name, Decoding.model_fields)}")
        return names

    @field_validator("extra")
    @classmethod
    def _not_the_question_itself(cls, params: dict[str, Any]) -> dict[str, Any]:
        for name in ("model", "messages", "stream"):
            if name in params:
                raise ValueError(f"extra must not hold '{name}': it would change what is asked")
        return params

    @model_validator(mode="after")
    def _kind_has_its_source(self) -> Annotator:
        needs, other = ("base_url", "calls") if self.kind == "chat_json" else ("calls", "base_url")
        if getattr(self, needs) is None:
            raise ValueError(f"annotator '{self.name}' is of kind {self.kind}, which needs the key '{needs}'")
        if getattr(self, other) is not None:
            raise ValueError(f"annotator '{self.name}' is of kind {self.kind}, which takes no '{other}'")
        return self


class Panel(_Settings):
    """Annotators × prompt variants."""

    prompts: str = Field("builtin", description="the built-in pack, or a folder with v1.txt v2.txt v3.txt user.txt")
    variants: tuple[Name, ...] = Field(("v1", "v2", "v3"), min_length=1, description="one file of the pack each")
    annotators: tuple[Annotator, ...] = Field(min_length=1, description="the teachers")
    decoding: Decoding = Field(Decoding(), description="sampling and retries")

    @model_validator(mode="after")
    def _names_differ(self) -> Panel:
        for what, names in (("annotators", [a.name for a in self.annotators]), ("variants", list(self.variants))):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"two {what} have the same name: {', '.join(twice)}")
        columns = [f"beta_{name}_{v}" for name in (*names_of(self), "annotators_mean") for v in (*self.variants, "ens")]
        columns += [f"beta_{name}_ens_tie_break" for name in names_of(self)]
        same = [column for column in columns if columns.count(column) > 1]
        if same:
            raise ValueError(f"names of annotators and variants collide in the column '{same[0]}'; rename one of them")
        return self


def names_of(panel: Panel) -> list[str]:
    """Names of the annotators, in order."""
    return [annotator.name for annotator in panel.annotators]


class Schedule(_Settings):
    """How judgements become β."""

    method: Literal["sp2dpo"] = Field("sp2dpo", description="how β is made")
    over_prompts: Literal["median"] = Field("median", description="eq. 16")
    over_annotators: Literal["mean"] = Field("mean", description="eq. 17")
    beta_min: Number = Field(BETA_MIN, gt=0, description="β of a gap of 0")
    beta_max: Number = Field(BETA_MAX, description="β of a gap of 1")
    random_seed: Whole = Field(42, description="of the Rand-β control")

    @model_validator(mode="after")
    def _envelope_is_ordered(self) -> Schedule:
        if self.beta_max < self.beta_min:
            raise ValueError(f"beta_max {self.beta_max} is below beta_min {self.beta_min}")
        return self


class Student(_Settings):
    """The model that is trained."""

    model: str = Field(description="hub id, folder, or 'toy': a tiny model made in the run")
    revision: str | None = Field(None, description="commit of the model; required for a hub id")


class Train(BaseModel):
    """`methods`, `beta`, `max_prompt_length`, and any key of `trl.DPOConfig` or `peft.LoraConfig` by its own name."""

    model_config = ConfigDict(extra="allow", frozen=True)
    methods: tuple[Literal["dpo", "rand_beta", "sp2dpo"], ...] = Field(
        ("sp2dpo",), min_length=1, description="trained one after the other from the same schedule"
    )
    beta: Number = Field(0.1, gt=0, description="the one β of plain DPO, method `dpo`")
    max_prompt_length: Whole | None = Field(None, ge=1, description="a longer prompt keeps its last tokens")

    @model_validator(mode="before")
    @classmethod
    def _keys_of_trl_and_peft(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        known = {**dict.fromkeys(cls.model_fields, "own"), **train_keys("dpo"), **train_keys("lora")}
        for key in values:
            if key in _SET_BY_RUN:
                raise ValueError(f"train.{key} is set by the run directory; leave it out")
            if key not in known:
                raise ValueError(f"unknown key 'train.{key}'{nearest(str(key), known)}")
            if not _has_type(values[key], known[key]):
                raise ValueError(f"train.{key} is {values[key]!r}; it must be of type {known[key]}")
        lora = [key for key in values if key in train_keys("lora")]
        if lora and "r" not in values:
            raise ValueError(f"train.{lora[0]} is a LoRA setting, and there is no 'r'; give the rank, or drop that key")
        return values


class Evaluate(_Settings):
    """Benchmarks and their judge, which must not be one of the annotators."""

    judge: Endpoint | None = Field(None, description="the LLM that scores")


class Report(_Settings):
    """What the report shows beyond the run itself."""

    known_reversed: str | None = Field(
        None, description="a true/false column of the source that marks pairs known to point the wrong way"
    )


class ProcessFile(_Settings):
    """λ: every decision that shapes the artifact and the training run."""

    name: Name = Field(description="names the run directory, runs/<name>")
    data: DataSettings = Field(description="the preference pairs")
    panel: Panel = Field(description="who is asked, and how")
    schedule: Schedule = Field(Schedule(), description="how judgements become β")
    student: Student | None = Field(None, description="the model to train; goes with train")
    train: Train | None = Field(None, description="how it is trained; goes with student")
    evaluate: Evaluate = Field(Evaluate(), description="benchmarks and their judge")
    report: Report = Field(Report(), description="what the report shows beyond the run")

    @model_validator(mode="after")
    def _judge_is_no_annotator(self) -> ProcessFile:
        judge = self.evaluate.judge
        for annotator in self.panel.annotators:
            if judge and annotator.model.casefold() == judge.model.casefold():
                raise ValueError(
                    f"evaluate.judge is {judge.model}, which is also the annotator '{annotator.name}': a judge must "
                    "not score what it taught; choose another judge"
                )
        if (self.student is None) != (self.train is None):
            raise ValueError("'student' and 'train' go together: give both, or neither to stop at the schedule")
        return self


def _has_type(value: Any, kind: str) -> bool:
    """Whether a value fits a numeric or true/false field; other kinds are left to TRL and PEFT."""
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    return kind != "bool" or isinstance(value, bool)


_SET_BY_RUN: Final = ("output_dir", "logging_dir", "run_name", "hub_model_id")


@cache
def train_keys(owner: Literal["dpo", "lora"]) -> dict[str, str]:
    """Names and types of the fields of `trl.DPOConfig` or `peft.LoraConfig`, from data, so that no torch is needed."""
    text = resources.files("sp2dpo").joinpath("train/keys.json").read_text(encoding="utf-8")
    keys: dict[str, dict[str, str]] = json.loads(text)
    return keys[owner]


@dataclass(frozen=True)
class Process:
    """A process file that was read, checked and pinned."""

    settings: ProcessFile
    base: Path
    pack: PromptPack
    resolved: dict[str, Any]
    lambda_hash: str


def is_hub_id(source: str, base: Path) -> bool:
    """Whether `source` is `org/name`, and neither an existing path below `base` nor the name of a data file."""
    is_file = source.lower().endswith((".parquet", ".jsonl", ".json", ".csv", ".gz", ".yaml", ".txt"))
    return bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source)) and not is_file and not (base / source).exists()


class _Yaml(yaml.SafeLoader):
    """YAML in which 5e-6 is a number and a key given twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = [key.value for key, _ in node.value]
        twice = sorted({key for key in seen if seen.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"key '{twice[0]}' is given twice, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_process(path: Path) -> Process:
    """Read, check and pin a process file.

    Raises:
        ProcessError: not YAML; a key that is missing, unknown or mistyped; a file that is not there; a hub id without
            a revision; a judge that is also an annotator. The message names the key and the way out.
    """
    if not path.is_file():
        raise ProcessError(f"{path}: no such process file")
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Yaml)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProcessError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ProcessError(f"{path} holds no keys; a process file begins with name, data and panel")
    return _pin(_validated(raw, str(path)), path.resolve().parent)


def process_of(run_dir: Path) -> Process:
    """The process that a run directory was made by, read back from its own `process.yaml` and prompts.

    Raises:
        ProcessError: the file is missing, or was edited (its hash does not fit).
    """
    path = run_dir / "process.yaml"
    if not path.is_file():
        raise ProcessError(f"{run_dir} is no run directory: it has no process.yaml")
    try:
        resolved = yaml.load(path.read_text(encoding="utf-8"), Loader=_Yaml)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProcessError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(resolved, dict) or "lambda" not in resolved:
        raise ProcessError(f"{path} was not written by a run (it has no λ); {run_dir} is no run directory")
    stored = resolved.pop("lambda")
    if stored != sha256_json(resolved):
        raise ProcessError(f"{path} was changed after it was written: its content does not give λ {str(stored)[:12]}")
    settings = _validated({key: value for key, value in resolved.items() if key != "pins"}, str(path))
    pack = load_pack(run_dir / "prompts", settings.panel.variants)
    return Process(settings, run_dir, pack, resolved, stored)


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
    return f"{key}: {problem['msg']} (it is {problem['input']!r})"


def _fields_at(loc: tuple[Any, ...]) -> list[str]:
    """Field names of the model that `loc` leads to."""
    model: Any = ProcessFile
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = str(model.model_fields[part].annotation) if part in model.model_fields else ""
        model = next((m for m in _MODELS if re.search(rf"\b{m.__name__}\b", annotation)), model)
    return list(model.model_fields)


_MODELS: Final = (DataSettings, Price, Annotator, Endpoint, Decoding, Panel, Schedule, Student, Evaluate, Report)


def _pin(settings: ProcessFile, base: Path) -> Process:
    """Hash what the process file points to, and the whole."""
    panel = settings.panel
    pack = load_pack(None if panel.prompts == "builtin" else base / panel.prompts, panel.variants)
    pins: dict[str, Any] = {
        "data": _pin_source(settings.data, base),
        "prompts": pack.hashes,
        "calls": {
            a.name: _pin_file(base / a.calls, f"calls of annotator '{a.name}'") for a in panel.annotators if a.calls
        },
    }
    if settings.student:
        pins["student"] = _pin_student(settings.student, base)
    resolved = json.loads(settings.model_dump_json()) | {"pins": pins}
    return Process(settings, base, pack, resolved, sha256_json(resolved))


def _pin_source(data: DataSettings, base: Path) -> str:
    if not is_hub_id(data.source, base):
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


def _pin_student(student: Student, base: Path) -> str:
    """The revision of a hub model; of a folder, a hash of its names, sizes and small files (weights take minutes)."""
    if student.model == "toy":
        return "toy"
    if (base / student.model).is_dir():
        files = [path for path in sorted((base / student.model).rglob("*")) if path.is_file()]
        sizes = {path.name: path.stat().st_size for path in files}
        return sha256_json([sizes, {path.name: sha256_path(path) for path in files if sizes[path.name] < 2**24}])
    if not is_hub_id(student.model, base):
        raise ProcessError(f"student.model: {student.model} is neither a hub id (org/name), a folder, nor 'toy'")
    if student.revision is None:
        raise ProcessError(
            f"student.model is the hub id {student.model}, which needs student.revision: the commit shown under "
            f"'Files and versions' of https://huggingface.co/{student.model}"
        )
    return student.revision
