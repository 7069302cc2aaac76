"""The first experiment: teach a model to answer in the [LEMA_REPLY] format, measure what it learnt, merge, and say so.

    python recipes/finetune_reply.py                 Llama-2-7B in fp16, one epoch of 5,000 examples, on a GPU
    python recipes/finetune_reply.py --small         SmolLM2-135M-Instruct in fp32, on a CPU

Before and after the training the model answers held-out questions, of which no fact is trained on. The loss is on the
reply and the end of text, never on padding: without that a model repeats its tags and does not stop. The adapter, the
merged model and their cards go to --output-dir. A training that dies leaves a checkpoint; --resume goes on from it.
"""

from __future__ import annotations

import os

# Before torch starts its threads. Those of OpenMP spin at barriers by default, which on busy cores costs many times the
# work (recipes/LOG.md); a value that the user set is kept.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import gc
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from contender import settle_memory
from contender_result import streamer_details
from default_model import ModelSource, resolve_model
from duel_data import prepare_data
from model_builds import build_model
from model_card import (
    CardFigures,
    aligned_table,
    figure_rows,
    limits_of,
    question_of,
    run_usage,
    score_rows,
    table_of_run,
    write_card,
)
from reply_check import Reply, generate_replies, judge_reply, score_replies
from reply_data import ReplyExample, make_examples
from resumable import Stop, report_stop, train_or_keep
from run_record import as_result, figures_of, open_run
from torch import nn
from training import LogCallback, TrainingPlan, stock_trainer
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from hf_lema import LemaConfig, MemoryTelemetryCallback, get_streamer, merge_and_save
from hf_lema.measuring.telemetry import ProcessMemory, environment_record, progress_line, read_process_memory
from hf_lema.reporting.report import summarize, write_plots
from hf_lema.units import parse_bytes

MODEL = "NousResearch/Llama-2-7b-hf"
VRAM_BUDGET = "6.36GiB"
"""What the first experiment reports: a card with more is not used further, so that the figures can be compared."""
SMALL = {
    "batch_size": 4,
    "seq_len": 128,
    "num_examples": 400,
    "learning_rate": 1e-3,
    "save_every": 20,
    "trim_padding": True,
    "vram_budget": "min",
    "ram_budget": "min",
}
FREE_ON_RESUME = ("log_every", "save_every", "vram_budget", "ram_budget")
"""Settings that change no number: a run may go on with others, after running out of memory for instance."""
GENERATION_BATCH = 40
VERSIONS = ("hf_lema_version", "torch_version", "transformers_version", "peft_version", "accelerate_version")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the options.

    Raises:
        SystemExit: An option cannot be used; the message says why.
    """
    parser = argparse.ArgumentParser(description="teach a model the [LEMA_REPLY] format and measure what it learnt")
    parser.add_argument("--small", action="store_true", help="SmolLM2-135M-Instruct and a short run, for a CPU")
    parser.add_argument("--model", help=f"hub id or folder; by default {MODEL}")
    parser.add_argument("--precision", choices=("fp16", "bf16", "fp32"), help="fp16 on a GPU, fp32 on a CPU")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512, help="tokens an example; a longer one is left out")
    parser.add_argument("--trim-padding", action="store_true", help="cut off the padding that a whole batch ends with")
    parser.add_argument("--num-examples", type=int, default=5000, help="they are gone over once")
    parser.add_argument("--num-held-out", type=int, default=40, help="questions asked before and after")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--lora-rank", type=int, default=16, help="alpha is twice the rank")
    parser.add_argument("--vram-budget", default=VRAM_BUDGET, help='"auto", "min", a size or bytes')
    parser.add_argument("--ram-budget", default="auto", help="likewise; min streams from disk")
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--save-every", type=int, default=100, help="steps from one checkpoint to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("reply-output"))
    parser.add_argument("--resume", action="store_true", help="go on where the training in --output-dir stopped")
    if parser.parse_known_args(argv)[0].small:
        parser.set_defaults(**SMALL)
    args = parser.parse_args(argv)
    counts = ("batch_size", "seq_len", "num_examples", "num_held_out", "lora_rank", "log_every", "save_every")
    if low := [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in counts if getattr(args, name) < 1]:
        parser.error(f"{', '.join(low)}: expected 1 or more")
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.precision = args.precision or ("fp16" if args.device == "cuda" else "fp32")
    if args.device == "cpu" and args.precision == "fp16":
        parser.error("--precision fp16 needs a GPU: its training goes through GradScaler")
    if args.model is None and not args.small:
        args.model = MODEL
    return args


def settings_of(args: argparse.Namespace, source: ModelSource) -> dict[str, Any]:
    """What was run, for records and for a resume: no local path."""
    left_out = ("model", "output_dir", "resume", "small")
    return {"model": source.label} | {name: value for name, value in vars(args).items() if name not in left_out}


def held_out_examples(args: argparse.Namespace) -> list[ReplyExample]:
    """Questions on facts that are not trained on.

    Raises:
        RuntimeError: One of them is.
    """
    held_out = make_examples(args.num_held_out, args.seed, "held_out")
    trained = {example.key for example in make_examples(args.num_examples, args.seed)}
    if shared := sorted({example.key for example in held_out} & trained):
        raise RuntimeError(f"these held-out facts are trained on too: {', '.join(shared)}")
    return held_out


def ask(args: argparse.Namespace, model: nn.Module, tokenizer: Any, examples: list[ReplyExample]) -> list[Reply]:
    """The model's replies to the held-out questions, each cut at one and a half times the longest reference."""
    lengths = [len(tokenizer(example.reply)["input_ids"]) for example in examples]
    start_s = time.perf_counter()
    replies = generate_replies(
        model,
        tokenizer,
        [example.prompt for example in examples],
        max_new_tokens=max(lengths) * 3 // 2,
        batch_size=GENERATION_BATCH,
    )
    well_formed = sum(judge_reply(reply).well_formed for reply in replies)
    asked_s = time.perf_counter() - start_s
    print(f"{len(replies)} held-out questions in {asked_s:.0f} s: {well_formed} replies well-formed", flush=True)
    return replies


def replies_before(
    args: argparse.Namespace, model: nn.Module, tokenizer: Any, examples: list[ReplyExample]
) -> list[Reply]:
    """As `ask`, once for a run: a resumed one reads what the untrained model said."""
    path = args.output_dir / "replies-before.json"
    if not args.resume:
        replies = ask(args, model, tokenizer, examples)
        path.write_text(json.dumps([vars(reply) for reply in replies], indent=1) + "\n", encoding="utf-8")
    return [Reply(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))]


def lema_config(args: argparse.Namespace) -> LemaConfig:
    """The budgets of the command line."""
    budgets = {
        name: text if text in ("auto", "min") else parse_bytes(text)
        for name, text in (("vram_budget", args.vram_budget), ("ram_budget", args.ram_budget))
    }
    return LemaConfig(**budgets)


def train(
    args: argparse.Namespace, model: nn.Module, dataset: Any, plan: TrainingPlan, baseline: ProcessMemory
) -> dict[str, Any] | Stop:
    """Trains; returns the figures of all steps, those of earlier sessions among them, or why it stopped."""
    telemetry_path = args.output_dir / "telemetry.jsonl"

    def show(num_steps_done: int, loss: float) -> None:
        if num_steps_done % args.log_every == 0 or num_steps_done == plan.max_steps:
            print(progress_line(num_steps_done, plan.max_steps, loss, telemetry.records[-1]), flush=True)

    trainer, _ = stock_trainer(
        model,
        plan,
        dataset,
        args.output_dir / "checkpoints",
        LogCallback(show),
        trim_padding=args.trim_padding,
        save_strategy="steps",
        save_steps=args.save_every,
        save_total_limit=1,
    )
    telemetry = MemoryTelemetryCallback.attach(trainer, telemetry_path, ram_baseline=baseline, console=False)
    with telemetry:
        stop = train_or_keep(trainer, resume=args.resume)
    if stop is not None:
        return stop
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return figures_of(telemetry_path, losses)


def finish(
    args: argparse.Namespace,
    source: ModelSource,
    settings: dict[str, Any],
    figures: dict[str, Any],
    examples: list[ReplyExample],
    replies: dict[str, list[Reply]],
) -> None:
    """Merges the saved adapter, writes pictures, cards and results, runs the usage of the merged model's card."""
    adapter, merged = args.output_dir / "adapter", args.output_dir / "merged"
    if merged.is_dir():
        shutil.rmtree(merged)  # of a session that was stopped after its merge
    start_s = time.perf_counter()
    merge_and_save(source.name_or_path, adapter, merged)
    figures["merge_s"] = time.perf_counter() - start_s
    environment = environment_record()
    card_bytes = torch.cuda.mem_get_info()[1] if args.device == "cuda" else None
    result = as_result("lema", figures, vram_card_bytes=card_bytes)
    plots = [path for path in write_plots([result], args.output_dir) if path.name != "step_time.png"]
    scores = {when: score_replies(said, examples) for when, said in replies.items()}
    card = CardFigures(
        base_label=source.label,
        base_id=source.hub_id,
        table=table_of_run(settings, environment, figures, source.label),
        before=scores["before"],
        after=scores["after"],
        curve=summarize([result])[0].curve_text or "no loss to read",
        question=question_of(examples[0]),
        reply_before=replies["before"][0].text,
        reply_after=replies["after"][0].text,
        limits=limits_of(scores["after"], is_random=source.is_random),
        versions={name.removesuffix("_version"): environment[name] for name in VERSIONS},
    )
    for folder, is_merged in ((adapter, False), (merged, True)):
        write_card(folder, card, plots, is_merged=is_merged)
    said = run_usage(merged)
    record = {"settings": settings, "environment": environment, "table": card.table, "curve": card.curve}
    record |= {when: score.to_json() for when, score in scores.items()}
    record["usage_well_formed"] = judge_reply(Reply(text=said, stopped=True)).well_formed
    record |= {name: value for name, value in figures.items() if name != "samples"}
    (args.output_dir / "results.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    head = ("held-out replies", "before", "after")
    print(f"\n{aligned_table(head, score_rows(scores['before'], scores['after']))}\n")
    print(aligned_table(("", "this run", "first experiment"), figure_rows(card.table)))
    print(f"\n{card.curve}\n\nThe card's usage, run with stock transformers on the merged model, printed:\n{said}\n")
    print(f"adapter, merged model (each with its card), results.json and pictures are in {args.output_dir}")


def main(argv: list[str] | None = None) -> int:
    """Runs the experiment; returns 0 if it reached its end."""
    args = parse_arguments(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    source = resolve_model(args.model)
    settings = settings_of(args, source)
    open_run(args.output_dir, settings, resume=args.resume, free=FREE_ON_RESUME)
    tokenizer = AutoTokenizer.from_pretrained(source.name_or_path)
    data = prepare_data(None, tokenizer, args.seq_len, args.seed, args.num_examples)
    plan = TrainingPlan(
        batch_size=args.batch_size,
        max_steps=data.num_examples // args.batch_size,
        seed=args.seed,
        lora_rank=args.lora_rank,
        learning_rate=args.learning_rate,
        precision=args.precision,
        device_type=args.device,
    )
    examples = held_out_examples(args)
    print(f"{source.label}: {plan.max_steps} steps of {args.batch_size} examples, {args.precision} on {args.device}")
    settle_memory()
    baseline = read_process_memory()
    model = build_model("lema", source.name_or_path, plan, torch.device(args.device), lema_config(args))
    before = replies_before(args, model, tokenizer, examples)
    figures = train(args, model, data.dataset, plan, baseline)
    if isinstance(figures, Stop):
        return report_stop(figures, plan.max_steps, "recipes/finetune_reply.py", sys.argv[1:] if argv is None else argv)
    after = ask(args, model, tokenizer, examples)
    model.save_pretrained(args.output_dir / "adapter")
    details = streamer_details(model)
    get_streamer(model).close()
    del model
    gc.collect()  # the merge and the usage begin with what the model took free again
    if args.device == "cuda":
        torch.cuda.empty_cache()
    finish(args, source, settings, figures | details, examples, {"before": before, "after": after})
    return 0


if __name__ == "__main__":
    sys.exit(main())
