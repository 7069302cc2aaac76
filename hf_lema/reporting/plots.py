"""The pictures of a duel: loss, memory over time, step time.

Responsibility: results in, PNG files out. Never measures and never shows a window. matplotlib (extra ``report``) is
imported when the first picture is drawn.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from hf_lema.reporting.contender import ContenderResult
from hf_lema.reporting.curves import NEARLY_FULL_SHARE, read_curve
from hf_lema.reporting.verdict import step_median_and_spread_s
from hf_lema.units import to_gib

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette (jfly.uni-koeln.de/color), told apart with any colour vision; styles and markers differ too.
_COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_LINE_STYLES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 3)), (0, (9, 3, 2, 3)))
# Styles and markers of other numbers than the colours: the eighth contender does not look like the first.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h", "<", "p")
_NUM_MARKERS_PER_CURVE = 8


def write_plots(results: Sequence[ContenderResult], folder: str | Path) -> list[Path]:
    """Draw ``loss.png``, ``vram.png`` (``ram.png`` on a machine without a card) and ``step_time.png``.

    A contender that did not finish is drawn as far as it came, with a cross at the end of its memory curve, and the
    legend says how it ended.

    Args:
        results: The contenders, in the order of the legend. A picture in which none has a figure is not drawn.
        folder: Made where it does not exist.

    Returns:
        The files that were written.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError('plots need matplotlib: pip install "hf_lema[report]"')
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    has_vram = any(sample.vram_bytes is not None for result in results for sample in result.samples)
    drawings: dict[str, Callable[[Axes, Sequence[ContenderResult]], bool]] = {
        "loss.png": _draw_loss,
        "vram.png" if has_vram else "ram.png": _draw_vram if has_vram else _draw_ram,
        "step_time.png": _draw_step_time,
    }
    paths = []
    for name, draw in drawings.items():
        figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        if draw(axes, results):
            if axes.get_legend_handles_labels()[0]:
                figure.legend(loc="outside lower center", ncols=3, frameon=False)
            figure.savefig(folder / name)
            paths.append(folder / name)
    return paths


def _draw_loss(axes: Axes, results: Sequence[ContenderResult]) -> bool:
    from matplotlib.ticker import MaxNLocator

    names_by_loss: dict[tuple[float, ...], str] = {}
    for idx, result in enumerate(results):
        losses = tuple(result.loss)
        # Equal curves hide each other, so the legend says it; and later curves are thinner.
        twin = names_by_loss.setdefault(losses, result.name)
        label = _label(result) + (f" (equal to {twin})" if losses and twin != result.name else "")
        steps = [float(num_steps) for num_steps in range(1, len(losses) + 1)]
        _draw_curve(axes, idx, label, steps, losses, linewidth=max(2.6 - 0.5 * idx, 1.1))
        if twin == result.name:
            _draw_reading(axes, idx, losses)
    _finish(
        axes, "Training loss (thin: linear fit, band: plateau, bar: cliff)", "Optimizer step", "Loss (nats per token)"
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return any(result.loss for result in results)


def _draw_reading(axes: Axes, idx: int, losses: Sequence[float]) -> None:
    """The fitted line, thin; a broad pale band along each plateau; a short bar down each cliff."""
    reading = read_curve(losses)
    if reading is None:
        return
    ends = (1, reading.num_steps)
    axes.plot(ends, [reading.fit.at(end) for end in ends], color=_colour(idx), linewidth=0.7, alpha=0.6)
    for plateau in reading.plateaus:
        steps = range(plateau.first_step, plateau.last_step + 1)
        values = [losses[step - 1] for step in steps]
        axes.plot(steps, values, color=_colour(idx), linewidth=8, alpha=0.15, solid_capstyle="butt")
    for cliff in reading.cliffs:
        ends_of_bar = (losses[cliff.step - 2], losses[cliff.step - 1])
        axes.plot([cliff.step - 0.5] * 2, ends_of_bar, color=_colour(idx), linewidth=4, alpha=0.5)


def _draw_vram(axes: Axes, results: Sequence[ContenderResult]) -> bool:
    curves = [[(s.elapsed_s, s.vram_bytes) for s in result.samples] for result in results]
    return _draw_use(axes, results, curves, "VRAM of the process over time", "VRAM (GiB)")


def _draw_ram(axes: Axes, results: Sequence[ContenderResult]) -> bool:
    curves = [[(s.elapsed_s, s.ram_bytes) for s in result.samples] for result in results]
    return _draw_use(axes, results, curves, "Private RAM over time, above what the imports took", "RAM (GiB)")


def _draw_use(
    axes: Axes,
    results: Sequence[ContenderResult],
    curves: Sequence[Sequence[tuple[float, int | None]]],
    title: str,
    y_label: str,
) -> bool:
    for idx, (result, curve) in enumerate(zip(results, curves, strict=True)):
        known = [(time_s, to_gib(num_bytes)) for time_s, num_bytes in curve if num_bytes is not None]
        _draw_curve(axes, idx, _label(result), [time_s for time_s, _ in known], [gib for _, gib in known])
        if known and result.status != "ok":
            axes.plot(*known[-1], marker="x", markersize=11, markeredgewidth=3, color=_colour(idx))
    limits = {result.vram_card_bytes for result in results if result.vram_card_bytes is not None}
    for limit_bytes in limits if y_label.startswith("VRAM") else ():
        nearly_full_gib = to_gib(NEARLY_FULL_SHARE * limit_bytes)
        if axes.get_ylim()[1] > nearly_full_gib / 2:  # a line far above all curves would press them flat
            label = f"{100 * NEARLY_FULL_SHARE:.0f} % of the card"
            axes.axhline(nearly_full_gib, label=label, color="0.4", linewidth=1, linestyle=(0, (6, 3)))
    _finish(axes, title, "Time (s)", y_label)
    axes.set_ylim(bottom=0)
    return any(num_bytes is not None for curve in curves for _, num_bytes in curve)


def _draw_curve(
    axes: Axes, idx: int, label: str, x: Sequence[float], y: Sequence[float], linewidth: float = 1.8
) -> None:
    """One curve; one without points is still in the legend."""
    num_points_per_marker = max(len(x) // _NUM_MARKERS_PER_CURVE, 1)
    axes.plot(
        x,
        y,
        label=label,
        color=_colour(idx),
        linestyle=_LINE_STYLES[idx % len(_LINE_STYLES)] if x else "none",
        linewidth=linewidth,
        marker=_MARKERS[idx % len(_MARKERS)] if x else "none",
        # Each curve's markers begin elsewhere, so that those of equal curves do not hide each other.
        markevery=(idx * num_points_per_marker // 4 % num_points_per_marker, num_points_per_marker),
        markersize=5,
    )


def _draw_step_time(axes: Axes, results: Sequence[ContenderResult]) -> bool:
    timed = [(idx, result) for idx, result in enumerate(results) if result.timed_step_s]
    if not timed:
        return False
    labels = []
    for row, (idx, result) in enumerate(timed):
        times_s, label = result.timed_step_s, _label(result)
        # Spread over the height of the row in a fixed pattern, so that equal times do not hide each other.
        heights = [row + 0.04 * ((step * 7) % 11 - 5) for step in range(len(times_s))]
        marker = _MARKERS[idx % len(_MARKERS)]
        axes.plot(times_s, heights, linestyle="none", marker=marker, markersize=4, color=_colour(idx), alpha=0.5)
        axes.plot([median(times_s)] * 2, [row - 0.34, row + 0.34], color=_colour(idx), linewidth=2.5)
        label += f"\nmedian {median(times_s):.3f} s"
        summary = step_median_and_spread_s(result)  # from a few steps there is no spread to tell
        if summary is not None:
            label += f"\nspread {summary[1]:.3f} s"
        labels.append(label)
    axes.set_yticks(range(len(timed)), labels)
    axes.set_ylim(len(timed) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_title("Step time after the warm-up: a dot for each step, a bar at the median")
    axes.set_xlabel("Step time (s); the spread is the interquartile range")
    axes.grid(axis="x", alpha=0.3)
    return True


def _colour(idx: int) -> str:
    return _COLOURS[idx % len(_COLOURS)]


def _label(result: ContenderResult) -> str:
    return result.name if result.status == "ok" else f"{result.name}: {result.status.replace('_', ' ')}"


def _finish(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
