"""The charts of a duel: memory against step time, where memory goes, and the curves.

Responsibility: results in, the charts of the page in their order out. Knows nothing of the page around a chart.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hf_lema.reporting.chart_style import NUM_SERIES_STYLES, Chart, Figure, dot_style
from hf_lema.reporting.contender import ContenderResult
from hf_lema.reporting.curve_charts import loss_chart, use_chart
from hf_lema.reporting.duel_record import DuelRecord
from hf_lema.reporting.headline import memory_of_duel
from hf_lema.reporting.label_places import Box, label_positions
from hf_lema.reporting.memory_bars import CONTEXT, Bar, ram_bars, vram_bars
from hf_lema.reporting.verdict import step_median_and_spread_s
from hf_lema.units import to_gib

# Figures farther apart than this stand on a logarithmic axis.
MAX_LINEAR_RATIO = 6.0
_LOG_TICKS = tuple(digit * 10.0**power for power in range(-3, 5) for digit in (1, 2, 5))
_PATTERNS = ("", "/", ".", "x", "-", "\\", "+", "|")


def duel_charts(duel: DuelRecord, baseline_name: str) -> tuple[Chart, ...]:
    """Every chart for which the duel has figures, in the order of the page."""
    has_vram = any(sample.vram_bytes is not None for result in duel.results for sample in result.samples)
    candidates = [
        _trade_off(duel),
        loss_chart(duel.results, baseline_name),
        use_chart(duel, "vram", "VRAM over time", lambda sample: sample.vram_bytes) if has_vram else None,
        use_chart(duel, "ram", "RAM over time", lambda sample: sample.ram_bytes),
        _bars("vram-bars", "Where VRAM goes", vram_bars(duel.results, duel.plans)),
        _bars("ram-bars", "Where RAM goes", ram_bars(duel.results, duel.plans)),
    ]
    return tuple(chart for chart in candidates if chart is not None)


# ---- memory against time ----


def _trade_off(duel: DuelRecord) -> Chart | None:
    memory = memory_of_duel(duel.results)
    placed = [(idx, result) for idx, result in enumerate(duel.results) if result.status == "ok" and result.timed_step_s]
    if memory is None or not placed:
        return None
    quantity, field = memory
    x = [to_gib(getattr(result, field)) for _, result in placed]
    y = [statistics.median(result.timed_step_s) for _, result in placed]
    limit_gib = _limit_gib(duel, quantity)
    x_axis = _axis(x, [] if limit_gib is None else [limit_gib])
    y_axis = _axis(y)
    dots = [(x_axis.share(own_x), y_axis.share(own_y)) for own_x, own_y in zip(x, y, strict=True)]
    whiskers = [_whiskers(result, quantity) for _, result in placed]
    arms = [_arms(own_x, own_y, arm, x_axis, y_axis) for own_x, own_y, arm in zip(x, y, whiskers, strict=True)]
    places = label_positions(dots, [result.name for _, result in placed], [box for boxes in arms for box in boxes])
    data = []
    for (idx, result), x_gib, step_s, whisker, place in zip(placed, x, y, whiskers, places, strict=True):
        data.append(
            {
                **dot_style(idx),
                "type": "scatter",
                "mode": "markers+text",
                "name": result.name,
                "x": [round(x_gib, 4)],
                "y": [round(step_s, 5)],
                "text": [result.name],
                "textposition": place,
                "cliponaxis": False,
                "showlegend": False,
                **whisker,
                "hovertemplate": f"<b>{result.name}</b><br>%{{x:.2f}} GiB of {quantity}<br>%{{y:.3f}} s a step"
                "<extra></extra>",
            }
        )
    shapes, annotations = _limit_line(duel, limit_gib, x_axis)
    layout = {
        "xaxis": {"title": {"text": f"{quantity} (GiB)"}, "zeroline": False, **x_axis.layout},
        "yaxis": {"title": {"text": "step (s)"}, "zeroline": False, **y_axis.layout},
        "shapes": shapes,
        "annotations": annotations,
    }
    caption = "Lower left is better. A dot is a contender: the median step and the largest memory use by its tensors; "
    caption += "the whiskers are the spread of the steps and, to the right, what the allocator reserved beyond."
    if quantity != "VRAM":
        caption = f"Lower left is better. No GPU took part, so memory is {quantity}, above what the imports took. "
        caption += "A dot is the median step, the whisker the spread of the steps."
    logarithmic = [name for name, axis in (("memory", x_axis), ("time", y_axis)) if axis.is_log]
    if logarithmic:
        caption += f" The scale of {' and '.join(logarithmic)} is logarithmic."
    figure = {"data": data, "layout": layout}
    return Chart(key="trade-off", title=f"{quantity} against step time", caption=caption, figure=figure)


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """The range of an axis: from nought, or logarithmic where the figures are too far apart for one."""

    begin: float
    end: float
    is_log: bool

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        if self.is_log:
            return math.log(value / self.begin) / math.log(self.end / self.begin)
        return value / self.end

    @property
    def layout(self) -> Figure:
        """For plotly, which takes the range of a logarithmic axis as powers of ten."""
        if not self.is_log:
            return {"range": [0, self.end]}
        return {
            "type": "log",
            "range": [math.log10(self.begin), math.log10(self.end)],
            "tickvals": [tick for tick in _LOG_TICKS if self.begin <= tick <= self.end],
        }


def _axis(values: Sequence[float], limits: Sequence[float] = ()) -> _Axis:
    least, largest = min(values), max(*values, *limits, 0.0)
    if least > 0 and largest / least > MAX_LINEAR_RATIO:
        return _Axis(begin=least / 1.4, end=largest * 1.3, is_log=True)
    return _Axis(begin=0.0, end=largest * (1.04 if limits and largest == max(limits) else 1.25), is_log=False)


def _arms(x: float, y: float, whisker: Figure, x_axis: _Axis, y_axis: _Axis) -> list[Box]:
    """Where the whiskers of a dot are, in shares of the chart."""
    left, middle = x_axis.share(x), y_axis.share(y)
    boxes = []
    if "error_x" in whisker:
        boxes.append((left, middle - 0.01, x_axis.share(x + whisker["error_x"]["array"][0]), middle + 0.01))
    if "error_y" in whisker:
        (half,) = whisker["error_y"]["array"]
        low = y_axis.share(max(y - half, y_axis.begin or 0.0))
        boxes.append((left - 0.01, low, left + 0.01, y_axis.share(y + half)))
    return boxes


def _whiskers(result: ContenderResult, quantity: str) -> Figure:
    whiskers: Figure = {}
    summary = step_median_and_spread_s(result)
    if summary is not None:
        whiskers["error_y"] = {"type": "data", "array": [summary[1] / 2], "thickness": 1.2, "width": 5}
    allocated, reserved = result.vram_allocated_peak_bytes, result.vram_reserved_peak_bytes
    if quantity == "VRAM" and allocated is not None and reserved is not None:
        beyond = {"array": [to_gib(reserved - allocated)], "arrayminus": [0]}
        whiskers["error_x"] = {"type": "data", "symmetric": False, "thickness": 1.2, "width": 5, **beyond}
    return whiskers


def _limit_gib(duel: DuelRecord, quantity: str) -> float | None:
    """What the contenders could have at most; None where it says nothing of this kind of memory."""
    return None if quantity != "VRAM" or duel.vram_limit_bytes is None else to_gib(duel.vram_limit_bytes)


def _limit_line(duel: DuelRecord, limit_gib: float | None, x_axis: _Axis) -> tuple[list[Figure], list[Figure]]:
    """The line of the card's limit, and who ran into it."""
    if limit_gib is None:
        return [], []
    too_large = [result.name for result in duel.results if result.status == "out_of_memory"]
    text = f"{'limit' if duel.settings.get('vram_limit_bytes') else 'card'} {limit_gib:.1f} GiB"
    if too_large:
        text += "<br>out of memory:<br>" + "<br>".join(f"✕ {name}" for name in too_large)
    line = {"type": "line", "x0": limit_gib, "x1": limit_gib, "y0": 0, "y1": 1, "yref": "paper"}
    label = {"y": 1, "yref": "paper", "yanchor": "top", "xanchor": "right", "showarrow": False, "align": "right"}
    shapes = [{**line, "line": {"color": "$alarm", "width": 2, "dash": "dash"}}]
    # On a logarithmic axis plotly takes the place of a shape as it is, and that of a text as a power of ten.
    x = math.log10(limit_gib) if x_axis.is_log else limit_gib
    return shapes, [{**label, "x": x, "text": text, "xshift": -6}]


# ---- where memory goes ----


def _bars(key: str, title: str, bars: Sequence[Bar]) -> Chart | None:
    if not bars:
        return None
    parts = sorted(dict.fromkeys(part for bar in bars for part in bar.parts), key=lambda part: part == CONTEXT)
    has_plans = any(bar.is_planned for bar in bars)
    kinds = {True: ", planned", False: ", measured" if has_plans else ""}
    labels = [bar.name + kinds[bar.is_planned] for bar in bars]
    data = [_part_trace(number, part, bars, labels) for number, part in enumerate(parts)]
    totals = [to_gib(sum(bar.parts.values())) for bar in bars]
    layout: Figure = {
        "barmode": "stack",
        "bargap": 0.35,
        "xaxis": {"title": {"text": "GiB"}, "range": [0, max(totals) * 1.18]},
        "yaxis": {"autorange": "reversed", "automargin": True, "showgrid": False},
        "annotations": [
            {"x": total, "y": label, "text": f"{total:.2f}", "xanchor": "left", "xshift": 4, "showarrow": False}
            for total, label in zip(totals, labels, strict=True)
        ],
        "legend": {"traceorder": "normal"},
        "uniformtext": {"mode": "hide", "minsize": 11},
    }
    caption = "The largest use of each contender, by kind; the figure at the end is the sum."
    if has_plans:
        caption += " Planned bars are arithmetic from before the run, measured bars are what it took."
    height_px = 150 + 40 * len(bars)
    figure = {"data": data, "layout": layout}
    return Chart(key=key, title=title, caption=caption, figure=figure, height_px=height_px)


def _part_trace(number: int, part: str, bars: Sequence[Bar], labels: Sequence[str]) -> Figure:
    values_gib = [to_gib(bar.parts.get(part, 0)) for bar in bars]
    colour = "$muted" if part == CONTEXT else f"$s{number % NUM_SERIES_STYLES}"
    shape = _PATTERNS[number % len(_PATTERNS)]
    pattern = {"shape": shape, "fillmode": "overlay", "size": 9, "solidity": 0.2, "fgopacity": 0.4}
    return {
        "type": "bar",
        "orientation": "h",
        "name": part,
        "text": [part if value else "" for value in values_gib],
        "textposition": "inside",
        "insidetextanchor": "middle",
        "textangle": 0,
        "x": [round(value, 4) for value in values_gib],
        "y": list(labels),
        "marker": {"color": colour, "opacity": 0.85, "pattern": pattern, "line": {"color": "$ink", "width": 0.6}},
        "hovertemplate": f"{part}: %{{x:.2f}} GiB<extra>%{{y}}</extra>",
    }
