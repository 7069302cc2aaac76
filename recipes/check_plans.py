"""Compares the planner with what was measured: every record of recipes/results/h100-*.jsonl, planned again on a CPU.

    python recipes/check_plans.py

Plans are made from shapes alone, for the way in which the record was made. The bus rate is the record's own. The
rates below are those of the machine; two of them were fitted. Since a to c visits have come to start fewer kernels
(casts made together; in cut visits no casts of inputs), so that c's records in micro-batches are planned faster and
smaller than they were measured.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig

from hf_lema import LemaConfig
from hf_lema.planning.device_rates import DeviceRates
from hf_lema.planning.memory_plan import MemoryPlan
from hf_lema.planning.planner import best_plan
from hf_lema.planning.step_cost import PlanOptions, StepCost
from hf_lema.planning.stock_plan import stock_plan
from hf_lema.units import GIB, to_gib

RESULTS = Path(__file__).resolve().parent / "results"
MAX_SCATTER = 1.15
"""Median of the timed steps over the fastest."""

MICRO_BATCHES = {"c": 4}
"""Sequences of a micro-batch where the record says "auto", a setting that is gone; in a and b it cut nothing."""

CHOICES = ("micro_batch_size", "forward_micro_batch_size", "tile_tokens", "boundaries_in_ram", "outside_in_ram")
IN_RAM_TEXTS = {"boundaries_in_ram": "boundaries in RAM", "outside_in_ram": "embedding and head in RAM"}
IN_RAM = {"boundaries_in_ram": True, "outside_in_ram": True}
CHOSEN: dict[str, dict[str, Any]] = {
    "min": IN_RAM,
    "1 x 512, min": IN_RAM,
    "budget 6.36 GiB": {"boundaries_in_ram": True},
    "1 x 512, 6.36 GiB": {"outside_in_ram": True},
}
"""What the planner of that time chose in d, whose records do not say it; none of it cuts the batch."""

H100 = DeviceRates(
    name="H100 80GB HBM3",
    origin="measured",
    capability=(9, 0),
    vram_bytes=85017493504,
    h2d_bytes_per_s=55.0e9,
    duplex_bytes_per_s=35.0e9,
    disk_bytes_per_s=1.38e9,
    # Fitted, with the stock record (0.625 s): bytes that kernels read and write over the time that is left for them.
    vram_read_write_bytes_per_s=2.48e12,
    half_flop_per_s=765e12,
    float_flop_per_s=67e12,
    # Fitted, with the record of micro-batches (0.789 s, bound by kernel starts) and what a visit started then.
    kernel_start_s=31e-6,
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One record and its plan."""

    name: str
    record: dict[str, Any]
    plan: MemoryPlan

    @property
    def vram_bytes(self) -> int:
        """Measured peak of the timed steps: before them a plan may have been given up for a smaller one."""
        peaks = self.record.get("vram_allocated_step_peak_bytes")
        return int(
            max(peaks[self.record["options"]["warmup"] :]) if peaks else self.record["vram_allocated_peak_bytes"]
        )

    @property
    def vram_error(self) -> float:
        """Of the planned peak, relative to the measured one."""
        return self.plan.vram_bytes / self.vram_bytes - 1

    @property
    def is_disturbed(self) -> bool:
        """Whether the timed steps scatter by more than 15 %, as on a host that is slowed for a part of the run.

        The plan is a lower bound, and is then compared with the fastest of them.
        """
        return float(self.record["step_median_s"]) > MAX_SCATTER * self.fastest_s

    @property
    def fastest_s(self) -> float:
        """The shortest timed step."""
        return float(min(self.record["step_s"][self.record["options"]["warmup"] :]))

    @property
    def is_rate_its_own(self) -> bool:
        """Whether the disk's rate is taken from the record itself, so that its time proves nothing."""
        return bool(self.record["options"]["tier"] == "disk" and not self.record["options"]["cold"])

    @property
    def is_of_a_slow_host(self) -> bool:
        """Whether starts of kernels bounded a step in c, d, f or g, whose hosts took longer than the rate says.

        Visits of c started more kernels besides. A record says nothing of how long its host takes.
        """
        options = self.record["options"]
        is_cut = self.name[0] in "cfg" and self.plan.micro_batch_size < options["batch_size"]
        is_bound = options["batch_size"] == 1 or is_cut
        return self.name[0] in "cdfg" and options["contender"] == "lema" and not self.is_rate_its_own and is_bound

    @property
    def time_error(self) -> float:
        """Of the planned step, relative to the measured one."""
        return self.plan.time.step_s / (self.fastest_s if self.is_disturbed else self.record["step_median_s"]) - 1


@functools.cache
def step_cost(seq_len: int, lora_dropout: float) -> StepCost:
    """Of 8 sequences; others are derived, so that the model is built once."""
    lora = LoraConfig(r=16, lora_dropout=lora_dropout, target_modules="all-linear", task_type="CAUSAL_LM")
    return StepCost("llama-2-7b", 8, seq_len, lora, H100, PlanOptions())


@functools.cache
def _at_batch(seq_len: int, batch_size: int, lora_dropout: float) -> StepCost:
    return step_cost(seq_len, lora_dropout).at(H100, batch_size)


def comparisons() -> Iterator[Comparison]:
    """Every record with its plan."""
    for path in sorted(RESULTS.glob("h100-7b-fp16-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            yield Comparison(name=_name(path, record), record=record, plan=_planned(path, record))


def _name(path: Path, record: dict[str, Any]) -> str:
    options = record["options"]
    parts = [path.stem[-1], options["contender"], f"{options['batch_size']} x {options['seq_len']}"]
    if options["contender"] == "lema":
        parts += [f"{options['num_slots']} slots", options["tier"] + (", cold" if options["cold"] else "")]
        parts += [f"{record['num_resident']} resident"] if record["num_resident"] else []
        parts += [f"micro-batch {_choices(path, record).get('micro_batch_size') or options['batch_size']}"]
        parts += [text for name, text in IN_RAM_TEXTS.items() if _choices(path, record).get(name)]
    return ", ".join(parts)


def _micro_batch_size(path: Path, record: dict[str, Any]) -> int:
    """What a visit was cut into; with resident layers to spare, and at one sequence, into nothing."""
    options = record["options"]
    if options.get("micro_batch_size") != "auto" or record.get("num_resident"):
        return int(options["batch_size"])
    return min(MICRO_BATCHES.get(path.stem[-1], options["batch_size"]), options["batch_size"])


def _choices(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Fields of `StepChoices` with which the record was made."""
    options = record["options"]
    if options.get("choices") is not None:
        return dict(json.loads(options["choices"]))
    if "chosen_micro_batch_size" in record:
        return {name: record[f"chosen_{name}"] for name in CHOICES} | {"num_kept": record.get("chosen_num_kept", 0)}
    chosen = CHOSEN.get(record.get("name", ""), {})
    return {"micro_batch_size": _micro_batch_size(path, record)} | chosen


def _planned(path: Path, record: dict[str, Any]) -> MemoryPlan:
    options, choices = record["options"], _choices(path, record)
    # From the page cache the disk tier moved what it did, which no plain reading of the disk says.
    disk_bytes_per_s = H100.disk_bytes_per_s if options["cold"] else record.get("disk_bytes_per_s", 1.0)
    rates = replace(H100, h2d_bytes_per_s=record["pinned_copy_bytes_per_s"], disk_bytes_per_s=disk_bytes_per_s)
    cost = _at_batch(options["seq_len"], options["batch_size"], options.get("lora_dropout", 0.1)).at(rates)
    whole_head_bytes, ends = cost.tensors.head_bytes, cost.ends
    if path.stem[-1] == "d":  # a head in RAM came in one piece
        cost.ends = lambda is_chunked, piece_bytes=0: ends(is_chunked, whole_head_bytes if piece_bytes else 0)
    if options["contender"] == "peft":
        return stock_plan(cost, is_checkpointed=True)
    config = LemaConfig(
        vram_budget=80 * GIB if record["num_resident"] else "min",
        ram_budget="min" if options["tier"] == "disk" else 64 * GIB,
        num_slots=options["num_slots"],
    )
    micro_batch_size = choices.get("micro_batch_size") or options["batch_size"]
    fixed = PlanOptions(
        micro_batch_size=micro_batch_size,
        forward_micro_batch_size=choices.get("forward_micro_batch_size") or micro_batch_size,
        boundaries="ram" if choices.get("boundaries_in_ram") else "vram",
        embedding_and_head="ram" if choices.get("outside_in_ram") else "vram",
        num_resident=record["num_resident"],
        num_kept=choices.get("num_kept", len(choices.get("kept_layers", ()))),
    )
    return best_plan(cost, config, fixed)


def main() -> None:
    """Prints the table."""
    print("| record | VRAM GiB: planned | measured | error | peaks in | step s: planned | median | fastest | error |")
    print("| :-- | --: | --: | --: | :-- | --: | --: | --: | --: |")
    for c in comparisons():
        measured_gib, median_s = to_gib(c.vram_bytes), c.record["step_median_s"]
        error = "(its own rate)" if c.is_rate_its_own else f"{c.time_error:+.1%}{', fastest' if c.is_disturbed else ''}"
        print(
            f"| {c.name} | {to_gib(c.plan.vram_bytes):.3f} | {measured_gib:.3f} | {c.vram_error:+.2%} | "
            f"{c.plan.peak.name} | {c.plan.time.step_s:.3f} | {median_s:.3f} | {c.fastest_s:.3f} | {error} |"
        )


if __name__ == "__main__":
    main()
