"""Do processes that stream the same file read the disk more than once, and does it help if they begin at other places?

    python recipes/bench_shared_reads.py --folder /tmp --num-processes 2

Each process reads the same layers in the same order through `DiskStore`, from dropped pages, as the ranks of a DDP run
do: at the same time, with one of them a little late, and with each beginning at another window of a layer. Prints one
JSON line: what the disk gave (read_bytes of proc(5)) over the size of the file, and the seconds of the slowest process.
Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import torch
from bench_rates import drop_pages, resident_fraction

from hf_lema.files.file_set import ReadSpan
from hf_lema.files.layout import make_layout
from hf_lema.measuring.telemetry import environment_record
from hf_lema.runtime.host_store import WINDOW_BYTES, DiskStore

FORK = multiprocessing.get_context("fork")
WAYS = {"at the same time": 0.0, "one process late": 0.5, "each at another window": 0.0}


class RotatedStore(DiskStore):
    """Begins each layer at another window than the processes beside it: the same bytes, in another order."""

    shift = 0.0

    def _copy_through_ring(self, out: torch.Tensor, fill: Any) -> None:
        assert self._readers is not None
        begins = list(range(0, out.numel(), WINDOW_BYTES))
        first = int(self.shift * len(begins))
        reads = [
            self._readers.submit(fill, begin, out[begin : begin + WINDOW_BYTES])
            for begin in begins[first:] + begins[:first]
        ]
        for read in reads:
            read.result()


def read_bytes() -> int:
    """What the storage has given to this process."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    raise RuntimeError("/proc/self/io has no read_bytes")


def sweep(path: Path, layer_bytes: int, num_layers: int, shift: float, late_s: float, start: Barrier) -> dict[str, Any]:
    """One process: all layers once, in order."""
    layouts = {i: make_layout(i, {"w": ((layer_bytes,), torch.uint8)}) for i in range(num_layers)}
    spans: dict[int, Sequence[ReadSpan]] = {
        i: (ReadSpan(path=path, file_offset_bytes=i * layer_bytes, nbytes=layer_bytes, layer_offset_bytes=0),)
        for i in range(num_layers)
    }
    store = RotatedStore(layouts, spans, torch.device("cpu"))
    store.shift = shift
    out = torch.empty(layer_bytes, dtype=torch.uint8).fill_(0)
    start.wait(60)
    time.sleep(late_s)
    before, begin_s = read_bytes(), time.perf_counter()
    for i in range(num_layers):
        store.read_into(i, out)
    figures = {"read_bytes": read_bytes() - before, "wall_s": late_s + time.perf_counter() - begin_s}
    store.close()
    return figures


def _child(pipe: Any, *args: Any) -> None:
    pipe.send(sweep(*args))


def measure(path: Path, layer_bytes: int, num_layers: int, num_processes: int, way: str) -> dict[str, Any]:
    """All processes once, from dropped pages."""
    drop_pages([path])
    start, pipes, children = FORK.Barrier(num_processes), [], []
    for rank in range(num_processes):
        here, there = FORK.Pipe(duplex=False)
        shift = rank / num_processes if way == "each at another window" else 0.0
        late_s = WAYS[way] * (rank > 0)
        child = FORK.Process(target=_child, args=(there, path, layer_bytes, num_layers, shift, late_s, start))
        child.start()
        pipes.append(here)
        children.append(child)
    found = [pipe.recv() for pipe in pipes]
    for child in children:
        child.join()
    return {
        "way": way,
        "num_processes": num_processes,
        "disk_over_file_ratio": sum(f["read_bytes"] for f in found) / (layer_bytes * num_layers),
        "disk_share_of_each": [f["read_bytes"] / (layer_bytes * num_layers) for f in found],
        "wall_s": max(f["wall_s"] for f in found),
    }


def main(argv: list[str] | None = None) -> None:
    """Measures every way, several times in turn, and prints the line."""
    parser = argparse.ArgumentParser(description="count what the disk gives to processes that read the same layers")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to be measured")
    parser.add_argument("--num-processes", type=int, default=2)
    parser.add_argument("--layer-mib", type=int, default=256)
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args(argv)
    layer_bytes = args.layer_mib * 2**20
    with tempfile.NamedTemporaryFile(dir=args.folder) as file:
        piece = torch.randint(0, 256, (layer_bytes,), dtype=torch.uint8).numpy().tobytes()
        for _ in range(args.num_layers):
            file.write(piece)
        file.flush()
        path = Path(file.name)
        drop_pages([path])
        left = resident_fraction([path])
        runs = [measure(path, layer_bytes, args.num_layers, 1, "at the same time") for _ in range(args.runs)]
        for _ in range(args.runs):
            runs += [measure(path, layer_bytes, args.num_layers, args.num_processes, way) for way in WAYS]
    size = {"layer_bytes": layer_bytes, "num_layers": args.num_layers, "resident_fraction_after_drop": left}
    print(json.dumps(size | {"runs": runs, "environment": environment_record()}))


if __name__ == "__main__":
    main()
