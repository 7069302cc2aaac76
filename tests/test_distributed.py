"""Several processes under a launcher: what stock PEFT gives under DDP, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TRANSFORMERS_5

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

# Trainer of transformers 4 cannot resume on several CPU processes: it asks torch for the device "cpu:0".
CASES = ("unused", "used", *(("resumed",) if TRANSFORMERS_5 else ()), "accelerate_loop")
SCRIPT = Path(__file__).with_name("distributed_cases.py")


def launch(folder: Path, num_processes: int, *cases: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder), *cases], capture_output=True, text=True, timeout=380, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]


def assert_equal(found: Any, expected: Any, where: str) -> None:
    """Equality of nested dicts and lists of tensors and numbers."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_equal(found[key], value, f"{where}/{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_equal(found[i], value, f"{where}/{i}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


def assert_all_equal(folder: Path, num_processes: int, case: str) -> None:
    stock = [torch.load(folder / f"{case}-stock-{rank}.pt") for rank in range(num_processes)]
    for order in ("wrap-peft", "peft-wrap"):
        for rank in range(num_processes):
            assert_equal(torch.load(folder / f"{case}-{order}-{rank}.pt"), stock[rank], f"{order} rank {rank}")
    # The ranks saw different rows and hold the same adapter: gradients were averaged.
    assert not torch.equal(stock[0]["losses"], stock[1]["losses"])
    assert_equal(stock[1]["trainables"], stock[0]["trainables"], "stock")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch(folder, 2, *CASES, "loaded")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_what_stock_gives_under_ddp(case: str, two_processes: Path) -> None:
    assert_all_equal(two_processes, 2, case)


@pytest.mark.skipif(not TRANSFORMERS_5, reason="Trainer of transformers 4 cannot resume on several CPU processes")
def test_a_checkpoint_is_written_once_and_holds_what_stock_writes(two_processes: Path) -> None:
    stock, streamed = (torch.load(two_processes / f"resumed-{order}-0.pt") for order in ("stock", "wrap-peft"))
    assert streamed["files"] == stock["files"]
    assert "adapter_model.safetensors" in stock["files"]


def test_processes_that_load_a_checkpoint_share_one_copy_and_train_as_stock_does(two_processes: Path) -> None:
    stock, streamed = (
        [torch.load(two_processes / f"loaded-{order}-{rank}.pt") for rank in (0, 1)] for order in ("stock", "wrap-peft")
    )
    memory = [found.pop("memory") for found in streamed]
    assert memory[0] == memory[1]
    assert "memfd:hf_lema" in memory[0][0]
    for rank in (0, 1):
        assert_equal(streamed[rank], stock[rank], f"rank {rank}")


def test_a_merge_into_weights_that_other_processes_read_is_refused(two_processes: Path) -> None:
    for rank in (0, 1):
        found = torch.load(two_processes / f"loaded-peft-wrap-{rank}.pt")
        assert "share one copy" in found["refused"]


@pytest.mark.slow
def test_four_processes_give_what_stock_gives_under_ddp(tmp_path: Path) -> None:
    launch(tmp_path, 4, "used", "accelerate_loop")
    for case in ("used", "accelerate_loop"):
        assert_all_equal(tmp_path, 4, case)
