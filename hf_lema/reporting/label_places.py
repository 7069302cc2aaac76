"""Where the name of a dot stands so that it covers as little as it can.

Responsibility: geometry in shares of a chart. Knows no figure of a duel.
"""

from __future__ import annotations

from collections.abc import Sequence

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, each from 0 to 1."""

# Of a chart on a phone, some 310 px wide and 330 px high: half a dot, a line of text, a letter. A wider page has more
# room.
_DOT, _LINE, _LETTER = 0.022, 0.045, 0.021
_POSITIONS = (
    ("middle right", 1, 0.0),
    ("middle left", -1, 0.0),
    ("top center", 0, 0.055),
    ("bottom center", 0, -0.055),
    ("top right", 1, 0.045),
    ("bottom right", 1, -0.045),
    ("top left", -1, 0.045),
    ("bottom left", -1, -0.045),
)
"""plotly's word, the side of the dot, and how far above it."""


def label_positions(dots: Sequence[tuple[float, float]], names: Sequence[str], taken: Sequence[Box] = ()) -> list[str]:
    """For each dot the position of its name, as plotly calls it.

    Args:
        dots: Places from 0 to 1, x and y.
        names: What is written at each.
        taken: Further places where nothing should stand, such as whiskers.
    """
    boxes = [*taken, *((x - _DOT, y - _DOT, x + _DOT, y + _DOT) for x, y in dots)]
    positions = [""] * len(dots)
    # From the right, where a name has least room, to the left.
    for idx in sorted(range(len(dots)), key=lambda idx: -dots[idx][0]):
        choices = [(position, _box(*dots[idx], len(names[idx]), side, up)) for position, side, up in _POSITIONS]
        position, box = min(choices, key=lambda choice: sum(_overlap(choice[1], other) for other in boxes))
        positions[idx] = position
        boxes.append(box)
    return positions


def _box(x: float, y: float, num_letters: int, side: int, up: float) -> Box:
    width = _LETTER * num_letters
    left = x - width / 2 + side * (width / 2 + _DOT)
    return left, y + up - _LINE / 2, left + width, y + up + _LINE / 2


def _overlap(box: Box, other: Box) -> float:
    """Area that two boxes share, and how far the first lies beyond the edges of the chart."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    beyond = max(-box[0], 0.0) + max(box[2] - 1, 0.0) + max(-box[1], 0.0) + max(box[3] - 1, 0.0)
    return max(width, 0.0) * max(height, 0.0) + beyond
