"""Counters that are read between two optimizer steps, and what a step adds to them.

Responsibility: `TokenCounter`, `StepCounters`. Knows nothing of Trainer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_lema.measuring.vram_meter import AllocatorPeak

if TYPE_CHECKING:
    from hf_lema.runtime.streamer import StreamerStats


class TokenCounter:
    """Forward pre-hook that adds up positions of ``input_ids`` while the model is in training mode.

    Holds no thread, lock or file, so that a model carrying the hook can still be copied.

    Attributes:
        num_tokens: Their sum.
    """

    def __init__(self) -> None:
        self.num_tokens = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Inside a compiled region a changing count would make the graph compile again at every step.
        if not module.training or torch.compiler.is_compiling():
            return
        token_ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(token_ids, torch.Tensor):
            self.num_tokens += token_ids.numel()


@dataclass(frozen=True, kw_only=True)
class StepCounters:
    """All counters at one moment between two steps; a step's figures are the differences.

    Attributes:
        time_s: Of a monotonic clock.
        num_tokens: By `TokenCounter`.
        num_tokens_by_trainer: By Trainer, 0 where it does not count.
        allocator: None without a GPU.
        stream: None where nothing is streamed.
    """

    time_s: float
    num_tokens: int
    num_tokens_by_trainer: int
    allocator: AllocatorPeak | None
    stream: StreamerStats | None

    def figures_since(self, start: StepCounters) -> dict[str, Any]:
        """What was added, as fields of `StepRecord`."""
        allocator = ("num_alloc_retries", "num_ooms")
        stream = ("h2d_bytes", "disk_bytes", "wait_s", "num_hits", "num_demand_loads")
        return {
            "step_s": self.time_s - start.time_s,
            "num_tokens": self._num_tokens_since(start),
            **{name: _difference(start.allocator, self.allocator, name) for name in allocator},
            **{name: _difference(start.stream, self.stream, name) for name in stream},
        }

    def _num_tokens_since(self, start: StepCounters) -> int | None:
        """The hook's count; where it saw nothing (a compiled model, embeddings as input), Trainer's, if it counts."""
        num_tokens = self.num_tokens - start.num_tokens
        if num_tokens == 0:
            num_tokens = self.num_tokens_by_trainer - start.num_tokens_by_trainer
        return num_tokens if num_tokens > 0 else None


def _difference(start: Any, end: Any, name: str) -> Any:
    return None if start is None or end is None else getattr(end, name) - getattr(start, name)
