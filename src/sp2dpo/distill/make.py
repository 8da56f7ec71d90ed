"""`sp2dpo distill`: from an annotated run to the files of a predictor, with what it is worth on held-out pairs."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sp2dpo.calls import open_calls
from sp2dpo.distill import measure
from sp2dpo.distill.fit import choose_alpha, fit_weights, held_out, opening_of
from sp2dpo.errors import InputError, MissingExtra, RunDirError
from sp2dpo.evidence import Array, Evidence, read_evidence
from sp2dpo.hashing import sha256_file
from sp2dpo.predictor.features import EMBEDDINGS, HASHED, TEXT, texts_of
from sp2dpo.predictor.model import Predicted, Predictor, Reader, Weights, predicted, reader_of, save_predictor, short_id
from sp2dpo.report.marks import auc, read_marks
from sp2dpo.rubric import CATEGORIES
from sp2dpo.runs import Run

__all__ = ["LEAST_PAIRS", "distill_run"]

LEAST_PAIRS: Final = 50
_LEAST_HELD_OUT: Final = 8
_AT_ONCE: Final = 512


@dataclass(frozen=True)
class _Panel:
    """What the panel says of each scheduled pair: means over its calls, and the places of the categories."""

    gap_i: Array
    confidence_i: Array
    magnitude_i: Array
    category_i: NDArray[np.int64]

    def targets(self) -> Array:
        """Gap, confidence, and 1 for the category."""
        return np.column_stack([self.gap_i, self.confidence_i, np.eye(len(CATEGORIES))[self.category_i]])

    def at(self, rows: NDArray[np.bool_]) -> _Panel:
        return _Panel(*(value[rows] for value in vars(self).values()))


def distill_run(run: Run, folder: Path, *, embedder: str | None = None, seed: int = 0) -> Predictor:
    """Fit a predictor to a run, measure it on pairs of held-out prompts, and write it to `folder`.

    What is written is what was measured: it has not seen the held-out pairs.

    Args:
        embedder: a folder or ID@REVISION of an encoder; without one, hashed words are the features.
        seed: of the split.

    Raises:
        RunDirError: an answer of the run is by a predictor, or `folder` holds something else.
        InputError: too few pairs or prompts.
        MissingExtra: embeddings, and what makes them is not installed.
    """
    _check_folder(folder)
    evidence = read_evidence(run)
    _refuse_own_kind(run)
    features_about = _features_about(embedder, folder)
    openings = [opening_of(row["prompt"]) for row in _rows(evidence, ["prompt"], np.ones(evidence.n, bool))]
    held = held_out(openings, seed)
    _check_size(evidence, held)
    read, panel = reader_of(features_about, folder), _panel(evidence)
    model, alpha = _fitted(evidence, read, panel, openings, ~held, 0 if embedder else HASHED)
    made = predicted(model, read(map(texts_of, _rows(evidence, _TEXTS, held))))
    about = {
        "features": features_about,
        "fit": {"seed": seed, "alpha": alpha, "pairs": int((~held).sum())},
        "source": _source(run, evidence),
        "held_out": _held_out_facts(evidence, panel, made, held, openings),
        "versions": _versions(embedder),
    }
    return save_predictor(folder, model, about)


def _fitted(
    evidence: Evidence,
    read: Reader,
    panel: _Panel,
    openings: Sequence[str],
    fit: NDArray[np.bool_],
    hashed: int,
) -> tuple[Weights, float]:
    """The model of the pairs `fit`, and its regularisation."""
    features = read(map(texts_of, _rows(evidence, _TEXTS, fit)))
    alpha = choose_alpha(
        features, panel.gap_i[fit], [opening for opening, one in zip(openings, fit, strict=True) if one], hashed
    )
    ids = evidence.pair_ids
    known = np.array(sorted({short_id(ids[n]) for n in evidence.at_i[fit].tolist()}), np.uint64)
    return fit_weights(features, panel.targets()[fit], alpha, hashed, known), alpha


_TEXTS: Final = ("prompt", "chosen", "rejected")


def _rows(evidence: Evidence, columns: Sequence[str], some: NDArray[np.bool_]) -> Iterator[dict[str, Any]]:
    """Some of the scheduled pairs, not all at once."""
    texts, at = evidence.pairs.select(list(columns)), evidence.at_i[some]
    for start in range(0, len(at), _AT_ONCE):
        yield from texts.take(at[start : start + _AT_ONCE]).to_pylist()


def _check_folder(folder: Path) -> None:
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / "model.json").is_file()):
        raise RunDirError(f"{folder} holds something else than a predictor; choose another --output")


def _refuse_own_kind(run: Run) -> None:
    """A predictor that learns from a predictor learns its errors as if a panel had made them."""
    annotators = run.process.settings.panel.annotators
    own = next(iter(run.process.settings.panel.predictors), None)
    if own is None and any((annotator.calls or "").endswith(".sqlite") for annotator in annotators):
        with open_calls(run.calls) as log:
            own = next((call.annotator for call in log.answers() if call.kind == "distilled"), None)
    if own is not None:
        raise RunDirError(
            f"{run.path} has answers of '{own}', which is a distilled predictor: a predictor is not fitted to "
            "predictions. Distill a run whose panel was asked"
        )


def _check_size(evidence: Evidence, held: NDArray[np.bool_]) -> None:
    if evidence.n < LEAST_PAIRS:
        raise InputError(f"{evidence.run.path} has {evidence.n} scheduled pairs; a predictor needs {LEAST_PAIRS}")
    if held.sum() < _LEAST_HELD_OUT:
        raise InputError(
            f"{evidence.run.path}: {held.sum()} pairs can be held out without having their prompt on both sides, and "
            f"{_LEAST_HELD_OUT} are needed; the pairs open with too few different messages"
        )


def _features_about(embedder: str | None, folder: Path) -> dict[str, Any]:
    if embedder is None:
        return {"name": TEXT}
    try:
        from sp2dpo.predictor.embed import pin_embedder
    except ModuleNotFoundError as error:
        raise MissingExtra(f"--features embeddings (no module '{error.name}')", "embeddings") from error
    return {"name": EMBEDDINGS, "embedder": pin_embedder(embedder, folder)}


def _panel(evidence: Evidence) -> _Panel:
    places = {name: place for place, name in enumerate(CATEGORIES)}
    return _Panel(
        evidence.gap_i,
        np.nanmean(evidence.confidence_ijk, axis=(1, 2)),
        np.nanmean(evidence.magnitude_ijk, axis=(1, 2)),
        np.array([places[name] for name in evidence.category_i], np.int64),
    )


def _held_out_facts(
    evidence: Evidence, panel: _Panel, made: Predicted, held: NDArray[np.bool_], openings: Sequence[str]
) -> dict[str, Any]:
    """Everything that `measure` says, and how well known wrong labels are told."""
    actual, fitted = panel.at(held), panel.at(~held)
    groups = [opening for opening, out in zip(openings, held, strict=True) if out]
    gap = measure.gap_facts(actual.gap_i, made.gap, fitted.gap_i, groups)
    return {
        "statement": measure.statement(gap),
        "pairs": int(held.sum()),
        "openings": len(set(groups)),
        "gap": gap,
        "one_call": measure.against_calls(evidence.gap_ijk[held], actual.gap_i),
        "magnitude": measure.number_facts(actual.magnitude_i, measure.magnitude_of(made), fitted.magnitude_i),
        "confidence": measure.number_facts(actual.confidence_i, made.confidence, fitted.confidence_i),
        "category": measure.category_facts(actual.category_i, made.category, fitted.category_i),
        "calibration": measure.calibration(actual.gap_i, made.gap),
        "by_category": measure.by_category(actual.gap_i, made.gap, actual.category_i, fitted.gap_i),
        "known_reversed": _reversed_facts(evidence, actual.gap_i, made.gap, held),
    }


def _reversed_facts(evidence: Evidence, actual: Array, made: Array, held: NDArray[np.bool_]) -> dict[str, Any] | None:
    """AUC with which the gap tells pairs that point the right way from those known to point the wrong way."""
    marks = read_marks(evidence)
    if marks.column is None or marks.problem:
        return None
    wrong = marks.reversed_i[held]
    aucs = {"auc": auc(made[~wrong], made[wrong]), "auc_of_panel": auc(actual[~wrong], actual[wrong])}
    return {"column": marks.column, "pairs": int(wrong.sum()), **aucs}


def _source(run: Run, evidence: Evidence) -> dict[str, Any]:
    panel = run.process.settings.panel
    return {
        "run": run.process.settings.name,
        "lambda": run.process.lambda_hash,
        run.schedule.name: sha256_file(run.schedule),
        "pairs": evidence.n,
        "panel": {a.name: {"kind": a.kind, "model": a.model} for a in panel.annotators},
        "variants": list(panel.variants),
    }


def _versions(embedder: str | None) -> dict[str, str]:
    names = ["sp2dpo", "numpy", "scikit-learn", *(["torch", "transformers"] if embedder else [])]
    return {name: importlib.metadata.version(name) for name in names}
