r"""A long run that must stay flat: training with evaluation and saving in between, the process measured all along.

Trains a LoRA adapter on a random model of a named shape with the stock Trainer. After warm-up, VRAM, page-locked bytes,
threads and open handles must not change by one, private RAM must not grow by more than a stated bound, and every loss
must be finite. The exit status is 1 where that does not hold. The record is one JSON file. ``--tier stock`` is the
control: the same run of stock PEFT, with nothing streamed.

    python recipes/soak.py --device cpu --steps 10000 --tier disk --output soak-disk.json
    python recipes/soak.py --device cuda --shape llama-2-7b --num-layers 4 --batch-size 8 --seq-len 512 --steps 2000 \
        --tier disk --output soak-h100-disk.json      # and once more with --tier ram
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bench_shapes import SHAPES, ensure_checkpoint
from footprint import Footprint, private_growth_bytes, read_footprint, what_grew
from model_builds import build_model
from random_data import NUM_EXAMPLES, random_data
from torch import nn
from training import TrainingPlan, precision_for, training_arguments
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hf_lema import LemaConfig, get_streamer, last_whole_checkpoint
from hf_lema.measuring.telemetry import environment_record
from hf_lema.units import MIB, format_bytes

NUM_SAMPLES = 100
WARM_UP_SHARE = 0.1
NUM_EVALUATIONS = 20
NUM_EVAL_EXAMPLES = 8
RAM_BUDGETS = {"ram": "auto", "disk": "min"}
STOCK = "stock"


def options_from(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tier", choices=(*RAM_BUDGETS, STOCK), default="disk")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("--max-growth-mib", type=float, default=8.0, help="most that private RAM may grow in all")
    parser.add_argument("--folder", type=Path, help="for the model and the checkpoints; a temporary one by default")
    parser.add_argument("--output", type=Path, default=Path("soak.json"))
    options = parser.parse_args(argv)
    if options.steps < NUM_SAMPLES:
        parser.error(f"--steps must be at least {NUM_SAMPLES}: so many samples are taken")
    if options.batch_size > NUM_EXAMPLES // 2:
        parser.error(f"--batch-size must be at most {NUM_EXAMPLES // 2}: an epoch's first step is never measured")
    return options


class Probe(TrainerCallback):
    """Measures the process between two steps of an epoch, at an even pace, and keeps every logged loss.

    Never before an epoch's first step: Trainer's loop over an epoch holds the last step's loss and gradient norm, two
    tensors of 512 bytes in VRAM, and a new epoch begins without them.
    """

    def __init__(self, model: nn.Module | None, num_steps: int) -> None:
        self.steps: list[int] = []
        self.footprints: list[Footprint] = []
        self.losses: list[float] = []
        self._model = model
        self._every = num_steps // NUM_SAMPLES
        self._begins_epoch = True

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The next step is an epoch's first."""
        self._begins_epoch = True

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before a step's forward: the last step's gradients are gone, and what was saved or evaluated is over."""
        is_due = state.global_step // self._every > len(self.steps)
        if is_due and not self._begins_epoch:
            self.steps.append(state.global_step)
            self.footprints.append(read_footprint(self._model))
        self._begins_epoch = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Takes losses of training and of evaluation."""
        self.losses += [float(value) for name, value in (logs or {}).items() if name in ("loss", "eval_loss")]

    def after_warm_up(self) -> list[Footprint]:
        """The footprints by which the run is judged."""
        return self.footprints[math.ceil(len(self.footprints) * WARM_UP_SHARE) :]


def soak(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Runs it.

    Args:
        options: The command line.
        folder: Where the model and the checkpoints lie.

    Returns:
        The record; ``faults`` lists in words what was not flat or not finite.
    """
    device = torch.device(options.device)
    precision = precision_for(device)
    checkpoint = ensure_checkpoint(options.shape, options.num_layers, precision, folder, device)
    plan = TrainingPlan(
        batch_size=options.batch_size,
        max_steps=options.steps,
        seed=0,
        lora_rank=8,
        learning_rate=1e-4,
        precision=precision,
        device_type=device.type,
    )
    if options.tier == STOCK:
        model = build_model("peft", str(checkpoint), plan, device)
    else:
        config = LemaConfig(vram_budget="min", ram_budget=RAM_BUDGETS[options.tier])
        model = build_model("lema", str(checkpoint), plan, device, config)
    data = random_data(SHAPES[options.shape]["vocab_size"], options.seq_len, seed=0).dataset
    every = max(1, options.steps // NUM_EVALUATIONS)
    arguments = training_arguments(
        plan, folder / "checkpoints", eval_strategy="steps", eval_steps=every, save_strategy="steps", save_steps=every,
        save_total_limit=2, logging_steps=max(1, options.steps // NUM_SAMPLES), per_device_eval_batch_size=2,
    )  # fmt: skip
    probe = Probe(None if options.tier == STOCK else model, options.steps)
    evaluated = torch.utils.data.Subset(data, range(NUM_EVAL_EXAMPLES))
    trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=evaluated, callbacks=[probe])
    trainer.remove_callback(PrinterCallback)
    begin_s = time.perf_counter()
    trainer.train()
    train_s = time.perf_counter() - begin_s
    faults = what_grew(probe.after_warm_up(), int(options.max_growth_mib * MIB))
    moved: dict[str, Any] = {"host_tier": STOCK}
    if options.tier != STOCK:
        streamer = get_streamer(model)
        stats = streamer.stats()
        streamer.close()
        moved = {"host_tier": streamer.host_store.tier, "disk_bytes": stats.disk_bytes, "h2d_bytes": stats.h2d_bytes}
        if streamer.pinned_bytes:
            faults.append(f"{streamer.pinned_bytes} bytes were page-locked after close()")
    if not all(map(math.isfinite, probe.losses)):
        faults.append("a loss was not finite")
    if last_whole_checkpoint(arguments.output_dir) is None:
        faults.append("no whole checkpoint was left")
    return {
        "settings": {name: value for name, value in vars(options).items() if name not in ("folder", "output")},
        "environment": environment_record(),
        "load_average": os.getloadavg()[0],
        "num_steps": trainer.state.global_step,
        "train_s": train_s,
        "loss_first": probe.losses[0],
        "loss_last": probe.losses[-1],
        "num_losses": len(probe.losses),
        "private_growth_bytes": private_growth_bytes(probe.after_warm_up()),
        "faults": faults,
        **moved,
        "steps": probe.steps,
        "footprints": {
            name: [asdict(each)[name] for each in probe.footprints] for name in Footprint.__dataclass_fields__
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it, writes the record and says how it went; the exit status."""
    options = options_from(argv)
    with tempfile.TemporaryDirectory(prefix="soak-") as temporary:
        record = soak(options, options.folder or Path(temporary))
    options.output.write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(
        f"{record['num_steps']} steps in {record['train_s']:.0f} s, layers in {record['host_tier']}; "
        f"loss {record['loss_first']:.4f} to {record['loss_last']:.4f}; "
        f"private RAM grew by {format_bytes(record['private_growth_bytes'])} after warm-up"
    )
    for fault in record["faults"]:
        print(f"NOT FLAT: {fault}")
    return 1 if record["faults"] else 0


if __name__ == "__main__":
    gc.collect()
    gc.freeze()  # what the imports left: every later collection would walk it again (0.3 s)
    sys.exit(main())
