"""Run in a process of its own, under limits: trains a model from its checkpoint and prints what it met as a JSON line.

Usage: ``python tests/small_machine_case.py CHECKPOINT OUTPUT ROOM_MIB``; ROOM_MIB is how much more address space the
process may take once everything is imported, 0 is no limit. Importing Triton fails here, as where it is not installed.
"""

from __future__ import annotations

import importlib.abc
import json
import resource
import sys
import threading
from pathlib import Path
from typing import Any


class NoTriton(importlib.abc.MetaPathFinder):
    """Stands before all other finders."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NoTriton())

from models import adapt, closing, train  # noqa: E402

from hf_lema import LemaConfig, LemaModelWrapper, get_streamer  # noqa: E402
from hf_lema.machine.doctor import diagnose  # noqa: E402
from hf_lema.machine.machine_facts import probe_machine  # noqa: E402
from hf_lema.runtime.host_memory import PAGE_BYTES  # noqa: E402
from hf_lema.units import MIB  # noqa: E402

STEPS: dict[str, Any] = {"max_steps": 2, "num_examples": 8, "dataloader_num_workers": 2}


def main() -> None:
    checkpoint, output, room_mib = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    facts = probe_machine()
    complaints = {finding.topic: finding.remedy for finding in diagnose(facts=facts) if finding.level != "ok"}
    found: dict[str, Any] = {"complaints": complaints, "memlock_limit_bytes": facts.memlock_limit_bytes}
    if room_mib:
        threading.stack_size(MIB)  # reader threads take address space too: 8 MiB each by default
        size_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (size_bytes + room_mib * MIB, resource.RLIM_INFINITY))
    for quantization in (None, "nf4"):
        config = LemaConfig(vram_budget="min", quantization=quantization)
        model = LemaModelWrapper.from_pretrained(checkpoint, config, device="cpu", attn_implementation="eager")
        with closing(adapt(model)) as peft_model:
            run = train(peft_model, output / str(quantization), **STEPS)
            tier, num_layers = get_streamer(peft_model).host_store.tier, get_streamer(peft_model).num_layers
        found[str(quantization)] = {"tier": tier, "num_layers": num_layers, "losses": run.losses.tolist()}
    found["has_triton"] = "triton" in sys.modules
    print(json.dumps(found))


if __name__ == "__main__":
    main()
