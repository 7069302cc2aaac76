"""What the kernel counts of this process in each step: is a step long because of the host, and why?

Responsibility: `HostCounters`, a callback. Linux only (proc(5), getrusage(2)). Knows nothing of models.

Where a device waits for kernels to be started, the CPU time of the threads that start them (the training thread in the
forward, autograd's in the backward) adds up to the wall time. Page faults, switches and stolen time say whether the
process was kept from running; where all are near 0, the processor itself was slower.
"""

from __future__ import annotations

import gc
import os
import resource
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

_TASKS = Path("/proc/self/task")
_STAT = Path("/proc/stat")
_STEAL_FIELD = 8
LEAST_CPU_S = 0.003
"""Threads that ran for less in a step are left out."""


def read_thread_cpu_s(tasks: Path = _TASKS) -> dict[str, tuple[float, float]]:
    """Name and number of each thread -> seconds that it ran, and seconds that it was ready and waited to run."""
    found = {}
    for task in tasks.iterdir():
        try:
            ran_ns, waited_ns, _ = (task / "schedstat").read_text(encoding="ascii").split()
            name = (task / "comm").read_text(encoding="utf-8", errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError):  # it has ended since
            continue
        found[f"{name}:{task.name}"] = (int(ran_ns) / 1e9, int(waited_ns) / 1e9)
    return found


class HostCounters(TrainerCallback):
    """Counts each step, from its begin until its kernels are enqueued; the device is not waited for.

    Attributes:
        steps: One entry a step: ``wall_s``, ``page_faults``, ``switches_waiting`` and ``switches_forced`` (of all
            threads), ``steal_s`` (of all processors of the machine), ``collections`` (of Python's garbage collector),
            ``threads`` (name and number -> seconds that it ran, seconds that it was ready and waited).
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._begin: dict[str, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads the counters."""
        self._begin = _now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads them again and keeps the differences."""
        begin, end = self._begin, _now()
        threads = {}
        for name, (ran_s, waited_s) in end.pop("threads").items():
            ran_before_s, waited_before_s = begin["threads"].get(name, (0.0, 0.0))
            if ran_s - ran_before_s >= LEAST_CPU_S:
                threads[name] = (round(ran_s - ran_before_s, 4), round(waited_s - waited_before_s, 4))
        self.steps.append({key: round(value - begin[key], 4) for key, value in end.items()} | {"threads": threads})


def _now() -> dict[str, Any]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    ticks = int(_STAT.read_text(encoding="ascii").split("\n", 1)[0].split()[_STEAL_FIELD])
    return {
        "wall_s": time.perf_counter(),
        "page_faults": usage.ru_minflt + usage.ru_majflt,
        "switches_waiting": usage.ru_nvcsw,
        "switches_forced": usage.ru_nivcsw,
        "steal_s": ticks / os.sysconf("SC_CLK_TCK"),
        "collections": sum(generation["collections"] for generation in gc.get_stats()),
        "threads": read_thread_cpu_s(),
    }
