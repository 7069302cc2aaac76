"""Forked processes that take themselves for the ranks of a launch; imports are done, so they start at once."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

import torch

from hf_lema.runtime import local_ranks

FORK = multiprocessing.get_context("fork")
Act = Callable[[int, Barrier], Any]


def _child(act: Act, rank: int, barrier: Barrier, environment: Mapping[str, str], pipe: Connection) -> None:
    os.environ.update(environment)
    local_ranks._num_offers.clear()
    torch.set_num_threads(1)
    try:
        pipe.send((True, act(rank, barrier)))
    except BaseException as error:  # noqa: BLE001 - whatever it was is shown in the parent
        pipe.send((False, f"{type(error).__name__}: {error}"))
    pipe.close()
    for thread in threading.enumerate():
        if thread.name == "hf_lema-offer":  # as a process that ends by itself does
            thread.join(local_ranks.EXIT_WAIT_S)
    os._exit(0)  # no test framework's own ends in a child


def run_ranks(act: Act, num_processes: int, timeout_s: float = 60.0, host: int = 0, port: int = 29999) -> list[Any]:
    """Runs ``act(rank, barrier)`` in as many forked processes, with the environment that torchrun gives.

    Args:
        act: What each does. It must not run a backward: autograd does not survive a fork on a machine with a GPU.
        num_processes: How many.
        timeout_s: Bound for all of it; whoever runs longer is killed, and the test fails.
        host: Number of the machine that they take themselves to be on.
        port: Of the launch.

    Returns:
        What each returned; ``"killed by signal N"`` for one that died, ``"Error: text"`` for one that raised.
    """
    barrier = FORK.Barrier(num_processes)
    children, pipes = [], []
    for rank in range(num_processes):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes),
            "GROUP_RANK": str(host),
            "MASTER_PORT": str(port),
        }
        here, there = FORK.Pipe(duplex=False)
        child = FORK.Process(target=_child, args=(act, rank, barrier, environment, there))
        child.start()
        there.close()
        children.append(child)
        pipes.append(here)
    deadline_s = time.monotonic() + timeout_s
    try:
        outcomes = [
            _outcome(child, pipe, deadline_s, rank)
            for rank, (child, pipe) in enumerate(zip(children, pipes, strict=True))
        ]
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
            child.join()
    return outcomes


def _outcome(child: Any, pipe: Connection, deadline_s: float, rank: int) -> Any:
    assert pipe.poll(max(0.0, deadline_s - time.monotonic())), f"rank {rank} hangs"
    try:
        succeeded, value = pipe.recv()
    except EOFError:
        child.join()
        return f"killed by signal {-child.exitcode}"
    return value if succeeded else f"Error: {value}"


def shared_memory_bytes() -> dict[str, int]:
    """Rss and Pss of this process's mappings of shared host memory (proc(5), smaps), and their inodes' number."""
    found = {"Rss": 0, "Pss": 0}
    inodes: set[str] = set()
    inside = False
    with open("/proc/self/smaps", encoding="ascii", errors="replace") as lines:
        for line in lines:
            name, _, rest = line.partition(" ")
            if not name.endswith(":"):
                inside = "/memfd:hf_lema" in line
                if inside:
                    inodes.add(line.split()[4])
            elif inside and name[:-1] in found:
                found[name[:-1]] += int(rest.split()[0]) * 1024
    return found | {"num_inodes": len(inodes)}
