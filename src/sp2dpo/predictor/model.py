"""The files of a predictor and the answers that it gives: `model.json` says all about it and names the hash of
`model.npz`, so that the hash of `model.json` stands for both.

A linear model of the effective gap, the confidence and the category. The magnitude that it answers is the gap over the
confidence, so that magnitude × confidence is the predicted gap (eq. 29). Knows nothing of runs or of how it was fitted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sp2dpo.errors import MissingExtra, ProcessError
from sp2dpo.hashing import sha256_file
from sp2dpo.predictor.features import DENSE, EMBEDDINGS, HASHED, TEXT, Features, Texts, text_features, texts_of
from sp2dpo.reply import KEYS
from sp2dpo.rubric import CATEGORIES
from sp2dpo.tables import write_atomic

__all__ = [
    "ABOUT",
    "TARGETS",
    "WEIGHTS",
    "Predicted",
    "Predictor",
    "Reader",
    "Weights",
    "load_predictor",
    "predicted",
    "reader_of",
    "save_predictor",
    "short_id",
]

Array = NDArray[np.float64]

Reader = Callable[[Iterable[Texts]], Features]
"""From the texts of some pairs to their features."""

ABOUT: Final = "model.json"
WEIGHTS: Final = "model.npz"
TARGETS: Final = ("gap", "confidence", *CATEGORIES)
_DECIMALS: Final = 4
_FORMAT: Final = 1


@dataclass(frozen=True)
class Weights:
    """A linear model: `centre` and `scale` (D,) standardise the dense numbers, `weights` (D + H, T) and `bias` (T,)
    make the T targets; `fitted_on` has the short ids of the pairs that it learnt from, sorted."""

    centre: NDArray[np.float32]
    scale: NDArray[np.float32]
    weights: NDArray[np.float32]
    bias: NDArray[np.float32]
    fitted_on: NDArray[np.uint64]


class Predicted(NamedTuple):
    """Of N pairs: effective gap and confidence, clipped to [0, 1], and the place of the category in `CATEGORIES`."""

    gap: Array
    confidence: Array
    category: NDArray[np.int64]


@dataclass(frozen=True)
class Predictor:
    """A model that was loaded, what `model.json` says about it, and the hash of that file."""

    about: Mapping[str, Any]
    model: Weights
    sha256: str
    folder: Path

    @property
    def name(self) -> str:
        """How answers name the model that served them."""
        return f"{self.about['features']['name']}@{self.sha256[:12]}"

    @property
    def exact(self) -> bool:
        """Whether every machine predicts the same to the last digit that is written."""
        return bool(self.about["features"]["name"] == TEXT)

    def knows(self, pair_id: str) -> bool:
        """Whether it was fitted on this pair."""
        known, short = self.model.fitted_on, short_id(pair_id)
        at = int(np.searchsorted(known, np.uint64(short)))
        return at < len(known) and int(known[at]) == short

    @cached_property
    def _read(self) -> Reader:
        return reader_of(self.about["features"], self.folder)

    def predict(self, pairs: Iterable[Texts]) -> Predicted:
        """Gap, confidence and category of pairs.

        Raises:
            MissingExtra: it reads embeddings, and what makes them is not installed.
            ProcessError: the encoder of the embeddings is missing or was changed.
        """
        return predicted(self.model, self._read(pairs))

    def answers(self, pairs: Sequence[Mapping[str, Any]]) -> list[str]:
        """The JSON that an annotator answers, for pairs of messages."""
        made = self.predict(map(texts_of, pairs))
        return [_answer(*one) for one in zip(*made, strict=True)]


def reader_of(features: Mapping[str, Any], folder: Path) -> Reader:
    """What makes the features that `model.json` in that folder names.

    Raises:
        MissingExtra: they are embeddings, and what makes them is not installed.
        ProcessError: the encoder of the embeddings is missing or was changed.
    """
    if features["name"] == TEXT:
        return text_features
    try:
        from sp2dpo.predictor import embed
    except ModuleNotFoundError as error:
        raise MissingExtra(f"a predictor on embeddings (no module '{error.name}')", "embeddings") from error
    return partial(embed.embedded_features, embed.embedder_of(features["embedder"], folder))


def _answer(gap: float, confidence: float, category: int) -> str:
    """Confidence is at least the gap, so that no magnitude is above 1."""
    certain = max(gap, confidence)
    magnitude = gap / certain if certain else 0.0
    numbers = (CATEGORIES[category], round(float(magnitude), _DECIMALS), round(float(certain), _DECIMALS))
    return json.dumps(dict(zip(KEYS, numbers, strict=True)))


def _scores(model: Weights, features: Features) -> Array:
    """The targets as they come out of the linear model, (N, T)."""
    counts = features.dense.shape[1]
    dense = (features.dense - model.centre) / model.scale
    made = dense @ model.weights[:counts].astype(np.float64) + model.bias
    for n, (start, end) in enumerate(zip(features.starts, features.starts[1:], strict=False)):
        columns, values = features.columns[start:end], features.values[start:end]
        made[n] += values.astype(np.float64) @ model.weights[counts + columns].astype(np.float64)
    return made


def predicted(model: Weights, features: Features) -> Predicted:
    """What a linear model makes of features."""
    made = _scores(model, features)
    gap, confidence = np.clip(made[:, 0], 0.0, 1.0), np.clip(made[:, 1], 0.0, 1.0)
    return Predicted(gap, confidence, made[:, 2:].argmax(axis=1))


def short_id(pair_id: str) -> int:
    """The first 64 bits of a pair_id, which is a sha256 in hexadecimal."""
    return int(pair_id[:16], 16)


def save_predictor(folder: Path, model: Weights, about: Mapping[str, Any]) -> Predictor:
    """Write both files, `model.json` last; the same model and facts give the same bytes."""
    write_atomic(folder / WEIGHTS, lambda path: _write_arrays(path, model))
    facts = {"format": _FORMAT, **about, "weights": {WEIGHTS: sha256_file(folder / WEIGHTS)}}
    text = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomic(folder / ABOUT, lambda path: path.write_text(text, encoding="utf-8"))
    return Predictor(facts, model, sha256_file(folder / ABOUT), folder)


def _write_arrays(path: Path, model: Weights) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **vars(model))


def load_predictor(folder: Path, pinned: str | None = None) -> Predictor:
    """Read a predictor and check its files against their hashes.

    Args:
        pinned: the hash that `model.json` must have.

    Raises:
        ProcessError: a file is missing, was changed, or is of another version of this project.
    """
    about_bytes, weights_bytes = (_bytes(folder / name) for name in (ABOUT, WEIGHTS))
    found = sha256(about_bytes).hexdigest()
    if pinned is not None and found != pinned:
        raise ProcessError(
            f"{folder / ABOUT} is not the file that λ pins (sha256 {found[:12]}, not {pinned[:12]}): put the old one "
            "back, or begin another run directory with --run-dir"
        )
    try:
        about: dict[str, Any] = json.loads(about_bytes)
        expected, version = about["weights"][WEIGHTS], about["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ProcessError(f"{folder / ABOUT} is no file of sp2dpo distill, or a damaged one: {error}") from error
    if version != _FORMAT:
        raise ProcessError(f"{folder / ABOUT} has the format {version}, and this sp2dpo knows {_FORMAT} only")
    if sha256(weights_bytes).hexdigest() != expected:
        mend = "make it again with: sp2dpo distill" if pinned is None else "put the old file back"
        raise ProcessError(f"{folder / WEIGHTS} was changed: its sha256 is not the one in {ABOUT}; {mend}")
    with np.load(folder / WEIGHTS, allow_pickle=False) as arrays:
        model = Weights(**{name: arrays[name] for name in arrays.files})
    _check_columns(folder, about, model)
    return Predictor(about, model, found, folder)


def _check_columns(folder: Path, about: Mapping[str, Any], model: Weights) -> None:
    """A later version may read other numbers from a text, under another name."""
    name = about["features"]["name"]
    if name not in (TEXT, EMBEDDINGS):
        raise ProcessError(f"{folder / ABOUT} has the features {name}, and this sp2dpo knows {TEXT} and {EMBEDDINGS}")
    if name == TEXT and model.weights.shape != (DENSE + HASHED, len(TARGETS)):
        raise ProcessError(f"{folder / WEIGHTS} does not fit the features {TEXT} of this sp2dpo")


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise ProcessError(f"{path} is missing; a predictor has {ABOUT} and {WEIGHTS}, made by: sp2dpo distill")
    return path.read_bytes()
