"""What a training run with the whole model in VRAM will take: stock PEFT and QLoRA.

Responsibility: `plan_stock`, and `stock_plan` for a step whose cost is known: arithmetic over what `Rehearsal` has
counted. Allocates nothing and touches no device.
"""

from __future__ import annotations

from peft import LoraConfig

from hf_lema.planning.device_rates import DeviceRates, rates_here
from hf_lema.planning.memory_plan import HostBytes, MemoryPlan, StepTime
from hf_lema.planning.step_cost import Model, PlanOptions, StepCost


def plan_stock(
    model: Model,
    *,
    batch_size: int,
    seq_len: int,
    lora: LoraConfig | int | None = 16,
    rates: DeviceRates | None = None,
    options: PlanOptions | None = None,
    is_checkpointed: bool = True,
) -> MemoryPlan:
    """Plans stock PEFT with the whole model in VRAM, or QLoRA where the options ask for NF4.

    Args:
        model: As for `hf_lema.plan_memory`.
        batch_size: As there.
        seq_len: As there.
        lora: As there.
        rates: As there.
        options: As there; places and budgets do not count.
        is_checkpointed: Whether gradient checkpointing is on.
    """
    options = options or PlanOptions()
    rates = rates or rates_here()
    cost = StepCost(model, batch_size, seq_len, lora, rates, options, is_upcast=options.is_packed)
    return stock_plan(cost, is_checkpointed)


def stock_plan(cost: StepCost, is_checkpointed: bool) -> MemoryPlan:
    """`plan_stock` for a step whose cost is known.

    Args:
        cost: Of the step.
        is_checkpointed: Whether gradient checkpointing is on.
    """
    visits, ends, tensors = cost.stock_visits(is_checkpointed), cost.ends(False), cost.tensors
    launch = cost.options.launch
    return MemoryPlan(
        contender="qlora" if cost.options.is_packed else "peft",
        model=cost.name,
        batch_size=cost.batch_size,
        seq_len=cost.seq_len,
        micro_batch_size=cost.batch_size,
        forward_micro_batch_size=cost.batch_size,
        tile_tokens=0,
        resident_layers=tuple(range(cost.num_layers)),
        kept_layers=tuple(range(visits.first_kept, cost.num_layers)),
        recomputed_layers=tuple(range(cost.lowest, visits.first_kept)),
        num_layers=cost.num_layers,
        tier="vram",
        boundaries="vram",
        embedding_and_head="vram",
        slots_bytes=0,
        resident_bytes=sum(tensors.layer_bytes.values()),
        embedding_bytes=tensors.embedding_bytes,
        head_bytes=tensors.head_bytes,
        other_bytes=tensors.other_bytes,
        adapter_bytes=tensors.adapter_bytes,
        optimizer_bytes=cost.optimizer_bytes.vram_bytes,
        bucket_bytes=launch.bucket_bytes(cost.gradient_bytes()),
        workspace_bytes=cost.rates.workspace_bytes,
        phases=cost.phases(visits, ends, in_ring=False),
        context_bytes=cost.rates.context_bytes,
        host=HostBytes(
            slab_bytes=0,
            page_locked_bytes=0,
            file_backed_bytes=0,
            ring_bytes=0,
            boundary_bytes=0,
            embedding_bytes=0,
            optimizer_bytes=cost.optimizer_bytes.paged_bytes,
        ),
        h2d_bytes=0,
        time=StepTime(
            forward_compute_s=visits.forward_s,
            forward_moving_s=0.0,
            backward_compute_s=visits.backward_s,
            backward_moving_s=0.0,
            ends_s=cost.ends_s(ends, 0),
            update_s=cost.update_s(),
            all_reduce_s=launch.all_reduce_s(cost.gradient_bytes(), launch.shared(cost.rates)),
        ),
        launch=launch,
    )
