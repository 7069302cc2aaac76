"""Calls on several cards at a time: each has a card and cores of its own, and results come in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

from cards import cores_of, on_cards

NUM_CORES = len(os.sched_getaffinity(0))
needs_two_cores = pytest.mark.skipif(NUM_CORES < 2, reason="a core for each of two calls")


def place(number: int) -> tuple[int, str, frozenset[int], int]:
    time.sleep(0.3)  # so that both processes get a number
    return number, os.environ["CUDA_VISIBLE_DEVICES"], frozenset(os.sched_getaffinity(0)), os.getpid()


def refuse(number: int) -> int:
    if number:
        raise ValueError(f"number {number}")
    return number


@needs_two_cores
def test_each_call_has_a_card_and_cores_that_no_other_has_at_the_time() -> None:
    found = on_cards(["3", "5"], place, range(5))

    assert [number for number, *_ in found] == list(range(5))
    homes = {process: (card, cores) for _, card, cores, process in found}
    assert sorted(card for card, _ in homes.values()) == ["3", "5"]
    assert all((card, cores) == homes[process] for _, card, cores, process in found)
    (_, first), (_, second) = homes.values()
    assert not first & second
    assert len(first) == len(second) == NUM_CORES // 2
    assert len(os.sched_getaffinity(0)) == NUM_CORES, "the caller keeps its own"


@needs_two_cores
def test_what_a_call_raises_comes_back() -> None:
    with pytest.raises(ValueError, match="number 1"):
        on_cards(["0", "1"], refuse, range(4))


SCRIPT = """
import signal, sys, time
from functools import partial
from pathlib import Path
from cards import on_cards

def linger(folder, number):
    Path(folder, str(number)).touch()
    time.sleep(60)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell in the background has it ignored
    on_cards(["0", "1"], partial(linger, sys.argv[1]), range(6))
"""


@needs_two_cores
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_calls_and_begins_no_other(how: signal.Signals, tmp_path: Path) -> None:
    script, marks = tmp_path / "script.py", tmp_path / "marks"
    script.write_text(SCRIPT, encoding="utf-8")
    marks.mkdir()
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, str(script), str(marks)],
        env=os.environ | paths,
        start_new_session=True,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    deadline_s = time.monotonic() + 30
    while len(list(marks.iterdir())) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.05)
    if how is signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does
    else:
        process.send_signal(how)
    process.stderr.read()  # until the last process that has it is gone
    assert process.wait(20) == -how
    assert sorted(path.name for path in marks.iterdir()) == ["0", "1"]


def test_more_places_than_cores_are_refused() -> None:
    assert cores_of(0, 1) == sorted(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match=f"need a core each, there are {NUM_CORES}"):
        cores_of(0, NUM_CORES + 1)
