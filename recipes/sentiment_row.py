"""One row of the sentiment duel in a process of its own: reads a task, trains, scores, writes its result.

    python recipes/sentiment_row.py task.json

Follows the protocol of contender.py. A training that dies leaves a checkpoint in the row's folder; the same task with
``resume`` goes on from it.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contender import Task, card_bytes, open_device, settle_memory
from contender_process import PROGRESS_MARK
from contender_result import streamer_details
from duel_data import stack
from label_likelihood import LabelScore, score_labels, tell_labels
from model_builds import LEMA_CONTENDERS, build_model
from resumable import Stop, train_or_keep
from run_record import as_result, figures_of
from sentiment_data import LabelledSplit, load_split, training_tokens
from techniques import ABLATION
from torch import nn
from training import LogCallback, TrainingPlan, stock_trainer
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from hf_lema import MemoryTelemetryCallback, get_streamer
from hf_lema.measuring.telemetry import ProcessMemory, environment_record, read_process_memory
from hf_lema.reporting.contender import json_ready


@dataclass(frozen=True, kw_only=True)
class RowTask(Task):
    """What the parent asks of one row, beside the fields of a contender's task.

    Attributes:
        technique: Name in `techniques.ABLATION`.
        accumulation: Batches that are one optimizer step.
        precision: As in `TrainingPlan`.
        weight_decay: Of AdamW.
        max_grad_norm: Gradients are clipped to it.
        num_held_out: Held-out texts that are labelled, before and after.
        eval_batch_size: Sequences of a forward then.
        save_every: Steps from one checkpoint to the next.
        resume: Go on from the last checkpoint, if there is one.
    """

    technique: str
    accumulation: int
    precision: str
    weight_decay: float
    max_grad_norm: float
    num_held_out: int
    eval_batch_size: int
    save_every: int
    resume: bool

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return Path(self.folder) / "checkpoints"


def run(task: RowTask) -> dict[str, Any]:
    """Scores, trains, scores again; returns the result with its details, ready for JSON."""
    technique = ABLATION[task.technique]
    device = open_device(task)
    plan = TrainingPlan(
        batch_size=task.batch_size,
        max_steps=task.max_steps,
        seed=task.seed,
        lora_rank=task.lora_rank,
        learning_rate=task.learning_rate,
        precision=task.precision,
        device_type=device.type,
        gradient_checkpointing=technique.recompute,
        target_modules=technique.targets,
    )
    assert task.dataset is not None, "the parent names the data set"
    tokenizer = AutoTokenizer.from_pretrained(task.model)
    split = load_split(task.dataset, task.seed)
    num_needed = task.max_steps * task.batch_size * task.accumulation
    dataset = stack(training_tokens(split.train[:num_needed], tokenizer, task.seq_len))
    settle_memory()
    baseline = read_process_memory()
    options = {} if technique.attention is None else {"attn_implementation": technique.attention}
    model = build_model(technique.contender, task.model, plan, device, **options)
    if technique.loftq:
        begin_with_loftq(model, task.model)
    before = score(task, model, tokenizer, split)
    result, details = train(task, plan, model, dataset, baseline)
    details |= {"before": before.to_json(), "after": score(task, model, tokenizer, split).to_json()}
    details |= {"dataset": split.label, "words": split.words, "num_repeated": split.num_repeated}
    details |= {"num_train": len(split.train), "num_trained": num_needed, "precision": plan.precision}
    if technique.contender in LEMA_CONTENDERS:
        details |= streamer_details(model)
        get_streamer(model).close()
    environment = environment_record()
    details["head_room_bytes"] = head_room_bytes(task, result, details["ram_rss_peak_bytes"], environment)
    return {"result": result, "details": details, "environment": environment}


def begin_with_loftq(model: nn.Module, name_or_path: str) -> None:
    """Sets the adapter of a 4-bit model to what the quantization lost, from the full-precision files."""
    from peft import replace_lora_weights_loftq

    replace_lora_weights_loftq(model, model_path=name_or_path if Path(name_or_path).is_dir() else None)


def score(task: RowTask, model: nn.Module, tokenizer: Any, split: LabelledSplit) -> LabelScore:
    """How well the model tells the labels of the held-out texts."""
    texts = split.held_out[: task.num_held_out]
    told = tell_labels(model, tokenizer, texts, split.words, seq_len=task.seq_len, batch_size=task.eval_batch_size)
    return score_labels(told, [text.word for text in texts], split.words)


def train(
    task: RowTask, plan: TrainingPlan, model: nn.Module, dataset: Any, baseline: ProcessMemory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains; returns the result as JSON and the details.

    Raises:
        RuntimeError: The training was interrupted, after its state was kept; other errors come as they were raised.
    """
    start_s = time.perf_counter()
    telemetry_path = Path(task.folder) / "telemetry.jsonl"

    def show(num_steps_done: int, loss: float) -> None:
        figures = {"num_steps_done": num_steps_done, "loss": str(loss), "elapsed_s": time.perf_counter() - start_s}
        print(PROGRESS_MARK + json.dumps(figures), flush=True)

    trainer, collator = stock_trainer(
        model,
        plan,
        dataset,
        task.checkpoints,
        LogCallback(show),
        trim_padding=True,
        gradient_accumulation_steps=task.accumulation,
        weight_decay=task.weight_decay,
        max_grad_norm=task.max_grad_norm,
        save_strategy="steps",
        save_steps=task.save_every,
        save_total_limit=1,
    )
    telemetry = MemoryTelemetryCallback.attach(
        trainer, telemetry_path, vram_limit_bytes=task.vram_limit_bytes, ram_baseline=baseline, console=False
    )
    is_resumed = task.resume and task.checkpoints.is_dir() and any(task.checkpoints.iterdir())
    with telemetry:
        stop = train_or_keep(trainer, resume=is_resumed)
    if stop is not None:
        raise_stop(stop)
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    figures = figures_of(telemetry_path, losses)
    num_batches = task.max_steps * task.accumulation
    result = as_result(
        task.name,
        figures,
        vram_card_bytes=card_bytes(task),
        ram_resident_above_imports_peak_bytes=(
            figures["ram_rss_peak_bytes"] - baseline.rss_bytes if task.device == "cpu" else None
        ),
        batches_sha256=None if is_resumed else collator.digest(num_batches),
        num_trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        notes=[f"Trained in {figures['num_sessions']} sessions."] if is_resumed else [],
    )
    names = ("train_s", "num_alloc_retries", "num_sessions", "ram_rss_peak_bytes")
    return result.to_json(), {name: figures[name] for name in names} | {"technique": ABLATION[task.technique].summary}


def raise_stop(stop: Stop) -> None:
    """Ends the process with the reason; where the training can go on is said first.

    Raises:
        BaseException: What ended the training, or a RuntimeError after an interrupt.
    """
    if stop.checkpoint is not None:
        print(f"What was trained is kept in {stop.checkpoint.name}; --resume goes on from there.", flush=True)
    raise stop.error or RuntimeError(f"stopped after step {stop.num_steps_done}: {stop.reason}")


def head_room_bytes(task: RowTask, result: dict[str, Any], ram_rss_peak_bytes: int, environment: dict[str, Any]) -> int:
    """What was left at the peak: of the limit, else of the card, and without a card of the machine's RAM."""
    if task.device == "cpu":
        return int(environment["ram_limit_bytes"]) - ram_rss_peak_bytes
    if task.vram_limit_bytes is not None:
        return task.vram_limit_bytes - int(result["vram_reserved_peak_bytes"])
    return int(result["vram_card_bytes"]) - int(result["vram_process_peak_bytes"])


def main() -> None:
    """Runs the task named on the command line."""
    task = RowTask(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    output = json.dumps(json_ready(run(task)), allow_nan=False, default=str)
    temporary = task.result_path.with_suffix(".part")
    temporary.write_text(output, encoding="utf-8")
    temporary.rename(task.result_path)


if __name__ == "__main__":
    main()
