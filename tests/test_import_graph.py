"""Imports point one way, the heavy libraries enter where the table says, and importing the package does nothing."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hf_lema"

# Lowest first. A module imports only from those above it in this table; what stands beside its name are the third-party
# packages that it may import. A new file gets its line here.
ROOMS: dict[str, set[str]] = {
    "units": set(),
    "choices": set(),
    "config": set(),
    "schedule": set(),
    "environment": {"torch", "psutil"},
    "staging": set(),
    "layout": {"torch"},
    "safetensors_header": {"torch"},
    "file_set": {"torch"},
    "checkpoint": set(),
    "checkpoint_writer": {"torch"},
    "pack": {"torch"},
    "events": {"torch"},
    "host_memory": {"torch", "psutil"},
    "local_ranks": set(),
    "host_store": {"torch"},
    "quantization": {"torch", "bitsandbytes"},
    "packed_checkpoint": {"torch"},
    "slots": {"torch"},
    "prefetcher": {"torch"},
    "streamer": {"torch"},
    "residency": {"torch"},
    "replay": {"torch"},
    "micro_batch": {"torch"},
    "token_tiles": {"torch"},
    "boundaries": {"torch"},
    "recompute": {"torch"},
    "self_check": {"torch"},
    "layer_proxy": {"torch"},
    "outside": {"torch", "transformers"},
    "pieced_loss": {"torch"},
    "loss": {"torch", "transformers"},
    "conversion": {"torch", "transformers", "packaging"},
    "stock_quantizer": {"torch", "transformers"},
    "layer_tensors": {"torch", "transformers"},
    "source": {"torch", "transformers"},
    "packing": {"torch", "transformers"},
    "locating": {"torch", "transformers", "accelerate", "huggingface_hub"},
    "loading": {"torch", "transformers"},
    "adapter": {"torch", "transformers", "peft"},
    "companion_files": {"transformers"},
    "merging": {"torch", "transformers", "huggingface_hub"},
    "unpickling": {"torch", "transformers", "huggingface_hub"},
    "placement": {"torch", "transformers", "peft", "tqdm"},
    "merge_hook": {"torch", "accelerate"},
    "meter": {"torch"},
    "device_rates": {"torch"},
    "memory_plan": set(),
    "rehearsal": {"torch", "transformers"},
    "blueprint": {"torch", "transformers", "peft"},
    "step_cost": {"torch", "transformers", "peft"},
    "planner": {"torch", "transformers", "peft"},
    "wrapper": {"torch", "transformers", "peft"},
    "plan_table": {"peft"},
    "vram_meter": {"torch", "packaging", "pynvml"},
    "sampler": {"psutil"},
    "records": set(),
    "telemetry": {"torch", "transformers", "tqdm"},
    "curves": set(),
    "contender": set(),
    "verdict": set(),
    "plots": {"matplotlib"},
    "report": set(),
    "repeats": set(),
    "bench_lines": set(),
    "duel_record": set(),
    "headline": set(),
    "memory_bars": set(),
    "chart_style": set(),
    "curve_charts": set(),
    "charts": set(),
    "page": {"plotly"},
    "report_files": set(),
    "machine_rates": {"torch"},
    "machine_facts": {"torch", "psutil", "packaging"},
    "doctor": set(),
    "cli": {"torch", "peft"},
    "__main__": set(),
}
ORDER = list(ROOMS)
DOORWAY = "__init__"  # names lead from here to every room, but only when they are asked for


def imported_modules(source: str) -> set[str]:
    """Full names of every module that a source imports: anywhere in it, inside functions and for types only too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names} if module == PACKAGE.name else {module}
    return names


def own_imports(source: str) -> set[str]:
    """Rooms of the package that a source imports."""
    return {name.split(".")[1] for name in imported_modules(source) if name.startswith(f"{PACKAGE.name}.")}


def third_party_imports(source: str) -> set[str]:
    """Top-level packages that a source imports, less this one and the standard library with its backport."""
    roots = {name.split(".")[0] for name in imported_modules(source)}
    return roots - {PACKAGE.name, "typing_extensions"} - set(sys.stdlib_module_names)


def room_source(room: str) -> str:
    return (PACKAGE / f"{room}.py").read_text(encoding="utf-8")


def test_every_file_of_the_package_has_its_line_in_the_table() -> None:
    files = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")}

    assert files - {DOORWAY} == set(ROOMS)


@pytest.mark.parametrize("room", ORDER)
def test_room_imports_only_from_rooms_above_it(room: str) -> None:
    above = set(ORDER[: ORDER.index(room)])

    assert own_imports(room_source(room)) - above == set()


@pytest.mark.parametrize("room", ORDER)
def test_room_imports_no_library_that_it_must_not_know(room: str) -> None:
    assert third_party_imports(room_source(room)) - ROOMS[room] == set()


def test_libraries_named_in_the_table_are_all_imported() -> None:
    stale = {room: unused for room in ORDER if (unused := ROOMS[room] - third_party_imports(room_source(room)))}

    assert stale == {}


def test_import_inside_a_function_counts() -> None:
    source = "def f():\n    from hf_lema.wrapper import find_streamer\n    import peft.tuners\n    import os.path\n"

    assert own_imports(source) == {"wrapper"}
    assert third_party_imports(source) == {"peft"}


def test_import_of_a_room_from_the_package_itself_counts() -> None:
    assert own_imports("from hf_lema import wrapper") == {"wrapper"}


def in_fresh_interpreter(code: str) -> str:
    """Runs code in a new interpreter and returns what it printed; every warning is an error there."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=PACKAGE.parent,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_importing_the_package_loads_no_third_party_module() -> None:
    printed = in_fresh_interpreter(
        "import sys; before = set(sys.modules)\n"
        "import hf_lema, json\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )

    assert set(json.loads(printed)) - set(sys.stdlib_module_names) == {PACKAGE.name}


def test_importing_the_package_has_no_side_effect() -> None:
    printed = in_fresh_interpreter(
        "import json, logging, os, signal, sys, threading, warnings\n"
        "def state():\n"
        "    return [dict(os.environ), os.getcwd(), threading.active_count(), sys.path[:], len(warnings.filters),\n"
        "            repr(logging.getLogger().handlers), logging.getLogger('hf_lema').level,\n"
        "            repr(signal.getsignal(signal.SIGINT)), repr(sys.excepthook), sorted(os.listdir('/proc/self/fd'))\n"
        "            if os.path.isdir('/proc/self/fd') else None]\n"
        "before = state()\n"
        "import hf_lema\n"
        "after = state()\n"
        "print(json.dumps([[b, a] for b, a in zip(before, after) if b != a]))"
    )

    assert json.loads(printed) == []


def test_help_and_completion_can_list_the_public_names_without_loading_torch() -> None:
    printed = in_fresh_interpreter(
        "import hf_lema, sys; print(sorted(set(hf_lema.__all__) - set(dir(hf_lema))), 'torch' in sys.modules)"
    )

    assert printed.strip() == "[] False"
