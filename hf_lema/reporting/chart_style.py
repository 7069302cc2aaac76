"""What all charts share: their form, the looks of a contender, names at the ends of curves.

Responsibility: plain JSON values for plotly's script; no plotly is imported, its script is only put into the page.
Knows no figure of a duel.

Note [colours]: a value such as ``"$s2"`` or ``"$ink"`` stands for a colour of the page's theme, light or dark, and is
put in by the page's script. Nothing is told by colour alone: curves differ by dash and marker too, bars by pattern.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Figure = dict[str, Any]

NUM_SERIES_STYLES = 7
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "4px 2px 1px 2px", "9px 3px 2px 3px")
# Of other lengths than the colours, so that the eighth contender does not look like the first.
_SYMBOLS = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "triangle-down",
    "x",
    "star",
    "cross",
    "hexagon",
    "bowtie",
    "pentagon",
)
MAX_END_LABELS = 6
"""With more curves their names would stand far from their ends, and the legend has to do."""
_NUM_MARKERS_PER_CURVE = 9
_LABEL_PX = 17
"""Least distance of two labels at the ends of curves."""
_PLOT_PX = 260
"""About the height of a plot's inside on a wide page; the real one only moves labels a little."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart.

    Attributes:
        key: Its name inside the page.
        title: Its head.
        caption: What is drawn, for a reader who sees it for the first time.
        figure: ``data`` and ``layout`` for plotly; see Note [colours].
        height_px: Height on the page.
    """

    key: str
    title: str
    caption: str
    figure: Figure
    height_px: int = 420


def dot_style(idx: int) -> Figure:
    """The marker of a contender that is one dot; `idx` is its place in the duel."""
    return {"marker": {"color": _colour(idx), "symbol": _SYMBOLS[idx % len(_SYMBOLS)], "size": 13}}


def curve_style(idx: int, width: float = 2.2) -> Figure:
    """Line and markers of a contender that is a curve; `idx` is its place in the duel."""
    marker = dot_style(idx)["marker"] | {"size": 7, "maxdisplayed": _NUM_MARKERS_PER_CURVE}
    line = {"color": _colour(idx), "dash": _DASHES[idx % len(_DASHES)], "width": width}
    return {"type": "scatter", "mode": "lines+markers", "line": line, "marker": marker}


def _colour(idx: int) -> str:
    return f"$s{idx % NUM_SERIES_STYLES}"


def end_labels(ends: Sequence[tuple[str, float, float]], drawn: Sequence[float]) -> list[Figure]:
    """Names beside the ends of their curves, moved apart where they would stand on each other.

    Args:
        ends: Name, x and y of the last point.
        drawn: All that is drawn on the axis, for its length.
    """
    if len(ends) > MAX_END_LABELS:
        return []
    labels: list[Figure] = []
    bounds = (min(drawn, default=0.0), max(drawn, default=0.0))
    px_per_unit = _PLOT_PX / (bounds[1] - bounds[0]) if bounds[1] > bounds[0] else 0.0
    x_near = 0.15 * max((x for _, x, _ in ends), default=0.0)
    placed: list[tuple[float, float]] = []
    for name, x, y in sorted(ends, key=lambda end: end[2]):
        under_px = [px for other_x, px in placed if abs(other_x - x) < x_near]
        own_px = max([px + _LABEL_PX for px in under_px], default=y * px_per_unit)
        own_px = max(own_px, y * px_per_unit)
        placed.append((x, own_px))
        place = {"x": x, "y": y, "xshift": 8, "yshift": round(own_px - y * px_per_unit), "xanchor": "left"}
        labels.append({"name": "end", "text": name, "showarrow": False, "bgcolor": "$paper", "borderpad": 1, **place})
    return labels
