"""``hf-lema report``: files of results in, table, HTML page and Markdown out.

Responsibility: one call that reads, writes what was asked for, and tells what it says. Knows no figure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lema.reporting.contender import ContenderResult
from hf_lema.reporting.duel_record import DuelRecord, read_duels
from hf_lema.reporting.headline import headline
from hf_lema.reporting.page import write_page
from hf_lema.reporting.report import Row, baseline_of, format_table, summarize, write_markdown, write_plots


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was read and written.

    Attributes:
        duels: In the order of the files; see `hf_lema.reporting.duel_record.read_duels`.
        baseline_name: The contender that the others are held against.
        files: The files that were written.
    """

    duels: tuple[DuelRecord, ...]
    baseline_name: str
    files: tuple[Path, ...]

    def format(self) -> str:
        """Verdict and table of each duel for a terminal, then the files."""
        parts = []
        for duel in self.duels:
            table = format_table(self._rows(duel.results), self.baseline_name)
            parts.append("\n".join([duel.title, headline(duel.results, self.baseline_name), "", table]))
        if self.files:
            parts.append("\n".join(f"wrote {path}" for path in self.files))
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON: the rows of the tables, the verdicts, the files."""
        duels = [
            {
                "title": duel.title,
                "headline": headline(duel.results, self.baseline_name),
                "contenders": [dataclasses.asdict(row) for row in self._rows(duel.results)],
            }
            for duel in self.duels
        ]
        return {"duels": duels, "files": [str(path) for path in self.files]}

    def _rows(self, results: Sequence[ContenderResult]) -> list[Row]:
        return summarize(results, self.baseline_name)


def make_report(
    paths: Sequence[str | Path],
    *,
    html: str | Path | None = None,
    markdown: str | Path | None = None,
    baseline_name: str | None = None,
) -> Report:
    """Read results and write what is asked for.

    Args:
        paths: ``results.json`` of duels, and JSON lines of ``bench_step.py``.
        html: The page to write; all duels go onto one.
        markdown: The Markdown file to write, its pictures beside it; takes a single duel.
        baseline_name: The contender that the others are held against; see `baseline_of` if None.

    Raises:
        ValueError: A file is no such record, Markdown is asked for and there is more than one duel, or no contender of
            any duel is the baseline.
        RuntimeError: plotly or matplotlib is needed and not installed.
        OSError: A file cannot be read or written.
    """
    duels = read_duels(paths)
    names = dict.fromkeys(result.name for duel in duels for result in duel.results)
    if baseline_name is None:
        baseline_name = baseline_of([result for duel in duels for result in duel.results])
    elif baseline_name not in names:
        raise ValueError(f"no contender is named {baseline_name!r}; there are {', '.join(names)}")
    if markdown is not None and len(duels) != 1:
        raise ValueError(f"Markdown shows one duel, but the files hold {len(duels)}: give those of one, or use HTML")
    files = []
    if html is not None:
        write_page(duels, html, baseline_name=baseline_name)
        files.append(Path(html))
    if markdown is not None:
        files += _write_markdown(duels[0], Path(markdown), baseline_name)
    return Report(duels=duels, baseline_name=baseline_name, files=tuple(files))


def _write_markdown(duel: DuelRecord, path: Path, baseline_name: str) -> list[Path]:
    plots = write_plots(duel.results, path.parent)
    write_markdown(
        duel.results,
        duel.environment,
        path,
        settings=duel.settings,
        plots=plots,
        baseline_name=baseline_name,
        title=duel.title,
        sections=duel.remarks,
    )
    return [path, *plots]
