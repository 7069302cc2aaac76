"""What several processes change: bytes and seconds of PyTorch's DDP, and a bus that cards share.

Responsibility: `Launch`, arithmetic over shapes of machines. Knows nothing of models.

What is assumed unless `Launch` says otherwise: every card has its own link to the host's RAM (two H200 of one host,
reading one shared mapping, kept 96 % of the rate each), and RAM gives every card what its link takes. Always: a layer
that stays in its file is read from the disk once for all processes of a machine (recipes/LOG.md), and gradients are
summed after the backward; DDP sums most of them behind it, so a real step is a little shorter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hf_lema.planning.device_rates import DeviceRates


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The processes of a launch, one a card, and what connects them.

    Attributes:
        num_processes: On each machine.
        num_hosts: Machines.
        cards_per_bus: Cards behind one link to RAM, such as a PCIe switch.
        ram_bytes_per_s: What RAM gives to all cards of a machine together; None for more than they take.
        link_bytes_per_s: Between cards of a machine, each way; None for that of the bus.
        network_bytes_per_s: Of a machine, each way. 25 Gbit/s if not given.
    """

    num_processes: int = 1
    num_hosts: int = 1
    cards_per_bus: int = 1
    ram_bytes_per_s: float | None = None
    link_bytes_per_s: float | None = None
    network_bytes_per_s: float = 25e9 / 8

    def __post_init__(self) -> None:
        counts = {name: getattr(self, name) for name in ("num_processes", "num_hosts", "cards_per_bus")}
        if wrong := {name: count for name, count in counts.items() if count < 1}:
            raise ValueError(f"expected at least 1, got {wrong}")

    @property
    def world_size(self) -> int:
        """Processes of all machines."""
        return self.num_processes * self.num_hosts

    def shared(self, rates: DeviceRates) -> DeviceRates:
        """A card's rates while all cards of the machine read from RAM."""
        share = 1 / min(self.cards_per_bus, self.num_processes)
        most = float("inf") if self.ram_bytes_per_s is None else self.ram_bytes_per_s / self.num_processes
        return replace(
            rates,
            h2d_bytes_per_s=min(rates.h2d_bytes_per_s * share, most),
            duplex_bytes_per_s=min(rates.duplex_bytes_per_s * share, most),
        )

    def all_reduce_s(self, num_bytes: int, rates: DeviceRates) -> float:
        """Seconds to sum gradients over all processes on a ring: each sends 2 (n - 1) / n of the bytes.

        Source: the "bus bandwidth" of NCCL's tests (doc/PERFORMANCE.md). The slowest link of the ring counts.

        Args:
            num_bytes: Of the gradients.
            rates: Of a card, shared or not.
        """
        if self.world_size == 1:
            return 0.0
        link = rates.h2d_bytes_per_s if self.link_bytes_per_s is None else self.link_bytes_per_s
        if self.num_hosts > 1:
            link = min(link, self.network_bytes_per_s)
        return 2 * (self.world_size - 1) / self.world_size * num_bytes / link

    def bucket_bytes(self, num_bytes: int) -> int:
        """VRAM of DDP's buckets: a second copy of every gradient, which stays (``gradient_as_bucket_view=False``).

        Args:
            num_bytes: Of the gradients.
        """
        return num_bytes if self.world_size > 1 else 0

    def describe(self) -> str:
        """The assumptions that figures of several processes rest on, in one line."""
        hosts = "1 machine" if self.num_hosts == 1 else f"each of {self.num_hosts} machines"
        bus = "its own link" if self.cards_per_bus == 1 else f"a link that {self.cards_per_bus} cards share"
        ram = "as much as they take" if self.ram_bytes_per_s is None else f"{self.ram_bytes_per_s / 1e9:g} GB/s"
        link = "the bus" if self.link_bytes_per_s is None else f"links of {self.link_bytes_per_s / 1e9:g} GB/s"
        network = "" if self.num_hosts == 1 else f" and a network of {8 * self.network_bytes_per_s / 1e9:g} Gbit/s"
        return (
            f"{self.num_processes} processes on {hosts}, one copy of the layers in its RAM. Assumed: each card has "
            f"{bus} to RAM, RAM gives all of them {ram}, gradients are summed on a ring over {link}{network} after the "
            "backward."
        )
