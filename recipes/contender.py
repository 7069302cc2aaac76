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
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from contender_process import PROGRESS_MARK
from contender_spec import ContenderSpec, load_contender
from duel_data import prepare_data
from model_builds import build_model
from random_data import RANDOM, random_data
from torch import nn
from training import LogCallback, TrainingPlan, adapter_sha256, precision_for, stock_trainer
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hf_lema import MemoryTelemetryCallback, get_streamer
from hf_lema.measuring.telemetry import (
    MemorySampler,
    PeakMemory,
    ProcessMemory,
    environment_record,
    read_process_memory,
)
from hf_lema.reporting.report import ContenderResult, UseSample

MAX_SAMPLES = 400
"""Points of the memory curve that are kept: more than a plot can show."""


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


def open_device(task: Task) -> torch.device:
    """The device, with its context made and the allocator held to the limit.

    Raises:
        ValueError: The limit is larger than the card.
    """
    device = torch.device(task.device)
    if device.type == "cuda":
        device = torch.device("cuda", 0)
        _, total_bytes = torch.cuda.mem_get_info(device)
        if task.vram_limit_bytes is not None:
            if task.vram_limit_bytes > total_bytes:
                raise ValueError(f"--vram-limit is {task.vram_limit_bytes} bytes, but the card has {total_bytes}")
            torch.cuda.set_per_process_memory_fraction(task.vram_limit_bytes / total_bytes, device)
        torch.zeros(1, device=device)
    return device


def run(task: Task) -> dict[str, Any]:
    """Trains and returns the result with its details, ready for JSON."""
    device = open_device(task)
    plan = TrainingPlan(
        batch_size=task.batch_size,
        max_steps=task.max_steps,
        seed=task.seed,
        lora_rank=task.lora_rank,
        learning_rate=task.learning_rate,
        precision=task.precision or precision_for(device),
        device_type=device.type,
        **task.contender.training,
    )
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
        model = build_model(task.contender, task.model, plan, device)
        loading = sampler.take_peak()
    details |= {"load_s": time.perf_counter() - start_s, "ram_imports_private_bytes": baseline.private_bytes}
    details |= {"ram_imports_rss_bytes": baseline.rss_bytes, "ram_loading_rss_peak_bytes": loading.ram_rss_bytes}
    details |= {"ram_loading_private_peak_bytes": loading.ram_private_bytes}
    details["adapter_start_sha256"] = adapter_sha256(model)
    settle_memory()
    result, trained = _train(task, plan, model, data.dataset, baseline)
    if task.contender.build == "lema":
        get_streamer(model).close()
    return {"result": result.to_json(), "details": details | trained, "environment": environment_record()}


def _train(
    task: Task, plan: TrainingPlan, model: nn.Module, dataset: Any, baseline: ProcessMemory
) -> tuple[ContenderResult, dict[str, Any]]:
    start_s = time.perf_counter()

    def show(num_steps_done: int, loss: float) -> None:
        figures = {"num_steps_done": num_steps_done, "loss": str(loss), "elapsed_s": time.perf_counter() - start_s}
        print(PROGRESS_MARK + json.dumps(figures), flush=True)

    log = LogCallback(show)
    trainer, collator = stock_trainer(model, plan, dataset, Path(task.folder), log, **task.contender.arguments)
    telemetry = MemoryTelemetryCallback.attach(
        trainer,
        Path(task.folder) / "telemetry.jsonl",
        vram_limit_bytes=task.vram_limit_bytes,
        ram_baseline=baseline,
        console=False,
    )
    with telemetry:
        trainer.train()
    details: dict[str, Any] = {
        "train_s": time.perf_counter() - start_s,
        "grad_norm": log.grad_norms,
        "adapter_end_sha256": adapter_sha256(model),
        "device_seen": str(trainer.args.device),
    }
    if task.contender.build == "lema":
        details |= streamer_details(model)
    result = make_result(task, model, log, telemetry, baseline, collator.digest(task.max_steps))
    return dataclasses.replace(result, notes=_notes(details)), details


def streamer_details(model: nn.Module) -> dict[str, Any]:
    """What a streamed model's runtime says of itself."""
    streamer = get_streamer(model)
    stats = {f"total_{name}": value for name, value in dataclasses.asdict(streamer.stats()).items()}
    return stats | {
        "tier": streamer.host_store.tier,
        "num_layers": streamer.num_layers,
        "num_streamed": streamer.num_streamed,
        "num_resident": streamer.num_resident,
        "layer_bytes": streamer.layer_bytes,
        "ram_pinned_bytes": streamer.host_store.pinned_bytes,
    }


def _notes(details: dict[str, Any]) -> list[str]:
    notes = []
    if "tier" in details and details["num_streamed"] == 0:
        notes.append("The budget held every layer: nothing was streamed, so its figures say nothing of streaming.")
    elif "tier" in details:
        streamed, layers = details["num_streamed"], details["num_layers"]
        notes.append(f"{streamed} of {layers} layers were streamed, from the {details['tier']} tier.")
    return notes


def make_result(
    task: Task,
    model: nn.Module,
    log: LogCallback,
    telemetry: MemoryTelemetryCallback,
    baseline: ProcessMemory,
    batches_sha256: str,
) -> ContenderResult:
    """Puts the measured figures into the form of the report."""
    records, peak = telemetry.records, telemetry.peak
    assert isinstance(peak, PeakMemory), "a finished training has a peak"
    timed = records[task.num_warmup_steps :]
    timed_s = sum(record.step_s for record in timed)
    num_tokens = sum(record.num_tokens or 0 for record in timed)
    return ContenderResult(
        name=task.name,
        status="ok",
        num_steps=len(records),
        num_warmup_steps=task.num_warmup_steps,
        loss=log.losses,
        step_s=[record.step_s for record in records],
        tokens_per_s=num_tokens / timed_s if timed_s > 0 else None,
        vram_allocated_peak_bytes=peak.vram_allocated_peak_bytes,
        vram_reserved_peak_bytes=peak.vram_reserved_peak_bytes,
        vram_process_peak_bytes=peak.vram_process_peak_bytes,
        vram_step_peak_bytes=[r.vram_process_peak_bytes for r in records if r.vram_process_peak_bytes is not None],
        vram_card_bytes=card_bytes(task),
        ram_private_above_imports_peak_bytes=peak.ram_private_above_baseline_peak_bytes,
        ram_file_peak_bytes=peak.ram_file_peak_bytes,
        ram_resident_above_imports_peak_bytes=(
            peak.ram_rss_peak_bytes - baseline.rss_bytes if task.device == "cpu" else None
        ),
        h2d_bytes=[record.h2d_bytes for record in records if record.h2d_bytes is not None],
        disk_bytes=[record.disk_bytes for record in records if record.disk_bytes is not None],
        wait_s=None if records[0].wait_s is None else sum(record.wait_s or 0.0 for record in records),
        samples=thin_samples(telemetry, baseline),
        batches_sha256=batches_sha256,
        num_trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def card_bytes(task: Task) -> int | None:
    """The size that use is held against: the limit, or else the card's; None on a CPU."""
    if task.device == "cpu":
        return None
    return task.vram_limit_bytes or torch.cuda.mem_get_info()[1]


def thin_samples(telemetry: MemoryTelemetryCallback, baseline: ProcessMemory) -> list[UseSample]:
    """The memory curve in at most ``MAX_SAMPLES`` points, each the peak over its part of the time."""
    samples = telemetry.samples
    num_merged = -(-len(samples) // MAX_SAMPLES)
    thinned = []
    for begin in range(0, len(samples), max(num_merged, 1)):
        merged = samples[begin : begin + num_merged]
        vram_bytes = [s.peak.vram_process_bytes for s in merged if s.peak.vram_process_bytes is not None]
        ram_bytes = [s.peak.ram_private_bytes for s in merged if s.peak.ram_private_bytes is not None]
        above_bytes = max(ram_bytes) - (baseline.private_bytes or 0) if ram_bytes else None
        thinned.append(
            UseSample(
                elapsed_s=round(merged[-1].elapsed_s, 3),
                vram_bytes=max(vram_bytes, default=None),
                ram_bytes=None if above_bytes is None else max(above_bytes, 0),
            )
        )
    return thinned


def main() -> None:
    """Runs the task named on the command line."""
    task = Task(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    output = json.dumps(run(task), allow_nan=False, default=str)
    temporary = task.result_path.with_suffix(".part")
    temporary.write_text(output, encoding="utf-8")
    temporary.rename(task.result_path)


if __name__ == "__main__":
    main()
