"""JSON that a stranger wrote: parsed without surprise, and shown in messages without flooding them.

Responsibility: text to values, names that come twice, values and problems cut to a length that can be read. Knows
nothing of what the text means.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

MAX_LISTED = 200
"""Problems in one message; a damaged file can have a million."""


def listing(problems: Sequence[str], indent: str = "", max_chars: int = 500) -> str:
    """The problems as lines of a message: each shortened, the first `MAX_LISTED` of them, and how many more there are.

    Args:
        problems: What is wrong, a sentence each.
        indent: What a line begins with.
        max_chars: Of one problem.
    """
    lines = [f"\n{indent}- {shown(problem, max_chars)}" for problem in problems[:MAX_LISTED]]
    if len(problems) > MAX_LISTED:
        lines.append(f"\n{indent}- and {len(problems) - MAX_LISTED} more")
    return "".join(lines)


def shown(value: object, max_chars: int = 100) -> str:
    """A value from a file as text for a message, cut where it is long, readable on any terminal."""
    text = value if isinstance(value, str) else described(value)
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= max_chars else f"{text[:max_chars]}..."


def described(value: object) -> str:
    """As ``repr``, which refuses some values that JSON can hold."""
    try:
        return repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes out, or lists in lists in lists
        return f"a {type(value).__name__} too long to show"


def parse_json(raw: bytes | str) -> tuple[Any, list[str]]:
    """Parse a JSON text that a stranger wrote.

    Args:
        raw: The text; bytes are UTF-8.

    Returns:
        The value, and the names that an object in it has more than once (of which it holds the last).

    Raises:
        ValueError: It is no JSON text, or nested deeper than Python can follow.
    """
    repeated: set[str] = set()

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                repeated.add(name)
            found[name] = value
        return found

    try:
        value = json.loads(raw.decode("utf-8") if isinstance(raw, bytes) else raw, object_pairs_hook=collect)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value, sorted(repeated)
