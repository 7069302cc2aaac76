"""The parts of one model's training step at one batch and card: their bytes by phase, and their seconds.

Responsibility: `StepCost`, which puts rehearsed parts together. Knows no budgets and decides nothing.
"""

from __future__ import annotations

import copy
import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig

from hf_lema.planning.blueprint import TensorBytes, draw, packed_weights, sort_tensors
from hf_lema.planning.data_parallel import Launch
from hf_lema.planning.device_rates import DeviceRates
from hf_lema.planning.memory_plan import Phase, Place
from hf_lema.planning.optimizers import FUSED, OptimizerBytes, optimizer_bytes
from hf_lema.planning.rehearsal import PartCost, Rehearsal

Model = str | Path | PretrainedConfig | nn.Module

NUM_BOUNDARY_SLOTS = 2
"""Device buffers through which boundary activations return: one computes, one arrives. They stay from step to step."""

_OPTIMIZER_PASSES = 12
"""Reads and writes of each trainable number in an update: unscaling and clipping 5, fused AdamW 7."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What is planned besides the shapes of model and batch.

    Attributes:
        dtype: Of the weights; None for the checkpoint's own.
        revision: Branch, tag or commit of a model on the hub; None for its main branch.
        quantization: None or ``"nf4"``: linear weights of the decoder layers in 4 bits.
        double_quantization: Whether the scales of NF4 are quantized too.
        gradient_accumulation_steps: As in ``TrainingArguments``; above 1 gradients are there in every phase.
        optim: One of `OPTIMIZERS`, as in ``TrainingArguments``.
        num_processes: Processes on each machine; they share one slab.
        launch: Machines and links beside that; ``num_processes`` counts, not the one in it.
        micro_batch_size: Fixed instead of chosen; None to choose.
        forward_micro_batch_size: The same for the forward; None to choose.
        boundaries: Fixed place of boundary activations; None to choose.
        embedding_and_head: Fixed place of these; None to choose.
        num_resident: Most resident layers; None for as many as fit.
        num_kept: Fixed number of layers whose activations are kept instead of recomputed; None to choose.
        vram_bytes: The card's size for ``vram_budget="auto"``; None for the one in the rates.
        ram_bytes: Free RAM for ``ram_budget="auto"``; None for what is free on this machine.
        file_layers: Layers that stay in their files; None to choose by the RAM budget.
    """

    dtype: torch.dtype | str | None = None
    revision: str | None = None
    quantization: str | None = None
    double_quantization: bool = True
    gradient_accumulation_steps: int = 1
    optim: str = FUSED
    num_processes: int = 1
    launch: Launch = field(default_factory=Launch)
    micro_batch_size: int | None = None
    forward_micro_batch_size: int | None = None
    boundaries: Place | None = None
    embedding_and_head: Place | None = None
    num_resident: int | None = None
    num_kept: int | None = None
    vram_bytes: int | None = None
    ram_bytes: int | None = None
    file_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.quantization not in (None, "nf4"):
            raise ValueError(f'quantization is {self.quantization!r}, expected None or "nf4"')
        if self.num_kept is not None and self.num_kept < 0:
            raise ValueError(f"num_kept is {self.num_kept}, expected None or a number of layers")
        object.__setattr__(self, "launch", replace(self.launch, num_processes=self.num_processes))

    @property
    def is_packed(self) -> bool:
        """Whether linear weights are in 4 bits."""
        return self.quantization == "nf4"


@dataclass(frozen=True, kw_only=True)
class VisitCosts:
    """The visits of all layers, one entry a layer.

    Attributes:
        embedded_bytes: The first layer's input.
        kept_bytes: What a visit keeps for its backward, its output included.
        output_bytes: Its output.
        forward_peak_bytes: Above what was there when it began.
        backward_peak_bytes: The same, with the gradient of its output there already.
        forward_times_s: Its forward.
        backward_times_s: Its backward; 0 below the layers that train.
        num_kept: So many of the last layers keep their activations from forward to backward; the others recompute.
    """

    embedded_bytes: int
    kept_bytes: tuple[int, ...]
    output_bytes: tuple[int, ...]
    forward_peak_bytes: tuple[int, ...]
    backward_peak_bytes: tuple[int, ...]
    forward_times_s: tuple[float, ...]
    backward_times_s: tuple[float, ...]
    num_kept: int = 0

    @property
    def forward_s(self) -> float:
        """All layers together."""
        return sum(self.forward_times_s)

    @property
    def backward_s(self) -> float:
        """All layers that train, and those above them."""
        return sum(self.backward_times_s)

    @property
    def input_bytes(self) -> tuple[int, ...]:
        """What enters each layer, and what comes out of the last."""
        return (self.embedded_bytes, *self.output_bytes)

    @property
    def first_kept(self) -> int:
        """The lowest of the layers that keep their activations; how many layers there are where none does."""
        return len(self.output_bytes) - self.num_kept

    def with_last(self, others: VisitCosts, num_kept: int) -> VisitCosts:
        """These visits below, and other ones, which keep their activations, for so many of the last layers."""
        first = len(self.output_bytes) - num_kept

        def joined(name: str) -> Any:
            return getattr(self, name)[:first] + getattr(others, name)[first:]

        names = [f.name for f in fields(self) if f.name not in ("embedded_bytes", "num_kept")]
        return replace(self, num_kept=num_kept, **{name: joined(name) for name in names})

    def boundary_bytes(self, lowest: int) -> int:
        """Inputs of the layers from ``lowest`` on that recompute."""
        return sum(self.input_bytes[lowest : self.first_kept])


class StepCost:
    """What the parts of a step take, whatever is decided about them.

    Args:
        model: As for `draw`.
        batch_size: Sequences.
        seq_len: Tokens of each.
        lora: As for `draw`.
        rates: Of the card.
        options: The rest.
        is_upcast: Whether what is not packed goes to float32, as ``prepare_model_for_kbit_training`` has it for QLoRA.

    Attributes:
        num_layers: Decoder layers.
        lowest: The lowest layer that the backward reaches; ``num_layers`` where none trains.
        tensors: The model's tensors by what becomes of them.
    """

    def __init__(
        self,
        model: Model,
        batch_size: int,
        seq_len: int,
        lora: LoraConfig | int | None,
        rates: DeviceRates,
        options: PlanOptions,
        is_upcast: bool = False,
    ) -> None:
        wrong = {name: n for name, n in (("batch_size", batch_size), ("seq_len", seq_len)) if n < 1}
        if wrong:
            raise ValueError(f"expected at least 1, got {wrong}")
        where = {} if options.revision is None else {"revision": options.revision}
        blueprint = draw(model, options.dtype, lora, **where)
        self.name = blueprint.name
        self.batch_size, self.seq_len, self.rates, self.options = batch_size, seq_len, rates, options
        packed = packed_weights(blueprint.lm) if options.is_packed else []
        if is_upcast:
            _upcast(blueprint.lm, packed)
        self.tensors: TensorBytes = sort_tensors(
            blueprint.lm, is_packed=options.is_packed, is_double=options.double_quantization
        )
        self.num_layers = len(self.tensors.layer_adapter_bytes)
        trained = [i for i, nbytes in enumerate(self.tensors.layer_adapter_bytes) if nbytes]
        self.lowest = min(trained, default=self.num_layers)
        self._rehearsal = Rehearsal(
            blueprint.lm,
            precision=blueprint.dtype if blueprint.dtype.itemsize == 2 else None,
            has_flash=rates.has_flash_attention,
            packed=packed,
        )
        self._remember()
        self.ends = functools.cache(functools.partial(self._rehearsal.ends, batch_size, seq_len))

    def _remember(self) -> None:
        self.streamed_visits = functools.cache(self._streamed_visits)
        self.kept_visits = functools.cache(self._kept_visits)

    def at(self, rates: DeviceRates, batch_size: int | None = None) -> StepCost:
        """The same step on a card with other rates, or with another batch; only what is new is counted.

        Args:
            rates: Of a card with the same attention kernels.
            batch_size: Sequences; None for as many.

        Raises:
            ValueError: The card has other attention kernels.
        """
        if rates.has_flash_attention != self.rates.has_flash_attention:
            raise ValueError(f"{rates.name} has other attention kernels than {self.rates.name}: count the step anew")
        other = copy.copy(self)
        other.rates = rates
        other.batch_size = self.batch_size if batch_size is None else batch_size
        other._remember()
        if other.batch_size != self.batch_size:
            other.ends = functools.cache(functools.partial(self._rehearsal.ends, other.batch_size, self.seq_len))
        return other

    @property
    def optimizer_bytes(self) -> OptimizerBytes:
        """The optimizer's state."""
        return optimizer_bytes(self.options.optim, self.tensors.trainable)

    def gradient_bytes(self) -> int:
        """Gradients that DDP sums over all processes."""
        return sum(count * itemsize for count, itemsize in self.tensors.trainable)

    # ---- visits ----

    def _streamed_visits(
        self, micro_batch_size: int, tile_tokens: int = 0, forward_micro_batch_size: int = 0
    ) -> VisitCosts:
        """Visits in micro-batches and tiles, the forward on at least one micro-batch.

        At most two pieces of the forward are rehearsed. More of them are that work over again, and longer tensors of
        the whole batch: the output in the forward, the input's gradient in the backward.
        """
        forward_size = max(micro_batch_size, forward_micro_batch_size)
        num_rehearsed = min(2 * forward_size, self.batch_size)
        size = micro_batch_size if micro_batch_size < self.batch_size else 0
        costs = [
            self._rehearsal.streamed_visit(i, num_rehearsed, self.seq_len, size, tile_tokens, forward_size)
            for i in range(self.num_layers)
        ]
        starts = [-(-self.batch_size // n) / -(-num_rehearsed // n) for n in (forward_size, micro_batch_size)]
        return self._visits(costs, num_rehearsed, *starts)

    def _kept_visits(self, micro_batch_size: int) -> VisitCosts:
        """Visits in micro-batches, both ways, whose activations stay for the backward.

        Two pieces are rehearsed. Each further one is taken to keep as much as each of these, the casts of adapters
        included, which are made once for all: so a plan of many pieces says a little more than they take.
        """
        size = micro_batch_size if micro_batch_size < self.batch_size else 0
        num_pieces = -(-self.batch_size // micro_batch_size)
        num_rehearsed = min(2 * micro_batch_size, self.batch_size)
        costs = [
            self._rehearsal.streamed_visit(i, num_rehearsed, self.seq_len, size, is_kept=True)
            for i in range(self.num_layers)
        ]
        starts = num_pieces / -(-num_rehearsed // micro_batch_size)
        visits = self._visits(costs, num_rehearsed, starts, starts)
        more = self.batch_size / num_rehearsed - 1  # outputs of the whole batch are counted already
        graphs = [math.ceil(more * (cost.forward.kept_bytes - cost.output_bytes)) for cost in costs]
        return replace(
            visits,
            kept_bytes=tuple(map(operator.add, visits.kept_bytes, graphs)),
            forward_peak_bytes=tuple(map(operator.add, visits.forward_peak_bytes, graphs)),
        )

    def stock_visits(self, is_checkpointed: bool) -> VisitCosts:
        """Visits of stock PEFT, the whole batch at once."""
        costs = [
            self._rehearsal.stock_visit(i, self.batch_size, self.seq_len, is_checkpointed)
            for i in range(self.num_layers)
        ]
        visits = self._visits(costs, self.batch_size, 1.0, 1.0)
        return visits if is_checkpointed else replace(visits, num_kept=self.num_layers - self.lowest)

    def _visits(
        self, costs: Sequence[PartCost], num_rehearsed: int, forward_starts: float, backward_starts: float
    ) -> VisitCosts:
        output_bytes = [cost.output_bytes // num_rehearsed * self.batch_size for cost in costs]
        more_bytes = [whole - cost.output_bytes for whole, cost in zip(output_bytes, costs, strict=True)]
        paired = list(zip(costs, more_bytes, strict=True))
        seconds = functools.cache(functools.partial(self.rates.compute_s, repeats=self.batch_size / num_rehearsed))
        return VisitCosts(
            embedded_bytes=output_bytes[0],
            kept_bytes=tuple(cost.forward.kept_bytes + more for cost, more in paired),
            output_bytes=tuple(output_bytes),
            forward_peak_bytes=tuple(cost.forward.peak_bytes + more for cost, more in paired),
            backward_peak_bytes=tuple(cost.backward.peak_bytes + more for cost, more in paired),
            forward_times_s=tuple(seconds(cost.forward.work, start_repeats=forward_starts) for cost in costs),
            backward_times_s=tuple(
                seconds(cost.backward.work, start_repeats=backward_starts) if i >= self.lowest else 0.0
                for i, cost in enumerate(costs)
            ),
        )

    # ---- memory ----

    def phases(self, visits: VisitCosts, ends: PartCost, in_ring: bool) -> tuple[Phase, ...]:
        """The moments at which the step may peak; of the layers' forwards and backwards the largest each.

        Args:
            visits: The layers.
            ends: What comes before and after them.
            in_ring: Whether boundary activations wait in RAM and pass through a ring in VRAM; those of layers that
                keep their activations stay where they are.
        """
        adapters = self.tensors.layer_adapter_bytes
        every_bytes = self.tensors.adapter_bytes
        early_bytes = every_bytes if self.options.gradient_accumulation_steps > 1 else 0
        outside_bytes = every_bytes - sum(adapters)
        boundaries, kept = self._waiting(visits, in_ring)
        forward = [
            Phase(
                name=f"forward of layer {i}",
                boundary_bytes=boundaries[i],
                kept_bytes=kept[i],
                gradient_bytes=early_bytes,
                activation_bytes=peak_bytes,
            )
            for i, peak_bytes in enumerate(visits.forward_peak_bytes)
        ]
        loss = Phase(
            name="loss",
            boundary_bytes=boundaries[-1],
            kept_bytes=kept[-1],
            gradient_bytes=max(early_bytes, outside_bytes),
            activation_bytes=max(ends.forward.peak_bytes, ends.forward.kept_bytes + ends.backward.peak_bytes),
        )
        backward = [
            Phase(
                name=f"backward of layer {i}",
                # The output was the next layer's input, which is done with it.
                boundary_bytes=boundaries[i + 1] - visits.output_bytes[i],
                kept_bytes=kept[i + 1],
                gradient_bytes=max(early_bytes, outside_bytes + sum(adapters[i + 1 :])),
                activation_bytes=visits.output_bytes[i] + visits.backward_peak_bytes[i],
            )
            for i in range(self.lowest, self.num_layers)
        ]
        update = Phase(name="update", boundary_bytes=0, kept_bytes=0, gradient_bytes=every_bytes, activation_bytes=0)
        peaks = [max(group, key=lambda phase: phase.nbytes) for group in (forward, backward) if group]
        return (*peaks, loss, update)

    def _waiting(self, visits: VisitCosts, in_ring: bool) -> tuple[list[int], list[int]]:
        """What waits for the backward before each layer, and after the last: boundary activations, and kept ones."""
        ring_bytes = NUM_BOUNDARY_SLOTS * max(visits.output_bytes)
        boundaries = [visits.embedded_bytes + (ring_bytes if in_ring else 0)]
        kept = [0]
        for i, output_bytes in enumerate(visits.output_bytes):
            is_kept = i >= max(visits.first_kept, self.lowest)
            if i < self.lowest:
                boundaries.append(boundaries[0] - visits.embedded_bytes + output_bytes)
            elif in_ring and not is_kept:
                boundaries.append(ring_bytes + output_bytes)
            else:
                boundaries.append(boundaries[-1] + (output_bytes if is_kept else visits.kept_bytes[i]))
            kept.append(kept[-1] + (visits.kept_bytes[i] - output_bytes if is_kept else 0))
        return boundaries, kept

    # ---- time ----

    def update_s(self) -> float:
        """Unscaling, clipping and the fused optimizer: passes over the trainable tensors."""
        return _OPTIMIZER_PASSES * self.tensors.adapter_bytes / self.rates.vram_read_write_bytes_per_s

    def ends_s(self, ends: PartCost, moved_bytes: int) -> float:
        """Embedding, head and loss.

        Args:
            ends: As rehearsed.
            moved_bytes: What of them crosses the bus.
        """
        computed_s = self.rates.compute_s(ends.forward.work) + self.rates.compute_s(ends.backward.work)
        return max(computed_s, moved_bytes / self.rates.h2d_bytes_per_s)

    def moving_s(self, h2d_bytes: float, d2h_bytes: float, disk_bytes: float) -> float:
        """Seconds on the bus, or from the disk where that takes longer; while both ways are used, each is slower."""
        rates = self.rates
        shorter, longer = sorted((h2d_bytes, d2h_bytes))
        bus_s = shorter / rates.duplex_bytes_per_s + (longer - shorter) / rates.h2d_bytes_per_s
        return max(bus_s, disk_bytes / rates.disk_bytes_per_s) if disk_bytes else bus_s


def _upcast(lm: nn.Module, packed: Sequence[nn.Parameter]) -> None:
    """What ``peft.prepare_model_for_kbit_training`` does: everything that is not packed goes to float32."""
    left = {id(weight) for weight in packed}
    for parameter in lm.parameters():
        if id(parameter) not in left and parameter.is_floating_point():
            parameter.data = parameter.data.float()
