"""The charts of a duel: memory against step time, where memory goes, and the curves.

Responsibility: results in, the charts of the page in their order out. Knows nothing of the page around a chart.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from hf_lema.reporting.chart_style import NUM_SERIES_STYLES, Chart, Figure, dot_style
from hf_lema.reporting.contender import ContenderResult
from hf_lema.reporting.curve_charts import loss_chart, use_chart
from hf_lema.reporting.duel_record import DuelRecord
from hf_lema.reporting.headline import memory_of_duel
from hf_lema.reporting.memory_bars import CONTEXT, Bar, ram_bars, vram_bars
from hf_lema.reporting.verdict import step_median_and_spread_s
from hf_lema.units import to_gib

# A limit farther away than this would press all the points into a corner; then its place is only told.
_MAX_LIMIT_OVER_LARGEST = 2.0
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
    data = []
    for (idx, result), x_gib, step_s, position in zip(placed, x, y, _label_positions(x, y, quantity), strict=True):
        data.append(
            {
                **dot_style(idx),
                "type": "scatter",
                "mode": "markers+text",
                "name": result.name,
                "x": [round(x_gib, 4)],
                "y": [round(step_s, 5)],
                "text": [result.name],
                "textposition": position,
                "cliponaxis": False,
                "showlegend": False,
                **_whiskers(result, quantity),
                "hovertemplate": f"<b>{result.name}</b><br>%{{x:.2f}} GiB of {quantity}<br>%{{y:.3f}} s a step"
                "<extra></extra>",
            }
        )
    shapes, annotations, x_end = _limit_line(duel, quantity, max(x))
    layout = {
        "xaxis": {"title": {"text": f"{quantity} (GiB)"}, "range": [0, x_end], "zeroline": False},
        "yaxis": {"title": {"text": "step (s)"}, "range": [0, max(y) * 1.25], "zeroline": False},
        "shapes": shapes,
        "annotations": annotations,
    }
    caption = "Lower left is better. A dot is a contender: the median step and the largest memory use by its tensors; "
    caption += "the whiskers are the spread of the steps and, to the right, what the allocator reserved beyond."
    if quantity != "VRAM":
        caption = f"Lower left is better. No GPU took part, so memory is {quantity}, above what the imports took. "
        caption += "A dot is the median step, the whisker the spread of the steps."
    figure = {"data": data, "layout": layout}
    return Chart(key="trade-off", title=f"{quantity} against step time", caption=caption, figure=figure)


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


def _label_positions(x: Sequence[float], y: Sequence[float], quantity: str) -> list[str]:
    """Where no whisker is, and no label of a dot close by."""
    positions: list[str] = []
    choices = ("top center", "bottom center", "middle left") if quantity == "VRAM" else ("middle right", "middle left")
    for idx, (own_x, own_y) in enumerate(zip(x, y, strict=True)):
        near = [
            positions[other]
            for other in range(idx)
            if abs(x[other] - own_x) < 0.2 * max(x) and abs(y[other] - own_y) < 0.12 * max(y)
        ]
        positions.append(next((choice for choice in choices if choice not in near), choices[0]))
    return positions


def _limit_line(duel: DuelRecord, quantity: str, largest_gib: float) -> tuple[list[Figure], list[Figure], float]:
    """Shapes, annotations and the end of the axis."""
    x_end = largest_gib * 1.2
    if quantity != "VRAM" or duel.vram_limit_bytes is None:
        return [], [], x_end
    limit_gib = to_gib(duel.vram_limit_bytes)
    too_large = [result.name for result in duel.results if result.status == "out_of_memory"]
    text = f"{'limit' if duel.settings.get('vram_limit_bytes') else 'card'} {limit_gib:.1f} GiB"
    if too_large:
        text += "<br>out of memory:<br>" + "<br>".join(f"✕ {name}" for name in too_large)
    label = {"y": 1, "yref": "paper", "yanchor": "top", "xanchor": "right", "showarrow": False, "align": "right"}
    if limit_gib > _MAX_LIMIT_OVER_LARGEST * x_end:
        return [], [{**label, "x": 1, "xref": "paper", "text": f"{text} →"}], x_end
    line = {"type": "line", "x0": limit_gib, "x1": limit_gib, "y0": 0, "y1": 1, "yref": "paper"}
    shapes = [{**line, "line": {"color": "$alarm", "width": 2, "dash": "dash"}}]
    return shapes, [{**label, "x": limit_gib, "text": text, "xshift": -6}], max(x_end, limit_gib * 1.04)


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
    colour = f"$s{number % NUM_SERIES_STYLES}"
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
