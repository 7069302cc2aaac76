"""How training steps are run: what a plan decides, and what may change between steps.

Responsibility: `StepChoices`, and what is asked of a plan that holds them. Knows no models and no devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, kw_only=True)
class StepChoices:
    """Where things lie during a training step, and in which parts it computes.

    The defaults are the fastest way where memory is no question; each other value saves device memory.

    Attributes:
        micro_batch_size: Sequences that a layer computes on at a time; 0 for the whole batch.
        forward_micro_batch_size: Sequences that a layer's forward computes on at a time, which keeps no graph and takes
            less memory for each of them; rounded down to whole micro-batches, 0 for one of these.
        tile_tokens: Tokens on which the token-wise part of a layer computes at a time; 0 for all.
        boundaries_in_ram: Whether the inputs of layers wait for the backward in host memory.
        outside_in_ram: Whether embedding and head lie in host memory.
        resident_layers: Layers whose weights stay on the device.
        kept_layers: Layers whose activations stay on the device from the forward to the backward instead of being
            recomputed. Those that compute in tiles are recomputed in any case, and those in 4 bits unless they are
            resident; a forward of the others computes on one micro-batch at a time.

    Raises:
        ValueError: A size is negative or no whole number, or a kept layer is no index or is given twice.
    """

    micro_batch_size: int = 0
    forward_micro_batch_size: int = 0
    tile_tokens: int = 0
    boundaries_in_ram: bool = False
    outside_in_ram: bool = False
    resident_layers: tuple[int, ...] = ()
    kept_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("micro_batch_size", "forward_micro_batch_size", "tile_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a whole number, 0 for no cut, got {value!r}")
        kept = tuple(self.kept_layers)  # from JSON it is a list
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in kept) or len(set(kept)) < len(kept):
            raise ValueError(f"kept_layers must be indices of layers, each once, got {self.kept_layers!r}")
        object.__setattr__(self, "kept_layers", kept)


@runtime_checkable
class StepPlan(Protocol):
    """What `LemaConfig` takes of a `MemoryPlan`, which is made far above this file."""

    @property
    def contender(self) -> str:
        """What kind of training was planned: ``"lema"`` for a streamed one."""

    @property
    def model(self) -> str:
        """Name of the model that was planned."""

    @property
    def num_layers(self) -> int:
        """Its decoder layers."""

    @property
    def batch_size(self) -> int:
        """Sequences that were planned for."""

    @property
    def seq_len(self) -> int:
        """Tokens of each."""

    @property
    def activation_bytes(self) -> int:
        """The most that a part of a step computes with."""

    @property
    def choices(self) -> StepChoices:
        """What the plan decides."""
