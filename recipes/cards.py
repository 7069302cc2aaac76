"""Calls that run at the same time, each alone on a card with its share of the processor's cores.

Responsibility: `on_cards`. Knows processes and cards; does not know what is called.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

Result = TypeVar("Result")

INTERRUPTED = 130
"""Exit code of a process that Ctrl-C has ended, as shells give it."""


def cores_of(place: int, num_places: int) -> list[int]:
    """The cores of one of several places: as many each, neighbours; what does not divide is left idle.

    Raises:
        ValueError: There are fewer cores than places.
    """
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // num_places
    if not share:
        raise ValueError(f"{num_places} at the same time need a core each, there are {len(cores)}")
    return cores[place * share : (place + 1) * share]


def on_cards(cards: Sequence[str], call: Callable[[int], Result], numbers: Iterable[int]) -> list[Result]:
    """Calls a function for each number, for as many at a time as there are cards; results in the order of the numbers.

    Args:
        cards: Values of ``CUDA_VISIBLE_DEVICES``.
        call: Called in a process that has one of the cards and its cores, as have the processes that it starts; must
            be picklable.
        numbers: The first that are left begin where a card is free.

    Raises:
        ValueError: There are fewer cores than cards.
    """
    context = multiprocessing.get_context("spawn")
    places: Any = context.Queue()
    for place, card in enumerate(cards):
        places.put((card, cores_of(place, len(cards))))
    executor = ProcessPoolExecutor(len(cards), mp_context=context, initializer=_take_place, initargs=(places,))
    try:
        futures = [executor.submit(_call, call, number) for number in numbers]
        return [future.result() for future in futures]
    finally:
        executor.shutdown(cancel_futures=True)  # an interrupt came to the processes of the calls too


def _call(call: Callable[[int], Result], number: int) -> Result:
    try:
        return call(number)
    except KeyboardInterrupt:
        sys.stdout.flush()
        os._exit(INTERRUPTED)  # the executor would take it for the call's result, and make the next call


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _take_place(places: Any) -> None:
    threading.Thread(target=_end_with_parent, name="end_with_parent", daemon=True).start()
    card, cores = places.get()
    os.environ["CUDA_VISIBLE_DEVICES"] = card
    os.sched_setaffinity(0, cores)
