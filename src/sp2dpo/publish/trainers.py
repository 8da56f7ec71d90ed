"""The pairs in the file that another trainer reads, with a README that says what becomes of β there.

A trainer is a line in `TRAINERS`: how a row becomes its row, and what stands beside the file. A row that it would skip
or cut is left out and listed, with the reason, in left_out.csv.

Formats, as read on 2026-11-20: TRL 1.16 (https://huggingface.co/docs/trl/dataset_formats), axolotl 0.19
(`chat_template.default` in its prompt_strategies/dpo), LLaMA-Factory 0.9.5 (its data/README.md and converter.py),
OpenRLHF 0.11 (its datasets/reward_dataset.py), ms-swift 4.5 (its Custom-dataset.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet

from sp2dpo.errors import InputError, nearest
from sp2dpo.hashing import sha256_file
from sp2dpo.pairs import MESSAGES
from sp2dpo.pairs.messages import ASKS, Message
from sp2dpo.publish.facts import read_current, trained_pairs
from sp2dpo.publish.folder import new_folder, write_listing
from sp2dpo.publish.markdown import templates
from sp2dpo.runs import Run
from sp2dpo.stages import read_schedule
from sp2dpo.tables import schema_of, write_csv

__all__ = ["TRAINERS", "Exported", "Trainer", "export"]

Row = dict[str, Any]

_LEFT_OUT: Final = schema_of(prompt_id=pa.string(), pair_id=pa.string(), reason=pa.string())
_TABLE: Final = schema_of(
    **dict.fromkeys(("prompt", "chosen", "rejected"), MESSAGES),
    **dict.fromkeys(("prompt_id", "pair_id"), pa.string()),
    beta=pa.float32(),
)
_ROWS_AT_ONCE: Final = 1024


class _Unfit(Exception):
    """A row that the trainer would skip, cut or refuse."""


@dataclass(frozen=True)
class Trainer:
    """One consumer: its file, how a row gets its shape, and what becomes of β."""

    title: str
    file: str
    row: Callable[[Row], Row]
    beta: str
    start: str
    language: str
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exported:
    """A folder that was made: rows in its file, and rows of the schedule that are not."""

    path: Path
    pairs: int
    left_out: int


def _as_is(row: Row) -> Row:
    return {name: row[name] for name in ("prompt", "chosen", "rejected")}


def _renamed(messages: list[Message], names: Mapping[str, str]) -> list[Message]:
    return [{"role": names.get(m["role"], m["role"]), "content": m["content"]} for m in messages]


def _reply(messages: list[Message]) -> Message:
    """The one message of a reply."""
    if len(messages) != 1:
        raise _Unfit("reply_of_several_messages")
    return messages[0]


_SYSTEM: Final = {"developer": "system"}


def _axolotl(row: Row) -> Row:
    chosen, rejected = _reply(row["chosen"]), _reply(row["rejected"])
    return {"messages": _renamed(row["prompt"], _SYSTEM), "chosen": chosen, "rejected": rejected}


def _llama_factory(row: Row) -> Row:
    """Its converter skips a row whose turns do not alternate, and takes a system prompt only at the start."""
    messages = _renamed(row["prompt"], _SYSTEM)
    turns = [m["role"] for m in messages]
    turns = turns[turns[:1] == ["system"] :]
    expected = (ASKS, ("assistant",))
    if len(turns) % 2 == 0 or any(role not in expected[n % 2] for n, role in enumerate(turns)):
        raise _Unfit("turns_do_not_alternate")
    return {"messages": messages, "chosen": _reply(row["chosen"]), "rejected": _reply(row["rejected"])}


def _ms_swift(row: Row) -> Row:
    prompt = _renamed(row["prompt"], _SYSTEM)
    return {"messages": prompt + row["chosen"], "rejected_messages": prompt + row["rejected"]}


_LLAMA_INFO: Final = {
    "sp2dpo": {
        "file_name": "train.jsonl",
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {"messages": "messages", "chosen": "chosen", "rejected": "rejected"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
            "observation_tag": "tool",
            "system_tag": "system",
        },
    }
}

TRAINERS: Final = {
    "trl": Trainer(
        "TRL",
        "train.parquet",
        _as_is,
        "yes with sp2dpo's `PairwiseDPOTrainer`; TRL's own `DPOTrainer` ignores the column",
        """from datasets import load_dataset
from sp2dpo.train import PairwiseDPOConfig, PairwiseDPOTrainer

train = load_dataset("parquet", data_files="train.parquet", split="train")
trainer = PairwiseDPOTrainer(model=MODEL, args=PairwiseDPOConfig(output_dir="out"), train_dataset=train)
""",
        "python",
    ),
    "axolotl": Trainer(
        "axolotl",
        "train.jsonl",
        _axolotl,
        "no: the column stays in the data, and nothing reads it; `rl_beta` is the β of every pair",
        """rl: dpo
rl_beta: {beta}
datasets:
  - path: train.jsonl
    ds_type: json
    split: train
    type: chat_template.default
    field_messages: messages
    field_chosen: chosen
    field_rejected: rejected
    message_property_mappings: {{role: role, content: content}}
    roles: {{system: [system], user: [user], assistant: [assistant], tool: [tool]}}
""",
        "yaml",
    ),
    "llama-factory": Trainer(
        "LLaMA-Factory",
        "train.jsonl",
        _llama_factory,
        "no: columns beyond its own are dropped; `pref_beta` is the β of every pair",
        """stage: dpo
pref_loss: sigmoid
pref_beta: {beta}
dataset_dir: .  # this folder, with dataset_info.json
dataset: sp2dpo
""",
        "yaml",
        {"dataset_info.json": _LLAMA_INFO},
    ),
    "openrlhf": Trainer(
        "OpenRLHF",
        "train.jsonl",
        _as_is,
        "no: other columns are dropped (`margin` is for reward models); `--model.beta` is the β of every pair",
        """deepspeed --module openrlhf.cli.train_dpo \\
  --data.dataset train.jsonl --data.apply_chat_template \\
  --data.prompt_key prompt --data.chosen_key chosen --data.rejected_key rejected \\
  --data.max_len 2048 --model.beta {beta}  # a longer prompt drops its row, without a word
""",
        "sh",
    ),
    "ms-swift": Trainer(
        "ms-swift",
        "train.jsonl",
        _ms_swift,
        "no: columns beyond its own are dropped; `--beta` is the β of every pair",
        """swift rlhf --rlhf_type dpo --beta {beta} --dataset train.jsonl
""",
        "sh",
    ),
}
"""Everything that `--for` takes."""


def trainer_of(name: str) -> Trainer:
    """
    Raises:
        InputError: no such trainer; the nearest is named.
    """
    if name not in TRAINERS:
        raise InputError(f"no format for '{name}'{nearest(name, TRAINERS)}; there are {', '.join(TRAINERS)}")
    return TRAINERS[name]


def export(run_dir: Path, out: Path, name: str) -> Exported:
    """Make the folder for one trainer.

    Raises:
        InputError: no such trainer; no row has a shape that it takes.
        RunDirError: no run, no schedule, or `out` holds something else that is in the way.
        Unfinished: the schedule is not the one that its manifest describes.
        ScheduleError: a β or a text that training would refuse.
    """
    trainer, run = trainer_of(name), read_current(run_dir)
    schedule = read_schedule(run).select(["prompt_id", "pair_id", "beta"])
    table = trained_pairs(run).drop_columns("beta")
    for column in schedule.column_names:
        table = table.append_column(column, schedule[column])
    left_out: list[Row] = []
    with new_folder(out) as folder:
        written = _write(folder / trainer.file, _rows(table, trainer, left_out))
        if not written:
            raise InputError(f"{trainer.title} takes none of the {len(left_out)} pairs: {left_out[0]['reason']}")
        if left_out:
            write_csv(folder / "left_out.csv", pa.Table.from_pylist(left_out, _LEFT_OUT))
        for file, content in trainer.extra.items():
            (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _write_readme(folder, run, trainer, written, left_out, schedule)
        write_listing(
            folder,
            artifact=name,
            inputs={run.schedule.name: sha256_file(run.schedule), run.pairs.name: sha256_file(run.pairs)},
            **{"lambda": run.process.lambda_hash},
        )
    return Exported(out, written, len(left_out))


def _rows(table: pa.Table, trainer: Trainer, left_out: list[Row]) -> Iterator[Row]:
    """The rows in the trainer's shape; those that it cannot take go to `left_out`."""
    for batch in table.to_batches(_ROWS_AT_ONCE):
        for row in batch.to_pylist():
            ids = {"prompt_id": row["prompt_id"], "pair_id": row["pair_id"]}
            try:
                yield trainer.row(row) | ids | {"beta": row["beta"]}
            except _Unfit as reason:
                left_out.append(ids | {"reason": str(reason)})


def _write(path: Path, rows: Iterator[Row]) -> int:
    """Parquet or JSON lines; returns how many rows."""
    if path.suffix == ".parquet":
        table = pa.Table.from_pylist(list(rows), _TABLE)
        pa.parquet.write_table(table, path, compression="zstd", row_group_size=4 * _ROWS_AT_ONCE)
        return table.num_rows
    written = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            written += 1
    return written


def _write_readme(
    folder: Path, run: Run, trainer: Trainer, written: int, left_out: list[Row], schedule: pa.Table
) -> None:
    beta = schedule["beta"].to_numpy()
    mean = f"{beta.mean():.3g}"
    start = trainer.start.format(beta=mean) if "{beta}" in trainer.start else trainer.start
    text = (
        templates()
        .get_template("trainer.md.jinja")
        .render(
            trainer=trainer,
            trainers=TRAINERS.values(),
            start=start,
            run=run,
            written=written,
            left_out=left_out,
            beta=(float(beta.min()), float(beta.mean()), float(beta.max())),
            mean=mean,
        )
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
