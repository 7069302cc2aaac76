"""``hf-lema doctor``: what of this machine keeps hf_lema from working, or from working fast, and what to do about it.

Responsibility: judging and wording. What the machine says of itself comes from `hf_lema.machine.machine_facts`, so that
each judgement can be tested with the answers of another machine. Changes nothing and writes no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_lema.capability import BF16_CAPABILITY, FOUR_BIT_CAPABILITY
from hf_lema.machine.machine_facts import Card, MachineFacts, PackageFact, has_kernels, probe_machine
from hf_lema.units import GIB, MIB, format_bytes

Level = Literal["ok", "warning", "problem"]

# A ring of two 0.4 GiB layers, the least that streaming from disk page-locks for a 7B model.
_SMALL_LOCK_BYTES = GIB
# Docker gives 64 MiB; DataLoader workers pass batches through it.
_SMALL_SHM_BYTES = 512 * MIB
# PCIe 3 x8 with page-locked memory.
_SLOW_BUS_BYTES_PER_S = 6e9
# Below this a step of a 7B model streamed from disk takes more than a minute.
_SLOW_DISK_BYTES_PER_S = 0.4e9
_SMALL_RAM_BYTES = 4 * GIB
# A 7B model's layers in half precision.
_SEVEN_B_BYTES = 12 * GIB


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ``ok``, ``warning`` (works, but slowly or only in part) or ``problem`` (will not work).
        topic: What was looked at, in a word or two.
        found: What was found, with the figure.
        remedy: What to do; empty where nothing needs doing.
    """

    level: Level
    topic: str
    found: str
    remedy: str = ""


def diagnose(folder: str | Path | None = None, *, facts: MachineFacts | None = None) -> tuple[Finding, ...]:
    """Look at this machine.

    Args:
        folder: A folder with a checkpoint: the rate at which its largest file is read is measured. Nothing is written.
        facts: Answers to judge instead of this machine's.

    Raises:
        ValueError: The folder does not exist or holds no file of some size to read.
    """
    facts = probe_machine(folder) if facts is None else facts
    judges: tuple[Callable[[MachineFacts], list[Finding]], ...] = (
        _packages,
        _extras,
        _card,
        _page_lock,
        _bus,
        _disk,
        _ram,
        _shared_memory,
    )
    return tuple(finding for judge in judges for finding in judge(facts))


def exit_status(findings: Sequence[Finding]) -> int:
    """1 if there is a problem, else 0."""
    return int(any(finding.level == "problem" for finding in findings))


def format_findings(findings: Sequence[Finding]) -> str:
    """The findings for a terminal, one each, with the remedy below; a last line counts them. Plain text, no colour."""
    marks = {"ok": "ok     ", "warning": "warning", "problem": "PROBLEM"}
    width = max((len(finding.topic) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.level]}  {finding.topic.ljust(width)}  {finding.found}")
        if finding.remedy:
            lines.append(f"{' ' * (len(marks['ok']) + width + 4)}-> {finding.remedy}")
    counts = [(level, sum(finding.level == level for finding in findings)) for level in ("problem", "warning")]
    words = [f"{count} {level}{'s' if count > 1 else ''}" for level, count in counts if count]
    return "\n".join([*lines, "", ", ".join(words) if words else "nothing to complain of"])


def findings_as_dict(findings: Sequence[Finding]) -> dict[str, Any]:
    """The same for JSON."""
    return {
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "num_problems": sum(finding.level == "problem" for finding in findings),
        "num_warnings": sum(finding.level == "warning" for finding in findings),
    }


# ---- packages ----


def _packages(facts: MachineFacts) -> list[Finding]:
    findings = []
    for package in facts.packages:
        if package.fits:
            findings.append(Finding(level="ok", topic=package.name, found=str(package.installed)))
            continue
        found = f"{package.installed or 'not installed'}; hf_lema asks for {package.requirement}"
        remedy = f'pip install "{package.requirement}"'
        findings.append(Finding(level="problem", topic=package.name, found=found, remedy=remedy))
    return findings


def _extras(facts: MachineFacts) -> list[Finding]:
    findings = []
    for extra, packages in facts.extras.items():
        lacking = [package for package in packages if not package.fits]
        if lacking:
            found = f"not complete: {', '.join(_shortcoming(package) for package in lacking)}"
            finding = Finding(level="warning", topic=f"[{extra}]", found=found, remedy=_install(extra))
        else:
            names = ", ".join(f"{package.name} {package.installed}" for package in packages)
            finding = Finding(level="ok", topic=f"[{extra}]", found=names)
        findings.append(finding)
    return findings


def _shortcoming(package: PackageFact) -> str:
    return f"{package.requirement} ({package.installed or 'not installed'})"


def _install(extra: str) -> str:
    purposes = {"qlora": "4-bit contender", "report": "plots and page", "demo": "recipes"}
    return f'for the {purposes.get(extra, extra)}: pip install "hf_lema[{extra}]"'


# ---- the card ----


def _card(facts: MachineFacts) -> list[Finding]:
    if facts.card is None:
        if facts.has_nvidia_device:
            found = f"an NVIDIA device is there, but torch {facts.torch_version} sees none"
            remedy = "install a torch with CUDA (pytorch.org/get-started), or a driver that is new enough for it"
            return [Finding(level="problem", topic="GPU", found=found, remedy=remedy)]
        found = "none: training runs on the CPU, layers stream from disk"
        return [Finding(level="warning", topic="GPU", found=found)]
    card = facts.card
    capability = f"{card.capability[0]}.{card.capability[1]}"
    text = (
        f"{card.name}, {format_bytes(card.total_bytes)} ({format_bytes(card.free_bytes)} free), capability {capability}"
    )
    findings = [Finding(level="ok", topic="GPU", found=text), _kernels(facts, card), _bf16(card)]
    if card.capability < FOUR_BIT_CAPABILITY:
        findings.append(_four_bit(card))
    if facts.num_gpus > 1:
        found = f"{facts.num_gpus} are visible; without a launcher Trainer would use DataParallel, which is refused"
        remedy = "CUDA_VISIBLE_DEVICES=0, or a launcher such as torchrun"
        findings.append(Finding(level="warning", topic="GPUs", found=found, remedy=remedy))
    return findings


def _kernels(facts: MachineFacts, card: Card) -> Finding:
    if has_kernels(facts.arch_list, card.capability):
        return Finding(level="ok", topic="kernels", found=f"torch {facts.torch_version} has them for this card")
    major, minor = card.capability
    found = f"torch {facts.torch_version} has none for sm_{major}{minor}; it has {', '.join(facts.arch_list)}"
    remedy = "install a torch that is built for it; for Pascal (P100) and Volta that is the build for CUDA 12.6 "
    remedy += "(pytorch.org/get-started)"
    return Finding(level="problem", topic="kernels", found=found, remedy=remedy)


def _bf16(card: Card) -> Finding:
    if card.capability >= BF16_CAPABILITY:
        return Finding(level="ok", topic="bf16", found="computed by the card")
    emulated = " (torch emulates it, slowly)" if card.is_bf16_claimed else ""
    remedy = "train with dtype=torch.float16 and fp16=True; SFTConfig defaults to bf16, so say it there too"
    return Finding(level="warning", topic="bf16", found=f"not computed by this card{emulated}", remedy=remedy)


def _four_bit(card: Card) -> Finding:
    needed = ".".join(map(str, FOUR_BIT_CAPABILITY))
    found = (
        f"bitsandbytes has no kernels below capability {needed}; this card has {'.'.join(map(str, card.capability))}"
    )
    return Finding(level="warning", topic="4 bits", found=found, remedy="leave quantization out: fp16 layers stream")


# ---- memory and rates ----


def _page_lock(facts: MachineFacts) -> list[Finding]:
    limit = facts.memlock_limit_bytes
    text = "no limit" if limit is None else f"a limit of {format_bytes(limit)}"
    advice = "ulimit -l unlimited; in Docker --ulimit memlock=-1; in WSL the memory of .wslconfig"
    if facts.page_lock_try is not None:
        size = format_bytes(facts.page_lock_try.num_bytes)
        if not facts.page_lock_try.is_allowed:
            found = f"CUDA could not lock {size} ({text}): copies run at a fraction of the bus rate"
            return [Finding(level="warning", topic="page-lock", found=found, remedy=advice)]
        return [Finding(level="ok", topic="page-lock", found=f"{size} locked and given back ({text})")]
    if facts.has_nvidia_device and limit is not None and limit < _SMALL_LOCK_BYTES:
        # CUDA's driver may lock beyond it, but containers and WSL with such a limit are those that refuse.
        found = f"{text}, and torch sees no GPU to try it with"
        return [Finding(level="warning", topic="page-lock", found=found, remedy=advice)]
    return [Finding(level="ok", topic="page-lock", found=f"{text}; no GPU here to try it with")]


def _bus(facts: MachineFacts) -> list[Finding]:
    if facts.bus_bytes_per_s is None:
        return []
    found = f"{facts.bus_bytes_per_s / 1e9:.1f} GB/s from page-locked memory to the card"
    step_s = 2 * _SEVEN_B_BYTES / facts.bus_bytes_per_s
    found += f": a 7B model in half precision, all streamed, takes {step_s:.1f} s a step at least"
    if facts.bus_bytes_per_s < _SLOW_BUS_BYTES_PER_S:
        remedy = "look whether the card sits in a slot of full width; more tokens a step hide a slow bus"
        return [Finding(level="warning", topic="bus", found=found, remedy=remedy)]
    return [Finding(level="ok", topic="bus", found=found)]


def _disk(facts: MachineFacts) -> list[Finding]:
    if facts.disk is None:
        return []
    rate = facts.disk.bytes_per_s
    found = f"{rate / 1e9:.2f} GB/s over {format_bytes(facts.disk.num_bytes)} of {facts.disk.file_name}"
    if facts.disk.resident_fraction > 0.5:
        found += (
            f", {100 * facts.disk.resident_fraction:.0f} % of it from the page cache: the disk itself may be slower"
        )
    if rate < _SLOW_DISK_BYTES_PER_S:
        remedy = "copy the checkpoint to a local SSD; a network folder is read again in every step"
        return [Finding(level="warning", topic="disk", found=found, remedy=remedy)]
    return [Finding(level="ok", topic="disk", found=found)]


def _ram(facts: MachineFacts) -> list[Finding]:
    found = f"{format_bytes(facts.ram_available_bytes)} free of {format_bytes(facts.ram_limit_bytes)}"
    if facts.ram_limit_bytes < facts.ram_total_bytes:
        found += f" that this control group may have ({format_bytes(facts.ram_total_bytes)} in the machine)"
    if facts.ram_available_bytes < _SMALL_RAM_BYTES:
        remedy = 'close what else runs; ram_budget="min" keeps only a small ring of layers in RAM'
        return [Finding(level="warning", topic="RAM", found=found, remedy=remedy)]
    if facts.ram_available_bytes < _SEVEN_B_BYTES:
        found += "; the layers of a 7B model in half precision (12 GiB) will be read from disk"
    return [Finding(level="ok", topic="RAM", found=found)]


def _shared_memory(facts: MachineFacts) -> list[Finding]:
    if facts.shm_bytes is None:
        return []
    found = f"{format_bytes(facts.shm_bytes)} at /dev/shm"
    if facts.shm_bytes < _SMALL_SHM_BYTES:
        remedy = "DataLoader workers need it: in Docker --shm-size=2g, or dataloader_num_workers=0"
        return [Finding(level="warning", topic="shm", found=found, remedy=remedy)]
    return [Finding(level="ok", topic="shm", found=found)]
