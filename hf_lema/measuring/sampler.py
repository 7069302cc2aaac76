"""What this process occupies now, and the thread that keeps the peaks.

Responsibility: one reading of the RAM of this process by kind, and `MemorySampler`, which takes it and a given reading
of VRAM at a fixed pace, so that a peak between two readings of the training loop is not lost. Knows nothing of models,
trainers or files.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

_PROC_STATUS = Path("/proc/self/status")
_PROC_ROLLUP = Path("/proc/self/smaps_rollup")
_JOIN_LIMIT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class ProcessMemory:
    """RAM of this process at one moment, in bytes, by kind; ``None`` where the platform does not tell.

    On Linux the figures are VmRSS, RssAnon, RssShmem and RssFile of ``/proc/self/status`` (man 5 proc). The kernel sums
    them late, so each may be off by some hundred pages. Elsewhere only ``rss_bytes`` is known. Child processes, such as
    DataLoader workers, are not in them.

    Attributes:
        rss_bytes: All resident pages.
        anon_bytes: Pages that no file backs: the heap, private tensors.
        shmem_bytes: Shared memory, memfd included: the slab of a streamed model, batches from DataLoader workers.
        file_bytes: Pages of mapped files, which the kernel may drop at any time.
    """

    rss_bytes: int
    anon_bytes: int | None
    shmem_bytes: int | None
    file_bytes: int | None

    @property
    def private_bytes(self) -> int | None:
        """Anonymous plus shared-memory pages: what the process needs, file pages apart; ``None`` where unknown.

        Page-locked host memory is resident from the moment that it is locked and so lies in one of the two kinds: it is
        not added a second time.
        """
        if self.anon_bytes is None or self.shmem_bytes is None:
            return None
        return self.anon_bytes + self.shmem_bytes


def read_process_memory(status_path: Path = _PROC_STATUS) -> ProcessMemory:
    """Read the RAM of this process now.

    Args:
        status_path: A file in the form of ``/proc/self/status``; where it does not exist, psutil gives the resident
            size and the kinds are ``None``.

    Returns:
        The reading. Takes some tens of microseconds.

    Raises:
        RuntimeError: The file exists but has no resident size.
    """
    try:
        text = status_path.read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        import psutil

        rss_bytes = int(psutil.Process().memory_info().rss)
        return ProcessMemory(rss_bytes=rss_bytes, anon_bytes=None, shmem_bytes=None, file_bytes=None)
    bytes_by_name: dict[str, int] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "RssAnon", "RssShmem", "RssFile"):
            bytes_by_name[name] = int(value.split()[0]) * 1024  # the kernel writes "kB" and means 1024 bytes
    if "VmRSS" not in bytes_by_name:
        raise RuntimeError(f"{status_path} has no VmRSS line, so the resident size of this process is not known")
    return ProcessMemory(
        rss_bytes=bytes_by_name["VmRSS"],
        anon_bytes=bytes_by_name.get("RssAnon"),
        shmem_bytes=bytes_by_name.get("RssShmem"),
        file_bytes=bytes_by_name.get("RssFile"),
    )


def read_proportional_private_bytes(rollup_path: Path = _PROC_ROLLUP) -> int | None:
    """Anonymous and shared-memory pages of this process, each divided by the number of processes that map it.

    Summed over processes, a page that they share counts once. The kernel walks all mappings for it, 0.1 s for some ten
    GiB: nothing to do inside a step.

    Args:
        rollup_path: A file in the form of ``/proc/self/smaps_rollup`` (proc(5)).

    Returns:
        Bytes; None where the kernel does not tell the kinds apart (before Linux 5.9).
    """
    try:
        text = rollup_path.read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        return None
    kib = {line.split(":")[0]: line.split()[1] for line in text.splitlines()[1:]}
    if "Pss_Anon" not in kib:
        return None
    return 1024 * (int(kib["Pss_Anon"]) + int(kib["Pss_Shmem"]))


@dataclass(frozen=True, kw_only=True)
class MemoryPeak:
    """The largest value of each figure over some time, in bytes; each figure's peak may lie at another moment."""

    vram_process_bytes: int | None
    ram_rss_bytes: int
    ram_private_bytes: int | None
    ram_file_bytes: int | None

    def merged(self, other: MemoryPeak) -> MemoryPeak:
        """The peak over both times."""
        return MemoryPeak(
            vram_process_bytes=larger(self.vram_process_bytes, other.vram_process_bytes),
            ram_rss_bytes=max(self.ram_rss_bytes, other.ram_rss_bytes),
            ram_private_bytes=larger(self.ram_private_bytes, other.ram_private_bytes),
            ram_file_bytes=larger(self.ram_file_bytes, other.ram_file_bytes),
        )


@dataclass(frozen=True, kw_only=True)
class MemorySample:
    """One point of the memory curve: the peak over a short time that ended ``elapsed_s`` after the sampler's start."""

    elapsed_s: float
    peak: MemoryPeak


def larger(first: int | None, second: int | None) -> int | None:
    """The larger of two figures, of which either may be unknown."""
    if first is None or second is None:
        return second if first is None else first
    return max(first, second)


class _Shared:
    """What the sampler and its thread both touch.

    The thread holds this and not the sampler, so that a dropped sampler is collected and thereby ends its thread.
    """

    def __init__(self, read_vram_bytes: Callable[[], int] | None, interval_s: float, max_samples: int) -> None:
        self.read_vram_bytes = read_vram_bytes
        self.interval_s = interval_s
        self.max_samples = max_samples
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.start_s = time.perf_counter()
        self.peak: MemoryPeak | None = None
        self.error: BaseException | None = None
        self.samples: list[MemorySample] = []
        self.pending: MemoryPeak | None = None
        self.num_pending = 0
        self.num_readings_per_sample = 1

    def read(self) -> MemoryPeak:
        ram = read_process_memory()
        return MemoryPeak(
            vram_process_bytes=None if self.read_vram_bytes is None else self.read_vram_bytes(),
            ram_rss_bytes=ram.rss_bytes,
            ram_private_bytes=ram.private_bytes,
            ram_file_bytes=ram.file_bytes,
        )

    def record(self, reading: MemoryPeak) -> None:
        with self.lock:
            self.peak = reading if self.peak is None else self.peak.merged(reading)
            self.pending = reading if self.pending is None else self.pending.merged(reading)
            self.num_pending += 1
            if self.num_pending < self.num_readings_per_sample:
                return
            elapsed_s = time.perf_counter() - self.start_s
            self.samples.append(MemorySample(elapsed_s=elapsed_s, peak=self.pending))
            self.pending, self.num_pending = None, 0
            if len(self.samples) >= self.max_samples:
                self._halve()

    def _halve(self) -> None:
        pairs = zip(self.samples[0::2], self.samples[1::2], strict=True)
        self.samples = [MemorySample(elapsed_s=b.elapsed_s, peak=a.peak.merged(b.peak)) for a, b in pairs]
        self.num_readings_per_sample *= 2

    def run(self) -> None:
        main_thread = threading.main_thread()
        # The wait is bounded by the interval. A non-daemon thread must see by itself that the main thread has ended,
        # or a training that died of an exception would keep the interpreter from leaving.
        try:
            while not self.stop.wait(self.interval_s) and main_thread.is_alive():
                self.record(self.read())
        except (OSError, RuntimeError, ValueError) as error:
            self.error = error  # raised again in the training thread: see MemorySampler.take_peak


class MemorySampler:
    """One named thread that reads RAM and VRAM of this process every ``interval_s`` and keeps the peaks.

    Use it as a context manager, or with `start` and `close`. The thread also ends when the sampler is collected and
    when the main thread ends.

    Args:
        read_vram_bytes: Gives the VRAM in use, such as ``VramMeter.read_bytes``; ``None`` without a device.
        interval_s: Seconds between readings.
        max_samples: Most points that `samples` keeps (an even number); when it is full, neighbours are merged, keeping
            the larger, and the pace of the points is halved, so that memory stays bounded over a run of any length.

    Raises:
        ValueError: ``interval_s`` is not above 0, or ``max_samples`` is odd or below 2.
    """

    THREAD_NAME = "hf_lema-memory-sampler"

    def __init__(
        self, read_vram_bytes: Callable[[], int] | None = None, *, interval_s: float = 0.05, max_samples: int = 2000
    ) -> None:
        if not interval_s > 0:
            raise ValueError(f"the sampling interval must be above 0 s, got {interval_s}")
        if max_samples < 2 or max_samples % 2:
            raise ValueError(f"max_samples must be even and at least 2, got {max_samples}")
        self._shared = _Shared(read_vram_bytes, interval_s, max_samples)
        self._thread: threading.Thread | None = None  # owned here: started by start(), joined by close()
        self._finalizer = weakref.finalize(self, self._shared.stop.set)

    def start(self) -> MemorySampler:
        """Take a first reading and start the thread.

        Raises:
            RuntimeError: The sampler was started or closed before.
        """
        if self._thread is not None or self._shared.stop.is_set():
            raise RuntimeError("a MemorySampler starts once: make a new one")
        self._shared.start_s = time.perf_counter()
        self._shared.record(self._shared.read())
        self._thread = threading.Thread(target=self._shared.run, name=self.THREAD_NAME, daemon=False)
        self._thread.start()
        return self

    def take_peak(self) -> MemoryPeak:
        """Read once more, give the peak since the last call of this method (or the start), and begin a new one.

        Raises:
            RuntimeError: A reading failed in the thread; the cause is chained.
        """
        if self._shared.error is not None:
            raise RuntimeError("the memory sampler's thread stopped: a reading failed") from self._shared.error
        self._shared.record(self._shared.read())
        with self._shared.lock:
            peak, self._shared.peak = self._shared.peak, None
        assert peak is not None, "a reading was recorded above"
        return peak

    @property
    def samples(self) -> tuple[MemorySample, ...]:
        """The memory curve since the start, oldest first."""
        with self._shared.lock:
            return tuple(self._shared.samples)

    def close(self) -> None:
        """End the thread and wait for it. May be called again, and before `start`."""
        self._shared.stop.set()
        thread, self._thread = self._thread, None
        if thread is not None and thread is not threading.current_thread() and thread.is_alive():
            thread.join(_JOIN_LIMIT_S)
            if thread.is_alive():
                raise RuntimeError(f"thread {thread.name} did not end within {_JOIN_LIMIT_S:.0f} s of its stop")

    def __enter__(self) -> MemorySampler:
        return self.start()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
