"""Several processes under a launcher: what stock PEFT gives under DDP, bit for bit."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import distributed_cases
import pytest
import torch
from models import NUM_LAYERS, TRANSFORMERS_5

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

# Trainer of transformers 4 cannot resume on several CPU processes: it asks torch for the device "cpu:0".
CASES = (
    "unused",
    "used",
    *(("resumed",) if TRANSFORMERS_5 else ()),
    "accelerate_loop",
    "accelerate_loop_unused",
    "sft",
)
SCRIPT = Path(__file__).with_name("distributed_cases.py")


def torchrun(num_processes: int, *options: str) -> list[str]:
    """The launcher's command for this machine."""
    options = options or ("--standalone",)
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={num_processes}", *options]


def accelerate_launch(num_processes: int) -> list[str]:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1"]
    return [*command, f"--num_processes={num_processes}", "--mixed_precision=no", "--dynamo_backend=no"]


def launch(folder: Path, command: list[str], *cases: str) -> None:
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
    num_saves = [found.pop("num_saves") for found in stock if "num_saves" in found]
    assert num_saves in ([], [1, *[0] * (num_processes - 1)]), "one process writes the checkpoint, once"
    for order in ("wrap-peft", "peft-wrap"):
        for rank in range(num_processes):
            found = torch.load(folder / f"{case}-{order}-{rank}.pt")
            assert found.pop("num_saves", 0) == (num_saves[rank] if num_saves else 0)
            assert_equal(found, stock[rank], f"{order} rank {rank}")
    # The ranks saw different rows and hold the same adapter: gradients were averaged.
    if "losses" in stock[0]:
        assert not torch.equal(stock[0]["losses"], stock[1]["losses"])
    assert_equal(stock[1]["trainables"], stock[0]["trainables"], "stock")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch(folder, torchrun(2), *CASES, "counted", "loaded", "nf4")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_what_stock_gives_under_ddp(case: str, two_processes: Path) -> None:
    assert_all_equal(two_processes, 2, case)


@pytest.mark.parametrize("order", distributed_cases.ORDERS)
def test_how_ddp_is_set_changes_no_number(order: str, two_processes: Path) -> None:
    set_by_trainer, set_by_hand = (torch.load(two_processes / f"{case}-{order}-0.pt") for case in ("unused", "used"))
    assert set_by_hand.pop("num_values_reduced")
    assert_equal(set_by_hand, set_by_trainer, order)


@pytest.mark.parametrize("case", ["used", "accelerate_loop", "accelerate_loop_unused"])
def test_accumulated_gradients_are_reduced_once_a_step_and_only_the_adapters(case: str, two_processes: Path) -> None:
    found = torch.load(two_processes / f"{case}-wrap-peft-0.pt")
    num_steps = 4
    num_trainable = sum(tensor.numel() for tensor in found["trainables"].values())
    assert len(found["losses"]) == 2 * num_steps, "two backwards a step"
    assert len(found["num_values_reduced"]) % num_steps == 0
    assert sum(found["num_values_reduced"]) == num_steps * num_trainable


@pytest.fixture(scope="module")
def counted(two_processes: Path) -> dict[str, list[str]]:
    """What the first of two processes starts in a step."""
    found = {order: torch.load(two_processes / f"counted-{order}-0.pt") for order in distributed_cases.ORDERS}
    operators = {order: one.pop("operators") for order, one in found.items()}
    for order, one in found.items():
        assert_equal(one, found["stock"], order)
    return operators


def test_a_streamed_step_has_the_collectives_of_stock_without_the_buffers(counted: dict[str, list[str]]) -> None:
    stock, *streamed = (Counter(name for name in one if name.startswith("c10d::")) for one in counted.values())
    assert stock["c10d::broadcast_"] == 1
    assert stock["c10d::allreduce_"] > 0
    for found in streamed:
        assert found == stock - Counter({"c10d::broadcast_": 1})


def test_a_group_adds_to_a_streamed_step_what_it_adds_to_stock_without_the_buffers(
    counted: dict[str, list[str]], tmp_path: Path
) -> None:
    added = {}
    for order, operators in counted.items():
        alone = distributed_cases.counted(order, tmp_path / order)["operators"]
        group = Counter(name for name in operators if name.startswith("aten::"))
        added[order] = group - Counter(name for name in alone if name.startswith("aten::"))
    # One copy into a bucket and one out of it for each gradient, and what the buffers' broadcast takes.
    num_gradients = counted["stock"].count("torch::distributed::reducer::mul_out")
    assert num_gradients == 2 * 4 * NUM_LAYERS
    stock, *streamed = added.values()
    assert stock["aten::copy_"] >= 2 * num_gradients
    for found in streamed:
        assert found <= stock
        assert found["aten::flatten_dense_tensors"] == 0
        assert stock["aten::flatten_dense_tensors"] == 1
        assert (stock - found).total() < num_gradients


def test_gradients_go_to_ddp_layer_by_layer_in_the_backward(counted: dict[str, list[str]]) -> None:
    names = {"RecomputeBackward": "visit", "torch::distributed::reducer::mul_out": "gradient"}
    for order in ("wrap-peft", "peft-wrap"):
        found = [names[name] for name in counted[order] if name in names]
        assert found == ["visit", *["gradient"] * 8] * NUM_LAYERS


@pytest.mark.skipif(not TRANSFORMERS_5, reason="Trainer of transformers 4 cannot resume on several CPU processes")
def test_one_process_takes_up_the_checkpoint_of_two_as_stock_does(two_processes: Path, tmp_path: Path) -> None:
    expected, *streamed = (
        distributed_cases.resume(order, tmp_path / order, two_processes / f"resumed-{order}-run" / "checkpoint-2")
        for order in distributed_cases.ORDERS
    )
    for found in streamed:
        assert_equal(found, expected, "one process")
    assert len(expected["losses"]) == 4


@pytest.mark.skipif(not TRANSFORMERS_5, reason="Trainer of transformers 4 cannot resume on several CPU processes")
def test_a_checkpoint_is_written_once_and_holds_what_stock_writes(two_processes: Path) -> None:
    stock, streamed = (torch.load(two_processes / f"resumed-{order}-0.pt") for order in ("stock", "wrap-peft"))
    assert streamed["files"] == stock["files"]
    assert "adapter_model.safetensors" in stock["files"]


@pytest.mark.parametrize("case", ["loaded", "nf4"])
def test_processes_that_load_a_checkpoint_share_one_copy_and_train_as_stock_does(
    case: str, two_processes: Path
) -> None:
    stock, streamed = (
        [torch.load(two_processes / f"{case}-{order}-{rank}.pt") for rank in (0, 1)] for order in ("stock", "wrap-peft")
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


# ---- other launches, each with its own processes ----


@pytest.mark.slow
def test_four_processes_give_what_stock_gives_under_ddp(tmp_path: Path) -> None:
    cases = ("unused", "used", "accelerate_loop", "sft")
    launch(tmp_path, torchrun(4), *cases)
    for case in cases:
        assert_all_equal(tmp_path, 4, case)


@pytest.mark.slow
@pytest.mark.skipif(not TRANSFORMERS_5, reason="Trainer of transformers 4 cannot resume on several CPU processes")
def test_four_processes_take_up_the_checkpoint_of_two_as_stock_does(two_processes: Path) -> None:
    launch(two_processes, torchrun(4), "resumed_by_others")
    assert_all_equal(two_processes, 4, "resumed_by_others")


@pytest.mark.slow
def test_accelerate_launch_gives_what_stock_gives(tmp_path: Path) -> None:
    cases = ("used", "accelerate_loop", "loaded")
    launch(tmp_path, accelerate_launch(2), *cases)
    for case in cases[:2]:
        assert_all_equal(tmp_path, 2, case)
    stock, streamed = (torch.load(tmp_path / f"loaded-{order}-1.pt") for order in ("stock", "wrap-peft"))
    assert streamed.pop("memory") == torch.load(tmp_path / "loaded-wrap-peft-0.pt")["memory"]
    assert_equal(streamed, stock, "rank 1")


@pytest.mark.slow
def test_two_machines_have_a_copy_each_and_train_as_one_group(tmp_path: Path) -> None:
    where = ("--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}")
    machines = [
        subprocess.Popen(
            [*torchrun(2, *where, f"--node_rank={machine}"), str(SCRIPT), str(tmp_path), "used", "loaded"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for machine in (0, 1)
    ]
    said = [machine.communicate(timeout=380)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said[0][-3000:] + said[1][-3000:]
    assert_all_equal(tmp_path, 4, "used")
    stock, streamed = (
        [torch.load(tmp_path / f"loaded-{order}-{rank}.pt") for rank in range(4)] for order in ("stock", "wrap-peft")
    )
    first, second, third, fourth = (found.pop("memory") for found in streamed)
    assert first == second
    assert third == fourth
    assert first[1] != third[1], "each machine has its own copy"
    for rank in range(4):
        assert_equal(streamed[rank], stock[rank], f"rank {rank}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.mark.slow
def test_a_process_that_is_killed_in_training_ends_the_launch(tmp_path: Path) -> None:
    begin_s = time.monotonic()
    done = subprocess.run(
        [*torchrun(3), str(SCRIPT), str(tmp_path), "killed"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL) received by PID" in done.stderr
    assert time.monotonic() - begin_s < 110
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path) in _text(path)]


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended meanwhile
        return ""


@pytest.mark.slow
def test_a_process_that_is_killed_in_training_is_an_error_of_the_others_also_without_a_launcher(
    tmp_path: Path,
) -> None:
    port = str(free_port())
    group = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path), "killed"],
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(3)
    ]
    try:
        assert ranks[2].wait(120) == -signal.SIGKILL
        assert [rank.wait(30) for rank in ranks[:2]] == [0, 0], "the error came within seconds, and was caught"
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank in (0, 1):
        found = torch.load(tmp_path / f"killed-wrap-peft-{rank}.pt")
        assert "Connection" in found["error"]
        assert found["num_losses"] == 2
        # What the dead one had mapped is gone: two processes hold the copy between them.
        assert found["memory"]["Pss"] >= found["memory"]["Rss"] * 0.49
