"""Keeps the slots filled with the layers that are needed soonest: the background thread and its copy stream.

Responsibility: `want`, `take`, `give_back`, `invalidate`, `close`; the lock around the slot pool; the copy stream.
Knows nothing of autograd or transformers. The first exception of the thread comes back at the next `take`.

Note [who enqueues]: a fill from page-locked RAM is two calls that enqueue work and return. The thread that frees the
slot makes them itself: handed to the background thread, they waited for the interpreter lock, which a thread that
launches kernels hardly ever lets go (H100, 7B, 1 x 512 tokens: the bus stood still for 20 % of the step). Fills that
block the host (disk, memory that is not page-locked, a CPU) belong to the background thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from hf_lema.runtime.events import CopyStream
from hf_lema.runtime.host_store import HostStore
from hf_lema.runtime.numa import run_near_card
from hf_lema.runtime.slots import Slot, SlotPool, SlotState

_MAX_WAIT_S = 60.0
"""Longest wait on the condition before the state is looked at again; a lost wake-up costs this, not a hang."""


class _Changed(threading.Condition):
    """A condition that an interrupt in the middle of ``wait`` may leave released: what is raised is that interrupt."""

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        except RuntimeError:
            if error[0] is None:
                raise


class Prefetcher:
    """Fills slots ahead of the visits.

    Args:
        pool: The slots; from here on only touched under this object's lock.
        store: Where the bytes come from.
        device: Where they go.

    Attributes:
        num_hits: Visits whose layer had been asked for before.
        num_demand_loads: Visits that had to ask.
        wait_s: Seconds that `take` blocked the host.
        h2d_bytes: Bytes sent to the device.
    """

    def __init__(self, pool: SlotPool, store: HostStore, device: torch.device) -> None:
        self._pool = pool
        self._store = store
        self._device = device
        self._copy_stream = CopyStream(device)  # owned
        self._wanted: list[int] = []
        self._error: BaseException | None = None
        self._failed_layer = -1  # whose read ended in the error
        self._closing = False
        self._changed = _Changed()
        self.num_hits = 0
        self.num_demand_loads = 0
        self.wait_s = 0.0
        self.h2d_bytes = 0
        self._thread = threading.Thread(target=self._run, name="hf_lema-prefetcher", daemon=True)  # owned
        if not store.enqueues:
            self._thread.start()

    def want(self, layers: Sequence[int]) -> None:
        """Names the layers to hold, soonest first; replaces what was named before."""
        with self._changed:
            self._wanted = list(layers)
            self._start_fills()

    def take(self, layer_idx: int) -> Slot:
        """Waits until the layer is in a slot (on a GPU: until its copy is enqueued) and leases that slot.

        The caller makes its stream wait for ``slot.ready_event`` before it reads.

        Raises:
            RuntimeError: The prefetcher is closed; its thread failed (the cause is attached); or every slot is leased.
        """
        begin_s = time.perf_counter()
        with self._changed:
            self._check_alive(layer_idx)
            slot = self._pool.find(layer_idx)
            if slot is not None or layer_idx in self._wanted:
                self.num_hits += 1
            else:
                self.num_demand_loads += 1
            if slot is None and self._pool.num_not_leased == 0:
                raise RuntimeError(
                    f"layer {layer_idx} was asked for while all {len(self._pool.slots)} slots are leased: one layer "
                    "runs inside another, which streaming does not support"
                )
            if slot is not None and slot.state is SlotState.LEASED:
                raise RuntimeError(
                    f"layer {layer_idx} was asked for while a visit of it is under way: it runs inside itself, or in "
                    "two threads at once, which streaming does not support"
                )
            if slot is None or slot.state is SlotState.FILLING:
                slot = self._want_first(layer_idx)
            while slot is None or slot.state is not SlotState.READY:
                self._changed.wait(_MAX_WAIT_S)
                self._check_alive(layer_idx)
                slot = self._pool.find(layer_idx) or self._want_first(layer_idx)
            self._pool.acquire(slot)
        self.wait_s += time.perf_counter() - begin_s
        return slot

    def _want_first(self, layer_idx: int) -> Slot | None:
        """Makes a layer the soonest wanted: also one under way, or its slot may be refilled once it is there."""
        others = [i for i in self._wanted if i != layer_idx]
        self._wanted = [layer_idx, *others][: self._pool.num_not_leased]
        self._start_fills()
        return self._pool.find(layer_idx)

    def give_back(self, slot: Slot, wanted: Sequence[int]) -> None:
        """Ends a lease; ``slot.released_event`` must have been recorded. Names the layers wanted from here on."""
        with self._changed:
            self._pool.release(slot)
            self._wanted = list(wanted)
            self._start_fills()

    def invalidate(self, layer_idx: int) -> None:
        """Forgets what slots hold of a layer, whose bytes on the host have changed."""
        with self._changed:
            slot = self._pool.find(layer_idx)
            while slot is not None and slot.state is SlotState.FILLING:
                self._changed.wait(_MAX_WAIT_S)
                self._check_alive(layer_idx)
                slot = self._pool.find(layer_idx)
            if slot is not None:
                self._pool.discard(slot)
            self._wanted = [i for i in self._wanted if i != layer_idx]
            self._start_fills()

    def end_stale_leases(self) -> None:
        """Ends leases and locks that an interrupt left behind. Only where no visit is under way."""
        self._let_go()
        with self._changed:
            for slot in self._pool.slots:
                if slot.state is SlotState.LEASED:
                    slot.released_event.record()
                    self._pool.release(slot)

    def close(self) -> None:
        """Ends the thread and waits for its copies. May be called any number of times."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._let_go()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()
        self._copy_stream.synchronize()
        self._pool.slots.clear()  # the device memory goes back now, not when the last reference to this object does

    def _let_go(self) -> None:
        """Releases what an interrupt has left locked, one between the taking of a lock and the block after it.

        The thread that was interrupted goes on as the lock's owner, and the background thread would wait for ever.
        """
        with suppress(RuntimeError):  # not, or no longer, the owner
            while True:
                self._changed.release()

    def _check_alive(self, layer_idx: int) -> None:
        if self._error is not None:
            raise RuntimeError(
                f"the prefetch thread failed; layer {layer_idx} cannot be fetched. Reading layer {self._failed_layer} "
                f"ended in {type(self._error).__name__}: {self._error}. Once that is mended, load the model again and "
                "resume from the last checkpoint"
            ) from self._error
        if self._closing:
            raise RuntimeError(f"layer {layer_idx} was asked for after close(); wrap the model again to use it")

    def _next_fill(self) -> tuple[int, Slot] | None:
        """The soonest wanted layer that is in no slot, with a slot claimed for it."""
        for layer_idx in self._wanted:
            if self._pool.find(layer_idx) is None:
                slot = self._pool.begin_fill(layer_idx, keep=self._wanted)
                return None if slot is None else (layer_idx, slot)
        return None

    def _start_fills(self) -> None:
        """Has the wanted layers filled; see Note [who enqueues]. Called with the lock held."""
        if not self._store.enqueues:
            self._changed.notify_all()
            return
        while not self._closing and (fill := self._next_fill()) is not None:
            try:
                self._enqueue(*fill)
            except BaseException:
                self._pool.discard(fill[1])
                raise
            self._finish(*fill)

    def _run(self) -> None:
        run_near_card(self._device)
        while True:
            with self._changed:
                fill = self._next_fill() if not self._closing else None
                while fill is None and not self._closing:
                    self._changed.wait(_MAX_WAIT_S)
                    fill = self._next_fill() if not self._closing else None
                if fill is None:
                    return
            try:
                self._fill(*fill)
            except BaseException as error:  # noqa: BLE001 - carried to the training thread; `take` raises it
                with self._changed:
                    self._pool.discard(fill[1])
                    self._error, self._failed_layer = error, fill[0]
                    self._changed.notify_all()
                return

    def _fill(self, layer_idx: int, slot: Slot) -> None:
        self._enqueue(layer_idx, slot)
        with self._changed:
            self._finish(layer_idx, slot)
            self._changed.notify_all()

    def _enqueue(self, layer_idx: int, slot: Slot) -> None:
        with torch.no_grad(), self._copy_stream.use():
            slot.released_event.wait()
            self._store.read_into(layer_idx, slot.buffer[: self._store.layouts[layer_idx].nbytes])
            slot.ready_event.record()

    def _finish(self, layer_idx: int, slot: Slot) -> None:
        self.h2d_bytes += self._store.layouts[layer_idx].nbytes
        self._pool.finish_fill(slot)
