"""The record of a run in its folder: its settings, held against those of a resume, and the figures of all its steps.

Knows the files of a run. Does not know models or trainers.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

from hf_lema.reporting.report import ContenderResult, UseSample

NUM_WARMUP_STEPS = 2
"""First steps of a run that no time is taken from."""


def open_run(folder: Path, settings: dict[str, Any], *, resume: bool, free: Collection[str]) -> None:
    """Notes the settings of a new run, or holds those of the run to be resumed against the present ones.

    Args:
        folder: Of the run; it is made.
        settings: All that was chosen.
        resume: Whether the run was begun before.
        free: Names of settings that may differ from those of before.

    Raises:
        ValueError: The folder holds a run and it is not to be resumed, or the run was another one.
    """
    path = folder / "settings.json"
    if resume:
        if not path.is_file():
            raise ValueError(f"--resume: {folder} holds no run; leave it out to begin one")
        before = json.loads(path.read_text(encoding="utf-8"))
        others = {
            name: (before.get(name), value)
            for name, value in settings.items()
            if name not in free and before.get(name) != value
        }
        if others:
            found = ", ".join(f"{name} was {old}, is {new}" for name, (old, new) in others.items())
            raise ValueError(f"--resume: the run in {folder} has other settings: {found}")
    elif path.exists():
        raise ValueError(f"{folder} holds a run already: --resume goes on with it, --output-dir names another")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def figures_of(telemetry_path: Path, losses: list[float]) -> dict[str, Any]:
    """The figures of all steps of a run, whatever the number of sessions it took; its memory curve has a point a step.

    Args:
        telemetry_path: As `MemoryTelemetryCallback` writes it. A step that was done again after a resume counts once,
            as it was done last.
        losses: Of every step.
    """
    lines = [json.loads(line) for line in telemetry_path.read_text(encoding="utf-8").splitlines()]
    by_step = {line["num_steps_done"]: line for line in lines if line["kind"] == "step"}
    steps = [by_step[number] for number in sorted(by_step)]
    step_s = [step["step_s"] for step in steps]

    def peak(name: str) -> int | None:
        return max((step[name] for step in steps if step[name] is not None), default=None)

    timed = steps[NUM_WARMUP_STEPS:] or steps
    timed_s = sum(step["step_s"] for step in timed)
    return {
        "loss": losses,
        "step_s": [round(time_s, 4) for time_s in step_s],
        "step_median_s": statistics.median(step["step_s"] for step in timed),
        "train_s": sum(step_s),
        "tokens_per_s": sum(step["num_tokens"] or 0 for step in timed) / timed_s,
        "num_sessions": sum(line["kind"] == "environment" for line in lines),
        "vram_allocated_peak_bytes": peak("vram_allocated_peak_bytes"),
        "vram_reserved_peak_bytes": peak("vram_reserved_peak_bytes"),
        "vram_process_peak_bytes": peak("vram_process_peak_bytes"),
        "num_alloc_retries": peak("num_alloc_retries") and sum(step["num_alloc_retries"] for step in steps),
        "ram_private_above_imports_peak_bytes": peak("ram_private_above_baseline_peak_bytes"),
        "ram_rss_peak_bytes": peak("ram_rss_peak_bytes"),
        "ram_file_peak_bytes": peak("ram_file_peak_bytes"),
        "vram_step_peak_bytes": [s["vram_process_peak_bytes"] for s in steps if s["vram_process_peak_bytes"]],
        "h2d_bytes": [step["h2d_bytes"] for step in steps if step["h2d_bytes"] is not None],
        "disk_bytes": [step["disk_bytes"] for step in steps if step["disk_bytes"] is not None],
        "samples": [
            UseSample(
                elapsed_s=round(elapsed_s, 3),
                vram_bytes=step["vram_process_peak_bytes"],
                ram_bytes=step["ram_private_above_baseline_peak_bytes"],
            )
            for elapsed_s, step in zip(itertools.accumulate(step_s), steps, strict=True)
        ],
    }


def as_result(name: str, figures: dict[str, Any], **more: Any) -> ContenderResult:
    """The figures in the form that tables and pictures are made from; ``more`` adds fields of `ContenderResult`."""
    known = {field.name for field in dataclasses.fields(ContenderResult)}
    num_steps = len(figures["loss"])
    return ContenderResult(
        name=name,
        status="ok",
        num_steps=num_steps,
        num_warmup_steps=min(NUM_WARMUP_STEPS, num_steps - 1),
        **({field: value for field, value in figures.items() if field in known} | more),
    )
