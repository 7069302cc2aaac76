"""The bytes of the streamed layers on the host, and the way from there into a device buffer.

Responsibility: `RamStore` (one exact-size shared slab), `DiskStore` (positioned reads through a small ring),
`read_into(layer_idx, out)`, and the tensors that a weight at rest is registered as. Knows nothing of slots, of the
order of layers, or of autograd.

Note [one source of truth]: the tensors of `host_views` are what the model registers while a layer is at rest, and what
every later read must give. In the RAM tier they are the slab itself, so a write to them is seen by the next read. In
the disk tier they are a private mapping of the file: a write makes private pages, and the layer must be named to
`mark_changed`, after which it is read from that mapping and no more from the file.
"""

from __future__ import annotations

import abc
import mmap
import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from hf_lema.files.file_set import FileSet, ReadSpan, read_spans_into
from hf_lema.files.layout import LayerLayout
from hf_lema.runtime.events import Event, make_event
from hf_lema.runtime.host_memory import PAGE_LOCK_ADVICE, HostBuffer, has_private_pages, map_private, tensor_over
from hf_lema.runtime.numa import run_near_card
from hf_lema.units import format_bytes

WINDOW_BYTES = 32 * 2**20
"""Bytes of one read and one copy. Large enough for the disk's sequential rate and the bus, and that the few calls
around each read, which wait for the interpreter lock, do not count; small enough that a ring holds a good many."""

NUM_READERS = min(8, os.cpu_count() or 1)
"""Reader threads. From the page cache one reaches 6 to 8 GB/s on an H100 host, four 21 to 30 GB/s."""

MAX_RING_BYTES = 512 * 2**20


def ring_bytes(largest_layer_bytes: int, max_bytes: int = MAX_RING_BYTES) -> int:
    """Bytes of the windows between files and a GPU: two layers, or what the limit leaves, and at least two windows."""
    wanted = 2 * -(-largest_layer_bytes // WINDOW_BYTES)
    return max(2, min(wanted, max_bytes // WINDOW_BYTES)) * WINDOW_BYTES


class StagingRing:
    """A few page-locked windows between pageable bytes and the device, reused in turn.

    Each window has an event that is recorded behind its copy; a window is filled again only after that event.
    """

    def __init__(self, num_windows: int, device: torch.device) -> None:
        self._buffer = HostBuffer(num_windows * WINDOW_BYTES)
        if not self._buffer.page_lock():
            warnings.warn(
                f"page-locking {format_bytes(self._buffer.nbytes)} of host memory was refused; copies to the GPU go "
                f"through pageable memory, at a fraction of the bus rate. {PAGE_LOCK_ADVICE}",
                stacklevel=2,
            )
        self._windows = self._buffer.tensor.split(WINDOW_BYTES)
        self._copied: list[Event] = [make_event(device) for _ in self._windows]
        self._next = 0

    @property
    def num_windows(self) -> int:
        return len(self._windows)

    @property
    def pinned_bytes(self) -> int:
        return self._buffer.pinned_bytes

    def claim(self) -> tuple[torch.Tensor, Event]:
        """The next window, once its last copy is over, and the event to record behind its next copy."""
        window, copied = self._windows[self._next], self._copied[self._next]
        self._next = (self._next + 1) % self.num_windows
        copied.synchronize()
        return window, copied

    def close(self) -> None:
        for copied in self._copied:
            copied.synchronize()
        self._buffer.close()


class HostStore(abc.ABC):
    """Where streamed layers live on the host.

    Args:
        layouts: Layout of every streamed layer, by layer index.
        device: Where `read_into` will write.

    Attributes:
        tier: ``"ram"``, ``"disk"``, or ``"mixed"`` for some layers each.
        layouts: As given.
        disk_bytes: Bytes read from files so far.
        is_shared: Whether other processes read the same memory: nothing may be written to it any more.
    """

    tier: str
    is_shared = False

    def __init__(self, layouts: Mapping[int, LayerLayout], device: torch.device) -> None:
        self.layouts = dict(layouts)
        self.device = device
        self.disk_bytes = 0
        self._ring: StagingRing | None = None  # owned
        self._readers: ThreadPoolExecutor | None = None  # owned

    @property
    def pinned_bytes(self) -> int:
        """Page-locked bytes held."""
        return self._ring.pinned_bytes if self._ring is not None else 0

    @property
    def held_bytes(self) -> int:
        """Bytes of RAM that the layers take."""
        return 0

    @property
    def file_layers(self) -> tuple[int, ...]:
        """Layers that are read from files at every visit."""
        return ()

    @property
    def paths(self) -> frozenset[Path]:
        """Files that layers are read from at every visit."""
        return frozenset()

    @property
    def enqueues(self) -> bool:
        """Whether `read_into` only enqueues work on the stream, and never blocks the host."""
        return False

    @abc.abstractmethod
    def host_views(self, layer_idx: int) -> dict[str, torch.Tensor]:
        """Name -> host tensor of true shape and dtype; see Note [one source of truth]."""

    @abc.abstractmethod
    def read_into(self, layer_idx: int, out: torch.Tensor) -> None:
        """Puts a layer's bytes into ``out`` (1-D uint8 on the device, ``layout.nbytes`` long), in stream order.

        Called on one thread at a time. On a GPU the copies are enqueued on the current stream and may still run when
        this returns.
        """

    @abc.abstractmethod
    def mark_changed(self, layer_idx: int) -> None:
        """Says that the tensors of `host_views` were written to; later reads give the new values."""

    @abc.abstractmethod
    def mark_if_changed(self, layer_idx: int) -> bool:
        """The same where it is not known whether they were written to; returns whether reads differ from before."""

    def refuse_cut_files(self) -> None:
        """To be called before tensors of `host_views` are read, where that is no part of a step.

        Raises:
            ValueError: A file that they are a mapping of was cut: to touch what is gone would end the process (SIGBUS).
        """
        return  # most stores have none

    def close(self) -> None:
        """Gives back page-locks, threads and files. May be called any number of times."""
        if self._readers is not None:
            self._readers.shutdown(wait=True)
            self._readers = None
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def _open_ring(self, max_bytes: int = MAX_RING_BYTES) -> None:
        if self.device.type == "cuda":
            largest_bytes = max(layout.nbytes for layout in self.layouts.values())
            self._ring = StagingRing(ring_bytes(largest_bytes, max_bytes) // WINDOW_BYTES, self.device)
        self._readers = ThreadPoolExecutor(
            NUM_READERS, thread_name_prefix="hf_lema-reader", initializer=run_near_card, initargs=(self.device,)
        )
        try:
            self._start_readers(self._readers)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def _start_readers(readers: ThreadPoolExecutor) -> None:
        """Starts every thread. A pool waits until it lacks one: a system that has none left would stop a run midway."""
        go = threading.Event()
        try:
            waits = [readers.submit(go.wait) for _ in range(NUM_READERS)]
        finally:
            go.set()
        _wait_for_all(waits)

    def _copy_through_ring(self, out: torch.Tensor, fill: Callable[[int, torch.Tensor], None]) -> None:
        """Fills ``out`` window by window: ``fill(begin, window)`` runs on the readers, copies follow in order."""
        assert self._readers is not None
        if self._ring is None:
            reads = [
                self._readers.submit(fill, begin, out[begin : begin + WINDOW_BYTES])
                for begin in range(0, out.numel(), WINDOW_BYTES)
            ]
            _wait_for_all(reads)
            return
        pending: deque[tuple[Future[None], int, torch.Tensor, Event]] = deque()
        begins = iter(range(0, out.numel(), WINDOW_BYTES))
        try:
            while True:
                begin = next(begins, None)
                # Two windows are left to copies under way, so that the bus has the next when one ends.
                if begin is None or len(pending) >= max(1, self._ring.num_windows - 2):
                    if not pending:
                        return
                    read, at, window, copied = pending.popleft()
                    read.result()
                    out[at : at + window.numel()].copy_(window, non_blocking=True)
                    copied.record()
                if begin is not None:
                    window, copied = self._ring.claim()
                    window = window[: min(WINDOW_BYTES, out.numel() - begin)]
                    pending.append((self._readers.submit(fill, begin, window), begin, window, copied))
        finally:
            _wait_for_all([read for read, *_ in pending])


def _wait_for_all(reads: Sequence[Future[Any]]) -> None:
    """Waits for every read, then raises the first error: no reader may still write when the buffer goes back."""
    errors = [error for read in reads if (error := read.exception()) is not None]
    if errors:
        raise errors[0]


class RamStore(HostStore):
    """All streamed layers in one shared slab of exact size.

    Fill `host_views` (or `layer_buffer`) of every layer, then call `seal`.

    Args:
        layouts: Layout of every streamed layer, by layer index.
        device: Where `read_into` will write.
        is_shared: Whether other processes will map the slab, or have made it.
        of: Descriptor of another process's slab, filled already; owned from here on.
    """

    tier = "ram"

    def __init__(
        self,
        layouts: Mapping[int, LayerLayout],
        device: torch.device,
        is_shared: bool = False,
        of: int | None = None,
    ) -> None:
        super().__init__(layouts, device)
        self.is_shared = is_shared
        self._offsets: dict[int, int] = {}
        end_bytes = 0
        for layer_idx, layout in self.layouts.items():
            self._offsets[layer_idx] = end_bytes
            end_bytes += layout.nbytes
        self._slab = HostBuffer(end_bytes, of=of, is_shared=is_shared and of is None)

    def take_descriptor(self) -> int:
        """The slab for other processes; the caller closes it. May be called once, on a slab that was made shared."""
        return self._slab.take_descriptor()

    @property
    def pinned_bytes(self) -> int:
        return self._slab.pinned_bytes + super().pinned_bytes

    @property
    def enqueues(self) -> bool:
        return self._slab.pinned_bytes > 0

    @property
    def held_bytes(self) -> int:
        return self._slab.nbytes

    def layer_buffer(self, layer_idx: int) -> torch.Tensor:
        """The layer's own part of the slab: 1-D uint8, ``layout.nbytes`` long."""
        begin = self._offsets[layer_idx]
        return self._slab.tensor[begin : begin + self.layouts[layer_idx].nbytes]

    def seal(self) -> None:
        """Page-locks the filled slab; where that is refused, opens the ring."""
        if self.device.type != "cuda" or not self.layouts or self._slab.page_lock():
            return
        self._open_ring()
        if self._ring is not None and self._ring.pinned_bytes:
            warnings.warn(
                f"page-locking {format_bytes(self.held_bytes)} of host memory was refused; copies to the GPU go "
                f"through a page-locked ring of {format_bytes(self._ring.pinned_bytes)}. {PAGE_LOCK_ADVICE}",
                stacklevel=2,
            )

    def make_read_only(self) -> None:
        """Has the kernel stop every later write of this process; for a sealed slab that another process has filled."""
        self._slab.make_read_only()

    def host_views(self, layer_idx: int) -> dict[str, torch.Tensor]:
        begin = self._offsets[layer_idx]
        return {
            spec.name: tensor_over(self._slab.memory, begin + spec.offset_bytes, spec.shape, spec.dtype)
            for spec in self.layouts[layer_idx].tensors
        }

    def read_into(self, layer_idx: int, out: torch.Tensor) -> None:
        source = self.layer_buffer(layer_idx)
        if self._ring is None:
            out.copy_(source, non_blocking=True)
        else:
            self._copy_through_ring(out, lambda begin, w: _copy_bytes(source[begin : begin + w.numel()], w))

    def mark_changed(self, layer_idx: int) -> None:
        """Nothing to do: the slab is what is read."""

    def mark_if_changed(self, layer_idx: int) -> bool:
        """Nothing to do: the slab is what is read."""
        return False

    def close(self) -> None:
        super().close()
        self._slab.close()


def _copy_bytes(source: torch.Tensor, out: torch.Tensor) -> None:
    out.copy_(source)


class DiskStore(HostStore):
    """Layers read from files at every visit; host memory holds a ring of windows and nothing else.

    Args:
        layouts: Layout of every streamed layer, by layer index.
        spans: Where each layer's bytes lie, by layer index.
        device: Where `read_into` will write.
        max_ring_bytes: Most page-locked bytes for the ring (GPU only).
        files: The files that the spans name, as they were indexed; owned from here on. As they are now if None.
    """

    tier = "disk"

    def __init__(
        self,
        layouts: Mapping[int, LayerLayout],
        spans: Mapping[int, Sequence[ReadSpan]],
        device: torch.device,
        max_ring_bytes: int = MAX_RING_BYTES,
        files: FileSet | None = None,
    ) -> None:
        super().__init__(layouts, device)
        self._spans = {layer_idx: tuple(spans[layer_idx]) for layer_idx in self.layouts}
        if files is None:
            paths = {span.path for layer_spans in self._spans.values() for span in layer_spans}
            files = FileSet({path: path.stat().st_size for path in paths})
        self._files = files  # owned
        try:
            self._mapped = {path: map_private(descriptor) for path, descriptor in files.open_all().items()}
        except BaseException:
            files.close()
            raise
        self._windows = {
            layer_idx: [
                cut_spans(self._spans[layer_idx], begin, begin + WINDOW_BYTES)
                for begin in range(0, layout.nbytes, WINDOW_BYTES)
            ]
            for layer_idx, layout in self.layouts.items()
        }
        self._changed: set[int] = set()
        if self.layouts:
            self._open_ring(max_ring_bytes)

    @property
    def file_layers(self) -> tuple[int, ...]:
        return tuple(sorted(self.layouts))

    @property
    def paths(self) -> frozenset[Path]:
        return frozenset(self._mapped)

    def host_views(self, layer_idx: int) -> dict[str, torch.Tensor]:
        views = {}
        for spec in self.layouts[layer_idx].tensors:
            span = self._span_of(layer_idx, spec.offset_bytes, spec.nbytes)
            begin = span.file_offset_bytes + spec.offset_bytes - span.layer_offset_bytes
            views[spec.name] = tensor_over(self._mapped[span.path], begin, spec.shape, spec.dtype)
        return views

    def _span_of(self, layer_idx: int, offset_bytes: int, nbytes: int) -> ReadSpan:
        for span in self._spans[layer_idx]:
            if span.layer_offset_bytes <= offset_bytes and (
                offset_bytes + nbytes <= span.layer_offset_bytes + span.nbytes
            ):
                return span
        raise ValueError(f"layer {layer_idx}: bytes {offset_bytes} to {offset_bytes + nbytes} lie in no one span")

    def read_into(self, layer_idx: int, out: torch.Tensor) -> None:
        if layer_idx in self._changed:
            views = self.layouts[layer_idx].views(out)
            for name, source in self.host_views(layer_idx).items():
                views[name].copy_(source)
            return
        windows = self._windows[layer_idx]
        self._copy_through_ring(out, lambda begin, w: read_spans_into(self._files, windows[begin // WINDOW_BYTES], w))
        self.disk_bytes += sum(span.nbytes for span in self._spans[layer_idx])

    def mark_changed(self, layer_idx: int) -> None:
        self._changed.add(layer_idx)

    def mark_if_changed(self, layer_idx: int) -> bool:
        firsts = {id(self._mapped[span.path]): span for span in self._spans[layer_idx]}.values()
        if any(has_private_pages(tensor_over(self._mapped[span.path], 0, (1,), torch.uint8)) for span in firsts):
            self._changed.add(layer_idx)
        return layer_idx in self._changed

    def refuse_cut_files(self) -> None:
        for path, memory in self._mapped.items():
            mapping: mmap.mmap = memory.obj  # type: ignore[assignment]
            if mapping.size() < len(memory):
                raise ValueError(
                    f"{path} has {mapping.size()} bytes left of {len(memory)}: it was cut while in use, and its layers "
                    "cannot be read any more. Fetch it again, and load the model again. The adapter can be saved"
                )

    def close(self) -> None:
        super().close()
        self._files.close()


def cut_spans(spans: Sequence[ReadSpan], begin: int, end: int) -> tuple[ReadSpan, ...]:
    """The parts of spans that lie in bytes ``begin..end`` of the layer, with offsets counted from ``begin``."""
    parts = []
    for span in spans:
        first = max(span.layer_offset_bytes, begin)
        last = min(span.layer_offset_bytes + span.nbytes, end)
        if first < last:
            parts.append(
                ReadSpan(
                    path=span.path,
                    file_offset_bytes=span.file_offset_bytes + first - span.layer_offset_bytes,
                    nbytes=last - first,
                    layer_offset_bytes=first - begin,
                )
            )
    return tuple(parts)
