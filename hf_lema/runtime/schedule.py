"""Which layers come next. Pure integers: knows nothing of tensors, devices or threads.

A training step visits the layers 0..N-1 in the forward and N-1..lowest in the backward, then starts again at 0. A sweep
of this kind defeats a least-recently-used cache; the best set to hold is the one that is needed soonest (Belady 1966),
which is known here in advance.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from itertools import chain, islice


class Direction(enum.Enum):
    """Which way a sweep passes through the layers."""

    FORWARD = "forward"
    BACKWARD = "backward"


class Schedule:
    """Predicts the order of visits over the streamed layers of one model.

    Args:
        layers: The streamed layers' indices, ascending (resident layers are not in it).
    """

    def __init__(self, layers: Sequence[int]) -> None:
        if list(layers) != sorted(set(layers)):
            raise ValueError(f"layers must be ascending and distinct, got {list(layers)}")
        self.layers = tuple(layers)

    def upcoming(self, layer_idx: int, direction: Direction, lowest: int | None) -> Iterator[int]:
        """Yields the streamed layers in the order of their next use after the visit of ``layer_idx``.

        Args:
            layer_idx: The layer visited now (streamed or resident).
            direction: Which way the visit goes.
            lowest: The lowest layer that the backward of this step reaches; None if no backward is expected.

        Yields:
            Each streamed layer once, soonest first.
        """
        above = [i for i in self.layers if i > layer_idx]
        if direction is Direction.FORWARD:
            turn = [] if lowest is None else [i for i in reversed(self.layers) if i >= lowest]
            order = chain(above, turn, self.layers)
        else:
            below = [i for i in reversed(self.layers) if (lowest or 0) <= i < layer_idx]
            order = chain(below, self.layers)
        seen: set[int] = set()
        for i in order:
            if i not in seen:
                seen.add(i)
                yield i

    def first_needed(self, num_slots: int, layer_idx: int, direction: Direction, lowest: int | None) -> list[int]:
        """The layers worth holding in ``num_slots`` slots after the visit of ``layer_idx``, soonest first."""
        return list(islice(self.upcoming(layer_idx, direction, lowest), num_slots))


def transfers_per_step(layers: Sequence[int], num_layers: int, num_slots: int, lowest: int = 0) -> int:
    """How many layer transfers one training step makes once the sweep repeats.

    Exactly so many where the backward reaches layer 0; with ``lowest`` above it at most so many, since a slow fetch may
    keep a layer in its slot that a fast one would have replaced.

    With all N layers streamed and S slots this is ``2N - 2S``: the S layers around each turn are still in their slots.
    Found by walking the schedule that the prefetcher follows, not by a formula, so that it also holds for a subset of
    streamed layers.

    Args:
        layers: The streamed layers, ascending.
        num_layers: Layers of the model, resident ones included.
        num_slots: Slots that the streamed layers share.
        lowest: The lowest layer that the backward reaches.
    """
    schedule = Schedule(layers)
    streamed = set(layers)
    held: set[int] = set()
    count = 0
    for _ in range(3):  # the first two fill the slots; the third repeats for good
        count = 0
        visits = [(i, Direction.FORWARD) for i in range(num_layers)]
        visits += [(i, Direction.BACKWARD) for i in reversed(range(lowest, num_layers))]
        for layer_idx, direction in visits:
            # A forward below `lowest` has no graph yet, so the turn is not known there (see LayerStreamer.lease).
            known = lowest if direction is Direction.BACKWARD or layer_idx >= lowest else None
            if layer_idx in streamed:
                count += layer_idx not in held
                held.add(layer_idx)
            wanted = set(schedule.first_needed(num_slots, layer_idx, direction, known))
            count += len(wanted - held)
            held = wanted
    return count


def spread_evenly(num_chosen: int, num_layers: int) -> tuple[int, ...]:
    """Chooses ``num_chosen`` of ``num_layers`` indices, as evenly over the depth as integers allow.

    Resident layers between streamed ones give the copy stream compute to hide behind everywhere in the sweep.
    """
    if not 0 <= num_chosen <= num_layers:
        raise ValueError(f"cannot choose {num_chosen} of {num_layers} layers")
    return tuple((2 * i + 1) * num_layers // (2 * num_chosen) for i in range(num_chosen))


def choose_resident(num_chosen: int, layers: Sequence[int], slow_layers: Sequence[int] = ()) -> tuple[int, ...]:
    """Chooses the layers that stay on the device: first those that are slow to fetch, each kind spread evenly.

    Args:
        num_chosen: How many.
        layers: Those that can be chosen, ascending.
        slow_layers: Those of them that are read from files; all or none where they are alike.

    Returns:
        Layer indices, ascending.

    Raises:
        ValueError: More are to be chosen than there are.
    """
    slow = [i for i in layers if i in set(slow_layers)]
    fast = [i for i in layers if i not in set(slow_layers)]
    num_slow = min(num_chosen, len(slow))
    chosen = [slow[i] for i in spread_evenly(num_slow, len(slow))]
    return tuple(sorted([*chosen, *(fast[i] for i in spread_evenly(num_chosen - num_slow, len(fast)))]))
