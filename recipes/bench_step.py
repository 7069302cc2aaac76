"""Times one contender on a named model shape with random weights, under the stock Trainer, and prints one JSON line.

    python recipes/bench_step.py --shape llama-2-7b --contender lema --batch-size 8 --seq-len 512 --vram-budget min

The tool behind every figure of speed and memory that the project quotes. All contenders load the same random
checkpoint, which is written once to --checkpoint-dir, and train the same LoRA on the same random tokens.

Under torchrun each process is one card's, trains on its own rows and prints its own line (`bench_group.py` puts them
together); the checkpoint must be there before.

Step times are wall times, the optimizer included. RAM is private RAM (anonymous and shared pages, page-locked ones
among them) above what the process held after imports, device context and model skeleton.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench_rates import disk_rates, drop_pages, pinned_copy_bytes_per_s, resident_fraction
from bench_shapes import SHAPES, checkpoint_files, ensure_checkpoint, meta_model, shape_config
from contender import settle_memory
from contender_result import streamer_details
from host_counters import HostCounters
from model_builds import build_model
from torch import nn
from training import DTYPES, LogCallback, TokenDataset, TrainingPlan, stock_trainer
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from hf_lema import LemaConfig, MemoryTelemetryCallback, StepChoices, get_streamer
from hf_lema.measuring.records import rank_path
from hf_lema.measuring.sampler import read_proportional_private_bytes
from hf_lema.measuring.telemetry import MemorySampler, ProcessMemory, environment_record, read_process_memory
from hf_lema.runtime.local_ranks import LocalGroup
from hf_lema.runtime.numa import node_of_card
from hf_lema.units import parse_bytes

LEMA = ("lema", "lema-nf4")
BENCH_CONTENDERS = ("peft", "peft-no-gc", "qlora", *LEMA)
LEARNING_RATE = 1e-4
NOT_RECORDED = ("checkpoint_dir", "output", "commit", "meet")
MEET_LIMIT_S = 300.0


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the options.

    Raises:
        SystemExit: Options that contradict each other; the message says which.
    """
    parser = argparse.ArgumentParser(description="time one contender on a named shape and print one JSON line")
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--contender", choices=BENCH_CONTENDERS, required=True)
    parser.add_argument("--num-layers", type=int, help="other than the shape's own")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3, help="first steps that no time is taken from")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="fp16 on a GPU (with GradScaler), fp32 on the CPU")
    parser.add_argument("--lora-rank", type=int, default=16, help="alpha is twice the rank")
    parser.add_argument("--targets", default="all-linear", help="all-linear, or names with commas: q_proj,v_proj")
    parser.add_argument("--lora-dropout", type=float, default=0.1)
    parser.add_argument("--vram-budget", default="min", help='lema: "auto", "min", "6GiB" or bytes')
    parser.add_argument("--ram-budget", help='lema: "auto", "min", "2.4GiB" or bytes; by default as --tier says')
    parser.add_argument("--num-slots", type=int, default=2, help="lema")
    parser.add_argument(
        "--choices", metavar="JSON", help="fields of StepChoices instead of the budget's plan; {} for none"
    )
    parser.add_argument("--micro-batch-size", type=int, default=0, help="lema: 0 for the whole batch")
    parser.add_argument(
        "--tier", choices=("ram", "disk", "mixed"), default="ram", help="lema: where layers must stream from"
    )
    parser.add_argument("--checkpoint-dir", type=Path, help="keeps the random checkpoint; by default a temporary one")
    parser.add_argument("--packed", action="store_true", help="start from a checkpoint that is in NF4 already")
    parser.add_argument("--cold", action="store_true", help="drop the files' pages before each pass; needs --tier disk")
    parser.add_argument("--host-counters", action="store_true", help="record what Linux counts of each step")
    parser.add_argument("--vram-limit", type=parse_bytes, help="hold the allocator to a smaller card, such as 16GiB")
    parser.add_argument("--attn", help="attention implementation, such as sdpa or eager")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="state of the sources, where the machine has no git checkout")
    parser.add_argument("--output", type=Path, help="file to which the JSON line is appended")
    parser.add_argument(
        "--meet", nargs=2, metavar=("N", "FOLDER"), help="begin to train when N processes have come to an empty folder"
    )
    args = parser.parse_args(argv)
    if args.cold and (args.contender not in LEMA or args.tier != "disk"):
        parser.error("--cold needs --contender lema --tier disk")
    if args.packed and args.contender not in ("qlora", "lema-nf4"):
        parser.error("--packed needs --contender qlora or lema-nf4")
    if not 0 <= args.warmup < args.steps:
        parser.error(f"--warmup {args.warmup} leaves none of {args.steps} steps")
    args.dtype = args.dtype or ("fp16" if args.device == "cuda" else "fp32")
    if args.device == "cpu" and (args.dtype == "fp16" or args.vram_limit is not None):
        parser.error("fp16 training and --vram-limit need a GPU")
    return args


class ColdCallback(TrainerCallback):
    """Drops the checkpoint's pages before each forward and each backward, and notes what was left of them.

    A layer that the prefetcher has read ahead is in its slot and not read again; what a step reads from the files is
    read after a drop.
    """

    def __init__(self, model: nn.Module, paths: list[Path]) -> None:
        self.paths = paths
        self.drop_s: list[float] = []
        self.resident_fractions: list[float] = []
        model.register_forward_hook(lambda *_: self._drop())

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Before the forward; the forward's own hook serves the backward."""
        self._drop()

    def _drop(self) -> None:
        start_s = time.perf_counter()
        drop_pages(self.paths)
        self.resident_fractions.append(resident_fraction(self.paths))
        self.drop_s.append(time.perf_counter() - start_s)


def lema_config(args: argparse.Namespace) -> LemaConfig:
    """The budgets of the command line; the disk tier is asked for by the least RAM budget."""
    ram_budget = args.ram_budget or ("min" if args.tier == "disk" else "auto")
    budgets = [int(text) if text.isdigit() else text for text in (args.vram_budget, ram_budget)]
    return LemaConfig(
        vram_budget=budgets[0],
        ram_budget=budgets[1],
        num_slots=args.num_slots,
        micro_batch_size=args.micro_batch_size,
        choices=None if args.choices is None else StepChoices(**json.loads(args.choices)),
        quantization="nf4" if args.contender == "lema-nf4" else None,
    )


def random_tokens(args: argparse.Namespace, vocab_size: int) -> TokenDataset:
    """A few batches of random tokens, the loss on all of them; Trainer goes over them again and again."""
    generator = torch.Generator().manual_seed(args.seed)
    shape = (4 * args.batch_size * int(os.environ.get("WORLD_SIZE", "1")), args.seq_len)
    ids = torch.randint(0, vocab_size, shape, generator=generator)
    return TokenDataset(ids, torch.ones_like(ids), ids)


def plan_of(args: argparse.Namespace) -> TrainingPlan:
    """The training that the command line asks for."""
    targets = args.targets if args.targets == "all-linear" else tuple(args.targets.split(","))
    return TrainingPlan(
        batch_size=args.batch_size,
        max_steps=args.steps,
        seed=args.seed,
        lora_rank=args.lora_rank,
        learning_rate=LEARNING_RATE,
        precision=args.dtype,
        device_type=args.device,
        gradient_checkpointing=args.contender != "peft-no-gc",
        target_modules=targets,
        lora_dropout=args.lora_dropout,
    )


def run(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Measures the machine, trains, and returns the record.

    Raises:
        RuntimeError: The layers stream from another tier than the one that was asked for.
    """
    group = LocalGroup.find()
    device = torch.device("cpu")
    if args.device == "cuda":
        device = torch.device("cuda", 0 if group is None else group.rank)
        torch.cuda.set_device(device)
    if args.vram_limit is not None:
        total_bytes = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(args.vram_limit / total_bytes, 1.0), device)
    if group is not None and args.checkpoint_dir is None:
        raise ValueError("several processes need one checkpoint: write it to --checkpoint-dir in a run of one process")
    folder = ensure_checkpoint(
        args.shape,
        args.num_layers,
        args.dtype,
        args.checkpoint_dir or scratch / "checkpoints",
        device,
        args.seed,
        is_packed=args.packed,
    )
    # No paths: a record is read on other machines.
    options = {name: value for name, value in vars(args).items() if name not in NOT_RECORDED}
    start_s = time.perf_counter()
    record = {"options": options} | machine_rates(args, device, folder)
    record["rates_s"] = time.perf_counter() - start_s
    skeleton = meta_model(shape_config(args.shape, args.num_layers), DTYPES[args.dtype])
    settle_memory()
    baseline = read_process_memory()
    del skeleton
    start_s = time.perf_counter()
    with MemorySampler() as sampler:
        model = load(args, folder, device)
        loading = sampler.take_peak()
    record["load_s"] = time.perf_counter() - start_s
    record["ram_loading_private_above_baseline_peak_bytes"] = _above(loading.ram_private_bytes, baseline)
    settle_memory()
    if args.meet is not None:
        meet(int(args.meet[0]), Path(args.meet[1]))
    start_s = time.perf_counter()
    record |= train(args, model, folder, scratch, baseline)
    record["train_s"] = time.perf_counter() - start_s
    if args.contender in LEMA:
        get_streamer(model).close()
    if "pinned_copy_bytes_per_s" in record and "bus_bytes_per_s" in record:
        record["bus_over_pinned_copy_ratio"] = record["bus_bytes_per_s"] / record["pinned_copy_bytes_per_s"]
    record["environment"] = environment_record() | {"stated_commit": args.commit}
    return record


def meet(num_processes: int, folder: Path, limit_s: float = MEET_LIMIT_S) -> None:
    """Waits until so many processes, this one among them, have come to a folder; they share nothing else.

    Raises:
        RuntimeError: Some have not come in time.
    """
    (folder / str(os.getpid())).touch()
    deadline_s = time.monotonic() + limit_s
    while (num_here := len(list(folder.iterdir()))) < num_processes:
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"{num_here} of {num_processes} processes came to {folder} within {limit_s:g} s")
        time.sleep(0.01)


def machine_rates(args: argparse.Namespace, device: torch.device, folder: Path) -> dict[str, Any]:
    """Rates of a plain copy and, for the disk tier, of plain reads, measured before anything is loaded."""
    rates: dict[str, Any] = {}
    if device.type == "cuda":
        rates["pinned_copy_bytes_per_s"] = pinned_copy_bytes_per_s(device)
        torch.cuda.reset_peak_memory_stats(device)
    if args.contender in LEMA and args.tier != "ram":
        rates |= disk_rates(max(checkpoint_files(folder), key=lambda path: path.stat().st_size))
    return rates


def load(args: argparse.Namespace, folder: Path, device: torch.device) -> nn.Module:
    """The contender's model with its adapter."""
    name = "peft" if args.contender == "peft-no-gc" else args.contender
    options: dict[str, Any] = {} if args.attn is None else {"attn_implementation": args.attn}
    config = lema_config(args) if name in LEMA else None
    model = build_model(name, str(folder), plan_of(args), device, config, **options)
    if name in LEMA and get_streamer(model).host_store.tier != args.tier:
        found = get_streamer(model).host_store.tier
        raise RuntimeError(f"the layers stream from the {found} tier, --tier asks for {args.tier}")
    return model


def train(
    args: argparse.Namespace, model: nn.Module, folder: Path, scratch: Path, baseline: ProcessMemory
) -> dict[str, Any]:
    """Trains and returns what was measured."""
    log = LogCallback()
    dataset = random_tokens(args, SHAPES[args.shape]["vocab_size"])
    trainer, collator = stock_trainer(model, plan_of(args), dataset, scratch, log)
    telemetry = MemoryTelemetryCallback.attach(
        trainer, vram_limit_bytes=args.vram_limit, ram_baseline=baseline, console=False
    )
    cold = ColdCallback(model, sorted(get_streamer(model).host_store.paths)) if args.cold else None
    if cold is not None:
        trainer.add_callback(cold)
    host = HostCounters() if args.host_counters else None
    if host is not None:
        trainer.add_callback(host)
    with telemetry:
        trainer.train()
    shared = shared_figures(baseline)
    peak, records = telemetry.peak, telemetry.records
    assert peak is not None, "a finished training has a peak"
    step_s = [record.step_s for record in records]
    figures = (
        peak.to_dict()
        | {
            "step_median_s": statistics.median(step_s[args.warmup :]),
            "step_s": step_s,
            "vram_allocated_step_peak_bytes": [record.vram_allocated_peak_bytes for record in records],
            "loss_first": log.losses[0],
            "loss_last": log.losses[-1],
            "loss": log.losses,
            "ram_file_above_baseline_peak_bytes": _file_above(peak.ram_file_peak_bytes, baseline),
            "num_trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "batches_sha256": collator.digest(args.steps),
        }
        | shared
    )
    if args.contender in LEMA:
        figures |= streaming_figures(args, model, [dataclasses.asdict(record) for record in records])
    if cold is not None:
        figures |= cold_figures(args, cold, figures)
    if host is not None:
        figures["host_steps"] = host.steps
    return figures


def shared_figures(baseline: ProcessMemory) -> dict[str, Any]:
    """Which process this is, and its share of the RAM that all of them take, while all of them hold it."""
    is_group, is_cuda = torch.distributed.is_initialized(), torch.cuda.is_initialized()
    # One that shares its memory with nobody has all of it; what it was forked from holds pages of imports alone.
    proportional_bytes = read_process_memory().private_bytes
    if is_group:
        torch.distributed.barrier()
        proportional_bytes = read_proportional_private_bytes()
        torch.distributed.barrier()
    return {
        "rank": torch.distributed.get_rank() if is_group else 0,
        "num_processes": torch.distributed.get_world_size() if is_group else 1,
        "numa_node_unitless": node_of_card(torch.device("cuda", torch.cuda.current_device())) if is_cuda else None,
        "ram_proportional_above_baseline_bytes": _above(proportional_bytes, baseline),
    }


def cold_figures(args: argparse.Namespace, cold: ColdCallback, figures: dict[str, Any]) -> dict[str, Any]:
    """How cold the passes were, and the disk's rate without the time that dropping and checking the pages took."""
    drop_s = [sum(cold.drop_s[2 * step : 2 * step + 2]) for step in range(args.steps)]
    wall_s = sum(figures["step_s"][args.warmup :]) - sum(drop_s[args.warmup :])
    return {
        "drop_s": drop_s,
        "disk_without_drop_bytes_per_s": sum(figures["disk_bytes"][args.warmup :]) / wall_s,
        "max_resident_fraction_after_drop": max(cold.resident_fractions),
    }


def streaming_figures(args: argparse.Namespace, model: nn.Module, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Bytes moved a step, what the schedule predicts, the rate over the wall time, and the waits."""
    streamer = get_streamer(model)
    h2d_bytes = [record["h2d_bytes"] for record in records]
    timed = records[args.warmup :]
    wall_s = sum(record["step_s"] for record in timed)
    num_transfers = streamer.transfers_per_step()
    figures: dict[str, Any] = streamer_details(model) | {
        "h2d_bytes": h2d_bytes,
        "h2d_predicted_bytes": num_transfers * streamer.layer_bytes,
        "num_transfers_predicted": num_transfers,
        "num_transfers_reused": 2 * streamer.num_streamed - num_transfers,
        "bus_bytes_per_s": sum(record["h2d_bytes"] for record in timed) / wall_s,
        "disk_bytes": [record["disk_bytes"] for record in records],
        "disk_bytes_per_s": sum(record["disk_bytes"] for record in timed) / wall_s,
        "wait_s": [record["wait_s"] for record in records],
        "num_demand_loads": [record["num_demand_loads"] for record in records],
    }
    return figures


def _above(private_bytes: int | None, baseline: ProcessMemory) -> int | None:
    base_bytes = baseline.private_bytes
    return None if private_bytes is None or base_bytes is None else private_bytes - base_bytes


def _file_above(file_bytes: int | None, baseline: ProcessMemory) -> int | None:
    return None if file_bytes is None or baseline.file_bytes is None else file_bytes - baseline.file_bytes


def main(argv: list[str] | None = None) -> None:
    """Runs one measurement and prints its JSON line last."""
    args = parse_arguments(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        record = run(args, Path(scratch))
    line = json.dumps(record, default=str)
    if args.output is not None:
        output = rank_path(args.output, record["rank"])
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    print(line)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
