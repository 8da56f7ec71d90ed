"""Loss and gradients of a student in each of several processes, whole and then sharded as FSDP2 does, on a CPU mesh.

accelerate leaves FSDP out on a CPU; here its own function that shards a model is called.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin, fsdp2_prepare_model
from peft import LoraConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

from distributed_cases import pairs
from sp2dpo.train import PairwiseDPOConfig, PairwiseDPOTrainer
from students import PROJECTIONS, make_student, make_tokenizer

CASES = {
    f"sharded_{student}_{'lora' if lora else 'full'}": (student, lora)
    for student in ("qwen3", "gemma3")  # gemma3 ties its head to its embeddings
    for lora in (False, True)
}


def trainer_of(student: str, lora: bool, folder: Path) -> PairwiseDPOTrainer:
    args = PairwiseDPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=True,
        precompute_ref_log_probs=True,
        reference_cache="off",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        layout="shared",
    )
    trainer = PairwiseDPOTrainer(
        make_student(student),
        args=args,
        train_dataset=pairs(4),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=PROJECTIONS, task_type="CAUSAL_LM") if lora else None,
    )
    torch.manual_seed(0)
    with torch.no_grad():  # off the reference, so that gradients are not those of Δ = 0
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer.model.train()
    return trainer


def loss_and_gradients(trainer: PairwiseDPOTrainer, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    grads = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.item(), {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in grads.items()}


def shard(model: Any) -> Any:
    """As `accelerate launch` does with examples/accelerate/fsdp2.yaml."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        state_dict_type="full_state_dict",
    )
    accelerator = SimpleNamespace(
        state=SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        is_main_process=dist.get_rank() == 0,
        device=torch.device("cpu"),
    )
    return fsdp2_prepare_model(accelerator, model)


def compare(student: str, lora: bool, folder: Path) -> dict[str, Any]:
    """Differences between the sharded and the whole model, which sees the mean of the gradients of all processes."""
    trainer = trainer_of(student, lora, folder)
    batch = next(iter(trainer.get_train_dataloader()))
    whole, grads = loss_and_gradients(trainer, batch)
    for grad in grads.values():
        dist.all_reduce(grad)
        grad /= dist.get_world_size()
    trainer.model = shard(trainer.model)
    rows: list[int] = []
    trainer.model.get_input_embeddings().register_forward_hook(lambda module, given, out: rows.append(len(given[0])))
    kinds = {type(p).__name__ for p in trainer.model.parameters()}
    sharded, shared_grads = loss_and_gradients(trainer, batch)
    off = sum((shared_grads[n] - g).double().pow(2).sum() for n, g in grads.items()).sqrt()
    size = sum(g.double().pow(2).sum() for g in grads.values()).sqrt()
    return {
        "rows": rows,
        "pairs": sorted(batch["row"].tolist()),
        "loss": whole,
        "loss_difference": abs(sharded - whole),
        "gradient_relative_l2": (off / size).item(),
        "gradients": [len(grads), len(shared_grads)],
        "kinds": sorted(kinds),
    }
