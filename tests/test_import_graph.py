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
    "capability": set(),
    "progress": {"tqdm"},
    "environment": {"torch", "psutil"},
    "files/staging": set(),
    "files/layout": {"torch"},
    "files/foreign_json": set(),
    "files/safetensors_header": {"torch"},
    "files/file_set": {"torch"},
    "files/checkpoint": set(),
    "files/base_files": {"tqdm"},
    "files/checkpoint_writer": {"torch"},
    "files/pack": {"torch"},
    "files/trainer_checkpoints": set(),
    "runtime/schedule": set(),
    "runtime/events": {"torch"},
    "runtime/numa": {"torch", "packaging"},
    "runtime/host_memory": {"torch", "psutil"},
    "runtime/local_ranks": set(),
    "runtime/host_store": {"torch"},
    "runtime/mixed_store": {"torch"},
    "runtime/quantization": {"torch", "bitsandbytes"},
    "runtime/packed_checkpoint": {"torch"},
    "runtime/slots": {"torch"},
    "runtime/prefetcher": {"torch"},
    "runtime/streamer": {"torch"},
    "runtime/segments": {"torch"},
    "runtime/residency": {"torch"},
    "layer/swaps": set(),
    "layer/replay": {"torch"},
    "layer/micro_batch": {"torch"},
    "layer/token_tiles": {"torch"},
    "layer/piece_draws": {"torch"},
    "layer/joint_casts": {"torch"},
    "layer/kept_graph": {"torch"},
    "layer/boundaries": {"torch"},
    "layer/visit_options": {"torch"},
    "layer/visit_arguments": {"torch"},
    "layer/layer_weights": {"torch"},
    "layer/recompute": {"torch"},
    "layer/self_check": {"torch"},
    "layer/layer_proxy": {"torch"},
    "model/other_ways": {"torch", "transformers", "accelerate"},
    "model/fixed_buffers": {"torch"},
    "model/lora_inputs": {"torch", "peft"},
    "model/tuner_layers": {"torch", "peft"},
    "model/outside": {"torch", "transformers"},
    "model/pieced_loss": {"torch"},
    "model/loss": {"torch", "transformers"},
    "model/conversion": {"torch", "transformers", "packaging"},
    "model/stock_quantizer": {"torch", "transformers"},
    "model/layer_tensors": {"torch", "transformers"},
    "model/source": {"torch", "transformers"},
    "model/packing": {"torch", "transformers"},
    "model/locating": {"torch", "transformers", "accelerate", "huggingface_hub"},
    "model/loading": {"torch", "transformers", "tqdm"},
    "model/row_merge": {"torch", "peft"},
    "model/adapter": {"torch", "transformers", "peft", "safetensors"},
    "model/placement": {"torch", "transformers", "peft", "tqdm"},
    "model/stores": {"torch", "tqdm"},
    "model/merge_hook": {"torch", "accelerate"},
    "model/unfit": {"torch", "transformers"},
    "planning/meter": {"torch"},
    "planning/device_rates": {"torch"},
    "planning/optimizers": set(),
    "planning/data_parallel": set(),
    "planning/memory_plan": set(),
    "planning/rehearsal": {"torch", "transformers"},
    "planning/blueprint": {"torch", "transformers", "peft"},
    "planning/step_cost": {"torch", "transformers", "peft"},
    "planning/stock_plan": {"peft"},
    "planning/streamed_plans": set(),
    "planning/planner": {"peft"},
    "planning/plan_table": {"peft"},
    "export/companion_files": {"transformers"},
    "export/merging": {"torch", "transformers", "huggingface_hub"},
    "export/unpickling": {"torch", "transformers", "huggingface_hub"},
    "model_runtime": {"torch", "transformers"},
    "wrapper": {"torch", "transformers", "peft"},
    "measuring/vram_meter": {"torch", "packaging", "pynvml"},
    "measuring/sampler": {"psutil"},
    "measuring/records": set(),
    "measuring/base_guard": {"torch"},
    "measuring/step_counters": {"torch"},
    "measuring/full_card": set(),
    "measuring/telemetry": {"torch", "transformers", "tqdm"},
    "reporting/curves": set(),
    "reporting/contender": set(),
    "reporting/verdict": set(),
    "reporting/plots": {"matplotlib"},
    "reporting/report": set(),
    "reporting/repeats": set(),
    "reporting/bench_lines": set(),
    "reporting/duel_record": set(),
    "reporting/headline": set(),
    "reporting/memory_bars": set(),
    "reporting/chart_style": set(),
    "reporting/curve_charts": set(),
    "reporting/label_places": set(),
    "reporting/charts": set(),
    "reporting/page": {"plotly"},
    "reporting/report_files": set(),
    "machine/machine_rates": {"torch"},
    "machine/machine_facts": {"torch", "psutil", "packaging"},
    "machine/doctor": set(),
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
            folder = module == PACKAGE.name or (PACKAGE.parent / module.replace(".", "/")).is_dir()
            names |= {f"{module}.{alias.name}" for alias in node.names} if folder else {module}
    return names


def own_imports(source: str) -> set[str]:
    """Rooms of the package that a source imports."""
    own = (name.split(".")[1:] for name in imported_modules(source) if name.startswith(f"{PACKAGE.name}."))
    return {"/".join(parts) for parts in own}


def third_party_imports(source: str) -> set[str]:
    """Top-level packages that a source imports, less this one and the standard library with its backport."""
    roots = {name.split(".")[0] for name in imported_modules(source)}
    return roots - {PACKAGE.name, "typing_extensions"} - set(sys.stdlib_module_names)


def room_source(room: str) -> str:
    return (PACKAGE / f"{room}.py").read_text(encoding="utf-8")


def test_every_file_of_the_package_has_its_line_in_the_table() -> None:
    files = {path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")}

    assert {file for file in files if Path(file).name != DOORWAY} == set(ROOMS)


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
