"""DPO with one β for each pair: TRL's trainer, told β_i from a column. Sec. 4.2, eq. 5.

TRL reads `self.beta` only inside its loss, as a factor of log-ratios, so a tensor in its place is all that per-pair β
takes: the same kernels run, and equal β_i give TRL's own result to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet
import torch
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from sp2dpo.errors import ScheduleError
from sp2dpo.tables import write_table
from sp2dpo.train.data import MARGINS_SCHEMA

__all__ = ["PairwiseCollator", "PairwiseDPOConfig", "PairwiseDPOTrainer"]

SUPPORTED_LOSSES: Final = ("sigmoid",)


@dataclass
class PairwiseDPOConfig(DPOConfig):  # type: ignore[misc]
    """TRL's configuration, and how long a prompt may be (TRL 1.16 has no such key any more)."""

    max_prompt_length: int | None = field(
        default=None, metadata={"help": "A longer prompt keeps its last tokens; None keeps all."}
    )


@dataclass
class PairwiseCollator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's collator, with `beta` (B,) float32 and, where the data has it, `row` (B,)."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        batch["beta"] = torch.tensor([example["beta"] for example in examples], dtype=torch.float32)
        if "row" in examples[0]:
            batch["row"] = torch.tensor([example["row"] for example in examples])
        return batch


class _PairBeta:
    """β_i in the place of TRL's scalar: a factor that also sees the log-ratios it is multiplied with."""

    def __init__(self, beta: Tensor) -> None:
        self._beta = beta
        self._factors: list[Tensor] = []

    def __mul__(self, log_ratios: Tensor) -> Tensor:
        self._factors.append(log_ratios.detach())
        return self._beta * log_ratios

    @property
    def margins(self) -> Tensor:
        """Δ_i: TRL ends with the chosen and the rejected log-ratios, times β, for its reward metrics."""
        chosen, rejected = self._factors[-2:]
        return chosen - rejected


class PairwiseDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """`trl.DPOTrainer` whose datasets have a column `beta`: the temperature of each pair, positive and finite.

    An integer column `row`, if there is one, names the pairs in `margins`, the implicit margins Δ_i of every training
    batch as it was seen. Other keys of TRL that shape the loss (`ld_alpha`, `use_weighting`, …) act as they do there.

    Raises:
        ScheduleError: no column `beta`, or a value that is not a positive finite number; before any step.
        ValueError: a loss for which per-pair β is not defined here.

    Eq. 1, 5.
    """

    def __init__(
        self, model: Any, *, args: PairwiseDPOConfig, train_dataset: Any, eval_dataset: Any = None, **more: Any
    ) -> None:
        losses = args.loss_type if isinstance(args.loss_type, list) else [args.loss_type]
        for loss in losses:
            if loss not in SUPPORTED_LOSSES:
                raise ValueError(f"loss_type '{loss}' has no per-pair β here; supported: {', '.join(SUPPORTED_LOSSES)}")
        evals = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        for name, dataset in {"train": train_dataset, **evals}.items():
            if dataset is not None:
                _check_column(dataset, name)
        self.data_collator: Any
        self.beta: Any  # TRL's scalar; a tensor in its place while a loss is computed
        self.margins: list[tuple[int, int, float]] = []
        super().__init__(model, args=args, train_dataset=train_dataset, eval_dataset=eval_dataset, **more)
        plain = self.data_collator
        self.data_collator = PairwiseCollator(
            pad_token_id=plain.pad_token_id,
            max_length=plain.max_length,
            truncation_mode=plain.truncation_mode,
            pad_to_multiple_of=plain.pad_to_multiple_of,
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        for name in ("beta", "row"):
            if name not in self._signature_columns:
                self._signature_columns.append(name)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Tokenize as TRL does, then cut prompts to their end. Rows without a completion token left are refused.

        Differs: TRL drops such rows without a word, and then fewer pairs train than the schedule has.
        """
        max_length, args.max_length = args.max_length, None
        try:
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        finally:
            args.max_length = max_length
        keep = args.max_prompt_length
        if keep is not None:
            dataset = dataset.map(lambda row: {"prompt_ids": row["prompt_ids"][-keep:]}, desc="Cutting prompts")
        if max_length is not None and args.truncation_mode == "keep_start" and isinstance(dataset, Dataset):
            _refuse_long_prompts(dataset, dataset_name, max_length)
        return dataset

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        rest = {name: value for name, value in inputs.items() if name not in ("beta", "row")}
        pair_beta = _PairBeta(inputs["beta"])
        scalar, self.beta = self.beta, pair_beta
        try:
            loss = super().compute_loss(model, rest, return_outputs, num_items_in_batch)
        finally:
            self.beta = scalar
        if self.model.training and "row" in inputs:
            self._note_margins(inputs["row"], pair_beta.margins)
        return loss

    def _note_margins(self, rows: Tensor, margins: Tensor) -> None:
        rows, margins = self.accelerator.gather_for_metrics((rows, margins))
        step = self.state.global_step
        self.margins += [(step, row, margin) for row, margin in zip(rows.tolist(), margins.tolist(), strict=True)]

    def resume_margins(self, checkpoint: Path) -> None:
        """Take over the margins noted up to a checkpoint that training goes on from."""
        seen = pa.parquet.read_table(checkpoint / "margins.parquet").to_pydict()
        self.margins = list(zip(seen["step"], seen["row"], seen["margin"], strict=True))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.is_world_process_zero():
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            write_table(folder / "margins.parquet", margins_table(self.margins))


def margins_table(margins: list[tuple[int, int, float]]) -> pa.Table:
    """Rows of (step, row of the schedule, Δ in nats)."""
    columns = list(zip(*margins, strict=True)) or [(), (), ()]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, MARGINS_SCHEMA, strict=True)], schema=MARGINS_SCHEMA)


def _check_column(dataset: Any, name: str) -> None:
    names = getattr(dataset, "column_names", None)
    if names is not None and "beta" not in names:
        raise ScheduleError(f"the {name} dataset has no column 'beta'; its columns: {', '.join(names)}")
    if not isinstance(dataset, Dataset):
        return
    for n, beta in enumerate(dataset["beta"]):
        if beta is None or not 0.0 < beta < float("inf"):
            raise ScheduleError(f"row {n} of the {name} dataset has β {beta}; every pair needs a positive finite β")


def _refuse_long_prompts(dataset: Dataset, name: str, max_length: int) -> None:
    long = [n for n, ids in enumerate(dataset["prompt_ids"]) if len(ids) >= max_length]
    if long:
        raise ScheduleError(
            f"{len(long)} rows of the {name} dataset have {max_length} or more prompt tokens (first: row {long[0]}); "
            "max_length would leave nothing of their responses; set max_prompt_length below max_length"
        )
