"""VRAM, RAM and loss of a training while it runs, drawn in a notebook's cell from the lines that telemetry writes.

    python recipes/live_plot.py reply-output/telemetry.jsonl --output memory.png

Knows the JSON lines of `MemoryTelemetryCallback`, matplotlib and IPython's display. Never measures. It has one picture
and replaces it, so a notebook that is saved keeps the last one only.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What is drawn, one value a step; a step that was done again after a resume counts as it was done last.

    Attributes:
        steps: Numbers of the steps.
        vram_bytes: Peak that the allocator handed out in each; empty without a GPU.
        ram_bytes: Peak of private RAM above the baseline.
        loss_steps: Numbers of the steps that a loss was logged after.
        losses: Those losses.
    """

    steps: list[int] = field(default_factory=list)
    vram_bytes: list[int] = field(default_factory=list)
    ram_bytes: list[int] = field(default_factory=list)
    loss_steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def read_curves(path: str | Path) -> Curves:
    """Reads the telemetry lines written so far; a file that is not there yet has none, a half-written line is left."""
    steps: dict[int, dict[str, Any]] = {}
    losses: dict[int, float] = {}
    path = Path(path)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n"):
            break
        record = json.loads(line)
        if record["kind"] == "step":
            steps[record["num_steps_done"]] = record
        elif record["kind"] == "log":
            losses[record["num_steps_done"]] = record["loss_unitless"]
    rows = [steps[number] for number in sorted(steps)]

    def of(name: str) -> list[int]:
        values = [row[name] for row in rows]
        return values if None not in values else []

    return Curves(
        steps=sorted(steps),
        vram_bytes=of("vram_allocated_peak_bytes"),
        ram_bytes=of("ram_private_above_baseline_peak_bytes"),
        loss_steps=sorted(losses),
        losses=[losses[number] for number in sorted(losses)],
    )


def draw(curves: Curves) -> Figure:
    """Three panels: VRAM (on a CPU there is none, and the panel says so), RAM, loss."""
    figure = Figure(figsize=(10, 2.8), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("VRAM allocated, GiB", curves.steps, [value / GIB for value in curves.vram_bytes]),
        ("private RAM above the start, GiB", curves.steps, [value / GIB for value in curves.ram_bytes]),
        ("loss", curves.loss_steps, curves.losses),
    )
    for axes, (title, steps, values) in zip(figure.subplots(1, 3), panels, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        if values:
            axes.plot(steps, values, color="#0072B2", marker=".", markersize=4)
            axes.set_ylim(0, 1.1 * max(values))
        else:
            axes.text(0.5, 0.5, "not measured here", ha="center", va="center", transform=axes.transAxes)
    return figure


def as_png(figure: Figure) -> bytes:
    """The picture's bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


class LivePlot:
    """One picture in a cell that is drawn anew, at most every ``interval_s`` seconds.

    Args:
        path: The telemetry file, which may not exist yet.
        interval_s: Least time between two drawings; one takes a quarter of a second of a CPU core.
        show: What puts a picture into the cell: called with the PNG bytes.
    """

    def __init__(self, path: str | Path, interval_s: float = 5.0, show: Callable[[bytes], None] | None = None) -> None:
        self._path = Path(path)
        self._interval_s = interval_s
        self._show = _DisplayedImage().show if show is None else show
        self._next_s = time.monotonic()

    def update(self, is_last: bool = False) -> None:
        """Draws if it is time, or if nothing comes after."""
        if not is_last and time.monotonic() < self._next_s:
            return
        curves = read_curves(self._path)
        if curves.steps:
            self._show(as_png(draw(curves)))
        self._next_s = time.monotonic() + self._interval_s


class _DisplayedImage:
    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, png: bytes) -> None:
        from IPython.display import Image, display

        if self._handle is None:
            self._handle = display(Image(data=png), display_id=True)
        else:
            self._handle.update(Image(data=png))


def main(argv: list[str] | None = None) -> None:
    """Writes the picture of a training that has ended, or still runs, as a file."""
    parser = argparse.ArgumentParser(description="draw VRAM, RAM and loss from telemetry lines")
    parser.add_argument("telemetry", type=Path)
    parser.add_argument("--output", type=Path, default=Path("telemetry.png"))
    args = parser.parse_args(argv)
    args.output.write_bytes(as_png(draw(read_curves(args.telemetry))))


if __name__ == "__main__":
    main()
