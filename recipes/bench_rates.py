"""What the machine can do: the rate of a plain page-locked copy, and of plain reads of a file, cold and warm.

Also drops a file's pages from the page cache and counts which are there. Linux. Knows nothing of models.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

GIB = 1 << 30
READ_BYTES = 8 << 20
NUM_COPIES = 8
READ_THREADS = (1, 4)
MAX_FILE_BYTES = 4 * GIB
"""The disk is timed over at most so many bytes."""
PROT_READ = 1
MAP_SHARED = 1
MAP_FAILED = ctypes.c_void_p(-1).value


def pinned_copy_bytes_per_s(device: torch.device, num_bytes: int = GIB) -> float:
    """Median rate of plain copies from a page-locked host buffer to the device; both buffers are given back.

    The buffer is registered and not allocated as pinned, because torch keeps pinned allocations in a cache of its own.

    Raises:
        RuntimeError: Page-locking was refused.
    """
    host = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    runtime = torch.cuda.cudart()
    code = runtime.cudaHostRegister(host.data_ptr(), num_bytes, 0)
    if int(code) != 0:
        raise RuntimeError(f"page-locking {num_bytes} bytes was refused with code {int(code)}")
    rates = []
    for _ in range(NUM_COPIES + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
        rates.append(num_bytes / (start.elapsed_time(end) / 1e3))
    runtime.cudaHostUnregister(host.data_ptr())
    del target
    torch.cuda.empty_cache()
    return statistics.median(rates[1:])


def drop_pages(paths: Sequence[Path]) -> None:
    """Has the kernel write files back and forget their cached pages; pages that a process has mapped stay."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # a page that is not yet on the disk cannot be dropped
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident_fraction(paths: Sequence[Path]) -> float:
    """Share of the files' pages that are in the page cache, by ``mincore`` (man 2 mincore).

    Raises:
        OSError: The kernel refuses to map or to tell.
    """
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    num_resident = num_pages = 0
    for path in paths:
        size = path.stat().st_size
        pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
        descriptor = os.open(path, os.O_RDONLY)
        try:
            address = libc.mmap(None, size, PROT_READ, MAP_SHARED, descriptor, 0)
        finally:
            os.close(descriptor)
        if address == MAP_FAILED:
            raise OSError(ctypes.get_errno(), f"mmap of {path.name} failed")
        flags = (ctypes.c_ubyte * pages)()
        code, errno = libc.mincore(address, size, flags), ctypes.get_errno()
        libc.munmap(address, size)
        if code != 0:
            raise OSError(errno, f"mincore of {path.name} failed")
        num_resident += bytes(flags).count(1)  # the other bits of a page's byte are reserved and 0
        num_pages += pages
    return num_resident / num_pages


def file_read_bytes_per_s(path: Path, num_threads: int) -> float:
    """Rate of reading a file from start to end into a few buffers, by one or several threads side by side."""
    num_bytes = min(path.stat().st_size, MAX_FILE_BYTES)
    descriptor = os.open(path, os.O_RDONLY)

    def read_span(span: tuple[int, int]) -> None:
        buffer = bytearray(READ_BYTES)
        offset, end = span
        while offset < end:
            offset += os.preadv(descriptor, [memoryview(buffer)[: min(READ_BYTES, end - offset)]], offset)

    step = -(-num_bytes // num_threads)
    spans = [(begin, min(begin + step, num_bytes)) for begin in range(0, num_bytes, step)]
    try:
        start_s = time.perf_counter()
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(read_span, spans))
        return num_bytes / (time.perf_counter() - start_s)
    finally:
        os.close(descriptor)


def disk_rates(path: Path) -> dict[str, float]:
    """Cold and warm rates of reading one file, by the number of threads, with the share of pages left before each.

    The file's pages are dropped before each cold reading; warm is the reading right after.
    """
    rates = {}
    for num_threads in READ_THREADS:
        drop_pages([path])
        left = resident_fraction([path])
        rates[f"disk_cold_{num_threads}_threads_bytes_per_s"] = file_read_bytes_per_s(path, num_threads)
        rates[f"disk_cold_{num_threads}_threads_resident_fraction"] = left
        rates[f"disk_warm_{num_threads}_threads_bytes_per_s"] = file_read_bytes_per_s(path, num_threads)
    return rates
