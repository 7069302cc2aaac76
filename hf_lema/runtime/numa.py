"""Which processors and which memory are next to a card, on machines with several NUMA nodes.

Responsibility: asking sysfs, and running a thread on the processors of a node. Knows nothing of models. Where a node is
not known (one node, a container without sysfs, an old torch) everything stays as it was, and nothing fails.

Linux gives a page from the node of the processor that first touches it. So a thread that runs next to the card and
touches new memory has it there; no memory policy is needed. Ring, boundary activations and head are a process's own,
and lie next to its card. The slab is shared: its layers are filled by threads that run on the nodes of the group's
cards in turn, so that half of it is near to each of two cards, and no node's memory alone has to feed all of them.
torchrun's ``--numa-binding node`` binds whole processes and does not contradict this: a thread never leaves what it may
use.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from packaging import version

_FIRST_WITH_PCI = version.parse("2.8")
_SYSFS = Path("/sys")
"""Where devices and nodes are looked for."""


def node_of_card(device: torch.device) -> int | None:
    """The NUMA node that a card is attached to.

    Source: ``numa_node`` of the PCI device in sysfs; -1 there means that the system does not know.

    Args:
        device: The card.

    Returns:
        The node's number; None on a CPU, before torch 2.8 (which has no PCI address), and where it is not known.
    """
    if device.type != "cuda" or not torch.cuda.is_available() or version.parse(torch.__version__) < _FIRST_WITH_PCI:
        return None
    properties: Any = torch.cuda.get_device_properties(device)
    return node_of_pci(properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id)


def node_of_pci(domain: int, bus: int, slot: int) -> int | None:
    """The NUMA node of a PCI device by its address; None where it is not known."""
    try:
        text = (_SYSFS / f"bus/pci/devices/{domain:04x}:{bus:02x}:{slot:02x}.0/numa_node").read_text()
        node = int(text)
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


def processors_of(node: int) -> frozenset[int]:
    """Processors of a node that this thread may run on; empty where it is not known.

    Source: ``cpulist`` of the node in sysfs, such as ``0-15,32-47``.
    """
    try:
        parts = (_SYSFS / f"devices/system/node/node{node}/cpulist").read_text().strip().split(",")
        ranges = [tuple(map(int, part.split("-"))) for part in parts if part]
    except (OSError, ValueError):
        return frozenset()
    found = {processor for ends in ranges for processor in range(ends[0], ends[-1] + 1)}
    return frozenset(found & os.sched_getaffinity(0))


def run_on_node(node: int | None) -> None:
    """Keeps the calling thread on the processors of a node from now on, as far as it may use them."""
    allowed = frozenset() if node is None else processors_of(node)
    if allowed:
        os.sched_setaffinity(0, allowed)  # 0 is the calling thread, not its process (sched_setaffinity(2))


def run_near_card(device: torch.device) -> None:
    """Keeps the calling thread on the processors next to a card, where these are known."""
    run_on_node(node_of_card(device))


@contextmanager
def near_current_card() -> Iterator[None]:
    """Keeps the calling thread next to the current card for a block: new memory that it touches lies there."""
    before = os.sched_getaffinity(0)
    if torch.cuda.is_available():
        run_near_card(torch.device("cuda", torch.cuda.current_device()))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def nodes_of_group(device: torch.device, num_processes: int) -> tuple[int, ...]:
    """Nodes of the cards of a machine's processes, each once; empty where one is not known.

    Args:
        device: This process's card.
        num_processes: On this machine; where each sees all cards, process i uses card i.
    """
    cards = [device]
    if device.type == "cuda" and 1 < num_processes <= torch.cuda.device_count():
        cards = [torch.device("cuda", i) for i in range(num_processes)]
    nodes = {node_of_card(card) for card in cards}
    return () if None in nodes else tuple(sorted(node for node in nodes if node is not None))


def in_turn(nodes: Sequence[int]) -> Callable[[], None]:
    """What each thread of a pool runs first, so that they run on the nodes in turn; does nothing without nodes."""
    turn = itertools.cycle(nodes or (None,))
    return lambda: run_on_node(next(turn))
