"""Streams and events of the device, or their null form where work is done when the call returns.

Responsibility: one vocabulary for both, so that the state machines above run unchanged on a CPU. Knows no layers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

import torch


class Event(Protocol):
    """What this package uses of ``torch.cuda.Event``."""

    def record(self) -> None:
        """Marks the current point of the current stream."""

    def wait(self) -> None:
        """Makes the current stream wait for the mark."""

    def synchronize(self) -> None:
        """Blocks the host until the mark is reached."""


class NullEvent:
    """An event of a device without streams: always reached."""

    def record(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def synchronize(self) -> None:
        pass


class DeviceEvent:
    """A CUDA event on the current stream of its own device, whichever device is the current one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event = torch.cuda.Event()

    def record(self) -> None:
        self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> None:
        self._event.wait(torch.cuda.current_stream(self._device))

    def synchronize(self) -> None:
        self._event.synchronize()


def make_event(device: torch.device) -> Event:
    """A new event of the device."""
    return DeviceEvent(device) if device.type == "cuda" else NullEvent()


class CopyStream:
    """The one stream on which layers travel to the device.

    Args:
        device: A CUDA device, or a CPU, where it does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def use(self) -> AbstractContextManager[object]:
        """Makes it the current stream of the calling thread."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def synchronize(self) -> None:
        """Blocks the host until everything on it is done; for the end of a life, never for a step."""
        if self._stream is not None:
            self._stream.synchronize()


class StreamWaitClock:
    """Seconds that the current stream stood still at waits, measured on the device without ever blocking the host.

    A pair of timing events brackets each wait; pairs are read once the device has passed them.

    Args:
        device: A CUDA device, or a CPU, where nothing is measured (waits block the host there and are timed there).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._total_s = 0.0

    @contextmanager
    def around(self) -> Iterator[None]:
        """Times the waits that are put on the current stream inside the ``with`` block."""
        if self._device.type != "cuda":
            yield
            return
        self.total_s()  # keeps the queue short where nobody asks
        stream = torch.cuda.current_stream(self._device)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(stream)
        yield
        end.record(stream)
        self._pending.append((begin, end))

    def total_s(self) -> float:
        """Seconds of all waits that the device has passed so far."""
        while self._pending and self._pending[0][1].query():
            begin, end = self._pending.popleft()
            self._total_s += begin.elapsed_time(end) / 1e3
        return self._total_s
