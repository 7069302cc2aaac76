"""Times `merge_and_save` on a named shape against a plain copy of the same bytes on the same disk; one JSON line.

Uses only the public names of hf_lema. The base is a random checkpoint (bench_shapes.py), the adapter a random LoRA on
all linear layers. Every contender begins with the base's pages dropped and ends with its output on the disk (fsync).

    python recipes/bench_merge.py --shape llama-2-7b --num-layers 8 --folder /tmp/bench
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as hf-lema itself does, before torch is imported

import torch
from bench_rates import drop_pages
from bench_shapes import SHAPES, ensure_checkpoint, meta_model, shape_config
from peft import LoraConfig, get_peft_model
from training import DTYPES

from hf_lema import merge_and_save

PIECE_BYTES = 16 << 20


def write_adapter(shape: str, num_layers: int | None, rank: int, folder: Path) -> None:
    """A random LoRA adapter on all linear layers; the base it is made on has no data."""
    base = meta_model(shape_config(shape, num_layers), torch.bfloat16)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    generator = torch.Generator().manual_seed(0)
    state = {
        name.replace(".default", ""): torch.randn(parameter.shape, generator=generator) * 0.01
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    model.save_pretrained(folder, state_dict=state)


def copy_plainly(source: Path, target: Path) -> None:
    """Reads and writes every file in pieces, one after the other."""
    target.mkdir()
    buffer = memoryview(bytearray(PIECE_BYTES))
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as reader, (target / path.name).open("wb", buffering=0) as writer:
            while num_read := reader.readinto(buffer):
                writer.write(buffer[:num_read])


def sync_files(folder: Path) -> None:
    """Puts every file of a folder on the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def timed(base: Path, target: Path, make: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and processor seconds, that a contender takes from a cold base to an output that is on the disk."""
    drop_pages(sorted(base.iterdir()))
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    make()
    sync_files(target)
    seconds = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    shutil.rmtree(target)
    return seconds


def main() -> None:
    """Runs the contenders in turns and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("bench"))
    arguments = parser.parse_args()
    device = torch.device("cpu")
    base = ensure_checkpoint(arguments.shape, arguments.num_layers, arguments.precision, arguments.folder, device)
    adapter, target = arguments.folder / "adapter", arguments.folder / "output"
    for left_over in (adapter, target):
        shutil.rmtree(left_over, ignore_errors=True)
    write_adapter(arguments.shape, arguments.num_layers, arguments.rank, adapter)
    num_bytes = sum(path.stat().st_size for path in base.iterdir())
    contenders: dict[str, Callable[[], object]] = {
        "copy": lambda: copy_plainly(base, target),
        "merge": lambda: merge_and_save(base, adapter, target),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, make in contenders.items():
            seconds[name].append(timed(base, target, make))
    record = {
        "shape": arguments.shape,
        "num_layers": arguments.num_layers,
        "precision": arguments.precision,
        "rank": arguments.rank,
        "num_bytes": num_bytes,
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        **{f"{name}_s": round(statistics.median(s for s, _ in times), 2) for name, times in seconds.items()},
        **{f"{name}_cpu_s": round(statistics.median(s for _, s in times), 2) for name, times in seconds.items()},
        **{f"{name}_all_s": [round(time_s, 2) for time_s, _ in times] for name, times in seconds.items()},
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
