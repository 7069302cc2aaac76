"""The second experiment: models and techniques learn to tell the sentiment of reviews, side by side.

    python recipes/finetune_sentiment.py                      Llama-2-7B and DeepSeek-7B, QLoRA and LEMA, on IMDB
    python recipes/finetune_sentiment.py --ablate --models NousResearch/Llama-2-7b-hf --vram-limit 16GiB
    python recipes/finetune_sentiment.py --small --dataset reviews.jsonl       SmolLM2-135M-Instruct on a CPU

Each row is a process of its own. A label is told by comparing the likelihood of the label words; what a row tells
before and after its training, its time and its memory go to the terminal and, with pictures, to --output-dir. A row
that fails, runs out of memory or cannot run here says so. --resume runs what a stopped duel has left, and goes on
within a row where its training stopped.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from compare_peft import ProgressLine
from contender_process import Outcome, as_json, run_contender
from default_model import ModelSource, resolve_model
from model_card import aligned_table, markdown_table
from resumable import EXIT_INTERRUPTED, command_to_resume
from run_record import open_run
from techniques import ABLATION, DUEL, SMALL_DUEL, reason_not_to_run

from hf_lema.measuring.telemetry import environment_record
from hf_lema.reporting.report import ContenderResult, format_table, summarize, write_markdown, write_plots
from hf_lema.units import parse_bytes, to_gib

MODELS = ("NousResearch/Llama-2-7b-hf", "deepseek-ai/deepseek-llm-7b-base")
DATASET = "stanfordnlp/imdb"
SMALL = {
    "batch_size": 8,
    "accumulation": 1,
    "seq_len": 96,
    "max_steps": 15,
    "learning_rate": 5e-4,
    "num_held_out": 100,
    "save_every": 5,
}
OWN_OPTIONS = ("small", "ablate", "models", "techniques", "vram_limit", "limit_s", "output_dir")
"""Options of the duel; all others are a row's too."""
SCRIPT = "sentiment_row.py"
SCORE_HEAD = ("row", "before", "accuracy", "precision", "recall", "F1", "fragmented GiB", "retries", "head-room GiB")
SCORE_LEGEND = (
    "Accuracy on held-out texts before and after the training; precision, recall and F1 after it, of the positive "
    "label. Fragmented: reserved less allocated VRAM at their peaks; retries: times that the allocator emptied its "
    "cache; head-room: what the card, or without one the machine's RAM, had left at the peak."
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the options.

    Raises:
        SystemExit: An option cannot be used; the message says why.
    """
    parser = argparse.ArgumentParser(description="a duel of models and techniques on the sentiment of reviews")
    parser.add_argument("--small", action="store_true", help="SmolLM2-135M-Instruct and a short run, for a CPU")
    parser.add_argument("--models", nargs="+", help=f"hub ids or folders; by default {' '.join(MODELS)}")
    parser.add_argument("--dataset", help=f"hub id, .jsonl or .csv with text and label; by default {DATASET}")
    parser.add_argument(
        "--techniques",
        nargs="+",
        choices=tuple(ABLATION),
        help=f"by default {' '.join(DUEL)}; small: {' '.join(SMALL_DUEL)}",
    )
    parser.add_argument("--ablate", action="store_true", help="all techniques, each one change against the first")
    parser.add_argument("--precision", choices=("fp16", "bf16", "fp32"), help="fp16 on a GPU, fp32 on a CPU")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulation", type=int, default=16, help="batches that are one step")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens an example; a longer text is cut")
    parser.add_argument("--max-steps", type=int, default=50)
    parser.add_argument("--num-held-out", type=int, default=500, help="held-out texts that are labelled")
    parser.add_argument("--eval-batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--max-grad-norm", type=float, default=0.3)
    parser.add_argument("--lora-rank", type=int, default=16, help="alpha is twice the rank")
    parser.add_argument("--vram-limit", type=parse_bytes, help="hold every row to a smaller card, such as 16GiB")
    parser.add_argument("--save-every", type=int, default=25, help="steps from one checkpoint to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-s", type=int, default=12 * 3600, help="a row that takes longer is stopped")
    parser.add_argument("--output-dir", type=Path, default=Path("sentiment-output"))
    parser.add_argument("--resume", action="store_true", help="run what the duel in --output-dir has left")
    if parser.parse_known_args(argv)[0].small:
        parser.set_defaults(**SMALL)
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.precision = args.precision or ("fp16" if args.device == "cuda" else "fp32")
    if args.device == "cpu" and (args.precision == "fp16" or args.vram_limit is not None):
        parser.error("--precision fp16 and --vram-limit need a GPU")
    if args.small and args.dataset is None:
        parser.error("--small needs --dataset FILE: a .jsonl or .csv file with text and label")
    if args.ablate and args.techniques:
        parser.error("--ablate runs all techniques: leave out --techniques")
    args.dataset = args.dataset or DATASET
    usual = SMALL_DUEL if args.small else DUEL
    args.techniques = list(ABLATION) if args.ablate else list(dict.fromkeys(args.techniques or usual))
    return args


def refuse_pickled(name_or_path: str) -> str | None:
    """Why a model cannot be trained from: it has only ``.bin`` weights. None where it can, or nobody can be asked."""
    folder = Path(name_or_path)
    if folder.is_dir():
        names = [path.name for path in folder.iterdir()]
    else:
        from huggingface_hub import list_repo_files
        from huggingface_hub.errors import HfHubHTTPError

        try:
            names = list_repo_files(name_or_path)
        except (HfHubHTTPError, ConnectionError):
            return None  # switched off or not there: loading will say so, or finds the model in its cache
    pickled = sorted(name for name in names if name.endswith(".bin"))
    if not pickled or any(name.endswith(".safetensors") for name in names):
        return None
    return (
        f"it has only .bin weights ({pickled[0]}), which can run code and are not opened. Where you trust their "
        f"origin: hf-lema pack {name_or_path} {Path(name_or_path).name}-safetensors, and give that folder to --models"
    )


def run_rows(args: argparse.Namespace, sources: list[ModelSource]) -> list[Outcome]:
    """Runs the rows one after the other, each alone on the device; those that a stopped duel finished are read."""
    rows = [(source, technique) for source in sources for technique in args.techniques]
    outcomes = []
    for number, (source, technique) in enumerate(rows, start=1):
        name = technique if len(sources) == 1 else f"{short_name(source)} {technique}"
        folder = args.output_dir / name.replace(" ", "-").replace("/", "-")
        folder.mkdir(parents=True, exist_ok=True)
        reason = refuse_pickled(source.name_or_path) or reason_not_to_run(ABLATION[technique], args.device)
        if reason is not None:
            print(f"[{number}/{len(rows)}] {name} skipped: {reason}", flush=True)
            skipped = ContenderResult(name=name, status="skipped", reason=reason)
            outcomes.append(Outcome(result=skipped, details={}, environment={}, wall_s=0.0))
            continue
        outcome = finished_outcome(folder) if args.resume else None
        if outcome is None:
            line = ProgressLine(
                head=f"[{number}/{len(rows)}] {name}", num_steps=args.max_steps, is_terminal=sys.stdout.isatty()
            )
            line.begin()
            outcome = run_contender(task_of(args, source, technique, name, folder), line.show, args.limit_s, SCRIPT)
            line.end(outcome)
        outcomes.append(outcome)
    return outcomes


def short_name(source: ModelSource) -> str:
    """The last part of a hub id or folder."""
    return source.label.split("/")[-1].split(" ")[0]


def task_of(args: argparse.Namespace, source: ModelSource, technique: str, name: str, folder: Path) -> dict[str, Any]:
    """The fields of ``sentiment_row.RowTask``."""
    options = {name: value for name, value in vars(args).items() if name not in OWN_OPTIONS}
    return options | {
        "name": name,
        "model": source.name_or_path,
        "technique": technique,
        "num_warmup_steps": 0,
        "vram_limit_bytes": args.vram_limit,
        "folder": str(folder),
    }


def finished_outcome(folder: Path) -> Outcome | None:
    """What a row wrote that had reached its end."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    written = json.loads(path.read_text(encoding="utf-8"))
    result = ContenderResult.from_json(written["result"])
    return Outcome(result=result, details=written["details"], environment=written["environment"], wall_s=0.0)


def score_row(outcome: Outcome) -> tuple[str, ...]:
    """The line of a row: its scores and its memory."""
    result, details = outcome.result, outcome.details
    if result.status != "ok":
        return (result.name, result.status.replace("_", " "), *["-"] * (len(SCORE_HEAD) - 2))
    after = details["after"]
    shares = [f"{100 * value:.1f} %" for value in (details["before"]["accuracy"], after["accuracy"])]
    shares += [f"{after[name]:.3f}" for name in ("precision", "recall", "f1")]
    reserved, allocated = result.vram_reserved_peak_bytes, result.vram_allocated_peak_bytes
    fragmented = "-" if reserved is None or allocated is None else f"{to_gib(reserved - allocated):.2f}"
    retries = "-" if details["num_alloc_retries"] is None else str(details["num_alloc_retries"])
    return (result.name, *shares, fragmented, retries, f"{to_gib(details['head_room_bytes']):.2f}")


def without_empty_columns(table: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The table, its head first, less the columns in which no row has a figure (fragmented VRAM on a CPU)."""
    kept = [idx for idx in range(len(table[0])) if idx < 2 or any(line[idx] != "-" for line in table[1:])]
    return [tuple(line[idx] for idx in kept) for line in table]


def write_results(args: argparse.Namespace, settings: dict[str, Any], outcomes: list[Outcome]) -> None:
    """Prints the tables and writes results.json, report.md and the pictures."""
    results = [outcome.result for outcome in outcomes]
    environment = next((outcome.environment for outcome in outcomes if outcome.environment), None)
    environment = environment or environment_record()
    details = next((outcome.details for outcome in outcomes if outcome.details), {})
    data = {name: details.get(name) for name in ("words", "num_train", "num_trained", "num_repeated")}
    record = {"settings": settings | data, "environment": environment, "rows": [as_json(row) for row in outcomes]}
    (args.output_dir / "results.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    head, *scores = without_empty_columns([SCORE_HEAD, *(score_row(outcome) for outcome in outcomes)])
    what = [(name, ABLATION[name].summary) for name in args.techniques]
    baseline = results[0].name
    plots = write_plots(results, args.output_dir)
    sections = [
        markdown_table(head, scores),
        SCORE_LEGEND,
        markdown_table(("technique", "what it is"), what, num_words=2),
        "## Time and memory",
    ]
    write_markdown(
        results,
        environment,
        args.output_dir / "report.md",
        settings=settings | data,
        plots=plots,
        baseline_name=baseline,
        title="Sentiment of reviews",
        sections=sections,
    )
    print(f"\n{aligned_table(head, scores)}\n\n{format_table(summarize(results, baseline), baseline)}\n")
    print(*(f"{name}: {summary}" for name, summary in what), SCORE_LEGEND, sep="\n")
    print(f"\nresults.json, report.md and {', '.join(plot.name for plot in plots)} are in {args.output_dir}")


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """While it lasts, SIGTERM is an interrupt, so that the row that runs is told to end its step."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: list[str] | None = None) -> int:
    """Runs the duel; returns 0 if at least one row finished."""
    args = parse_arguments(argv)
    sources = [resolve_model(name) for name in args.models or ([None] if args.small else MODELS)]
    left_out = ("models", "output_dir", "resume", "small", "ablate")
    settings = {name: value for name, value in vars(args).items() if name not in left_out}
    settings |= {"models": [source.label for source in sources], "dataset": Path(args.dataset).name}
    open_run(args.output_dir, settings, resume=args.resume, free=("vram_limit", "limit_s", "save_every"))
    print(f"{', '.join(settings['models'])} on {settings['dataset']}: {args.max_steps} steps a row, on {args.device}")
    try:
        with terminate_as_interrupt():
            outcomes = run_rows(args, sources)
    except KeyboardInterrupt:
        command = command_to_resume("recipes/finetune_sentiment.py", sys.argv[1:] if argv is None else argv)
        print(f"\nStopped; finished rows and the training that ran are kept. To go on:\n    {command}")
        return EXIT_INTERRUPTED
    write_results(args, settings, outcomes)
    return 0 if any(outcome.result.status == "ok" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
