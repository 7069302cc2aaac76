"""The record of where a figure was measured: versions, machine, device, commit.

Responsibility: one flat dictionary that a reader needs to judge or repeat a measurement. Holds no host name, user name
or path. Knows nothing of models or training.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "trl", "datasets", "safetensors")
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),  # cgroup v2
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),  # cgroup v1
)
_GIT_LIMIT_S = 10.0


def environment_record() -> dict[str, str | int | bool | None]:
    """Describe the software, the machine, the device and the commit of this process.

    Returns:
        A flat dictionary, ready for JSON; keys of numbers carry their unit. ``None`` stands for what is not installed,
        not there or not known: a package, a GPU, a git checkout around the package. ``git_dirty`` is true when the
        checkout has changes that no commit holds, results under ``recipes/results`` apart. ``ram_limit_bytes`` is the
        smaller of the machine's RAM and the control group's limit. Touching the GPU's name initialises CUDA.
    """
    record: dict[str, str | int | bool | None] = {
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hf_lema_version": _installed_version("hf_lema"),
        "python_version": platform.python_version(),
    }
    record |= {f"{name}_version": _installed_version(name) for name in _PACKAGES}
    record |= _machine_record()
    record |= _gpu_record()
    record |= _git_record(Path(__file__).resolve().parent)
    return record


def _installed_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine_record() -> dict[str, str | int | bool | None]:
    return {
        "platform": _platform(),
        "cpu_model": _cpu_model(Path("/proc/cpuinfo")),
        "num_cpus": os.cpu_count(),
        "num_cpus_usable": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "num_torch_threads": torch.get_num_threads(),
        "ram_limit_bytes": ram_limit_bytes(),
    }


def _platform() -> str:
    """Such as ``Linux 6.18 x86_64 glibc 2.36``: no more of the kernel's name, which says where a machine is rented."""
    kernel_version = ".".join(platform.release().split(".")[:2])
    library, library_version = platform.libc_ver()
    parts = (platform.system(), kernel_version, platform.machine(), library, library_version)
    return " ".join(part for part in parts if part)


def _cpu_model(cpuinfo: Path) -> str | None:
    """The name on the first ``model name`` line; Arm kernels write none, then what the platform module knows."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return match[1].strip() if match else (platform.processor() or platform.machine() or None)


def ram_limit_bytes() -> int:
    """RAM that this process can have at most: the machine's, or the control group's limit where that is smaller."""
    import psutil

    limit_bytes = int(psutil.virtual_memory().total)
    for path in _CGROUP_LIMITS:
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue  # no such control group here
        if text.isdigit():  # otherwise "max": no limit
            limit_bytes = min(limit_bytes, int(text))
    return limit_bytes


def _gpu_record() -> dict[str, str | int | bool | None]:
    record: dict[str, str | int | bool | None] = {"num_gpus": torch.cuda.device_count()}
    record |= {"gpu_name": None, "gpu_compute_capability": None, "vram_total_bytes": None}
    record |= {"driver_version": _driver_version(Path("/proc/driver/nvidia/version")), "cuda_version": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        record["gpu_name"] = properties.name
        record["gpu_compute_capability"] = f"{properties.major}.{properties.minor}"
        record["vram_total_bytes"] = properties.total_memory
        record["cuda_version"] = torch.version.cuda
    return record


def _driver_version(version_file: Path) -> str | None:
    """The kernel module's version, as in ``NVRM version: NVIDIA UNIX ... Kernel Module  580.159.04  ...``."""
    try:
        text = version_file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    match = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return match[1] if match else None


def _git_record(package_folder: Path) -> dict[str, str | int | bool | None]:
    unknown: dict[str, str | int | bool | None] = {"git_commit": None, "git_dirty": None}
    checkout = package_folder.parent
    top_level = _git(checkout, "rev-parse", "--show-toplevel")
    # An installed package may lie inside another project's checkout (in its virtual environment): not our commit.
    if top_level is None or Path(top_level).resolve() != checkout:
        return unknown
    commit = _git(checkout, "rev-parse", "--verify", "HEAD")
    changes = _git(checkout, "status", "--porcelain", "--", ".", ":(exclude)recipes/results")
    if commit is None or changes is None:
        return unknown
    return {"git_commit": commit, "git_dirty": changes != ""}


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command in a folder; ``None`` where there is no git, no checkout or no commit."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_LIMIT_S, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
