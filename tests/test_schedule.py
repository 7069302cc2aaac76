"""Schedule predictions, checked against brute force and against what a step may move at the least."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_lema.runtime.schedule import Direction, Schedule, choose_resident, spread_evenly, transfers_per_step

FORWARD, BACKWARD = Direction.FORWARD, Direction.BACKWARD


def visits_of_steps(num_layers: int, lowest: int | None, num_steps: int) -> list[tuple[int, Direction]]:
    """The visits of training steps, or of forward-only sweeps where ``lowest`` is None."""
    step = [(i, FORWARD) for i in range(num_layers)]
    if lowest is not None:
        step += [(i, BACKWARD) for i in range(num_layers - 1, lowest - 1, -1)]
    return step * num_steps


def next_uses(visits: list[tuple[int, Direction]], at: int) -> list[int]:
    """Distinct layers in the order in which they are visited after position ``at``."""
    return list(dict.fromkeys(i for i, _ in visits[at + 1 :]))


def fewest_transfers_per_step(layers: list[int], num_layers: int, num_slots: int, lowest: int) -> int:
    """Transfers of the third step under Belady's rule with fetching on demand, which no order of fetching can beat."""
    visits = visits_of_steps(num_layers, lowest, 6)
    step_length = 2 * num_layers - lowest
    held: set[int] = set()
    count = 0
    for at, (layer_idx, _) in enumerate(visits):
        if layer_idx not in layers:
            continue
        if layer_idx not in held:
            count += 2 * step_length <= at < 3 * step_length
            if len(held) == num_slots:
                order = next_uses(visits, at)
                held.remove(max(held, key=lambda i: order.index(i) if i in order else len(order)))
            held.add(layer_idx)
    return count


def test_a_step_moves_2n_minus_2s_layers_for_every_n_and_s() -> None:
    for num_layers in range(1, 25):
        for num_slots in range(2, num_layers + 1):
            expected = 2 * num_layers - 2 * num_slots
            assert transfers_per_step(range(num_layers), num_layers, num_slots) == expected, (num_layers, num_slots)


@pytest.mark.parametrize("num_slots", [2, 3, 8])
def test_a_step_moves_nothing_when_the_slots_hold_every_layer(num_slots: int) -> None:
    for num_layers in range(1, num_slots + 1):
        assert transfers_per_step(range(num_layers), num_layers, num_slots) == 0


@given(st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_visits_are_predicted_in_the_order_of_their_next_use(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(1, 9))
    layers = data.draw(st.lists(st.integers(0, num_layers - 1), unique=True).map(sorted))
    lowest = data.draw(st.none() | st.integers(0, num_layers - 1))
    visits = visits_of_steps(num_layers, lowest, 3)
    step_length = len(visits) // 3
    schedule = Schedule(layers)

    for at, (layer_idx, direction) in enumerate(visits[:step_length]):
        below_the_turn = direction is FORWARD and lowest is not None and layer_idx < lowest
        expected = [i for i in next_uses(visits, at) if i in layers]
        found = list(schedule.upcoming(layer_idx, direction, None if below_the_turn else lowest))

        if below_the_turn:  # that a backward will come is not known yet: right up to the top layer
            num_above = sum(i > layer_idx for i in layers)
            assert found[:num_above] == expected[:num_above]
            assert sorted(found) == layers
        else:
            assert found == expected


@given(st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_step_moves_as_little_as_any_order_of_fetching_could(data: st.DataObject) -> None:
    num_layers = data.draw(st.integers(1, 10))
    num_slots = data.draw(st.integers(2, 6))
    layers = data.draw(st.lists(st.integers(0, num_layers - 1), unique=True).map(sorted))
    lowest = data.draw(st.integers(0, num_layers - 1))

    found = transfers_per_step(layers, num_layers, num_slots, lowest)
    fewest = fewest_transfers_per_step(layers, num_layers, num_slots, lowest)

    # Below the lowest trainable layer an optimum would pin layers from step to step; here all slots fetch ahead.
    assert fewest <= found <= fewest + (num_slots if lowest else 0)


def test_layers_that_are_resident_are_not_moved() -> None:
    for num_layers in range(2, 9):
        for num_chosen in range(num_layers + 1):
            for layers in itertools.combinations(range(num_layers), num_chosen):
                expected = max(0, 2 * num_chosen - 2 * 2)
                assert transfers_per_step(layers, num_layers, 2) == expected, layers


def test_the_backward_moves_nothing_below_the_lowest_trainable_layer() -> None:
    # From layer 7 down: two layers are in their slots at the turn; 0 and 1 are there at the next step if just visited.
    assert [transfers_per_step(range(8), 8, 2, lowest) for lowest in range(8)] == [12, 12, 12, 11, 10, 9, 8, 8]


@pytest.mark.parametrize("direction", list(Direction))
@pytest.mark.parametrize("lowest", [None, 0, 3])
def test_every_streamed_layer_is_predicted_at_most_once(direction: Direction, lowest: int | None) -> None:
    for layer_idx in range(6):
        found = list(Schedule([0, 2, 3, 5]).upcoming(layer_idx, direction, lowest))
        assert len(found) == len(set(found))
        assert set(found) == {0, 2, 3, 5}


def test_a_forward_only_sweep_starts_again_at_the_first_layer() -> None:
    schedule = Schedule(range(5))
    assert list(schedule.upcoming(4, FORWARD, None)) == [0, 1, 2, 3, 4]
    assert schedule.first_needed(2, 3, FORWARD, None) == [4, 0]


def test_the_turn_is_held_when_a_backward_is_expected() -> None:
    assert Schedule(range(5)).first_needed(3, 3, FORWARD, 0) == [4, 3, 2]
    assert Schedule(range(5)).first_needed(3, 1, BACKWARD, 0) == [0, 1, 2]


def test_asking_for_no_slots_gives_no_layers() -> None:
    assert Schedule(range(5)).first_needed(0, 1, FORWARD, 0) == []
    assert Schedule([]).first_needed(4, 1, FORWARD, 0) == []


@pytest.mark.parametrize("layers", [[1, 0], [0, 0], [2, 2, 3]])
def test_layers_out_of_order_or_twice_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="ascending and distinct"):
        Schedule(layers)


@given(st.integers(0, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_layers_are_spread_as_evenly_as_integers_allow(case: tuple[int, int]) -> None:
    num_chosen, num_layers = case
    chosen = spread_evenly(num_chosen, num_layers)

    assert len(chosen) == num_chosen
    assert list(chosen) == sorted(set(chosen))
    assert all(0 <= i < num_layers for i in chosen)
    gaps = [after - before for before, after in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1
    if chosen:  # nor is one end left bare: what lies outside is half a gap
        before, after = chosen[0], num_layers - 1 - chosen[-1]
        assert abs(before - after) <= 1
        assert max(before, after) <= num_layers / num_chosen / 2 + 1


def test_all_and_none_can_be_chosen() -> None:
    assert spread_evenly(0, 7) == ()
    assert spread_evenly(7, 7) == tuple(range(7))
    assert spread_evenly(1, 7) == (3,)


@pytest.mark.parametrize(("num_chosen", "num_layers"), [(-1, 4), (5, 4), (1, 0)])
def test_more_layers_than_there_are_cannot_be_chosen(num_chosen: int, num_layers: int) -> None:
    with pytest.raises(ValueError, match="cannot choose"):
        spread_evenly(num_chosen, num_layers)


def test_layers_that_are_slow_to_fetch_become_resident_first() -> None:
    layers, slow = tuple(range(10)), (2, 5, 8)

    assert choose_resident(2, layers, slow) == (2, 8)
    assert choose_resident(3, layers, slow) == slow
    assert choose_resident(5, layers, slow) == (1, 2, 5, 7, 8)
    assert choose_resident(10, layers, slow) == layers


@pytest.mark.parametrize("num_chosen", range(8))
def test_layers_that_are_alike_are_chosen_evenly(num_chosen: int) -> None:
    layers = (1, 3, 4, 6, 7, 9, 11)
    evenly = tuple(layers[i] for i in spread_evenly(num_chosen, 7))

    assert choose_resident(num_chosen, layers) == choose_resident(num_chosen, layers, layers) == evenly
