"""README's tables of duels: contenders down, jobs across, and in each cell what the job took.

Of several records of a job that with the most contenders counts, and of those the newest. Benches, which compare ways
to run and not contenders, are left to docs/measured.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from measured_tables import Line, better, device_of, duels_of, figures_of, is_ours, lines_of, seconds

from hf_lema.reporting.duel_record import DuelRecord
from hf_lema.reporting.report import BASELINE_NAME
from hf_lema.units import format_bytes, to_gib

LINKS = "recipes/results"
SEPARATOR = " · "


@dataclass(frozen=True, kw_only=True)
class Job:
    """A column.

    Attributes:
        duel: The record.
        lines: Its contenders.
        source: File name of the record.
    """

    duel: DuelRecord
    lines: Sequence[Line]
    source: str

    @property
    def model(self) -> str:
        """What the columns of a table have in common."""
        return ", ".join(str(self.duel.settings[name]) for name in ("model", "precision"))

    @property
    def name(self) -> str:
        """What tells it from the other columns."""
        settings = self.duel.settings
        limit_bytes = settings.get("vram_limit_bytes")
        held = "" if limit_bytes is None else f", held to {format_bytes(limit_bytes)}"
        return f"{settings['batch_size']} x {settings['seq_len']}{held}"

    @property
    def head(self) -> str:
        """Of its column."""
        device = device_of(self.duel).removeprefix("NVIDIA ")
        return f"{self.name}, [{device}]({LINKS}/{self.source})"

    @property
    def order(self) -> tuple[bool, int, int]:
        """By tokens and batch, a card that is held to a limit last."""
        settings = self.duel.settings
        num_tokens = settings["batch_size"] * settings["seq_len"]
        return settings.get("vram_limit_bytes") is not None, num_tokens, settings["batch_size"]


def overview(files: Iterable[Path]) -> str:
    """Markdown of a table for each model, those with the most jobs first."""
    models: dict[str, list[Job]] = {}
    for job in _jobs(files):
        models.setdefault(job.model, []).append(job)
    in_order = sorted(models, key=lambda model: (-len(models[model]), model))
    return "\n\n".join(_table(model, sorted(models[model], key=lambda job: job.order)) for model in in_order)


def _jobs(files: Iterable[Path]) -> list[Job]:
    jobs: dict[str, Job] = {}
    for path in (path for path in files if path.suffix == ".json"):
        for duel in duels_of(path):
            job = Job(duel=duel, lines=lines_of(duel, path.name), source=path.name)
            if duel.title not in jobs or _worth(job) > _worth(jobs[duel.title]):
                jobs[duel.title] = job
    return list(jobs.values())


def _worth(job: Job) -> tuple[int, str]:
    return len(job.lines), str(job.duel.environment.get("time_utc", ""))


def _table(model: str, jobs: Sequence[Job]) -> str:
    every = sorted(
        (line for job in jobs for line in job.lines),
        key=lambda line: (line.label != BASELINE_NAME, is_ours(line), line.label),
    )
    figures = figures_of(every)
    cells = {
        (job.source, line.label): _cell(line, [figure.field for figure in figures])
        for job in jobs
        for line in job.lines
    }
    rows = [["contender", *(job.head for job in jobs)], [":--", *["--:"] * len(jobs)]]
    labels = dict.fromkeys(line.label for line in every)
    rows += [[label, *(cells.get((job.source, label), "") for job in jobs)] for label in labels]
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
    """Three figures, so that a cell stays narrow."""
    gib = to_gib(num_bytes)
    return f"{gib:.2f}" if gib < 10 else f"{gib:.1f}"
