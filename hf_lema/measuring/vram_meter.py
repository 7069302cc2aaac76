"""Device memory of this process: what the driver says it holds, and what torch's allocator says.

Responsibility: reading, with NVML where it sees this process. Never waits for the device. Knows nothing of models or
trainers.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
from packaging.version import Version

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AllocatorPeak:
    """torch's caching allocator since its peaks were last reset; the two counts are since the process began."""

    allocated_bytes: int
    reserved_bytes: int
    num_alloc_retries: int
    num_ooms: int


class VramMeter:
    """Device memory of this process, as the driver sees it (context, allocator, libraries) and as the allocator does.

    NVML (package ``nvidia-ml-py``) gives the figure of the process alone. Inside some containers NVML lists other
    process ids, or none: then, or without the package, the figure is what is in use on the whole card, by
    ``torch.cuda.mem_get_info``, which is the same thing on an idle card. `source` says which one it is.

    Attributes:
        source: ``"nvml_process"`` or ``"mem_get_info_device"``.
        total_bytes: Size of the card.
    """

    def __init__(self, device: torch.device) -> None:
        """Look for NVML and for this process in it. Creates no tensor; the device must be a CUDA device."""
        self._device = device
        self.total_bytes: int = torch.cuda.mem_get_info(device)[1]
        self._nvml: Any = None
        self._nvml_handle: Any = None
        self._open_nvml()

    @property
    def source(self) -> str:
        """Where `read_bytes` has its figure from."""
        return "mem_get_info_device" if self._nvml is None else "nvml_process"

    def read_bytes(self) -> int:
        """Read the bytes in use now; never waits for running kernels."""
        if self._nvml is not None:
            process_bytes = self._read_nvml_bytes()
            if process_bytes is not None:
                return process_bytes
            logger.warning("NVML does not list this process any more: VRAM in use is read from the whole card instead")
            self._nvml = None
        free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
        return total_bytes - free_bytes

    def allocator_limit_bytes(self) -> int:
        """Bytes that torch's allocator may reserve: the process's memory fraction of the card.

        The fraction can be read from torch 2.7 on; before, the whole card is assumed (the line may go with torch 2.6).
        """
        if Version(torch.__version__) < Version("2.7"):
            return self.total_bytes
        fraction = torch.cuda.get_per_process_memory_fraction(self._device)
        return int(fraction * self.total_bytes)

    def take_allocator_peak(self) -> AllocatorPeak:
        """Read the allocator's peaks and begin new ones (``torch.cuda.reset_peak_memory_stats``)."""
        stats = torch.cuda.memory_stats(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return AllocatorPeak(
            allocated_bytes=stats["allocated_bytes.all.peak"],
            reserved_bytes=stats["reserved_bytes.all.peak"],
            num_alloc_retries=stats["num_alloc_retries"],
            num_ooms=stats["num_ooms"],
        )

    def _open_nvml(self) -> None:
        if importlib.util.find_spec("pynvml") is None:
            return
        import pynvml

        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(self._device).uuid
            self._nvml_handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode())
        except pynvml.NVMLError as error:
            logger.info("NVML cannot be used (%s): VRAM in use is read from the whole card", error)
            return
        self._nvml = pynvml
        if self._read_nvml_bytes() is None:
            logger.info("NVML does not list this process: VRAM in use is read from the whole card")
            self._nvml = None

    def _read_nvml_bytes(self) -> int | None:
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._nvml_handle)
        except self._nvml.NVMLError:
            return None
        used_bytes = [p.usedGpuMemory for p in processes if p.pid == os.getpid() and p.usedGpuMemory is not None]
        return sum(used_bytes) if used_bytes else None


def open_vram_meter(device: torch.device) -> VramMeter | None:
    """A meter for a CUDA device; ``None`` for any other device."""
    return VramMeter(device) if device.type == "cuda" else None
