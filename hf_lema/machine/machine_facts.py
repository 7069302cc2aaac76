"""What this machine says of itself: packages, card, limits, rates. Asked and measured, not judged.

Responsibility: plain answers for `hf_lema.machine.doctor`. Knows nothing of models.
"""

from __future__ import annotations

import importlib.metadata
import resource
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from packaging.requirements import Requirement

from hf_lema.environment import ram_limit_bytes
from hf_lema.machine.machine_rates import DiskRead, LockTry, read_rate, try_bus
from hf_lema.runtime.host_memory import available_host_bytes

USER_EXTRAS = ("qlora", "report", "demo")


@dataclass(frozen=True, kw_only=True)
class PackageFact:
    """One package that is asked for.

    Attributes:
        name: As on the package index.
        requirement: What is asked for, such as ``torch>=2.4``.
        installed: Its version here, or None.
        fits: Whether it is installed in a version that is asked for.
    """

    name: str
    requirement: str
    installed: str | None
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Card:
    """The first visible GPU.

    Attributes:
        name: As the driver calls it.
        capability: Compute capability.
        total_bytes: Its memory.
        free_bytes: Of that, what nobody uses now.
        is_bf16_claimed: What ``torch.cuda.is_bf16_supported`` says, emulation included.
    """

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int
    is_bf16_claimed: bool


@dataclass(frozen=True, kw_only=True)
class MachineFacts:
    """All answers.

    Attributes:
        packages: That hf_lema asks for.
        extras: Those of the extras, by extra.
        torch_version: With its build, such as ``2.13.0+cpu``.
        arch_list: What torch has kernels for, such as ``sm_80`` and ``compute_90``; empty without CUDA.
        num_gpus: Visible to torch.
        has_nvidia_device: Whether the system knows an NVIDIA device, visible to torch or not.
        card: The first GPU, or None.
        memlock_limit_bytes: Soft limit for locked memory; None for no limit.
        page_lock_try: None without a GPU.
        bus_bytes_per_s: Page-locked host memory to the card; None without a GPU or where locking was refused.
        disk: None where no folder was given.
        ram_available_bytes: What this process may still take, its control groups considered.
        ram_limit_bytes: What it may take at most.
        ram_total_bytes: Of the machine.
        shm_bytes: Size of /dev/shm, or None.
    """

    packages: tuple[PackageFact, ...]
    extras: Mapping[str, tuple[PackageFact, ...]]
    torch_version: str
    arch_list: tuple[str, ...]
    num_gpus: int
    has_nvidia_device: bool
    card: Card | None
    memlock_limit_bytes: int | None
    page_lock_try: LockTry | None
    bus_bytes_per_s: float | None
    disk: DiskRead | None
    ram_available_bytes: int
    ram_limit_bytes: int
    ram_total_bytes: int
    shm_bytes: int | None


def probe_machine(folder: str | Path | None = None) -> MachineFacts:
    """Ask and measure; takes about a second, and reads at most 512 MiB.

    Args:
        folder: Where a file is read for the disk's rate; None leaves the disk out.

    Raises:
        ValueError: The folder does not exist, or no file below it has 16 MiB.
    """
    disk = None if folder is None else read_rate(Path(folder))
    packages, extras = required_packages()
    has_card = torch.cuda.is_available()
    card = _first_card() if has_card else None
    arch_list = tuple(torch.cuda.get_arch_list()) if has_card else ()
    page_lock_try, bus_bytes_per_s = (None, None) if card is None else try_bus(has_kernels(arch_list, card.capability))
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shm = Path("/dev/shm")
    return MachineFacts(
        packages=packages,
        extras=extras,
        torch_version=torch.__version__,
        arch_list=arch_list,
        num_gpus=torch.cuda.device_count() if has_card else 0,
        has_nvidia_device=Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists(),
        card=card,
        memlock_limit_bytes=None if soft_limit == resource.RLIM_INFINITY else soft_limit,
        page_lock_try=page_lock_try,
        bus_bytes_per_s=bus_bytes_per_s,
        disk=disk,
        ram_available_bytes=available_host_bytes(),
        ram_limit_bytes=ram_limit_bytes(),
        ram_total_bytes=int(psutil.virtual_memory().total),
        shm_bytes=psutil.disk_usage(str(shm)).total if shm.is_dir() else None,
    )


def required_packages() -> tuple[tuple[PackageFact, ...], dict[str, tuple[PackageFact, ...]]]:
    """What the installed hf_lema asks for, by its own metadata: always, and for each extra that is for users.

    Raises:
        RuntimeError: hf_lema runs from a folder and is not installed, so nobody knows what it asks for.
    """
    try:
        lines = importlib.metadata.requires("hf_lema") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeError("hf_lema is not installed here, only imported from a folder: pip install -e .") from error
    requirements = [Requirement(line) for line in lines]
    always = tuple(package_fact(r) for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""}))
    extras = {
        extra: tuple(
            package_fact(r)
            for r in requirements
            if r.marker is not None and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""})
        )
        for extra in USER_EXTRAS
    }
    return always, extras


def package_fact(requirement: Requirement) -> PackageFact:
    """Whether a requirement is met here."""
    asked = f"{requirement.name}{requirement.specifier}"
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return PackageFact(name=requirement.name, requirement=asked, installed=None, fits=False)
    # A version built from a checkout ("2.14.0.dev0") is newer than the release that is asked for.
    fits = requirement.specifier.contains(installed, prereleases=True)
    return PackageFact(name=requirement.name, requirement=asked, installed=installed, fits=fits)


def has_kernels(arch_list: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a torch that was built for these architectures runs on a card.

    Binary code (``sm_``) runs on cards of the same major capability from its minor upwards; PTX (``compute_``) is
    compiled by the driver for any card from there on. Source: CUDA C++ Programming Guide, "Application Compatibility".

    Args:
        arch_list: As ``torch.cuda.get_arch_list()`` gives them; a letter at the end (``sm_90a``) binds the code to
            exactly that card.
        capability: Of the card.
    """
    return any(_runs_on(arch, capability) for arch in arch_list)


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    kind, _, version = arch.partition("_")
    digits = version.rstrip(string.ascii_lowercase)
    built_for = (int(digits[:-1]), int(digits[-1]))
    if digits != version:
        return built_for == capability
    if kind == "compute":
        return built_for <= capability
    return built_for[0] == capability[0] and built_for[1] <= capability[1]


def _first_card() -> Card:
    properties = torch.cuda.get_device_properties(0)
    free_bytes, total_bytes = torch.cuda.mem_get_info(0)
    return Card(
        name=properties.name,
        capability=(properties.major, properties.minor),
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        is_bf16_claimed=torch.cuda.is_bf16_supported(),
    )
