"""What a device can do a second: the figures that a step's time is a consequence of.

Responsibility: `DeviceRates`, data-sheet values of well-known cards, measuring a card that is there, and the time that
counted work takes at given rates. Knows nothing of models or budgets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from hf_lema.capability import FLASH_CAPABILITY
from hf_lema.planning.meter import ByteMeter, Kernels
from hf_lema.units import GIB, MIB

_NUM_RUNS = 10
_MATMUL_SIZE = 8192
_COPY_BYTES = GIB // 4


@dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """Rates of one card in one machine.

    Attributes:
        name: Of the card.
        origin: ``"measured"``, or ``"data sheet"`` for the maker's figures less what is not reached of them.
        capability: Compute capability, which decides on attention kernels and workspaces.
        vram_bytes: Size of the card.
        h2d_bytes_per_s: Host to device, page-locked.
        duplex_bytes_per_s: Each way while both are used.
        disk_bytes_per_s: Reading the layers' files. No property of a card: 1 GB/s is assumed until it is measured.
        vram_read_write_bytes_per_s: Bytes read and written by kernels that do little else.
        half_flop_per_s: Matrix products in float16 or bfloat16.
        float_flop_per_s: Matrix products in float32.
        kernel_start_s: Time in which the host starts one kernel, with all the Python around it. Fitted to records of
            several hosts (recipes/results), which took 29 to 38 us; above the middle, since too little is what hurts.
        context_bytes: What the CUDA context and libraries take beside PyTorch's allocator.
    """

    name: str
    origin: str
    capability: tuple[int, int]
    vram_bytes: int
    h2d_bytes_per_s: float
    duplex_bytes_per_s: float
    disk_bytes_per_s: float = 1e9
    vram_read_write_bytes_per_s: float
    half_flop_per_s: float
    float_flop_per_s: float
    kernel_start_s: float = 36e-6
    context_bytes: int = GIB // 2

    @property
    def has_flash_attention(self) -> bool:
        """Whether PyTorch's flash attention runs on it."""
        return self.capability >= FLASH_CAPABILITY

    @property
    def workspace_bytes(self) -> int:
        """What cuBLAS takes from the allocator: one workspace for the forward's thread, one for autograd's.

        Source: ``parseChosenWorkspaceSize`` of ATen (``:4096:2:16:8``, and 32 MiB from compute capability 9.0 on).
        """
        return 2 * (32 * MIB if self.capability >= (9, 0) else 8 * MIB + 128 * 1024)

    def compute_s(self, work: Iterable[Kernels], repeats: float = 1.0, start_repeats: float | None = None) -> float:
        """Least time of some work: the kernels' own time, or the host's to start them, whichever is more.

        A kernel takes the longer of its arithmetic and its memory traffic (the roofline model).

        Args:
            work: The kernels.
            repeats: How often as much is computed.
            start_repeats: How often as many kernels are started, where that differs: by a last piece that is smaller.
        """
        kernels_s = starts_s = 0.0
        for kernel in work:
            flop_per_s = self.half_flop_per_s if kernel.is_half else self.float_flop_per_s
            traffic_s = kernel.num_bytes / self.vram_read_write_bytes_per_s
            kernels_s += kernel.count * max(kernel.num_flops / flop_per_s, traffic_s)
            starts_s += kernel.count * self.kernel_start_s
        return max(repeats * kernels_s, (repeats if start_repeats is None else start_repeats) * starts_s)


def _data_sheet(
    name: str,
    capability: tuple[int, int],
    vram_gib: float,
    pcie_bytes_per_s: float,
    vram_rate: float,
    half: float,
    single: float,
) -> DeviceRates:
    return DeviceRates(
        name=name,
        origin="data sheet",
        capability=capability,
        vram_bytes=int(vram_gib * GIB),
        h2d_bytes_per_s=REACHED_OF_BUS * pcie_bytes_per_s,
        duplex_bytes_per_s=REACHED_OF_BUS_BOTH_WAYS * pcie_bytes_per_s,
        vram_read_write_bytes_per_s=REACHED_OF_VRAM * vram_rate,
        half_flop_per_s=REACHED_OF_MATMUL * half,
        float_flop_per_s=REACHED_OF_MATMUL * single,
    )


REACHED_OF_BUS = 0.87
REACHED_OF_BUS_BOTH_WAYS = 0.56
REACHED_OF_VRAM = 0.74
REACHED_OF_MATMUL = 0.77
"""What an H100 was measured to reach of its data sheet: 55 GB/s of page-locked copies, 35 GB/s each way at once,
2.48 TB/s for kernels that read and write, 765 TFLOP/s (recipes/check_plans.py). Other cards are taken to reach as much
of theirs."""

_PCIE_3, _PCIE_4, _PCIE_5 = 15.75e9, 31.5e9, 63.0e9
"""Bytes a second of 16 lanes, one way, by the PCI Express specification."""

DATA_SHEETS: dict[str, DeviceRates] = {
    rates.name: rates
    for rates in (
        _data_sheet("P100", (6, 0), 15.89, _PCIE_3, 732e9, 9.3e12, 9.3e12),
        _data_sheet("V100", (7, 0), 16, _PCIE_3, 900e9, 112e12, 14e12),
        _data_sheet("T4", (7, 5), 14.74, _PCIE_3, 320e9, 65e12, 8.1e12),
        _data_sheet("RTX 3060", (8, 6), 12, _PCIE_4, 360e9, 25.5e12, 12.7e12),
        _data_sheet("RTX 3090", (8, 6), 24, _PCIE_4, 936e9, 71e12, 35.6e12),
        _data_sheet("RTX 4090", (8, 9), 24, _PCIE_4, 1008e9, 165e12, 82.6e12),
        _data_sheet("A100", (8, 0), 40, _PCIE_4, 1555e9, 312e12, 19.5e12),
        _data_sheet("H100", (9, 0), 80, _PCIE_5, 3350e9, 989e12, 67e12),
    )
}
"""By name. The makers' figures (dense matrix products with float32 sums), less what no machine reaches of them, by the
shares above. RTX 3060: half rate is twice the float32 one. P100: its double rate for fp16 is that of sums in fp16;
PyTorch asks for sums in float32, which run at the float32 rate. Sizes are the nominal ones, but for the two cards of
which it is known that CUDA sees less: P100 15.89 GiB, T4 14.74 GiB."""


def find_rates(name: str) -> DeviceRates:
    """Data-sheet rates of a card by its name, in any case, with or without spaces.

    Raises:
        ValueError: The card is not in the table.
    """
    by_name = {key.lower().replace(" ", ""): rates for key, rates in DATA_SHEETS.items()}
    wanted = name.lower().replace(" ", "").replace("-", "").replace("_", "")
    if wanted not in by_name:
        raise ValueError(f"no data-sheet rates for {name!r}; there are {', '.join(DATA_SHEETS)}")
    return by_name[wanted]


def rates_of(device: torch.device) -> DeviceRates:
    """Data-sheet rates of the card that is there, or of the known one that is nearest by compute capability.

    Takes no time; enough to compare ways to run a step, not to tell its seconds.
    """
    properties = torch.cuda.get_device_properties(device)
    named = [rates for key, rates in DATA_SHEETS.items() if key in properties.name]
    capability = (properties.major, properties.minor)
    older = [rates for rates in DATA_SHEETS.values() if rates.capability <= capability]
    nearest = max(older or DATA_SHEETS.values(), key=lambda rates: rates.capability)
    return replace(
        named[-1] if named else nearest,
        name=properties.name,
        capability=capability,
        vram_bytes=properties.total_memory,
    )


def rates_here() -> DeviceRates:
    """Data-sheet rates of the current CUDA device, or of a T4 where there is none."""
    if torch.cuda.is_available():
        return rates_of(torch.device("cuda", torch.cuda.current_device()))
    return DATA_SHEETS["T4"]


def measure_rates(device: torch.device, disk_bytes_per_s: float = 1e9) -> DeviceRates:
    """Measures a CUDA device. Takes a few seconds and about 1.5 GiB; call it before anything is loaded.

    Args:
        device: The card.
        disk_bytes_per_s: Is not measured here.
    """
    properties = torch.cuda.get_device_properties(device)
    start_s = _kernel_start_s(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    context_bytes = total_bytes - free_bytes - torch.cuda.memory_reserved(device)
    host = torch.ones(_COPY_BYTES, dtype=torch.uint8).pin_memory()
    back = torch.empty_like(host, pin_memory=True)
    target, source = torch.empty_like(host, device=device), torch.ones_like(host, device=device)
    other = torch.cuda.Stream(device)

    def both_ways() -> None:
        other.wait_stream(torch.cuda.current_stream(device))
        target.copy_(host, non_blocking=True)
        with torch.cuda.stream(other):
            back.copy_(source, non_blocking=True)
        torch.cuda.current_stream(device).wait_stream(other)

    h2d_s = _best_s(device, lambda: target.copy_(host, non_blocking=True))
    duplex_s = _best_s(device, both_ways)
    vram_s = _best_s(device, lambda: torch.add(source, 1, out=target))
    flop = 2 * _MATMUL_SIZE**3
    matmul_s = {}
    for dtype in (torch.float16, torch.float32):
        square = torch.ones(_MATMUL_SIZE, _MATMUL_SIZE, dtype=dtype, device=device)
        result = torch.empty_like(square)
        matmul_s[dtype] = _best_s(device, lambda a=square, c=result: torch.mm(a, a, out=c))  # type: ignore[misc]
    return DeviceRates(
        name=properties.name,
        origin="measured",
        capability=(properties.major, properties.minor),
        vram_bytes=total_bytes,
        h2d_bytes_per_s=_COPY_BYTES / h2d_s,
        duplex_bytes_per_s=_COPY_BYTES / duplex_s,
        disk_bytes_per_s=disk_bytes_per_s,
        vram_read_write_bytes_per_s=2 * _COPY_BYTES / vram_s,
        half_flop_per_s=flop / matmul_s[torch.float16],
        float_flop_per_s=flop / matmul_s[torch.float32],
        kernel_start_s=start_s,
        context_bytes=context_bytes,
    )


def _best_s(device: torch.device, run: Callable[[], object]) -> float:
    """Shortest device time of a few runs, the first apart."""
    times_s: list[float] = []
    for _ in range(_NUM_RUNS + 1):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times_s.append(begin.elapsed_time(end) / 1e3)
    return min(times_s[1:])


def _kernel_start_s(device: torch.device) -> float:
    """Host time a kernel, over the forward and backward of small modules as PEFT stacks them."""
    branch = nn.Sequential(nn.Dropout(0.1), nn.Linear(64, 16, bias=False), nn.Linear(16, 64, bias=False)).to(device)
    hidden = torch.ones(8, 64, device=device, requires_grad=True)

    def run() -> None:
        with torch.autocast(device.type, dtype=torch.float16):
            output = hidden
            for _ in range(50):
                output = output + branch(output) * 2.0
        torch.autograd.grad(output.float().sum(), [hidden, *branch.parameters()])

    run()
    with ByteMeter().measured() as measures:
        run()
    num_kernels = sum(kernel.count for kernel in measures[0].work)
    times_s = []
    for _ in range(_NUM_RUNS):
        torch.cuda.synchronize(device)  # noqa: TID251 - a measurement outside any step
        begin_s = time.perf_counter()
        run()
        torch.cuda.synchronize(device)  # noqa: TID251 - as above
        times_s.append(time.perf_counter() - begin_s)
    return min(times_s) / num_kernels
