"""The slot's states, the pool's choices, and what autograd sees when a slot is used for another layer."""

from __future__ import annotations

import itertools

import pytest
import torch
from fake_store import CPU, layer_layout

from hf_lema.files.layout import make_layout
from hf_lema.runtime.slots import Slot, SlotPool, SlotState

FREE, FILLING, READY, LEASED = SlotState.FREE, SlotState.FILLING, SlotState.READY, SlotState.LEASED

# The table of the docstring, written a second time: a change of one must be a change of both.
LEGAL = {
    (FREE, FILLING),
    (FILLING, READY),
    (FILLING, FREE),
    (READY, FILLING),
    (READY, LEASED),
    (READY, FREE),
    (LEASED, READY),
}
WAY_TO = {FREE: [], FILLING: [FILLING], READY: [FILLING, READY], LEASED: [FILLING, READY, LEASED]}


def make_slot(state: SlotState = FREE, layer_idx: int = 4, nbytes: int = 1024) -> Slot:
    slot = Slot(0, torch.zeros(nbytes, dtype=torch.uint8))
    for step in WAY_TO[state]:
        slot.move_to(step, layer_idx)
    return slot


def filled_pool(*layers: int, num_slots: int = 3) -> SlotPool:
    pool = SlotPool(num_slots, 256, CPU)
    for layer_idx in layers:
        slot = pool.begin_fill(layer_idx, keep=layers)
        assert slot is not None
        pool.finish_fill(slot)
    return pool


@pytest.mark.parametrize(("before", "after"), sorted(LEGAL, key=str))
def test_legal_edges_are_taken(before: SlotState, after: SlotState) -> None:
    slot = make_slot(before)
    slot.move_to(after, 7)
    assert (slot.state, slot.layer_idx) == (after, 7)


@pytest.mark.parametrize(("before", "after"), sorted(set(itertools.product(SlotState, SlotState)) - LEGAL, key=str))
def test_illegal_edges_are_refused_and_change_nothing(before: SlotState, after: SlotState) -> None:
    slot = make_slot(before)
    layer_idx = slot.layer_idx
    with pytest.raises(RuntimeError, match="slot 0"):
        slot.move_to(after, 7)
    assert (slot.state, slot.layer_idx) == (before, layer_idx)


def test_a_refused_edge_names_the_layer_and_both_states() -> None:
    with pytest.raises(RuntimeError, match=r"layer 4.*LEASED.*FILLING"):
        make_slot(LEASED).move_to(FILLING, 5)


def test_a_pool_has_as_many_slots_as_asked_and_no_more_bytes() -> None:
    pool = SlotPool(3, 1000, CPU)
    assert [slot.buffer.numel() for slot in pool.slots] == [1000] * 3
    assert {slot.buffer.dtype for slot in pool.slots} == {torch.uint8}
    assert len({slot.buffer.data_ptr() for slot in pool.slots}) == 3
    assert {slot.state for slot in pool.slots} == {FREE}


def test_free_slots_are_filled_before_ready_ones() -> None:
    pool = filled_pool(0, 1)
    slot = pool.begin_fill(2, keep=[])
    assert slot is pool.slots[2]
    assert pool.find(0) is not None
    assert pool.find(1) is not None


def test_a_ready_slot_is_filled_again_only_when_its_layer_is_not_kept() -> None:
    pool = filled_pool(0, 1, 2)
    assert pool.begin_fill(3, keep=[0, 1, 2, 3]) is None
    slot = pool.begin_fill(3, keep=[0, 2, 3])
    assert slot is pool.slots[1]
    assert (slot.state, slot.layer_idx) == (FILLING, 3)
    assert pool.find(1) is None


@pytest.mark.parametrize("state", [FILLING, LEASED])
def test_a_slot_in_use_is_never_filled(state: SlotState) -> None:
    pool = SlotPool(2, 256, CPU)
    for slot, layer_idx in zip(pool.slots, (0, 1), strict=True):
        for step in WAY_TO[state]:
            slot.move_to(step, layer_idx)
    assert pool.begin_fill(2, keep=[]) is None
    assert [slot.layer_idx for slot in pool.slots] == [0, 1]


def test_each_fill_is_a_new_generation() -> None:
    pool = filled_pool(0, num_slots=1)
    assert pool.slots[0].generation == 1
    slot = pool.begin_fill(1, keep=[])
    assert slot is not None
    assert slot.generation == 2
    pool.discard(slot)
    assert slot.generation == 2


def test_a_discarded_slot_holds_no_layer() -> None:
    pool = filled_pool(0, 1)
    pool.discard(pool.slots[0])
    assert (pool.slots[0].state, pool.slots[0].layer_idx) == (FREE, None)
    assert pool.find(0) is None


def test_a_leased_slot_cannot_be_discarded() -> None:
    pool = filled_pool(0)
    pool.acquire(pool.slots[0])
    with pytest.raises(RuntimeError, match="layer 0"):
        pool.discard(pool.slots[0])


def test_a_layer_stays_in_its_slot_through_a_lease() -> None:
    pool = filled_pool(0, 1)
    slot = pool.find(1)
    assert slot is not None
    pool.acquire(slot)
    assert (slot.state, pool.find(1)) == (LEASED, slot)
    pool.release(slot)
    assert (slot.state, pool.find(1)) == (READY, slot)


def test_slots_that_are_not_leased_are_counted() -> None:
    pool = filled_pool(0, 1, num_slots=3)
    assert pool.num_not_leased == 3
    pool.acquire(pool.slots[0])
    assert pool.num_not_leased == 2
    pool.acquire(pool.slots[1])
    pool.release(pool.slots[0])
    assert pool.num_not_leased == 2


def test_parameters_are_views_of_the_buffer_with_true_shape_and_dtype() -> None:
    layout = make_layout(
        0,
        {"a": ((3, 5), torch.float32), "b": ((7,), torch.bfloat16), "c": ((), torch.int64), "d": ((0, 4), torch.half)},
    )
    slot = make_slot(nbytes=layout.nbytes)
    parameters = slot.parameters(layout)

    assert {n: (tuple(p.shape), p.dtype) for n, p in parameters.items()} == {
        "a": ((3, 5), torch.float32),
        "b": ((7,), torch.bfloat16),
        "c": ((), torch.int64),
        "d": ((0, 4), torch.half),
    }
    assert all(isinstance(p, torch.nn.Parameter) and not p.requires_grad for p in parameters.values())
    for spec in layout.tensors:
        if spec.nbytes:
            assert parameters[spec.name].data_ptr() == slot.buffer.data_ptr() + spec.offset_bytes


def test_parameters_are_made_once_for_each_layout() -> None:
    slot = make_slot()
    assert slot.parameters(layer_layout(0)) is slot.parameters(layer_layout(5))
    assert slot.parameters(layer_layout(0)) is not slot.parameters(layer_layout(0, num_elements=63))
    assert slot.parameters(layer_layout(0))["w"] is slot.parameters(layer_layout(1))["w"]


def fill(slot: Slot, value: float, num_elements: int = 64) -> None:
    """What the pool and a store do together; the store may write past torch, as a read of a file does."""
    layout = layer_layout(0, num_elements)
    source = torch.zeros(layout.nbytes, dtype=torch.uint8)
    layout.views(source)["w"].fill_(value)
    slot.begin_fill(0)
    slot.buffer.numpy()[: layout.nbytes] = source.numpy()
    slot.move_to(READY, 0)


def test_a_fill_bumps_the_version_of_every_view() -> None:
    slot = make_slot()
    wide, narrow = slot.parameters(layer_layout(0))["w"], slot.parameters(layer_layout(0, num_elements=8))["w"]
    before = wide._version, narrow._version
    fill(slot, 2.0)
    assert wide._version > before[0]
    assert narrow._version > before[1]


@pytest.mark.parametrize("num_elements", [64, 8], ids=["same layout", "smaller layer"])
def test_backward_over_a_refilled_slot_raises_instead_of_using_the_wrong_bytes(num_elements: int) -> None:
    slot = make_slot()
    fill(slot, 3.0)
    hidden = torch.ones(64, requires_grad=True)
    loss = (hidden * slot.parameters(layer_layout(0))["w"]).sum()
    fill(slot, 5.0, num_elements)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_over_an_untouched_slot_gives_the_gradient() -> None:
    slot = make_slot()
    fill(slot, 3.0)
    hidden = torch.ones(64, requires_grad=True)
    (hidden * slot.parameters(layer_layout(0))["w"]).sum().backward()
    assert torch.equal(hidden.grad, torch.full((64,), 3.0))  # type: ignore[arg-type]


def test_a_write_to_one_view_does_not_bump_the_others() -> None:
    slot = make_slot(nbytes=make_layout(0, {"a": ((4,), torch.float32), "b": ((4,), torch.float32)}).nbytes)
    views = slot.parameters(make_layout(0, {"a": ((4,), torch.float32), "b": ((4,), torch.float32)}))
    before = views["b"]._version
    views["a"].add_(1.0)
    assert views["b"]._version == before


def test_a_fill_under_inference_mode_bumps_the_versions_too() -> None:
    slot = make_slot()
    fill(slot, 3.0)
    hidden = torch.ones(64, requires_grad=True)
    loss = (hidden * slot.parameters(layer_layout(0))["w"]).sum()
    with torch.inference_mode():
        fill(slot, 5.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_made_under_inference_mode_serve_a_later_training_visit() -> None:
    slot = make_slot()
    fill(slot, 3.0)
    with torch.inference_mode():
        slot.parameters(layer_layout(0))
    hidden = torch.ones(64, requires_grad=True)
    (hidden * slot.parameters(layer_layout(0))["w"]).sum().backward()
    assert torch.equal(hidden.grad, torch.full((64,), 3.0))  # type: ignore[arg-type]
