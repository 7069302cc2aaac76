"""Lists of measurements, each in a process of its own, and a table of each list against its targets.

    python recipes/bench_suite.py recipes/suites/h100-7b-*.json --checkpoint-dir ck --output results.jsonl

A suite is a file: the options that all runs of `bench_step.py` share, and each run's own, the run that it is compared
with, and the targets that it must meet. What two suites share, such as the stock baseline, is measured once. Runs
follow each other; with ``--devices 0,1`` each card has one at a time, and those that are compared share a card.
Knows no models and measures nothing itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_runs import START_METHODS, Job, run_jobs

from hf_lema.units import GIB

BENCH = Path(__file__).resolve().parent / "bench_step.py"
TARGETS = {
    "max_step_ratio": "step over that of the run it is compared with, at most",
    "max_vram_gib": "VRAM allocated, at most",
    "max_reserved_gib": "VRAM reserved, at most",
    "max_reserved_ratio": "VRAM reserved over allocated, at most",
    "max_ram_gib": "private RAM above what the imports take, at most",
    "max_step_s": "seconds a step, at most",
    "min_bus_ratio": "bytes moved over wall time, over a plain copy's rate, at least",
    "min_disk_ratio": "bytes read over wall time, over a plain read's rate, at least",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measurement.

    Attributes:
        name: Its name in the table.
        options: Of `bench_step.py`, as on its command line.
        against: Name of the run that its step is compared with.
        targets: Key of `TARGETS` -> number.
        limit_s: Seconds after which it is stopped.
        alone: Whether nothing may run beside it, where there are several cards.
    """

    name: str
    options: tuple[str, ...]
    against: str | None = None
    targets: dict[str, float] = field(default_factory=dict)
    limit_s: float = 120.0
    alone: bool = False


def read_suite(path: Path) -> list[Run]:
    """The runs of a suite.

    Raises:
        ValueError: A name twice, a target that is not known, or a comparison with a run that does not come before.
    """
    suite = json.loads(path.read_text(encoding="utf-8"))
    runs: list[Run] = []
    for entry in suite["runs"]:
        options = tuple((suite["options"] + " " + entry["options"]).split())
        run = Run(**(entry | {"options": options}))
        names = [earlier.name for earlier in runs]
        if run.name in names:
            raise ValueError(f"{path.name}: two runs are named {run.name}")
        if run.against is not None and run.against not in names:
            raise ValueError(f"{path.name}: {run.name} is compared with {run.against}, which does not come before it")
        if unknown := sorted(set(run.targets) - set(TARGETS)):
            raise ValueError(f"{path.name}: {run.name} has targets {unknown}, expected some of {sorted(TARGETS)}")
        runs.append(run)
    return runs


def jobs_of(suites: dict[str, list[Run]]) -> dict[tuple[str, str], Job]:
    """The job behind every run, by the names of suite and run.

    Runs of several suites that have the same options are one job; what one suite has twice is measured twice. Jobs that
    are compared, directly or by way of others, are of one group.
    """
    jobs: dict[tuple[tuple[str, ...], int], Job] = {}
    found: dict[tuple[str, str], Job] = {}
    for suite, runs in suites.items():
        seen: Counter[tuple[str, ...]] = Counter()
        for run in runs:
            key = (run.options, seen[run.options])
            seen[run.options] += 1
            job = jobs.setdefault(key, Job(name=run.name, options=run.options, limit_s=0.0, group=len(jobs)))
            job.limit_s = max(job.limit_s, run.limit_s)
            job.is_alone = job.is_alone or run.alone
            found[suite, run.name] = job
            if run.against is not None:
                joined = {job.group, found[suite, run.against].group}
                for other in jobs.values():
                    other.group = min(joined) if other.group in joined else other.group
    return found


def figures(record: dict[str, Any], against: dict[str, Any] | None) -> dict[str, float]:
    """The numbers that targets speak of, as far as the record has them."""
    found: dict[str, float] = {}
    if "step_median_s" not in record:
        return found
    found["step_s"] = record["step_median_s"]
    if against is not None and "step_median_s" in against:
        found["step_ratio"] = found["step_s"] / against["step_median_s"]
    for name, key in (("vram_gib", "vram_allocated_peak_bytes"), ("reserved_gib", "vram_reserved_peak_bytes")):
        if record.get(key):
            found[name] = record[key] / GIB
    if "vram_gib" in found:
        found["reserved_ratio"] = found["reserved_gib"] / found["vram_gib"]
    if record.get("ram_private_above_baseline_peak_bytes") is not None:
        found["ram_gib"] = record["ram_private_above_baseline_peak_bytes"] / GIB
    if "bus_over_pinned_copy_ratio" in record:
        found["bus_ratio"] = record["bus_over_pinned_copy_ratio"]
    if "disk_without_drop_bytes_per_s" in record:  # of a cold run
        plain = [value for name, value in record.items() if name.startswith("disk_cold_") and name.endswith("_per_s")]
        found["disk_ratio"] = record["disk_without_drop_bytes_per_s"] / max(plain)
    return found


def judged(targets: dict[str, float], found: dict[str, float]) -> list[str]:
    """A word for each target: met, missed with the figure, or not measured."""
    words = []
    for target, limit in targets.items():
        bound, _, name = target.partition("_")
        if name not in found:
            words.append(f"{name} not measured")
        elif found[name] <= limit if bound == "max" else found[name] >= limit:
            words.append(f"{name} {'<=' if bound == 'max' else '>='} {limit:g} met")
        else:
            words.append(f"{name} {limit:g} MISSED")
    return words


def table(runs: list[Run], records: dict[str, dict[str, Any]]) -> tuple[str, bool]:
    """Markdown, one row a run, and whether every run ended and met its targets."""
    columns = ("step_s", "step_ratio", "vram_gib", "reserved_gib", "ram_gib", "bus_ratio", "disk_ratio")
    lines = ["| run | " + " | ".join(columns) + " | targets |", "| :-- |" + " --: |" * len(columns) + " :-- |"]
    is_met = True
    for run in runs:
        record = records.get(run.name, {"error": "not run"})
        found = figures(record, records.get(run.against or ""))
        cells = [f"{found[name]:.3f}" if name in found else "" for name in columns]
        words = [record["error"]] if "error" in record else judged(run.targets, found)
        words += [f"{record['num_runs_beside']} beside it"] if record.get("num_runs_beside") else []
        verdict = ", ".join(words)
        is_met = is_met and "error" not in record and "MISSED" not in verdict
        lines.append(f"| {run.name} | {' | '.join(cells)} | {verdict} |")
    return "\n".join(lines), is_met


def chosen(runs: list[Run], names: Sequence[str]) -> list[Run]:
    """Those of the names, and what they are compared with."""
    wanted = {run.name for run in runs if run.name in names}
    wanted |= {run.against for run in runs if run.name in wanted and run.against is not None}
    return [run for run in runs if run.name in wanted]


def main(argv: list[str] | None = None) -> int:
    """Runs suites and prints their tables last; 1 where a run failed or missed a target."""
    parser = argparse.ArgumentParser(description="measure suites of runs, each run in its own process, and compare")
    parser.add_argument("suites", type=Path, nargs="+", help="files of recipes/suites")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these runs, and those they are compared with")
    parser.add_argument("--checkpoint-dir", type=Path, required=True, help="keeps the random checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="file to which the records are appended")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="begin no run that may end later than this")
    parser.add_argument("--devices", help="cards that run at the same time, such as 0,1; by default one run at a time")
    parser.add_argument(
        "--start-method", choices=START_METHODS, default="forkserver", help="spawn imports all anew for each run"
    )
    parser.add_argument("--commit", default="", help="state of the sources, where there is no git checkout")
    args = parser.parse_args(argv)
    suites = {str(path): read_suite(path) for path in args.suites}
    if args.only:
        if missing := sorted(set(args.only) - {run.name for runs in suites.values() for run in runs}):
            parser.error(f"no such runs: {', '.join(missing)}")
        suites = {path: chosen(runs, args.only) for path, runs in suites.items()}
    extra = ["--checkpoint-dir", str(args.checkpoint_dir), *(["--commit", args.commit] if args.commit else [])]
    jobs = jobs_of(suites)
    for job in set(jobs.values()):
        job.options = (*job.options, *extra)
    devices = args.devices.split(",") if args.devices else [None]
    options: dict[str, Any] = {"start_method": args.start_method, "limit_s": args.limit_s}
    records: dict[Job, dict[str, Any]] = {}
    for job, record in run_jobs(BENCH, list(dict.fromkeys(jobs.values())), devices, **options):
        records[job] = record
        if "process_s" not in record:  # it was not run
            continue
        serves = [f"{Path(path).stem}: {name}" for (path, name), other in jobs.items() if other is job]
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": job.name, "serves": serves} | record) + "\n")
        print(f"{job.name}: {record['process_s']:.0f} s", flush=True)
    is_all_met = True
    for path, runs in suites.items():
        text, is_met = table(runs, {run.name: records[jobs[path, run.name]] for run in runs})
        print(f"\n{Path(path).stem}\n\n{text}")
        is_all_met = is_all_met and is_met
    return 0 if is_all_met else 1


if __name__ == "__main__":
    sys.exit(main())
