"""One copy of the layers for all processes of a machine: its size, who may write, and what a death does."""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import threading
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
import torch
from models import batch, build
from ranks import FORK, run_ranks, shared_memory_bytes

from hf_lema import LemaConfig, LemaModelWrapper, get_streamer
from hf_lema.measuring.sampler import read_process_memory
from hf_lema.model import stores
from hf_lema.runtime import local_ranks

pytestmark = pytest.mark.timeout(170)

NUM_LAYERS = 16
SHAPE = {"num_layers": NUM_LAYERS, "hidden_size": 256, "intermediate_size": 1024}
CONFIGS = {"fp32": LemaConfig(), "nf4": LemaConfig(quantization="nf4")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build(**SHAPE).save_pretrained(path)
    return path


def load(folder: Path, config: LemaConfig | None = None) -> Any:
    return LemaModelWrapper.from_pretrained(str(folder), config, device="cpu", attn_implementation="eager")


def loss_of(model: Any) -> float:
    with torch.no_grad():
        return float(model(**batch()).loss)


def host_memory(folder: Path, config: LemaConfig, barrier: Barrier) -> dict[str, Any]:
    """What a rank holds once every rank has read every layer."""
    before = read_process_memory()
    model = load(folder, config)
    loss = loss_of(model)
    barrier.wait(60)
    after = read_process_memory()
    found = shared_memory_bytes() | {"held": get_streamer(model).host_store.held_bytes, "loss": loss}
    found["anon_growth"] = after.anon_bytes - before.anon_bytes
    barrier.wait(60)
    get_streamer(model).close()
    return found


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("num_processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_host_memory_of_the_group_is_that_of_one_process(kind: str, num_processes: int, folder: Path) -> None:
    gc.collect()  # what an earlier test has dropped would be forked, and its mapping counted
    [alone] = run_ranks(lambda _, barrier: host_memory(folder, CONFIGS[kind], barrier), 1)
    group = run_ranks(lambda _, barrier: host_memory(folder, CONFIGS[kind], barrier), num_processes)

    page_bytes = 4096 * NUM_LAYERS
    assert alone["Pss"] == pytest.approx(alone["held"], abs=page_bytes)
    assert sum(rank["Pss"] for rank in group) == pytest.approx(alone["Pss"], abs=page_bytes), "one copy, whatever N"
    for rank in group:
        assert rank["num_inodes"] == 1
        assert rank["Rss"] == pytest.approx(alone["held"], abs=page_bytes), "each has read all of it"
        assert rank["loss"] == alone["loss"]
    # What else a rank takes: two slots, embedding and head; the layers themselves are 16 slots' worth.
    for rank in group[1:]:
        assert rank["anon_growth"] < alone["anon_growth"] + alone["held"] // 4
        if kind == "fp32":
            assert rank["anon_growth"] < rank["held"] // 2


def test_a_rank_that_did_not_fill_the_memory_cannot_write_to_it(folder: Path) -> None:
    def act(rank: int, barrier: Barrier) -> Any:
        model = load(folder)
        first = get_streamer(model).host_store.layer_buffer(3)
        expected = int(first.long().sum())
        barrier.wait(60)
        if rank == 1:
            faulthandler.disable()  # pytest's would show the fault that is meant to happen
            first[0] += 1
        time.sleep(0.5)  # the other one must have died by now
        return int(first.long().sum()) == expected

    assert run_ranks(act, 2) == [True, f"killed by signal {signal.SIGSEGV.value}"]


def test_a_first_rank_that_is_killed_while_loading_ends_the_others_with_an_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = local_ranks._connect

    def act(rank: int, barrier: Barrier) -> None:
        def write_or_die(source: Any, layer_idx: int, out: torch.Tensor) -> None:
            if layer_idx == NUM_LAYERS // 2:
                barrier.wait(60)  # the others are connected: before that, only the launcher can tell them
                os.kill(os.getpid(), signal.SIGKILL)

        def connect_and_say_so(*args: Any) -> None:
            connect(*args)
            barrier.wait(60)

        monkeypatch.setattr(stores.CheckpointSource, "write_layer", write_or_die)
        monkeypatch.setattr(local_ranks, "_connect", connect_and_say_so)
        load(folder)

    begin_s = time.monotonic()
    first, *others = run_ranks(act, 3)
    assert first == "killed by signal 9"
    assert set(others) == {
        "Error: RuntimeError: local rank 0 ended before it had loaded the model; its own error says why"
    }
    assert time.monotonic() - begin_s < 30


def test_another_rank_that_is_killed_while_loading_neither_stops_nor_delays_the_first(folder: Path) -> None:
    def act(rank: int, barrier: Barrier) -> Any:
        if rank == 1:
            local_ranks.socket.recv_fds = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        begin_s = time.monotonic()
        loss = loss_of(load(folder))
        return loss, time.monotonic() - begin_s < 30

    first, killed, third = run_ranks(act, 3)
    assert killed == "killed by signal 9"
    assert first[1]
    assert third == first


def maps_something(pid: int) -> bool:
    """Whether a process has memory: one that is gone, or waits to be buried, has none."""
    try:
        return bool(Path(f"/proc/{pid}/smaps").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_memory_outlives_the_rank_that_made_it_and_is_held_by_nobody_else(folder: Path) -> None:
    first_pid = FORK.Value("i", 0)

    def act(rank: int, barrier: Barrier) -> Any:
        model = load(folder)
        before = loss_of(model)
        if rank == 0:
            first_pid.value = os.getpid()
        barrier.wait(60)
        if rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        while maps_something(first_pid.value):
            time.sleep(0.05)
        return loss_of(model) == before, shared_memory_bytes()["Pss"] / get_streamer(model).host_store.held_bytes

    killed, [is_equal, share] = run_ranks(act, 2)
    assert killed == "killed by signal 9"
    assert is_equal
    assert share == pytest.approx(1, abs=0.02)


def test_two_machines_of_one_launch_have_a_copy_each(folder: Path) -> None:
    """Both in one network namespace, with the same parent and port: only the number of the machine differs."""

    def act(rank: int, barrier: Barrier) -> Any:
        model = load(folder)
        loss_of(model)
        barrier.wait(60)
        pss_bytes = shared_memory_bytes()["Pss"]
        barrier.wait(60)
        return pss_bytes / get_streamer(model).host_store.held_bytes

    outcomes: dict[int, list[Any]] = {}
    hosts = [threading.Thread(target=lambda h=h: outcomes.__setitem__(h, run_ranks(act, 2, host=h))) for h in (0, 1)]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join(100)
    assert [sum(outcomes[h]) for h in (0, 1)] == [pytest.approx(1, abs=0.02)] * 2


def test_a_model_that_each_process_has_built_is_a_copy_each_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match=r"each of the 2 processes .* own copy .*from_pretrained loads them once"):
        model = LemaModelWrapper.wrap(build(), device="cpu")
    get_streamer(model).close()
