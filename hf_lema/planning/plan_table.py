"""Plans side by side: which of them fit a card and a machine, as text and as a dictionary.

Responsibility: `compare_plans` for a streamed model, stock PEFT and QLoRA, the table of ``hf-lema plan``, and what to
change where something does not fit. Plans nothing itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft import LoraConfig

from hf_lema.config import LemaConfig
from hf_lema.planning.device_rates import DeviceRates, rates_here
from hf_lema.planning.memory_plan import MemoryPlan
from hf_lema.planning.optimizers import OPTIMIZERS, OptimizerBytes, optimizer_bytes
from hf_lema.planning.planner import best_plan
from hf_lema.planning.step_cost import Model, PlanOptions, StepCost
from hf_lema.planning.stock_plan import stock_plan
from hf_lema.runtime.residency import HEAD_ROOM_BYTES
from hf_lema.units import format_bytes

NUM_HALVINGS = 6
"""Of the card's memory, to find where a step begins to be bound by computing."""

_NAMES = {"lema": "LEMA", "peft": "stock PEFT", "qlora": "QLoRA"}


@dataclass(frozen=True, kw_only=True)
class PlanComparison:
    """Plans for the same job, and whether they fit.

    Attributes:
        plans: Streamed, stock PEFT and QLoRA; where the streamed one does not fit, the least that it would take.
        fits: Whether each fits the card and the machine.
        advice: What to change, a sentence each.
        vram_bytes: The card.
        vram_limit_bytes: What the allocator may hand out: the card less context and head-room.
        ram_bytes: The machine; None for this one.
        rates: Of the card.
        optimizers: Other optimizers -> their state, in VRAM and paged.
        compute_bound_from_bytes: VRAM from which on the streamed step is bound by computing; None where the card has
            not so much.
    """

    plans: tuple[MemoryPlan, ...]
    fits: tuple[bool, ...]
    advice: tuple[str, ...]
    vram_bytes: int
    vram_limit_bytes: int
    ram_bytes: int | None
    rates: DeviceRates
    optimizers: dict[str, OptimizerBytes]
    compute_bound_from_bytes: int | None


def compare_plans(
    model: Model,
    config: LemaConfig | None = None,
    *,
    batch_size: int,
    seq_len: int,
    vram_bytes: int | None = None,
    ram_bytes: int | None = None,
    lora: LoraConfig | int = 16,
    rates: DeviceRates | None = None,
    options: PlanOptions | None = None,
) -> PlanComparison:
    """Plans one job three ways.

    Args:
        model: As for `plan_memory`.
        config: Budgets of the streamed model; by default all of the card and the machine.
        batch_size: Sequences that one process trains on at a time.
        seq_len: Tokens of each.
        vram_bytes: The card's size; None for the one in ``rates``.
        ram_bytes: The machine's free RAM; None for this machine's.
        lora: Adapter, or its rank.
        rates: Of the card; the data sheet's of the one that is here if None, of a T4 where there is none.
        options: The rest.

    Raises:
        ValueError: The model cannot be planned, or a stated RAM budget holds nothing.
    """
    rates, config = rates or rates_here(), config or LemaConfig()
    card_bytes = rates.vram_bytes if vram_bytes is None else vram_bytes
    options = replace(options or PlanOptions(), vram_bytes=card_bytes, ram_bytes=ram_bytes)
    limit_bytes = card_bytes - rates.context_bytes - HEAD_ROOM_BYTES
    advice: list[str] = []
    cost = StepCost(model, batch_size, seq_len, lora, rates, options)
    try:
        streamed = best_plan(cost, config, options)
        is_refused = streamed.vram_bytes > limit_bytes
    except ValueError as error:
        streamed = best_plan(cost, replace(config, vram_budget="min"), options)
        is_refused = True
        advice.append(f"LEMA: {error}")

    four_bit = replace(options, quantization="nf4")
    packed_cost = StepCost(model, batch_size, seq_len, lora, rates, four_bit, is_upcast=True)
    peft, qlora = stock_plan(cost, is_checkpointed=True), stock_plan(packed_cost, is_checkpointed=True)
    for plan, of_plan in ((peft, cost), (qlora, packed_cost)):
        if plan.vram_bytes > limit_bytes:
            advice.append(_advice(plan, limit_bytes, of_plan))
    if streamed.tier in ("disk", "mixed") and config.ram_budget != "min" and not options.is_packed:
        budgets = replace(config, vram_budget="min") if is_refused else config  # what fits unpacked fits packed
        packed = best_plan(StepCost(model, batch_size, seq_len, lora, rates, four_bit), budgets, four_bit)
        advice += _packing_advice(streamed, packed)
    plans = (streamed, peft, qlora)
    fits = (not is_refused, *(plan.vram_bytes <= limit_bytes for plan in plans[1:]))
    return PlanComparison(
        plans=plans,
        fits=fits,
        advice=tuple(advice),
        vram_bytes=card_bytes,
        vram_limit_bytes=limit_bytes,
        ram_bytes=ram_bytes,
        rates=rates,
        optimizers={
            name: optimizer_bytes(name, cost.tensors.trainable) for name in OPTIMIZERS if name != options.optim
        },
        compute_bound_from_bytes=_compute_bound_from(cost, config, options, limit_bytes),
    )


def _compute_bound_from(cost: StepCost, config: LemaConfig, options: PlanOptions, limit_bytes: int) -> int | None:
    """The VRAM from which on computing hides the moving, found by halving; None where the card has not so much.

    Every layer is taken to recompute: one that is kept takes arithmetic away again, and the step is faster anyway. With
    less memory a step may be bound by computing too, in such small micro-batches that they take longer.
    """
    options = replace(options, num_kept=0)

    def is_bound(budget: int | str) -> bool:
        return best_plan(cost, replace(config, vram_budget=budget), options).time.is_bound_by_compute

    least_bytes = best_plan(cost, replace(config, vram_budget="min"), options).vram_bytes
    if limit_bytes < least_bytes:
        return None
    if is_bound("min"):
        return least_bytes
    if not is_bound(limit_bytes):
        return None
    too_small_bytes, enough_bytes = least_bytes, limit_bytes
    for _ in range(NUM_HALVINGS):
        middle_bytes = (too_small_bytes + enough_bytes) // 2
        if is_bound(middle_bytes):
            enough_bytes = middle_bytes
        else:
            too_small_bytes = middle_bytes
    return enough_bytes


def _advice(plan: MemoryPlan, limit_bytes: int, cost: StepCost) -> str:
    """What would make a stock run fit: the largest batch found by halving, or nothing."""
    name = _NAMES[plan.contender]
    if plan.always_bytes > limit_bytes:
        return f"{name}: weights and optimizer alone take {format_bytes(plan.always_bytes)}; no batch size fits."
    size = plan.batch_size // 2
    while size and stock_plan(cost.at(cost.rates, size), is_checkpointed=True).vram_bytes > limit_bytes:
        size //= 2
    if not size:
        return f"{name}: no batch size fits at {plan.seq_len} tokens."
    return f"{name}: fits with per_device_train_batch_size={size}."


def _packing_advice(streamed: MemoryPlan, packed: MemoryPlan) -> list[str]:
    """What NF4 would take where layers are read from files at every visit. It changes the numbers: it is only said."""
    if packed.tier not in ("ram", "vram"):
        return []
    return [
        f'LEMA: layers are read from files at every visit; with quantization="nf4", which has the numbers of QLoRA, '
        f"they would be in {format_bytes(packed.host.private_bytes)} of RAM, and a step take at least "
        f"{packed.time.step_s:.3g} s instead of {streamed.time.step_s:.3g} s."
    ]


# ---- text ----


def _rows(plan: MemoryPlan) -> list[tuple[str, str]]:
    peak, launch = plan.peak, plan.launch
    is_group = launch.world_size > 1
    layers = f"{len(plan.resident_layers)} of {plan.num_layers}"
    return [
        ("slots", format_bytes(plan.slots_bytes)),
        ("resident layers", f"{format_bytes(plan.resident_bytes)} ({layers})"),
        ("embedding and head", format_bytes(plan.embedding_bytes + plan.head_bytes)),
        ("norms, buffers", format_bytes(plan.other_bytes)),
        ("adapter", format_bytes(plan.adapter_bytes)),
        ("optimizer", format_bytes(plan.optimizer_bytes)),
        *([("DDP's buckets", format_bytes(plan.bucket_bytes))] if is_group else []),
        ("cuBLAS workspace", format_bytes(plan.workspace_bytes)),
        ("peaks in", peak.name),
        ("- boundary activations", format_bytes(peak.boundary_bytes)),
        ("- kept activations", format_bytes(peak.kept_bytes)),
        ("- gradients", format_bytes(peak.gradient_bytes)),
        ("- activations", format_bytes(peak.activation_bytes)),
        ("VRAM allocated", format_bytes(plan.vram_bytes)),
        ("CUDA context", format_bytes(plan.context_bytes)),
        ("RAM", format_bytes(plan.host.private_bytes)),
        ("- page-locked", format_bytes(plan.host.page_locked_bytes)),
        *([(f"RAM of all {launch.num_processes}", format_bytes(plan.host_group_bytes))] if is_group else []),
        ("left in files", format_bytes(plan.host.file_backed_bytes)),
        ("micro-batch", _micro_batch(plan)),
        ("recompute", _recompute(plan)),
        ("layers rest in", plan.tier),
        ("boundaries wait in", plan.boundaries),
        ("moved a step", format_bytes(plan.h2d_bytes)),
        ("forward", _phase_text(plan.time.forward_compute_s, plan.time.forward_moving_s)),
        ("backward", _phase_text(plan.time.backward_compute_s, plan.time.backward_moving_s)),
        *([("summing gradients", f"{plan.time.all_reduce_s:.3g} s")] if is_group else []),
        ("step, at least", f"{plan.time.step_s:.3g} s"),
        *([(f"tokens/s of all {launch.world_size}", f"{plan.tokens_per_s:.4g}")] if is_group else []),
    ]


def _micro_batch(plan: MemoryPlan) -> str:
    both = plan.forward_micro_batch_size, plan.micro_batch_size
    return str(both[1]) if both[0] == both[1] else "{} (forward), {} (backward)".format(*both)


def _recompute(plan: MemoryPlan) -> str:
    return f"{len(plan.recomputed_layers)} of {plan.num_layers} layers" if plan.recomputed_layers else "off"


def _phase_text(compute_s: float, moving_s: float) -> str:
    if moving_s <= compute_s:
        return f"{compute_s:.3g} s"
    return f"{moving_s:.3g} s (bus; {compute_s:.3g} computing)"


def format_plans(plans: Sequence[MemoryPlan]) -> str:
    """A table with one column a plan, for a terminal."""
    columns = [_rows(plan) for plan in plans]
    titles = ["", *(_NAMES[plan.contender] for plan in plans)]
    lines = [
        titles,
        *(
            [column[i][0] if j < 0 else column[i][1] for j, column in enumerate([columns[0], *columns], -1)]
            for i in range(len(columns[0]))
        ),
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def format_comparison(comparison: PlanComparison) -> str:
    """What ``hf-lema plan`` prints."""
    first, rates = comparison.plans[0], comparison.rates
    verdicts = [
        f"{_NAMES[plan.contender]}: {'fits' if fits else 'does not fit'}"
        for plan, fits in zip(comparison.plans, comparison.fits, strict=True)
    ]
    return "\n".join(
        [
            f"{first.model}, {first.batch_size} x {first.seq_len} tokens, {format_bytes(comparison.vram_bytes)} of "
            f"VRAM ({format_bytes(comparison.vram_limit_bytes)} beside context and head-room)",
            "",
            format_plans(comparison.plans),
            "",
            *verdicts,
            *comparison.advice,
            _bound_text(comparison.compute_bound_from_bytes),
            _optimizer_text(comparison.optimizers),
            *([first.launch.describe()] if first.launch.world_size > 1 else []),
            f"Times are lower bounds from {rates.origin} rates ({rates.name}).",
        ]
    )


def _bound_text(from_bytes: int | None) -> str:
    if from_bytes is None:
        return "LEMA: no VRAM budget of this card is enough for computing to hide the moving of layers."
    return f"LEMA: from a VRAM budget of {format_bytes(from_bytes)} on, computing hides the moving of layers."


def _optimizer_text(optimizers: dict[str, OptimizerBytes]) -> str:
    """What the optimizer's state would take under other names of ``TrainingArguments(optim=...)``."""
    parts = [
        f"{name} {format_bytes(state.vram_bytes)}"
        + (f" and {format_bytes(state.paged_bytes)} paged" if state.paged_bytes else "")
        for name, state in optimizers.items()
    ]
    return f"Optimizer state with another optim: {', '.join(parts)}."


# ---- dictionary ----


def plan_as_dict(plan: MemoryPlan) -> dict[str, Any]:
    """A plan for JSON: every field, and what follows from them."""
    return dataclasses.asdict(plan) | {
        "vram_bytes": plan.vram_bytes,
        "always_bytes": plan.always_bytes,
        "peak_phase": plan.peak.name,
        "host_private_bytes": plan.host.private_bytes,
        "host_group_bytes": plan.host_group_bytes,
        "tokens_per_s": plan.tokens_per_s,
        "step_s": plan.time.step_s,
        "num_recomputed": len(plan.recomputed_layers),
        "is_bound_by_compute": plan.time.is_bound_by_compute,
    }


def comparison_as_dict(comparison: PlanComparison) -> dict[str, Any]:
    """A comparison for JSON."""
    return dataclasses.asdict(comparison) | {"plans": [plan_as_dict(plan) for plan in comparison.plans]}
