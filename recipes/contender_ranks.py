"""A contender in several processes: who one is, and the figures of all of them as one result.

Knows torch.distributed and the form of a result. Does not know how a contender is trained.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lema.reporting.contender import ContenderResult

ROLLUP = Path("/proc/self/smaps_rollup")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The place of this process among those of its contender.

    Attributes:
        rank: Its number on this machine; the first writes the result.
        size: How many there are.
        is_launched: Whether a launcher started it.
    """

    rank: int
    size: int
    is_launched: bool

    @classmethod
    def find(cls) -> Ranks:
        """From the environment that torchrun makes."""
        rank = os.environ.get("LOCAL_RANK")
        size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(rank=int(rank or 0), size=size, is_launched=rank is not None)

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank; all of them must call it."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def repeated_shmem_bytes(rollup: Path = ROLLUP) -> int | None:
    """Shared memory of this process that others map too, less its own share of it; None where it is not told.

    From Rss and Pss of ``smaps_rollup`` (proc(5)): the kernel divides a page by the number of processes that map it.
    Summed over the processes of a group it is what their private RAM counts more than once.
    """
    if not rollup.is_file():
        return None
    from hf_lema.measuring.telemetry import read_process_memory

    shares = [line for line in rollup.read_text(encoding="ascii").splitlines() if line.startswith("Pss_Shmem:")]
    shmem_bytes = read_process_memory().shmem_bytes
    if not shares or shmem_bytes is None:
        return None
    return max(shmem_bytes - int(shares[0].split()[1]) * 1024, 0)


def merge_ranks(results: Sequence[ContenderResult], repeated_bytes: Sequence[int | None]) -> ContenderResult:
    """One result for the group: a step lasts as long as its slowest process, tokens and moved bytes are summed.

    VRAM is the largest of any card. Private RAM is summed with shared pages counted once; as the peaks of the processes
    may lie at different moments, it is at most too large. Of pages of mapped files, which are the same for all, the
    largest.

    Args:
        results: By rank, all of them ok.
        repeated_bytes: By rank, as `repeated_shmem_bytes` gives it.
    """
    first = results[0]
    if len(results) == 1:
        return first
    step_s = [max(times_s) for times_s in zip(*(result.step_s for result in results), strict=True)]
    timed_s = sum(step_s[first.num_warmup_steps :])
    num_tokens = sum((result.tokens_per_s or 0.0) * sum(result.timed_step_s) for result in results)
    repeated = None if None in repeated_bytes else sum(filter(None, repeated_bytes))
    private = _sum([result.ram_private_above_imports_peak_bytes for result in results])
    resident = [
        result.ram_resident_above_imports_peak_bytes - result.ram_private_above_imports_peak_bytes
        for result in results
        if result.ram_resident_above_imports_peak_bytes is not None
        and result.ram_private_above_imports_peak_bytes is not None
    ]
    group_bytes = None if private is None else private - (repeated or 0)
    unknown = "Shared memory of the processes was counted once for each: this kernel does not tell its shares."
    return dataclasses.replace(
        first,
        step_s=step_s,
        tokens_per_s=num_tokens / timed_s if timed_s > 0 else None,
        **{name: _max([getattr(result, name) for result in results]) for name in _LARGEST},
        vram_step_peak_bytes=_by_step(max, [result.vram_step_peak_bytes for result in results]),
        ram_private_above_imports_peak_bytes=group_bytes,
        ram_resident_above_imports_peak_bytes=(
            group_bytes + max(resident) if resident and group_bytes is not None else None
        ),
        h2d_bytes=_by_step(sum, [result.h2d_bytes for result in results]),
        disk_bytes=_by_step(sum, [result.disk_bytes for result in results]),
        wait_s=_max([result.wait_s for result in results]),
        batches_sha256=hashlib.sha256("".join(str(r.batches_sha256) for r in results).encode()).hexdigest(),
        notes=[*first.notes, *([unknown] if repeated is None else [])],
    )


_LARGEST = (
    "vram_allocated_peak_bytes",
    "vram_reserved_peak_bytes",
    "vram_process_peak_bytes",
    "ram_file_peak_bytes",
)


def _by_step(combine: Any, series: Sequence[Sequence[int]]) -> list[int]:
    return [combine(values) for values in zip(*series, strict=True)]


def _sum(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _max(values: Sequence[Any]) -> Any:
    return max((value for value in values if value is not None), default=None)
