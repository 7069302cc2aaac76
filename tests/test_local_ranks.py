"""One rank makes, the others get: the same memory, the same decision, the same error."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from hf_lema.runtime import local_ranks
from hf_lema.runtime.host_memory import HostBuffer
from hf_lema.runtime.local_ranks import LocalGroup, Offer, OfferServer, receive_offer, share

NBYTES = 10_000


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    local_ranks._num_offers.clear()
    yield
    local_ranks._num_offers.clear()


def group(rank: int, size: int = 2) -> LocalGroup:
    return LocalGroup(rank=rank, size=size)


def in_child(act: Callable[[Connection], Any]) -> tuple[Any, Connection]:
    """Runs something in a forked process, which has the same parent as this one for the address's sake."""
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=act, args=(there,))
    child.start()
    there.close()
    return child, here


@pytest.fixture
def same_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getppid", lambda: 7)


def test_the_group_is_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("GROUP_RANK", raising=False)
    assert LocalGroup.find() is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert LocalGroup.find() == LocalGroup(rank=1, size=4)
    monkeypatch.setenv("GROUP_RANK", "3")
    assert LocalGroup.find() == LocalGroup(rank=1, size=4, host=3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert LocalGroup.find() is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert LocalGroup.find() is None, "one process on each of two machines"


def test_processes_that_cannot_find_each_other_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.warns(UserWarning, match="LOCAL_WORLD_SIZE is not set.*own copy"):
        assert LocalGroup.find() is None


@pytest.mark.usefixtures("same_parent")
def test_another_process_reads_what_the_first_one_wrote_and_later_writes_too() -> None:
    buffer = HostBuffer(NBYTES, is_shared=True)
    buffer.tensor.copy_(torch.arange(NBYTES) % 251)
    server = OfferServer(group(0), "model")

    def other(pipe: Connection) -> None:
        local_ranks._num_offers.clear()
        offer = receive_offer(group(1), "model", timeout_s=20)
        assert offer.descriptor is not None
        mapped = HostBuffer(NBYTES, of=offer.descriptor)
        pipe.send((offer.tier, int(mapped.tensor.long().sum())))
        pipe.recv()
        pipe.send(int(mapped.tensor[0]))

    child, pipe = in_child(other)
    server.answer(Offer(tier="ram", descriptor=buffer.take_descriptor())).join(20)
    assert pipe.recv() == ("ram", int((torch.arange(NBYTES) % 251).sum()))
    buffer.tensor[0] = 77
    pipe.send("go on")
    assert pipe.recv() == 77
    child.join(20)
    assert child.exitcode == 0


def test_all_others_get_the_same_offer() -> None:
    server = OfferServer(group(0, size=4), "model")
    offers: list[Offer] = []
    threads = []
    for rank in (1, 2, 3):
        local_ranks._num_offers.clear()
        address = group(rank, size=4).address("model")
        local_ranks._num_offers.clear()
        assert address.endswith(b"-model-0")
        thread = threading.Thread(
            target=lambda rank=rank: offers.append(receive_offer(_Fixed(rank=rank, size=4), "model", timeout_s=20))
        )
        thread.start()
        threads.append(thread)
    server.answer(Offer(tier="disk")).join(20)
    for thread in threads:
        thread.join(20)
    assert offers == [Offer(tier="disk")] * 3


class _Fixed(LocalGroup):
    """A rank of another process, as far as counting offers goes."""

    def address(self, identity: str) -> bytes:
        local_ranks._num_offers[identity] = 0
        return super().address(identity)


def test_an_error_of_the_first_rank_reaches_the_others_with_its_text() -> None:
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            receive_offer(_Fixed(rank=1, size=2), "model", timeout_s=20)
        except RuntimeError as error:
            caught.append(error)

    def fail() -> Offer:
        thread.start()
        raise ValueError("shard 3 is missing")

    thread = threading.Thread(target=wait)
    with pytest.raises(ValueError, match="shard 3 is missing"):
        share("model", fail, lambda _: None, group(0))
    thread.join(20)
    assert [str(error) for error in caught] == ["local rank 0 could not load the model: ValueError: shard 3 is missing"]


@pytest.mark.usefixtures("same_parent")
def test_the_death_of_the_first_rank_ends_the_wait_of_the_others() -> None:
    def first(pipe: Connection) -> None:
        local_ranks._num_offers.clear()
        OfferServer(group(0), "model")._socket.accept()
        os.kill(os.getpid(), signal.SIGKILL)
        pipe.close()

    child, _ = in_child(first)
    with pytest.raises(RuntimeError, match="ended before it had loaded"):
        receive_offer(group(1), "model", timeout_s=20)
    child.join(20)
    assert child.exitcode == -signal.SIGKILL


def test_a_first_rank_that_never_comes_is_waited_for_a_bounded_time() -> None:
    with pytest.raises(RuntimeError, match=r"rank 1 waited 0 s.*the same model, in the same order"):
        receive_offer(group(1), "other model", timeout_s=0.2)


def test_two_launches_with_the_same_address_are_refused_and_the_next_offer_has_another() -> None:
    first = OfferServer(group(0), "model")
    second = OfferServer(group(0), "model")  # the second wrap of the same model
    local_ranks._num_offers.clear()
    with pytest.raises(RuntimeError, match="offers the same memory"):
        OfferServer(group(0), "model")
    for server in (first, second):
        server.refuse(ValueError("done"))


@pytest.mark.usefixtures("same_parent")
def test_a_first_rank_that_ends_at_once_still_serves_those_that_come_late() -> None:
    script = (
        "import os, sys\n"
        "os.getppid = lambda: 7\n"
        "from hf_lema.runtime.local_ranks import LocalGroup, Offer, OfferServer\n"
        "OfferServer(LocalGroup(rank=0, size=2), 'model').answer(Offer(tier='disk'))\n"
        "print('done', flush=True)\n"
    )
    first = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == "done\n"
        time.sleep(0.3)  # its main thread has nothing left to do
        assert first.poll() is None
        assert receive_offer(group(1), "model", timeout_s=20) == Offer(tier="disk")
        assert first.wait(20) == 0
    finally:
        first.kill()
        first.wait()


def test_another_users_process_is_neither_served_nor_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    users = iter([os.getuid() + 1, os.getuid()])
    monkeypatch.setattr(local_ranks, "_peer_of", lambda _: (os.getpid(), next(users)))
    server = OfferServer(group(0), "model")
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as friend,
    ):
        local_ranks._num_offers.clear()
        address = group(1).address("model")
        stranger.connect(address)
        friend.connect(address)
        server.answer(Offer(tier="disk")).join(20)
        assert stranger.recv(100) == b""
        assert friend.recv(100) == b'{"tier": "disk"}'
    users = iter([os.getuid() + 1])
    local_ranks._num_offers.clear()
    server = OfferServer(group(0), "model")
    local_ranks._num_offers.clear()
    with pytest.raises(RuntimeError, match="not trusted"):
        receive_offer(group(1), "model", timeout_s=20)
    server._socket.close()


@pytest.mark.usefixtures("same_parent")
@pytest.mark.parametrize("is_at_work", [False, True])
def test_a_first_rank_that_hangs_is_an_error_and_one_that_works_is_waited_for(
    is_at_work: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_ranks, "STALL_TIMEOUT_S", 0.5)
    monkeypatch.setattr(local_ranks, "_MIN_WORK_S", 0.01)

    def first(pipe: Connection) -> None:
        local_ranks._num_offers.clear()
        server = OfferServer(group(0), "model")
        end_s = time.monotonic() + 1.5
        while time.monotonic() < end_s:
            if not is_at_work:
                time.sleep(0.1)
        server.answer(Offer(tier="disk")).join(20)

    child, _ = in_child(first)
    if is_at_work:
        assert receive_offer(group(1), "model", timeout_s=20) == Offer(tier="disk")
    else:
        with pytest.raises(RuntimeError, match=rf"process {child.pid}\) has used a processor for less .* it hangs"):
            receive_offer(group(1), "model", timeout_s=20)
    child.join(20)
    assert child.exitcode == 0
