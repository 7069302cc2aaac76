"""Attributes that other code sees differently for the duration of a block, put back whatever happens.

Responsibility: changing entries of dictionaries, and knowing which are changed. Knows nothing of layers.

Note [interrupts]: Ctrl-C raises between any two steps of Python, in the clean-up of a block as well, and what that
leaves changed would be used by every later step. So every change is noted before it is made. Whoever is outermost takes
`mark` before the blocks and calls `undo_to` when an exception has passed them: one interrupt comes once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

_MISSING = object()


class _Notes(threading.local):
    """What is changed now by this thread: (block, dictionary, key, value before)."""

    def __init__(self) -> None:
        self.entries: list[tuple[object, dict[Any, Any], Any, Any]] = []


_NOTES = _Notes()


@contextmanager
def changed(changes: Iterable[tuple[dict[Any, Any], Any, Any]]) -> Iterator[None]:
    """Sets entries of dictionaries inside the block.

    Args:
        changes: (dictionary, key, value inside the block).
    """
    block, entries = object(), _NOTES.entries
    try:
        for target, key, value in changes:
            entries.append((block, target, key, target.get(key, _MISSING)))
            target[key] = value
        yield
    finally:
        begin = next((i for i, entry in enumerate(entries) if entry[0] is block), None)
        if begin is not None:  # else it was undone by whoever is outside
            undo_to(begin)


def mark() -> int:
    """Where this thread is in its changes, for `undo_to`."""
    return len(_NOTES.entries)


def undo_to(begin: int) -> None:
    """Puts back what was changed since `mark`, the last first."""
    entries = _NOTES.entries
    while len(entries) > begin:
        _, target, key, before = entries[-1]
        if before is _MISSING:
            target.pop(key, None)
        else:
            target[key] = before
        entries.pop()
