"""What the runtime's tests share: a store in memory whose reads wait for permission, and calls that may not hang."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from hf_lema.files.layout import LayerLayout, make_layout
from hf_lema.runtime.host_store import HostStore
from hf_lema.runtime.prefetcher import Prefetcher
from hf_lema.runtime.slots import SlotState

CPU = torch.device("cpu")
MAX_WAIT_S = 5.0
"""Longest that a test waits for anything: a hang is a failure, not a hanging test."""

T = TypeVar("T")


def layer_layout(layer_idx: int, num_elements: int = 64) -> LayerLayout:
    """One float32 vector ``w`` and a small int64 one, so that a layer has padding inside."""
    return make_layout(layer_idx, {"w": ((num_elements,), torch.float32), "n": ((3,), torch.int64)})


class FakeStore(HostStore):
    """Layers whose bytes say which layer and which version of it they are.

    Args:
        num_elements: Layer index -> length of its vector ``w``.
        on_read: Called on the reading thread with (layer index, target) before a byte is written.
        enqueues: Whether it says of itself that reads never block.

    Attributes:
        gate: Reads wait until it is set; set at first.
        started: The layers whose reads have begun, in order.
        max_concurrent_reads: Most reads that were ever under way at once.
        failures: Layer index -> exception that its next read raises.
    """

    tier = "ram"

    def __init__(
        self,
        num_elements: Mapping[int, int],
        on_read: Callable[[int, torch.Tensor], None] = lambda layer_idx, out: None,
        enqueues: bool = False,
    ) -> None:
        super().__init__({i: layer_layout(i, n) for i, n in num_elements.items()}, CPU)
        self._enqueues = enqueues
        self.gate = threading.Event()
        self.gate.set()
        self.on_read = on_read
        self.started: list[int] = []
        self.changed: list[int] = []
        self.failures: dict[int, BaseException] = {}
        self.max_concurrent_reads = 0
        self.num_closes = 0
        self.reader_threads: set[threading.Thread] = set()
        self._num_reading = 0
        self._begun = threading.Condition()
        self._buffers = {i: torch.zeros(layout.nbytes, dtype=torch.uint8) for i, layout in self.layouts.items()}
        for layer_idx in self.layouts:
            self.write(layer_idx, 0)

    @property
    def enqueues(self) -> bool:
        return self._enqueues

    def bytes_of(self, layer_idx: int) -> torch.Tensor:
        """What a read of the layer must give now: 1-D uint8, a copy."""
        return self._buffers[layer_idx].clone()

    def write(self, layer_idx: int, version: int) -> None:
        """Gives the host bytes of a layer a new version."""
        views = self.host_views(layer_idx)
        views["w"].copy_(torch.arange(views["w"].numel()) + 1000.0 * layer_idx + version / 8)
        views["n"].copy_(torch.tensor([layer_idx, version, -1]))

    def host_views(self, layer_idx: int) -> dict[str, torch.Tensor]:
        return self.layouts[layer_idx].views(self._buffers[layer_idx])

    def read_into(self, layer_idx: int, out: torch.Tensor) -> None:
        with self._begun:
            self.started.append(layer_idx)
            self.reader_threads.add(threading.current_thread())
            self._num_reading += 1
            self.max_concurrent_reads = max(self.max_concurrent_reads, self._num_reading)
            self._begun.notify_all()
        try:
            self.on_read(layer_idx, out)
            assert self.gate.wait(MAX_WAIT_S), f"nobody let the read of layer {layer_idx} pass"
            if layer_idx in self.failures:
                out.fill_(0xEE)  # a read that fails half-way leaves rubbish
                raise self.failures.pop(layer_idx)
            out.copy_(self._buffers[layer_idx])
        finally:
            with self._begun:
                self._num_reading -= 1

    def wait_until_started(self, *layers: int) -> None:
        """Waits until the reads begun so far are exactly these, in this order."""
        with self._begun:
            reached = self._begun.wait_for(lambda: len(self.started) >= len(layers), MAX_WAIT_S)
        assert reached, f"expected reads of {layers}, got {self.started}"
        assert self.started == list(layers)

    def mark_changed(self, layer_idx: int) -> None:
        self.changed.append(layer_idx)

    def mark_if_changed(self, layer_idx: int) -> None:
        self.changed.append(layer_idx)

    def close(self) -> None:
        self.num_closes += 1
        super().close()


def in_thread(call: Callable[[], T]) -> Callable[[], T]:
    """Starts a call in a thread of its own; the result waits for it, with a bound, and gives its value or exception."""
    values: list[T] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            values.append(call())
        except BaseException as error:  # noqa: BLE001  handed to the caller below
            errors.append(error)

    thread = threading.Thread(target=body, daemon=True, name="test-caller")
    thread.start()

    def result() -> T:
        thread.join(MAX_WAIT_S)
        assert not thread.is_alive(), f"{call} hangs"
        if errors:
            raise errors[0]
        return values[0]

    return result


def bounded(call: Callable[[], T]) -> T:
    """The value of a call that must not hang."""
    return in_thread(call)()


def wait_until(condition: Callable[[], bool]) -> None:
    """Waits, with a bound, for something that nobody announces."""
    pause = threading.Event()
    for _ in range(int(MAX_WAIT_S / 0.002)):
        if condition():
            return
        pause.wait(0.002)
    raise AssertionError("what was waited for does not come")


def wait_until_idle(prefetcher: Prefetcher) -> None:
    """Waits until nothing is being filled and every wanted layer that can have a slot has one, or the thread failed."""

    def idle() -> bool:
        slots = prefetcher._pool.slots
        filling = any(slot.state is SlotState.FILLING for slot in slots)
        missing = [i for i in prefetcher._wanted if prefetcher._pool.find(i) is None]
        spare = [
            slot
            for slot in slots
            if slot.state is SlotState.FREE
            or (slot.state is SlotState.READY and slot.layer_idx not in prefetcher._wanted)
        ]
        return prefetcher._error is not None or (not filling and not (missing and spare))

    with prefetcher._changed:
        assert prefetcher._changed.wait_for(idle, MAX_WAIT_S), "the prefetcher does not come to rest"
