"""Byte quantities: what a user types, what the code counts, what is printed.

Responsibility: the one place where bytes become GiB and text, and text becomes bytes. Every other module counts in
bytes and says so in the name. Knows nothing of models, devices or budgets.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

KIB: int = 2**10
MIB: int = 2**20
GIB: int = 2**30
TIB: int = 2**40

_BYTES_PER_UNIT: dict[str, int] = {
    "b": 1,
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_QUANTITY = re.compile(r"\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[A-Za-z]+)?\s*", re.ASCII)
_NUM_CHARS_SHOWN = 80


def parse_bytes(quantity: str | int) -> int:
    """Turn a byte quantity as a user writes it into a whole number of bytes.

    Args:
        quantity: A whole number of bytes, or text: a decimal number followed by ``B``, ``KiB``, ``MiB``, ``GiB``,
            ``TiB`` (powers of 1024) or ``kB``, ``MB``, ``GB``, ``TB`` (powers of 1000), in any case, with or
            without a space. Text without a unit is read as bytes and must be a whole number.

    Returns:
        The number of bytes, rounded down to a whole byte.

    Raises:
        ValueError: The quantity is negative, not finite, no number, or its unit is not one of those above.
    """
    if isinstance(quantity, bool) or not isinstance(quantity, (str, int)):
        raise ValueError(
            f"a byte quantity must be an int or text such as '6GiB', got {quantity!r} of type {type(quantity).__name__}"
        )
    if isinstance(quantity, int):
        if quantity < 0:
            raise ValueError(f"a byte quantity cannot be negative, got {quantity}")
        return quantity
    shown = quantity if len(quantity) <= _NUM_CHARS_SHOWN else quantity[:_NUM_CHARS_SHOWN] + "..."
    match = _QUANTITY.fullmatch(quantity)
    if match is None:
        raise ValueError(f"cannot read {shown!r} as a byte quantity: write a number and a unit, such as '6GiB'")
    number, unit = match["number"], match["unit"]
    if unit is None:
        if not number.isdigit():
            raise ValueError(f"{shown!r} has no unit: write one, such as '{number}GiB', or a whole number of bytes")
        return int(number)
    bytes_per_unit = _BYTES_PER_UNIT.get(unit.lower())
    if bytes_per_unit is None:
        raise ValueError(f"{shown!r} has the unit {unit!r}, expected one of B, KiB, MiB, GiB, TiB, kB, MB, GB, TB")
    return int(Decimal(number) * bytes_per_unit)


def to_gib(num_bytes: int | float) -> float:
    """Convert bytes to GiB (2**30 bytes)."""
    return num_bytes / GIB


def format_bytes(num_bytes: int | float) -> str:
    """Write a number of bytes for a person, in the largest binary unit in which it is at least 1.

    Args:
        num_bytes: Bytes; may be negative (a difference).

    Returns:
        Text such as ``"6.36 GiB"``, ``"210.00 MiB"`` or ``"17 B"``.

    Raises:
        ValueError: The number is not finite.
    """
    if not math.isfinite(num_bytes):
        raise ValueError(f"a number of bytes must be finite, got {num_bytes}")
    sign = "-" if num_bytes < 0 else ""
    magnitude = abs(num_bytes)
    for unit, bytes_per_unit in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        # The second term sends what would be printed as "1024.00 MiB" to the next unit as "1.00 GiB".
        if magnitude >= bytes_per_unit or round(magnitude / bytes_per_unit * 1024, 2) >= 1024:
            return f"{sign}{magnitude / bytes_per_unit:.2f} {unit}"
    return f"{sign}{magnitude:.0f} B"
