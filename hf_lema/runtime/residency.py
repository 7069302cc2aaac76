"""How steps are run within a VRAM budget: planned before the first one, corrected by measuring.

Responsibility: the budget, and when the choices change. Knows bytes and layer indices, not weights; plans come from a
callable.

A plan decides what is cut, what leaves device memory and which layers keep their activations. The first training steps
run so, with nothing resident. What the allocator then has reserved (the optimizer's state included from the second step
on) is taken from the budget; whole layers fill the rest, spread evenly over the depth, those first that would be read
from files. Where more is reserved than the budget allows, the plan is made again with that much less; where layers keep
activations, and with as much less again as the plan had for resident layers, which give way first.

Note [larger batches]: a batch with more tokens than any before it, or with longer sequences (a micro-batch of them has
more tokens, and attention may take their square), is planned anew before its first layer. The plan is for the least
shape that has both, the most tokens and the longest sequence. A batch within that shape, but not within one that ran
since layers became resident, sends them back first and is measured too: a peak that nobody has seen yet must not meet a
card that is full. An evaluation is not planned, but larger ones than any before send the layers back in the same way.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_lema.choices import StepChoices
from hf_lema.config import LemaConfig
from hf_lema.runtime.schedule import choose_resident
from hf_lema.runtime.segments import hold_free, take_segment
from hf_lema.runtime.streamer import LayerStreamer
from hf_lema.units import GIB, format_bytes

HEAD_ROOM_BYTES = GIB // 2
"""Left free under ``"auto"``: what the CUDA context, cuBLAS workspaces and fragmentation took beyond the allocator's
own count on an H100 was below 0.4 GiB."""

_NUM_MEASURED_UPDATES = 2
"""Optimizer steps before the reserved memory counts: the optimizer allocates its state at the end of the first."""

logger = logging.getLogger(__name__)


def free_vram_bytes(device: torch.device) -> int:
    """Bytes that this process may still allocate: the least of what is free and of the process's memory fraction."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    reserved_bytes = torch.cuda.memory_reserved(device)
    fraction = torch.cuda.get_per_process_memory_fraction(device)
    return min(free_bytes + reserved_bytes, int(total_bytes * fraction)) - torch.cuda.memory_allocated(device)


@dataclass(frozen=True)
class Planned:
    """How to run, and what that computes with.

    Attributes:
        choices: How.
        activation_bytes: What the largest part under way needs; 0 where nobody knows. See Note [one segment] in
            `segments`.
    """

    choices: StepChoices
    activation_bytes: int = 0


Plan = Callable[[int, int, int | None], Planned]
"""Batch size, tokens of a sequence and bytes to stay within (None for as few as are sensible) -> how to run.

Raises ValueError where nothing fits.
"""


@dataclass(frozen=True)
class BatchShape:
    """A batch as a plan sees it.

    Attributes:
        batch_size: Sequences.
        seq_len: Tokens of each, padding included.
    """

    batch_size: int
    seq_len: int

    def covers(self, other: BatchShape) -> bool:
        """Whether a step of this shape takes no less memory than one of the other; see Note [larger batches]."""
        num_tokens, num_others = self.batch_size * self.seq_len, other.batch_size * other.seq_len
        return num_tokens >= num_others and self.seq_len >= other.seq_len

    def joined(self, other: BatchShape) -> BatchShape:
        """The least shape that covers both."""
        seq_len = max(self.seq_len, other.seq_len, 1)
        num_tokens = max(self.batch_size * self.seq_len, other.batch_size * other.seq_len)
        return BatchShape(-(-num_tokens // seq_len), seq_len)


class VramBudget:
    """Decides between steps how they are run and which layers are resident.

    Args:
        config: The user's budget.
        streamer: The runtime whose layers it chooses.
        other_bytes: Bytes on the device that are not the streamer's when it is made: embedding, head, adapters.
        movable_bytes: Those of them that can lie in host memory.
        plan: See `Plan`.
        apply: Has steps run as chosen.
        given: A plan that somebody made, and the shape that it is for: steps run so until a batch is larger.

    Raises:
        ValueError: The stated budget is below what the slots and the resident parts need at once.
    """

    def __init__(
        self,
        config: LemaConfig,
        streamer: LayerStreamer,
        other_bytes: int,
        movable_bytes: int,
        plan: Plan,
        apply: Callable[[StepChoices], None],
        given: tuple[BatchShape, Planned] | None = None,
    ) -> None:
        self._config = config
        self._streamer = streamer
        self._plan = plan
        self._apply = apply
        self._given = given
        self._num_updates = 0
        self._shape, planned = given or (BatchShape(0, 0), Planned(StepChoices()))
        self._choices, self._activation_bytes = planned.choices, planned.activation_bytes
        self._lacks_segment = given is not None
        self._ran = [self._shape]  # shapes whose peaks the measured memory has, or will have, seen
        self._evaluated: list[BatchShape] = []  # the same, of evaluations
        self._reserved_bytes = 0  # the most that steps with nothing resident took, run as they are now
        self._measured = given is not None
        self._num_planned = 0  # resident layers of the plan
        self._is_cache_clean = False  # of what only a first step takes
        slots_bytes = streamer.layer_bytes * streamer.num_slots
        minimum_bytes = other_bytes - movable_bytes + slots_bytes
        self.budget_bytes = self._budget(config, streamer.device, minimum_bytes)
        self._planned_bytes = self.budget_bytes
        if config.vram_budget_bytes is not None and config.vram_budget_bytes < minimum_bytes:
            raise ValueError(
                f"vram_budget is {format_bytes(config.vram_budget_bytes)}, but {format_bytes(minimum_bytes)} is the "
                f"least that works: {format_bytes(other_bytes - movable_bytes)} that cannot leave the device and "
                f"{streamer.num_slots} slots of {format_bytes(streamer.layer_bytes)}, before activations. Raise the "
                f"budget, or use a model whose layers are smaller"
            )

    @staticmethod
    def _budget(config: LemaConfig, device: torch.device, minimum_bytes: int) -> int | None:
        """Bytes to fill with resident layers up to; None to keep none."""
        stated_bytes = config.vram_budget_bytes
        if config.vram_budget == "min" or device.type != "cuda":
            return stated_bytes
        free_bytes = free_vram_bytes(device) + torch.cuda.memory_allocated(device) - HEAD_ROOM_BYTES
        if stated_bytes is None or stated_bytes <= free_bytes:
            return free_bytes if stated_bytes is None else stated_bytes
        warnings.warn(
            f"vram_budget is {format_bytes(stated_bytes)}, but this process can have {format_bytes(free_bytes)} beside "
            f"{format_bytes(HEAD_ROOM_BYTES)} of head-room; that is the budget",
            stacklevel=2,
        )
        return max(free_bytes, minimum_bytes)

    def start(self) -> None:
        """Runs steps as given, and begins to count optimizer steps, where there is a budget to fill."""
        if self._given is not None:
            self._apply(self._choices)
        if self.budget_bytes is not None and self._streamer.device.type == "cuda":
            budget = weakref.ref(self)

            def count(*_: object) -> None:
                if (alive := budget()) is not None:
                    alive._num_updates += 1

            handle = register_optimizer_step_post_hook(count)
            weakref.finalize(self, handle.remove)

    def before_training_step(self, batch_size: int, seq_len: int) -> None:
        """A training forward begins. Called before its first layer, when no visit is under way.

        Args:
            batch_size: Sequences.
            seq_len: Tokens of each, padding included.

        Raises:
            ValueError: The stated budget is too small for this batch.
        """
        if self._streamer.device.type != "cuda":
            return
        shape = BatchShape(batch_size, seq_len)
        if not self._shape.covers(shape):
            self._shape = self._shape.joined(shape)
            self._planned_bytes = self.budget_bytes
            self._run_as(self._choose())
        if self._lacks_segment:
            self._clear_cache()
        if self.budget_bytes is None:
            return
        if not any(seen.covers(shape) for seen in self._ran):
            self._measure_too(shape)
        if self._choices.kept_layers and self._num_updates and not self._is_cache_clean:
            # Layers that keep activations prove in their first visit that they may, on copies of their weights.
            self._is_cache_clean = True
            self._clear_cache()
        if not self._measured and self._num_updates >= _NUM_MEASURED_UPDATES:
            self._measured = True
            self._reserved_bytes = max(self._reserved_bytes, torch.cuda.memory_reserved(self._streamer.device))
            self._settle(self.budget_bytes, self._reserved_bytes)

    def before_evaluation(self, batch_size: int, seq_len: int) -> None:
        """A forward without gradients begins: as for `before_training_step`, but it is not planned."""
        if self._streamer.device.type != "cuda" or self.budget_bytes is None:
            return
        shape = BatchShape(batch_size, seq_len)
        if not any(seen.covers(shape) for seen in (*self._ran, *self._evaluated)):
            self._evaluated = [seen for seen in self._evaluated if not shape.covers(seen)] + [shape]
            self._measure_again()

    def _measure_too(self, shape: BatchShape) -> None:
        """Has the peak of a shape counted before any layer is resident beside it."""
        self._ran = [seen for seen in self._ran if not shape.covers(seen)] + [shape]
        self._measure_again()

    def _measure_again(self) -> None:
        if self._measured:
            self._measured = False
            self._send_back()
        self._num_updates = min(self._num_updates, _NUM_MEASURED_UPDATES - 1)

    def _send_back(self) -> None:
        """Takes every layer off the device."""
        self._choices = replace(self._choices, resident_layers=())
        self._apply(self._choices)
        self._clear_cache()

    def _clear_cache(self) -> None:
        """Gives back what the allocator holds for nobody, but for one segment; see Note [one segment] in `segments`.

        Reserved memory then grows back to what the step needs; rare, and never inside a step.
        """
        torch.cuda.empty_cache()  # noqa: TID251 - between steps, when a larger batch comes or a plan was too large
        self._lacks_segment = False
        if self._activation_bytes and (self._is_cache_clean or not self._choices.kept_layers):
            take_segment(self._activation_bytes, self._streamer.device)

    def _choose(self) -> Planned:
        """How to run by the plan, with nothing resident."""
        try:
            planned = self._plan(self._shape.batch_size, self._shape.seq_len, self._planned_bytes)
        except ValueError as error:
            if self._config.vram_budget != "auto":
                raise
            warnings.warn(f"{error} Training goes on with what takes least.", stacklevel=2)
            planned = self._plan(self._shape.batch_size, self._shape.seq_len, None)
        return self._without_residents(planned)

    def _without_residents(self, planned: Planned) -> Planned:
        self._num_planned = len(planned.choices.resident_layers)
        return replace(planned, choices=replace(planned.choices, resident_layers=()))

    def _run_as(self, planned: Planned) -> None:
        self._choices, self._activation_bytes = planned.choices, planned.activation_bytes
        self._num_updates, self._measured, self._is_cache_clean = 0, False, False
        self._ran, self._evaluated, self._reserved_bytes = [], [], 0
        self._send_back()

    def _settle(self, budget_bytes: int, reserved_bytes: int) -> None:
        """Fills what is left of the budget with layers, or plans again where nothing is left."""
        spare_bytes = budget_bytes - reserved_bytes
        if spare_bytes < 0 and self._plan_less(-spare_bytes):
            return
        layers = self._streamer.streamable_layers
        if spare_bytes < 0:
            warnings.warn(
                f"a step of {self._shape.batch_size} x {self._shape.seq_len} tokens takes "
                f"{format_bytes(reserved_bytes)} of VRAM with every layer streamed, more than the budget of "
                f"{format_bytes(budget_bytes)}. Use a smaller batch or shorter sequences",
                stacklevel=2,
            )
        num_resident = min(max(0, spare_bytes) // max(1, self._streamer.layer_bytes), len(layers))
        resident = choose_resident(num_resident, layers, self._streamer.host_store.file_layers)
        self._choices = replace(self._choices, resident_layers=resident)
        held = hold_free(self._streamer.layer_bytes, self._streamer.device) if num_resident else []
        self._apply(self._choices)
        del held
        if num_resident == len(layers) > 0:
            logger.warning(
                "the VRAM budget of %s holds every layer: nothing is streamed any more. Stock PEFT without hf_lema "
                "trains this job as well",
                format_bytes(budget_bytes),
            )

    def _plan_less(self, excess_bytes: int) -> bool:
        """Plans with so many bytes less; whether there is another way to run."""
        assert self._planned_bytes is not None
        planned = Planned(self._choices, self._activation_bytes)
        if self._choices.kept_layers:
            excess_bytes += self._num_planned * self._streamer.layer_bytes
        # A model that cannot be planned gets the same answer whatever is left.
        while planned.choices == self._choices and self._planned_bytes > excess_bytes:
            self._planned_bytes -= excess_bytes
            try:
                plan = self._plan(self._shape.batch_size, self._shape.seq_len, self._planned_bytes)
            except ValueError:  # what takes least is running already, but for kept activations
                break
            planned = self._without_residents(plan)
        if planned.choices == self._choices:
            planned = replace(planned, choices=replace(self._choices, kept_layers=()))
        if planned.choices == self._choices:
            return False
        self._run_as(planned)
        return True
