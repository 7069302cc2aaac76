"""The duel: the same adapter trained by stock PEFT, QLoRA and LEMA, each in a process of its own, side by side.

    python recipes/compare_peft.py                       a real model and real examples, six minutes on two CPU cores
    python recipes/compare_peft.py --quick               a smoke run of about a minute
    python recipes/compare_peft.py --model NousResearch/Llama-2-7b-hf --batch-size 8 --seq-len 512 --vram-limit 16GiB

All contenders get the same training arguments, adapter, seed, data order and batches; a hash of the batches and one of
the fresh adapter are compared. One that fails or runs out of memory is a row that says so. The table goes to the
terminal; results.json, report.md and the plots go to --output-dir.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contender_process import Outcome, as_json, run_contender
from default_model import ModelSource, resolve_model

from hf_lema.report import NOISE_RULE, format_table, summarize, write_markdown, write_plots
from hf_lema.units import format_bytes, parse_bytes

CONTENDERS = ("peft", "qlora", "lema", "lema-auto")
ALL_CONTENDERS = (*CONTENDERS, "lema-nf4")
QUICK = {"batch_size": 1, "max_steps": 4}
NUM_WARMUP_STEPS = 2
NUM_STEPS_A_LINE = 4
"""Where the output is not a terminal, one progress line is printed for so many steps."""


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the options.

    Raises:
        SystemExit: An option cannot be used; the message says why.
    """
    parser = argparse.ArgumentParser(description="train one adapter with stock PEFT, QLoRA and LEMA, and compare")
    parser.add_argument("--model", help="hub id or folder; by default SmolLM2-135M-Instruct, fetched and cached")
    parser.add_argument("--dataset", help="hub id, .jsonl or .csv; by default 5,000 [LEMA_REPLY] examples")
    parser.add_argument("--contenders", nargs="+", type=_names, default=[CONTENDERS], help=", ".join(ALL_CONTENDERS))
    parser.add_argument("--batch-size", type=_positive, default=2)
    parser.add_argument("--seq-len", type=_positive, default=96, help="tokens an example")
    parser.add_argument("--max-steps", type=_positive, default=12)
    parser.add_argument("--lora-rank", type=_positive, default=16, help="alpha is twice the rank")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--vram-limit", type=_byte_size, help="hold every contender to a smaller card, such as 16GiB")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("duel-output"))
    parser.add_argument("--quick", action="store_true", help="a smoke run: one example a step, four steps")
    parser.add_argument("--limit-s", type=_positive, default=6 * 3600, help="a contender that takes longer is stopped")
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    args.contenders = list(dict.fromkeys(name for names in args.contenders for name in names))
    args.device = _choose_device(args.device, parser)
    if args.vram_limit is not None and args.device == "cpu":
        parser.error("--vram-limit needs a GPU; this duel runs on the CPU")
    return args


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in ALL_CONTENDERS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no contender {', '.join(unknown)}; there are {', '.join(ALL_CONTENDERS)}")
    return names


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _byte_size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _choose_device(wanted: str, parser: argparse.ArgumentParser) -> str:
    import torch

    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        parser.error("--device cuda: torch sees no GPU here")
    return wanted if wanted != "auto" else ("cuda" if has_gpu else "cpu")


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
        print(f"{chr(13) if self.is_terminal else ''}{self.head} {state} ({outcome.wall_s:.0f} s in all)".ljust(100))


def run_duel(args: argparse.Namespace, source: ModelSource) -> list[Outcome]:
    """Runs the contenders one after the other, each alone on the device."""
    outcomes = []
    for number, name in enumerate(args.contenders, start=1):
        folder = args.output_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        for stale in ("result.json", "telemetry.jsonl"):
            (folder / stale).unlink(missing_ok=True)
        line = ProgressLine(
            head=f"[{number}/{len(args.contenders)}] {name:<9}",
            num_steps=args.max_steps,
            is_terminal=sys.stdout.isatty(),
        )
        line.begin()
        task = {
            "name": name,
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
            "folder": str(folder),
        }
        outcome = run_contender(task, line.show, args.limit_s)
        line.end(outcome)
        outcomes.append(outcome)
    return outcomes


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
        "precision": finished.get("precision"),
        "batch_size": args.batch_size,
        "seq_len": args.seq_len,
        "max_steps": args.max_steps,
        "num_warmup_steps": min(NUM_WARMUP_STEPS, args.max_steps - 1),
        "lora_rank": args.lora_rank,
        "learning_rate": args.learning_rate,
        "seed": args.seed,
        "vram_limit_bytes": args.vram_limit,
        "is_quick": args.quick,
    }


def check_same(outcomes: list[Outcome]) -> list[str]:
    """Sentences on what the finished contenders shared, or did not."""
    finished = [outcome for outcome in outcomes if outcome.result.status == "ok"]
    if len(finished) < 2:
        return []
    batches = {outcome.result.batches_sha256 for outcome in finished}
    starts = {outcome.details["adapter_start_sha256"] for outcome in finished}
    sentences = [
        "All saw the same batches." if len(batches) == 1 else "BEWARE: the contenders did not see the same batches.",
        "All began with the same adapter, bit for bit."
        if len(starts) == 1
        else "BEWARE: the contenders did not begin with the same adapter.",
    ]
    by_end: dict[str, list[str]] = {}
    for outcome in finished:
        by_end.setdefault(outcome.details["adapter_end_sha256"], []).append(outcome.result.name)
    equal = [" and ".join(names) for names in by_end.values() if len(names) > 1]
    return sentences + [f"After the last step the adapters of {names} are equal, bit for bit." for names in equal]


def write_results(args: argparse.Namespace, source: ModelSource, outcomes: list[Outcome]) -> None:
    """Prints the table and writes results.json, report.md and the plots."""
    results = [outcome.result for outcome in outcomes]
    settings = settings_of(args, source, outcomes)
    environment = next((outcome.environment for outcome in outcomes if outcome.environment), None)
    if environment is None:
        from hf_lema.telemetry import environment_record

        environment = environment_record()
    remarks = check_same(outcomes)
    record = {"settings": settings, "environment": environment, "remarks": remarks}
    record["contenders"] = [as_json(outcome) for outcome in outcomes]
    (args.output_dir / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plots = write_plots(results, args.output_dir)
    write_markdown(results, environment, args.output_dir / "report.md", settings=settings, plots=plots)
    print(f"\n{format_table(summarize(results))}\n")
    notes = [f"{result.name}: {note}" for result in results for note in result.notes]
    print(*remarks, *notes, NOISE_RULE, sep="\n")
    print(f"\nresults.json, report.md and {', '.join(plot.name for plot in plots)} are in {args.output_dir}")


def main(argv: list[str] | None = None) -> int:
    """Runs the duel; returns 0 if at least one contender finished."""
    args = parse_arguments(argv)
    start_s = time.perf_counter()
    source = resolve_model(args.model)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    limit = "" if args.vram_limit is None else f", held to {format_bytes(args.vram_limit)} of VRAM"
    print(f"{source.label}, {args.batch_size} x {args.seq_len} tokens, {args.max_steps} steps, on {args.device}{limit}")
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
