"""The planner: bytes that equal what a wrapped model holds, peaks that were measured, budgets that hold."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import PEFT_THEN_WRAP, WRAP_THEN_PEFT, adapt, build, lora, prepare
from peft import LoraConfig
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

from hf_lema import LemaConfig, StepChoices, get_streamer
from hf_lema.planning import plan_table, rehearsal
from hf_lema.planning.blueprint import draw, nf4_bytes, packed_weights, sort_tensors
from hf_lema.planning.data_parallel import Launch
from hf_lema.planning.device_rates import DATA_SHEETS, DeviceRates, find_rates, measure_rates
from hf_lema.planning.memory_plan import MemoryPlan
from hf_lema.planning.meter import ByteMeter, CudaBehaviour, Kernels, allocated_bytes
from hf_lema.planning.plan_table import (
    _advice,
    compare_plans,
    comparison_as_dict,
    format_comparison,
    format_plans,
    plan_as_dict,
)
from hf_lema.planning.planner import GAPS, TILE_TOKENS, best_plan, plan_memory
from hf_lema.planning.rehearsal import Rehearsal
from hf_lema.planning.step_cost import PlanOptions, StepCost
from hf_lema.planning.stock_plan import plan_stock, stock_plan
from hf_lema.runtime.host_store import RamStore
from hf_lema.units import GIB, MIB, format_bytes
from hf_lema.wrapper import apply_choices

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
MAX_VRAM_ERROR = 0.02
MAX_TIME_ERROR = 0.15
SMALL = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    attn_implementation="sdpa",
)
SLOW_BUS = dataclasses.replace(
    DATA_SHEETS["T4"], h2d_bytes_per_s=5e8, duplex_bytes_per_s=5e8, kernel_start_s=1e-6, context_bytes=0
)
PLENTY = PlanOptions(ram_bytes=64 * GIB)
ADAPTER = LoraConfig(r=8, lora_dropout=0.1, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def small_cost() -> StepCost:
    """A step of 4 x 64 tokens on a card behind a slow bus."""
    return StepCost(SMALL, 4, 64, ADAPTER, SLOW_BUS, PLENTY)


def plan(cost: StepCost, budget: str | int, **options: Any) -> MemoryPlan:
    return best_plan(cost, LemaConfig(vram_budget=budget), dataclasses.replace(PLENTY, **options))


# ---- against what was measured ----


def check_plans() -> Any:
    spec = importlib.util.spec_from_file_location("check_plans", RECIPES / "check_plans.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_plans"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_plans_agree_with_every_record_of_the_h100() -> None:
    found = list(check_plans().comparisons())

    assert len(found) >= 70
    assert len({c.record["vram_allocated_peak_bytes"] for c in found}) >= 12, "records that differ"
    cut_with_casts = [c for c in found if c.name[0] == "c" and c.plan.micro_batch_size == 4]
    assert [c.name for c in cut_with_casts if not -0.05 < c.vram_error < 0] == [], "casts that are left out since"
    others = [c for c in found if c not in cut_with_casts]
    assert [c.name for c in others if abs(c.vram_error) > MAX_VRAM_ERROR] == []
    assert len(cut_with_casts) == 2
    timed = [c for c in found if not c.is_rate_its_own]
    assert [c.name for c in timed if abs(c.time_error) > MAX_TIME_ERROR and not c.is_of_a_slow_host] == []
    slow = [c for c in timed if c.is_of_a_slow_host]
    assert [c.name for c in slow if not -0.26 < c.time_error < 0.02] == []
    disturbed = [c for c in timed if c.is_disturbed and c not in slow]
    assert (len(timed), len(slow), len(disturbed)) == (66, 12, 8)
    streamed = [c for c in found if c.record["options"]["contender"] == "lema"]
    streamed = [c for c in streamed if (c.plan.boundaries, c.plan.embedding_and_head) == ("vram", "vram")]
    assert [c.name for c in streamed if c.plan.h2d_bytes != c.record["h2d_predicted_bytes"]] == []


# ---- against counted bytes ----


@pytest.mark.parametrize("order", [WRAP_THEN_PEFT, PEFT_THEN_WRAP])
@pytest.mark.integration
def test_plan_of_a_wrapped_model_is_what_it_holds_to_the_byte(order: str) -> None:
    model = prepare(order, config=LemaConfig(num_slots=3, vram_budget="min"))
    streamer = get_streamer(model)
    planned = plan_memory(model, LemaConfig(num_slots=3, vram_budget="min"), batch_size=2, seq_len=16, options=PLENTY)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trainable)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values()]
    prefetcher = streamer._prefetcher
    assert prefetcher is not None
    assert isinstance(streamer.host_store, RamStore)
    slots = prefetcher._pool.slots

    assert planned.host.slab_bytes == streamer.host_store.held_bytes
    assert planned.slots_bytes == sum(allocated_bytes(slot.buffer.nbytes) for slot in slots)
    assert planned.adapter_bytes == sum(allocated_bytes(p.nbytes) for p in trainable)
    assert planned.optimizer_bytes == sum(allocated_bytes(t.nbytes) for t in moments)
    update = planned.phases[-1]
    assert (update.name, update.gradient_bytes) == ("update", sum(allocated_bytes(p.grad.nbytes) for p in trainable))
    streamer.close()


@pytest.mark.integration
def test_plan_of_a_configuration_is_that_of_the_built_model() -> None:
    model = build()
    from_config = plan_memory(
        model.config,
        LemaConfig(vram_budget="min"),
        batch_size=2,
        seq_len=16,
        lora=lora(),
        options=dataclasses.replace(PLENTY, dtype=torch.float32),
    )
    wrapped = prepare(WRAP_THEN_PEFT, model)
    from_wrapped = plan_memory(wrapped, LemaConfig(vram_budget="min"), batch_size=2, seq_len=16, options=PLENTY)
    get_streamer(wrapped).close()

    assert dataclasses.replace(from_config, model="") == dataclasses.replace(from_wrapped, model="")


@pytest.mark.integration
def test_bytes_that_a_plan_moves_are_those_that_training_steps_move() -> None:
    model = prepare(WRAP_THEN_PEFT, build(), config=LemaConfig(vram_budget="min"))
    streamer = get_streamer(model)
    planned = plan_memory(
        model,
        LemaConfig(vram_budget="min"),
        batch_size=2,
        seq_len=16,
        options=dataclasses.replace(PLENTY, boundaries="vram", embedding_and_head="vram"),
    )
    ids = torch.ones(2, 16, dtype=torch.int64)
    moved = []
    for _ in range(4):
        before = streamer.stats().num_hits + streamer.stats().num_demand_loads
        model(input_ids=ids, labels=ids).loss.backward()
        moved.append(streamer.stats().num_hits + streamer.stats().num_demand_loads - before)
    assert planned.h2d_bytes == streamer.transfers_per_step() * streamer.layer_bytes
    assert moved[-1] == 2 * 4
    streamer.close()


def test_a_model_that_trains_some_base_weights_is_planned_with_them_resident() -> None:
    model = build()
    model.requires_grad_(False)
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    peft_model = adapt(model)
    model.model.layers[1].mlp.up_proj.base_layer.weight.requires_grad_(True)

    tensors = sort_tensors(draw(peft_model).lm, is_packed=False)

    assert tensors.layer_bytes[0] - tensors.layer_bytes[1] == 64 * 32 * 4
    assert tensors.layer_adapter_bytes[1] - tensors.layer_adapter_bytes[0] == 64 * 32 * 4


def test_tied_embedding_counts_once() -> None:
    tied = sort_tensors(draw(build(tie_word_embeddings=True)).lm, is_packed=False)
    untied = sort_tensors(draw(build(tie_word_embeddings=False)).lm, is_packed=False)

    assert (tied.embedding_bytes, tied.head_bytes) == (128 * 32 * 4, 0)
    assert (untied.embedding_bytes, untied.head_bytes) == (128 * 32 * 4, 128 * 32 * 4)


@pytest.mark.parametrize("is_double", [True, False])
def test_nf4_bytes_are_those_of_bitsandbytes(is_double: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(688, 256)

    packed, state = bitsandbytes.functional.quantize_4bit(weight, compress_statistics=is_double, quant_type="nf4")

    parts = [packed, state.absmax] + ([state.state2.absmax, state.offset] if is_double else [])
    assert nf4_bytes(weight.numel(), is_double) == sum(part.nbytes for part in parts)


def test_packed_model_keeps_norms_and_adapters_as_they_were() -> None:
    lm = draw(SMALL, torch.float16, 8).lm
    dense, packed = sort_tensors(lm, is_packed=False), sort_tensors(lm, is_packed=True)
    weights = packed_weights(lm)

    assert len(weights) == 7 * 8
    assert dataclasses.replace(packed, layer_bytes={}) == dataclasses.replace(dense, layer_bytes={})
    assert 3.5 < dense.layer_bytes[0] / packed.layer_bytes[0] < 4


# ---- tensors without data against real ones ----


def part_costs(lm: Any, precision: torch.dtype | None) -> dict[str, Any]:
    rehearsed = Rehearsal(lm, precision=precision, has_flash=False)
    return {
        "streamed": rehearsed.streamed_visit(1, 4, 24, 0),
        "cut": rehearsed.streamed_visit(1, 4, 24, 2),
        "cut backward": rehearsed.streamed_visit(1, 4, 24, 2, 0, 4),
        "kept": rehearsed.streamed_visit(1, 4, 24, 0, is_kept=True),
        "kept, cut": rehearsed.streamed_visit(1, 4, 24, 2, is_kept=True),
        "checkpointed": rehearsed.stock_visit(1, 4, 24, True),
        "plain": rehearsed.stock_visit(1, 4, 24, False),
        "loss": rehearsed.ends(4, 24, False),
        "chunked loss": rehearsed.ends(4, 24, True),
        "head in pieces": rehearsed.ends(4, 24, True, 1024),
    }


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_fake_run_counts_what_a_real_run_counts(precision: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rehearsal.ChunkedLoss.__init__, "__defaults__", (None, 0, True))
    real_model, twin = (adapt(build(num_layers=2), lora(target_modules=["v_proj", "down_proj"])) for _ in range(2))
    fake = part_costs(draw(twin).lm, precision)
    # The same code on real tensors; the saved random state is the host's.
    counted = functools.partial(ByteMeter, lambda tensor: tensor.dtype != torch.uint8)
    monkeypatch.setattr(rehearsal, "FakeTensorMode", contextlib.nullcontext)
    monkeypatch.setattr(rehearsal, "_forget_data", lambda lm, mode: {})
    monkeypatch.setattr(rehearsal, "ByteMeter", counted)

    real = part_costs(real_model.get_base_model(), precision)

    ends = ("loss", "chunked loss", "head in pieces")
    assert {how: cost for how, cost in real.items() if how not in ends} == {
        how: cost for how, cost in fake.items() if how not in ends
    }
    # With values to look at, transformers asks a few questions of the mask; they leave nothing behind.
    assert [_bytes_of(real[how]) for how in ends] == [_bytes_of(fake[how]) for how in ends]
    assert fake["cut"].backward.peak_bytes < fake["streamed"].backward.peak_bytes
    assert fake["cut backward"].backward.peak_bytes < fake["cut"].backward.peak_bytes  # it keeps no masks
    assert num_kernels(fake["cut backward"].forward) < 0.8 * num_kernels(fake["cut"].forward)
    assert fake["chunked loss"].forward.kept_bytes < fake["loss"].forward.kept_bytes
    graph_bytes = fake["plain"].forward.kept_bytes
    assert graph_bytes <= fake["kept"].forward.kept_bytes < 1.05 * graph_bytes, "what stock PEFT keeps"
    assert fake["kept"].backward.peak_bytes < fake["streamed"].backward.peak_bytes - graph_bytes // 2
    assert num_kernels(fake["kept"].backward) < 0.8 * num_kernels(fake["streamed"].backward)


def num_kernels(measure: rehearsal.Measure) -> int:
    return sum(kernels.count for kernels in measure.work)


def _bytes_of(cost: rehearsal.PartCost) -> list[tuple[int, int]]:
    return [(measure.peak_bytes, measure.kept_bytes) for measure in (cost.forward, cost.backward)]


def test_kept_activations_of_many_pieces_are_planned_from_two_and_never_as_less(small_cost: StepCost) -> None:
    rehearsed = small_cost._rehearsal
    counted = rehearsed.streamed_visit(7, 4, 64, 1, is_kept=True)
    planned = small_cost.kept_visits(1)

    for part, name in ((counted.forward.kept_bytes, "kept_bytes"), (counted.forward.peak_bytes, "forward_peak_bytes")):
        assert part <= getattr(planned, name)[7] < 1.03 * part
    assert counted.backward.peak_bytes <= planned.backward_peak_bytes[7] <= counted.backward.peak_bytes + 2**18
    work_s = small_cost.rates.compute_s(counted.forward.work)
    assert planned.forward_times_s[7] == pytest.approx(work_s, rel=0.02)


@pytest.mark.integration
def test_what_kept_layers_add_to_a_plan_is_what_they_hold_at_the_loss() -> None:
    """Counted on a wrapped model, whose weights move from slot to slot."""
    model = prepare(WRAP_THEN_PEFT, build(), lora(lora_dropout=0.0), config=LemaConfig(vram_budget="min"))
    fixed = dataclasses.replace(PLENTY, boundaries="vram", embedding_and_head="vram")
    ids = torch.ones(2, 16, dtype=torch.int64)
    held, planned = [], []
    for num_kept in (0, 3):
        apply_choices(model, StepChoices(kept_layers=tuple(range(4 - num_kept, 4))))
        for _ in range(2):  # in its first visit a layer proves that it may
            meter = ByteMeter(lambda tensor: tensor.dtype != torch.uint8)
            with meter.measured() as measures:
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        held.append(measures[0].kept_bytes)
        options = dataclasses.replace(fixed, num_kept=num_kept)
        plan = plan_memory(model, LemaConfig(vram_budget="min"), batch_size=2, seq_len=16, options=options)
        planned.append(next(phase for phase in plan.phases if phase.name == "loss"))
        assert plan.choices.kept_layers == tuple(range(4 - num_kept, 4))
    get_streamer(model).close()

    assert planned[0].boundary_bytes == planned[1].boundary_bytes
    assert planned[0].kept_bytes == 0
    assert held[1] - held[0] == planned[1].kept_bytes


def test_counting_follows_the_life_of_storages() -> None:
    meter = ByteMeter(lambda tensor: True)
    given = torch.ones(1000)
    with meter.measured() as measures:
        kept = given.view(10, 100) + 1  # 4,000 bytes: 4,096 of them
        torch.ones(100_000).sum()
        del given
    (measure,) = measures

    assert kept.shape == (10, 100)
    assert measure.kept_bytes == 4096
    assert measure.peak_bytes == 4096 + allocated_bytes(400_000) + 512


def test_causal_attention_counts_half_of_the_square() -> None:
    flops = []
    for is_causal in (False, True):
        with FakeTensorMode(), ByteMeter().measured() as measures, CudaBehaviour(has_flash=True):
            query = torch.empty(1, 2, 64, 32, dtype=torch.float16)
            torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=is_causal)
        flops.append(sum(kernels.num_flops for kernels in measures[0].work))

    assert flops[0] == 2 * flops[1] == 2 * 2 * (2 * 64 * 64 * 32)


def test_grouped_queries_without_flash_hold_the_whole_matrix_of_scores() -> None:
    scores_bytes = 4 * 4 * 256 * 256  # four heads, in float32
    peaks = {}
    for has_flash in (True, False):
        with FakeTensorMode(), ByteMeter().measured() as measures, CudaBehaviour(has_flash=has_flash):
            query = torch.empty(1, 4, 256, 32, dtype=torch.float16, requires_grad=True)
            key = torch.empty(1, 2, 256, 32, dtype=torch.float16)
            torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
        peaks[has_flash] = measures[0].peak_bytes

    assert peaks[True] < scores_bytes <= peaks[False]


def test_dropout_and_attention_keep_what_they_keep_on_cuda() -> None:
    hidden = torch.ones(4, 8, requires_grad=True)
    with CudaBehaviour(has_flash=True):
        output = torch.nn.functional.dropout(hidden, 0.5, True)

    assert type(output.grad_fn).__name__ == "NativeDropoutBackward0"


def test_attention_without_flash_is_the_memory_efficient_kernel() -> None:
    # As many keys as queries: the memory-efficient kernel does not take fewer, and transformers leaves them few.
    fields = SMALL.to_dict() | {"num_key_value_heads": SMALL.num_attention_heads}
    fused, eager = LlamaConfig(**fields), LlamaConfig(**fields, attn_implementation="eager")
    flash = StepCost(fused, 1, 2048, ADAPTER, DATA_SHEETS["A100"], PLENTY).streamed_visits(1)
    efficient = StepCost(fused, 1, 2048, ADAPTER, DATA_SHEETS["P100"], PLENTY).streamed_visits(1)
    whole_matrix = StepCost(eager, 1, 2048, ADAPTER, DATA_SHEETS["P100"], PLENTY).streamed_visits(1)

    peaks = [visits.backward_peak_bytes[0] for visits in (flash, efficient, whole_matrix)]
    assert peaks[0] <= peaks[1] < peaks[2] - 2048 * 2048 * 2, "no mask of all tokens by all tokens"


def test_a_long_sequence_is_planned_in_tiles_with_lora_dropout() -> None:
    options = dataclasses.replace(PLENTY, micro_batch_size=1)
    whole = StepCost(SMALL, 1, 4 * TILE_TOKENS, ADAPTER, DATA_SHEETS["A100"], options)
    assert ADAPTER.lora_dropout > 0, "whose masks are drawn again with each tile"
    in_tiles = whole.streamed_visits(1, TILE_TOKENS).backward_peak_bytes[0]

    assert in_tiles < 0.7 * whole.streamed_visits(1).backward_peak_bytes[0]
    assert best_plan(whole, LemaConfig(vram_budget="min"), options).tile_tokens == TILE_TOKENS


def test_casts_that_visits_leave_out_are_left_out_of_plans() -> None:
    def backward_bytes(dropout: float, micro_batch_size: int) -> int:
        adapter = LoraConfig(r=8, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
        cost = StepCost(SMALL, 4, 64, adapter, DATA_SHEETS["A100"], dataclasses.replace(PLENTY, dtype=torch.float16))
        return cost.streamed_visits(micro_batch_size).backward_peak_bytes[0]

    # In float32: what enters the projections of the attention, its output, and what enters the feed-forward part.
    cast_bytes = 4 * 64 * 4 * (2 * SMALL.hidden_size + SMALL.intermediate_size)
    assert backward_bytes(0.1, 4) - backward_bytes(0.0, 4) > cast_bytes, "dropout draws in float32, as it does in stock"
    assert backward_bytes(0.1, 2) < 0.6 * backward_bytes(0.1, 4)


# ---- budgets ----


def test_larger_budget_never_plans_a_slower_step_and_no_plan_exceeds_its_budget(small_cost: StepCost) -> None:
    least = plan(small_cost, "min", boundaries="ram").vram_bytes
    budgets = [least + 256 * 1024 * i for i in range(1, 80)]
    plans = [plan(small_cost, budget) for budget in budgets]

    assert all(p.vram_bytes <= budget for p, budget in zip(plans, budgets, strict=True))
    steps_s = [p.time.step_s for p in plans]
    assert steps_s == sorted(steps_s, reverse=True)
    assert steps_s[-1] < steps_s[0]
    assert len({len(p.resident_layers) for p in plans}) > 4
    assert {p.boundaries for p in plans} == {"ram", "vram"}


def test_larger_budget_is_spent_on_kept_layers_where_computing_takes_the_time(small_cost: StepCost) -> None:
    fast = small_cost.at(
        dataclasses.replace(SLOW_BUS, h2d_bytes_per_s=2e10, duplex_bytes_per_s=2e10, kernel_start_s=3e-5)
    )
    least = plan(fast, "min", boundaries="ram").vram_bytes
    budgets = [least + 512 * 1024 * i for i in range(1, 72)]
    plans = [plan(fast, budget) for budget in budgets]

    assert all(p.vram_bytes <= budget for p, budget in zip(plans, budgets, strict=True))
    steps_s = [p.time.step_s for p in plans]
    assert steps_s == sorted(steps_s, reverse=True)
    assert {len(p.kept_layers) for p in plans} == set(range(9))
    assert all(p.kept_layers == tuple(range(8 - len(p.kept_layers), 8)) for p in plans)
    assert all(p.recomputed_layers == tuple(range(8 - len(p.kept_layers))) for p in plans)
    assert steps_s[-1] < 0.8 * steps_s[0], "a recompute is a third of the kernels"
    assert plan(fast, budgets[-1], num_kept=0).time.step_s > steps_s[-1]


def test_resident_layers_leave_room_for_gaps_which_the_least_may_lack(small_cost: StepCost) -> None:
    fixed = {"boundaries": "ram", "embedding_and_head": "ram", "micro_batch_size": 1, "num_kept": 0}
    least = plan(small_cost, "min", **fixed)
    gaps_bytes = max(phase.nbytes + int(GAPS * phase.activation_bytes) for phase in least.phases) - least.peak.nbytes
    assert gaps_bytes > 0
    room_bytes = least.vram_bytes + gaps_bytes + least.slots_bytes // 2

    assert len(plan(small_cost, room_bytes, **fixed).resident_layers) == 1
    assert plan(small_cost, room_bytes - 1, **fixed).resident_layers == ()
    assert plan(small_cost, least.vram_bytes, **fixed).vram_bytes == least.vram_bytes
    with pytest.raises(ValueError, match=f"the least that works is .*{least.vram_bytes} bytes"):
        plan(small_cost, least.vram_bytes - 1, **fixed)


def test_kept_layers_leave_room_for_gaps_and_for_copies_of_weights_in_their_first_visit(small_cost: StepCost) -> None:
    fixed = {"micro_batch_size": 4, "boundaries": "vram", "embedding_and_head": "vram", "num_resident": 0}
    kept = plan(small_cost, "min", num_kept=8, **fixed)
    forward = kept.phases[0]
    slot_bytes = kept.slots_bytes // 2
    needed = kept.always_bytes + max(
        forward.nbytes + int(GAPS * (forward.kept_bytes + forward.activation_bytes)) + slot_bytes,
        *(phase.nbytes + int(GAPS * (phase.kept_bytes + phase.activation_bytes)) for phase in kept.phases[1:]),
    )

    assert needed > kept.vram_bytes
    assert plan(small_cost, needed, num_kept=8, **fixed).vram_bytes == kept.vram_bytes
    with pytest.raises(ValueError, match="the least that works is"):
        plan(small_cost, needed - 1, num_kept=8, **fixed)


def test_min_keeps_activations_only_where_they_take_nothing() -> None:
    few_words = LlamaConfig(**(SMALL.to_dict() | {"vocab_size": 64}))  # so that the loss takes less than a layer
    fixed = {"micro_batch_size": 2, "boundaries": "vram", "embedding_and_head": "vram"}

    def planned(seq_len: int, num_kept: int | None) -> MemoryPlan:
        return plan(costs[seq_len], "min", num_kept=num_kept, **fixed)

    costs = {n: StepCost(few_words, 2, n, ADAPTER, DATA_SHEETS["A100"], PLENTY) for n in (512, 2048)}
    # The last layer's graph is there in its backward in any case; its first forward is beside copies of its weights.
    assert planned(2048, None).vram_bytes <= planned(2048, 0).vram_bytes < planned(2048, 2).vram_bytes
    assert planned(2048, None).kept_layers == (7,)
    assert planned(2048, None).time.step_s < planned(2048, 0).time.step_s
    assert planned(512, None).kept_layers == ()


def test_inputs_of_kept_layers_do_not_travel(small_cost: StepCost) -> None:
    fixed = {"micro_batch_size": 4, "boundaries": "ram", "embedding_and_head": "vram"}
    none, three = (plan(small_cost, "min", num_kept=n, **fixed) for n in (0, 3))
    hidden_bytes = 4 * 64 * 256 * 2

    assert none.host.boundary_bytes - three.host.boundary_bytes == 3 * hidden_bytes
    assert none.h2d_bytes - three.h2d_bytes == 3 * hidden_bytes
    loss = next(phase for phase in three.phases if phase.name == "loss")
    graph_bytes = [
        kept - out
        for kept, out in zip(
            small_cost.kept_visits(4).kept_bytes[5:], small_cost.kept_visits(4).output_bytes[5:], strict=True
        )
    ]
    assert loss.kept_bytes == sum(graph_bytes)
    assert loss.boundary_bytes == (2 + 1 + 3) * hidden_bytes, "a ring, the input of the first and every output"


def test_four_bit_layers_are_kept_only_where_they_are_asked_for_and_all_resident() -> None:
    options = dataclasses.replace(PLENTY, quantization="nf4", dtype=torch.float16)
    cost = StepCost(SMALL, 4, 64, ADAPTER, DATA_SHEETS["A100"], options)
    config = LemaConfig(vram_budget=4 * GIB)
    asked = best_plan(cost, config, dataclasses.replace(options, num_kept=2))

    assert best_plan(cost, config, options).kept_layers == ()
    assert (asked.kept_layers, len(asked.resident_layers)) == ((6, 7), 8)
    bare = best_plan(cost, LemaConfig(vram_budget="min"), dataclasses.replace(options, num_kept=2))
    assert len(bare.resident_layers) == 8
    with pytest.raises(ValueError, match="the least that works is"):
        best_plan(cost, LemaConfig(vram_budget=bare.vram_bytes - 1), dataclasses.replace(options, num_kept=2))


def test_more_kept_layers_than_train_are_refused() -> None:
    config = LoraConfig(r=8, target_modules=["q_proj"], layers_to_transform=[6, 7], task_type="CAUSAL_LM")
    cost = StepCost(SMALL, 2, 64, config, SLOW_BUS, PLENTY)

    both = plan(cost, 4 * GIB, num_kept=2)
    assert (both.kept_layers, both.recomputed_layers) == ((6, 7), ())
    with pytest.raises(ValueError, match="only 2 layers have a backward"):
        plan(cost, 4 * GIB, num_kept=3)


def test_impossible_budget_is_refused_with_the_smallest_that_works(small_cost: StepCost) -> None:
    with pytest.raises(ValueError, match="the least that works is") as refusal:
        plan(small_cost, 1 * MIB)
    smallest = int(str(refusal.value).split("(")[1].split(" bytes")[0])

    assert plan(small_cost, smallest).vram_bytes == smallest
    with pytest.raises(ValueError, match="the least that works is"):
        plan(small_cost, smallest - 1)


def test_min_keeps_nothing_resident_and_is_no_slower_than_it_may_be(small_cost: StepCost) -> None:
    floor = plan(small_cost, "min")
    whole = plan(small_cost, "min", micro_batch_size=4, boundaries="vram", embedding_and_head="vram")

    assert floor.resident_layers == ()
    assert floor.vram_bytes < whole.vram_bytes
    assert floor.time.step_s <= 1.2 * whole.time.step_s


def test_resident_layers_are_spread_and_move_less(small_cost: StepCost) -> None:
    fixed = {"micro_batch_size": 4, "boundaries": "vram", "embedding_and_head": "vram"}
    none = plan(small_cost, 4 * GIB, num_resident=0, **fixed)
    two = plan(small_cost, 4 * GIB, num_resident=2, **fixed)
    every = plan(small_cost, 4 * GIB, **fixed)

    assert two.resident_layers == (2, 6)
    assert two.vram_bytes - none.vram_bytes == two.resident_bytes
    assert two.h2d_bytes < none.h2d_bytes
    assert (every.tier, every.h2d_bytes, len(every.resident_layers)) == ("vram", 0, 8)


def test_auto_leaves_room_for_the_context_and_head_room(small_cost: StepCost) -> None:
    planned = best_plan(small_cost, LemaConfig(), dataclasses.replace(PLENTY, vram_bytes=GIB // 2 + 60 * MIB))

    assert planned.vram_bytes <= 60 * MIB


def test_boundaries_in_ram_take_a_ring_of_vram_and_their_own_bytes_of_ram(small_cost: StepCost) -> None:
    fixed = {"micro_batch_size": 4, "embedding_and_head": "vram"}
    here, there = (plan(small_cost, "min", boundaries=place, **fixed) for place in ("vram", "ram"))
    hidden_bytes = 4 * 64 * 256 * 2

    assert there.host.boundary_bytes == 8 * hidden_bytes
    assert there.h2d_bytes - here.h2d_bytes == 8 * hidden_bytes
    backward = next(phase for phase in there.phases if phase.name.startswith("backward"))
    assert backward.boundary_bytes == 2 * hidden_bytes
    assert backward.name == "backward of layer 0", "gradients of the layers above are all there"


def test_layers_that_do_not_fit_ram_stay_in_their_files(small_cost: StepCost) -> None:
    layers_bytes = sum(small_cost.tensors.layer_bytes.values())
    options = dataclasses.replace(PLENTY, boundaries="vram", embedding_and_head="vram")
    ram = best_plan(small_cost, LemaConfig(vram_budget="min", ram_budget=layers_bytes), options)
    disk = best_plan(small_cost, LemaConfig(vram_budget="min", ram_budget="min"), options)

    assert (ram.tier, ram.host.slab_bytes, ram.host.file_backed_bytes) == ("ram", layers_bytes, 0)
    assert (disk.tier, disk.host.slab_bytes, disk.host.file_backed_bytes) == ("disk", 0, layers_bytes)
    assert disk.host.page_locked_bytes == disk.host.ring_bytes == 64 * MIB
    with pytest.raises(ValueError, match="RAM budget"):
        best_plan(small_cost, LemaConfig(vram_budget="min", ram_budget=layers_bytes - 1), options)


@pytest.mark.integration
def test_13b_on_a_host_of_29_gib_has_most_layers_in_ram_and_the_others_in_files() -> None:
    """What Kaggle gives: 29 GiB, of which 21 are free beside Python, the page cache and the data."""
    options = dataclasses.replace(PLENTY, dtype=torch.float16, ram_bytes=22 * GIB)
    cost = StepCost("llama-2-13b", 1, 512, 16, DATA_SHEETS["P100"], options)
    found = best_plan(cost, LemaConfig(vram_budget="min"), options)
    layer_bytes = 40 * [next(iter(cost.tensors.layer_bytes.values()))]
    num_left = found.host.file_backed_bytes // layer_bytes[0]

    assert (found.tier, sum(layer_bytes)) == ("mixed", found.host.slab_bytes + found.host.file_backed_bytes)
    assert found.host.private_bytes <= 21 * GIB < found.host.private_bytes + layer_bytes[0]
    # With the spare VRAM of the card, those are resident that would be read from files, and none is any more.
    card = best_plan(cost, LemaConfig(vram_budget="auto"), options)
    assert 0 < num_left <= len(card.resident_layers) < 40
    assert card.time.forward_moving_s < found.time.forward_moving_s
    everything_in_ram = best_plan(cost, LemaConfig(vram_budget="auto", ram_budget=40 * GIB), options)
    assert card.time.step_s == pytest.approx(everything_in_ram.time.step_s, rel=0.05)


def test_ddp_adds_its_buckets_to_every_contender_and_the_time_to_sum_them(small_cost: StepCost) -> None:
    one, two = (
        best_plan(small_cost, LemaConfig(vram_budget="min"), dataclasses.replace(PLENTY, num_processes=n))
        for n in (1, 2)
    )
    gradient_bytes = sum(count * itemsize for count, itemsize in small_cost.tensors.trainable)

    assert (one.bucket_bytes, one.time.all_reduce_s) == (0, 0.0)
    assert two.bucket_bytes == gradient_bytes
    assert two.vram_bytes == one.vram_bytes + gradient_bytes
    # A ring of two: each sends its gradients once, 2 (n - 1) / n of them, over the bus.
    assert two.time.all_reduce_s == pytest.approx(gradient_bytes / small_cost.rates.h2d_bytes_per_s)
    assert two.time.step_s == pytest.approx(one.time.step_s + two.time.all_reduce_s)
    assert two.tokens_per_s == pytest.approx(2 * two.batch_size * two.seq_len / two.time.step_s)
    own_bytes = two.host.private_bytes - two.host.slab_bytes
    assert two.host_group_bytes == two.host.slab_bytes + 2 * own_bytes


def test_a_bus_or_ram_that_cards_share_is_slower_for_each() -> None:
    rates = DATA_SHEETS["H100"]

    assert Launch(num_processes=8).shared(rates).h2d_bytes_per_s == rates.h2d_bytes_per_s
    assert Launch(num_processes=8, cards_per_bus=2).shared(rates).h2d_bytes_per_s == rates.h2d_bytes_per_s / 2
    assert Launch(num_processes=1, cards_per_bus=2).shared(rates).h2d_bytes_per_s == rates.h2d_bytes_per_s
    bound = Launch(num_processes=8, ram_bytes_per_s=200e9).shared(rates)
    assert (bound.h2d_bytes_per_s, bound.duplex_bytes_per_s) == (25e9, 25e9)
    assert bound.half_flop_per_s == rates.half_flop_per_s


def test_gradients_are_summed_at_the_rate_of_the_slowest_link() -> None:
    rates = DATA_SHEETS["H100"]
    num_bytes = 10**9

    assert Launch(num_processes=8, link_bytes_per_s=450e9).all_reduce_s(num_bytes, rates) == pytest.approx(1.75 / 450)
    two_hosts = Launch(num_processes=8, num_hosts=2, link_bytes_per_s=450e9, network_bytes_per_s=12.5e9)
    assert two_hosts.world_size == 16
    assert two_hosts.all_reduce_s(num_bytes, rates) == pytest.approx(2 * 15 / 16 / 12.5)
    assert "a network of 100 Gbit/s" in two_hosts.describe()
    with pytest.raises(ValueError, match="num_hosts"):
        Launch(num_hosts=0)


def test_the_streamed_step_follows_the_bus_that_two_cards_share(small_cost: StepCost) -> None:
    def moving_s(launch: Launch) -> float:
        options = dataclasses.replace(PLENTY, num_processes=2, launch=launch, boundaries="vram")
        return best_plan(small_cost, LemaConfig(vram_budget="min"), options).time.forward_moving_s

    assert moving_s(Launch(cards_per_bus=2)) == pytest.approx(2 * moving_s(Launch()))


def test_processes_share_the_slab_and_not_their_boundaries(small_cost: StepCost) -> None:
    one = plan(small_cost, "min", boundaries="ram", embedding_and_head="vram")
    ram_bytes = one.host.slab_bytes + 2 * one.host.boundary_bytes
    config = LemaConfig(vram_budget="min", ram_budget=ram_bytes)
    options = dataclasses.replace(PLENTY, boundaries="ram", embedding_and_head="vram")

    assert best_plan(small_cost, config, dataclasses.replace(options, num_processes=2)).boundaries == "ram"
    with pytest.raises(ValueError, match="RAM budget"):
        best_plan(small_cost, config, dataclasses.replace(options, num_processes=3))


def test_gradients_are_there_from_the_start_where_they_accumulate(small_cost: StepCost) -> None:
    accumulating = small_cost.at(SLOW_BUS)
    accumulating.options = PlanOptions(gradient_accumulation_steps=2)
    once, twice = (
        cost.phases(cost.streamed_visits(4), cost.ends(True), in_ring=False)[0] for cost in (small_cost, accumulating)
    )

    assert (once.name, once.gradient_bytes) == ("forward of layer 7", 0)
    assert (twice.name, twice.gradient_bytes) == ("forward of layer 7", small_cost.tensors.adapter_bytes)


def test_layers_below_the_lowest_adapter_keep_nothing() -> None:
    config = LoraConfig(r=8, target_modules=["q_proj"], layers_to_transform=[6, 7], task_type="CAUSAL_LM")
    cost = StepCost(SMALL, 2, 64, config, SLOW_BUS, PLENTY)

    assert cost.lowest == 6
    assert cost.streamed_visits(2).boundary_bytes(cost.lowest) == 2 * (2 * 64 * 256 * 2)


# ---- names, files, errors ----


def test_folder_with_a_configuration_alone_can_be_planned(tmp_path: Path) -> None:
    SMALL.save_pretrained(tmp_path)
    by_folder = plan_stock(
        str(tmp_path), batch_size=1, seq_len=32, lora=ADAPTER, options=PlanOptions(dtype=torch.float16)
    )
    by_config = plan_stock(SMALL, batch_size=1, seq_len=32, lora=ADAPTER, options=PlanOptions(dtype=torch.float16))

    assert dataclasses.replace(by_folder, model="") == dataclasses.replace(by_config, model="")


def test_dtype_of_a_folder_without_one_in_its_configuration_is_that_of_its_files(tmp_path: Path) -> None:
    build(dtype=torch.bfloat16).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps(fields))

    assert draw(str(tmp_path)).dtype is torch.bfloat16


def test_wrong_numbers_and_names_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size"):
        plan_memory(SMALL, batch_size=0, seq_len=16)
    with pytest.raises(ValueError, match="quantization"):
        PlanOptions(quantization="int3")
    with pytest.raises(ValueError, match="num_kept"):
        PlanOptions(num_kept=-1)
    with pytest.raises(ValueError, match=r"no data-sheet rates for 'Voodoo'.*P100"):
        find_rates("Voodoo")
    assert find_rates("rtx-4090") is DATA_SHEETS["RTX 4090"]


def test_model_that_computes_by_the_values_of_its_tensors_is_refused_with_the_reason() -> None:
    lm: Any = draw(build()).lm
    layer_class = type(lm.model.layers[0])
    original = layer_class.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(self, hidden_states, *args, **kwargs) if bool(hidden_states.sum() > 0) else hidden_states

    for layer in lm.model.layers:
        layer.__class__ = type("DecidingLayer", (layer_class,), {"forward": forward})
    with pytest.raises(ValueError, match="decides by the values"):
        Rehearsal(lm, precision=None, has_flash=False).streamed_visit(0, 1, 8, 0)


# ---- rates ----


def test_work_takes_the_longest_of_arithmetic_memory_and_starts() -> None:
    rates = DeviceRates(
        name="x",
        origin="measured",
        capability=(8, 0),
        vram_bytes=GIB,
        h2d_bytes_per_s=1.0,
        duplex_bytes_per_s=1.0,
        vram_read_write_bytes_per_s=10.0,
        half_flop_per_s=100.0,
        float_flop_per_s=50.0,
        kernel_start_s=1.0,
    )

    def seconds(num_flops: int, num_bytes: int, is_half: bool, count: int = 1) -> float:
        kernels = Kernels(num_flops=num_flops, num_bytes=num_bytes, is_half=is_half, count=count)
        return rates.compute_s([kernels])

    assert seconds(1000, 10, True) == 10.0
    assert seconds(1000, 10, False) == 20.0
    assert seconds(1000, 1000, True) == 100.0
    assert seconds(1, 1, True, count=7) == 7.0


def test_two_way_traffic_takes_longer_than_one_way(small_cost: StepCost) -> None:
    cost = small_cost.at(dataclasses.replace(SLOW_BUS, h2d_bytes_per_s=10.0, duplex_bytes_per_s=5.0))

    assert cost.moving_s(100, 0, False) == 10.0
    assert cost.moving_s(100, 50, False) == 50 / 5 + 50 / 10
    with pytest.raises(ValueError, match="attention kernels"):
        small_cost.at(DATA_SHEETS["H100"])


@pytest.mark.gpu
def test_measured_rates_are_of_this_card() -> None:
    rates = measure_rates(torch.device("cuda", 0))

    assert rates.capability == torch.cuda.get_device_capability(0)
    assert 1e9 < rates.h2d_bytes_per_s < 2e11
    assert rates.half_flop_per_s > rates.float_flop_per_s > 1e12
    assert 1e-6 < rates.kernel_start_s < 1e-3


# ---- text and JSON ----


@pytest.fixture(scope="module")
def comparison() -> Any:
    """A card that is too small for all three."""
    return compare_plans(SMALL, batch_size=2, seq_len=64, vram_bytes=GIB + 24 * MIB, ram_bytes=8 * GIB, lora=ADAPTER)


def test_table_names_every_place_that_memory_goes_and_adds_up(comparison: Any) -> None:
    text = format_comparison(comparison)

    assert all(word in text for word in ("LEMA", "stock PEFT", "QLoRA", "slots", "activations", "optimizer", "step"))
    assert [line.split("  ")[0] for line in format_plans(comparison.plans).splitlines()][1] == "slots"
    for planned in comparison.plans:
        parts = [
            planned.slots_bytes, planned.resident_bytes, planned.embedding_bytes, planned.head_bytes,
            planned.other_bytes, planned.adapter_bytes, planned.optimizer_bytes, planned.workspace_bytes,
            planned.peak.boundary_bytes, planned.peak.kept_bytes, planned.peak.gradient_bytes,
            planned.peak.activation_bytes,
        ]  # fmt: skip
        assert planned.vram_bytes == sum(parts)


def test_table_and_json_say_how_many_layers_are_recomputed(small_cost: StepCost) -> None:
    def recompute(num_kept: int) -> str:
        planned = plan(small_cost, 4 * GIB, num_kept=num_kept)
        assert plan_as_dict(planned)["num_recomputed"] == 8 - num_kept
        (row,) = [line for line in format_plans([planned]).splitlines() if line.startswith("recompute")]
        return row.removeprefix("recompute").strip()

    assert [recompute(n) for n in (0, 3, 8)] == ["8 of 8 layers", "5 of 8 layers", "off"]
    unchecked = stock_plan(small_cost, is_checkpointed=False)
    assert (len(unchecked.kept_layers), unchecked.recomputed_layers) == (8, ())
    assert stock_plan(small_cost, is_checkpointed=True).recomputed_layers == tuple(range(8))


def test_a_comparison_says_from_which_budget_on_computing_bounds_the_step(comparison: Any) -> None:
    told = compare_plans(
        SMALL, batch_size=4, seq_len=64, vram_bytes=4 * GIB, lora=ADAPTER, rates=SLOW_BUS, options=PLENTY
    )
    found = told.compute_bound_from_bytes
    assert found is not None
    assert f"from a VRAM budget of {format_bytes(found)} on" in format_comparison(told)
    cost = StepCost(SMALL, 4, 64, ADAPTER, SLOW_BUS, PLENTY)
    least = plan(cost, "min", num_kept=0).vram_bytes
    apart = -(-(told.vram_limit_bytes - least) // 2**plan_table.NUM_HALVINGS)
    budgets = (max(least, found - apart - 1), found, told.vram_limit_bytes)
    assert [plan(cost, budget, num_kept=0).time.is_bound_by_compute for budget in budgets] == [False, True, True]
    assert comparison.compute_bound_from_bytes is None
    assert "no VRAM budget of this card is enough" in format_comparison(comparison)


def test_json_holds_the_same_figures(comparison: Any) -> None:
    read = json.loads(json.dumps(comparison_as_dict(comparison)))

    assert [p["vram_bytes"] for p in read["plans"]] == [p.vram_bytes for p in comparison.plans]
    assert [p["step_s"] for p in read["plans"]] == [p.time.step_s for p in comparison.plans]
    assert json.loads(json.dumps(plan_as_dict(comparison.plans[0])))["peak_phase"] == comparison.plans[0].peak.name


def test_what_does_not_fit_comes_with_what_to_change(comparison: Any) -> None:
    assert comparison.fits == (False, False, False)
    assert len(comparison.advice) == 3
    assert "the least that works is" in comparison.advice[0]
    assert all("no batch size fits" in text for text in comparison.advice[1:])


def test_stock_run_that_is_too_large_is_told_the_batch_that_fits() -> None:
    cost = StepCost(SMALL, 2, 128, ADAPTER, SLOW_BUS, PlanOptions(dtype=torch.float16))
    one, two = (stock_plan(cost.at(SLOW_BUS, size), is_checkpointed=True) for size in (1, 2))

    text = _advice(two, one.vram_bytes, cost)

    assert text == "stock PEFT: fits with per_device_train_batch_size=1."


@pytest.mark.parametrize(("tiers", "is_told"), [(("mixed", "ram"), True), (("disk", "mixed"), False)])
def test_layers_that_stay_in_files_are_told_what_nf4_would_take(
    comparison: Any, tiers: tuple[str, str], is_told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def planned(cost: StepCost, config: LemaConfig, options: PlanOptions) -> Any:
        asked.append(options.quantization)
        return dataclasses.replace(comparison.plans[0], tier=tiers[len(asked) - 1])

    monkeypatch.setattr(plan_table, "best_plan", planned)
    monkeypatch.setattr(plan_table, "_compute_bound_from", lambda *_: None)  # it plans many times
    told = compare_plans(SMALL, batch_size=1, seq_len=16, vram_bytes=4 * GIB, ram_bytes=8 * GIB, lora=ADAPTER).advice
    assert asked == [None, "nf4"], "of its own it plans in the dtype that was asked for"
    assert ['quantization="nf4"' in text for text in told] == [True] * is_told
