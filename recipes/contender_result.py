"""The figures of one contender's training in the form of the report.

Knows the telemetry and the runtime's statistics. Does not know how a contender is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from contender_spec import ContenderSpec
from torch import nn
from training import DTYPES, OPTIMIZER, TrainingPlan

from hf_lema import LemaConfig, MemoryTelemetryCallback, get_streamer
from hf_lema.measuring.telemetry import PeakMemory, ProcessMemory
from hf_lema.planning.device_rates import rates_of
from hf_lema.planning.plan_table import plan_as_dict
from hf_lema.planning.planner import plan_memory
from hf_lema.planning.step_cost import PlanOptions
from hf_lema.planning.stock_plan import plan_stock
from hf_lema.reporting.contender import ContenderResult, UseSample
from hf_lema.wrapper import find_choices

MAX_SAMPLES = 400
"""Points of the memory curve that are kept: more than a plot can show."""
OPTIMIZER_KEYS = ("lr", "betas", "eps", "weight_decay")


def streamer_details(model: nn.Module) -> dict[str, Any]:
    """What a streamed model's runtime says of itself; ``chosen_...`` is how its last steps were run."""
    streamer = get_streamer(model)
    stats = {f"total_{name}": value for name, value in dataclasses.asdict(streamer.stats()).items()}
    chosen = {f"chosen_{name}": value for name, value in dataclasses.asdict(find_choices(model)).items()}
    for name in ("resident", "kept"):
        chosen[f"chosen_num_{name}"] = len(chosen.pop(f"chosen_{name}_layers"))
    return (
        stats
        | chosen
        | {
            "tier": streamer.host_store.tier,
            "num_layers": streamer.num_layers,
            "num_streamed": streamer.num_streamed,
            "num_resident": streamer.num_resident,
            "layer_bytes": streamer.layer_bytes,
            "ram_pinned_bytes": streamer.host_store.pinned_bytes,
        }
    )


def stream_notes(details: dict[str, Any]) -> list[str]:
    """What a reader must know of a streamed model's run."""
    if "tier" not in details:
        return []
    if details["num_streamed"] == 0:
        return ["The budget held every layer: nothing was streamed, so its figures say nothing of streaming."]
    streamed, layers = details["num_streamed"], details["num_layers"]
    return [f"{streamed} of {layers} layers were streamed, from the {details['tier']} tier."]


def optimizer_facts(optimizer: Any) -> list[dict[str, Any]]:
    """The settings of an optimizer's groups that all contenders must share, each once."""
    groups = [{name: group[name] for name in OPTIMIZER_KEYS} for group in optimizer.param_groups]
    return [group for idx, group in enumerate(groups) if group not in groups[:idx]]


def planned(
    spec: ContenderSpec, model: str, plan: TrainingPlan, seq_len: int, num_processes: int, limit_bytes: int | None
) -> dict[str, Any]:
    """The planner's memory plan of a run on the card that is current; made after it, so that it takes nothing from it.

    Args:
        spec: The contender, one that the planner knows: streamed, stock or 4-bit under the stock Trainer.
        model: Folder or hub id.
        plan: What was trained.
        seq_len: Tokens a sequence.
        num_processes: That share the machine.
        limit_bytes: What the card was held to.

    Raises:
        ValueError: The model cannot be planned.
    """
    job = {
        "batch_size": plan.batch_size,
        "seq_len": seq_len,
        "lora": plan.lora_rank,
        "rates": rates_of(torch.device("cuda", torch.cuda.current_device())),
    }
    options = PlanOptions(
        dtype=DTYPES[plan.precision],
        quantization="nf4" if spec.build == "4bit" else None,
        gradient_accumulation_steps=plan.gradient_accumulation_steps,
        optim=OPTIMIZER,
        num_processes=num_processes,
        vram_bytes=limit_bytes,
    )
    if spec.build == "lema":
        return plan_as_dict(plan_memory(model, LemaConfig(**spec.lema), **job, options=options))
    return plan_as_dict(plan_stock(model, **job, options=options, is_checkpointed=plan.gradient_checkpointing))


def make_result(
    name: str,
    num_warmup_steps: int,
    losses: Sequence[float],
    telemetry: MemoryTelemetryCallback,
    baseline: ProcessMemory,
    **known: Any,
) -> ContenderResult:
    """Puts the measured figures into the form of the report.

    Args:
        name: The contender.
        num_warmup_steps: First steps that no time is taken from.
        losses: Of every step.
        telemetry: Of the training, which is over.
        baseline: What the process held before the model was loaded.
        **known: Further fields of `ContenderResult`.
    """
    records, peak = telemetry.records, telemetry.peak
    assert isinstance(peak, PeakMemory), "a finished training has a peak"
    timed = records[num_warmup_steps:]
    timed_s = sum(record.step_s for record in timed)
    num_tokens = sum(record.num_tokens or 0 for record in timed)
    return ContenderResult(
        name=name,
        status="ok",
        num_steps=len(records),
        num_warmup_steps=num_warmup_steps,
        loss=losses,
        step_s=[record.step_s for record in records],
        tokens_per_s=num_tokens / timed_s if timed_s > 0 else None,
        vram_allocated_peak_bytes=peak.vram_allocated_peak_bytes,
        vram_reserved_peak_bytes=peak.vram_reserved_peak_bytes,
        vram_process_peak_bytes=peak.vram_process_peak_bytes,
        vram_step_peak_bytes=[r.vram_process_peak_bytes for r in records if r.vram_process_peak_bytes is not None],
        ram_private_above_imports_peak_bytes=peak.ram_private_above_baseline_peak_bytes,
        ram_file_peak_bytes=peak.ram_file_peak_bytes,
        ram_resident_above_imports_peak_bytes=(
            peak.ram_rss_peak_bytes - baseline.rss_bytes if peak.vram_allocated_peak_bytes is None else None
        ),
        h2d_bytes=[record.h2d_bytes for record in records if record.h2d_bytes is not None],
        disk_bytes=[record.disk_bytes for record in records if record.disk_bytes is not None],
        wait_s=None if records[0].wait_s is None else sum(record.wait_s or 0.0 for record in records),
        samples=thin_samples(telemetry, baseline),
        **known,
    )


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
