"""The conditions of a forward visit that its recompute must meet again: random state and autocast.

Responsibility: capture and re-enter. Knows no layers. What ``torch.utils.checkpoint`` preserves is preserved here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RandomState:
    """Random state of the host and of one device."""

    device: torch.device
    cpu: torch.Tensor
    cuda: torch.Tensor | None

    @classmethod
    def capture(cls, device: torch.device) -> RandomState:
        """The state now. Reads no device memory: CUDA's generator keeps its offset on the host."""
        cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Makes this the state."""
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """This state inside the block; afterwards the one from before it."""
        outside = RandomState.capture(self.device)
        self.restore()
        try:
            yield
        finally:
            outside.restore()


@dataclass(frozen=True)
class AutocastState:
    """Autocast settings of the device's type and of the CPU."""

    settings: tuple[tuple[str, bool, torch.dtype], ...]
    cache_enabled: bool

    @classmethod
    def capture(cls, device: torch.device) -> AutocastState:
        """The settings now."""
        types = ("cpu",) if device.type == "cpu" else ("cpu", device.type)
        settings = tuple((t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types)
        return cls(settings, torch.is_autocast_cache_enabled())

    @contextmanager
    def entered(self) -> Iterator[None]:
        """These settings inside the block."""
        with ExitStack() as stack:
            for device_type, enabled, dtype in self.settings:
                stack.enter_context(
                    torch.autocast(device_type, enabled=enabled, dtype=dtype, cache_enabled=self.cache_enabled)
                )
            yield
