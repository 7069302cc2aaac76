"""One contender in a process of its own: reads a task, trains, writes its result. compare_peft.py starts it.

    python recipes/contender.py task.json

Prints progress lines that begin with PROGRESS_MARK for the parent, and lets errors end the process: the parent makes a
row of them. RAM is counted above what this process holds once all is imported, the tokens are made and, on a GPU,
the context exists.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import dataclasses
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contender_process import PROGRESS_MARK
from contender_ranks import Ranks, merge_ranks, repeated_shmem_bytes
from contender_result import make_result, optimizer_facts, planned, stream_notes, streamer_details
from contender_spec import ContenderSpec, load_contender
from duel_data import prepare_data
from model_builds import build_model
from random_data import RANDOM, random_data
from torch import nn
from training import LogCallback, TrainingPlan, adapter_sha256, precision_for, trainer_with, training_arguments
from transformers import AutoConfig, AutoTokenizer, Trainer, TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_lema import MemoryTelemetryCallback, get_streamer
from hf_lema.measuring.telemetry import MemorySampler, ProcessMemory, environment_record, read_process_memory
from hf_lema.reporting.contender import ContenderResult, json_ready


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the parent asks of one contender.

    Attributes:
        name: The contender.
        model: Folder or hub id.
        dataset: As ``--dataset``; None for the reply examples, ``random`` for random tokens.
        seq_len: Tokens an example.
        batch_size: Examples a step.
        max_steps: Optimizer steps.
        num_warmup_steps: Steps cut off before times are taken.
        lora_rank: Rank of the adapter.
        learning_rate: Constant.
        seed: Of everything.
        device: ``"cpu"`` or ``"cuda"``.
        vram_limit_bytes: Card size to hold torch's allocator to; None for the card's own.
        folder: Where the contender may write; it is the contender's own.
        precision: A key of ``training.DTYPES``; None for what the device computes best.
        spec: The fields of its `ContenderSpec`; None for those in the file of its name.
        gradient_accumulation_steps: Batches an optimizer step.
        num_processes: Of the contender, each with batches of its own.
    """

    name: str
    model: str
    dataset: str | None
    seq_len: int
    batch_size: int
    max_steps: int
    num_warmup_steps: int
    lora_rank: int
    learning_rate: float
    seed: int
    device: str
    vram_limit_bytes: int | None
    folder: str
    precision: str | None = None
    spec: dict[str, Any] | None = None
    gradient_accumulation_steps: int = 1
    num_processes: int = 1

    @property
    def contender(self) -> ContenderSpec:
        """What makes this contender, on this device."""
        spec = load_contender(self.name) if self.spec is None else ContenderSpec(**self.spec)
        return spec.for_device(self.device)

    @property
    def result_path(self) -> Path:
        """Where the result goes; there only once it is complete."""
        return Path(self.folder) / "result.json"


def settle_memory() -> None:
    """Gives back what imports and loading have freed, so that a baseline does not hold it."""
    gc.collect()
    libc = ctypes.util.find_library("c")
    if sys.platform == "linux" and libc is not None and "libc.so.6" in libc:
        ctypes.CDLL(libc).malloc_trim(0)


def open_device(task: Task, ranks: Ranks | None = None) -> torch.device:
    """The device of this rank, with its context made and the allocator held to the limit.

    Raises:
        ValueError: The limit is larger than the card.
    """
    device = torch.device(task.device)
    if device.type == "cuda":
        device = torch.device("cuda", 0 if ranks is None else ranks.rank)
        torch.cuda.set_device(device)
        _, total_bytes = torch.cuda.mem_get_info(device)
        if task.vram_limit_bytes is not None:
            if task.vram_limit_bytes > total_bytes:
                raise ValueError(f"--vram-limit is {task.vram_limit_bytes} bytes, but the card has {total_bytes}")
            torch.cuda.set_per_process_memory_fraction(task.vram_limit_bytes / total_bytes, device)
        torch.zeros(1, device=device)
    return device


def run(task: Task, ranks: Ranks) -> dict[str, Any]:
    """Trains and returns the result of all ranks with its details, ready for JSON."""
    device = open_device(task, ranks)
    plan, notes = training_plan(task, device)
    spec = task.contender
    # The arguments first: they make the process group, and DeepSpeed reads them when the model is loaded.
    args = training_arguments(plan, Path(task.folder), **spec.arguments)
    trainer_class = load_class(spec.trainer) if spec.trainer else Trainer
    if task.dataset == RANDOM:
        data = random_data(AutoConfig.from_pretrained(task.model).vocab_size, task.seq_len, task.seed)
    else:
        data = prepare_data(task.dataset, AutoTokenizer.from_pretrained(task.model), task.seq_len, task.seed)
    details: dict[str, Any] = {
        "precision": plan.precision,
        "dataset": data.label,
        "num_examples": data.num_examples,
        "num_examples_skipped": data.num_skipped,
        "num_load_average_1_min": os.getloadavg()[0],
    }
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        details["vram_in_use_at_start_bytes"] = total_bytes - free_bytes
    settle_memory()
    baseline = read_process_memory()
    start_s = time.perf_counter()
    with MemorySampler() as sampler:
        model = build_model(spec, task.model, plan, device)
        loading = sampler.take_peak()
    details |= {"load_s": time.perf_counter() - start_s, "ram_imports_private_bytes": baseline.private_bytes}
    details |= {"ram_imports_rss_bytes": baseline.rss_bytes, "ram_loading_rss_peak_bytes": loading.ram_rss_bytes}
    details |= {"ram_loading_private_peak_bytes": loading.ram_private_bytes}
    details["adapter_start_sha256"] = adapter_sha256(model)
    settle_memory()
    trainer, log = make_trainer(task, ranks, model, data.dataset, args, trainer_class)
    result, trained = _train(task, ranks, trainer, log, baseline)
    details |= trained
    if spec.build == "lema":
        get_streamer(model).close()
    if device.type == "cuda" and not spec.is_launched and not spec.trainer:
        try:
            details["plan"] = planned(spec, task.model, plan, task.seq_len, ranks.size, task.vram_limit_bytes)
        except ValueError as error:
            notes.append(f"It has no memory plan: {error}")
    result = dataclasses.replace(result, notes=[*result.notes, *notes, *stream_notes(details), *spec.caveats])
    return {"result": result.to_json(), "details": details, "environment": environment_record()}


def training_plan(task: Task, device: torch.device) -> tuple[TrainingPlan, list[str]]:
    """What is trained, and what the row must say of it.

    Raises:
        ValueError: The contender would have to train in a precision that the device only emulates.
    """
    spec = task.contender
    precision = asked = task.precision or precision_for(device)
    notes = []
    if asked in spec.precision_instead:
        precision = spec.precision_instead[asked]
        if precision == "bf16" and precision_for(device) == "fp16":
            raise ValueError(f"{task.name} cannot train in {asked}, and this card does not compute {precision}")
        notes.append(f"It cannot train in {asked} and trained in {precision}: its losses are not those of the others.")
    plan = TrainingPlan(
        batch_size=task.batch_size,
        max_steps=task.max_steps,
        seed=task.seed,
        lora_rank=task.lora_rank,
        learning_rate=task.learning_rate,
        precision=precision,
        device_type=device.type,
        gradient_accumulation_steps=task.gradient_accumulation_steps,
        **spec.training,
    )
    return plan, notes


def make_trainer(
    task: Task, ranks: Ranks, model: nn.Module, dataset: Any, args: TrainingArguments, trainer_class: type[Trainer]
) -> tuple[Trainer, LogCallback]:
    """The contender's Trainer, which tells the parent of each step.

    Raises:
        RuntimeError: Accelerate does something else than the contender claims.
    """
    start_s = time.perf_counter()

    def show(num_steps_done: int, loss: float) -> None:
        figures = {"num_steps_done": num_steps_done, "loss": str(loss), "elapsed_s": time.perf_counter() - start_s}
        print(PROGRESS_MARK + json.dumps(figures), flush=True)

    log = LogCallback(show if ranks.rank == 0 else None)
    spec = task.contender
    trainer, _ = trainer_with(model, args, dataset, log, trainer_class=trainer_class, **spec.trainer_options)
    found = trainer.accelerator.distributed_type.value
    if spec.distributed_type and found != spec.distributed_type:
        raise RuntimeError(f"{task.name} is to train by {spec.distributed_type}, but Accelerate trains by {found}")
    return trainer, log


def _train(
    task: Task, ranks: Ranks, trainer: Trainer, log: LogCallback, baseline: ProcessMemory
) -> tuple[ContenderResult, dict[str, Any]]:
    model = trainer.model
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    telemetry = MemoryTelemetryCallback.attach(
        trainer,
        Path(task.folder) / "telemetry.jsonl",
        vram_limit_bytes=task.vram_limit_bytes,
        ram_baseline=baseline,
        console=False,
    )
    start_s = time.perf_counter()
    with telemetry:
        trainer.train()
    details: dict[str, Any] = {
        "train_s": time.perf_counter() - start_s,
        "grad_norm": log.grad_norms,
        "adapter_end_sha256": adapter_sha256(model),
        "device_seen": str(trainer.args.device),
        "distributed_type": trainer.accelerator.distributed_type.value,
        "optimizer": optimizer_facts(trainer.optimizer),
    }
    if task.contender.build == "lema":
        details |= streamer_details(model)
    result = make_result(
        task.name,
        task.num_warmup_steps,
        log.losses,
        telemetry,
        baseline,
        vram_card_bytes=card_bytes(task),
        batches_sha256=trainer.data_collator.digest(task.max_steps * task.gradient_accumulation_steps),
        num_trainable=num_trainable,
    )
    every = ranks.gather((result, repeated_shmem_bytes(), details["adapter_end_sha256"]))
    results, repeated_bytes, ends = zip(*every, strict=True)
    if len(set(ends)) > 1:
        raise RuntimeError(f"the adapters of {ranks.size} processes are not the same after the last step")
    return merge_ranks(results, repeated_bytes), details | _details_of_ranks(results)


def _details_of_ranks(results: Sequence[ContenderResult]) -> dict[str, Any]:
    """What each process took, where there are several."""
    if len(results) == 1:
        return {}
    names = ("ram_private_above_imports_peak_bytes", "vram_allocated_peak_bytes", "tokens_per_s")
    return {f"rank_{name}": [getattr(result, name) for result in results] for name in names}


def load_class(name: str) -> type[Trainer]:
    """The class of ``module:Class``."""
    module, _, attribute = name.partition(":")
    loaded: type[Trainer] = getattr(importlib.import_module(module), attribute)
    return loaded


def card_bytes(task: Task) -> int | None:
    """The size that use is held against: the limit, or else the card's; None on a CPU."""
    if task.device == "cpu":
        return None
    return task.vram_limit_bytes or torch.cuda.mem_get_info()[1]


def main() -> None:
    """Runs the task named on the command line."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    ranks = Ranks.find()
    output = json.dumps(json_ready(run(task, ranks)), allow_nan=False, default=str)
    if ranks.is_launched:
        torch.distributed.destroy_process_group()  # with NCCL an exit without it warns, and may hang
    if ranks.rank > 0:
        return
    temporary = task.result_path.with_suffix(".part")
    temporary.write_text(output, encoding="utf-8")
    temporary.rename(task.result_path)


if __name__ == "__main__":
    main()
