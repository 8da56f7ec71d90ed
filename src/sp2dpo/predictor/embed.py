"""Sentence embeddings of the texts of a pair, as features: the mean of the last hidden states of an encoder.

The only file of the predictor that knows torch and transformers. The encoder is pinned by a commit of the hub or by the
hash of its folder, and never runs code of its own or reads pickled weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from sp2dpo.errors import ProcessError
from sp2dpo.hashing import sha256_path
from sp2dpo.pairs.hub import is_hub_id
from sp2dpo.predictor.features import Features, Texts, dense_row

__all__ = ["Embedder", "embedded_features", "embedder_of", "pin_embedder"]

_AT_ONCE: Final = 32
_MOST_TOKENS: Final = 512

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Embedder:
    """An encoder and its tokenizer, ready to read."""

    model: Any
    tokenizer: Any
    tokens: int


def pin_embedder(source: str, beside: Path) -> dict[str, str]:
    """What `model.json` says about an encoder; a folder is named by its way from the folder `beside`.

    Args:
        source: a folder, or ID@REVISION of the hub.

    Raises:
        ProcessError: neither of the two.
    """
    if Path(source).is_dir():
        way = os.path.relpath(Path(source).resolve(), beside.resolve())
        return {"folder": Path(way).as_posix(), "sha256": sha256_path(Path(source))}
    name, _, revision = source.partition("@")
    if is_hub_id(name) and revision:
        return {"id": name, "revision": revision}
    raise ProcessError(
        f"--embedder {source}: neither a folder nor ID@REVISION, such as org/name@ and the commit shown under 'Files "
        "and versions' of the model's page"
    )


def embedder_of(about: Mapping[str, str], beside: Path) -> Embedder:
    """Load an encoder as it was pinned.

    Raises:
        ProcessError: it is not there, or its folder was changed.
    """
    where, revision = about.get("id", ""), about.get("revision")
    if "folder" in about:
        folder = (beside / about["folder"]).resolve()
        if not folder.is_dir() or sha256_path(folder) != about["sha256"]:
            raise ProcessError(f"the encoder {folder} is missing or was changed; the predictor was fitted on another")
        where = str(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, revision=revision)
        model = AutoModel.from_pretrained(where, revision=revision, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ProcessError(f"the encoder {where} cannot be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    most = getattr(model.config, "max_position_embeddings", None) or _MOST_TOKENS
    return Embedder(model.eval(), tokenizer, min(_MOST_TOKENS, most))


def embedded_features(embedder: Embedder, pairs: Iterable[Texts]) -> Features:
    """Embeddings p, c, r of prompt, chosen and rejected; c − r, c·r, p·c and p·r by coordinate; then the counts."""
    pairs = list(pairs)
    p, c, r = (_embedded([getattr(t, side) for t in pairs], embedder) for side in ("prompt", "chosen", "rejected"))
    counts = np.array([dense_row(texts) for texts in pairs])
    dense = np.concatenate([p, c, r, c - r, c * r, p * c, p * r, counts], axis=1)
    return Features(dense, np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(len(pairs) + 1, np.int64))


@torch.inference_mode()
def _embedded(texts: Sequence[str], embedder: Embedder) -> Array:
    """One row for each text; those of like length are read together."""
    order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
    rows: dict[int, Array] = {}
    for start in range(0, len(order), _AT_ONCE):
        some = order[start : start + _AT_ONCE]
        batch = embedder.tokenizer(
            [texts[n] for n in some], padding=True, truncation=True, max_length=embedder.tokens, return_tensors="pt"
        )
        mask = batch["attention_mask"]
        states = embedder.model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        summed = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        rows |= dict(zip(some, summed.to(torch.float64).numpy(), strict=True))
    return np.array([rows[n] for n in range(len(texts))])
