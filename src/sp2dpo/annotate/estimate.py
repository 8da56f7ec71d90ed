"""What a panel will ask, and what that costs, before it is asked. Appendix G, eq. 60.

Every prompt is rendered and measured. How many tokens that makes is counted by the endpoint where a pilot has asked it
something, or where it counts for nothing; else it is guessed, and the estimate says so. Hidden reasoning is billed as
output and shows only in a pilot.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from sp2dpo.annotate.teacher import body_of
from sp2dpo.calls import CallLog, Cell, Usage, open_calls
from sp2dpo.cost import annotation_cost
from sp2dpo.errors import ProcessError
from sp2dpo.hashing import sha256_file
from sp2dpo.llm.chat import json_of
from sp2dpo.llm.decisions import texts_read
from sp2dpo.llm.http import Endpoint, read_key
from sp2dpo.pairs import prepare, read_pairs
from sp2dpo.process import Process
from sp2dpo.prompts import render
from sp2dpo.providers import profile_of
from sp2dpo.settings import Annotator
from sp2dpo.tables import write_atomic, write_manifest

__all__ = ["ESTIMATE", "AnnotatorCost", "Estimate", "estimate", "pairs_of"]

ESTIMATE: Final = "estimate.json"

CHARACTERS_PER_TOKEN: Final = 4.0
OUTPUT_TOKENS: Final = 40.0
"""Of an answer with the three keys, without hidden reasoning."""

_COUNTED_PROMPTS: Final = 16
_AT_ONCE: Final = 256


@dataclass(frozen=True)
class AnnotatorCost:
    """One annotator's part. Tokens are of one attempt; `counted_by` is `pilot`, `endpoint` or `guess`.

    `usd` is None without a price; `usd_batch` is None where the provider has no batches.
    """

    annotator: str
    model: str
    calls: int
    answered: int
    input_tokens: float
    output_tokens: float
    hidden_tokens: float | None
    billed_per_answer: float
    counted_by: str
    pilot_calls: int
    price_as_of: str | None
    usd: float | None
    usd_batch: float | None

    @property
    def basis(self) -> str:
        """What the figures rest on, in words."""
        counted = {
            "pilot": f"tokens as billed in {self.pilot_calls:,} calls, {self.billed_per_answer:.2f} for each answer",
            "endpoint": "prompts counted by the endpoint's tokenizer; output guessed",
            "guess": f"tokens guessed, {CHARACTERS_PER_TOKEN:g} characters to one; output guessed",
        }[self.counted_by]
        return f"{counted}; {f'price of {self.price_as_of}' if self.price_as_of else 'no price'}"


@dataclass(frozen=True)
class Estimate:
    """The whole panel."""

    pairs: int
    calls: int
    recorded_answers: int
    predicted_answers: int
    input_tokens: int
    output_tokens: int
    usd: float | None
    usd_batch: float | None
    oldest_price: str | None
    made_at: str
    annotators: tuple[AnnotatorCost, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def write(self, folder: Path, lambda_hash: str) -> None:
        """Keep it beside the call log, for the report, with its manifest."""
        path, text = folder / ESTIMATE, json.dumps(self.as_json(), indent=1) + "\n"
        write_atomic(path, lambda partial: partial.write_text(text, encoding="utf-8"))
        write_manifest(path, files={path.name: sha256_file(path)}, inputs={}, lambda_hash=lambda_hash)


def pairs_of(process: Process, pairs: Path | None, limit: int | None) -> pa.Table:
    """The pairs to be asked about: those of a run, or made in memory where there is none yet."""
    made = pairs is not None and pairs.is_file()
    table = read_pairs(pairs, "") if made and pairs is not None else prepare(process.settings.data, process.base).pairs
    return table.select(["pair_id", "prompt", "chosen", "rejected"]).slice(0, limit)


def estimate(process: Process, *, run_dir: Path | None = None, limit: int | None = None) -> Estimate:
    """Calls, tokens and USD of a whole panel.

    Args:
        run_dir: where answers of a pilot are, if there are any.
        limit: only the first so many pairs.
    """
    settings = process.settings
    pairs = pairs_of(process, run_dir and run_dir / "pairs.parquet", limit)
    asked = settings.panel.asked
    with _log_of(run_dir) as log:
        seen = _measure(process, asked, pairs, log) if asked else {}
        usage = {a.name: log.usage(a.name) if log else None for a in asked}
    parts = tuple(_part(process, a, pairs, seen[a.name], usage[a.name]) for a in asked)
    dates = [part.price_as_of for part in parts if part.price_as_of]
    kinds = Counter(annotator.kind for annotator in settings.panel.annotators)
    return Estimate(
        pairs=pairs.num_rows,
        calls=sum(part.calls for part in parts),
        recorded_answers=pairs.num_rows * kinds["recorded"] * len(settings.panel.variants),
        predicted_answers=pairs.num_rows * kinds["distilled"] * len(settings.panel.variants),
        input_tokens=round(sum(part.calls * part.billed_per_answer * part.input_tokens for part in parts)),
        output_tokens=round(sum(part.calls * part.billed_per_answer * part.output_tokens for part in parts)),
        usd=_sum([part.usd for part in parts]),
        usd_batch=_sum([part.usd_batch if part.usd_batch is not None else part.usd for part in parts]),
        oldest_price=min(dates, default=None),
        made_at=datetime.now(UTC).isoformat(timespec="seconds"),
        annotators=parts,
    )


@contextmanager
def _log_of(run_dir: Path | None) -> Iterator[CallLog | None]:
    path = run_dir / "calls.sqlite" if run_dir else None
    if path is None or not path.is_file():
        yield None
        return
    with open_calls(path) as log:
        yield log


def _sum(amounts: Sequence[float | None]) -> float | None:
    """None if one amount is unknown."""
    known = [amount for amount in amounts if amount is not None]
    return sum(known) if len(known) == len(amounts) else None


@dataclass
class _Seen:
    """Of one annotator: characters of all prompts by call of a pair; and of those asked already, with their tokens."""

    totals: list[int]
    characters: int = 0
    tokens: int = 0


def _measure(process: Process, asked: Sequence[Annotator], pairs: pa.Table, log: CallLog | None) -> dict[str, _Seen]:
    """Render every prompt once and measure it."""
    variants = process.settings.panel.variants
    seen = {a.name: _Seen([0] * (1 if a.kind == "decisions" else len(variants))) for a in asked}
    for some in _pieces(pairs):
        counted = _counted(log, [pair["pair_id"] for pair in some])
        for pair in some:
            user = len(
                render(process.pack, variants[0], pair["prompt"], pair["chosen"], pair["rejected"])[1]["content"]
            )
            for annotator in asked:
                one = seen[annotator.name]
                for n, (names, length) in enumerate(_lengths(process, annotator, pair, user)):
                    one.totals[n] += length
                    tokens = sum(counted.get((pair["pair_id"], annotator.name, name), 0) for name in names)
                    if tokens:
                        one.characters, one.tokens = one.characters + length, one.tokens + tokens
    return seen


def _lengths(
    process: Process, annotator: Annotator, pair: Mapping[str, Any], user: int
) -> Iterator[tuple[Sequence[str], int]]:
    """For each call about a pair: its variants, and its characters."""
    variants = process.settings.panel.variants
    if annotator.kind != "decisions":
        yield from (((variant,), len(process.pack.systems[variant]) + user) for variant in variants)
        return
    body = _body(process, annotator, pair, variants)
    once = process.sent(annotator.name)["params"]["api"] == "decisions"
    yield variants, len(json.dumps(body, ensure_ascii=False)) if once else sum(len(t) for t in texts_read(body))


def _part(process: Process, annotator: Annotator, pairs: pa.Table, seen: _Seen, usage: Usage | None) -> AnnotatorCost:
    calls = pairs.num_rows * len(seen.totals)
    per_character, counted_by = _tokens_per_character(process, annotator, pairs, usage, seen)
    output, hidden, billed = 0.0 if annotator.kind == "decisions" else OUTPUT_TOKENS, None, 1.0
    if usage is not None and usage.counted:
        output, hidden = usage.completion_tokens / usage.counted, usage.reasoning_tokens / usage.counted
        billed = max(1.0, usage.counted / max(usage.valid, 1))
    price, batch = annotator.price, profile_of(annotator).batch
    tokens_in = [total / max(pairs.num_rows, 1) * per_character for total in seen.totals]
    usd = None if price is None else annotation_cost(pairs.num_rows, [price], tokens_in, output, billed)
    return AnnotatorCost(
        annotator=annotator.name,
        model=annotator.model,
        calls=calls,
        answered=usage.valid if usage else 0,
        input_tokens=sum(tokens_in) / len(tokens_in),
        output_tokens=output,
        hidden_tokens=hidden,
        billed_per_answer=billed,
        counted_by=counted_by,
        pilot_calls=usage.counted if usage else 0,
        price_as_of=price.as_of.isoformat() if price else None,
        usd=usd,
        usd_batch=None if usd is None or batch is None else usd * (1 - batch.discount),
    )


def _pieces(pairs: pa.Table) -> Iterator[list[dict[str, Any]]]:
    for batch in pairs.to_batches(max_chunksize=_AT_ONCE):
        yield batch.to_pylist()


def _counted(log: CallLog | None, pair_ids: Sequence[str]) -> dict[Cell, int]:
    """Prompt tokens of live answers that are there."""
    answers = log.answers(pair_ids) if log is not None else ()
    return {call.cell: call.prompt_tokens or 0 for call in answers if call.origin == "live"}


def _body(process: Process, annotator: Annotator, pair: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    params = process.sent(annotator.name)["params"]
    return body_of(annotator.kind, annotator.model, process.pack, pair, names, params)[1]


def _tokens_per_character(
    process: Process, annotator: Annotator, pairs: pa.Table, usage: Usage | None, seen: _Seen
) -> tuple[float, str]:
    if seen.tokens:
        return seen.tokens / seen.characters, "pilot"
    if usage is None or not usage.counted:
        measured = asyncio.run(_ask_for_counts(process, annotator, pairs))
        if measured:
            return measured, "endpoint"
    return 1 / CHARACTERS_PER_TOKEN, "guess"


async def _ask_for_counts(process: Process, annotator: Annotator, pairs: pa.Table) -> float | None:
    """Tokens per character as a server that tokenizes for nothing counts them in a few prompts."""
    path = profile_of(annotator).tokenize_path
    if path is None or annotator.kind != "chat_json":
        return None
    try:
        key = read_key(annotator.api_key_env, f"annotator '{annotator.name}'")
    except ProcessError:
        return None
    endpoint = Endpoint((annotator.base_url or "").removesuffix("/v1"), key, 10.0)
    characters = tokens = 0
    try:
        for pair in islice(_spread(pairs), _COUNTED_PROMPTS):
            body = _body(process, annotator, pair, process.settings.panel.variants[:1])
            text = "\n".join(message["content"] for message in body["messages"])
            count = _count_of(json_of(await endpoint.post(path, {"model": annotator.model, **_texts(text)})))
            if count is None:
                return None
            characters, tokens = characters + len(text), tokens + count
    finally:
        await endpoint.close()
    return tokens / characters if characters else None


def _texts(text: str) -> dict[str, str]:
    """The text under both names that servers give it: llama.cpp's and that of vLLM and SGLang."""
    return {"content": text, "prompt": text}


def _count_of(answer: Any) -> int | None:
    if not isinstance(answer, dict):
        return None
    tokens = answer.get("tokens")
    count = len(tokens) if isinstance(tokens, list) else answer.get("count")
    return count if isinstance(count, int) and count > 0 else None


def _spread(pairs: pa.Table) -> Iterable[dict[str, Any]]:
    step = max(1, pairs.num_rows // _COUNTED_PROMPTS)
    for row in range(0, pairs.num_rows, step):
        yield pairs.slice(row, 1).to_pylist()[0]
