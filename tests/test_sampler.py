"""One reading of this process, and the thread that keeps the peaks."""

from __future__ import annotations

import gc
import math
import mmap
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lema.measuring.sampler import MemoryPeak, MemorySampler, ProcessMemory, read_process_memory
from hf_lema.units import MIB


def sampler_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == MemorySampler.THREAD_NAME]


STATUS = "Name:\tpython\nVmRSS:\t    3000 kB\nRssAnon:\t    1000 kB\nRssFile:\t     500 kB\nRssShmem:\t    1500 kB\n"


def test_the_kinds_of_pages_are_read_in_bytes(tmp_path: Path) -> None:
    (tmp_path / "status").write_text(STATUS)
    memory = read_process_memory(tmp_path / "status")
    assert memory == ProcessMemory(
        rss_bytes=3000 * 1024, anon_bytes=1000 * 1024, shmem_bytes=1500 * 1024, file_bytes=500 * 1024
    )
    assert memory.private_bytes == 2500 * 1024


def test_without_proc_only_the_resident_size_is_known(tmp_path: Path) -> None:
    memory = read_process_memory(tmp_path / "absent")
    assert memory.rss_bytes > MIB
    assert (memory.anon_bytes, memory.shmem_bytes, memory.file_bytes, memory.private_bytes) == (None, None, None, None)


def test_a_status_file_without_the_resident_size_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\n")
    with pytest.raises(RuntimeError, match="VmRSS"):
        read_process_memory(tmp_path / "status")


def test_a_tensor_counts_as_private_and_a_mapped_file_does_not(tmp_path: Path) -> None:
    size_bytes, slack_bytes = 64 * MIB, 8 * MIB
    (tmp_path / "file").write_bytes(os.urandom(MIB) * 64)
    before = read_process_memory()
    with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) >= 0
        with_file = read_process_memory()
    assert with_file.file_bytes - before.file_bytes > size_bytes - slack_bytes  # type: ignore[operator]
    assert with_file.private_bytes - before.private_bytes < slack_bytes  # type: ignore[operator]
    tensor = torch.ones(size_bytes, dtype=torch.uint8)
    with_tensor = read_process_memory()
    assert with_tensor.private_bytes - before.private_bytes > size_bytes - slack_bytes  # type: ignore[operator]
    del tensor


def test_shared_memory_counts_as_private_once() -> None:
    size_bytes, slack_bytes = 64 * MIB, 8 * MIB
    before = read_process_memory()
    with mmap.mmap(-1, size_bytes) as shared:  # shared and anonymous, as a memfd is
        shared.write(b"x" * size_bytes)
        after = read_process_memory()
    growth_bytes = after.private_bytes - before.private_bytes  # type: ignore[operator]
    assert size_bytes - slack_bytes < growth_bytes < size_bytes + slack_bytes


def test_a_peak_between_two_takes_is_kept() -> None:
    values = iter([100, 100, 900, 900, 200])
    spike_was_read = threading.Event()

    def read_vram_bytes() -> int:
        value = next(values, 50)
        if value == 200:
            spike_was_read.set()
        return value

    with MemorySampler(read_vram_bytes, interval_s=0.002) as sampler:
        assert spike_was_read.wait(10)
        assert sampler.take_peak().vram_process_bytes == 900
        assert sampler.take_peak().vram_process_bytes in (50, 200)  # the old peak is not told twice
    assert sampler_threads() == []


def test_the_thread_is_named_and_no_daemon_and_close_may_be_called_again() -> None:
    sampler = MemorySampler(interval_s=60).start()
    (thread,) = sampler_threads()
    assert not thread.daemon
    start_s = time.perf_counter()
    sampler.close()
    assert time.perf_counter() - start_s < 10  # the stop wakes the thread, it does not wait for the interval
    sampler.close()
    assert sampler_threads() == []


def test_a_sampler_that_never_started_can_be_closed() -> None:
    MemorySampler().close()


def test_a_sampler_starts_once() -> None:
    with MemorySampler(interval_s=60) as sampler, pytest.raises(RuntimeError, match="starts once"):
        sampler.start()
    with pytest.raises(RuntimeError, match="starts once"):
        sampler.start()


def test_a_dropped_sampler_ends_its_thread() -> None:
    sampler = MemorySampler(interval_s=60).start()
    (thread,) = sampler_threads()
    del sampler
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_a_failing_reading_surfaces_at_the_next_take() -> None:
    num_reads = 0

    def read_vram_bytes() -> int:
        nonlocal num_reads
        num_reads += 1
        if num_reads > 1:
            raise OSError("the driver is gone")
        return 1

    with MemorySampler(read_vram_bytes, interval_s=0.002) as sampler:
        (thread,) = sampler_threads()
        thread.join(10)
        with pytest.raises(RuntimeError, match="reading failed") as caught:
            sampler.take_peak()
    assert "the driver is gone" in str(caught.value.__cause__)


def test_the_memory_curve_stays_bounded_and_keeps_its_peak() -> None:
    values = iter([1, 2, 3, 999, *range(4, 60)])
    is_done = threading.Event()

    def read_vram_bytes() -> int:
        value = next(values, None)
        if value is None:
            is_done.set()
            return 0
        return value

    with MemorySampler(read_vram_bytes, interval_s=0.001, max_samples=8) as sampler:
        assert is_done.wait(20)
        samples = sampler.samples
    assert 4 <= len(samples) < 8
    assert max(sample.peak.vram_process_bytes or 0 for sample in samples) == 999
    times_s = [sample.elapsed_s for sample in samples]
    assert times_s == sorted(times_s)


@pytest.mark.parametrize(
    "options", [{"interval_s": 0}, {"interval_s": math.nan}, {"max_samples": 3}, {"max_samples": 0}]
)
def test_settings_that_cannot_be_sampled_with_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"interval|max_samples"):
        MemorySampler(**options)


def test_a_process_that_dies_with_an_open_sampler_still_ends() -> None:
    script = """
        from hf_lema.measuring.sampler import MemorySampler
        sampler = MemorySampler(interval_s=0.01).start()
        raise SystemExit(7)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], timeout=60, check=False)
    assert done.returncode == 7


def test_one_sampled_peak_merges_with_another_figure_by_figure() -> None:
    first = MemoryPeak(vram_process_bytes=None, ram_rss_bytes=5, ram_private_bytes=1, ram_file_bytes=9)
    second = MemoryPeak(vram_process_bytes=3, ram_rss_bytes=4, ram_private_bytes=2, ram_file_bytes=None)
    both = MemoryPeak(vram_process_bytes=3, ram_rss_bytes=5, ram_private_bytes=2, ram_file_bytes=9)
    assert first.merged(second) == both


@pytest.mark.gpu
def test_on_a_card_page_locked_memory_is_resident_and_counted_once() -> None:
    torch.empty(MIB, device="cuda")
    size_bytes, slack_bytes = 512 * MIB, 64 * MIB
    before = read_process_memory()
    pinned = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    after = read_process_memory()
    growth_bytes = after.private_bytes - before.private_bytes  # type: ignore[operator]
    assert size_bytes - slack_bytes < growth_bytes < size_bytes + slack_bytes
    del pinned
