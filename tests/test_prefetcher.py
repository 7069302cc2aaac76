"""The background thread: what it fetches when, what it never does, how it fails and how it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from fake_store import CPU, MAX_WAIT_S, FakeStore, bounded, in_thread, wait_until, wait_until_idle
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_lema.runtime.prefetcher import Prefetcher
from hf_lema.runtime.slots import Slot, SlotPool, SlotState

THREAD_NAME = "hf_lema-prefetcher"


class ReadFailed(Exception):
    """What a broken disk says."""


@contextmanager
def prefetching(
    num_layers: int = 6, num_slots: int = 2, *, enqueues: bool = False
) -> Iterator[tuple[Prefetcher, FakeStore, SlotPool]]:
    store = FakeStore(dict.fromkeys(range(num_layers), 64), enqueues=enqueues)
    pool = SlotPool(num_slots, max(layout.nbytes for layout in store.layouts.values()), CPU)
    prefetcher = Prefetcher(pool, store, CPU)
    try:
        yield prefetcher, store, pool
    finally:
        store.gate.set()
        bounded(prefetcher.close)


def take(prefetcher: Prefetcher, layer_idx: int) -> Slot:
    return bounded(lambda: prefetcher.take(layer_idx))


def holds(slot: Slot, store: FakeStore, layer_idx: int) -> bool:
    expected = store.bytes_of(layer_idx)
    return torch.equal(slot.buffer[: expected.numel()], expected)


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


both_ways = pytest.mark.parametrize("enqueues", [False, True], ids=["in the background", "enqueued"])


@both_ways
def test_a_layer_that_was_asked_for_is_a_hit(enqueues: bool) -> None:
    with prefetching(enqueues=enqueues) as (prefetcher, store, _):
        prefetcher.want([3, 4])
        slot = take(prefetcher, 3)
        assert (slot.layer_idx, slot.state) == (3, SlotState.LEASED)
        assert holds(slot, store, 3)
        assert (prefetcher.num_hits, prefetcher.num_demand_loads) == (1, 0)


@both_ways
def test_a_layer_that_nobody_asked_for_is_a_demand_load(enqueues: bool) -> None:
    with prefetching(enqueues=enqueues) as (prefetcher, store, _):
        slot = take(prefetcher, 5)
        assert holds(slot, store, 5)
        assert (prefetcher.num_hits, prefetcher.num_demand_loads) == (0, 1)
        assert store.started == [5]


@both_ways
def test_wanted_layers_are_fetched_soonest_first_and_no_more_than_there_are_slots(enqueues: bool) -> None:
    with prefetching(num_slots=3, enqueues=enqueues) as (prefetcher, store, pool):
        prefetcher.want([4, 2, 5, 0])
        wait_until_idle(prefetcher)
        assert store.started == [4, 2, 5]
        assert {slot.layer_idx for slot in pool.slots} == {4, 2, 5}


@both_ways
def test_a_layer_that_is_in_a_slot_is_not_fetched_again(enqueues: bool) -> None:
    with prefetching(enqueues=enqueues) as (prefetcher, store, _):
        prefetcher.want([1, 2])
        for _ in range(3):
            slot = take(prefetcher, 1)
            prefetcher.give_back(slot, [2, 1])
        wait_until_idle(prefetcher)
        assert store.started == [1, 2]


@both_ways
def test_a_wanted_layer_beyond_the_slots_is_fetched_when_it_is_taken(enqueues: bool) -> None:
    with prefetching(enqueues=enqueues) as (prefetcher, store, _):
        prefetcher.want([0, 1, 2])
        wait_until_idle(prefetcher)
        assert holds(take(prefetcher, 2), store, 2)


@both_ways
def test_a_demand_load_does_not_throw_the_soonest_layer_away(enqueues: bool) -> None:
    with prefetching(num_slots=3, enqueues=enqueues) as (prefetcher, store, pool):
        prefetcher.want([0, 1, 2])
        wait_until_idle(prefetcher)
        take(prefetcher, 5)
        assert {slot.layer_idx for slot in pool.slots} == {5, 0, 1}
        assert store.started == [0, 1, 2, 5]


@both_ways
def test_every_read_counts_its_bytes_once(enqueues: bool) -> None:
    with prefetching(enqueues=enqueues) as (prefetcher, store, _):
        prefetcher.want([0, 1])
        wait_until_idle(prefetcher)
        assert prefetcher.h2d_bytes == sum(store.layouts[i].nbytes for i in store.started)
        assert len(store.started) == 2


def test_a_hit_on_a_layer_that_is_under_way_waits_for_it_and_counts_the_wait() -> None:
    with prefetching() as (prefetcher, store, _):
        store.gate.clear()
        prefetcher.want([0])
        store.wait_until_started(0)
        result = in_thread(lambda: prefetcher.take(0))
        wait_until(lambda: prefetcher.num_hits == 1)
        assert prefetcher.wait_s == 0.0
        store.gate.set()
        assert holds(result(), store, 0)
        assert prefetcher.wait_s > 0.0
        assert prefetcher.num_demand_loads == 0


@both_ways
def test_the_next_layer_is_fetched_while_a_visit_is_under_way(enqueues: bool) -> None:
    with prefetching(enqueues=enqueues) as (prefetcher, store, _):
        prefetcher.want([0, 1])
        slot = take(prefetcher, 0)
        wait_until_idle(prefetcher)
        assert slot.state is SlotState.LEASED
        assert store.started == [0, 1]


@both_ways
def test_a_leased_slot_is_not_refilled_however_much_is_wanted(enqueues: bool) -> None:
    with prefetching(enqueues=enqueues) as (prefetcher, store, _):
        first, second = take(prefetcher, 0), take(prefetcher, 1)
        prefetcher.want([2, 3])
        assert store.started == [0, 1]
        assert holds(first, store, 0)
        assert holds(second, store, 1)
        prefetcher.give_back(first, [2, 3])
        wait_until_idle(prefetcher)
        assert store.started == [0, 1, 2]
        assert holds(second, store, 1)


@both_ways
@pytest.mark.parametrize("wanted", [[], [5], [0, 1, 5]])
def test_a_layer_asked_for_while_every_slot_is_leased_is_refused(enqueues: bool, wanted: list[int]) -> None:
    with prefetching(enqueues=enqueues) as (prefetcher, _, _):
        take(prefetcher, 0)
        take(prefetcher, 1)
        prefetcher.want(wanted)
        with pytest.raises(RuntimeError, match=r"layer 5 .* all 2 slots are leased"):
            take(prefetcher, 5)


@both_ways
def test_a_layer_asked_for_while_a_visit_of_it_is_under_way_is_refused(enqueues: bool) -> None:
    with prefetching(enqueues=enqueues) as (prefetcher, store, _):
        slot = take(prefetcher, 0)
        with pytest.raises(RuntimeError, match=r"layer 0 .* visit of it is under way"):
            take(prefetcher, 0)
        prefetcher.give_back(slot, [])
        assert holds(take(prefetcher, 0), store, 0)


@both_ways
def test_a_layer_can_be_taken_beside_a_leased_one_when_the_other_slot_holds_a_wanted_layer(enqueues: bool) -> None:
    with prefetching(enqueues=enqueues) as (prefetcher, store, _):
        outer = take(prefetcher, 4)
        prefetcher.want([5, 0])
        wait_until_idle(prefetcher)
        assert holds(take(prefetcher, 2), store, 2)
        assert holds(outer, store, 4)


@pytest.mark.parametrize("num_slots", [1, 2])
def test_a_layer_that_is_under_way_but_no_longer_wanted_is_not_lost_when_taken(num_slots: int) -> None:
    with prefetching(num_slots=num_slots) as (prefetcher, store, _):
        store.gate.clear()
        prefetcher.want([5])
        store.wait_until_started(5)
        prefetcher.want([2, 3])
        result = in_thread(lambda: prefetcher.take(5))
        wait_until(lambda: prefetcher.num_hits == 1)
        store.gate.set()
        assert holds(result(), store, 5)


def test_a_take_that_waits_is_not_lost_when_somebody_else_wants_other_layers() -> None:
    with prefetching(num_slots=1) as (prefetcher, store, _):
        store.gate.clear()
        prefetcher.want([0])
        store.wait_until_started(0)
        result = in_thread(lambda: prefetcher.take(5))
        wait_until(lambda: prefetcher.num_demand_loads == 1)
        prefetcher.want([2])
        store.gate.set()
        assert holds(result(), store, 5)


# ---- invalidation ----


@both_ways
def test_changed_bytes_are_read_again(enqueues: bool) -> None:
    with prefetching(enqueues=enqueues) as (prefetcher, store, _):
        prefetcher.give_back(take(prefetcher, 0), [0, 1])
        store.write(0, 7)
        bounded(lambda: prefetcher.invalidate(0))
        slot = take(prefetcher, 0)
        assert holds(slot, store, 0)
        assert slot.parameters(store.layouts[0])["n"].tolist() == [0, 7, -1]


def test_invalidating_a_layer_that_is_being_filled_waits_and_forgets_it() -> None:
    with prefetching() as (prefetcher, store, pool):
        store.gate.clear()
        prefetcher.want([0])
        store.wait_until_started(0)
        done = in_thread(lambda: prefetcher.invalidate(0))
        store.gate.set()
        done()
        assert pool.find(0) is None
        store.write(0, 3)
        assert holds(take(prefetcher, 0), store, 0)
        assert store.started == [0, 0]


def test_invalidating_a_layer_that_is_wanted_but_not_yet_fetched_lets_the_others_come() -> None:
    with prefetching(num_slots=3) as (prefetcher, store, pool):
        store.gate.clear()
        prefetcher.want([0, 1, 2])
        store.wait_until_started(0)
        bounded(lambda: prefetcher.invalidate(1))
        store.gate.set()
        wait_until_idle(prefetcher)
        assert store.started == [0, 2]
        assert pool.find(1) is None


@both_ways
def test_invalidating_a_layer_that_is_nowhere_is_harmless(enqueues: bool) -> None:
    with prefetching(enqueues=enqueues) as (prefetcher, store, _):
        bounded(lambda: prefetcher.invalidate(3))
        assert holds(take(prefetcher, 3), store, 3)


@both_ways
def test_a_slot_that_invalidation_freed_is_used_at_once(enqueues: bool) -> None:
    with prefetching(enqueues=enqueues) as (prefetcher, store, _):
        prefetcher.want([0, 1, 2])
        wait_until_idle(prefetcher)
        bounded(lambda: prefetcher.invalidate(0))
        wait_until_idle(prefetcher)
        assert store.started == [0, 1, 2]


@both_ways
def test_invalidating_a_leased_layer_is_refused(enqueues: bool) -> None:
    with prefetching(enqueues=enqueues) as (prefetcher, store, _):
        slot = take(prefetcher, 0)
        with pytest.raises(RuntimeError, match="layer 0"):
            bounded(lambda: prefetcher.invalidate(0))
        assert (slot.state, slot.layer_idx) == (SlotState.LEASED, 0)
        assert holds(slot, store, 0)


# ---- failure ----


def test_error_in_reader_thread_surfaces_at_next_take_with_its_cause() -> None:
    with prefetching() as (prefetcher, store, pool):
        slot = take(prefetcher, 0)
        error = ReadFailed("sector 7")
        store.failures[1] = error
        prefetcher.want([0, 1])
        prefetcher._thread.join(MAX_WAIT_S)
        assert pool.find(1) is None

        prefetcher.give_back(slot, [1, 2])  # what is under way can still end
        for layer_idx in (1, 0):
            with pytest.raises(RuntimeError, match=f"layer {layer_idx} cannot be fetched") as caught:
                take(prefetcher, layer_idx)
            assert caught.value.__cause__ is error


def test_error_reaches_a_take_that_is_already_waiting() -> None:
    with prefetching() as (prefetcher, store, _):
        store.failures[0] = ReadFailed()
        store.gate.clear()
        result = in_thread(lambda: prefetcher.take(0))
        store.wait_until_started(0)
        store.gate.set()
        with pytest.raises(RuntimeError, match="layer 0 cannot be fetched") as caught:
            result()
        assert isinstance(caught.value.__cause__, ReadFailed)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError()], ids=lambda e: type(e).__name__)
def test_no_exception_of_the_thread_is_lost(error: BaseException) -> None:
    with prefetching() as (prefetcher, store, _):
        store.failures[0] = error
        with pytest.raises(RuntimeError, match="cannot be fetched") as caught:
            take(prefetcher, 0)
        assert caught.value.__cause__ is error


def test_nothing_hangs_after_the_thread_has_failed() -> None:
    with prefetching() as (prefetcher, store, _):
        store.failures[0] = ReadFailed()
        with pytest.raises(RuntimeError):
            take(prefetcher, 0)
        prefetcher._thread.join(MAX_WAIT_S)
        assert not prefetcher._thread.is_alive()
        bounded(lambda: prefetcher.want([1, 2]))
        bounded(lambda: prefetcher.invalidate(1))
        bounded(prefetcher.close)
        assert store.started == [0]


def test_error_of_an_enqueued_read_comes_out_where_it_was_made_and_frees_the_slot() -> None:
    with prefetching(enqueues=True) as (prefetcher, store, pool):
        store.failures[0] = ReadFailed()
        with pytest.raises(ReadFailed):
            take(prefetcher, 0)
        assert [slot.state for slot in pool.slots] == [SlotState.FREE, SlotState.FREE]
        assert holds(take(prefetcher, 0), store, 0)


def test_a_half_read_layer_is_never_handed_out() -> None:
    with prefetching(num_slots=1) as (prefetcher, store, pool):
        store.failures[0] = ReadFailed()
        with pytest.raises(RuntimeError):
            take(prefetcher, 0)
        assert [slot.state for slot in pool.slots] == [SlotState.FREE]


# ---- the thread and the end ----


def test_there_is_one_thread_and_none_after_close() -> None:
    before = prefetch_threads()
    with prefetching() as (prefetcher, store, _):
        for layer_idx in range(6):
            prefetcher.give_back(take(prefetcher, layer_idx), [(layer_idx + 1) % 6])
        wait_until_idle(prefetcher)
        assert len(prefetch_threads()) == len(before) + 1
        assert store.reader_threads == {prefetcher._thread}
        assert store.max_concurrent_reads == 1
    assert prefetch_threads() == before


def test_a_store_that_only_enqueues_needs_no_thread() -> None:
    before = prefetch_threads()
    with prefetching(enqueues=True) as (prefetcher, store, _):
        assert prefetch_threads() == before
        prefetcher.want([0, 1])
        assert store.reader_threads == {threading.current_thread()}


@both_ways
def test_close_may_be_called_any_number_of_times(enqueues: bool) -> None:
    with prefetching(enqueues=enqueues) as (prefetcher, _, _):
        for _ in range(3):
            bounded(prefetcher.close)
        assert not prefetcher._thread.is_alive()


@both_ways
def test_take_after_close_is_refused_with_the_remedy(enqueues: bool) -> None:
    with prefetching(enqueues=enqueues) as (prefetcher, store, _):
        prefetcher.want([0])
        wait_until_idle(prefetcher)
        bounded(prefetcher.close)
        for layer_idx in (0, 1):
            with pytest.raises(RuntimeError, match=rf"layer {layer_idx} .* after close\(\)"):
                take(prefetcher, layer_idx)
        bounded(lambda: prefetcher.want([2, 3]))
        assert store.started == [0]


def test_close_ends_the_thread_though_an_interrupt_left_the_lock_taken() -> None:
    with prefetching() as (prefetcher, store, _):
        prefetcher.want([3])
        wait_until(lambda: list(store.started) == [3])

        def interrupted() -> None:
            prefetcher._changed.acquire()  # and then, before the block that would release it, Ctrl-C
            prefetcher._changed.acquire()
            prefetcher.close()

        bounded(interrupted)
        assert prefetch_threads() == []


def test_close_ends_a_take_that_waits_in_another_thread() -> None:
    with prefetching() as (prefetcher, store, _):
        store.gate.clear()
        waiting = in_thread(lambda: prefetcher.take(0))
        store.wait_until_started(0)
        closing = in_thread(prefetcher.close)
        with pytest.raises(RuntimeError, match=r"after close\(\)"):
            waiting()
        store.gate.set()
        closing()


def test_close_waits_for_the_read_under_way_and_begins_no_other() -> None:
    with prefetching() as (prefetcher, store, _):
        store.gate.clear()
        prefetcher.want([0, 1])
        store.wait_until_started(0)
        closing = in_thread(prefetcher.close)
        wait_until(lambda: prefetcher._closing)
        assert prefetcher._thread.is_alive()
        store.gate.set()
        closing()
        assert store.started == [0]


def test_a_lease_can_end_after_close() -> None:
    with prefetching() as (prefetcher, store, _):
        slot = take(prefetcher, 0)
        bounded(prefetcher.close)
        bounded(lambda: prefetcher.give_back(slot, [1]))
        assert slot.state is SlotState.READY
        assert store.started == [0]


# ---- random schedules ----

NUM_LAYERS = 6
LAYERS = st.integers(0, NUM_LAYERS - 1)
WANTED = st.lists(LAYERS, max_size=4)


class AnyOrderOfCalls(RuleBasedStateMachine):
    """One consumer that calls in any order, reads that are held up and let go, host bytes that change, failures.

    What must hold is in the rules' assertions and in the invariants; every call has a bound, so a deadlock fails.
    What is drawn depends on earlier draws alone, never on how far the thread has come: Hypothesis insists.
    """

    enqueues = False

    @initialize(
        num_slots=st.integers(2, 4), sizes=st.lists(st.integers(1, 80), min_size=NUM_LAYERS, max_size=NUM_LAYERS)
    )
    def begin(self, num_slots: int, sizes: list[int]) -> None:
        self.store = FakeStore(dict(enumerate(sizes)), self.check_target, enqueues=self.enqueues)
        self.pool = SlotPool(num_slots, max(layout.nbytes for layout in self.store.layouts.values()), CPU)
        self.leased: dict[int, tuple[Slot, torch.Tensor]] = {}
        self.wrong: list[str] = []
        self.version = 0
        self.num_failures_arranged = 0
        self.num_calls = 0
        self.failed: BaseException | None = None
        self.closed = False
        self.prefetcher = Prefetcher(self.pool, self.store, CPU)

    def check_target(self, layer_idx: int, out: torch.Tensor) -> None:
        """Runs in the reading thread: the slot that is written to must be the reader's."""
        slot = next(slot for slot in self.pool.slots if slot.buffer.data_ptr() == out.data_ptr())
        if (slot.state, slot.layer_idx) != (SlotState.FILLING, layer_idx):
            self.wrong.append(f"layer {layer_idx} read into slot {slot.index}: {slot.state}, layer {slot.layer_idx}")
        if out.numel() != self.store.layouts[layer_idx].nbytes:
            self.wrong.append(f"layer {layer_idx} read into {out.numel()} bytes")

    def call(self, call: object) -> object:
        """A bounded call; reads are let go only once it is under way."""
        result = in_thread(call)  # type: ignore[arg-type]
        self.store.gate.set()
        return result()

    def note_failure(self, cause: BaseException | None) -> None:
        assert self.num_failures_arranged > 0
        assert isinstance(cause, ReadFailed)
        assert self.failed in (None, cause), "the first error is the one that comes back"
        self.failed = cause

    def may_be_taken(self) -> bool:
        return self.failed is None and not self.closed

    @rule(wanted=WANTED)
    def want(self, wanted: list[int]) -> None:
        self.ask(lambda: self.prefetcher.want(wanted))

    def ask(self, call: object) -> None:
        """A call that must not raise, but for the error of a read that it enqueues itself."""
        try:
            self.call(call) if self.enqueues else bounded(call)  # type: ignore[arg-type]
        except ReadFailed:
            assert self.enqueues

    @rule(layer_idx=LAYERS)
    def take(self, layer_idx: int) -> None:
        full = len(self.leased) == len(self.pool.slots)
        try:
            slot = self.call(lambda: self.prefetcher.take(layer_idx))
        except ReadFailed:
            assert self.enqueues
            return
        except RuntimeError as error:
            text = str(error)
            if isinstance(error.__cause__, ReadFailed):
                self.note_failure(error.__cause__)
            elif self.closed:
                assert "after close()" in text
            elif layer_idx in self.leased:
                assert "under way" in text
            else:
                assert full
                assert "slots are leased" in text
            return
        assert self.may_be_taken()
        assert layer_idx not in self.leased
        assert isinstance(slot, Slot)
        assert (slot.state, slot.layer_idx) == (SlotState.LEASED, layer_idx)
        expected = self.store.bytes_of(layer_idx)
        assert torch.equal(slot.buffer[: expected.numel()], expected), f"stale or wrong bytes of layer {layer_idx}"
        self.leased[layer_idx] = slot, slot.buffer.clone()

    @rule(which=st.integers(0, 3), wanted=WANTED)
    def give_back(self, which: int, wanted: list[int]) -> None:
        if not self.leased:
            return
        slot, _ = self.leased.pop(sorted(self.leased)[which % len(self.leased)])
        self.ask(lambda: self.prefetcher.give_back(slot, wanted))

    @rule(layer_idx=LAYERS)
    def change(self, layer_idx: int) -> None:
        if layer_idx in self.leased:
            return
        self.version += 1
        self.store.write(layer_idx, self.version)
        try:
            self.call(lambda: self.prefetcher.invalidate(layer_idx))
        except ReadFailed:
            assert self.enqueues
        except RuntimeError as error:
            if not self.closed:
                self.note_failure(error.__cause__)

    @rule()
    def hold_reads_up(self) -> None:
        if not self.enqueues:
            self.store.gate.clear()

    @rule()
    def let_reads_go(self) -> None:
        self.store.gate.set()

    @precondition(lambda self: self.num_calls > 12)
    @rule(layer_idx=LAYERS)
    def let_the_next_read_of_a_layer_fail(self, layer_idx: int) -> None:
        self.store.failures[layer_idx] = ReadFailed(f"layer {layer_idx}")
        self.num_failures_arranged += 1

    @rule()
    def come_to_rest(self) -> None:
        self.store.gate.set()
        if not self.closed and not self.enqueues:  # what is enqueued is at rest when the call returns
            wait_until_idle(self.prefetcher)

    @precondition(lambda self: self.num_calls > 20)
    @rule()
    def close(self) -> None:
        self.closed = True
        self.call(self.prefetcher.close)
        assert not self.prefetcher._thread.is_alive()

    @invariant()
    def nothing_is_wrong(self) -> None:
        if not hasattr(self, "prefetcher"):
            return
        self.num_calls += 1
        assert self.wrong == []
        assert self.store.max_concurrent_reads <= 1
        assert self.store.reader_threads <= {self.prefetcher._thread} or self.enqueues
        with self.prefetcher._changed:
            held = [slot.layer_idx for slot in self.pool.slots if slot.layer_idx is not None]
            leased = {slot.layer_idx for slot in self.pool.slots if slot.state is SlotState.LEASED}
            num_bytes = sum(self.store.layouts[i].nbytes for i in self.store.started)
            assert self.prefetcher.h2d_bytes <= num_bytes
        assert len(held) == len(set(held)), "a layer is in two slots"
        assert leased == set(self.leased) or self.closed
        for layer_idx, (slot, lent) in self.leased.items():
            assert slot.layer_idx == layer_idx
            assert torch.equal(slot.buffer, lent), f"the slot of layer {layer_idx} was written to while leased"

    def teardown(self) -> None:
        if hasattr(self, "prefetcher"):
            self.call(self.prefetcher.close)
            assert not self.prefetcher._thread.is_alive()
            assert self.wrong == []


class AnyOrderOfEnqueuingCalls(AnyOrderOfCalls):
    """The same, where the caller's thread makes the copies."""

    enqueues = True


RANDOM_SCHEDULES = settings(
    max_examples=120,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # to shrink a deadlock costs MAX_WAIT_S a try
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

TestAnyOrderOfCalls = AnyOrderOfCalls.TestCase
TestAnyOrderOfCalls.settings = RANDOM_SCHEDULES
TestAnyOrderOfEnqueuingCalls = AnyOrderOfEnqueuingCalls.TestCase
TestAnyOrderOfEnqueuingCalls.settings = settings(RANDOM_SCHEDULES, max_examples=60)
