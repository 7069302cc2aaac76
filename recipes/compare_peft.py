"""The duel: the same adapter trained by stock PEFT, QLoRA and LEMA, each in a process of its own, side by side.

    python recipes/compare_peft.py                       a real model and real examples, two minutes on two CPU cores
    python recipes/compare_peft.py --quick               a smoke run of about a minute
    python recipes/compare_peft.py --scenario t4-7b      a job from scenarios/
    python recipes/compare_peft.py --gpus 0,1            two contenders at a time, each alone on a card
    python recipes/compare_peft.py --model NousResearch/Llama-2-7b-hf --batch-size 8 --seq-len 512 --vram-limit 16GiB

All contenders get the same training arguments, adapter, seed, data order and batches; a hash of the batches and one of
the fresh adapter are compared. One that fails or runs out of memory is a row that says so, and one whose package is
missing says how to install it. What a contender is stands in contenders/, one small file each.

The table goes to the terminal; report.html, report.md, results.json and the plots go to --output-dir. Runs that are
done are kept there: the same command again goes on where it was interrupted, --runs 3 adds what is lacking to three
runs of each, --fresh repeats. Runs of other settings, versions, sources or machines stay apart and do not count.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from dataclasses import dataclass
from typing import Any

from apart import checkpoint_apart, environment_apart
from cards import cores_of, on_cards
from contender_process import Outcome, as_json, run_contender
from contender_spec import ContenderSpec
from default_model import ModelSource, cache_folder, resolve_model
from duel_options import CONTENDERS, QUICK, command_of, parse_arguments
from duel_runs import KeptRuns
from fairness import check_same

from hf_lema.reporting.contender import ContenderResult
from hf_lema.reporting.duel_record import duel_from_json
from hf_lema.reporting.headline import headline
from hf_lema.reporting.page import write_page
from hf_lema.reporting.report import NOISE_RULE, baseline_of, format_table, summarize, write_markdown, write_plots
from hf_lema.units import format_bytes

__all__ = ["CONTENDERS", "QUICK", "main", "parse_arguments"]

SHAPE_PREFIX = "shape:"
PACKED_SUFFIX = "-nf4"
NUM_WARMUP_STEPS = 2
MIN_RUN_S = 30.0
"""With less of --time-s left no contender is begun: importing and loading take that long."""
OUT_OF_TIME = "--time-s is over; the same command goes on here"
NUM_STEPS_A_LINE = 4
"""Where the output is not a terminal, one progress line is printed for so many steps."""


@dataclass
class ProgressLine:
    """One line that is written over on a terminal, and now and then a new line elsewhere."""

    head: str
    num_steps: int
    is_terminal: bool

    def begin(self) -> None:
        """Before the process starts, which takes some seconds to import and load."""
        text = f"{self.head} starts"
        print(f"\r{text:<100}" if self.is_terminal else text, end="" if self.is_terminal else "\n", flush=True)

    def show(self, num_steps_done: int, loss: float, elapsed_s: float) -> None:
        """The state after a step."""
        text = f"{self.head} step {num_steps_done}/{self.num_steps} | loss {loss:.4f} | {elapsed_s:.0f} s"
        if self.is_terminal:
            print(f"\r{text:<100}", end="", flush=True)
        elif num_steps_done % NUM_STEPS_A_LINE == 0 or num_steps_done == self.num_steps:
            print(text, flush=True)

    def end(self, outcome: Outcome) -> None:
        """The last state of a contender."""
        result = outcome.result
        state = "done" if result.status == "ok" else f"{result.status.replace('_', ' ')}: {result.reason}"
        print(
            f"{chr(13) if self.is_terminal else ''}{self.head} {state} ({outcome.wall_s:.0f} s in all)".ljust(100),
            flush=True,
        )


def resolve_source(args: argparse.Namespace) -> ModelSource:
    """The model; for ``shape:...`` a checkpoint of random weights, written once and cached.

    Raises:
        ValueError: There is no such shape.
    """
    if args.model is None or not args.model.startswith(SHAPE_PREFIX):
        return resolve_model(args.model)
    from bench_shapes import SHAPES

    named = args.model.removeprefix(SHAPE_PREFIX)
    shape = named.removesuffix(PACKED_SUFFIX)
    if shape not in SHAPES:
        raise ValueError(f"no shape {shape}; there are {', '.join(SHAPES)}, each with {PACKED_SUFFIX} too")
    is_packed = shape != named
    folder = checkpoint_apart(shape, args.precision, args.device, cache_folder() / "shapes", is_packed)
    how = "in NF4, random weights" if is_packed else "random weights"
    return ModelSource(name_or_path=str(folder), label=f"{shape} shape, {how}", is_random=True)


def job_of(args: argparse.Namespace, source: ModelSource) -> dict[str, Any]:
    """What is asked for, the same for all contenders: the fields of ``contender.Task`` but the contender's own."""
    return {
        "model": source.name_or_path,
        "dataset": args.dataset,
        "seq_len": args.seq_len,
        "batch_size": args.batch_size,
        "max_steps": args.max_steps,
        "num_warmup_steps": min(NUM_WARMUP_STEPS, args.max_steps - 1),
        "lora_rank": args.lora_rank,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "device": args.device,
        "vram_limit_bytes": args.vram_limit,
        "precision": args.precision,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "num_processes": args.num_processes,
    }


def run_duel(args: argparse.Namespace, source: ModelSource) -> list[Outcome]:
    """Runs the contenders, each alone on its device; what is done already is not repeated."""
    end_s = math.inf if args.time_s is None else time.monotonic() + args.time_s
    job = job_of(args, source)
    # Runs beside others are not those of a duel that has the machine to itself.
    at_once = {"num_at_once": len(args.gpus)} if _is_shared(args) else {}
    turn = Turn(args=args, job=job, runs=KeptRuns(args.output_dir, job | at_once, environment_apart()), end_s=end_s)
    if args.gpus is None:
        found = [turn.outcomes_of(number) for number in range(len(args.contenders))]
    else:
        found = on_cards(args.gpus, turn.outcomes_of, range(len(args.contenders)))
    return [outcome for outcomes in found for outcome in outcomes]


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a contender needs to take its turn.

    Attributes:
        args: Of the duel.
        job: As `job_of` gives it.
        runs: Where its runs are kept.
        end_s: By the monotonic clock; with little time left before it no run begins.
    """

    args: argparse.Namespace
    job: dict[str, Any]
    runs: KeptRuns
    end_s: float

    def outcomes_of(self, number: int) -> list[Outcome]:
        """Runs a contender as often as is asked for, less the runs that are kept."""
        args, spec = self.args, self.args.contenders[number]
        line = ProgressLine(
            head=f"[{number + 1}/{len(args.contenders)}] {spec.name:<9}",
            num_steps=args.max_steps,
            is_terminal=sys.stdout.isatty() and not _is_shared(args),
        )
        if obstacles := spec.obstacles(args.device, args.num_processes):
            skipped = _skipped(spec, obstacles)
            line.end(skipped)
            return [skipped]
        if args.fresh:
            self.runs.forget(spec.name)
        outcomes = self.runs.find(spec)
        if outcomes:
            print(f"{line.head} {len(outcomes)} of {args.runs} runs done before", flush=True)
        for _ in range(len(outcomes), args.runs):
            left_s = self.end_s - time.monotonic()
            if left_s < MIN_RUN_S:
                outcomes.append(_skipped(spec, [OUT_OF_TIME]))
                line.end(outcomes[-1])
                break
            folder = self.runs.new_folder(spec.name)
            task = self.job | {"name": spec.name, "folder": str(folder), "spec": vars(spec)}
            line.begin()
            outcomes.append(run_contender(task, line.show, min(args.limit_s, left_s)))
            line.end(outcomes[-1])
            self.runs.keep(spec, outcomes[-1], folder)
        return outcomes


def _skipped(spec: ContenderSpec, why: list[str]) -> Outcome:
    result = ContenderResult(name=spec.name, status="skipped", reason="; ".join(why))
    return Outcome(result=result, details={}, environment={}, wall_s=0.0)


def settings_of(args: argparse.Namespace, source: ModelSource, outcomes: list[Outcome]) -> dict[str, Any]:
    """What was run, for the records: no local path."""
    finished = next((outcome.details for outcome in outcomes if outcome.details), {})
    return {
        "model": source.label,
        "model_is_random": source.is_random,
        "dataset": finished.get("dataset", args.dataset),
        "num_examples": finished.get("num_examples"),
        "num_examples_skipped": finished.get("num_examples_skipped"),
        "device": args.device,
        "precision": finished.get("precision", args.precision),
        "batch_size": args.batch_size,
        "seq_len": args.seq_len,
        "max_steps": args.max_steps,
        "num_warmup_steps": min(NUM_WARMUP_STEPS, args.max_steps - 1),
        "lora_rank": args.lora_rank,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "vram_limit_bytes": args.vram_limit,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "num_processes": args.num_processes,
        "num_at_once": len(args.gpus) if _is_shared(args) else 1,
        "is_quick": args.quick,
        "is_dry_run": args.dry_run,
    }


def write_results(args: argparse.Namespace, source: ModelSource, outcomes: list[Outcome]) -> None:
    """Writes results.json, prints the table, writes the page, the Markdown and the plots."""
    environment = next((outcome.environment for outcome in outcomes if outcome.environment), None)
    record = {
        "settings": settings_of(args, source, outcomes),
        "environment": environment_apart() if environment is None else environment,
        "remarks": [*check_same(outcomes), *_beside(args)],
        "command": command_of(args),
        "contenders": [as_json(outcome) for outcome in outcomes],
    }
    folder = args.output_dir
    (folder / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    duel = duel_from_json(record)
    baseline = baseline_of(duel.results)
    table = format_table(summarize(duel.results, baseline), baseline)
    print(f"\n{headline(duel.results, baseline)}\n\n{table}\n")
    notes = [f"{result.name}: {note}" for result in duel.results for note in result.notes]
    print(*duel.remarks, *notes, NOISE_RULE, sep="\n")
    plots = write_plots(duel.results, folder)
    options: dict[str, Any] = {
        "settings": duel.settings,
        "plots": plots,
        "sections": duel.remarks,
        "baseline_name": baseline,
    }
    write_markdown(duel.results, duel.environment, folder / "report.md", **options)
    files = ["report.md", "results.json", *(plot.name for plot in plots)]
    if importlib.util.find_spec("plotly") is None:
        print('report.html is left out: it needs plotly (pip install "hf_lema[report]"), then hf-lema report makes it')
    else:
        write_page([duel], folder / "report.html", baseline_name=baseline)
        files.insert(0, "report.html")
    print(f"\n{', '.join(files[:-1])} and {files[-1]} are in {folder}")


def _is_shared(args: argparse.Namespace) -> bool:
    """Whether contenders share the machine."""
    return args.gpus is not None and len(args.gpus) > 1


def _beside(args: argparse.Namespace) -> list[str]:
    if not _is_shared(args):
        return []
    return [
        f"BEWARE: {len(args.gpus)} contenders ran at the same time, each alone on a card, with "
        f"{len(cores_of(0, len(args.gpus)))} cores of its own. Memory, disk and caches of the machine were shared."
    ]


def main(argv: list[str] | None = None) -> int:
    """Runs the duel; returns 0 if at least one contender finished."""
    args = parse_arguments(argv)
    start_s = time.perf_counter()
    source = resolve_source(args)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    limit = "" if args.vram_limit is None else f", held to {format_bytes(args.vram_limit)} of VRAM"
    many = "" if args.num_processes == 1 else f" in each of {args.num_processes} processes"
    batches = f"{args.batch_size} x {args.seq_len} tokens{many}, {args.max_steps} steps"
    print(f"{source.label}, {batches}, on {args.device}{limit}")
    if args.device == "cpu":
        print("No GPU takes part: memory is compared in RAM, above what the imports take; lema streams from disk.")
        print(
            "RAM is private RAM. A stock model's weights lie in pages of its mapped checkpoint, which fill RAM too, but"
        )
        print("which the kernel may drop and must read again: resident RAM is the sum of both.")
    setup_s = time.perf_counter() - start_s
    outcomes = run_duel(args, source)
    write_results(args, source, outcomes)
    duel_s = time.perf_counter() - start_s - setup_s
    print(f"The duel took {duel_s:.0f} s, the set-up before it {setup_s:.0f} s.")
    return 0 if any(outcome.result.status == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
