"""The charts of a duel that are curves: loss with its difference to the baseline, memory over time.

Responsibility: which points are drawn. Knows nothing of the page.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hf_lema.reporting.chart_style import Chart, Figure, curve_style, end_labels
from hf_lema.reporting.contender import ContenderResult, UseSample
from hf_lema.reporting.duel_record import DuelRecord
from hf_lema.units import to_gib

MAX_EQUAL_NAMES = 3


def loss_chart(results: Sequence[ContenderResult], baseline_name: str) -> Chart | None:
    """Losses on top of each other and, below, their differences to the baseline, where both saw the same batches."""
    drawn = [(idx, result) for idx, result in enumerate(results) if result.loss]
    if not drawn:
        return None
    baseline = next((result for _, result in drawn if result.name == baseline_name and result.status == "ok"), None)
    below = [pair for pair in drawn if baseline is not None and _is_comparable(pair[1], baseline)]
    data = [_loss_curve(idx, result) for idx, result in drawn]
    losses = [loss for curve in data for loss in curve["y"] if loss is not None]
    layout: Figure = {
        "hovermode": "x unified",
        "xaxis": {
            "title": {"text": "optimizer step"},
            "anchor": "y2" if below else "y",
            "range": [0.6, max(len(result.loss) for _, result in drawn) + 0.4],
        },
        "yaxis": {"title": {"text": "loss"}, "domain": [0.4 if below else 0, 1], "zeroline": False},
        "annotations": end_labels(_loss_ends([result for _, result in drawn]), losses),
    }
    caption = "Training loss of each step."
    if baseline is not None and below:
        gaps = [_gap_curve(idx, result, baseline) for idx, result in below]
        data += gaps
        layout["yaxis2"] = _gap_axis([abs(y) for gap in gaps for y in gap["y"] if y is not None], baseline_name)
        equal = [result.name for _, result in below if result.loss == baseline.loss]
        caption += f" Below, the difference to {baseline_name}, on a scale of its own"
        caption += f"; that of {', '.join(equal)} is zero at every step." if equal else "."
    others = [r.name for _, r in drawn if r.status == "ok" and baseline is not None and not _is_comparable(r, baseline)]
    others = [name for name in others if name != baseline_name]
    if others:
        caption += f" No difference for {', '.join(others)}, which did not see the same batches."
    figure = {"data": data, "layout": layout}
    return Chart(key="loss", title="Loss", caption=caption, figure=figure, height_px=520 if below else 380)


def _is_comparable(result: ContenderResult, baseline: ContenderResult) -> bool:
    is_other = result is not baseline and result.status == "ok"
    return is_other and result.batches_sha256 is not None and result.batches_sha256 == baseline.batches_sha256


def _loss_curve(idx: int, result: ContenderResult) -> Figure:
    return {
        **_step_curve(idx, result),
        "name": _name(result),
        "y": [_finite(loss) for loss in result.loss],
        "hovertemplate": f"{result.name} %{{y:.6f}}<extra></extra>",
    }


def _gap_curve(idx: int, result: ContenderResult, baseline: ContenderResult) -> Figure:
    return {
        **_step_curve(idx, result),
        "name": result.name,
        "y": [_finite(own - other) for own, other in zip(result.loss, baseline.loss, strict=False)],
        "yaxis": "y2",
        "showlegend": False,
        "hovertemplate": f"{result.name} minus {baseline.name}: %{{y:.3g}}<extra></extra>",
    }


def _step_curve(idx: int, result: ContenderResult) -> Figure:
    # Equal curves hide each other: the later ones are thinner.
    style = curve_style(idx, width=max(4.5 - idx, 1.5))
    return {**style, "x": list(range(1, len(result.loss) + 1)), "legendgroup": result.name}


def _gap_axis(gaps: Sequence[float], baseline_name: str) -> Figure:
    span = 1.2 * max(gaps, default=0.0)
    return {
        "title": {"text": f"minus {baseline_name}"},
        "domain": [0, 0.28],
        "range": [-span, span] if span else [-1, 1],
        "tickvals": None if span else [0],
        "zeroline": True,
        "zerolinecolor": "$muted",
        "exponentformat": "power",
    }


def _loss_ends(results: Sequence[ContenderResult]) -> list[tuple[str, float, float]]:
    names_by_curve: dict[tuple[float, ...], list[str]] = {}
    for result in results:
        names_by_curve.setdefault(tuple(result.loss), []).append(result.name)
    ends = [(_equal_names(names), len(curve), curve[-1]) for curve, names in names_by_curve.items()]
    return [end for end in ends if _finite(end[2]) is not None]


def _equal_names(names: Sequence[str]) -> str:
    """The names of equal curves; of many only the first, or the label would take the width of the chart."""
    if len(names) <= MAX_EQUAL_NAMES:
        return " = ".join(names)
    return f"{names[0]} = {len(names) - 1} others"


def _finite(value: float) -> float | None:
    """JSON has no NaN: a gap in the curve."""
    return value if abs(value) < float("inf") else None


def _name(result: ContenderResult) -> str:
    return result.name if result.status == "ok" else f"{result.name} ({result.status.replace('_', ' ')})"


def use_chart(duel: DuelRecord, key: str, title: str, bytes_of: Callable[[UseSample], int | None]) -> Chart | None:
    """One curve of memory over time for each contender; where a contender did not finish, its label says so.

    Args:
        duel: The contenders and the limit.
        key: ``"vram"`` or ``"ram"``.
        title: Head of the chart.
        bytes_of: The figure of a sample.
    """
    data, ends = [], []
    for idx, result in enumerate(duel.results):
        curve = [(sample.elapsed_s, to_gib(n)) for sample in result.samples if (n := bytes_of(sample)) is not None]
        if not curve:
            continue
        data.append(
            {
                **curve_style(idx),
                "name": _name(result),
                "x": [elapsed_s for elapsed_s, _ in curve],
                "y": [round(gib, 4) for _, gib in curve],
                "hovertemplate": f"{result.name} %{{y:.2f}} GiB at %{{x:.0f}} s<extra></extra>",
            }
        )
        ends.append((result.name + ("" if result.status == "ok" else " ✕"), *curve[-1]))
    if not data:
        return None
    layout: Figure = {
        "xaxis": {
            "title": {"text": "time since training began (s)"},
            "range": [0, 1.01 * max(trace["x"][-1] for trace in data)],
        },
        "yaxis": {"title": {"text": f"{key.upper()} (GiB)"}, "rangemode": "tozero"},
        "annotations": end_labels(ends, [0.0, *(y for trace in data for y in trace["y"])]),
    }
    if key == "vram" and duel.settings.get("vram_limit_bytes"):
        limit_gib = to_gib(duel.settings["vram_limit_bytes"])
        line = {"type": "line", "x0": 0, "x1": 1, "xref": "paper", "y0": limit_gib, "y1": limit_gib}
        layout["shapes"] = [{**line, "line": {"color": "$alarm", "width": 2, "dash": "dash"}}]
    caption = "Of the process, CUDA context included." if key == "vram" else "Private RAM above what the imports took."
    return Chart(key=key, title=title, caption=caption, figure={"data": data, "layout": layout})
