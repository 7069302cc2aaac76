"""Runs of the same contender on the same job, put together to one result.

Responsibility: what becomes of each figure. Knows nothing of files.

Note [merged runs]: the timed steps of all runs of a contender are taken together, so the spread holds what differs from
run to run. A peak is the largest of any run. Losses and the memory curve are the first run's; where the losses of
another run differ, a note says so.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from hf_lema.reporting.contender import ContenderResult


def merge_runs(results: Sequence[ContenderResult]) -> tuple[ContenderResult, ...]:
    """One result for each name, in the order of their first runs; see Note [merged runs].

    A run that finished stands before one that did not. The same run given twice counts once.
    """
    by_name: dict[str, list[ContenderResult]] = {}
    for result in results:
        runs = by_name.setdefault(result.name, [])
        if result not in runs:
            runs.append(result)
    return tuple(_merge(runs) for runs in by_name.values())


def _merge(runs: Sequence[ContenderResult]) -> ContenderResult:
    finished = [run for run in runs if run.status == "ok"]
    if len(runs) == 1 or not finished:
        return runs[0]
    unfinished = [run for run in runs if run.status != "ok"]
    notes = list(dict.fromkeys(note for run in finished for note in run.notes))
    notes += [f"One of {len(runs)} runs did not finish: {run.reason}" for run in unfinished]
    if len(finished) == 1:
        return dataclasses.replace(finished[0], notes=notes)
    first = finished[0]
    medians_s = ", ".join(f"{statistics.median(run.timed_step_s):.3f}" for run in finished if run.timed_step_s)
    notes.append(f"{len(finished)} runs, their median steps {medians_s} s; the steps of all are taken together.")
    if any(run.loss != first.loss for run in finished):
        notes.append("The losses were not the same in all runs; those of the first are shown.")
    peaks: dict[str, Any] = {}
    for field in dataclasses.fields(ContenderResult):
        values = [getattr(run, field.name) for run in finished]
        if field.name.endswith("_peak_bytes") and any(isinstance(value, int) for value in values):
            peaks[field.name] = max(value for value in values if value is not None)
    warm_up_s = [step_s for run in finished for step_s in tuple(run.step_s)[: run.num_warmup_steps]]
    return dataclasses.replace(
        first,
        num_steps=sum(run.num_steps for run in finished),
        num_warmup_steps=len(warm_up_s),
        step_s=[*warm_up_s, *(step_s for run in finished for step_s in run.timed_step_s)],
        tokens_per_s=_tokens_per_s(finished),
        h2d_bytes=[num_bytes for run in finished for num_bytes in run.h2d_bytes],
        disk_bytes=[num_bytes for run in finished for num_bytes in run.disk_bytes],
        wait_s=None if first.wait_s is None else sum(run.wait_s or 0.0 for run in finished),
        notes=notes,
        **peaks,
    )


def _tokens_per_s(runs: Sequence[ContenderResult]) -> float | None:
    if any(run.tokens_per_s is None for run in runs):
        return None
    timed_s = [sum(run.timed_step_s) for run in runs]
    if sum(timed_s) == 0:
        return None
    num_tokens = sum((run.tokens_per_s or 0.0) * run_s for run, run_s in zip(runs, timed_s, strict=True))
    return num_tokens / sum(timed_s)
