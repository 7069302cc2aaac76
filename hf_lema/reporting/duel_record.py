"""A duel as it is kept in a file, read back: its settings, its machine, its contenders, repeated runs merged.

Responsibility: the two forms of file (``results.json`` of the duel, JSON lines of ``bench_step.py``) to one value.
Knows neither how a figure was measured nor how it is shown.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_lema.reporting.bench_lines import read_bench_lines
from hf_lema.reporting.contender import ContenderResult
from hf_lema.reporting.repeats import merge_runs
from hf_lema.units import format_bytes

DUEL_KEYS = ("settings", "environment", "contenders")
# These say when and beside what a run was made, not what was run: two runs may differ in them and be repeats.
_OF_THE_MOMENT = ("time_utc", "num_load_average_1_min")


@dataclass(frozen=True, kw_only=True)
class DuelRecord:
    """One duel: the same job done by several contenders on one machine.

    Attributes:
        title: Model, batch, tokens and device in a few words.
        settings: What was run, name by name.
        environment: Where, as `hf_lema.environment.environment_record` gives it.
        results: The contenders, each once; see `merge_runs`.
        remarks: Sentences on what the contenders shared.
        plans: By contender, the memory plan that its run was made with, as ``plan_as_dict`` gives it.
        commands: Shell lines that repeat the duel.
    """

    title: str
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    results: tuple[ContenderResult, ...]
    remarks: tuple[str, ...] = ()
    plans: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    commands: tuple[str, ...] = ()

    @property
    def vram_limit_bytes(self) -> int | None:
        """What the contenders could have at most: the limit that the duel set, else the card's size."""
        return self.settings.get("vram_limit_bytes") or self.environment.get("vram_total_bytes")


def read_duels(paths: Sequence[str | Path]) -> tuple[DuelRecord, ...]:
    """The duels in some files, in their order; files that hold runs of the same job on the same machine are one duel.

    Args:
        paths: ``results.json`` of a duel, or ``*.jsonl`` of ``bench_step.py``.

    Raises:
        ValueError: A file is neither, or a result in it is not whole; all such files are named.
        OSError: A file cannot be read.
    """
    groups: dict[str, list[DuelRecord]] = {}
    faults = []
    for path in map(Path, paths):
        try:
            duels = _read_file(path)
        except ValueError as error:
            faults.append(f"{path}: {error}")
            continue
        for duel in duels:
            # Without a commit nobody can say that two files come from the same sources.
            source = "" if duel.environment.get("git_commit") else str(path)
            groups.setdefault(source + _job_key(duel), []).append(duel)
    if faults:
        raise ValueError("; ".join(faults))
    return tuple(_merge_duels(group) for group in groups.values())


def _read_file(path: Path) -> list[DuelRecord]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [DuelRecord(title=duel_title(fields["settings"]), **fields) for fields in read_bench_lines(text)]
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error})") from error
    return [duel_from_json(record)]


def duel_from_json(record: Any) -> DuelRecord:
    """The duel in a record as ``compare_peft.py`` writes it.

    Raises:
        ValueError: It is no such record.
    """
    missing = [key for key in DUEL_KEYS if key not in record] if isinstance(record, dict) else list(DUEL_KEYS)
    if missing:
        raise ValueError(f"no record of a duel: it has no {', '.join(missing)}; expected results.json of a duel")
    results, plans = [], {}
    for row in record["contenders"]:
        fields = {name: value for name, value in row.items() if name not in ("details", "wall_s")}
        results.append(ContenderResult.from_json(fields))
        if plan := row.get("details", {}).get("plan"):
            plans[row["name"]] = plan
    settings = record["settings"]
    return DuelRecord(
        title=duel_title(settings),
        settings=settings,
        environment=record["environment"],
        results=merge_runs(results),
        remarks=tuple(record.get("remarks", ())),
        plans=plans,
        commands=(record["command"],) if record.get("command") else (),
    )


def duel_title(settings: Mapping[str, Any]) -> str:
    """The job in a few words: the same for two duels that can be compared on one machine."""
    size, *more = job_words(settings)
    precision = [str(settings["precision"])] if settings.get("precision") else []
    return ", ".join([str(settings.get("model", "a model")), *filter(None, [size]), *precision, *more])


def job_words(settings: Mapping[str, Any]) -> list[str]:
    """What tells the jobs of one model in one precision apart: the size, empty where it is not known, then the rest."""
    is_known = {"batch_size", "seq_len"} <= settings.keys()
    parts = [f"{settings['batch_size']} x {settings['seq_len']} tokens" if is_known else ""]
    if (num_processes := settings.get("num_processes") or 1) > 1:
        parts.append(f"{num_processes} processes")
    if (limit_bytes := settings.get("vram_limit_bytes")) is not None:
        parts.append(f"held to {format_bytes(limit_bytes)} of VRAM")
    if settings.get("lora_dropout") == 0:
        parts.append("no LoRA dropout")
    if (num_at_once := settings.get("num_at_once") or 1) > 1:
        parts.append(f"{num_at_once} at a time")
    return parts


def _job_key(duel: DuelRecord) -> str:
    environment = {name: value for name, value in duel.environment.items() if name not in _OF_THE_MOMENT}
    return json.dumps([dict(duel.settings), environment], sort_keys=True, default=str)


def _merge_duels(duels: Sequence[DuelRecord]) -> DuelRecord:
    first, *others = duels
    if not others:
        return first
    plans: dict[str, Mapping[str, Any]] = {}
    for duel in reversed(duels):
        plans |= duel.plans
    return dataclasses.replace(
        first,
        results=merge_runs([result for duel in duels for result in duel.results]),
        remarks=tuple(dict.fromkeys(remark for duel in duels for remark in duel.remarks)),
        plans=plans,
        commands=tuple(dict.fromkeys(command for duel in duels for command in duel.commands)),
    )
