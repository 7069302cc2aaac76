"""Memory and threads next to the card, with a made-up /sys: what is known is used, what is not changes nothing."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fake_store import layer_layout

from hf_lema.runtime import numa
from hf_lema.runtime.host_store import RamStore
from hf_lema.runtime.prefetcher import Prefetcher
from hf_lema.runtime.slots import SlotPool

CPU, CARD, OTHER_CARD = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two nodes of two processors each; a card at 0000:3b:00.0 on node 0, one at 0000:af:00.0 on node 1."""
    for node, cpulist in ((0, "0,2"), (1, "1,3-3")):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{cpulist}\n")
    for address, node in (("0000:3b:00.0", "0"), ("0000:af:00.0", "1"), ("0000:01:00.0", "-1")):
        folder = tmp_path / f"bus/pci/devices/{address}"
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node}\n")
    monkeypatch.setattr(numa, "_SYSFS", tmp_path)
    properties = {0: (0, 0x3B, 0), 1: (0, 0xAF, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(
            **dict(zip(("pci_domain_id", "pci_bus_id", "pci_device_id"), properties[device.index], strict=True))
        ),
    )
    return tmp_path


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, frozenset[int]]]:
    """(thread, processors) of every binding; four processors are allowed, whatever this machine has."""
    calls: list[tuple[str, frozenset[int]]] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(
        os, "sched_setaffinity", lambda _, cpus: calls.append((threading.current_thread().name, frozenset(cpus)))
    )
    return calls


def test_a_cards_node_and_its_processors_are_what_sysfs_says(machine: Path, bound: list[object]) -> None:
    assert numa.node_of_card(CARD) == 0
    assert numa.node_of_card(OTHER_CARD) == 1
    assert numa.processors_of(0) == {0, 2}
    assert numa.processors_of(1) == {1, 3}


def test_where_a_node_is_not_known_nothing_is_bound(
    machine: Path, bound: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert numa.node_of_pci(0, 1, 0) is None, "the system says -1"
    assert numa.node_of_pci(0, 2, 0) is None, "no such device"
    (machine / "bus/pci/devices/0000:3b:00.0/numa_node").write_text("what?\n")
    assert numa.node_of_card(CARD) is None
    assert numa.processors_of(7) == frozenset()
    assert numa.node_of_card(CPU) is None
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    assert numa.node_of_card(OTHER_CARD) is None, "that torch tells no PCI address"
    for device in (CARD, CPU, OTHER_CARD):
        numa.run_near_card(device)
    assert bound == []


def test_a_thread_never_leaves_what_it_may_use(
    machine: Path, bound: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3})
    numa.run_near_card(CARD)
    assert bound == [("MainThread", frozenset({2}))]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1})
    numa.run_near_card(CARD)
    assert len(bound) == 1, "bound elsewhere already, by torchrun --numa-binding or a container: left alone"


def test_memory_of_a_process_is_touched_next_to_its_card(
    machine: Path, bound: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)

    def touch() -> None:
        with numa.near_current_card():
            assert bound == [("MainThread", frozenset({1, 3}))]
            raise MemoryError

    with pytest.raises(MemoryError):
        touch()
    assert bound[-1] == ("MainThread", frozenset({0, 1, 2, 3})), "and back, also after an error"


def test_loaders_of_a_shared_copy_run_on_the_nodes_of_all_cards_in_turn(
    machine: Path, bound: list[tuple[str, frozenset[int]]]
) -> None:
    assert numa.nodes_of_group(CARD, 2) == (0, 1)
    assert numa.nodes_of_group(OTHER_CARD, 1) == (1,)
    assert numa.nodes_of_group(CARD, 8) == (0,), "each process sees its own card only: its node is all that is known"
    assert numa.nodes_of_group(CPU, 2) == ()
    begin = numa.in_turn((0, 1))
    for _ in range(3):
        begin()
    assert [processors for _, processors in bound] == [{0, 2}, {1, 3}, {0, 2}]
    numa.in_turn(())()
    assert len(bound) == 3


def test_prefetcher_and_readers_run_next_to_the_card(
    machine: Path, bound: list[tuple[str, frozenset[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A CPU in the place of the second card: the threads are real, and the question where to run is asked by them.
    monkeypatch.setattr(numa, "node_of_card", lambda device: 1)
    layouts = {0: layer_layout(0)}
    store = RamStore(layouts, CPU)
    store._open_ring()
    prefetcher = Prefetcher(SlotPool(1, layouts[0].nbytes, CPU), store, CPU)
    try:
        store._readers.submit(int).result(10)
        prefetcher.want([0])
        slot = prefetcher.take(0)
        slot.released_event.record()
        prefetcher.give_back(slot, [])
    finally:
        prefetcher.close()
        store.close()
    assert {(name.rstrip("_0123456789"), processors) for name, processors in bound} == {
        ("hf_lema-reader", frozenset({1, 3})),
        ("hf_lema-prefetcher", frozenset({1, 3})),
    }
