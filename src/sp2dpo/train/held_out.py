"""Every arm measured on the same pairs, which none was trained on. Eq. 1.

Log-probabilities come by the way that training takes them: the trainer's own collator, layout and reference.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from sp2dpo.errors import TrainingError
from sp2dpo.train.data import HELD_OUT_SCHEMA

__all__ = ["held_out_metrics", "measure", "measure_reference"]


def measure(trainer: Any) -> pa.Table:
    """`held_out.parquet` of the model as it is now, over the trainer's evaluation dataset, by row.

    Every process takes part, and every process gets the whole table.
    """
    model = trainer.model_wrapped
    model.eval()
    parts = []
    for batch in _loader(trainer):
        chosen, rejected = _log_probs(trainer, model, batch)
        reference = _reference(trainer, model, batch)
        columns = (batch["row"], chosen - reference[0], rejected - reference[1], chosen, rejected)
        parts.append([column.cpu() for column in trainer.accelerator.gather_for_metrics(columns)])
    return _table([torch.cat(column).tolist() for column in zip(*parts, strict=True)])


def _loader(trainer: Any) -> Any:
    """The trainer's own, with the last batch of pairs too, which may be dropped in training."""
    drops, trainer.args.dataloader_drop_last = trainer.args.dataloader_drop_last, False
    try:
        return trainer.get_eval_dataloader()
    finally:
        trainer.args.dataloader_drop_last = drops


def measure_reference(trainer: Any) -> pa.Table:
    """The same of the student before training, from the reference log-probabilities that the trainer precomputed."""
    there = trainer.eval_dataset
    chosen, rejected = list(there["ref_chosen_logps"]), list(there["ref_rejected_logps"])
    zero = [0.0] * len(chosen)
    return _table([list(there["row"]), zero, zero, chosen, rejected])


def _log_probs(trainer: Any, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Those of the policy: the trainer's reference pass, with the model in the place of the reference."""
    reference, trainer.ref_model = trainer.ref_model, model
    try:
        chosen, rejected = trainer.compute_ref_log_probs(model, batch)
    finally:
        trainer.ref_model = reference
    return chosen, rejected


def _reference(trainer: Any, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if trainer.precompute_ref_logps:
        return batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model or model, batch)
    return chosen, rejected


def _table(columns: list[list[Any]]) -> pa.Table:
    arrays = [pa.array(column, field.type) for column, field in zip(columns, HELD_OUT_SCHEMA, strict=True)]
    return pa.table(arrays, schema=HELD_OUT_SCHEMA).sort_by("row")


def held_out_metrics(table: pa.Table, beta: float) -> dict[str, float]:
    """Means over the held-out pairs: the DPO loss at one β for all arms, and what Δ and the responses say without β.

    `held_out_accuracy` is the share of Δ > 0, `held_out_margin` the mean Δ in nats, `held_out_ranking` the share of
    pairs whose chosen response is the more probable one under the model itself.

    Raises:
        TrainingError: a log-probability is not finite; the row is named.
    """
    chosen, rejected, log_chosen, log_rejected = (
        table[name].to_numpy().astype(np.float64) for name in HELD_OUT_SCHEMA.names[1:]
    )
    margin = chosen - rejected
    if not np.isfinite(margin).all():
        row = table["row"][int(np.flatnonzero(~np.isfinite(margin))[0])].as_py()
        raise TrainingError(f"the trained model gives row {row} of the schedule, held out, no finite log-probability")
    return {
        "held_out_loss": math.fsum(np.logaddexp(0.0, -beta * margin)) / len(margin),
        "held_out_accuracy": float((margin > 0).mean()),
        "held_out_margin": float(margin.mean()),
        "held_out_ranking": float((log_chosen > log_rejected).mean()),
        "held_out_pairs": float(len(margin)),
    }
