"""A duel as one HTML file that opens without a network: verdict, table, charts, settings, the command to repeat it.

Responsibility: putting the page together from `hf_lema.reporting.charts`, the table's columns and the two asset files
beside this one (``page.css``, ``page.js``). Never measures. plotly (extra ``report``) is imported when a page is
written; only its script is used, which makes up nearly all of the file's size.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hf_lema.reporting.chart_style import Chart
from hf_lema.reporting.charts import duel_charts
from hf_lema.reporting.duel_record import DuelRecord
from hf_lema.reporting.headline import headline
from hf_lema.reporting.report import BASELINE_NAME, COLUMNS, NOISE_RULE, Row, summarize
from hf_lema.units import format_bytes

_TITLE = "hf_lema duel"
_NO_FIGURE = "-"
# The browser itself sees to it that the page fetches nothing and sends nothing anywhere.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; form-action 'none'"
)


def write_page(duels: Sequence[DuelRecord], path: str | Path, *, baseline_name: str = BASELINE_NAME) -> None:
    """Write one self-contained page.

    Args:
        duels: What to show, one section each.
        path: The file; its folder is made where it does not exist.
        baseline_name: The contender that the others are held against.

    Raises:
        ValueError: There is no duel, or a memory plan in one is not whole.
        RuntimeError: plotly is not installed.
    """
    page = page_html(duels, baseline_name=baseline_name)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def page_html(duels: Sequence[DuelRecord], *, baseline_name: str = BASELINE_NAME) -> str:
    """The text of the page; see `write_page`."""
    if not duels:
        raise ValueError("no duel to show: give at least one results.json or bench_step.py file")
    if importlib.util.find_spec("plotly") is None:
        raise RuntimeError('the page needs plotly: pip install "hf_lema[report]"')
    from plotly.offline import get_plotlyjs

    charts = [duel_charts(duel, baseline_name) for duel in duels]
    sections = [_section(number, *pair, baseline_name) for number, pair in enumerate(zip(duels, charts, strict=True))]
    figures = {_chart_id(number, chart): chart.figure for number, of_duel in enumerate(charts) for chart in of_duel}
    # "</script>" inside a name would end the element early.
    data = json.dumps(figures, allow_nan=False).replace("</", "<\\/")
    title = escape(duels[0].title if len(duels) == 1 else f"{len(duels)} duels")
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">',
            f"<title>{_TITLE}: {title}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n<main>",
            _contents(duels),
            *sections,
            "</main>",
            f"<script>{get_plotlyjs()}</script>",
            f'<script type="application/json" id="figures">{data}</script>',
            f"<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n",
        ]
    )


def _asset(name: str) -> str:
    return importlib.resources.files("hf_lema.reporting").joinpath(name).read_text(encoding="utf-8")


def _chart_id(number: int, chart: Chart) -> str:
    return f"duel-{number}-{chart.key}"


def _contents(duels: Sequence[DuelRecord]) -> str:
    if len(duels) == 1:
        return ""
    links = "".join(f'<li><a href="#duel-{number}">{escape(duel.title)}</a></li>' for number, duel in enumerate(duels))
    return f"<nav><p>{_TITLE}, {len(duels)} of them</p><ol>{links}</ol></nav>"


def _section(number: int, duel: DuelRecord, charts: Sequence[Chart], baseline_name: str) -> str:
    rows = summarize(duel.results, baseline_name)
    parts = [
        f'<section class="duel" id="duel-{number}">',
        f'<header><p class="kind">{_TITLE}</p><h1>{escape(duel.title)}</h1>{_machine(duel.environment)}</header>',
        f'<p class="verdict">{escape(headline(duel.results, baseline_name))}</p>',
        f'<p class="remarks">{escape(" ".join(duel.remarks))}</p>' if duel.remarks else "",
        _table(rows),
        *(_chart(number, chart) for chart in charts),
        f"<h2>Against {escape(baseline_name)}</h2>",
        _list([(row.name, row.verdict) for row in rows]),
        f'<p class="small">{escape(NOISE_RULE)}</p>',
        _notes(duel),
        _repeat(duel),
        f"<details><summary>Settings</summary>{_mapping(duel.settings)}</details>",
        f"<details><summary>Environment</summary>{_mapping(duel.environment)}</details>",
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _machine(environment: Mapping[str, Any]) -> str:
    names = [environment.get("gpu_name") or environment.get("cpu_model"), environment.get("time_utc", "")[:10]]
    names += [f"{name} {v}" for name in ("torch", "transformers", "peft") if (v := environment.get(f"{name}_version"))]
    return f'<p class="machine">{escape(" · ".join(str(name) for name in names if name))}</p>'


def _table(rows: Sequence[Row]) -> str:
    shown = [column for column in COLUMNS if any(getattr(row, column.field) is not None for row in rows)]
    heads = "".join(f'<th scope="col"><button type="button">{escape(column.head)}</button></th>' for column in shown)
    body = []
    for row in rows:
        values = [(column, getattr(row, column.field)) for column in shown]
        cells = [_cell(value, _NO_FIGURE if value is None else column.write(value)) for column, value in values[1:]]
        name = escape(row.name)
        body.append(f'<tr><th scope="row" data-value="{name}">{name}</th>{"".join(cells)}</tr>')
    caption = (
        "A click on a head sorts. Step: median after the warm-up; spread: interquartile range. RAM: private memory "
        "above what the imports took. A GiB is 2**30 bytes."
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Results"><table class="sortable">'
        f'<thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div><p class="small">{caption}</p>'
    )


def _cell(value: Any, text: str) -> str:
    kind = ' class="words"' if isinstance(value, str) else ""
    return f'<td{kind} data-value="{"" if value is None else escape(str(value))}">{escape(text)}</td>'


def _chart(number: int, chart: Chart) -> str:
    key = _chart_id(number, chart)
    return (
        f'<figure aria-labelledby="{key}-title"><h2 id="{key}-title">{escape(chart.title)}</h2>'
        f'<div class="chart" id="{key}" data-height-px="{chart.height_px}"></div>'
        f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
    )


def _list(pairs: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<li><b>{escape(name)}</b>: {escape(' '.join(text.split()))}</li>" for name, text in pairs)
    return f"<ul>{items}</ul>"


def _notes(duel: DuelRecord) -> str:
    notes = [(result.name, note) for result in duel.results for note in result.notes]
    return f"<h2>Notes</h2>{_list(notes)}" if notes else ""


def _repeat(duel: DuelRecord) -> str:
    if not duel.commands:
        return ""
    commit, dirty = duel.environment.get("git_commit"), duel.environment.get("git_dirty")
    first = [f"git checkout {commit}{'   # and changes that no commit holds' if dirty else ''}"] if commit else []
    blocks = "".join(f"<pre><code>{escape(line)}</code></pre>" for line in (*first, *duel.commands))
    return f"<h2>Repeat it</h2>{blocks}"


def _mapping(values: Mapping[str, Any]) -> str:
    rows = []
    for name, value in values.items():
        text = _NO_FIGURE if value is None else str(value)
        if name.endswith("_bytes") and isinstance(value, int):
            text = format_bytes(value)
        rows.append(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>")
    return f"<dl>{''.join(rows)}</dl>"
