"""Starts one contender in its own process, follows it, and turns whatever happens to it into a result.

Knows processes and the contender's protocol (a task file, progress lines, a result file). Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contender_spec import ContenderSpec

from hf_lema.reporting.report import ContenderResult

PROGRESS_MARK = "@progress "
OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA out of memory|MemoryError|can't allocate memory|Cannot allocate memory|CUBLAS_STATUS_ALLOC"
)
ERROR_LINE = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt|Exit)\b")
LAUNCHER_ERROR = re.compile(r"ChildFailedError|SignalException")
RANK_PREFIX = re.compile(r"^\[rank\d+\]: ?")
LAUNCHED_KILLED = re.compile(r"exitcode\s*: -9\b")
"""torchrun's word for a process of its that was killed."""
MAX_REASON_CHARS = 300
KILL_WAIT_S = 10.0
LAUNCHER_STOP_WAIT_S = 45.0
"""torchrun waits 30 s for its processes before it kills them."""
STOP_WAIT_S = 600.0
"""A recipe's row that is interrupted ends its step and writes a checkpoint; a contender just ends."""

Progress = Callable[[int, float, float], None]
"""Called with steps done, loss, and seconds of training."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A contender's result, whether it finished or not.

    Attributes:
        result: The row of the table.
        details: Further figures, empty unless it finished.
        environment: Of its process, empty unless it finished.
        wall_s: From the start of the process to its end.
    """

    result: ContenderResult
    details: dict[str, Any]
    environment: dict[str, Any]
    wall_s: float


def run_contender(task: dict[str, Any], on_progress: Progress, limit_s: float, script: str = "contender.py") -> Outcome:
    """Runs a script of this folder on a task and waits for it.

    Args:
        task: The fields of the script's task, such as ``contender.Task``; ``folder`` exists.
        on_progress: Told of each step.
        limit_s: After so many seconds the process is killed.
        script: Follows the protocol of ``contender.py``.
    """
    folder = Path(task["folder"])
    task_path = folder / "task.json"
    task_path.write_text(json.dumps(task), encoding="utf-8")
    command = [*_launcher(task), str(Path(__file__).with_name(script)), str(task_path)]
    start_s = time.perf_counter()
    was_late = threading.Event()
    losses: list[float] = []
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=_environment(task),
            start_new_session=True,  # an interrupt comes once, from here
        )
        watchdog = threading.Timer(limit_s, _kill_late, (process, was_late))
        watchdog.start()
        try:
            _follow(process, log, losses, on_progress)
        except KeyboardInterrupt:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_WAIT_S)
            raise
        finally:
            watchdog.cancel()
            _end(process)
    wall_s = time.perf_counter() - start_s
    result_path = folder / "result.json"
    if process.returncode == 0 and result_path.is_file():
        written = json.loads(result_path.read_text(encoding="utf-8"))
        result = ContenderResult.from_json(written["result"])
        return Outcome(result=result, details=written["details"], environment=written["environment"], wall_s=wall_s)
    text = (folder / "log.txt").read_text(encoding="utf-8")
    late = f"it was stopped after {limit_s:.0f} s" if was_late.is_set() else None
    result = failed_result(task["name"], process.returncode, text, losses, late)
    return Outcome(result=result, details={}, environment={}, wall_s=wall_s)


def _launcher(task: dict[str, Any]) -> list[str]:
    """Python, or torchrun for several processes and for a contender that needs a process group."""
    num_processes = task.get("num_processes", 1)
    if num_processes == 1 and not (task.get("spec") or {}).get("is_launched"):
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]


def _end(process: subprocess.Popen[str]) -> None:
    """Ends it and what it has launched; does nothing to a process that has ended.

    torchrun puts each of its processes into a session of its own: only torchrun itself can end them, when it is told.
    """
    if process.poll() is None and "torch.distributed.run" in process.args:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LAUNCHER_STOP_WAIT_S)
    process.kill()
    process.wait(KILL_WAIT_S)


def _kill_late(process: subprocess.Popen[str], was_late: threading.Event) -> None:
    was_late.set()
    _end(process)


def _environment(task: dict[str, Any]) -> dict[str, str]:
    """One visible GPU a process: with two, Trainer would wrap in DataParallel. On the CPU, threads that sleep."""
    environment = dict(os.environ)
    num_processes = task.get("num_processes", 1)
    every = ",".join(str(number) for number in range(num_processes))
    visible = environment.get("CUDA_VISIBLE_DEVICES", every).split(",")[:num_processes]
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible) if task["device"] == "cuda" else ""
    environment["TOKENIZERS_PARALLELISM"] = "false"
    if task["device"] == "cpu":
        # By default OpenMP's threads spin at each of a step's thousands of barriers. On two cores that others used too,
        # a step of the default duel took 25 to 74 s so, and 7 to 20 s with threads that sleep: spinning would measure
        # the neighbours. It holds for every contender, and a value that the user set is kept.
        environment.setdefault("OMP_WAIT_POLICY", "passive")
    if task.get("spec") is None:
        return environment
    return environment | dict(ContenderSpec(**task["spec"]).for_device(task["device"]).environment)


def _follow(process: subprocess.Popen[str], log: Any, losses: list[float], on_progress: Progress) -> None:
    assert process.stdout is not None, "started with a pipe"
    for line in process.stdout:
        log.write(line)
        log.flush()
        if line.startswith(PROGRESS_MARK):
            figures = json.loads(line.removeprefix(PROGRESS_MARK))
            losses.append(float(figures["loss"]))
            on_progress(figures["num_steps_done"], losses[-1], figures["elapsed_s"])
    process.wait()


def failed_result(
    name: str, return_code: int, log_text: str, losses: list[float], late: str | None = None
) -> ContenderResult:
    """The row of a contender that did not finish: why, and how far it came.

    Args:
        name: The contender.
        return_code: Of its process; negative is the number of the signal that ended it.
        log_text: Everything that it printed.
        losses: Of the steps that it did.
        late: Why it was stopped from outside, if it was.
    """
    lines = [line.strip() for line in log_text.splitlines() if line.strip()]
    lines = [RANK_PREFIX.sub("", line) for line in lines]
    errors = [line for line in lines if ERROR_LINE.match(line) and not LAUNCHER_ERROR.search(line)]
    error = errors[-1] if errors else lines[-1] if lines else "no output"
    was_killed_below = any(LAUNCHED_KILLED.match(line) for line in lines)
    is_killed = late is None and (return_code == -signal.SIGKILL or was_killed_below)
    if late is not None:
        status, reason = "failed", late
    elif is_killed:
        status, reason = "out_of_memory", "killed from outside, as the kernel does when RAM runs out"
    elif OUT_OF_MEMORY.search(error):
        status, reason = "out_of_memory", error
    else:
        status, reason = "failed", f"exit code {return_code}: {error}"
    if losses:
        reason = f"after {len(losses)} steps: {reason}"
    reason = reason[:MAX_REASON_CHARS]
    return ContenderResult(name=name, status=status, reason=reason, num_steps=len(losses), loss=losses)


def as_json(outcome: Outcome) -> dict[str, Any]:
    """The outcome for ``results.json``: the result's fields, then the details."""
    return outcome.result.to_json() | {"details": outcome.details, "wall_s": outcome.wall_s}
