"""How many layers may stay on the device, found by measuring a step rather than by guessing it.

Responsibility: the VRAM budget, and when layers become resident or streamed again. Knows bytes and layer indices, not
weights.

The first training steps run with nothing resident. What the allocator then has reserved (the optimizer's
state included from the second step on) is taken from the budget; whole layers fill the rest, spread evenly
over the depth. A batch with more tokens than any before it sends them all back first and is measured again.
"""

from __future__ import annotations

import logging
import warnings
import weakref

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_lema.config import LemaConfig
from hf_lema.schedule import spread_evenly
from hf_lema.streamer import LayerStreamer
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


class VramBudget:
    """Decides between steps which layers are resident.

    Args:
        config: The user's budget.
        streamer: The runtime whose layers it chooses.
        other_bytes: Bytes on the device that are not the streamer's when it is made: embedding, head, adapters.

    Raises:
        ValueError: The stated budget is below what the slots and the resident parts need at once.
    """

    def __init__(self, config: LemaConfig, streamer: LayerStreamer, other_bytes: int) -> None:
        self._streamer = streamer
        self._num_updates = 0
        self._max_tokens = 0
        self._measured = False
        slots_bytes = streamer.layer_bytes * streamer.num_slots
        minimum_bytes = other_bytes + slots_bytes
        self.budget_bytes = self._budget(config, streamer.device, minimum_bytes)
        if config.vram_budget_bytes is not None and config.vram_budget_bytes < minimum_bytes:
            raise ValueError(
                f"vram_budget is {format_bytes(config.vram_budget_bytes)}, but {format_bytes(minimum_bytes)} is the "
                f"least that works: {format_bytes(other_bytes)} outside the decoder layers and "
                f"{streamer.num_slots} slots of {format_bytes(streamer.layer_bytes)}, before activations. Raise the "
                f"budget, or use a model whose layers are smaller"
            )

    @staticmethod
    def _budget(config: LemaConfig, device: torch.device, minimum_bytes: int) -> int | None:
        """Bytes to fill with resident layers up to; None to keep none."""
        if config.vram_budget_bytes is not None:
            return config.vram_budget_bytes
        if config.vram_budget == "min" or device.type != "cuda":
            return None
        return free_vram_bytes(device) + torch.cuda.memory_allocated(device) - HEAD_ROOM_BYTES

    def start(self) -> None:
        """Begins to count optimizer steps, where there is a budget to fill."""
        if self.budget_bytes is not None and self._streamer.device.type == "cuda":
            budget = weakref.ref(self)

            def count(*_: object) -> None:
                if (alive := budget()) is not None:
                    alive._num_updates += 1

            handle = register_optimizer_step_post_hook(count)
            weakref.finalize(self, handle.remove)

    def before_training_step(self, num_tokens: int) -> None:
        """A training forward begins. Called before its first layer, when no visit is under way.

        Args:
            num_tokens: Tokens of the batch, padding included.
        """
        if self.budget_bytes is None or self._streamer.device.type != "cuda":
            return
        if num_tokens > self._max_tokens:
            self._max_tokens, self._num_updates, self._measured = num_tokens, 0, False
            self._streamer.set_resident(())
            # Reserved memory then grows back to what the step needs; rare, and never inside a step.
            torch.cuda.empty_cache()  # noqa: TID251 - between steps, when a longer batch comes
        if not self._measured and self._num_updates >= _NUM_MEASURED_UPDATES:
            self._measured = True
            self._fill(self.budget_bytes, torch.cuda.memory_reserved(self._streamer.device))

    def _fill(self, budget_bytes: int, reserved_bytes: int) -> None:
        layers = self._streamer.streamable_layers
        spare_bytes = budget_bytes - reserved_bytes
        if spare_bytes < 0:
            warnings.warn(
                f"a step of {self._max_tokens} tokens takes {format_bytes(reserved_bytes)} of VRAM with every layer "
                f"streamed, more than the budget of {format_bytes(budget_bytes)}. Use a smaller batch or shorter "
                "sequences",
                stacklevel=2,
            )
        num_resident = min(max(0, spare_bytes) // max(1, self._streamer.layer_bytes), len(layers))
        self._streamer.set_resident([layers[i] for i in spread_evenly(num_resident, len(layers))])
        if num_resident == len(layers) > 0:
            logger.warning(
                "the VRAM budget of %s holds every layer: nothing is streamed any more. Stock PEFT without hf_lema "
                "trains this job as well",
                format_bytes(budget_bytes),
            )
