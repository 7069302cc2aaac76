"""README's tables of duels: contenders down, jobs across, and in each cell what the job took.

Of the machines that a job was done on, that with the most contenders counts, and of those the one of the newest record.
Where it has several records, what the one with the most contenders lacks comes from the others. Benches, which compare
ways to run and not contenders, are left to docs/measured.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measured_tables import Line, better, device_of, duels_of, figures_of, is_ours, lines_of, seconds

from hf_lema.reporting.duel_record import DuelRecord, job_words
from hf_lema.reporting.report import BASELINE_NAME
from hf_lema.units import to_gib

LINKS = "recipes/results"
SEPARATOR = " · "


@dataclass(frozen=True, kw_only=True)
class Job:
    """A column: the duels of a job on one kind of machine.

    Attributes:
        duel: That with the most contenders.
        lines: The contenders, of each one.
    """

    duel: DuelRecord
    lines: Sequence[Line]

    @property
    def model(self) -> str:
        """What the columns of a table have in common."""
        settings = self.duel.settings
        return ", ".join(str(settings[name]) for name in ("model", "precision") if settings.get(name))

    @property
    def name(self) -> str:
        """What tells it from the other columns."""
        return ", ".join(filter(None, job_words(self.duel.settings)))

    @property
    def head(self) -> str:
        """Of its column, with a link to each record."""
        sources = dict.fromkeys(line.source for line in self.lines)
        texts = [device_of(self.duel).removeprefix("NVIDIA "), *map(str, range(2, len(sources) + 1))]
        links = [f"[{text}]({LINKS}/{source})" for text, source in zip(texts, sources, strict=True)]
        return ", ".join(filter(None, [self.name, *links]))

    @property
    def order(self) -> tuple[Any, ...]:
        """By tokens and batch, a card that is held to a limit last."""
        settings = self.duel.settings
        batch_size, seq_len = (settings.get(name) or 0 for name in ("batch_size", "seq_len"))
        return settings.get("vram_limit_bytes") is not None, batch_size * seq_len, batch_size, self.name

    @property
    def worth(self) -> tuple[int, str]:
        """The larger, the rather it is shown."""
        return len(self.lines), max(line.time_utc for line in self.lines)


def overview(files: Iterable[Path]) -> str:
    """Markdown of a table for each model, those with the most jobs first."""
    models: dict[str, list[Job]] = {}
    for job in _jobs(files):
        models.setdefault(job.model, []).append(job)
    in_order = sorted(models, key=lambda model: (-len(models[model]), model))
    return "\n\n".join(_table(model, sorted(models[model], key=lambda job: job.order)) for model in in_order)


def _jobs(files: Iterable[Path]) -> list[Job]:
    machines: dict[tuple[str, str], list[Job]] = {}
    for path in (path for path in files if path.suffix == ".json"):
        for duel in duels_of(path):
            if lines := lines_of(duel, path.name):
                machines.setdefault((duel.title, device_of(duel)), []).append(Job(duel=duel, lines=lines))
    best: dict[str, Job] = {}
    for (title, _), records in machines.items():
        job = _joined(sorted(records, key=lambda record: record.worth, reverse=True))
        if title not in best or job.worth > best[title].worth:
            best[title] = job
    return list(best.values())


def _joined(records: Sequence[Job]) -> Job:
    """One job of its records, the most worthy first."""
    by_label: dict[str, Line] = {}
    for line in (line for record in records for line in record.lines):
        by_label.setdefault(line.label, line)
    return Job(duel=records[0].duel, lines=list(by_label.values()))


def _table(model: str, jobs: Sequence[Job]) -> str:
    every = sorted(
        (line for job in jobs for line in job.lines),
        key=lambda line: (line.label != BASELINE_NAME, is_ours(line), line.label),
    )
    figures = figures_of(every)
    cells = {
        (job.name, line.label): _cell(line, [figure.field for figure in figures]) for job in jobs for line in job.lines
    }
    rows = [["contender", *(job.head for job in jobs)], [":--", *["--:"] * len(jobs)]]
    labels = dict.fromkeys(line.label for line in every)
    rows += [[label, *(cells.get((job.name, label), "") for job in jobs)] for label in labels]
    of = SEPARATOR.join(["seconds a step", *(f"GiB of {figure.quantity}" for figure in figures)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    found = [f"- {job.name}: {'; '.join(said)}." for job in jobs if (said := better(job.lines))]
    said = ["What others do better:\n\n" + "\n".join(found)] if found else []
    return "\n\n".join([f"**{model}**: {of}", table, *said])


def _cell(line: Line, fields: Sequence[str]) -> str:
    if line.result.status != "ok":
        return line.result.status.replace("_", " ")
    values = [getattr(line.result, field) for field in fields]
    return SEPARATOR.join([seconds(line.step_s), *("-" if value is None else _gib(value) for value in values)])


def _gib(num_bytes: int) -> str:
    """With few figures, so that a cell stays narrow."""
    gib = to_gib(num_bytes)
    return f"{gib:.2f}" if gib < 10 else f"{gib:.1f}"
