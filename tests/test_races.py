"""Copies, kernels and threads at random moments: a visit sees its own layer, whole, and nothing hangs or is lost.

The first part draws schedules of a streamer over a store in memory; the second stretches the copies and the layers of a
real model, the same on a CPU and on a GPU. Memory that is about to be filled is overwritten first: whoever reads it too
early, or too late, gets rubbish.
"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_memcheck
import pytest
import torch
from fake_store import CPU, FakeStore, bounded
from models import adapt, assert_same_tensors, batch, build, closing, enable_checkpointing, lora, trainables
from torch import nn
from transformers import PreTrainedModel

from hf_lema import LemaConfig, LemaModelWrapper, StepChoices, get_streamer
from hf_lema.model_runtime import runtime_of
from hf_lema.runtime import host_store
from hf_lema.runtime.schedule import Direction
from hf_lema.runtime.streamer import LayerStreamer

# ---- schedules ----


def pause(rng: random.Random) -> None:
    """Lets other threads run, mostly not at all."""
    for _ in range(rng.choice((0, 0, 1, 3, 10))):
        os.sched_yield()


@contextmanager
def gatekeeper(store: FakeStore, seed: int) -> Iterator[None]:
    """Holds reads up and lets them go at random moments, in a thread of its own."""
    rng, done = random.Random(seed), threading.Event()

    def keep() -> None:
        while not done.is_set():
            store.gate.clear()
            pause(rng)
            store.gate.set()
            pause(rng)

    thread = threading.Thread(target=keep, name="test-gatekeeper", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(10.0)
        assert not thread.is_alive()
        store.gate.set()


class Schedule:
    """One random life of a streamer; the same seed draws the same calls."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        sizes = {i: rng.choice((16, 24, 64)) for i in range(rng.randint(1, 7))}
        self.store = FakeStore(sizes, lambda layer_idx, out: out.fill_(0xEE), enqueues=rng.random() < 0.2)
        self.streamer = LayerStreamer(self.store, CPU, len(sizes), rng.randint(2, 5))
        self.layers = sorted(sizes)
        self.version = 0
        self.num_visits = 0

    def visit(self, layer_idx: int, direction: Direction, expect_backward: bool = False, error: bool = False) -> None:
        self.num_visits += 1
        expected = self.store.host_views(layer_idx)
        with self.streamer.lease(layer_idx, direction, expect_backward=expect_backward) as weights:
            for _ in range(2):  # when the visit begins, and when it ends
                assert all(torch.equal(weights[n], t) for n, t in expected.items()), f"layer {layer_idx}"
                pause(self.rng)
            if error:
                raise KeyError("on purpose")

    def forward(self, lowest: int | None) -> None:
        for i in self.layers:
            self.visit(i, Direction.FORWARD, lowest is not None and i >= lowest)

    def backward(self, lowest: int) -> None:
        for i in reversed(self.layers[lowest:]):
            self.visit(i, Direction.BACKWARD)

    def step(self) -> None:
        lowest = self.rng.choice((0, 0, self.rng.choice(self.layers)))
        num_forwards = self.rng.choice((1, 1, 2))
        for _ in range(num_forwards):
            self.forward(lowest)
        for _ in range(num_forwards):
            self.backward(lowest)

    def broken_step(self) -> None:
        """A step that ends in the middle, in either direction."""
        with suppress(KeyError):
            is_backward = self.rng.random() < 0.5
            if is_backward:
                self.forward(0)
            order = list(reversed(self.layers)) if is_backward else self.layers
            for i in order[: self.rng.randrange(len(order) + 1)]:
                self.visit(i, Direction.BACKWARD if is_backward else Direction.FORWARD, not is_backward)
            self.visit(self.rng.choice(self.layers), Direction.FORWARD, error=True)

    def change(self) -> None:
        """Host bytes change between visits. A read that is under way may end with old ones; it must not be kept."""
        layer_idx = self.rng.choice(self.layers)
        self.version += 1
        self.store.write(layer_idx, self.version)
        self.streamer.invalidate(layer_idx)

    def choose_residents(self) -> None:
        self.streamer.set_resident([i for i in self.layers if self.rng.random() < 0.3])

    def run(self) -> None:
        acts = (self.step, self.step, self.broken_step, lambda: self.forward(None), self.change, self.choose_residents)
        for _ in range(self.rng.randint(3, 8)):
            self.rng.choice(acts)()


def run_schedules(seeds: range) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    num_visits = num_moved = 0
    try:
        for seed in seeds:
            schedule = Schedule(seed)
            with gatekeeper(schedule.store, seed):
                try:
                    schedule.run()
                except (AssertionError, RuntimeError) as error:
                    raise AssertionError(f"seed {seed}: {error}") from error
                finally:
                    bounded(schedule.streamer.close)
            assert schedule.store.max_concurrent_reads <= 1
            num_visits += schedule.num_visits
            num_moved += len(schedule.store.started)
    finally:
        sys.setswitchinterval(interval)
    assert num_visits > 10 * len(seeds)
    assert num_moved > 5 * len(seeds)


def test_a_hundred_random_schedules_lend_whole_layers() -> None:
    run_schedules(range(100))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_random_schedules_lend_whole_layers() -> None:
    run_schedules(range(100, 1100))


def test_a_schedule_would_see_a_layer_that_is_handed_out_half_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of the check: a slot that is ready when its read begins."""
    from hf_lema.runtime.prefetcher import Prefetcher

    def early(self: Prefetcher, layer_idx: int, slot: Any) -> None:
        with self._changed:
            self._finish(layer_idx, slot)
            self._changed.notify_all()
        self._enqueue(layer_idx, slot)

    monkeypatch.setattr(Prefetcher, "_fill", early)
    with pytest.raises(AssertionError, match="seed"):
        run_schedules(range(50))


# ---- models whose copies and layers are late ----


@dataclass(frozen=True)
class Way:
    """How a model is streamed."""

    tier: str
    num_slots: int
    choices: StepChoices

    @property
    def is_cut(self) -> bool:
        """Whether sums are made in parts, so that the numbers are not those of the resident model to the bit."""
        return bool(self.choices.micro_batch_size or self.choices.tile_tokens or self.choices.outside_in_ram)


WAYS = [
    Way("ram", 2, StepChoices()),
    Way("disk", 3, StepChoices(boundaries_in_ram=True)),
    Way("mixed", 4, StepChoices(resident_layers=(1,))),
    Way("disk", 5, StepChoices(micro_batch_size=1, boundaries_in_ram=True)),
    Way("ram", 2, StepChoices(micro_batch_size=2, tile_tokens=8, outside_in_ram=True)),
    Way("mixed", 2, StepChoices(boundaries_in_ram=True, micro_batch_size=1, resident_layers=(0, 3))),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DELAYS: dict[str, Callable[[float], object]] = {
    "cpu": lambda delay_ms: time.sleep(delay_ms / 1e3),
    "cuda": lambda delay_ms: torch.cuda._sleep(int(delay_ms * 2e6)),  # cycles of about 2 GHz
}
"""What makes the stream, or the thread, on which it is called late."""

STRETCHES = {"copies_late": (0.4, 0.0, 0.0), "events_late": (0.0, 0.4, 0.0), "layers_late": (0.0, 0.0, 0.4)}
STRETCHES["all_late"] = (0.2, 0.1, 0.3)
"""Delay before a copy, after it, and in a layer, in milliseconds, at most."""


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a layer is many windows of the ring, and the ring less than a layer."""
    monkeypatch.setattr(host_store, "WINDOW_BYTES", 4096)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build().save_pretrained(path)
    return path


def streamed(folder: Path, way: Way, device: str) -> nn.Module:
    layer_bytes = sum(p.numel() * p.element_size() for p in build().model.layers[0].parameters())
    budgets = {"ram": "auto", "disk": "min", "mixed": 5 * layer_bytes // 2}
    config = LemaConfig(vram_budget="min", ram_budget=budgets[way.tier], num_slots=way.num_slots, choices=way.choices)
    model = LemaModelWrapper.from_pretrained(str(folder), config, device=device, attn_implementation="eager")
    assert get_streamer(model).host_store.tier == way.tier
    return adapt(model, lora(lora_dropout=0.0)).to(device).train()


def stretch(model: Any, stretched: str, device: str, seed: int) -> None:
    """Makes copies and layers late by random times, and overwrites memory that is about to be filled."""
    rng, delay = random.Random(seed), DELAYS[device]
    before_ms, after_ms, inside_ms = STRETCHES[stretched]
    store, read_into = get_streamer(model).host_store, get_streamer(model).host_store.read_into
    lm: PreTrainedModel = model.get_base_model()
    kept = runtime_of(lm).options.boundaries
    keep, fetch = kept.keep, kept._fetch

    def late_read(layer_idx: int, out: torch.Tensor) -> None:
        out.fill_(255)
        delay(rng.random() * before_ms)
        read_into(layer_idx, out)
        delay(rng.random() * after_ms)

    def late_keep(hidden: torch.Tensor) -> torch.Tensor:
        with kept._outward.use():
            delay(rng.random() * before_ms)
        return keep(hidden)

    def late_fetch(entry: Any, arrival: Any) -> None:
        with kept._homeward.use():
            delay(rng.random() * after_ms)
        fetch(entry, arrival)

    store.read_into, kept.keep, kept._fetch = late_read, late_keep, late_fetch
    for layer in lm.model.layers:
        layer.mlp.gate_proj.register_forward_pre_hook(lambda *_: delay(rng.random() * inside_ms))


def numbers_of(model: nn.Module, device: str, num_steps: int = 2) -> dict[str, torch.Tensor]:
    """Losses of training and evaluation in turn, and what was trained."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = {}
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = model(**batch(4, seed=step, device=device)).loss
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            evaluated = model(**batch(4, seed=9, device=device)).loss
        found |= {f"loss {step}": loss.detach(), f"eval loss {step}": evaluated}
    return found | trainables(model)


def assert_no_race(folder: Path, way: Way, stretched: str, device: str, seed: int) -> None:
    """Late or not, the numbers are the same; those of the resident model, where nothing is cut."""
    with closing(streamed(folder, way, device)) as model:
        quiet = numbers_of(model, device)
    with closing(streamed(folder, way, device)) as model:
        stretch(model, stretched, device, seed)
        assert_same_tensors(numbers_of(model, device), quiet)
    if not way.is_cut:
        resident = type(build()).from_pretrained(folder, attn_implementation="eager")
        resident = adapt(resident, lora(lora_dropout=0.0)).to(device).train()
        enable_checkpointing(resident)
        assert_same_tensors(quiet, numbers_of(resident, device))


def name_of(way: Way) -> str:
    chosen = [n for n in StepChoices.__dataclass_fields__ if getattr(way.choices, n) != getattr(StepChoices(), n)]
    return "-".join([way.tier, f"{way.num_slots}_slots", *chosen])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS, ids=name_of)
def test_numbers_do_not_depend_on_when_copies_and_layers_end(way: Way, device: str, folder: Path) -> None:
    assert_no_race(folder, way, "all_late", device, seed=0)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("stretched", STRETCHES)
@pytest.mark.parametrize("way", WAYS, ids=name_of)
def test_numbers_do_not_depend_on_which_of_them_is_late(way: Way, stretched: str, device: str, folder: Path) -> None:
    for num_slots in range(2, 6):
        assert_no_race(folder, Way(way.tier, num_slots, way.choices), stretched, device, seed=num_slots)


def test_run_for_the_memory_checker_is_right_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_memcheck.main(["--device", "cpu"]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == list(gpu_memcheck.WAYS)
