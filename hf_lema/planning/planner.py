"""What a training run of a streamed model will take of VRAM, RAM and time, and how to spend the memory that is left.

Responsibility: `plan_memory`: the choice between the ways to run. Allocates nothing and touches no device.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

from peft import LoraConfig

from hf_lema.config import LemaConfig
from hf_lema.planning.device_rates import DeviceRates, rates_here
from hf_lema.planning.memory_plan import MemoryPlan, Place
from hf_lema.planning.step_cost import Model, PlanOptions, StepCost
from hf_lema.planning.streamed_plans import Choice, StreamedPlans
from hf_lema.runtime.residency import HEAD_ROOM_BYTES
from hf_lema.units import format_bytes

MIN_TILE_TOKENS, TILE_TOKENS = 1024, 4096
"""Tokens of a tile of one sequence, a half of it or as many as give matrix products their full rate."""

PIECES = (1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 23, 32)
"""Into how many micro-batches a batch may be cut, beside one sequence each."""

MAX_PIECES_AT_ONCE = 8
"""Most micro-batches on which a planned forward computes at once; with more of them its memory is what counts."""

MIN_FORWARD_GAIN = 1.03
"""A forward in micro-batches that takes less than so many times the whole batch's gains nothing from larger pieces."""

KEPT = (*range(33), 40, 48, 56, 64, 80, 96)
"""How many layers may keep their activations, beside all that train."""

GAPS = 0.1
"""Of activations, what they take of a budget beside themselves: blocks of many sizes leave gaps in the allocator's
memory (stock PEFT without gradient checkpointing, all of whose layers keep them, reserved 42.4 GiB for 39.5 on an
H100)."""

MAX_MIN_SLOWDOWN = 1.2
"""Under ``vram_budget="min"``: the step may take so many times the fastest one with nothing resident."""

ALIKE_VRAM = 1.05
"""Under ``vram_budget="min"``: a forward in other pieces that takes at most so many times the least VRAM is as good."""


def plan_memory(
    model: Model,
    config: LemaConfig | None = None,
    *,
    batch_size: int,
    seq_len: int,
    lora: LoraConfig | int | None = 16,
    rates: DeviceRates | None = None,
    options: PlanOptions | None = None,
) -> MemoryPlan:
    """Plans the training of a streamed model, from its configuration and file headers alone.

    Of all micro-batch sizes, places for boundary activations, embedding and head, and numbers of resident layers and
    of kept ones (the last, whose activations are not recomputed) that the budgets allow, the plan is the one with the
    shortest modelled step. Under ``vram_budget="min"`` it is the one that takes least VRAM (of those that cut but the
    forward otherwise and are within `ALIKE_VRAM` of it, the fastest) among those with nothing resident whose step is at
    most `MAX_MIN_SLOWDOWN` times the fastest one's, with as many kept layers as take no more.

    Args:
        model: A named shape, folder, hub id, configuration, or a model (wrapped, with adapters, or neither).
        config: Budgets, slots, and the micro-batch size where it is not 0; the defaults if None.
        batch_size: Sequences that one process trains on at a time.
        seq_len: Tokens of each.
        lora: Adapter for a model that has none: a configuration, the rank of one on all linear layers, or None.
        rates: Of the card; the data sheet's of the one that is here if None, of a T4 where there is none.
        options: The rest.

    Raises:
        ValueError: A budget in which nothing fits (the message says what would), or a model that cannot be planned.
    """
    config, options = config or LemaConfig(), options or PlanOptions()
    if config.micro_batch_size and options.micro_batch_size is None:
        options = replace(options, micro_batch_size=config.micro_batch_size)
    if config.quantization and options.quantization is None:
        options = replace(options, quantization=config.quantization, double_quantization=config.double_quantization)
    cost = StepCost(model, batch_size, seq_len, lora, rates or rates_here(), options)
    return best_plan(cost, config, options)


def best_plan(cost: StepCost, config: LemaConfig, options: PlanOptions) -> MemoryPlan:
    """`plan_memory` for a step whose cost is known; so that several budgets are planned without counting again.

    Args:
        cost: Of the step.
        config: As for `plan_memory`.
        options: Places, numbers and free memory; what they say of the step itself is in ``cost``.

    Raises:
        ValueError: As for `plan_memory`.
    """
    return _Search(cost, config, options).best()


def _is_alike(plan: MemoryPlan, least: MemoryPlan) -> bool:
    """Whether a plan takes little more than the least, and differs in nothing but the pieces of the forward."""
    pairs = [(p.micro_batch_size, p.tile_tokens, p.boundaries, p.embedding_and_head) for p in (plan, least)]
    return pairs[0] == pairs[1] and plan.vram_bytes <= ALIKE_VRAM * least.vram_bytes


class _Search:
    """Compares the ways to run one streamed model within its budgets."""

    def __init__(self, cost: StepCost, config: LemaConfig, options: PlanOptions) -> None:
        launch = options.launch
        self._cost = cost.at(launch.shared(cost.rates)) if launch.num_processes > 1 else cost
        self._config, self._options = config, options
        self._plans = StreamedPlans(self._cost, config, options)
        self._layers = self._plans.layers
        self._plan = self._plans.plan
        self._num_trained = cost.num_layers - cost.lowest
        if (options.num_kept or 0) > self._num_trained:
            raise ValueError(f"num_kept is {options.num_kept}, but only {self._num_trained} layers have a backward")

    def best(self) -> MemoryPlan:
        """The plan within the budgets; see `plan_memory`.

        Smaller micro-batches only start more kernels: once what they may reach at best takes longer than a plan that
        would do, those that are left are not looked at.
        """
        budget_bytes = self._vram_budget_bytes()
        bare: list[MemoryPlan] = []
        found: list[MemoryPlan] = []
        for micro_batch_size in self._sizes():
            ways = [(choice, self._bare(choice)) for choice in self._choices(micro_batch_size)]
            in_ram = [(choice, plan) for choice, plan in ways if self._fits_ram(plan)]
            bare += [plan for _, plan in in_ram]
            if budget_bytes is None:
                fastest_s = min((plan.time.step_s for plan in bare), default=float("inf"))
                found = [plan for plan in bare if plan.time.step_s <= MAX_MIN_SLOWDOWN * fastest_s]
                if min(plan.time.computing_s for _, plan in ways) > MAX_MIN_SLOWDOWN * fastest_s:
                    break
            else:
                for choice, plan in in_ram:
                    if plan.vram_bytes <= budget_bytes:
                        found += self._filled(choice, budget_bytes)
                # Of the whole batch a visit may take longer than in pieces, of which some casts are left out.
                is_cut = micro_batch_size < self._cost.batch_size
                if (
                    found
                    and is_cut
                    and self._least_s([choice for choice, _ in ways], budget_bytes)
                    >= min(plan.time.step_s for plan in found)
                ):
                    break
        if not bare:
            raise ValueError(self._ram_message())
        if not found and budget_bytes is not None:  # whose gaps may go beyond the budget, where nothing else is left
            found = [plan for plan in bare if plan.vram_bytes <= budget_bytes and not plan.kept_layers]
        if not found:
            assert budget_bytes is not None
            raise ValueError(self._vram_message(budget_bytes, min(bare, key=lambda plan: plan.vram_bytes)))
        if budget_bytes is None:
            least = min(found, key=lambda plan: (plan.vram_bytes, plan.time.step_s))
            alike = [plan for plan in found if _is_alike(plan, least)]
            return self._with_free_kept(min(alike, key=lambda plan: (plan.time.step_s, plan.vram_bytes)))
        # Where computing hides the bus, several ways take the same time: the one that moves least is left alone.
        return min(found, key=lambda plan: (plan.time.step_s, plan.h2d_bytes, plan.vram_bytes))

    def _vram_message(self, budget_bytes: int, least: MemoryPlan) -> str:
        return (
            f"{self._cost.name} with {least.batch_size} x {least.seq_len} tokens does not fit a VRAM budget of "
            f"{format_bytes(budget_bytes)}: the least that works is {format_bytes(least.vram_bytes)} "
            f"({least.vram_bytes} bytes), with micro-batches of {least.micro_batch_size}. Raise the budget, or use "
            "shorter sequences"
        )

    def _sizes(self) -> list[int]:
        """Sequences that a micro-batch may have, from the whole batch down."""
        whole = self._cost.batch_size
        if self._options.micro_batch_size:
            return [min(self._options.micro_batch_size, whole)]
        return sorted({-(-whole // num_pieces) for num_pieces in (*PIECES, whole)}, reverse=True)

    def _choices(self, micro_batch_size: int) -> Iterator[Choice]:
        """Every way to run with such micro-batches."""
        places: tuple[Place, ...] = ("vram", "ram")
        boundaries = places if self._options.boundaries is None else (self._options.boundaries,)
        ends = places if self._options.embedding_and_head is None else (self._options.embedding_and_head,)
        cuts = [(at_once, 0) for at_once in self._forward_sizes(micro_batch_size)]
        if micro_batch_size == 1 and self._cost.seq_len >= 2 * MIN_TILE_TOKENS and not self._options.num_kept:
            cuts.append((1, min(TILE_TOKENS, self._cost.seq_len // 2)))
        for (at_once, tile_tokens), boundary, end in itertools.product(cuts, boundaries, ends):
            yield Choice(
                micro_batch_size=micro_batch_size,
                forward_micro_batch_size=at_once,
                tile_tokens=tile_tokens,
                boundaries=boundary,
                embedding_and_head=end,
            )

    def _forward_sizes(self, micro_batch_size: int) -> list[int]:
        """What the forward may compute on at a time beside such a backward: one of the parts, two, or many."""
        fixed, whole = self._options.forward_micro_batch_size, self._cost.batch_size
        if fixed is not None:
            return [min(max(fixed, micro_batch_size), whole)]
        visits = self._cost.streamed_visits
        in_parts_s = visits(micro_batch_size, 0, micro_batch_size).forward_s
        is_faster = in_parts_s >= MIN_FORWARD_GAIN * visits(whole, 0, whole).forward_s
        # Two at once keep no masks of dropout either: they are drawn again.
        times = (1, 2, MAX_PIECES_AT_ONCE) if is_faster else (1, 2)
        return sorted({min(n * micro_batch_size, whole) for n in times})

    def _bare(self, choice: Choice) -> MemoryPlan:
        """A way to run with nothing on the device that need not be there."""
        num_kept = self._kept_numbers(choice)[0]
        return self._plan(choice, len(self._layers) if num_kept and self._cost.options.is_packed else 0, num_kept)

    def _filled(self, choice: Choice, budget_bytes: int) -> Iterator[MemoryPlan]:
        """A way to run with each number of kept layers, and as many resident ones as the budget holds beside them."""
        for num_kept in self._kept_numbers(choice):
            spare_bytes = budget_bytes - self._taken_bytes(self._plan(choice, 0, num_kept))
            if spare_bytes < 0:
                break
            num_resident = self._num_fitting(spare_bytes)
            # What is packed to 4 bits must not move while activations are kept.
            if not num_kept or not self._cost.options.is_packed or num_resident == len(self._layers):
                yield self._plan(choice, num_resident, num_kept)

    # ---- kept layers ----

    def _kept_numbers(self, choice: Choice) -> Sequence[int]:
        """How many layers may keep their activations, ascending."""
        if choice.tile_tokens:
            return [0]
        if self._options.num_kept is not None:
            return [self._options.num_kept]
        if self._cost.options.is_packed:
            return [0]  # their layers must all be resident, which is known after steps have been measured
        # With all of them kept no boundary activation would travel.
        most = self._num_trained - (choice.boundaries == "ram")
        return sorted({n for n in (*KEPT, self._num_trained) if n <= most})

    def _taken_bytes(self, plan: MemoryPlan) -> int:
        """What a plan takes of a budget: its peak, the gaps between activations, and once copies of weights.

        The first kept visit of a layer whose weights move runs on such copies.
        """
        bytes_of = [phase.nbytes + int(GAPS * (phase.kept_bytes + phase.activation_bytes)) for phase in plan.phases]
        if plan.kept_layers and not self._cost.options.is_packed:
            bytes_of[0] += self._plans.slot_bytes  # the largest forward
        return plan.always_bytes + max(bytes_of)

    def _least_s(self, ways: Sequence[Choice], budget_bytes: int) -> float:
        """What a step takes with such micro-batches or smaller ones, at least.

        Smaller ones shorten nothing, and take no less for kept activations and the loss, beside which layers stay.
        """
        least_s = float("inf")
        for choice, num_kept in ((way, n) for way in ways for n in self._kept_numbers(way)):
            plan = self._plan(choice, 0, num_kept)
            loss = plan.phases[-2]
            spare_bytes = budget_bytes - plan.always_bytes - loss.nbytes - int(GAPS * loss.kept_bytes)
            if spare_bytes >= 0:
                least_s = min(least_s, self._plan(choice, self._num_fitting(spare_bytes), num_kept).time.step_s)
        return least_s

    def _num_fitting(self, spare_bytes: int) -> int:
        """Resident layers for which there is room."""
        most = len(self._layers) if self._options.num_resident is None else self._options.num_resident
        return min(spare_bytes // max(1, self._plans.slot_bytes), len(self._layers), most)

    def _with_free_kept(self, plan: MemoryPlan) -> MemoryPlan:
        """The same plan with as many kept layers as take no more VRAM and make it faster."""
        choice = Choice(
            micro_batch_size=plan.micro_batch_size,
            forward_micro_batch_size=plan.forward_micro_batch_size,
            tile_tokens=plan.tile_tokens,
            boundaries=plan.boundaries,
            embedding_and_head=plan.embedding_and_head,
        )
        best = plan
        for num_kept in self._kept_numbers(choice)[1:]:
            kept = self._plan(choice, 0, num_kept)
            if self._taken_bytes(kept) > self._taken_bytes(plan):
                break
            best = min(best, kept, key=lambda found: found.time.step_s)
        return best

    # ---- budgets ----

    def _vram_budget_bytes(self) -> int | None:
        """What the allocator may hand out; None for ``"min"``."""
        if self._config.vram_budget == "min":
            return None
        if self._config.vram_budget_bytes is not None:
            return self._config.vram_budget_bytes
        rates = self._cost.rates
        card_bytes = rates.vram_bytes if self._options.vram_bytes is None else self._options.vram_bytes
        return card_bytes - rates.context_bytes - HEAD_ROOM_BYTES

    def _fits_ram(self, plan: MemoryPlan) -> bool:
        """Whether slab, ring and what every process has of its own fit; ``"min"`` says nothing about the latter."""
        if self._plans.ram_bytes is None:
            return True
        return plan.host_group_bytes <= self._plans.ram_bytes

    def _ram_message(self) -> str:
        return (
            f"{self._cost.name}: the RAM budget of {format_bytes(self._plans.ram_bytes or 0)} holds neither the "
            f"streamed layers ({format_bytes(self._plans.streamable_bytes)}) nor the ring to read them through, beside "
            'boundary activations. Raise it, use ram_budget="min", or a smaller batch'
        )
