"""Boundary activations in host memory: the input of every layer leaves in the forward and returns in the backward.

Responsibility: the page-locked buffer, the two streams of its own, the pair of device buffers for the way back. Knows
nothing of layers, weights or recomputing: a tensor is kept, and later brought back.

Note [who owns a kept tensor]: `keep` returns a host tensor, which autograd saves in place of the one on the device. Its
place in the buffer is free again when autograd lets go of it, whichever way that happens (backward done, graph dropped,
an exception in between): the tensor holds the only reference to a view of the memory, and that view's end is observed.
"""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from dataclasses import dataclass

import torch

from hf_lema.files.layout import align_up
from hf_lema.runtime.events import CopyStream, Event, make_event
from hf_lema.runtime.host_memory import PAGE_BYTES, PAGE_LOCK_ADVICE, HostBuffer
from hf_lema.units import format_bytes


class _Slab:
    """One page-locked buffer with a fixed number of places."""

    def __init__(self, num_places: int, place_bytes: int, device: torch.device) -> None:
        self.place_bytes = place_bytes
        self.num_places = num_places
        self.buffer = HostBuffer(num_places * place_bytes)  # owned
        self.free = deque(range(num_places))
        if device.type == "cuda" and not self.buffer.page_lock():
            warnings.warn(
                f"page-locking {format_bytes(self.buffer.nbytes)} for boundary activations was refused; they travel "
                f"through pageable memory, at a fraction of the bus rate. {PAGE_LOCK_ADVICE}",
                stacklevel=2,
            )

    @property
    def is_idle(self) -> bool:
        return len(self.free) == self.num_places


@dataclass(frozen=True)
class _Kept:
    """One tensor in host memory; `serial` tells it from whatever lies in its place later."""

    serial: int
    bytes_on_host: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype
    written_event: Event


class _Arrival:
    """A device buffer and the kept tensor that is in it, or on its way."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.buffer = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.ready_event: Event = make_event(device)
        self.serial = -1
        self.lent: torch.Tensor | None = None


class Boundaries:
    """Keeps activations in host memory between forward and backward.

    Args:
        device: Where they are computed.
        num_layers: How many are kept in one forward; more are possible, at the price of a second buffer.

    Attributes:
        in_use: Whether visits keep their boundary activations here; may be changed between steps.
        d2h_bytes: Bytes sent to the host so far.
        h2d_bytes: Bytes sent back so far.
    """

    def __init__(self, device: torch.device, num_layers: int) -> None:
        self.in_use = False
        self._device = device
        self._num_layers = num_layers
        self._slabs: list[_Slab] = []
        self._retired: list[_Slab] = []
        self._outward = CopyStream(device)
        self._homeward = CopyStream(device)
        self._arrivals: tuple[_Arrival, ...] = ()
        self._kept: dict[int, _Kept] = {}
        self._serial_at: dict[int, int] = {}
        self._leaving: tuple[torch.Tensor, int, Event] | None = None
        self._num_kept = 0
        self.d2h_bytes = 0
        self.h2d_bytes = 0

    @property
    def pinned_bytes(self) -> int:
        """Page-locked bytes held."""
        return sum(slab.buffer.pinned_bytes for slab in self._slabs + self._retired)

    @property
    def device_bytes(self) -> int:
        """Bytes of the buffers on the device."""
        return sum(arrival.buffer.numel() for arrival in self._arrivals)

    def keep(self, hidden: torch.Tensor) -> torch.Tensor:
        """Sends a tensor to the host; the device memory is held until it has left, at most until the next `keep`.

        Args:
            hidden: A contiguous tensor on the device; nobody may write to it before it has left.

        Returns:
            A host tensor of the same shape and dtype, for `bring`; see Note [who owns a kept tensor].

        Raises:
            RuntimeError: The tensor kept before this one was written to while it left.
        """
        self.settle()
        slab, place = self._claim(hidden.nbytes)
        begin = place * slab.place_bytes
        memory = slab.buffer.memory[begin : begin + hidden.nbytes]
        host = torch.frombuffer(memory, dtype=hidden.dtype).view(hidden.shape)
        serial = self._num_kept
        self._num_kept += 1
        written_event, computed_event = make_event(self._device), make_event(self._device)
        computed_event.record()
        with torch.no_grad(), self._outward.use():
            computed_event.wait()
            host.copy_(hidden, non_blocking=True)
            written_event.record()
        plain = slab.buffer.tensor[begin : begin + hidden.nbytes]
        self._kept[serial] = _Kept(serial, plain, hidden.shape, hidden.dtype, written_event)
        self._serial_at[host.data_ptr()] = serial
        weakref.finalize(memory, self._forget, serial, host.data_ptr(), slab, place).atexit = False
        self._leaving = (hidden, hidden._version, written_event)
        self.d2h_bytes += hidden.nbytes
        return host

    def settle(self) -> None:
        """Lets go of the device memory of the last kept tensor; the stream waits until it has left."""
        if self._leaving is None:
            return
        hidden, version, written_event = self._leaving
        self._leaving = None
        written_event.wait()
        if hidden._version != version:
            raise RuntimeError(
                "the input of a layer was written to in place after the layer was called; its boundary activation is "
                "lost. Keep boundary activations in VRAM (a larger vram_budget), or do not write to it"
            )

    def bring(self, host: torch.Tensor) -> torch.Tensor:
        """The device copy of a kept tensor; the one that was kept before it is fetched meanwhile.

        Args:
            host: What `keep` returned.

        Returns:
            A tensor on the device, valid until the second call from now.
        """
        self.settle()
        kept = self._kept[self._serial_at[host.data_ptr()]]
        largest_bytes = max(slab.place_bytes for slab in self._slabs + self._retired)
        if not self._arrivals or self._arrivals[0].buffer.numel() < largest_bytes:
            self._open_arrivals(largest_bytes)
        here = next((a for a in self._arrivals if a.serial == kept.serial), None)
        if here is None:
            here = self._arrivals[0]
            self._fetch(kept, here)
        before = self._kept.get(kept.serial - 1)
        other = self._arrivals[1] if here is self._arrivals[0] else self._arrivals[0]
        if before is not None and other.serial != before.serial:
            self._fetch(before, other)
        here.ready_event.wait()
        here.lent = tensor = here.buffer[: kept.bytes_on_host.numel()].view(kept.dtype).view(kept.shape)
        return tensor

    def _fetch(self, kept: _Kept, arrival: _Arrival) -> None:
        """Enqueues the way back. Whatever read the buffer before is on the stream already when this is called."""
        if arrival.lent is not None:
            # Autograd then refuses a tensor that it still holds from before instead of reading the new bytes.
            torch.autograd.graph.increment_version(arrival.lent)
            arrival.lent = None
        computed_event = make_event(self._device)
        computed_event.record()
        with torch.no_grad(), self._homeward.use():
            computed_event.wait()
            kept.written_event.wait()
            arrival.buffer[: kept.bytes_on_host.numel()].copy_(kept.bytes_on_host, non_blocking=True)
            arrival.ready_event.record()
        arrival.serial = kept.serial
        self.h2d_bytes += kept.bytes_on_host.numel()

    def _open_arrivals(self, nbytes: int) -> None:
        for arrival in self._arrivals:
            arrival.ready_event.wait()  # nothing may still be on its way into memory that is given back
        self._arrivals = ()
        self._arrivals = tuple(_Arrival(nbytes, self._device) for _ in range(2))

    def _claim(self, nbytes: int) -> tuple[_Slab, int]:
        """A free place of at least so many bytes."""
        if self._retired and all(slab.is_idle for slab in self._retired):
            self._close_slabs(self._retired)
        if self._slabs and nbytes > self._slabs[0].place_bytes:
            self._retired, self._slabs = self._retired + self._slabs, []
        for slab in self._slabs:
            if slab.free:
                return slab, slab.free.popleft()
        # All that are in use have places of one size: whichever is free must be large enough.
        place_bytes = self._slabs[0].place_bytes if self._slabs else align_up(nbytes, PAGE_BYTES)
        slab = _Slab(self._num_layers, place_bytes, self._device)
        self._slabs.append(slab)
        return slab, slab.free.popleft()

    def _forget(self, serial: int, pointer: int, slab: _Slab, place: int) -> None:
        """Autograd has let go of a kept tensor. May run in any thread, at any time."""
        del self._kept[serial]
        if self._serial_at.get(pointer) == serial:
            del self._serial_at[pointer]
        slab.free.append(place)

    def _close_slabs(self, slabs: list[_Slab]) -> None:
        self._outward.synchronize()
        self._homeward.synchronize()
        for slab in slabs:
            slab.buffer.close()
        slabs.clear()

    def close(self) -> None:
        """Gives back page-locks and device buffers. May be called any number of times."""
        self._leaving = None
        self._close_slabs(self._retired)
        self._close_slabs(self._slabs)
        self._arrivals = ()
