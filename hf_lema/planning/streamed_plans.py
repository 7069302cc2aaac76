"""One way to run a streamed model within its RAM budget, made into a plan.

Responsibility: `Choice`, `StreamedPlans`: arithmetic over what `Rehearsal` has counted. Compares nothing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from hf_lema.config import LemaConfig
from hf_lema.model.outside import PIECE_BYTES
from hf_lema.model.stores import RAM_HEAD_ROOM_BYTES
from hf_lema.planning.memory_plan import HostBytes, MemoryPlan, Place, StepTime
from hf_lema.planning.meter import allocated_bytes
from hf_lema.planning.rehearsal import PartCost
from hf_lema.planning.step_cost import PlanOptions, StepCost, VisitCosts
from hf_lema.runtime.host_memory import available_host_bytes
from hf_lema.runtime.host_store import MAX_RING_BYTES, ring_bytes
from hf_lema.runtime.mixed_store import layers_in_ram
from hf_lema.runtime.schedule import choose_resident, transfers_per_step


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a model may be run, but for which layers stay on the device or keep their activations.

    Attributes:
        micro_batch_size: Sequences on which a backward computes at a time.
        forward_micro_batch_size: The same for the forward.
        tile_tokens: Tokens of a tile of one sequence; 0 for no tiles.
        boundaries: Where boundary activations are between forward and backward.
        embedding_and_head: Where these are.
    """

    micro_batch_size: int
    forward_micro_batch_size: int
    tile_tokens: int
    boundaries: Place
    embedding_and_head: Place


class StreamedPlans:
    """Plans of one model at one batch and card, each made once.

    Args:
        cost: Of the step; with several processes on the machine, by rates that they share.
        config: Budgets and slots.
        options: Free memory, and where layers are.

    Attributes:
        layers: Those that can be streamed.
        slot_bytes: What the largest of them takes on the device.
        ram_bytes: What layers, boundary activations and the head may take together; None for ``"min"``.
        streamable_bytes: All layers together.
        plan: The plan of a choice with so many resident and so many kept layers; made once.
    """

    def __init__(self, cost: StepCost, config: LemaConfig, options: PlanOptions) -> None:
        self._cost, self._config, self._options = cost, config, options
        self.layers = tuple(sorted(cost.tensors.layer_bytes))
        self._layer_bytes = max(cost.tensors.layer_bytes.values(), default=0)
        self.slot_bytes = allocated_bytes(self._layer_bytes)
        self.streamable_bytes = sum(cost.tensors.layer_bytes.values())
        self.ram_bytes = self._ram_budget_bytes()
        self._file_layers = self._choose_file_layers() if options.file_layers is None else options.file_layers
        self._transfers = functools.cache(self._num_transfers)
        self.plan = functools.cache(self._plan)

    def _ram_budget_bytes(self) -> int | None:
        """What layers, boundary activations and the head may take together; None for ``"min"``."""
        if self._config.ram_budget == "min":
            return None
        if self._config.ram_budget_bytes is not None:
            return self._config.ram_budget_bytes
        given = self._options.ram_bytes
        return (available_host_bytes() if given is None else given) - RAM_HEAD_ROOM_BYTES

    def _choose_file_layers(self) -> tuple[int, ...]:
        """The layers that do not fit into the RAM budget."""
        if self.ram_bytes is not None and self.streamable_bytes <= self.ram_bytes:
            return ()
        room_bytes = 0 if self.ram_bytes is None else max(0, self.ram_bytes - self._ring_bytes())
        kept = layers_in_ram(self._cost.tensors.layer_bytes, room_bytes)
        return tuple(i for i in self.layers if i not in kept)

    def _ring_bytes(self) -> int:
        most_bytes = MAX_RING_BYTES if self.ram_bytes is None else min(MAX_RING_BYTES, self.ram_bytes // 2)
        return ring_bytes(self._layer_bytes, most_bytes)

    def _tier(self) -> str:
        if len(self._file_layers) in (0, len(self.layers)):
            return "disk" if self._file_layers else "ram"
        return "mixed"

    def _plan(self, choice: Choice, num_resident: int, num_kept: int) -> MemoryPlan:
        cost, tensors, launch = self._cost, self._cost.tensors, self._options.launch
        visits = self._visits(choice, num_kept)
        ends = self._ends(choice)
        ends_in_ram = choice.embedding_and_head == "ram"
        resident = choose_resident(num_resident, self.layers, self._file_layers)
        num_streamed = len(self.layers) - num_resident
        host = self._host(visits, choice)
        time, h2d_bytes = self._time(visits, choice, resident)
        return MemoryPlan(
            contender="lema",
            model=cost.name,
            batch_size=cost.batch_size,
            seq_len=cost.seq_len,
            micro_batch_size=choice.micro_batch_size,
            forward_micro_batch_size=choice.forward_micro_batch_size,
            tile_tokens=choice.tile_tokens,
            resident_layers=resident,
            kept_layers=tuple(range(visits.first_kept, cost.num_layers)),
            recomputed_layers=tuple(range(cost.lowest, visits.first_kept)),
            num_layers=cost.num_layers,
            tier=self._tier() if num_streamed else "vram",
            boundaries=choice.boundaries,
            embedding_and_head=choice.embedding_and_head,
            slots_bytes=self._config.num_slots * self.slot_bytes,
            resident_bytes=sum(allocated_bytes(tensors.layer_bytes[i]) for i in resident),
            embedding_bytes=0 if ends_in_ram else tensors.embedding_bytes,
            head_bytes=0 if ends_in_ram else tensors.head_bytes,
            other_bytes=tensors.other_bytes,
            adapter_bytes=tensors.adapter_bytes,
            optimizer_bytes=cost.optimizer_bytes.vram_bytes,
            bucket_bytes=launch.bucket_bytes(cost.gradient_bytes()),
            workspace_bytes=cost.rates.workspace_bytes,
            phases=cost.phases(visits, ends, in_ring=choice.boundaries == "ram"),
            context_bytes=cost.rates.context_bytes,
            host=host,
            h2d_bytes=h2d_bytes,
            time=time,
            launch=launch,
        )

    def _ends(self, choice: Choice) -> PartCost:
        in_ram = choice.embedding_and_head == "ram"
        return self._cost.ends(True, PIECE_BYTES if in_ram else 0)

    def _host(self, visits: VisitCosts, choice: Choice) -> HostBytes:
        tensors = self._cost.tensors
        between_bytes = self._ring_bytes() if self._file_layers else 0
        in_files_bytes = sum(tensors.layer_bytes[i] for i in self._file_layers)
        slab_bytes = self.streamable_bytes - in_files_bytes
        boundary_bytes = visits.boundary_bytes(self._cost.lowest) if choice.boundaries == "ram" else 0
        in_ram = choice.embedding_and_head == "ram"
        embedding_bytes = tensors.embedding_bytes + tensors.head_bytes if in_ram else 0
        return HostBytes(
            slab_bytes=slab_bytes,
            page_locked_bytes=slab_bytes + between_bytes + boundary_bytes + embedding_bytes,
            file_backed_bytes=in_files_bytes,
            ring_bytes=between_bytes,
            boundary_bytes=boundary_bytes,
            embedding_bytes=embedding_bytes,
            optimizer_bytes=self._cost.optimizer_bytes.paged_bytes,
        )

    def _time(self, visits: VisitCosts, choice: Choice, resident: tuple[int, ...]) -> tuple[StepTime, int]:
        """Lower bound of the step, and the bytes that it moves to the device."""
        cost, tensors, launch = self._cost, self._cost.tensors, self._options.launch
        streamed = tuple(i for i in self.layers if i not in resident)
        mean_bytes = sum(tensors.layer_bytes[i] for i in streamed) / max(1, len(streamed))
        num_transfers = self._transfers(streamed)
        disk_share = sum(tensors.layer_bytes[i] for i in streamed if i in set(self._file_layers)) / max(
            1, sum(tensors.layer_bytes[i] for i in streamed)
        )
        forward_bytes = -(-num_transfers // 2) * mean_bytes
        backward_bytes = num_transfers // 2 * mean_bytes
        boundary_bytes = visits.boundary_bytes(cost.lowest) if choice.boundaries == "ram" else 0
        head_bytes = 0
        if choice.embedding_and_head == "ram":  # the head in the forward and in the backward of the loss
            head_bytes = 2 * (tensors.head_bytes or tensors.embedding_bytes) + visits.embedded_bytes
        time = StepTime(
            forward_compute_s=visits.forward_s,
            forward_moving_s=cost.moving_s(forward_bytes, boundary_bytes, disk_share * forward_bytes),
            backward_compute_s=visits.backward_s,
            backward_moving_s=cost.moving_s(backward_bytes + boundary_bytes, 0, disk_share * backward_bytes),
            ends_s=cost.ends_s(self._ends(choice), head_bytes),
            update_s=cost.update_s(),
            all_reduce_s=launch.all_reduce_s(cost.gradient_bytes(), cost.rates),
        )
        return time, int(forward_bytes + backward_bytes) + boundary_bytes + head_bytes

    def _num_transfers(self, streamed: tuple[int, ...]) -> int:
        return transfers_per_step(streamed, self._cost.num_layers, self._config.num_slots, self._cost.lowest)

    def _visits(self, choice: Choice, num_kept: int) -> VisitCosts:
        visits = self._cost.streamed_visits(
            choice.micro_batch_size, choice.tile_tokens, choice.forward_micro_batch_size
        )
        return visits.with_last(self._cost.kept_visits(choice.micro_batch_size), num_kept) if num_kept else visits
