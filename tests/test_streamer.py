"""The runtime put together: what a step moves, what a lease lends, and how everything ends."""

from __future__ import annotations

import gc
import os
import random
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from fake_store import CPU, MAX_WAIT_S, FakeStore, bounded, in_thread, wait_until, wait_until_idle

from hf_lema.files.layout import make_layout
from hf_lema.runtime.events import StreamWaitClock
from hf_lema.runtime.host_store import RamStore
from hf_lema.runtime.prefetcher import Prefetcher
from hf_lema.runtime.schedule import Direction
from hf_lema.runtime.slots import SlotState
from hf_lema.runtime.streamer import LayerStreamer

FORWARD, BACKWARD = Direction.FORWARD, Direction.BACKWARD

both_ways = pytest.mark.parametrize("enqueues", [False, True], ids=["in the background", "enqueued"])


@contextmanager
def streaming(
    num_layers: int = 5, num_slots: int = 2, *, absent: Sequence[int] = (), enqueues: bool = False, sizes: object = None
) -> Iterator[tuple[LayerStreamer, FakeStore]]:
    num_elements = {i: (sizes[i] if sizes else 64) for i in range(num_layers) if i not in absent}  # type: ignore[index]
    store = FakeStore(num_elements, enqueues=enqueues)
    streamer = LayerStreamer(store, CPU, num_layers, num_slots)
    try:
        yield streamer, store
    finally:
        store.gate.set()
        bounded(streamer.close)


def prefetcher_of(streamer: LayerStreamer) -> Prefetcher:
    assert streamer._prefetcher is not None
    return streamer._prefetcher


def visit(
    streamer: LayerStreamer, store: FakeStore, layer_idx: int, direction: Direction, *, expect_backward: bool = False
) -> None:
    """One lease, which must lend the layer's own bytes."""
    with streamer.lease(layer_idx, direction, expect_backward=expect_backward) as weights:
        if layer_idx not in store.layouts:
            assert weights == {}
            return
        expected = store.host_views(layer_idx)
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, expected[name]), f"layer {layer_idx}: wrong bytes in {name}"


def training_step(streamer: LayerStreamer, store: FakeStore, lowest: int = 0, *, unhurried: bool = False) -> None:
    """All visits of a step; ``unhurried`` lets every fetch end before the next visit begins."""
    visits = [(i, FORWARD) for i in range(streamer.num_layers)]
    visits += [(i, BACKWARD) for i in reversed(range(lowest, streamer.num_layers))]
    for layer_idx, direction in visits:
        visit(streamer, store, layer_idx, direction, expect_backward=direction is FORWARD and layer_idx >= lowest)
        if unhurried:
            wait_until_idle(prefetcher_of(streamer))


def evaluation(streamer: LayerStreamer, store: FakeStore) -> None:
    for layer_idx in range(streamer.num_layers):
        visit(streamer, store, layer_idx, FORWARD)


def at_rest(streamer: LayerStreamer) -> int:
    """Bytes moved so far, once nothing is on its way any more."""
    wait_until_idle(prefetcher_of(streamer))
    return streamer.stats().h2d_bytes


# ---- what a step moves ----


@both_ways
@pytest.mark.parametrize("seed", range(8))
def test_steps_move_what_the_schedule_predicts(seed: int, enqueues: bool) -> None:
    rng = random.Random(seed)
    for _ in range(6):
        num_layers, num_slots = rng.randint(1, 9), rng.randint(2, 5)
        absent = rng.sample(range(num_layers), rng.randint(0, max(0, num_layers - 2)) if rng.random() < 0.3 else 0)
        lowest = rng.choice([0, 0, rng.randrange(num_layers)])
        with streaming(num_layers, num_slots, absent=absent, enqueues=enqueues) as (streamer, store):
            resident = rng.sample(streamer.streamable_layers, rng.randint(0, len(streamer.streamable_layers)))
            streamer.set_resident(resident if rng.random() < 0.5 else [])
            # A layer that leaves the wanted ones for less time than a fetch takes need not be fetched again. That can
            # happen where the backward does not go all the way down, and a step then moves less than predicted.
            unhurried = lowest > 0 and not enqueues
            bounded(lambda: training_step(streamer, store, lowest, unhurried=unhurried))  # noqa: B023
            cold_bytes = at_rest(streamer)
            for _ in range(3):
                bounded(lambda: training_step(streamer, store, lowest, unhurried=unhurried))  # noqa: B023

            found = at_rest(streamer) - cold_bytes
            predicted = 3 * streamer.transfers_per_step(lowest) * streamer.layer_bytes
            case = (num_layers, num_slots, absent, streamer.resident_layers, lowest)
            assert found == predicted, case


@pytest.mark.parametrize("seed", range(3))
def test_hurried_steps_move_no_more_than_the_schedule_predicts(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(6):
        num_layers, num_slots = rng.randint(1, 9), rng.randint(2, 5)
        lowest = rng.randrange(num_layers)
        with streaming(num_layers, num_slots) as (streamer, store):
            bounded(lambda: training_step(streamer, store, lowest))  # noqa: B023
            cold_bytes = at_rest(streamer)
            bounded(lambda: [training_step(streamer, store, lowest) for _ in range(3)])  # noqa: B023
            predicted = 3 * streamer.transfers_per_step(lowest) * streamer.layer_bytes
            assert at_rest(streamer) - cold_bytes <= predicted, (num_layers, num_slots, lowest)


@both_ways
def test_a_step_moves_2n_minus_2s_layers_when_all_are_streamed(enqueues: bool) -> None:
    with streaming(7, 3, enqueues=enqueues) as (streamer, store):
        bounded(lambda: training_step(streamer, store))
        before = at_rest(streamer)
        bounded(lambda: training_step(streamer, store))
        assert at_rest(streamer) - before == (2 * 7 - 2 * 3) * streamer.layer_bytes


@both_ways
def test_an_evaluation_moves_every_layer_once(enqueues: bool) -> None:
    with streaming(6, 2, enqueues=enqueues) as (streamer, store):
        bounded(lambda: evaluation(streamer, store))
        before = at_rest(streamer)
        for _ in range(3):
            bounded(lambda: evaluation(streamer, store))
        assert at_rest(streamer) - before == 3 * 6 * streamer.layer_bytes


@both_ways
@pytest.mark.parametrize("lowest", [0, 2, 4])
def test_only_the_very_first_visit_has_to_ask(lowest: int, enqueues: bool) -> None:
    with streaming(5, 2, enqueues=enqueues) as (streamer, store):
        for _ in range(2):
            bounded(lambda: training_step(streamer, store, lowest))
            bounded(lambda: evaluation(streamer, store))
            bounded(lambda: training_step(streamer, store, lowest))
        stats = streamer.stats()
        num_visits = 4 * (10 - lowest) + 2 * 5
        assert (stats.num_demand_loads, stats.num_hits) == (1, num_visits - 1)


@both_ways
def test_gradient_accumulation_is_one_sweep_after_another(enqueues: bool) -> None:
    with streaming(5, 2, enqueues=enqueues) as (streamer, store):
        bounded(lambda: [training_step(streamer, store) for _ in range(4)])
        assert streamer.stats().num_demand_loads == 1


@both_ways
def test_two_forwards_before_two_backwards_give_the_right_weights(enqueues: bool) -> None:
    with streaming(5, 2, enqueues=enqueues) as (streamer, store):

        def step() -> None:
            for _ in range(2):
                for layer_idx in range(5):
                    visit(streamer, store, layer_idx, FORWARD, expect_backward=True)
            for _ in range(2):
                for layer_idx in reversed(range(5)):
                    visit(streamer, store, layer_idx, BACKWARD)

        bounded(step)


@both_ways
def test_layers_of_unlike_sizes_get_their_own_bytes(enqueues: bool) -> None:
    with streaming(5, 2, sizes=[1, 300, 64, 7, 129], enqueues=enqueues) as (streamer, store):
        assert streamer.layer_bytes == store.layouts[1].nbytes
        bounded(lambda: [training_step(streamer, store, lowest=1) for _ in range(3)])


@both_ways
def test_any_order_of_visits_gives_the_right_weights(enqueues: bool) -> None:
    rng = random.Random(7)
    with streaming(6, 3, enqueues=enqueues) as (streamer, store):

        def visits() -> None:
            for at in range(300):
                if rng.random() < 0.05:
                    streamer.set_resident(rng.sample(range(6), rng.randint(0, 6)))
                layer_idx = rng.randrange(6)
                if rng.random() < 0.1:
                    store.write(layer_idx, at)
                    streamer.invalidate(layer_idx)
                visit(streamer, store, layer_idx, rng.choice([FORWARD, BACKWARD]), expect_backward=rng.random() < 0.5)

        bounded(visits)


def test_a_model_with_nothing_to_stream_runs_without_a_thread() -> None:
    before = threading.enumerate()
    streamer = LayerStreamer(RamStore({}, CPU), CPU, 3, 2)
    with streamer.lease(1, FORWARD) as weights:
        assert weights == {}
    assert threading.enumerate() == before
    assert (streamer.num_streamed, streamer.num_resident, streamer.layer_bytes) == (0, 3, 0)
    assert streamer.stats().h2d_bytes == 0
    streamer.close()


# ---- residents ----


@both_ways
def test_a_resident_layer_moves_once(enqueues: bool) -> None:
    with streaming(4, 2, enqueues=enqueues) as (streamer, store):
        streamer.set_resident([0, 1, 2, 3])
        bounded(lambda: training_step(streamer, store))
        before = at_rest(streamer)
        assert before == 4 * streamer.layer_bytes
        bounded(lambda: [training_step(streamer, store) for _ in range(2)])
        assert at_rest(streamer) == before
        assert (streamer.num_resident, streamer.num_streamed, streamer.streamed_bytes) == (4, 0, 0)


@both_ways
def test_a_resident_layer_can_be_streamed_again(enqueues: bool) -> None:
    with streaming(4, 2, enqueues=enqueues) as (streamer, store):
        streamer.set_resident([1, 2])
        bounded(lambda: training_step(streamer, store))
        streamer.set_resident([2])
        assert streamer.resident_layers == (2,)
        assert streamer.streamed_bytes == 3 * streamer.layer_bytes
        bounded(lambda: training_step(streamer, store))
        before = at_rest(streamer)
        bounded(lambda: training_step(streamer, store))
        assert at_rest(streamer) - before == (2 * 3 - 2 * 2) * streamer.layer_bytes


def test_a_resident_layer_keeps_its_copy_when_the_set_changes_around_it() -> None:
    with streaming(4, 2) as (streamer, store):
        streamer.set_resident([1])
        bounded(lambda: training_step(streamer, store))
        before = store.started.count(1)
        streamer.set_resident([0, 1])
        bounded(lambda: training_step(streamer, store))
        assert store.started.count(1) == before


@both_ways
def test_a_changed_resident_layer_is_fetched_again(enqueues: bool) -> None:
    with streaming(4, 2, enqueues=enqueues) as (streamer, store):
        streamer.set_resident([1])
        bounded(lambda: training_step(streamer, store))
        store.write(1, 5)
        streamer.invalidate(1)
        bounded(lambda: training_step(streamer, store))  # `visit` compares with the new bytes
        assert store.changed == [1]
        assert streamer.resident_layers == (1,)


def test_layers_that_are_not_in_the_store_cannot_be_made_resident() -> None:
    with streaming(4, absent=[1, 3]) as (streamer, _), pytest.raises(ValueError, match=r"layers \[1, 3, 9\]"):
        streamer.set_resident([0, 1, 3, 9])


@pytest.mark.parametrize("resident", [[], [0]], ids=["streamed", "resident"])
def test_a_first_visit_under_inference_mode_does_not_spoil_later_training(resident: list[int]) -> None:
    with streaming(2) as (streamer, store):
        streamer.set_resident(resident)
        with torch.inference_mode():
            visit(streamer, store, 0, FORWARD)
        hidden = torch.ones(64, requires_grad=True)
        with streamer.lease(0, FORWARD, expect_backward=True) as weights:
            (hidden * weights["w"]).sum().backward()
        assert torch.equal(hidden.grad, store.host_views(0)["w"])  # type: ignore[arg-type]


# ---- leases ----


def test_weights_are_parameters_that_need_no_gradient() -> None:
    with streaming() as (streamer, _), streamer.lease(0, FORWARD) as weights:
        assert {name: (type(w), w.requires_grad) for name, w in weights.items()} == {
            "w": (torch.nn.Parameter, False),
            "n": (torch.nn.Parameter, False),
        }


def test_a_graph_that_outlives_its_lease_refuses_the_next_layers_bytes() -> None:
    with streaming(4) as (streamer, store):
        hidden = torch.ones(64, requires_grad=True)
        with streamer.lease(0, FORWARD) as weights:
            loss = (hidden * weights["w"]).sum()
        for layer_idx in (1, 2, 3):
            bounded(lambda: visit(streamer, store, layer_idx, FORWARD))  # noqa: B023
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("error", [ValueError("in the layer"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
def test_an_exception_inside_a_lease_gives_the_slot_back(error: BaseException) -> None:
    with streaming() as (streamer, store):

        def interrupted() -> None:
            for layer_idx in (0, 1, 2):
                with streamer.lease(layer_idx, FORWARD, expect_backward=True):
                    if layer_idx == 2:
                        raise error

        with pytest.raises(type(error)):
            bounded(interrupted)
        assert all(slot.state is not SlotState.LEASED for slot in prefetcher_of(streamer)._pool.slots)
        bounded(lambda: [training_step(streamer, store) for _ in range(2)])


def test_a_lease_that_an_interrupt_left_open_does_not_spoil_the_next_step() -> None:
    with streaming() as (streamer, store):
        for layer_idx in (0, 1):  # an interrupt between the end of `take` and the block that gives back
            prefetcher_of(streamer).take(layer_idx)
        bounded(lambda: [training_step(streamer, store) for _ in range(2)])


def test_a_step_that_broke_off_in_the_backward_leaves_the_schedule_right() -> None:
    with streaming(6) as (streamer, store):
        bounded(lambda: training_step(streamer, store, lowest=3))
        for layer_idx in range(6):
            bounded(lambda: visit(streamer, store, layer_idx, FORWARD, expect_backward=layer_idx >= 3))  # noqa: B023
        bounded(lambda: visit(streamer, store, 5, BACKWARD))
        bounded(lambda: training_step(streamer, store, lowest=0))
        before = at_rest(streamer)
        bounded(lambda: training_step(streamer, store, lowest=0))
        assert at_rest(streamer) - before == streamer.transfers_per_step(0) * streamer.layer_bytes


@both_ways
@pytest.mark.parametrize("layer_idx", [0, 1])
@pytest.mark.parametrize("direction", list(Direction))
def test_a_layer_inside_itself_is_refused_and_nothing_is_lost(
    direction: Direction, layer_idx: int, enqueues: bool
) -> None:
    with streaming(enqueues=enqueues) as (streamer, store):

        def nested() -> None:
            with streamer.lease(layer_idx, FORWARD):
                visit(streamer, store, layer_idx, direction)

        with pytest.raises(RuntimeError, match=f"layer {layer_idx} was asked for while a visit of it"):
            bounded(nested)
        bounded(lambda: training_step(streamer, store))


def test_leases_of_more_layers_than_slots_are_refused_and_nothing_is_lost() -> None:
    with streaming() as (streamer, store):

        def nested() -> None:
            with streamer.lease(0, FORWARD), streamer.lease(1, FORWARD), streamer.lease(2, FORWARD):
                pass

        with pytest.raises(RuntimeError, match=r"layer 2 .* all 2 slots are leased"):
            bounded(nested)
        bounded(lambda: training_step(streamer, store))


@pytest.mark.parametrize("layer_idx", [-1, 5])
def test_a_layer_that_the_model_does_not_have_is_refused(layer_idx: int) -> None:
    with streaming(5) as (streamer, _), pytest.raises((ValueError, IndexError)), streamer.lease(layer_idx, FORWARD):
        pass


def test_stale_bytes_are_not_lent_after_the_host_changed() -> None:
    with streaming() as (streamer, store):
        bounded(lambda: training_step(streamer, store))
        at_rest(streamer)
        for layer_idx in range(5):  # in slots now: 0 and 1
            store.write(layer_idx, 40 + layer_idx)
            bounded(lambda: streamer.invalidate(layer_idx))  # noqa: B023
        bounded(lambda: training_step(streamer, store))
        assert store.changed == [0, 1, 2, 3, 4]


def test_a_change_that_nobody_named_is_not_seen_so_the_test_above_can_fail() -> None:
    with streaming() as (streamer, store):
        bounded(lambda: training_step(streamer, store))
        at_rest(streamer)
        store.write(0, 9)
        with pytest.raises(AssertionError, match="layer 0: wrong bytes"):
            bounded(lambda: visit(streamer, store, 0, FORWARD))


# ---- failure and end ----


def test_error_of_the_thread_surfaces_in_the_step_and_leaves_no_thread() -> None:
    with streaming() as (streamer, store):
        store.failures[3] = OSError("disk is gone")
        with pytest.raises(RuntimeError, match="prefetch thread failed") as caught:
            bounded(lambda: training_step(streamer, store))
        assert isinstance(caught.value.__cause__, OSError)
        thread = prefetcher_of(streamer)._thread
        thread.join(MAX_WAIT_S)
        assert not thread.is_alive()


def test_close_ends_the_thread_and_the_store_once() -> None:
    with streaming() as (streamer, store):
        bounded(lambda: training_step(streamer, store))
        thread = prefetcher_of(streamer)._thread
        for _ in range(3):
            bounded(streamer.close)
        assert streamer.closed
        assert not thread.is_alive()
        assert store.num_closes == 1


def test_lease_after_close_is_refused_for_streamed_resident_and_bare_layers() -> None:
    with streaming(3, absent=[2]) as (streamer, store):
        streamer.set_resident([1])
        bounded(lambda: training_step(streamer, store))
        bounded(streamer.close)
        for layer_idx in range(3):
            with (
                pytest.raises(RuntimeError, match=rf"layer {layer_idx} .* after close\(\)"),
                streamer.lease(layer_idx, FORWARD),
            ):
                pass


def test_counters_outlive_close() -> None:
    with streaming() as (streamer, store):
        bounded(lambda: training_step(streamer, store))
        at_rest(streamer)
        before = streamer.stats()
        bounded(streamer.close)
        assert streamer.stats() == before
        assert before.h2d_bytes > 0


def test_weights_at_rest_stay_readable_and_invalidate_is_harmless_after_close() -> None:
    layouts = {0: make_layout(0, {"w": ((8,), torch.float32)})}
    store = RamStore(layouts, CPU)
    weight = store.host_views(0)["w"]
    weight.copy_(torch.arange(8.0))
    streamer = LayerStreamer(store, CPU, 1, 2)
    bounded(streamer.close)
    del store
    gc.collect()
    streamer.invalidate(0)
    assert torch.equal(weight, torch.arange(8.0))


def test_close_inside_a_lease_does_not_hide_the_exception_of_the_step() -> None:
    with streaming() as (streamer, _):

        def step() -> None:
            with streamer.lease(0, FORWARD):
                streamer.close()
                raise KeyError("the user's own")

        with pytest.raises(KeyError, match="the user's own"):
            bounded(step)


def test_close_inside_a_lease_of_a_resident_layer_is_harmless() -> None:
    with streaming() as (streamer, store):
        streamer.set_resident([0])
        bounded(lambda: visit(streamer, store, 0, FORWARD))

        def step() -> None:
            with streamer.lease(0, FORWARD):
                streamer.close()

        bounded(step)


def test_a_close_that_was_interrupted_can_be_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    with streaming() as (streamer, store):
        prefetcher = prefetcher_of(streamer)
        with monkeypatch.context() as patch:

            def interrupted() -> None:
                raise KeyboardInterrupt

            patch.setattr(prefetcher, "close", interrupted)
            with pytest.raises(KeyboardInterrupt):
                streamer.close()
        try:
            bounded(streamer.close)
            assert not prefetcher._thread.is_alive()
            assert store.num_closes == 1
        finally:
            bounded(prefetcher.close)


def test_a_streamer_that_is_dropped_without_close_gives_everything_back() -> None:
    store = FakeStore(dict.fromkeys(range(4), 64))
    holder = [LayerStreamer(store, CPU, 4, 2)]
    bounded(lambda: training_step(holder[0], store))
    prefetcher, gone = prefetcher_of(holder[0]), weakref.ref(holder[0])
    try:
        holder.clear()
        gc.collect()
        assert gone() is None
        prefetcher._thread.join(MAX_WAIT_S)
        assert not prefetcher._thread.is_alive()
        wait_until(lambda: store.num_closes == 1)
    finally:
        bounded(prefetcher.close)


def test_a_forked_child_cannot_use_or_close_the_parents_streamer() -> None:
    with streaming() as (streamer, store):
        bounded(lambda: visit(streamer, store, 0, FORWARD))
        at_rest(streamer)
        child = os.fork()
        if child == 0:  # no assertion may leave the child
            outcome = 1
            try:
                streamer.close()
                with streamer.lease(1, FORWARD):
                    outcome = 2
            except RuntimeError as error:
                outcome = 0 if "forked child" in str(error) and not streamer.closed and not store.num_closes else 3
            finally:
                os._exit(outcome)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        bounded(lambda: training_step(streamer, store))


def test_statistics_count_hits_demand_loads_waits_and_bytes() -> None:
    with streaming(3) as (streamer, store):
        assert streamer.stats().wait_s == 0.0
        store.gate.clear()
        done = in_thread(lambda: visit(streamer, store, 2, FORWARD))
        store.wait_until_started(2)
        store.gate.set()
        done()
        at_rest(streamer)
        stats = streamer.stats()
        assert (stats.num_hits, stats.num_demand_loads, stats.disk_bytes) == (0, 1, 0)
        assert stats.h2d_bytes == 3 * streamer.layer_bytes  # the layer, and 0 and 1, with which the next sweep begins
        assert stats.wait_s > 0.0


# ---- the clock of device waits ----


class FakeTimingEvent:
    """A CUDA timing event that the device passes at once, 2 ms after the one before it."""

    now_ms = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self, stream: object = None) -> None:
        FakeTimingEvent.now_ms += 2.0
        self.at_ms = FakeTimingEvent.now_ms

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: FakeTimingEvent) -> float:
        return end.at_ms - self.at_ms


def test_device_waits_are_summed_and_their_events_not_hoarded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeTimingEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
    clock = StreamWaitClock(torch.device("cuda", 0))
    for _ in range(1000):
        with clock.around():
            pass
    assert len(clock._pending) <= 2
    assert clock.total_s() == pytest.approx(2.0)


def test_device_waits_are_not_measured_on_a_cpu() -> None:
    clock = StreamWaitClock(CPU)
    with clock.around():
        pass
    assert clock.total_s() == 0.0
