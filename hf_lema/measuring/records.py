"""The records of a training: the figures that are kept of each optimizer step, with the unit in each name.

Responsibility: plain frozen data, its JSON form, and the files that it goes to. Knows neither how the figures are
measured nor how they are drawn.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lema.units import to_gib


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Largest use of each kind of memory over some time, in bytes; ``None`` where not known, or without a device.

    Attributes:
        vram_allocated_peak_bytes: Held by tensors, by the allocator's own exact count.
        vram_reserved_peak_bytes: Taken from the card by torch's allocator.
        vram_process_peak_bytes: Taken from the card by the whole process, CUDA context included, as sampled; the whole
            card where NVML is blind (the environment line's ``vram_process_source`` says which).
        ram_rss_peak_bytes: All resident pages, as sampled.
        ram_private_peak_bytes: Anonymous and shared-memory pages, page-locked ones among them.
        ram_private_above_baseline_peak_bytes: The same, less what it was at the baseline.
        ram_file_peak_bytes: Pages of mapped files, which the kernel may drop.
    """

    vram_allocated_peak_bytes: int | None
    vram_reserved_peak_bytes: int | None
    vram_process_peak_bytes: int | None
    ram_rss_peak_bytes: int
    ram_private_peak_bytes: int | None
    ram_private_above_baseline_peak_bytes: int | None
    ram_file_peak_bytes: int | None

    @property
    def vram_reserved_minus_allocated_bytes(self) -> int | None:
        """What the allocator holds beyond its tensors at their peaks: cached or fragmented memory."""
        if self.vram_reserved_peak_bytes is None or self.vram_allocated_peak_bytes is None:
            return None
        return self.vram_reserved_peak_bytes - self.vram_allocated_peak_bytes

    def to_dict(self) -> dict[str, Any]:
        """All figures by name, ready for JSON."""
        return dataclasses.asdict(self) | {
            "vram_reserved_minus_allocated_bytes": self.vram_reserved_minus_allocated_bytes
        }


@dataclass(frozen=True, kw_only=True)
class StepRecord(PeakMemory):
    """One optimizer step: its peaks, its time and what it moved. Micro-batches of accumulation are one step.

    Attributes:
        num_steps_done: Optimizer steps done, this one included (``state.global_step``).
        elapsed_s: Since training began, evaluation and saving included.
        step_s: Wall time since the step before ended: data loading and logging included, evaluation and saving not.
        num_tokens: Positions of ``input_ids`` that the model was given in training, padding included, in this process.
        num_alloc_retries: Times in this step that the allocator emptied its cache and tried again.
        num_ooms: Times in this step that it gave up.
        h2d_bytes: Layer bytes copied to the device during this step (prefetch for the next step included); ``None``,
            like the four below, when the model is not streamed.
        disk_bytes: Layer bytes read from disk.
        wait_s: Time that the compute thread waited for layers.
        num_hits: Layers that were there when asked for.
        num_demand_loads: Layers that were not requested ahead.
    """

    num_steps_done: int
    elapsed_s: float
    step_s: float
    num_tokens: int | None
    num_alloc_retries: int | None
    num_ooms: int | None
    h2d_bytes: int | None
    disk_bytes: int | None
    wait_s: float | None
    num_hits: int | None
    num_demand_loads: int | None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of this step over its wall time."""
        return None if self.num_tokens is None or self.step_s <= 0 else self.num_tokens / self.step_s

    @property
    def bus_bytes_per_s(self) -> float | None:
        """Layer bytes that this process moved to its device, over the step's wall time, optimizer included."""
        return None if self.h2d_bytes is None or self.step_s <= 0 else self.h2d_bytes / self.step_s

    def to_dict(self) -> dict[str, Any]:
        """All figures by name, ready for JSON."""
        return super().to_dict() | {"tokens_per_s": self.tokens_per_s, "bus_bytes_per_s": self.bus_bytes_per_s}


def merged_peak(records: Sequence[PeakMemory]) -> PeakMemory:
    """The peak over all the records; a figure that only some of them know is the largest of those.

    Raises:
        ValueError: There is none.
    """
    if not records:
        raise ValueError("no record to take a peak of")
    peaks: dict[str, Any] = {
        field.name: max((v for r in records if (v := getattr(r, field.name)) is not None), default=None)
        for field in dataclasses.fields(PeakMemory)
    }
    return PeakMemory(**peaks)


def peak_figures(memory: PeakMemory) -> dict[str, float]:
    """Peaks in GiB (of a `PeakMemory` itself), under the names in Trainer's logs; what is not known is left out."""
    return {
        name.removesuffix("_bytes") + "_gib": round(to_gib(num_bytes), 4)
        for name, num_bytes in memory.to_dict().items()
        if num_bytes is not None
    }


def interval_figures(records: Sequence[StepRecord]) -> dict[str, float]:
    """What a log of Trainer gains from the steps since the last one: peaks, means per step and counts, where known.

    Raises:
        ValueError: There is no record.
    """
    figures = peak_figures(merged_peak(records))
    num_steps = len(records)
    interval_s = sum(record.step_s for record in records)
    figures["step_s"] = round(interval_s / num_steps, 4)
    num_tokens = _sum(records, "num_tokens")
    if num_tokens is not None and interval_s > 0:
        figures["tokens_per_s"] = round(num_tokens / interval_s, 2)
    for name in ("num_alloc_retries", "num_ooms", "num_hits", "num_demand_loads"):
        if (count := _sum(records, name)) is not None:
            figures[name] = count
    for name in ("h2d", "disk"):
        if (num_bytes := _sum(records, f"{name}_bytes")) is not None:
            figures[f"{name}_per_step_gib"] = round(to_gib(num_bytes / num_steps), 4)
    if (num_bytes := _sum(records, "h2d_bytes")) is not None and interval_s > 0:
        figures["bus_gib_per_s"] = round(to_gib(num_bytes / interval_s), 4)
    if (wait_s := _sum(records, "wait_s")) is not None:
        figures["wait_per_step_s"] = round(wait_s / num_steps, 4)
    return figures


def _sum(records: Sequence[StepRecord], name: str) -> Any:
    values = [getattr(record, name) for record in records]
    return None if None in values else sum(values)


def progress_line(num_steps_done: int, num_steps: int, loss: float, memory: PeakMemory) -> str:
    """One line for the console, such as ``Step 100/625 | Loss: 0.0677 | VRAM: 6.36 GiB``; without a card, of RAM."""
    kind, used_bytes = "VRAM", memory.vram_allocated_peak_bytes
    if used_bytes is None:
        kind, used_bytes = "RAM", memory.ram_private_peak_bytes
    if used_bytes is None:  # a platform that does not tell the kinds of pages apart
        used_bytes = memory.ram_rss_peak_bytes
    return f"Step {num_steps_done}/{num_steps} | Loss: {loss:.4f} | {kind}: {to_gib(used_bytes):.2f} GiB"


def append_json_line(path: Path, figures: dict[str, Any]) -> None:
    """Append one JSON line, on a line of its own also when a crash cut the last one short.

    JSON has no NaN and no infinity: such a number is written as text (``"nan"``), which ``float`` reads.
    """
    values = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in figures.items()
    }
    line = json.dumps(values, allow_nan=False).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line + b"\n")


def rank_path(path: Path, rank: int) -> Path:
    """The file that a process of a distributed run writes."""
    return path if rank == 0 else path.with_name(f"{path.stem}.rank{rank}{path.suffix}")
