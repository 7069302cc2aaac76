"""Fixed device buffers of one layer each, and who may touch them when.

Responsibility: `Slot`, `SlotState`, `SlotPool`. Knows nothing of files or threads: its caller holds the lock.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import nn

from hf_lema.files.layout import LayerLayout
from hf_lema.runtime.events import Event, make_event

if TYPE_CHECKING:
    from hf_lema.runtime.quantization import LentMatrices


class SlotState(enum.Enum):
    """What a slot is doing. Its buffer occupies device memory in every state.

    ::

        FREE --begin_fill--> FILLING --finish_fill--> READY --acquire--> LEASED --release--> READY
        READY --begin_fill--> FILLING         (the layer in it is not needed soonest any more)
        READY --discard--> FREE               (its layer changed on the host)
        FILLING --discard--> FREE             (the fill failed)

    FREE: holds nothing of use. FILLING: the prefetcher owns it. READY: holds a whole layer, or will when `ready_event`
    is reached on the device. LEASED: a visit reads it.
    """

    FREE = "free"
    FILLING = "filling"
    READY = "ready"
    LEASED = "leased"


_EDGES = {
    (SlotState.FREE, SlotState.FILLING),
    (SlotState.READY, SlotState.FILLING),
    (SlotState.FILLING, SlotState.READY),
    (SlotState.READY, SlotState.LEASED),
    (SlotState.LEASED, SlotState.READY),
    (SlotState.READY, SlotState.FREE),
    (SlotState.FILLING, SlotState.FREE),
}


class Slot:
    """One device buffer.

    Note [slot views]: the parameters handed to a visit are views of `buffer` made once per layout, each with a version
    counter of its own (PEFT's parametrizations bump the one that they touch). Every fill bumps them all: autograd then
    refuses to use a tensor that it saved from an earlier layer instead of computing with the wrong bytes. What is
    packed to 4 bits has a guard of its own: Note [packed views] in quantization.py.

    Attributes:
        buffer: 1-D uint8 tensor on the device, as large as the largest layer.
        state: See `SlotState`.
        layer_idx: The layer in it; None when FREE.
        ready_event: Reached when the fill is complete on the device.
        released_event: Reached when the last visit's kernels have run.
        generation: Number of fills begun so far.
    """

    def __init__(self, index: int, buffer: torch.Tensor) -> None:
        self.index = index
        self.buffer = buffer
        self.state = SlotState.FREE
        self.layer_idx: int | None = None
        self.ready_event: Event = make_event(buffer.device)
        self.released_event: Event = make_event(buffer.device)
        self.generation = 0
        self._views: dict[tuple[object, ...], dict[str, nn.Parameter]] = {}
        self._packed: dict[tuple[object, ...], LentMatrices] = {}
        # By the layout's identity: its tensors would be hashed at every visit.
        self._of_layout: dict[int, tuple[LayerLayout, dict[str, nn.Parameter], LentMatrices | None]] = {}

    def move_to(self, state: SlotState, layer_idx: int | None) -> None:
        """The one place where the state changes."""
        if (self.state, state) not in _EDGES:
            raise RuntimeError(f"slot {self.index} (layer {self.layer_idx}) cannot go from {self.state} to {state}")
        self.state = state
        self.layer_idx = layer_idx

    def parameters(self, layout: LayerLayout) -> dict[str, nn.Parameter]:
        """The layer's tensors as parameters that need no gradient, for one visit; see Note [slot views]."""
        found = self._of_layout.get(id(layout))
        if found is None:
            key = (layout.tensors, layout.packed)
            if key not in self._views:
                with torch.inference_mode(False):  # made in an evaluation, they must still serve training
                    self._make_views(key, layout)
            found = self._of_layout[id(layout)] = (layout, self._views[key], self._packed.get(key))
        _, views, packed = found
        return views if packed is None else packed.lend()

    def _make_views(self, key: tuple[object, ...], layout: LayerLayout) -> None:
        self._views[key] = {
            name: nn.Parameter(view.data, requires_grad=False) for name, view in layout.views(self.buffer).items()
        }
        if layout.packed:
            from hf_lema.runtime.quantization import LentMatrices  # bitsandbytes is not needed where nothing is packed

            self._packed[key] = LentMatrices(layout, self._views[key], self)

    def begin_fill(self, layer_idx: int) -> None:
        """Another layer's bytes are on their way; see Note [slot views]."""
        self.move_to(SlotState.FILLING, layer_idx)
        self.generation += 1
        for views in self._views.values():
            for view in views.values():
                torch.autograd.graph.increment_version(view)


class SlotPool:
    """The slots that all streamed layers of a model share.

    Args:
        num_slots: How many.
        slot_bytes: Size of each: the largest layer.
        device: Where they lie.
    """

    def __init__(self, num_slots: int, slot_bytes: int, device: torch.device) -> None:
        self.slots = [Slot(i, torch.empty(slot_bytes, dtype=torch.uint8, device=device)) for i in range(num_slots)]

    def find(self, layer_idx: int) -> Slot | None:
        """The slot that holds or is being filled with the layer."""
        return next((slot for slot in self.slots if slot.layer_idx == layer_idx), None)

    def begin_fill(self, layer_idx: int, keep: Collection[int]) -> Slot | None:
        """Claims a slot for a layer: a FREE one, else a READY one whose layer is not to be kept, else None."""
        free = [slot for slot in self.slots if slot.state is SlotState.FREE]
        spare = [slot for slot in self.slots if slot.state is SlotState.READY and slot.layer_idx not in keep]
        chosen = next(iter(free + spare), None)
        if chosen is not None:
            chosen.begin_fill(layer_idx)
        return chosen

    def finish_fill(self, slot: Slot) -> None:
        """The layer is in the slot, or will be when its `ready_event` is reached."""
        slot.move_to(SlotState.READY, slot.layer_idx)

    def acquire(self, slot: Slot) -> None:
        """A visit begins to read the slot."""
        slot.move_to(SlotState.LEASED, slot.layer_idx)

    def release(self, slot: Slot) -> None:
        """The visit is over; the layer stays until the slot is needed for another."""
        slot.move_to(SlotState.READY, slot.layer_idx)

    def discard(self, slot: Slot) -> None:
        """What is in the slot must not be read any more."""
        slot.move_to(SlotState.FREE, None)

    @property
    def num_not_leased(self) -> int:
        """Slots that can be filled before a lease ends."""
        return sum(slot.state is not SlotState.LEASED for slot in self.slots)
