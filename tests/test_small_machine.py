"""What free machines lack: no Triton, no bf16, 64 KiB of locked memory, a tiny /dev/shm, no RAM for the layers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ORDERS, STOCK, assert_same_run, build, closing, prepare, train
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

from training import TrainingPlan, precision_for, training_arguments  # noqa: E402

ROOM_MIB = 640
"""Address space that the child may take beyond its imports: less than is left free for the process (1 GiB), so that no
layer may rest in RAM."""
TINY_SHM = "mount -t tmpfs -o size=1m tmpfs /dev/shm && ulimit -l 64 && exec "
"""In a mount namespace of the child's own."""


def can_mount() -> bool:
    """Whether this process may have a mount namespace; containers without that right exist."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*in_namespace(), "true"], capture_output=True, check=False).returncode == 0


def in_namespace() -> list[str]:
    return ["unshare", "--map-root-user", "--mount", "sh", "-c", TINY_SHM + '"$0" "$@"']


def run_case(checkpoint: Path, output: Path, room_mib: int, prefix: list[str]) -> dict[str, Any]:
    command = [*prefix, sys.executable, str(ROOT / "tests/small_machine_case.py"), str(checkpoint), str(output)]
    # One malloc arena: each thread's own would reserve 64 MiB of address space.
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "MALLOC_ARENA_MAX": "1",
        "HF_LEMA_CACHE": str(output / "cache"),
    }
    done = subprocess.run(
        [*command, str(room_mib)], capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    build(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


@pytest.mark.timeout(600)
def test_training_on_a_small_machine_is_that_on_a_large_one(checkpoint: Path, tmp_path: Path) -> None:
    small = run_case(checkpoint, tmp_path / "small", ROOM_MIB, in_namespace() if can_mount() else [])
    large = run_case(checkpoint, tmp_path / "large", 0, [])

    assert (small["None"]["tier"], large["None"]["tier"]) == ("disk", "ram")
    for quantization in ("None", "nf4"):
        assert small[quantization]["losses"] == large[quantization]["losses"]
        assert len(small[quantization]["losses"]) == 2
    assert not small["has_triton"]
    if can_mount():
        assert small["memlock_limit_bytes"] == 64 * 1024
        assert "--shm-size" in small["complaints"]["shm"]


@pytest.mark.parametrize("order", ORDERS)
def test_attention_by_the_math_kernel_is_that_of_the_resident_model(order: str, tmp_path: Path) -> None:
    runs = {}
    for name in (STOCK, order):
        # Grouped queries without a mask: what sm_60 and sm_75 have no other kernel for. On the CPU it can be asked for.
        with closing(prepare(name, build(attn_implementation="sdpa"))) as model, sdpa_kernel(SDPBackend.MATH):
            checkpointing = {"gradient_checkpointing": True} if name == STOCK else {}
            runs[name] = train(model, tmp_path / name, **checkpointing)

    assert_same_run(runs[order], runs[STOCK])


@pytest.mark.parametrize(("capability", "precision"), [((6, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16")])
def test_recipes_take_fp16_where_bf16_is_only_emulated_and_say_that_bf16_is_off(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
    assert precision_for(torch.device("cuda", 0)) == precision

    if precision == "fp16":
        fields = {"batch_size": 1, "max_steps": 1, "seed": 0, "lora_rank": 4, "learning_rate": 1e-4}
        plan = TrainingPlan(**fields, precision=precision, device_type="cpu")
        arguments = training_arguments(plan, tmp_path)
        assert (arguments.fp16, arguments.bf16) == (True, False)
