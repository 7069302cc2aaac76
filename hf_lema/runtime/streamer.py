"""The runtime of one wrapped model: store, slots, prefetcher and schedule put together.

Responsibility: ``with streamer.lease(layer_idx, direction) as weights``, the resident layers, statistics, `close`.
Knows nothing of transformers or peft.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from hf_lema.runtime.events import StreamWaitClock
from hf_lema.runtime.host_store import HostStore
from hf_lema.runtime.prefetcher import Prefetcher
from hf_lema.runtime.schedule import Direction, Schedule, transfers_per_step
from hf_lema.runtime.slots import Slot, SlotPool, SlotState


@dataclass(frozen=True, kw_only=True)
class StreamerStats:
    """Counters since the streamer was made.

    Attributes:
        num_hits: Visits whose layer had been asked for before.
        num_demand_loads: Visits that had to ask for their layer.
        wait_s: Seconds that visits waited for a layer: the host in the prefetcher, the compute stream on the device.
        disk_bytes: Bytes read from files.
        h2d_bytes: Bytes sent from the host to the device.
    """

    num_hits: int
    num_demand_loads: int
    wait_s: float
    disk_bytes: int
    h2d_bytes: int


class Closeable(Protocol):
    """Whatever holds threads, page-locks, files or device memory."""

    def close(self) -> None:
        """Gives them back. May be called any number of times."""


class PageLocking(Closeable, Protocol):
    """Whatever may hold page-locked memory."""

    @property
    def pinned_bytes(self) -> int:
        """Page-locked bytes held."""


class LayerStreamer:
    """Lends the weights of decoder layers to their visits.

    Args:
        store: The streamed tensors of every layer, on the host.
        device: Where layers compute.
        num_layers: Decoder layers of the model; those absent from the store have nothing to stream.
        num_slots: Device buffers shared by the streamed layers.
    """

    def __init__(self, store: HostStore, device: torch.device, num_layers: int, num_slots: int) -> None:
        self.host_store = store  # owned
        self.device = device
        self.num_layers = num_layers
        self.num_slots = num_slots
        self.closed = False
        self._owner_pid = os.getpid()
        self.streamable_layers = tuple(sorted(store.layouts))
        self.layer_bytes = max((layout.nbytes for layout in store.layouts.values()), default=0)
        self._residents: dict[int, _Resident] = {}
        self._schedule = Schedule(self.streamable_layers)
        self._lowest: int | None = None
        self._final_stats: StreamerStats | None = None
        self._depth = 0
        self._wait_clock = StreamWaitClock(device)
        self._prefetcher: Prefetcher | None = None  # owned
        if self.streamable_layers:
            pool = SlotPool(num_slots, self.layer_bytes, device)
            self._prefetcher = Prefetcher(pool, store, device)
        self._owned: list[Closeable] = [store]
        self._page_locking: list[PageLocking] = [store]
        if self._prefetcher is not None:
            self._owned.insert(0, self._prefetcher)
        # A model that is dropped without close() must not leave its thread and page-locked memory behind.
        self._finalizer = weakref.finalize(self, _close_from_anywhere, self._owned, self._owner_pid)
        self._finalizer.atexit = False

    @property
    def resident_layers(self) -> tuple[int, ...]:
        """Layers whose weights stay on the device."""
        return tuple(sorted(self._residents))

    @property
    def num_streamed(self) -> int:
        """Layers that are fetched at every visit."""
        return len(self._schedule.layers)

    @property
    def num_resident(self) -> int:
        """Layers that stay on the device, those with nothing to stream included."""
        return self.num_layers - self.num_streamed

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the layers that are fetched at every visit."""
        return sum(self.host_store.layouts[i].nbytes for i in self._schedule.layers)

    @property
    def pinned_bytes(self) -> int:
        """Page-locked bytes of everything that `close` gives back."""
        return sum(resource.pinned_bytes for resource in self._page_locking)

    def transfers_per_step(self, lowest: int = 0) -> int:
        """Layer transfers that one training step makes once the sweep repeats: 2N less the reuse at the turns."""
        return transfers_per_step(self._schedule.layers, self.num_layers, self.num_slots, lowest)

    def stats(self) -> StreamerStats:
        """A snapshot of the counters; after `close`, the last one."""
        if self._final_stats is not None:
            return self._final_stats
        prefetcher = self._prefetcher
        return StreamerStats(
            num_hits=prefetcher.num_hits if prefetcher else 0,
            num_demand_loads=prefetcher.num_demand_loads if prefetcher else 0,
            wait_s=(prefetcher.wait_s if prefetcher else 0.0) + self._wait_clock.total_s(),
            disk_bytes=self.host_store.disk_bytes,
            h2d_bytes=prefetcher.h2d_bytes if prefetcher else 0,
        )

    def set_resident(self, layers: Sequence[int]) -> None:
        """Keeps these layers on the device from now on and streams the others. Only between steps.

        They get their memory at once, and their weights at their next visit; the host copy stays, so that a resident
        layer can be streamed again at once.
        """
        unknown = [i for i in layers if i not in self.host_store.layouts]
        if unknown:
            raise ValueError(f"layers {unknown} are not streamed; streamed layers are {list(self.streamable_layers)}")
        self._residents = {i: self._residents.get(i) or self._new_resident(i) for i in layers}
        self._schedule = Schedule([i for i in self.streamable_layers if i not in self._residents])

    def _new_resident(self, layer_idx: int) -> _Resident:
        return _Resident(self.host_store.layouts[layer_idx].nbytes, self.device)

    def is_in_place(self, layer_idx: int) -> bool:
        """Whether a resident layer is on the device already, so that every visit is lent the same memory."""
        resident = self._residents.get(layer_idx)
        return resident is not None and resident.slot is not None

    @contextmanager
    def lease(
        self, layer_idx: int, direction: Direction, *, expect_backward: bool = False
    ) -> Iterator[dict[str, nn.Parameter]]:
        """Lends a layer's streamed tensors on the device for one visit.

        Args:
            layer_idx: The layer.
            direction: Which way the sweep goes.
            expect_backward: For a forward visit: whether a backward visit of this layer will follow.

        Yields:
            Name relative to the layer -> parameter on the device, valid until the ``with`` block ends.

        Raises:
            RuntimeError: After `close`; if the prefetch thread failed (cause attached); if all slots are leased.
        """
        if not 0 <= layer_idx < self.num_layers:
            raise ValueError(f"layer {layer_idx} does not exist; the model has {self.num_layers} layers")
        if self.closed:
            raise RuntimeError(f"layer {layer_idx} was asked for after close(); wrap the model again to use it")
        if os.getpid() != self._owner_pid:
            raise RuntimeError("a wrapped model cannot run in a forked child process; wrap it in the child")
        if direction is Direction.FORWARD:
            self._note_turn(layer_idx, expect_backward)
        self._depth += 1
        try:
            with self._leased(layer_idx, direction) as weights:
                yield weights
        finally:
            self._depth -= 1

    @contextmanager
    def _leased(self, layer_idx: int, direction: Direction) -> Iterator[dict[str, nn.Parameter]]:
        layout = self.host_store.layouts.get(layer_idx)
        if layout is None:
            yield {}
            return
        prefetcher = self._prefetcher
        assert prefetcher is not None
        if self._depth == 1:
            prefetcher.end_stale_leases()
        resident = self._residents.get(layer_idx)
        if resident is not None and resident.slot is not None:
            yield resident.slot.parameters(layout)
            prefetcher.want(self._wanted_after(layer_idx, direction))
            return
        slot = prefetcher.take(layer_idx)
        try:
            with self._wait_clock.around():
                slot.ready_event.wait()
            # Not the slot's memory: the graph of a kept visit would still lie there when the slot holds another layer.
            lent = slot if resident is None else resident.keep(slot)
            yield lent.parameters(layout)
        finally:
            slot.released_event.record()
            prefetcher.give_back(slot, self._wanted_after(layer_idx, direction))

    def _note_turn(self, layer_idx: int, expect_backward: bool) -> None:
        """Learns the lowest layer of the coming backward: the first visit of a sweep that will be followed by one."""
        if not expect_backward:
            self._lowest = None
        elif self._lowest is None or layer_idx <= self._lowest:
            self._lowest = layer_idx

    def _wanted_after(self, layer_idx: int, direction: Direction) -> list[int]:
        return self._schedule.first_needed(self.num_slots, layer_idx, direction, self._lowest)

    def invalidate(self, layer_idx: int) -> None:
        """Host bytes of a layer have changed: nothing on the device may be read for it any more."""
        self.host_store.mark_changed(layer_idx)
        self._forget(layer_idx)

    def invalidate_if_changed(self, layer_idx: int, *, was_visited: bool) -> None:
        """The same where it is not known whether the bytes have changed.

        Args:
            layer_idx: The layer.
            was_visited: Whether a slot may hold it from before; one that was never visited is fetched after the change.
        """
        if self.host_store.mark_if_changed(layer_idx) or was_visited:
            self._forget(layer_idx)

    def _forget(self, layer_idx: int) -> None:
        if layer_idx in self._residents:
            self._residents[layer_idx] = self._new_resident(layer_idx)
        if self._prefetcher is not None and not self.closed:
            self._prefetcher.invalidate(layer_idx)

    def own(self, resource: PageLocking) -> None:
        """Takes over something that is to be closed with the streamer, before what it was made from."""
        self._owned.insert(0, resource)
        self._page_locking.append(resource)

    def close(self) -> None:
        """Ends the thread, gives back slots, page-locks and files. May be called any number of times.

        The weights at rest stay readable. Does nothing in a forked child.
        """
        if os.getpid() != self._owner_pid or not self._finalizer.alive:
            return
        self._final_stats = self._final_stats or self.stats()
        self.closed = True
        for resource in self._owned:
            resource.close()
        self._residents.clear()
        # Only now: an interrupted close can be called again.
        self._prefetcher = None
        self._finalizer.detach()


def _close_from_anywhere(owned: list[Closeable], owner_pid: int) -> None:
    """Closes what a dropped streamer owned, in a thread: the garbage collector may run on a thread to be joined."""
    if os.getpid() != owner_pid:
        return

    def close() -> None:
        for resource in owned:
            resource.close()

    threading.Thread(target=close, name="hf_lema-closer", daemon=True).start()


class _Resident:
    """A layer that stays on the device; its own slot is filled from the shared one at its first visit."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self._buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.slot: Slot | None = None

    def keep(self, slot: Slot) -> Slot:
        """Copies what is in a shared slot; the slot of its own."""
        with torch.inference_mode(False), torch.no_grad():
            own = Slot(-1, self._buffer.copy_(slot.buffer[: len(self._buffer)]))
        own.move_to(SlotState.FILLING, slot.layer_idx)
        own.move_to(SlotState.READY, slot.layer_idx)
        self.slot = own
        return own
