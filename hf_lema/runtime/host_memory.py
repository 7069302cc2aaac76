"""Host memory of an exact size, shared between processes, page-locked where the system allows it.

Responsibility: mapping, registering with CUDA, giving back. Knows nothing of layers or files. Linux only (memfd).

``pin_memory`` rounds every allocation up to a power of two; a registered mapping has the size that was asked for. The
mapping is a memfd, not private memory: a forked DataLoader worker then shares it instead of copying it page by page.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from hf_lema.progress import time_shown
from hf_lema.runtime.numa import near_current_card
from hf_lema.units import format_bytes

PAGE_BYTES = mmap.PAGESIZE

PAGE_LOCK_ADVICE = (
    "Raise the limit for locked memory (`ulimit -l unlimited`, in Docker `--ulimit memlock=-1`, in WSL the memory of "
    ".wslconfig) for the full rate."
)

_ROOT = Path("/")
"""Where /proc and /sys are looked for."""


class HostBuffer:
    """A zero-filled shared mapping, seen as one uint8 tensor.

    ``close`` takes the page-lock away; the memory itself is given back when the last tensor that views it is gone, so
    a weight at rest never points at memory that is no longer there.

    Args:
        nbytes: Size in bytes; rounded up to whole pages.
        of: Descriptor of another process's buffer of the same size, to share it; owned from here on.
        is_shared: Whether a descriptor is kept for `take_descriptor`.

    Attributes:
        tensor: 1-D uint8 CPU tensor of ``nbytes`` elements over the mapping.
        memory: The mapping's bytes, for `tensor_over`.
        pinned_bytes: Bytes that are page-locked now.
    """

    def __init__(self, nbytes: int, of: int | None = None, is_shared: bool = False) -> None:
        self.nbytes = nbytes
        self._mapped_bytes = mapped_bytes = max(-(-nbytes // PAGE_BYTES), 1) * PAGE_BYTES
        fd = os.memfd_create("hf_lema", os.MFD_CLOEXEC) if of is None else of
        try:
            if of is None:
                os.ftruncate(fd, mapped_bytes)
            elif os.fstat(fd).st_size != mapped_bytes:
                raise ValueError(f"a buffer of {os.fstat(fd).st_size} bytes was given, expected {mapped_bytes}")
            mapping = mmap.mmap(fd, mapped_bytes)
            self._descriptor = os.dup(fd) if is_shared else None
        finally:
            os.close(fd)
        # The tensors over it keep the mapping alive; nothing else does.
        self.memory = memoryview(mapping)
        self.tensor: torch.Tensor = torch.frombuffer(self.memory, dtype=torch.uint8)[:nbytes]
        self.pinned_bytes = 0
        self._owner_pid = os.getpid()

    def take_descriptor(self) -> int:
        """The descriptor for another process to map; the caller closes it. May be called once."""
        descriptor, self._descriptor = self._descriptor, None
        assert descriptor is not None
        return descriptor

    def page_lock(self) -> bool:
        """Registers the memory with CUDA: copies then run at full bus rate and do not block the host.

        Worth calling after the memory was filled (0.05 s a GiB on an H100 host, ten times that on others; the pages are
        then already there). One call for all of it, which cannot say how far it is, and a long one shows its time: CUDA
        lets no copy reach over two registered ranges.

        Returns:
            Whether the system allowed it; if not, the memory stays pageable, and `PAGE_LOCK_ADVICE` is for the user.
        """
        # Pages that are new come from near the card.
        with time_shown(f"Page-locking {format_bytes(self._mapped_bytes)} of RAM"), near_current_card():
            result = int(torch.cuda.cudart().cudaHostRegister(self.tensor.data_ptr(), self._mapped_bytes, 0))
        if result == 0:
            self.pinned_bytes = self._mapped_bytes
            return True
        clear_cuda_error()
        return False

    def make_read_only(self) -> None:
        """Has the kernel stop every later write of this process, by a segmentation fault.

        After `page_lock`: CUDA registers writable mappings only, and keeps the pages whatever becomes of the mapping.

        Raises:
            OSError: The kernel refused.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        address = ctypes.c_void_p(self.tensor.data_ptr())
        if libc.mprotect(address, ctypes.c_size_t(self._mapped_bytes), mmap.PROT_READ) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"protecting {self._mapped_bytes} shared bytes: {os.strerror(error)}")

    def close(self) -> None:
        """Take the page-lock away. May be called any number of times; does nothing in a forked child."""
        if self.pinned_bytes and self._owner_pid == os.getpid():
            torch.cuda.cudart().cudaHostUnregister(self.tensor.data_ptr())
        self.pinned_bytes = 0
        if self._descriptor is not None:
            os.close(self.take_descriptor())


def clear_cuda_error() -> None:
    """Makes CUDA forget an error that a runtime call returned.

    A refused ``cudaHostRegister`` is reported a second time by the next kernel launch; a tiny one is run here so that
    it is reported to us and not to the training step.
    """
    try:
        torch.zeros(1, device="cuda").add_(1)
    except RuntimeError:
        torch.zeros(1, device="cuda").add_(1)


def map_private(descriptor: int) -> memoryview:
    """Maps a whole file as writable memory of this process; writes never reach the file.

    Pages are read when touched and belong to the page cache until written. No swap or RAM is reserved in advance.

    Args:
        descriptor: The open file; it must not be empty.

    Returns:
        Its bytes; the mapping lives as long as the view and the tensors over it.
    """
    no_reserve = 0x4000  # MAP_NORESERVE of Linux: a 13 GB file may be mapped on a machine with 12 GB
    return memoryview(
        mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | no_reserve, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    )


def has_private_pages(tensor: torch.Tensor) -> bool:
    """Whether anything was written to the mapping that a tensor lies in, since it was mapped by `map_private`.

    Source: Anonymous and Swap of the mapping in /proc/self/smaps; a written page of a private file mapping is
    anonymous, whoever shares it after a fork.
    """
    address, inside, written_kib = tensor.data_ptr(), False, 0
    for line in (_ROOT / "proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            begin, end = (int(part, 16) for part in name.split("-"))
            inside = begin <= address < end
        elif inside and name in ("Anonymous:", "Swap:"):
            written_kib += int(rest.split()[0])
    return written_kib > 0


def tensor_over(memory: memoryview, offset_bytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A tensor over a part of a mapping, with a storage of its own.

    Tensors that shared one storage would be taken for tied weights by ``save_pretrained``, and cloned.

    Args:
        memory: The mapping's bytes.
        offset_bytes: Where the tensor starts; a file may place it where its dtype's alignment does not.
        shape: Sizes of its dimensions.
        dtype: Type of its elements.
    """
    num_elements = math.prod(shape)
    if num_elements == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=num_elements, offset=offset_bytes).view(shape)


def device_view(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the device over page-locked host memory, which kernels read over the bus.

    Args:
        tensor: A contiguous CPU tensor inside a `HostBuffer` that is page-locked.
        device: The CUDA device; on a CPU the tensor itself is returned.

    Returns:
        The same memory, shape and dtype.
    """
    if device.type != "cuda":
        return tensor
    with torch.cuda.device(device):
        as_bytes: torch.Tensor = torch.as_tensor(_CudaArray(tensor.data_ptr(), tensor.nbytes, tensor), device=device)
    return as_bytes.view(tensor.dtype).view(tensor.shape)


class _CudaArray:
    """Bytes at an address, as version 3 of the CUDA array interface (Numba's documentation) describes them.

    torch keeps this object, and with it the memory, as long as its own tensor.
    """

    def __init__(self, address: int, nbytes: int, memory: torch.Tensor) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (nbytes,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


def available_host_bytes() -> int:
    """Bytes that this process may still take: the least of the machine's available memory and the room of its limits.

    Sources: MemAvailable of /proc/meminfo; the limit of the address space (``ulimit -v``) less the process's size, to
    which every mapping counts, of a file too; for the cgroup of this process and every one above it, memory.max and
    memory.current (cgroup 2) or memory.limit_in_bytes and memory.usage_in_bytes (cgroup 1), with the group's page cache
    counted as free.
    """
    room: list[int] = [psutil.virtual_memory().available]
    address_space_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space_bytes != resource.RLIM_INFINITY:
        num_pages = int((_ROOT / "proc/self/statm").read_text().split()[0])
        room.append(address_space_bytes - num_pages * PAGE_BYTES)
    for folder, limit_name, usage_name, prefix in _cgroup_folders():
        limit_path = folder / limit_name
        if limit_path.exists() and (limit := limit_path.read_text().strip()) != "max":
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            file_bytes = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
            room.append(int(limit) - int((folder / usage_name).read_text()) + file_bytes)
    return max(0, min(room))


def _cgroup_folders() -> Iterator[tuple[Path, str, str, str]]:
    """(folder, limit file, usage file, prefix in memory.stat) of this process's memory cgroup and those above it."""
    listing = _ROOT / "proc/self/cgroup"
    lines = listing.read_text().splitlines() if listing.exists() else ["0::/", "1:memory:/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _ROOT / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            root, names = _ROOT / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield folder, *names
            if folder == root:
                break
