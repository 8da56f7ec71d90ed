"""What a reference log-probability depends on, as hashes: the model that computes it, and the token ids it sees.

A tokenizer, a chat template and every way to cut a text act through the ids. Not in the keys: β and all else of a
schedule, the order of rows, batches, layout.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import transformers
from datasets import Dataset
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from torch.distributed.tensor import DTensor

from sp2dpo.hashing import canonical_json, sha256_json

__all__ = ["PairKey", "model_facts", "pair_keys"]

SILENT: Final = frozenset(
    {
        *("architectures", "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "return_dict"),
        *("_name_or_path", "initializer_range", "pretraining_tp", "transformers_version"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
        *("attn_implementation", "dtype", "output_attentions", "output_hidden_states", "use_cache"),
    }
)
"""Keys of a model's configuration that no log-probability depends on; the weights' own dtype is hashed with them."""

ADAPTER_SILENT: Final = frozenset({"base_model_name_or_path", "inference_mode", "peft_version", "revision"})

IDS: Final = ("prompt_ids", "chosen_ids", "rejected_ids")


class PairKey(NamedTuple):
    """One pair as the collator cuts it: its hash, and how many tokens are its chosen and its rejected completion."""

    sha256: bytes
    tokens: int
    chosen_tokens: int
    rejected_tokens: int


def pair_keys(
    dataset: Dataset, *, max_length: int | None, truncation_mode: str, ld_alpha: float | None
) -> list[PairKey]:
    """Keys of the rows of a tokenized dataset, in its order.

    Args:
        max_length: of prompt and completion together, in tokens, as the collator cuts them.
        truncation_mode: `keep_start` or `keep_end`.
        ld_alpha: of LD-DPO, which weights the tail of the longer completion; METHODS: arXiv 2409.06411.
    """
    head = canonical_json({"ld_alpha": ld_alpha}).encode()
    return [_pair_key(head, max_length, truncation_mode, *ids) for ids in _rows(dataset)]


def _pair_key(
    head: bytes, max_length: int | None, mode: str, prompt: NDArray[Any], chosen: NDArray[Any], rejected: NDArray[Any]
) -> PairKey:
    digest = hashlib.sha256(head)
    lengths, completions = [], []
    for completion in (chosen, rejected):
        whole = len(prompt) + len(completion)
        over = 0 if max_length is None else max(0, whole - max_length)
        start, end = (over, whole) if mode == "keep_end" else (0, whole - over)
        prompted = max(0, min(len(prompt), end) - start)
        digest.update(np.array([end - start, prompted], dtype="<i8").tobytes())
        digest.update(np.concatenate([prompt, completion])[start:end].astype("<i8").tobytes())
        lengths.append(end - start)
        completions.append(end - start - prompted)
    return PairKey(digest.digest(), sum(lengths), *completions)


def _rows(dataset: Dataset) -> Iterator[tuple[NDArray[Any], ...]]:
    """Prompt, chosen and rejected ids of each row, without a Python number for each token."""
    for table in dataset.select_columns(list(IDS)).with_format("arrow").iter(batch_size=1000):
        columns = [table[name].combine_chunks() for name in IDS]
        values = [column.values.to_numpy(zero_copy_only=False) for column in columns]
        offsets = [column.offsets.to_numpy() for column in columns]
        for n in range(table.num_rows):
            yield tuple(v[at[n] : at[n + 1]] for v, at in zip(values, offsets, strict=True))


def model_facts(trainer: Any) -> dict[str, str] | None:
    """What the reference model is: hashes of its weights and its configuration, its class, and how it is computed.

    The weights are read anew at each call: a model that was changed in memory is another model. Adapters that the
    reference pass disables are left out, so that LoRA and full fine-tuning of one student share their reference.
    Where weights are sharded every process has to call this.

    Returns:
        None where the weights cannot be read (FSDP 1 flattens them, a meta device has none).
    """
    held = trainer.model if trainer.ref_model is None else trainer.ref_model
    module = trainer.accelerator.unwrap_model(held)
    used = _adapters(module, own=trainer.ref_model is not None)
    weights = _weights_hash(_weights(module, used), trainer.accelerator.is_main_process)
    if weights is None:
        return None
    base = module.get_base_model() if isinstance(module, PeftModel) else module
    adapters = [_plain(module.peft_config[name].to_dict(), ADAPTER_SILENT) for name in used]
    return {
        "class": type(base).__name__,
        "weights": weights,
        "config": sha256_json({"model": _plain(base.config.to_dict(), SILENT), "adapters": adapters}),
        "precision": str(trainer.accelerator.mixed_precision),
        "transformers": transformers.__version__,
    }


def _adapters(module: Any, *, own: bool) -> list[str]:
    """Adapters that the reference pass leaves active: those of a reference model of its own, or TRL's copy, `ref`."""
    if not isinstance(module, PeftModel):
        return []
    return [module.active_adapter] if own else [name for name in module.peft_config if name == "ref"]


def _plain(config: Mapping[str, Any], silent: frozenset[str]) -> dict[str, Any]:
    """A configuration as JSON has it, without what is silent at any depth."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): kept(inner) for name, inner in value.items() if name not in silent}
        return [kept(inner) for inner in value] if isinstance(value, list) else value

    text = json.dumps(dict(config), default=lambda value: sorted(value) if isinstance(value, set) else str(value))
    plain: dict[str, Any] = kept(json.loads(text))
    return plain


def _weights(module: Any, used: Sequence[str]) -> dict[str, Any]:
    """Weights and buffers by the names that they have without PEFT around them; of adapters only those in use."""
    places = tuple(
        f"{name}.{part}."
        for name, layer in module.named_modules()
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for part in (*layer.adapter_layer_names, *layer.other_param_names)
    )

    def in_use(name: str) -> bool:
        place = next((place for place in places if name.startswith(place)), None)
        return place is None or name.removeprefix(place).split(".")[0] in used

    state = module.state_dict(keep_vars=True)
    return {_without_peft(name): tensor for name, tensor in state.items() if in_use(name)}


def _without_peft(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")


def _weights_hash(tensors: Mapping[str, Any], main: bool) -> str | None:
    """sha256 over names, dtypes, shapes and bytes. Every process joins in where a tensor is sharded."""
    if any(not isinstance(t, Tensor) or t.is_meta or getattr(t, "_is_flat_param", False) for t in tensors.values()):
        return None
    sharded = {name for name, tensor in tensors.items() if isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")}
    digests = {name: _digest(_whole(tensors[name])) for name in tensors if name in sharded}
    if not main:
        return ""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        rest = [name for name in tensors if name not in sharded]
        digests |= dict(zip(rest, pool.map(lambda name: _digest(tensors[name]), rest), strict=True))
    return sha256_json(digests)


def _whole(tensor: Any) -> Tensor:
    """A sharded weight gathered from all processes: FSDP 2 by itself, ZeRO-3 by DeepSpeed."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    with import_module("deepspeed").zero.GatheredParameters([tensor]):
        whole: Tensor = tensor.detach().cpu().clone()
    return whole


def _digest(tensor: Tensor) -> list[Any]:
    plain = tensor.detach().cpu().contiguous()
    data: Any = plain.reshape(-1).view(torch.uint8).numpy()
    return [str(plain.dtype), list(plain.shape), hashlib.sha256(data).hexdigest()]
