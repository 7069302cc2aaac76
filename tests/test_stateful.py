"""Whatever is done to a streamer, in any order: a visit sees its layer's bytes of now, and nothing is lost or hangs.

Hypothesis draws the orders; reads are held up at a gate while other things happen.
"""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from fake_store import CPU, FakeStore, bounded
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from hf_lema.runtime.schedule import Direction
from hf_lema.runtime.slots import SlotState
from hf_lema.runtime.streamer import LayerStreamer

MAX_LAYERS = 6


class StreamerMachine(RuleBasedStateMachine):
    """A streamer over a store whose reads may be held up; layers are visited, changed, made resident, in any order."""

    enqueues = False

    @initialize(num_layers=st.integers(1, MAX_LAYERS), num_slots=st.integers(2, 5), unlike=st.booleans())
    def start(self, num_layers: int, num_slots: int, unlike: bool) -> None:
        sizes = {i: 16 + 8 * (i % 3 if unlike else 0) for i in range(num_layers)}
        self.store = FakeStore(sizes, enqueues=self.enqueues)
        self.streamer = LayerStreamer(self.store, CPU, num_layers, num_slots)
        self.versions = dict.fromkeys(range(num_layers), 0)
        self.bytes_at_last_count = 0

    def layer(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.versions)))

    def visit(self, layer_idx: int, direction: Direction, expect_backward: bool, error: bool = False) -> None:
        def lease() -> None:
            with self.streamer.lease(layer_idx, direction, expect_backward=expect_backward) as weights:
                for name, view in self.store.host_views(layer_idx).items():
                    assert torch.equal(weights[name], view), f"layer {layer_idx}: {name}"
                if error:
                    raise KeyError("on purpose")

        self.store.gate.set()
        if error:
            with pytest.raises(KeyError):
                bounded(lease)
        else:
            bounded(lease)

    @rule(data=st.data(), direction=st.sampled_from(Direction), expect=st.booleans(), error=st.booleans())
    def visit_any_layer(self, data: st.DataObject, direction: Direction, expect: bool, error: bool) -> None:
        self.visit(self.layer(data), direction, expect, error)

    @rule(lowest=st.integers(0, MAX_LAYERS))
    def train_a_step(self, lowest: int) -> None:
        layers = sorted(self.versions)
        for i in layers:
            self.visit(i, Direction.FORWARD, i >= lowest)
        for i in reversed(layers):
            if i >= lowest:
                self.visit(i, Direction.BACKWARD, False)

    @precondition(lambda self: not self.enqueues)
    @rule()
    def hold_reads_up(self) -> None:
        self.store.gate.clear()

    @rule(data=st.data())
    def change_a_layer(self, data: st.DataObject) -> None:
        layer_idx = self.layer(data)
        # A change of the host's bytes comes between visits; a read that is under way ends first, with old bytes.
        self.store.gate.set()
        self.versions[layer_idx] += 1
        bounded(lambda: (self.store.write(layer_idx, self.versions[layer_idx]), self.streamer.invalidate(layer_idx)))

    @rule(data=st.data())
    def choose_residents(self, data: st.DataObject) -> None:
        layers = data.draw(st.sets(st.sampled_from(sorted(self.versions))))
        self.streamer.set_resident(sorted(layers))
        assert self.streamer.resident_layers == tuple(sorted(layers))

    @invariant()
    def slots_are_consistent(self) -> None:
        if not hasattr(self, "streamer"):
            return
        prefetcher: Any = self.streamer._prefetcher
        with prefetcher._changed:
            held = [slot.layer_idx for slot in prefetcher._pool.slots if slot.layer_idx is not None]
            assert len(held) == len(set(held)), "a layer in two slots"
            assert all(slot.state is not SlotState.LEASED for slot in prefetcher._pool.slots), (
                "a lease that never ended"
            )
            assert prefetcher._error is None
        moved = self.streamer.stats().h2d_bytes
        assert moved >= self.bytes_at_last_count
        self.bytes_at_last_count = moved

    def teardown(self) -> None:
        if hasattr(self, "streamer"):
            self.store.gate.set()
            bounded(self.streamer.close)
            assert self.store.num_closes == 1


class EnqueuingMachine(StreamerMachine):
    """The same over a store that only enqueues: there is no thread."""

    enqueues = True


def run(machine: type[StreamerMachine], num_examples: int, num_steps: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=num_examples,
            stateful_step_count=num_steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )


@pytest.mark.parametrize("machine", [StreamerMachine, EnqueuingMachine])
def test_any_order_of_visits_changes_and_choices_lends_the_bytes_of_now(machine: type[StreamerMachine]) -> None:
    run(machine, num_examples=30, num_steps=20)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("machine", [StreamerMachine, EnqueuingMachine])
def test_a_thousand_random_orders_lend_the_bytes_of_now(machine: type[StreamerMachine]) -> None:
    run(machine, num_examples=1000, num_steps=40)
