"""The host's share of a training step: how long the thread that launches kernels works, and how many it launches.

    python recipes/bench_host.py
    python recipes/bench_host.py --rows peft,lema,lema-4 --profile lema-4

Needs no GPU. The model is so small that computing takes no time: what is left is Python and PyTorch's dispatch, the
same as in front of a GPU. Contenders take turns, step by step, and the fastest step of each counts: others may use the
machine meanwhile. Seconds are those that the launching thread ran, so that copies to the device, which another thread
makes here and the bus makes on a GPU, are not in them. An operator that is neither a view nor an allocation counts as
one kernel, which is what it starts on a GPU with few exceptions.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_shapes import shape_config
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from hf_lema import LemaConfig, LemaModelWrapper, StepChoices, get_streamer
from hf_lema.environment import environment_record
from hf_lema.planning.meter import ByteMeter

SEQ_LEN = 16
BATCH_SIZE = 8
COUNTED_LAYERS = (2, 4)
"""Depths whose difference is what one layer launches."""

PEFT, QLORA = "peft", "qlora"
LEMA: dict[str, tuple[StepChoices, bool]] = {
    "lema": (StepChoices(), False),
    "lema-4": (StepChoices(micro_batch_size=4), False),
    "lema-4-whole": (StepChoices(micro_batch_size=4, forward_micro_batch_size=8), False),
    "lema-2": (StepChoices(micro_batch_size=2), False),
    "lema-2-whole": (StepChoices(micro_batch_size=2, forward_micro_batch_size=8), False),
    "lema-ram-4": (StepChoices(micro_batch_size=4, boundaries_in_ram=True, outside_in_ram=True), False),
    "lema-kept": (StepChoices(), False),
    "lema-kept-4": (StepChoices(micro_batch_size=4), False),
    "lema-nf4": (StepChoices(), True),
    "lema-nf4-4": (StepChoices(micro_batch_size=4), True),
}
"""Streamed rows: how they run, and whether their linears are in 4 bits. The number is the micro-batch, of 8 sequences;
"whole" is a forward on all of them, "kept" keeps the activations of every layer."""
ROWS = (PEFT, QLORA, *LEMA)


@dataclass(frozen=True, kw_only=True)
class Launches:
    """Kernels that one layer starts in a step."""

    forward: int
    backward: int


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the options."""
    parser = argparse.ArgumentParser(description="measure the host's share of a training step, without a GPU")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--num-layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15, help="steps of each row; the fastest counts")
    parser.add_argument("--lora-dropout", type=float, default=0.1)
    parser.add_argument("--profile", metavar="ROW", help="print where the time of this row goes instead")
    parser.add_argument("--output", type=Path, help="file to which the JSON line is appended")
    args = parser.parse_args(argv)
    args.rows = args.rows.split(",")
    if unknown := [row for row in [*args.rows, *filter(None, [args.profile])] if row not in ROWS]:
        parser.error(f"unknown rows {unknown}; there are {', '.join(ROWS)}")
    return args


def build(row: str, num_layers: int, lora_dropout: float, folder: Path) -> nn.Module:
    """The row's model with LoRA on all linears, r=16: base in bf16, adapter in fp32, as under Trainer's autocast."""
    checkpoint = folder / str(num_layers)
    if not checkpoint.is_dir():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(shape_config("tiny", num_layers), dtype=torch.bfloat16).save_pretrained(
            checkpoint
        )
    if row == QLORA:
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, quantization_config=four_bits)
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    elif row == PEFT:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    else:
        choices, is_packed = LEMA[row]
        if "kept" in row:
            choices = replace(choices, kept_layers=tuple(range(num_layers)))
        config = LemaConfig(choices=choices, ram_budget="auto", quantization="nf4" if is_packed else None)
        model = LemaModelWrapper.from_pretrained(checkpoint, config, dtype=torch.bfloat16, device="cpu")
    return adapted(model, row, lora_dropout)


def adapted(model: PreTrainedModel, row: str, lora_dropout: float) -> nn.Module:
    """The model with its adapter, and gradient checkpointing where it is stock."""
    if row == QLORA:
        model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    elif row == PEFT:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    torch.manual_seed(1)
    lora = LoraConfig(
        r=16, lora_alpha=32, lora_dropout=lora_dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(model, lora).train()


def stepper(model: nn.Module) -> tuple[Callable[[], torch.Tensor], Callable[[torch.Tensor], None]]:
    """Forward and backward of one step, apart."""
    ids = torch.randint(0, 512, (BATCH_SIZE, SEQ_LEN), generator=torch.Generator().manual_seed(2))

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss

    trainables = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def backward(loss: torch.Tensor) -> None:
        loss.backward()
        for parameter in trainables:
            parameter.grad = None

    return forward, backward


def launches(row: str, lora_dropout: float, folder: Path) -> Launches:
    """What one layer of the row starts, by counting two depths."""
    counts = []
    for num_layers in COUNTED_LAYERS:
        model = build(row, num_layers, lora_dropout, folder)
        forward, backward = stepper(model)
        backward(forward())  # a class is verified at its first visit
        meter = ByteMeter(lambda _: False)
        with meter.measured() as forwards:
            loss = forward()
        with meter.measured() as backwards:
            backward(loss)
        counts.append([sum(kernel.count for kernel in part[0].work) for part in (forwards, backwards)])
        close(model)
    difference = COUNTED_LAYERS[1] - COUNTED_LAYERS[0]
    forward_count, backward_count = ((b - a) // difference for a, b in zip(*counts, strict=True))
    return Launches(forward=forward_count, backward=backward_count)


def close(model: nn.Module) -> None:
    """Ends the streaming of a streamed model."""
    try:
        get_streamer(model).close()
    except ValueError:
        return


def host_seconds(rows: list[str], num_layers: int, repeats: int, dropout: float, folder: Path) -> dict[str, Any]:
    """Row -> (forward, backward) seconds of its fastest step."""
    models = {row: build(row, num_layers, dropout, folder) for row in rows}
    steps = {row: stepper(model) for row, model in models.items()}
    fastest: dict[str, tuple[float, float]] = {}
    for repeat in range(repeats + 1):
        for row, (forward, backward) in steps.items():
            begin_s = time.thread_time()
            loss = forward()
            middle_s = time.thread_time()
            backward(loss)
            seconds = (middle_s - begin_s, time.thread_time() - middle_s)
            if repeat and (row not in fastest or sum(seconds) < sum(fastest[row])):
                fastest[row] = seconds
    for model in models.values():
        close(model)
    return fastest


def profile(row: str, num_layers: int, repeats: int, dropout: float, folder: Path) -> None:
    """Prints the functions in which the row's steps spend their time."""
    model = build(row, num_layers, dropout, folder)
    forward, backward = stepper(model)
    backward(forward())
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(repeats):
        backward(forward())
    profiler.disable()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(45)
    close(model)


def main(argv: list[str] | None = None) -> None:
    """Prints a table and, last, one JSON line."""
    import tempfile

    args = parse_arguments(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if args.profile:
            profile(args.profile, args.num_layers, args.repeats, args.lora_dropout, folder)
            return
        counted = {row: launches(row, args.lora_dropout, folder) for row in args.rows}
        seconds = host_seconds(args.rows, args.num_layers, args.repeats, args.lora_dropout, folder)
    records = {}
    print(f"{'row':14}{'launches a layer':>26}{'host ms a layer':>26}{'against the first row':>24}")
    first = sum(seconds[args.rows[0]])
    for row in args.rows:
        count, (forward_s, backward_s) = counted[row], seconds[row]
        forward_ms, backward_ms = (1e3 * s / args.num_layers for s in (forward_s, backward_s))
        ratio = (forward_s + backward_s) / first
        print(
            f"{row:14}{count.forward:>10} +{count.backward:>5} ={count.forward + count.backward:>6}"
            f"{forward_ms:>10.2f} +{backward_ms:>5.2f} ={forward_ms + backward_ms:>6.2f}{ratio:>24.3f}"
        )
        records[row] = {
            "forward_launches_a_layer": count.forward,
            "backward_launches_a_layer": count.backward,
            "forward_host_s": forward_s,
            "backward_host_s": backward_s,
            "ratio": ratio,
        }
    line = json.dumps(
        {"bench": "host", "options": {k: str(v) for k, v in vars(args).items()}, "rows": records}
        | {"environment": environment_record()},
        default=str,
    )
    if args.output is not None:
        with args.output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
