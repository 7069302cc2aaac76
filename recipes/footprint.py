"""What a process holds at one moment, and whether it stayed flat: memory of each kind, threads, open handles.

Knows the counters of Linux, torch and the streamer. Does not know what was run in between.
"""

from __future__ import annotations

import gc
import os
import statistics
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from hf_lema import get_streamer
from hf_lema.measuring.telemetry import read_process_memory
from hf_lema.units import format_bytes

EXACT = ("pinned_bytes", "vram_allocated_bytes", "vram_reserved_bytes", "num_threads", "num_handles")
"""Figures that must not change by one. Private RAM may: the heap keeps pages, and Trainer a history of its logs."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What this process holds.

    Attributes:
        private_bytes: RssAnon + RssShmem.
        pinned_bytes: Page-locked bytes of the streamed model; 0 where there is none.
        vram_allocated_bytes: Device memory in tensors; 0 on a CPU.
        vram_reserved_bytes: Device memory that torch's allocator holds; 0 on a CPU.
        num_threads: Python threads.
        num_handles: Open file descriptors.
    """

    private_bytes: int
    pinned_bytes: int
    vram_allocated_bytes: int
    vram_reserved_bytes: int
    num_threads: int
    num_handles: int


def read_footprint(model: nn.Module | None = None) -> Footprint:
    """What this process holds now, garbage taken out first.

    Args:
        model: A wrapped model, or None.

    Raises:
        RuntimeError: The system does not tell private memory (it is not Linux).
    """
    gc.collect()
    private_bytes = read_process_memory().private_bytes
    if private_bytes is None:
        raise RuntimeError("private memory is known on Linux only")
    on_gpu = torch.cuda.is_initialized()
    return Footprint(
        private_bytes=private_bytes,
        pinned_bytes=0 if model is None else get_streamer(model).pinned_bytes,
        vram_allocated_bytes=torch.cuda.memory_allocated() if on_gpu else 0,
        vram_reserved_bytes=torch.cuda.memory_reserved() if on_gpu else 0,
        num_threads=threading.active_count(),
        num_handles=len(os.listdir("/proc/self/fd")),
    )


def private_growth_bytes(footprints: Sequence[Footprint]) -> int:
    """By how much private memory grew: the median of the last quarter less that of the first, in bytes."""
    quarter = max(1, len(footprints) // 4)
    first, last = (
        statistics.median(footprint.private_bytes for footprint in part)
        for part in (footprints[:quarter], footprints[-quarter:])
    )
    return int(last - first)


def what_grew(footprints: Sequence[Footprint], max_private_growth_bytes: int) -> list[str]:
    """What was not flat, in words; empty where everything was.

    Args:
        footprints: In order, after warm-up.
        max_private_growth_bytes: By how much private memory may have grown, see `private_growth_bytes`.
    """
    grew = []
    for name in EXACT:
        values = [getattr(footprint, name) for footprint in footprints]
        if min(values) != max(values):
            grew.append(f"{name} went from {values[0]} to {values[-1]} (least {min(values)}, most {max(values)})")
    growth_bytes = private_growth_bytes(footprints)
    if growth_bytes > max_private_growth_bytes:
        grew.append(
            f"private_bytes grew by {format_bytes(growth_bytes)}, more than {format_bytes(max_private_growth_bytes)}"
        )
    return grew
