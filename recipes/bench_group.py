r"""Times one contender in one process and then in several of one machine, and prints one JSON line for the group.

    python recipes/bench_group.py --num-processes 2 --checkpoint-dir ck --output scale.jsonl -- \
        --shape llama-2-7b --contender lema --batch-size 8 --seq-len 512 --choices {}
    python recipes/bench_group.py --num-processes 2 --checkpoint-dir ck --output scale.jsonl \
        --suite recipes/groups/7b.json

What stands after ``--`` goes to `bench_step.py`, which runs alone first (and writes the random checkpoint) and then
under torchrun, one process a card. The line has every process's own figures and the group's:

- ``throughput_ratio``: tokens a second of the group over those of the process that ran alone. A step of the group is
  over when its slowest process is done.
- ``throughput_ratio_beside``, with ``--beside``: the same of processes that run at the same time and have nothing to do
  with each other, each with its own copy of the layers. It is what the machine gives when all cards are busy; what
  the group has less is DDP's. ``throughput_ratio_in_step`` counts a step of theirs as over when the slowest has done
  it, as it is in a group.
- ``ram_group_bytes``: anonymous and shared-memory pages of all processes above what each held before it loaded
  anything; a page that several map counts once (PSS of proc(5)).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hf_lema.measuring.records import rank_path
from hf_lema.units import GIB

BENCH = Path(__file__).resolve().parent / "bench_step.py"
LIMIT_S = 600.0
TARGETS = {"min_throughput_ratio": "throughput_ratio", "max_ram_group_gib": "ram_group_gib"}


def run_alone(options: list[str], checkpoint_dir: Path, number: int = 0) -> dict[str, Any]:
    """The record of one process without a launcher, on the card of a number."""
    command = [sys.executable, str(BENCH), *options, "--checkpoint-dir", str(checkpoint_dir)]
    # Under two visible cards and no launcher Trainer would take both.
    cards = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = str(number) if cards is None else ",".join(cards.split(",")[number : number + 1])
    lines = _output(command, {"CUDA_VISIBLE_DEVICES": visible}).splitlines()
    record: dict[str, Any] = json.loads(lines[-1])
    return record


def run_beside(options: list[str], checkpoint_dir: Path, num_processes: int) -> list[dict[str, Any]]:
    """The records of several processes that train at the same time, each as if it were alone."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(num_processes) as pool:
        together = [*options, "--meet", str(num_processes), folder]
        return list(pool.map(lambda number: run_alone(together, checkpoint_dir, number), range(num_processes)))


def run_group(options: list[str], checkpoint_dir: Path, num_processes: int) -> list[dict[str, Any]]:
    """The records of all processes, by rank."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    with tempfile.TemporaryDirectory() as scratch:
        lines = Path(scratch) / "lines.jsonl"
        command = [sys.executable, *launcher, str(BENCH), *options, "--checkpoint-dir", str(checkpoint_dir)]
        _output([*command, "--output", str(lines)], {})
        return [json.loads(rank_path(lines, rank).read_text(encoding="utf-8")) for rank in range(num_processes)]


def _output(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=os.environ | environment
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def group_record(
    alone: dict[str, Any], ranks: list[dict[str, Any]], beside: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The group's figures beside those of each process.

    Args:
        alone: Record of the one process.
        ranks: Records of the several, by rank.
        beside: Records of as many that ran at the same time by themselves.
    """
    step_s = max(rank["step_median_s"] for rank in ranks)
    tokens = alone["options"]["batch_size"] * alone["options"]["seq_len"]
    shares = [rank["ram_proportional_above_baseline_bytes"] for rank in ranks]
    return {
        "num_processes": len(ranks),
        "step_median_s": step_s,
        "tokens_per_s": len(ranks) * tokens / step_s,
        "tokens_per_s_alone": tokens / alone["step_median_s"],
        "throughput_ratio": len(ranks) * alone["step_median_s"] / step_s,
        "ram_group_bytes": None if None in shares else sum(shares),
        "ram_alone_bytes": alone["ram_proportional_above_baseline_bytes"],
        "vram_allocated_peak_bytes": [rank["vram_allocated_peak_bytes"] for rank in ranks],
        "bus_bytes_per_s": [rank.get("bus_bytes_per_s") for rank in ranks],
        "bus_bytes_per_s_alone": alone.get("bus_bytes_per_s"),
        "loss_last": [rank["loss_last"] for rank in ranks],
        "options": alone["options"],
        "environment": alone["environment"],
        "alone": alone,
        "ranks": ranks,
    } | ({} if beside is None else beside_figures(alone, beside))


def beside_figures(alone: dict[str, Any], beside: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of processes that ran at the same time by themselves; both ratios as in the module's text."""
    slowest_s = max(record["step_median_s"] for record in beside)
    in_step_s = [max(step_s) for step_s in zip(*(record["step_s"] for record in beside), strict=True)]
    total_s = len(beside) * alone["step_median_s"]
    return {
        "throughput_ratio_beside": total_s / slowest_s,
        "throughput_ratio_in_step": total_s / statistics.median(in_step_s[alone["options"]["warmup"] :]),
        "beside": beside,
    }


def measure(options: list[str], checkpoint_dir: Path, num_processes: int, *, is_beside: bool = False) -> dict[str, Any]:
    """One process, then several, in the same call and on the same machine.

    Args:
        options: Of bench_step.py.
        checkpoint_dir: Keeps the random checkpoint.
        num_processes: Of the group.
        is_beside: Whether as many also run by themselves, between the two.
    """
    alone = run_alone(options, checkpoint_dir)
    beside = run_beside(options, checkpoint_dir, num_processes) if is_beside else None
    return group_record(alone, run_group(options, checkpoint_dir, num_processes), beside)


def summary(record: dict[str, Any], targets: dict[str, float]) -> tuple[str, bool]:
    """A line for a person, and whether the targets are met."""
    names = ("throughput_ratio", "throughput_ratio_beside", "throughput_ratio_in_step")
    figures = {name: record[name] for name in names if name in record}
    if record["ram_group_bytes"] is not None:
        figures["ram_group_gib"] = record["ram_group_bytes"] / GIB
    words, is_met = [f"{name} {value:.3f}" for name, value in figures.items()], True
    for target, limit in targets.items():
        found = figures.get(TARGETS[target])
        is_ok = found is not None and (found >= limit if target.startswith("min") else found <= limit)
        words.append(f"{target} {limit:g} {'met' if is_ok else 'MISSED'}")
        is_met = is_met and is_ok
    for rank in record["ranks"]:
        bus = rank.get("bus_bytes_per_s")
        moved = "" if bus is None else f", bus {bus / 1e9:.1f} GB/s"
        words.append(f"rank {rank['rank']}: {rank['step_median_s']:.3f} s a step{moved}")
    return "; ".join(words), is_met


def read_runs(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs of the suite, or the one of the command line.

    Raises:
        ValueError: A target that is not known.
    """
    if args.suite is None:
        return [{"name": "", "options": args.options, "targets": {}}]
    suite = json.loads(args.suite.read_text(encoding="utf-8"))
    runs = [
        {"name": run["name"], "options": f"{suite['options']} {run['options']}".split(), "targets": run["targets"]}
        for run in suite["groups"]
    ]
    for run in runs:
        if unknown := sorted(set(run["targets"]) - set(TARGETS)):
            raise ValueError(
                f"{args.suite.name}: {run['name']} has targets {unknown}, expected some of {list(TARGETS)}"
            )
    return runs


def main(argv: list[str] | None = None) -> int:
    """Measures, appends a line a run to the output, prints a summary a run; 1 where a target was missed."""
    parser = argparse.ArgumentParser(description="time one process against several of one machine")
    parser.add_argument("--num-processes", type=int, default=2)
    parser.add_argument("--checkpoint-dir", type=Path, required=True, help="keeps the random checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="file to which a JSON line a run is appended")
    parser.add_argument("--suite", type=Path, help="a file of recipes/groups, instead of options")
    parser.add_argument("--beside", action="store_true", help="also run as many at the same time, each by itself")
    parser.add_argument("--commit", help="state of the sources, where there is no git checkout")
    parser.add_argument("options", nargs="*", help="of bench_step.py, after --")
    args = parser.parse_args(argv)
    if (args.suite is None) is not bool(args.options):
        parser.error("give either --suite, or options of bench_step.py after --")
    commit = [] if args.commit is None else ["--commit", args.commit]
    is_all_met = True
    for run in read_runs(args):
        record = measure([*run["options"], *commit], args.checkpoint_dir, args.num_processes, is_beside=args.beside)
        with args.output.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": run["name"]} | record) + "\n")
        text, is_met = summary(record, run["targets"])
        print(f"{run['name']}: {text}" if run["name"] else text, flush=True)
        is_all_met = is_all_met and is_met
    return 0 if is_all_met else 1


if __name__ == "__main__":
    sys.exit(main())
