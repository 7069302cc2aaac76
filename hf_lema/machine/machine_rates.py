"""The rates of a machine: page-locking tried and the bus timed, a file read and the disk timed.

Responsibility: measuring, with little: one page-locked buffer of 256 MiB that is given back, and at most 512 MiB of a
file that is there; nothing is written. Judges nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_lema.runtime.host_memory import HostBuffer, clear_cuda_error
from hf_lema.units import MIB

TRY_LOCK_BYTES = 256 * MIB
NUM_COPIES = 5
MAX_DISK_READ_BYTES = 512 * MIB
MIN_DISK_FILE_BYTES = 16 * MIB
READ_BYTES = 8 * MIB


@dataclass(frozen=True, kw_only=True)
class LockTry:
    """A real try to page-lock memory.

    Attributes:
        num_bytes: How much.
        is_allowed: Whether CUDA did it.
    """

    num_bytes: int
    is_allowed: bool


@dataclass(frozen=True, kw_only=True)
class DiskRead:
    """A timed read of a file.

    Attributes:
        file_name: Its name, without the folder.
        num_bytes: How much of it was read.
        bytes_per_s: The rate.
        resident_fraction: Part of what was read that was in the page cache before.
    """

    file_name: str
    num_bytes: int
    bytes_per_s: float
    resident_fraction: float


def try_bus(can_compute: bool) -> tuple[LockTry, float | None]:
    """Locks a buffer and copies it a few times. Copies are no kernels: this works on a card that torch has none for.

    Args:
        can_compute: Whether torch has kernels for the card, so that a refusal can be made to leave no trace.
    """
    buffer = HostBuffer(TRY_LOCK_BYTES)
    buffer.tensor.zero_()  # pages that are there
    code = int(torch.cuda.cudart().cudaHostRegister(buffer.tensor.data_ptr(), TRY_LOCK_BYTES, 0))
    if code != 0:
        if can_compute:
            clear_cuda_error()
        return LockTry(num_bytes=TRY_LOCK_BYTES, is_allowed=False), None
    buffer.pinned_bytes = TRY_LOCK_BYTES
    try:
        rate = _copy_rate(buffer.tensor)
    finally:
        buffer.close()
    return LockTry(num_bytes=TRY_LOCK_BYTES, is_allowed=True), rate


def _copy_rate(host: torch.Tensor) -> float:
    target = torch.empty(host.shape, dtype=host.dtype, device="cuda")
    rates: list[float] = []
    for _ in range(NUM_COPIES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(host, non_blocking=True)
        end.record()
        end.synchronize()
        rates.append(host.nbytes / (start.elapsed_time(end) / 1e3))
    return statistics.median(rates[1:])


def read_rate(folder: Path) -> DiskRead:
    """Times reading the largest file below a folder, its first 512 MiB at most; how much of it was cached is told.

    Raises:
        ValueError: The folder does not exist, or no file below it has 16 MiB.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    path = max(sizes, key=lambda path: sizes[path], default=None)
    if path is None or sizes[path] < MIN_DISK_FILE_BYTES:
        raise ValueError(f"no file below {folder} has 16 MiB to read: give the folder of a checkpoint")
    num_bytes = min(sizes[path], MAX_DISK_READ_BYTES)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        resident_fraction = _resident_fraction(descriptor, num_bytes)
        buffer = memoryview(mmap.mmap(-1, READ_BYTES))
        offset, start_s = 0, time.perf_counter()
        while offset < num_bytes:
            offset += os.preadv(descriptor, [buffer[: min(READ_BYTES, num_bytes - offset)]], offset)
        read_s = time.perf_counter() - start_s
    finally:
        os.close(descriptor)
    return DiskRead(
        file_name=path.name,
        num_bytes=num_bytes,
        bytes_per_s=num_bytes / read_s,
        resident_fraction=resident_fraction,
    )


def _resident_fraction(descriptor: int, num_bytes: int) -> float:
    """Part of the file's pages that are in the page cache, by ``mincore`` (man 2 mincore)."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    address = libc.mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "the file cannot be mapped")
    num_pages = -(-num_bytes // mmap.PAGESIZE)
    flags = (ctypes.c_ubyte * num_pages)()
    try:
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), flags) != 0:
            raise OSError(ctypes.get_errno(), "mincore was refused")
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes))
    return bytes(flags).count(1) / num_pages  # the other bits of a page's byte are reserved and 0
