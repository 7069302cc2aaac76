"""What every contender shares: training arguments, adapter configuration, precision, batches and their hash.

One place builds the arguments for the installed transformers version, so that contenders cannot differ by accident.
Knows transformers and peft. Does not know which contender it serves, and nothing of LEMA.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from sharded_parameters import CHECKPOINT_WRAPPER, gathered, is_released, whole
from torch import nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

LORA_DROPOUT = 0.1
OPTIMIZER = "adamw_torch_fused"
BF16_CAPABILITY = (8, 0)
"""Compute capability from which bf16 is computed and not emulated; ``is_bf16_supported`` counts emulation too."""
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def precision_for(device: torch.device) -> str:
    """``"fp32"`` on a CPU; on a GPU ``"bf16"`` from compute capability 8.0, below it ``"fp16"`` with GradScaler."""
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= BF16_CAPABILITY else "fp16"


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What is trained and how, the same for all contenders.

    Attributes:
        batch_size: Sequences a step.
        max_steps: Optimizer steps.
        seed: Of adapter, dropout and data order.
        lora_rank: Rank of the adapter; alpha is twice the rank.
        learning_rate: Constant over the run.
        precision: ``"fp32"``, ``"fp16"`` (autocast and GradScaler) or ``"bf16"`` (autocast).
        device_type: ``"cpu"`` or ``"cuda"``.
        gradient_checkpointing: Whether stock models recompute activations; a streamed one always does.
        target_modules: Names of the linear layers that get an adapter, or ``"all-linear"``.
        lora_dropout: Dropout before the adapter.
        gradient_accumulation_steps: Batches an optimizer step.
    """

    batch_size: int
    max_steps: int
    seed: int
    lora_rank: int
    learning_rate: float
    precision: str
    device_type: str
    gradient_checkpointing: bool = True
    target_modules: str | tuple[str, ...] = "all-linear"
    lora_dropout: float = LORA_DROPOUT
    gradient_accumulation_steps: int = 1


def training_arguments(plan: TrainingPlan, output_dir: Path, **changed: Any) -> TrainingArguments:
    """The one set of arguments, for the installed transformers version; ``changed`` replaces single ones."""
    # From 5.23 gradient checkpointing is named activation checkpointing and the old name warns. The lower branch may go
    # when that is the oldest version supported.
    if Version(transformers.__version__) >= Version("5.23"):
        name = "activation_checkpointing"
    else:
        name = "gradient_checkpointing"
    checkpointing: dict[str, Any] = {name: plan.gradient_checkpointing}
    if plan.gradient_checkpointing:
        checkpointing[f"{name}_kwargs"] = {"use_reentrant": False}
    values: dict[str, Any] = {
        "max_steps": plan.max_steps,
        "per_device_train_batch_size": plan.batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": OPTIMIZER,
        "seed": plan.seed,
        "data_seed": plan.seed,
        "fp16": plan.precision == "fp16",
        "bf16": plan.precision == "bf16",
        "use_cpu": plan.device_type == "cpu",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_drop_last": True,
        "dataloader_pin_memory": plan.device_type == "cuda",
        # Every adapter takes part in every step; for a PeftModel Trainer has DDP look for those that do not.
        "ddp_find_unused_parameters": False,
    }
    return TrainingArguments(output_dir=str(output_dir), **(values | checkpointing | changed))


def add_adapter(model: nn.Module, plan: TrainingPlan) -> nn.Module:
    """Puts a fresh LoRA adapter on the model; the seed is set here, so what was drawn before makes no difference."""
    set_seed(plan.seed)
    targets = plan.target_modules if isinstance(plan.target_modules, str) else list(plan.target_modules)
    config = LoraConfig(
        r=plan.lora_rank,
        lora_alpha=2 * plan.lora_rank,
        lora_dropout=plan.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def adapter_sha256(model: nn.Module) -> str:
    """SHA-256 over names, dtypes and bytes of all trainable parameters, in the order of their names.

    Where they are spread over processes, all of these must call it.
    """
    trainable = {
        name.replace(CHECKPOINT_WRAPPER, ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    stored: dict[str, torch.Tensor] = model.state_dict() if any(map(is_released, trainable.values())) else {}
    digest = hashlib.sha256()
    with gathered(list(trainable.values())):
        for name in sorted(trainable):
            value = whole(stored.get(name, trainable[name]))
            digest.update(f"{name} {value.dtype} ".encode())
            digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class TokenDataset(Dataset):
    """Token ids, attention mask and labels of equally long examples, kept as three integer tensors."""

    def __init__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor) -> None:
        self.input_ids = input_ids.to(torch.int32)
        self.attention_mask = attention_mask.to(torch.int8)
        self.labels = labels.to(torch.int32)

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The three tensors of one example, each of ``seq_len`` integers."""
        return {
            "input_ids": self.input_ids[index].long(),
            "attention_mask": self.attention_mask[index].long(),
            "labels": self.labels[index].long(),
        }


class HashingCollator:
    """Stacks examples to a batch and keeps a hash of each batch, so that contenders can be shown to see the same.

    Args:
        trim_padding: Cut off the padding that all examples of a batch end with.
    """

    def __init__(self, *, trim_padding: bool = False) -> None:
        self.hashes: list[str] = []
        self._trim_padding = trim_padding

    def __call__(self, examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """One batch, each value of shape (batch, seq_len)."""
        batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
        if self._trim_padding:
            num_tokens = int(batch["attention_mask"].sum(dim=1).max())
            batch = {name: value[:, :num_tokens] for name, value in batch.items()}
        digest = hashlib.sha256()
        for name in sorted(batch):
            digest.update(name.encode())
            digest.update(batch[name].contiguous().numpy().tobytes())
        self.hashes.append(digest.hexdigest())
        return batch

    def digest(self, num_batches: int) -> str:
        """One hash over the first batches. A data loader may collate one ahead, which no step sees.

        Raises:
            RuntimeError: Fewer batches were made.
        """
        if len(self.hashes) < num_batches:
            raise RuntimeError(f"{len(self.hashes)} batches were made, {num_batches} were to be trained on")
        return hashlib.sha256("".join(self.hashes[:num_batches]).encode()).hexdigest()


class LogCallback(TrainerCallback):
    """Keeps loss and gradient norm of each step and hands them on as they come."""

    def __init__(self, on_step: Any = None) -> None:
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self._on_step = on_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Takes the log of one step; other logs are passed over."""
        if logs is None or "loss" not in logs:
            return
        self.losses.append(float(logs["loss"]))
        self.grad_norms.append(float(logs.get("grad_norm", "nan")))
        if self._on_step is not None:
            self._on_step(state.global_step, self.losses[-1])


def stock_trainer(
    model: nn.Module,
    plan: TrainingPlan,
    dataset: Dataset,
    output_dir: Path,
    log: LogCallback,
    *,
    trim_padding: bool = False,
    **changed: Any,
) -> tuple[Trainer, HashingCollator]:
    """A stock Trainer that prints nothing by itself, and the collator that hashes its batches.

    ``changed`` replaces single training arguments.
    """
    args = training_arguments(plan, output_dir, **changed)
    return trainer_with(model, args, dataset, log, trim_padding=trim_padding)


def trainer_with(
    model: nn.Module,
    args: TrainingArguments,
    dataset: Dataset,
    log: LogCallback,
    *,
    trim_padding: bool = False,
    trainer_class: type[Trainer] = Trainer,
    **options: Any,
) -> tuple[Trainer, HashingCollator]:
    """The same with arguments that exist, and for a subclass of Trainer with its own ``options``."""
    collator = HashingCollator(trim_padding=trim_padding)
    trainer = trainer_class(
        model=model, args=args, train_dataset=dataset, data_collator=collator, callbacks=[log], **options
    )
    trainer.remove_callback(PrinterCallback)
    # Trainer has no argument for it. Before transformers 5 it makes the handler later, and gradients are copied out of
    # DDP's buckets; the numbers are the same.
    if trainer.accelerator.ddp_handler is not None:
        trainer.accelerator.ddp_handler.gradient_as_bucket_view = True
    return trainer, collator
