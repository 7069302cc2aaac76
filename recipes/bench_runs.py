"""Runs of a script, each in a process of its own that begins with the slow imports done; one at a time, or one a card.

The process is a fork of one that has imported what takes long and has done nothing else. Its private memory is counted
as if it had imported that itself (Linux counts a page that is shared since a fork as each process's own). Pages of
mapped files are not: of libraries only what the run itself touches is counted.

Knows processes and cards. Does not know what the script measures, nor what its results are compared with.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

START_METHODS = ("forkserver", "spawn")
PRELOADED = (
    "torch",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint",
    "transformers.modeling_utils",
    "datasets",
)
"""What takes the time when peft, bitsandbytes and transformers' Trainer are imported, without these three themselves:
bitsandbytes 0.50 asks for the card's compute capability when it is imported, peft and the Trainer import it, and where
CUDA is initialised before a fork no child can use it."""


@dataclass(kw_only=True, eq=False)
class Job:
    """One run of the script.

    Attributes:
        name: What the user calls it.
        options: On the script's command line.
        limit_s: Seconds after which it is stopped, with all processes that it has started.
        is_alone: Whether nothing may run beside it.
        group: Jobs of the same number run on the same card.
    """

    name: str
    options: tuple[str, ...]
    limit_s: float = 120.0
    is_alone: bool = False
    group: int = 0


def run_jobs(
    script: Path,
    jobs: Sequence[Job],
    devices: Sequence[str | None] = (None,),
    *,
    start_method: str = "forkserver",
    limit_s: float = float("inf"),
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Runs the script once for every job, in order, and gives each job with its record when it has ended.

    A record is what the script's last line holds, or ``error``; with ``process_s`` (seconds from start to end),
    ``start_method``, ``visible_devices`` and ``num_runs_beside``: of other jobs, at most at once.

    Args:
        script: Prints a JSON object last.
        jobs: The first that may run on an idle card is the next one there.
        devices: A value of ``CUDA_VISIBLE_DEVICES`` for each job that may run at once; None leaves it as it is.
        start_method: ``"forkserver"``, or ``"spawn"`` to import everything anew for each run.
        limit_s: No job begins that may end later than this.
    """
    end_s = time.monotonic() + limit_s
    context: Any = multiprocessing.get_context(start_method)
    if start_method == "forkserver":
        context.set_forkserver_preload(list(PRELOADED))
        if not _leaves_cuda_alone(context):
            print("An import has initialised CUDA, so that no fork can use it: runs import all anew.", flush=True)
            start_method = "spawn"
            context = multiprocessing.get_context(start_method)
    pending, running, homes = list(jobs), dict[str | None, _Running](), dict[int, str | None]()
    try:
        while pending or running:
            for job in [job for job in pending if time.monotonic() + job.limit_s > end_s]:
                pending.remove(job)
                yield job, {"error": "not run: no time left"}
            while (choice := _choose(pending, devices, running, homes)) is not None:
                job, device = choice
                pending.remove(job)
                homes[job.group] = device
                running[device] = _Running(context, script, job, device)
                for beside in running.values():
                    beside.num_beside = max(beside.num_beside, len(running) - 1)
            first_s = min((run.end_s for run in running.values()), default=0.0)
            wait([run.process.sentinel for run in running.values()], max(0.0, first_s - time.monotonic()))
            for device in [device for device, run in running.items() if run.is_over]:
                run = running.pop(device)
                yield run.job, run.end() | {"start_method": start_method}
    finally:
        for run in running.values():
            run.end()


def _leaves_cuda_alone(context: Any) -> bool:
    """Starts the process that does the imports, and says whether a fork of it can use CUDA."""
    probe = context.Process(target=_exit_by_cuda)
    name, before = "PYTORCH_NVML_BASED_CUDA_CHECK", os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK")
    os.environ[name] = "1"  # PyTorch's inductor asks for a card when it is imported; NVML answers without the driver
    try:
        probe.start()
    finally:
        del os.environ[name]
        os.environ |= {} if before is None else {name: before}
    probe.join()
    return bool(probe.exitcode == 0)


def _exit_by_cuda() -> None:
    sys.exit(1 if sys.modules["torch"].cuda._is_in_bad_fork() else 0)


def _choose(
    pending: Sequence[Job],
    devices: Sequence[str | None],
    running: dict[str | None, _Running],
    homes: dict[int, str | None],
) -> tuple[Job, str | None] | None:
    """The job that begins now, and its card; None where all must wait."""
    heads: list[tuple[Job, str | None]] = []
    for device in devices:
        mine = (job for job in pending if homes.get(job.group, device) == device)
        if device not in running and (head := next(mine, None)) is not None:
            heads.append((head, device))
    # One that must be alone goes first: what begins beside it meanwhile would have it wait for ever.
    heads.sort(key=lambda head: not head[0].is_alone)
    if not heads or any(run.job.is_alone for run in running.values()) or (running and heads[0][0].is_alone):
        return None
    return heads[0]


class _Running:
    """The process of a job."""

    def __init__(self, context: Any, script: Path, job: Job, device: str | None) -> None:
        self.job = job
        self.num_beside = 0
        self._environment = dict(os.environ) | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device})
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        for path in self._outputs:
            path.touch()
        self._begin_s = time.monotonic()
        self.end_s = self._begin_s + job.limit_s
        args = (str(script), job.options, self._environment, *map(str, self._outputs))
        self.process = context.Process(target=_run_script, args=args)
        self.process.start()

    @property
    def is_over(self) -> bool:
        """Whether it has ended, or must."""
        return not self.process.is_alive() or time.monotonic() >= self.end_s

    def end(self) -> dict[str, Any]:
        """Stops it if it has not ended, and returns its record."""
        is_late = self.process.is_alive()
        if is_late:
            self._kill()
        self.process.join()
        stdout, stderr = (path.read_text(encoding="utf-8", errors="replace").strip() for path in self._outputs)
        self._folder.cleanup()
        if is_late:
            record = {"error": f"stopped after {self.job.limit_s:.0f} s"}
        elif self.process.exitcode != 0 or not stdout:
            last = (stderr.splitlines() or ["no output"])[-1]
            record = {"error": f"exit code {self.process.exitcode}: {last}"}
        else:
            record = json.loads(stdout.splitlines()[-1])
        visible = self._environment.get("CUDA_VISIBLE_DEVICES")
        seconds = time.monotonic() - self._begin_s
        return record | {"process_s": seconds, "visible_devices": visible, "num_runs_beside": self.num_beside}

    def _kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group of its own yet
            self.process.kill()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def _run_script(script: str, options: Sequence[str], environment: dict[str, str], stdout: str, stderr: str) -> None:
    """What the child does: the script, as if it had been started on a command line."""
    os.setsid()  # a group that can be stopped as a whole; nothing that ends the parent reaches it any more
    threading.Thread(target=_end_with_parent, name="end_with_parent", daemon=True).start()
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        with open(path, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *options]
    sys.path.insert(0, str(Path(script).parent))
    runpy.run_path(script, run_name="__main__")
