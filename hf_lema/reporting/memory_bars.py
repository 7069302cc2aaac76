"""What memory consists of, planned and measured, one bar each.

Responsibility: the parts of a bar in bytes. Knows the field names of a memory plan, not how a plan is made or a bar
drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_lema.reporting.contender import ContenderResult

Plan = Mapping[str, Any]
"""A memory plan as a dictionary: `plan_as_dict` of the planner."""

_ALWAYS_THERE = {
    "slots": ("slots_bytes",),
    "resident layers": ("resident_bytes",),
    "embedding and head": ("embedding_bytes", "head_bytes"),
    "adapter": ("adapter_bytes",),
    "optimizer": ("optimizer_bytes",),
    "norms, buffers, workspace": ("other_bytes", "workspace_bytes"),
}
_AT_THE_PEAK = {
    "boundary activations": "boundary_bytes",
    "kept activations": "kept_bytes",
    "gradients": "gradient_bytes",
    "activations": "activation_bytes",
}
_ON_THE_HOST = {
    "layers": "slab_bytes",
    "window to the files": "ring_bytes",
    "boundary activations": "boundary_bytes",
    "embedding and head": "embedding_bytes",
    "optimizer": "optimizer_bytes",
}
CONTEXT = "CUDA context and libraries"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar.

    Attributes:
        name: The contender.
        parts: Bytes by the name of the part, in the order of drawing; none is zero.
        is_planned: Whether it is arithmetic from before the run.
    """

    name: str
    parts: Mapping[str, int]
    is_planned: bool


def vram_bars(results: Sequence[ContenderResult], plans: Mapping[str, Plan]) -> list[Bar]:
    """For each contender its plan, where there is one, and what it took.

    Raises:
        ValueError: A plan lacks a field.
    """
    bars = []
    for result in results:
        if result.name in plans:
            bars.append(_bar(result.name, _planned_vram(result.name, plans[result.name]), is_planned=True))
        allocated, reserved = result.vram_allocated_peak_bytes, result.vram_reserved_peak_bytes
        if allocated is None:
            continue
        parts = {"tensors": allocated}
        if reserved is not None:
            parts["held by the allocator beyond tensors"] = reserved - allocated
        if reserved is not None and result.vram_process_peak_bytes is not None:
            parts[CONTEXT] = result.vram_process_peak_bytes - reserved
        bars.append(_bar(result.name, parts, is_planned=False))
    return [bar for bar in bars if bar.parts]


def ram_bars(results: Sequence[ContenderResult], plans: Mapping[str, Plan]) -> list[Bar]:
    """The same for RAM.

    Raises:
        ValueError: A plan lacks a field.
    """
    bars = []
    for result in results:
        if result.name in plans:
            host = _field(result.name, plans[result.name], "host")
            host = {"optimizer_bytes": 0} | dict(host)  # older plans have no such field
            parts = {part: _field(result.name, host, name) for part, name in _ON_THE_HOST.items()}
            bars.append(_bar(result.name, parts, is_planned=True))
        private, pages = result.ram_private_above_imports_peak_bytes, result.ram_file_peak_bytes
        if private is not None:
            parts = {"private, above the imports": private, "pages of mapped files": pages or 0}
            bars.append(_bar(result.name, parts, is_planned=False))
    return [bar for bar in bars if bar.parts]


def _bar(name: str, parts: Mapping[str, int], is_planned: bool) -> Bar:
    return Bar(name=name, parts={part: n for part, n in parts.items() if n > 0}, is_planned=is_planned)


def _planned_vram(name: str, plan: Plan) -> dict[str, int]:
    parts = {part: sum(_field(name, plan, field) for field in fields) for part, fields in _ALWAYS_THERE.items()}
    phases = _field(name, plan, "phases")
    if not phases:
        raise ValueError(f"the memory plan of {name} has no phase")
    phases = [{"kept_bytes": 0} | dict(phase) for phase in phases]  # older plans keep nothing and have no such field
    peak = max(phases, key=lambda phase: sum(_field(name, phase, field) for field in _AT_THE_PEAK.values()))
    parts |= {part: peak[field] for part, field in _AT_THE_PEAK.items()}
    # Nor have they this part.
    return parts | {"DDP's buckets": plan.get("bucket_bytes", 0), CONTEXT: _field(name, plan, "context_bytes")}


def _field(name: str, plan: Plan, field: str) -> Any:
    if field not in plan:
        raise ValueError(f"the memory plan of {name} has no {field}; it has {', '.join(sorted(plan))}")
    return plan[field]
