"""The settings of a process file: every key, its type and default, and what does not go together.

Strict: an unknown key, a text for a number, or a key pasted where the name of a variable belongs is refused.
Reads no files of the user.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Annotated, Any, Final, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    field_validator,
    model_validator,
)

from sp2dpo.arms import WITH_KNOBS, Arm, arm_of
from sp2dpo.errors import InputError, nearest
from sp2dpo.hashing import canonical_json
from sp2dpo.temperature import BETA_MAX, BETA_MIN

__all__ = [
    "SECTIONS",
    "SET_BY_RUN",
    "Annotator",
    "Damping",
    "DataSettings",
    "Decoding",
    "Endpoint",
    "Envelope",
    "Evaluate",
    "Panel",
    "Price",
    "ProcessFile",
    "Report",
    "Schedule",
    "Student",
    "Train",
    "names_of",
    "train_keys",
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
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("a base_url holds no user, password or ?query; name the variable of the key in api_key_env")
    return url


def _variable(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("api_key_env must be the name of an environment variable, such as OPENAI_API_KEY, not the key")
    return name


_SECRET = re.compile(r"apikey|authorization|secret|password|passwd|token$|bearer|credential|privatekey|^key$|^auth$")
_KEY_LIKE = re.compile(r"\s*(?:bearer\s|sk-|gsk_|hf_|AIza)", re.IGNORECASE)


def _no_secret(value: Any) -> None:
    """Refuse names of keys, and what looks like a key, at any depth; the message never has the value."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if _SECRET.search(re.sub(r"[^a-z]", "", str(name).casefold())):
                raise ValueError(f"extra must not hold '{name}': name the variable of the key in api_key_env")
            _no_secret(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            _no_secret(inner)
    elif isinstance(value, str) and _KEY_LIKE.match(value):
        raise ValueError("extra holds what looks like a key: name the variable of the key in api_key_env")


Address = Annotated[str, AfterValidator(_address)]
Variable = Annotated[str, AfterValidator(_variable)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


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
    """The settings of Table 6, for all annotators alike; less what a model's [profile](providers.md) excludes."""

    temperature: Number = Field(0.1, ge=0, description="of sampling")
    top_p: Number = Field(0.8, gt=0, le=1, description="nucleus sampling")
    top_k: Whole | None = Field(None, description="null: not sent")
    max_tokens: Whole = Field(
        64, ge=1, description="output cap, sent under the name that the model has for it; reasoning counts too"
    )
    max_output_tokens: Whole | None = Field(None, description="the same cap where an endpoint names it so")
    seed: Whole | None = Field(42, description="best effort, where the model takes one")
    frequency_penalty: Number = Field(0.0, description="0: off")
    presence_penalty: Number = Field(0.0, description="0: off")
    repetition_penalty: Number = Field(1.0, description="1: off")
    n: Literal[1] = Field(1, description="one answer a call")
    stop: tuple[str, ...] | None = Field(None, description="null: not sent")
    timeout: Number = Field(180, gt=0, description="seconds")
    retry_attempts: Whole = Field(3, ge=0, description="after the first attempt")
    retry_delay_base: Number = Field(5, ge=0, description="seconds; doubled at every retry, with jitter")


ASKED: Final = ("model", "messages", "stream", "n", "input", "state", "questions", "api", "variants")
"""Parameters that are the question itself, or how many answers it gets."""


class Annotator(_Settings):
    """A teacher: asked for JSON (`chat_json`, the paper's) or for typed decisions, or one that needs no asking: answers
    that are already there, or a predictor that `sp2dpo distill` made."""

    name: Name = Field(description="part of column names")
    kind: Literal["chat_json", "decisions", "recorded", "distilled"] = Field(
        "chat_json",
        description="asked for JSON, asked for typed decisions, answers that are already there, or a [predictor]"
        "(distill.md)",
    )
    model: str = Field(
        description="identifier sent to the endpoint; a dated snapshot where there is one; distilled: the folder of "
        "the predictor"
    )
    base_url: Address | None = Field(None, description="https://…/v1; required of one that is asked")
    provider: Literal[
        "auto",
        "openai",
        "gemini",
        "dashscope",
        "vllm",
        "sglang",
        "llama_cpp",
        "ollama",
        "transformers_serve",
        "generic",
    ] = Field("auto", description="whose [profile](providers.md) holds; auto: by the host of base_url, else generic")
    api_key_env: Variable | None = Field(None, description="the variable that holds the key, never the key")
    price: Price | None = Field(None, description="without it, cost is unknown")
    served_as: str | None = Field(None, description="name that the endpoint answers under, where it is not `model`")
    response_format: Literal["auto", "none", "json_object", "json_schema"] = Field(
        "auto",
        description="how the endpoint is asked to enforce JSON; auto: the best that its profile knows to be enforced; "
        "a schema allows two decimals",
    )
    api: Literal["decisions", "systemone"] | None = Field(
        None, description="decisions: which of the two dialects; none: that of the profile"
    )
    omit: tuple[str, ...] = Field((), description="further settings that the model refuses; recorded as not sent")
    extra: dict[str, Any] = Field({}, description="further parameters sent as they are, over those of the profile")
    calls: str | None = Field(None, description="recorded: a calls.sqlite or .jsonl of answers")

    @property
    def asked(self) -> bool:
        """Whether a model behind an endpoint is asked; the others answer offline, and cost nothing."""
        return self.kind not in ("recorded", "distilled")

    @field_validator("omit")
    @classmethod
    def _settings_to_omit(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in Decoding.model_fields:
                raise ValueError(f"'{name}' is no decoding setting{nearest(name, Decoding.model_fields)}")
        return names

    @field_validator("extra")
    @classmethod
    def _neither_the_question_nor_a_key(cls, params: dict[str, Any]) -> dict[str, Any]:
        for name in ASKED:
            if name in params:
                raise ValueError(f"extra must not hold '{name}': it would change what is asked")
        _no_secret(params)
        try:
            plain: dict[str, Any] = json.loads(canonical_json(params))
        except (TypeError, ValueError):
            raise ValueError("extra holds what JSON cannot: quote a date, and leave out .nan and .inf") from None
        return plain

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Annotator:
        for key, needed in (("base_url", self.asked), ("calls", self.kind == "recorded")):
            if needed and getattr(self, key) is None:
                raise ValueError(f"annotator '{self.name}' is of kind {self.kind}, which needs the key '{key}'")
            if not needed and getattr(self, key) is not None:
                raise ValueError(f"annotator '{self.name}' is of kind {self.kind}, which takes no '{key}'")
        for name, default in (("response_format", "auto"), ("omit", ())):
            if self.kind == "decisions" and getattr(self, name) != default:
                raise ValueError(f"annotator '{self.name}' is of kind decisions, which takes no '{name}'")
        if self.kind != "decisions" and self.api is not None:
            raise ValueError(f"annotator '{self.name}' is of kind {self.kind}, which takes no 'api'")
        return self


class Panel(_Settings):
    """Annotators × prompt variants."""

    prompts: str = Field("builtin", description="the built-in pack, or a folder with v1.txt v2.txt v3.txt user.txt")
    variants: tuple[Name, ...] = Field(("v1", "v2", "v3"), min_length=1, description="one file of the pack each")
    preset: str | None = Field(
        None, exclude=True, description="a panel by [name](providers.md#presets), in place of annotators"
    )
    annotators: tuple[Annotator, ...] = Field(min_length=1, description="the teachers")
    decoding: Decoding = Field(Decoding(), description="sampling and retries")

    @property
    def asked(self) -> list[Annotator]:
        """The annotators that are asked over the network."""
        return [annotator for annotator in self.annotators if annotator.asked]

    @property
    def predictors(self) -> tuple[str, ...]:
        """Names of the annotators that are local predictors: one voice each, whatever the prompt."""
        return tuple(annotator.name for annotator in self.annotators if annotator.kind == "distilled")

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


def _ordered(bounds: Any) -> Any:
    if bounds.beta_max < bounds.beta_min:
        raise ValueError(f"beta_max {bounds.beta_max} is below beta_min {bounds.beta_min}")
    return bounds


class Envelope(_Settings):
    """Bounds of β for the pairs of a category; J.5."""

    beta_min: Number = Field(gt=0, description="β of a gap of 0")
    beta_max: Number = Field(description="β of a gap of 1")

    _bounds = model_validator(mode="after")(_ordered)


class Damping(_Settings):
    """Less of a gap where the prompts disagree about it; eq. 39."""

    form: Literal["exponential", "rational"] = Field("exponential", description="exp(−λu) or 1/(1 + λu); eq. 40")
    strength: Number = Field(ge=0, description="λ of eq. 40, per unit of prompt disagreement")


Weights = Annotated[dict[Name, Annotated[Number, Field(ge=0)]], Field(min_length=1)]


class Schedule(_Settings):
    """How judgements become β; the defaults are the paper's."""

    method: Literal["sp2dpo"] = Field("sp2dpo", description="how β is made")
    debias: Number | None = Field(
        None,
        ge=0,
        description="take out additive offsets of annotators and prompts first, fitted over the pairs of the schedule "
        "with this ridge; eq. 44",
    )
    over_prompts: Literal["median", "mean"] = Field("median", description="eq. 16, or 41 with prompt_weights")
    prompt_weights: Weights | None = Field(None, description="a weight for each variant, for the mean; γ of eq. 41")
    damping: Damping | None = Field(None, description="of gaps on which the prompts disagree; eq. 39")
    over_annotators: Literal["mean", "median", "trimmed_mean", "huber"] = Field(
        "mean", description="eq. 17, or 42 with annotator_weights; C.5.3"
    )
    annotator_weights: Weights | None = Field(
        None, description="a weight for each annotator, for the mean; α of eq. 42"
    )
    over_calls: Literal["mean", "median", "trimmed_mean", "huber"] | None = Field(
        None, description="in place of over_prompts and over_annotators, all calls of a pair at once; eq. 43"
    )
    trim: Number = Field(
        0.2,
        ge=0,
        lt=0.5,
        description="of M values a trimmed mean leaves out ⌊trim × M⌋ at each end: none of 3 at 0.2, one at 0.34",
    )
    huber_delta: Number = Field(
        0.1,
        gt=0,
        description="how far from the centre a gap pulls in full; where a stretch of centres fits "
        "equally well, its middle",
    )
    min_calls: Whole | None = Field(
        None,
        ge=1,
        description="a pair with fewer valid answers (those of weight 0 not counted) is excluded; null: it needs all "
        "of them",
    )
    beta_min: Number = Field(BETA_MIN, gt=0, description="β of a gap of 0")
    beta_max: Number = Field(BETA_MAX, description="β of a gap of 1")
    envelopes: dict[Literal["Safety", "Factuality", "Instruction", "Reasoning", "Helpfulness", "Style"], Envelope] = (
        Field({}, description="other bounds for the pairs of a category; J.5")
    )
    random_seed: Whole = Field(42, description="of the Rand-β control")

    _bounds = model_validator(mode="after")(_ordered)

    @property
    def widest_envelope(self) -> tuple[float, float]:
        """The lowest and the highest β of all categories."""
        every: tuple[Schedule | Envelope, ...] = (self, *self.envelopes.values())
        return min(one.beta_min for one in every), max(one.beta_max for one in every)

    @model_validator(mode="after")
    def _operators_fit(self) -> Schedule:
        both = self.over_calls is not None
        if both and self.damping:
            raise ValueError("damping acts on the gap of an annotator, and over_calls makes none; give one of them")
        if (
            both
            and {"over_prompts", "over_annotators"} & self.model_fields_set
            and ((self.over_prompts, self.over_annotators) != ("median", "mean"))
        ):
            raise ValueError("over_calls stands in place of over_prompts and over_annotators; give it, or them")
        for weights, over in (("prompt_weights", "over_prompts"), ("annotator_weights", "over_annotators")):
            operator = "over_calls" if both else over
            if getattr(self, weights) is not None and getattr(self, operator) != "mean":
                raise ValueError(
                    f"{weights} are those of a mean, and {operator} is {getattr(self, operator)}; give {operator}: mean"
                )
        used = (self.over_calls or self.over_annotators,)
        for knob, operator in (("trim", "trimmed_mean"), ("huber_delta", "huber")):
            if operator not in used and getattr(self, knob) != type(self).model_fields[knob].default:
                raise ValueError(f"{knob} is that of {operator}, which neither over_annotators nor over_calls is")
        return self


class Student(_Settings):
    """The model that is trained."""

    model: str = Field(description="hub id; folder (names, sizes, small files are pinned); or 'toy', made in the run")
    revision: str | None = Field(None, description="commit of the model; required for a hub id")
    quantization: dict[str, Any] | None = Field(
        None,
        description="keys of `transformers.BitsAndBytesConfig` by their own names, for QLoRA; goes with `train.r`",
    )


class Train(BaseModel):
    """The keys below, and any key of `trl.DPOConfig` or `peft.LoraConfig` by its own name."""

    model_config = ConfigDict(extra="allow", frozen=True, hide_input_in_errors=True)
    methods: tuple[str, ...] = Field(
        ("sp2dpo",), min_length=1, description="[arms](training.md), trained one after the other from the same schedule"
    )
    beta: Number = Field(0.1, gt=0, description="the one β of the arm `dpo`, and of the loss on the held-out pairs")
    max_prompt_length: Whole | None = Field(None, ge=1, description="a longer prompt keeps its last tokens")
    held_out: Number = Field(
        0.0,
        ge=0,
        le=0.5,
        description="share of the pairs, drawn by prompt with `schedule.random_seed`, that no arm is trained on and "
        "every arm is measured on",
    )
    merge: Annotated[bool, Strict()] = Field(
        True, description="with LoRA: leave the merged model beside the adapter, in `merged/`"
    )
    knobs: dict[str, dict[str, Any]] = Field(
        {}, description="of an arm that is a method of the catalogue: its knobs, as `sp2dpo methods NAME` shows them"
    )
    layout: Literal["auto", "shared", "padded"] = Field(
        "auto", description="shared: each prompt computed once, rows packed; padded: as TRL; auto: shared if it can be"
    )

    def arm(self, name: str) -> Arm:
        """The arm of that name under these settings.

        Raises:
            InputError: no such arm, or one that these settings leave without pairs to be measured on.
        """
        arm = arm_of(name, beta=self.beta, knobs=self.knobs)
        if not arm.trained and not self.held_out:
            raise InputError(f"'{name}' is measured on held-out pairs, and train.held_out is 0; set it, such as 0.05")
        return arm

    @model_validator(mode="after")
    def _arms_are_known(self) -> Train:
        for name in self.methods:
            self.arm(name)
            if self.methods.count(name) > 1:
                raise ValueError(f"train.methods names '{name}' twice")
        for name in self.knobs:
            if name not in WITH_KNOBS:
                raise ValueError(f"'{name}' has no knobs{nearest(name, WITH_KNOBS)}; {', '.join(WITH_KNOBS)} have")
            arm_of(name, knobs=self.knobs)
        return self

    @model_validator(mode="before")
    @classmethod
    def _keys_of_trl_and_peft(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        known = {**dict.fromkeys(cls.model_fields, "own"), **train_keys("dpo"), **train_keys("lora")}
        for key in values:
            if key in SET_BY_RUN:
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
    def _weights_name_the_panel(self) -> ProcessFile:
        known = {"prompt_weights": list(self.panel.variants), "annotator_weights": names_of(self.panel)}
        for key, names in known.items():
            weights = getattr(self.schedule, key)
            if weights is None:
                continue
            if set(weights) != set(names) or not any(weights.values()):
                raise ValueError(
                    f"schedule.{key} needs one weight for each of {', '.join(names)}, not all of them zero; "
                    f"it has {', '.join(f'{name}: {weight:g}' for name, weight in weights.items())}"
                )
        calls = len(self.panel.variants) * len(self.panel.annotators)
        if self.schedule.min_calls is not None and self.schedule.min_calls > calls:
            raise ValueError(f"schedule.min_calls is {self.schedule.min_calls}, and a pair has {calls} calls")
        return self

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


SET_BY_RUN: Final = ("output_dir", "logging_dir", "run_name", "hub_model_id")


@cache
def train_keys(owner: Literal["dpo", "lora"]) -> dict[str, str]:
    """Names and types of the fields of `trl.DPOConfig` or `peft.LoraConfig`, from data, so that no torch is needed."""
    text = resources.files("sp2dpo").joinpath("train/keys.json").read_text(encoding="utf-8")
    keys: dict[str, dict[str, str]] = json.loads(text)
    return keys[owner]


SECTIONS: Final = (
    DataSettings,
    Price,
    Annotator,
    Endpoint,
    Decoding,
    Panel,
    Envelope,
    Damping,
    Schedule,
    Student,
    Evaluate,
    Report,
)
"""Every model below the top level that has fixed keys."""
