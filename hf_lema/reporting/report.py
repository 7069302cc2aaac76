"""A duel's results, with a reading of their curves, as a table for the terminal and a page in Markdown.

Responsibility: records in, text out. Never measures; knows nothing of the runtime.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lema.reporting.contender import STATUSES, ContenderResult, UseSample
from hf_lema.reporting.curves import CURVE_RULE, CurveReading, read_curve, share_above
from hf_lema.reporting.plots import write_plots
from hf_lema.reporting.verdict import NOISE_RULE, Comparison, Verdict, step_median_and_spread_s, verdict
from hf_lema.units import format_bytes, to_gib

__all__ = [
    "BASELINE_NAME",
    "COLUMNS",
    "CURVE_RULE",
    "NOISE_RULE",
    "STATUSES",
    "Column",
    "Comparison",
    "ContenderResult",
    "Row",
    "UseSample",
    "Verdict",
    "baseline_of",
    "format_table",
    "summarize",
    "verdict",
    "write_markdown",
    "write_plots",
]

BASELINE_NAME = "peft"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender's line of the table; ``None`` where there is no figure.

    Attributes:
        name: The contender.
        status: As in its result.
        loss_first: Loss of the first step.
        loss_last: Loss of the last step.
        step_median_s: Median of the steps after the warm-up.
        step_spread_s: Their interquartile range.
        tokens_per_s: After the warm-up.
        vram_allocated_peak_bytes: By tensors.
        vram_reserved_peak_bytes: By torch's allocator.
        vram_process_peak_bytes: By the process.
        ram_private_above_imports_peak_bytes: Private RAM above what the imports took.
        ram_resident_above_imports_peak_bytes: The same with the pages of mapped files; where no card takes part.
        ram_file_peak_bytes: Pages of mapped files.
        h2d_per_step_bytes: Mean of the layer bytes that a step moved.
        bus_bytes_per_s: These over the wall time of the steps after the warm-up.
        curve: What is to be seen in the loss curve.
        nearly_full_share: Share of the steps with more than 90 % of the card in use by the process.
        verdict: What may be said against the baseline, in one line.
    """

    name: str
    status: str
    loss_first: float | None
    loss_last: float | None
    step_median_s: float | None
    step_spread_s: float | None
    tokens_per_s: float | None
    vram_allocated_peak_bytes: int | None
    vram_reserved_peak_bytes: int | None
    vram_process_peak_bytes: int | None
    ram_private_above_imports_peak_bytes: int | None
    ram_resident_above_imports_peak_bytes: int | None
    ram_file_peak_bytes: int | None
    h2d_per_step_bytes: float | None
    bus_bytes_per_s: float | None
    curve: CurveReading | None
    nearly_full_share: float | None
    verdict: str

    @property
    def curve_text(self) -> str:
        """The curves in one line for a person; empty where there is none."""
        parts = [] if self.curve is None else [self.curve.text]
        if self.nearly_full_share is not None:
            parts.append(f"VRAM above 90 % in {100 * self.nearly_full_share:.0f} % of the steps")
        return "; ".join(parts)


def baseline_of(results: Sequence[ContenderResult]) -> str:
    """The contender that the others are held against: stock PEFT where it takes part, else the first."""
    names = [result.name for result in results]
    return BASELINE_NAME if BASELINE_NAME in names else next(iter(names), BASELINE_NAME)


def summarize(results: Sequence[ContenderResult], baseline_name: str = BASELINE_NAME) -> list[Row]:
    """One row for each result, in their order, each held against the result of that name."""
    baseline = next((result for result in results if result.name == baseline_name), None)
    return [_row(result, baseline) for result in results]


def _row(result: ContenderResult, baseline: ContenderResult | None) -> Row:
    median_and_spread_s = step_median_and_spread_s(result)
    return Row(
        name=result.name,
        status=result.status,
        loss_first=result.loss[0] if result.loss else None,
        loss_last=result.loss[-1] if result.loss else None,
        step_median_s=statistics.median(result.timed_step_s) if result.timed_step_s else None,
        step_spread_s=None if median_and_spread_s is None else median_and_spread_s[1],
        tokens_per_s=result.tokens_per_s,
        vram_allocated_peak_bytes=result.vram_allocated_peak_bytes,
        vram_reserved_peak_bytes=result.vram_reserved_peak_bytes,
        vram_process_peak_bytes=result.vram_process_peak_bytes,
        ram_private_above_imports_peak_bytes=result.ram_private_above_imports_peak_bytes,
        ram_resident_above_imports_peak_bytes=result.ram_resident_above_imports_peak_bytes,
        ram_file_peak_bytes=result.ram_file_peak_bytes,
        h2d_per_step_bytes=sum(result.h2d_bytes) / len(result.h2d_bytes) if result.h2d_bytes else None,
        bus_bytes_per_s=_bus_bytes_per_s(result),
        curve=read_curve(result.loss),
        nearly_full_share=(
            None if result.vram_card_bytes is None else share_above(result.vram_step_peak_bytes, result.vram_card_bytes)
        ),
        verdict=verdict(result, baseline).text,
    )


def _bus_bytes_per_s(result: ContenderResult) -> float | None:
    timed_s, moved = sum(result.timed_step_s), result.h2d_bytes[len(result.step_s) - len(result.timed_step_s) :]
    return sum(moved) / timed_s if moved and timed_s > 0 and len(moved) == len(result.timed_step_s) else None


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of the table.

    Attributes:
        head: Its head, with the unit.
        field: The field of `Row` that it shows.
        write: How.
        is_brief: Whether it is shown on the terminal too.
    """

    head: str
    field: str
    write: Callable[[Any], str]
    is_brief: bool = True


def _write_gib(num_bytes: float) -> str:
    return f"{to_gib(num_bytes):.2f}"


def _write_rate(per_s: float) -> str:
    return f"{per_s:.1f}" if per_s < 100 else f"{per_s:.0f}"


COLUMNS = (
    Column(head="contender", field="name", write=str),
    Column(head="status", field="status", write=lambda status: str(status).replace("_", " ")),
    Column(head="loss first", field="loss_first", write="{:.4f}".format),
    Column(head="loss last", field="loss_last", write="{:.4f}".format),
    Column(head="step s", field="step_median_s", write="{:.3f}".format),
    Column(head="spread s", field="step_spread_s", write="{:.3f}".format),
    Column(head="tokens/s", field="tokens_per_s", write=_write_rate),
    Column(head="VRAM GiB", field="vram_allocated_peak_bytes", write=_write_gib),
    Column(head="VRAM reserved GiB", field="vram_reserved_peak_bytes", write=_write_gib, is_brief=False),
    Column(head="VRAM process GiB", field="vram_process_peak_bytes", write=_write_gib, is_brief=False),
    Column(head="RAM GiB", field="ram_private_above_imports_peak_bytes", write=_write_gib),
    Column(head="resident GiB", field="ram_resident_above_imports_peak_bytes", write=_write_gib),
    Column(head="file pages GiB", field="ram_file_peak_bytes", write=_write_gib, is_brief=False),
    Column(head="moved GiB/step", field="h2d_per_step_bytes", write=_write_gib, is_brief=False),
    Column(head="bus GiB/s", field="bus_bytes_per_s", write=_write_gib, is_brief=False),
)
_MAX_VERDICT_CHARS = 100


def _cells(rows: Sequence[Row], columns: Sequence[Column]) -> list[list[str]]:
    """Head and body as text, without the columns in which no row has a figure."""
    shown = [column for column in columns if any(getattr(row, column.field) is not None for row in rows)]
    table = [[column.head for column in shown]]
    for row in rows:
        values = [(column, getattr(row, column.field)) for column in shown]
        table.append(["-" if value is None else column.write(value) for column, value in values])
    return table


def format_table(rows: Sequence[Row], baseline_name: str = BASELINE_NAME) -> str:
    """The rows as aligned plain text for a terminal: the figures, then the verdicts.

    A column in which no contender has a figure is left out (VRAM on a machine without a card).
    """
    if not rows:
        return "no contender"
    table = _cells(rows, [column for column in COLUMNS if column.is_brief])
    widths = [max(len(line[idx]) for line in table) for idx in range(len(table[0]))]
    # The first two columns are words and the rest are figures.
    align = [str.ljust, str.ljust, *[str.rjust] * (len(widths) - 2)]
    lines = [
        "  ".join(justify(cell, width) for justify, cell, width in zip(align, cells, widths, strict=True)).rstrip()
        for cells in table
    ]
    lines.insert(1, "-" * max(len(line) for line in lines))
    lines += ["", f"against {baseline_name}"]
    lines += [f"  {row.name.ljust(widths[0])}  {_cut(row.verdict)}" for row in rows]
    if any(row.curve_text for row in rows):
        lines += ["", "curves"]
        lines += [f"  {row.name.ljust(widths[0])}  {row.curve_text}" for row in rows if row.curve_text]
    return "\n".join(lines)


def _cut(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= _MAX_VERDICT_CHARS else one_line[: _MAX_VERDICT_CHARS - 3] + "..."


def write_markdown(
    results: Sequence[ContenderResult],
    environment: Mapping[str, Any],
    path: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    plots: Sequence[Path] = (),
    baseline_name: str = BASELINE_NAME,
    title: str = "Duel",
    sections: Sequence[str] = (),
) -> None:
    """Write the page: results, verdicts and the rule behind them, notes, pictures, settings, environment.

    Args:
        results: The contenders, in the order of the table.
        environment: As `hf_lema.environment.environment_record` gives it.
        path: The file to write; its folder is made where it does not exist.
        settings: What was run, name by name, such as model, batch size and seed.
        plots: Pictures to show, as `write_plots` gave them; linked relative to the page.
        baseline_name: The contender that the others are held against.
        title: Head of the page.
        sections: Markdown to stand between head and results.
    """
    path = Path(path)
    rows = summarize(results, baseline_name)
    page = [f"# {title}", *sections, *_results_section(rows, baseline_name), *_notes_section(results)]
    for plot in plots:
        link = os.path.relpath(plot, path.parent).replace(os.sep, "/")
        page.append(f"![{plot.stem.replace('_', ' ')}]({link})")
    if settings:
        page += ["## Settings", _markdown_mapping(settings)]
    page += ["## Environment", _markdown_mapping(environment)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(page) + "\n", encoding="utf-8")


def _results_section(rows: Sequence[Row], baseline_name: str) -> list[str]:
    head, *body = _cells(rows, COLUMNS)
    alignment = [":--", ":--", *("--:" for _ in head[2:])]
    table = "\n".join(_markdown_line(cells) for cells in (head, alignment, *body))
    legend = (
        "Step: median after the warm-up; spread: interquartile range. RAM: largest private memory (anonymous and "
        "shared pages) above what the imports took; pages of mapped files stand apart. A GiB is 2**30 bytes."
    )
    if all(row.vram_allocated_peak_bytes is None for row in rows):
        legend += (
            " No GPU took part, so memory is compared in RAM. Resident: private RAM and pages of mapped files, above "
            "the imports; a stock model's weights are such pages, which the kernel may drop and must read again."
        )
    else:
        legend += " VRAM: largest use by tensors (`max_memory_allocated`)."
    verdicts = "\n".join(f"- **{row.name}**: {' '.join(row.verdict.split())}" for row in rows)
    curves = "\n".join(f"- **{row.name}**: {row.curve_text}" for row in rows if row.curve_text)
    sections = [table, legend, f"## Against {baseline_name}", verdicts, NOISE_RULE]
    return sections + (["## Curves", curves, CURVE_RULE] if curves else [])


def _notes_section(results: Sequence[ContenderResult]) -> list[str]:
    notes = [f"- **{result.name}**: {note}" for result in results for note in result.notes]
    return ["## Notes", "\n".join(notes)] if notes else []


def _markdown_mapping(values: Mapping[str, Any]) -> str:
    lines = [["", "value"], [":--", ":--"]]
    for name, value in values.items():
        text = "-" if value is None else str(value)
        if name.endswith("_bytes") and isinstance(value, int):
            text = format_bytes(value)
        lines.append([name, text])
    return "\n".join(_markdown_line(cells) for cells in lines)


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
