"""The VRAM budget: what is refused, when layers become resident, and how many."""

from __future__ import annotations

import gc
import logging
import warnings
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import optimizer as torch_optimizer

from hf_lema.choices import StepChoices
from hf_lema.config import LemaConfig
from hf_lema.runtime.residency import HEAD_ROOM_BYTES, BatchShape, Planned, VramBudget, free_vram_bytes
from hf_lema.runtime.schedule import spread_evenly
from hf_lema.runtime.segments import hold_free, take_segment

GIB, MIB = 2**30, 2**20
CUDA = torch.device("cuda", 0)


class FakeStreamer:
    """Layers of one size, and a record of which were made resident."""

    def __init__(
        self, num_layers: int = 32, layer_bytes: int = 400 * MIB, num_slots: int = 2, device: torch.device = CUDA
    ) -> None:
        self.streamable_layers = tuple(range(num_layers))
        self.layer_bytes = layer_bytes
        self.num_slots = num_slots
        self.device = device
        self.calls: list[tuple[int, ...]] = []
        self.host_store = SimpleNamespace(file_layers=())

    def set_resident(self, layers: Sequence[int]) -> None:
        self.calls.append(tuple(layers))

    @property
    def resident_layers(self) -> tuple[int, ...]:
        return self.calls[-1] if self.calls else ()


class FakeCard:
    """What torch says of a card's memory."""

    def __init__(self) -> None:
        self.total_bytes = 16 * GIB
        self.others_bytes = 1 * GIB
        self.reserved_bytes = 3 * GIB
        self.allocated_bytes = 2 * GIB
        self.fraction = 1.0
        self.num_empties = 0

    def empty_cache(self) -> None:
        self.num_empties += 1


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    card = FakeCard()

    def mem_get_info(device: object = None) -> tuple[int, int]:
        return card.total_bytes - card.others_bytes - card.reserved_bytes, card.total_bytes

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: card.reserved_bytes)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: card.allocated_bytes)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device=None: card.fraction)
    monkeypatch.setattr(torch.cuda, "empty_cache", card.empty_cache)
    monkeypatch.setattr("hf_lema.runtime.residency.hold_free", lambda least_bytes, device: [])
    return card


@pytest.fixture(autouse=True)
def no_hooks_left() -> Iterator[None]:
    """Counting optimizer steps ends with the budget that counts."""
    before = dict(torch_optimizer._global_optimizer_post_hooks)
    yield
    if dict(torch_optimizer._global_optimizer_post_hooks) != before:
        gc.collect()
    assert dict(torch_optimizer._global_optimizer_post_hooks) == before


def update() -> None:
    """One optimizer step."""
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    torch.optim.SGD([parameter], lr=0.1).step()


class FakePlanner:
    """Ways to run with the bytes that each takes, and a record of what was asked and applied."""

    def __init__(self, streamer: FakeStreamer, ways: dict[int, StepChoices] | None = None) -> None:
        self.streamer = streamer
        self.ways = ways or {0: StepChoices(resident_layers=(1, 2))}  # a plan's own residents are not taken over
        self.activation_bytes = 0
        self.asked: list[tuple[int, int, int | None]] = []
        self.applied: list[StepChoices] = []

    def plan(self, batch_size: int, seq_len: int, budget_bytes: int | None) -> Planned:
        self.asked.append((batch_size, seq_len, budget_bytes))
        fitting = [nbytes for nbytes in self.ways if budget_bytes is None or nbytes <= budget_bytes]
        if not fitting:
            raise ValueError(f"the least that works is {min(self.ways)}")
        return Planned(self.ways[min(fitting) if budget_bytes is None else max(fitting)], self.activation_bytes)

    def apply(self, choices: StepChoices) -> None:
        self.applied.append(choices)
        self.streamer.set_resident(choices.resident_layers)


def make_budget(
    streamer: FakeStreamer,
    other_bytes: int = GIB // 2,
    movable_bytes: int = 0,
    planner: FakePlanner | None = None,
    given: tuple[BatchShape, Planned] | None = None,
    **config: Any,
) -> VramBudget:
    planner = planner or FakePlanner(streamer)
    budget = VramBudget(
        LemaConfig(**config),
        streamer,
        other_bytes,
        movable_bytes,
        planner.plan,
        planner.apply,  # type: ignore[arg-type]
        given,
    )
    budget.start()
    return budget


def train(budget: VramBudget, num_steps: int = 1, num_tokens: int = 4096, accumulation: int = 1) -> None:
    for _ in range(num_steps):
        for _ in range(accumulation):
            budget.before_training_step(num_tokens // 512, 512)
        update()


# ---- what is free ----


def test_free_memory_is_what_the_card_has_left_for_this_process(card: FakeCard) -> None:
    # 16 in all, 1 of others, 2 allocated here; what is reserved but not allocated can be used.
    assert free_vram_bytes(CUDA) == 13 * GIB


def test_the_memory_fraction_of_the_process_holds_it_to_a_smaller_card(card: FakeCard) -> None:
    card.fraction = 0.5
    assert free_vram_bytes(CUDA) == 6 * GIB


# ---- what is refused ----


def test_a_budget_below_the_slots_and_the_resident_parts_is_refused_with_the_minimum(card: FakeCard) -> None:
    with pytest.raises(ValueError, match="vram_budget") as caught:
        make_budget(FakeStreamer(), vram_budget="1GiB")
    text = str(caught.value)
    for part in ("1.00 GiB", "1.28 GiB", "512.00 MiB that cannot leave", "2 slots of 400.00 MiB", "before activations"):
        assert part in text, part


def test_a_budget_of_exactly_the_minimum_is_taken(card: FakeCard) -> None:
    minimum_bytes = GIB // 2 + 800 * MIB
    assert make_budget(FakeStreamer(), vram_budget=minimum_bytes).budget_bytes == minimum_bytes
    with pytest.raises(ValueError, match="least that works"):
        make_budget(FakeStreamer(), vram_budget=minimum_bytes - 1)


def test_more_slots_need_more(card: FakeCard) -> None:
    with pytest.raises(ValueError, match=r"3 slots of 400\.00 MiB"):
        make_budget(FakeStreamer(num_slots=3), vram_budget=GIB // 2 + 800 * MIB)


def test_a_budget_too_small_is_refused_on_a_cpu_too() -> None:
    with pytest.raises(ValueError, match="least that works"):
        make_budget(FakeStreamer(device=torch.device("cpu")), vram_budget="1GiB")


# ---- how many, and when ----


def test_min_keeps_nothing_resident(card: FakeCard) -> None:
    streamer = FakeStreamer()
    budget = make_budget(streamer, vram_budget="min")
    train(budget, 6)
    assert streamer.calls in ([], [()])
    assert budget.budget_bytes is None


@pytest.mark.parametrize("vram_budget", ["auto", "min", "6GiB"])
def test_on_a_cpu_nothing_is_made_resident(vram_budget: str) -> None:
    streamer = FakeStreamer(device=torch.device("cpu"))
    train(make_budget(streamer, vram_budget=vram_budget), 6)
    assert streamer.calls in ([], [()])


def test_auto_fills_what_is_free_less_head_room(card: FakeCard) -> None:
    streamer = FakeStreamer()
    budget = make_budget(streamer)
    assert budget.budget_bytes == 15 * GIB - HEAD_ROOM_BYTES
    card.reserved_bytes = 5 * GIB
    train(budget, 3)
    num_resident = int(9.5 * GIB) // (400 * MIB)
    assert num_resident == 24
    assert streamer.resident_layers == spread_evenly(24, 32)
    assert 5 * GIB + num_resident * streamer.layer_bytes <= 15 * GIB - HEAD_ROOM_BYTES


def test_a_stated_budget_is_filled_with_whole_layers_and_never_passed(card: FakeCard) -> None:
    for reserved_bytes in (3 * GIB, int(4.7 * GIB), 6 * GIB - 400 * MIB, 6 * GIB - 400 * MIB + 1, 6 * GIB):
        streamer = FakeStreamer()
        budget = make_budget(streamer, vram_budget="6GiB")
        card.reserved_bytes = reserved_bytes
        train(budget, 3)
        num_resident = len(streamer.resident_layers)
        assert reserved_bytes + num_resident * streamer.layer_bytes <= 6 * GIB
        assert reserved_bytes + (num_resident + 1) * streamer.layer_bytes > 6 * GIB


def test_nothing_is_resident_before_two_updates_were_measured(card: FakeCard) -> None:
    streamer = FakeStreamer()
    budget = make_budget(streamer, vram_budget="6GiB")
    for num_updates in range(4):
        budget.before_training_step(4096 // 512, 512)
        assert bool(streamer.resident_layers) == (num_updates >= 2), num_updates
        update()


def test_micro_batches_of_one_update_do_not_count_as_steps(card: FakeCard) -> None:
    streamer = FakeStreamer()
    budget = make_budget(streamer, vram_budget="6GiB")
    train(budget, 2, accumulation=8)
    assert streamer.resident_layers == ()
    budget.before_training_step(4096 // 512, 512)
    assert streamer.resident_layers != ()


def test_the_set_is_chosen_once_and_left_alone(card: FakeCard) -> None:
    streamer = FakeStreamer()
    train(make_budget(streamer, vram_budget="6GiB"), 12)
    assert len(streamer.calls) == 2  # none at the first batch, the set at the third
    assert card.num_empties == 1


def test_a_larger_batch_sends_every_layer_back_and_is_measured_again(card: FakeCard) -> None:
    streamer = FakeStreamer()
    budget = make_budget(streamer, vram_budget="6GiB")
    train(budget, 3, num_tokens=1000)
    first = streamer.resident_layers
    budget.before_training_step(1, 1001)
    assert streamer.resident_layers == ()
    assert card.num_empties == 2, "the memory that they took is still reserved"
    update()
    card.reserved_bytes += GIB
    train(budget, 2, num_tokens=1001)
    assert 0 < len(streamer.resident_layers) < len(first)


def test_a_smaller_batch_changes_nothing(card: FakeCard) -> None:
    streamer = FakeStreamer()
    budget = make_budget(streamer, vram_budget="6GiB")
    train(budget, 3, num_tokens=1000)
    chosen = streamer.resident_layers
    train(budget, 3, num_tokens=10)
    train(budget, 3, num_tokens=1000)
    assert streamer.resident_layers == chosen
    assert len(streamer.calls) == 2


def test_resident_layers_are_indices_of_layers_that_can_be_streamed(card: FakeCard) -> None:
    streamer = FakeStreamer(4)
    streamer.streamable_layers = (3, 5, 8, 13)
    budget = make_budget(streamer, vram_budget=3 * GIB + 800 * MIB)
    train(budget, 3)
    assert streamer.resident_layers == tuple((3, 5, 8, 13)[i] for i in spread_evenly(2, 4))


def test_a_budget_that_holds_every_layer_says_so(card: FakeCard, caplog: pytest.LogCaptureFixture) -> None:
    streamer = FakeStreamer(4)
    with caplog.at_level(logging.WARNING):
        train(make_budget(streamer), 4)
    assert streamer.resident_layers == (0, 1, 2, 3)
    (record,) = caplog.records
    assert "holds every layer" in record.getMessage()
    assert "14.50 GiB" in record.getMessage()


def test_a_step_that_passes_the_budget_with_nothing_resident_says_so_once(card: FakeCard) -> None:
    streamer = FakeStreamer()
    budget = make_budget(streamer, vram_budget="4GiB")
    card.reserved_bytes = 5 * GIB
    with pytest.warns(UserWarning, match="8 x 512 tokens takes 5.00 GiB .* budget of 4.00 GiB") as caught:
        train(budget, 8)
    assert len(caught) == 1
    assert streamer.resident_layers == ()


def test_a_model_with_nothing_to_stream_divides_by_nothing(card: FakeCard) -> None:
    streamer = FakeStreamer(0, layer_bytes=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(make_budget(streamer), 4)
    assert streamer.resident_layers == ()


def test_a_budget_that_is_gone_counts_no_more(card: FakeCard) -> None:
    before = len(torch_optimizer._global_optimizer_post_hooks)
    budget = make_budget(FakeStreamer(), vram_budget="6GiB")
    assert len(torch_optimizer._global_optimizer_post_hooks) == before + 1
    del budget
    gc.collect()
    assert len(torch_optimizer._global_optimizer_post_hooks) == before
    update()


# ---- plans ----

WHOLE, HALVES, LEAST = (
    StepChoices(),
    StepChoices(micro_batch_size=4),
    StepChoices(micro_batch_size=1, boundaries_in_ram=True, outside_in_ram=True),
)


def planner_of_three(streamer: FakeStreamer) -> FakePlanner:
    return FakePlanner(streamer, {8 * GIB: WHOLE, 5 * GIB: HALVES, 2 * GIB: LEAST})


@pytest.mark.parametrize("limit", ["others", "fraction"])
def test_a_stated_budget_is_no_more_than_the_process_can_have(card: FakeCard, limit: str) -> None:
    if limit == "others":
        card.others_bytes = 8 * GIB
    else:
        card.fraction = 0.5
    streamer = FakeStreamer()
    with pytest.warns(UserWarning, match="vram_budget is 10.00 GiB, but this process can have 7.50 GiB"):
        budget = make_budget(streamer, vram_budget="10GiB")
    train(budget, 4)
    assert card.reserved_bytes + len(streamer.resident_layers) * streamer.layer_bytes <= 8 * GIB - HEAD_ROOM_BYTES
    assert make_budget(FakeStreamer(), vram_budget="6GiB").budget_bytes == 6 * GIB


def test_a_longer_sequence_is_planned_anew_although_its_batch_has_fewer_tokens(card: FakeCard) -> None:
    streamer = FakeStreamer()
    planner = planner_of_three(streamer)
    budget = make_budget(streamer, planner=planner, vram_budget="6GiB")
    train(budget, 4)
    assert streamer.resident_layers
    budget.before_training_step(1, 2048)
    assert planner.asked[-1] == (2, 2048, 6 * GIB), "as many tokens as 8 x 512 have, in sequences of 2,048"
    assert streamer.resident_layers == ()


def test_every_shape_is_measured_before_layers_are_resident_beside_it(
    card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a longer sequence came, the peak of the batch that has more tokens has to be seen again."""

    def step(batch_size: int, seq_len: int, needed_bytes: int) -> None:
        budget.before_training_step(batch_size, seq_len)
        resident_bytes = len(streamer.resident_layers) * streamer.layer_bytes
        # An empty cache, and then the step: reserved is what it needs beside what is resident.
        card.reserved_bytes = max(card.reserved_bytes, needed_bytes + resident_bytes)
        assert card.reserved_bytes <= 6 * GIB
        update()

    streamer = FakeStreamer()
    budget = make_budget(streamer, vram_budget="6GiB")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(card, "reserved_bytes", GIB))
    wide, narrow = (8, 512, 5 * GIB), (1, 2048, 2 * GIB)
    for shape in [wide, wide, wide, narrow, narrow, narrow, narrow, wide, wide, wide, narrow, wide]:
        step(*shape)
    assert len(streamer.resident_layers) == GIB // (400 * MIB)


def test_a_larger_evaluation_sends_the_layers_back_and_is_measured_with_the_steps(card: FakeCard) -> None:
    streamer = FakeStreamer()
    planner = FakePlanner(streamer)
    budget = make_budget(streamer, planner=planner, vram_budget="6GiB")
    train(budget, 3, num_tokens=512)
    assert streamer.resident_layers
    budget.before_evaluation(1, 512)
    assert streamer.resident_layers, "no larger than a step"
    budget.before_evaluation(8, 512)
    assert streamer.resident_layers == ()
    card.reserved_bytes = 5 * GIB
    budget.before_evaluation(8, 512)
    train(budget, 2, num_tokens=512)
    resident = streamer.resident_layers
    assert len(resident) == GIB // (400 * MIB), "beside what the evaluation took"
    budget.before_evaluation(8, 512)
    assert streamer.resident_layers == resident
    assert planner.asked == [(1, 512, 6 * GIB)], "an evaluation is not planned"


@pytest.mark.parametrize("is_given", [False, True])
def test_activations_get_one_segment_before_the_first_step_and_residents_settle_beside_it(
    is_given: bool, card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamer, alive, log = FakeStreamer(), weakref.WeakSet[torch.Tensor](), []

    def hold(least_bytes: int, device: torch.device) -> list[torch.Tensor]:
        assert (least_bytes, device) == (streamer.layer_bytes, CUDA)
        held = [torch.empty(1)]
        alive.update(held)
        return held

    def apply(choices: StepChoices) -> None:
        log.append(f"{len(choices.resident_layers)} resident, {len(alive)} held")
        streamer.set_resident(choices.resident_layers)

    monkeypatch.setattr("hf_lema.runtime.residency.take_segment", lambda nbytes, device: log.append(f"{nbytes} taken"))
    monkeypatch.setattr("hf_lema.runtime.residency.hold_free", hold)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append("emptied"))
    planner = FakePlanner(streamer)
    planner.activation_bytes, planner.apply = 700, apply  # type: ignore[method-assign]
    given = (BatchShape(8, 512), Planned(StepChoices(), 700)) if is_given else None
    budget = make_budget(streamer, planner=planner, given=given, vram_budget="6GiB")
    first = ["0 resident, 0 held", "emptied", "700 taken"]
    if is_given:
        assert log == first[:1], "what is loaded after the wrapping is not there yet"
    train(budget)
    assert log == first
    train(budget, 3)
    assert log == (first if is_given else [*first, "7 resident, 1 held"])
    assert not alive


def test_where_activations_are_kept_their_segment_comes_before_the_second_step(
    card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr("hf_lema.runtime.residency.take_segment", lambda nbytes, device: taken.append(nbytes))
    streamer = FakeStreamer()
    planner = FakePlanner(streamer, {0: StepChoices(kept_layers=(31,))})
    planner.activation_bytes = 700
    budget = make_budget(streamer, planner=planner, vram_budget="6GiB")
    train(budget)
    assert taken == []
    train(budget)
    assert taken == [700]
    train(budget, 3)
    assert taken == [700]


@pytest.mark.parametrize(("free", "is_taken"), [((), True), ((349, 20), True), ((350,), False), ((900,), False)])
def test_a_segment_is_not_taken_beside_one_that_serves(
    free: tuple[int, ...], is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr("hf_lema.runtime.segments._free_pieces", lambda device: list(free))
    monkeypatch.setattr(torch, "empty", lambda nbytes, **_: taken.append(nbytes))
    take_segment(700, CUDA)
    assert taken == ([700] if is_taken else [])


def test_what_is_held_is_every_large_free_piece_of_this_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def segment(device: int, stream: int, *blocks: tuple[int, str]) -> dict[str, Any]:
        return {"device": device, "stream": stream, "blocks": [{"size": n, "state": state} for n, state in blocks]}

    snapshot = [
        segment(0, 7, (400, "inactive"), (500, "active_allocated"), (900, "inactive")),
        segment(0, 7, (399, "inactive"), (401, "active_pending_free"), (600, "inactive")),
        segment(0, 0, (1000, "inactive")),
        segment(1, 7, (1000, "inactive")),
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: snapshot)
    stream = SimpleNamespace(device_index=0, cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    held = hold_free(400, torch.device("cpu"))
    assert [tensor.nbytes for tensor in held] == [900, 600, 400]


def test_a_plan_that_was_given_holds_until_a_batch_is_larger(card: FakeCard) -> None:
    streamer = FakeStreamer()
    planner = planner_of_three(streamer)
    given = StepChoices(micro_batch_size=2, resident_layers=(3, 5))
    budget = make_budget(streamer, planner=planner, given=(BatchShape(8, 512), Planned(given)), vram_budget="6GiB")
    train(budget, 4)
    train(budget, 2, num_tokens=512)
    assert planner.applied == [given]
    assert planner.asked == []
    train(budget, num_tokens=8192)
    assert planner.asked == [(16, 512, 6 * GIB)]
    assert planner.applied[-1] == HALVES


def test_min_runs_as_the_least_plan_says(card: FakeCard) -> None:
    streamer = FakeStreamer()
    planner = planner_of_three(streamer)
    train(make_budget(streamer, planner=planner, vram_budget="min"), num_steps=4)
    assert planner.asked == [(8, 512, None)]
    assert planner.applied == [LEAST]


def test_the_plan_of_a_stated_budget_comes_first_and_layers_fill_the_rest(card: FakeCard) -> None:
    streamer = FakeStreamer()
    planner = planner_of_three(streamer)
    budget = make_budget(streamer, planner=planner, vram_budget="6GiB")
    train(budget)
    assert planner.applied == [HALVES]
    train(budget, num_steps=3)
    resident = planner.applied[-1].resident_layers
    assert planner.applied == [HALVES, replace(HALVES, resident_layers=resident)]
    assert len(resident) == (6 * GIB - card.reserved_bytes) // (400 * MIB)


def test_a_plan_that_takes_more_than_it_said_is_made_again_with_less(card: FakeCard) -> None:
    streamer = FakeStreamer()
    planner = planner_of_three(streamer)
    budget = make_budget(streamer, planner=planner, vram_budget="6GiB")
    card.reserved_bytes = int(7.5 * GIB)  # 1.5 GiB too much: 4.5 GiB are planned with next
    train(budget, num_steps=3)
    assert planner.applied == [HALVES, LEAST]
    card.reserved_bytes = 3 * GIB
    train(budget, num_steps=3)
    assert planner.applied[-1] == replace(LEAST, resident_layers=streamer.resident_layers)
    assert len(streamer.resident_layers) == 7


def test_a_stated_budget_in_which_nothing_fits_is_refused_at_the_first_step(card: FakeCard) -> None:
    streamer = FakeStreamer()
    budget = make_budget(streamer, planner=planner_of_three(streamer), vram_budget="1.9GiB")
    with pytest.raises(ValueError, match="the least that works"):
        budget.before_training_step(8, 512)


def test_auto_runs_on_with_the_least_where_nothing_fits_and_says_so(card: FakeCard) -> None:
    card.others_bytes = 14 * GIB
    card.reserved_bytes = 0
    card.allocated_bytes = 0
    streamer = FakeStreamer()
    planner = planner_of_three(streamer)
    with pytest.warns(UserWarning, match="goes on with what takes least"):
        make_budget(streamer, planner=planner).before_training_step(8, 512)
    assert planner.applied == [LEAST]


def test_a_longer_batch_is_planned_anew_with_the_whole_budget(card: FakeCard) -> None:
    streamer = FakeStreamer()
    planner = planner_of_three(streamer)
    budget = make_budget(streamer, planner=planner, vram_budget="9GiB")
    card.reserved_bytes = 10 * GIB
    train(budget, num_steps=3)
    assert planner.applied[-1] == HALVES
    card.reserved_bytes = 3 * GIB
    train(budget, num_tokens=8192)
    assert planner.asked[-1] == (16, 512, 9 * GIB)
    assert planner.applied[-1] == WHOLE


def test_embedding_and_head_do_not_count_in_the_minimum_since_they_can_leave(card: FakeCard) -> None:
    streamer = FakeStreamer()
    with pytest.raises(ValueError, match="least that works"):
        make_budget(streamer, vram_budget="1GiB")
    make_budget(streamer, movable_bytes=GIB // 2, vram_budget="1GiB")


def test_a_model_that_cannot_be_planned_is_not_planned_for_ever(card: FakeCard) -> None:
    streamer = FakeStreamer()
    planner = FakePlanner(streamer, {-(10**15): WHOLE})  # the same answer whatever the budget
    budget = make_budget(streamer, planner=planner, vram_budget="6GiB")
    card.reserved_bytes = 7 * GIB
    with pytest.warns(UserWarning, match="more than the budget"):
        train(budget, num_steps=3)
    assert planner.applied == [WHOLE, WHOLE]


# ---- kept activations ----

KEEPS_SIX, KEEPS_TWO = (StepChoices(kept_layers=tuple(range(32 - n, 32)), resident_layers=(3, 9)) for n in (6, 2))


def planner_of_kept(streamer: FakeStreamer) -> FakePlanner:
    return FakePlanner(streamer, {7 * GIB: KEEPS_SIX, 5 * GIB: KEEPS_TWO, 3 * GIB: WHOLE})


def without_residents(choices: StepChoices) -> StepChoices:
    return replace(choices, resident_layers=())


def test_layers_keep_activations_from_the_first_step_and_residents_fill_what_is_measured(card: FakeCard) -> None:
    streamer = FakeStreamer()
    planner = planner_of_kept(streamer)
    budget = make_budget(streamer, planner=planner, vram_budget="8GiB")
    card.reserved_bytes = 7 * GIB
    train(budget)
    assert planner.applied == [without_residents(KEEPS_SIX)]
    train(budget, num_steps=4)
    assert planner.applied[1:] == [replace(KEEPS_SIX, resident_layers=streamer.resident_layers)]
    assert len(streamer.resident_layers) == GIB // (400 * MIB)


def test_what_only_the_first_kept_visits_take_is_not_measured(card: FakeCard, monkeypatch: pytest.MonkeyPatch) -> None:
    streamer = FakeStreamer()
    planner = planner_of_kept(streamer)
    budget = make_budget(streamer, planner=planner, vram_budget="8GiB")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(card, "reserved_bytes", 4 * GIB))
    for needed_bytes in (8 * GIB, 6 * GIB, 6 * GIB, 6 * GIB):  # copies of weights in the first step
        budget.before_training_step(8, 512)
        card.reserved_bytes = max(card.reserved_bytes, needed_bytes)
        update()
    assert planner.applied[-1].kept_layers == KEEPS_SIX.kept_layers
    assert len(streamer.resident_layers) == 2 * GIB // (400 * MIB)


def test_residents_give_way_to_a_plan_that_takes_more_and_then_kept_layers_do(card: FakeCard) -> None:
    streamer = FakeStreamer()
    planner = planner_of_kept(streamer)
    budget = make_budget(streamer, planner=planner, vram_budget="8GiB")
    card.reserved_bytes = 8 * GIB  # the plan's two resident layers no longer fit
    train(budget, num_steps=4)
    assert planner.applied[-1] == without_residents(KEEPS_SIX)

    streamer = FakeStreamer()
    planner = planner_of_kept(streamer)
    budget = make_budget(streamer, planner=planner, vram_budget="8GiB")
    card.reserved_bytes = 8 * GIB + 300 * MIB
    train(budget, num_steps=3)
    assert planner.asked[-1] == (8, 512, 8 * GIB - 1100 * MIB), "the excess, and what two resident layers would take"
    assert planner.applied == [without_residents(KEEPS_SIX), without_residents(KEEPS_TWO)]
    card.reserved_bytes = 6 * GIB
    train(budget, num_steps=3)
    assert planner.applied[-1].kept_layers == KEEPS_TWO.kept_layers
    assert len(streamer.resident_layers) == 2 * GIB // (400 * MIB)


def test_kept_layers_are_given_up_where_no_plan_is_left(card: FakeCard) -> None:
    streamer = FakeStreamer()
    planner = FakePlanner(streamer, {7 * GIB: KEEPS_SIX})
    budget = make_budget(streamer, planner=planner, vram_budget="8GiB")
    card.reserved_bytes = 10 * GIB
    train(budget, num_steps=3)
    assert planner.applied == [without_residents(KEEPS_SIX), StepChoices()]
    card.reserved_bytes = 7 * GIB
    train(budget, num_steps=3)
    assert planner.applied[-1] == StepChoices(resident_layers=streamer.resident_layers)
    assert len(streamer.resident_layers) == 2


def test_a_longer_batch_keeps_what_its_own_plan_says(card: FakeCard) -> None:
    streamer = FakeStreamer()
    planner = planner_of_kept(streamer)
    budget = make_budget(streamer, planner=planner, vram_budget="8GiB")
    train(budget, num_steps=4)
    planner.ways = {5 * GIB: KEEPS_TWO}
    budget.before_training_step(8, 1024)
    assert planner.applied[-1] == without_residents(KEEPS_TWO)
