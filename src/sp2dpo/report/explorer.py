"""Every pair of the schedule packed for the explorer: numbers as typed columns, and what its script must know.

A block is base64 of zlib-compressed bytes, so that no text of a pair can end it. Knows nothing of the page around it.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sp2dpo.audit.errors import LabelErrors
from sp2dpo.calls import Cell
from sp2dpo.evidence import Array, Evidence
from sp2dpo.report.cards import visible
from sp2dpo.report.marks import Marks
from sp2dpo.report.pipeline import Pipeline
from sp2dpo.rubric import CATEGORIES

__all__ = ["Block", "Texts", "block", "columns_of_run", "facts", "odd_calls", "openings", "script"]

_OPENING_CHARACTERS: Final = 4_000_000
"""Characters of all openings of prompts together, about; each has at least 48 and at most 200 of them."""

_NOT_LISTED: Final = 2**32 - 1
_LONG_ID: Final = 40
_CUT_ID: Final = 16


@dataclass(frozen=True)
class Block:
    """One data block of the page."""

    id: str
    base64: str

    @property
    def html(self) -> str:
        return f'<script type="application/octet-stream;base64" id="{self.id}">{self.base64}</script>\n'


@dataclass(frozen=True)
class Texts:
    """What the page holds of the texts; `excerpt` is None if all are whole, `all_mb` what holds them all, about."""

    whole: int
    excerpt: int | None
    chunk: int
    all_mb: int


def block(name: str, content: Any) -> Block:
    """A block of an array's bytes, or of anything else as JSON; equal content gives equal bytes."""
    if isinstance(content, np.ndarray):
        raw = np.ascontiguousarray(content).tobytes()
    else:
        raw = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    return Block(f"data-{name}", base64.b64encode(zlib.compress(raw, 6)).decode())


def script() -> str:
    """The whole script of the page; nothing in it is seen from outside."""
    here = files("sp2dpo.report")
    parts = [(here / name).read_text(encoding="utf-8") for name in ("explorer.js", "explorer_pair.js")]
    return "(() => {\n" + "\n".join(parts) + "})();\n"


def facts(
    evidence: Evidence,
    pipeline: Pipeline,
    marks: Marks,
    errors: LabelErrors,
    odd: Mapping[int, str],
    texts: Texts | None,
) -> Block:
    """What is true of the whole run; `odd` says of single calls, by their place, what was odd about them."""
    offsets = pipeline.offsets
    return block(
        "facts",
        {
            "n": evidence.n,
            "annotators": evidence.annotators,
            "variants": evidence.variants,
            "categories": CATEGORIES,
            "steps": [{"title": s.title, "of": s.of, "line": s.line} for s in pipeline.steps],
            "weights_j": pipeline.weights_j,
            "weights_k": pipeline.weights_k,
            "bounds": [pipeline.bounds[name] for name in CATEGORIES],
            "offsets": None if offsets is None else {"j": offsets.b.tolist(), "k": offsets.d.tolist()},
            "damping": pipeline.damping,
            "doubt": errors.rule,
            "marked": marks.usable,
            "odd": odd,
            "texts": asdict(texts) if texts else None,
        },
    )


def odd_calls(evidence: Evidence, odd: Mapping[Cell, str]) -> dict[int, str]:
    """What was odd about calls, by their place in the arrays of the schedule."""
    places: dict[str, list[int]] = {}
    for i, pair_id in enumerate(_text(evidence.schedule, "pair_id")):
        places.setdefault(pair_id, []).append(i)
    shape = evidence.gap_ijk.shape[1:]
    cells = {(a, v): (j, k) for j, a in enumerate(evidence.annotators) for k, v in enumerate(evidence.variants)}
    found: dict[int, str] = {}
    for (pair_id, annotator, variant), told in odd.items():
        if (annotator, variant) in cells:
            j, k = cells[annotator, variant]
            found |= {(i * shape[0] + j) * shape[1] + k: told for i in places.get(pair_id, ())}
    return dict(sorted(found.items()))


def columns_of_run(evidence: Evidence, marks: Marks, errors: LabelErrors) -> list[Block]:
    """The numbers of all pairs, a block for each column: those of the list, those of calls, those of annotators."""
    rank = np.full(evidence.n, _NOT_LISTED, np.uint32)
    rank[errors.listed] = np.arange(len(errors.listed))
    votes = [evidence.schedule[f"category_{a}_ens"].to_pylist() for a in evidence.annotators]
    columns: dict[str, Any] = {
        "key": np.array([list(bytes.fromhex(one[:12])) for one in _text(evidence.schedule, "pair_id")], np.uint8),
        "category": _codes(evidence.category_i),
        "beta": _packed(evidence.beta_i),
        "gap": _packed(evidence.gap_i),
        "spread": _packed(evidence.spread_i),
        "doubt": _packed(errors.doubt_i),
        "rank": rank,
        "reversed": marks.reversed_i.astype(np.uint8),
        "call_category": _codes(evidence.category_ijk),
        "magnitude": _packed(evidence.magnitude_ijk),
        "confidence": _packed(evidence.confidence_ijk),
        "gap_j": _packed(evidence.gap_ij),
        "mad_j": _packed(evidence.disagreement_ij),
        "category_j": _codes(np.array(votes, object).T),
        "tie_j": evidence.tie_ij.astype(np.uint8),
        "std": _packed(evidence.annotator_std_i),
    }
    kinds = {np.dtype(np.uint8): "u1", np.dtype(np.uint16): "u2", np.dtype(np.uint32): "u4", np.dtype(np.float32): "f4"}
    blocks, described = [], {}
    for name, packed in columns.items():
        codes, values = packed if isinstance(packed, tuple) else (packed, None)
        described[name] = {"type": kinds[codes.dtype], "values": values}
        blocks.append(block(name, codes))
    return [block("columns", described), *blocks]


def _packed(values: Array) -> tuple[NDArray[Any], list[float | None] | None]:
    """Places in the list of different values where these are few, which loses nothing; else single precision."""
    different, places = np.unique(values, return_inverse=True)
    if len(different) > max(256, min(65_536, values.size // 4)):
        return values.astype(np.float32), None
    small = np.uint8 if len(different) <= 256 else np.uint16
    return places.astype(small).reshape(values.shape), [None if np.isnan(one) else float(one) for one in different]


def _codes(names: NDArray[np.object_]) -> NDArray[np.uint8]:
    """Places in `CATEGORIES`; 255 where there is no answer."""
    codes = np.full(names.shape, 255, np.uint8)
    for place, name in enumerate(CATEGORIES):
        codes[names == name] = place
    return codes


def _text(table: pa.Table, name: str) -> list[str]:
    return table[name].to_pylist()  # type: ignore[return-value]


def openings(evidence: Evidence) -> Block:
    """How the prompt of each pair begins, and the source's id of it (long ones cut), to list and to search."""
    length = min(max(_OPENING_CHARACTERS // evidence.n, 48), 200)
    ids = zip(_text(evidence.schedule, "prompt_id"), _text(evidence.schedule, "pair_id"), strict=True)
    prompts = evidence.pairs["prompt"].take(evidence.at_i)
    return block(
        "openings",
        {
            "cut": _CUT_ID,
            "ids": ["" if own == pair else _cut_id(visible(own)) for own, pair in ids],
            "prompts": [_opening(messages, length) for batch in prompts.chunks for messages in batch.to_pylist()],
        },
    )


def _cut_id(own: str) -> str:
    return own if len(own) <= _LONG_ID else own[:_CUT_ID]


def _opening(messages: Any, length: int) -> str:
    """The start of the first message of a user, on one line."""
    first = next((m["content"] for m in messages if m["role"] == "user"), messages[0]["content"] if messages else "")
    return visible(" ".join(first[: 4 * length].split()))[:length]
