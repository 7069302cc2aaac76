"""What the user sees of a call that takes long and cannot tell how far it is.

Responsibility: one line with the time that has passed. What goes on piece by piece has an ordinary bar where the pieces
are counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm  # type: ignore[import-untyped]

DELAY_S = 2.0
"""What is over before then is not shown."""

REFRESH_S = 1.0


@contextmanager
def time_shown(what: str) -> Iterator[None]:
    """Shows what the block does and for how long by now, from `DELAY_S` on; the line goes with the block.

    The block runs on the calling thread and must let go of the interpreter lock. A thread shows the line: nothing else
    runs while one call does. It ends before the block is left.

    Args:
        what: What goes on, to be followed by the time, such as ``"Page-locking 12.06 GiB"``.
    """
    ended = threading.Event()
    thread = threading.Thread(target=_show, args=(what, ended), name="hf_lema-clock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _show(what: str, ended: threading.Event) -> None:
    start_s = time.perf_counter()
    if ended.wait(DELAY_S):
        return
    with tqdm(bar_format="{desc}", leave=False) as line:
        while True:
            line.set_description_str(f"{what}: {time.perf_counter() - start_s:.0f} s")
            if ended.wait(REFRESH_S):
                return
